"""A finished study as one page for people: report.html, its pictures, and pictures/explore.html to click through.

The page needs neither a display nor the network. Its words are in report.html.jinja, its looks in report.css. What
prints on the first A4 page is the decision; the evidence follows.

Shapes: N test images, C candidate answers.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data.copies import contact_sheet
from train_fn.data.decision import ARGMAX
from train_fn.data.images import image_problems
from train_fn.data.samples import PARTS
from train_fn.data.splitting import DataReport
from train_fn.settings import ModelSettings
from train_fn.support.files import write_file
from train_fn.support.text import plain, plain_values
from tune.results.answer_pictures import confusions
from tune.results.decision import answer_rows, deciding_metrics, rule_sentence, score_table
from tune.results.operating import CLEAN, aim_of, operating_points, positive_tasks
from tune.results.pictures import draw
from tune.results.summary import Score, format_metric, format_score, format_spread, format_value
from tune.results.view import ADAPTERS, View

MAX_SHOWN = 600  # characters of a text in a table
MAX_ANSWERS = 4  # with a column each
RAW = "_raw"  # ends the name of a score before the decision was fitted


def write_report(study: dict[str, Any], directory: Path) -> list[Path]:
    """Write report.html and pictures/ of a finished study, however it ended.

    Args:
        study: the content of study.json.
        directory: the study's folder, with splits.json.

    Returns: the paths of the files written.
    """
    import jinja2

    study = plain_values(study)
    view = View(study, directory)
    folder = directory / "pictures"
    folder.mkdir(exist_ok=True)
    pictures, paths = draw(view, folder)
    paths += write_explorer(view, folder / "explore.html")
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, **options)
    text = pages.get_template("report.html.jinja").render(
        summary=view.summary,
        study=study,
        pictures=pictures,
        explorer=any(path.suffix == ".html" for path in paths),
        num_images={part: len(getattr(view.splits, part)) if view.splits else "?" for part in PARTS},
        rule_sentence=rule_sentence(view),
        score_table=score_table(view),
        deciding_metrics=deciding_metrics(view),
        answer_rows=answer_rows(view),
        confusions=confusions(view),
        score_tables=score_tables(view),
        raw_columns=[who for who in ADAPTERS if who in study["test"]],
        raw_rows=raw_rows(view),
        operating_points=operating_points(view),
        many_answers=any(len(task.tested.task.candidates) > 2 for task in positive_tasks(view)),
        decided=aim_of(view) != ARGMAX,
        coverage=coverage_tables(study),
        mistakes=mistakes(view),
        written_answers=written_answers(view),
        tasks=task_rows(view),
        groups=group_pictures(study),
        data_sentences=DataReport(**study["data_report"]).sentences(),
        format_metric=format_metric,
        format_score=format_score,
        format_spread=format_spread,
        format_value=format_value,
    )
    path = directory / "report.html"
    write_file(path, text)
    return [path, *paths]


def write_explorer(view: View, path: Path) -> list[Path]:
    """Write Optuna's own interactive pictures as one page that works offline.

    Returns: the page's path; nothing with fewer than two completed trials.
    """
    import optuna
    from optuna import visualization

    state = optuna.trial.TrialState.COMPLETE
    if len(done := view.search.get_trials(deepcopy=False, states=(state,))) < 2:
        return []
    several = len(view.search.directions) > 1
    options: dict[str, Any] = {"target_name": view.metric, "target": (lambda t: t.values[0]) if several else None}
    figures = {"History": visualization.plot_optimization_history(view.search, **options)}
    figures["Timeline"] = visualization.plot_timeline(view.search)
    if view.parameters:
        figures["Settings together"] = visualization.plot_parallel_coordinate(view.search, **options)
        figures["Setting by setting"] = visualization.plot_slice(view.search, **options)
    shared = [name for name in view.parameters if all(name in trial.params for trial in done)][:3]
    if len(shared) > 1:
        figures["Settings by twos"] = visualization.plot_contour(view.search, shared, **options)
        figures["Settings by twos"].update_layout(height=800)
    parts: list[str] = []
    for name, figure in figures.items():
        figure.update_layout(template="plotly_white", title=name, width=None, autosize=True)
        options = {"include_plotlyjs": not parts, "config": {"displaylogo": False, "responsive": True}}
        parts.append(figure.to_html(full_html=False, **options))
    title = html.escape(view.summary.study["name"])
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<body style="font-family:system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem">'
        f"<h1>{title}</h1><p>Point at a mark for its trial; drag to zoom; double-click to zoom out.</p>"
        + "".join(f'<div style="overflow-x:auto"><div style="min-width:640px">{part}</div></div>' for part in parts)
    )
    write_file(path, page)
    return [path]


def score_tables(view: View) -> list[dict[str, Any]]:
    """The test scores as tables that fit a page: those of the test without its near-copies first, as they count."""
    test = view.summary.study["test"]
    clean = [who for who in test if who.endswith(CLEAN)]
    adapters = [who for who in test if who in (*ADAPTERS, "difference")]
    others = [who for who in test if who not in (*clean, *adapters)]
    groups = {
        "Test images without a near-copy in training": clean,
        "All test images" if clean or others else "": adapters,
        "Baselines, on all test images": others,
    }
    metrics = view.summary.test_metrics
    names = [name for name in metrics if not (name.endswith(RAW) and name.removesuffix(RAW) in metrics)]
    return [
        {"title": title, "columns": columns, "names": [n for n in names if any(n in test[who] for who in columns)]}
        for title, columns in groups.items()
        if columns
    ]


def raw_rows(view: View) -> list[tuple[str, list[tuple[Score | None, Score | None]]]]:
    """Scores before and after the decision was fitted, by metric and then by adapter."""
    parts = [scores for who, scores in view.summary.study["test"].items() if who in ADAPTERS]
    return [
        (name, [(scores.get(name + RAW), scores.get(name)) for scores in parts])
        for name in view.summary.test_metrics
        if any(name + RAW in scores for scores in parts)
    ]


def coverage_tables(study: dict[str, Any]) -> list[dict[str, Any]]:
    """How often the sets of answers hold the true one, a table by task. Of many answers, only the worst is shown."""
    tables: dict[str, dict[str, Any]] = {}
    for entry in study.get("coverage") or []:
        by_class = {answer: score for answer, score in entry["by_class"].items() if score["value"] is not None}
        table = tables.setdefault(entry["task"], {"task": entry["task"], "answers": list(by_class), "rows": []})
        if len(by_class) > MAX_ANSWERS:
            table["answers"] = []
            entry = {**entry, "worst": min(by_class, key=lambda answer: by_class[answer]["value"])}
        table["rows"].append(entry)
    return list(tables.values())


def mistakes(view: View) -> list[tuple[str, str, str, float]]:
    """The winner's ten most confident wrong answers on the test: image, true answer, its answer, its probability."""
    if not view.splits:
        return []
    found = []
    for tested in view.tested:
        answers, names = tested.answers["winner"], tested.task.candidates  # answers [n]
        confidence = tested.probabilities["winner"][np.arange(len(answers)), answers]  # [n]
        for i in np.flatnonzero(answers != tested.truth).tolist():
            image = view.splits.test[tested.indices[i]].image
            found.append((plain(image), names[tested.truth[i]], names[answers[i]], float(confidence[i])))
    return sorted(found, key=lambda mistake: -mistake[3])[:10]


