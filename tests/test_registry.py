"""The winner's adapter as an MLflow model: logged once, loaded, and served as MLflow's own commands do it."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from train_fn.data.samples import Sample, Task
from train_fn.model.adapters import read_task
from train_fn.nano import CHECKPOINT
from train_fn.predict import InputError, answers_of
from train_fn.scoring.answering import Answer
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.adapter_files import save_adapter
from train_fn.trial.lora import adapted
from train_fn.trial.outputs import save_task
from tune.tracking.registry import log_model

TAGS = {"base": "nano", "data": "phantoms", "test/auroc": "0.9"}


def write_adapter(base, splits, directory: Path, seed: int) -> Path:
    """An adapter that changes the answers, without the time of training it."""
    settings = TrialSettings(lora_r=4, train_projector=True, seed=seed)
    with adapted(base, settings) as model:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        save_adapter(base, model, settings, directory)
    save_task(base, splits, directory)
    return directory


def ask(adapter: Path, samples: Sequence[Sample]) -> list[Answer]:
    """What `train_fn.predict --no-generate` answers."""
    task = read_task(adapter)
    assigned = [task.assign(replace(sample, answer="")) for sample in samples]
    return list(answers_of(ModelSettings(), adapter, assigned, task, {}, 8, generate_all=False))


def inline(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


@pytest.fixture(scope="module")
def adapter(base, splits, tmp_path_factory) -> Path:
    return write_adapter(base, splits, tmp_path_factory.mktemp("study") / "best adapter #1", 0)


@pytest.fixture(scope="module")
def images(splits) -> list[str]:
    return [sample.image for sample in splits.test[:4]]


@pytest.fixture(scope="module")
def expected(adapter, splits) -> np.ndarray:
    """The probabilities that `train_fn.predict` gives the images: [4, C]."""
    return np.array([answer.probabilities for answer in ask(adapter, splits.test[:4])])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A client of a store of its own, and its URI."""
    from mlflow import MlflowClient

    directory = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{directory / 'mlflow.db'}"
    client = MlflowClient(uri)
    client.create_experiment("tuning", artifact_location=str(directory / "artifacts"))
    return client, uri


@pytest.fixture(scope="module")
def registered(store, adapter) -> str:
    return log_model(store[0], new_run(store[0]), adapter, register="ultrasound", tags=TAGS)


@pytest.fixture
def load(store, monkeypatch):
    """`mlflow.pyfunc.load_model` from the store."""
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[1])
    monkeypatch.setattr(sys, "path", sys.path[:])  # loading puts the model's code in front
    return mlflow.pyfunc.load_model


@pytest.fixture
def loaded(load, registered):
    return load(registered)


def new_run(client) -> str:
    return client.create_run(client.get_experiment_by_name("tuning").experiment_id).info.run_id


def models_of(client, run: str) -> list:
    experiment = client.get_run(run).info.experiment_id
    return client.search_logged_models([experiment], filter_string=f"source_run_id = '{run}'")


def same(found: pd.DataFrame, expected: np.ndarray, candidates: tuple[str, ...]) -> bool:
    assert list(found.columns) == [*candidates, "answer"]
    assert list(found["answer"]) == [candidates[row.argmax()] for row in expected]
    return np.allclose(found[list(candidates)].to_numpy(float), expected, rtol=0, atol=1e-6)


def test_logged_once_and_nothing_global_changes(store, base, splits, adapter, tmp_path) -> None:
    import mlflow

    client, _ = store
    run = new_run(client)
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    uri = log_model(client, run, adapter, register="once", tags=TAGS)
    assert uri == "models:/once/1" == log_model(client, run, adapter, register="once", tags=TAGS)
    (model,) = models_of(client, run)
    assert log_model(client, run, adapter, tags=TAGS) == f"models:/{model.model_id}"
    (version,) = client.search_model_versions("name = 'once'")
    assert version.run_id == run and version.status == model.status == "READY"
    assert version.tags.items() >= TAGS.items() and model.tags.items() >= TAGS.items()
    assert [output.model_id for output in client.get_run(run).outputs.model_outputs] == [model.model_id]
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == before and mlflow.active_run() is None
    assert not list(Path(model.artifact_location).rglob("*.pkl"))

    other = write_adapter(base, splits, tmp_path / "other", 1)  # the study went on and has another winner
    assert log_model(client, run, other, register="once", tags=TAGS) == "models:/once/2"
    assert log_model(client, run, adapter, register="once", tags=TAGS) == "models:/once/1"
    assert len(models_of(client, run)) == 2


