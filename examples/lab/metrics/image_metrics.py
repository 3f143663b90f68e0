"""How near generated images are to real ones, from their features.

Fréchet and kernel distance, the Inception Score and improved precision and recall (Kynkäänniemi et
al. 2019, 3 neighbours) are torch-fidelity's. This module adds the precision-recall distribution of
Sajjadi et al., "Assessing Generative Models via Precision and Recall" (2018), the third metric of
RS-GAN's `eval.py`.
"""

import math
import warnings

import numpy as np
from numpy.typing import NDArray

from lab.metrics.features import Embedding

METRICS = {
    "fid": "FID",
    "kid": "KID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "f_8": "F_8",
    "f_1_8": "F_1/8",
}
Floats = NDArray[np.float64]
SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as published; smaller for few images
CLUSTERS, ANGLES, CLUSTERINGS = 20, 1001, 10  # of Sajjadi et al.


def measure(fake: Embedding, real: Embedding, *, seed: int = 0) -> dict[str, float]:
    """Return every metric; the Inception Score is NaN for features without logits.

    Args:
        fake: The generated images.
        real: Those of the data; the precision-recall distribution takes as many of either.
        seed: Of the kernel distance's subsets and the clusterings.
    """
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc  # slow to import

    if fake.features.shape[1:] != real.features.shape[1:]:
        shapes = tuple(fake.features.shape), tuple(real.features.shape)
        raise ValueError(f"features of fake and real images must have one size, got {shapes}")
    statistics = [metric_fid.fid_features_to_statistics(x.features) for x in (fake, real)]
    fid = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    size = min(SUBSET_SIZE, max(min(len(fake.features), len(real.features)) // 4, 2))
    kid = metric_kid.kid_features_to_metric(
        *(fake.features, real.features),
        kid_subsets=SUBSETS,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    neighbours = metric_prc.prc_features_to_metric(
        *(fake.features, real.features), save_cpu_ram=True, prc_batch_size=1000, verbose=False
    )
    score = math.nan
    if fake.logits is not None:
        score = metric_isc.isc_features_to_metric(fake.logits)["inception_score_mean"]
    f_8, f_1_8 = f_scores(*prd(fake.features.numpy(), real.features.numpy(), seed=seed))
    return {
        "fid": fid["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "inception_score": score,
        "precision": neighbours["precision"],
        "recall": neighbours["recall"],
        "f_8": f_8,
        "f_1_8": f_1_8,
    }


def prd(fake: Floats, real: Floats, *, seed: int = 0) -> tuple[Floats, Floats]:
    """Return the precision-recall distribution of samples: the mean over several clusterings."""
    from sklearn.cluster import MiniBatchKMeans  # slow to import

    count = min(len(fake), len(real))
    rng = np.random.default_rng(seed)
    both = np.concatenate([x[rng.permutation(len(x))[:count]] for x in (fake, real)])
    curves = []
    for number in range(CLUSTERINGS):
        kmeans = MiniBatchKMeans(min(CLUSTERS, len(both)), n_init=10, random_state=seed + number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct points than clusters: empty ones
            cluster = kmeans.fit_predict(both)
        parts = cluster[:count], cluster[count:]
        curves.append(
            prd_of_histograms(*(np.bincount(p, minlength=CLUSTERS) / count for p in parts))
        )
    precisions, recalls = np.mean(curves, axis=0)
    return precisions, recalls


def prd_of_histograms(fake: Floats, real: Floats) -> tuple[Floats, Floats]:
    """Return precision and recall for slopes from 0 to infinity (their Eqs. 3 and 4, Alg. 1).

    With P the data's distribution and Q the generator's, over the clusters:
    precision alpha(slope) = sum min(slope P, Q), and recall beta(slope) = alpha(slope) / slope.
    """
    angles = np.linspace(0, np.pi / 2, ANGLES + 2)[1:-1]
    slope = np.tan(angles)[:, None]
    precision = np.minimum(slope * real, fake).sum(1)
    recall = np.minimum(real, fake / slope).sum(1)
    return precision, recall


def f_scores(precision: Floats, recall: Floats, beta: float = 8) -> tuple[float, float]:
    """Return the largest F_beta, weighted towards recall, and F_1/beta, towards precision."""

    def best(weight: float) -> float:
        total = weight**2 * precision + recall
        ratio = np.divide(precision * recall, total, out=np.zeros_like(total), where=total > 0)
        return float((1 + weight**2) * ratio.max())

    return best(beta), best(1 / beta)
