"""The training loop on the nano base with a real DeepSpeed engine: trained weights, frozen weights and reports."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from train_fn.data.images import read_image
from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.execution import Execution
from train_fn.jobs import EpochReport
from train_fn.model.base import load_base
from train_fn.model.batches import answer_losses, collate, forward_hidden, num_tokens
from train_fn.scoring.evaluation import predict, score_candidates
from train_fn.scoring.scores import metrics_of
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.support.ranks import seed_everything
from train_fn.trial import engine as engine_module
from train_fn.trial.applied import TrialFailed, check_applied, read_applied
from train_fn.trial.engine import MicroBatchTooLarge, build_engine
from train_fn.trial.loop import Preempted, run_trial
from train_fn.trial.lora import adapted, adapter_layers
from train_fn.trial.scoring import score_adapter
from train_fn.trial.steps import micro_batches, train_step

SHORT = TrialSettings(num_train_epochs=1, lora_r=4, lora_alpha=8, learning_rate=1e-3)
PROJECTOR = replace(SHORT, train_projector=True, projector_learning_rate=5e-4, lora_r=8, lora_alpha=8, seed=5)


@pytest.fixture(scope="module")
def splits(splits) -> Splits:
    """Fewer images, for trials of seconds."""
    return replace(splits, train=splits.train[:16], validation=splits.validation[:8])


def train(base, splits, settings: TrialSettings, output: Path | None = None, stop: bool = False) -> list[EpochReport]:
    reports: list[EpochReport] = []

    def report(message: EpochReport) -> bool:
        reports.append(message)
        return stop

    run_trial(base, splits, settings, report, output=output)
    return reports


def weights(base) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in base.model.named_parameters()}


def test_base_is_left_as_it_was(base, splits) -> None:
    before = weights(base)
    modules = [name for name, _ in base.model.named_modules()]
    train(base, splits, PROJECTOR)
    after = weights(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modules == [name for name, _ in base.model.named_modules()]
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("settings", [SHORT, PROJECTOR], ids=["adapter", "adapter and projector"])
def test_one_step_moves_exactly_what_is_trained(base, splits, settings) -> None:
    with adapted(base, settings) as model:
        engine = build_engine(base, model, replace(settings, warmup_ratio=0.0), torch.ones(3), 4, 1)
        engine.train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for start in range(0, 16, 2):
            samples = splits.train[start : start + 2]
            loss = engine(collate(base, samples, True), torch.tensor([s.label for s in samples]))
            engine.backward(loss)
            engine.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
        engine.destroy()
    # lora_A's gradient is lora_B's value, 0 before the first step: weight decay moves it all the same.
    expected = {name for name in before if ".lora_" in name}
    if settings.train_projector:
        expected |= {name for name in before if ".projector." in name}
    assert moved == expected
    assert len([name for name in moved if ".lora_" in name]) == 4 * 7 * 2
    assert not any("vision_model" in name for name in moved)


def test_loss_falls(base, splits) -> None:
    reports = train(base, splits, replace(SHORT, num_train_epochs=8, learning_rate=3e-3, gradient_accumulation_steps=4))
    losses = [report.metrics["train_loss"] for report in reports]
    assert losses[-1] < 0.8 * losses[0]
    assert [report.finished for report in reports] == [False] * 7 + [True]


def test_same_numbers_whatever_trial_came_before(base, splits) -> None:
    first = train(base, splits, SHORT)[0]
    other = train(base, splits, PROJECTOR)[0]
    again = train(base, splits, SHORT)[0]
    assert first.metrics == again.metrics
    assert first.metrics != other.metrics
    assert train(base, splits, replace(SHORT, seed=1))[0].metrics != first.metrics


def test_applied_is_what_was_asked(base, splits) -> None:
    one, two = train(base, splits, SHORT)[0].applied, train(base, splits, PROJECTOR)[0].applied
    assert (one["lora_r"], one["lora_alpha"], one["learning_rate"], one["train_projector"]) == (4, 8, 1e-3, False)
    assert (two["lora_r"], two["lora_alpha"], two["projector_learning_rate"], two["train_projector"]) == (
        8,
        8,
        5e-4,
        True,
    )
    for applied in (one, two):
        assert (applied["zero_stage"], applied["global_batch_size"], applied["num_adapted_modules"]) == (1, 16, 28)
        assert (applied["engine"], applied["optimizer"]) == ("DeepSpeedEngine", "DeepSpeedZeroOptimizer")
        assert applied["trainable_dtype"] == "float32"
    projector = sum(p.numel() for p in base.model.get_submodule(base.projector).parameters())
    assert two["trainable_params"] == 2 * one["trainable_params"] + projector


def test_a_setting_that_does_not_arrive_fails_the_trial(base) -> None:
    with adapted(base, SHORT) as model:
        engine = build_engine(base, model, SHORT, torch.ones(3), 4, 1)
        applied = read_applied(engine)
        check_applied(applied, SHORT)
        next(iter(adapter_layers(model).values())).r["default"] = 16  # one layer of 28 with another rank
        with pytest.raises(TrialFailed, match=r"lora_r should be 4 but is \[4, 16\]"):
            check_applied(read_applied(engine), SHORT)
        with pytest.raises(TrialFailed, match=r"learning_rate should be 0.5 but is 0.001"):
            check_applied(applied, replace(SHORT, learning_rate=0.5))
        engine.destroy()


def test_micro_batches_do_not_change_the_step(base, splits) -> None:
    """By tokens, all at once, in unequal parts, or the guide's pairs: the same loss and gradients, summed exactly."""
    settings = replace(SHORT, lora_dropout=0.0)
    order = np.arange(16)[None]
    four = 4 * max(num_tokens(base, sample) for sample in splits.train)
    found = []
    for way in (Execution(images=2), Execution(images=16), Execution(tokens=8192), Execution(tokens=four)):
        with adapted(base, settings) as model:
            engine = build_engine(base, model, settings, torch.linspace(0.5, 1.5, len(splits.train)), 4, 1, way)
            parts = list(micro_batches(base, splits.train, way, order))
            assert sorted(index for part in parts for index in part.indices.tolist()) == list(range(16))
            assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
            seed_everything(0, 0)
            loss, _ = train_step(engine, iter(parts), 1, False)
            weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
            found.append((len(parts), loss, weights))
            engine.destroy()
    assert [count for count, *_ in found] == [8, 1, 1, 4]
    for _, loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][1], abs=1e-6)
        assert (weights - found[0][2]).abs().max() < 1e-6


