"""An untrusted adapter's folder: the values that are used, and the refusal of all others in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from train_fn.data.phantoms import phantom
from train_fn.data.samples import closed_set
from train_fn.model.adapters import BadAdapter, read_config, read_shapes, read_task
from train_fn.model.targets import target_problems
from train_fn.predict import main
from train_fn.scoring.answering import answer_samples
from train_fn.settings import TrialSettings
from train_fn.trial.adapter_files import load_adapter, save_adapter
from train_fn.trial.lora import adapted
from train_fn.trial.outputs import save_task

TRIAL = TrialSettings(lora_r=4, lora_alpha=8, lora_target_modules=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def sound(base, splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained adapter on the nano base, as a trial writes it."""
    folder = tmp_path_factory.mktemp("adapter") / "final_model"
    with adapted(base, replace(TRIAL, train_projector=True)) as model:
        save_adapter(base, model, replace(TRIAL, train_projector=True), folder)
    save_task(base, splits, folder)
    return folder


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


def change(name: str, values: dict) -> Callable[[Path], object]:
    def write(adapter: Path) -> None:
        stored = json.loads((adapter / name).read_text())
        (adapter / name).write_text(json.dumps(stored | values))

    return write


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda adapter: (adapter / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def pipe(name: str) -> Callable[[Path], object]:
    def make(adapter: Path) -> None:
        (adapter / name).unlink()
        os.mkfifo(adapter / name)

    return make


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(adapter: Path) -> None:
        found = load_file(adapter / "adapter_model.safetensors")
        edit(found)
        save_file(found, adapter / "adapter_model.safetensors")

    return rewrite


def first(found: dict[str, torch.Tensor]) -> str:
    return next(name for name in found if name.endswith("lora_B.weight"))


def config(**values: object) -> Callable[[Path], object]:
    return change("adapter_config.json", values)


def task(**values: object) -> Callable[[Path], object]:
    return change("task.json", values)


def tasks(*changes: dict) -> Callable[[Path], object]:
    """A task.json with a sound task for each change, and the change in it."""
    sound = {"kind": "open", "candidates": [], "separator": "", "questions": ["Why?"]}
    return task(candidates=[], tasks=[sound | {"name": f"task {n}"} | change for n, change in enumerate(changes)])


def decision(**changes: object) -> Callable[[Path], object]:
    """A task.json with a sound decision, and changes in it."""
    sound = {"aim": "macro_f1", "scale": 1.0, "offsets": [0.0, 1.0], "rule": [], "positive": None, "threshold": None}
    return tasks({"kind": "binary", "candidates": ["no", "yes"], "decision": sound | changes}, {})


NANO = {"model": "nano"}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 800232\n"
WEIGHTS = "adapter_model.safetensors"
STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json"),
    "configuration cut off": (write("adapter_config.json", '{"r": '), "must be JSON"),
    "configuration that is a list": (write("adapter_config.json", "[]"), "must hold a JSON dict"),
    "configuration that is a pipe": (pipe("adapter_config.json"), "adapter_config.json"),
    "another method": (config(peft_type="IA3"), "`peft_type` must be LORA"),
    "rank beyond any memory": (config(r=10**9), "`r` must be a whole number from 1 to 4096"),
    "rank that is text": (config(r="64"), "`r` must be a whole number"),
    "rank true": (config(r=True), "`r` must be a whole number"),
    "rank of another adapter": (config(r=8), "rank 8, as adapter_config.json says, but their ranks are 4"),
    "scaling NaN": (config(lora_alpha=float("nan")), "`lora_alpha` must be a positive number"),
    "scaling negative": (config(lora_alpha=-1), "`lora_alpha` must be a positive number"),
    "dropout 1": (config(lora_dropout=1), "`lora_dropout` must be at least 0 and below 1"),
    "another initialisation": (config(init_lora_weights="pissa"), "`init_lora_weights` must be true or false"),
    "corda": (config(corda_config={"cache_file": "/etc/passwd"}), "`corda_config` must be switched off"),
    "eva": (config(eva_config={"rho": 2}), "`eva_config` must be switched off"),
    "loftq": (config(loftq_config={"loftq_bits": 4}), "`loftq_config` must be switched off"),
    "own classes": (config(auto_mapping={"parent_library": "os"}), "`auto_mapping` must be switched off"),
    "layers doubled": (config(layer_replication=[[0, 4], [0, 4]]), "`layer_replication` must be switched off"),
    "ranks by pattern": (config(rank_pattern={"(a+)+$": 8}), "`rank_pattern` must be switched off"),
    "a key of tomorrow": (config(tomorrow=1), "`tomorrow` must be switched off"),
    "targets that are a number": (config(target_modules=3), "`target_modules` must be text"),
    "no weights": (lambda adapter: (adapter / WEIGHTS).unlink(), "is missing"),
    "weights that are a pointer": (write(WEIGHTS, LFS), "Git LFS"),
    "weights that are a folder": (lambda a: ((a / WEIGHTS).unlink(), (a / WEIGHTS).mkdir()), "is no file"),
    "weights that are a pipe": (pipe(WEIGHTS), "is no file"),
    "weights cut off": (lambda a: os.truncate(a / WEIGHTS, 3000), "whole safetensors file"),
    "weights empty": (write(WEIGHTS, b""), "whole safetensors file"),
    "a pickle": (write(WEIGHTS, b"\x80\x04cos\nsystem\n."), "whole safetensors file"),
    "no LoRA in the weights": (lambda a: save_file({"x": torch.zeros(2)}, a / WEIGHTS), "their ranks are none"),
    "no task": (lambda adapter: (adapter / "task.json").unlink(), "task.json"),
    "task cut off": (write("task.json", "{"), "must be JSON"),
    "task without a question": (task(question=""), "`question` must be text"),
    "candidates that are text": (task(candidates="Benign"), "`candidates` must be a list"),
    "candidates that are numbers": (task(candidates=[1, 2]), "`candidates` must be texts"),
    "a candidate twice": (task(candidates=["no", "no"]), "`candidates` must differ"),
    "candidates without end": (task(candidates=["x"] * 3_000_000), "`candidates` must be a list of at most 1000"),
    "a candidate without end": (task(candidates=["x" * 10_000_000, "y"]), "`candidates` must be texts"),
    "candidates that are half characters": (task(candidates=["\ud800", "y"]), "`candidates` must be texts"),
    "other candidates than the task's": (task(candidates=["no", "yes"]), "must be those of the only task"),
    "tokens without end": (task(max_new_tokens=10**9), "`max_new_tokens` must be a whole number"),
    "tokens that are a truth value": (task(max_new_tokens=True), "`max_new_tokens` must be a whole number"),
    "tasks that are text": (task(tasks="open"), "`tasks` must be a list of 1 to 10,000 tasks"),
    "no tasks": (task(tasks=[]), "`tasks` must be a list of 1 to 10,000 tasks"),
    "tasks without end": (task(tasks=[0] * 1_000_000), "`tasks` must be a list of 1 to 10,000 tasks"),
    "a task that is a list": (task(tasks=[[]]), "`tasks[0]` must be an object"),
    "many wrong tasks": (task(tasks=[0] * 10_000), "and 9980 more like these"),
    "a task of another kind": (tasks({"kind": "haiku"}), "`tasks[0].kind` must be one of"),
    "a kind that is a list": (tasks({"kind": []}), "`tasks[0].kind` must be one of"),
    "a task without a name": (tasks({}, {"name": ""}), "`tasks[1].name` must be text"),
    "a name twice": (tasks({"name": "a"}, {"name": "a"}), "the names of `tasks` must differ"),
    "a candidate twice in a task": (tasks({}, {"candidates": ["a", "a"]}), "`tasks[1].candidates` must differ"),
    "a closed task without candidates": (tasks({"kind": "closed"}, {}), "`tasks[0]` must have candidates"),
    "an open task with candidates": (tasks({"candidates": ["a", "b"]}, {}), "`tasks[0]` must have no candidates"),
    "sets without a separator": (tasks({"kind": "multilabel"}), "`tasks[0].separator` must be text"),
    "a separator that is a number": (tasks({"separator": 3}), "`tasks[0].separator` must be text"),
    "questions without end": (tasks({"questions": ["?"] * 1001}), "`tasks[0].questions` must be a list of at most"),
    "questions that are numbers": (tasks({"questions": [1]}), "`tasks[0].questions` must be a list of at most"),
    "a decision that is a number": (tasks({"decision": 3}), "`tasks[0].decision` must have the fields"),
    "a decision with another field": (decision(code="x"), "`tasks[0].decision` must have the fields"),
    "a decision for nothing": (decision(aim="auroc"), "`tasks[0].decision.aim` must be what answers can be chosen for"),
    "a scale of 0": (decision(scale=0), "`tasks[0].decision.scale` must be above 0"),
    "an offset too few": (decision(offsets=[1.0]), "`tasks[0].decision.offsets` must be a number"),
    "an offset that overflows": (decision(rule=[1e300, 0.0]), "`tasks[0].decision.rule` must be a number from"),
    "a threshold of no candidate": (decision(positive=2, threshold=0.5), "must be the index of a candidate"),
    "a threshold above 1": (decision(positive=1, threshold=1.5), "must be the index of a candidate"),
    "a positive answer of no task": (tasks({"positive": "yes"}), "`tasks[0].positive` must be one of the candidates"),
    "a file without end": (lambda a: os.truncate(a / "task.json", 65_000_000), "must have at most 64,000,000 bytes"),
    "no model": (task(model="nano"), "`model` must be an object"),
    "a setting that is not there": (task(model=NANO | {"trust_remote_code": True}), "no setting 'trust_remote_code'"),
    "a setting of another type": (task(model=NANO | {"use_qlora": "no"}), "`model.use_qlora` must be true or false"),
    "a model that is a number": (task(model={"model": 3}), "`model.model` must be text"),
    "a format that torch has not": (task(model=NANO | {"dtype": "Tensor"}), "`model.dtype` must be one of"),
}


