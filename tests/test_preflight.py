"""Faults that would fail every trial are found before Ray: files, template, words, images and modules of the base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train_fn.data.phantoms import CLASSES, QUESTION, phantom
from train_fn.data.samples import PARTS, Sample, Splits, closed_set
from train_fn.model.checkpoint import base_hash, file_problems, resolve_model
from train_fn.model.preflight import base_problems
from train_fn.settings import ModelSettings, TrialSettings


def splits_of(folder: Path, questions: tuple[str, ...] = (QUESTION,), answers: tuple[str, ...] = CLASSES) -> Splits:
    samples = []
    for number, answer in enumerate(answers):
        path = folder / f"{number}.png"
        Image.fromarray(phantom(np.random.default_rng(number), number % 3)[0]).save(path)
        samples += [Sample((str(path),), question, answer, number) for question in questions]
    return Splits(tuple(samples), tuple(samples), tuple(samples), closed_set(answers))


def problems_of(splits: Splits, model: str = "nano", trial: dict[str, Any] | None = None, **parts: str) -> list[str]:
    return base_problems(ModelSettings(model=model, **parts), TrialSettings(**trial or {}), splits)  # type: ignore[arg-type]


def test_the_shipped_base_passes(tmp_path) -> None:
    assert problems_of(splits_of(tmp_path)) == []
    two = splits_of(tmp_path, ("Is a mass visible?", "Is it malignant?"), ("no", "yes"))
    assert problems_of(two) == []


# ------------------------------------------------------------------------------------------------ words


def opened(splits: Splits) -> Splits:
    """The splits with open answers."""
    parts = {name: tuple(replace(s, label=-1) for s in getattr(splits, name)) for name in PARTS}
    return Splits(**parts)


def test_a_placeholder_stands_where_its_image_belongs(tmp_path) -> None:
    assert problems_of(splits_of(tmp_path, ("<image>\nNormal, benign or malignant?",))) == []  # LLaVA's


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nNormal, <image> or malignant?",  # more than images
        "What does <|vision_start|><|image_pad|><|vision_end|> show?",  # Qwen's
        "<start_of_image> What is it?",  # Gemma's
        "What is it? <IMG_CONTEXT>",  # InternVL's
        "What is it?<|im_end|>",  # a token of the base's own
    ],
)
def test_placeholders_and_special_tokens_are_no_words(tmp_path, text) -> None:
    (problem,) = problems_of(splits_of(tmp_path, (text,)))
    assert "question" in problem and "(9x) holds '<" in problem and "take it out" in problem
    (problem,) = problems_of(splits_of(tmp_path, answers=(text, "no", "yes")))
    assert "answer" in problem and "(3x) holds '<" in problem


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (("正常", "良性", "恶性"), ["none of '正常'", "none of '良性'", "none of '恶性'"]),
        (("Benign", "良性"), ["none of '良性'"]),
        (("Benign tumour", "Benign tumour, probably"), ["'Benign tumour' and 'Benign tumour, probably'"]),
        (("Benign 良", "Benign", "Normal 正", "Normal"), ["'Benign 良' and 'Benign'", "'Normal 正' and 'Normal'"]),
    ],
)
def test_answers_that_the_tokenizer_cannot_tell_apart(tmp_path, answers, words) -> None:
    problems = problems_of(splits_of(tmp_path, answers=answers))
    assert len(problems) == len(words) and all(word in text for word, text in zip(words, problems, strict=True))


def test_free_answers_may_become_the_same_but_not_nothing(tmp_path) -> None:
    splits = splits_of(tmp_path, answers=("Benign tumour", "Benign tumour, probably"))
    assert problems_of(opened(splits)) == []
    (problem,) = problems_of(opened(splits_of(tmp_path, answers=("良性", "Benign"))))
    assert "knows none of '良性'" in problem


def warnings_of(splits: Splits) -> tuple[list[str], list[str]]:
    """Problems and warnings with the nano base."""
    said: list[str] = []
    return base_problems(ModelSettings(), TrialSettings(), splits, said.append), said


def test_answers_that_differ_after_an_unknown_word_are_refused_with_that_word(tmp_path) -> None:
    (problem,) = problems_of(splits_of(tmp_path, answers=("Benign tumour left", "Benign tumour right", "Normal")))
    assert "same tokens of 'Benign tumour left' and 'Benign tumour right'" in problem and "'tumour'" in problem


def test_an_answer_that_ends_at_a_special_token_is_refused(tmp_path, model) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"]
    added.append(added[0] | {"id": 1 + max(tokenizer["model"]["vocab"].values()), "content": "\n\n", "special": True})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    problems = problems_of(splits_of(tmp_path, answers=("Benign\n\nmass", "Normal", "Malignant")), str(model))
    assert len(problems) == 1 and r"'Benign\n\nmass' ends at '\n\n', a special token" in problems[0]


def test_a_share_of_unknown_words_is_a_warning_with_the_words(tmp_path) -> None:
    known = splits_of(tmp_path, ("Please determine the diagnostic result.",))
    assert warnings_of(known) == ([], [])
    asked = splits_of(tmp_path, ("Please determine the xylophone: xylophone or zeppelin?",))
    problems, (warning,) = warnings_of(asked)
    assert problems == [] and "of the tokens of the questions" in warning
    assert "'xylophone' (18x), 'zeppelin' (9x)" in warning and "determine" not in warning
    # 2 of 60 tokens are below 5 %.
    texts = ("Please determine the result " * 9 + "zeppelin",)
    assert warnings_of(splits_of(tmp_path, texts)) == ([], [])


def test_an_answer_that_ends_at_an_unknown_word_is_a_warning(tmp_path) -> None:
    splits = splits_of(tmp_path, answers=("Benign xylophone mass", "Normal", "Malignant"))
    problems, warnings = warnings_of(splits)
    assert problems == [] and len(warnings) == 2 and "tokens of the answers" in warnings[0]
    assert "3 of 9 answers end" in warnings[1] and "'Benign xylophone mass' (3x) ends before 'xylophone'" in warnings[1]
    assert warnings_of(opened(splits)) == (problems, warnings)


def test_a_study_logs_the_warnings_before_it_starts(tmp_path) -> None:
    from tune.config.cli import parse
    from tune.plan.prepare import prepare

    entries = []
    for number in range(30):
        Image.fromarray(phantom(np.random.default_rng(number), number % 3)[0]).save(tmp_path / f"{number}.png")
        answer = CLASSES[number % 3]
        entries.append({"image": f"{number}.png", "text": "xylophone result?", "answer": answer, "label": number % 3})
    (tmp_path / "m.json").write_text(json.dumps(entries))
    said: list[str] = []
    prepare(parse(["--data", str(tmp_path / "m.json"), "--results", str(tmp_path / "r"), "--name", "s"]), said.append)
    assert any("'xylophone' (30x)" in line for line in said)


def test_a_question_of_unknown_words(tmp_path) -> None:
    (problem,) = problems_of(splits_of(tmp_path, ("良性？",)))
    assert "each question must hold words" in problem


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the nano base."""
    return Path(shutil.copytree(resolve_model("nano"), tmp_path / "model"))


