"""The report's pictures of the answers on the test.

Shapes: n test samples of a task, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.scoring.metrics import confusion, num_calibration_bins
from tune.results.intervals import wilson
from tune.results.operating import PositiveTask, Z, net_benefit, positive_tasks, precision, rates
from tune.results.summary import Score, is_number
from tune.results.view import GUIDE, WINNER, TestedTask, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TASKS = 4  # in one picture
NO_CHOICE = "the test was not scored on a closed set of answers"
NO_POSITIVE = "it takes a positive answer (--positive-label), and test images with and without it"
LOOKS: dict[str, dict[str, Any]] = {
    "winner": {"color": WINNER, "linewidth": 2.4},
    "guide": {"color": GUIDE, "linewidth": 1.4, "linestyle": "--"},
}
MARKS: dict[str, dict[str, Any]] = {
    "winner": {"marker": "o", "color": WINNER, "markersize": 10, "elinewidth": 2, "zorder": 5},
    "guide": {"marker": "s", "color": GUIDE, "markersize": 6, "elinewidth": 1, "zorder": 6},
}


def confusions(view: View) -> Figure | str:
    """Confusion tables on the test: counts, coloured by their share of the row."""
    if not view.tested:
        return NO_CHOICE
    figure, row = answer_figure(view, 4.9 if len(view.tested[0].task.candidates) > 6 else 3.9)
    for axes, tested, who in row:
        answers = [short(answer) for answer in tested.task.candidates]
        many = len(answers) > 6
        table = confusion(tested.truth, tested.answers[who], len(answers))
        shares = table / np.maximum(1, table.sum(1, keepdims=True))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (true, predicted), count in np.ndenumerate(table):
            ink = "white" if shares[true, predicted] > 0.55 else "black"
            axes.text(predicted, true, count, ha="center", va="center", color=ink, fontsize=7 if many else 13)
        axes.set_xticks(range(len(answers)), answers, rotation=90 if many else 0)
        axes.set_yticks(range(len(answers)), answers)
        axes.set(title=title_of(view, tested, who), xlabel="the model's answer", ylabel="true answer")
        axes.grid(visible=False)
        axes.tick_params(length=0)
    return figure


def answer_figure(view: View, height: float) -> tuple[Figure, list[tuple[Any, TestedTask, str]]]:
    """A figure of the largest tasks, and by cell its axes, task and adapter.

    Both adapters of a task stand side by side; of one adapter, two tasks do.

    height: of a row, in inches.
    """
    cells = [(tested, who) for tested in view.tested[:MAX_TASKS] for who in tested.answers]
    figure, grid = cell_figure(height, len(cells), 2)
    return figure, [(axes, *cell) for axes, cell in zip(grid, cells, strict=True)]


def cell_figure(height: float, count: int, columns: int) -> tuple[Figure, list[Any]]:
    """A figure 9 inches wide and its `count` axes. height: of a row, in inches."""
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(9, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def short(answer: str) -> str:
    """An answer as a label."""
    return answer if len(answer) < 18 else answer[:16] + "…"


def title_of(view: View, tested: TestedTask, who: str) -> str:
    """The title of a picture of one adapter on one task."""
    name = tested.task.name
    return f"{name}: {view.summary.title(who)}" if name else view.summary.title(who)


def calibration(right: np.ndarray, confidence: np.ndarray, bins: int) -> tuple[np.ndarray, float]:
    """Answers in `bins` equally large groups by confidence.

    Returns:
        Rows of (mean confidence, share right, number of images), and the expected calibration error: the mean distance
        of the first two over all images (arXiv:1904.01685).
    """
    groups = [group for group in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(group)]
    rows = np.array([(confidence[group].mean(), right[group].mean(), len(group)) for group in groups])
    return rows, float((np.abs(rows[:, 0] - rows[:, 1]) * rows[:, 2]).sum() / len(confidence))


def reliability(view: View) -> Figure | str:
    """Share of right answers by confidence on the test, with 95 % Wilson intervals: calibrated and raw."""
    if not view.tested:
        return NO_CHOICE
    figure, row = answer_figure(view, 4.1)
    for axes, tested, who in row:
        axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
        title, calibrated = title_of(view, tested, who), tested.probabilities[who]
        if who in tested.raw:
            raw = draw_calibration(axes, tested.truth, tested.raw[who], "#E69F00", "s", "raw probabilities")
            error = draw_calibration(axes, tested.truth, calibrated, "#0072B2", "o", "calibrated on validation")
            title += f"\nECE {error:.3f}, raw {raw:.3f}"
        else:
            title += f": ECE {draw_calibration(axes, tested.truth, calibrated, '#0072B2', 'o'):.3f}"
        axes.set(title=title, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="probability of the most probable answer")
        axes.set(aspect="equal", ylabel="how often it is right")
    return figure


def draw_calibration(
    axes: Any, truth: np.ndarray, probabilities: np.ndarray, color: str, marker: str, label: str = "_"
) -> float:
    """Draw how often the most probable answer is right, by its probability. Returns the expected calibration error."""
    right = probabilities.argmax(1) == truth
    rows, error = calibration(right, probabilities.max(1), num_calibration_bins(len(right)))
    confidence, share, count = rows.T
    axes.vlines(confidence, *wilson(share, count, Z), color=color, linewidth=1.5)
    axes.scatter(confidence, share, 45, color, marker, label=label, zorder=3)
    return error


# ------------------------------------------------------------------------------------------------ a positive answer


def for_each_positive(view: View, draw: Callable[[Any, PositiveTask], None]) -> Figure | str:
    """A figure of the largest tasks with a positive answer, each drawn on its axes by `draw`; or why there is none."""
    if not (tasks := positive_tasks(view)[:MAX_TASKS]):
        return NO_POSITIVE
    figure, grid = cell_figure(4.6, len(tasks), min(2, len(tasks)))
    for axes, task in zip(grid, tasks, strict=True):
        draw(axes, task)
    return figure


def finish(axes: Any, task: PositiveTask, **words: Any) -> None:
    """Square axes from 0 to 1, named."""
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", title=task.tested.task.name, **words)


def cross(axes: Any, who: str, x: Score, y: Score) -> None:
    """Mark an operating point, with its intervals as a cross."""
    if not (is_number(x["value"]) and is_number(y["value"])):
        return
    errors: dict[str, Any] = {
        error: [[max(0.0, score["value"] - score["interval"][0])], [max(0.0, score["interval"][1] - score["value"])]]
        for error, score in (("xerr", x), ("yerr", y))
        if score["interval"]
    }
    look = MARKS[who] | {"markerfacecolor": "none", "markeredgewidth": 1.6, "capsize": 3, "linestyle": "none"}
    axes.errorbar(x["value"], y["value"], **errors, **look, label=f"{who}'s decision", clip_on=False)


def roc(view: View) -> Figure | str:
    """Sensitivity over 1 - specificity at every threshold, and the operating point."""

    def draw(axes: Any, task: PositiveTask) -> None:
        for who in task.tested.answers:
            hits, alarms = rates(task.positive, task.raw(who))
            axes.plot([0, *alarms], [0, *hits], **LOOKS[who], label=view.summary.title(who))
            specificity = task.share(who, "specificity")
            cross(axes, who, complement(specificity), task.share(who, "sensitivity"))
        axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":", label="chance")
        finish(axes, task, xlabel=f"1 - specificity: others called {short(task.name)}", ylabel="sensitivity")

    return for_each_positive(view, draw)


def complement(score: Score) -> Score:
    """1 minus a score."""
    interval = [1 - bound for bound in reversed(score["interval"])] if score["interval"] else None
    return {"value": 1 - score["value"] if is_number(score["value"]) else None, "interval": interval}


def precision_recall(view: View) -> Figure | str:
    """Precision over recall at every threshold and one prevalence, and the operating point."""

    def draw(axes: Any, task: PositiveTask) -> None:
        for who in task.tested.answers:
            hits, alarms = rates(task.positive, task.raw(who))
            values = precision(hits, alarms, task.prevalence)
            look = LOOKS[who] | {"drawstyle": "steps-pre", "label": view.summary.title(who)}
            axes.plot([0, *hits], [values[0], *values], **look)
            predictive = task.score(who, "ppv") if task.given else task.share(who, "ppv")
            if predictive:
                cross(axes, who, task.share(who, "sensitivity"), predictive)
        axes.axhline(task.prevalence, color="#888888", linewidth=1, linestyle=":", label="chance")
        finish(axes, task, xlabel="recall (sensitivity)", ylabel="precision (positive predictive value)")

    return for_each_positive(view, draw)


def decision_curve(view: View) -> Figure | str:
    """Net benefit by threshold probability, beside treating all and treating none."""
    thresholds = np.arange(1, 100) / 100

    def draw(axes: Any, task: PositiveTask) -> None:
        prevalence = task.prevalence
        lowest = 0.0
        for who in task.tested.answers:
            benefit = net_benefit(task.positive, task.probability(who), thresholds, prevalence)
            axes.plot(thresholds, benefit, **LOOKS[who], label=view.summary.title(who))
            lowest = min(lowest, float(benefit.min()))
        treat_all = prevalence - (1 - prevalence) * thresholds / (1 - thresholds)
        axes.plot(thresholds, treat_all, color="#D55E00", linewidth=1.4, label="treat all")
        axes.axhline(0, color="#888888", linewidth=1.4, linestyle=":", label="treat none")
        bottom = max(lowest, -0.5 * prevalence) - 0.08 * prevalence
        axes.set(xlim=(0, 1), ylim=(bottom, 1.08 * prevalence), title=task.tested.task.name)
        axes.set(xlabel=f"probability of {short(task.name)} from which one would act", ylabel="net benefit")

    return for_each_positive(view, draw)