@pytest.mark.parametrize(("spoil", "words"), STRANGE.values(), ids=STRANGE)
def test_an_unsafe_adapter_is_refused_before_the_base_is_loaded(adapter, capsys, monkeypatch, spoil, words) -> None:
    spoil(adapter)
    monkeypatch.setattr("train_fn.model.base.load_base", lambda *given: pytest.fail("the base was loaded"))
    assert main(["--adapter", str(adapter), __file__]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Cannot predict: ") and said.count("\n") == 1 and words in said


LOADED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor NaN": (tensors(lambda t: t[first(t)].fill_(float("nan"))), "must hold finite numbers, but 1 of"),
    "a number infinite": (tensors(lambda t: t[first(t)].view(-1)[:1].fill_(float("inf"))), "must hold finite numbers"),
    "whole numbers": (tensors(lambda t: t.update({first(t): t[first(t)].int()})), "must hold finite numbers"),
    "a tensor of another shape": (tensors(lambda t: t.update({first(t): t[first(t)][:5].clone()})), "1 tensors are"),
    "a tensor missing": (tensors(lambda t: t.pop(first(t))), "1 tensors are missing"),
    "a tensor left over": (tensors(lambda t: t.update({"base_model.model.x": torch.zeros(1)})), "1 tensors are"),
    "modules of another base": (
        tensors(lambda t: t.update({"base_model.model.model.h.0.q.lora_A.weight": torch.zeros(4, 3)})),
        "has 8: give the base that it was trained on",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), LOADED.values(), ids=LOADED)
