"""What a study names on the hub: found, fetched, and named with its commit, so that every machine reads the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_fn.model.hub import data_path, download, fetch, find
from train_fn.model.hub_errors import HubError
from train_fn.model.hub_ids import Snapshot, is_hub_data, is_hub_model
from tune.config.paths import SettingsError
from tune.config.rules import check_config
from tune.config.settings import Settings, flag


def find_named(settings: Settings, say: Callable[[str], None]) -> tuple[Settings, Snapshot | None, list[str]]:
    """Find the base and the data sets on the hub, and download the data sets.

    Returns:
        The settings with the commits in their names; the base on the hub, which may still have to be downloaded (None
        for a folder); and every problem with the base.

    Raises:
        SettingsError: a data set cannot be fetched.
    """
    base = None
    problems: list[str] = []
    faults: list[str] = []
    model, data = settings.model, settings.data
    if is_hub_model(model.model):
        try:
            base = find(model.model)
            model = dataclasses.replace(model, model=base.name)
            say(f"Using {base.name}{'' if base.missing else ' from the cache'}")
            problems += check_config(base.directory, base.name)
        except HubError as error:
            problems.append(f"`--model` {error}")
    fetched: dict[str, Any] = {}
    for name in ("data", "val_data", "test_data"):
        if is_hub_data(text := getattr(data, name)):
            try:
                fetched[name] = fetch(text, say)
            except HubError as error:
                faults.append(f"`{flag(name)}` {error}")
    if faults:
        raise SettingsError([*problems, *faults])
    return dataclasses.replace(settings, model=model, data=dataclasses.replace(data, **fetched)), base, problems


def download_base(base: Snapshot, say: Callable[[str], None]) -> list[str]:
    """Download what this machine lacks of the base. Returns problems."""
    try:
        download(base, say)
    except HubError as error:
        return [f"`--model` {error}"]
    return []


def fetch_again(model: str, say: Callable[[str], None]) -> None:
    """Download the base of a study that goes on, if the cache has lost it. Raises SettingsError."""
    if is_hub_model(model):
        try:
            fetch(model, say)
        except HubError as error:
            raise SettingsError([f"`--model` {error}"]) from error


def manifest_path(data: str) -> Path:
    """The file or folder of `--data`, which `find_named` has fetched if it is on the hub."""
    return data_path(data) if is_hub_data(data) else Path(data)
