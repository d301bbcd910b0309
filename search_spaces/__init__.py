"""Search spaces: each module has `space(trial)` for Optuna and `GUIDE`, the point that is always tried first.

A space of your own is a Python file with the same two names: `--space my_space.py`. `space` must return the same
settings for the same values, since a study that goes on asks it again. They are those of `train_fn/settings.py`, type
for type: whole numbers for counts, a list of texts for modules. Optuna takes numbers, texts, True, False and None as
choices.
"""
