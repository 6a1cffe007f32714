"""One naive float64 implementation per rule, written from the paper: no stacks, no blocks, no in-place tricks.

A module `NAME.py` has `step(p, g, state, t, h)`: one matrix or vector, its gradient, a dictionary that starts empty,
the step from 1 and the settings of the group; it returns the new parameter. `SETTINGS` lists the settings to test
beside the defaults; `STRICT` holds settings under which the rule computes in its parameters' precision, and `TINY_LR`
one whose steps bfloat16 cannot resolve, where 5e-4 is none.
"""
