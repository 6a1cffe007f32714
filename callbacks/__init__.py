"""Lightning callbacks, imported as `lightning_optim.callbacks`."""

from .hybrid import HybridOptimizer  # noqa: TID251  (this folder has two names; here it is the package's)

__all__ = ["HybridOptimizer"]
