"""Two worker processes with gloo: ZeRO-2 partitions, evaluation gathers exactly, and the trial has the same numbers."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from train_fn.data.augment import Variant, shown_images
from train_fn.data.order import epoch_order
from train_fn.jobs import EpochReport
from train_fn.settings import ModelSettings, TrialSettings

SETTINGS = TrialSettings(
    num_train_epochs=1, lora_r=4, lora_alpha=8, learning_rate=1e-3, lora_dropout=0.0, augment="medium"
)
EVERY_PART = replace(SETTINGS, train_vision="lora", train_projector=True, projector_lora=True, max_steps=1)


def worker(rank: int, world_size: int, splits, output: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{output}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    from train_fn.model.base import load_base
    from train_fn.scoring.evaluation import predict
    from train_fn.trial.engine import build_engine
    from train_fn.trial.loop import run_trial
    from train_fn.trial.lora import adapted

    base = load_base(ModelSettings(), torch.device("cpu"))
    odd = splits.validation[:7]
    predicted = predict(base, odd, splits, 4)
    with adapted(base, SETTINGS) as model:
        engine = build_engine(base, model, SETTINGS, torch.ones(3), 10, world_size)
        optimizer = engine.optimizer
        partition = sum(p.numel() for group in optimizer.optimizer.param_groups for p in group["params"])
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts = {
            "engine": type(engine).__name__,
            "stage": engine.zero_optimization_stage(),
            "optimizer": type(optimizer).__name__,
            "partition_gradients": optimizer.partition_gradients,
            "partition": partition,
            "trainable": trainable,
            "batch": engine.train_batch_size(),
        }
        engine.destroy()
    reports: list[EpochReport] = []
    fed: list[Any] = []
    for settings in (EVERY_PART, SETTINGS):
        if settings is SETTINGS:
            fed = note_fed_images()
        run_trial(base, splits, settings, lambda report: reports.append(report) or False)
    points = points_of_damaged_states(rank, Path(output) / "trial")
    found = {"facts": facts, "predicted": predicted, "reports": [*map(vars, reports)], "points": points, "fed": fed}
    torch.save(found, f"{output}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def note_fed_images() -> list[Any]:
    """Grows by the images and variants that this process feeds to the model in training."""
    from train_fn.trial import steps

    fed: list[Any] = []
    original = steps.collate

    def noting(base, samples, **options):
        fed.extend(image for its in options["shown"] for image in its)
        return original(base, samples, **options)

    steps.collate = noting
    return fed


def points_of_damaged_states(rank: int, folder: Path) -> list[int | None]:
    """The steps from which a trial with two saved points resumes: first with the second rank's newest file damaged,
    then also with the two ranks' files of the older point exchanged."""
    from train_fn.support.storage import Storage
    from train_fn.trial import resume_state

    resume_state.engine_state = lambda engine: {}  # type: ignore[assignment]
    state = resume_state.ResumeState(folder, Storage(folder), SETTINGS)
    for step in (1, 2):
        state.write(*state.serialise({"step": step, "losses": [0.0], "reports": []}, None))
    if rank == 1:
        state.file("00000004").write_bytes(b"damaged")
    dist.barrier()
    steps = [found["step"] if (found := state.load()) else None]
    dist.barrier()
    if rank == 0:
        one, two = (folder / "state" / f"00000002-{number}.state" for number in (0, 1))
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
    dist.barrier()
    return [*steps, found["step"] if (found := state.load()) else None]


def test_all_ranks_resume_from_the_same_sound_point(found) -> None:
    assert [result["points"] for result in found] == [[1, None], [1, None]]


@pytest.fixture(scope="module")
def found(splits, tmp_path_factory) -> list[dict]:
    output = str(tmp_path_factory.mktemp("ranks"))
    run_ranks(worker, (2, splits, output))
    return [torch.load(Path(output) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_zero_2_partitions_optimizer_state_and_gradients(found) -> None:
    for result in found:
        facts = result["facts"]
        assert (facts["engine"], facts["optimizer"]) == ("DeepSpeedEngine", "DeepSpeedZeroOptimizer")
        assert (facts["stage"], facts["partition_gradients"], facts["batch"]) == (2, True, 16)
        assert facts["partition"] == pytest.approx(facts["trainable"] / 2, rel=0.01)


def test_evaluation_neither_repeats_nor_drops(found, base, splits) -> None:
    from train_fn.scoring.evaluation import predict

    alone = predict(base, splits.validation[:7], splits, 4)
    for result in found:
        assert result["predicted"].keys() == alone.keys() == {"losses", "scores", "texts"}
        assert result["predicted"]["texts"].tolist() == alone["texts"].tolist() == [None] * 7
        for name in ("losses", "scores"):
            assert result["predicted"][name].shape == alone[name].shape
            assert np.allclose(result["predicted"][name], alone[name], atol=1e-4)


@pytest.mark.parametrize(("number", "settings"), [(0, EVERY_PART), (1, SETTINGS)], ids=["every part", "adapter"])
def test_two_workers_train_the_same_trial(found, base, splits, number, settings) -> None:
    from train_fn.trial.loop import run_trial

    reports: list[EpochReport] = []
    run_trial(base, splits, settings, lambda report: reports.append(report) or False)
    one, two = (result["reports"][number] for result in found)
    assert one["metrics"] == two["metrics"]
    assert one["metrics"]["loss"] == pytest.approx(reports[-1].metrics["loss"], abs=1e-3)
    assert one["metrics"]["train_loss"] == pytest.approx(reports[-1].metrics["train_loss"], abs=1e-3)
    # A single worker has nothing to partition, so its stage 2 is run as stage 1.
    assert one["applied"] == reports[-1].applied | {"zero_stage": 2}


def test_two_workers_feed_the_variants_that_one_feeds(found, splits) -> None:
    shown = shown_images(splits, SETTINGS, 1)
    order = epoch_order(len(splits.train), SETTINGS.global_batch_size, SETTINGS.seed, 1)
    wanted = Counter(image for index in order.flat for image in shown[index])
    one, two = (result["fed"] for result in found)
    assert Counter(one) + Counter(two) == wanted and len(one) == len(two) == order.size / 2
    assert sum(isinstance(image, Variant) for image in one) > 5 < sum(isinstance(image, Variant) for image in two)
