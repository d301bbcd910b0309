"""Hulu-Med checkpoints against arrays that the original implementation computed.

HULUMED_FIXTURES names a folder with `checkpoint/`, `images/` and `reference/`; without it these tests are skipped. What
needs no reference is tested on the published configuration at the end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import smart_resize

from train_fn.data.samples import Sample
from train_fn.model import hulumed
from train_fn.model.base import load_base
from train_fn.model.batches import answer_losses, collate, forward_hidden
from train_fn.model.prompts import prompt_text
from train_fn.settings import ModelSettings

FIXTURES = os.environ.get("HULUMED_FIXTURES", "")
needs_fixtures = pytest.mark.skipif(not FIXTURES, reason="HULUMED_FIXTURES does not name the reference arrays")
ROOT = Path(FIXTURES)


@pytest.fixture(scope="module")
def tiny():
    return load_base(ModelSettings(model=str(ROOT / "checkpoint"), dtype="float32"), torch.device("cpu"))


def references() -> list[tuple[Path, dict, Sample]]:
    meta = json.loads((ROOT / "reference" / "meta.json").read_text())
    found = []
    for number, (told, answer) in enumerate(zip(meta["samples"], meta["answers"], strict=True)):
        arrays = dict(np.load(ROOT / "reference" / f"sample{number}.npz"))
        image = ROOT / "images" / told["file"]
        found.append((image, arrays, Sample((str(image),), meta["question"], answer, number)))
    assert len(found) == 3
    return found


def apart(ours: torch.Tensor, theirs: np.ndarray) -> float:
    assert tuple(ours.shape) == theirs.shape
    return float((ours.float().numpy() - theirs).__abs__().max())


@needs_fixtures
def test_pixels_token_ids_and_labels_are_equal(tiny) -> None:
    for image, arrays, sample in references():
        found = tiny.processor.image_processor([Image.open(image)], return_tensors="np")
        assert np.array_equal(found["pixel_values"], arrays["pixel_values"])
        assert np.array_equal(found["image_grid_thw"], arrays["grid_sizes"])
        batch = collate(tiny, [sample], with_answers=True)
        assert batch["input_ids"][0].tolist() == arrays["train_input_ids"].tolist()
        assert batch["labels"][0].tolist() == arrays["train_labels"].tolist()
        prompt = collate(tiny, [sample], with_answers=False)
        assert prompt["input_ids"][0].tolist() == arrays["prompt_input_ids"].tolist()


@needs_fixtures
@torch.no_grad()
def test_features_logits_and_loss(tiny) -> None:
    for _, arrays, sample in references():
        batch = collate(tiny, [sample], with_answers=True)
        assert apart(batch["vision_features"], arrays["vision_features"]) < 5e-5
        projected = tiny.model.get_submodule(tiny.projector)(batch["vision_features"])
        assert apart(projected, arrays["projector_features"]) < 5e-5
        logits = tiny.model.get_output_embeddings()(forward_hidden(tiny, batch).last_hidden_state)[0]
        assert apart(logits, arrays["train_logits"]) < 5e-5
        assert answer_losses(tiny, batch).item() == pytest.approx(arrays["loss"].item(), abs=5e-5)


@needs_fixtures
@torch.no_grad()
def test_a_padded_batch_equals_its_samples(tiny) -> None:
    samples = [sample for _, _, sample in references()]
    reference = dict(np.load(ROOT / "reference" / "batch3.npz"))
    batch = collate(tiny, samples, with_answers=True)
    assert np.array_equal(batch["input_ids"].numpy()[batch["attention_mask"].numpy() > 0],
                          reference["input_ids"][reference["attention_mask"] > 0])  # fmt: skip
    assert np.array_equal(batch["labels"].numpy(), reference["labels"])
    losses = answer_losses(tiny, batch)
    for loss, (_, arrays, _) in zip(losses, references(), strict=True):
        assert loss.item() == pytest.approx(arrays["loss"].item(), abs=5e-5)


@needs_fixtures
@torch.no_grad()
def test_eight_greedy_tokens_are_equal(tiny) -> None:
    for _, arrays, sample in references():
        inputs = tiny.processor(
            images=[Image.open(sample.image).convert("RGB")],
            text=[prompt_text(tiny.processor, sample.prompt)],
            return_tensors="pt",
        )
        told = tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert told[0, inputs["input_ids"].shape[1] :].tolist() == arrays["generated_ids"].tolist()


@needs_fixtures
def test_every_resize_case() -> None:
    cases = json.loads((ROOT / "reference" / "resize_cases.json").read_text())
    assert len(cases) == 40
    found = json.loads((ROOT / "checkpoint" / "preprocessor_config.json").read_text())
    patch = found["patch_size"]
    for case in cases:
        limits = {"min_pixels": found["min_tokens"] * patch**2, "max_pixels": case["max_tokens"] * patch**2}
        for key, (height, width) in (
            ("official_pil_target_hw", (case["width"], case["height"])),
            ("official_numpy_target_hw", (case["height"], case["width"])),
        ):
            assert list(smart_resize(height, width, factor=patch, **limits)) == case[key]


@needs_fixtures
@pytest.mark.parametrize("upright", [False, True])
def test_upright_keeps_the_shape(upright) -> None:
    settings = ModelSettings(model=str(ROOT / "checkpoint"), upright_images=upright, max_image_tokens=64)
    base = load_base(settings, torch.device("cpu"))
    found = base.processor.image_processor([Image.new("RGB", (560, 280))], return_tensors="np")
    _, height, width = found["image_grid_thw"][0]
    assert bool(width > height) is upright
    assert height * width <= 64


@needs_fixtures
def test_rotary_frequencies_stay_float32_in_bfloat16() -> None:
    base = load_base(ModelSettings(model=str(ROOT / "checkpoint"), dtype="bfloat16"), torch.device("cpu"))
    buffers = {name: buffer for name, buffer in base.model.named_buffers() if "inv_freq" in name}
    assert len(buffers) >= 2
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())
    assert all(parameter.dtype == torch.bfloat16 for parameter in base.model.parameters())


@needs_fixtures
@pytest.mark.parametrize("change", ["sharded", "lm_head", "older names"])
def test_other_ways_the_weights_are_published(tiny, tmp_path, change) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(ROOT / "checkpoint", tmp_path / "model", copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    if change == "lm_head":
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
                  folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    elif change == "older names":
        renamed = {n.replace("model.vision_encoder.", "model.vision_encoder.vision_encoder."): t
                   for n, t in tensors.items()}  # fmt: skip
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    again = load_base(ModelSettings(model=str(folder), dtype="float32"), torch.device("cpu"))
    ours, theirs = dict(tiny.model.named_parameters()), dict(again.model.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_fixtures
def test_a_missing_tensor_is_an_error(tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(ROOT / "checkpoint", tmp_path / "model", copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="norm"):
        load_base(ModelSettings(model=str(folder)), torch.device("cpu"))


# The published Hulu-Med-4B: github.com/ZJUI-AI4H/Hulu-Med and its model card.
PUBLISHED_4B = {
    "model_type": "hulumed_qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 5000000,
    "tie_word_embeddings": True,
    "image_token_index": 151669,
    "vision_encoder_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


def test_real_size_maps_tensor_by_tensor() -> None:
    from transformers import VideoLlama3ForConditionalGeneration

    with torch.device("meta"):
        model = VideoLlama3ForConditionalGeneration(hulumed.native_config(PUBLISHED_4B))
    model.tie_weights()
    names = dict(model.named_parameters())  # the tied head is counted once
    originals = {hulumed.original_name(name): parameter for name, parameter in names.items()}
    assert len(originals) == len(names) == 838
    assert sum(parameter.numel() for parameter in originals.values()) == 4_444_123_376
    assert originals["model.embed_tokens.weight"].shape == (151936, 2560)
    assert originals["model.vision_encoder.encoder.layers.26.mlp.fc1.weight"].shape == (4304, 1152)
    assert originals["model.mm_projector.readout.2.weight"].shape == (2560, 2560)
    assert originals["model.layers.35.self_attn.q_proj.weight"].shape == (4096, 2560)


def test_names_go_both_ways() -> None:
    for name in (
        "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.projector.readout.0.bias",
        "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    ):
        assert hulumed.original_name(name) != name
        assert hulumed.native_name(hulumed.original_name(name)) == name


def test_another_text_model_is_refused() -> None:
    with pytest.raises(ValueError, match="hulumed_gemma"):
        hulumed.native_config(PUBLISHED_4B | {"model_type": "hulumed_gemma"})
