"""What a run shows of itself: the keys of ``monitor``; and the options of ``dualroute report``.

No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dualroute.errors import UserError
from dualroute.paths import LocalPath, SuiteName
from dualroute.settings import above, at_least, check_fields


@dataclass
class MonitorConfig:
    """What is written, and how often.

    Args:
        log_every_steps: Optimizer steps between two lines of training metrics; the first and the last step
            always have one.
        router_statistics_every: Optimizer steps between two readings of the attention's router; 0 never.
        router_images_every: Optimizer steps between two heat maps of what each layer's global route reads, as
            images of TensorBoard; 0 never.  Axes and a scale need matplotlib.
        sample_every_steps: Optimizer steps between two samples of generated text, the first at the validation
            before the first step; 0 never.
        sample_prompts: Beginnings that the samples continue.
        sample_tokens: New tokens per sample.
        evaluate_suite: What ``dualroute evaluate --suite`` measures, also during the training: the name of a
            suite, or a YAML file.
        evaluate_every_steps: Optimizer steps between two such measurements; 0 never.
        peak_tflops: Dense bfloat16 peak of one device for the model FLOPs utilisation; null takes it from a
            table of NVIDIA GPUs and measures a matmul on any other device.
        profile_at_step: Optimizer step from which on torch.profiler records the first rank, into
            OUTPUT/profile; null never.
        profile_steps: Optimizer steps that are recorded then.
        alert_data_wait: Share of a step's time spent waiting for data above which an alert is raised; 0
            never.
        alert_router_entropy: Router entropy of a layer, 0 to 1, below which its router counts as collapsed; 0
            never.
        webhook: An address, http:// or https://, to which each alert is POSTed as a small JSON object; an
            address that does not answer never stops a run.
        webhook_seconds: How long such a request may take.
        wandb: Project of Weights & Biases to which the same figures go; WANDB_MODE=offline keeps them in the
            run folder.
        mlflow: Address of an MLflow server, or file:///FOLDER, to which the same figures go.
    """

    log_every_steps: int = 10
    router_statistics_every: int = 100
    router_images_every: int = 500
    sample_every_steps: int = 500
    sample_prompts: list[str] = field(default_factory=lambda: ["Once upon a time", "The"])
    sample_tokens: int = 100
    evaluate_suite: SuiteName | None = None
    evaluate_every_steps: int = 0
    peak_tflops: float | None = None
    profile_at_step: int | None = None
    profile_steps: int = 3
    alert_data_wait: float = 0.05
    alert_router_entropy: float = 0.05
    webhook: str | None = None
    webhook_seconds: float = 5.0
    wandb: str | None = None
    mlflow: str | None = None

    def __post_init__(self) -> None:
        ranges = {
            "log_every_steps": at_least(1),
            "router_statistics_every": at_least(0),
            "router_images_every": at_least(0),
            "sample_every_steps": at_least(0),
            "sample_tokens": at_least(1),
            "evaluate_every_steps": at_least(0),
            "peak_tflops": above(0),
            "profile_at_step": at_least(1),
            "profile_steps": at_least(1, 1000),
            "alert_data_wait": at_least(0, 1),
            "alert_router_entropy": at_least(0, 1),
            "webhook_seconds": above(0, 60),
        }
        check_fields(self, "monitor", ranges)
        if self.evaluate_every_steps and self.evaluate_suite is None:
            raise UserError(
                f"monitor.evaluate_every_steps is {self.evaluate_every_steps}, and monitor.evaluate_suite "
                "names no suite: give one"
            )
        _check_address("monitor.webhook", self.webhook, ("http", "https"))
        _check_address("monitor.mlflow", self.mlflow, ("http", "https", "file"))


def _check_address(key: str, address: str | None, schemes: tuple[str, ...]) -> None:
    if address is None:
        return
    try:
        parts = urlsplit(address)
        fits = parts.scheme in schemes and bool(parts.path if parts.scheme == "file" else parts.hostname)
        _ = parts.port  # which raises where it is no number
    except ValueError:
        fits = False
    if not fits or any(ord(character) <= 32 for character in address):
        choices = " or ".join(f"{scheme}://…" for scheme in schemes)
        raise UserError(f"{key} is {address!r}: give an address that begins with {choices}")


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
