"""A suite measured during a training, every so many steps.

In: the suite of ``monitor.evaluate_suite`` and the model as it stands.  Out: {tag: figure} for the monitor,
under ``eval/`` in TensorBoard and in ``metrics.jsonl``, each with its standard error.

Every rank measures all of it, in step with the others: where the weights are divided among ranks, a forward
pass needs all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded
from dualroute.evaluate.suite.config import Suite
from dualroute.evaluate.suite.model import SuiteModel
from dualroute.evaluate.suite.run import cells_of
from dualroute.model.checkpoint.folder import Checkpoint


class SuiteDuringTraining:
    """Measures a suite.

    Args:
        suite: What.
        batch_size: Texts in one forward pass.
        folder: Of the run, to name it by.
        context: Of the training.
        alive: Called with the step before each cell, so that nobody takes the training for stalled.
    """

    def __init__(
        self,
        suite: Suite,
        batch_size: int,
        folder: Path,
        context: int,
        alive: Callable[[int], None],
    ) -> None:
        self.suite, self.batch_size, self.folder, self.context = suite, batch_size, folder, context
        self.alive = alive

    def check(self, pl_module: LightningModule) -> None:
        """Refuse a suite that does not fit the model, before the first step.

        Raises:
            UserError: A part cannot be measured; names it.
        """
        with self._model(pl_module, 0) as model:
            cells_of(self.suite, model, {})

    def __call__(self, pl_module: LightningModule, step: int) -> dict[str, float]:
        """The figures of the model as it stands; none, with a warning, where it gives no finite outputs."""
        figures: dict[str, float] = {}
        with self._model(pl_module, step) as model:
            for cell in cells_of(self.suite, model, {}):
                self.alive(step)
                try:
                    scores = cell.measure().scores
                except UserError as error:  # a training does not end for it
                    rank_zero_warn(f"step {step}: {cell.key} was not measured: {error}")
                    continue
                for score in scores:
                    figures[f"eval/{cell.key}/{score.metric}"] = score.value
                    if score.stderr is not None:
                        figures[f"eval/{cell.key}/{score.metric}_stderr"] = score.stderr
        return figures

    @contextmanager
    def _model(self, pl_module: LightningModule, step: int) -> Iterator[SuiteModel]:
        """The module's model as a suite asks it, whole texts on every rank."""
        inner: Any = pl_module
        model, group = inner.model, inner.model.sequence_group
        training = model.training
        model.set_sequence_group(None)
        model.eval()
        try:
            checkpoint = Checkpoint(self.folder, step, {"context": self.context})
            yield SuiteModel(Loaded(checkpoint, model, inner.tokenizer, pl_module.device), self.batch_size)
        finally:
            model.train(training)
            model.set_sequence_group(group)
