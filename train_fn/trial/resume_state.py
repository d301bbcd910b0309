"""The saved state of an unfinished trial: written at points of the training, read again after a kill."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from train_fn.settings import TrialSettings
from train_fn.support.files import SUMS, DamagedFile, check_sums, read_checked, write_checked
from train_fn.support.ranks import gather, world
from train_fn.support.storage import Storage
from train_fn.trial.engine import engine_state
from train_fn.trial.outputs import VALIDATION

STATE_SUFFIX = ".state"


class ResumeState:
    """`state/` of an unfinished trial: one file for each rank and point, and `epoch-N/` with the adapter of its best
    epoch so far.

    The last two points are kept, because ranks may be killed between their writes. So are the best epochs of both. No
    rank may write a point before all ranks have written the point before it.
    """

    def __init__(self, output: Path | None, storage: Storage, settings: TrialSettings) -> None:
        self.directory = output / "state" if output else None
        self.storage = storage
        self.rank, self.world_size = world()
        # A micro-batch that was halved because memory ran out changes nothing in the state.
        micro = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": settings.global_batch_size}
        self.settings = json.loads(json.dumps(dataclasses.asdict(settings) | micro))
        self.notes: list[str] = []
        """Points that were damaged, after `load`."""

    def points(self) -> list[str]:
        """Points with a file of every rank, in order."""
        names = self.storage.names(self.directory) if self.directory else []
        points = Counter(name.partition("-")[0] for name in names if name.endswith(STATE_SUFFIX))
        return sorted(point for point, count in points.items() if count == self.world_size)

    def serialise(self, progress: dict[str, Any], engine: Any) -> tuple[str, memoryview]:
        """This rank's state as it is now.

        Args:
            progress: how far training has come, as JSON values; "step", "losses" and "reports" decide the point.

        Returns: the point's name, and the content of its file. Later training steps do not change the content.
        """
        # A step, and the report after it (of an epoch's end, or at a rung), are two points.
        reported = bool(progress["reports"]) and progress["reports"][-1]["step"] == progress["step"]
        point = f"{2 * progress['step'] + (reported or not progress['losses']):08d}"
        text = json.dumps(progress | {"settings": self.settings, "point": point, "rank": self.rank})
        random_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        content = {"progress": text, "engine": engine_state(engine), "random": random_state}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return point, buffer.getbuffer()

    def write(self, point: str, content: memoryview) -> None:
        """Write this rank's file of a point, and remove its files of all points before the last two. Raises OSError."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_checked(self.file(point), content)
        self.storage.push(self.file(point))
        for old in self.own_files()[:-2]:
            self.storage.remove(old)

    def file(self, point: str) -> Path:
        """This rank's file of a point."""
        assert self.directory
        return self.directory / f"{point}-{self.rank}{STATE_SUFFIX}"

    def own_files(self) -> list[Path]:
        """This rank's files on this node, the oldest first."""
        assert self.directory
        return sorted(self.directory.glob(f"*-{self.rank}{STATE_SUFFIX}"))

    def load(self) -> dict[str, Any] | None:
        """This rank's part of the newest state that every rank can read; None if there is none, or it is of a trial
        with other settings.

        Every rank gets the same point. Damaged points and all later ones are removed, and `notes` has them.
        """
        points = gather(self.points() if self.rank == 0 else [])[0]  # rank 0 decides for all
        if self.directory is None:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        for point in reversed(points):
            content = self.read(point)
            if content is None and self.storage.uri:  # the copy on object storage may be sound
                path = self.file(point)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                content = self.read(point)
            if all(gather(content is not None)):
                return content if content and content["settings"] == self.settings else None
            self.notes.append(f"the saved state at point {int(point)} was damaged: an older one was taken, if any")
            self.storage.remove(self.file(point))
        return None

    def read(self, point: str) -> dict[str, Any] | None:
        """This rank's content of a point; None if the file is damaged or of another point. Executes nothing in it."""
        path = self.file(point)
        try:
            self.storage.pull(path)  # this node may hold other points, or none
            content = torch.load(io.BytesIO(read_checked(path)), map_location="cpu", weights_only=True)
        except (DamagedFile, FileNotFoundError, IsADirectoryError, pickle.UnpicklingError, RuntimeError, ValueError):
            return None
        content |= json.loads(content.pop("progress"))
        return content if (content["point"], content["rank"]) == (point, self.rank) else None

    def epoch_folder(self, epoch: int) -> Path:
        """The folder for what is kept of an epoch while the trial is unfinished: `final_model/` and the predictions."""
        assert self.directory
        return self.directory / f"epoch-{epoch}"

    def has_epoch(self, epoch: int) -> bool:
        """Whether the adapter of an epoch is here, or on object storage, and undamaged."""
        folder = self.epoch_folder(epoch)
        self.storage.pull(folder)
        try:
            check_sums(folder / "final_model")
        except DamagedFile:
            return False
        return (folder / "final_model" / SUMS).is_file() and (folder / VALIDATION).is_file()

    def keep_epochs(self, *epochs: int) -> None:
        """Remove the folders of all other epochs."""
        if self.directory is None:
            return
        kept = {self.epoch_folder(epoch).name for epoch in epochs}
        # Object storage lists only its own names. This node may have older folders, of before the trial moved.
        names = {*self.storage.names(self.directory), *(path.name for path in self.directory.glob("epoch-*"))}
        for name in names - kept:
            if name.startswith("epoch-"):
                self.storage.remove(self.directory / name)

    def discard(self) -> None:
        """Remove what an attempt that cannot be continued has left."""
        if self.directory is not None:
            for path in self.own_files():
                self.storage.remove(path)
            if self.rank == 0:
                self.keep_epochs()

    def remove(self) -> None:
        """Remove the state of a finished trial."""
        if self.directory is not None and self.rank == 0:
            self.storage.remove(self.directory)
