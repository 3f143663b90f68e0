"""Unrolled generative adversarial networks as a drop-in generator loss."""

from unroll.checks import GradientReport as GradientReport
from unroll.checks import check_gradients as check_gradients
from unroll.checks import gradient_terms as gradient_terms
from unroll.game.objectives import Criterion as Criterion
from unroll.game.objectives import Hinge as Hinge
from unroll.game.objectives import LeastSquares as LeastSquares
from unroll.game.objectives import Minimax as Minimax
from unroll.game.objectives import NonSaturating as NonSaturating
from unroll.game.objectives import Objective as Objective
from unroll.game.objectives import RelativisticAverage as RelativisticAverage
from unroll.game.objectives import RelativisticPairing as RelativisticPairing
from unroll.game.objectives import Wasserstein as Wasserstein
from unroll.game.penalties import R1 as R1
from unroll.game.penalties import R2 as R2
from unroll.game.penalties import GradientPenalty as GradientPenalty
from unroll.loss import UnrolledGeneratorLoss as UnrolledGeneratorLoss
from unroll.steps.discriminator import UnrolledDiscriminator as UnrolledDiscriminator
