"""What a self-check answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What :func:`check_gradients` or :func:`check_step` found.

    Attributes:
        verdict: ``"right"``, ``"wrong"`` or, where nothing can be told, ``"inconclusive"``.
        relative_error: The largest difference that was found: of a directional derivative from its
            central difference, relative to the gradient's norm, or of D's gradients and moves in a
            step of the loop from those in the look-ahead, relative to the latter. Infinite where
            there is nothing to compare.
        suspicions: What is to blame and what mends it, or why nothing can be told, in words; empty
            if all is right.
    """

    verdict: str
    relative_error: float
    suspicions: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the verdict is ``"right"``."""
        return self.verdict == "right"


GradientReport = Report
StepReport = Report


def unclear(reason: str) -> Report:
    """Return that nothing can be told, and why."""
    return Report("inconclusive", float("inf"), (reason,))