def test_no_module_to_adapt_fails_the_trial(base, splits) -> None:
    before = [name for name, _ in base.model.named_modules()]
    with pytest.raises(TrialFailed, match="nowhere"):
        train(base, splits, replace(SHORT, lora_target_modules=("nowhere",)))
    assert before == [name for name, _ in base.model.named_modules()]


def test_a_loss_that_is_not_finite_fails_the_trial(base, splits) -> None:
    with pytest.raises(TrialFailed, match="lower the learning rate"):
        large = {"lora_alpha": 1e6, "learning_rate": 10.0, "loraplus_lr_ratio": 1e6, "max_grad_norm": 0.0}
        train(base, splits, replace(SHORT, num_train_epochs=4, **large))
    assert np.isfinite(train(base, splits, SHORT)[0].metrics["loss"])


def test_open_answers_are_trained_and_scored_by_their_loss(base, splits, tmp_path) -> None:
    def opened(part):
        return tuple(replace(sample, answer=f"{sample.answer} tissue", label=-1) for sample in part)

    parts = {name: opened(getattr(splits, name)) for name in ("train", "validation", "test")}
    open_splits = Splits(**parts)
    report = train(base, open_splits, SHORT, tmp_path)[0]
    assert set(report.metrics) == {"loss", "train_loss", "exact_match", "token_f1", "rouge_l"}  # too short for BLEU
    predicted = score_adapter(base, open_splits, "validation", 16, tmp_path / "final_model")
    assert predicted["losses"].mean() == pytest.approx(report.metrics["loss"], abs=1e-5)
    assert predicted["scores"].shape == (len(parts["validation"]), 0)


