"""What a person sees first of a study in MLflow: the run table, its columns, datasets, few tags, the address."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from mlflow import MlflowClient
from studies import write_plan
from test_tracking import Server

from tune.config.uris import default_uri
from tune.records.journal import encode
from tune.results.console import print_summary
from tune.results.summary import Summary
from tune.show import show
from tune.tracking.__main__ import main
from tune.tracking.calls import prepare_mlflow
from tune.tracking.runs_view import runs_address

STUDY_ID = "5e1f" * 8
SEARCHED = [  # rank 16 of the second trial is the better one, and the third has no projector
    {"learning_rate": 1e-4, "lora_r": 4, "train_projector": True, "projector_learning_rate": 1e-5},
    {"learning_rate": 2e-4, "lora_r": 16, "train_projector": True, "projector_learning_rate": 2e-5},
    {"learning_rate": 3e-4, "lora_r": 8, "train_projector": False},
]
SCORES, STATES = [0.61, 0.83, 0.42], ["COMPLETE", "COMPLETE", "STOPPED"]


def events() -> list[dict[str, Any]]:
    """A study of three trials."""
    tags = {"metric": "auroc", "data": "/images/busi.json", "version_ray": "2.60.0", "version_torch": "2.13.0"}
    params = {"trials": 3, "num_train": 30, "num_validation": 10, "num_test": 11}
    written: list[dict[str, Any]] = [{"event": "session", "params": params, "tags": tags}]
    for number, (searched, score, state) in enumerate(zip(SEARCHED, SCORES, STATES, strict=True)):
        derived = {"lora_alpha": 2.0 * searched["lora_r"], "num_train_epochs": 1}
        written += [
            {"event": "started", "number": number, "searched": searched, "settings": searched | derived,
             "params": searched | derived},
            {"event": "report", "number": number, "epoch": 1, "step": 4, "metrics": {"auroc": score, "accuracy": 0.5},
             "log": [{"step": 4, "loss": 0.5, "learning_rate": 1e-4}], "system": {}, "wall_s": 3.0, "waited_s": 0.1,
             "seconds": {"train": 2.0, "evaluation": 0.5}, "device_s": 3.0},
            {"event": "ended", "number": number, "state": state, "error": "", "best": max(SCORES[: number + 1]),
             "num_ended": number + 1, "step": 4, "seconds": {"wall": 3.0, "train": 2.0, "evaluation": 0.5},
             "applied": {"trainable_params": 10}, "lane": 0, "device": "cpu", "notes": [], "device_s": 3.0,
             "best_epoch": 1, "score": score},
        ]  # fmt: skip
    written.append(
        {"event": "study_ended", "state": "COMPLETE", "tags": {"winner": 1}, "metrics": {"best_auroc": 0.83},
         "num_trials": 3, "artifacts": [], "adapter": None, "register": "", "model_tags": {}}
    )  # fmt: skip
    return [event | {"time": 1e9 + index, "seq": index} for index, event in enumerate(written)]


def make_study(folder: Path, uri: str) -> Path:
    directory = folder / "results" / "first"
    directory.mkdir(parents=True)
    study = {"experiment": "e", "report_to": ["mlflow"], "storage": "", "trials": 3, "select": "best"}
    write_plan(directory, study, study_id=STUDY_ID, tracking_uri=uri, data_hash="d" * 64)
    (directory / "journal.jsonl").write_bytes(b"".join(encode(event) + b"\n" for event in events()))
    return directory


@pytest.fixture(scope="module")
def delivered(tmp_path_factory) -> Iterator[tuple[Path, MlflowClient]]:
    """A study's folder, delivered to an experiment whose owner has described it."""
    folder = tmp_path_factory.mktemp("pages")
    prepare_mlflow()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        directory = make_study(folder, default_uri())
        client = MlflowClient(default_uri())
        client.create_experiment("e", tags={"mlflow.note.content": "Ours."})
        assert main(["sync", str(directory)]) == 0
        yield directory, client


