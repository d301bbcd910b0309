"""The report's pictures: those of the search, and the drawing of all."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.support.files import write_file
from tune.records.trials import TrialRecord
from tune.results.answer_pictures import decision_curve, precision_recall, reliability, roc
from tune.results.summary import format_metric, format_value
from tune.results.view import STATES, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "text.parse_math": False,  # an answer may hold a $
    "svg.fonttype": "none",  # text stays text: a browser has fonts for every script
    "svg.hashsalt": "report",  # the same study gives the same file
}


def new_figure(height: float, count: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure 9 inches wide and its `count` axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False, sharey=True).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def scatter(axes: Any, view: View, records: Sequence[TrialRecord], position: Callable[[TrialRecord], float]) -> None:
    """Scores over `position`: a marker for each end state, rings around winner and guide."""
    for state, (color, marker) in STATES.items():
        if ended := [record for record in records if record.state == state]:
            heights = [view.height(view.score(record)) for record in ended]
            look: dict[str, Any] = {"alpha": 0.8, "linewidths": 0, "zorder": 3, "clip_on": False}
            axes.scatter([position(r) for r in ended], heights, 30, color, marker, label=state.lower(), **look)
    for record in records:
        if highlight := view.highlight(record):
            look = {"facecolors": "none", "edgecolors": highlight[1], "linewidths": 2, "zorder": 4, "clip_on": False}
            axes.scatter(position(record), view.height(view.score(record)), 120, label=highlight[0], **look)
    axes.set_ylim(view.low, view.high)


def say_cut(figure: Figure, scores: Sequence[float], low: float, high: float) -> None:
    """Say below a picture how many scores lie beyond its axis, or are missing."""
    beyond = [score for score in scores if math.isfinite(score) and not low <= score <= high]
    missing = sum(not math.isfinite(score) for score in scores)
    words = []
    if beyond:
        farthest = max(beyond, key=lambda score: max(low - score, score - high))
        count = f"{len(beyond)} score{'s' if len(beyond) > 1 else ''}"
        words.append(f"{count} beyond this axis, as far as {format_metric(farthest)}")
    if missing:
        words.append(f"{missing} score{'s' if missing > 1 else ''} missing")
    if words:
        figure.supxlabel("Not to scale: " + "; ".join(words), fontsize=9, color="#9c3d00")


def history(view: View) -> Figure | str:
    """Scores by trial number, and the best so far."""
    if not view.scored:
        return "no trial has a score"
    figure, (axes,) = new_figure(3.6)
    scatter(axes, view, view.records, lambda record: record.number)
    completed = [r for r in view.records if r.state == "COMPLETE" and math.isfinite(view.score(r))]
    if completed:
        so_far = view.better * np.maximum.accumulate([view.better * view.score(record) for record in completed])
        numbers = [record.number for record in completed] + [view.records[-1].number]
        axes.step(numbers, [*so_far, so_far[-1]], color="#444444", where="post", label="best completed so far")
    axes.set(xlabel="trial", ylabel=f"validation {view.metric}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    say_cut(figure, [view.score(record) for record in view.records], view.low, view.high)
    return figure


def curves(view: View) -> Figure | str:
    """The metric by epoch."""
    if not any(view.metric in record.metrics for record in view.records):
        return f"no trial reported {view.metric} by epoch"
    figure, (axes,) = new_figure(3.6)
    scores = [epoch.get(view.metric, math.nan) for record in view.records for epoch in record.epochs]
    low, high = curve_range(view)
    for record in sorted(view.records, key=lambda record: view.highlight(record) is not None):
        color, marker = STATES[record.state]
        label, look = record.state.lower(), {"alpha": min(0.5, 30 / len(view.records))}
        if highlight := view.highlight(record):
            (label, color), look = highlight, {"linewidth": 2.8, "zorder": 4}
        heights = [epoch.get(view.metric, math.nan) for epoch in record.epochs]
        label = "_" if label in axes.get_legend_handles_labels()[1] or not heights else label
        axes.plot(range(1, len(heights) + 1), heights, color=color, marker=marker, markersize=5, label=label, **look)
    axes.set(xlabel="epoch (pass over the training images)", ylabel=f"validation {view.metric}", ylim=(low, high))
    axes.xaxis.get_major_locator().set_params(integer=True)
    say_cut(figure, scores, low, high)
    return figure


def curve_range(view: View) -> tuple[float, float]:
    """The axis of the learning curves: it holds the scores of winner and guide and those that trials ended with, and
    every other score that makes it at most four times as long."""
    kept = [view.low, view.high]
    others: list[float] = []
    for record in view.records:
        scores = [score for epoch in record.epochs if math.isfinite(score := epoch.get(view.metric, math.nan))]
        (kept if view.highlight(record) else others).extend(scores)
    room = 1.5 * (max(kept) - min(kept))
    shown = [*kept, *(score for score in others if min(kept) - room <= score <= max(kept) + room)]
    pad = 0.04 * (max(shown) - min(shown))
    return min(shown) - pad, max(shown) + pad


def parameter_axis(view: View, name: str) -> tuple[Callable[[TrialRecord], float], dict[float, str]]:
    """The axis of a parameter: log where the search is log, choices evenly spaced.

    Returns:
        The position of a trial between 0 and 1, moved a little by the trial's number so that trials with the same value
        stay apart; and the ticks' texts by position.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    trials = view.search.get_trials(deepcopy=False)
    searched = next((trial.distributions[name] for trial in trials if name in trial.distributions), None)
    values = [record.searched[name] for record in view.records if name in record.searched]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    share: Callable[[Any], float]
    if hasattr(searched, "choices") or not numeric:
        texts = {repr(value): format_value(value)[:14] for value in [*getattr(searched, "choices", ()), *values]}
        shares = {key: (index + 0.5) / len(texts) for index, key in enumerate(texts)}
        share = lambda value: shares[repr(value)]  # noqa: E731
        ticks = {shares[key]: text for key, text in texts.items()}
    else:
        low = min([*values, getattr(searched, "low", values[0])])
        high = max([*values, getattr(searched, "high", values[0])])
        log = getattr(searched, "log", False)
        scale = math.log if log else float
        span = scale(high) - scale(low) or 1.0
        share = lambda value: (scale(value) - scale(low)) / span  # noqa: E731
        locator = LogLocator(subs=(1, 3) if high < 100 * low else (1,)) if log else MaxNLocator(4)
        ticks = {share(t): f"{t:g}" for t in map(float, locator.tick_values(low, high)) if low <= t <= high}
    return lambda record: share(record.searched[name]) + (record.number * 0.618 % 1 - 0.5) * 0.04, ticks