def test_stop_ends_the_trial_without_an_adapter(base, splits, tmp_path) -> None:
    reports = train(base, splits, replace(SHORT, num_train_epochs=3), tmp_path, stop=True)
    assert len(reports) == 1 and not (tmp_path / "final_model").exists()


# ------------------------------------------------------------------------------------------------ text and pixels


def test_labels_cover_the_answer_and_its_end(base, splits) -> None:
    batch = collate(base, splits.train[:3], with_answers=True)
    tokenizer = base.processor.tokenizer
    for row, sample in enumerate(splits.train[:3]):
        kept = batch["input_ids"][row][batch["labels"][row] != -100]
        assert tokenizer.convert_ids_to_tokens(kept) == [sample.answer, "<|im_end|>"]
        assert torch.equal(kept, batch["labels"][row][batch["labels"][row] != -100])


def test_the_path_never_reaches_the_model(base, splits, tmp_path) -> None:
    sample = splits.train[0]
    copy = tmp_path / "Malignant" / "malignant (1).png"
    copy.parent.mkdir()
    copy.write_bytes(Path(sample.image).read_bytes())
    moved = Sample((str(copy),), sample.question, sample.answer, sample.label)
    one, two = collate(base, [sample], True), collate(base, [moved], True)
    assert one.keys() == two.keys()
    positions, same = one.pop("positions"), two.pop("positions")
    assert all(map(torch.equal, positions, same)) and all(torch.equal(one[key], two[key]) for key in one)


def test_the_batch_gives_the_models_own_logits(base, splits) -> None:
    samples = splits.validation[:4]
    batch = base.processor(
        images=[read_image(samples[0].image)],
        text=[base.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": samples[0].question}]}],
            add_generation_prompt=True)],
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        whole = base.model(**batch).logits[0, -1]
        hidden = forward_hidden(base, collate(base, samples[:1], False)).last_hidden_state[:, -1]
        ours = base.model.get_output_embeddings()(hidden)[0]
    assert torch.allclose(whole, ours, atol=1e-5)


def test_candidate_scores_equal_a_full_forward_pass(base, splits) -> None:
    samples = splits.validation[:3]
    fast = score_candidates(base, samples, splits.candidates)
    for row, sample in enumerate(samples):
        for column, answer in enumerate(splits.candidates):
            batch = collate(base, [replace(sample, answer=answer)], with_answers=True)
            with torch.no_grad():
                hidden = forward_hidden(base, batch).last_hidden_state
                logits = base.model.get_output_embeddings()(hidden)[0].log_softmax(-1)
            targets = batch["labels"][0]
            (places,) = (targets != -100).nonzero(as_tuple=True)
            slow = logits[places - 1, targets[places]].sum()
            assert fast[row, column] == pytest.approx(slow.item(), abs=1e-4)


# ------------------------------------------------------------------------------------------------ the adapter on disk


