"""Checks before a study that its tracking stores can take its records."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from train_fn.support.files import unwritable
from tune.config.uris import local_path, scrub, with_credentials
from tune.tracking.calls import StoreUnavailable, bounded, prepare_mlflow, reason_of, refuses
from tune.tracking.mlflow_store import deleted_experiment

if TYPE_CHECKING:
    from tune.config.settings import Settings

CHECK_S = 10.0  # longest time for a call of the check before a study


def check_store(settings: Settings, directory: Path, uri: str, say: Callable[[str], None]) -> list[str]:
    """Check the stores of a study.

    Args:
        directory: the study's folder, which need not exist yet.
        uri: MLflow's store, without credentials.
        say: called with a sentence about each store that cannot be reached now; the study can start without it.

    Returns:
        One sentence (rule, value, fix) for each reason why a store would refuse the study's records.
    """
    report_to, problems = settings.study.report_to, []
    for name, folder in (("tensorboard", directory / "trials"), ("wandb", directory / "wandb")):
        if name in report_to and (why := not_writable(folder)):
            problems.append(f"`--report-to` {name} writes to {folder}, but {why}: make it writable, or choose another")
    if "mlflow" in report_to:
        problems += check_mlflow(settings.study.experiment, settings.study.register, uri, say)
    return problems


def check_mlflow(experiment: str, register: str, uri: str, say: Callable[[str], None]) -> list[str]:
    """Why an MLflow store would refuse a study. Leaves nothing behind in the store."""
    what = "`--mlflow-uri` (or MLFLOW_TRACKING_URI)"
    path = local_path(uri)
    try:
        if uri.startswith("sqlite"):
            return check_sqlite(experiment, uri, path, say) if path else []
        prepare_mlflow()
        from mlflow import MlflowClient

        client = bounded(lambda: MlflowClient(with_credentials(uri)), CHECK_S)
        stored = bounded(lambda: client.get_experiment_by_name(experiment), CHECK_S)
        if stored and stored.lifecycle_stage != "active":
            return [deleted_experiment(experiment, stored.experiment_id)]
        if stored:
            return check_artifacts(stored.artifact_location, with_credentials(uri), say)
        if register:
            bounded(lambda: client.search_registered_models(max_results=1), CHECK_S)
        return []
    except Exception as error:  # whatever a store raises is the reason why it cannot be used
        why = reason_of(error)
        if path and "MLFLOW_ALLOW_FILE_STORE" in str(error):
            return [
                f"{what} must be a server or a database, but got the folder {path}, which this MLflow refuses: move "
                f"its runs with `mlflow migrate-filestore` to a sqlite:/// URI, or set MLFLOW_ALLOW_FILE_STORE=true"
            ]
        if re.search(r"error code 30\d", why):
            return [
                f"{what} must be the address of the server itself, but {uri} redirects: give the address that it "
                f"redirects to"
            ]
        if getattr(error, "error_code", "") in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"):
            return [
                f"{what} {uri} must let you in, but {why}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ]
        if refuses(error) or isinstance(error, ImportError):
            return [f"{what} must be a store that MLflow can use, but {uri}: {why}: give another"]
        say(f"MLflow cannot be reached at {uri}: {why}. The study begins without it, and its records wait")
        return []


def check_sqlite(experiment: str, uri: str, path: Path, say: Callable[[str], None]) -> list[str]:
    """Why a database file, or the folder of its artifacts, cannot be used. Asks SQLite, which answers at once."""
    import sqlite3

    what, artifacts, row = f"`--mlflow-uri` {path}", Path.cwd() / "mlruns", None
    if not path.exists():
        if why := not_writable(path.parent):
            return [f"{what} must lie in a folder that can be written, but {why}: give another --mlflow-uri"]
    else:
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=2, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
                query = "SELECT experiment_id, lifecycle_stage, artifact_location FROM experiments WHERE name = ?"
                row = database.execute(query, (experiment,)).fetchone() if "experiments" in tables else None
                database.execute("ROLLBACK")
        except sqlite3.Error as error:
            if "locked" in str(error):
                return []  # by another process that is using it now
            return [f"{what} must be an MLflow database that can be written, but {error}: give another --mlflow-uri"]
    if row and row[1] != "active":
        return [deleted_experiment(experiment, str(row[0]))]
    if row:
        location = row[2]
        folder = local_path(location)
        if folder is None:
            return check_artifacts(location, uri, say)
        artifacts = folder
    if why := not_writable(artifacts):
        return [
            f"the artifacts of MLflow's experiment {experiment!r} lie in {artifacts}, but {why}: repair that folder"
        ]
    return []


def check_artifacts(location: str, uri: str, say: Callable[[str], None]) -> list[str]:
    """Why an experiment's artifacts cannot be written. Writes a small file to their location and removes it."""
    folder = local_path(location)
    if folder:
        why = not_writable(folder)
        return [f"MLflow's artifacts lie in {folder}, but {why}: repair that folder"] if why else []
    prepare_mlflow()
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"vlm-tune-check-{time.time_ns()}.txt"
        file.write_text("Written to test whether artifacts can be stored; you may remove it.\n")
        try:
            repository = get_artifact_repository(location, tracking_uri=uri)
            bounded(lambda: repository.log_artifact(str(file)), CHECK_S)
        except StoreUnavailable as error:
            say(f"MLflow's artifacts cannot be reached at {scrub(location)}: {error}")
            return []
        except Exception as error:  # of whatever library writes there
            fix = "correct its credentials, or give another --experiment"
            return [f"MLflow's artifacts must be writable, but {scrub(location)}: {reason_of(error)}: {fix}"]
        try:
            bounded(lambda: repository.delete_artifacts(file.name), CHECK_S)
        except Exception as error:  # a store may forbid removal
            say(f"MLflow keeps the file {file.name} of this check: {reason_of(error)}")
    return []


def not_writable(folder: Path) -> str:
    """Why a folder, or a file in it, cannot be created; empty: it can."""
    problem = unwritable(folder)
    return f"{problem[0]}: {problem[1]}" if problem else ""
