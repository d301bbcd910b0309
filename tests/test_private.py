"""A real study with secrets in its environment: none of them is on disk, and nobody else can read what it writes."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path

from studies import SMALL, finish, start

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA-planted-0",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-1",
    "AWS_SESSION_TOKEN": "planted-token-2",
    "WANDB_API_KEY": "planted-wandb-3",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-4",
    "HF_TOKEN": "planted-hf-5",
}


def test_secrets_stay_in_the_environment_and_folders_are_private(tmp_path, monkeypatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as short:  # room for the paths of Ray's sockets
        monkeypatch.setenv("RAY_TMPDIR", short)
        finished = finish(start(tmp_path, "--trials", "1", "--lanes", "1", *SMALL), tmp_path)
        assert finished.code == 0, finished.out + finished.err
        (ours,) = Path(short).iterdir()
        assert stat.S_IMODE(ours.stat().st_mode) == 0o700
        (session,) = (path for path in ours.glob("ray/session_2*") if not path.is_symlink())
        logs = [path for path in session.rglob("*") if path.is_file()]
        assert any(path.name == "runtime_env_agent.log" for path in logs)
        for path in (*logs, *(p for p in tmp_path.rglob("*") if p.is_file())):
            content = path.read_bytes()
            found = [name for name, value in SECRETS.items() if value.encode() in content]
            assert not found, f"{path} holds {found}"
    study = tmp_path / "results" / "s"
    assert stat.S_IMODE(study.stat().st_mode) == 0o700
    trial = json.loads((study / "study.json").read_text())["trials"][0]
    plan = json.loads((study / "plan.json").read_text())
    assert (trial["base_hash"], trial["data_hash"]) == (plan["base_hash"], plan["data_hash"])
    assert "Lanes:" not in finished.out and not os.environ.get("RAY_ADDRESS")