@pytest.mark.parametrize("settings", [SHORT, PROJECTOR], ids=["adapter", "adapter and projector"])
def test_saved_adapter_gives_the_trials_scores(base, splits, tmp_path, settings) -> None:
    trained = train(base, splits, settings, tmp_path)[-1].metrics
    before = weights(base)
    predicted = score_adapter(base, splits, "validation", 16, tmp_path / "final_model")
    found = {name: value for name, value in metrics_of(predicted, splits.validation, splits).items() if value == value}
    assert trained.keys() == {*found, "train_loss"}
    assert all(found[name] == pytest.approx(trained[name], abs=1e-6) for name in found)
    after = weights(base)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_peft_loads_the_adapter_in_a_fresh_process(base, splits, tmp_path) -> None:
    train(base, splits, PROJECTOR, tmp_path)
    adapter = tmp_path / "final_model"
    samples = splits.validation[:2]
    with torch.no_grad():
        plain = score_adapter(base, replace(splits, test=samples), "test", 16, adapter)["scores"]
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from pathlib import Path
from train_fn.data.images import read_image
from train_fn.model.checkpoint import resolve_model
from train_fn.model.processors import load_processor
base = AutoModelForImageTextToText.from_pretrained(resolve_model("nano"), dtype=torch.float32)
model = PeftModel.from_pretrained(base, {str(adapter)!r}).eval()
processor = load_processor(Path({str(adapter)!r}))
for image in {[s.image for s in samples]!r}:
    turn = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": {samples[0].question!r}}}]}}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    row = []
    for answer in {list(splits.candidates)!r}:
        inputs = processor(images=[read_image(image)], text=[prompt + answer + "<|im_end|>"], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0]
        row.append(sum(logits[-3 + n, ids[-2 + n]].item() for n in range(2)))
    print(*row)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    fresh = np.array([[float(word) for word in line.split()] for line in run.stdout.splitlines()])
    assert np.allclose(fresh, plain, atol=1e-4)


def test_importing_the_engine_switches_the_compiled_op_off() -> None:
    import deepspeed.ops

    assert engine_module.deepspeed is not None
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


class Killed(BaseException):
    """In place of the end of the process."""


LONG = replace(PROJECTOR, num_train_epochs=3, save_steps=3, logging_steps=1, lora_dropout=0.2,
               gradient_accumulation_steps=4)  # fmt: skip


ZERO_0 = replace(LONG, zero_stage=0, train_projector=False)
ZERO_1 = replace(LONG, zero_stage=1, loraplus_lr_ratio=4.0, max_steps=5)
EIGHT_BIT = replace(LONG, optim="adamw_8bit")
VISION = replace(LONG, train_vision="lora", projector_lora=True, num_train_epochs=2)


