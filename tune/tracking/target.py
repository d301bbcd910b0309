"""The study whose records are delivered, and its stores."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_fn.support.files import DamagedFile
from train_fn.support.storage import Storage
from tune.config.settings import REPORT_TO
from tune.config.uris import default_uri, strip_credentials, with_credentials
from tune.records.goals import epoch_goal


def sync_command(target: Target) -> str:
    """The command that delivers a study's records later."""
    words = ["python", "-m", "tune.tracking", "sync", str(target.directory)]
    uri = strip_credentials(target.uri)
    if "mlflow" in target.report_to and uri != default_uri():
        words += ["--mlflow-uri", uri]
    return shlex.join(words)


def target_of(directory: Path, plan: Mapping[str, Any], uri: str = "") -> Target:
    """The target of an existing study.

    Args:
        plan: the content of plan.json.
        uri: an MLflow store other than the study's own.

    Raises DamagedFile if plan.json lacks a value, or one has the wrong type.
    """
    try:
        study = plan["settings"]["study"]
        texts = [plan["study_id"], plan["tracking_uri"], study["experiment"], study["storage"], *plan["goals"][0][:2]]
        report_to = tuple(study["report_to"])
    except (KeyError, IndexError, TypeError) as error:
        raise DamagedFile(f"{directory / 'plan.json'} must be a study's plan, but lacks {error}") from error
    if not all(isinstance(text, str) for text in (*texts, *report_to)) or not set(report_to) <= {*REPORT_TO, "storage"}:
        raise DamagedFile(f"{directory / 'plan.json'} must be a study's plan, but a value has another type")
    return Target(
        study=directory.name,
        study_id=plan["study_id"],
        directory=directory,
        experiment=study["experiment"],
        metric=plan["goals"][0][0],
        uri=with_credentials(uri or plan["tracking_uri"]),
        report_to=(*report_to, *(["storage"] if study["storage"] else [])),
        mode=plan["goals"][0][1],
        score="best_epoch_score" if epoch_goal(plan["goals"], study.get("select", "best")) else plan["goals"][0][0],
        data_hash=str(plan.get("data_hash", "")),
        storage_uri=Storage.under(study["storage"], directory).uri,
        study_uri=strip_credentials(plan["tracking_uri"]),
    )


@dataclass(frozen=True)
class Target:
    """The study whose records are delivered, and its stores."""

    study: str
    study_id: str
    """Unique: identifies the study's runs even if another study has the same name."""
    directory: Path
    experiment: str
    metric: str
    """The first goal."""
    uri: str
    report_to: tuple[str, ...]
    mode: str = "max"
    """Whether the first goal is "max" or "min"."""
    score: str = "best_epoch_score"
    """The metric of a trial's run by which it counts: the first goal in its best epoch, or the first goal itself."""
    data_hash: str = ""
    """As in plan.json."""
    storage_uri: str = ""
    """The study's folder on object storage; empty: none."""
    study_uri: str = ""
    """The MLflow store in plan.json, without credentials; `uri` may be another one."""
    may_write: Callable[[], bool] = lambda: True
    """Whether this process may write the study's files on object storage. Raises OSError."""


def inside(directory: Path, name: object, content: bool = True) -> Path:
    """The path of a file or folder of a study.

    Args:
        content: also check everything that a folder holds, because it will be sent.

    Raises ValueError if the path, with links followed, leads out of the study's folder.
    """
    path, root = directory / str(name), directory.resolve()
    for part in (path, *(path.rglob("*") if content and path.is_dir() else ())):
        if not part.resolve().is_relative_to(root):
            raise ValueError(
                f"{str(name)!r} must lie inside the study's folder, but leads to {part.resolve()}: it is not used"
            )
    return path
