"""The model card of a winner: README.md in best_adapter/, with the front matter that PEFT and the hub read.

Every number comes from the `Summary` that report and terminal show.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train_fn.data.decision import Decision
from train_fn.data.samples import PARTS
from train_fn.data.splits_file import load_splits
from train_fn.data.splitting import DataReport
from train_fn.model.adapters import AdapterTask, read_task
from train_fn.model.checkpoint import resolve_model
from train_fn.model.hub_ids import is_hub_data, peft_reference
from train_fn.serving import read_served, serving_lines
from train_fn.settings import ModelSettings
from train_fn.support.files import write_file
from train_fn.support.text import plain, plain_values
from tune.results.comparison import CLEAN
from tune.results.summary import Summary, format_score, format_settings

FOLDER = "best_adapter"  # stands in the commands for wherever the folder lies now


def write_card(study: Mapping[str, Any], directory: Path) -> Path:
    """Write the card of a study's winner.

    Args:
        study: the content of study.json.
        directory: the study's folder, with splits.json and best_adapter/.

    Returns:
        The card's path.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file of the adapter or of the splits is damaged.
    """
    summary = Summary(plain_values(dict(study)), directory)
    adapter = directory / FOLDER
    settings = ModelSettings(**study["settings"]["model"])
    base = peft_reference(settings.model, str(resolve_model(settings.model)))
    parts = [
        front_matter(base["base_model_name_or_path"]),
        *what_it_is(summary, base),
        *data_section(summary),
        *score_section(summary),
        *decision_section(read_task(adapter)),
        *usage_section(adapter, settings, base, number_format(study, settings)),
    ]
    path = adapter / "README.md"
    write_file(path, "\n\n".join(parts) + "\n")
    return path


def front_matter(base: str) -> str:
    """The metadata in YAML."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["lora", "peft", "transformers", "vision-language", "vlm-tune", f"base_model:adapter:{base}"],
    )
    return f"---\n{data.to_yaml()}\n---"


def what_it_is(summary: Summary, base: Mapping[str, str]) -> list[str]:
    """Title, result, base and adapter."""
    study, winner = summary.study, summary.winner
    assert winner, "only a winner has a card"
    delivered = study.get("delivered") or {}
    name, revision = text(base["base_model_name_or_path"]), base.get("revision", "")
    facts = [
        f"Base: {name}" + (f", revision `{revision}`" if revision else "") + f" (sha256 `{study['base_hash']}`)",
        f"Adapter: trial {winner.number} of {len(summary.records)}, seed {delivered.get('seed', 'unknown')}",
        f"Searched settings: {text(format_settings(winner.searched)) or 'none'}",
        f"Study: {text(study['name'])}, {study['state'].lower()}; "
        + ", ".join(f"{name.removeprefix('version_')} {version}" for name, version in study["versions"].items()),
    ]
    return [
        f"# {text(study['name'])}: an adapter for {name}",
        f"{text(summary.headline)}. {text(summary.explanation)}",
        "## Model",
        bullets(facts),
    ]


def data_section(summary: Summary) -> list[str]:
    """What the adapter was trained and tested on."""
    study = summary.study
    splits = load_splits(summary.directory / "splits.json", study.get("positive_label", ""))
    source = study["settings"]["data"]["data"]
    name = source if is_hub_data(source) else Path(source).name or "generated ultrasound phantoms"
    facts = [f"Data: {text(name)} (sha256 `{study['data_hash']}`)"]
    for part in PARTS:
        counts = study["class_counts"].get(part, []) if study["candidates"] else []
        named = ", ".join(f"{n} {text(answer)}" for n, answer in zip(counts, study["candidates"], strict=False))
        facts.append(f"{part}: {len(getattr(splits, part))} samples" + (f" ({named})" if named else ""))
    facts += [f"Task {text(task['name']) or 'of every question'}: {task['kind']}" for task in study["tasks"]]
    facts += map(text, DataReport(**study["data_report"]).sentences())
    return ["## Data", bullets(facts)]


def score_section(summary: Summary) -> list[str]:
    """Test scores with their intervals and caveats."""
    study = summary.study
    lines = ["## Scores"]
    if study["test"]:
        lines.append(f"The test images were {text(study['test_note'])}. In parentheses: 95 % intervals.")
    names = [name for name in summary.test_metrics if not name.endswith("_raw")]
    for whose in summary.test_tables:
        rows = [[name, *(format_score(study["test"][who].get(name)) for who in whose)] for name in names]
        title = f"test{CLEAN if CLEAN in whose[0] else ''}"
        lines.append(table([title, *map(summary.title, whose)], rows))
    if summary.compared:
        rows = [
            [summary.title(who), *(format_score(study["test"][who].get(name)) for name in summary.compared_metrics)]
            for who in summary.compared
        ]
        lines += ["Beside baselines:", table(["test", *summary.compared_metrics], rows)]
    if not study["test"]:
        lines.append(f"{text(summary.guide_sentence)}")
    if study["notes"]:
        lines.append(bullets(f"Note: {text(note)}" for note in study["notes"]))
    return lines


