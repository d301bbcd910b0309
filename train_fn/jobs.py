"""What a study hands to its workers, and what they report back: the typed contract between `tune/` and `train_fn/`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.data.samples import Splits
from train_fn.execution import Execution
from train_fn.settings import TrialSettings

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Train one trial."""

    number: int  # the job's number in the dispatcher: the trial's, or another one when a trial is trained again
    settings: TrialSettings
    output: Path  # folder for the adapter, checkpoints and logs of the trial
    known_epochs: float = 0  # `progress` up to which the journal has the reports: they are answered without asking Tune
    rungs: tuple[float, ...] = ()  # epochs, whole or not, after which early stopping wants a report
    label: str = ""  # name of the job in the live footer. Not given: "trial" and the number
    splits: Splits | None = None  # splits of this job alone. None: the study's
    execution: Execution | None = None  # how its steps are computed. None: as the worker's memory allows
    too_large: tuple[tuple[TrialSettings, Execution], ...] = ()  # trials that ran out of memory on this lane, and how
    notes: tuple[str, ...] = ()  # what was changed so that the trial can run


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """Score the test images with saved adapters."""

    number: int
    adapters: tuple[Path, ...]
    baselines: bool = False  # whether the report also has `untuned` and `features`
    label: str = ""


Job = TrainJob | ScoreJob


@dataclass(kw_only=True)
class TrialFacts:
    """What is known of a trial after its last report: fields that `EpochReport` and the trial's record share."""

    step: int = 0  # optimizer steps done
    applied: dict[str, Any] = field(default_factory=dict)  # settings that were read back from the live engine
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, those of lost attempts and earlier sessions included."""
    notes: list[str] = field(default_factory=list)
    """What was changed so that the trial could run, such as a smaller micro-batch."""
    finished: bool = False  # whether the last report came after the trial's last epoch
    best_epoch: int = 0  # the epoch, from 1, by which the trial counts, and whose adapter is kept. 0: the last
    lane: int | None = None
    turn: int | None = None  # assignment index: how many jobs the lane's worker group had before this one
    device: str = ""
    num_threads: int = 0  # torch threads of each worker; 0: torch's default
    free_gib: float = 0.0  # GiB of memory beside the base by which executions are chosen, the same on each kind of GPU
    base_gib: float = 0.0  # GiB of the base's weights in each worker
    base_16_bit_gib: float = 0.0  # GiB of the same weights at 2 bytes each
    base_hash: str = ""  # sha256 of the base's files as the trial's workers saw them
    data_hash: str = ""  # sha256 of images, questions and answers


@dataclass(kw_only=True)
class EpochReport(TrialFacts):
    """What a trial reports after an epoch, or at a rung of early stopping within one.

    The journal's "report" events have these fields.

    `train_fn.trial.loop` fills in the fields about training, `train_fn.worker` those about lane and machine, the
    dispatcher `device_s`.
    """

    epoch: int  # from 1; within an epoch, that epoch
    metrics: dict[str, float]  # validation metrics and training loss of the epoch so far
    progress: float = 0.0  # epochs trained: `epoch` after one (and where 0 is given), less at a rung within one
    log: list[dict[str, float]] = field(default_factory=list)  # entries of trainer_state.json since the last report
    wall_s: float = 0.0  # seconds since the worker's last job ended
    waited_s: float = 0.0  # seconds of `wall_s` before this job came
    device_s: float = 0.0  # seconds of a device (GPU, or CPU worker) over all workers, lost attempts included
    system: dict[str, float] = field(default_factory=dict)  # memory and CPU seconds of rank 0

    def __post_init__(self) -> None:
        self.progress = float(self.progress or self.epoch)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochReport:
        """The report from a saved state, in which earlier versions named `finished` `done`."""
        known = {item.name for item in dataclasses.fields(cls)}
        values = {"finished": values.get("done", False)} | dict(values)
        return cls(**{name: value for name, value in values.items() if name in known})


class Verdict(enum.IntEnum):
    """The answer to an `EpochReport`. False is GO_ON, and True is PAUSE."""

    GO_ON = 0
    PAUSE = 1
    """The trial ends here for now. It keeps `state/`, because a study that goes on may train it further."""
    END = 2
    """Early stopping ends the trial. Nothing continues it, so it keeps no state."""


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """The answer to a `ScoreJob`."""

    predictions: list[dict[str, Any]]
    """By adapter: losses [N] and scores [N, C] of the N test images, or {"error": why it cannot be loaded}."""
    untuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Predictions of the base without an adapter, for "validation" and "test"; empty: not asked for."""
    features: np.ndarray | None = None
    """Pooled vision features [I, F] of `train_fn.scoring.probe.probe_images`; None: this base keeps none by image."""
    finished: bool = True


@dataclass(frozen=True, kw_only=True)
class JobFailed:
    """The dispatcher's last report of a job that ends with an error, or that the user has stopped."""

    error: str
    device_s: float  # as in `EpochReport`
    study_error: str = ""  # what ended the whole study; then the job is not to blame
    stopped: bool = False  # whether the user has stopped the job; then there is no error


JobReport = EpochReport | ScoreReport | JobFailed
