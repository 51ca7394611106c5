"""The staging that a configuration asks for.

Comes in: `PrepareConfig` and the corpus. Goes out: `Staging`, for `prepare` in one process and for `steps`
in many.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_prep import corpora
from data_prep.clean import Selection
from data_prep.cleaning.stage import CleaningOptions
from data_prep.config import PrepareConfig
from data_prep.download import default_download_folder
from data_prep.staged.staging import FOLDER, Limit, Staging


def staging_of(
    config: PrepareConfig,
    corpus: corpora.Corpus,
    state: Path,
    origin: str,
    selection: Selection,
    note: Callable[[str], None] = lambda line: None,
) -> Staging:
    """What `Staging` needs, from the options of a preparation.

    Args:
        config: with at least one option of cleaning.
        corpus: of it.
        state: folder for what is kept until the manifest is written.
        origin: SHA-256 of inputs and of the options that decide what cleaned documents are.
        selection: limits of length.
        note: told a line about what has to be made again.
    """
    downloads = Path(config.downloads) if config.downloads else default_download_folder()
    part_bytes = max(1, int(config.shard_size_mb * 1e6))
    similarity = config.near_duplicate_similarity if config.near_duplicates else None

    def staging(of: corpora.Corpus, folder: str, cleaning: CleaningOptions, keeps_texts: bool) -> Staging:
        limit = Limit(config.max_documents, config.max_bytes) if keeps_texts else Limit()
        return Staging(
            of,
            state / folder,
            origin,
            config.read_options,
            cleaning,
            downloads,
            part_bytes,
            similarity,
            limit,
            note,
            keeps_texts,
        )

    staged = staging(corpus, FOLDER, config.cleaning_options(selection), True)
    for number, path in enumerate(config.near_duplicates_of or ()):
        other = corpora.open_corpus(path, config.read_options())
        staged.seen.append(
            staging(other, f"seen-{number}", CleaningOptions(near_duplicates=True, chats=config.chats), False)
        )
    return staged
