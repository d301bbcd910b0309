"""The report's pictures of the answers on the test; the confusion tables are drawn by the page itself.

Shapes: n test samples of a task, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.scoring.metrics import confusion, num_calibration_bins
from train_fn.support.text import plain
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


@dataclass(frozen=True)
class Confusion:
    """The answers of one adapter on the test of one task."""

    title: str
    answers: list[str]
    counts: list[list[int]]
    """Test images, by true answer and then by the model's."""
    shares: list[list[float]]
    """Each count's share of its row."""

    @property
    def numbered(self) -> bool:
        """Whether columns are headed by numbers, because there is no room for the answers."""
        return len(self.answers) > 4 or max(map(len, self.answers)) > 24


def confusions(view: View) -> list[Confusion]:
    """Confusion tables of the largest tasks on the test. The page draws them: a browser has fonts for every script."""
    found = []
    for tested, who in answer_cells(view):
        answers = [plain(answer) for answer in tested.task.candidates]
        table = confusion(tested.truth, tested.answers[who], len(answers))
        shares = table / np.maximum(1, table.sum(1, keepdims=True))
        found.append(Confusion(title_of(view, tested, who), answers, table.tolist(), shares.round(3).tolist()))
    return found


def answer_cells(view: View) -> list[tuple[TestedTask, str]]:
    """The largest tasks, each with its adapters."""
    return [(tested, who) for tested in view.tested[:MAX_TASKS] for who in tested.answers]


def cell_figure(height: float, count: int, columns: int, width: float = 9) -> tuple[Figure, list[Any]]:
    """A figure and its `count` axes. height: of a row; width: of all, in inches."""
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def short(answer: str) -> str:
    """An answer as a label."""
    return answer if len(answer) < 18 else answer[:16] + "…"


def title_of(view: View, tested: TestedTask, who: str) -> str:
    """The title of a picture of one adapter on one task."""
    name = plain(tested.task.name)
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
    cells = answer_cells(view)
    figure, grid = cell_figure(4.1, len(cells), 2)
    for axes, (tested, who) in zip(grid, cells, strict=True):
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


def for_each_positive(view: View, draw: Callable[[Any, PositiveTask], None], width: float = 4.9) -> Figure | str:
    """A figure of the largest tasks with a positive answer, each drawn on its axes by `draw`; or why there is none.

    width: of a single task's picture, in inches.
    """
    if not (tasks := positive_tasks(view)[:MAX_TASKS]):
        return NO_POSITIVE
    figure, grid = cell_figure(4.9, len(tasks), min(2, len(tasks)), 9 if len(tasks) > 1 else width)
    for axes, task in zip(grid, tasks, strict=True):
        draw(axes, task)
    return figure


def finish(axes: Any, task: PositiveTask, **words: Any) -> None:
    """Square axes from 0 to 1, named."""
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", title=plain(task.tested.task.name), **words)


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
        axes.set(xlim=(0, 1), ylim=(bottom, 1.08 * prevalence), title=plain(task.tested.task.name))
        axes.set(xlabel=f"probability of {short(task.name)} from which one would act", ylabel="net benefit")

    return for_each_positive(view, draw, width=7)
