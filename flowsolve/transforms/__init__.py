r"""How integer images become the state a flow models: declared once on the flow, `Flow(..., transform=...)`.

An image of D integers $k \in \{0, …, L-1\}^D$ occupies, in **levels**, the cell $k + [0, 1)^D$. A transform carries a
point $v = k + u$ of it to the state $x = T(v)$, number by number and monotonically, so that a density $p$ of states
gives the integers the probability

$$ P(k) = \int_{[0,1)^D} p\bigl(T(k+u)\bigr)\,\bigl|\det T'(k+u)\bigr|\,du . $$

$\log|\det T'|$ is all there is between nats of the state and bits of the integers; no constant such as 7 or 8 is
written down anywhere. For a transform of slope $\Delta$ it is $D\log\Delta$, and the offset is $-\log_2\Delta$ bits a
dimension:

| transform | $T(v)$ | offset, bits/dim |
|---|---|---|
| `Range(0, 1)`, 256 levels | $v/256$ | 8 |
| `Range(-1, 1)`, 256 levels | $2v/256 - 1$ | 7 |
| `Range(-1, 1, levels=32)` (5 bits) | $2v/32 - 1$ | 4 |
| `Range(-1, 1, levels=17)` | $2v/17 - 1$ | $\log_2 17 - 1 = 3.087$ |
| `Range(-1, 1, centred=True)`, 256 levels | $2(v-\tfrac12)/255 - 1$ | $\log_2 255 - 1 = 6.994$ |
| `Range(0, 1).then(Normalize(mean, std))` | $(v/256 - m)/s$ | $8 + \overline{\log_2 s}$ |
| `Range(0, 1).then(Logit(alpha))` | $\operatorname{logit}(\alpha + (1-2\alpha)v/256)$ | differs from image to image |

`centred` is the map $2k/255 - 1$ of images that are scaled and never dequantised: the levels 0 and L−1 lie *on* the
ends of the range, and each cell reaches half a level to either side. It differs from the plain one by up to half a
level, which is nothing to the eye and everything to a likelihood.

The logit of squeezed data is that of RealNVP (Dinh et al. 2017) and MAF (Papamakarios et al. 2017).
"""

from flowsolve.transforms.base import Chain, Map, Transform
from flowsolve.transforms.maps import Elementwise, Logit, Normalize
from flowsolve.transforms.scales import Latent, Range

__all__ = ["Chain", "Elementwise", "Latent", "Logit", "Map", "Normalize", "Range", "Transform"]
