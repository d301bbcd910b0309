"""Samples with several images, earlier turns, a system prompt and all other fields: the same from every format."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import IMAGES, WORDS, lines, noise, refusal, samples_of, save_arrow

from train_fn.data.convert import as_entry, write_manifest
from train_fn.data.manifest import divide, read_manifest
from train_fn.data.samples import PARTS, PLACEHOLDER, Sample
from train_fn.inspect import main


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image root with IMAGES, each different."""
    folder = tmp_path_factory.mktemp("root").resolve()
    for number, name in enumerate(IMAGES):
        noise(folder / name, number)
    return folder


def refusal_of(path: Path, **options: Any) -> str:
    (problem,) = read_manifest(path, **options).problems
    return problem


# ------------------------------------------------------------------------------------------------ any sample
# Writers get samples and the image root. Each writes a file or folder at a path.


def names(sample: Sample, root: Path) -> list[str]:
    return [str(Path(image).relative_to(root)) for image in sample.images]


def entry(sample: Sample, root: Path) -> dict[str, Any]:
    return as_entry(sample, names(sample, root), False, sample.label != sample.answer)


def beside(sample: Sample) -> dict[str, str]:
    """What stands beside a conversation."""
    found = {name: getattr(sample, name) for name in ("system", "id", "question_type", "group", "split")}
    return {name: text for name, text in found.items() if text}


def asked(sample: Sample) -> list[str]:
    """The questions, each image with a placeholder."""
    questions = [*(question for question, _ in sample.turns), sample.question]
    if not any(PLACEHOLDER in question for question in questions):
        questions[0] = PLACEHOLDER * len(sample.images) + questions[0]
    return questions


