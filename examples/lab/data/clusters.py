"""Two clusters on a line: the data, and where a generator's samples are among them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLES = 100
CENTRES = (0.0, 4.0)
SPREAD = 0.3  # each cluster is uniform on [centre, centre + SPREAD]
NEAR = 1.2 * SPREAD  # from a centre: the authors' count of samples in a cluster
AROUND = 1.0  # from the middle of a cluster: a quarter of the way to the other
COVERED = SAMPLES // 4  # around a cluster: half of its share
COLLAPSED = 9 * SAMPLES // 10  # around one cluster, with none around the other
PLATEAU = dict.fromkeys(("JS", "minimax"), math.log(3) / 4 + math.log(3 / 2) / 2)
PLATEAU["Rp"] = math.log(2) / 2
MATCHED = math.log(2)


def clusters(rng: torch.Generator) -> Tensor:
    """Return the data: points of the two clusters by turns, in one row."""
    centres = torch.tensor(CENTRES, device=rng.device).repeat(SAMPLES // 2)
    offsets = torch.rand(SAMPLES, generator=rng, device=rng.device)
    return (centres + SPREAD * offsets)[None]


def noises(rng: torch.Generator) -> Tensor:
    """Return the generator's inputs, uniform on [-5, 5], in one row."""
    return 10 * torch.rand(1, SAMPLES, generator=rng, device=rng.device) - 5


def counts(fake: Tensor) -> dict[str, int]:
    """Count the samples near each centre, as the authors do, and in a wider window around it."""
    found = {}
    for name, centre in zip(("first", "second"), CENTRES, strict=True):
        found[f"near_{name}"] = int(((fake - centre).abs() < NEAR).sum())
        found[f"around_{name}"] = int(((fake - centre - SPREAD / 2).abs() < AROUND).sum())
    return found


def landmarks(
    epochs: int, row: Mapping[str, float], earlier: Sequence[Mapping[str, Any]], game: str
) -> dict[str, int]:
    """Follow one seed through the landscape.

    Returns:
        covers: Whether both clusters have half of their share of the samples around them.
        covered_at: The epoch of the first evaluation that did; -1 before.
        collapsed: Evaluations so far with 90 of 100 samples around one cluster and none around
            the other.
        on_plateau: Those of them with D's loss within 0.02 of the collapsed optimum.
    """
    few, many = sorted((row["around_first"], row["around_second"]))
    covers = few >= COVERED
    collapsed = many >= COLLAPSED and few == 0
    on_plateau = collapsed and abs(row["d_loss"] - PLATEAU[game]) < 0.02
    start = {"covered_at": -1, "collapsed": 0, "on_plateau": 0}
    before = earlier[-1] if earlier else start
    first = epochs if covers and before["covered_at"] < 0 else before["covered_at"]
    return {
        "covers": int(covers),
        "covered_at": first,
        "collapsed": before["collapsed"] + collapsed,
        "on_plateau": before["on_plateau"] + on_plateau,
    }
