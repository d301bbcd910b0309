"""`python -m train_fn.inspect`: its tables, the problems that it reports, and its manifest of BUSI."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train_fn.data.copies import copy_pairs
from train_fn.data.images import image_size
from train_fn.data.phantoms import QUESTION, phantom
from train_fn.data.samples import Sample
from train_fn.data.settings import DataSettings
from train_fn.datasheet.facts import DataSheet, read_files
from train_fn.datasheet.make import make_sheet
from train_fn.datasheet.page import write_page
from train_fn.datasheet.tables import all_tables, quantiles
from train_fn.inspect import DATA_OPTIONS, build_parser, main
from train_fn.model.checkpoint import resolve_model
from train_fn.settings import flag
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.plan.prepare import prepare


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def busi_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the downloaded BUSI: 12 images of each class, masks beside them, and one image in two classes."""
    folder = tmp_path_factory.mktemp("busi")
    for label, name in enumerate(["normal", "benign", "malignant"]):
        (folder / name).mkdir()
        for n in range(1, 13):
            image, _, mask = phantom(np.random.default_rng([label, n]), label)
            Image.fromarray(image).save(folder / name / f"{name} ({n}).png")
            for suffix in ("_mask", "_mask_1")[: 1 + (n == 4)]:
                Image.fromarray(mask).save(folder / name / f"{name} ({n}){suffix}.png")
    shutil.copy(folder / "benign" / "benign (3).png", folder / "malignant" / "malignant (5).png")
    return folder


