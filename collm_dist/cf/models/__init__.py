"""Collaborative-filtering models, one file each; custom models subclass ``TrainableCfModel``."""

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.models.interface import CfModel, TrainableCfModel

__all__ = ["CfBatch", "CfModel", "TrainableCfModel"]