def decision_section(task: AdapterTask) -> list[str]:
    """How scores become answers."""
    lines = [
        f"{text(name) + ': ' if name else ''}{decision_sentence(decision, task.by_name[name].candidates)}"
        for name, decision in task.decisions.items()
    ]
    if not lines:
        return ["## Decision", "The most probable candidate is the answer. Nothing was fitted on the validation part."]
    return [
        "## Decision",
        bullets(lines),
        "This was fitted on the validation part and is in task.json. The scores above are with it. "
        "`python -m train_fn.predict` and the MLflow model apply it; PEFT, a pipeline and the servers below give the "
        "model's own probabilities and answers.",
    ]


def decision_sentence(decision: Decision, candidates: tuple[str, ...]) -> str:
    """A decision in words and numbers."""

    def listed(numbers: Iterable[float]) -> str:
        return ", ".join(f"{text(c)} {number:+.3f}" for c, number in zip(candidates, numbers, strict=True))

    offsets = f", plus {listed(decision.offsets)}" if decision.offsets else ""
    first = f"Probabilities: softmax of {decision.scale:.3f} x log-probability{offsets}."
    if decision.positive is not None and decision.threshold is not None:
        rule = f"{text(candidates[decision.positive])} from a probability of {decision.threshold:.3f} on"
        return f"{first} Answer, for {decision.aim}: {rule}, else the most probable other."
    added = f" after adding {listed(decision.rule)}" if decision.rule else ""
    return f"{first} Answer, for {decision.aim}: the largest log-probability{added}."


def number_format(study: Mapping[str, Any], settings: ModelSettings) -> str:
    """The number format of the base in the study; "auto" on a GPU: the base's own."""
    on_cpu = settings.base_dtype == "auto" and not (study.get("layout") or {}).get("use_gpu")
    return "float32" if on_cpu else settings.base_dtype


def usage_section(adapter: Path, settings: ModelSettings, base: Mapping[str, str], dtype: str) -> list[str]:
    """How the adapter is loaded."""
    name, revision = base["base_model_name_or_path"], base.get("revision", "")
    directory = resolve_model(settings.model)
    paragraphs, is_hulumed = [f"python -m train_fn.predict --adapter {FOLDER} --check-serving"], False
    if (directory / "config.json").is_file():
        paragraphs = serving_lines(adapter, settings, shown=FOLDER)
        is_hulumed = read_served(adapter, directory).hulumed
    loader = "AutoModelForCausalLM" if is_hulumed else "AutoModelForImageTextToText"
    options = [f'dtype="{dtype}"'] + ["trust_remote_code=True"] * is_hulumed
    options += [f'revision="{revision}"'] * bool(revision)
    source = f'"{name}"'
    imports = [f"from transformers import {loader}, AutoProcessor", "from peft import PeftModel"]
    if settings.model == "nano":
        imports, source = [*imports, "from train_fn.nano import CHECKPOINT"], "CHECKPOINT"
    # Hulu-Med's own code prepares images as in its training, transformers' does not.
    processor = f"{source}, trust_remote_code=True" if is_hulumed else f'"{FOLDER}"'
    load = [
        f"base = {loader}.from_pretrained({source}, {', '.join(options)})",
        f'model = PeftModel.from_pretrained(base, "{FOLDER}").eval()',
        f"processor = AutoProcessor.from_pretrained({processor})",
    ]
    merge = ["python -m train_fn.predict --adapter", FOLDER, "--merge-into merged"]
    merge += ["--merge-layout transformers"] * is_hulumed
    merged = [
        "from transformers import pipeline",
        'answer = pipeline("image-text-to-text", model="merged")(images="image.png", text="a question")',
    ]
    where = "" if settings.model == "nano" or "/" in name else f" Put the path of {text(name)} for its name."
    return [
        "## Use",
        "With the study's probabilities and decision:",
        fenced([f"python -m train_fn.predict --adapter {FOLDER} IMAGE_OR_FOLDER"], "sh"),
        f"With PEFT (a processor with a video part needs torchvision).{where}",
        fenced([*imports, "", *load]),
        "Merged into the base, as a model of its own:",
        fenced([" ".join(merge)], "sh"),
        fenced(merged),
        "With a server:",
        fenced("\n\n".join(p.replace(str(directory), name) for p in paragraphs).splitlines(), ""),
    ]


# ------------------------------------------------------------------------------------------------ Markdown


def text(value: Any) -> str:
    """A text that Markdown and HTML show as it is: names come from the data, which may be a stranger's."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(plain(value), quote=False))


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(text(cell) if cell != '---' else cell for cell in line)} |" for line in lines)


def fenced(lines: list[str], language: str = "python") -> str:
    """A block of code."""
    return "\n".join([f"```{language}", *lines, "```"])
