"""A real study with secrets in its environment: none of them is on disk, and nobody else can read what it writes."""

from __future__ import annotations

import json
import os
import stat

import pytest
from studies import SECRETS


@pytest.mark.xdist_group("ray")
def test_secrets_stay_in_the_environment_and_folders_are_private(mixed, ray_folder) -> None:
    (ours,) = ray_folder.iterdir()
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    (session,) = (path for path in ours.glob("ray/session_2*") if not path.is_symlink())
    logs = [path for path in session.rglob("*") if path.is_file()]
    assert any(path.name == "runtime_env_agent.log" for path in logs)
    for path in (*logs, *(p for p in mixed.folder.rglob("*") if p.is_file())):
        content = path.read_bytes()
        found = [name for name, value in SECRETS.items() if value.encode() in content]
        assert not found, f"{path} holds {found}"
    study = mixed.folder / "results" / "s"
    assert stat.S_IMODE(study.stat().st_mode) == 0o700
    trial = json.loads((study / "study.json").read_text())["trials"][0]
    plan = json.loads((study / "plan.json").read_text())
    assert (trial["base_hash"], trial["data_hash"]) == (plan["base_hash"], plan["data_hash"])
    assert "Lanes:" not in mixed.out and not os.environ.get("RAY_ADDRESS")
