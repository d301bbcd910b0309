"""Predictions on data of several tasks: which task a question belongs to, batches, truths, and what goes wrong."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score
from test_families import FAMILIES, save_family
from test_predict import FIXTURES, run

from train_fn.data.phantoms import QUESTION
from train_fn.data.samples import Sample, Splits, Task
from train_fn.model.adapters import AdapterTask, read_task
from train_fn.model.base import Base, load_base
from train_fn.model.batches import process
from train_fn.model.prompts import end_tokens
from train_fn.scoring import answering, evaluation
from train_fn.scoring.answering import Answer, answer_samples, summary
from train_fn.scoring.evaluation import generate
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.adapter_files import save_adapter
from train_fn.trial.lora import adapted
from train_fn.trial.outputs import save_task

ROOT = Path(__file__).parents[1]
YES_NO = "Is it benign?"
OPEN = "What does this image show?"


@pytest.fixture(scope="module")
def several(splits) -> Splits:
    """The phantoms with three questions: a closed, a binary and an open one."""
    kinds = (
        (splits.tasks[0], "finding", QUESTION, lambda s: s.answer),
        (Task(kind="binary", candidates=("no", "yes")), "benign", YES_NO, lambda s: "yes" if s.label == 1 else "no"),
        (Task(), "open", OPEN, lambda s: f"a {s.answer.lower()} mass"),
    )
    tasks = tuple(replace(task, name=name) for task, name, *_ in kinds)

    def asked(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        made = []
        for number, sample in enumerate(samples):
            _, name, question, answer = kinds[number % 3]
            task = tasks[number % 3]
            text = answer(sample)
            made.append(replace(sample, question=question, answer=text, task=name, label=task.indices.get(text, -1)))
        return tuple(made)

    return Splits(asked(splits.train), asked(splits.validation), asked(splits.test), tasks)


@pytest.fixture(scope="module")
def adapter(base, several, tmp_path_factory) -> Path:
    """An adapter that changes the answers, without the time of training it."""
    directory = tmp_path_factory.mktemp("several") / "final_model"
    settings = TrialSettings(lora_r=4, train_projector=True)
    with adapted(base, settings) as model:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        save_adapter(base, model, settings, directory)
    save_task(base, several, directory)
    return directory


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(samples: tuple[Sample, ...]) -> list[dict[str, str]]:
    return [{"image": s.image, "question": s.question, "answer": s.answer} for s in samples]


def root_of(splits: Splits) -> tuple[str, Path]:
    return "--image-root", Path(splits.test[0].image).parent


def lines_of(found: SimpleNamespace) -> list[dict]:
    return [json.loads(line) for line in found.stdout.splitlines()]


# ------------------------------------------------------------------------------------------------ tasks


def test_task_json_holds_the_tasks_of_a_study(adapter, several) -> None:
    task = read_task(adapter)
    assert task.tasks == several.tasks
    assert task.questions == {"finding": (QUESTION,), "benign": (YES_NO,), "open": (OPEN,)}
    assert task.candidates == () and task.columns == ("answer", "probabilities")
    assert task.max_new_tokens == evaluation.max_new_tokens(SimpleNamespace(**vars(load())), several)


def load() -> Base:
    return load_base(ModelSettings(), torch.device("cpu"))


NAMED = AdapterTask(
    ModelSettings(),
    "Which plane?",
    (
        Task("plane", "closed", ("axial", "coronal", "sagittal")),
        Task("plane_of_the_brain", "closed", ("axial", "sagittal")),
        Task("open", "open"),
    ),
    {"plane": ("Which plane?", "Plane?"), "plane_of_the_brain": ("Which plane?",), "open": ("Describe it.",)},
)


@pytest.mark.parametrize(
    ("question", "question_type", "name"),
    [
        ("plane?", "", "plane"),  # case does not count
        ("Which  plane?", "", "plane"),  # of both, the first
        ("Which plane?", "Plane of the brain", "plane_of_the_brain"),  # the type decides between both
        ("Which plane?", "unheard of", "plane"),
        ("In which plane was this taken?", "Plane", "plane"),  # unknown question of a known type
        ("What is wrong?", "", "open"),
        ("What is wrong?", "unheard of", "open"),
    ],
)
def test_the_task_of_a_question(question, question_type, name) -> None:
    assert NAMED.task_of(question, question_type).name == name


def test_an_unknown_question_is_generated_without_an_open_task() -> None:
    closed = replace(NAMED, tasks=NAMED.tasks[:2])
    assert closed.task_of("What is wrong?") == Task() == closed.by_name[""]
    numeric = replace(NAMED, tasks=(*NAMED.tasks[:2], Task("size", "numeric")))
    assert numeric.task_of("What is wrong?") == Task()
    only = replace(NAMED, tasks=NAMED.tasks[:1])
    assert only.task_of("What is wrong?") is only.tasks[0]


def test_answers_are_assigned_as_their_task_writes_them() -> None:
    task = replace(NAMED, tasks=(Task("", "multilabel", ("a; b", "c"), separator=";"),))
    sample = task.assign(Sample(("x",), "?", "B;A"))
    assert sample.label == 0 and sample.answer == "A; B"
    unsorted = replace(task, tasks=(Task("", "multilabel", ("b; a", "c"), separator=";"),))  # of an older adapter
    assert unsorted.assign(Sample(("x",), "?", "a;b")).label == 0
    assert task.assign(Sample(("x",), "?", "b")).label == -1 == task.assign(Sample(("x",), "?", "")).label


# ------------------------------------------------------------------------------------------------ lines


def test_each_line_has_question_task_truth_and_answer(adapter, several, tmp_path) -> None:
    table = write_table(tmp_path / "mixed.csv", rows_of(several.test))
    found = run("--adapter", adapter, table, *root_of(several))
    assert found.returncode == 0, found.stderr
    lines = lines_of(found)
    assert [(s.image, s.question, s.task, s.answer) for s in several.test] == [
        (line["image"], line["question"], line["task"], line["truth"]) for line in lines
    ]
    for line in lines:
        candidates = several.by_name[line["task"]].candidates
        if candidates:
            assert tuple(line["probabilities"]) == candidates and sum(line["probabilities"].values()) == pytest.approx(
                1
            )
            assert line["answer"] == line["label"] == max(line["probabilities"], key=line["probabilities"].get)
            assert isinstance(line["generated"], str)
        else:
            assert line["answer"] == line["generated"] and "probabilities" not in line and "label" not in line

    told = found.stderr.splitlines()[-1]
    closed = [line for line in lines if line["task"] == "finding"]
    right = accuracy_score([line["truth"] for line in closed], [line["answer"] for line in closed])
    assert f"finding ({len(closed)}) accuracy {right:.3g} " in told
    assert "open (" in told and "token_f1" in told and " loss" not in told and "nan" not in told

    alone = lines_of(run("--adapter", adapter, table, "--batch-size", 1, "--no-generate", *root_of(several)))
    for one, line in zip(alone, lines, strict=True):
        assert one["answer"] == line["answer"] and ("generated" in one) == (one["task"] == "open")
        for name, value in one.get("probabilities", {}).items():
            assert value == pytest.approx(line["probabilities"][name], abs=1e-5)


def test_options_replace_what_the_adapter_says(adapter, several, tmp_path) -> None:
    image = several.test[0].image
    (line,) = lines_of(run("--adapter", adapter, "--question", YES_NO, "--no-generate", image))
    assert list(line["probabilities"]) == ["no", "yes"] and line["task"] == "benign"
    (line,) = lines_of(run("--adapter", adapter, "--question", "Why?", "--max-new-tokens", 2, image))
    assert line["task"] == "open" and len(line["answer"].split()) <= 2
    (line,) = lines_of(run("--adapter", adapter, "--question", "Why?", "--candidates", "Benign, Normal", image))
    assert list(line["probabilities"]) == ["Benign", "Normal"]
    rows = [{"file": image, "asked": YES_NO, "truth": "YES"}]
    table = write_table(tmp_path / "named.csv", rows)
    found = run("--adapter", adapter, "--columns", "image=file,question=asked,answer=truth", table, *root_of(several))
    assert lines_of(found)[0]["task"] == "benign" and "1 answers are right" in found.stderr


def test_sets_of_labels_are_compared_as_sets(adapter, several, tmp_path) -> None:
    table = write_table(tmp_path / "sets.csv", [rows_of(several.test)[0] | {"answer": "Normal;Benign"}])
    sets = ["Benign; Normal", "Benign", "Normal"]
    options = ("--multilabel", ";", "--candidates", ",".join(sets), "--no-generate")
    found = run("--adapter", adapter, table, *options, *root_of(several))
    (line,) = lines_of(found)
    assert line["truth"] == sets[0] and list(line["probabilities"]) == sets
    assert f"{int(line['answer'] == sets[0])} of 1 answers are right" in found.stderr


def test_folders_of_classes_have_truths(adapter, several, tmp_path, splits) -> None:
    for sample in several.test[:3]:
        folder = tmp_path / "images" / ("YES" if sample.label == 1 else "no")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(sample.image).name).write_bytes(Path(sample.image).read_bytes())
    options = ("--adapter", adapter, "--candidates", "no,yes", "--no-generate")
    found = run(*options, tmp_path / "images")
    assert {line["truth"] for line in lines_of(found)} <= {"yes", "no"} and "of 3 answers are right" in found.stderr
    inside = run(*options, next((tmp_path / "images").iterdir()))
    assert all("truth" not in line for line in lines_of(inside)) and "are right" not in inside.stderr


def test_data_without_answers_and_with_several_images(adapter, several, tmp_path) -> None:
    for number, sample in enumerate(several.test[:2]):
        (tmp_path / f"{number}.png").write_bytes(Path(sample.image).read_bytes())
    rows = [
        {"id": "a", "image": "0.png", "question": YES_NO},
        {"id": "b", "image": ["0.png", "1.png"], "question": YES_NO, "answer": ""},
        {"id": "c", "image": "1.png", "question": "Benign or not?", "question_type": "Benign", "answer": "Yes"},
    ]
    data = tmp_path / "some.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = run("--adapter", adapter, "--no-generate", data)
    assert found.returncode == 0, found.stderr
    lines = lines_of(found)
    assert [line["id"] for line in lines] == ["a", "b", "c"] and {line["task"] for line in lines} == {"benign"}
    assert [line.get("truth") for line in lines] == [None, None, "Yes"] and len(lines[1]["images"]) == 2
    assert found.stderr.splitlines()[-1].startswith(f"{int(lines[2]['answer'] == 'yes')} of 1 answers are right")


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_bad_row_does_not_lose_the_others(adapter, several, tmp_path) -> None:
    for number, sample in enumerate(several.test[:4]):
        content = Path(sample.image).read_bytes()
        (tmp_path / f"{number}.png").write_bytes(content[:300] if number == 3 else content)
    rows = [row | {"image": f"{number}.png"} for number, row in enumerate(rows_of(several.test[:4]))]
    rows[1]["image"] = "nowhere\x1b[31m.png"
    rows[2]["question"] = "<|image_pad|> Why?"
    found = run("--adapter", adapter, write_table(tmp_path / "some.csv", rows), "--no-generate")
    assert found.returncode == 1 and "Traceback" not in found.stderr and "\x1b[31m" not in found.stderr
    lines = lines_of(found)
    assert ["error" in line for line in lines] == [False, True, True]
    assert "'<|image_pad|>'" in lines[1]["error"] and "decodable" in lines[2]["error"]
    told = [line.partition(":")[0] for line in found.stderr.splitlines()]
    assert [line for line in told if line.startswith("Cannot")] == [
        "Cannot read",
        "Cannot answer some.csv line 4",
        "Cannot answer some.csv line 5",
    ]
    assert told[-1].startswith(f"{int(lines[0]['answer'] == lines[0]['truth'])} of 1 answers are right")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--columns", "nothing"], "--columns"),
        (["--columns", "image=a,image=b"], "--columns"),
        (["--multilabel", "and"], "--multilabel"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_options_are_refused_before_the_base_is_loaded(adapter, several, monkeypatch, argv, word) -> None:
    monkeypatch.setattr("train_fn.model.base.load_base", lambda *given: pytest.fail("the base was loaded"))
    found = run("--adapter", adapter, *argv, several.test[0].image)
    assert found.returncode == 2 and word in found.stderr and found.stderr.count("\n") == 1


def test_a_closed_pipe_ends_it_quietly(adapter, several) -> None:
    command = [
        sys.executable,
        "-m",
        "train_fn.predict",
        "--adapter",
        str(adapter),
        "--no-generate",
        "--batch-size",
        "1",
    ]
    images = [s.image for s in several.samples]
    with subprocess.Popen([*command, *images], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.readline()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        told = process.stderr.read().decode()  # type: ignore[union-attr]
    assert json.loads(first)["image"] == images[0] and process.returncode == 141
    assert "Traceback" not in told and "BrokenPipe" not in told


def test_ctrl_c_prints_one_line(adapter, several, monkeypatch) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train_fn.predict.answer_samples", interrupted)
    found = run("--adapter", adapter, several.test[0].image)
    assert found.returncode == 130 and "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1] == "Stopped by Ctrl-C"


# ------------------------------------------------------------------------------------------------ batches


def asked(samples: tuple[Sample, ...]) -> list[Sample]:
    return [replace(sample, answer="") for sample in samples]


def test_answers_come_in_order_and_as_soon_as_they_are_there(base, several, monkeypatch) -> None:
    sizes: list[int] = []
    whole = answering.answer_batch

    def counted(base, samples, *others):
        sizes.append(len(samples))
        return whole(base, samples, *others)

    monkeypatch.setattr(answering, "answer_batch", counted)
    samples = asked(several.test)
    answers = answer_samples(base, samples, several.by_name, 2, batch_size=3)
    first = next(answers)
    assert len(sizes) == 1 and first.probabilities
    rest = list(answers)
    assert len(rest) == len(samples) - 1 and max(sizes) == 3 and sum(sizes) == len(samples)
    tasks = [several.task_of(sample) for sample in samples]
    assert [len(task.candidates) for task in tasks] == [len(answer.probabilities) for answer in (first, *rest)]


def test_a_batch_that_does_not_fit_is_halved(base, several, monkeypatch) -> None:
    samples = asked(tuple(s for s in several.samples if s.task == "finding"))[:8]
    wanted = list(answer_samples(base, samples, several.by_name, 2))
    sizes: list[int] = []
    whole = evaluation.score_candidates

    def small(base, samples, candidates):
        sizes.append(len(samples))
        if len(samples) > 2:
            raise RuntimeError("CUDA out of memory")
        return whole(base, samples, candidates)

    monkeypatch.setattr(evaluation, "score_candidates", small)
    found = list(answer_samples(base, samples, several.by_name, 2))
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert np.allclose([a.probabilities for a in found], [a.probabilities for a in wanted], atol=1e-5)


def test_one_sample_that_the_model_refuses_does_not_lose_its_batch(base, several, monkeypatch) -> None:
    samples = asked(tuple(s for s in several.samples if s.task == "finding"))[:5]
    whole = evaluation.score_candidates

    def picky(base, chosen, candidates):
        if samples[3] in chosen:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return whole(base, chosen, candidates)

    monkeypatch.setattr(evaluation, "score_candidates", picky)
    found = list(answer_samples(base, samples, several.by_name, 2))
    assert [bool(answer.error) for answer in found] == [False, False, False, True, False]


def test_several_images_turns_and_a_system_prompt_are_answered(base, several) -> None:
    one, two = several.test[0].image, several.test[1].image
    plain = Sample((one,), "Which?", "", task="finding")
    samples = [
        plain,
        replace(plain, images=(one, two)),
        replace(plain, system="You are a radiologist."),
        replace(plain, turns=(("What is it?", "An image."),)),
    ]
    found = [a.probabilities for a in answer_samples(base, samples, several.by_name, 2)]
    assert all(len(row) == 3 for row in found)
    assert all(not np.allclose(found[0], other, atol=1e-4) for other in found[1:])


# ------------------------------------------------------------------------------------------------ the summary


def test_the_summary_is_an_independent_computation(several) -> None:
    rng = np.random.default_rng(0)
    task = several.by_name["benign"]
    samples = [s for s in several.samples if s.task == "benign"]
    positive = rng.random(len(samples))
    answered = [(s, Answer(probabilities=(1 - p, p))) for s, p in zip(samples, positive, strict=True)]
    truths = [s.label for s in samples]
    told = summary(answered, {"benign": task})
    num_right = sum((p > 0.5) == truth for p, truth in zip(positive, truths, strict=True))
    assert told.startswith(f"{num_right} of {len(samples)} answers are right; accuracy {num_right / len(samples):.3g} ")
    assert f"auroc {roc_auc_score(truths, positive):.3g}" in told

    strange = (replace(samples[0], answer="perhaps", label=-1), Answer(probabilities=(0.1, 0.9)))
    assert "1 true answers are no candidates of theirs" in summary([*answered, strange], {"benign": task})
    assert summary([(replace(samples[0], answer=""), Answer(probabilities=(0.1, 0.9)))], {"benign": task}) == ""


def test_right_answers_of_each_kind() -> None:
    tasks = {
        "open": Task("open"),
        "numeric": Task("numeric", "numeric"),
        "sets": Task("sets", "multilabel", separator=","),
    }
    given = [
        ("open", "The left lung.", "left lung", True),
        ("open", "right lung", "left lung", False),
        ("numeric", "3.50 cm", "3.5", True),
        ("numeric", "none", "3.5", False),
        ("sets", "b, a", "a,b", True),
        ("sets", "a", "a,b", False),
    ]
    for name, text, truth, right in given:
        told = summary([(Sample(("x",), "?", truth, task=name), Answer(text=text))], tasks)
        assert told.startswith(f"{int(right)} of 1 answers are right"), (name, text)
    chosen = {"": Task("", "multilabel", ("a", "b"), separator=",")}
    told = summary(
        [(Sample(("x",), "?", "a, c"), Answer(probabilities=(0.9, 0.1)))], chosen
    )  # a set that is no candidate
    assert told.startswith("0 of 1 answers are right; exact_match 0 label_f1 ")


# ------------------------------------------------------------------------------------------------ generation


@pytest.fixture(scope="module", params=["nano", "hulumed", "qwen2_5_vl", "gemma3"])
def generator(request, tmp_path_factory) -> Base:
    """A base that writes more than nothing."""
    model = "nano"
    if request.param == "hulumed":
        if not FIXTURES:
            pytest.skip("no HULUMED_FIXTURES")
        model = f"{FIXTURES}/checkpoint"
    elif request.param != "nano":
        model = str(tmp_path_factory.mktemp(request.param))
        save_family(FAMILIES[request.param], Path(model))
    return load_base(ModelSettings(model=model, feature_cache_gib=0), torch.device("cpu"))


def test_generated_texts_are_those_of_the_library(generator, splits) -> None:
    """In a batch and alone. The library, too, is to end at any special token."""
    samples = asked(splits.test[:3])
    tokenizer = generator.processor.tokenizer
    theirs = []
    for sample in samples:
        inputs = process(generator, sample)
        with torch.no_grad():
            tokens = generator.model.generate(
                **inputs,
                max_new_tokens=16,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(end_tokens(tokenizer)),
            )
        written = tokens[0, inputs["input_ids"].shape[1] :]
        theirs.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    assert generate(generator, samples, 16) == theirs
    assert [generate(generator, [sample], 16)[0] for sample in samples] == theirs
    assert any(theirs)
