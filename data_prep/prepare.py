"""The whole preparation: `prepare(config)` turns a corpus into a dataset folder.

1. open the corpus (`corpora`) and note options and input files in ``preparation.json``; if options of
cleaning are
   set, put what they leave of it onto the disk (`staged`), from where the next steps read it;
2. survey: read and clean everything once, count what stays and what is dropped, sample the training side;
3. train the tokenizer on the sample, or copy the one that was given;
4. read and clean again, tokenise, write shards (`shards`);
5. index files, ``report.html`` and last of all ``manifest.json``: a folder that has one is complete.

An interrupted run continues: the survey, the tokenizer and each shard are kept once complete (`notes`), and
looked at again before they are believed. A second run with the same options and inputs returns at once; with
others it says what differs.

The corpus is read twice. That costs little beside tokenising, bounds the memory,
gives a true percentage while the shards are written, and finds a bad byte at the end of the corpus before
hours are spent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import corpora
from data_prep.clean import CleanDocument, Selection, select
from data_prep.cleaning.stage import Cleaner
from data_prep.composition import composition, described, warning
from data_prep.config import DEFAULT_VAL_FRACTION, PrepareConfig, cleaning_plan, differences_between, plan_of
from data_prep.counterfactual import Swaps, with_counterfactuals
from data_prep.download import default_download_folder
from data_prep.notes import SPLITS, STATE_FOLDER, SURVEY_FILE, Unusable, read_plan, read_survey, write_note
from data_prep.output_folder import PREPARATION_FILE, claimed, explain, strangers
from data_prep.progress import Reporter
from data_prep.report import REPORT_FILE, write_report
from data_prep.shards import write_index, write_shards
from data_prep.staged.build import staging_of
from data_prep.staged.pool import Killed, Pool
from data_prep.tally import Tally, describe, readable, reasons_of
from data_prep.train_tokenizer import Sample, train_tokenizer
from dualroute import __version__
from dualroute.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    Shard,
    TokenizerInfo,
    canonical_json,
    token_dtype,
    verify_shards,
)
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.tokenizer_settings import TokenizerSettings
from dualroute.errors import UserError, other_remedy
from dualroute.files import file_sha256, remove_leftovers, write_bytes_atomically

CONTAMINATED_FILE = "contaminated.jsonl"
_SHOWN_REASONS = 12
_TAIL_NOTE = "there is one document: its end is held out as val (cut files into documents with --separator)"


def prepare(config: PrepareConfig) -> Manifest:
    """Make the dataset folder ``config.output``, or continue it, or find it done.

    Raises:
        UserError: bad options or input, an occupied output folder, no space; one line that says what to
            do. After bad input nothing is left behind but documents that have been cleaned; after a full
            disk what is finished stays, and the next run continues.
    """
    config.check()
    if config.executor != "none":
        raise UserError(
            f"executor {config.executor}: call prepare_command, which shares the work among tasks"
        )
    output = Path(config.output).expanduser()
    try:
        with claimed(output):
            return Preparation(config).run()
    except OSError as error:
        raise explain(error, output) from error


def prepare_command(config: PrepareConfig) -> Manifest | None:
    """`prepare`, in tasks if there is an ``executor``; None where they have been submitted and will do it."""
    if config.executor == "none":
        return prepare(config)
    config.check()
    from data_prep.staged.steps import prepare_in_tasks

    try:
        return prepare_in_tasks(config)
    except OSError as error:
        raise explain(error, Path(config.output)) from error


def summary(manifest: Manifest) -> str:
    """What a dataset holds and what was left out, for people."""
    lines = []
    for name, split in manifest.splits.items():
        lines.append(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes "
            f"({split.bytes / split.tokens:.2f} bytes a token), {len(split.shards)} shards"
        )
    dropped = manifest.preparation.get("dropped", {})
    if dropped:
        ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{count:,} {reason}" for reason, count in ordered[:_SHOWN_REASONS])
        rest = sum(count for _, count in ordered[_SHOWN_REASONS:])
        more = (
            f", {rest:,} for {len(ordered) - _SHOWN_REASONS} reasons more, in {REPORT_FILE}" if rest else ""
        )
        lines.append(f"dropped: {listed}{more}")
    made_of = manifest.preparation.get("composition", {})
    lines += described(made_of)
    if (vocabulary := made_of.get("vocabulary")) and (line := warning(vocabulary)):
        lines.append(f"note: {line}")
    if manifest.preparation.get("val_tail"):
        lines.append(_TAIL_NOTE)
    lines += describe(manifest.preparation.get("files", {}))
    return "\n".join(lines)


class Preparation:
    """The steps of one run, over what they share.

    Raises:
        UserError: the corpus or the tokenizer cannot be opened.
    """

    def __init__(self, config: PrepareConfig) -> None:
        corpus = corpora.open_corpus(config.corpus, config.read_options())
        given = Tokenizer(config.tokenizer) if config.tokenizer is not None else None
        output = Path(config.output).expanduser()
        plan = plan_of(config, corpus, given)
        self.config, self.corpus, self.given, self.output, self.plan = config, corpus, given, output, plan
        self.state = output / STATE_FOLDER
        self.swaps = Swaps(config.counterfactual) if config.counterfactual else None
        self.plan_sha256 = _sha256(plan)
        self.report = Reporter(config.progress)
        held_out = corpus.val_documents if config.val_documents is None else tuple(config.val_documents)
        self.selection = Selection(
            min_chars=config.min_chars,
            max_chars=config.max_chars,
            max_documents=config.max_documents,
            max_bytes=config.max_bytes,
            val_fraction=DEFAULT_VAL_FRACTION if config.val_fraction is None else config.val_fraction,
            val_documents=held_out if config.val_fraction is None else (),
            seed=config.seed,
        )
        self.staged = (
            staging_of(
                config, corpus, self.state, _sha256(cleaning_plan(plan)), self.selection, self.report.note
            )
            if config.is_cleaned
            else None
        )

    def run(self) -> Manifest:
        done = self.begin()
        if done is not None:
            return done
        manifest = self._write(self.learn())
        self.report.note(f"{self.output} is ready\n{summary(manifest)}")
        return manifest

    def begin(self) -> Manifest | None:
        """Note what is to be done in the output folder; the manifest if it has been done."""
        cleared = self.config.force and self._discard()
        if not cleared and self._compare():
            manifest = Manifest.load(self.output)
            for split in manifest.splits:
                self._check_files(manifest, split)
            shutil.rmtree(self.state, ignore_errors=True)  # left by a run that was killed at the very end
            self.report.note(f"{self.output} is prepared already\n{summary(manifest)}")
            return manifest
        remove_leftovers(self.output)
        self.state.mkdir(exist_ok=True)
        remove_leftovers(self.state)
        write_bytes_atomically(self.output / PREPARATION_FILE, json.dumps(self.plan, indent=1).encode())
        return None

    def learn(self) -> dict[str, Any]:
        """Clean, count, and make the tokenizer; after bad input nothing is left behind but documents that
        have been cleaned, which may have taken days and serve a run with other options of what follows."""
        try:
            self._stage()
            return self._survey()
        except Killed:
            raise
        except UserError as error:
            kept = self.staged is not None and self.staged.has_documents
            self._discard(but_parts=kept)
            if not kept:
                raise
            raise UserError(
                f"{error} (the cleaned documents are kept in {self.state}: a run with the same options of "
                "reading and cleaning goes on with them; --force true removes them)"
            ) from error

    # Step 1: is there an earlier run, and of the same preparation?

    def _compare(self) -> bool:
        """Whether the folder is complete already; raises if it is in the way."""
        path = self.output / PREPARATION_FILE
        if not os.path.lexists(path):
            if occupants := strangers(self.output):
                raise UserError(
                    f"output {self.output}: not empty ({occupants[0]}); choose a folder that is empty or new"
                )
            return False
        try:
            earlier = read_plan(path)
        except UserError as error:
            if self._earlier_survey() is None:
                raise
            self.report.note(
                f"{str(error).rpartition('; ')[0]}; written again: the notes are of the same plan"
            )
            return False
        differences = differences_between(earlier, json.loads(json.dumps(self.plan)))
        complete = (self.output / MANIFEST_FILE).exists()
        if differences and not complete and self._earlier_survey() is not None:
            self.report.note(f"{path}: damaged; written again: the notes are of the same plan")
            return False
        if differences:
            raise UserError(
                f"output {self.output} was prepared with other {'; '.join(differences)}; use --force true to "
                f"replace it, or choose another folder"
            )
        return complete

    def _check_files(self, manifest: Manifest, split: str) -> None:
        try:
            verify_shards(manifest, split, level="size")
        except UserError as error:
            raise other_remedy(error, f"use --force true to prepare {self.output} again") from error

    def _discard(self, but_parts: bool = False) -> bool:
        """Remove what a preparation may have written, and nothing else; False if there was none.

        Args:
            but_parts: keep documents that have been cleaned.
        """
        if not os.path.lexists(self.output / PREPARATION_FILE):
            if not but_parts and not strangers(self.output):
                shutil.rmtree(self.state, ignore_errors=True)
            return False
        (self.output / MANIFEST_FILE).unlink(missing_ok=True)  # first: no complete-looking half
        for split in SPLITS:
            for path in self.output.glob(f"{split}-[0-9]*.tar"):
                path.unlink()
            (self.output / f"{split}.index.npy").unlink(missing_ok=True)
        for name in (TOKENIZER_FILE, REPORT_FILE, CONTAMINATED_FILE):
            (self.output / name).unlink(missing_ok=True)
        if but_parts:
            for path in self.state.iterdir():
                if not path.is_dir():
                    path.unlink()
        else:
            shutil.rmtree(self.state, ignore_errors=True)
        remove_leftovers(self.output)
        (self.output / PREPARATION_FILE).unlink()
        return True

    def _stage(self) -> None:
        """Clean the corpus onto the disk and find its duplicates, from where an earlier run stopped."""
        if self.staged is None:
            return
        workers = self.config.workers or _cpus()
        for staging in (*self.staged.seen, self.staged):
            title = (
                "cleaning" if staging is self.staged else f"reading {staging.corpus.name}, to compare with"
            )
            with Pool(Cleaner(staging.cleaning), workers) as pool, self.report.phase(title) as phase:
                staging.clean_all(pool, lambda documents, chars: phase.update(chars, documents=documents))
        if self.staged.columns:
            with self.report.phase("comparing documents"):
                self.staged.find_all()

    # Steps 2 and 3: count, and learn the vocabulary

    def _documents(
        self, dropped: Counter[str], matched: set[str] | None = None, files: Tally | None = None
    ) -> Iterator[CleanDocument]:
        distinct = False
        if self.staged is not None:
            source, distinct = self.staged.documents(dropped), bool(self.staged.columns)
        else:
            options = replace(self.config.read_options(), dropped=dropped, files=files or Tally())
            downloads = Path(self.config.downloads) if self.config.downloads else default_download_folder()
            source = corpora.documents(self.corpus, options, downloads, self.report.download)
        documents = select(source, self.selection, dropped, matched, distinct)
        if not self.swaps:
            return documents
        return with_counterfactuals(documents, self.swaps, self.config.counterfactual_mode, self.config.seed)

    def _earlier_survey(self) -> dict[str, Any] | None:
        try:
            return read_survey(self.output, self.output / TOKENIZER_FILE, self.plan_sha256)
        except Unusable as error:
            self.report.note(f"{self.output}: the corpus is surveyed again; {error}")
            return None

    def _survey(self) -> dict[str, Any]:
        """Counts by split and by reason; leaves tokenizer.model behind."""
        earlier = self._earlier_survey()
        if earlier is not None:
            self.selection = replace(self.selection, val_tail=earlier.get("val_tail") is True)
            return earlier
        survey, sample = self._read_all()
        if self._is_lone(survey) and not self.config.chats:
            self.selection = replace(self.selection, val_tail=True)
            survey, sample = self._read_all()
        self._check_counts(survey)
        write_bytes_atomically(self.output / TOKENIZER_FILE, self._model(sample))
        survey |= {"tokenizer_sha256": file_sha256(self.output / TOKENIZER_FILE), "plan": self.plan_sha256}
        write_note(self.state / SURVEY_FILE, survey)
        return survey

    def _is_lone(self, survey: dict[str, Any]) -> bool:
        """Whether there is but one document, of which no share can be held out whole."""
        return not self.selection.val_documents and _total(survey["splits"], "documents") == 1

    def _read_all(self) -> tuple[dict[str, Any], Sample]:
        """One pass over the corpus: what it holds, and a sample of its training side."""
        dropped: Counter[str] = Counter()
        files = self.staged.found().files if self.staged is not None else Tally()
        if self.staged is None:
            files.add(self.corpus.passed_over)
        matched: set[str] = set()
        counts = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
        sample = Sample(int(self.config.tokenizer_sample_mb * 1e6), self.config.seed)
        examples: list[str] = []
        with self.report.phase("reading") as phase:
            for document in self._documents(dropped, matched, files):
                counts[document.split]["documents"] += 1
                counts[document.split]["bytes"] += document.num_bytes
                if document.split == "train" and self.given is None:
                    sample.add(document.digest, document.text)
                if len(examples) < 3:
                    examples.append(document.name)
                phase.update(_total(counts, "bytes"), documents=_total(counts, "documents"))
        survey = {
            "splits": counts,
            "dropped": dict(dropped),
            "files": files.to_json(),
            "val_tail": self.selection.val_tail,
            "matched": sorted(matched),
            "examples": examples,
        }
        return survey, sample

    def _check_counts(self, survey: dict[str, Any]) -> None:
        counts, matched, examples = survey["splits"], survey["matched"], survey["examples"]
        total, name = _total(counts, "documents"), readable(self.config.corpus)
        if not total:
            reasons = [f"{count:,} {reason}" for reason, count in sorted(survey["dropped"].items())]
            why = ", ".join(reasons + reasons_of(survey["files"])) or "it has none"
            raise UserError(f"corpus {name}: no document to use ({why}); give another, or relax the limits")
        for pattern in self.selection.val_documents:
            if pattern not in matched:
                like = ", ".join(examples)
                raise UserError(f"val_documents: {pattern!r} fits none of {total:,} documents (like {like})")
        held_out = (
            "val_documents"
            if self.selection.val_documents
            else f"val_fraction {self.selection.val_fraction:g}"
        )
        if not counts["val"]["documents"]:
            raise UserError(
                f"corpus {name}: {held_out} holds out none of its {total:,} documents; raise "
                f"--val_fraction, or name some with --val_documents"
            )
        if not counts["train"]["documents"]:
            raise UserError(
                f"corpus {name}: {held_out} holds out all of its {total:,} documents; lower "
                f"--val_fraction, name fewer with --val_documents, or cut files with --separator"
            )

    def _model(self, sample: Sample) -> bytes:
        if self.given is not None:
            if self.given.bos_id < 0 or self.given.eos_id < 0:
                raise UserError(
                    f"tokenizer {self.given.path}: lacks <bos> or <eos>, which part the documents"
                )
            return self.given.path.read_bytes()
        config = self.config
        self.report.note(
            f"training a {config.tokenizer_type} tokenizer, vocabulary {config.vocab_size:,}, on "
            f"{sample.size / 1e6:.1f} MB"
        )
        return train_tokenizer(
            sample.texts(), config.vocab_size, config.tokenizer_type, config.reserved_tokens
        )

    # Steps 4 and 5: write

    def write_shards(
        self, survey: dict[str, Any], tokenizer: Tokenizer, mine: Callable[[str, int], bool] | None = None
    ) -> dict[str, list[Shard]]:
        """All shards, or those that are ``mine``."""
        workers = self.config.workers or _cpus()
        with self.report.phase("writing shards", _total(survey["splits"], "bytes")) as phase:
            return write_shards(
                self._documents(Counter()),
                tokenizer,
                self.output,
                token_dtype(tokenizer.vocab_size),
                max(1, int(self.config.shard_size_mb * 1e6)),
                workers,
                lambda documents, size, tokens: phase.update(size, documents=documents, tokens=tokens),
                self.report.note,
                self.plan_sha256,
                mine,
                self.config.chats,
            )

    def _settings(self) -> TokenizerSettings:
        """What stands beside the tokenizer that was given."""
        return TokenizerSettings() if self.given is None else self.given.settings

    def tokenizer(self) -> Tokenizer:
        """The one in the output folder, which `learn` made."""
        return Tokenizer(self.output / TOKENIZER_FILE, self._settings())

    def _write(self, survey: dict[str, Any]) -> Manifest:
        tokenizer = self.tokenizer()
        dtype = token_dtype(tokenizer.vocab_size)
        shards = self.write_shards(survey, tokenizer)
        splits = {split: write_index(self.output, split, shards[split]) for split in SPLITS}
        for name, split in splits.items():
            if {"documents": split.documents, "bytes": split.bytes} != survey["splits"][name]:
                raise UserError(
                    f"corpus {self.config.corpus} changed while it was read ({name}: {split.documents} "
                    f"documents, {survey['splits'][name]['documents']} before); use --force true"
                )
        found = self.staged.found() if self.staged is not None else None
        made_of = composition(self.output, splits, dtype, tokenizer.vocab_size)
        cleaning = (
            {"cleaning": {"read": found.read, "counts": dict(found.counts)}} if found is not None else {}
        )
        manifest = Manifest(
            folder=self.output,
            dtype=dtype,
            tokenizer=TokenizerInfo(
                TOKENIZER_FILE,
                tokenizer.sha256,
                tokenizer.vocab_size,
                tokenizer.bos_id,
                tokenizer.eos_id,
                tokenizer.pad_id if tokenizer.pad_id >= 0 else tokenizer.eos_id,
                self._settings().to_json(),
            ),
            splits=splits,
            preparation={
                "dualroute": __version__,
                "options": self.plan["options"],
                "licence": self.corpus.licence,
                "input_files": len(self.plan["inputs"]),
                "dropped": survey["dropped"],
                "files": survey.get("files", {}),
                "val_tail": survey.get("val_tail", False),
                "composition": made_of,
                **cleaning,
            },
        )
        hits = 0
        if self.staged is not None and self.config.decontaminate:
            hits = self.staged.write_hits(self.output / CONTAMINATED_FILE)
        write_report(manifest, found, hits, summary(manifest).splitlines())
        for name in SPLITS:
            manifest.check_index(name)  # what is wrong now would be believed ever after
        manifest.save(self.output)
        shutil.rmtree(self.state, ignore_errors=True)
        return manifest


def _sha256(plan: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(plan)).hexdigest()


def _cpus() -> int:
    """CPUs that this process may use (macOS cannot tell)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _total(counts: dict[str, dict[str, int]], key: str) -> int:
    return sum(count[key] for count in counts.values())
