"""Several optimizers, each of its own part of D."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]


class Several:
    """Optimizers that are stepped one after the other; state and settings are lists of theirs."""

    def __init__(self, inner: Sequence[Any]) -> None:
        counts = Counter(name for one in inner for name in one.names)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(
                "optimizer: the optimizers of a list must hold different parameters of the "
                f"discriminator; {twice[0]!r} has several. Give each parameter to one of them."
            )
        self._inner, self.names = inner, frozenset(counts)
        self.others: Sequence[Tensor] = [t for one in inner for t in one.others]
        self.traceable = all(one.traceable for one in inner)
        self.settings = [one.settings for one in inner]
        self.initial_state = [one.initial_state for one in inner]

    def step(
        self, parameters: Tensors, gradients: Tensors, state: Any, settings: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Return theta_D^{k+1} and the next state."""
        moved, new_state = dict(parameters), []
        for one, own, h in zip(self._inner, state, settings, strict=True):
            moved, following = one.step(moved, gradients, own, h)
            new_state.append(following)
        return moved, new_state

    def as_inputs(self, state: Any, settings: Any) -> tuple[Any, Any]:
        """Return both with their numbers as tensors, where all of it is compiled."""
        if not self.traceable:
            return state, settings
        triples = zip(self._inner, state, settings, strict=True)
        pairs = [one.as_inputs(own, h) for one, own, h in triples]
        return [own for own, _ in pairs], [h for _, h in pairs]

    def export(self, state: Any) -> list[Any]:
        """Return the states as the user's optimizers keep them."""
        return [one.export(own) for one, own in zip(self._inner, state, strict=True)]
