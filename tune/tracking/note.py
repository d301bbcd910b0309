"""A study's summary as MLflow's note on the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tune.results.summary import Summary, format_metric, format_score, format_settings, summarize
from tune.tracking.target import inside


def study_note(directory: Path) -> str:
    """The note of a finished study in markdown; empty without a winner or a study.json.

    Raises ValueError if study.json leads out of the study's folder.
    """
    path = inside(directory, "study.json")
    study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return markdown(summarize(study, directory)) if study.get("winner") is not None else ""


def markdown(summary: Summary) -> str:
    """The summary of a study with a winner, as markdown."""
    metric = summary.metric
    lines = [f"**{summary.headline}** ({len(summary.records)} trials: {summary.counts_text}).", ""]
    lines += [summary.explanation, ""]
    lines += [f"| | validation {metric} | test {metric} (95 % interval) | settings |", "| --- | --- | --- | --- |"]
    for who in ("guide", "winner"):
        record = summary.guide if who == "guide" else summary.winner
        if record and record.epochs and (who == "winner" or record is not summary.winner):
            test = summary.tests.get(who, {}).get(metric)
            cells = [who, format_metric(record.value(metric)), format_score(test) if test else "-"]
            lines.append(f"| {' | '.join([*cells, format_settings(record.searched)])} |")
    return "\n".join([*lines, "", f"Adapter: `{summary.adapter}`. The whole report: artifact `report.html`."])