@pytest.mark.parametrize(
    ("settings", "killed_in"),
    [(LONG, 2), (LONG, 4), (LONG, 5), (ZERO_0, 4), (ZERO_1, 5), (EIGHT_BIT, 4), (VISION, 4)],
    ids=["zero 2, step 2", "zero 2, step 4", "zero 2, step 5", "zero 0", "zero 1", "8 bit", "vision tower"],
)
def test_a_killed_trial_resumes_to_the_same_numbers(base, splits, tmp_path, monkeypatch, settings, killed_in) -> None:
    whole = train(base, splits, settings, tmp_path / "whole")
    from train_fn.trial import loop

    step = loop.train_step

    def dies(*args):
        if args[2] == killed_in:
            raise Killed
        return step(*args)

    monkeypatch.setattr(loop, "train_step", dies)
    reports: list[EpochReport] = []
    with pytest.raises(Killed):
        run_trial(base, splits, settings, lambda report: reports.append(report) or False,
                  output=tmp_path / "killed", save_state_every=0)  # fmt: skip
    steps_done: list[int] = []
    monkeypatch.setattr(loop, "train_step", lambda *args: steps_done.append(args[2]) or step(*args))
    again = train(base, splits, settings, tmp_path / "killed")
    # From the last checkpoint: of every third step, or of the epoch's end (two steps).
    saved = max([s for s in range(killed_in) if s % 2 == 0 or s % 3 == 0])
    assert steps_done == list(range(saved + 1, whole[-1].step + 1))
    told = {report.epoch: report for report in reports + again}
    assert [told[report.epoch].metrics for report in whole] == [report.metrics for report in whole]
    assert [told[report.epoch].log for report in whole] == [report.log for report in whole]
    one, two = (
        load_file(tmp_path / name / "final_model" / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "killed" / "state").exists()


def test_a_trial_killed_in_its_last_report_repeats_it(base, splits, tmp_path) -> None:
    def dies(report: EpochReport) -> bool:
        if report.finished:
            raise Killed
        return False

    with pytest.raises(Killed):
        run_trial(base, splits, LONG, dies, output=tmp_path)
    again = train(base, splits, LONG, tmp_path)
    assert [report.finished for report in again] == [False, False, True]
    assert [report.metrics for report in again] == [report.metrics for report in train(base, splits, LONG)]


def test_a_preempted_trial_resumes_from_that_step(base, splits, tmp_path) -> None:
    whole, asked = train(base, splits, LONG), iter([False] * 3 + [True])
    with pytest.raises(Preempted, match="left at step 4"):
        run_trial(base, splits, LONG, lambda report: False, output=tmp_path,
                  preempted=lambda: next(asked))  # fmt: skip
    again = train(base, splits, LONG, tmp_path)
    assert [report.metrics for report in again] == [report.metrics for report in whole]
    assert [entry for report in again for entry in report.log] == [e for report in whole for e in report.log]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_fails_the_trial(base, splits, monkeypatch, stage) -> None:
    from train_fn.trial import engine

    losses = engine.answer_losses

    def poisoned(*args):
        found = losses(*args)
        return found + 0 * torch.sqrt(found - found.detach())  # finite, but its derivative is not

    monkeypatch.setattr(engine, "answer_losses", poisoned)
    with pytest.raises(TrialFailed, match="gradient was not finite in step 1"):
        train(base, splits, replace(SHORT, zero_stage=stage))


@pytest.mark.parametrize("place", ["train_fn.trial.engine.answer_losses", "train_fn.trial.scoring.predict"])
def test_out_of_memory_in_a_step_has_its_own_error(base, splits, monkeypatch, place) -> None:
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(place, full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        train(base, splits, SHORT)
    assert isinstance(caught.value, MicroBatchTooLarge) == ("engine" in place)


def test_an_fp16_base_trains_in_the_direction_of_a_float32_one(base, splits, tmp_path) -> None:
    half = load_base(ModelSettings(dtype="float16"), torch.device("cpu"))
    step = replace(SHORT, max_steps=1, warmup_ratio=0.0, lora_dropout=0.0)
    moved = {}
    for name, one in (("whole", base), ("half", half)):
        train(one, splits, step, tmp_path / name)
        found = load_file(tmp_path / name / "final_model" / "adapter_model.safetensors")
        moved[name] = torch.cat([found[key].flatten() for key in sorted(found) if "lora_B" in key])
    assert (moved["half"] != 0).float().mean() > 0.99
    assert torch.nn.functional.cosine_similarity(moved["half"], moved["whole"], dim=0) > 0.9


def test_evaluation_that_does_not_fit_is_cut_into_smaller_batches(base, splits, monkeypatch) -> None:
    from train_fn.scoring import evaluation

    score, sizes = evaluation.score_candidates, []

    def small(base, samples, candidates):
        if len(samples) > 3:
            raise torch.OutOfMemoryError("no more")
        sizes.append(len(samples))
        return score(base, samples, candidates)

    plain = predict(base, splits.validation, splits, 16)
    monkeypatch.setattr(evaluation, "score_candidates", small)
    found = predict(base, splits.validation, splits, 16)
    assert max(sizes) <= 3 and sum(sizes) == len(splits.validation)
    np.testing.assert_allclose(found["scores"], plain["scores"], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(evaluation, "score_candidates", lambda *args: small(base, [0] * 4, ()))
    with pytest.raises(torch.OutOfMemoryError):
        predict(base, splits.validation, splits, 16)


def test_right_padding_without_a_mask_touches_nothing(base, splits) -> None:
    """In a batch of several prompt lengths, each prompt has the same loss as alone."""
    samples = list(splits.train[:4])
    samples[1] = replace(samples[1], question=samples[1].question + " Look at the margin and at the shadow behind it.")
    samples[2] = replace(samples[2], question="Which?")
    with torch.no_grad():
        together = answer_losses(base, collate(base, samples, True))
        alone = torch.cat([answer_losses(base, collate(base, [sample], True)) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_state_of_other_settings_is_not_resumed(base, splits, tmp_path) -> None:
    with pytest.raises(Killed):
        run_trial(base, splits, LONG, lambda report: (_ for _ in ()).throw(Killed()), output=tmp_path)
    other = replace(LONG, learning_rate=2e-3)
    assert train(base, splits, other, tmp_path)[-1].metrics == train(base, splits, other)[-1].metrics


def test_a_profile_counts_every_second_once_and_changes_no_number(base, splits, tmp_path) -> None:
    settings = replace(SHORT, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    plain, told = train(base, splits, settings), []
    was = torch.distributed.all_reduce

    def report(message: EpochReport) -> bool:
        told.append(message)
        time.sleep(0.2)  # time of the study, not of the trial
        return False

    run_trial(base, splits, settings, report, output=tmp_path, profile=True, trace=True)
    assert [one.metrics for one in told] == [one.metrics for one in plain]
    seconds = told[-1].seconds
    inside = sum(seconds[f"profile_{name}"] for name in ("data", "forward", "backward", "optimizer", "communication"))
    assert 0 < inside <= seconds["train"]
    assert seconds["profile_evaluation"] + seconds.get("profile_encoder", 0) <= seconds["evaluation"] + seconds["train"]
    assert 0.2 * (len(told) - 1) <= seconds["profile_idle"] <= seconds["report"]
    assert torch.distributed.all_reduce is was
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("backward") >= 3 and "aten::mm" in names


def test_a_loss_that_is_not_finite_fails_before_the_step(base, splits, monkeypatch) -> None:
    forward = engine_module.AnswerLoss.forward
    monkeypatch.setattr(engine_module.AnswerLoss, "forward", lambda *args: forward(*args) * float("nan"))
    with pytest.raises(TrialFailed, match="nan in step 1"):
        train(base, splits, SHORT)


def test_images_of_like_size_share_a_micro_batch(base, tmp_path, monkeypatch) -> None:
    """With two alternating sizes no micro-batch mixes them, and the step equals that of unsorted images."""
    from PIL import Image

    from train_fn.trial import steps

    samples = []
    for number in range(8):
        path = tmp_path / f"{number}.png"
        Image.effect_noise((140, 140) if number % 2 else (252, 224), 60).convert("RGB").save(path)
        samples.append(Sample(images=(str(path),), question="What is it?", answer="Malignant", label=0))
    splits = Splits(train=samples, validation=samples, test=samples, tasks=closed_set(["Malignant"]))
    settings = replace(SHORT, max_steps=1, lora_dropout=0.0, per_device_train_batch_size=2,
                       gradient_accumulation_steps=4)  # fmt: skip
    assert settings.global_batch_size == 8
    batches: list[list[int]] = []
    collate_plainly = steps.collate

    def spy(base, chosen, *others, **options):
        batches.append([int(Path(sample.image).stem) for sample in chosen])
        return collate_plainly(base, chosen, *others, **options)

    monkeypatch.setattr(steps, "collate", spy)
    sorted_loss = train(base, splits, settings)[0].metrics["train_loss"]
    assert sorted(number for batch in batches for number in batch) == list(range(8))
    assert all(len({number % 2 for number in batch}) == 1 for batch in batches), batches
    monkeypatch.setattr(steps, "prompt_size", lambda base, sample: 0)
    batches.clear()
    assert train(base, splits, settings)[0].metrics["train_loss"] == pytest.approx(sorted_loss, rel=1e-5)
    assert any(len({number % 2 for number in batch}) == 2 for batch in batches)
