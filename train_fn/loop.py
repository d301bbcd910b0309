"""One trial, from its settings to its adapter: the training loop. Knows nothing of Ray.

Runs in one process or in each of several that torch.distributed has joined. What it needs to go on after a kill lies in
`state/`: the trial then ends with the same numbers, to the last bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from train_fn.data import Splits, class_weights, epoch_order, micro_batches
from train_fn.engine import (
    MicroBatchTooLarge,
    TrialFailed,
    build_engine,
    check_applied,
    check_schedule,
    check_trained,
    engine_state,
    load_engine_state,
    read_applied,
    read_schedule,
)
from train_fn.evaluation import predict
from train_fn.files import DamagedFile, read_checked, replace_folder, write_checked, write_json, write_sums
from train_fn.lora import adapted, load_adapter, save_adapter
from train_fn.memory import is_out_of_memory
from train_fn.model import Base, collate, prompt_size, to_device
from train_fn.profile import beat, phase, profiled, traced
from train_fn.scores import metrics_of
from train_fn.settings import TrialSettings
from train_fn.storage import Storage, patiently

Report = Callable[[dict[str, Any]], bool]
Progress = Callable[[dict[str, Any]], object]


class Leaving(Exception):
    """This trial's process must leave; the trial can be continued elsewhere."""


