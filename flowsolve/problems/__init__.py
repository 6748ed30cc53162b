"""Problems with known answers: Gaussian mixtures, power-law fields, planar toys, and scikit-learn's 8×8 digits."""

from flowsolve.problems import digits
from flowsolve.problems.mixture import GaussianMixture
from flowsolve.problems.power_law import PowerLaw
from flowsolve.problems.toys import checkerboard, eight_gaussians, moons

__all__ = ["GaussianMixture", "PowerLaw", "checkerboard", "digits", "eight_gaussians", "moons"]
