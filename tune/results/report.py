"""A finished study as one page for people: report.html, its pictures, and pictures/explore.html to click through.

All of it comes from study.json's content, splits.json and optuna.db; it needs neither a display nor the network. The
words are in report.html.jinja.

Shapes: N test images, C candidate answers.
"""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.data.splitting import DataReport
from train_fn.support.files import write_file
from train_fn.support.text import plain, plain_values
from tune.results.intervals import verdict
from tune.results.pictures import draw
from tune.results.summary import defined, failures, next_mlflow, number_text, score_text, with_interval
from tune.results.view import STATES, View

if TYPE_CHECKING:
    pass


def write_explorer(view: View, path: Path) -> list[Path]:
    """Optuna's own interactive pictures on one page that works offline; none without two completed trials."""
    import optuna
    from optuna import visualization

    state = optuna.trial.TrialState.COMPLETE
    if not view.search or len(done := view.search.get_trials(deepcopy=False, states=(state,))) < 2:
        return []
    several = len(view.search.directions) > 1
    options: dict[str, Any] = {"target_name": view.metric, "target": (lambda t: t.values[0]) if several else None}
    figures = {"History": visualization.plot_optimization_history(view.search, **options)}
    figures["Timeline"] = visualization.plot_timeline(view.search)
    if view.names:
        figures["Settings together"] = visualization.plot_parallel_coordinate(view.search, **options)
        figures["Setting by setting"] = visualization.plot_slice(view.search, **options)
    shared = [name for name in view.names if all(name in trial.params for trial in done)][:3]
    if len(shared) > 1:
        figures["Settings by twos"] = visualization.plot_contour(view.search, shared, **options)
        figures["Settings by twos"].update_layout(height=800)
    parts: list[str] = []
    for name, figure in figures.items():
        figure.update_layout(template="plotly_white", title=name, width=None, autosize=True)
        options = {"include_plotlyjs": not parts, "config": {"displaylogo": False, "responsive": True}}
        parts.append(figure.to_html(full_html=False, **options))
    title = html.escape(view.study["name"])
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<body style="font-family:system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem">'
        f"<h1>{title}</h1><p>Point at a mark for its trial; drag to zoom; double-click to zoom out.</p>"
        + "".join(parts)
    )
    write_file(path, page)
    return [path]


def mistakes(view: View) -> list[tuple[str, str, str, float]]:
    """The winner's ten surest wrong answers on the test: image, true answer, its answer, its probability."""
    if not view.tested or not view.splits:
        return []
    probabilities, truth, names = next(iter(view.tested.values())), view.truth, view.study["candidates"]
    given, sure = probabilities.argmax(1), probabilities.max(1)
    wrong = sorted(np.flatnonzero(given != truth).tolist(), key=lambda image: -sure[image])[:10]
    return [(plain(view.splits.test[i].image), names[truth[i]], names[given[i]], float(sure[i])) for i in wrong]


def write_report(study: dict[str, Any], directory: Path) -> list[Path]:
    """Write report.html and pictures/ of a finished study, however it ended.

    study: what `Outcome.save` wrote to study.json. directory: the study's, with splits.json and optuna.db.
    Returns the paths of what was written.
    """
    import jinja2

    study = plain_values(study)
    view = View(study, directory)
    folder = directory / "pictures"
    folder.mkdir(exist_ok=True)
    pictures, paths = draw(view, folder)
    paths += write_explorer(view, folder / "explore.html")
    gain = study["test"].get("difference", {}).get(view.metric)
    parts = ("train", "validation", "test")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = page.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")).render(
        view=view,
        study=study,
        pictures=pictures,
        explorer=any(path.suffix == ".html" for path in paths),
        scores={who: test[view.metric] for who, test in study["test"].items() if defined(test.get(view.metric))},
        verdict=verdict(gain, view.metric) if defined(gain) else "",
        num_images={part: len(getattr(view.splits, part)) if view.splits else "?" for part in parts},
        ended={state: sum(r.state == state for r in view.records) for state in STATES},
        failures=failures(view.records),
        mistakes=mistakes(view),
        data_sentences=DataReport(**study["data_report"]).sentences(),
        root=directory.parent,
        mlflow=next_mlflow(study["tracking_uri"]),
        number_text=number_text,
        with_interval=with_interval,
        score_text=score_text,
        quote=shlex.quote,
    )
    path = directory / "report.html"
    write_file(path, text)
    return [path, *paths]
