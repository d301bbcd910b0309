"""A study's outcome in a terminal."""

from __future__ import annotations
from tune.results.outcome import next_step

from typing import Any
import math
from collections import Counter
from tune.records.trials import END_STATES
from tune.results.outcome import Outcome
from tune.records.ranking import front
import numpy as np
from train_fn.support.text import plain
import shlex
from tune.results.intervals import verdict
from collections.abc import Sequence
from tune.records.trials import TrialRecord




def number_text(value: Any) -> str:
    """A setting or score, short."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def score_text(value: float) -> str:
    """A score or cost in a table."""
    return "-" if not math.isfinite(value) else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def defined(score: dict[str, Any] | None) -> bool:
    """Whether a test score is a number with an interval."""
    return bool(score and score["interval"] and score["value"] is not None and math.isfinite(score["value"]))


def with_interval(score: dict[str, Any]) -> str:
    """A test score and its 95 % interval."""
    if score["value"] is None or not math.isfinite(score["value"]):
        return "undefined"
    if score["interval"] is None:
        return f"{score['value']:.3f}"
    low, high = score["interval"]
    return f"{score['value']:.3f} ({low:.3f} to {high:.3f})"


def print_summary(outcome: Outcome, most: int = 10) -> None:
    """Print the table of trials, the test scores, where everything is, and what to type next."""
    from rich.console import Console
    from rich.table import Table

    def tell(text: str) -> None:
        print(plain(text))

    # Names, values and answers are the user's: no markup, and nothing that commands the terminal.
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 160
    best = outcome.best()
    shown = best[:most]
    guide = next((r for r in outcome.records if r.number == 0), None)
    if guide and guide not in shown:
        shown.append(guide)
    counts = Counter(record.state.lower() for record in outcome.records)
    counted = ", ".join(
        f"{counts[state]} {state}" for state in map(str.lower, (*END_STATES, "RUNNING")) if counts[state]
    )
    names = list(dict.fromkeys(name for r in outcome.records for name in r.searched))
    scores = list(dict.fromkeys([*(name for name, _ in outcome.goals), "macro_f1", "auroc", "loss"]))
    scores = [m for m in scores if any(math.isfinite(r.value(m)) for r in outcome.records)]
    title = f"Study {outcome.name}: {counted}. Validation scores, best first by {outcome.metric}"
    table = Table(title=plain(title))
    table.add_column("trial", justify="right")
    for name in (*names, *scores, "train s", "state"):
        table.add_column(plain(name), justify="right", overflow="fold")
    for record in shown:
        label = f"{record.number}" + (" (guide)" if record.number == 0 else "")
        cells = [number_text(record.searched[name]) if name in record.searched else "-" for name in names]
        cells += [score_text(record.value(m)) for m in scores]
        cells += [f"{record.seconds.get('train', 0):.1f}", record.state.lower()]
        table.add_row(label, *map(plain, cells))
    everything = "study.json" if (outcome.directory / "study.json").is_file() else "journal.jsonl"
    if shown:
        console.print(table)
        if len(outcome.goals) > 1:
            numbers = ", ".join(str(r.number) for r in front(outcome.records, outcome.goals))
            tell(f"Pareto front of {', '.join(f'{name} ({mode})' for name, mode in outcome.goals)}: trials {numbers}")
        if len(best) > most:
            tell(f"(the best {most} of {len(best)}; all of them are in {everything} and MLflow)")
    if len(best) > 1:
        low, high = (f(r.value(outcome.metric) for r in best) for f in (min, max))
        tell(f"Spread of {outcome.metric} over the completed trials: {low:.3f} to {high:.3f}")
    for error, count in failures(outcome.records).items():
        tell(f"{count} failed: {error}")
    for number, values in outcome.confirmations.items():
        label = f"trial {number}" + (" (guide)" if number == 0 else "")
        spread = f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
        tell(f"Confirmed {len(values)} times: {label}: validation {outcome.metric} {spread}")
    if outcome.tests:
        table = Table(title="Test scores (95 % bootstrap interval), computed once, after the search")
        table.add_column("metric")
        winner = f"winner (trial {outcome.winner.number})" if outcome.winner else "winner"
        if outcome.winner and outcome.winner.number == 0:
            winner = "winner = the guide's defaults"
        titles = {"winner": winner, "guide": "guide", "difference": "winner less guide, paired"}
        for who in outcome.tests:
            table.add_column(plain(titles.get(who, who)))
        for name in next(iter(outcome.tests.values())):
            table.add_row(plain(name), *(with_interval(scores[name]) for scores in outcome.tests.values()))
        console.print(table)
        gain = outcome.tests.get("difference", {}).get(outcome.metric)
        if gain and defined(gain):
            tell(verdict(gain, outcome.metric))
    if outcome.error:
        tell(f"Ended by an error: {outcome.error}.")
    if outcome.ended_by:
        tell(f"Ended because {outcome.ended_by}.")
    for note in outcome.notes:
        tell(f"Note: {note}")
    if outcome.running and outcome.winner:
        tell(f"Best so far: trial {outcome.winner.number}")
    tell(
        f"Wall time {outcome.seconds.get('wall', 0):.0f} s, {outcome.busy_share:.0%} of it training and evaluation "
        f"on {outcome.lanes} lane{'s' if outcome.lanes != 1 else ''}."
    )
    if outcome.profile:
        tell(f"Profile: {', '.join(f'{name} {share:.1%}' for name, share in outcome.profile.items())}.")
    tell(f"Results        {outcome.directory / everything}")
    if outcome.adapter:
        tell(f"Adapter        {outcome.adapter}")
    tell("Compare trials " + next_mlflow(outcome.tracking_uri))
    if outcome.adapter:
        predict = shlex.join(["python", "-m", "train_fn.predict", "--adapter", str(outcome.adapter)])
        tell(f"Use it         {predict} IMAGE_OR_FOLDER")
        tell(f"Merge it       {predict} --merge-into NEW_FOLDER")
    label, command = next_step(outcome)
    tell(f"{label:15}{command}")
    if not outcome.winner and not outcome.unfinished:
        reason = "No trial completed" if not best else "No adapter can be used"
        tell(f"{reason}, so there is no winner. The first error is above; all are in {everything}.")


def next_mlflow(uri: str) -> str:
    """The command that shows the trials."""
    from tune.config.uris import default_uri

    return "mlflow ui" if uri == default_uri() else shlex.join(["mlflow", "ui", "--backend-store-uri", uri])


def failures(records: Sequence[TrialRecord]) -> dict[str, int]:
    """First lines of the errors, with how many trials ended by each."""
    errors = [record.error.strip() or "unknown error" for record in records if record.state == "FAILED"]
    return Counter(error.splitlines()[0] for error in errors)
