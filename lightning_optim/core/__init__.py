"""The step loop and what it stands on: rules, chunks, storage, layout. The only code that knows torch.distributed."""
