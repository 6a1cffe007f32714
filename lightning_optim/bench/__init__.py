"""The benchmark protocol: equal tuning budgets, tokens and time and memory together, every trial a line of JSON.

`python -m lightning_optim bench run | ablate | transfer | report`. What the commands need beyond torch is installed by
`pip install lightning-optim[bench]`.
"""