@pytest.fixture
def manifest(busi_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["--busi", str(busi_like), "--write", str(tmp_path / "m.json")]) == 0
    capsys.readouterr()
    return tmp_path / "m.json"


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit code and output, with cells separated by a single |."""
    code = main([str(word) for word in argv])
    out = capsys.readouterr().out
    assert max(map(len, (line for line in out.splitlines() if "│" in line)), default=0) <= 100
    return code, "\n".join(" ".join(line.replace("│", "|").split()) for line in out.splitlines())


def change(manifest: Path, *changes: dict) -> Path:
    """A copy with other first entries."""
    entries = json.loads(manifest.read_text())
    for number, values in enumerate(changes):
        entries[number] |= values
    path = manifest.with_name("changed.json")
    path.write_text(json.dumps(entries))
    return path


def test_busi_folder_becomes_the_guides_manifest(busi_like, tmp_path, capsys) -> None:
    path = tmp_path / "m.json"
    code, out = shown(capsys, "--busi", busi_like, "--write", path)
    assert code == 0 and f"--data {path} --image-root {busi_like}" in out and "| Malignant | 12 |" in out
    entries = json.loads(path.read_text())
    assert len(entries) == 36 and not any("mask" in entry["image"] for entry in entries)
    assert entries[0] == {"image": "normal/normal (1).png", "text": QUESTION, "answer": "Normal", "label": 0}
    assert {(e["image"].split("/")[0], e["answer"], e["label"]) for e in entries} == {
        ("normal", "Normal", 0), ("benign", "Benign", 1), ("malignant", "Malignant", 2)
    }  # fmt: skip
    assert main(["--busi", str(busi_like), "--write", str(path)]) == 2
    assert "`--write` must name a new file" in capsys.readouterr().err
    main(["--busi", str(busi_like), "--write", str(tmp_path / "other.json"), "--question", "What?"])
    assert {entry["text"] for entry in json.loads((tmp_path / "other.json").read_text())} == {"What?"}


def test_a_folder_that_is_not_busi(tmp_path, capsys) -> None:
    (tmp_path / "benign").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["--busi", str(folder), "--write", str(tmp_path / "m.json")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 4 and all(name in "".join(lines) for name in ("normal/", "benign/", "malignant/"))
    assert not (tmp_path / "m.json").exists()


def test_the_tables_show_a_studys_numbers(manifest, busi_like, capsys, tmp_path) -> None:
    code, out = shown(capsys, "--data", manifest, "--image-root", busi_like, "--val-fraction", 0.25)
    study = prepare(
        parse(["--data", str(manifest), "--image-root", str(busi_like), "--val-fraction", "0.25", "--allow-flips",
               "--results", str(tmp_path)]), lambda text: None,
    )  # fmt: skip
    assert study.splits.allow_flips
    assert code == 0 and out.endswith("A study can start with this data.")
    parts = [study.splits.class_counts(part) for part in ("train", "validation", "test")]
    for answer, *counts in zip(study.splits.candidates, *parts, strict=True):
        assert f"| {answer} | 12 | {' | '.join(map(str, counts))} |" in out
    assert "| PNG L | 36 | 128 / 128 / 128 | 128 / 128 / 128 |" in out
    report = study.data_report
    assert f"| images that have one | {report.num_grouped} |" in out and f"| pairs | {report.num_pairs} |" in out
    assert f"| groups with contradictory answers | {len(report.contradictions)} |" in out and report.contradictions
    assert f"| the same, had the split been random | {report.leaked_if_random:.0%} of" in out
    assert "benign/benign (3).png: Benign" in out and "malignant/malignant (5).png: Malignant" in out
    _, out = shown(capsys, "--data", manifest, "--image-root", busi_like, "--contradictions", "drop")
    assert "| images left out for a contradiction | 2 |" in out


def test_leaks_between_parts_of_the_user_are_counted(manifest, busi_like, capsys) -> None:
    _, out = shown(capsys, "--data", manifest, "--image-root", busi_like, "--test-data", manifest)
    assert "| test images with one in train or validation | 36 |" in out
    assert "| 3 different answers | 72 |" in out


def test_every_problem_is_shown_and_the_rest_is_counted(manifest, busi_like, capsys, tmp_path) -> None:
    busi_like = Path(shutil.copytree(busi_like, tmp_path / "copy"))
    (busi_like / "normal" / "[red]\x1b[2J.png").write_bytes(b"no image")
    bad = change(manifest, {"image": "normal/[red]\x1b[2J.png"}, {"image": "none.png"}, {"answer": 3}, {"label": 2})
    code, out = shown(capsys, "--data", bad, "--image-root", busi_like, "--val-data", tmp_path / "missing.json")
    assert code == 2 and out.endswith("A study cannot start with this data, for the reasons above.")
    for words in ("[red]\\x1b[2J.png must be decodable", "entry 1: image 'none.png'", "entry 2 must hold", "answer=3"):
        assert words in out
    assert "`--val-data`: manifest" in out and "\x1b" not in out
    assert "| Normal | 9 |" in out and "| Benign | 12 |" in out and "| PNG L | 33 |" in out
    code, out = shown(capsys, "--data", bad, "--image-root", busi_like)
    assert code == 2 and "each answer must go with one of the labels, but answer 'Normal' goes with" in out


def test_the_problems_are_those_of_a_study(manifest, busi_like, capsys) -> None:
    bad = change(manifest, {"answer": "Bening", "label": 5})
    argv = ["--data", str(bad), "--image-root", str(busi_like)]
    with pytest.raises(SettingsError) as caught:
        prepare(parse(argv), lambda text: None)
    code, out = shown(capsys, *argv)
    assert code == 2 and caught.value.problems and all(problem in out for problem in caught.value.problems)


def test_nothing_to_show(tmp_path, capsys) -> None:
    code, out = shown(capsys, "--data", tmp_path / "none.json")
    assert code == 2 and "must be an existing file" in out


def test_open_answers_are_no_classes(manifest, busi_like, capsys) -> None:
    captions = [{"answer": f"caption {n}", "label": n} for n in range(36)]
    code, out = shown(capsys, "--data", change(manifest, *captions), "--image-root", busi_like)
    assert code == 0 and "| 36 different answers | 36 |" in out and "tunes on the loss" in out


@pytest.mark.parametrize(
    "argv",
    [
        [], ["--busi", "x"], ["--data", "x", "--write", "y"], ["--data", "x", "--busi", "y", "--write", "z"],
        ["--busi", "x", "--write", "y", "--image-root", "z"], ["--data", "x", "--val-fraction", "0"],
        ["--data", "x", "--val-fraction", "0.5", "--test-fraction", "0.5"], ["--data", "x", "--test-fraction", "nan"],
        ["--data", "x", "--split-seed", "-1"], ["--data", "x", "--contradictions", "ignore"],
    ],
)  # fmt: skip
def test_a_wrong_command_line(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_neither_torch_nor_ray_is_loaded() -> None:
    code = "import sys, train_fn.inspect as i; i.main(['--data', 'none']); print({'torch', 'ray'} & sys.modules.keys())"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "set()"


# ------------------------------------------------------------------------------------------------ tasks and parts


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of three questions about each of 30 images: hostile names and answers, every fifth image turned."""
    root = tmp_path_factory.mktemp("mixed")
    entries = []
    for n in range(30):
        image = Image.fromarray(phantom(np.random.default_rng(n), n % 3)[0][:, :100])
        name = f"<script>alert({n})<.png" if n % 7 == 0 else f"\"onerror='{n}'.jpg"
        exif = image.getexif()
        if n % 5 == 0:
            exif[0x0112] = 6
        image.save(root / name, exif=exif)
        for text, answer in (
            ("Which class?", ["<script>alert(1)</script>", "<b>Benign", "\"onerror='x'"][n % 3]),
            ("Is there a mass?", ["no", "yes", "yes"][n % 3]),
            ("Describe the image.", f"Number {n} with <img src=x onerror=alert(2)> and 7 words"),
        ):
            entries.append({"image": name, "text": text, "answer": answer, "label": answer})
    (root / "m.json").write_text(json.dumps(entries))
    return root / "m.json"


