"""Log lines: plain on the terminal, with time and rank in the run's file, and never what ends a run."""

import logging
import re

import pytest

from dualroute import log


@pytest.fixture
def logger():
    log.to_terminal()
    log.to_terminal()
    return logging.getLogger("dualroute.somewhere")


def test_the_terminal_shows_each_line_once_and_as_it_is(logger, capsys):
    logger.info("resuming from %s", "x")
    logger.warning("a disk is slow")
    logger.debug("not shown")
    out, err = capsys.readouterr()
    assert out == "resuming from x\n"
    assert err == "dualroute: warning: a disk is slow\n"


def test_the_file_has_time_and_rank_and_is_appended_to(logger, tmp_path):
    for rank in (0, 3):
        with log.to_file(tmp_path, rank):
            logger.info("step %d\nof two", rank)
    logger.info("after")
    first, second = (tmp_path / log.FILE).read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 0 INFO step 0 of two", first)
    assert second.endswith("rank 3 INFO step 3 of two")


def test_a_file_that_cannot_be_written_is_given_up_with_one_warning(logger, tmp_path, capsys):
    (tmp_path / log.FILE).mkdir()
    with log.to_file(tmp_path):
        logger.info("one")
        logger.info("two")
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert len(err.splitlines()) == 1
    assert "log.txt is not written any more" in err


def test_lines_wait_until_the_folder_may_be_written(logger, tmp_path):
    ready = False
    with log.to_file(tmp_path, ready=lambda: ready):
        logger.info("one")
        assert not any(tmp_path.iterdir())
        ready = True
        logger.info("two")
        logger.info("shown by a bar", extra={"on_terminal": True})
    assert [line.split(" INFO ")[1] for line in (tmp_path / log.FILE).read_text().splitlines()] == [
        "one",
        "two",
        "shown by a bar",
    ]
