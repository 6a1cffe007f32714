"""The phases of a step, in their order: plan, preflight, curvature input, refreshes, directions, apply."""
