"""Problems with known answers, and data: Gaussian mixtures, power-law fields, planar toys, digits, photographs."""

from flowsolve.problems import digits, patches
from flowsolve.problems.mixture import GaussianMixture
from flowsolve.problems.power_law import PowerLaw
from flowsolve.problems.toys import checkerboard, eight_gaussians, moons

__all__ = ["GaussianMixture", "PowerLaw", "checkerboard", "digits", "eight_gaussians", "moons", "patches"]
