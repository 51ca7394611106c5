"""Trivial predictions that a model has to beat; scikit-learn does the work where there is any."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.tasks.data.spans import is_wide, units
from dualroute.tasks.metrics import answer_metrics, library

#: Answers of so many words are tried by :func:`overlap_answers`, on so many training questions.
_ANSWER_WORDS, _QUESTIONS = range(1, 13), 200


def majority(targets: Sequence[Any]) -> Any:
    """The commonest target, the first of equals."""
    return Counter(targets).most_common(1)[0][0]


Histories = Sequence[Sequence[int]]


def popular(train: Histories, asked: Histories, items: int) -> Iterator[NDArray[Any]]:
    """Scores of items, for each asked user: how often an item is in the training."""
    counts = np.bincount([item for history in train for item in history], minlength=items)
    for _ in asked:
        yield counts.astype(np.float64)


def cosine_neighbours(train: Histories, asked: Histories, items: int) -> Iterator[NDArray[Any]]:
    """Scores of items, for each asked user: the sum of their cosines with the user's own, an item being the
    set of its users."""
    sparse = library("scipy.sparse")
    users = np.repeat(np.arange(len(train)), [len(history) for history in train])
    of = np.array([item for history in train for item in history], dtype=np.int64)
    matrix = sparse.csr_matrix((np.ones(len(of)), (users, of)), shape=(len(train), items))
    matrix.data[:] = 1.0  # a pair that is there twice was added up
    sizes = np.sqrt(np.maximum(np.asarray(matrix.sum(0)).ravel(), 1.0))
    matrix = matrix.multiply(1 / sizes[None]).tocsr()
    for history in asked:
        own = np.bincount(list(history), minlength=items) > 0
        yield np.asarray(matrix.T @ (matrix @ own.astype(np.float64))).ravel()


def nearest_centroid(features: Sequence[Any], targets: Sequence[str], asked: Sequence[Any]) -> list[str]:
    """The class whose mean of features is nearest to those of ``asked``."""
    neighbors = library("sklearn.neighbors")
    model = neighbors.NearestCentroid().fit(list(features), list(targets))
    return [str(name) for name in model.predict(list(asked))]


def tfidf_classifier(texts: Sequence[str], targets: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Classes of ``asked`` by logistic regression on TF-IDF of words and pairs of words, or of characters
    where words are not divided by spaces."""
    linear_model, pipeline = library("sklearn.linear_model"), library("sklearn.pipeline")
    model = pipeline.make_pipeline(_tfidf(texts), linear_model.LogisticRegression(C=10.0, max_iter=1000))
    model.fit(list(texts), list(targets))
    return [str(name) for name in model.predict(list(asked))]


def tfidf_cosine_classifier(
    pairs: Sequence[tuple[str, str]], targets: Sequence[str], asked: Sequence[tuple[str, str]]
) -> list[str]:
    """Classes of pairs of texts by logistic regression on one number, the cosine of their TF-IDF.

    Words and their frequencies are those of both parts: what two texts share may be a name that the training
    does not have. Labels are those of ``pairs`` alone.
    """
    texts = [text for pair in (*pairs, *asked) for text in pair]
    vectorizer = _tfidf(texts).fit(texts)

    def cosines(some: Sequence[tuple[str, str]]) -> NDArray[Any]:
        first, second = (vectorizer.transform([pair[side] for pair in some]) for side in (0, 1))
        return np.asarray(first.multiply(second).sum(1)).reshape(-1, 1)

    model = library("sklearn.linear_model").LogisticRegression(C=1000.0)
    model.fit(cosines(pairs), list(targets))
    return [str(name) for name in model.predict(cosines(asked))]


def tfidf_regression(texts: Sequence[str], targets: Sequence[float], asked: Sequence[str]) -> list[float]:
    """Numbers for ``asked`` by ridge regression on the same features."""
    linear_model, pipeline = library("sklearn.linear_model"), library("sklearn.pipeline")
    model = pipeline.make_pipeline(_tfidf(texts), linear_model.Ridge())
    model.fit(list(texts), list(targets))
    return [float(value) for value in model.predict(list(asked))]


