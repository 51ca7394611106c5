"""What a corpus is called, and which files it consists of.

Comes in: a name (`names` lists them) or a path. Goes out: `Corpus`, whose files `documents` opens one
after the other through `formats`; a remote file is downloaded only when its turn comes, so ``max_bytes``
of a large corpus downloads little.

- ``stdlib``: the Python sources of the interpreter that runs this; no download.  The default.
- ``hf:OWNER/NAME``: a data set of the Hugging Face hub, streamed (`readers.hub`).
- ``https://…``: files of the web, braces standing for many.
- a folder or file: every supported file below it, in the order of the path (`folder`).
- a public corpus: see `REGISTRY`. Each carries its licence; a checksum stands where one is known for
  certain, elsewhere `download` trusts the first use.
"""

from __future__ import annotations

import difflib
import itertools
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from data_prep import download
from data_prep.clean import matches
from data_prep.readers.documents import Document, NoTextKey, ReadOptions
from data_prep.readers.folder import scan
from data_prep.readers.formats import known_endings, pass_over_table, read_documents, supported
from data_prep.readers.hub import PREFIX, HubSet, read_hub
from data_prep.tally import Tally, readable, reasons_of
from dualroute.errors import UserError
from dualroute.files import require_regular

STDLIB = "stdlib"
_MOST_ADDRESSES = 100_000
_STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HF = "https://huggingface.co/datasets"


@dataclass(frozen=True)
class SourceFile:
    """One file, local (``path``) or remote (``urls``), or a data set of the hub.

    ``name`` is relative to the corpus, with slashes.
    """

    name: str
    path: Path | None = None
    urls: tuple[str, ...] = ()
    sha256: str | None = None
    hub: HubSet | None = None

    def fingerprint(self) -> list[str | int]:
        """What is compared to notice that the inputs changed."""
        if self.hub is not None:
            return [self.name, self.hub.revision()]
        if self.path is None:
            return [self.name, self.urls[0], self.sha256 or "first use"]
        status = self.path.stat()
        return [self.name, status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class Corpus:
    """Files and how to read them.

    Attributes:
        name: for messages and the manifest; of a path, its last part.
        files: in the order they are read.
        licence: as stated at the source.
        description: one line.
        text_key, separator, heading: override `ReadOptions` where not None.
        exclude: globs of documents that are left out.
        val_documents: globs of the documents that the publisher holds out.
        strip: takes the publisher's own text away from a document.
        is_folder: of many files, some of which may hold no corpus; else a lone file.
        passed_over: what of a folder is not read.
    """

    name: str
    files: tuple[SourceFile, ...]
    licence: str = ""
    description: str = ""
    text_key: str | None = None
    separator: str | None = None
    heading: re.Pattern[str] | None = None
    exclude: tuple[str, ...] = ()
    val_documents: tuple[str, ...] = ()
    strip: Callable[[str], str] | None = field(default=None, compare=False)
    is_folder: bool = False
    passed_over: Tally = field(default_factory=Tally, compare=False)


def strip_gutenberg(text: str) -> str:
    """The book without Project Gutenberg's licence and header, as its terms ask of altered copies."""
    start = re.search(r"^\*\*\* ?START OF .*?\*\*\*[^\n]*$", text, re.MULTILINE)
    end = re.search(r"^\*\*\* ?END OF ", text, re.MULTILINE)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip() + "\n"


def _gutenberg(number: int) -> SourceFile:
    return SourceFile(
        f"pg{number}.txt", urls=(f"https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt",)
    )


REGISTRY: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "tinyshakespeare",
            (
                SourceFile(
                    "input.txt",
                    urls=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
                    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                ),
            ),
            licence="public domain",
            description="1.1 MB of plays, one speech a document",
            separator="\n\n",
        ),
        Corpus(
            "wikitext-103",
            (
                SourceFile(
                    "wikitext-103-raw-v1.zip",
                    urls=(
                        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-raw-v1.zip",
                    ),
                    sha256="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
                ),
            ),
            licence="CC BY-SA 3.0",
            description="540 MB of Wikipedia articles; its valid split is held out, its test split left out",
            heading=re.compile(r" = [^=].*[^=] = "),
            exclude=("*wiki.test.raw*",),
            val_documents=("*wiki.valid.raw*",),
        ),
        Corpus(
            "tinystories",
            (
                SourceFile(
                    "TinyStoriesV2-GPT4-train.txt",
                    urls=(
                        f"{_HF}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
                        "TinyStoriesV2-GPT4-train.txt",
                    ),
                ),
            ),
            licence="CDLA-Sharing-1.0",
            description="2.2 GB of short stories in simple words",
            separator="<|endoftext|>",
        ),
        Corpus(
            "fineweb-edu",
            tuple(
                SourceFile(
                    f"sample/10BT/{number:03d}_00000.parquet",
                    urls=(f"{_HF}/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/{number:03d}_00000.parquet",),
                )
                for number in range(14)
            ),
            licence="ODC-By 1.0",
            description="the 10-billion-token sample: 14 files of 2 GB; set max_bytes to take less",
            text_key="text",
        ),
        Corpus(
            "gutenberg",
            tuple(
                _gutenberg(number)
                for number in (
                    35, 36, 45, 74, 76, 84, 98, 100, 120, 135, 145, 158, 161, 174, 345, 599, 730, 766, 768,
                    996, 1023, 1184, 1228, 1260, 1342, 1399, 1400, 1661, 2413, 2554, 2600, 2701, 3300, 4300,
                    28054,
                )
            ),
            licence="public domain in the United States",
            description="35 well-known books, 40 MB",
            strip=strip_gutenberg,
        ),
    )
}  # fmt: skip


