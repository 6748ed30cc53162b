"""The paths that tests run through: every class, and the corners of those that have some."""

from __future__ import annotations

from flowsolve.paths import EDM, VE, VP, CondOT, Cosine, Discrete, Path, SubVP, Trig

ZERO_TERMINAL = [0.9998, 0.97, 0.9, 0.74, 0.5, 0.31, 0.12, 0.0]
PATHS: dict[str, Path] = {
    "CondOT": CondOT(),
    "CondOT-sigma_min": CondOT(sigma_min=1e-3),
    "VP": VP(),
    "SubVP": SubVP(),
    "VE": VE(),
    "Cosine": Cosine(),
    "Trig": Trig(),
    "EDM": EDM(),
    "Discrete": Discrete.linear(),
    "Discrete-zero-terminal": Discrete(ZERO_TERMINAL),
    "Discrete-not-clean": Discrete.linear(40, clean=False),
}
