"""Which points a study has tried: two trials with the same settings and the same seed would train the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from train_fn.settings import MAX_SEED, TrialSettings
from tune.records.end_state import EndState
from tune.records.trials import TrialRecord

NOT_TRAINED_BY = ("logging_steps", "save_steps", "save_total_limit")  # they decide only what is written
# Between two seeds of a point. `--confirm` trains a point with up to 1,000 seeds that follow its own.
SEED_STEP = 1001

Key = tuple[tuple[str, Any], ...]


def training_key(settings: TrialSettings) -> Key:
    """What a trial trains with. Settings without effect beside the others are left out: two trials with equal keys
    train the same weights."""
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_TRAINED_BY}
    if settings.train_projector:
        values["projector_learning_rate"] = settings.projector_learning_rate or settings.learning_rate
    else:
        del values["projector_learning_rate"]
    if settings.train_vision == "lora":
        values["vision_learning_rate"] = settings.vision_learning_rate or settings.learning_rate
    else:
        del values["vision_learning_rate"]
    if settings.augment == "none":
        del values["augment_variants"]
    if settings.max_steps:
        del values["num_train_epochs"]
    if not (settings.use_lora or settings.projector_lora or settings.train_vision == "lora"):
        adapter = ("learning_rate", "use_rslora", "use_dora", "loraplus_lr_ratio")
        values = {name: value for name, value in values.items() if name not in adapter and not name.startswith("lora_")}
    return tuple(values.items())


class Tried:
    """The points of a study's trials, also of those that failed.

    A trial whose workers died or ran out of memory has been repeated, in ways that take less memory, before it failed:
    its point would most probably fail again.
    """

    def __init__(self, records: Iterable[TrialRecord]) -> None:
        self._first: dict[Key, TrialRecord] = {}
        for record in sorted(records, key=lambda record: record.number):
            try:
                self._first.setdefault(training_key(record.typed_settings()), record)
            except ValueError:  # an earlier version's setting, which no new trial has
                continue

    def __contains__(self, settings: TrialSettings) -> bool:
        return training_key(settings) in self._first

    def sound(self) -> list[TrialRecord]:
        """The first trial of each point that has not failed."""
        return [r for r in self._first.values() if r.state != EndState.FAILED and r.repeats is None]

    def another_seed(self, settings: TrialSettings) -> tuple[TrialSettings, int] | None:
        """A tried point with a seed that it was not tried with, and the number of the trial that it repeats. None when
        that trial failed, or there is none."""
        first = self._first.get(training_key(settings))
        if first is None or first.state == EndState.FAILED:
            return None
        seed = settings.seed
        while settings in self:
            seed = (seed + SEED_STEP) % (MAX_SEED + 1)
            settings = dataclasses.replace(settings, seed=seed)
        return settings, first.number
