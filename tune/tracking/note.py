"""A study's summary as MLflow's note on the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tune.results.summary import Summary, format_metric, format_score, format_settings
from tune.tracking.target import inside


def study_note(directory: Path) -> str:
    """The note of a finished study in markdown; empty without a winner or a study.json.

    Raises ValueError if study.json leads out of the study's folder.
    """
    path = inside(directory, "study.json")
    study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if study.get("winner") is None:
        return ""
    summary = Summary(study, directory)
    metric, winner = summary.metric, summary.winner
    lines = [f"**{summary.headline}** ({len(summary.records)} trials: {summary.counts_text}).", ""]
    lines += [summary.explanation, summary.transfer_sentences, ""]
    lines += [f"| | validation {metric} | test {metric} (95 % interval) | settings |", "| --- | --- | --- | --- |"]
    for who, record in (("guide", summary.guide if summary.guide is not winner else None), ("winner", winner)):
        if record and record.epochs:
            test = study["test"].get(who, {}).get(metric)
            score = format_score(test) if test else "-"
            settings = format_settings(record.searched)
            lines.append(f"| {who} | {format_metric(record.value(metric))} | {score} | {settings} |")
    return "\n".join([*lines, "", f"Adapter: `{study['adapter']}`. The whole report: artifact `report.html`."])
