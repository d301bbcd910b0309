"""What a study's numbers rest on, as hashes and versions: a study that goes on must rest on the same."""

from __future__ import annotations

import hashlib
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train_fn.copies import default_cache, file_hash, read_known, write_known
from train_fn.data import Splits

ROOT = Path(__file__).resolve().parents[1]


def data_hash(splits: Splits) -> str:
    """sha256 over every image's content, question and answer, in the order of the splits; file names do not count."""
    samples = [*splits.train, *splits.validation, *splits.test]
    with ThreadPoolExecutor(8) as pool:
        contents = pool.map(lambda sample: file_hash(sample.image), samples)
    told = [[content, sample.text, sample.answer] for content, sample in zip(contents, samples, strict=True)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def base_hash(directory: Path) -> str:
    """sha256 over a model directory's configuration and weights. Hashes of large files are remembered by size and time
    of change: 8 GB take some seconds once."""
    memory = default_cache().with_name("hashes.json")
    known = read_known(memory)
    found = {}
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.json")]):
        state = path.stat()
        key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
        if key not in known:
            known[key] = file_hash(path)
        found[path.name] = known[key]
    write_known(memory, known)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def git_state() -> dict[str, str | bool]:
    """Revision of this project's working tree and whether it has changes; empty where it is not a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not (ROOT / ".git").exists():
            return {}
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}  # no git on this machine, or not its owner
