"""The doctor: its findings about nodes, the memory that it estimates against the real model, and real runs."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from studies import SMALL, finish, start
from test_hulumed import PUBLISHED_4B

from train_fn.execution import Execution
from train_fn.model import hulumed
from train_fn.model.base import base_gib
from train_fn.model.batches import answer_losses, collate
from train_fn.model.memory import GIB
from train_fn.nano import CHECKPOINT
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.lora import adapted
from train_fn.trial.memory import Sizes, measure, memory_needed, skeleton
from tune.config.cli import parse
from tune.doctor import duration
from tune.doctor.duration import Speed, Times, Work, evaluation_s, step_s, times, train_flops, work_of
from tune.doctor.examine import examine
from tune.doctor.findings import Need, check_nodes, check_times
from tune.doctor.fit import Worker, fit
from tune.doctor.nodes import node_facts, parse_gpus
from tune.doctor.probe import probe
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
# A base of 1 GiB whose samples of 100 tokens keep 1 GiB each, or 0.12 with gradient checkpointing.
SIZES = Sizes(base=GIB, trained=0, activations=0.01 * GIB, checkpointed=0.001 * GIB, layer=0.0002 * GIB, evaluation=0)


def worker(on_gpu: bool, **options) -> Worker:
    trial = TrialSettings(**options)
    return Worker(sizes=SIZES, trial=trial, workers=1, on_gpu=on_gpu, longest=100, candidates=3)


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
        ({"ram_gib": 8.4}, "memory", "FAIL", "--use-qlora"),
        ({"error": "ModuleNotFoundError: No module named 'peft'"}, "node", "FAIL", "peft"),
    ],
)
def test_each_fault_of_a_node_is_found_and_nothing_else(changes, check, status, word) -> None:
    need = Need(layout=CPU, worker=worker(False), disk=5.0)
    found = checked(changes, need)
    assert found[check][0] == status and word in found[check][1] and "other" in found[check][1]
    assert [name for name, (status, _) in found.items() if status != "ok"] == [check]
    assert len(found) == {"node": 1, "storage": 7}.get(check, 8)  # a storage that cannot be used has no disk


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, {}),
        ({"cuda": None}, {"GPU": "FAIL"}),
        ({"gpus": []}, {"GPU": "FAIL"}),
        ({"gpus": [A10G, A10G | {"free_gib": 2.1}]}, {"memory": "FAIL"}),
        ({"compiler": ""}, {"compiler": "warning"}),
    ],
)
def test_faults_of_gpus_and_their_memory_are_found(changes, wrong) -> None:
    found = checked(ON_GPU | changes, Need(layout=GPU, worker=worker(True)))
    assert {check: status for check, (status, _) in found.items() if status != "ok"} == wrong


def test_torch_compile_needs_a_compiler_on_nodes_with_workers() -> None:
    need = Need(layout=CPU, torch_compile=True)
    assert checked({"compiler": ""}, need)["compiler"][0] == "FAIL" and checked({}, need)["compiler"][0] == "ok"
    assert "compiler" not in checked({"compiler": ""}, Need(layout=CPU))
    assert "compiler" not in checked({"compiler": ""} | ON_GPU, Need(layout=GPU, torch_compile=False))
    assert "compiler" not in checked({"compiler": "", "resources": {"CPU": 0.0}}, need)


def memory_on(free_gib: float, on_gpu: bool = True, **options) -> tuple[str, str]:
    """What is found, and the fix, for the memory of a node."""
    node = GOOD | (ON_GPU | {"gpus": [A10G | {"free_gib": free_gib}]} if on_gpu else {"ram_gib": 4 * free_gib})
    need = Need(layout=GPU if on_gpu else CPU, worker=worker(on_gpu, **options))
    (found,) = [f for f in check_nodes({"driver": GOOD, "node": node}, need) if f.check == "memory"]
    return found.found, found.status + found.fix


@pytest.mark.parametrize(
    ("free_gib", "way"),
    [
        # Beside the base's and the worker's own 2 GiB, 0.9 of which is filled. Compiled, 100 tokens keep 0.81 GiB.
        # What keeps less takes more samples at once again.
        (2 + 83 / 0.9, "10,240 tokens, compiled:"),
        (2 + 82 / 0.9, "5,120 tokens, compiled:"),
        (2 + 0.82 / 0.9, "100 tokens, compiled:"),
        (2 + 0.80 / 0.9, "200 tokens, compiled, 60% of activations kept:"),
        (2 + 0.31 / 0.9, "200 tokens, compiled, gradient checkpointing:"),
    ],
)
def test_by_default_the_doctor_says_how_a_trial_would_run(free_gib, way) -> None:
    found, fix = memory_on(free_gib)
    assert found.startswith(f"forward passes of {way} worker 1.00 + base 1.00") and fix == "ok"
    assert "--per-device" not in found


def test_what_fits_nowhere_gets_the_advice_of_a_trial_that_ran_out_of_memory() -> None:
    for on_gpu in (True, False):
        _, fix = memory_on(2 + 0.11 / 0.9, on_gpu)
        assert fix.startswith("FAIL") and "--use-qlora; --lora-r 32" in fix and ("--lanes" in fix) is not on_gpu
    assert memory_on(2 + 0.13 / 0.9, on_gpu=False)[0].startswith("forward passes of 100 tokens, not compiled, gradient")


def test_a_given_micro_batch_is_compared_with_smaller_and_larger_ones() -> None:
    options = {"torch_compile": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    found, fix = memory_on(2 + 9 / 0.9, **options)
    assert "--per-device-train-batch-size 8 --gradient-accumulation-steps 2" in found and fix == "ok"
    found, fix = memory_on(2 + 3 / 0.9, **options)
    assert "--per-device" not in found and fix == "ok"
    assert "warning" in memory_on(2 + 1.5 / 0.9, **options)[1] and "halve" in memory_on(2 + 1.5 / 0.9, **options)[1]
    assert "gradient checkpointing" in memory_on(2 + 0.2 / 0.9, **options | {"per_device_train_batch_size": 1})[1]
    assert "FAIL" in memory_on(2.1, **options)[1]


def test_each_kind_of_gpu_of_a_node_has_its_line() -> None:
    node = GOOD | ON_GPU | {"gpus": [A10G, A10G | {"name": "NVIDIA H100", "free_gib": 100.0}, A10G]}
    found = check_nodes({"driver": GOOD, "node": node}, Need(layout=GPU, worker=worker(True)))
    lines = [f.found for f in found if f.check == "memory"]
    assert [line.rsplit(" of ", 1)[1] for line in lines] == ["NVIDIA A10G", "NVIDIA H100"]


def test_a_node_without_workers_needs_no_memory_and_the_next_one_is_described() -> None:
    need = Need(layout=GPU, worker=worker(True))
    findings = check_nodes({"driver": GOOD, "head": GOOD | {"resources": {"CPU": 0.0}}}, need)
    assert all(found.status == "ok" for found in findings)
    (found,) = [found for found in findings if found.check == "memory"]
    # 100 tokens with gradient checkpointing, and 10,240 compiled ones, beside 2 GiB.
    assert found.where == "cluster" and "2.1 GiB at least and 84.9 GiB" in found.found


def test_the_probe_measures_this_machine(monkeypatch) -> None:
    monkeypatch.setattr("tune.doctor.probe.TIMED_S", 0.05)
    threads = torch.get_num_threads()
    try:
        speed = probe(1)
    finally:
        torch.set_num_threads(threads)
    assert 1e9 < speed.matmul < 1e13 and 1e9 < speed.copy < 1e12 and 1e-7 < speed.launch < 1e-3


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
    million = Sizes(base=0, trained=10**6, activations=0.01 * GIB, checkpointed=0, layer=0, evaluation=0.001 * GIB)
    found = memory_needed(million, TrialSettings(**options), Execution(images=2), workers, True, 500, candidates=3)
    per_weight = {part: found[part] * GIB / 10**6 for part in ("trained", "gradients", "AdamW")}
    assert per_weight == pytest.approx({"trained": trained, "gradients": gradients, "AdamW": moments})
    assert found["activations"] == pytest.approx(10.0)  # two samples: more than the candidates' keys and values


def test_estimated_sizes_are_those_of_the_real_model(base, splits) -> None:
    trial = TrialSettings(lora_r=16, train_projector=True)
    found = measure(ModelSettings(), trial, torch.float32)
    assert found.base / GIB == pytest.approx(base_gib(base.model)[0], rel=1e-6)
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with adapted(base, trial) as model:
        model.train()
        assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        batch = collate(base, splits.train[:4], with_answers=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            answer_losses(base, batch)
    real = sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
    tokens = batch["input_ids"].numel()
    print(f"activations of a token: {found.activations:.0f} bytes from shapes, {real / tokens:.0f} really")
    assert found.activations == pytest.approx(real / tokens, rel=0.1)
    assert found.checkpointed + found.layer < 0.6 * found.activations


def test_measuring_a_model_of_gigabytes_takes_no_memory(tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 12}
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = measure(ModelSettings(model=str(folder)), TrialSettings(), torch.bfloat16)
    small = measure(ModelSettings(model=str(folder), use_qlora=True), TrialSettings(), torch.bfloat16)
    grown_gib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert whole.base > 1.5 * GIB and grown_gib < 0.3
    assert small.base < 0.4 * whole.base and small.trained == whole.trained


# ------------------------------------------------------------------------------------------------ time

# The probe of the H200 of benchmarks/README.md. Its latency is derived from the step at micro-batch 2.
H200 = Speed(matmul=790e12, copy=4.0e12, launch=32e-6 / duration.LAUNCH_OVERHEAD)


@pytest.fixture(scope="module")
def hulumed_4b(tmp_path_factory) -> tuple[Sizes, Work]:
    """Of the published shape, with 378 images of 1,225 tokens and 40 tokens of text; the nano base's processor."""
    config = hulumed.native_config(PUBLISHED_4B)
    folder = tmp_path_factory.mktemp("hulumed") / "model"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config.save_pretrained(folder)
    settings = ModelSettings(model=str(folder))
    sizes = measure(settings, TrialSettings(), torch.bfloat16)
    lengths = ([1265] * 378, [1265] * 126, [1265] * 126)
    return sizes, work_of(skeleton(settings, torch.bfloat16), sizes, *lengths)


