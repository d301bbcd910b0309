"""What can go wrong with the Hugging Face hub and its cache, as sentences with the next command."""

from __future__ import annotations

import difflib
import errno
import shlex
from pathlib import Path
from typing import Any

from train_fn.model.hub_ids import Repository, Snapshot
from train_fn.settings import SHOWN


class HubError(ValueError):
    """A model or data set of the hub cannot be used. The message is one sentence: value, rule, fix."""


def errors() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises for a hub that refuses, fails or is no hub, and for a full disk."""
    from huggingface_hub.errors import HTTPError, RevisionResolutionError

    # ValueError and KeyError: answers of other servers. RuntimeError: from hf_xet, for whatever ends a download.
    return HTTPError, RevisionResolutionError, OSError, ValueError, KeyError, RuntimeError


def explain(its: Repository, error: Exception, local: Snapshot | None) -> str:
    """An error of the hub or of the disk as one sentence: value, rule, and the next command."""
    from huggingface_hub import errors as hub

    if isinstance(error, (hub.RevisionResolutionError, hub.LocalEntryNotFoundError)):
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    is_model, site = its.kind == "model", endpoint()
    rule = f"{its.text!r} must be {'a folder or a model of the hub' if is_model else 'a data set of the hub'}"
    no_folder = "there is no such folder here, and " if is_model and not local else ""
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else 0
    # Without a token the hub answers 401 for a repository that is private, and for one that does not exist.
    said = error.response.headers.get("X-Error-Message", "") if isinstance(error, hub.HfHubHTTPError) else ""
    refused = status == 403 or (status == 401 and "credentials" in said)
    if isinstance(error, hub.GatedRepoError):
        fix = f"accept its terms on {page(its)}, then run `hf auth login` (on each machine), or set HF_TOKEN"
        return f"{rule} that you may download, but it is gated: {fix}"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{rule}, but {its.id} has no revision {its.revision or 'main'!r}: see {page(its)}/commits/main"
    if isinstance(error, hub.RepositoryNotFoundError) or (status == 401 and not refused):
        fix = "check the name; if it is private, run `hf auth login`"
        return f"{rule}, but {no_folder}{site} shows you no repository {its.id}: {fix}"
    if refused:
        return f"{rule}, but {site} refuses your token ({status}): run `hf auth login`, or set HF_TOKEN anew"
    if status:
        return f"{rule}, but {site} answers with status {status}: try again later"
    if isinstance(error, hub.OfflineModeIsEnabled | hub.HTTPError):
        offline = isinstance(error, hub.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"{site} cannot be reached ({one_line(error)})"
        fix = f"run `{fetch_command(its)}` with a network{' (HF_HUB_OFFLINE=0)' * offline}, or set HF_HOME to a cache"
        return f"{rule}, but {no_folder}{why}, and the cache {cache_root()} {in_cache(its, local)}: {fix} that has it"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or f"os error {errno.ENOSPC}" in str(error):  # hf_xet has the number only in its text
        fix = "make room, or set HF_HOME to a folder on another disk"
        return f"{its.text!r} must fit on the disk of {cache_root()}, but that is full: {fix}"
    if isinstance(error, OSError) and error.errno:
        why = f"{error.filename or cache_root()}: {error.strerror}"
        return f"{its.text!r} needs a cache that can be written, but {why}: set HF_HOME to another folder"
    if isinstance(error, OSError | RuntimeError):  # broken off, or of another length than announced
        return f"{its.text!r} must be downloaded whole, but {one_line(error)}: run `{fetch_command(its)}`"
    return f"{rule}, but {site} does not answer as a hub ({one_line(error)}): check HF_ENDPOINT and the proxy"


def fetch_command(its: Repository) -> str:
    """The command that downloads a repository to where it is looked for."""
    if its.kind == "dataset":  # not in the hub's own cache
        return shlex.join(["python", "-m", "train_fn.model.hub", its.text])
    return shlex.join(["hf", "download", its.id, *(["--revision", its.revision] if its.revision else [])])


def page(its: Repository) -> str:
    """The address of a repository's page."""
    return f"{endpoint()}/{'datasets/' if its.kind == 'dataset' else ''}{its.id}"


def in_cache(its: Repository, local: Snapshot | None) -> str:
    """What the cache holds of a repository, as the end of a sentence about it."""
    if local:
        count, missing = len(local.sizes), sorted(local.missing)
        return f"lacks {len(missing)} of its {count} files ({missing[0]})" if missing else "has only a part of it"
    names = cached_names(its.kind)
    near = difflib.get_close_matches(its.id.lower(), [name.lower() for name in names], n=1)
    similar = next((name for name in names if near and name.lower() == near[0]), "")
    if similar == its.id:
        return f"has other revisions of it, but not {its.revision or 'main'!r}"
    return "lacks it" + (f" (but has {similar})" if similar else "")


def cached_names(kind: str) -> list[str]:
    """The ids of the repositories in the hub's cache."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob(f"{kind}s--*")
    return sorted(folder.name.partition("--")[2].replace("--", "/", 1) for folder in folders)


def endpoint() -> str:
    """The hub's address."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def cache_root() -> str:
    """The folder below which `huggingface_hub` keeps what it downloads."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def gigabytes(size: int) -> str:
    """A size in GB, as the hub shows it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def one_line(error: Any) -> str:
    """An exception's type and message in one line."""
    return f"{type(error).__name__}: {SHOWN.repr(' '.join(str(error).split()))[1:-1]}"
