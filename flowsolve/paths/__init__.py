r"""Gaussian paths: the curve $(\alpha(t), \sigma(t))$ that joins noise to data.

Every Gaussian generative model moves along

$$ x_t = \alpha(t)\,z + \sigma(t)\,\varepsilon, \qquad t = 0:\ \text{pure noise} \;\to\; t = 1:\ \text{data}, $$

with $z$ a data point and $\varepsilon \sim N(0, I)$. Models differ in the curve and in the clock their network
was trained with; both are written down here and nowhere else. *Flow time* $t \in [0, 1]$ always runs from noise to
data. The clock of the network (the index of a discrete table, the diffusion time of an SDE, $\sigma$ itself) is the
path's *native time*, reached by `native_time` and left by `time_from_native`.

The log-SNR $\lambda(t) = \log(\alpha/\sigma)$ strictly increases. Two paths that pass through the same $\lambda$
differ there by a rescaling of $x$ only, which is why one solver serves them all. (Some papers call $2\lambda$ the
log-SNR; here, as in Lu et al. 2022, it is $\lambda$.)

| path | $\alpha$ | $\sigma$ | native time | source |
|---|---|---|---|---|
| `CondOT` | $t$ | $1-(1-\sigma_{\min})t$ | $t$ | Lipman et al. 2022 |
| `VP` | $e^{-L(\tau)}$ | $\sqrt{1-\alpha^2}$ | $\tau$ | Song et al. 2021 |
| `SubVP` | $e^{-L(\tau)}$ | $1-\alpha^2$ | $\tau$ | Song et al. 2021 |
| `Cosine` | $\cos\theta(\tau)/\cos\theta(0)$ | $\sqrt{1-\alpha^2}$ | $\tau$ | Nichol & Dhariwal 2021 |
| `Trig` | $\sin(\pi t/2)$ | $\cos(\pi t/2)$ | angle from the data | Albergo & Vanden-Eijnden 2023 |
| `VE` | $1$ | $\sigma_{\max}(\sigma_{\min}/\sigma_{\max})^t$ | $\sigma$ | Song et al. 2021 |
| `EDM` | $1$ | $((1-t)\sigma_{\max}^{1/\rho}+t\sigma_{\min}^{1/\rho})^\rho$ | $\sigma$ | Karras et al. 2022 |
| `Discrete` | from a table $\bar\alpha_k$ | $\sqrt{1-\bar\alpha_k}$ | index $k$ | Ho et al. 2020 |

with $L(\tau) = \tfrac14(\beta_1-\beta_0)\tau^2 + \tfrac12\beta_0\tau$ and
$\theta(\tau) = \tfrac\pi2\,\frac{\tau+s}{1+s}$. The diffusion time $\tau$ runs from 1 (noise) to `tau_min` (data):
$\sigma \propto \sqrt\tau$ has no finite slope at $\tau = 0$, and no network is trained there.

Times are Python floats or tensors. One formula serves both, because `math` and `torch` share their function names; all
of it is float64. $\alpha$, $\sigma$ and their derivatives are finite on all of $[0, 1]$, and $\lambda$ saturates at
$\pm 708.4$, where $\alpha/\sigma$ leaves the range of float64, so that no difference of log-SNRs is ever NaN.
"""

from flowsolve.paths.base import Path, Point
from flowsolve.paths.continuous import EDM, VE, VP, CondOT, Cosine, SubVP, Trig
from flowsolve.paths.discrete import Discrete

__all__ = ["EDM", "VE", "VP", "CondOT", "Cosine", "Discrete", "Path", "Point", "SubVP", "Trig"]