def test_an_interrupted_upload_is_completed(store, adapter, monkeypatch) -> None:
    client, _ = store
    run = new_run(client)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="disk full"):
        broken.setattr(client, "log_model_artifacts", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        log_model(client, run, adapter, register="cut", tags=TAGS)
    assert not client.search_model_versions("name = 'cut'")
    assert log_model(client, run, adapter, register="cut", tags=TAGS) == "models:/cut/1"
    (model,) = models_of(client, run)
    assert model.status == "READY"


def test_the_loaded_model_predicts_as_predict_does(loaded, images, expected, splits, adapter) -> None:
    wrapped = "\n".join(inline(images[1])[start : start + 76] for start in range(0, 10**6, 76)).strip()
    given = [images[0], wrapped, f"data:image/png;base64,{inline(images[2])}", inline(images[3])]
    assert same(loaded.predict(pd.DataFrame({"image": given})), expected, splits.candidates)

    question = "Is this benign?"
    asked = [Sample((images[0],), question, "", -1)]
    (answer,) = ask(adapter, asked)
    other = np.array([expected[1], answer.probabilities])
    found = loaded.predict(pd.DataFrame({"image": [images[1], inline(images[0])], "text": [None, question]}))
    assert same(found, other, splits.candidates)
    assert not np.allclose(other[1], expected[0], atol=1e-3)


def test_the_loaded_model_decides_as_predict_does(load, store, base, splits, images, tmp_path) -> None:
    adapter = write_adapter(base, splits, tmp_path / "decided", 0)
    task = json.loads((adapter / "task.json").read_text())
    rule = {"aim": "macro_f1", "scale": 0.5, "offsets": [0.4, 0.0, -0.4], "rule": [2.0, -1.0, 1.0],
            "positive": None, "threshold": None}  # fmt: skip
    task["tasks"][0]["decision"] = rule
    (adapter / "task.json").write_text(json.dumps(task))
    wanted = ask(adapter, splits.test[:4])
    answers = [splits.candidates[answer.chosen] for answer in wanted]
    assert answers != [splits.candidates[int(np.argmax(answer.probabilities))] for answer in wanted]
    found = load(log_model(store[0], new_run(store[0]), adapter, tags=TAGS)).predict(pd.DataFrame({"image": images}))
    assert list(found["answer"]) == answers
    expected = np.array([answer.probabilities for answer in wanted])
    assert np.allclose(found[list(splits.candidates)].to_numpy(float), expected, rtol=0, atol=1e-6)


def test_without_candidates_the_answer_is_generated(load, store, base, splits, images, tmp_path) -> None:
    opened = replace(splits, tasks=(Task(),), max_new_tokens=4)
    adapter = write_adapter(base, opened, tmp_path / "open", 2)
    found = load(log_model(store[0], new_run(store[0]), adapter, tags=TAGS)).predict(pd.DataFrame({"image": images}))
    assert found.to_dict("list") == {"answer": [answer.text for answer in ask(adapter, splits.test[:4])]}
    assert any(found["answer"])


def test_an_adapter_of_several_tasks_answers_each(load, store, base, splits, images, tmp_path) -> None:
    tasks = (replace(splits.tasks[0], name="finding"), Task("benign", "binary", ("no", "yes")), Task("open"))
    questions = ("What is it?", "Is it benign?", "Describe it.")
    train = [
        replace(splits.train[0], question=question, task=task.name, answer=answer, label=0)
        for task, question, answer in zip(tasks, questions, ("Normal", "no", "a mass"), strict=True)
    ]
    several = replace(splits, train=tuple(train), tasks=tasks, max_new_tokens=4)
    adapter = write_adapter(base, several, tmp_path / "several", 3)
    model = load(log_model(store[0], new_run(store[0]), adapter, tags=TAGS))
    both = [images[0], inline(images[1])]
    rows = [
        (images[0], questions[0], None),
        (json.dumps(both), questions[1], None),
        (images[0], "Unheard of?", "Benign"),
        (images[0], questions[2], None),
    ]
    found = model.predict(pd.DataFrame(rows, columns=["image", "text", "question_type"]))
    assert list(found.columns) == ["answer", "probabilities"]
    asked = [Sample((images[0],), rows[0][1], ""), Sample(tuple(images[:2]), rows[1][1], "")]
    asked += [Sample((images[0],), rows[2][1], "", question_type="Benign"), Sample((images[0],), rows[3][1], "")]
    expected = ask(adapter, asked)
    for row, answer, candidates in zip(
        range(4), expected, (splits.candidates, ("no", "yes"), ("no", "yes"), ()), strict=True
    ):
        its = json.loads(found["probabilities"][row])
        assert tuple(its) == candidates and list(its.values()) == pytest.approx(answer.probabilities, abs=1e-5)
        assert found["answer"][row] == (max(its, key=its.get) if its else answer.text)
    assert [model.metadata.signature.outputs.input_names(), model.metadata.signature.inputs.input_names()] == [
        ["answer", "probabilities"],
        ["image", "text", "question_type"],
    ]
    direct = model.unwrap_python_model().predict(None, pd.DataFrame({"image": [both], "text": [questions[1]]}))
    assert direct["probabilities"][0] == found["probabilities"][1]


def test_input_that_is_not_an_image_is_refused(loaded, images) -> None:
    from mlflow.exceptions import MlflowException

    bomb = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(bomb, "PNG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    encoded = [base64.b64encode(content).decode() for content in (bomb.getvalue(), postscript)]
    with pytest.raises(MlflowException) as caught:
        loaded.predict(pd.DataFrame({"image": [*encoded, "/etc/passwd", "nowhere.png", images[0], ""]}))
    problems = str(caught.value).split("; ")
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    assert [text for text in problems if "row 0 must have at most 50,000,000 pixels" in text]
    assert [text for text in problems if "row 2: `image` must be a path" in text]
    with pytest.raises(MlflowException) as caught:
        loaded.predict(pd.DataFrame({"image": ["[]"]}))
    assert str(caught.value).count("must be") == 1 and "row 0" in str(caught.value)
    for row in (1, 5):
        assert [text for text in problems if f"image row {row} must be decodable" in text]
    assert [text for text in problems if "nowhere.png must be" in text]


def test_paths_stay_in_the_named_folder(loaded, images, expected, splits, tmp_path, monkeypatch) -> None:
    from mlflow.exceptions import MlflowException

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link.png").symlink_to(images[0])
    (folder / "inside.png").write_bytes(Path(images[0]).read_bytes())
    monkeypatch.setenv("VLM_TUNE_IMAGE_ROOT", str(folder))
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    given = ["inside.png", str(folder / "inside.png")]
    assert same(loaded.predict(pd.DataFrame({"image": given})), expected[[0, 0]], splits.candidates)
    for outside in ("link.png", "../../outside.png", images[0], "a\0.png"):
        with pytest.raises(MlflowException, match=r"row 0: `image` must"):
            loaded.predict(pd.DataFrame({"image": [outside]}))


def test_the_base_comes_from_the_environment_variable(load, registered, images, expected, splits, monkeypatch) -> None:
    monkeypatch.setenv("VLM_TUNE_BASE", "/nowhere/model")
    with pytest.raises(InputError, match=r"'/nowhere/model'.* VLM_TUNE_BASE"):
        load(registered)
    monkeypatch.setenv("VLM_TUNE_BASE", str(CHECKPOINT))
    assert same(load(registered).predict(pd.DataFrame({"image": images})), expected, splits.candidates)


def command(name: str, store, registered: str, *argv: object) -> tuple[list[str], dict[str, str]]:
    """An `mlflow models` command and its environment, in which this project is not to be found."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, "-m", "mlflow", "models", name, "-m", registered, "--env-manager", "local"]
    return [*words, *map(str, argv)], environment | {"MLFLOW_TRACKING_URI": store[1]}


def test_mlflow_models_predict(store, registered, images, expected, splits, tmp_path) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"dataframe_records": [{"image": inline(path)} for path in images]}))
    argv = ("-i", tmp_path / "in.json", "-o", tmp_path / "out.json", "-t", "json")
    words, environment = command("predict", store, registered, *argv)
    found = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    answers = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert same(pd.DataFrame(answers), expected, splits.candidates)


def test_mlflow_models_serve(store, registered, images, expected, splits, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    words, environment = command("serve", store, registered, "--host", "127.0.0.1", "--port", port, "--workers", 1)

    def ask(image: str) -> dict:
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}}).encode()
        request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["predictions"][0]

    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(words, env=environment, cwd=tmp_path, stderr=log, stdout=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(f"{url}/ping", timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.2)
            with ThreadPoolExecutor(4) as pool:  # at once, as clients do
                answers = list(pool.map(ask, map(inline, images * 2)))
            assert same(pd.DataFrame(answers), np.concatenate([expected, expected]), splits.candidates)
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(images[0])
            assert caught.value.code == 400 and "a server reads no paths" in caught.value.read().decode()
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