def _tfidf(texts: Sequence[str]) -> Any:
    some = "".join(texts[:1000])
    by_character = sum(map(is_wide, some)) * 4 > len(some)
    return library("sklearn.feature_extraction.text").TfidfVectorizer(
        analyzer="char" if by_character else "word",
        ngram_range=(1, 3) if by_character else (1, 2),
        token_pattern=r"(?u)\b\w+\b",
        sublinear_tf=True,
        max_features=200_000,
    )


def dictionary_tags(
    known: Sequence[tuple[list[str], list[tuple[str, int, int]]]], asked: Sequence[list[str]]
) -> list[list[str]]:
    """BIO tags of sentences: the longest runs of words that were an entity in training, of the type that they
    most often had.

    Args:
        known: Words, and (type, first word, word after the last) of their entities.
        asked: Words.
    """
    types: dict[tuple[str, ...], Counter[str]] = {}
    for words, found in known:
        for kind, start, stop in found:
            types.setdefault(tuple(words[start:stop]), Counter())[kind] += 1
    longest = max(map(len, types), default=0)
    return [_from_dictionary(words, types, longest) for words in asked]


def _from_dictionary(words: list[str], types: dict[tuple[str, ...], Counter[str]], longest: int) -> list[str]:
    tags, at = ["O"] * len(words), 0
    while at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):
            found = types.get(tuple(words[at : at + length]))
            if found is not None:
                kind = found.most_common(1)[0][0]
                tags[at : at + length] = [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
                at += length
                break
        else:
            at += 1
    return tags


def overlap_answers(
    known: Sequence[tuple[str, str]], targets: Sequence[list[str]], asked: Sequence[tuple[str, str]]
) -> list[str]:
    """Answers by word overlap in a sliding window (Richardson et al. 2013): the run of words, none of them in
    the question, whose surroundings have most of the question's words.

    The length of the run is the one that does best on the training questions.

    Args:
        known: (question, text) of training rows.
        targets: Their answers.
        asked: (question, text).
    """
    tried = known[:_QUESTIONS]
    scores = {
        length: answer_metrics(targets[: len(tried)], [_best_window(*pair, length) for pair in tried])["f1"]
        for length in _ANSWER_WORDS
    }
    length = max(scores, key=lambda n: scores[n])
    return [_best_window(question, text, length) for question, text in asked]


def _best_window(question: str, text: str, length: int, around: int = 10) -> str:
    wanted = {word.lower() for word in units(question)}
    words = [(match.start(), match.end()) for match in re.finditer(_WORD, text)]
    known = [text[start:end].lower() in wanted for start, end in words]
    before = [0]
    for one in known:
        before.append(before[-1] + one)
    best, place = -1.0, 0
    for start in range(max(len(words) - length + 1, 1)):
        stop = min(start + length, len(words))
        inside = before[stop] - before[start]
        near = before[min(stop + around, len(words))] - before[max(start - around, 0)]
        if near - 2.0 * inside > best:
            best, place = near - 2.0 * inside, start
    if not words:
        return text
    return text[words[place][0] : words[min(place + length, len(words)) - 1][1]]


_WORD = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]|[^\W\u2e80-\u9fff\uac00-\ud7af]+"


def nearest_source(sources: Sequence[str], asked: Sequence[str]) -> list[int]:
    """For each of ``asked`` the number of the source that is most like it (cosine of TF-IDF of characters): a
    translation memory."""
    text, neighbors = library("sklearn.feature_extraction.text"), library("sklearn.neighbors")
    vectorizer = text.TfidfVectorizer(
        analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, max_features=200_000
    )
    index = neighbors.NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute")
    index.fit(vectorizer.fit_transform(list(sources)))
    _, found = index.kneighbors(vectorizer.transform(list(asked)))
    return [int(one[0]) for one in found]


def first_sentence(text: str) -> str:
    """The first sentence of a text: lead-1."""
    return re.split(r"(?<=[.!?])\s+|(?<=[。！？])", text.strip(), maxsplit=1)[0]
