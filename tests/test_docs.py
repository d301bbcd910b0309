"""README and docs/: every option, command and file that they name exists, and the site builds."""

from __future__ import annotations

import dataclasses
import html
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from train_fn.data.manifest import read_manifest
from train_fn.settings import broken_rules, field_docs, flag
from tune.config.base_shape import BaseShape
from tune.config.cli import read_values, read_words
from tune.config.settings import GROUPS, Settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    if path.name != "CHANGELOG.md"
)
# The words by which our commands are named, with the module that prints their help, and how.
PROGRAMS = {
    r"tune/run\.py|tune\.run|(?<![\w=/])vlm-tune(?= -)": ("tune.run", "--help-all"),
    r"train_fn\.predict": ("train_fn.predict", "--help"),
    r"train_fn\.inspect|(?<=`)inspect": ("train_fn.inspect", "--help"),
    r"tune\.control": ("tune.control", "--help"),
    r"tune\.tracking": ("tune.tracking.__main__", "--help"),
}
OF_OTHERS = {
    "--backend-store-uri": "mlflow ui",
    "--enable-tower-connector-lora": "vllm serve",
    "--max-lora-rank": "vllm serve",
    "--mm-processor-kwargs": "vllm serve",
}
"""Options of other programs that a text names alone, and the program."""
WORD = re.compile(
    "|".join(f"(?P<p{n}>{words})" for n, words in enumerate(PROGRAMS)) + r"|(?<![\w-])(?P<option>--[a-z][\w-]*)"
)


@cache
def options_of(module: str, option: str) -> frozenset[str]:
    """The options that a command's help defines."""
    script = f"import sys; from {module} import main; sys.exit(main(['{option}']))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = re.findall(r"^  (?:-\w, )?(--.+)", run.stdout, re.MULTILINE)
    return frozenset(name for line in lines for name in re.findall(r"(?:^|, )(--[a-z][\w-]*)", line.partition("  ")[0]))


def chunks(text: str) -> Iterator[tuple[str, bool]]:
    """The commands and inline code of a Markdown text, and the rest of it; each with whether it is a command line."""
    for number, part in enumerate(re.split(r"^```(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)):
        if number % 2:
            for line in part.replace("\\\n", " ").splitlines()[1:]:
                command, _, comment = line.partition("# ")
                yield command, True
                yield comment, False
        else:
            spans = re.findall(r"`[^`]+`", part)
            yield from ((span.replace("\n", " "), not re.match("`(--|inspect)", span)) for span in spans)
            yield re.sub(r"`[^`]+`", "", part), False


def unknown_options(text: str) -> tuple[int, list[str]]:
    """How many options of ours a text names, and those that do not exist, with their program.

    In a command line, an option belongs to the last program of ours before it, or to another program. Elsewhere it may
    be an option of any of ours.
    """
    num_options, unknown = 0, []
    for chunk, is_command in chunks(text):
        programs = [] if is_command else list(PROGRAMS.values())
        for match in WORD.finditer(chunk):
            if not (option := match["option"]):
                programs = [its for n, its in enumerate(PROGRAMS.values()) if match[f"p{n}"]]
            elif programs and option not in ("--help", "--help-all", *OF_OTHERS):
                num_options += 1
                if not any(option.replace("_", "-") in options_of(*program) for program in programs):
                    unknown.append(f"{option} of {' or '.join(module for module, _ in programs)}")
    return num_options, unknown


def test_every_option_that_a_document_names_exists() -> None:
    found = {document: unknown_options((ROOT / document).read_text(encoding="utf-8")) for document in DOCUMENTS}
    assert {document: unknown for document, (_, unknown) in found.items() if unknown} == {}
    assert sum(count for count, _ in found.values()) > 250 and found["README.md"][0] > 40


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("take `--lora-rank 8`", "--lora-rank of tune.run or train_fn.predict"),
        ("with --lora-rank", "--lora-rank of tune.run"),
        ("`python tune/run.py --coverage 0.9`", "--coverage of tune.run"),
        ("```bash\npython -m train_fn.predict \\\n    --trials 3\n```", "--trials of train_fn.predict"),
        ("```bash\nls   # with --trails\n```", "--trails of tune.run"),
        ("`inspect --htm PAGE`", "--htm of train_fn.inspect"),
        ("```bash\nray job submit --no-wait -- python tune/run.py --trial-s 20\n```", "--trial-s of tune.run"),
        ("```bash\nray job submit --no-wait -- python tune/run.py --trials 20\n```", ""),
        ("`pip install --no-cache-dir x` and `--lora_r 8`", ""),
    ],
)
def test_an_option_that_does_not_exist_is_found(text: str, unknown: str) -> None:
    found = unknown_options(text)[1]
    assert [name[: len(unknown)] for name in found] == ([unknown] if unknown else [])