def runs_of(client: MlflowClient, condition: str = "", order: str = "") -> list[Any]:
    experiment = client.get_experiment_by_name("e")
    return list(client.search_runs([experiment.experiment_id], condition, order_by=[order] if order else None))


def view_of(client: MlflowClient) -> dict[str, Any]:
    view = json.loads(client.get_experiment_by_name("e").tags[f"mlflow.sharedViewState.{STUDY_ID}"])
    assert view["name"] == "first" and view["createdAt"] == 1e12
    return json.loads(view["state"])


def test_the_view_selects_the_studys_trials_with_the_best_first(delivered) -> None:
    _, client = delivered
    view = view_of(client)
    runs = runs_of(client, view["searchFilter"], f"{view['orderByKey']} {'ASC' if view['orderByAsc'] else 'DESC'}")
    assert [run.info.run_name for run in runs] == ["trial 1", "trial 0", "trial 2"]


def test_the_views_columns_and_chart_are_objective_end_state_and_what_was_searched(delivered) -> None:
    _, client = delivered
    view = view_of(client)
    searched = ["learning_rate", "lora_r", "train_projector", "projector_learning_rate"]
    columns = ["metrics.`best_epoch_score`", "tags.`end_state`", *(f"params.`{name}`" for name in searched)]
    assert view["selectedColumns"] == view["columnOrder"] == columns
    parallel, curves = view["compareRunCharts"]
    # MLflow would draw no line for the third trial, which has no rate of a projector.
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (searched[:3], ["best_epoch_score"])
    assert curves["metricKey"] == "auroc"
    for column in columns[:5]:  # what the page asks for exists in every trial
        kind, name = column.replace("`", "").split(".")
        assert all(name in getattr(run.data, kind) for run in runs_of(client, view["searchFilter"]))


def test_what_the_owner_wrote_about_the_experiment_stays(delivered) -> None:
    tags = delivered[1].get_experiment_by_name("e").tags
    assert tags["mlflow.note.content"] == "Ours." and tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_parts_of_the_data_are_inputs_and_the_trials_have_not_seen_the_test(delivered) -> None:
    _, client = delivered
    inputs = {}
    for run in runs_of(client):
        datasets = [(item.tags[0].value, item.dataset) for item in run.inputs.dataset_inputs]
        assert {dataset.name for _, dataset in datasets} == {"busi"}
        inputs[run.info.run_name] = {part: (d.digest, json.loads(d.profile)["num_rows"]) for part, d in datasets}
    study = inputs.pop("first")
    assert {part: rows for part, (_, rows) in study.items()} == {"train": 30, "validation": 10, "test": 11}
    assert len({digest for digest, _ in study.values()}) == 3
    assert list(inputs.values()) == [{part: study[part] for part in ("train", "validation")}] * 3


def test_versions_are_one_tag_and_derived_settings_no_parameter(delivered) -> None:
    for run in runs_of(delivered[1]):
        assert run.data.tags["versions"] == "ray 2.60.0, torch 2.13.0"
        assert not [name for name in run.data.tags if name.startswith("version_")]
        assert "lora_alpha" not in run.data.params
        assert len(run.data.tags) <= 14, sorted(run.data.tags)


def test_a_second_delivery_changes_nothing(delivered) -> None:
    directory, client = delivered
    before = [run.to_dictionary() for run in runs_of(client)], client.get_experiment_by_name("e").tags
    (directory / "tracking.json").unlink()
    assert main(["sync", str(directory)]) == 0
    assert ([run.to_dictionary() for run in runs_of(client)], client.get_experiment_by_name("e").tags) == before


def test_the_results_name_the_address(delivered, capsys) -> None:
    directory, client = delivered
    number = client.get_experiment_by_name("e").experiment_id
    page = f"/#/experiments/{number}/runs?workflowType=machine_learning&viewStateShareKey={STUDY_ID}"
    outcome = show(directory)
    print_summary(outcome)
    lines = capsys.readouterr().out.splitlines()
    where = next(index for index, line in enumerate(lines) if line.startswith("Compare trials mlflow ui"))
    assert lines[where + 1].split() == ["and", "open", f"http://127.0.0.1:5000{page}"]
    commands = Summary(outcome.to_dict() | {"tracking_uri": "http://host:1"}, directory).commands
    assert commands["Compare trials"] == outcome.runs_address and "and open" not in commands