def test_each_task_has_its_answers_counts_and_lengths(mixed, capsys) -> None:
    code, out = shown(capsys, "--data", mixed)
    assert code == 0
    words = " ".join(out.split())
    assert "Task is_there_a_mass (binary): 30 samples, 1 question 'Is there a mass?'" in words
    assert "Task which_class (closed): 30 samples" in words and "words a question 2, an answer 1" in words
    assert "the model writes them; words a question 3, an answer 9" in words
    assert "| yes | 20 | 12 |" in out and "| 30 different answers | 30 |" in out and "| <b>Benign | 10 |" in out


def test_turned_files_and_parts_are_counted(mixed, capsys) -> None:
    _, out = shown(capsys, "--data", mixed, "--val-fraction", 0.1, "--test-fraction", 0.3)
    turned, upright = [n for n in range(30) if n % 5 == 0], [n for n in range(30) if n % 5]
    png = sum(n % 7 == 0 for n in turned)
    assert f"| {sum(n % 7 == 0 for n in (*turned, *upright))} |" in out
    (line,) = (line for line in out.splitlines() if line.startswith("| PNG L"))
    assert line.split("|")[5].strip() == str(png)
    assert "| 100 / 100 / 128 | 100 / 128 / 128 |" in out
    rows = [line for line in out.splitlines() if line.startswith(("| train |", "| validation |", "| test |"))]
    assert [row.split("|")[5].strip() for row in rows] == ["60.0%", "10.0%", "30.0%"]
    assert sum(int(row.split("|")[2]) for row in rows) == 90


def test_answers_that_differ_by_case_or_blanks_are_all_shown_and_may_be_merged(manifest, busi_like, capsys) -> None:
    bad = change(manifest, *({"answer": "Normal " if n % 2 else "normal"} for n in range(8)))
    entries = json.loads(bad.read_text())
    bad.write_text(json.dumps([entry | {"label": entry["answer"]} for entry in entries]))
    code, out = shown(capsys, "--data", bad, "--image-root", busi_like)
    assert code == 2 and "'normal' (4x), 'Normal ' (4x), 'Normal' (4x)" in out
    assert "| 'Normal ' | 4 |" in out and "| normal | 4 |" in out
    code, out = shown(capsys, "--data", bad, "--image-root", busi_like, "--merge-variants")
    assert code == 0 and "Answers merged" in out and "| 3 different answers | 36 |" in out