def slices(view: View) -> Figure | str:
    """The score against one parameter at a time."""
    if not view.scored or not view.parameters:
        return "it takes a trial with a score and a searched setting"
    columns = min(3, len(view.parameters))
    figure, grid = new_figure(2.6 * -(-len(view.parameters) // columns) + 0.6, len(view.parameters), columns)
    for axes, name in zip(grid, view.parameters, strict=True):
        position, ticks = parameter_axis(view, name)
        scatter(axes, view, [record for record in view.records if name in record.searched], position)
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=30 if sum(map(len, ticks.values())) > 24 else 0)
        axes.set(xlim=(-0.06, 1.06), xlabel=name)
    for axes in grid[::columns]:
        axes.set_ylabel(view.metric)
    say_cut(figure, [view.score(record) for record in view.records], view.low, view.high)
    return figure


def parallel(view: View) -> Figure | str:
    """Each trial as a line through its parameters to its score."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    if len(view.scored) < 2 or not view.parameters:
        return "it takes two trials with a score and a searched setting"
    figure, (axes,) = new_figure(4.2)
    columns = {name: parameter_axis(view, name) for name in view.parameters}
    for record in reversed(view.summary.order[: len(view.scored)]):
        shares = [position(record) if name in record.searched else -0.14 for name, (position, _) in columns.items()]
        shares.append((view.height(view.score(record)) - view.low) / (view.high - view.low))
        goodness = (view.score(record) - view.worst) / (view.best - view.worst or 1.0)
        look: dict[str, Any] = {"color": "#c8c8c8", "linewidth": 0.8}
        if record.state == "COMPLETE":
            look = {"color": colormaps["Blues"](0.35 + 0.65 * goodness), "linewidth": 1.4, "zorder": 3}
        if highlight := view.highlight(record):
            look = {"color": highlight[1], "linewidth": 2.8, "label": highlight[0], "zorder": 5}
        axes.plot(range(len(shares)), shares, linestyle="--" if record is view.summary.guide else "-", **look)
    heights = [t for t in MaxNLocator(5).tick_values(view.low, view.high) if view.low <= t <= view.high]
    ends = {(height - view.low) / (view.high - view.low): f"{height:.4g}" for height in heights}
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
    for column, ticks in enumerate([*(ticks for _, ticks in columns.values()), ends]):
        axes.axvline(column, color="#888888", linewidth=0.8)
        for share, text in ticks.items():
            axes.text(column + 0.03, share, text, va="center", fontsize=8.5, bbox=box, zorder=6)
    if any(name not in record.searched for record in view.scored for name in view.parameters):
        axes.text(-0.04, -0.14, "not searched", ha="right", va="center", fontsize=8.5)
    labels = [name.replace("_", "_\n", 1) if len(name) > 14 else name for name in [*view.parameters, view.metric]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set(yticks=[], xlim=(-0.05, len(labels) - 0.65))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    say_cut(figure, [view.score(record) for record in view.scored], view.low, view.high)
    return figure


def importances(view: View) -> Figure | str:
    """Optuna's PED-ANOVA: it needs no further package and takes milliseconds for hundreds of trials."""
    import optuna

    done = view.search.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    # A parameter that only some trials have would get the credit for all other differences of those trials.
    shared = [name for name in view.parameters if all(name in trial.params for trial in done)]
    names = [name for name in shared if len({repr(trial.params[name]) for trial in done}) > 1]
    if len(done) < 4 or len(names) < 2:
        return f"it takes 4 completed trials and 2 settings that vary, and there are {len(done)} and {len(names)}"
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    shares = optuna.importance.get_param_importances(view.search, evaluator=evaluator, params=names)
    figure, (axes,) = new_figure(0.7 + 0.36 * len(shares))
    bars = axes.barh(list(shares)[::-1], list(shares.values())[::-1], color="#0072B2", height=0.62)
    axes.bar_label(bars, fmt="{:.0%}", padding=4)
    axes.set(xlabel=f"share of importance in {len(done)} completed trials", xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    return figure


def spans(view: View) -> list[tuple[TrialRecord, float, float]]:
    """Start and end of each trial, in seconds since the first start.

    A trial is recorded as started while it is still queued, so its start is computed from its end and the seconds that
    its lane worked on it: `wall` less the idle `waited`.
    """
    ended = [record for record in view.records if record.ended_at]
    starts = {}
    for record in ended:
        seconds = record.attempt_s or record.seconds.get("wall", math.inf) - record.seconds.get("waited", 0.0)
        starts[record.number] = max(record.started_at, record.ended_at - seconds)
    first = min(starts.values(), default=0.0)
    return [(record, starts[record.number] - first, record.ended_at - first) for record in ended]


def timeline(view: View) -> Figure | str:
    """Lanes as rows, trials as bars."""
    if not (bars := spans(view)):
        return "no trial has both a start and an end"
    last = max(end for *_, end in bars)
    unit, seconds = ("hours", 3600) if last > 7200 else ("minutes", 60) if last > 300 else ("seconds", 1)
    lanes = sorted({record.lane for record, *_ in bars}, key=lambda lane: (lane is None, lane))
    figure, (axes,) = new_figure(1.3 + 0.38 * len(lanes))
    for state, (color, _) in STATES.items():
        if ended := [(lanes.index(record.lane), *span) for record, *span in bars if record.state == state]:
            rows, starts, ends = np.array(ended).T
            look: dict[str, Any] = {"color": color, "edgecolor": "white", "linewidth": 0.6, "label": state.lower()}
            axes.barh(rows, (ends - starts) / seconds, 0.72, starts / seconds, **look)
    for record, start, end in bars:
        number = str(record.number)
        if end - start > (0.008 + 0.007 * len(number)) * last:
            middle, ink = (start + end) / 2 / seconds, "black" if record.state == "STOPPED" else "white"
            axes.text(middle, lanes.index(record.lane), number, ha="center", va="center", fontsize=8, color=ink)
    axes.set_yticks(range(len(lanes)), ["no lane" if lane is None else f"lane {lane}" for lane in lanes])
    axes.set(xlabel=f"{unit} since the first trial began", xlim=(0, last / seconds))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


PICTURES = (
    roc, precision_recall, decision_curve, reliability,
    history, curves, importances, slices, parallel, timeline,
)  # fmt: skip


def draw(view: View, folder: Path) -> tuple[dict[str, str], list[Path]]:
    """Draw all pictures.

    Returns:
        By name, a picture's data URI or the reason why it is not drawn; and the paths of the SVGs.
    """
    import matplotlib

    shown, paths = {}, []
    for picture in PICTURES:
        name, path = picture.__name__, folder / f"{picture.__name__}.svg"
        with matplotlib.rc_context(STYLE):
            figure = picture(view)
            if isinstance(figure, str):
                shown[name] = figure
                continue
            marks: dict[str, Any] = {}
            for axes in figure.axes:
                for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                    marks.setdefault(label, handle)
            if marks:
                columns = 2 if figure.get_figwidth() < 6 else 5 if sum(map(len, marks)) < 80 else 3
                figure.legend(list(marks.values()), list(marks), loc="outside upper center", ncols=columns)
            svg = io.BytesIO()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "constrained_layout not applied")  # long labels in a small picture
                warnings.filterwarnings("ignore", "Glyph .* missing from")  # measured by its replacement
                figure.savefig(svg, format="svg", metadata={"Date": None})
        write_file(path, svg.getvalue())
        shown[name] = "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
        paths.append(path)
    return shown, paths
