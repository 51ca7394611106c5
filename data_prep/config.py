"""The options of a preparation, and what makes two preparations the same.

Comes in: what the user set. Goes out: `PrepareConfig` to `prepare`, and a plan (options and input files)
that is written to the output folder, so that a later run can tell whether it is the same preparation.

A plan never holds a path. A dataset folder may be handed on without telling where its
corpus lay, and a corpus may move without being prepared again.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from data_prep import corpora
from data_prep.clean import Selection
from data_prep.cleaning.quality import RULES, Rules
from data_prep.cleaning.scrub import KINDS, Scrubbed
from data_prep.cleaning.stage import CleaningOptions
from data_prep.counterfactual import Mode, Swaps
from data_prep.readers.documents import BadFiles, DecodeErrors, ReadOptions
from data_prep.tally import Tally, readable
from data_prep.train_tokenizer import TokenizerType
from dualroute.data.manifest import canonical_json
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.paths import LocalPath, PathField

DEFAULT_VAL_FRACTION = 0.02
SwapList = Annotated[str, PathField(words=("english", "chinese"))]


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare and how.

    Args:
        corpus: ``stdlib`` (sources of the running Python, no download), ``tinyshakespeare``,
            ``wikitext-103``, ``tinystories``, ``fineweb-edu``, ``gutenberg``, or the path of a file or
            folder (text, source code, .jsonl .json .csv .tsv .parquet .arrow .tar .zip, also compressed
            with .gz .xz .bz2 .zst).
        output: dataset folder to make; must be empty, or hold an earlier run of the same preparation.
        text_key: key (JSON) or column (CSV, Parquet, Arrow) that holds the text; a number is the place of the
            column, from 1, in a CSV or TSV file whose first line does not name them.
        chats: ``text_key`` (messages, say) holds chats: lists of messages with role and content.  They become
            ids by the chat template of ``tokenizer``, which has to be given; see docs/data.md.
        separator: cut text files into documents at this string; by default a file is one document. It may
            be spelled with \\n, \\t, \\r and \\\\.
        on_decode_error: what to do with text that is not UTF-8: ``error``, ``replace`` the bytes, or
            ``skip`` the document.
        on_bad_file: what to do with a file that is damaged or not what its name says: ``error``, or ``skip``
            it (each file is then read twice) and count it.
        text_endings: further endings of names that hold plain text, like .html; "" for names without one.
        exclude: globs of files and members of archives to pass over.
        follow_links: follow links that lead out of a corpus folder.
        max_document_mb: longest document, line, record or JSON file that is read, in megabytes.
        min_chars: drop documents with fewer characters.
        max_chars: drop documents with more characters.
        max_documents: stop after this many documents.
        max_bytes: stop after the document that brings the text to this many bytes.
        val_fraction: share of the documents held out for validation, chosen by the hash of their text; by
            default the publisher's own validation split where it has one, else 0.02.
        val_documents: names or globs of the documents held out instead, for corpora of few long documents.
        counterfactual: lists of what is swapped to add the training texts as they would be told of the other
            gender: ``english``, ``chinese`` or files; see docs/behaviour/fairness.md.
        counterfactual_mode: ``add`` the swapped text to each one that it changes, or ``replace`` half of
            them.
        languages: keep documents in these (ISO codes like en and zh, and ``code`` for source code); see
            docs/data/cleaning.md for this and all that follows.
        language_confidence: least probability of the language, from 0 to 1.
        quality: rules that documents have to pass: gopher, gopher_repetition, c4, fineweb, code.
        decontaminate: evaluation sets, files or folders; documents that hold a stretch of them are removed
            and listed in contaminated.jsonl.
        decontaminate_ngram: words in a row that make such a stretch.
        decontaminate_action: remove the ``document``, or the lines of the ``passage``.
        scrub: personal data to replace: email, ip, phone.
        near_duplicates: drop documents that nearly repeat an earlier one.
        near_duplicate_similarity: share of equal runs of 5 words (Jaccard) from which on they do.
        near_duplicates_of: other corpora, whose documents count as earlier ones and are not written.
        tokenizer: existing sentencepiece model or Hugging Face tokenizer.json to use; by default one is
            trained.
        tokenizer_type: ``bpe`` or ``unigram``, when one is trained.
        vocab_size: size of its vocabulary.
        reserved_tokens: ids in it kept free for later stages.
        tokenizer_sample_mb: megabytes of training text that it is trained on.
        shard_size_mb: megabytes of text in a shard.
        seed: of the validation split and of the tokenizer's sample.
        workers: threads that tokenise; by default one for each CPU. The result does not depend on it.
        downloads: folder for downloaded files; by default $DUALROUTE_DOWNLOADS or the user's cache.
        force: discard what an earlier run left in the output folder.
        progress: show progress on stderr.
        executor: ``none`` works in this process and its workers; ``local`` and ``slurm`` share the work among
            tasks of datatrove's executors, with the same result; see docs/data/cleaning.md.
        tasks: into how many.
        task_logs: folder for their logs; by default beside the output, with .tasks behind its name.
        partition: of Slurm.
        time: that a task of Slurm may take, as sbatch spells it.
        mem_gb: memory of a task of Slurm.
    """

    corpus: LocalPath = corpora.STDLIB
    output: LocalPath = "data"
    text_key: str = "text"
    chats: bool = False
    separator: str | None = None
    on_decode_error: DecodeErrors = "error"
    on_bad_file: BadFiles = "error"
    text_endings: list[str] | None = None
    exclude: list[str] | None = None
    follow_links: bool = False
    max_document_mb: float = 256.0
    min_chars: int = 1
    max_chars: int | None = None
    max_documents: int | None = None
    max_bytes: int | None = None
    val_fraction: float | None = None
    val_documents: list[str] | None = None
    counterfactual: list[SwapList] | None = None
    counterfactual_mode: Mode = "add"
    languages: list[str] | None = None
    language_confidence: float = 0.0
    quality: list[Rules] | None = None
    decontaminate: list[LocalPath] | None = None
    decontaminate_ngram: int = 13
    decontaminate_action: Literal["document", "passage"] = "document"
    scrub: list[Scrubbed] | None = None
    near_duplicates: bool = False
    near_duplicate_similarity: float = 0.7
    near_duplicates_of: list[LocalPath] | None = None
    tokenizer: LocalPath | None = None
    tokenizer_type: TokenizerType = "bpe"
    vocab_size: int = 8192
    reserved_tokens: int = 16
    tokenizer_sample_mb: float = 32.0
    shard_size_mb: float = 64.0
    seed: int = 0
    workers: int | None = None
    downloads: LocalPath | None = None
    force: bool = False
    progress: bool = True
    executor: Literal["none", "local", "slurm"] = "none"
    tasks: int = 8
    task_logs: LocalPath | None = None
    partition: str | None = None
    time: str = "24:00:00"
    mem_gb: int = 4

    def check(self) -> None:
        """Raise a UserError for a value that makes no sense."""
        for name in ("min_chars", "reserved_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, it is {getattr(self, name)}")
        positive = (
            "max_chars",
            "max_documents",
            "max_bytes",
            "workers",
            "vocab_size",
            "shard_size_mb",
            "tasks",
        )
        for name in (*positive, "tokenizer_sample_mb", "max_document_mb", "mem_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive, it is {value}")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise UserError(
                f"max_chars {self.max_chars} is below min_chars {self.min_chars}; no document fits"
            )
        if self.val_documents and self.val_fraction is not None:
            raise UserError("val_fraction and val_documents exclude each other; leave one out")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UserError(
                f"val_fraction must lie between 0 and 1, it is {self.val_fraction}; or name val_documents"
            )
        if self.separator == "":
            raise UserError("separator must not be empty; leave it out to make each file one document")
        for name, known in (
            ("on_decode_error", ("error", "replace", "skip")),
            ("on_bad_file", ("error", "skip")),
            ("tokenizer_type", ("bpe", "unigram")),
            ("counterfactual_mode", ("add", "replace")),
            ("executor", ("none", "local", "slurm")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, it is {getattr(self, name)!r}")
        self._check_cleaning()
        self._check_chats()
        self._check_tasks()
        for name in ("corpus", "output", "tokenizer", "downloads", "task_logs"):
            _check_path(name, getattr(self, name))
        for name in ("text_key", "separator", "text_endings", "exclude", "val_documents"):
            value = getattr(self, name)
            for text in [value] if isinstance(value, str) else value or []:
                if not text.isascii() and re.search("[\ud800-\udfff]", text):
                    raise UserError(f"{name}: {text!a} is not UTF-8; spell it so that it is")

    def _check_chats(self) -> None:
        if not self.chats:
            return
        if self.tokenizer is None:
            raise UserError("chats needs the tokenizer whose chat template they are written with: name it")
        unfit = [name for name in ("quality", "counterfactual", "separator") if getattr(self, name)]
        if self.decontaminate_action == "passage":
            unfit.append("decontaminate_action passage")
        if unfit:
            raise UserError(f"{', '.join(unfit)}: made for texts, not for chats; leave it out, or chats")

    def _check_tasks(self) -> None:
        if self.executor == "none":
            return
        if self.tasks > 100_000:
            raise UserError(f"tasks is {self.tasks}; give at most 100,000")
        if self.max_documents is not None or self.max_bytes is not None:
            raise UserError(
                f"executor {self.executor}: max_documents and max_bytes end the reading at one place for "
                f"all, which "
                f"tasks cannot know; leave them out, or set executor none"
            )
        if self.executor == "slurm" and not self.partition:
            raise UserError("executor slurm needs a partition; `sinfo` lists them")
        if not re.fullmatch(r"(\d+-)?\d{1,4}(:\d{1,2}){0,2}", self.time):
            raise UserError(f"time is {self.time!r}; write it like 24:00:00, as sbatch does")
        if self.partition is not None and not re.fullmatch(r"[\w.,-]+", self.partition):
            raise UserError(f"partition is {self.partition!r}, which is no name; `sinfo` lists them")

    def _check_cleaning(self) -> None:
        for name, known in (
            ("quality", RULES),
            ("scrub", KINDS),
            ("decontaminate_action", ("document", "passage")),
        ):
            value = getattr(self, name)
            for word in [value] if isinstance(value, str) else value or []:
                if word not in known:
                    raise UserError(f"{name} must be among {', '.join(known)}, it holds {word!r}")
        for name in ("languages", "quality", "scrub", "decontaminate", "near_duplicates_of"):
            value = getattr(self, name)
            if value is not None and (not value or len(set(value)) < len(value)):
                raise UserError(f"{name} is {value!r}; name each once, or leave it out")
        for name in ("decontaminate", "near_duplicates_of"):
            for path in getattr(self, name) or []:
                _check_path(name, path)
        if not 0 <= self.language_confidence <= 1:
            raise UserError(f"language_confidence must lie between 0 and 1, it is {self.language_confidence}")
        if self.language_confidence and not self.languages:
            raise UserError("language_confidence needs languages; name those that stay")
        if not 2 <= self.decontaminate_ngram <= 1000:
            raise UserError(f"decontaminate_ngram must be from 2 to 1000, it is {self.decontaminate_ngram}")
        if not 0.3 <= self.near_duplicate_similarity <= 1:
            raise UserError(
                f"near_duplicate_similarity must lie between 0.3 and 1, it is "
                f"{self.near_duplicate_similarity}; "
                f"below that, texts are alike by chance"
            )
        if self.near_duplicates_of and not self.near_duplicates:
            raise UserError("near_duplicates_of needs near_duplicates true; set both")

    @property
    def is_cleaned(self) -> bool:
        """Whether documents pass `staged` before they are tokenised."""
        cleaning = (self.languages, self.quality, self.decontaminate, self.scrub)
        return self.near_duplicates or any(cleaning)

    def cleaning_options(self, selection: Selection) -> CleaningOptions:
        """What a document has to pass there."""
        return CleaningOptions(
            selection=selection,
            languages=tuple(self.languages or ()),
            language_confidence=self.language_confidence,
            quality=tuple(rule for rule in RULES if rule in (self.quality or ())),
            decontaminate=tuple(self.decontaminate or ()),
            decontaminate_ngram=self.decontaminate_ngram,
            decontaminate_action=self.decontaminate_action,
            scrub=tuple(kind for kind in KINDS if kind in (self.scrub or ())),
            near_duplicates=self.near_duplicates,
            chats=self.chats,
        )

    @property
    def document_separator(self) -> str | None:
        r"""``separator`` with ``\n``, ``\t``, ``\r`` and ``\\`` decoded, as a shell hands them over."""
        if self.separator is None:
            return None
        decoded = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
        return re.sub(r"\\([ntr\\])", lambda found: decoded[found[1]], self.separator)

    def read_options(self) -> ReadOptions:
        """How the corpus is read, with fresh counts."""
        return ReadOptions(
            text_key=self.text_key,
            chats=self.chats,
            separator=self.document_separator,
            on_decode_error=self.on_decode_error,
            on_bad_file=self.on_bad_file,
            max_document_bytes=max(1, int(min(self.max_document_mb, 2**40) * 1e6)),
            text_endings=tuple(_ending(text) for text in self.text_endings or ()),
            exclude=tuple(self.exclude or ()),
            follow_links=self.follow_links,
            dropped=Counter(),
            files=Tally(),
        )


def _check_path(name: str, value: str | None) -> None:
    if value is None:
        return
    if not value or "\0" in value:
        raise UserError(f"{name} is {value!r}, which is no path; give the path of a file or folder")
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name} {readable(value)}: {error}; write the path out in full") from error


def _ending(text: str) -> str:
    """As `formats` compares it: lower case, with its dot; "" stays."""
    text = text.lower()
    return f".{text}" if text and not text.startswith(".") else text


#: Fields of cleaning, which a plan holds only where they are used.
CLEANING = (
    "languages", "language_confidence", "quality", "decontaminate", "decontaminate_ngram",
    "decontaminate_action", "scrub", "near_duplicates", "near_duplicate_similarity", "near_duplicates_of",
)  # fmt: skip
_LIBRARIES = {
    "languages": ("py3langid",),
    "quality": ("datatrove", "rjieba"),
    "near_duplicates": ("rensa",),
}

#: Fields that do not change the result.
INCIDENTAL = (
    "output", "workers", "downloads", "force", "progress", "executor", "tasks", "task_logs", "partition",
    "time", "mem_gb",
)  # fmt: skip


def plan_of(config: PrepareConfig, corpus: corpora.Corpus, given: Tokenizer | None) -> dict[str, Any]:
    """Options and inputs: equal plans give equal bytes."""
    options = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name not in INCIDENTAL
    }
    options["corpus"] = corpus.name
    options["separator"] = config.document_separator
    options["text_endings"] = list(config.read_options().text_endings) or None
    if not config.chats:  # the plan is what it was before there was such an option
        del options["chats"]
    swaps = options.pop("counterfactual")
    mode = options.pop("counterfactual_mode")
    if swaps:  # else the plan is what it was before there was such an option
        options |= {"counterfactual": f"sha256:{Swaps(swaps).sha256}", "counterfactual_mode": mode}
    _plan_cleaning(config, options)
    if given is not None:
        options["tokenizer"] = f"sha256:{given.sha256}"
        if config.chats:  # are written with its template
            options["tokenizer_settings"] = sha256(canonical_json(given.settings.to_json())).hexdigest()
        for unused in ("tokenizer_type", "vocab_size", "reserved_tokens", "tokenizer_sample_mb"):
            del options[unused]
    return {"options": options, "inputs": [source.fingerprint() for source in corpus.files]}


