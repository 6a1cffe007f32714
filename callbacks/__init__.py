"""Lightning callbacks, imported as `lightning_optim.callbacks`."""