def names() -> list[str]:
    """Names that `open_corpus` accepts besides paths."""
    return [STDLIB, *REGISTRY]


def open_corpus(corpus: str, options: ReadOptions | None = None) -> Corpus:
    """The corpus of that name or path; ``options`` say which files of a folder are read.

    Raises:
        UserError: neither a known name (the nearest is named) nor an existing path, or a path without any
            supported file.
    """
    if corpus == STDLIB:
        return _stdlib()
    if corpus in REGISTRY:
        return REGISTRY[corpus]
    if corpus.startswith(PREFIX):
        hub = HubSet.parse(corpus)
        return Corpus(hub.name, (SourceFile(hub.name, hub=hub),))
    if re.match("https?://", corpus):
        return _of_addresses(corpus, options or ReadOptions())
    path = Path(corpus).expanduser()
    try:
        if path.exists():
            return _local(path, options or ReadOptions())
    except OSError as error:
        raise UserError(
            f"corpus {readable(corpus)}: cannot be read ({error.strerror or error}); check the path"
        ) from error
    if path.is_symlink() or "/" in corpus or "\\" in corpus or "." in corpus:
        raise UserError(
            f"corpus {readable(corpus)}: no such file or folder; give an existing path or one of "
            f"{', '.join(names())}"
        )
    near = difflib.get_close_matches(corpus.lower(), names(), 1, cutoff=0.0)[0]
    known = ", ".join(names())
    raise UserError(f"corpus {corpus!r} is neither a known name nor a path; did you mean {near!r}? ({known})")