def shard(model: Path) -> None:
    """Its weights in two files, without the second."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def lost_shard(model: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def swapped_shards(model: Path) -> None:
    shard(model)
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors")


def annex(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../.git/annex/objects/xx/MD5E-s1--0.safetensors")


def tensors(edit: Callable[[dict, str], object]) -> Callable[[Path], object]:
    def rewrite(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(model / "model.safetensors")
        edit(found, next(name for name in found if "layers.1" in name and "q_proj" in name))
        save_file(found, model / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def config(**values: object) -> Callable[[Path], object]:
    def rewrite(model: Path) -> None:
        stored = json.loads((model / "config.json").read_text())
        stored["text_config"] |= values
        (model / "config.json").write_text(json.dumps(stored))

    return rewrite


def written(name: str, content: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(content)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 800232\n"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a Git LFS pointer": (written("model.safetensors", LFS), "Git LFS's pointer"),
    "a git-annex pointer": (written("model.safetensors", "/annex/objects/MD5E-s1--0\n"), "git-annex's pointer"),
    "git-annex's link": (annex, "a link to nowhere"),
    "cut off": (lambda model: os.truncate(model / "model.safetensors", 100_000), "whole safetensors file"),
    "empty": (written("model.safetensors", ""), "whole safetensors file"),
    "a shard lost": (lost_shard, "model-00002-of-00002.safetensors must hold weights, but is missing"),
    "a shard twice": (swapped_shards, "tensors are not where it says"),
    "a tensor missing": (
        tensors(lambda t, name: t.pop(name)),
        "1 are missing or of another shape, model.language_model",
    ),
    "a tensor of another shape": (
        tensors(lambda t, name: t.update({name: t[name][:7].clone()})),
        "1 are missing or of another shape, model.",
    ),
    "another width": (config(hidden_size=64), "are missing or of another shape"),
    "a width that is text": (config(hidden_size="wide"), "'hidden_size' expected int, got str"),
    "a depth below zero": (config(num_attention_heads=0), "must be a model that transformers can load"),
    "a configuration cut off": (written("config.json", '{"model_type": '), "must be JSON"),
    "a tokenizer that is a list": (written("tokenizer.json", "[]"), "must hold a JSON dict"),
    "a tokenizer of nothing": (written("tokenizer.json", "{}"), "a tokenizer and a processor that load"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "a tokenizer and a processor that load"),
    "no chat template": (lambda model: (model / "chat_template.jinja").unlink(), "chat template must render"),
    "a template that is broken": (written("chat_template.jinja", "{% for %}"), "chat template must render"),
    "a template without the question": (
        written("chat_template.jinja", "<|image_pad|>"),
        "must write the question, but leaves out",
    ),
    "a template that raises": (
        written("chat_template.jinja", "{{ raise_exception('no system turn') }}"),
        "no system turn",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model_is_named_in_one_sentence(tmp_path, model, spoil, words) -> None:
    spoil(model)
    (problem,) = problems_of(splits_of(tmp_path), str(model))
    assert words in problem and "\n" not in problem


def test_complete_shards_pass(model) -> None:
    shard(model)
    assert file_problems(model) == []


def test_the_cases_own_models(tmp_path) -> None:
    """The published layout of Hulu-Med, if its fixtures are there."""
    if not (fixtures := os.environ.get("HULUMED_FIXTURES")):
        pytest.skip("no HULUMED_FIXTURES")
    assert problems_of(splits_of(tmp_path), f"{fixtures}/checkpoint") == []


# ------------------------------------------------------------------------------------------------ images and modules


def test_images_that_the_processor_refuses_are_found_among_those_it_takes(tmp_path) -> None:
    splits = splits_of(tmp_path)
    strips = []
    for number, size in enumerate([(900, 4), (5, 1200), (300, 200), (2000, 9)]):
        Image.new("L", size, 90).save(tmp_path / f"strip{number}.png")
        strips.append(Sample((str(tmp_path / f"strip{number}.png"),), QUESTION, CLASSES[0], 0))
    problems = problems_of(replace(splits, test=(*splits.test, *strips)))
    names = {Path(problem.split()[1]).name for problem in problems}
    assert names == {"strip0.png", "strip1.png", "strip3.png"} and len(problems) == 3
    assert all("accepted by the model's processor" in problem and "aspect ratio" in problem for problem in problems)


def test_every_size_is_counted_once(tmp_path, monkeypatch) -> None:
    """An image of a usual shape that the processor's arithmetic refuses, and its refusal when it is processed."""
    import transformers.models.video_llama_3.image_processing_pil_video_llama_3 as processing

    plain, counted = processing.smart_resize, []

    def smart_resize(height: int, width: int, *args: Any, **options: Any) -> Any:
        counted.append((width, height))
        if (width, height) == (300, 200):
            raise ValueError("no multiple of anything")
        return plain(height, width, *args, **options)

    monkeypatch.setattr(processing, "smart_resize", smart_resize)
    splits, more = splits_of(tmp_path), []
    for number, size in enumerate([(300, 200), (900, 500), (60, 50), (300, 200), *[(310, 210)] * 20]):
        Image.new("L", size, 90).save(tmp_path / f"more{number}.png")
        more.append(Sample((str(tmp_path / f"more{number}.png"),), QUESTION, CLASSES[0], 0))
    problems = problems_of(replace(splits, test=(*splits.test, *more)))
    assert [Path(problem.split()[1]).name for problem in problems] == ["more0.png", "more3.png"]
    assert all("(300 x 200)" in text and "no multiple of anything" in text for text in problems)
    assert counted.count((310, 210)) == 1