#: Options that are looked at after documents have been cleaned: those parts do not depend on them.
_AFTER_CLEANING = {
    *(
        "tokenizer",
        "tokenizer_settings",
        "tokenizer_type",
        "vocab_size",
        "reserved_tokens",
        "tokenizer_sample_mb",
        "seed",
    ),
    *("val_fraction", "val_documents", "counterfactual", "counterfactual_mode"),
}


def cleaning_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """What of a plan decides what the cleaned documents are."""
    options = {name: value for name, value in plan["options"].items() if name not in _AFTER_CLEANING}
    return {**plan, "options": options}


def _plan_cleaning(config: PrepareConfig, options: dict[str, Any]) -> None:
    """Options of cleaning as a plan holds them: those that are used, no paths, and what else decides the
    result."""
    defaults = {field.name: field.default for field in fields(PrepareConfig)}
    for name in CLEANING:
        if options[name] == defaults[name]:  # the plan is what it was before there was such an option
            del options[name]
    for name in ("decontaminate", "near_duplicates_of"):
        if name in options:
            options[name] = [entry for path in options[name] for entry in _files_of(name, path, config)]
    used = [library for key, libraries in _LIBRARIES.items() if key in options for library in libraries]
    if used:
        options["libraries"] = {library: _version(library) for library in sorted(used)}


