"""Formats of labelled image data: recognised by their content, the same entries from each, and one sentence for
everything that is not understood or that cannot be trained with."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from entries import as_entry, as_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from train_fn.data.manifest import divide, read_manifest
from train_fn.data.rows import DEFAULT_QUESTION, PARTS
from train_fn.data.samples import Sample
from train_fn.inspect import main
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.plan.prepare import prepare

IMAGES = ("a.png", "b c.png", "deep/c.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image root with IMAGES, each different."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "deep").mkdir()
    for number, name in enumerate(IMAGES):
        noise(folder / name, number)
    return folder


def noise(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32), np.uint8)).save(path)
    return path


def rows(*answers: str, **more: Any) -> list[dict[str, Any]]:
    """Entries about IMAGES in turn."""
    return [
        {"image": IMAGES[n % 3], "question": f"Question {n}?", "answer": answer, **more}
        for n, answer in enumerate(answers)
    ]


def samples_of(path: Path, root: Path | None = None, *columns: str, **options: Any) -> list[Sample]:
    """The samples of data without faults."""
    reading = read_manifest(path, root, columns, **options)
    assert reading.problems == []
    return reading.samples


def read(path: Path, root: Path, *columns: str, question: str = "") -> list[dict[str, Any]]:
    return list(map(as_entry, samples_of(path, root, *columns, question=question)))


def divided(parts: dict[str, Any], question: str = "") -> tuple[dict[str, Any], list[str]]:
    """`divide` of entries."""
    found, problems = divide({name: its and list(map(as_sample, its)) for name, its in parts.items()}, question)
    return {name: its and list(map(as_entry, its)) for name, its in found.items()}, problems


def refusal(path: Path, root: Path, *columns: str) -> str:
    """The one problem of data that is refused."""
    (problem,) = read_manifest(path, root, columns).problems
    assert len(problem) < 1000 and "\n" not in problem and "Traceback" not in problem
    return problem


# ------------------------------------------------------------------------------------------------ writers
# Each writes rows (image, question, answer, and label or split) and returns the path for --data.


def lines(values: list[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def guides(row: dict[str, Any]) -> dict[str, Any]:
    return {"text" if key == "question" else key: value for key, value in row.items()}


def llava(row: dict[str, Any]) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]
    return {"id": "1", "image": row["image"], "conversations": turns} | (
        {"split": row["split"]} if "split" in row else {}
    )


def swift(row: dict[str, Any]) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"<image>{row['question']}"}, {"role": "assistant", "content": row["answer"]}]
    return {"messages": turns, "images": [row["image"]]} | ({"split": row["split"]} if "split" in row else {})


def openai(row: dict[str, Any]) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": row["image"]}}, {"type": "text", "text": row["question"]}]
    answer = [{"type": "text", "text": row["answer"]}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | ({"split": row["split"]} if "split" in row else {})


def as_json(form: Callable[[dict[str, Any]], Any]) -> Callable[[list[dict[str, Any]], Path, Path], Path]:
    def write(made: list[dict[str, Any]], folder: Path, root: Path) -> Path:
        (folder / "x").write_text(json.dumps([form(row) for row in made]))
        return folder / "x"

    return write


def as_lines(form: Callable[[dict[str, Any]], Any]) -> Callable[[list[dict[str, Any]], Path, Path], Path]:
    def write(made: list[dict[str, Any]], folder: Path, root: Path) -> Path:
        (folder / "x").write_text(lines([form(row) for row in made]))
        return folder / "x"

    return write


def as_csv(delimiter: str, encoding: str = "utf-8") -> Callable[[list[dict[str, Any]], Path, Path], Path]:
    def write(made: list[dict[str, Any]], folder: Path, root: Path) -> Path:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, made[0].keys(), delimiter=delimiter)
        table.writeheader()
        table.writerows(made)
        (folder / "x").write_bytes(text.getvalue().encode(encoding))
        return folder / "x"

    return write


def as_parquet(image: str) -> Callable[[list[dict[str, Any]], Path, Path], Path]:
    def write(made: list[dict[str, Any]], folder: Path, root: Path) -> Path:
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow_table(made, root, image), folder / "x", row_group_size=2)
        return folder / "x"

    return write


def arrow_table(made: list[dict[str, Any]], root: Path, image: str) -> Any:
    """A table with images as "path", "bytes", or "struct" of bytes and path, as `datasets` writes them."""
    import pyarrow

    forms = {
        "path": lambda name: name,
        "bytes": lambda name: (root / name).read_bytes(),
        "struct": lambda name: {"bytes": (root / name).read_bytes(), "path": None},
    }
    return pyarrow.Table.from_pylist([{**row, "image": forms[image](row["image"])} for row in made])


def save_arrow(table: Any, folder: Path) -> None:
    """A folder as `Dataset.save_to_disk` writes it: two arrow files in stream format, and state.json."""
    import pyarrow

    folder.mkdir(parents=True)
    names = []
    for number, part in enumerate((table.slice(0, 1), table.slice(1))):
        names.append(f"data-{number:05}-of-00002.arrow")
        with (
            pyarrow.OSFile(str(folder / names[-1]), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def as_saved(image: str) -> Callable[[list[dict[str, Any]], Path, Path], Path]:
    def write(made: list[dict[str, Any]], folder: Path, root: Path) -> Path:
        shutil.rmtree(folder / "saved", ignore_errors=True)
        save_arrow(arrow_table(made, root, image), folder / "saved")
        return folder / "saved"

    return write


FORMATS = {
    "JSON": as_json(guides),
    "JSON Lines": as_lines(guides),
    "JSON with other names": as_json(dict),
    "JSON Lines with other names": as_lines(dict),
    "LLaVA JSON": as_json(llava),
    "LLaVA JSON Lines": as_lines(llava),
    "ms-swift JSON": as_json(swift),
    "ms-swift JSON Lines": as_lines(swift),
    "OpenAI JSON": as_json(openai),
    "OpenAI JSON Lines": as_lines(openai),
    "CSV": as_csv(","),
    "CSV with semicolons": as_csv(";"),
    "CSV with a mark": as_csv(",", "utf-8-sig"),
    "TSV": as_csv("\t"),
    "parquet with paths": as_parquet("path"),
    "parquet with bytes": as_parquet("bytes"),
    "parquet with structs": as_parquet("struct"),
    "saved, with paths": as_saved("path"),
    "saved, with structs": as_saved("struct"),
}
CONVERSATIONS = ("LLaVA", "ms-swift", "OpenAI")  # these have no labels
# Without control characters and halves of characters, and not blank; line ends, quotes and delimiters may occur.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from('\n",;\t|'), min_size=1).map(str.strip)
WORDS = TEXT.filter(lambda text: text and "<image>" not in text)
ROWS = st.fixed_dictionaries({"image": st.sampled_from(IMAGES), "question": WORDS, "answer": WORDS})


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_row_is_the_same_in_every_format(name: str, root: Path, tmp_path: Path, data: st.DataObject) -> None:
    extra = data.draw(st.sampled_from(["", "split"] if name.startswith(CONVERSATIONS) else ["", "split", "label"]))
    kinds = {"split": st.sampled_from(sorted(PARTS)), "label": st.integers(0, 99)}
    shape = ROWS if not extra else st.tuples(ROWS, kinds[extra]).map(lambda pair: pair[0] | {extra: pair[1]})
    made = data.draw(st.lists(shape, min_size=2, max_size=6))
    found = read(FORMATS[name](made, tmp_path, root), root)
    assert len(found) == len(made)
    for entry, row in zip(found, made, strict=True):
        assert Path(entry["image"]).read_bytes() == (root / row["image"]).read_bytes()
        assert (entry["text"], entry["answer"]) == (row["question"], row["answer"])
        assert entry["label"] == row.get("label", row["answer"])
        assert entry.get("split") == (PARTS[row["split"]] if extra == "split" else None)


def test_other_keys_of_the_guides_entries_do_not_matter(root: Path, tmp_path: Path) -> None:
    made = [{"image": "a.png", "text": "Q?", "answer": "yes", "label": 1, "note": [3], "conversations": "none"}]
    (tmp_path / "m.json").write_text(json.dumps(made))
    (found,) = read(tmp_path / "m.json", root)
    assert found == {"image": str((root / "a.png").resolve()), "text": "Q?", "answer": "yes", "label": 1}


# ------------------------------------------------------------------------------------------------ tables


def table(folder: Path, text: str) -> Path:
    (folder / "x.csv").write_bytes(text.encode())
    return folder / "x.csv"


def test_quotes_line_ends_and_delimiters_in_cells(root: Path, tmp_path: Path) -> None:
    path = table(tmp_path, 'Image Path;Question;Class\r\na.png;"one\r\n""two""; three";x\r\n\r\n"b c.png";q;"y;z"\r\n')
    one, two = read(path, root)
    assert (one["text"], one["answer"]) == ('one\r\n"two"; three', "x")
    assert (two["image"], two["answer"]) == (str(root.resolve() / "b c.png"), "y;z")


def test_usual_names_and_labels(root: Path, tmp_path: Path) -> None:
    assert read(table(tmp_path, "file_name,label\na.png,3\nb c.png,4\n"), root)[0] == {
        "image": str(root.resolve() / "a.png"), "text": DEFAULT_QUESTION, "answer": "3", "label": "3"
    }  # fmt: skip
    one, _ = read(table(tmp_path, 'image, answer\ra.png, "x, y"\rb c.png, z\r'), root)
    assert one["answer"] == "x, y"
    made = [llava(row) | {"prompt": "p", "query": "q", "caption": "c", "class": "d"} for row in rows("x", "y")]
    (tmp_path / "m").write_text(json.dumps(made))
    assert read(tmp_path / "m", root)[0]["text"] == "Question 0?"
    one, _ = read(table(tmp_path, "img,query,response,label\na.png,q,x,10\na.png,r,y,9\n"), root)
    assert (one["text"], one["answer"], one["label"]) == ("q", "x", 10)
    (tmp_path / "m").write_text(json.dumps([{"image": "a.png", "label": "x"}]))
    assert read(tmp_path / "m", root)[0]["answer"] == "x"
    made = [{"image_name": "a.png", "question": "How many?", "answer": 2, "image_organ": "head"}] * 2
    (tmp_path / "vqa").write_text(json.dumps(made))
    assert read(tmp_path / "vqa", root)[0]["answer"] == "2"


def test_columns_name_what_has_other_names(root: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "scan,what is asked,finding,text\na.png,q,x,long\nb c.png,r,y,long\n")
    assert "--columns image=COLUMN,answer=COLUMN" in refusal(path, root) and "'finding'" in refusal(path, root)
    one, _ = read(path, root, "image=scan", "question=what is asked", "answer=finding")
    assert (one["text"], one["answer"]) == ("q", "x")
    problem = refusal(path, root, "image=scan", "answer=findings")
    assert "answer=findings" in problem and "'finding'" in problem
    path = table(tmp_path, "image,caption,class\na.png,x,y\nb c.png,x,y\n")
    assert "add --columns answer=caption" in refusal(path, root)
    assert read(path, root, "answer=class")[0]["answer"] == "y"
    (tmp_path / "x").write_text(lines([{"a": "a.png", "b": "yes"}] * 2))
    assert read(tmp_path / "x", root, "image=a", "answer=b", question="Why?")[0]["text"] == "Why?"


def test_questions_are_not_dropped_for_one_question(root: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "image,id,asked,answer\na.png,1,q,x\nb c.png,2,Is it?,y\n")
    assert "'asked' may be it: add --columns question=asked, or --question" in refusal(path, root)
    assert [entry["text"] for entry in read(path, root, "question=asked")] == ["q", "Is it?"]
    assert [entry["text"] for entry in read(path, root, question="Why?")] == ["Why?"] * 2
    path = as_parquet("bytes")([{"image": "a.png", "asked": "What is it", "answer": "x"}], tmp_path, root)
    assert "'asked' may be it" in refusal(path, root)
    for form in (guides, dict, llava):
        entries = read(as_json(form)(rows("x", "y"), tmp_path, root), root, question="Why?")
        assert "`--question` must go with data without questions" in divided({"data": entries}, "Why?")[1][0]


def test_a_split_column_and_what_contradicts_it(root: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "image,answer,split\na.png,x,train\na.png,y,Valid\na.png,z,test\na.png,u,TRAIN\n")
    entries = read(path, root)
    parts, problems = divided({"data": entries, "val_data": None, "test_data": None})
    assert {name: [entry["answer"] for entry in part or []] for name, part in parts.items()} == {
        "data": ["x", "u"], "val_data": ["y"], "test_data": ["z"]
    }  # fmt: skip
    assert not problems
    _, problems = divided({"data": entries, "val_data": None, "test_data": entries})
    assert len(problems) == 2 and "`--test-data` must be left out" in problems[1] and "3 entries" in problems[0]
    _, problems = divided({"data": entries[1:3], "val_data": None, "test_data": None})
    assert "must have entries of the split train" in problems[0]
    problem = refusal(table(tmp_path, "image,answer,split\na.png,x,train\na.png,y,fold 1\n"), root)
    assert problem.startswith("x.csv line 3 must have the split train, validation or test, but has 'fold 1'")


def test_a_part_without_labels_gets_those_of_the_others(root: Path, tmp_path: Path) -> None:
    data = read(table(tmp_path, "image,answer,label\na.png,no,0\na.png,mass,1\n"), root)
    test = read(table(tmp_path, "image,answer\na.png,mass\na.png,other\n"), root)
    parts, problems = divided({"data": data, "val_data": None, "test_data": test})
    assert not problems and parts["data"] == data and parts["val_data"] is None
    assert [entry["label"] for entry in parts["test_data"] or []] == [1, "other"]


def test_a_manifest_for_predict_is_asked_the_adapters_question(root: Path) -> None:
    from train_fn.predict import find_samples

    try:
        path = table(root, "image,class\na.png,x\nb c.png,y\n")
        assert {sample.question for sample in find_samples(path, None, "Is it?")[0]} == {"Is it?"}
        path = table(root, "image,question,class\na.png,Why?,x\nb c.png,Why?,y\n")
        assert {sample.question for sample in find_samples(path, None, "Is it?")[0]} == {"Why?"}
    finally:
        (root / "x.csv").unlink()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,answer\na.png,x,y\n", "x.csv line 2 must have 2 cells, as the header has, but has 3"),
        ('image,answer\na.png,"x\n', "line 2 must be CSV"),
        ("image,answer\n", "a header only"),
        ("image,answer,answer\na.png,x,y\n", "must name each column once, but has ['answer']"),
        ("image,answer\na.png,\nb c.png,\n", "x.csv line 2 (and 1 more) must have an answer, but has none"),
        ("image,question,answer\na.png,,x\na.png,q,x\n", "line 2 must have a question, but has none"),
        ("image,answer\n,x\na.png,x\n", "line 2 must have an image, but has none"),
        ("image,answer\nnone.png,x\n", "x.csv line 2: image 'none.png' must be an existing file under the image root"),
        ("image,answer\n../outside.png,x\n", "image root"),
        ("image,answer\nhttps://host/a.png,x\n", "download it first"),
        ("image,answer,label\na.png,x,1\na.png,x,\n", "x.csv line 3 must have a label, as others have"),
        ("id,finding\n1,x\n2,y\n", "must have a column for image and answer, but its columns are ['id', 'finding']"),
        ("image,question,answer\na.png,<image> q <image>,x\n", "but has 1 and 2"),
        (f"image,answer\na.png,{'x' * 200_000}\n", "must be CSV, but field larger"),
    ],
)
def test_a_table_that_cannot_be_used(root: Path, tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(table(tmp_path, text), root)


# ------------------------------------------------------------------------------------------------ conversations


def turns(*texts: str, roles: str = "ua") -> list[dict[str, str]]:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": names[role], "content": text} for role, text in zip(roles, texts, strict=True)]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": turns("<image>q", "a"), "images": ["a.png"] * 2}, "but has 2 and 1: write <image> once for each"),
    ({"messages": turns("<image>q", "a")}, "but has 0 and 1"),
    ({"messages": turns("<image>q", "<image>"), "images": ["a.png"]}, "but has 1 and 2"),
    ({"messages": turns("q", "<image>"), "images": ["a.png"]}, "in its questions only, but has it in '<image>'"),
    ({"messages": turns("<image>", "q", "a", roles="sua"), "images": ["a.png"]}, "<image> in its questions only"),
    ({"messages": turns("<image>q", "a", "<image>r", "b", roles="uaua"), "images": "a.png"}, "but has 1 and 2"),
    ({"messages": turns("q", "a", "r", "b", roles="uaua")}, " must have an image, but has none"),
    ({"messages": [*turns("<image>q", roles="u"), {"role": "assistant", "content": "a", "loss": False}],
      "images": ["a.png"]}, 'but each has "loss": false: take the entry out'),
    ({"messages": turns("<image>q", "a"), "images": "a.png", "system": ["Be kind."]}, "text as its system prompt, but"),
    ({"messages": turns("q", "a"), "images": []}, " must have an image, but has none"),
    ({"messages": turns("<image>q", roles="u"), "images": "a.png"}, " must have an answer, but has none"),
    ({"messages": turns("<image>q", ""), "images": "a.png"}, " must have an answer, but has none"),
    ({"messages": turns("a", "<image>q", roles="au"), "images": "a.png"},
     "question and answer in turn, but has assistant, user"),
    ({"messages": turns("<image>q", "a", roles="ut"), "images": "a.png"}, "turns of role (system, human, user"),
    ({"messages": [], "images": "a.png"}, " must have a list as messages, but has []"),
    ({"messages": "q", "images": "a.png"}, " must have a list as messages, but has 'q'"),
    ({"messages": turns("<image>q", 3), "images": "a.png"}, " must have text or parts as content, but has 3"),
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "parts of type text or image"),
    ({"messages": turns("<image>q", "a"), "images": ["data:image/png;base64,?"]}, " must have an image in bytes, but"),
    ({"messages": turns("<image>q", "a"), "images": ["data:image/png;base64,QUJD"]}, "begin with b'ABC'"),
    ({"messages": turns("<image>q", "a"), "images": [3]}, "an image's path or bytes, but has 3"),
    ({"messages": turns("<image>q", "a"), "images": "a.png", "videos": ["v"]}, " must have images only, but has v"),
    ({"messages": turns("<image>q", "a"), "images": [["a.png"]]}, "an image's path or bytes, but has [['a.png']]"),
    ({"conversations": [{"from": "alien", "value": "q"}], "image": "a.png"}, "turns of from (system, human"),
    ({"conversations": [{"from": "human", "value": "q"}], "image": "a.png"}, " must have an answer, but has none"),
]  # fmt: skip


@pytest.mark.parametrize("write", [json.dumps, lines])
@pytest.mark.parametrize(("entry", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_trained_with_is_refused_with_its_entry(root, tmp_path, entry, words, write) -> None:
    good = {"messages": turns("<image>q", "a"), "images": ["a.png"]}
    if "conversations" in entry:
        good = llava(rows("x")[0])
    (tmp_path / "m").write_text(write([good, entry, entry]))
    reading = read_manifest(tmp_path / "m", root)
    entries, problems = reading.samples, reading.problems
    where = "entry 1" if write is json.dumps else "line 2"
    assert len(entries) == 1 and any(words in p and f"m {where} (and 1 more) " in p for p in problems), problems


def test_llava_moves_the_image_from_the_end_to_the_beginning(root: Path, tmp_path: Path) -> None:
    made = llava(rows("x")[0])
    made["conversations"][0]["value"] = "What is it?\n<image>"
    (tmp_path / "m").write_text(json.dumps([made]))
    assert read(tmp_path / "m", root)[0]["text"] == "What is it?"


def test_query_and_response_with_what_stands_beside_them(root: Path, tmp_path: Path) -> None:
    made = {"query": "<image>q", "response": "a", "images": ["a.png"], "history": [], "system": ""}
    (tmp_path / "m").write_text(lines([made] * 2))
    assert read(tmp_path / "m", root)[0]["text"] == "q"
    (tmp_path / "m").write_text(lines([made | {"history": [["<image>p", "b"]], "query": "q", "system": "Be kind."}]))
    (tmp_path / "m").rename(tmp_path / "m.jsonl")  # a single line
    (sample,) = samples_of(tmp_path / "m.jsonl", root)
    assert (sample.question, sample.turns, sample.system) == ("q", (("p", "b"),), "Be kind.")
    (tmp_path / "m").write_text(lines([made | {"history": ["p", "b"]}, made]))
    assert "m line 1 must have pairs of question and answer as its history" in refusal(tmp_path / "m", root)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["a.png", "<image>", "user", "assistant", "text", "image", "data:image/png;base64,", "train"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "image_url", "url", "bytes"]),
        inner, max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip
KEYS = ["image", "images", "messages", "conversations", "question", "text", "answer", "label", "class", "split",
        "system", "history", "turns", "id", "group", "question_type", "videos", "x"]  # fmt: skip


SOUND = st.sampled_from([
    {"image": "a.png", "text": "q", "answer": "a", "label": 1},
    {"image": ["a.png", "b c.png"], "question": "<image> or <image>?", "answer": "a", "history": [["q", "a"]]},
    {"images": ["a.png"], "messages": turns("<image>q", "a", "r", "b", roles="uaua"), "system": "Be kind."},
])  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sound=SOUND,
    changes=st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3) | VALUES, min_size=1, max_size=3),
    options=st.sampled_from([{}, {"multilabel": ";"}, {"answers_optional": True}]),
)
def test_any_values_give_samples_or_sentences(
    root: Path, tmp_path: Path, sound: dict[str, Any], changes: list[Any], options: dict[str, Any]
) -> None:
    made = [sound, *(sound | change if isinstance(change, dict) else change for change in changes)]
    for content in (json.dumps(made), lines(made)):
        (tmp_path / "m").write_text(content)
        reading = read_manifest(tmp_path / "m", root, **options)
        assert reading.samples or reading.problems
        assert all(len(problem) < 1000 and "\n" not in problem for problem in reading.problems)
        for sample in reading.samples:
            assert all(map(os.path.isfile, sample.images)) and sample.question.strip()
            assert sample.answer.strip() or options.get("answers_optional")
            assert isinstance(sample.label, int | str)
            questions = [*(question for question, _ in sample.turns), sample.question]
            assert sum(question.count("<image>") for question in questions) in (0, len(sample.images))


@pytest.mark.parametrize("write", ["parquet", "saved"])
def test_damaged_bytes_give_sentences(root: Path, tmp_path: Path, write: str) -> None:
    made = rows("x", "y", "z", split="train")
    path = (as_parquet("struct") if write == "parquet" else as_saved("struct"))(made, tmp_path, root)
    file = path if path.is_file() else path / "data-00001-of-00002.arrow"
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 20)):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        reading = read_manifest(path, root)
        entries, problems = reading.samples, reading.problems
        assert entries or problems
        assert all(len(problem) < 1000 for problem in problems)


def test_images_in_data_urls(root: Path, tmp_path: Path) -> None:
    content = (root / "a.png").read_bytes()
    row = rows("x")[0] | {"image": f"data:image/png;base64,{base64.b64encode(content).decode()}"}
    (tmp_path / "m").write_text(json.dumps([openai(row)] * 2))
    found = read(tmp_path / "m", root)
    assert Path(found[0]["image"]).read_bytes() == content and found[0] == found[1]


# ------------------------------------------------------------------------------------------------ parquet, arrow


def test_image_bytes_are_written_once_under_their_hash(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photo = noise(tmp_path / "p.jpg", 9)
    made = [*rows("x", "y", "z", "u"), {"image": str(photo), "question": "q", "answer": "v"}]
    path = as_parquet("struct")(made, tmp_path, root)
    images = {entry["image"] for entry in read(path, root)}
    assert len(images) == 4 and sorted(Path(image).suffix for image in images) == [".jpg", ".png", ".png", ".png"]
    assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 4
    before = {image: os.stat(image).st_mtime_ns for image in images}
    cut = min(images)
    Path(cut).write_bytes(b"")  # as after a power loss
    read(path, root)
    assert all(os.stat(image).st_mtime_ns == before[image] for image in images - {cut}) and os.path.getsize(cut)
    (tmp_path / "none").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert "the cache cannot be written" in read_manifest(path, root).problems[0]


def test_classes_of_datasets_are_answered_by_name(root: Path, tmp_path: Path) -> None:
    import pyarrow

    made = [{"image": {"bytes": (root / "a.png").read_bytes(), "path": "a.png"}, "label": n} for n in (0, 1, -1)]
    names = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    whole = pyarrow.Table.from_pylist(made).replace_schema_metadata({"huggingface": json.dumps(names)})
    save_arrow(whole.slice(0, 2), tmp_path / "saved")
    assert [entry["answer"] for entry in read(tmp_path / "saved", root)] == ["no", "yes"]
    save_arrow(whole, tmp_path / "more")
    assert "row 1 must have an answer, but has none" in refusal(tmp_path / "more", root)


def test_a_saved_set_of_parts(root: Path, tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        save_arrow(arrow_table(rows(part, part), root, "struct"), tmp_path / "saved" / part)
    splits = tmp_path / "saved" / "dataset_dict.json"
    splits.write_text('{"splits": ["train", "validation", "test"]}')
    assert [(e["answer"], e["split"]) for e in read(tmp_path / "saved", root)] == [
        (part, part) for part in ("train", "train", "validation", "validation", "test", "test")
    ]
    state = tmp_path / "saved" / "test" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_indices_data_files": ["x"]}))
    assert "call flatten_indices()" in refusal(tmp_path / "saved", root)
    for text in ('{"splits": ["gone"]}', "[", "{}", '{"splits": [3]}'):
        splits.write_text(text)
        assert str(tmp_path / "saved") in refusal(tmp_path / "saved", root)


def test_an_arrow_file_and_messages_in_parquet(root: Path, tmp_path: Path) -> None:
    import pyarrow.feather
    import pyarrow.parquet

    pyarrow.feather.write_feather(
        arrow_table(rows("x", "y"), root, "bytes"), tmp_path / "x", compression="uncompressed"
    )
    assert [entry["answer"] for entry in read(tmp_path / "x", root)] == ["x", "y"]
    made = [{**swift(row), "images": [{"bytes": (root / row["image"]).read_bytes()}]} for row in rows("x", "y")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), tmp_path / "x")
    assert [entry["answer"] for entry in read(tmp_path / "x", root)] == ["x", "y"]


def test_damaged_and_foreign_parquet(root: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    path = as_parquet("struct")(rows("x", "y", "z"), tmp_path, root)
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:40], b"PAR1", b"ARROW1", b"\xff\xff\xff\xff\x10\x00\x00\x00"):
        path.write_bytes(content)
        assert "must be a whole parquet or arrow file" in refusal(path, root)
    for answer in (["x", "y"], {"text": ["x"]}, True, b"x"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": "a.png", "answer": answer}] * 2), path)
        assert f"x row 0 (and 1 more) must have text as its answer, but has {answer!r}" in refusal(path, root)
    pyarrow.parquet.write_table(pyarrow.table({"scan": [b"x" * 9], "finding": ["a"], "n": [1]}), path)
    assert "its columns are ['scan', 'finding', 'n']" in refusal(path, root)
    assert "row 0 must have an image in bytes" in refusal(path, root, "image=scan", "answer=finding")
    pyarrow.parquet.write_table(
        pyarrow.table({"image": pyarrow.array([], "string"), "answer": pyarrow.array([], "string")}), path
    )
    assert "must have rows" in refusal(path, root)


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    folder = tmp_path / "classes"
    for number, name in enumerate(("Benign mass/1.png", "Benign mass/p1/2.JPG", "normal/3.png")):
        noise(folder / name, number)
    for name in (".DS_Store", "normal/._3.png", "normal/Thumbs.db", "README.md", ".git/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    return folder


def test_a_folder_of_classes(classes: Path) -> None:
    found = read(classes, classes.parent)
    assert [(Path(e["image"]).name, e["text"], e["answer"], e["label"]) for e in found] == [
        ("1.png", DEFAULT_QUESTION, "Benign mass", "Benign mass"),
        ("2.JPG", DEFAULT_QUESTION, "Benign mass", "Benign mass"),
        ("3.png", DEFAULT_QUESTION, "normal", "normal"),
    ]  # fmt: skip
    assert read(classes, classes.parent, question="What?")[0]["text"] == "What?"


def test_a_folder_of_parts(classes: Path, tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        shutil.copytree(classes, tmp_path / "parts" / part)
    found = read(tmp_path / "parts", tmp_path)
    assert len(found) == 9 and {entry["split"] for entry in found} == {"train", "validation", "test"}
    (tmp_path / "parts" / "extra").mkdir()
    assert "has test/ and extra/" in refusal(tmp_path / "parts", tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loose.png", "must hold its images in folders of classes, but 'loose.png' lies beside them"),
        ("empty/", "class folder empty/ must hold images"),
        ("normal/4.psd", "class folder normal/ must hold images only, but has 1x .psd"),
        ("normal/3_mask.png", "class folder normal/ must hold no masks, but has '3_mask.png' (1 masks)"),
        ("normal/train/3.png", "must have parts above the classes, but has train/ in normal/"),
    ],
)
def test_a_folder_that_is_not_understood(classes: Path, name: str, words: str) -> None:
    if name.endswith("/"):
        (classes / name).mkdir()
    else:
        noise(classes / (name if name.endswith("png") else "x.png"), 7)
        if not name.endswith("png"):
            shutil.move(classes / "x.png", classes / name)
    assert words in refusal(classes, classes.parent)


def test_folders_without_classes(tmp_path: Path) -> None:
    assert "but holds nothing" in refusal(tmp_path, tmp_path)
    noise(tmp_path / "a.png", 0)
    assert "1x .png: move the images into a folder for each class" in refusal(tmp_path, tmp_path)
    (tmp_path / "m.csv").write_text("")
    assert f"manifest {tmp_path / 'm.csv'} must be" in refusal(tmp_path, tmp_path)


# ------------------------------------------------------------------------------------------------ nonsense


def nonsense(number: int) -> bytes:
    """A file of the given kind that is no data set."""
    rng = np.random.default_rng(number)
    text = ["", " ", "\n\n", "hello", "hello\nworld", "a,b", "a,b\nc", "a,b\nc,d", "{", "{}", "{}\n{}", "{}\n[", "[",
            "[]", "[[]]", "[{}]", "[3]", "null", "3", '"x"', "a\tb\nc\td", "image", "image,answer", "<html></html>",
            '{"a": [1]}', '{"a": {"b": 1}}', '{"image": 1}\n3', '{"image": 1}\n{"image": 2}', '[{"messages": 3}]',
            '[{"conversations": []}]', '[{"a": 1, "b": 2}]', "NaN", "image;answer\n;;;;\n", "\0" * 50, "---\na: 1",
            '[{"image": "a.png", "answer": {"x": 1}}]', '{"messages": [[]]}\n{}', "x" * 70_000 + "\n", "\u2028\u2029",
            '{"messages": 3, "conversations": 3}\n{"image": []}']  # fmt: skip
    binary = [b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\x1f\x8b", b"PAR1PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff",
              b"\xff\xfe[\0", b"%PDF-1.7", b"SQLite format 3\0", b"\x93NUMPY", b"\x80\x04"]  # fmt: skip
    kinds = [*(entry.encode() for entry in text), *(entry + rng.bytes(200) for entry in binary)]
    return kinds[number] if number < len(kinds) else rng.bytes(int(rng.integers(1, 300)))


@pytest.mark.parametrize("number", range(60))
def test_nonsense_gets_one_sentence(root: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "m.json").write_bytes(nonsense(number))
    reading = read_manifest(tmp_path / "m.json", root)
    entries, problems = reading.samples, reading.problems
    assert not entries and problems and all("m.json" in text and len(text) < 1000 for text in problems)
    assert len(problems) == 1 or nonsense(number).count(b"\n"), problems


def test_a_file_of_another_kind_gets_the_list_of_formats(root: Path, tmp_path: Path) -> None:
    for content, shown in ((b"%PDF-1.7 \xff", "b'%PDF-1.7'"), (b"<html></html>", "'<html></html>'")):
        (tmp_path / "m").write_bytes(content)
        problem = refusal(tmp_path / "m", root)
        assert shown in problem and "CSV or TSV with a header, parquet" in problem
    (tmp_path / "m").write_text('{"train": [{"image": "a.png"}]}')
    assert "json.load(open('m'))['train']" in refusal(tmp_path / "m", root)


# ------------------------------------------------------------------------------------------------ studies, inspect


def study_folder(folder: Path, *parts: str) -> Path:
    """A folder of two classes with eight images each, in parts or not."""
    for number, part in enumerate(parts or ("",)):
        for label, name in enumerate(("no mass", "mass")):
            for n in range(8):
                noise(folder / part / name / f"{n}.png", 1000 * number + 100 * label + n)
    return folder


def test_a_folder_of_parts_is_a_study(tmp_path: Path) -> None:
    data = study_folder(tmp_path / "data", "train", "val", "test")
    argv = ["--data", str(data), "--results", str(tmp_path / "results"), "--question", "Is there a mass?"]
    study = prepare(parse(argv), lambda text: None)
    for part, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        samples = getattr(study.splits, part)
        assert len(samples) == 16 and all(f"/{name}/" in sample.image for sample in samples)
        assert {sample.question for sample in samples} == {"Is there a mass?"}
    assert study.splits.candidates == ("mass", "no mass")
    assert study.plan["settings"]["data"]["question"] == "Is there a mass?"
    with pytest.raises(SettingsError) as refused:
        prepare(parse([*argv, "--test-data", str(study_folder(tmp_path / "more"))]), lambda text: None)
    assert any("`--test-data` must be left out" in problem for problem in refused.value.problems)


@pytest.mark.parametrize(
    ("answer", "more", "aim"),
    [
        (lambda n: ("no", "yes")[n % 2], [], "macro_f1"),
        (lambda n: ("no", "yes")[n % 2], ["--metric", "accuracy"], "accuracy"),
        (lambda n: ("no", "yes")[n % 2], ["--metric", "auroc", "--require", "sensitivity>=0.8"], "sensitivity>=0.8"),
        (lambda n: ("no", "yes")[n % 2], ["--require", "sensitivity>=0.8", "--decide", "argmax"], "argmax"),
        (lambda n: str(n % 4), ["--ordinal", "0,1,2,3", "--metric", "quadratic_kappa"], "quadratic_kappa"),
        (lambda n: str(10 + n), ["--numeric"], "argmax"),  # nothing is decided between
        (lambda n: f"finding number {n}", [], "argmax"),
        (lambda n: ("Benign;Malignant", "Benign")[n % 2], ["--multilabel", ";"], "argmax"),
    ],
)
def test_what_answers_are_chosen_for_follows_what_is_asked(tmp_path: Path, answer, more, aim) -> None:
    study_folder(tmp_path / "data", "a", "b")
    paths = sorted(path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*.png"))
    entries = [{"image": str(path), "text": "What?", "answer": answer(n)} for n, path in enumerate(paths)]
    (tmp_path / "data" / "all.json").write_text(json.dumps(entries))
    argv = ["--data", str(tmp_path / "data" / "all.json"), "--results", str(tmp_path / "results"), *more]
    study = prepare(parse(argv), lambda text: None)
    assert study.splits.decide == study.settings.study.decide == study.plan["settings"]["study"]["decide"] == aim
    if not study.splits.has_candidates or "--multilabel" in more:
        with pytest.raises(SettingsError, match="`--decide` accuracy needs a task with one answer of a set"):
            prepare(parse([*argv, "--name", "other", "--decide", "accuracy"]), lambda text: None)


def test_paths_of_a_test_manifest_start_from_its_own_folder(tmp_path: Path) -> None:
    for folder in ("data", "test"):  # the same names, other images
        study_folder(tmp_path / folder)
        entries = [{"image": f"{name}/{n}.png", "text": "Is there a mass?", "answer": name} for name in
                   ("mass", "no mass") for n in range(8)]  # fmt: skip
        (tmp_path / folder / "all.json").write_text(json.dumps(entries))
    argv = ["--data", str(tmp_path / "data" / "all.json"), "--results", str(tmp_path / "results")]
    study = prepare(parse([*argv, "--test-data", str(tmp_path / "test" / "all.json")]), lambda text: None)
    assert {Path(sample.image).parents[1].name for sample in study.splits.test} == {"test"}
    assert {Path(sample.image).parents[1].name for sample in study.splits.train} == {"data"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--columns", "x=y"], "`--columns` must be ROLE=COLUMN, with one of the roles image, question"),
        (["--columns", "image=a,image=b"], "`--columns` must name each role only once"),
        (["--image-root", "."], "`--image-root` goes with a manifest"),
        (["--question", " "], "`--question`"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, argv: list[str], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse(["--data", str(tmp_path), *argv])
    assert words in "\n".join(refused.value.problems)
    with pytest.raises(SettingsError) as refused:
        parse(["--columns", "image=a", "--question", "Why?"])
    assert len(refused.value.problems) == 2 and all("goes with --data" in text for text in refused.value.problems)


def converted(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[list[dict[str, Any]], str]:
    """The entries of a manifest that `inspect --write` has made, and its output."""
    assert main([str(word) for word in argv]) == 0
    out = capsys.readouterr().out
    assert "A study can start with this data." in out
    return json.loads(Path(str(argv[argv.index("--write") + 1])).read_text()), out


def test_inspect_converts_a_folder_to_the_guides_json(tmp_path: Path, capsys) -> None:
    data = study_folder(tmp_path / "data", "train", "val", "test")
    made, out = converted(capsys, "--data", data, "--write", tmp_path / "m.json", "--question", "Why?")
    assert made[0] == {
        "image": "data/test/mass/0.png", "text": "Why?", "answer": "mass", "label": "mass", "split": "test"
    }  # fmt: skip
    assert "| mass" in out.replace("│", "|") and read(tmp_path / "m.json", tmp_path) == read(
        data, data, question="Why?"
    )
    (tmp_path / "out").mkdir()
    made, out = converted(capsys, "--data", data, "--write", tmp_path / "out" / "m.json")
    assert f"--image-root {data}" in out and made[0]["image"] == "test/mass/0.png"
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(data), "--write", str(tmp_path / "m.json")])
    assert ended.value.code == 2 and "must name a new file" in capsys.readouterr().err


def test_inspect_converts_parquet_with_its_images(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = study_folder(tmp_path / "data")
    made = [{"image": str(file.relative_to(data)), "finding": file.parent.name} for file in sorted(data.rglob("*.png"))]
    path = as_parquet("struct")(made, tmp_path, data)
    argv = ["--data", path, "--columns", "answer=finding"]
    assert main([*map(str, argv)]) == 0
    (tmp_path / "out").mkdir()
    entries, _ = converted(capsys, *argv, "--write", tmp_path / "out" / "m.json")
    shutil.rmtree(tmp_path / "cache")
    assert all(entry["image"].startswith("m_images/") for entry in entries)
    found = read(tmp_path / "out" / "m.json", tmp_path / "out")
    for entry, row in zip(found, made, strict=True):
        assert entry["answer"] == row["finding"]
        assert Path(entry["image"]).read_bytes() == (data / row["image"]).read_bytes()


@pytest.mark.parametrize("form", ["classes", "parts", "metadata", "metadata in parts", "a file beside its images"])
def test_a_folder_by_its_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.chdir(tmp_path)
    data = Path("some/data")
    if form == "classes":
        made = [noise(data / f"class {n % 2}" / f"{n}.png", n) for n in range(4)]
    elif form == "parts":
        made = [noise(data / part / f"class {n}" / f"{n}.png", n) for part in ("train", "test") for n in range(2)]
    else:
        parts = [data / "train", data / "test"] if form == "metadata in parts" else [data]
        made = [noise(part / f"{n}.png", n) for part in parts for n in range(2)]
        for part in parts:
            name = "data.csv" if form == "a file beside its images" else "metadata.csv"
            (part / name).write_text("file_name,label\n0.png,a\n1.png,b\n")
    reading = read_manifest(data)
    assert reading.problems == []
    assert sorted(sample.image for sample in reading.samples) == sorted(str(path.resolve()) for path in made)