def world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator that training draws from; dropout differs by rank, as its images do."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + 100_003 * rank)


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The mean of each number over the ranks. Every rank gets the same answer, so all decide alike on it."""
    _, world_size = world()
    if world_size == 1:
        return values
    tensor = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(tensor)
    return (tensor / world_size).tolist()


# ------------------------------------------------------------------------------------------------ one trial


def run_trial(
    base: Base,
    splits: Splits,
    settings: TrialSettings,
    report: Report,
    *,
    eval_batch_size: int = 16,
    positive: str = "",
    output: Path | None = None,
    storage: Storage | None = None,
    progress: Progress | None = None,
    leaving: Callable[[], bool] = lambda: False,
    profile: bool = False,
    trace: bool = False,
) -> None:
    """Train one adapter and report after each epoch.

    report: called on every rank with {"epoch", "metrics", "seconds", "done", ...}; its answer True ends the trial
        early. The report of the last epoch has `done` and comes after the adapter is written. A trial that goes on
        after a kill first gives its reports again, for the one who was told may be gone.
    output: folder in which `final_model/` and trainer_state.json are written at the trial's end (not when it is stopped
        early), `checkpoint-N/` on the way, and `state/` as long as the trial is unfinished.
    progress: called on rank 0 with {"phase", "epoch", "num_epochs", "step", "num_steps", "loss"} when training begins,
        every `logging_steps` optimizer steps, and when an evaluation begins; it must not wait.

    leaving: whether this process must leave soon; asked in each optimizer step.
    profile: measure phases (see `train_fn.profile`) and report their seconds with the others.
    trace: write `trace.json.gz` into `output`, of a few optimizer steps.

    Raises Leaving, on all ranks alike and with `state/` just written, when one of them must leave.
    Raises TrialFailed, on all ranks alike, for what the trial itself has done wrong: no module to adapt, a setting
    that did not reach the engine, a loss that is not finite.
    """
    rank, world_size = world()
    clock = Clock()
    if problems := settings.problems(world_size):
        raise TrialFailed("; ".join(problems))
    seed_everything(settings.seed, 0)  # the adapter starts alike on every rank
    with contextlib.ExitStack() as stack:
        try:
            model = stack.enter_context(adapted(base, settings))
        except ValueError as error:
            raise TrialFailed(str(error)) from error
        steps_per_epoch = -(-len(splits.train) // settings.global_batch_size)
        num_steps = settings.max_steps or steps_per_epoch * settings.num_train_epochs
        num_epochs = -(-num_steps // steps_per_epoch)
        weights = class_weights(splits.class_counts("train")) if settings.class_balanced_loss else []
        weights_tensor = torch.tensor(weights, device=base.device)
        engine = build_engine(base, model, settings, weights_tensor, num_steps, world_size)
        stack.callback(engine.destroy)
        rates = read_schedule(engine, settings, num_steps)
        applied = read_applied(engine) | {"learning_rate_at_step": rates}
        check_applied(applied, settings)
        check_schedule(rates, settings, num_steps)
        seed_everything(settings.seed, rank)

        log, epoch, stop = History(), 1, False
        losses: list[float] = []
        reports: list[dict[str, Any]] = []
        storage = storage or Storage(output or Path())
        tracer = traced(output / "trace.json.gz") if trace and output and rank == 0 else None
        traced_step = stack.enter_context(tracer or contextlib.nullcontext(lambda: None))
        state = ResumeState(output, storage, settings)
        if found := state.load():
            load_engine_state(engine, found["engine"], rank)
            torch.set_rng_state(found["random"]["cpu"])
            if "cuda" in found["random"]:
                torch.cuda.set_rng_state(found["random"]["cuda"])
            log.step, log.entries, log.told = (found[key] for key in ("step", "entries", "told"))
            log.recent = found.get("recent", [])
            losses, epoch, reports, clock.spent = (found[key] for key in ("losses", "epoch", "reports", "seconds"))
        elif output is not None and rank == 0:
            for old in checkpoints(output, storage):
                storage.remove(old)  # of an attempt that cannot be continued
        clock.lap("setup")
        if profile:
            stack.enter_context(profiled(clock.spent, base.device))

        troubles = list(state.notes)

        def trouble(text: str) -> None:
            beat()
            if text not in troubles:
                troubles.append(text)

        def write(action: Callable[[], None]) -> None:
            with phase("checkpoint"):
                patiently(action, trouble)

        def save_state() -> None:
            place = {"step": log.step, "entries": log.entries, "told": log.told, "recent": log.recent}
            place |= {"losses": losses, "epoch": epoch, "reports": reports, "seconds": clock.seconds()}
            write(lambda: state.save(place, engine))
            clock.lap("checkpoint")

        def tell(phase: str, loss: float | None) -> None:
            if progress is not None and rank == 0:
                place = {"epoch": epoch, "num_epochs": num_epochs, "step": log.step, "num_steps": num_steps}
                progress({"phase": phase, "loss": loss} | place)

        for known in reports:
            stop = stop or report(known)
        tell("train", None)
        while not stop and epoch <= num_epochs:
            done = (epoch - 1) * steps_per_epoch
            order = epoch_order(len(splits.train), settings.global_batch_size, settings.seed, epoch)
            for indices in order[log.step - done : num_steps - done]:
                loss, leave = train_step(base, splits, settings, engine, indices, log.step + 1, leaving())
                losses.append(loss)
                log.recent.append(loss)
                log.step += 1
                traced_step()
                if log.step % settings.logging_steps == 0:
                    loss = sum(log.recent) / len(log.recent)
                    log.add(epoch=log.step / steps_per_epoch, loss=loss, learning_rate=engine.get_lr()[0])
                    log.recent = []
                    tell("train", loss)
                if settings.save_steps and log.step % settings.save_steps == 0 and output is not None:
                    clock.lap("train")
                    if rank == 0:
                        write(lambda: save_checkpoint(base, model, settings, log, output, storage))
                    save_state()
                if leave:
                    clock.lap("train")
                    save_state()
                    raise Leaving(f"left at step {log.step}")
            train_loss = sum(losses) / len(losses)
            tell("evaluation", train_loss)
            clock.lap("train")
            with phase("evaluation"):
                metrics = evaluate(base, splits, "validation", eval_batch_size, settings.class_balanced_loss, positive)
            log.add(epoch=epoch, **{f"eval_{name}": value for name, value in metrics.items()})
            clock.lap("evaluation")
            last = log.step == num_steps
            if last:
                check_trained(engine, settings, len(splits.train), epoch)
            if last and output is not None and rank == 0:
                write(lambda: save_final(base, model, settings, splits, log, output, storage))
                clock.lap("checkpoint")
            message = {
                "epoch": epoch,
                "step": log.step,
                "metrics": metrics | {"train_loss": train_loss},
                "log": log.take_new(),
                "applied": applied,
                "seconds": clock.seconds(),
                "notes": troubles,
                "done": last,
            }
            reports.append(message)
            epoch, losses = epoch + 1, []
            save_state()
            with phase("idle"):
                stop = report(message)
            clock.lap("report")
        if not stop:
            write(state.remove)  # one that was told to stop may be asked to go on, by a study that goes on


NOT_FINITE = "a gradient was not finite in step {}: lower the learning rate (or not --fp16)"


def finite_gradient(engine: Any) -> bool:
    """Whether the step may be taken. ZeRO looks by itself; without it, all ranks have the same mean gradient by now."""
    if engine.zero_optimization_stage():
        return True
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())


@contextlib.contextmanager
def out_of_memory_told_apart() -> Iterator[None]:
    """Of what runs in here, for a step that does not fit is told otherwise than an evaluation that does not."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise MicroBatchTooLarge(str(error)) from error
        raise


