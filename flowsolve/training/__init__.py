"""Training: the losses of flow matching and score matching, averaged weights, a small resumable trainer."""

from flowsolve.training import times, weights
from flowsolve.training.ema import EMA
from flowsolve.training.losses import cfm_loss, dsm_loss
from flowsolve.training.trainer import Trainer

__all__ = ["EMA", "Trainer", "cfm_loss", "dsm_loss", "times", "weights"]