def test_the_options_about_answers_are_those_of_a_study(manifest, busi_like, capsys) -> None:
    graded = change(manifest, *({"answer": str(n % 4), "label": n % 4} for n in range(36)))
    argv = ["--data", graded, "--image-root", busi_like]
    for options, kind in (([], "closed"), (["--ordinal", "0,1,2,3"], "ordinal"), (["--numeric"], "numeric"),
                          (["--max-answers", 3], "open")):  # fmt: skip
        _, out = shown(capsys, *argv, *options)
        assert f"Task ({kind})" in out
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert {flag(name) for name in DATA_OPTIONS} < flags and len(DATA_OPTIONS) > 15
    with pytest.raises(SystemExit):
        main([*map(str, argv), "--max-answers", "1", "--multilabel", "a", "--copies-distance", "x"])
    problems = capsys.readouterr().err
    with pytest.raises(SettingsError) as caught:
        parse([*map(str, argv), "--max-answers", "1", "--multilabel", "a"])
    assert len(caught.value.problems) == 2 and all(text in problems for text in caught.value.problems)
    assert "`--copies-distance` must be a whole number" in problems


def test_what_was_recognised_comes_first(busi_like, manifest, tmp_path, capsys) -> None:
    entries = json.loads(manifest.read_text())
    lines = "".join(f"{entry['image']},{entry['answer']},p{n // 3}\n" for n, entry in enumerate(entries))
    (tmp_path / "t.csv").write_text("file_name,class,patient_id\n" + lines)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, entries)))
    _, out = shown(capsys, "--data", tmp_path / "t.csv", "--image-root", busi_like)
    first, columns, groups = out.splitlines()[:3]
    assert first == "t.csv is CSV with 36 sound entries"
    assert "file_name as image, class as answer, patient_id as group" in columns and "patient_id" in groups
    assert "| groups | 12 |" in out and "| groups shared by several parts | 0 |" in out
    for data, name in ((tmp_path / "t.jsonl", "JSON Lines"), (manifest, "a JSON list")):
        _, out = shown(capsys, "--data", data, "--image-root", busi_like)
        assert out.startswith(f"{data.name} is {name} with 36")
    folder = Path(shutil.copytree(busi_like, tmp_path / "classes"))
    for mask in folder.rglob("*_mask*"):
        mask.unlink()
    _, out = shown(capsys, "--data", folder)
    assert out.startswith("classes is a folder of images by class with 36")


# ------------------------------------------------------------------------------------------------ groups


def sheet_of(samples: list[Sample], **options: object) -> DataSheet:
    root = Path(samples[0].image).parent
    return make_sheet("x", {"data": samples}, root, DataSettings(**options), [], [], lambda text: None)


def text_of(sheet: DataSheet) -> str:
    return "\n".join(" | ".join(map(str, row)) for table in all_tables(sheet) for row in [[table.title], *table.rows])


