"""Search spaces: each module has `space(trial)` for Optuna and `GUIDE`, the point that is always tried first.

A space of your own is a Python file with the same two names: `--space my_space.py`.
"""