STUDY_COMMAND = re.compile(r"(?:python \S*tune/run\.py|(?:^|\s)vlm-tune(?= -))((?: (?![&|]).*)?)")


def commands() -> dict[str, str]:
    """Every command line of `tune/run.py` in a document, with the document."""
    return {
        match[1].split("'")[0]: document
        for document in DOCUMENTS
        for chunk, is_command in chunks((ROOT / document).read_text(encoding="utf-8"))
        if is_command and (match := STUDY_COMMAND.search(chunk.strip("`")))
    }


def test_every_command_line_of_a_study_is_accepted() -> None:
    for command, document in commands().items():
        problems: list[str] = []
        words = shlex.split(command)
        words = [word for word in words if word not in ("--help", "--help-all", "...")]
        settings = Settings.of(read_values(read_words(words, problems), problems), (), (), BaseShape())
        for group in (settings.study, settings.model, settings.data, settings.trial, settings.command):
            problems += broken_rules(group).values()
        assert problems == [], f"{document}: {command}"
    assert len(commands()) >= 12


def test_the_examples_of_data_are_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    text = text.partition("### An example of each")[2].partition("### Names")[0]
    for number in (1, 2):
        image = tmp_path / "images" / f"{number}.png"
        image.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), number).save(image)
    read = {}
    for name, content in re.findall(r"`([\w.]+\.(?:jsonl?|csv))`[^`]*?:\n\n```\w+\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(content, encoding="utf-8")
        read[name] = read_manifest(tmp_path / name)
    (folders,) = re.findall(r"^scans/.*?(?=```)", text, re.DOTALL | re.MULTILINE)
    for path in map(tmp_path.joinpath, folders.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "images" / "1.png", path)
    read["scans"] = read_manifest(tmp_path / "scans", question="Normal, benign or malignant?")
    assert {name: reading.problems for name, reading in read.items() if reading.problems} == {}
    found = {name: [(len(s.images), s.answer, s.split, s.group) for s in its.samples] for name, its in read.items()}
    assert found == {
        "train.json": [(1, "Benign", "", ""), (1, "Malignant", "", "")],
        "train.jsonl": [(1, "yes", "train", "p1"), (1, "no", "test", "p2")],
        "conversations.json": [(1, "yes", "", ""), (1, "At two o'clock.", "", "")],
        "messages.jsonl": [(2, "The mass has grown.", "", "")],
        "train.csv": [(1, "benign", "", "p1"), (1, "malignant", "", "p2")],
        "scans": [(1, "benign", "test", ""), (1, "malignant", "test", ""), (1, "benign", "train", ""),
                  (1, "malignant", "train", "")],
    }  # fmt: skip


def test_pages_that_messages_name_exist() -> None:
    sources = [
        path for room in ("tune", "train_fn") for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".jinja")
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    names = {name for text in texts.values() for name in re.findall(r"(?<!/)\b(docs/[\w./-]+\.\w+)", text)}
    assert "docs/cluster.md" in names
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_the_medical_sentence_stands_once() -> None:
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    assert sum(text.count("not a medical device") for text in texts) == 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation site, built so that a link that leads nowhere is an error. (`--quiet` would hide warnings from
    `--strict`, too.)"""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_the_site_has_every_page_and_the_readme_as_its_first(site: Path) -> None:
    pages = {path.parent.name for path in site.rglob("index.html")}
    assert pages >= {Path(document).stem for document in DOCUMENTS if document.startswith("docs/")}
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="data/"' in home and 'href="cluster.yaml"' in home and 'src="decision.png"' in home
    assert (site / "cluster.yaml").read_bytes() == (ROOT / "cluster.yaml").read_bytes()
    assert not (site / "hooks.py").exists()


def test_the_reference_has_every_setting_with_its_docstring(site: Path) -> None:
    page = (site / "options" / "index.html").read_text(encoding="utf-8")
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())
    docs = {name: doc for group in GROUPS for name, doc in field_docs(group).items()}
    assert docs.keys() == {field.name for group in GROUPS for field in dataclasses.fields(group)} and len(docs) > 100
    for name, doc in docs.items():
        assert f'id="{flag(name)[2:]}"' in page
        assert doc.replace("`", "") in text
    assert "Must be a whole number from 1 to 16,384" in text  # the rule of --lora-r
    assert '<a href="#train-projector"><code>--train-projector</code></a>' in page


def test_the_reference_has_the_help_of_the_other_commands(site: Path) -> None:
    text = html.unescape((site / "commands" / "index.html").read_text(encoding="utf-8"))
    for module in ("train_fn.inspect", "train_fn.predict", "tune.control", "tune.tracking"):
        assert f"usage: python -m {module}" in text
    assert importlib.import_module("tune.control").HELP.splitlines()[1].strip() in text
