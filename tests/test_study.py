"""`python tune/run.py` for real: Ray, DeepSpeed, Optuna and MLflow, on phantoms and the nano base."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from mlflow import MlflowClient
from optuna.trial import TrialState
from safetensors.torch import load_file
from studies import ROOT, SECRETS, SMALL, Finished, finish, start, wait_for

from train_fn.data.splits_file import load_splits
from train_fn.model.base import load_base
from train_fn.settings import ModelSettings
from train_fn.trial.scoring import score_adapter
from tune.api import load_study, run_study
from tune.results.summary import format_score

pytestmark = pytest.mark.ray


def test_every_trial_is_in_study_json_with_its_end(mixed) -> None:
    trials = mixed.study["trials"]
    assert [trial["number"] for trial in trials] == list(range(8))
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 5 + ["FAILED"] + ["COMPLETE"] * 2
    assert "nowhere" in trials[5]["error"]
    assert mixed.study["state"] == "COMPLETE"


def test_mlflow_tells_the_same(mixed) -> None:
    runs = mixed.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {int(run.data.tags["trial"]): run for run in runs if run is not parent}
    assert parent.info.status == "FINISHED" and set(children) == set(range(8))
    for number, run in children.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FAILED" if number == 5 else "FINISHED")
    assert "nowhere" in children[5].data.tags["error"]
    trial = mixed.study["trials"][1]
    assert children[1].data.params["lora_r"] == "16"
    assert children[1].data.metrics["auroc"] == pytest.approx(trial["epochs"][-1]["auroc"])
    assert children[1].data.tags["lane"] == "0" and children[1].data.tags["device"] == "cpu"
    assert "ray 2.60.0, " in parent.data.tags["versions"] == children[1].data.tags["versions"]
    assert parent.data.tags["winner"] == str(mixed.study["winner"])


def test_the_profile_is_told_everywhere(mixed) -> None:
    shares = mixed.study["profile"]
    assert {"data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "idle"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1) and shares["forward"] > shares["optimizer"]
    assert f"Profile: {next(iter(shares))} {max(shares.values()):.1%}, " in mixed.out
    (child,) = [run for run in mixed.runs() if run.data.tags.get("trial") == "3"]
    seconds = mixed.study["trials"][3]["seconds"]
    assert child.data.metrics["profile_forward_s"] == seconds["profile_forward"] > 0


def test_tensorboard_and_wandb_tell_the_same(mixed) -> None:
    files = sorted((mixed.folder / "results" / "s" / "trials").glob("*/runs/events*"))
    assert len(files) == 8
    for number, file in enumerate(files):
        assert (b"auroc" in file.read_bytes()) is (number != 5)  # the one that failed has no score
        assert (b"train/loss" in file.read_bytes()) is (number != 5)
    offline = list((mixed.folder / "results" / "s" / "wandb").glob("offline-run-*"))
    assert len(offline) == 8
    client = MlflowClient(f"sqlite:///{mixed.folder / 'mlflow.db'}")
    (child,) = [run for run in mixed.runs() if run.data.tags.get("trial") == "0"]
    history = client.get_metric_history(child.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3]


def test_python_tells_the_same_also_when_nothing_is_left(mixed, tmp_path: Path) -> None:
    results = shutil.copytree(mixed.folder / "results", tmp_path / "results", symlinks=True)
    result = run_study(resume="s", results=results, report_to=["tensorboard"], progress=False)
    stored = mixed.study
    assert result.state == "COMPLETE" and result.winner is not None and result.winner.name == stored["winner"]
    assert list(result.trials["state"]) == [trial["state"] for trial in stored["trials"]]
    assert list(result.trials["lora_r"]) == [trial["settings"]["lora_r"] for trial in stored["trials"]]
    assert result.trials["confirmed"][stored["winner"]] == np.mean(stored["confirmations"][str(stored["winner"])])
    assert result.adapter == results / "s" / "best_adapter" and result.report == results / "s" / "report.html"
    assert result.test["winner"].loc["auroc", "value"] == stored["test"]["winner"]["auroc"]["value"]
    assert load_study(results / "s").trials.equals(result.trials)


def test_optuna_tells_the_same(mixed) -> None:
    storage = f"sqlite:///{mixed.folder / 'results' / 's' / 'optuna.db'}"
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5 + [TrialState.FAIL] + [
        TrialState.COMPLETE
    ] * 2
    for trial, record in zip(trials, mixed.study["trials"], strict=True):
        if trial.state == TrialState.COMPLETE:
            assert trial.value == pytest.approx(record["epochs"][-1]["auroc"])
    assert trials[0].params == {"learning_rate": 1e-3}


def test_a_trial_is_the_same_on_a_fresh_lane_and_as_its_fifth(mixed) -> None:
    trials = mixed.study["trials"]
    assert [trial["turn"] for trial in trials[:5]] == [0, 1, 2, 3, 4]
    for group in ((0, 2, 4, 7), (1, 3, 6)):
        first, *others = (trials[number] for number in group)
        for other in others:
            assert other["epochs"] == first["epochs"]
            assert other["applied"] == first["applied"] | {"max_grad_norm": 1e6 + other["number"]}
    one, two = trials[0]["applied"], trials[1]["applied"]
    assert (one["lora_r"], one["train_projector"], one["learning_rate"]) == (4, False, 1e-3)
    assert (two["lora_r"], two["train_projector"], two["projector_learning_rate"]) == (16, True, 2e-3)


def test_a_failed_trial_leaves_the_lane_standing(mixed) -> None:
    trials = mixed.study["trials"]
    assert [trial["turn"] for trial in trials if trial["state"] == "COMPLETE"] == [0, 1, 2, 3, 4, 6, 7]


def test_the_summary_names_winner_scores_and_places(mixed) -> None:
    study = mixed.study
    assert f"winner (trial {study['winner']})" in mixed.out or "winner = the guide" in mixed.out
    assert "1 failed" in mixed.out and "mlflow ui" in mixed.out and study["adapter"] in mixed.out
    adapter = Path(study["adapter"])
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "processor_config.json"} <= names
    assert format_score(study["test"]["winner"]["auroc"]) in (adapter / "README.md").read_text()
    low, high = study["test"]["winner"]["auroc"]["interval"]
    assert low <= study["test"]["winner"]["auroc"]["value"] <= high
    best = max(t["epochs"][-1]["auroc"] for t in study["trials"] if t["state"] == "COMPLETE")
    assert study["trials"][study["winner"]]["epochs"][-1]["auroc"] == best


def test_nothing_was_compiled(mixed) -> None:
    assert not (mixed.folder / "compiled").exists()
    assert shutil.which("gcc", path=str(mixed.folder / "bin")) is None


def test_splits_are_written_and_disjoint(mixed) -> None:
    parts = json.loads((mixed.folder / "results" / "s" / "splits.json").read_text())
    images = [image for part in ("train", "validation", "test") for sample in parts[part] for image in sample["images"]]
    assert len(images) == len(set(images)) == 60


def test_the_difference_to_the_guide_is_paired_and_told(mixed) -> None:
    study = mixed.study
    means = {int(number): sum(values) / len(values) for number, values in study["confirmations"].items()}
    assert 0 in means and all(len(values) == 2 for values in study["confirmations"].values())
    assert means[study["winner"]] == max(means.values())
    assert "Confirmed 2 times: trial" in mixed.out
    trial = study["trials"][study["winner"]]
    assert all(value != trial["epochs"][-1]["auroc"] for value in study["confirmations"][str(study["winner"])])
    if study["winner"]:
        gain = study["test"]["difference"]["auroc"]
        assert gain["num_seeds"] == [2, 2]
        assert gain["interval"][0] <= gain["value"] <= gain["interval"][1]
        assert "than the guide's defaults over 2 seeds" in mixed.out or "not distinguishable from" in mixed.out


def test_predict_in_a_fresh_process_gives_the_decisions_of_the_test(mixed) -> None:
    study, folder = mixed.study, mixed.folder / "results" / "s"
    splits = json.loads((folder / "splits.json").read_text())
    images = [sample["images"][0] for sample in splits["test"]]
    command = [sys.executable, "-m", "train_fn.predict", "--adapter", str(folder / "best_adapter"), "--no-generate"]
    found = subprocess.run([*command, *images], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines, stored = [json.loads(line) for line in found.stdout.splitlines()], study["predictions"]["winner"]
    assert [line["answer"] for line in lines] == [study["candidates"][index] for index in stored["decided"]]
    assert np.allclose([[*line["probabilities"].values()] for line in lines], stored["probabilities"], atol=2e-6)
    assert splits["decide"] == study["settings"]["study"]["decide"] == "macro_f1"
    assert [entry["coverage"] for entry in study["coverage"]] == [0.8, 0.9, 0.95]
    assert all(0 <= entry["covered"]["value"] <= 1 for entry in study["coverage"])


def test_baselines_are_scored_and_shown(mixed) -> None:
    scores = mixed.study["test"]
    assert {"untuned base", "majority answer", "linear probe", "winner minus probe"} <= scores.keys()
    assert scores["majority answer"]["auroc"]["value"] == 0.5
    assert 0 <= scores["linear probe"]["auroc"]["value"] <= 1
    (run,) = [run for run in mixed.runs() if "mlflow.parentRunId" not in run.data.tags]
    assert run.data.metrics["test_linear probe_auroc"] == pytest.approx(scores["linear probe"]["auroc"]["value"])
    assert "Beside baselines" in mixed.out and "linear probe" in mixed.out
    page = (mixed.folder / "results" / "s" / "report.html").read_text()
    assert page.count('<td class="text">linear probe</td>') == 1  # in the first table


def test_the_same_name_again_is_refused(mixed) -> None:
    again = finish(start(mixed.folder, *SMALL), mixed.folder)
    assert again.code == 2 and "--name" in again.err and "Traceback" not in again.err


def test_a_study_on_a_terminal(mixed: Finished) -> None:
    print(mixed.out)
    during, _, after = mixed.out.rpartition("Study s: ")  # the summary's title
    assert "starting 1 lane: loading the base · 0 of 8 done, 0 running" in during
    assert re.search(r"trial [0-7] +epoch 1/1 +step [1-3]/3 +loss \d\.\d{3} +\S+", during)
    assert re.search(r"best auroc \d\.\d{3} \(trial [0-7]\) · [1-7] of 8 done, 1 running · about \d+ s left", during)
    assert re.search(r"\[1/8\] trial 0 complete, +auroc 0\.\d{3}, +\d+\.\d s \(learning_rate 0\.001\)", during)
    assert re.search(r"\[6/8\] trial 5 failed: .*nowhere", during)
    # Every line is the study's own: the time first, or the footer's.
    own = r"\[ *\d+\.\d s\] |trial \d|starting 1 lane|best |\d of 8 done"
    search, _, _ = during.partition("Confirming trials")
    lines = [line for line in re.split(r"[\r\n]+", search) if line.strip()]
    assert not [line for line in lines if not re.match(own, line)]
    raw = mixed.raw
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l") and "done," not in after
    (logs,) = re.findall(r"Starting the lanes \(logs in (\S+)\)", during)
    assert " ray.tune" in Path(logs, "driver.log").read_text()  # Tune's traceback of the trial that failed


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


def test_a_study_whose_space_fails_ends_with_its_winner(uneven: Finished) -> None:
    assert uneven.code == 3 and "must return settings, but raised SystemExit" in uneven.out, uneven.err
    assert "Traceback" not in uneven.out + uneven.err
    assert [trial["state"] for trial in uneven.study["trials"]] == ["COMPLETE", "COMPLETE", "STOPPED", "STOPPED"]
    assert (uneven.folder / "results" / "s" / "best_adapter").is_dir()


def test_a_trial_stopped_early_is_nowhere_called_complete(uneven) -> None:
    trials = uneven.study["trials"]
    stopped = [trial["number"] for trial in trials if trial["state"] == "STOPPED"]
    assert stopped == [2, 3] and trials[0]["state"] == trials[1]["state"] == "COMPLETE"
    assert uneven.study["winner"] == 1
    storage = f"sqlite:///{uneven.folder / 'results' / 's' / 'optuna.db'}"
    for trial in optuna.load_study(study_name="s", storage=storage).trials[:4]:  # the space has failed at the fifth
        epochs, rungs = ([r["loss"] for r in its] for its in (
            trials[trial.number]["epochs"], [rung["metrics"] for rung in trials[trial.number]["rungs"]]))  # fmt: skip
        assert trial.state == (TrialState.PRUNED if trial.number in stopped else TrialState.COMPLETE)
        assert (len(rungs), len(epochs)) == ((1, 0) if trial.number in stopped else (2, 2))
        if trial.number in stopped:
            assert trial.intermediate_values == {500: pytest.approx(rungs[0])}
            assert trial.value == pytest.approx(rungs[0])
            assert trials[trial.number]["notes"][-1] == "worse than the best third after 0.5 epochs"
            continue
        counted = [rungs[0], epochs[0], min(epochs[0], rungs[1]), min(epochs)]  # after 0.5, 1, 1.5 and 2 epochs
        assert trial.intermediate_values == {500 * n: pytest.approx(loss) for n, loss in enumerate(counted, 1)}
        assert trial.value == pytest.approx(epochs[trials[trial.number]["best_epoch"] - 1])
        assert trial.value == pytest.approx(min(epochs))
    runs = {int(run.data.tags["trial"]): run for run in uneven.runs() if "trial" in run.data.tags}
    assert [runs[number].data.metrics["epoch"] for number in range(4)] == [2, 2, 0.5, 0.5]
    assert runs[3].data.metrics["loss"] == trials[3]["rungs"][0]["metrics"]["loss"]
    states = {int(run.data.tags["trial"]): run.info.status for run in uneven.runs() if "trial" in run.data.tags}
    assert states == {n: "KILLED" if n in stopped else "FINISHED" for n in range(4)}
    assert "stopped" in uneven.out
    assert not (uneven.folder / "results" / "s" / "trials" / "0003" / "final_model").exists()


def test_another_seed_of_a_point_is_named_as_one_everywhere(uneven: Finished) -> None:
    """The third and the fourth trial have the settings of the first."""
    trials = uneven.study["trials"]
    assert [trial["repeats"] for trial in trials] == [None, None, 0, 0]
    assert [trial["settings"]["seed"] for trial in trials] == [0, 0, 1001, 2002]
    first = [trial["rungs"][0]["metrics"] for trial in trials]  # the third and the fourth are stopped at it
    assert len({metrics["loss"] for metrics in first}) == 4
    assert "; trial 0 with seed 1001" in uneven.out
    study = uneven.folder / "results" / "s"
    events = [json.loads(line) for line in (study / "journal.jsonl").read_text().splitlines()]
    started = {event["number"]: event.get("repeats") for event in events if event["event"] == "started"}
    assert started == {0: None, 1: None, 2: 0, 3: 0}
    assert (study / "report.html").read_text().count('<span class="tag">repeats 0</span>') == 2
    runs = {int(run.data.tags["trial"]): run.data for run in uneven.runs() if "trial" in run.data.tags}
    assert {n: run.tags.get("repeats") for n, run in runs.items()} == {0: None, 1: None, 2: "0", 3: "0"}
    assert [runs[n].params.get("seed") for n in range(4)] == [None, None, "1001", "2002"]


@pytest.mark.campaign
def test_a_base_that_cannot_be_loaded_is_refused_or_ends_the_study_once(tmp_path) -> None:
    model = shutil.copytree(ROOT / "train_fn" / "nano" / "checkpoint", tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    options = ("--trials", "2", "--lanes", "1", "--model", str(model), *SMALL)
    refused = finish(start(tmp_path, *options), tmp_path)
    assert refused.code == 2 and "model.safetensors" in refused.err, refused.out + refused.err
    (model / "model.safetensors").write_bytes(weights)
    process = start(tmp_path, *options)
    wait_for(process, "Starting the lanes")
    (model / "model.safetensors").write_bytes(weights[:-4])
    finished = finish(process, tmp_path)
    # The driver itself has seen it just before the lanes, or a worker as it began.
    assert finished.code in (2, 3) and "model" in finished.out + finished.err, finished.out + finished.err
    said = finished.err if finished.code == 2 else finished.out
    assert "must stay as the study was begun with" in said and "complete" not in finished.out


def test_a_model_that_transformers_does_not_know(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    (tmp_path / "model.safetensors").touch()
    finished = finish(start(tmp_path, "--model", str(tmp_path), *SMALL), tmp_path)
    assert finished.code == 2 and "unheard_of" in finished.err and "llava" in finished.err


# Loaded by Python at the start of every worker: a trial of rank 4 runs out of memory on all ranks, one of rank 8 on the
# second alone, as long as a micro-batch may have more than 4,096 tokens.
ALLOCATOR_ERROR = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "train_fn.trial.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def patched(module):
            execute(module)
            step = module.train_step
            def train_step(engine, *others):
                import torch
                rank, _ = module.world()
                trained = engine.module
                if trained.execution.tokens > 4096 and (trained.model.peft_config["default"].r == 4 or rank == 1):
                    raise torch.OutOfMemoryError("simulated: CUDA out of memory")
                return step(engine, *others)
            module.train_step = train_step
        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory) -> Finished:
    """Three trials of two workers each: two run out of memory and complete, the third has no module to train."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "patch").mkdir()
    (folder / "patch" / "sitecustomize.py").write_text(ALLOCATOR_ERROR)
    (folder / "space.py").write_text(
        'GUIDE = {}\ndef space(trial):\n    where = {"lora_target_modules": ["nowhere"]} if trial.number == 2 else {}\n'
        '    return {"lora_r": [8, 4, 2][trial.number % 3], "lora_alpha": 8} | where\n'
    )
    options = ["--trials", "3", "--workers-per-trial", "2", "--space", "space.py", "--report-to", "tensorboard", *SMALL]
    finished = finish(start(folder, *options, PYTHONPATH=str(folder / "patch")), folder)
    assert finished.code == 0, finished.out + finished.err
    return finished