def test_weights_that_do_not_fit_leave_the_base_as_it_was(base, adapter, spoil, words) -> None:
    spoil(adapter)
    before = {name: parameter.data_ptr() for name, parameter in base.model.named_parameters()}
    with pytest.raises(BadAdapter, match=words), load_adapter(base, adapter):
        pytest.fail("it was loaded")
    assert before == {name: parameter.data_ptr() for name, parameter in base.model.named_parameters()}


def test_no_regular_expression_of_the_folder_is_run(base, adapter) -> None:
    """This one would not end in a lifetime; the names of the tensors decide what is adapted."""
    config(target_modules=r"(.*)*(.*)*(.*)*(.*)*\1(a+)+$")(adapter)
    with load_adapter(base, adapter) as model:
        names = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert names == {"q_proj", "v_proj"}


def test_the_hub_is_never_asked(base, adapter, monkeypatch) -> None:
    def asked(*given, **named):
        pytest.fail(f"the hub was asked for {given}")

    for name in ("peft.config.hf_hub_download", "peft.utils.save_and_load.check_file_exists_on_hf_hub"):
        monkeypatch.setattr(name, asked)
    config(base_model_name_or_path="someone/something")(adapter)
    with load_adapter(base, adapter) as model:
        save_adapter(base, model, TRIAL, adapter.with_name("again"))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(BadAdapter, match=r"adapter_config\.json"):
        read_config(adapter)


