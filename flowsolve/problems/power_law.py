r"""Gaussian fields with power-law spectra, and scale mixtures of them: the second-order statistics of natural images.

The standard deviation of an image's Fourier coefficients falls off like $1/|k|$ (Field 1987), so there is structure at
every scale and, along a path, at every noise level: some coefficient is of the size of the noise from the first step to
the last. In an orthonormal basis of the states let component j have independent coefficients of zero mean and

$$ s_j(k, c) \propto b_j\,u_c\,\max(|k|, 1)^{-p_j}, \qquad s_j^2 \to s_j^2 + \nu^2, $$

with contrast $b_j$, slope $p_j$, shares $u_c$ of the colours and white noise ν (of quantisation, say). Components
differ in contrast and slope as patches of one photograph do (Gaussian scale mixtures: Wainwright & Simoncelli 2000).

**The basis.** Along the two axes of space the Hartley transform: with X the orthonormal discrete Fourier transform of a
real x,

$$ h = \operatorname{Re} X - \operatorname{Im} X , $$

which is real, orthogonal, its own inverse (Bracewell 1983) and costs one FFT. $s$ is the same at k and −k, so the
fields are stationary (periodic). Over channels the cosine transform (DCT-II), of which the first vector is grey.

In this basis the data are a `GaussianMixture`, all of whose answers are closed forms; an orthogonal change of basis
leaves densities and traces as they are. The flow map of a single component is

$$ h(k)_{t'} = h(k)_t\,\sqrt{\frac{\alpha_{t'}^2 s^2 + \sigma_{t'}^2}{\alpha_t^2 s^2 + \sigma_t^2}} , $$

since $u = \tfrac12 x\,d\log v/dt$ for a Gaussian of variance v. That of several components is solved: by RK4 in the
straight chart, $dy/ds = \hat z - \hat\varepsilon$ for $y = x/(\alpha+\sigma)$ against $s = \alpha/(\alpha+\sigma)$,
in equal steps of $w = \tanh(\lambda/8)$. There $s = (1+w)^4/((1+w)^4 + (1-w)^4)$ is smooth with $s' = 0$ at both ends,
so that all scales of a spectrum are resolved, and ends where λ is infinite are reached. Steps are halved until the
result stands still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowsolve._batch import hosted
from flowsolve.flow import Flow
from flowsolve.paths import Path, Point
from flowsolve.predictions import Prediction, resolve
from flowsolve.problems.mixture import DATA, Exact, GaussianMixture

__all__ = ["PowerLaw"]

NARROW = 0.25
FEWEST, MOST = 64, 8192


class PowerLaw:
    """A Gaussian field with a power-law spectrum, or a scale mixture of such, and its exact flow along any path.

    Args:
        shape: S, (H, W) or (C, H, W).
        slope: p, the exponent of 1/|k|, a number or one for each component; 1 is natural images', 0 white.
        contrast: b, relative root mean squares, a number or one for each component.
        weights: w, one for each component, > 0, normalised here; equal by default.
        scale: root mean square of the data, noise ν left out.
        colours: u, relative standard deviations along the channels' basis, (C,); 1, ¼, ¼, … by default.
        noise: ν, white noise that is part of the data.
        dtype: of samples and moments. Estimates are computed in the dtype of x.

    Raises:
        ValueError: a shape that is not (H, W) or (C, H, W), numbers of components that do not match, or values that
            are not finite or of the wrong sign.

    Examples:
        >>> images = fs.problems.PowerLaw((3, 32, 32), noise=0.004)
        >>> images.sample(2).shape, fs.sample(images.flow(fs.paths.CondOT()), (2, 3, 32, 32), nfe=4).x.shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        slope: float | Sequence[float] = 1.0,
        contrast: float | Sequence[float] = 1.0,
        weights: Sequence[float] | None = None,
        *,
        scale: float = 0.45,
        colours: Sequence[float] | None = None,
        noise: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = tuple(shape)
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"shape = {shape}; expected (H, W) or (C, H, W)")
        slopes, contrasts = _column("slope", slope), _column("contrast", contrast)
        count = max(len(slopes), len(contrasts))
        for name, given in (("slope", slopes), ("contrast", contrasts)):
            if len(given) not in (1, count):
                raise ValueError(f"{name} has {len(given)} values; expected 1 or {count}, the number of components")
        if not bool((contrasts > 0).all()):
            raise ValueError(f"contrast = {contrast!r}; expected values > 0")
        if not (math.isfinite(scale) and scale > 0.0):
            raise ValueError(f"scale = {scale!r}; expected a finite number > 0")
        if not (math.isfinite(noise) and noise >= 0.0):
            raise ValueError(f"noise = {noise!r}; expected a finite number >= 0")
        channels = shape[0] if len(shape) == 3 else 1
        share = _column("colours", [1.0, *[NARROW] * (channels - 1)] if colours is None else colours)
        if len(share) != channels or not bool((share > 0).all()):
            raise ValueError(f"colours = {colours!r}; expected {channels} values > 0, one for each channel")
        parts = [1.0] * count if weights is None else [float(w) for w in weights]
        if len(parts) != count or not all(math.isfinite(w) and w > 0.0 for w in parts):
            raise ValueError(f"weights = {weights!r}; expected {count} finite values > 0, one for each component")
        w = torch.tensor(parts, dtype=torch.float64, device="cpu") / math.fsum(parts)
        std = share.reshape(-1, 1, 1) * _radius(*shape[-2:]) ** -slopes.reshape(-1, 1, 1, 1)
        std = contrasts.reshape(-1, 1, 1, 1) * std / std.square().mean((1, 2, 3), keepdim=True).sqrt()
        std = std * (scale / (w @ std.square().mean((1, 2, 3))).sqrt())
        std = (std.square() + noise**2).sqrt().reshape(count, *shape)
        dtype = dtype or torch.get_default_dtype()
        self.shape = shape
        self.coefficients = GaussianMixture(torch.zeros_like(std), std, w, dtype=dtype)
        self._colours = _cosine(channels) if channels > 1 else None

    def __repr__(self) -> str:
        return f"PowerLaw({len(self.weights)} components, event shape {self.shape})"

    @property
    def weights(self) -> Tensor:
        """w, shape (K,)."""
        return self.coefficients.weights

    @property
    def std(self) -> Tensor:
        """s, the standard deviations in the basis, shape (K, *S)."""
        return self.coefficients.std

    @property
    def mean(self) -> Tensor:
        """E[z] = 0, shape S."""
        return self.coefficients.mean

    @property
    def cov(self) -> Tensor:
        """Covariance of the flattened state, shape (D, D)."""
        size = math.prod(self.shape)
        basis = self.back(torch.eye(size, dtype=self.std.dtype, device="cpu").reshape(size, *self.shape)).flatten(1)
        variance = torch.tensordot(self.weights, self.std.square(), dims=1).flatten()
        found: Tensor = basis.T @ (variance[:, None] * basis)
        return found

    def forth(self, x: Tensor) -> Tensor:
        """The coefficients of x of shape (B, *S) in the basis, of the same shape."""
        self._check(x)
        return _hartley(x if self._colours is None else _along(self._colours, x))

    def back(self, h: Tensor) -> Tensor:
        """The state with coefficients h of shape (B, *S); the inverse of `forth`."""
        self._check(h)
        x = _hartley(h)
        return x if self._colours is None else _along(self._colours.T, x)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n independent points, shape (n, *S)."""
        return self.back(self.coefficients.sample(n, seed))

    def log_prob(self, x: Tensor, point: Point = DATA) -> Tensor:
        """Log-density in nats of x of shape (B, *S), shape (B,); at a point of a path, that of x_t."""
        return self.coefficients.log_prob(self.forth(x), point)

    def data(self, x: Tensor, point: Point) -> Tensor:
        """E[z | x] at a point of a path (`path.at(t)`, t a float or of shape (B,)), shape (B, *S)."""
        return self.back(self.coefficients.data(self.forth(x), point))

    def noise(self, x: Tensor, point: Point) -> Tensor:
        """E[ε | x] at a point of a path, shape (B, *S)."""
        return self.combine(x, point, 0.0, 1.0)

    def score(self, x: Tensor, point: Point) -> Tensor:
        """∇ log p_t(x) at a point of a path, shape (B, *S); finite at σ = 0 too."""
        return self.back(self.coefficients.score(self.forth(x), point))

    def velocity(self, x: Tensor, point: Point) -> Tensor:
        """u = α̇ E[z | x] + σ̇ E[ε | x] at a point of a path, shape (B, *S)."""
        return self.combine(x, point, point.alpha_dot, point.sigma_dot)

    def combine(self, x: Tensor, point: Point, data: Any, noise: Any) -> Tensor:
        """data·E[z | x] + noise·E[ε | x] at a point of a path, weights as floats or of shape (B,)."""
        return self.back(self.coefficients.combine(self.forth(x), point, data, noise))

    def trace(self, x: Tensor, point: Point) -> Tensor:
        """tr ∂E[z | x]/∂x at a point of a path, shape (B,)."""
        return self.coefficients.trace(self.forth(x), point)

    def flow(self, path: Path, prediction: str | Prediction = "velocity") -> Flow:
        """The flow whose network outputs exactly what the prediction asks for, finite at both ends."""
        return Flow(Exact(self, path, resolve(prediction)), path, prediction)

    def flow_map(self, path: Path, x: Tensor, start: float = 0.0, end: float = 1.0, tolerance: float = 1e-9) -> Tensor:
        """Where the probability-flow ODE takes a state x of shape (B, *S) at flow time `start` by flow time `end`.

        A closed form for one component. For several, RK4 in float64 with ever more steps, until halving them changes no
        sample by more than `tolerance` of its norm; the error of what is returned is about a fifteenth of that.

        Raises:
            ValueError: the tolerance is not reached with 8,192 steps.
        """
        h, here, there = self.forth(x), path.at(float(start)), path.at(float(end))
        if len(self.weights) == 1:
            square = self.std[0].to(h).square()
            gain = (there.alpha**2 * square + there.sigma**2) / (here.alpha**2 * square + here.sigma**2)
            return self.back(gain.sqrt() * h)
        wide, steps = h.double(), FEWEST
        coarse = self._solved(path, wide, here, there, steps)
        while steps < MOST:
            steps *= 2
            fine = self._solved(path, wide, here, there, steps)
            if bool(((fine - coarse).flatten(1).norm(dim=1) <= tolerance * fine.flatten(1).norm(dim=1)).all()):
                return self.back(fine.to(h))
            coarse = fine
        raise ValueError(f"tolerance = {tolerance!r} is not reached with {MOST} steps; expected a larger one")

    def _solved(self, path: Path, h: Tensor, here: Point, there: Point, steps: int) -> Tensor:
        """RK4 in w, from coefficients h at a point of the path to another."""
        first, last = (math.tanh(0.125 * p.log_snr) for p in (here, there))
        y, size = h / (here.alpha + here.sigma), (last - first) / steps

        def slope(y: Tensor, w: float) -> Tensor:
            point, a, b = path.at(path.time(8.0 * math.atanh(w)) if abs(w) < 1.0 else float(w > 0)), 1.0 + w, 1.0 - w
            rate = 8.0 * (a * b) ** 3 / (a**4 + b**4) ** 2  # ds/dw of s = a⁴/(a⁴ + b⁴)
            return rate * self.coefficients.combine((point.alpha + point.sigma) * y, point, 1.0, -1.0)

        for i in range(steps):
            w, middle, after = (first + (last - first) * (i + j) / steps for j in (0.0, 0.5, 1.0))
            k1 = slope(y, w)
            k2 = slope(y + 0.5 * size * k1, middle)
            k3 = slope(y + 0.5 * size * k2, middle)
            k4 = slope(y + size * k3, after)
            y = y + size / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        reached: Tensor = (there.alpha + there.sigma) * y
        return reached

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, {', '.join(map(str, self.shape))})")


def _column(name: str, values: float | Sequence[float]) -> Tensor:
    found = hosted(values, dtype=torch.float64).reshape(-1)
    if not len(found) or not bool(found.isfinite().all()):
        raise ValueError(f"{name} = {values!r}; expected finite numbers")
    return found


def _radius(height: int, width: int) -> Tensor:
    """max(|k|, 1), in periods along the longer side, shape (1, 1, H, W)."""
    longer = float(max(height, width))
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) * longer for n in (height, width))
    radius: Tensor = (rows[:, None].square() + columns.square()).sqrt().clamp_min(1.0)
    return radius[None, None]


def _cosine(n: int) -> Tensor:
    """The orthonormal DCT-II, a vector a row, shape (n, n)."""
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    rows = torch.cos(math.pi / n * (i + 0.5) * i[:, None]) * math.sqrt(2.0 / n)
    rows[0] = math.sqrt(1.0 / n)
    return rows


def _along(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix applied to the channels of x, shape (B, C, H, W)."""
    found: Tensor = torch.einsum("dc,bchw->bdhw", matrix.to(x), x)
    return found


def _hartley(x: Tensor) -> Tensor:
    """The orthonormal Hartley transform over the last two axes, in the dtype of x (float32 at least inside)."""
    wide = x if x.dtype == torch.float64 else x.float()
    found = torch.fft.fft2(wide, norm="ortho")
    real: Tensor = (found.real - found.imag).to(x.dtype)
    return real
