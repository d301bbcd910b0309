"""The live footer of a running study."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import ray
import ray.tune
from rich.console import Group

from tune.lanes.layout import Layout
from tune.results.terminal import footer
from tune.search.callback import StudyLog


class Footer:
    """Draws the footer from the trials' records and the dispatcher's last snapshot. Never waits for the dispatcher."""

    def __init__(self, log: StudyLog, layout: Layout) -> None:
        self.log = log
        self.devices_per_trial = layout.devices_per_trial
        self.snapshot: dict[str, Any] = {"lanes": layout.lanes, "starting": layout.lanes, "running": []}
        self.asked = log.dispatcher.snapshot.remote()

    def __call__(self) -> Group:
        """The footer now."""
        if ray.wait([self.asked], timeout=0)[0]:
            # The search ends and reports it when the dispatcher is gone.
            with contextlib.suppress(ray.exceptions.RayActorError):
                self.snapshot = ray.get(self.asked)
            self.asked = self.log.dispatcher.snapshot.remote()
        study = self.log.study
        records = list(self.log.records.values())
        settings = dataclasses.replace(study.settings.study, trials=self.log.num_trials)
        return footer(records, self.snapshot, study.goals, settings, self.devices_per_trial)
