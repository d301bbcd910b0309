"""How a trial or a study ended, and what each store calls that."""

from __future__ import annotations

from enum import StrEnum


class EndState(StrEnum):
    """How a trial or a study ended. The values stand in the journal and in study.json."""

    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    """Early stopping ended the trial."""
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"
    """`--resume` continues the trial or the study."""
    RUNNING = "RUNNING"
    """It has not ended."""


DONE_STATES = (EndState.COMPLETE, EndState.STOPPED, EndState.FAILED)
"""States of trials that no session runs again."""

IN_MLFLOW: dict[str, str] = {
    EndState.COMPLETE: "FINISHED",
    EndState.STOPPED: "KILLED",
    EndState.FAILED: "FAILED",
    EndState.INTERRUPTED: "KILLED",
    EndState.RUNNING: "RUNNING",
}
"""Status of an MLflow run."""

IN_WANDB: dict[str, int] = {state: 0 if state == EndState.COMPLETE else 1 for state in EndState}
"""Exit code of a W&B run."""

IN_OPTUNA: dict[str, str] = {
    EndState.COMPLETE: "COMPLETE",
    EndState.STOPPED: "PRUNED",
    EndState.FAILED: "FAIL",
    EndState.INTERRUPTED: "RUNNING",
    EndState.RUNNING: "RUNNING",
}
"""Name of an `optuna.trial.TrialState`."""