@out_of_memory_told_apart()
def train_step(
    base: Base, splits: Splits, settings: TrialSettings, engine: Any, indices: np.ndarray, step: int, leaving: bool
) -> tuple[float, bool]:
    """Optimizer step number `step` on the images `indices` [global_batch_size]; their mean loss over all workers, and
    whether any worker is `leaving`.

    Raises TrialFailed, on all ranks and before the weights are touched, when loss or gradient is not finite on one;
    MicroBatchTooLarge, on those that have run out of memory.
    """
    rank, world_size = world()
    engine.train()
    total = torch.zeros((), device=base.device)
    micro_batch_size = settings.per_device_train_batch_size
    num_micro_batches = len(indices) // (micro_batch_size * world_size)
    # Images of like size go into one micro-batch: less padding, and workers wait less for each other. The step's sum
    # stays the same. Images of one size keep their order.
    indices = np.array(sorted(indices, key=lambda index: prompt_size(base, splits.train[index])))
    for number, images in enumerate(micro_batches(indices, micro_batch_size, rank, world_size), 1):
        with phase("data"):
            samples = [splits.train[index] for index in images]
            labels = to_device(torch.tensor([sample.label for sample in samples]), base.device)
            batch = collate(base, samples, with_answers=True)
        with phase("forward"):
            loss = engine(batch, labels)
        with phase("backward"):
            engine.backward(loss)
        total += loss.detach()
        if number == num_micro_batches:
            # Here the step waits for the device: all ranks agree on the loss before the weights move.
            with phase("communication"):
                told = [total.item() / num_micro_batches, float(leaving)]
                mean_loss, leave = mean_over_ranks(told, base.device)
            if not np.isfinite(mean_loss):
                raise TrialFailed(f"the training loss became {mean_loss} in step {step}: lower the learning rate")
            if not finite_gradient(engine):
                raise TrialFailed(NOT_FINITE.format(step))
        with phase("optimizer"):
            engine.step()
    if engine.skipped_steps:  # ZeRO's answer to a gradient that is not finite, on all ranks alike
        raise TrialFailed(NOT_FINITE.format(step))
    return mean_loss, leave > 0


# ------------------------------------------------------------------------------------------------ going on after a kill


STATE_SUFFIX = ".state"


class ResumeState:
    """`state/` of an unfinished trial: one file per rank and point, the last two of which are kept: ranks may be killed
    between their writes."""

    def __init__(self, output: Path | None, storage: Storage, settings: TrialSettings) -> None:
        self.directory = output / "state" if output else None
        self.storage = storage
        self.rank, self.world_size = world()
        # A micro-batch that was halved for want of memory changes nothing that is kept here.
        micro = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": settings.global_batch_size}
        self.settings = json.loads(json.dumps(dataclasses.asdict(settings) | micro))
        self.notes: list[str] = []

    def points(self) -> list[str]:
        """Points of which every rank's file is there, in order."""
        names = self.storage.names(self.directory) if self.directory else []
        points = Counter(name.partition("-")[0] for name in names if name.endswith(STATE_SUFFIX))
        return sorted(point for point, count in points.items() if count == self.world_size)

    def save(self, progress: dict[str, Any], engine: Any) -> None:
        """Write this rank's file, aside and then renamed, and remove this rank's from before the last."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        # An epoch's last step and its end, evaluation included, are two points.
        point = f"{2 * progress['step'] + (not progress['losses']):08d}"
        told = json.dumps(progress | {"settings": self.settings, "point": point, "rank": self.rank})
        drawn = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        random_state = {"cpu": torch.get_rng_state(), **drawn}
        content = {"progress": told, "engine": engine_state(engine), "random": random_state}
        path = self.file(point)
        # To an open file: given a path, torch writes it itself, and a full disk is no OSError.
        write_checked(path, lambda file: torch.save(content, file))
        self.storage.push(path)
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
        """This rank's newest state that every rank can read, if its trial is the same; `notes` says what was damaged.

        Every rank gets the same point. Damaged points, and those after the one that is taken, are removed.
        """
        points = [self.points() if self.rank == 0 else []]
        if self.world_size > 1:
            dist.broadcast_object_list(points, src=0)
        if self.directory is None:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        for point in reversed(points[0]):
            content = self.read(point)
            if content is None and self.storage.uri:  # the copy on object storage may be sound
                path = self.file(point)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                content = self.read(point)
            readable = [content is not None]
            if self.world_size > 1:
                all_readable: list[Any] = [None] * self.world_size
                dist.all_gather_object(all_readable, readable[0])
                readable = all_readable
            if all(readable):
                return content if content and content["settings"] == self.settings else None
            self.notes.append(f"the saved state at point {int(point)} was damaged: an older one was taken, if any")
            self.storage.remove(self.file(point))
        return None

    def read(self, point: str) -> dict[str, Any] | None:
        """This rank's content of a point; None when it is damaged, or of another one. Nothing in it is executed."""
        path = self.file(point)
        try:
            self.storage.pull(path)  # this node may have had other points, or none
            content = torch.load(io.BytesIO(read_checked(path)), map_location="cpu", weights_only=True)
        except (DamagedFile, FileNotFoundError, IsADirectoryError, pickle.UnpicklingError, RuntimeError, ValueError):
            return None
        content |= json.loads(content.pop("progress"))
        return content if (content["point"], content["rank"]) == (point, self.rank) else None

    def remove(self) -> None:
        """The trial is over."""
        if self.directory is not None and self.rank == 0:
            self.storage.remove(self.directory)


