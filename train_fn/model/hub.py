"""Models and data sets of the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION; hf://OWNER/NAME for a data set.

The local cache comes first: a snapshot that is complete there needs no network. `find` asks the hub for names and sizes
only, so that a study refuses what it cannot use before gigabytes are downloaded. Pickles and code are never fetched.

`python -m train_fn.model.hub NAME` downloads what NAME stands for, in a process of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from train_fn.model.hub_errors import HubError, cache_root, errors, explain, gigabytes, page
from train_fn.model.hub_ids import TABLES, Repository, Snapshot, read_name

SAVED = ("state.json", "dataset_dict.json", "dataset_info.json")  # in a folder that `datasets` has saved
COMMIT = re.compile("[0-9a-f]{40}")
ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------ finding


def find(name: str) -> Snapshot:
    """The commit that a name of the hub stands for, and its files: from the local cache if all of them are there, else
    from the hub. Downloads at most a model's config.json.

    Raises:
        HubError: no such repository or revision, no access, no network, no model in it, or no room for it.
    """
    its = read_name(name)
    local = cached(its)
    if local and is_complete(local):
        return local
    try:
        found = asked(its)
    except errors() as error:
        raise HubError(explain(its, error, local)) from error
    if problem := content_problem(found):
        raise HubError(f"{its.text!r} {problem}")
    room, needed = free_bytes(found.directory), sum(found.missing.values())
    if needed > room:
        raise HubError(
            f"{its.text!r} needs {gigabytes(needed)} on the disk of {cache_root()}, which has {gigabytes(room)} free: "
            f"make room, or set HF_HOME to a folder on another disk"
        )
    return found


def cached(its: Repository) -> Snapshot | None:
    """What the local cache knows of a repository's revision; None if it does not know the commit."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, RevisionResolutionError

    try:
        revision = HfApi().resolve_revision(
            its.id, repo_type=its.kind, revision=its.revision or None, local_files_only=True
        )
        if not its.cached_at(commit := revision.resolved).is_dir():
            return None
        where = its.cached_at(commit) if its.kind == "dataset" else None
        tree = get_cached_repo_tree(its.id, repo_type=its.kind, revision=commit, local_dir=where)
    except RevisionResolutionError:
        return None
    except CachedRepoTreeNotFoundError:  # not downloaded as a whole, or by an older version
        return Snapshot(its, commit, {})
    return Snapshot(its, commit, {file.path: file.size for file in tree if its.wants(file.path)})


def is_complete(snapshot: Snapshot) -> bool:
    """Whether this machine has every file of a snapshot.

    Raises:
        HubError: a file has another size than on the hub.
    """
    its, folder = snapshot.repository, snapshot.directory
    if not snapshot.sizes:  # no listing: are there configuration, words, images and weights?
        needed = (("config.json",), ("tokenizer.json", "tokenizer_config.json"),
                  ("processor_config.json", "preprocessor_config.json"))  # fmt: skip
        files = all(any((folder / name).is_file() for name in names) for names in needed)
        return its.kind == "model" and files and has_weights(folder)
    if snapshot.missing:
        return False
    for path, size in snapshot.sizes.items():
        if (present := (folder / path).stat().st_size) != size:
            again = ["hf", "download", its.id, path, "--revision", snapshot.commit, "--force-download"]
            again += ["--repo-type", "dataset", "--local-dir", str(folder)] if its.kind == "dataset" else []
            raise HubError(
                f"{its.text!r} must lie in the cache as on the hub, but {path} has {present:,} of {size:,} bytes: "
                f"fetch it again with `{shlex.join(again)}`"
            )
    return True


def has_weights(folder: Path) -> bool:
    """Whether a model's folder holds its weights, all files of them if there are several."""
    single, shards = folder / "model.safetensors", sorted(folder.glob("model-*-of-*.safetensors"))
    if single.is_file() or not shards:
        return single.is_file()
    return len([path for path in shards if path.is_file()]) == int(shards[0].stem.rpartition("-of-")[2] or 0)


