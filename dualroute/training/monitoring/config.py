"""The options of ``dualroute report``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.paths import LocalPath
from dualroute.settings import at_least, check_fields


@dataclass
class ReportConfig:
    """Show what a run did.

    Args:
        run: The run folder.
        prompt: Beginning of the sample that the newest checkpoint writes.
        sample_tokens: Length of the sample.
    """

    run: LocalPath
    prompt: str = "The"
    sample_tokens: int = 120

    def __post_init__(self) -> None:
        check_fields(self, "", {"sample_tokens": at_least(1)}, may_be_empty=("prompt",))
