"""Search spaces: each module has `space(trial)` for Optuna, and `GUIDE`, the point that is always tried first.

A space of your own is a Python file with the same two names: `--space my_space.py`. `space` returns settings of
`train_fn/settings.py` in their own types: whole numbers for counts, a list of texts for modules. The same values must
give the same settings, because a study that goes on calls `space` again. Optuna takes numbers, texts, True, False and
None as choices.

In a study, `trial` also has `trial.base` (model_type, hidden_size and the usual learning_rate of the base's language
model), `trial.workers` (workers per trial), `trial.pinned` (the settings that the command line gives) and
`trial.search_alpha`. See `tune/config/space.py`. A space of your own may go on from a shipped one: `from search_spaces
import lora`.
"""
