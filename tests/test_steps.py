"""How a step's samples are cut into micro-batches, and that the cut changes no sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train_fn.data.order import by_images, by_tokens
from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.execution import Execution
from train_fn.model.batches import num_tokens
from train_fn.settings import TrialSettings
from train_fn.trial.engine import build_engine
from train_fn.trial.lora import adapted
from train_fn.trial.steps import micro_batches, train_step

TRIAL = TrialSettings(lora_r=4, lora_alpha=8, lora_dropout=0.0, warmup_ratio=0.0)


@given(
    tokens=st.lists(st.integers(1, 3000), min_size=1, max_size=16),
    workers=st.sampled_from([1, 2, 4]),
    most=st.integers(1, 20_000),
    packed=st.booleans(),
)
def test_every_sample_goes_through_once_within_the_limit(tokens, workers, most, packed) -> None:
    step = tokens * workers  # a global batch is a multiple of the workers
    cuts = [by_tokens(step, most, rank, workers, packed) for rank in range(workers)]
    assert len({len(cut) for cut in cuts}) == 1  # workers reduce their gradients together
    assert sorted(position for cut in cuts for part in cut for position in part) == list(range(len(step)))
    sizes = [[step[position] for position in part] for cut in cuts for part in cut]
    assert all(part and (len(part) == 1 or (sum(part) if packed else max(part) * len(part)) <= most) for part in sizes)


def test_as_few_micro_batches_as_the_limit_allows() -> None:
    lengths = [100] * 16
    assert [len(by_tokens(lengths, most, 0, 1, False)) for most in (99, 100, 400, 799, 800, 1600)] == [
        16, 16, 4, 3, 2, 1,
    ]  # fmt: skip
    # Packed, long and short samples share a row: 2 x (900 + 100) instead of 2 x 900 and 2 x 100 apart.
    assert len(by_tokens([900, 100, 900, 100], 1000, 0, 1, True)) == 2
    assert len(by_tokens([900, 100, 900, 100], 1000, 0, 1, False)) == 3


def test_a_number_of_images_is_the_guides_micro_batch() -> None:
    assert [part.tolist() for part in by_images([3, 1, 2, 1], 2, 0, 1)] == [[1, 3], [2, 0]]
    assert [part.tolist() for rank in (0, 1) for part in by_images([3, 1, 2, 1], 1, rank, 2)] == [[1], [2], [3], [0]]


@pytest.fixture
def mixed(tmp_path) -> Splits:
    """Images of sizes so different that padding would cost much."""
    samples = []
    for number in range(16):
        path = tmp_path / f"{number}.png"
        side = 60 + 25 * (number % 5)
        Image.effect_noise((side, 2 * side), 60).convert("RGB").save(path)
        answer = ("benign", "malignant", "normal")[number % 3]
        samples.append(Sample(images=(str(path),), question="What is it?", answer=answer, label=number % 3))
    return Splits(train=samples, validation=samples[:3], test=samples[:3],
                  tasks=closed_set(["benign", "malignant", "normal"]))  # fmt: skip


def test_packed_padded_and_small_micro_batches_give_the_same_gradients(base, mixed) -> None:
    """The sum of a step, in float32, whatever the cut: losses and gradients to 1e-6."""
    lengths = [num_tokens(base, sample) for sample in mixed.train]
    assert base.packs(lengths)
    found = []
    all_at_once, thrice = Execution(tokens=8192), Execution(tokens=3 * max(lengths))
    for way, packs in ((Execution(images=2), True), (all_at_once, True), (all_at_once, False), (thrice, True),
                       (thrice, False)):  # fmt: skip
        with adapted(base, TRIAL) as model, pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(base), "packs", lambda self, sizes, packs=packs: packs)
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # zero at the start, and then A has no gradient
                    torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(0))
            engine = build_engine(base, model, replace(TRIAL, zero_stage=0), torch.linspace(0.5, 1.5, 16), 4, 1, way)
            engine.train()
            total, count = 0.0, 0
            for batch, indices, is_last in micro_batches(base, mixed.train, way, np.arange(16)[None]):
                engine.set_gradient_accumulation_boundary(is_last)
                loss = engine(batch, indices)
                engine.backward(loss, scale_wrt_gas=False)
                total, count = total + loss.item(), count + 1
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append((count, total, gradients))
            engine.destroy()
    counts = [count for count, *_ in found]
    assert counts[:3] == [8, 1, 1] and 1 < counts[3] <= counts[4] == 6
    for _, total, gradients in found[1:]:
        assert total == pytest.approx(found[0][1], abs=1e-6)
        assert (gradients - found[0][2]).abs().max() < 1e-6 * max(1.0, float(found[0][2].abs().max()))


def test_stage_2_of_one_worker_is_run_as_stage_1_with_the_same_bits(base, splits, monkeypatch) -> None:
    """The reason is time: stage 2 reduces after each micro-batch, also where there is nobody to reduce with."""
    weights = []
    for stage in (1, 2):
        monkeypatch.setattr("train_fn.trial.engine.run_stage", lambda settings, world_size, stage=stage: stage)
        with adapted(base, TRIAL) as model:
            engine = build_engine(base, model, TRIAL, torch.tensor([]), 4, 1)
            assert engine.zero_optimization_stage() == stage
            order = np.arange(32).reshape(2, 16) % len(splits.train)
            batches = micro_batches(base, splits.train, Execution(images=2), order)
            losses = [train_step(engine, batches, step, False)[0] for step in (1, 2)]
            weights.append((losses, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])))
            engine.destroy()
    assert weights[0][0] == weights[1][0] and torch.equal(weights[0][1], weights[1][1])


def test_a_thread_prepares_the_same_batches(base, splits, monkeypatch) -> None:
    """On a GPU the next micro-batch is prepared beside the present one; a batch that fails raises where it is used."""
    order = np.arange(32).reshape(2, 16) % len(splits.train)
    way = Execution(images=4)
    plain = list(micro_batches(base, splits.train, way, order))
    monkeypatch.setattr("train_fn.trial.steps.prepares_ahead", lambda device: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    ahead = list(micro_batches(base, splits.train, way, order))
    assert len(plain) == len(ahead) == 8
    for one, two in zip(plain, ahead, strict=True):
        assert torch.equal(one.indices, two.indices) and one.is_last == two.is_last
        assert one.batch.keys() == two.batch.keys()
        assert all(torch.equal(one.batch[name], two.batch[name]) for name in ("labels", "input_ids"))
    missing = [replace(sample, images=("nowhere.png",)) for sample in splits.train]
    with pytest.raises((OSError, ValueError), match="nowhere"):
        list(micro_batches(base, missing, way, order))
