"""A trial that ends with an error: the first error is the one that is reported, and nothing of its engine stays."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from train_fn.model.memory import is_broken_device
from train_fn.settings import TrialSettings
from train_fn.support.cleanup import at_end
from train_fn.support.profile import Profile
from train_fn.trial import engine as engines
from train_fn.trial import loop
from train_fn.trial.engine import MicroBatchTooLarge
from train_fn.trial.memory import free_memory
from train_fn.worker import release_memory

SETTINGS = TrialSettings(num_train_epochs=1, lora_r=4, lora_alpha=8, learning_rate=1e-3)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class FailingBackward(torch.autograd.Function):
    """Passes its input through, and runs out of memory in the backward pass."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return tensor.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise torch.OutOfMemoryError(*OUT_OF_MEMORY.args)


def fail(*_: Any) -> Any:
    raise torch.OutOfMemoryError(*OUT_OF_MEMORY.args)


def run_and_fail(base, splits, settings: TrialSettings) -> Exception:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        loop.run_trial(base, splits, settings, lambda report: False)
    return raised.value


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"zero_stage": 0}, {"train_projector": True}]
)
@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_nothing_of_a_trial_that_ran_out_of_memory_survives(base, splits, monkeypatch, where, options) -> None:
    held: list[weakref.ref] = []

    def build(*given: Any) -> Any:
        engine = engines.build_engine(*given)
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        flat = [tensor for name in ("single_partition_of_fp32_groups", "bit16_groups_flat")
                for tensor in getattr(engine.optimizer, name, [])]  # fmt: skip
        held.extend(map(weakref.ref, [engine, engine.optimizer, *trained, *flat]))
        layer = next(m for name, m in reversed(list(engine.module.named_modules())) if name.endswith("down_proj"))
        if where == "forward":
            layer.register_forward_hook(fail)
        elif where == "backward":
            layer.register_forward_hook(lambda module, inputs, output: FailingBackward.apply(output))
        else:
            monkeypatch.setattr(engine.optimizer, "step", fail)
        return engine

    monkeypatch.setattr(loop, "build_engine", build)
    settings = replace(SETTINGS, **options)

    def failed() -> bool:  # in a frame of its own: the error holds the frames that it passed
        error = run_and_fail(base, splits, settings)
        return isinstance(error, MicroBatchTooLarge) and isinstance(error.__cause__, torch.OutOfMemoryError)

    assert failed()
    monkeypatch.undo()
    release_memory()
    assert len(held) > 50 and not [reference for reference in held if reference() is not None]


@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_of_an_engine_that_could_not_be_built_survives(base, splits, monkeypatch, stage) -> None:
    """ZeRO allocates once more after it has put its hooks on the weights."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    held: list[weakref.ref] = []

    def out_of_memory(optimizer: Any) -> None:
        held.extend(map(weakref.ref, [optimizer, *optimizer.single_partition_of_fp32_groups]))
        fail()

    monkeypatch.setattr(DeepSpeedZeroOptimizer, "initialize_optimizer_states", out_of_memory)
    run_and_fail(base, splits, replace(SETTINGS, zero_stage=stage))
    release_memory()
    assert len(held) == 3 and not [reference for reference in held if reference() is not None]


def test_a_broken_device_does_not_hide_the_first_error(base, splits, monkeypatch) -> None:
    def build(*given: Any) -> Any:
        engine = engines.build_engine(*given)
        destroy = engine.destroy

        def broken() -> None:
            destroy()
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered (in destroy)")

        monkeypatch.setattr(engine, "destroy", broken)
        monkeypatch.setattr(engine, "backward", raise_first)
        return engine

    def raise_first(loss: torch.Tensor, **options: Any) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(loop, "build_engine", build)
    with pytest.raises(torch.AcceleratorError, match="device-side assert") as raised:
        loop.run_trial(base, splits, SETTINGS, lambda report: False)
    assert raised.value.__notes__ == [
        "Cleaning up failed, too: AcceleratorError: CUDA error: an illegal memory access was encountered (in destroy)"
    ]
    assert is_broken_device(raised.value)


def test_a_profiled_phase_does_not_hide_the_first_error(monkeypatch) -> None:
    waits: list[int] = []

    def synchronize() -> None:
        waits.append(1)
        if len(waits) > 1:
            raise torch.AcceleratorError("CUDA error: second")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    profile = Profile({}, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="first"), profile.phase("forward"):
        raise RuntimeError("first")
    assert len(waits) == 2 and not profile.open


def test_an_error_at_the_end_alone_is_raised() -> None:
    with pytest.raises(ValueError, match="alone"), at_end(lambda: (_ for _ in ()).throw(ValueError("alone"))):
        pass


@pytest.mark.parametrize(("share", "free_gib"), [(1.0, 30.0), (0.5, 36 / 2 - 4)])
def test_a_worker_counts_on_its_share_of_a_gpu_only(monkeypatch, share, free_gib) -> None:
    """Of 36 GiB it holds 4, and others hold 2; another lane of the same GPU may not have loaded its base yet."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (30 * 2**30, 36 * 2**30))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 4 * 2**30)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 4 * 2**30)
    assert free_memory(torch.device("cuda"), share) == free_gib
