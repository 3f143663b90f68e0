"""The surrogate loss of unrolled GANs (Metz et al., ICLR 2017), with the right gradient."""

from unroll._diagnostics.check_gradients import check_gradients
from unroll._diagnostics.check_step import check_step
from unroll._diagnostics.gradient_terms import gradient_terms
from unroll._diagnostics.report import GradientReport, StepReport
from unroll._functional import Batch
from unroll._loss import UnrolledGeneratorLoss
from unroll._objectives import (
    Criterion,
    Discriminator,
    Hinge,
    LeastSquares,
    Losses,
    Minimax,
    NonSaturating,
    Objective,
    RelativisticAverage,
    RelativisticPairing,
    Wasserstein,
)
from unroll._optimizers.grouped import register_rule
from unroll._penalties import R1, R2, GradientPenalty
from unroll._transforms import ClipGradNorm, ClipGradValue
from unroll._unrolled_discriminator import UnrolledDiscriminator

__version__ = "0.1.0"
__all__ = [
    "R1",
    "R2",
    "Batch",
    "ClipGradNorm",
    "ClipGradValue",
    "Criterion",
    "Discriminator",
    "GradientPenalty",
    "GradientReport",
    "Hinge",
    "LeastSquares",
    "Losses",
    "Minimax",
    "NonSaturating",
    "Objective",
    "RelativisticAverage",
    "RelativisticPairing",
    "StepReport",
    "UnrolledDiscriminator",
    "UnrolledGeneratorLoss",
    "Wasserstein",
    "check_gradients",
    "check_step",
    "gradient_terms",
    "register_rule",
]