@pytest.mark.campaign
def test_out_of_memory_on_all_ranks_and_on_one(two_workers) -> None:
    for trial in two_workers.study["trials"][:2]:
        assert trial["state"] == "COMPLETE"
        assert trial["notes"] == ["out of memory: micro-batch 8,192 -> 4,096 tokens, same global batch"]
        assert (trial["applied"]["execution"]["tokens"], trial["applied"]["global_batch_size"]) == (4096, 16)
    assert "micro-batch 8,192 -> 4,096 tokens" in two_workers.out
    plan = json.loads((two_workers.folder / "results" / "s" / "plan.json").read_text())
    assert plan["free_gib"]["cpu"] > 0


@pytest.mark.campaign
def test_two_workers_and_a_trial_that_fails_on_both(two_workers) -> None:
    assert two_workers.study["trials"][2]["state"] == "FAILED" and "1 failed" in two_workers.out
    assert "nowhere" in two_workers.study["trials"][2]["error"] and two_workers.study["winner"] in (0, 1)


@pytest.mark.campaign
@pytest.mark.skipif(not os.environ.get("HULUMED_FIXTURES"), reason="no HULUMED_FIXTURES")
def test_a_qlora_study_on_a_hulumed_checkpoint(tmp_path) -> None:
    model = f"{os.environ['HULUMED_FIXTURES']}/checkpoint"
    (tmp_path / "space.py").write_text(
        "from search_spaces.qlora import GUIDE, space as qlora\n"
        "def space(trial):\n"
        "    return qlora(trial) | {'train_vision': ['none', 'lora'][trial.number % 2]}\n"
    )
    options = ["--trials", "2", "--model", model, "--use-qlora", "--space", "space.py", "--max-image-tokens", "64"]
    options += ["--report-to", "tensorboard", *SMALL]
    finished = finish(start(tmp_path, *options), tmp_path)
    assert finished.code == 0, finished.out + finished.err
    trials = finished.study["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 2
    assert trials[0]["settings"]["lora_r"] == 64 and trials[0]["base_gib"] > 0
    config = json.loads((Path(finished.study["adapter"]) / "adapter_config.json").read_text())
    trained = trials[finished.study["winner"]]["applied"]["train_projector"]
    assert config["modules_to_save"] == (["mm_projector"] if trained else None)

    # The second trial of the lane has trained the vision tower, too.
    assert [trial["applied"]["train_vision"] for trial in trials] == ["none", "lora"]
    study = tmp_path / "results" / "s"
    adapter = study / "trials" / "0001" / "final_model"
    names = load_file(adapter / "adapter_model.safetensors").keys()
    prefix = "base_model.model.model.vision_encoder.encoder.layers."
    layers = {name.removeprefix(prefix).rpartition(".lora_")[0] for name in names if name.startswith(prefix)}
    assert len(layers) == trials[1]["applied"]["adapted_parts"]["vision_tower"] > 0
    assert not any("vision" in name for name in load_file(study / "trials/0000/final_model/adapter_model.safetensors"))
    base = load_base(ModelSettings(model=model, use_qlora=True, max_image_tokens=64), torch.device("cpu"))
    predicted = score_adapter(base, load_splits(study / "splits.json"), "validation", 16, adapter)
    assert predicted["losses"].mean() == pytest.approx(trials[1]["epochs"][-1]["loss"], abs=1e-4)
