"""How samples spread over discrete classes: modes covered, entropy, reverse KL.

All logarithms are natural. Labels are those of `lab.metrics.classifier`, and a stack of three
digits is one of 1,000 modes (section 3.3.1 of the paper).
"""

import numpy as np
from scipy.special import entr, rel_entr  # scipy.stats is slow to import
from torch import Tensor


def stack_labels(digits: Tensor) -> Tensor:
    """Return the modes, from 0 to 999, of stacks whose digits are `(N, 3)`."""
    return digits @ digits.new_tensor([100, 10, 1])


def counts(labels: Tensor, classes: int) -> np.ndarray:
    """Return how many samples each class has."""
    return np.bincount(labels.cpu().numpy(), minlength=classes)


def mode_metrics(labels: Tensor, modes: int = 1000) -> dict[str, float]:
    """Return Table 1's metrics: modes with at least one sample, and KL(model || uniform)."""
    found = counts(labels, modes)
    kl = rel_entr(found / found.sum(), 1 / modes).sum()  # log(modes) where a single one has all
    return {"modes": int((found > 0).sum()), "reverse_kl": float(kl)}


def class_metrics(labels: Tensor, classes: int = 10) -> dict[str, float]:
    """Return classes with at least one sample, their entropy, and the class that has most."""
    found = counts(labels, classes)
    return {
        "classes": int((found > 0).sum()),
        "class_entropy": float(entr(found / found.sum()).sum()),  # log(classes) where all are equal
        "dominant_class": int(found.argmax()),
        "dominant_share": float(found.max() / len(labels)),
    }
