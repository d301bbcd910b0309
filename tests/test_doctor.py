"""The doctor: its findings about nodes, the memory that it estimates against the real model, and real runs."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from studies import SMALL, finish, start

from train_fn.model.base import base_gib
from train_fn.model.batches import answer_losses, collate
from train_fn.model.memory import GIB
from train_fn.nano import CHECKPOINT
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.lora import adapted
from train_fn.trial.memory import Sizes, measure, memory_needed
from tune.config.cli import parse
from tune.doctor.examine import examine
from tune.doctor.findings import Need, check_nodes
from tune.doctor.nodes import node_facts, parse_gpus
from tune.lanes.layout import Layout

A10G = {"name": "NVIDIA A10G", "free_gib": 22.0, "driver": "570.1", "bf16": True}
GOOD = {
    "versions": {"version_torch": "2.13.0", "version_ray": "2.60.0"},
    "model": {"config.json": 10, "config": "abc"},
    "num_images": 3,
    "missing": [],
    "storage": "",
    "free_gib": 100.0,
    "session": "/tmp/ray",
    "session_full": 0.5,
    "skew_s": 0.0,
    "ram_gib": 16.0,
    "gpus": [],
    "cuda": None,
    "compiler": "cc",
    "token": True,
    "resources": {"CPU": 4.0},
}
CPU, GPU = Layout(4, 1, False, 1), Layout(1, 1, True, 0)
ON_GPU = {"gpus": [A10G], "cuda": "12.8", "resources": {"CPU": 4.0, "GPU": 1.0}}


def checked(changes: dict, need: Need) -> dict[str, tuple[str, str]]:
    """Status and fix by check, of a node that differs from the driver by `changes`. A second node has no faults."""
    findings = check_nodes({"driver": GOOD, "good": GOOD, "other": GOOD | changes}, need)
    assert all(finding.status == "ok" or finding.where == "other" for finding in findings)
    return {finding.check: (finding.status, finding.fix) for finding in findings if finding.where == "other"}


@pytest.mark.parametrize(
    ("changes", "check", "status", "word"),
    [
        ({"versions": GOOD["versions"] | {"version_ray": "2.59.0"}}, "versions", "FAIL", "pip install"),
        ({"model": {}}, "model", "FAIL", "same path"),
        ({"model": GOOD["model"] | {"config": "def"}}, "model", "FAIL", "same files"),
        ({"missing": ["/data/b.png"]}, "images", "FAIL", "/data/b.png"),
        ({"storage": "cannot be written: Read-only file system"}, "storage", "FAIL", "Read-only"),
        ({"free_gib": 1.0}, "disk of results", "FAIL", "--trials"),
        ({"session_full": 0.97}, "disk of Ray", "FAIL", "RAY_TMPDIR"),
        ({"skew_s": 60.0}, "clock", "warning", "time synchronisation"),
        ({"ram_gib": 3.0}, "memory", "FAIL", "--use-qlora"),
        ({"ram_gib": 6.0}, "memory", "warning", "halve"),
        ({"error": "ModuleNotFoundError: No module named 'peft'"}, "node", "FAIL", "peft"),
    ],
)
def test_each_fault_of_a_node_is_found_and_nothing_else(changes, check, status, word) -> None:
    need = Need(layout=CPU, memory={"base": 1.0, "activations": 1.0}, least=1.0, disk=5.0)
    found = checked(changes, need)
    assert found[check][0] == status and word in found[check][1] and "other" in found[check][1]
    assert [name for name, (status, _) in found.items() if status != "ok"] == [check]
    assert len(found) == {"node": 1, "storage": 7}.get(check, 8)  # a storage that cannot be used has no disk


@pytest.mark.parametrize(
    ("changes", "need", "wrong"),
    [
        ({}, {"least": 8.0}, {}),
        ({"cuda": None}, {}, {"GPU": "FAIL"}),
        ({"gpus": []}, {}, {"GPU": "FAIL", "memory": "FAIL"}),
        ({"gpus": [A10G, A10G | {"free_gib": 9.0}]}, {"least": 8.0}, {"memory": "warning"}),
        ({}, {"least": 23.0}, {"memory": "FAIL"}),
    ],
)
def test_faults_of_gpus_and_their_memory_are_found(changes, need, wrong) -> None:
    found = checked(
        ON_GPU | changes, Need(layout=GPU, memory={"base": 8.0, "activations": 2.0}, **{"least": 1.0} | need)
    )
    assert {check: status for check, (status, _) in found.items() if status != "ok"} == wrong


def test_torch_compile_needs_a_compiler_on_nodes_with_workers() -> None:
    need = Need(layout=CPU, memory={"base": 1.0}, compiler=True)
    assert checked({"compiler": ""}, need)["compiler"][0] == "FAIL" and checked({}, need)["compiler"][0] == "ok"
    assert "compiler" not in checked({"compiler": ""}, Need(layout=CPU))
    assert "compiler" not in checked({"compiler": "", "resources": {"CPU": 0.0}}, need)


def test_the_doctor_names_the_largest_micro_batch_that_fits_a_gpu() -> None:
    def memory(**larger: float) -> str:
        need = Need(layout=GPU, memory={"base": 8.0}, larger={int(name[1:]): gib for name, gib in larger.items()})
        findings = check_nodes({"driver": GOOD, "node": GOOD | ON_GPU}, need)
        return next(finding.found for finding in findings if finding.check == "memory")

    fitting = "--per-device-train-batch-size 8 --gradient-accumulation-steps 2"
    assert fitting in memory(m4=12.0, m8=18.0, m16=30.0)
    assert "--per-device" not in memory(m4=22.0, m8=30.0, m16=50.0)


def test_a_node_without_workers_needs_no_memory() -> None:
    found = checked({"resources": {"CPU": 0.0}, "ram_gib": 0.1}, Need(layout=CPU, memory={"base": 4.0}, least=4.0))
    assert "memory" not in found and all(status == "ok" for status, _ in found.values())


def test_gpus_are_read_from_nvidia_smi() -> None:
    table = "NVIDIA A10G, 22503, 570.133.20, 8.6\nTesla T4, 15095, 570.133.20, 7.5\n"
    assert parse_gpus(table) == [
        {"name": "NVIDIA A10G", "free_gib": 22503 / 1024, "driver": "570.133.20", "bf16": True},
        {"name": "Tesla T4", "free_gib": 15095 / 1024, "driver": "570.133.20", "bf16": False},
    ]


@pytest.mark.parametrize(
    ("options", "workers", "trained", "gradients", "moments"),
    [
        ({}, 1, 8, 4 + 4, 8),
        ({}, 4, 5, 1 + 8, 2),
        ({"zero_stage": 1}, 4, 5, 4 + 8, 2),
        ({"zero_stage": 0}, 4, 4, 4, 8),
        ({"optim": "adamw_8bit"}, 1, 8, 4 + 4, 2),
        ({"offload_optimizer": True}, 1, 8, 4 + 4, 0),
    ],
)
def test_bytes_of_a_trained_weight(options, workers, trained, gradients, moments) -> None:
    million = Sizes(base=0, trained=10**6, activations=5.0 * GIB, evaluation=1.0 * GIB)
    found = memory_needed(million, TrialSettings(**options), workers, True, eval_batch_size=4)
    per_weight = {part: found[part] * GIB / 10**6 for part in ("trained", "gradients", "AdamW")}
    assert per_weight == pytest.approx({"trained": trained, "gradients": gradients, "AdamW": moments})
    assert found["activations"] == 10.0  # the micro-batch of two: more than four images in evaluation


def test_estimated_sizes_are_those_of_the_real_model(base, splits) -> None:
    trial = TrialSettings(lora_r=16, train_projector=True)
    found = measure(ModelSettings(), trial, False, splits.train, splits.candidates)
    assert found.base / GIB == pytest.approx(base_gib(base.model)[0], rel=1e-6)
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with adapted(base, trial) as model:
        model.train()
        assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        batch = collate(base, splits.train[:1], with_answers=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            answer_losses(base, batch)
    real = sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
    print(f"activations of an image: {found.activations / 2**20:.2f} MiB from shapes, {real / 2**20:.2f} MiB really")
    assert found.activations == pytest.approx(real, rel=0.1)
    checkpointed = measure(
        ModelSettings(), TrialSettings(lora_r=16, gradient_checkpointing=True), False, splits.train, splits.candidates
    )
    assert checkpointed.activations < 0.6 * found.activations


def test_measuring_a_model_of_gigabytes_takes_no_memory(splits, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 12}
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = measure(ModelSettings(model=str(folder)), TrialSettings(), True, splits.train, splits.candidates)
    small = measure(
        ModelSettings(model=str(folder), use_qlora=True), TrialSettings(), True, splits.train, splits.candidates
    )
    grown_gib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert whole.base > 1.5 * GIB and grown_gib < 0.3
    assert small.base < 0.4 * whole.base and small.trained == whole.trained


@pytest.mark.ray
def test_the_doctor_passes_a_sound_machine(tmp_path: Path) -> None:
    done = finish(start(tmp_path, "--doctor", "--workers-per-trial", "2", *SMALL, name=""), tmp_path)
    print(done.out)
    assert done.code == 0, done.out + done.err
    for check in (
        "data",
        "lanes",
        "versions",
        "model",
        "images",
        "storage",
        "memory",
        "collectives",
        "ZeRO-2",
        "MLflow",
    ):
        assert any(line.strip("│ ").startswith(check) for line in done.out.splitlines()), check
    assert "60 of 60 readable" in done.out and "2 workers, gloo: all-reduce" in done.out
    assert "A study can run." in done.out
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("bin", "compiled")] == ["results"]
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["phantoms-60-0"]


def test_the_doctor_reports_unwritable_results_and_too_many_workers(tmp_path, phantoms, monkeypatch, capsys) -> None:
    """Without Ray: one node, which answers from this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tune.doctor.examine.start_ray", lambda settings: {"CPU": 2.0})

    def asked(settings, study, storage) -> dict:
        samples = [*study.splits.train, *study.splits.validation, *study.splits.test]
        images = {sample.image: Path(sample.image).stat().st_size for sample in samples}
        facts = node_facts(CHECKPOINT, images, storage)
        return {"driver": facts, "node": facts | {"skew_s": 0.0, "resources": {"CPU": 2.0}}}

    monkeypatch.setattr("tune.doctor.examine.ask_nodes", asked)
    (tmp_path / "file").touch()
    argv = ["--doctor", "--data", str(phantoms), "--results", "file/results", "--workers-per-trial", "4096"]
    code = examine(parse([*argv, "--gradient-accumulation-steps", "4096"]), lambda text: None)
    out = capsys.readouterr().out
    assert code == 1, out
    assert "FAIL: `--results`" in out and "file/results" in out
    assert "FAIL: `--lanes` x `--workers-per-trial`" in out
    assert "60 of 60 readable" in out and "A study cannot run: 3 check(s) fail." in out
