"""A winner in the hands of others: plain PEFT, transformers' pipeline after merging, and the rules of servers."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, pipeline

from train_fn.data.decision import softmax
from train_fn.data.images import read_image
from train_fn.model.base import load_base
from train_fn.model.checkpoint import resolve_model
from train_fn.model.processors import PROCESSOR, load_processor, saved_processor
from train_fn.predict import main
from train_fn.serving import AS_ADAPTER, LORA_RANKS, MERGED, Served, check_sglang, check_vllm
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.loop import run_trial
from train_fn.trial.scoring import score_adapter

TRIAL = TrialSettings(num_train_epochs=1, lora_r=8, lora_alpha=8, learning_rate=1e-3)
TRIALS = {"lora": TRIAL, "projector": replace(TRIAL, train_projector=True, projector_learning_rate=1e-3)}
FIXTURES = os.environ.get("HULUMED_FIXTURES", "")


def run(*argv: object) -> str:
    """Standard output of `train_fn.predict`, which must end well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, argv)]) == 0
    return out.getvalue()


@pytest.fixture(scope="module", params=TRIALS)
def winner(request, base, splits, tmp_path_factory) -> tuple[Path, str, np.ndarray]:
    """An adapter, whether it has a projector, and its probabilities of test images, which are smaller than the base's
    own. `base` has made the process group."""
    base = load_base(ModelSettings(max_image_tokens=64), torch.device("cpu"))
    few = replace(splits, train=splits.train[:16], test=splits.test[:4])
    output = tmp_path_factory.mktemp("winner")
    run_trial(base, few, TRIALS[request.param], lambda report: False, output=output)
    adapter = output / "final_model"
    return adapter, request.param, softmax(score_adapter(base, few, "test", 16, adapter)["scores"])


def probabilities(model: Any, processor: Any, splits: Any) -> np.ndarray:
    """Of the candidates for four test images, by nothing but a model and a processor: by the log-likelihood of each
    answer and the end of its turn."""
    rows = []
    for sample in splits.test[:4]:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
        row = []
        for answer in splits.candidates:
            options: Any = {"images": [read_image(sample.image)], "return_tensors": "pt"}
            inputs = processor(text=[prompt + answer + "<|im_end|>"], **options)
            start = processor(text=[prompt], **options)["input_ids"].shape[1]
            with torch.no_grad():
                found = model(**inputs).logits[0].float().log_softmax(-1)
            ids = inputs["input_ids"][0]
            row.append(sum(found[n - 1, ids[n]].item() for n in range(start, len(ids))))
        rows.append(row)
    return softmax(np.array(rows))


def test_plain_peft_gives_the_studys_probabilities(winner, splits) -> None:
    adapter, kind, wanted = winner
    base = AutoModelForImageTextToText.from_pretrained(resolve_model("nano"), dtype=torch.float32)
    processor = load_processor(adapter)
    untouched = probabilities(base, processor, splits)
    model = PeftModel.from_pretrained(base, adapter).eval()
    assert PeftConfig.from_pretrained(adapter).modules_to_save == (["projector"] if kind == "projector" else None)
    assert np.allclose(probabilities(model, processor, splits), wanted, atol=1e-4)
    assert np.abs(untouched - wanted).max() > 1e-3


