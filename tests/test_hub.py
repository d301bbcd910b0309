"""Models and data sets of the Hugging Face hub, against a small hub on loopback and prepared caches."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import constants
from PIL import Image

from train_fn.data.manifest import read_manifest
from train_fn.model.checkpoint import base_hash, hashed_files, resolve_model
from train_fn.model.hub import data_path, download, fetch, fetch_apart, find
from train_fn.model.hub_errors import HubError
from train_fn.model.hub_ids import is_hub_data, is_hub_model, peft_reference, read_name
from train_fn.nano import CHECKPOINT
from train_fn.settings import ModelSettings, TrialSettings
from tune.config.base_shape import BaseShape
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.config.rules import check_model

ROOT = Path(__file__).parents[1]
OLD, NEW = "a" * 40, "b" * 40
NANO = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir() if path.is_file()}
OTHERS = {"README.md": b"#", "pytorch_model.bin": b"\x80", "modeling.py": b"raise SystemExit", "LICENSE": b"free",
          "consolidated.safetensors": b"twice", "onnx/config.json": b"{}", ".gitattributes": b"*"}  # fmt: skip


@dataclass
class Hub:
    """What the server has and does, and what it was asked."""

    url: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)  # by path of the repository and commit
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    answers: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)  # instead of a repository's own
    gated: set[str] = field(default_factory=set)
    redirects: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)  # that are announced for each file
    asked: list[str] = field(default_factory=list)

    def add(self, path: str, files: dict[str, bytes], commit: str = OLD) -> None:
        """Give a repository (OWNER/NAME or datasets/OWNER/NAME) a commit, which becomes its main branch."""
        self.files[path, commit] = files
        self.refs.setdefault(path, {})["main"] = commit

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(f"{handler.command} {handler.path}")
        words = handler.path.partition("?")[0].strip("/").split("/")
        api = words[0] == "api"
        words = words[1:] if api else words
        kind = "datasets" if words[0] == "datasets" else ""
        words = words[1:] if words[0] in ("models", "datasets") else words
        path, rest = "/".join(filter(None, (kind, *words[:2]))), words[2:]
        if path in self.redirects:
            return self.send(handler, 307, b"", {"Location": handler.path.replace(path, self.redirects[path], 1)})
        if path in self.answers:
            status, headers = self.answers[path]
            return self.send(handler, status, b"<html>", headers)
        if path not in self.refs:
            return self.send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.refs[path].get(revision, revision)
        files = self.files.get((path, commit))
        if files is None:
            return self.send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if api and rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                       for name, content in files.items()]  # fmt: skip
            return self.send(handler, 200, json.dumps(entries).encode(), {})
        if api:
            return self.send(
                handler, 200, json.dumps({"id": path.removeprefix("datasets/"), "sha": commit}).encode(), {}
            )
        if path in self.gated:
            return self.send(handler, 403, b"", {"X-Error-Code": "GatedRepo"})
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self.send(handler, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        length = {"Content-Length": str(self.lengths[path])} if path in self.lengths else {}
        return self.send(handler, 200, content, etag | length)

    def send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the nano base as lab/nano, and an empty cache; this process and its children use them."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.add("lab/nano", NANO | OTHERS)
    use_cache(monkeypatch, tmp_path / "home", hub.url)
    yield hub
    server.shutdown()
    server.server_close()


def use_cache(monkeypatch: pytest.MonkeyPatch, home: Path, url: str) -> None:
    """Let `huggingface_hub`, which reads the environment once, use this cache and hub, here and in children."""
    for name, value in {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refusal(name: str) -> str:
    with pytest.raises(HubError) as caught:
        fetch(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", ("two parts, not 1", "OWNER/NAME")),
        ("./lab/nano", ("no such folder", "check the path")),
        ("/lab/nano", ("no such folder", "check the path")),
        ("../nano", ("no such folder", "check the path")),
        ("~/nano", ("no shell has replaced its ~", "$HOME")),
        ("lab/nano/", ("no slash at its end", "or write lab/nano")),
        ("lab/models/nano", ("two parts, not 3", "check the path")),
        ("lab/na no", ("only letters", "check the path, or the id")),
        ("lab--x/nano", ("only letters",)),
        ("lab/nano@", ("only letters",)),
        ("lab/nano@../../x", ("only letters",)),
        ("lab@v1/nano", ("only letters",)),
        ("https://huggingface.co/lab/nano/tree/main", ("an address", "write lab/nano")),
        ("hf://lab/nano", ("an address", "write lab/nano")),
    ],
)
def test_a_name_that_is_neither_folder_nor_id_is_refused(model: str, words: tuple[str, ...]) -> None:
    (problem,) = check_model(model)
    assert problem.startswith(f"`--model` {model!r} must be a folder with a config.json, or a model of the hub as ")
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize("model", ["lab/nano", "Lab/Nano-3B.v1_x", "lab/nano@v1.0", "lab/nano@refs/pr/4"])
def test_ids_are_left_to_the_hub(model: str) -> None:
    assert is_hub_model(model) and check_model(model) == []
    assert read_name(model).id == model.partition("@")[0]
    assert read_name(model).revision == model.partition("@")[2]


@pytest.mark.parametrize("name", ["lab/nano", "lab/nano@v1"])
def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_model(name)
    shutil.copytree(CHECKPOINT, tmp_path / name)
    assert not is_hub_model(name) and check_model(name) == []
    assert resolve_model(name) == Path(name) and base_hash(name) == base_hash(CHECKPOINT)


def test_a_folder_that_is_no_model_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab/nano").mkdir(parents=True)
    (problem,) = check_model("lab/nano")
    assert "'lab/nano' must be a model directory with a config.json" in problem


def test_the_help_names_ids_and_folders(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "OWNER/NAME@REVISION; a folder of that name comes first" in text
    assert "hf://OWNER/NAME[@REVISION][:FOLDER]" in text


# ------------------------------------------------------------------------------------------------ models


def test_a_model_is_downloaded_once_and_only_what_is_read(hub: Hub) -> None:
    said: list[str] = []
    assert fetch("lab/nano", said.append) == f"lab/nano@{OLD}"
    folder = resolve_model(f"lab/nano@{OLD}")
    assert folder == resolve_model("lab/nano") and folder.name == OLD
    assert {path.name for path in folder.iterdir()} == set(NANO)
    assert len(said) == 1 and f"Downloading lab/nano@{OLD}: {len(NANO) - 1} files" in said[0]  # config.json was there
    hub.asked.clear()
    assert fetch("lab/nano", said.append) == f"lab/nano@{OLD}" and fetch(f"lab/nano@{OLD}") == f"lab/nano@{OLD}"
    assert hub.asked == [] and len(said) == 1


def test_a_commit_stays_when_the_branch_moves(hub: Hub) -> None:
    first = fetch("lab/nano")
    hub.add("lab/nano", NANO | {"config.json": NANO["config.json"] + b" "}, NEW)
    hub.refs["lab/nano"]["v1"] = OLD
    assert fetch("lab/nano@v1") == first
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert fetch("lab/nano") == f"lab/nano@{NEW}"
    assert fetch(first) == first and base_hash(first) != base_hash(f"lab/nano@{NEW}")


def test_the_hash_is_over_the_contents_that_are_fetched(hub: Hub) -> None:
    name = fetch("lab/nano")
    assert base_hash(name) == base_hash(CHECKPOINT)
    folder = resolve_model(name)
    for other, content in OTHERS.items():  # as `hf download` would
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(content)
    assert base_hash(name) == base_hash(CHECKPOINT) and {path.name for path in hashed_files(name)} == set(NANO)
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(NANO["config.json"] + b" ")
    assert base_hash(name) != base_hash(CHECKPOINT)


@pytest.mark.parametrize("listing", [True, False])
def test_a_complete_snapshot_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch, listing: bool) -> None:
    name = fetch("lab/nano")
    if not listing:  # as older versions, and `from_pretrained`, leave it
        shutil.rmtree(Path(constants.HF_HUB_CACHE, "models--lab--nano/trees"))
        copy = Path(constants.HF_HOME).with_name("copy")
        shutil.copytree(constants.HF_HOME, copy, symlinks=True)
        use_cache(monkeypatch, copy, "http://127.0.0.1:1")
    go_offline(monkeypatch)
    hub.asked.clear()
    assert fetch("lab/nano") == fetch(name) == name and hub.asked == []
    assert base_hash(name) == base_hash(CHECKPOINT)


def test_a_half_downloaded_snapshot_is_completed_or_reported(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fetch("lab/nano")
    (resolve_model(name) / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = refusal("lab/nano")
    assert f"lacks 1 of its {len(NANO)} files (model.safetensors)" in text
    assert "`hf download lab/nano` with a network (HF_HUB_OFFLINE=0)" in text and "HF_HOME" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch("lab/nano") == name and base_hash(name) == base_hash(CHECKPOINT)


def test_a_file_cut_off_in_the_cache_is_reported_with_the_command(hub: Hub) -> None:
    name = fetch("lab/nano")
    weights = resolve_model(name) / "model.safetensors"
    weights.resolve().write_bytes(NANO["model.safetensors"][:1000])
    command = f"hf download lab/nano model.safetensors --revision {OLD} --force-download"
    assert f"has 1,000 of {len(NANO['model.safetensors']):,} bytes: fetch it again with `{command}`" in refusal(name)


def refuse_with(status: int, headers: dict[str, str]) -> Any:
    return lambda hub: hub.answers.update({"lab/nano": (status, headers)})


WRONG: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "gated": (lambda hub: hub.gated.add("lab/nano"), "lab/nano", ("gated", "accept its terms", "`hf auth login`")),
    "misspelt": (lambda hub: None, "lab/nnao", ("no such folder here", "no repository lab/nnao", "check the name")),
    "private": (refuse_with(401, {}), "lab/nano", ("no repository lab/nano", "if it is private, run `hf auth login`")),
    "forbidden": (refuse_with(403, {}), "lab/nano", ("refuses your token (403)", "`hf auth login`")),
    "wrong token": (refuse_with(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "lab/nano",
                    ("refuses your token (401)", "HF_TOKEN")),
    "unknown revision": (lambda hub: None, "lab/nano@v9", ("no revision 'v9'", "/lab/nano/commits/main")),
    "unknown commit": (lambda hub: None, f"lab/nano@{'c' * 40}", (f"no revision '{'c' * 40}'",)),
    "broken hub": (refuse_with(500, {}), "lab/nano", ("status 500", "try again later")),
    "no hub": (refuse_with(200, {}), "lab/nano", ("does not answer as a hub", "HF_ENDPOINT")),
    "pickles only": (lambda hub: hub.add("lab/old", {"config.json": b"{}", "pytorch_model.bin": b""}), "lab/old",
                     ("must hold its weights as model*.safetensors", "pickled weights are not read")),
    "no model": (lambda hub: hub.add("lab/gguf", {"x.gguf": b"", "README.md": b""}), "lab/gguf", ("no config.json",)),
}  # fmt: skip


@pytest.mark.parametrize(("change", "name", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_the_hub_refuses_is_said_in_one_sentence(hub: Hub, change: Any, name: str, words: tuple[str, ...]) -> None:
    change(hub)
    text = refusal(name)
    assert text.startswith(f"{name!r} must") and all(word in text for word in words), text


def test_offline_and_not_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("lab/nano")
    go_offline(monkeypatch)
    assert "HF_HUB_OFFLINE is set" in refusal("lab/other") and "`hf download lab/other`" in refusal("lab/other")
    assert f"the cache {constants.HF_HUB_CACHE} lacks it (but has lab/nano)" in refusal("Lab/Nano")
    assert "has other revisions of it, but not 'v2'" in refusal("lab/nano@v2")
    assert "`hf download lab/nano --revision v2`" in refusal("lab/nano@v2")


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(monkeypatch, Path(constants.HF_HOME), "http://127.0.0.1:1")
    begun = time.monotonic()
    assert "http://127.0.0.1:1 cannot be reached (ConnectError" in refusal("lab/nano")
    assert "http://127.0.0.1:1 cannot be reached (ConnectError" in refusal(f"lab/nano@{OLD}")
    assert time.monotonic() - begun < 5
    assert "HF_HOME" in refusal("lab/nano")


def test_a_full_disk_is_noticed_before_and_during_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
        assert "which has 0.0 MB free: make room, or set HF_HOME" in refusal("lab/nano")
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--lab--nano/snapshots/*/model.safetensors"))

    snapshot = find("lab/nano")
    of_xet = RuntimeError("Task error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), of_xet):
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.file_download.http_get", Mock(side_effect=error))
            with pytest.raises(HubError, match=r"must fit on the disk of .* that is full: make room, or set HF_HOME"):
                download(snapshot)
    assert fetch("lab/nano") == snapshot.name  # with room again


def test_a_download_that_breaks_off_goes_on_later(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = find("lab/nano")
    with monkeypatch.context() as patch:
        error = RuntimeError("Task error: CAS Client Error: error sending request")  # of hf_xet
        patch.setattr("huggingface_hub.file_download.http_get", Mock(side_effect=error))
        with pytest.raises(HubError, match=r"must be downloaded whole, but .*CAS Client.*: run `hf download lab/nano`"):
            download(snapshot)
    hub.lengths["lab/nano"] = 10**7  # longer than what comes
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with pytest.raises(HubError, match=r"the hub, but http\S+ cannot be reached \(Rem.* of its 7 files .*hf down"):
        download(snapshot)
    assert not (snapshot.directory / "model.safetensors").exists()
    hub.lengths.clear()
    assert fetch("lab/nano") == snapshot.name and base_hash(snapshot.name) == base_hash(CHECKPOINT)


def test_an_id_in_other_letters_follows_the_hub(hub: Hub) -> None:
    hub.redirects["Lab/Nano"] = "lab/nano"
    name = fetch("Lab/Nano")
    assert name == f"Lab/Nano@{OLD}" and base_hash(name) == base_hash(CHECKPOINT)


def test_a_cache_that_cannot_be_written(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    assert "needs a cache that can be written" in refusal("lab/nano") and "set HF_HOME" in refusal("lab/nano")


# ------------------------------------------------------------------------------------------------ a study and after


def options(phantoms: Path, folder: Path, model: str) -> list[str]:
    return ["--data", str(phantoms), "--results", str(folder), "--model", model, "--trials", "1"]


def test_a_study_names_the_commit(hub: Hub, phantoms: Path, tmp_path: Path) -> None:
    from tune.plan.prepare import prepare

    said: list[str] = []
    study = prepare(parse(options(phantoms, tmp_path / "results", "lab/nano")), said.append)
    assert study.settings.model.model == study.plan["settings"]["model"]["model"] == f"lab/nano@{OLD}"
    assert study.plan["base_hash"] == base_hash(CHECKPOINT)
    # Read after the download: the ranges of the space follow the base.
    assert study.settings.base == BaseShape.of("qwen3", 128) == BaseShape.from_dict(study.plan["base"])
    assert str(tmp_path) not in json.dumps(study.plan["settings"]["model"])
    downloads = [index for index, text in enumerate(said) if text.startswith("Downloading")]
    assert len(downloads) == 1 and downloads[0] > said.index(
        "Looking for near-copies"
    )  # data that is refused costs none


def test_problems_of_base_and_data_come_together_before_any_download(hub: Hub, tmp_path: Path) -> None:
    from tune.plan.prepare import prepare

    (tmp_path / "m.json").write_text("[1]")
    for model, word in (("lab/nnao", "no repository lab/nnao"), ("lab/nano", "m.json")):
        with pytest.raises(SettingsError) as caught:
            prepare(parse(options(tmp_path / "m.json", tmp_path / "results", model)), print)
        assert word in str(caught.value) and "m.json" in str(caught.value)
    assert not any("model.safetensors" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b'{"model_type": "bert"}', "image-text-to-text model"),
        (b"{}", "must name a model_type"),
        (b"{", "must be JSON"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_downloaded(
    hub: Hub, phantoms: Path, tmp_path: Path, config: bytes, words: str
) -> None:
    from tune.plan.prepare import prepare

    hub.add("lab/bert", NANO | {"config.json": config})
    with pytest.raises(SettingsError, match=words):
        prepare(parse(options(phantoms, tmp_path / "results", "lab/bert")), print)
    assert not any("model.safetensors" in path for path in hub.asked)


def test_a_study_that_goes_on_fetches_the_same_commit_again(hub: Hub, phantoms: Path, tmp_path: Path) -> None:
    from train_fn.data.splits_file import save_splits
    from train_fn.support.files import file_hash
    from tune.plan.prepare import prepare, resume
    from tune.records.plan import save_plan

    study = prepare(parse(options(phantoms, tmp_path / "results", "lab/nano")), print)
    save_splits(study.splits, study.directory / "splits.json")
    splits_hash = file_hash(study.directory / "splits.json")
    save_plan(study.directory, study.plan | {"splits_hash": splits_hash})
    shutil.copytree(study.directory, tmp_path / "moved" / study.name)  # which no process has locked
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.add("lab/nano", NANO | {"config.json": NANO["config.json"] + b" "}, NEW)
    again = resume(parse(["--resume", study.name, "--results", str(tmp_path / "moved")]), print)
    assert again.settings.model.model == f"lab/nano@{OLD}" and again.plan["base_hash"] == study.plan["base_hash"]


def test_adapter_and_predictions_name_id_and_commit(hub: Hub, splits, tmp_path: Path) -> None:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForImageTextToText

    from train_fn.model.adapters import read_config, read_task
    from train_fn.model.base import load_base
    from train_fn.predict import main
    from train_fn.trial.adapter_files import save_adapter
    from train_fn.trial.lora import adapted
    from train_fn.trial.outputs import save_task

    trial = TrialSettings(lora_r=4, lora_alpha=8, lora_target_modules=("q_proj", "v_proj"))
    base = load_base(replace(ModelSettings(), model=fetch("lab/nano")), torch.device("cpu"))
    with adapted(base, trial) as model:
        save_adapter(base, model, trial, tmp_path / "adapter")
    save_task(base, splits, tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("lab/nano", OLD)
    assert read_config(tmp_path / "adapter").r == 4
    assert read_task(tmp_path / "adapter").model.model == f"lab/nano@{OLD}"
    for path in (tmp_path / "adapter").glob("*.json"):
        assert str(tmp_path) not in path.read_text() and "snapshots" not in path.read_text(), path

    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.add("lab/nano", {"config.json": b"{}"}, NEW)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--adapter", str(tmp_path / "adapter"), "--no-generate", splits.test[0].image])
    assert code == 0 and json.loads(out.getvalue())["label"] in splits.candidates, err.getvalue()
    assert f"Downloading lab/nano@{OLD}" in err.getvalue()

    reference = PeftConfig.from_pretrained(tmp_path / "adapter")
    again = AutoModelForImageTextToText.from_pretrained(reference.base_model_name_or_path, revision=reference.revision)
    assert PeftModel.from_pretrained(again, tmp_path / "adapter").peft_config["default"].r == 4
    assert peft_reference("nano", "/here/nano/checkpoint") == {"base_model_name_or_path": "nano"}
    assert peft_reference("/data/Our-VLM/", "/data/Our-VLM") == {"base_model_name_or_path": "Our-VLM"}
    cached = f"/root/.cache/huggingface/hub/models--lab--nano/snapshots/{OLD}"
    assert peft_reference(cached, cached) == {"base_model_name_or_path": "lab/nano", "revision": OLD}


def test_a_prediction_without_its_base_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from train_fn.predict import InputError, find_base

    go_offline(monkeypatch)
    with pytest.raises(InputError, match=r"the base model 'lab/nano' must be .* HF_HUB_OFFLINE is set"):
        find_base(ModelSettings(model="lab/nano"))


def test_one_trial_without_ray_names_what_is_wrong(
    hub: Hub, splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from train_fn.data.splits_file import save_splits
    from train_fn.main import main

    save_splits(splits, tmp_path / "splits.json")
    trial = {"splits": str(tmp_path / "splits.json"), "output": str(tmp_path / "out"), "trial": {}}
    (tmp_path / "trial.json").write_text(json.dumps(trial | {"model": {"model": "lab/nnao"}}))
    assert main([str(tmp_path / "trial.json")]) == 2
    assert "the base model 'lab/nnao' must be a folder or a model of the hub" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ nodes


def test_a_node_fetches_the_base_in_a_process_of_its_own(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"lab/nano@{OLD}"
    fetch_apart(name)
    hub.add("datasets/lab/pets", {"m.csv": CSV})
    fetch_apart("hf://lab/pets")  # the command that a message advises
    assert data_path("hf://lab/pets").read_bytes() == CSV
    assert base_hash(name) == base_hash(CHECKPOINT)
    shutil.rmtree(constants.HF_HUB_CACHE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match=r"the base 'lab/nano@a+' must .*HF_HUB_OFFLINE is set.*\(on this node\)"):
        fetch_apart(name)


def test_a_worker_has_not_read_the_offline_switch_before_it_sets_it() -> None:
    code = """
