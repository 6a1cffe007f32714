"""State tensors: their storage formats, allocation, and their form in a checkpoint."""
