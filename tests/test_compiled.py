"""Compiled layers: one graph for all trials of a lane, eager's numbers, and plain layers where the compiler fails.

The backend is aot_eager: the inductor's compilation takes half a minute.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from train_fn.execution import Execution
from train_fn.jobs import EpochReport
from train_fn.model.base import Base
from train_fn.settings import TrialSettings
from train_fn.support.ranks import seed_everything
from train_fn.trial import compiled
from train_fn.trial.engine import build_engine
from train_fn.trial.loop import run_trial
from train_fn.trial.lora import adapted, adapter_layers
from train_fn.trial.memory import wanted_execution
from train_fn.trial.steps import micro_batches, train_step

TRIAL = TrialSettings(lora_dropout=0.0, warmup_ratio=0.0, learning_rate=1e-3, torch_compile=True, max_steps=2)


@pytest.fixture
def lane(base: Base, monkeypatch: pytest.MonkeyPatch) -> Base:
    """A base on which nothing is compiled yet."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(base, "compiler", None)
    return base


def train(base: Base, splits, settings: TrialSettings, num_steps: int = 2) -> tuple[list[float], torch.Tensor, int]:
    """Losses of the product's optimizer steps, the trained weights, and how many graphs were compiled."""
    before = counters["stats"]["unique_graphs"]
    way = replace(wanted_execution(settings, base.device), tokens=0, images=2)
    with adapted(base, settings, way) as model:
        engine = build_engine(base, model, settings, torch.tensor([]), 10, 1, way)
        seed_everything(0, 0)
        losses = []
        for step in range(num_steps):
            # Each micro-batch has another length.
            indices = np.random.default_rng(step).permutation(len(splits.train))[:16]
            batches = micro_batches(base, splits.train, way, indices[None])
            losses.append(train_step(engine, batches, step + 1, False)[0])
        engine.destroy()
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return losses, weights, counters["stats"]["unique_graphs"] - before


def test_one_graph_serves_all_ranks_scalings_dropout_rates_and_lengths_with_the_same_numbers(lane, splits) -> None:
    """DeepSpeed keeps an adapter's weights in one flat buffer, so their offsets in it vary from layer to layer."""
    settings = replace(TRIAL, lora_dropout=0.05)
    first = train(lane, splits, settings, 3)
    assert first[2] == 1 and not compiled.compiler_note(lane)
    for rank, alpha, dropout in ((8, 4.0, 0.1), (128, 512.0, 0.2), (16, 5.0, 0.05)):
        other = replace(TRIAL, lora_r=rank, lora_alpha=alpha, lora_dropout=dropout)
        losses, _, graphs = train(lane, splits, other, 1)
        assert graphs == 0 and losses[0] == pytest.approx(first[0][0], abs=1e-6)  # B is zero in a first step
    again = train(lane, splits, settings, 3)
    assert again[0] == first[0] and torch.equal(again[1], first[1]) and again[2] == 0


def test_compiled_steps_are_eagers_to_the_bit(lane, splits) -> None:
    """Over several updates, with a scaling that bfloat16 cannot hold."""
    settings = replace(TRIAL, lora_r=8, lora_alpha=2.4)
    losses, weights, _ = train(lane, splits, replace(settings, torch_compile=False), 3)
    fast = train(lane, splits, settings, 3)
    assert fast[0] == losses and torch.equal(fast[1], weights) and fast[2] == 1
    assert losses[0] != losses[2]


def test_dropout_has_its_rate_and_keeps_the_mean(lane) -> None:
    for rate in (0.05, 0.5):
        dropout = compiled.Dropout(rate, torch.device("cpu"))
        run = torch.compile(dropout, backend="aot_eager")
        output = run(torch.ones(100_000))
        assert float((output == 0).float().mean()) == pytest.approx(rate, abs=0.01)
        assert output.max() == pytest.approx(1 / (1 - rate)) and torch.equal(dropout.eval()(output), output)


def test_the_scaling_that_all_others_see_stays_a_number(lane, splits) -> None:
    settings = replace(TRIAL, lora_r=8, lora_alpha=1.0)
    with adapted(lane, settings, Execution(images=2, compiled=True)) as model:
        layers = [layer for layer in lane.model.modules() if compiled.is_compiled(layer)]
        assert len(layers) == 4
        assert {layer.scaling["default"] for layer in adapter_layers(model).values()} == {0.125}
    assert not any(map(compiled.is_compiled, lane.model.modules()))


def test_a_failing_compiler_leaves_the_layers_plain_and_says_so(lane, splits, monkeypatch) -> None:
    def fails(backend: str, budget: float):
        def compile_graph(graph, inputs):
            calls.append(graph)
            raise OSError("no C++ compiler")

        return compile_graph

    calls: list = []
    monkeypatch.setattr(compiled, "budgeted", fails)
    plain = train(lane, splits, replace(TRIAL, torch_compile=False))
    reports: list[EpochReport] = []
    for _ in range(2):
        assert train(lane, splits, TRIAL)[0] == plain[0]
        run_trial(lane, replace(splits, train=splits.train[:16]), TRIAL, lambda r: reports.append(r) or False)
    assert len(calls) == 1
    for report in reports:
        assert len(report.notes) == 1 and "no C++ compiler" in report.notes[0] and "\n" not in report.notes[0]
        assert "torch_compile" not in report.applied


def test_out_of_memory_is_not_the_compilers_failure(lane, splits, monkeypatch) -> None:
    def fails(backend: str, budget: float):
        def compile_graph(graph, inputs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return compile_graph

    monkeypatch.setattr(compiled, "budgeted", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(lane, splits, TRIAL)
    assert not compiled.compiler_note(lane)


def test_a_cpu_does_not_compile_by_default() -> None:
    assert not compiled.compiles_by_default(torch.device("cpu"))