def group_pictures(study: dict[str, Any]) -> list[str]:
    """The largest groups that stay in one part, each as a picture of its images (a data URI). Images that are gone, or
    cannot be read any more, are left out."""
    options = ModelSettings(**study["settings"]["model"]).image_options
    pictures = []
    for paths in study["data_report"].get("shown", []):
        there = [path for path in paths if not image_problems([path], options=options)]
        if there:
            png = base64.b64encode(contact_sheet(there, options=options)).decode()
            pictures.append(f"data:image/png;base64,{png}")
    return pictures


def task_rows(view: View) -> list[dict[str, Any]]:
    """Each task with its number of samples in the three parts."""
    if not view.splits:
        return []
    return [
        {
            "name": task.name,
            "kind": task.kind,
            "answers": plain(", ".join(task.candidates)[:MAX_SHOWN]) or "written by the model",
            "counts": [sum(s.task == task.name for s in getattr(view.splits, part)) for part in PARTS],
        }
        for task in view.splits.tasks
    ]


def written_answers(view: View, most: int = 50) -> list[list[str]]:
    """The first test samples with a generated answer: image, question, true answer, the winner's, the guide's ("":
    none)."""
    if not view.splits or not view.predictions:
        return []
    texts = {who: part.get("texts") or [] for who, part in view.predictions.items()}
    rows = []
    for index, sample in enumerate(view.splits.test):
        by_who = {who: its[index] for who, its in texts.items() if its and its[index] is not None}
        if by_who:
            words = (sample.image, sample.question, sample.answer, by_who.get("winner", ""), by_who.get("guide", ""))
            rows.append([plain(text[:MAX_SHOWN], keep="\n") for text in words])
    return rows[:most]
