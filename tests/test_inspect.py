"""`python -m train_fn.inspect`: its tables, the problems that it reports, and its manifest of BUSI."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_fn.data.phantoms import QUESTION, phantom
from train_fn.inspect import main
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
        parse(["--data", str(manifest), "--image-root", str(busi_like), "--val-fraction", "0.25",
               "--results", str(tmp_path)]), lambda text: None,
    )  # fmt: skip
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


def test_real_busi(busi, tmp_path, capsys) -> None:
    manifest, root = busi
    code, out = shown(capsys, "--busi", root, "--write", tmp_path / "m.json")
    assert code == 0 and json.loads((tmp_path / "m.json").read_text()) == json.loads(manifest.read_text())
    assert "benign (433).png: Benign" in out and "malignant (145).png: Malignant" in out
