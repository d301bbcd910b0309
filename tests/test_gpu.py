"""What only a GPU can show: `pytest -m gpu`. The tests of several GPUs skip themselves on one."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train_fn.data.splits_file import save_splits
from train_fn.jobs import EpochReport
from train_fn.settings import ModelSettings, TrialSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
ROOT = Path(__file__).parents[1]
SHORT = TrialSettings(num_train_epochs=2, lora_r=8, lora_alpha=8, learning_rate=2e-3)


@pytest.fixture(scope="module", params=["bf16", "qlora"])
def on_gpu(request):
    """The nano base on the GPU, in a process group of one."""
    import torch.distributed as dist

    from train_fn.model.base import load_base

    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return load_base(ModelSettings(use_qlora=request.param == "qlora"), torch.device("cuda", 0))


def train(base, splits, settings: TrialSettings, output: Path | None = None) -> list[EpochReport]:
    from train_fn.trial.loop import run_trial

    reports: list[EpochReport] = []
    run_trial(base, splits, settings, lambda report: reports.append(report) or False, output=output)
    return reports


@pytest.mark.parametrize("options", [{}, {"train_projector": True}, {"optim": "paged_adamw_8bit"},
                                     {"gradient_checkpointing": True}, {"offload_optimizer": True},
                                     {"train_vision": "lora", "train_projector": True, "projector_lora": True},
                                     {"torch_compile": False}, {"per_device_train_batch_size": 2}])  # fmt: skip
def test_a_trial_on_a_gpu(on_gpu, splits, tmp_path, options) -> None:
    from train_fn.trial.compiled import compiles_by_default
    from train_fn.trial.scoring import score_adapter

    before = {name: parameter.clone() for name, parameter in on_gpu.model.named_parameters()}
    reports = train(on_gpu, splits, replace(SHORT, **options), tmp_path)
    assert reports[1].metrics["train_loss"] < reports[0].metrics["train_loss"]
    assert reports[0].applied["trainable_dtype"] == "float32"
    is_compiled = options.get("torch_compile", compiles_by_default(on_gpu.device))
    assert reports[0].applied.get("torch_compile", False) == is_compiled and not reports[0].notes
    predicted = score_adapter(on_gpu, splits, "validation", 16, tmp_path / "final_model")
    assert predicted["losses"].mean() == pytest.approx(reports[1].metrics["loss"], abs=1e-3)
    assert all(torch.equal(before[name], parameter) for name, parameter in on_gpu.model.named_parameters())


def test_other_ranks_compile_nothing(on_gpu, splits) -> None:
    from torch._dynamo.utils import counters

    train(on_gpu, splits, SHORT)
    before = counters["stats"]["unique_graphs"]
    for rank in (64, 128, 16):
        train(on_gpu, splits, replace(SHORT, lora_r=rank, lora_dropout=0.1))
    assert counters["stats"]["unique_graphs"] == before


def test_packed_rows_have_the_losses_of_padded_batches(on_gpu, splits) -> None:
    """With torch's variable-length kernel, in bfloat16."""
    from train_fn.model.batches import answer_losses, collate

    if not on_gpu.packs_rows:
        pytest.skip("no kernel for packed rows on this GPU")
    on_gpu.model.eval()
    with torch.no_grad():
        packed, padded = (answer_losses(on_gpu, collate(on_gpu, splits.train[:8], True, packed=packed))
                          for packed in (True, False))  # fmt: skip
    assert torch.allclose(packed, padded, atol=0.05)


def test_trials_leave_no_gpu_memory_behind(on_gpu, splits) -> None:
    train(on_gpu, splits, SHORT)
    gc.collect()  # as a lane does after each trial: DeepSpeed's engine is a cycle
    held = torch.cuda.memory_allocated()
    for _ in range(5):
        train(on_gpu, splits, SHORT)
    gc.collect()
    assert torch.cuda.memory_allocated() <= held * 1.01


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_two_gpus_under_torchrun(splits, tmp_path) -> None:
    save_splits(splits, tmp_path / "splits.json")
    wanted = {
        "splits": str(tmp_path / "splits.json"),
        "output": str(tmp_path / "out"),
        "trial": {"num_train_epochs": 2, "lora_r": 8, "lora_alpha": 8, "learning_rate": 2e-3},
    }
    (tmp_path / "trial.json").write_text(json.dumps(wanted))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
               "train_fn.main", str(tmp_path / "trial.json")]  # fmt: skip
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    first, last = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert last["train_loss"] < first["train_loss"]


@pytest.mark.parametrize(("workers", "sharing"), [(1, 1), (1, 2), (2, 1)])
def test_a_study_on_gpus(tmp_path, workers, sharing) -> None:
    if torch.cuda.device_count() < workers:
        pytest.skip("one GPU only")
    command = [sys.executable, str(ROOT / "tune" / "run.py"), "--trials", "3", "--name", "s", "--num-phantoms", "60",
               "--workers-per-trial", str(workers), "--lanes-per-gpu", str(sharing)]  # fmt: skip
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    study = json.loads((tmp_path / "results" / "s" / "study.json").read_text())
    assert study["layout"]["use_gpu"] and study["layout"]["lanes_per_gpu"] == sharing
    assert all(trial["device"] != "cpu" for trial in study["trials"])
