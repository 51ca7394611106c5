"""Metrics, by the libraries that the field uses; each names itself where it is not installed."""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dualroute.errors import UserError
from dualroute.tasks.data.spans import is_wide, plain, units

_PACKAGES = {
    "sklearn": "scikit-learn",
    "rouge_score": "rouge-score",
}


def library(module: str, extra: str = "tasks") -> Any:
    """An optional library.

    Raises:
        UserError: It is not installed; names it and the extra that has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        name = _PACKAGES.get(package, package)
        raise UserError(
            f"this needs the library {name}, which is not installed ({error}): pip install -e '.[{extra}]'"
        ) from error


def classification_metrics(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """accuracy, macro F1, Matthews' correlation of classes, and F1 of the last class where there are two
    (GLUE's, of MRPC)."""
    metrics = library("sklearn.metrics")
    classes = sorted({*targets, *predictions})
    found = {
        "accuracy": float(metrics.accuracy_score(targets, predictions)),
        "macro_f1": float(metrics.f1_score(targets, predictions, average="macro", zero_division=0.0)),
        "matthews": float(metrics.matthews_corrcoef(targets, predictions)),
    }
    found["f1"] = found["macro_f1"]
    if len(classes) == 2:
        found["f1"] = float(metrics.f1_score(targets, predictions, pos_label=classes[-1], zero_division=0.0))
    return found


def number_metrics(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Spearman's and Pearson's correlation (0 where one side does not vary), mean squared error."""
    stats, metrics = library("scipy.stats"), library("sklearn.metrics")
    varies = len(set(targets)) > 1 and len(set(predictions)) > 1
    return {
        "spearman": float(stats.spearmanr(targets, predictions).statistic) if varies else 0.0,
        "pearson": float(stats.pearsonr(targets, predictions).statistic) if varies else 0.0,
        "mse": float(metrics.mean_squared_error(targets, predictions)),
    }


def tag_metrics(targets: Sequence[list[str]], predictions: Sequence[list[str]]) -> dict[str, float]:
    """F1, precision and recall of whole entities (conlleval's, by seqeval) and accuracy of tags; of tags that
    are no BIO macro averages over tags instead."""
    right = sum(
        t == p for ts, ps in zip(targets, predictions, strict=True) for t, p in zip(ts, ps, strict=True)
    )
    accuracy = {"accuracy": right / max(sum(map(len, targets)), 1)}
    if not any(tag.startswith(("B-", "I-")) for tags in targets for tag in tags):
        flat = [[tag for tags in some for tag in tags] for some in (targets, predictions)]
        found = library("sklearn.metrics").precision_recall_fscore_support(
            *flat, average="macro", zero_division=0.0
        )
        return dict(zip(("precision", "recall", "f1"), map(float, found[:3]), strict=True)) | accuracy
    seqeval = library("seqeval.metrics")
    lists = [list(map(list, targets)), list(map(list, predictions))]
    names = {"f1": "f1_score", "precision": "precision_score", "recall": "recall_score"}
    return {
        name: float(getattr(seqeval, function)(*lists, zero_division=0)) for name, function in names.items()
    } | accuracy


def answer_metrics(targets: Sequence[list[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and F1, each the best over a question's answers, between 0 and 1.

    As SQuAD 1.1's official script defines them (words, without case, articles and punctuation); answers in
    scripts without spaces as CMRC 2018's does (characters, F1 of the longest common subsequence of them).
    """
    exact = f1 = 0.0
    for answers, said in zip(targets, predictions, strict=True):
        pairs = [_of_answer(answer, said) for answer in answers]
        exact += max(pair[0] for pair in pairs)
        f1 += max(pair[1] for pair in pairs)
    count = max(len(predictions), 1)
    return {"f1": f1 / count, "exact_match": exact / count}


def _of_answer(answer: str, said: str) -> tuple[float, float]:
    if sum(map(is_wide, answer)) * 2 > len(answer):
        ours, theirs = (units(plain(text)) for text in (said, answer))
        common = _longest_common(ours, theirs)
    else:
        ours, theirs = (_squad_words(text) for text in (said, answer))
        common = sum((Counter(ours) & Counter(theirs)).values())
    exact = float(ours == theirs)
    if not common:
        return exact, exact
    precision, recall = common / len(ours), common / len(theirs)
    return exact, 2 * precision * recall / (precision + recall)


def _squad_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common substring, which is what CMRC's script calls a subsequence."""
    best, lengths = 0, [0] * (len(theirs) + 1)
    for one in ours:
        before = 0
        for k, other in enumerate(theirs, start=1):
            before, lengths[k] = lengths[k], before + 1 if one == other else 0
            best = max(best, lengths[k])
    return best


def text_metrics(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """BLEU (sacreBLEU, its Chinese tokenizer where the targets are Chinese), chrF, ROUGE-1, -2 and -L (F1,
    between 0 and 1), and the share of answers that are the target to the letter."""
    sacrebleu, rouge = library("sacrebleu"), library("rouge_score.rouge_scorer")
    letters = "".join(targets)
    chinese = sum(map(is_wide, letters)) * 4 > len(letters)
    said, answers = list(predictions), [list(targets)]
    scorer = rouge.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Units() if chinese else None)
    scores = [scorer.score(target, one) for target, one in zip(targets, said, strict=True)]
    return {
        "bleu": float(sacrebleu.corpus_bleu(said, answers, tokenize="zh" if chinese else "13a").score),
        "chrf": float(sacrebleu.corpus_chrf(said, answers).score),
        **{
            name: sum(float(score[name].fmeasure) for score in scores) / max(len(scores), 1)
            for name in ("rouge1", "rouge2", "rougeL")
        },
        "exact_match": sum(t == p for t, p in zip(targets, said, strict=True)) / max(len(said), 1),
    }


class _Units:
    """A tokenizer for rouge-score, whose own drops all but Latin letters."""

    def tokenize(self, text: str) -> list[str]:
        return units(text.lower())
