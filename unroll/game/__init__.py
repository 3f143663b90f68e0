"""The game that the discriminator and the generator play: objectives and penalties."""

from __future__ import annotations

import warnings

from torch import nn

from unroll.game.objectives import (
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    Objective,
    RelativisticAverage,
    RelativisticPairing,
    Wasserstein,
)
from unroll.game.penalties import Sum


def check_objective(objective: object) -> None:
    """Refuse what is not an objective."""
    for method in ("discriminator_loss", "generator_loss"):
        if isinstance(objective, type) or not callable(getattr(objective, method, None)):
            raise TypeError(
                "objective: must be an object with the methods discriminator_loss and "
                f"generator_loss; got {objective!r}. Pass for instance unroll.Minimax(), or wrap "
                "a torch loss in unroll.Criterion(...)."
            )


def parts(objective: Objective) -> list[Objective]:
    """Return what an objective is the sum of."""
    if isinstance(objective, Sum):
        return [*parts(objective.first), *parts(objective.second)]
    return [objective]


def warn_of_sigmoid(module: nn.Module, objective: Objective) -> None:
    """Warn of a discriminator that returns probabilities to an objective that takes logits."""
    if _expects_logits(objective) and isinstance(list(module.modules())[-1], nn.Sigmoid):
        warnings.warn(
            "discriminator: ends in nn.Sigmoid, but the objective takes logits and would apply a "
            "second one. Remove the Sigmoid, or use unroll.Criterion(nn.BCELoss()).",
            stacklevel=3,
        )


def _expects_logits(objective: Objective) -> bool:
    if isinstance(objective, Sum):
        return _expects_logits(objective.first) or _expects_logits(objective.second)
    separable = (Minimax, NonSaturating, LeastSquares, Hinge, Wasserstein)
    return isinstance(objective, (*separable, RelativisticPairing, RelativisticAverage))
