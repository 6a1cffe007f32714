"""Lightning callbacks, for readers of the repository; installed, they are `lightning_optim.callbacks`."""

from lightning_optim.callbacks import *  # noqa: F403
from lightning_optim.callbacks import __all__ as __all__
