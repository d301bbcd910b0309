"""Names of models and data sets on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION; hf://OWNER/NAME for a data
set. A file or folder of that name on this machine comes first. Asks no network and imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

# What is read of a model. Its subfolders hold other formats, and files such as consolidated.safetensors a second copy.
MODEL_FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
TABLES = (".parquet", ".json", ".jsonl", ".csv", ".tsv", ".arrow")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
NAME = r"\b[A-Za-z0-9_.-]{1,96}\b"
REVISION = r"@(?!/)[A-Za-z0-9_./+-]+"
MODEL_ID = re.compile(f"({NAME}/{NAME})({REVISION})?")
DATA_ID = re.compile(f"hf://(?:datasets/)?({NAME}/{NAME})({REVISION})?(:[A-Za-z0-9_./-]+)?")
SCHEME = "hf://"
CACHED = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?$")  # a model's folder in the hub's cache


@dataclass(frozen=True)
class Repository:
    """A repository on the hub, as a command line names it."""

    text: str
    """The name as it was given."""
    id: str
    """OWNER/NAME."""
    revision: str = ""
    """Branch, tag or commit; "": the main branch."""
    kind: str = "model"
    """model or dataset."""
    folder: str = ""
    """Of a data set: the only folder that is used; "": all."""

    def cached_at(self, commit: str) -> Path:
        """The folder of a commit's files on this machine; it need not exist.

        A data set does not lie in the hub's own cache: a manifest's images must be files beside it, and that cache
        holds links.
        """
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=self.id, repo_type=self.kind)
        if self.kind == "dataset":
            return Path(constants.HF_ASSETS_CACHE, "vlm-tune", name, commit)
        return Path(constants.HF_HUB_CACHE, name, "snapshots", commit)

    @property
    def patterns(self) -> tuple[list[str], list[str]]:
        """Patterns of the files that are used, and of exceptions from them. A `*` matches slashes, too."""
        if self.kind == "model":
            return [*MODEL_FILES], ["*/*"]
        within = f"{self.folder}/*" if self.folder else "*"
        suffixes = (suffix for lower in TABLES + IMAGES for suffix in (lower, lower.upper()))
        return [within + suffix for suffix in suffixes], ["dataset_infos.json", ".*", "*/.*"]

    def wants(self, path: str) -> bool:
        """Whether a file of the repository is used."""
        wanted, unwanted = self.patterns
        return any(fnmatch(path, pattern) for pattern in wanted) and not any(fnmatch(path, p) for p in unwanted)


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit that are used."""

    repository: Repository
    commit: str
    sizes: Mapping[str, int]
    """Bytes of each file by its path; empty if the cache has no listing of the commit."""

    @property
    def name(self) -> str:
        """The name with the commit in it, which every machine reads in the same way."""
        its = self.repository
        prefix, suffix = (SCHEME, f":{its.folder}" if its.folder else "") if its.kind == "dataset" else ("", "")
        return f"{prefix}{its.id}@{self.commit}{suffix}"

    @property
    def directory(self) -> Path:
        """The files' folder on this machine."""
        return self.repository.cached_at(self.commit)

    @property
    def missing(self) -> dict[str, int]:
        """Bytes of each file that this machine lacks."""
        return {path: size for path, size in self.sizes.items() if not (self.directory / path).is_file()}


def is_hub_model(model: str | Path) -> bool:
    """Whether `--model` names a model of the hub. A file or folder of that name on this machine comes first."""
    return isinstance(model, str) and bool(hub_id(MODEL_ID, model)) and not os.path.lexists(model)


def is_hub_data(data: str) -> bool:
    """Whether `--data` names a data set of the hub."""
    return bool(hub_id(DATA_ID, data))


def hub_id(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The match of a name that the hub's own rules allow."""
    match = pattern.fullmatch(text)
    sound = match and not ("--" in match[1] or match[1].endswith(".git") or ".." in text)
    return match if sound else None


def read_name(text: str) -> Repository:
    """The repository that a name of the hub stands for."""
    if match := hub_id(DATA_ID, text):
        return Repository(text, match[1], (match[2] or "")[1:], "dataset", (match[3] or "")[1:].strip("/"))
    match = hub_id(MODEL_ID, text)
    assert match, f"{text!r} was checked to be a name of the hub"
    return Repository(text, match[1], (match[2] or "")[1:])


def name_problem(model: str) -> str:
    """Why `--model` can be neither a folder nor a model of the hub, as a sentence. For a name of which nothing exists
    on this machine and which has not the form of an id."""
    rule = "must be a folder with a config.json, or a model of the hub as OWNER/NAME or OWNER/NAME@REVISION"
    parts = [part for part in model.split("/") if part]
    bare = model.rstrip("/")
    if model.startswith("~"):
        why, fix = "no shell has replaced its ~", "write $HOME, or the whole path"
    elif "://" in model:
        owner_and_name = "/".join(parts[-2:]) if model.startswith(SCHEME) else "/".join(parts[2:4])
        why, fix = "it is an address", f"write {owner_and_name or 'OWNER/NAME'}"
    elif model.startswith(("/", "./", "../")) or model in (".", ".."):
        why, fix = "there is no such folder", "check the path"
    elif bare != model and hub_id(MODEL_ID, bare):
        why, fix = "there is no such folder, and an id has no slash at its end", f"check the path, or write {bare}"
    elif len(parts) != 2 and "@" not in model:
        why = f"there is no such folder, and an id has two parts, not {len(parts)}"
        fix = "check the path, or write OWNER/NAME"
    else:
        why = "there is no such folder, and an id has only letters, digits, single `-`, `_` and `.` in its two parts"
        fix = "check the path, or the id"
    return f"`--model` {model!r} {rule}, but {why}: {fix}"


def peft_reference(model: str, directory: str) -> dict[str, str]:
    """The base in PEFT's adapter_config.json, under a name that means the same on every machine: id and commit of a hub
    model, also of one that `--model` names by its folder in the hub's cache; else the folder's own name. PEFT itself
    never looks a base up, `train_fn.predict` has it from task.json, and a path would name a user and a machine.

    Args:
        directory: the base's folder on this machine.
    """
    if is_hub_model(model):
        its = read_name(model)
        name, revision = its.id, its.revision
    elif cached := CACHED.search(directory):
        name, revision = cached[1].replace("--", "/"), cached[2]
    else:
        name, revision = model if model == "nano" else Path(directory).name or directory, ""
    return {"base_model_name_or_path": name} | ({"revision": revision} if revision else {})
