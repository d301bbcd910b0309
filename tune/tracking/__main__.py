"""`python -m tune.tracking sync STUDY`: deliver the records that a study's stores lack."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from train_fn.support.storage import Storage
from tune.config.uris import is_own, scrub, strip_credentials, tracking_uri
from tune.records.bucket import Lease
from tune.records.journal import StudyLock, read_journal
from tune.records.plan import read_plan
from tune.records.process import SYNC
from tune.tracking.delivery import Tracking
from tune.tracking.target import inside, target_of


def main(argv: list[str]) -> int:
    """`sync STUDY [--mlflow-uri URI]`: deliver the records that the study's stores lack.

    Returns 0 if the stores hold all records, 1 if any is missing, 2 if the study or the command is at fault.
    """
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tune.tracking", description="Deliver a study's records.")
    parser.add_argument("command", choices=["sync"])
    parser.add_argument("study", type=Path, help="the study's folder")
    parser.add_argument("--mlflow-uri", default="", help="MLflow's store. Default: the study's, if it is your own")
    options = parser.parse_args(argv)
    try:
        return sync(options.study.resolve(), options.mlflow_uri)
    except (OSError, ValueError) as error:
        print(scrub(str(error)), file=sys.stderr)
        return 2


def sync(directory: Path, mlflow_uri: str) -> int:
    """Deliver the records that the stores of a study lack.

    Args:
        directory: the study's folder.
        mlflow_uri: another MLflow store than the study's; empty: the study's.

    Returns: the exit code. Raises OSError and ValueError if the study cannot be read.
    """
    if not (directory / "plan.json").exists():
        raise ValueError(f"STUDY must be the folder of a study, but {directory} holds no plan.json: check the path")
    if strip_credentials(mlflow_uri) != mlflow_uri:
        raise ValueError(
            "--mlflow-uri must hold no key or password: give the whole address as MLFLOW_TRACKING_URI, too"
        )
    target = target_of(directory, read_plan(directory), tracking_uri(mlflow_uri) if mlflow_uri else "")
    if not mlflow_uri and "mlflow" in target.report_to and not is_own(target.study_uri, directory):
        raise ValueError(
            f"a store that is not your own must be named, but {directory.name} wants its records sent to "
            f"{target.study_uri}: if you trust it, give {shlex.join(['--mlflow-uri', target.study_uri])}, or set "
            f"MLFLOW_TRACKING_URI"
        )
    lock = StudyLock(directory)
    if not lock.acquire(SYNC):
        raise ValueError(f"{directory.name} is running: it delivers its records itself")
    lease = Lease(Storage(directory, target.storage_uri))
    if problem := lease.acquire():
        raise ValueError(problem)
    journal = read_journal(inside(directory, "journal.jsonl"))
    tracking = Tracking(target, journal.events, 1.0)
    left = tracking.close(timeout_s=24 * 3600)  # as long as the stores answer
    for sentence in (*journal.notes(), *([tracking.damage] if tracking.damage else []), *tracking.missing_files):
        print(sentence, file=sys.stderr)
    for name in target.report_to:
        waits = f"{left[name]} records wait, {tracking.reason(name)}" if name in left else "all records delivered"
        print(f"{name}: {waits}")
    lease.release()
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
