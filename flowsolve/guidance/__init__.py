r"""Guidance: flows made of other flows. A guided flow *is* a `Flow`, for every solver, driver, batch and likelihood.

Everything acts in the plane of $(\hat z, \hat\varepsilon)$, so that it does not matter what a network was trained to
output. With $c$ the estimate of the network given its conditioning, $u$ that of a weaker one at the same $(x, t)$, and
$w$ the scale:

| flow | estimate | source |
|---|---|---|
| `ClassifierFree(flow, w)` | $u + w\,(c - u)$, $u$ without the conditioning | Ho & Salimans 2022 |
| `Autoguidance(flow, weak, w)` | $u + w\,(c - u)$, $u$ by another flow | Karras et al. 2024 |
| `Classifier(flow, log_prob, w)` | $\hat\varepsilon - w\,\sigma\,\nabla_x\log p(y\mid x,t)$ | Dhariwal & Nichol 2021 |
| `Posterior(flow, log_prob, w)` | $\hat\varepsilon - w\,\sigma\,\nabla_x\log p(y\mid\hat z(x,t))$ | Chung et al. 2023 |
| `Transformed(flow, f)` | $f(\hat z)$, and $\hat\varepsilon = (x - \alpha f(\hat z))/\sigma$ | Saharia et al. 2022 |

**What is linear.** At a fixed $(x, t)$ every output is affine in $\hat z$: $o = k\,x + m\,\hat z$, with numbers $k, m$
of the prediction and the time (`flowsolve.predictions`). The weights of $u + w(c-u)$ add up to 1, so
$o_u + w(o_c - o_u) = k\,x + m\,(\hat z_u + w(\hat z_c - \hat z_u))$: extrapolating any output extrapolates
$\hat z$ and $\hat\varepsilon$, and all predictions give the same guided estimate. It keeps
$x = \alpha\hat z + \sigma\hat\varepsilon$ too, for the same reason.

**What is not.** Norms, projections, clipping, and sums whose weights do not add up to 1 depend on the space. Each says
which it acts in (`flowsolve.guidance.rules`, `transforms`); what is changed there by a given amount changes the other
estimate so that $x = \alpha\hat z + \sigma\hat\varepsilon$ stays true.

**Where.** `interval` is one of log-SNR λ = log(α/σ), or of σ/α (`Interval.sigma`), never of steps, so it does not move
with the grid (Kynkäänniemi et al. 2024). Outside it the flow is not guided, and only its own network runs. What an
estimate costs then depends on time (`Flow.cost`): NFE counts what ran, for each sample, and `nfe=` is the most that a
sample may cost (`flowsolve.planning`).

**A density** under guidance is that of what the guided ODE makes of the prior. It is not p(x | y): the guided field is
not the velocity of a family of noised data. `Flow.caveats` says so.
"""

from flowsolve.guidance.autoguidance import Autoguidance
from flowsolve.guidance.base import Guided, Interval
from flowsolve.guidance.classifier_free import ClassifierFree
from flowsolve.guidance.gradient import Classifier, Posterior
from flowsolve.guidance.rules import APG, ZeroStar
from flowsolve.guidance.transforms import Clip, Threshold, Transformed

__all__ = [
    "APG",
    "Autoguidance",
    "Classifier",
    "ClassifierFree",
    "Clip",
    "Guided",
    "Interval",
    "Posterior",
    "Threshold",
    "Transformed",
    "ZeroStar",
]
