"""Pure functions on tensors `[..., m, n]`; nothing here knows an optimizer."""