def conversation(sample: Sample, keys: tuple[str, str], roles: tuple[str, str]) -> list[dict[str, Any]]:
    answers = [*(answer for _, answer in sample.turns), sample.answer]
    pairs = zip(asked(sample), answers, strict=True)
    return [{keys[0]: role, keys[1]: text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def swift(sample: Sample, root: Path) -> dict[str, Any]:
    turns = conversation(sample, ("role", "content"), ("user", "assistant"))
    turns = [turn | ({"loss": False} if n % 2 and n < len(turns) - 1 else {}) for n, turn in enumerate(turns)]
    return {"messages": turns, "images": names(sample, root)} | beside(sample)


def openai(sample: Sample, root: Path) -> dict[str, Any]:
    turns = conversation(sample, ("role", "content"), ("user", "assistant"))
    images = iter(names(sample, root))
    for turn in turns[::2]:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(turn["content"].split(PLACEHOLDER)):
            parts += [{"type": "image_url", "image_url": {"url": next(images)}}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        turn["content"] = parts
    for turn in turns[1:-1:2]:
        turn["loss"] = False
    system = [{"role": "system", "content": sample.system}] if sample.system else []
    return {"messages": system + turns} | beside(replace(sample, system=""))


def llava(sample: Sample, root: Path) -> dict[str, Any]:
    turns = conversation(sample, ("from", "value"), ("human", "gpt"))
    turns = [turn | ({"loss": False} if n % 2 and n < len(turns) - 1 else {}) for n, turn in enumerate(turns)]
    return {"conversations": turns, "image": names(sample, root)} | beside(sample)


def query(sample: Sample, root: Path) -> dict[str, Any]:
    *earlier, last = asked(sample)
    history = [[question, answer] for question, (_, answer) in zip(earlier, sample.turns, strict=True)]
    return {"query": last, "response": sample.answer, "history": history, "images": names(sample, root)} | beside(
        sample
    )


def write_json(form: Callable[[Sample, Path], Any]) -> Callable[[list[Sample], Path, Path], None]:
    return lambda made, path, root: path.write_text(json.dumps([form(sample, root) for sample in made])) and None


def write_lines(form: Callable[[Sample, Path], Any]) -> Callable[[list[Sample], Path, Path], None]:
    return lambda made, path, root: path.write_text(lines([form(sample, root) for sample in made])) and None


def write_csv(made: list[Sample], path: Path, root: Path) -> None:
    """A table whose cells hold lists as JSON."""
    entries = [entry(sample, root) for sample in made]
    header = list(dict.fromkeys(key for its in entries for key in its))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        for its in entries:
            cells = (its.get(key, "") for key in header)
            table.writerow([json.dumps(cell) if isinstance(cell, tuple | list) else cell for cell in cells])


def arrow(form: Callable[[Path], Any], to_file: bool) -> Callable[[list[Sample], Path, Path], None]:
    def write(made: list[Sample], path: Path, root: Path) -> None:
        import pyarrow.parquet

        images = [[form(root / name) for name in names(sample, root)] for sample in made]
        entries = [entry(sample, root) | {"image": its} for sample, its in zip(made, images, strict=True)]
        for its in entries:
            its["turns"] = [list(turn) for turn in its.get("turns", ())]
        table = pyarrow.Table.from_pylist(entries, schema=schema_of(entries))
        if to_file:
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        else:
            save_arrow(table, path)

    return write


def schema_of(entries: list[dict[str, Any]]) -> Any:
    import pyarrow

    whole: dict[str, Any] = {}
    for its in entries:
        whole |= its
    whole["turns"] = [["q", "a"]]
    return pyarrow.Table.from_pylist([whole]).schema


FORMATS: dict[str, Callable[[list[Sample], Path, Path], None]] = {
    "JSON Lines": write_lines(entry),
    "JSON": write_json(entry),
    "the guide's JSON": write_json(lambda sample, root: as_entry(sample, names(sample, root), True, True)),
    "LLaVA": write_lines(llava),
    "ms-swift": write_lines(swift),
    "OpenAI": write_lines(openai),
    "query and response": write_json(query),
    "CSV": write_csv,
    "parquet with paths": arrow(lambda path: str(path), True),
    "parquet with structs": arrow(lambda path: {"bytes": path.read_bytes(), "path": None}, True),
    "saved": arrow(lambda path: {"bytes": path.read_bytes(), "path": None}, False),
}
CONVERSATIONS = ("LLaVA", "ms-swift", "OpenAI", "query and response")  # these have no labels


@st.composite
def samples(draw: st.DrawFn, with_label: bool, with_split: bool) -> Sample:
    """Any sample, in the form in which it is read: images that stand first have no placeholders."""
    images = draw(st.lists(st.sampled_from(IMAGES), min_size=1, max_size=3))
    questions = draw(st.lists(WORDS, min_size=1, max_size=3))
    if draw(st.booleans()):  # an image stands before or behind each of the words, or between two
        for _ in images:
            at = draw(st.integers(0, len(questions) - 1))
            side = draw(st.sampled_from(["front", "behind", "middle"]))
            word = questions[at]
            questions[at] = {"front": f"{PLACEHOLDER} {word}", "behind": f"{word}\n{PLACEHOLDER}"}.get(
                side, f"{word} {PLACEHOLDER} and"
            )
        first, rest = questions[0], "".join(questions[1:])
        if PLACEHOLDER not in rest and PLACEHOLDER not in first.replace(f"{PLACEHOLDER} ", ""):
            questions[0] = first.replace(f"{PLACEHOLDER} ", "")
    answers = draw(st.lists(WORDS, min_size=len(questions), max_size=len(questions)))
    optional = st.sampled_from([""]) | WORDS
    *earlier, question = questions
    return Sample(
        images=tuple(images),
        question=question,
        answer=answers[-1],
        label=draw(st.integers(0, 99)) if with_label else answers[-1],
        system=draw(optional),
        turns=tuple(zip(earlier, answers, strict=False)),
        id=draw(optional),
        question_type=draw(optional),
        group=draw(optional),
        split=draw(st.sampled_from(PARTS)) if with_split else "",
    )


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sample_is_the_same_from_every_format(name: str, root: Path, tmp_path: Path, data: st.DataObject) -> None:
    with_label = name not in CONVERSATIONS and data.draw(st.booleans())
    with_split = data.draw(st.booleans())
    made = data.draw(st.lists(samples(with_label, with_split), min_size=2, max_size=4))
    if name == "LLaVA":
        made = [
            s for s in made if not (s.turns[0][0] if s.turns else s.question).endswith(PLACEHOLDER)
        ]  # it moves these
    split = "train" if with_split else ""
    made += [Sample(("a.png",), f"q{n}", "a", n if with_label else "a", group=f"g{n}", split=split) for n in range(3)]
    made = [replace(sample, images=tuple(str(root / image) for image in sample.images)) for sample in made]
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    (tmp_path / "x").unlink(missing_ok=True)
    FORMATS[name](made, tmp_path / "x", root)
    found = samples_of(tmp_path / "x", root)
    for sample, other in zip(found, made, strict=True):
        assert other.source == "" and replace(sample, source="", images=other.images) == other
        assert [Path(image).read_bytes() for image in sample.images] == [
            Path(image).read_bytes() for image in other.images
        ]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=st.lists(samples(True, True), min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["m.jsonl", "m.json"])
def test_what_is_written_is_read_as_the_same_samples(name: str, root: Path, tmp_path: Path, made: list[Sample]) -> None:
    made = [replace(s, split="train", group="", images=tuple(str(root / name) for name in s.images)) for s in made]
    write_json(entry)(made, tmp_path / "x", root)
    (tmp_path / name).unlink(missing_ok=True)
    image_root, problems = write_manifest(tmp_path / name, tmp_path / "x", root)
    assert not problems
    found, before = samples_of(tmp_path / name, image_root), samples_of(tmp_path / "x", root)
    assert [replace(sample, source="") for sample in found] == [replace(sample, source="") for sample in before]


# ------------------------------------------------------------------------------------------------ conversations


def test_a_conversation_of_several_answers_gives_a_sample_for_each(root: Path, tmp_path: Path) -> None:
    texts = ["<image>\nWhat is it?", "A scan.", "And <image>?", "Another.", "Which is newer?", "The second."]
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    (tmp_path / "m").write_text(json.dumps([{"id": 7, "image": ["a.png", "b c.png"], "conversations": turns}]))
    one, two, three = samples_of(tmp_path / "m", root)
    assert (one.question, one.turns, len(one.images)) == ("What is it?", (), 1)
    first = ("<image>\nWhat is it?", "A scan.")
    assert (two.question, two.turns, len(two.images)) == ("And <image>?", (first,), 2)
    assert (three.question, three.turns) == ("Which is newer?", (first, ("And <image>?", "Another.")))
    assert [sample.id for sample in (one, two, three)] == ["7#1", "7#2", "7#3"]
    assert two.source == "m entry 0 answer 2"
    turns[1]["loss"] = False
    (tmp_path / "m").write_text(json.dumps([{"image": ["a.png", "b c.png"], "conversations": turns}]))
    assert [len(sample.turns) for sample in samples_of(tmp_path / "m", root)] == [1, 2]


def test_an_answer_before_the_first_image_is_context(root: Path, tmp_path: Path) -> None:
    texts = ["Hello.", "Good morning.", "<image>What is it?", "A scan."]
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    (tmp_path / "m").write_text(json.dumps([{"images": ["a.png"], "messages": turns}]))
    (sample,) = samples_of(tmp_path / "m", root)
    assert (sample.question, sample.turns) == ("<image>What is it?", (("Hello.", "Good morning."),))


@pytest.mark.parametrize(
    ("question", "images", "read"),
    [
        ("<image>\nq", 1, "q"),
        ("<image> <image>\nq", 2, "q"),
        ("q", 2, "q"),
        (" q ", 1, " q "),
        ("q <image>", 1, "q <image>"),
        ("<image> or <image>?", 2, "<image> or <image>?"),
        ("<image>\nq", 2, " must have as many images as <image> placeholders, but has 2 and 1: write <image> once for"),
        ("q <image> <image>", 1, " must have as many images as <image> placeholders, but has 1 and 2"),
    ],
)
@pytest.mark.parametrize("key", ["text", "question"])
def test_placeholders_are_placed_and_counted(root, tmp_path, key, question, images, read) -> None:
    made = {"image": list(IMAGES[:images]), key: question, "answer": "a"}
    (tmp_path / "m").write_text(json.dumps([made] * 2))
    if read.startswith(" must"):
        assert all(
            text.startswith("m entry ") and read in text for text in read_manifest(tmp_path / "m", root).problems
        )
    else:
        assert [sample.question for sample in samples_of(tmp_path / "m", root)] == [read] * 2


# ------------------------------------------------------------------------------------------------ roles, answers


def test_the_file_of_vqa_rad_is_read_as_it_is(root: Path, tmp_path: Path) -> None:
    made = [
        {"qid": n, "phrase_type": "freeform", "qid_linked_id": f"0{n}-x", "image_case_url": "https://medpix/case",
         "image_name": IMAGES[n % 3], "image_organ": "HEAD", "evaluation": "not evaluated",
         "question": "Is there an evidence of a mass?", "question_rephrase": "NULL", "question_relation": "NULL",
         "question_frame": "NULL", "question_type": ["PRES", "PRES, ABN", "SIZE"][n % 3],
         "answer": ["Yes", 2, 5.5][n % 3], "answer_type": ["CLOSED", "OPEN"][n % 2]}
        for n in range(6)
    ]  # fmt: skip
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(made))
    reading = read_manifest(tmp_path / "VQA_RAD Dataset Public.json", root)
    assert reading.problems == []
    assert [(s.id, s.answer, s.question_type) for s in reading.samples[:3]] == [
        ("0", "Yes", "PRES"), ("1", "2", "PRES, ABN"), ("2", "5.5", "SIZE")
    ]  # fmt: skip
    assert reading.notes == ["Columns taken: image_name as image, qid as id (--columns ROLE=COLUMN names others)"]


def patients(folder: Path, column: str, num: int) -> Path:
    rows = [{"image": "a.png", "question": "q", "answer": "a", column: n % num} for n in range(8)]
    (folder / "m").write_text(json.dumps(rows))
    return folder / "m"


def test_groups_are_found_and_confirmed_by_a_line(root: Path, tmp_path: Path) -> None:
    reading = read_manifest(patients(tmp_path, "Patient ID", 4), root)
    assert [sample.group for sample in reading.samples] == ["0", "1", "2", "3"] * 2
    assert reading.notes == [
        "Columns taken: Patient ID as group (--columns ROLE=COLUMN names others)",
        "Grouped by Patient ID: entries with the same value (4 different) stay in one part (--group-field names "
        "another column)",
    ]
    reading = read_manifest(patients(tmp_path, "group", 2), root)  # such as control and treatment
    assert "has 2 different values only and groups nothing if other data has no more" in reading.notes[0]
    for more, named, groups in ((None, False, {""}), (None, True, {"0", "1"}), (["2"], False, {"0", "1"})):
        parts = {"data": reading.samples, "test_data": more and [replace(reading.samples[0], group="2")]}
        assert {sample.group for sample in divide(parts, "", named)[0]["data"] or []} == groups
    reading = read_manifest(tmp_path / "m", root, ("group=group",))
    assert reading.notes == ["Grouped by group: entries with the same value (2 different) stay in one part"]
    made = [{"image": "a.png", "question": "q", "answer": "a", "study_id": n, "subject_id": n // 2} for n in range(8)]
    (tmp_path / "m").write_text(json.dumps(made))
    assert {sample.group for sample in samples_of(tmp_path / "m", root)} == {"0", "1", "2", "3"}


def test_several_columns_of_images(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("before,after,answer\na.png,b c.png,x\na.png,,y\n")
    one, two = samples_of(tmp_path / "x.csv", root, "image=before+after")
    assert [Path(image).name for image in one.images] == ["a.png", "b c.png"] and len(two.images) == 1
    assert "image 2=later; it has ['before', 'after', 'answer']" in refusal(
        tmp_path / "x.csv", root, "image=before+later"
    )
    (tmp_path / "x.csv").write_text("images,answer\n\"['a.png', 'b c.png']\",x\na.png,y\n")  # as pandas writes a list
    assert [len(sample.images) for sample in samples_of(tmp_path / "x.csv", root)] == [2, 1]


def test_answers_that_are_lists_are_sets_of_labels(root: Path, tmp_path: Path) -> None:
    for key in ("question", "text"):
        made = [{"image": "a.png", key: "q", "answer": answer} for answer in (["mass", "cyst"], "mass", ["cyst", 3])]
        (tmp_path / "m").write_text(json.dumps(made))
        problems = read_manifest(tmp_path / "m", root).problems
        assert len(problems) == 2 and 'add --multilabel ";" if' in problems[0]
        answers = [sample.answer for sample in samples_of(tmp_path / "m", root, multilabel=";")]
        assert answers == ["mass; cyst", "mass", "cyst; 3"]
        problems = read_manifest(tmp_path / "m", root, multilabel="s").problems
        assert "must have labels of text without 's' in its answer, but has 'mass'" in problems[0]


@pytest.mark.parametrize("key", ["question", "text"])
def test_answers_may_be_missing_where_they_are_optional(root: Path, tmp_path: Path, key: str) -> None:
    made: list[dict[str, Any]] = [{"image": "a.png", key: "q"}, {"image": "a.png", key: "r", "answer": None}]
    for extra in ([], [{"image": "a.png", key: "s", "answer": "x", "label": 3}]):
        (tmp_path / "m").write_text(json.dumps(made + extra))
        assert read_manifest(tmp_path / "m", root).problems
        found = samples_of(tmp_path / "m", root, answers_optional=True)
        assert [(s.question, s.answer, s.label) for s in found[:2]] == [("q", "", -1), ("r", "", -1)]
        assert [(s.answer, s.label) for s in found[2:]] == [("x", 3)] * len(extra)
    turns = [{"role": "user", "content": "<image>q"}]
    (tmp_path / "m").write_text(json.dumps([{"images": ["a.png"], "messages": turns}] * 2))
    assert [s.answer for s in samples_of(tmp_path / "m", root, answers_optional=True)] == ["", ""]
    (tmp_path / "m").write_text("image,split\na.png,test\n")
    assert samples_of(tmp_path / "m", root, question="Why?", answers_optional=True)[0].question == "Why?"


# ------------------------------------------------------------------------------------------------ conversions


ENTRIES = [{"image": IMAGES[n], "question": f"q{n}", "answer": "a"} for n in range(2)]
DICTS: dict[str, Any] = {
    "columns": {key: [entry[key] for entry in ENTRIES] for key in ENTRIES[0]},
    "columns of pandas": {key: {str(n): entry[key] for n, entry in enumerate(ENTRIES)} for key in ENTRIES[0]},
    "entries by id": {f"id {n}": entry for n, entry in enumerate(ENTRIES)},
    "entries by part": {"train": ENTRIES, "test": ENTRIES[:1]},
    "one list": {"info": {}, "data": ENTRIES},
}


@pytest.mark.parametrize("name", DICTS)
def test_the_line_of_a_refused_dict_makes_a_list(name: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(DICTS[name]))
    problem = refusal_of(tmp_path / "m.json", image_root=root)
    assert "must be a JSON list of at least one entry, but holds a dict with [" in problem and len(problem) < 1000
    line = problem[problem.index('python -c "') :].split('"')[1]
    subprocess.run([sys.executable, "-c", line], cwd=tmp_path, check=True)
    found = samples_of(tmp_path / "list.json", root)
    assert [sample.question for sample in found[:2]] == ["q0", "q1"]
    assert [sample.split for sample in found[2:]] == (["test"] if name == "entries by part" else [])
    assert found[0].id == ("id 0" if name == "entries by id" else "")


def test_packed_files_and_spreadsheets_are_refused_with_a_line(tmp_path: Path) -> None:
    for name, tool in (("x y.zip", "unzip 'x y.zip'"), ("x.xlsx", "pandas.read_excel('x.xlsx')")):
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            packed.writestr("x.csv", "image,answer\n")
        assert tool in refusal_of(tmp_path / name)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"[]"))
    assert "unpack it with gunzip -k x.json.gz" in refusal_of(tmp_path / "x.json.gz")
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        shard.add(tmp_path / "x.json.gz", "x")
    assert "unpack it with tar -xf x.tar" in refusal_of(tmp_path / "x.tar")


# ------------------------------------------------------------------------------------------------ folders of data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("images/1.png", "images/2.png", "3.png")):
        noise(tmp_path / "data" / name, number)
    return tmp_path / "data"


def test_a_folder_with_one_data_file_and_its_images(folder: Path) -> None:
    (folder / "labels.csv").write_text("image,answer\nimages/1.png,x\n3.png,y\n")
    assert [sample.answer for sample in samples_of(folder)] == ["x", "y"]
    (folder / "metadata.jsonl").write_text(lines([{"file_name": "images/2.png", "text": "Why?", "answer": "z"}] * 2))
    assert [sample.question for sample in samples_of(folder)] == ["Why?"] * 2  # the image folder of `datasets`
    for name in ("a.jsonl", "metadata.jsonl"):
        (folder / "metadata.jsonl").rename(folder / name) if name == "a.jsonl" else None
    assert "must have data files of one kind, but has a.jsonl and labels.csv" in refusal_of(folder)


def test_metadata_in_folders_of_parts(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        noise(tmp_path / part / "1.png", len(part))
        (tmp_path / part / "metadata.csv").write_text(f"file_name,answer\n1.png,{part}\n1.png,x\n")
    found = samples_of(tmp_path)
    assert sorted({(Path(s.image).parent.name, s.split) for s in found}) == [
        ("test", "test"), ("train", "train"), ("validation", "validation")
    ]  # fmt: skip
    assert found[0].source == "test/metadata.csv line 2" and found[0].image == str(tmp_path.resolve() / "test/1.png")
    (tmp_path / "test" / "metadata.csv").unlink()
    assert "must have a data file in each of its parts, but test/ has none" in refusal_of(tmp_path)


@pytest.mark.parametrize("where", ["", "data"])
def test_shards_whose_names_carry_the_split(root: Path, tmp_path: Path, where: str) -> None:
    import pyarrow.parquet

    (tmp_path / where).mkdir(exist_ok=True)
    content = [{"image": {"bytes": (root / "a.png").read_bytes(), "path": None}, "answer": "x"}]
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / where / f"{name}.parquet")
    (tmp_path / "README.md").write_text("")
    assert [sample.split for sample in samples_of(tmp_path)] == ["test", "train", "train"]
    shutil.copy(tmp_path / where / "test-00000-of-00001.parquet", tmp_path / where / "all.parquet")
    assert "has test-00000-of-00001.parquet and all.parquet: give one as --data" in refusal_of(tmp_path)


def test_a_single_class_is_refused_early(tmp_path: Path) -> None:
    noise(tmp_path / "data" / "mass" / "1.png", 0)
    problem = refusal_of(tmp_path / "data")
    assert "has mass/ only: add the others, or write the answers into" in problem and "metadata.csv" in problem


def test_sets_of_classes_and_lists_of_images_that_datasets_saved(root: Path, tmp_path: Path) -> None:
    import pyarrow

    content = [{"bytes": (root / name).read_bytes(), "path": name} for name in IMAGES]
    made = [{"images": content[:n], "label": classes} for n, classes in ((1, [0]), (2, [0, 1]), (3, [1]))]
    features = {"label": {"feature": {"names": ["mass", "cyst"], "_type": "ClassLabel"}, "_type": "Sequence"}}
    table = pyarrow.Table.from_pylist(made)
    save_arrow(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), tmp_path / "s"
    )
    found = samples_of(tmp_path / "s", multilabel=";")
    assert [(len(sample.images), sample.answer) for sample in found] == [(1, "mass"), (2, "mass; cyst"), (3, "cyst")]


# ------------------------------------------------------------------------------------------------ inspect, speed


def test_inspect_writes_json_lines_with_all_fields(root: Path, tmp_path: Path, capsys) -> None:
    made = [
        {"image": [IMAGES[n % 3], "a.png"], "question": f"Is <image> newer than <image>, {n}?",
         "class": ["no", "yes"][n % 2], "qid": n, "patient": n % 5, "system_prompt": "Be brief.",
         "history": [["Hello.", "Hello."]]}
        for n in range(20)
    ]  # fmt: skip
    (root / "m").write_text(json.dumps(made))
    out = tmp_path / "out.jsonl"
    main(["--data", str(root / "m"), "--write", str(out), "--copies-distance", "-1"])
    text = capsys.readouterr().out
    assert f"--data {out} --image-root {root}" in text and "Grouped by group" in text
    assert json.loads(out.read_text().splitlines()[0]) == {
        "image": ["a.png", "a.png"], "question": "Is <image> newer than <image>, 0?", "answer": "no",
        "system": "Be brief.", "turns": [["Hello.", "Hello."]], "id": "0", "group": "0",
    }  # fmt: skip
    assert [replace(s, source="") for s in samples_of(out, root)] == [
        replace(s, source="") for s in samples_of(root / "m")
    ]
    with pytest.raises(SystemExit):
        main(["--data", str(root / "m"), "--group-field", "patients", "--write", str(tmp_path / "more.jsonl")])
    assert "must name columns of the data, but got group=patients" in capsys.readouterr().err
    (root / "m").unlink()


@pytest.mark.parametrize("key", ["text", "question"])
def test_a_large_manifest_is_read_in_seconds(root: Path, tmp_path: Path, key: str) -> None:
    made = [{"image": IMAGES[n % 3], key: f"<image> q{n}", "answer": "a", "patient_id": n} for n in range(30_000)]
    (tmp_path / "m").write_text(json.dumps(made))
    begun = time.process_time()
    assert len(samples_of(tmp_path / "m", root)) == len(made)
    assert time.process_time() - begun < 5  # 0.5 s alone