def test_a_size_that_cannot_be_counted_but_is_processed_is_no_problem(tmp_path, monkeypatch) -> None:
    from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

    def broken(self: Any, height: int, width: int, images_kwargs: Any) -> int:
        raise AssertionError

    monkeypatch.setattr(VideoLlama3ImageProcessorPil, "get_number_of_image_patches", broken)
    assert problems_of(splits_of(tmp_path)) == []


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"vision_tower": "model.nowhere"}, ["vision tower"]),
        ({"projector": "x"}, ["projector"]),
        ({"vision_tower": "a", "projector": "b", "language_model": "c"}, ["vision", "projector", "language model"]),
    ],
)
def test_parts_that_the_model_lacks(tmp_path, parts, words) -> None:
    problems = problems_of(splits_of(tmp_path), **parts)
    assert len(problems) == len(words) and all(word in text for word, text in zip(words, problems, strict=True))


def test_faults_of_several_kinds_are_reported_together(tmp_path) -> None:
    names = {"lora_target_modules": ("q_proj", "v_porj")}
    words, modules = problems_of(splits_of(tmp_path, answers=("Benign", "良性")), trial=names)
    assert "良性" in words and "'v_porj'" in modules


def test_a_study_is_refused_before_its_folder_is_made(tmp_path) -> None:
    from tune.config.cli import parse
    from tune.config.paths import SettingsError
    from tune.plan.prepare import prepare

    said: list[str] = []
    argv = ["--num-phantoms", "30", "--results", str(tmp_path / "results"), "--name", "s"]
    with pytest.raises(SettingsError) as refused:
        prepare(parse([*argv, "--lora-target-modules", "q_proj,v_porj"]), said.append)
    (problem,) = refused.value.problems
    assert "'v_porj'" in problem and "choose from down_proj" in problem
    assert not (tmp_path / "results" / "s").exists()