import sys, ray, ray.train, ray.train.torch, torch.distributed, train_fn.worker, train_fn.support.profile
print([name for name in sys.modules if name.startswith("huggingface_hub")])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_the_doctor_takes_a_node_that_will_download_the_base() -> None:
    from tune.doctor.findings import Need, check_node

    driver = {"versions": {}, "model": {"config.json": 10}, "num_images": 0, "missing": [], "storage": "",
              "free_gib": 1.0, "session": "", "session_full": 0.5, "skew_s": 0.0, "ram_gib": 1.0}  # fmt: skip
    rows = {row[0]: row[1:3] for row in check_node(driver | {"model": {}, "fetches": True}, driver, Need())}
    assert rows["model"] == ("to be downloaded", "")
    rows = {row[0]: row[1:3] for row in check_node(driver | {"model": {}, "fetches": False}, driver, Need())}
    assert rows["model"][0] == "missing or different"


# ------------------------------------------------------------------------------------------------ data sets


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(rows: int) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    images = [{"bytes": png(index), "path": f"{index}.png"} for index in range(rows)]
    table = pa.table({"image": images, "question": ["What?"] * rows, "answer": ["a"] * rows})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


ANSWERS = ("Benign", "Malignant")  # words that the nano base knows
CSV = b"image,question,answer\nimages/0.png,What?,a\nimages/1.png,What?,b\n"
DATA: dict[str, tuple[dict[str, bytes], str, str, int]] = {
    "a table with images": ({"d/m.csv": CSV, "d/images/0.png": png(0), "d/images/1.png": png(1), "README.md": b"#",
                             "load.py": b"raise SystemExit"}, "", "d/m.csv", 2),
    "one parquet": ({"data/train-00000-of-00001.parquet": parquet(3), "dataset_infos.json": b"{}"}, "",
                    "data/train-00000-of-00001.parquet", 3),
    "folders by class": ({"all/cat/0.png": png(0), "all/dog/1.PNG": png(1), "all/dog/.x.png": b"x"}, "", "all", 2),
    "one of two folders": ({"small/m.csv": CSV, "small/images/0.png": png(0), "small/images/1.png": png(1),
                            "large/x.parquet": b"x"}, ":small", "small/m.csv", 2),
}  # fmt: skip