def _files_of(name: str, path: str, config: PrepareConfig) -> list[list[str | int]]:
    where = Path(path).expanduser()
    if (where / "manifest.json").exists():
        raise UserError(
            f"{name} {readable(path)}: is a prepared data set; give the texts that it was made from"
        )
    try:
        corpus = corpora.open_corpus(path, config.read_options())
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return [[corpus.name, *source.fingerprint()] for source in corpus.files]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "none"  # an error says so as soon as it is needed


def differences_between(earlier: Any, now: dict[str, Any]) -> list[str]:
    """What changed between two plans, for a message."""
    if not isinstance(earlier, dict) or not isinstance(earlier.get("options"), dict):
        return ["options (its record is damaged)"]
    found = []
    defaults = {field.name: field.default for field in fields(PrepareConfig)}
    before, after = earlier["options"], now["options"]
    before = {key: defaults.get(key) for key in after} | before  # made when an option did not yet exist
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if changed:
        listed = ", ".join(f"{key} {before.get(key)!r}, now {after.get(key)!r}" for key in changed[:4])
        found.append(f"options ({listed})")
    old = {entry[0]: entry for entry in earlier.get("inputs", [])}
    new = {entry[0]: entry for entry in now["inputs"]}
    for word, files in (
        ("new", new.keys() - old.keys()),
        ("gone", old.keys() - new.keys()),
        ("changed", {name for name in new.keys() & old.keys() if new[name] != old[name]}),
    ):
        if files:
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            found.append(f"inputs ({word}: {min(files)}{more})")
    return found
