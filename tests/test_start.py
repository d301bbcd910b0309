"""What the processes of a study import before the first step: no heavy library in vain."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The module by which a process of Ray receives its work -> libraries that this process never uses.
NEEDLESS = {
    "tune.search.queued_trial, tune.search.point": ("torch", "transformers", "deepspeed", "mlflow", "optuna", "PIL"),
    "tune.lanes.dispatcher": ("torch", "transformers", "mlflow", "optuna", "pandas", "ray.train", "ray.tune"),
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
    names = ("train_fn.trial.loop", "deepspeed", "peft", "mlflow", "bitsandbytes")
    code = (
        "from train_fn.support.imports import not_imported\n"
        "with not_imported('mlflow', 'bitsandbytes'): import train_fn.trial.loop\n"
        "import importlib.util; assert importlib.util.find_spec('bitsandbytes') and importlib.util.find_spec('mlflow')"
    )
    assert imported(code, names) == ["train_fn.trial.loop", "deepspeed", "peft"]