def test_flops_of_a_step_of_hulu_med_4b_are_those_that_were_counted(hulumed_4b) -> None:
    _, work = hulumed_4b
    assert train_flops(work, [1265] * 16) == pytest.approx(362e12, rel=0.02)


@pytest.mark.parametrize(
    ("execution", "measured_s"),
    [
        (Execution(images=2), 3.20),
        (Execution(images=8), 1.294),
        (Execution(images=4, compiled=True), 0.899),
        (Execution(images=8, compiled=True), 0.848),
        (Execution(images=16, compiled=True), 0.848),
        (Execution(images=8, compiled=True, activation_budget=0.6), 0.898),
    ],
)
def test_estimated_steps_are_near_those_measured_on_an_h200(hulumed_4b, execution, measured_s) -> None:
    estimated = step_s(hulumed_4b[1], H200, execution, TrialSettings(), 1)
    print(f"{execution}: {estimated:.3f} s estimated, {measured_s} measured")
    assert measured_s / 1.5 < estimated < 1.5 * measured_s


def test_an_evaluated_image_takes_about_as_long_as_measured_on_an_h200(hulumed_4b) -> None:
    per_image = evaluation_s(hulumed_4b[1], H200, [1265] * 126, 16) / 126
    assert 0.04 / 1.5 < per_image < 0.05  # measured: 0.04 of equal lengths, 0.05 of unequal ones


