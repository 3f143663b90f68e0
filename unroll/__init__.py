"""Unrolled generative adversarial networks as a drop-in generator loss."""

from unroll.checks import GradientReport as GradientReport
from unroll.checks import check_gradients as check_gradients
from unroll.checks import gradient_terms as gradient_terms
from unroll.loss import UnrolledDiscriminator as UnrolledDiscriminator
from unroll.loss import UnrolledGeneratorLoss as UnrolledGeneratorLoss
from unroll.objectives import Criterion as Criterion
from unroll.objectives import Hinge as Hinge
from unroll.objectives import LeastSquares as LeastSquares
from unroll.objectives import Minimax as Minimax
from unroll.objectives import NonSaturating as NonSaturating
from unroll.objectives import Objective as Objective
from unroll.objectives import RelativisticAverage as RelativisticAverage
from unroll.objectives import RelativisticPairing as RelativisticPairing
from unroll.objectives import Wasserstein as Wasserstein
from unroll.penalties import R1 as R1
from unroll.penalties import R2 as R2
from unroll.penalties import GradientPenalty as GradientPenalty
