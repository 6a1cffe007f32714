"""Lightning callbacks, imported as `lightning_optim.callbacks`."""

# This folder has two names; here it is the package's.
from .hybrid import HybridOptimizer  # noqa: TID251
from .relora import ReLoRA  # noqa: TID251

__all__ = ["HybridOptimizer", "ReLoRA"]
