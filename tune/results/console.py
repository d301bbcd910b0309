"""A study's summary in a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from train_fn.support.text import plain
from tune.results.outcome import EXTEND, LOOK_AGAIN, Outcome
from tune.results.summary import Summary, format_metric, format_score, format_value, summarize

if TYPE_CHECKING:
    from rich.table import Table

MOST_TRIALS = 10  # rows of the table, the guide's defaults apart


def print_summary(outcome: Outcome) -> None:
    """Print the table of trials, the test scores, where the results are, and what to type next."""
    from rich.console import Console

    summary = summarize(outcome.to_dict(), outcome.directory)
    # Names, values and answers are the user's: no markup, and nothing that controls the terminal.
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 160
    for part in (trials_table(summary), search_lines(summary), tests_table(summary), result_lines(summary)):
        if isinstance(part, list):
            for line in part:
                print(plain(line))
        elif part:
            console.print(part)


def trials_table(summary: Summary) -> Table | None:
    """The best trials and the guide's defaults; None before a trial has completed."""
    from rich.table import Table

    shown = [*summary.ranked[:MOST_TRIALS], summary.winner, summary.guide]
    trials = {record.number: record for record in shown if record}
    if not trials:
        return None
    title = f"Study {summary.name}: {summary.counts_text}. Validation scores, best first by {summary.metric}"
    table = Table(title=plain(title))
    for name in ("trial", *summary.parameters, *summary.metrics, "train s", "state"):
        table.add_column(plain(name), justify="right", overflow="fold")
    for record in trials.values():
        cells = [format_value(record.searched.get(name, "-")) for name in summary.parameters]
        cells += [format_metric(record.value(name)) for name in summary.metrics]
        cells += [f"{record.seconds.get('train', 0):.1f}", record.state.lower()]
        table.add_row(summary.label(record), *map(plain, cells))
    return table


def search_lines(summary: Summary) -> list[str]:
    """What the search found, beside the table."""
    lines, metric, completed = [], summary.metric, summary.ranked
    if summary.front:
        goals = ", ".join(f"{name} ({mode})" for name, mode in summary.goals)
        lines.append(f"Pareto front of {goals}: trials {', '.join(map(str, summary.front))}")
    if len(completed) > MOST_TRIALS:
        lines.append(
            f"(the best {MOST_TRIALS} of {len(completed)}; all of them are in {summary.results.name} and MLflow)"
        )
    if len(completed) > 1:
        scores = [record.value(metric) for record in completed]
        lines.append(f"Spread of {metric} over the completed trials: {min(scores):.3f} to {max(scores):.3f}")
    lines += [f"{count} failed: {error}" for error, count in summary.errors.items()]
    for confirmed in summary.confirmations:
        trial = f"trial {confirmed.number}" + (" (guide)" if confirmed.number == 0 else "")
        spread = f" +- {confirmed.deviation:.3f}" if math.isfinite(confirmed.deviation) else ""
        score = f"validation {metric} {confirmed.mean:.3f}{spread}"
        lines.append(f"Confirmed {len(confirmed.values)} times: {trial}: {score}")
    return lines


def tests_table(summary: Summary) -> Table | None:
    """The test scores; None where the test was not scored."""
    from rich.table import Table

    if not summary.tests:
        return None
    table = Table(title=f"Test scores (95 % bootstrap interval), {summary.test_note}")
    for name in ("metric", *map(summary.title, summary.tests)):
        table.add_column(plain(name))
    for name in next(iter(summary.tests.values())):
        table.add_row(plain(name), *(format_score(scores[name]) for scores in summary.tests.values()))
    return table


def result_lines(summary: Summary) -> list[str]:
    """How the study ended, where its results are, and commands to type next."""
    lines = [summary.comparison] if summary.comparison else []
    lines += [f"Ended by an error: {summary.error}."] if summary.error else []
    lines += [f"Ended because {summary.ended_by}."] if summary.ended_by else []
    lines += [f"Note: {note}" for note in summary.notes]
    if summary.winner and summary.next_step == LOOK_AGAIN:
        lines.append(f"Best so far: trial {summary.winner.number}")
    lines.append(
        f"Wall time {summary.wall_s:.0f} s, {summary.busy_share:.0%} of it training and evaluation "
        f"on {summary.lanes} lane{'' if summary.lanes == 1 else 's'}."
    )
    if summary.profile:
        lines.append(f"Profile: {', '.join(f'{name} {share:.1%}' for name, share in summary.profile.items())}.")
    places = {"Results": summary.results} | ({"Adapter": summary.adapter} if summary.adapter else {})
    lines += [f"{label:15}{text}" for label, text in {**places, **summary.commands}.items()]
    if not summary.winner and summary.next_step == EXTEND:
        reason = "No adapter can be used" if summary.ranked else "No trial completed"
        lines.append(f"{reason}, so there is no winner. The first error is above; all are in {summary.results.name}.")
    return lines