def test_a_pipeline_of_the_merged_model_gives_the_studys_probabilities(winner, splits, tmp_path) -> None:
    adapter, _, wanted = winner
    run("--adapter", adapter, "--merge-into", tmp_path / "merged", "--dtype", "float32")
    processor = load_processor(tmp_path / "merged")
    made = pipeline("image-text-to-text", model=str(tmp_path / "merged"), processor=processor, dtype=torch.float32)
    assert np.allclose(probabilities(made.model, made.processor, splits), wanted, atol=1e-4)
    parts = [{"type": "image", "image": read_image(splits.test[0].image)}]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": splits.test[0].question}]}
    answer = made([turn], max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer.split("<")[0].strip() in splits.candidates


def test_an_adapter_names_no_path_of_this_machine(winner) -> None:
    adapter, _, _ = winner
    stored = json.loads((adapter / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "nano"
    assert "model.language_model.layers.0.self_attn.q_proj" in stored["target_modules"]
    assert len(stored["target_modules"]) == 4 * 7
    for path in adapter.glob("*.json"):
        assert str(resolve_model("nano")) not in path.read_text(), path


def test_the_processor_has_the_video_part_that_its_class_wants(winner) -> None:
    adapter, _, _ = winner
    stored = json.loads((adapter / PROCESSOR).read_text())
    assert stored["processor_class"] == "VideoLlama3Processor"
    assert stored["video_processor"]["video_processor_type"] == "VideoLlama3VideoProcessor"
    assert stored["image_processor"]["size"]["longest_edge"] == 64 * 14 * 14


def test_auto_processor_loads_an_adapters_folder(winner) -> None:
    pytest.importorskip("torchvision", reason="transformers' video processors need it")
    from transformers import AutoProcessor

    adapter, _, _ = winner
    assert AutoProcessor.from_pretrained(adapter).image_processor.size["longest_edge"] == 64 * 14 * 14


def test_a_bases_own_video_part_is_kept(tmp_path) -> None:
    own = {"video_processor_type": "VideoLlama3VideoProcessor", "max_frames": 7}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(own))
    files = saved_processor(load_processor(resolve_model("nano")), tmp_path)
    assert json.loads(files[PROCESSOR])["video_processor"] == own


@pytest.mark.skipif(not FIXTURES, reason="no HULUMED_FIXTURES")
def test_a_merged_hulumed_model_loads_in_transformers_layout(base, splits, tmp_path) -> None:
    upright = ModelSettings(model=f"{FIXTURES}/checkpoint", max_image_tokens=64, upright_images=True)
    hulumed = load_base(upright, torch.device("cpu"))
    few = replace(splits, train=splits.train[:16], test=splits.test[:4])
    run_trial(hulumed, few, TRIALS["projector"], lambda report: False, output=tmp_path)
    adapter, merged = tmp_path / "final_model", tmp_path / "merged"
    wanted = softmax(score_adapter(hulumed, few, "test", 16, adapter)["scores"])
    vllm, sglang = run("--adapter", adapter, "--check-serving").split("\n\n")
    assert all("--merge-layout transformers" in text and "own layout" in text for text in (vllm, sglang))
    run("--adapter", adapter, "--merge-into", merged, "--merge-layout", "transformers", "--dtype", "float32")
    made = pipeline("image-text-to-text", model=str(merged), processor=load_processor(merged), dtype=torch.float32)
    assert type(made.model).__name__ == "VideoLlama3ForConditionalGeneration"
    assert np.allclose(probabilities(made.model, made.processor, splits), wanted, atol=1e-4)


# ------------------------------------------------------------------------------------------------ servers

QWEN = Served(
    architecture="Qwen2_5_VLForConditionalGeneration",
    hulumed=False,
    r=64,
    use_dora=False,
    use_rslora=False,
    full_modules=(),
    listed=True,
    language=frozenset({"q_proj", "v_proj", "gate_proj", "up_proj"}),
    others=False,
)


@pytest.mark.parametrize(
    ("change", "vllm", "sglang"),
    [
        ({}, "", ""),
        ({"full_modules": ("merger",)}, "--projector-lora", "without an error"),
        ({"use_dora": True}, "DoRA", "DoRA"),
        ({"use_rslora": True}, "", "rsLoRA"),
        ({"r": 513}, "largest, 512", ""),
        ({"others": True}, "", "vision tower"),
        ({"others": True, "architecture": "InternVLForConditionalGeneration"}, "without an error", "InternVL"),
        ({"architecture": "VideoLlama3ForConditionalGeneration"}, "", "VideoLlama3"),
        ({"architecture": "AriaForConditionalGeneration"}, "no LoRA", "Aria"),
        ({"listed": False}, "", "regular expression"),
        ({"language": frozenset({"k_proj"})}, "", "q_proj and v_proj"),
        ({"language": frozenset({"up_proj"})}, "", "gate_proj"),
        ({"hulumed": True}, "own layout", "own layout"),
    ],
)
def test_what_servers_take(change, vllm, sglang) -> None:
    served = replace(QWEN, **change)
    for verdict, reason in ((check_vllm(served), vllm), (check_sglang(served), sglang)):
        assert verdict.takes == (MERGED if reason else AS_ADAPTER)
        assert reason in "; ".join(verdict.reasons) and bool(verdict.reasons) == bool(reason)


@pytest.mark.parametrize(("r", "limit"), [(1, 1), (4, 8), (64, 64), (65, 128), (257, 320), (512, 512)])
def test_vllm_gets_the_next_rank_that_it_allows(r, limit) -> None:
    options = check_vllm(replace(QWEN, r=r, others=True)).options
    assert options == ["--enable-lora", "--max-lora-rank", str(limit), "--enable-tower-connector-lora"]
    assert limit in LORA_RANKS


def test_check_serving_prints_the_commands(winner) -> None:
    adapter, kind, _ = winner
    vllm, sglang = run("--adapter", adapter, "--check-serving").split("\n\n")
    assert "takes it merged only" in sglang and f"--adapter {adapter} --merge-into MERGED" in sglang
    if kind == "projector":
        assert "takes it merged only" in vllm and "modules_to_save" in vllm and "vllm serve MERGED" in vllm
    else:
        assert "takes it as an adapter" in vllm and "--max-lora-rank 8 --model-impl transformers" in vllm
        assert f"--lora-modules study={adapter}" in vllm and '"longest_edge": 12544' in vllm


def test_check_serving_is_not_done_beside_a_merge(winner, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--adapter", str(winner[0]), "--check-serving", "--merge-into", str(tmp_path / "merged")])
    assert refused.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def test_check_serving_wants_the_bases_configuration(winner, capsys) -> None:
    adapter, _, _ = winner
    assert main(["--adapter", str(adapter), "--check-serving", "--model", "lab/absent"]) == 2
    assert "name its folder with `--model`" in capsys.readouterr().err
