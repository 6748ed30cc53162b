"""Training: one objective and the literature's by name, couplings, averaged weights, a resumable trainer."""

from flowsolve.training import bridges, couplings, named, preconditioning, rectified, times, weights
from flowsolve.training.ema import EMA
from flowsolve.training.fitting import Trained, train
from flowsolve.training.interpolants import TwoHeaded
from flowsolve.training.losses import cfm_loss, dsm_loss
from flowsolve.training.objective import Draw, Objective
from flowsolve.training.pairing import Pairs, pairs
from flowsolve.training.power_ema import PowerEMA, posthoc
from flowsolve.training.rectified import distil, reflow
from flowsolve.training.trainer import Trainer

__all__ = [
    "EMA",
    "Draw",
    "Objective",
    "Pairs",
    "PowerEMA",
    "Trained",
    "Trainer",
    "TwoHeaded",
    "bridges",
    "cfm_loss",
    "couplings",
    "distil",
    "dsm_loss",
    "named",
    "pairs",
    "posthoc",
    "preconditioning",
    "rectified",
    "reflow",
    "times",
    "train",
    "weights",
]