def _of_addresses(spelled: str, options: ReadOptions) -> Corpus:
    """Files of the web; braces stand for many: ``https://host/part-{000..119}.jsonl.zst``."""
    from braceexpand import braceexpand

    try:
        addresses = list(itertools.islice(braceexpand(spelled), _MOST_ADDRESSES + 1))
    except ValueError as error:
        raise UserError(
            f"corpus {readable(spelled)}: its braces are not closed; write {{000..119}}"
        ) from error
    if len(addresses) > _MOST_ADDRESSES:
        raise UserError(f"corpus {readable(spelled)}: more than {_MOST_ADDRESSES:,} addresses; give fewer")
    names = [readable(urlsplit(address).path.rpartition("/")[2]) for address in addresses]
    for name in names:
        if not supported(name, options):
            raise UserError(
                f"corpus {readable(spelled)}: {name!r} is of no kind that is read; known are "
                f"{known_endings()}"
            )
    if len(set(names)) < len(names):
        raise UserError(
            f"corpus {readable(spelled)}: two addresses end in the same name; give them one by one"
        )
    host = readable(urlsplit(addresses[0]).netloc.rpartition("@")[2])
    files = tuple(SourceFile(name, urls=(address,)) for name, address in zip(names, addresses, strict=True))
    return Corpus(re.sub(r"[^\w.-]", "_", f"{host}-{names[0]}"), files)


def _local(path: Path, options: ReadOptions) -> Corpus:
    name = readable(path.resolve().name)
    if not path.is_dir():
        require_regular(path, "corpus")
        if not supported(path.name, options):
            raise UserError(f"corpus {readable(path)}: unknown kind of file; known are {known_endings()}")
        return Corpus(name, (SourceFile(readable(path.name), path),))
    found = scan(path, options)
    if not found.files:
        reasons = reasons_of(found.tally.to_json())
        there = f" ({', '.join(reasons)})" if reasons else ""
        raise UserError(
            f"corpus {readable(path)}: the folder holds no supported file{there}; known are {known_endings()}"
        )
    files = tuple(SourceFile(name, file) for name, file in found.files)
    return Corpus(name, files, is_folder=True, passed_over=found.tally)


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(
        (file.relative_to(root).as_posix(), file)
        for file in root.rglob("*.py")
        if file.is_file() and not _STDLIB_SKIP.intersection(file.relative_to(root).parts)
    )
    if not found:
        raise UserError(f"corpus stdlib: no .py files in {root}; give a folder of texts instead")
    return Corpus(
        STDLIB,
        tuple(SourceFile(name, file) for name, file in found),
        licence="PSF-2.0",
        description=f"sources of Python {platform.python_version()}'s standard library, without its tests",
    )


def documents(
    corpus: Corpus,
    options: ReadOptions,
    downloads: Path,
    report: Callable[[str], download.Report] | None = None,
) -> Iterator[Document]:
    """Every document of ``corpus`` in order.

    Args:
        corpus: from `open_corpus`.
        options: of the user; what the corpus itself states wins.
        downloads: folder for remote files.
        report: makes, for a file's name, the callback that is told how its download goes.
    """
    options = replace(
        options,
        text_key=corpus.text_key or options.text_key,
        separator=corpus.separator or options.separator,
        heading=corpus.heading or options.heading,
    )
    for source in corpus.files:
        if source.hub is not None:
            yield from read_hub(source.hub, options)
            continue
        path = source.path
        if path is None:
            path = download.fetch(
                source.urls,
                downloads / corpus.name / source.name,
                source.sha256,
                report(source.name) if report is not None else None,
            )
        for document in _of_file(path, source.name, options, corpus.is_folder):
            if any(matches(document.name, pattern) for pattern in corpus.exclude):
                continue
            yield document if corpus.strip is None else replace(document, text=corpus.strip(document.text))


def _of_file(path: Path, name: str, options: ReadOptions, is_folder: bool) -> Iterator[Document]:
    """Documents of one file; none of one that is passed over, which is counted.

    With ``on_bad_file: skip`` a file is read twice: damage may show at its very end, in a checksum, and then
    what was read before is not to be trusted.
    """
    try:
        if options.on_bad_file == "skip":
            unheard = replace(options, dropped=Counter(), files=Tally())
            for _ in read_documents(path, name, unheard):
                pass
        yield from read_documents(path, name, options)
    except NoTextKey as error:
        if not is_folder and options.on_bad_file == "error":
            raise
        pass_over_table(error, name, options)
    except UserError as error:
        if options.on_bad_file == "error":
            raise
        options.files.skip("damaged, or not what its name says", error)
