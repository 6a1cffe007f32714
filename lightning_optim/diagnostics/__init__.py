"""What training looks like from the optimizer: pure functions of matrices, and probes that read an optimizer."""