# ------------------------------------------------------------------------------------------------ the base's hash

CHANGES: dict[str, Callable[[Path], object]] = {
    "chat template": written("chat_template.jinja", "{{ messages }}"),
    "a tokenizer of another name": written("tokenizer.model", "pieces"),
    "words": written("vocab.txt", "words"),
    "a template in a folder": lambda model: (
        (model / "additional_chat_templates").mkdir(),
        (model / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}"),
    ),
    "a file taken away": lambda model: (model / "chat_template.jinja").unlink(),
    "weights": lambda model: rewrite(model / "model.safetensors"),
}


def rewrite(path: Path) -> None:
    """Another byte, the same size and times."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_hash_sees_every_file_that_decides_a_prompt_or_weights(model, change) -> None:
    before = base_hash(model)
    assert base_hash(model) == before
    change(model)
    assert base_hash(model) != before


def test_the_hash_does_not_see_documents(model) -> None:
    before = base_hash(model)
    for name in ("README.md", ".gitattributes", "picture.png", "modeling_x.py"):
        (model / name).write_text("x")
    (model / ".cache").mkdir()
    (model / ".cache" / "download.json").write_text("{}")
    assert base_hash(model) == before


def test_weights_are_read_once_while_nothing_touches_them(model, monkeypatch) -> None:
    before = base_hash(model)
    monkeypatch.setattr(
        "train_fn.model.checkpoint.file_hash",
        lambda path: pytest.fail("read again") if path.suffix == ".safetensors" else "x",
    )
    assert base_hash(model) != before  # small files are read each time