def test_named_groups_and_those_that_parts_share(mixed) -> None:
    images = sorted(mixed.parent.glob("*.*g"))
    samples = [
        Sample((str(image),), "Q", ["a", "b"][n % 2], ["a", "b"][n % 2], group=f"patient {n // 4}" if n < 28 else "")
        for n, image in enumerate(images)
    ]
    text = text_of(sheet_of(samples, copies_distance=-1))
    assert "groups | 7\nsamples without a group | 2\nsamples a group, min / median / max | 4 / 4 / 4" in text
    assert "groups shared by several parts | 0" in text and "patient 0 | 4 | " in text
    parts = {"data": samples[:20], "test_data": samples[18:]}
    sheet = make_sheet("x", parts, mixed.parent, DataSettings(copies_distance=-1), [], [], lambda text: None)
    assert "groups shared by several parts | 1" in text_of(sheet)
    (shared,) = [group for group in sheet.groups if len(group.parts) > 1]
    assert shared.name == "patient 4" and "test" in shared.parts and len(shared.samples) == 6


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("options", [{}, {"max_image_tokens": 20}])
def test_token_lengths_are_those_that_the_model_gets(mixed, options) -> None:
    from types import SimpleNamespace

    from train_fn.datasheet.tokens import token_lengths
    from train_fn.model.batches import process
    from train_fn.model.processors import load_processor
    from train_fn.model.prompts import tokenize_answer
    from train_fn.settings import ModelSettings

    directory = resolve_model("nano")
    processor = load_processor(directory, ModelSettings(**options))
    images = [str(image) for image in sorted(mixed.parent.glob("*.*g"))[:6]]
    samples = [Sample((image,), "Is it a mass?", ["yes", "no . yes"][n % 2]) for n, image in enumerate(images)]
    samples.append(Sample(tuple(images[:2]), "Which?", "Benign", system="You are a doctor"))
    found = token_lengths(processor, directory, samples, {image: image_size(image) for image in images})
    view: Any = SimpleNamespace(processor=processor, settings=ModelSettings(**options))
    assert found.prompts == [process(view, sample)["input_ids"].shape[1] for sample in samples]
    assert found.answers == [len(tokenize_answer(processor, s.prompt, s.answer)[0]) for s in samples]
    assert found.limit == 2048 and not found.beyond and len(found.images) == 6


