"""Curvature that is measured beside training, for optimizers whose rules need more than gradients."""

from lightning_optim.curvature.estimator import CurvatureEstimator
from lightning_optim.curvature.labels import Labels, categorical
from lightning_optim.curvature.loss_oracle import BatchLossOracle
from lightning_optim.curvature.measurement import EstimatorMethod
from lightning_optim.curvature.validation import check_settings, inputs_of, needs_curvature, searches
from lightning_optim.diagnostics.batches import first_rows

__all__ = [
    "BatchLossOracle",
    "CurvatureEstimator",
    "EstimatorMethod",
    "Labels",
    "categorical",
    "check_settings",
    "first_rows",
    "inputs_of",
    "needs_curvature",
    "searches",
]
