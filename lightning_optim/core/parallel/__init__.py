"""Sharded parameters and replicas: the only code that imports torch.distributed."""