# ------------------------------------------------------------------------------------------------ on disk


def save_checkpoint(
    base: Base, model: Any, settings: TrialSettings, log: History, output: Path, storage: Storage
) -> None:
    """Write `checkpoint-N/` and remove the oldest beyond `save_total_limit`."""
    directory = output / f"checkpoint-{log.step}"
    partial = output / f".checkpoint-{log.step}"  # a half-written one must not look like one
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(base, model, settings, partial)
    log.save(partial)
    replace_folder(partial, directory)
    storage.push(directory)
    for old in checkpoints(output, storage)[: -settings.save_total_limit] if settings.save_total_limit else []:
        storage.remove(old)


def checkpoints(output: Path, storage: Storage) -> list[Path]:
    """The folders `checkpoint-N/` of a trial, the oldest first."""
    found = [name for name in storage.names(output) if name.startswith("checkpoint-")]
    return [output / name for name in sorted(found, key=lambda name: int(name.rpartition("-")[2]))]


def save_final(
    base: Base, model: Any, settings: TrialSettings, splits: Splits, log: History, output: Path, storage: Storage
) -> None:
    """Write `final_model/`, with its task.json, and trainer_state.json; both are on the disk when this returns."""
    partial = output / ".final_model"  # a half-written one must never become a winner's
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(base, model, settings, partial)
    save_task(base, splits, partial)
    write_sums(partial)
    replace_folder(partial, output / "final_model")
    log.save(output)
    storage.push(output / "final_model")
    storage.push(output / "trainer_state.json")


def save_task(base: Base, splits: Splits, directory: Path) -> None:
    """Write task.json beside an adapter: base, question and candidates, so that `train_fn.predict` need not ask."""
    questions = Counter(sample.text for sample in splits.train)
    task = {
        "model": dataclasses.asdict(base.settings),
        "question": questions.most_common(1)[0][0],
        "candidates": splits.candidates,
    }
    write_json(directory / "task.json", task)


class History:
    """A trial's log, in the form of the Hugging Face Trainer's trainer_state.json."""

    def __init__(self) -> None:
        self.step = 0
        self.entries: list[dict[str, float]] = []
        self.told = 0
        self.recent: list[float] = []  # losses of the steps since the last entry on training

    def add(self, **values: float) -> None:
        """Append an entry for the present step."""
        self.entries.append({**values, "step": self.step})

    def take_new(self) -> list[dict[str, float]]:
        """Entries since the last call."""
        fresh, self.told = self.entries[self.told :], len(self.entries)
        return fresh

    def save(self, directory: Path) -> None:
        """Write trainer_state.json."""
        state = {"global_step": self.step, "log_history": self.entries}
        write_json(directory / "trainer_state.json", state)


def evaluate(
    base: Base, splits: Splits, part: str, batch_size: int, class_balanced: bool, positive: str
) -> dict[str, float]:
    """Metrics of the adapted base on one part of the data."""
    samples = getattr(splits, part)
    predicted = predict(base, samples, splits.candidates, batch_size, *world())
    return metrics_of(predicted, samples, splits, class_balanced, positive)


def score_adapter(base: Base, splits: Splits, part: str, batch_size: int, adapter: Path) -> dict[str, np.ndarray]:
    """Losses [N] and scores [N, C] of a saved adapter on one part of the data."""
    with load_adapter(base, adapter):
        return predict(base, getattr(splits, part), splits.candidates, batch_size, *world())


def try_adapter(base: Base, splits: Splits, part: str, batch_size: int, adapter: Path) -> dict[str, Any]:
    """Losses and scores as `score_adapter`, or {"error": ...} on every rank when a rank cannot load the adapter."""
    with contextlib.ExitStack() as stack:
        error = ""
        try:
            stack.enter_context(load_adapter(base, adapter))
        except (FileNotFoundError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as failure:
            if isinstance(failure, (torch.OutOfMemoryError, torch.AcceleratorError)):
                raise  # the device's fault, not the adapter's
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        errors = [error]
        if world()[1] > 1:  # all ranks predict together, or none does
            errors = [""] * world()[1]
            dist.all_gather_object(errors, error)
        if any(errors):
            return {"error": next(filter(None, errors))}
        return predict(base, getattr(splits, part), splits.candidates, batch_size, *world())


class Clock:
    """Where a trial's seconds went, by phase."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap on a phase."""
        now = time.perf_counter()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far."""
        return dict(self.spent)
