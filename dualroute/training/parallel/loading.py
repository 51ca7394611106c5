"""A state that cannot be loaded is named, in one line.

torch and Lightning raise whatever they come across in a file that is damaged, or that another program wrote.
:class:`NamesTheState` stands before a strategy of one process or DDP, where every rank reads the one file.
"""

from __future__ import annotations

from typing import Any

from dualroute.errors import UserError

#: what Lightning reads of a state, and what it must be
_PARTS: dict[str, type] = {
    "state_dict": dict,
    "global_step": int,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


class NamesTheState:
    """Turns what loading raises into a :class:`UserError` that names the file."""

    _state = "the state"

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._state = str(checkpoint_path)
        try:
            state: Any = super().load_checkpoint(checkpoint_path, weights_only)  # type: ignore[misc]
        except UserError:
            raise
        except Exception as error:
            raise self._unusable("cannot be loaded", error) from error
        for name, kind in _PARTS.items():
            if not isinstance(state, dict) or not isinstance(state.get(name), kind):
                raise UserError(
                    f"{self._state} holds no {name} of a training: resume from another checkpoint (see the "
                    f"step-… folders beside it)"
                )
        return dict(state)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        try:
            super().load_model_state_dict(checkpoint, strict=strict)  # type: ignore[misc]
        except RuntimeError as error:
            raise self._unusable("does not fit the model of this configuration", error) from error

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        try:
            super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._unusable("does not fit the optimizer of this configuration", error) from error

    def _unusable(self, what: str, error: Exception) -> UserError:
        lines = [line.strip() for line in str(error).strip().splitlines()][:2]
        reason = " ".join(lines)[:300] or type(error).__name__
        return UserError(
            f"{self._state} {what} ({reason}): resume with the settings that it was trained with, or from "
            f"another checkpoint"
        )