def asked(its: Repository) -> Snapshot:
    """A repository's revision on the hub. A model's config.json is fetched, which a gated repository refuses."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    revision = api.resolve_revision(its.id, repo_type=its.kind, revision=its.revision or None)
    if COMMIT.fullmatch(its.revision):  # nothing has been asked yet, and the listing would try for half a minute
        api.repo_info(its.id, repo_type=its.kind, revision=its.revision)
    tree = api.list_repo_tree(its.id, recursive=True, revision=revision.resolved, repo_type=its.kind)
    sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile) and its.wants(file.path)}
    if its.kind == "model" and "config.json" in sizes:
        hf_hub_download(its.id, "config.json", revision=revision.resolved)
    return Snapshot(its, revision.resolved, sizes)


def content_problem(found: Snapshot) -> str:
    """Why a repository that exists cannot be used, or ""."""
    its, where = found.repository, f"{page(found.repository)}/tree/{found.commit}"
    if its.kind == "dataset":
        inside = f" in {its.folder}/" if its.folder else ""
        return "" if found.sizes else f"must hold parquet, JSON, CSV or image files{inside}, but has none: see {where}"
    if "config.json" not in found.sizes:
        return f"must be a model for transformers, but has no config.json: see {where}"
    if not any(path.endswith(".safetensors") for path in found.sizes):
        return (
            f"must hold its weights as model*.safetensors, but has none (see {where}): take a repository with them, or "
            f"convert them (pickled weights are not read)"
        )
    return ""


# ------------------------------------------------------------------------------------------------ downloading


def download(snapshot: Snapshot, say: Callable[[str], None] = lambda text: None) -> None:
    """Fetch the files that this machine lacks. Several processes may: each file is fetched once.

    Raises:
        HubError: the hub or the disk fails; files that are whole by then are kept.
    """
    if not (missing := snapshot.missing):
        return
    from huggingface_hub import snapshot_download

    its = snapshot.repository
    wanted, unwanted = its.patterns
    say(f"Downloading {snapshot.name}: {len(missing)} files, {gigabytes(sum(missing.values()))}, to {cache_root()}")
    try:
        snapshot_download(
            its.id,
            repo_type=its.kind,
            revision=snapshot.commit,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
            local_dir=snapshot.directory if its.kind == "dataset" else None,
        )
    except errors() as error:
        raise HubError(explain(its, error, snapshot)) from error
    is_complete(snapshot)  # raises for a file of another size than the hub's listing


def fetch(name: str, say: Callable[[str], None] = lambda text: None) -> str:
    """Find and download what a name of the hub stands for. Returns the name with its commit. Raises HubError."""
    snapshot = find(name)
    download(snapshot, say)
    return snapshot.name


def fetch_apart(model: str) -> None:
    """Fetch a hub model in a process of its own, with its progress on stderr. This process stays offline: it must not
    import `huggingface_hub`, which reads HF_HUB_OFFLINE once, before it has set that variable.

    Raises:
        RuntimeError: it cannot be fetched.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "train_fn.model.hub", model]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})
    if run.returncode:
        raise RuntimeError(f"the base {run.stdout.strip() or repr(model) + ' cannot be fetched'} (on this node)")


# ------------------------------------------------------------------------------------------------ on this machine


def local_directory(name: str) -> Path:
    """The folder of a model's or data set's files on this machine, once it was found there or on the hub. A name that
    was never found gives a folder that does not exist."""
    its = read_name(name)
    commit = its.revision
    if not COMMIT.fullmatch(commit):
        local = cached(its)
        commit = local.commit if local else "unknown"
    return its.cached_at(commit)


def data_path(name: str) -> Path:
    """The file or folder of a data set that was fetched, for `read_manifest`: its one table, or the folder that holds
    all of its files."""
    its = read_name(name)
    local = cached(its)
    assert local, f"{name} was fetched"
    paths = [PurePosixPath(path) for path in local.sizes]
    tables = [path for path in paths if path.suffix.lower() in TABLES]
    if len(tables) == 1 and not any(path.name in SAVED for path in paths):
        return local.directory / tables[0]
    return local.directory / os.path.commonpath([path.parent for path in paths])


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk on which a folder lies or will be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


if __name__ == "__main__":
    try:
        fetch(sys.argv[1])
    except HubError as fault:
        print(fault)
        sys.exit(2)