@pytest.mark.parametrize(("files", "folder", "path", "count"), DATA.values(), ids=DATA.keys())
def test_a_data_set_is_downloaded_and_read(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], folder: str, path: str, count: int
) -> None:
    hub.add("datasets/lab/pets", files)
    name = fetch(f"hf://lab/pets@main{folder}")
    assert name == f"hf://lab/pets@{OLD}{folder}"
    found = data_path(name)
    assert str(found).endswith(f"{OLD}/{path}")
    reading = read_manifest(found)
    assert reading.problems == [] and len(reading.samples) == count
    assert not any(word in asked for asked in hub.asked for word in ("load.py", "README.md", "dataset_infos"))
    if folder:
        assert not any("large" in asked for asked in hub.asked)
    go_offline(monkeypatch)
    assert fetch(name) == fetch(f"hf://datasets/lab/pets{folder}") == name


def test_shards_are_given_as_their_folder(hub: Hub) -> None:
    hub.add("datasets/lab/pets", {f"data/train-0000{n}-of-00002.parquet": parquet(2) for n in range(2)})
    found = data_path(fetch("hf://lab/pets"))
    assert found.name == "data" and len(list(found.glob("*.parquet"))) == 2


def test_a_study_names_the_commit_of_its_data(hub: Hub, tmp_path: Path) -> None:
    from tune.plan.prepare import prepare

    images = {f"images/{index}.png": png(index * 8) for index in range(30)}
    rows = "".join(f"images/{index}.png,What?,{ANSWERS[index % 2]}\n" for index in range(30))
    hub.add("datasets/lab/pets", images | {"m.csv": ("image,question,answer\n" + rows).encode()})
    argv = ["--data", "hf://lab/pets", "--results", str(tmp_path / "results"), "--copies-distance", "-1"]
    study = prepare(parse(argv), lambda text: None)
    assert study.plan["settings"]["data"]["data"] == f"hf://lab/pets@{OLD}"
    assert len(study.splits.train) + len(study.splits.validation) + len(study.splits.test) == 30