def test_a_study_takes_as_long_as_its_epochs(hulumed_4b) -> None:
    _, work = hulumed_4b
    way = Execution(tokens=10_240, compiled=True)
    options = {"workers": 1, "trials": 20, "eval_batch_size": 16}

    def study(**changes) -> Times:
        return times(work, H200, way, TrialSettings(), **options | {"lanes": 1, "to_end": 1, "first_stop": 1} | changes)

    one = study()
    assert one.trial == pytest.approx(3 * one.epoch) and one.epoch > 24 * one.step
    assert one.study[1] - one.study[0] == pytest.approx((60 - (3 + 19)) * one.epoch)
    assert study(first_stop=0).study == (one.study[1], one.study[1])
    four = study(lanes=4).study
    assert one.study[1] / 4 < four[1] < one.study[1] / 3 and four[0] > 3 * one.epoch
    # One H100 takes 17 min by the arithmetic of benchmarks/README.md.
    assert one.study[0] < 17 * 60 < one.study[1] * 1.5


def test_hulu_med_4b_with_busi_as_downloaded_fits_the_nodes_of_cluster_yaml(hulumed_4b) -> None:
    """A large trial: rank 128 and the projector, with images of 2,650 tokens."""
    yaml = pytest.importorskip("yaml")
    nodes = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())["available_node_types"]
    free_gib = {"g5": 21.9, "g6e": 43.5}[nodes["worker"]["node_config"]["InstanceType"].split(".")[0]]
    sizes, _ = hulumed_4b
    trained = 2 * sizes.trained + 10**7
    largest = Worker(
        sizes=replace(sizes, trained=trained),
        trial=TrialSettings(lora_r=128, train_projector=True),
        workers=1,
        on_gpu=True,
        longest=2650,
        candidates=3,
    )
    found = fit(largest, free_gib, compiles=True)
    assert found.fits and not found.execution.gradient_checkpointing and sum(found.parts.values()) < 0.9 * free_gib
    assert fit(largest, 21.9, compiles=True).execution.gradient_checkpointing  # an A10G
    assert not fit(largest, 14.0, compiles=True).fits  # a T4


def test_the_estimate_of_time_has_its_line() -> None:
    need = Need(layout=CPU, times=lambda speed, gib, compiles: Times(0.5, 12.0, 36.0, (100.0, 7500.0 * speed.launch)))
    facts = {"driver": GOOD, "node": GOOD}
    (found,) = check_times(facts, {"node": Speed(1e11, 2e10, 1.0)}, need)
    assert "0.50 s a step, 36 s the guide's trial, 100 s to 2.1 h the study on 4 such lane(s)" in found.found
    assert "matmul 0.1 TFLOP/s, copy 20 GB/s" in found.found and found.status == "ok"
    (found,) = check_times(facts, {}, need)
    assert found.found.startswith("not estimated")


@pytest.mark.campaign
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
        "time",
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
    argv = ["--doctor", "--data", str(phantoms), "--results", "file/results", "--workers-per-trial", "18"]
    code = examine(parse([*argv, "--gradient-accumulation-steps", "9"]), lambda text: None)
    out = capsys.readouterr().out
    assert code == 1, out
    assert "FAIL: `--results`" in out and "file/results" in out
    assert "FAIL: `--lanes` x `--workers-per-trial`" in out
    assert "60 of 60 readable" in out and "A study cannot run: 3 check(s) fail." in out
