"""Packed rows and batches of unequal prompts: the same numbers as one sample at a time, and fewer tokens."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.model.attention import NAME, by_kernel, max_length, sdpa_or_packed
from train_fn.model.base import Base, load_base
from train_fn.model.batches import answer_losses, collate, forward_hidden, num_tokens
from train_fn.scoring import evaluation
from train_fn.scoring.answering import answer_samples
from train_fn.scoring.evaluation import generate, in_batches, predict, score_candidates
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.lora import adapted, adapter_layers

FIXTURES = os.environ.get("HULUMED_FIXTURES", "")
TRIAL = TrialSettings(lora_r=8, lora_alpha=16, lora_dropout=0.0, train_projector=True)
CANDIDATES = ("Normal", "Benign", "Malignant Benign", "Malignant Benign Normal")
SIZES = [(42, 42), (90, 60), (60, 120), (130, 40), (70, 70), (84, 126)]


@pytest.fixture(scope="module", params=["nano", "Hulu-Med"])
def base(request) -> Base:
    if request.param == "Hulu-Med" and not FIXTURES:
        pytest.skip("HULUMED_FIXTURES does not name a checkpoint")
    model = str(Path(FIXTURES) / "checkpoint") if request.param == "Hulu-Med" else ModelSettings().model
    return load_base(ModelSettings(model=model, dtype="float32"), torch.device("cpu"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Images of several sizes, several images a question, questions and answers of several lengths."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    images = []
    for number, (width, height) in enumerate(SIZES):
        images.append(str(folder / f"{number}.png"))
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(images[-1])
    questions = ("Which?", "Is it benign, malignant or normal?")
    made = [Sample((image,), questions[i % 2], CANDIDATES[i % 4], i % 4) for i, image in enumerate(images)]
    return [*made, Sample(tuple(images[:3]), questions[0], CANDIDATES[2], 2)]


@pytest.fixture(scope="module")
def adapter(base):
    """A trainable adapter that changes the output, and a trainable projector."""
    with adapted(base, TRIAL) as model:
        torch.manual_seed(0)
        for layer in adapter_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
        yield model


def gradients(model, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ packed rows


def test_a_packed_row_has_the_losses_and_gradients_of_a_padded_batch(base, samples, adapter) -> None:
    padded, packed = (collate(base, samples, with_answers=True, packed=packed) for packed in (False, True))
    lengths = padded["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 3 and packed["input_ids"].shape == (1, sum(lengths))
    wanted, found = answer_losses(base, padded), answer_losses(base, packed)
    assert found.shape == (len(samples),)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    theirs, ours = gradients(adapter, wanted), gradients(adapter, found)
    assert theirs.keys() == ours.keys() and any("projector" in name for name in ours)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-2
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_packed_sequence_does_not_see_its_neighbours(base, samples) -> None:
    with torch.no_grad():
        alone = torch.cat([answer_losses(base, collate(base, [one], True, packed=True)) for one in samples])
        together = answer_losses(base, collate(base, samples, True, packed=True))
        reversed_ones = answer_losses(base, collate(base, samples[::-1], True, packed=True))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reversed_ones.flip(0), alone, rtol=1e-6, atol=1e-6)


def test_only_the_language_model_has_the_attention_of_packed_rows(base) -> None:
    config = base.model.config
    assert config.get_text_config()._attn_implementation == NAME
    assert config.vision_config._attn_implementation == "sdpa"


def test_rows_are_packed_where_lengths_differ_and_the_base_allows_it(base, monkeypatch) -> None:
    assert base.packs([70, 80]) and not base.packs([70, 70]) and not base.packs([70])
    monkeypatch.setattr(base.model.config.get_text_config(), "attention_dropout", 0.1)
    assert not base.packs([70, 80])
    monkeypatch.undo()
    monkeypatch.setattr(base.model.config.get_text_config(), "layer_types", ["sliding_attention"])
    assert not base.packs([70, 80])


def test_the_kernels_longest_sequence_is_a_constant_for_usual_rows() -> None:
    assert {max_length(longest) for longest in (1, 700, 2600, 4096)} == {4096}
    assert [max_length(longest) for longest in (4097, 8192, 8193)] == [8192, 8192, 16384]


def test_a_row_on_a_gpu_is_one_call_of_the_kernel(monkeypatch) -> None:
    """The kernel's own definition, computed here: the call's arguments are what it needs."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    calls = []

    def kernel(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
        calls.append((longest_q, longest_k, window_size))
        ends = [ends_q.ends[i : i + 2] for i in range(len(ends_q.ends) - 1)]
        parts = [
            sdpa(*(t[a:b].transpose(0, 1) for t in (q, k, v)), is_causal=True, scale=scale, enable_gqa=enable_gqa)
            for a, b in ends
        ]
        return torch.cat(parts, 1).transpose(0, 1)

    monkeypatch.setattr("train_fn.model.attention.varlen_attn", kernel)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    on_gpu = SimpleNamespace(is_cuda=True, ends=[0, 4, 9])
    options = {"scaling": 0.3, "dropout": 0.0, "sliding_window": None}
    found, _ = sdpa_or_packed(None, q, k, v, None, cu_seq_lens_q=on_gpu, max_length_q=4096, **options)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    wanted, _ = sdpa_or_packed(None, q, k, v, None, cu_seq_lens_q=ends, max_length_q=4096, **options)
    assert calls == [(4096, 4096, (-1, 0))] and found.shape == wanted.shape == (1, 9, 4, 8)
    torch.testing.assert_close(found, wanted)


def test_the_kernels_call_is_one_graph_for_rows_of_any_length() -> None:
    """Traced, not run: there is no such kernel on a CPU."""
    graphs = []

    def traced(graph, inputs):
        graphs.append(graph)
        return lambda *inputs: (torch.empty(0),)

    compiled = torch.compile(by_kernel, backend=traced, fullgraph=True)
    for lengths in ([4, 5], [6, 3, 8], [30, 2, 7, 1]):
        q, k, v = (torch.randn(1, heads, sum(lengths), 8, requires_grad=True) for heads in (4, 2, 2))
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        for tensor in (q, k, v):
            torch._dynamo.mark_dynamic(tensor, 2)
        torch._dynamo.mark_dynamic(ends, 0)
        compiled(q, k, v, ends, max_length(max(lengths)), 0.3)
    assert len(graphs) == 1
    assert sum("_varlen_attn" in str(node.target) for node in graphs[0].graph.nodes) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_layer_takes_packed_rows(base, samples) -> None:
    layer = base.model.get_submodule(base.language_model).layers[0]
    batch = collate(base, samples, with_answers=True, packed=True)
    with torch.no_grad():
        wanted = answer_losses(base, batch)
        layer.forward = torch.compile(layer.forward, backend="aot_eager", dynamic=True)
        try:
            torch.testing.assert_close(answer_losses(base, batch), wanted, rtol=1e-6, atol=1e-6)
        finally:
            del layer.forward


# ------------------------------------------------------------------------------------------------ lengths, embeddings


def test_the_number_of_tokens_is_the_batchs_own(base, samples) -> None:
    for sample in samples:
        batch = collate(base, [sample], with_answers=True)
        assert num_tokens(base, sample) == batch["input_ids"].shape[1]


def test_embedded_features_are_the_inner_models_own_to_the_last_bit(base, samples, adapter) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    batch = collate(base, samples, with_answers=False)
    ours = forward_hidden(base, batch, use_cache=False).last_hidden_state
    projected = base.model.get_submodule(base.projector)(batch["vision_features"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": {"full_attention": None}, "use_cache": False}
    features = {"image": BaseModelOutputWithPooling(pooler_output=(projected,))}
    theirs = base.model.model(**inputs, mm_encoder_outputs=features).last_hidden_state
    assert torch.equal(ours, theirs)
    found, wanted = gradients(adapter, ours), gradients(adapter, theirs)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def likelihood(base: Base, sample: Sample, answer: str) -> float:
    """One sample, one candidate, one forward pass of the whole model."""
    batch = collate(base, [replace(sample, answer=answer)], with_answers=True)
    (places,) = (batch["labels"][0] != -100).nonzero(as_tuple=True)
    likely = base.model.get_output_embeddings()(forward_hidden(base, batch).last_hidden_state[0]).log_softmax(-1)
    return likely[places - 1, batch["labels"][0, places]].sum().item()


def written(base: Base, sample: Sample, most: int) -> str:
    """The answer of one sample, by a whole forward pass for each token."""
    batch = collate(base, [sample], with_answers=False)
    start, tokenizer = batch["input_ids"].shape[1], base.processor.tokenizer
    for _ in range(most):
        with torch.no_grad():
            hidden = forward_hidden(base, batch, use_cache=False).last_hidden_state[:, -1:]
        token = base.model.get_output_embeddings()(hidden).argmax(-1)
        batch["input_ids"] = torch.cat([batch["input_ids"], token], 1)
        if token.item() in evaluation.end_tokens(tokenizer):
            break
    return tokenizer.decode(batch["input_ids"][0, start:], skip_special_tokens=True).strip()


def test_scores_of_unequal_prompts_are_those_of_one_sample_at_a_time(base, samples, adapter) -> None:
    adapter.eval()
    found = score_candidates(base, samples, CANDIDATES)
    wanted = torch.tensor([[likelihood(base, sample, answer) for answer in CANDIDATES] for sample in samples])
    assert wanted.std(0).min() > 1e-3, "the prompts make a difference"
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    for row, sample in enumerate(samples):
        torch.testing.assert_close(found[row], score_candidates(base, [sample], CANDIDATES)[0], rtol=1e-6, atol=1e-5)
    assert torch.equal(found, score_candidates(base, samples, CANDIDATES))


def test_texts_of_unequal_prompts_are_those_of_one_sample_at_a_time(base, samples, adapter) -> None:
    adapter.eval()
    wanted = [written(base, sample, 12) for sample in samples]
    assert generate(base, samples, 12) == wanted and len(set(wanted)) > 1


def test_predictions_do_not_depend_on_the_size_of_the_batches(base, samples, adapter) -> None:
    splits = Splits(*[tuple(samples)] * 3, closed_set(CANDIDATES))
    one, many = (predict(base, samples, splits, size) for size in (1, 4))
    np.testing.assert_allclose(many["scores"], one["scores"], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-6, atol=1e-5)
    assert many["scores"].shape == (len(samples), len(CANDIDATES))


def test_answers_have_the_studys_scores_to_the_last_bit(base, samples, adapter) -> None:
    """The same samples in the same order, as `train_fn.predict` gets them for a study's test part."""
    splits = Splits(*[tuple(samples)] * 3, closed_set(CANDIDATES))
    study = predict(base, samples, splits, ModelSettings().per_device_eval_batch_size)["scores"]
    answers = list(answer_samples(base, samples, splits.by_name, 1))
    assert [answer.scores for answer in answers] == [tuple(row) for row in study]


def test_batches_are_of_one_task_and_of_like_lengths_within_the_limits(monkeypatch) -> None:
    lengths = {0: ("a", 50), 1: ("b", 10), 2: ("a", 20), 3: ("a", 21), 4: ("a", 22), 5: ("a", 40), 6: ("b", 9)}
    padded, equal = SimpleNamespace(needs_no_mask=True), SimpleNamespace(needs_no_mask=False)
    assert in_batches(padded, lengths, 3) == [[2, 3, 4], [0, 5], [1, 6]]
    assert in_batches(padded, dict(reversed(lengths.items())), 3) == [[2, 3, 4], [0, 5], [1, 6]]
    monkeypatch.setattr(evaluation, "MAX_PROMPT_TOKENS", 45)
    assert in_batches(padded, lengths, 3) == [[2, 3], [4], [5], [0], [1, 6]]  # a longer one goes alone
    assert in_batches(equal, lengths | {7: ("a", 20)}, 3) == [[0], [1], [2, 7], [3], [4], [5], [6]]