def test_samples_beyond_the_models_limit(mixed, capsys, tmp_path) -> None:
    model = Path(shutil.copytree(resolve_model("nano"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 30
    (model / "config.json").write_text(json.dumps(config))
    entries = [entry for entry in json.loads(mixed.read_text()) if entry["text"] == "Is there a mass?"]
    (tmp_path / "m.json").write_text(json.dumps(entries[:15]))
    argv = [
        "--data",
        tmp_path / "m.json",
        "--image-root",
        mixed.parent,
        "--model",
        model,
        "--html",
        tmp_path / "p.html",
    ]
    code, out = shown(capsys, *argv)
    assert code == 0 and "Tokens (the model's limit: 30; 15 samples beyond it)" in out
    assert "15 of 15 samples have more tokens than the 30 of the model" in out
    assert "Longest samples beyond the model" in (tmp_path / "p.html").read_text()


def test_words_that_the_base_does_not_know(manifest, busi_like, capsys) -> None:
    alike = [{"answer": "Benign xylophone", "label": 3} for _ in range(6)]
    bad = change(manifest, *alike)
    code, out = shown(capsys, "--data", bad, "--image-root", busi_like, "--model", "nano")
    assert code == 2 and "same tokens of" in out and "(they end at unknown words: 'xylophone')" in out
    code, out = shown(capsys, "--data", bad, "--image-root", busi_like)
    assert code == 0


def test_quantiles() -> None:
    assert quantiles(list(range(1, 101))) == (50.5, 95, 100) and quantiles([7]) == (7, 7, 7)


# ------------------------------------------------------------------------------------------------ page


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_names_and_answers_as_text_only(mixed, capsys, tmp_path) -> None:
    path = tmp_path / "page.html"
    code, out = shown(capsys, "--data", mixed, "--html", path)
    assert code == 0 and f"Written: {path}" in out
    page = Page(path)
    assert not {tag for tag, _ in page.tags} & {"script", "b>benign", "iframe", "link", "a"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) > 30 and all(str(source).startswith("data:image/jpeg;base64,") for source in sources)
    assert "http" not in path.read_text().replace("http-equiv", "")
    for words in (
        "<script>alert(1)</script> (10)",
        "<b>Benign (10)",
        "yes (20)",
        "A study can start",
        "<script>alert(0)<",
    ):
        assert words in page.text
    assert "<img src=x onerror=alert(2)> and 7 words" in page.text


def test_the_page_shows_training_images_as_they_would_be_varied(manifest, busi_like, tmp_path, capsys) -> None:
    shown(capsys, "--data", manifest, "--image-root", busi_like, "--allow-flips", "--html", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    text = page.text[page.text.index("Training images as --augment varies them") :]
    for label in ("itself", *(f"{strength} {n}, flips allowed" for strength in ("light", "medium") for n in (1, 2))):
        assert text.count(label) == 3, label  # once for each answer
    last = [attributes["src"] for tag, attributes in page.tags if tag == "img"][-15:]
    assert len(set(last)) == 15


def test_the_page_shows_copies_contradictions_and_unreadable_files(manifest, busi_like, tmp_path, capsys) -> None:
    busi_like = Path(shutil.copytree(busi_like, tmp_path / "copy"))
    (busi_like / "normal" / "<i>.png").write_bytes(b"no image")
    bad = change(manifest, {"image": "normal/<i>.png"})
    shown(capsys, "--data", bad, "--image-root", busi_like, "--html", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "A study cannot start with this data" in page.text and "i" not in {tag for tag, _ in page.tags}
    text = page.text[page.text.index("Contradictory near-copies", page.text.index("Examples")) :]
    assert "Benignbenign/benign (3).png" in text and "Malignantmalignant/malignant (5).png" in text
    assert "normal/<i>.png" in text[text.index("Unreadable files") :]


def test_the_page_is_small_for_many_images_and_answers(mixed, tmp_path) -> None:
    images = sorted(map(str, mixed.parent.glob("*.*g")))
    samples = [Sample((images[n % 30],), f"Question {n // 90}?", f"answer {n // 90} {n % 5}") for n in range(1800)]
    write_page(sheet_of([replace(s, label=s.answer) for s in samples]), tmp_path / "page.html")
    num_pictures = sum(tag == "img" for tag, _ in Page(tmp_path / "page.html").tags)
    assert 60 <= num_pictures <= 220 and (tmp_path / "page.html").stat().st_size < 2_000_000


def test_a_page_that_cannot_be_written(mixed, tmp_path, capsys) -> None:
    assert main(["--data", str(mixed), "--html", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "`--html` must be a file that can be written" in capsys.readouterr().err


def test_each_image_is_opened_once(mixed, monkeypatch) -> None:
    opened: list[str] = []
    original = Image.open

    def counting(file: Any, *args: Any, **options: Any) -> Image.Image:
        opened.append(str(getattr(file, "name", file)))
        return original(file, *args, **options)

    monkeypatch.setattr(Image, "open", counting)
    images = sorted(map(str, mixed.parent.glob("*.*g")))
    facts, problems = read_files(images, 10**6, lambda text: None)
    copy_pairs(images)
    assert sorted(opened) == images and not problems
    assert {path: its.size for path, its in facts.items()} == {path: image_size(path) for path in images}


def test_real_busi(busi, tmp_path, capsys) -> None:
    manifest, root = busi
    code, out = shown(capsys, "--busi", root, "--write", tmp_path / "m.json")
    assert code == 0 and json.loads((tmp_path / "m.json").read_text()) == json.loads(manifest.read_text())
    assert "benign (433).png: Benign" in out and "malignant (145).png: Malignant" in out


def test_sets_of_labels_are_converted(tmp_path, busi_like, capsys) -> None:
    images = sorted(path.relative_to(busi_like).as_posix() for path in busi_like.rglob("*.png"))
    entries = [{"image": image, "question": "Which?", "answer": ["mass", "oval"][: 1 + n % 2]} for n, image in
               enumerate(images)]  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(entries))
    argv = ("--data", tmp_path / "m.json", "--image-root", busi_like, "--write", tmp_path / "out.jsonl")
    assert shown(capsys, *argv, "--multilabel", ";")[0] == 0
    answers = {json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()}
    assert answers == {"mass", "mass; oval"}
