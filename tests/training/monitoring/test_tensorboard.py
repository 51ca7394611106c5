"""A disk that is full costs the curves of a run, not the run."""

import subprocess
import warnings

import pytest

from dualroute.training.monitoring.tensorboard import TensorBoard
from tests.training.step.test_module import attempt, curve


def test_a_full_disk_is_one_warning_that_names_the_folder(tmp_path, capfd):
    logger = TensorBoard(tmp_path, name="tensorboard", version="")
    writer = logger.experiment
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    kept = events.rename(tmp_path / "kept")
    size = kept.stat().st_size
    assert size > 50
    events.symlink_to("/dev/full")  # which opens, and takes nothing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2, 60):  # more than its queue holds
            writer.add_scalar("loss", 1.0, step)
            writer.flush()
        writer.add_text("config", "text", 60)
        writer.add_event(None, 60)
        logger.finalize("success")
    assert [str(w.message) for w in caught] == [
        f"{tmp_path}/tensorboard/ cannot be written (No space left on device): make room there; training "
        f"goes on without TensorBoard until it is started again, and metrics.jsonl has the same figures"
    ]
    assert "Traceback" not in capfd.readouterr().err


def test_where_it_cannot_begin_it_is_left_out(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    logger = TensorBoard(tmp_path, name="tensorboard", version="")
    with pytest.warns(UserWarning, match="tensorboard/ cannot be written"):
        logger.experiment.add_scalar("loss", 1.0, 1)
    logger.finalize("failed")


@pytest.mark.slow
def test_a_run_goes_on_while_its_curves_find_no_room(tiny_dataset, tmp_path):
    disk, output = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        (output / "tensorboard").symlink_to(disk)
        result = attempt(tiny_dataset, output, 40)
    finally:
        subprocess.run(["umount", str(disk)], check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("tensorboard/ cannot be written (No space left on device)") == 1
    assert "Traceback" not in result.stderr
    assert sorted(curve(output)) == list(range(1, 41))
