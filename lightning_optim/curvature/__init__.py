"""Curvature that is measured beside training, for optimizers whose rules need more than gradients."""

from lightning_optim.curvature.estimator import CurvatureEstimator
from lightning_optim.curvature.labels import Labels, categorical
from lightning_optim.curvature.loss_oracle import BatchLossOracle
from lightning_optim.curvature.measurement import EstimatorMethod, first_rows
from lightning_optim.curvature.validation import check_settings, compare_losses, needs_curvature

__all__ = [
    "BatchLossOracle",
    "CurvatureEstimator",
    "EstimatorMethod",
    "Labels",
    "categorical",
    "check_settings",
    "compare_losses",
    "first_rows",
    "needs_curvature",
]
