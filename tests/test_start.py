"""What the processes of a study import before the first step: no heavy library in vain."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from train_fn.support.imports import no_garbage_collection

# The module by which a process of Ray receives its work -> libraries that this process never uses.
NEEDLESS = {
    "tune.search.queued_trial, tune.search.point": ("torch", "transformers", "deepspeed", "mlflow", "optuna", "PIL"),
    "tune.lanes.dispatcher": ("torch", "transformers", "mlflow", "optuna", "pandas", "ray.train", "ray.tune"),
    "tune.transfer": ("torch", "transformers", "mlflow", "ray"),  # the driver before it knows that the data is sound
    "tune.lanes.loopback": ("torch", "transformers", "mlflow", "optuna"),  # a lane's controller
    "tune.search.callback": ("torch", "transformers", "mlflow"),  # the driver while the lanes start
}


def imported(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of these modules a fresh process holds after some code."""
    code += f"; import sys; print(*[name for name in {names!r} if sys.modules.get(name)])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("modules", NEEDLESS)
def test_a_process_imports_only_what_it_uses(modules: str) -> None:
    assert imported(f"import {modules}", NEEDLESS[modules]) == []


def test_a_worker_imports_neither_mlflow_nor_bitsandbytes_and_can_import_them_later() -> None:
    names = ("train_fn.trial.loop", "deepspeed", "peft", "torch._inductor.compile_fx", "mlflow", "bitsandbytes")
    code = (
        "from train_fn.support.imports import not_imported\n"
        "with not_imported('mlflow', 'bitsandbytes'): import train_fn.trial.loop\n"
        "import importlib.util; assert importlib.util.find_spec('bitsandbytes') and importlib.util.find_spec('mlflow')"
    )
    assert imported(code, names) == ["train_fn.trial.loop", "deepspeed", "peft"]


def test_the_first_step_of_zero_loads_no_compiler_and_its_group_has_the_time_out_of_the_lane(tmp_path) -> None:
    code = f"""
import os, torch
from train_fn.execution import PADDED_PAIRS
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.support.imports import not_imported
with not_imported("mlflow", "bitsandbytes"):
    from peft.import_utils import is_bnb_available
    from train_fn.model.base import load_base
    from train_fn.trial.engine import build_engine
    from train_fn.trial.lora import adapted
    is_bnb_available()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
assert issubclass(MuonWithAuxAdam, torch.optim.Optimizer)
torch.set_deterministic_debug_mode("warn")
assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
os.environ["LOCAL_RANK"] = "0"
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
base, settings = load_base(ModelSettings(), torch.device("cpu")), TrialSettings(zero_stage=2)
with adapted(base, settings, PADDED_PAIRS) as model:
    engine = build_engine(base, model, settings, torch.tensor([]), 10, 1, PADDED_PAIRS, 1260)
    group = engine.data_parallel_group
    assert group is not torch.distributed.group.WORLD
    assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 1260
    loss = sum(p.square().sum() for p in engine.module.parameters() if p.requires_grad)
    engine.backward(loss)
    engine.step()
"""
    assert imported(code + "import sys", ("deepspeed", "torch._inductor.compile_fx")) == ["deepspeed"]


def test_no_garbage_collection_is_for_its_block_only_even_after_an_error() -> None:
    with pytest.raises(ImportError), no_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