@pytest.mark.parametrize(
    ("uri", "server"),
    [("sqlite:////a/mlflow.db", "http://127.0.0.1:5000"), ("https://host:1/path/", "https://host:1/path")],
)
def test_the_address_is_the_servers(uri, server) -> None:
    page = "/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=key"
    assert runs_address(uri, "7", "key") == server + page


def test_no_address_is_guessed() -> None:
    assert runs_address("databricks", "7", "key") == runs_address("sqlite:////a/mlflow.db", "", "key") == ""


# ------------------------------------------------------------------------------------------------ in a browser


class Browser:
    """Headless Chromium, driven over its debugging protocol."""

    def __init__(self, profile: Path) -> None:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command = ["chromium", *options, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.profile = profile

    async def words(self, address: str, expected: list[str]) -> str:
        """The text of a page, 1800 pixels wide, once it has all expected words; after two minutes with what it has."""
        deadline = time.monotonic() + 120
        port_file = self.profile / "DevToolsActivePort"
        while not port_file.exists() or "\n" not in port_file.read_text():
            assert time.monotonic() < deadline, "Chromium does not start"
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            pages = await (await session.get(f"http://127.0.0.1:{port}/json")).json(content_type=None)
            socket = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            async with session.ws_connect(socket, max_msg_size=0) as protocol:
                size = {"width": 1800, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
                await self.call(protocol, 1, "Emulation.setDeviceMetricsOverride", **size)
                # Another address of the same single page would not be loaded anew.
                await self.call(protocol, 2, "Page.navigate", url="about:blank")
                await self.call(protocol, 3, "Page.navigate", url=address)
                number, text = 3, ""
                while time.monotonic() < deadline and not all(word in text for word in expected):
                    await asyncio.sleep(0.5)
                    number += 1
                    script = "document.body ? document.body.innerText : ''"
                    answer = await self.call(protocol, number, "Runtime.evaluate", expression=script)
                    text = answer["result"]["result"].get("value", "")
                return text

    @staticmethod
    async def call(protocol: aiohttp.ClientWebSocketResponse, number: int, method: str, **params: Any) -> Any:
        await protocol.send_json({"id": number, "method": method, "params": params})
        while True:
            answer = await protocol.receive_json(timeout=120)
            if answer.get("id") == number:
                return answer


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    if not shutil.which("chromium"):
        pytest.skip("needs Chromium: apt-get install chromium")
    made = Browser(tmp_path / "profile")
    yield made
    made.process.terminate()
    made.process.wait()


@pytest.mark.slow
def test_a_new_browser_opens_the_runs_as_they_should_look(delivered, browser, tmp_path) -> None:
    directory, _ = delivered
    server = Server(tmp_path, default_uri())
    server.start()
    try:
        address = show(directory).runs_address.replace("http://127.0.0.1:5000", server.uri)
        searched = ["learning_rate", "lora_r", "train_projector", "projector_learning_rate"]
        expected = ["best_epoch_score", "end_state", "STOPPED", "0.83", "0.0002", *searched]
        text = asyncio.run(browser.words(address, expected))
        assert [word for word in expected if word not in text] == [], text
        assert text.index("trial 1") < text.index("trial 0") < text.index("trial 2"), "the best first"
        assert "Ours." in text and "3 matching runs" in text
        assert "No data available" not in text and "lora_alpha" not in text
        compared = ["Study first", "Parallel Coordinates", "best_e", "lora_r", "trial 1 (auroc)"]
        text = asyncio.run(browser.words(address.replace("?", "?compareRunsMode=CHART&"), compared))
        assert [word for word in compared if word not in text] == [], text
    finally:
        server.signal(signal.SIGKILL)
