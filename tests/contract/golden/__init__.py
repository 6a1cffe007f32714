"""Recorded trajectories (`cases`), their replayer and the mapping to our classes."""
