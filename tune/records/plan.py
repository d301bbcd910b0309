"""plan.json: the settings and hashes that a study fixes before its first trial."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from train_fn.support.files import DamagedFile, read_json, write_json

# Of plan.json. 1, of the first version: neither number nor checksum; 2: one closed set of answers at most; 3: the most
# probable answer is the answer, and a trial counts by its last epoch.
FORMAT = 4
KEYS: dict[str, type] = {
    "study_id": str,
    "settings": dict,
    "tracking_uri": str,
    "data_report": dict,
    "goals": list,
    "candidates": list,
    "positive_label": str,
    "data_hash": str,
    "base_hash": str,
    "space_hash": str,
    "splits_hash": str,
}
UNREAD = ("class_counts", "versions", "git")  # in plans of the first version, for people only
PARTS = ("study", "model", "data", "trial")  # of the settings
FIX = "put it back from a copy, or begin a new study"


def read_plan(directory: Path) -> dict[str, Any]:
    """A study's plan, without its checksum; its values have the types that its readers rely on.

    Raises:
        OSError: there is no plan.json, or it cannot be read.
        DamagedFile: it is damaged, or a newer version has written it.
    """
    path = directory / "plan.json"
    plan = read_json(path, dict, FIX)
    version = plan.setdefault("format", 1)
    if version not in range(1, FORMAT + 1):
        raise DamagedFile(f"{path} must have a format up to {FORMAT}, but has {version!r}: use the newer version")
    unknown = [name for name in plan if version == 1 and name not in (*KEYS, *UNREAD, "format")]
    if unknown or (version > 1 and plan.pop("checksum", None) != checksum(plan)):
        raise DamagedFile(f"{path} must be unchanged since it was written, but it was changed: {FIX}")
    wrong = [name for name, kind in KEYS.items() if not isinstance(plan.get(name), kind)]
    if "settings" not in wrong:
        wrong += [f"settings.{name}" for name in PARTS if not isinstance(plan["settings"].get(name), dict)]
    if wrong:
        raise DamagedFile(f"{path} must hold a study's plan, but lacks a sound {', '.join(wrong)}: {FIX}")
    if version < 4:
        plan["settings"]["study"] = {"decide": "argmax", "select": "last"} | plan["settings"]["study"]
    if not plan["goals"] or not all(is_goal(goal) for goal in plan["goals"]):
        raise DamagedFile(f"{path} must name goals such as ['auroc', 'max'], but has {plan['goals']!r:.80}: {FIX}")
    if not all(isinstance(answer, str) for answer in plan["candidates"]):
        raise DamagedFile(f"{path} must name the answers, but has {plan['candidates']!r:.80}: {FIX}")
    return plan


def checksum(plan: dict[str, Any]) -> str:
    """sha256 of a plan as JSON."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def is_goal(value: Any) -> bool:
    """Whether a JSON value is a goal."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[1] in ("max", "min")


def save_plan(directory: Path, plan: dict[str, Any]) -> None:
    """Write plan.json, which makes the folder a study. Raises OSError."""
    plain = json.loads(json.dumps(plan | {"format": FORMAT}))
    write_json(directory / "plan.json", plain | {"checksum": checksum(plain)})
