"""Faster ways to compute what plain torch operations say; every function here has such a twin, which tests compare."""
