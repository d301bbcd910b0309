"""Jobs and reports for tests of the dispatcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_fn.jobs import EpochReport, TrainJob
from train_fn.settings import TrialSettings
from tune.lanes.dispatcher import Dispatcher


def train(number: int, label: str = "", **settings: Any) -> TrainJob:
    return TrainJob(number=number, settings=TrialSettings.from_dict(settings), output=Path(), label=label)


def report(epoch: int, finished: bool = False) -> EpochReport:
    return EpochReport(epoch=epoch, metrics={}, finished=finished)


def running(dispatcher: Dispatcher) -> dict[int, int]:
    """The numbers of the running jobs by lane."""
    return {lane.number: lane.job.job.number for lane in dispatcher.lanes if lane.job}


def group_of(dispatcher: Dispatcher, lane: int = 0) -> str:
    """The lane's worker group."""
    workers = dispatcher.lanes[lane].group
    assert workers
    return workers.id
