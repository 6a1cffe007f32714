"""Probes: each reads a model and its optimizer during training and makes reports, in any framework."""
