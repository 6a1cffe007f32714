"""One naive float64 implementation per rule, written from the paper: no stacks, no blocks, no in-place tricks.

A module `NAME.py` has `step(p, g, state, t, h)`: one matrix or vector, its gradient, a dictionary that starts with the
parameter's index, the step from 1 and the settings of the group; it returns the new parameter. `SETTINGS` lists the
settings to test beside the defaults. `STRICT` holds settings under which the rule computes in its parameters'
precision, `WITHOUT_DRAWS` ones under which it draws no random numbers. `FIRST_STEP` bounds the RMS of a first step
per unit lr under the adamw convention, where that is not about 0.2.
"""