def test_older_and_newer_folders_are_read(adapter) -> None:
    """Fewer settings, and keys that a later PEFT adds and switches off."""
    stored = json.loads((adapter / "adapter_config.json").read_text())
    few = {name: stored[name] for name in ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")}
    (adapter / "adapter_config.json").write_text(json.dumps(few | {"tomorrow": None, "later": {}, "base": False}))
    found = read_config(adapter)
    assert (found.r, found.lora_alpha, found.use_dora) == (4, 8, False) and read_shapes(adapter, found)
    (adapter / "task.json").write_text(json.dumps({"model": NANO, "question": "?", "candidates": [], "format": 9}))
    assert read_task(adapter).model.model == "nano" and read_task(adapter).candidates == ()
    (adapter / "task.json").write_text(json.dumps({"model": NANO, "question": "?", "candidates": ["no", "yes"]}))
    older = read_task(adapter)
    assert older.tasks == closed_set(["no", "yes"]) and older.max_new_tokens == 64
    assert older.task_of("Whatever?").candidates == ("no", "yes") == older.columns[:2]


# ------------------------------------------------------------------------------------------------ answers


def test_scores_that_are_not_finite_are_no_answer(base, splits) -> None:
    weight = base.model.get_submodule(base.projector).readout[2].bias
    with torch.no_grad():
        before = weight.clone()
        weight.fill_(float("nan"))
        try:
            (answer,) = answer_samples(base, splits.test[:1], splits.by_name, 4)
            assert "must be finite" in answer.error and not answer.probabilities
        finally:
            weight.copy_(before)
    (answer,) = answer_samples(base, splits.test[:1], splits.by_name, 4)
    assert sum(answer.probabilities) == pytest.approx(1) and not answer.error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good images, and other files as on a foreign disk."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(phantom(np.random.default_rng(number), number)[0]).save(folder / f"good{number}.png")
    Image.new("L", (900, 4)).save(folder / "strip.png")
    (folder / "cut.png").write_bytes((folder / "good0.png").read_bytes()[:300])
    (folder / "._good0.png").write_bytes(b"\0\5\26\7")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_one_bad_image_does_not_keep_the_others_from_their_answers(sound, folder, capsys) -> None:
    assert main(["--adapter", str(sound), "--no-generate", str(folder)]) == 1
    said = capsys.readouterr()
    lines = {Path(line["image"]).name: line for line in map(json.loads, said.out.splitlines())}
    assert list(lines) == ["cut.png", "good0.png", "good1.png", "pipe.png", "strip.png"]
    assert {name for name, line in lines.items() if "error" in line} == {"cut.png", "pipe.png", "strip.png"}
    assert "aspect ratio" in lines["strip.png"]["error"] and "existing file" in lines["pipe.png"]["error"]
    assert all(name in said.err for name in ("cut.png", "pipe.png", "strip.png"))
    assert lines["good0.png"]["label"] in lines["good0.png"]["probabilities"]


BAD_WORDS: dict[str, tuple[list[str], str]] = {
    "no image is good": (["cut.png"], "decodable"),
    "a candidate twice": (["good0.png", "--candidates", "no, no"], "must differ"),
    "candidates that become the same": (["good0.png", "--candidates", "正常,恶性"], "knows none of"),
    "a placeholder in the question": (["good0.png", "--question", "<|image_pad|>?"], "holds '<|image_pad|>'"),
    "the base is somewhere else": (["good0.png", "--model", "nowhere"], "config.json"),
    "a limit that Pillow has not": (["good0.png", "--max-image-pixels", "0"], "--max-image-pixels"),
    "merged into a file": (["--merge-into", "good0.png"], "--merge-into"),
    "merged below a file": (["--merge-into", "good0.png/x"], "--merge-into"),
    "merged into what holds something": (["--merge-into", "."], "--merge-into"),
}


@pytest.mark.parametrize(("argv", "words"), BAD_WORDS.values(), ids=BAD_WORDS)
def test_bad_words_to_predict(sound, folder, capsys, monkeypatch, argv, words) -> None:
    monkeypatch.chdir(folder)
    assert main(["--adapter", str(sound), "--no-generate", *argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("Cannot predict: ") and words in said.err and not said.out


def test_a_base_that_is_damaged_is_named(sound, folder, tmp_path, capsys) -> None:
    from train_fn.model.checkpoint import resolve_model

    damaged = Path(shutil.copytree(resolve_model("nano"), tmp_path / "base"))
    (damaged / "model.safetensors").write_text(LFS)
    assert main(["--adapter", str(sound), "--model", str(damaged), str(folder / "good0.png")]) == 2
    assert "Git LFS" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ target modules


@pytest.mark.parametrize(
    ("names", "excluded", "words"),
    [
        (("q_proj", "v_proj"), ("vision",), []),
        (("self_attn.q_proj",), (), []),
        (("q_proj", "v_porj"), (), ["'v_porj'"]),
        (("v_porj", "x"), (), ["'v_porj', 'x'"]),
        (("all-linear",), (), ["'all-linear'"]),
        (("embed_tokens",), (), ["'embed_tokens'"]),
        (("out_proj",), (), ["'out_proj'"]),  # the vision tower's
        (("q_proj", "up_proj"), ("mlp",), ["mlp excludes every 'up_proj'"]),
        (("q_proj", "x"), ("q_proj",), ["excludes every 'q_proj'", "'x'"]),
    ],
)
def test_every_target_module_must_match(base, names, excluded, words) -> None:
    settings = TrialSettings(lora_target_modules=names, lora_exclude_patterns=excluded)
    problems = target_problems(base, settings)
    assert len(problems) == len(words) and all(word in text for word, text in zip(words, problems, strict=True))
    if problems:
        with pytest.raises(ValueError, match="lora_"), adapted(base, settings):
            pytest.fail("it was attached")
