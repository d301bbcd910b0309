"""The files of a trial: checkpoints of the adapter, the final adapter, and the log of training."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data.samples import Splits, units_of
from train_fn.model.adapters import MAX_QUESTIONS
from train_fn.model.base import Base
from train_fn.scoring.answers import answer_lines
from train_fn.scoring.conformal import calibration_scores
from train_fn.scoring.evaluation import max_new_tokens
from train_fn.scoring.fitting import fit_part
from train_fn.scoring.scores import stored_predictions
from train_fn.settings import TrialSettings
from train_fn.support.files import copy_folder, replace_folder, write_file, write_json, write_json_lines, write_sums
from train_fn.support.storage import Storage
from train_fn.trial.adapter_files import save_adapter
from train_fn.trial.scoring import Evaluation

VALIDATION = "validation_predictions.jsonl"


def save_checkpoint(
    base: Base, model: Any, settings: TrialSettings, log: History, output: Path, storage: Storage
) -> None:
    """Write `checkpoint-N/` and remove the oldest beyond `save_total_limit`."""
    directory = output / f"checkpoint-{log.step}"
    partial = output / f".checkpoint-{log.step}"  # an unfinished checkpoint must not look like one
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(base, model, settings, partial)
    log.save(partial)
    replace_folder(partial, directory)
    storage.push(directory)
    for old in checkpoints(output, storage)[: -settings.save_total_limit] if settings.save_total_limit else []:
        storage.remove(old)


def checkpoints(output: Path, storage: Storage) -> list[Path]:
    """The folders `checkpoint-N/` of a trial, the oldest first."""
    names = [name for name in storage.names(output) if name.startswith("checkpoint-")]
    return [output / name for name in sorted(names, key=lambda name: int(name.rpartition("-")[2]))]


def save_final(
    base: Base,
    model: Any,
    settings: TrialSettings,
    splits: Splits,
    output: Path,
    storage: Storage,
    evaluation: Evaluation | None = None,
) -> None:
    """Write `final_model/` with its task.json. It is on the disk when this returns."""
    partial = output / ".final_model"  # an unfinished adapter must never become a winner's
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(base, model, settings, partial)
    save_task(base, splits, partial, evaluation)
    write_sums(partial)
    replace_folder(partial, output / "final_model")
    storage.push(output / "final_model")


def copy_final(epoch_folder: Path, output: Path, storage: Storage) -> None:
    """Copy what `save_final` and `save_predictions` wrote after an earlier epoch into the trial's folder.

    A copy, because the saved state means the files in `epoch_folder` until the next one is written.
    """
    copy_folder(epoch_folder / "final_model", output / "final_model")
    write_file(output / VALIDATION, (epoch_folder / VALIDATION).read_bytes())
    storage.push(output / "final_model")
    storage.push(output / VALIDATION)


def save_log(log: History, output: Path, storage: Storage) -> None:
    """Write trainer_state.json."""
    log.save(output)
    storage.push(output / "trainer_state.json")


def save_predictions(splits: Splits, evaluation: Evaluation, directory: Path, storage: Storage) -> None:
    """Write the validation predictions: question, truth and answer of each sample."""
    samples = splits.validation
    stored = stored_predictions(evaluation.predicted, samples, splits, evaluation.decided)
    write_json_lines(directory / VALIDATION, answer_lines(samples, splits, {"": stored}))
    storage.push(directory / VALIDATION)


def save_task(base: Base, splits: Splits, directory: Path, evaluation: Evaluation | None = None) -> None:
    """Write task.json beside an adapter: the base, and what `train_fn.predict` needs of each task: its candidates, its
    questions, the most frequent first (MAX_QUESTIONS at most), its decision, and the calibration scores of its sets of
    answers."""
    questions = Counter(sample.question for sample in splits.train)
    decisions = fit_part(evaluation.predicted, splits.validation, splits) if evaluation else {}
    tasks: list[dict[str, Any]] = []
    for task in splits.tasks:
        its = Counter(sample.question for sample in splits.train if sample.task == task.name)
        tasks.append(
            {
                "name": task.name,
                "kind": task.kind,
                "candidates": task.candidates,
                "positive": task.positive,
                "separator": task.separator,
                "questions": [question for question, _ in its.most_common(MAX_QUESTIONS)],
            }
        )
        if evaluation and task.name in decisions:
            samples = [sample for sample in splits.validation if sample.task == task.name]
            labels = np.array([sample.label for sample in samples], dtype=int)
            probabilities = evaluation.decided[task.name].probabilities
            tasks[-1]["decision"] = dataclasses.asdict(decisions[task.name])
            tasks[-1]["conformal"] = calibration_scores(probabilities, labels, units_of(samples))
    content = {
        "model": dataclasses.asdict(base.settings),
        "question": questions.most_common(1)[0][0],
        "candidates": splits.candidates,
        "tasks": tasks,
        "max_new_tokens": max_new_tokens(base, splits),
    }
    write_json(directory / "task.json", content)


@dataclasses.dataclass
class History:
    """A trial's log, in the form of the Hugging Face Trainer's trainer_state.json."""

    step: int = 0
    entries: list[dict[str, float]] = dataclasses.field(default_factory=list)
    num_reported: int = 0
    """Entries that a report has carried."""
    recent: list[float] = dataclasses.field(default_factory=list)
    """Losses of the steps since the last entry on training."""

    def add(self, **values: float) -> None:
        """Append an entry for the present step."""
        self.entries.append({**values, "step": self.step})

    def take_recent_loss(self) -> float:
        """The mean training loss since the last call."""
        loss, self.recent = sum(self.recent) / len(self.recent), []
        return loss

    def take_new(self) -> list[dict[str, float]]:
        """Entries since the last call."""
        fresh, self.num_reported = self.entries[self.num_reported :], len(self.entries)
        return fresh

    def save(self, directory: Path) -> None:
        """Write trainer_state.json."""
        state = {"global_step": self.step, "log_history": self.entries}
        write_json(directory / "trainer_state.json", state)