def test_problems_of_data_on_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tune.plan.prepare import prepare

    hub.add("datasets/lab/script", {"load.py": b"", "README.md": b""})
    hub.add("datasets/lab/pets", {"m.csv": CSV})
    assert "must hold parquet, JSON, CSV or image files, but has none" in refusal("hf://lab/script")
    assert f"see {hub.url}/datasets/lab/script/tree/{OLD}" in refusal("hf://lab/script")
    assert "files in small/, but has none" in refusal("hf://lab/pets:small")
    assert f"{hub.url} shows you no repository lab/pest" in refusal("hf://lab/pest")
    argv = ["--results", str(tmp_path / "results"), "--data"]
    with pytest.raises(SettingsError, match="`--data` 'hf://lab/pest' must be a data set of the hub"):
        prepare(parse([*argv, "hf://lab/pest"]), print)
    for text in ("hf://pets", "hf://lab/pets@", "hf://lab/pets@../x", "hf://lab/pets:../x"):
        assert not is_hub_data(text)
        with pytest.raises(SettingsError, match=r"`--data` must be .*hf://OWNER/NAME"):
            parse([*argv, text])
    go_offline(monkeypatch)
    assert "`python -m train_fn.model.hub hf://lab/pets`" in refusal("hf://lab/pets")


@pytest.mark.skipif(not os.environ.get("HULUMED_FIXTURES"), reason="no HULUMED_FIXTURES")
def test_hulu_med_from_the_hub(hub: Hub) -> None:
    from train_fn.model.preflight import checked_processor

    folder = Path(os.environ["HULUMED_FIXTURES"]) / "checkpoint"
    hub.add("zju/hulu", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    name = fetch("zju/hulu")
    assert base_hash(name) == base_hash(folder)
    assert checked_processor(ModelSettings(model=name)).tokenizer is not None
