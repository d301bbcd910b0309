"""A study's summary in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from train_fn.support.tables import HELD, print_table
from train_fn.support.text import plain
from tune.results.comparison import CLEAN, Score
from tune.results.outcome import EXTEND, LOOK_AGAIN, Outcome
from tune.results.summary import Summary, format_metric, format_score, format_spread, format_value

MOST_TRIALS = 10  # rows of the table, winner and guide apart


def print_summary(outcome: Outcome) -> None:
    """Print the table of trials, the test scores, where the results are, and what to type next."""
    summary = Summary(outcome.to_dict(), outcome.directory)
    winner, guide, tests = summary.winner, summary.guide, summary.study["test"]
    trials = {record.number: record for record in (*summary.ranked[:MOST_TRIALS], winner, guide) if record}
    goals = [name for name, _ in summary.goals]
    rows, short = [], []
    for record in trials.values():
        role = f"{HELD}(winner)" if record is winner else f"{HELD}(guide)" if record is guide else ""
        role += f" (repeats{HELD}{record.repeats})" if record.repeats is not None else ""
        row = [f"{record.number}{role}", *(format_value(record.searched.get(name, "-")) for name in summary.parameters)]
        row += [format_metric(record.value(name)) for name in summary.metrics]
        rows.append([*row, f"{record.seconds.get('train', 0):.1f}", record.state.lower()])
        settings = ", ".join(f"{name}{HELD}{format_value(value)}" for name, value in record.searched.items())
        short.append([row[0], *(format_metric(record.value(name)) for name in goals), settings, record.state.lower()])
    title = f"Study {summary.study['name']}: {summary.counts_text}. Validation scores, best first by {summary.metric}"
    columns = ["trial", *summary.parameters, *summary.metrics, "train s", "state"]
    print_table(title, columns, rows, narrow=(["trial", *goals, "settings", "state"], short), justify="right")
    print_lines(search_lines(summary))
    names = [name for name in summary.test_metrics if not name.endswith("_raw")]
    for whose in summary.test_tables:
        rows = [[name, *(score_cell(tests[who].get(name)) for who in whose)] for name in names]
        title = f"Test scores{CLEAN if CLEAN in whose[0] else ''} (95 % interval)"
        print_table(title, ["metric", *map(summary.title, whose)], rows)
    rows = [
        [summary.title(who), *(score_cell(tests[who].get(name)) for name in summary.compared_metrics)]
        for who in summary.compared
    ]
    print_table("Beside baselines (95 % interval)", ["test scores", *summary.compared_metrics], rows)
    print_lines(result_lines(summary))


def score_cell(score: Score | None) -> str:
    """A test score whose interval stays in one line."""
    value, between, interval = format_score(score).partition(" ")
    return value + between + interval.replace(" ", HELD)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of text, without characters that control the terminal."""
    for line in lines:
        print(plain(line))


def search_lines(summary: Summary) -> list[str]:
    """What the table of trials does not show."""
    lines, metric, completed = [], summary.metric, summary.ranked
    if front := summary.study["front"]:
        goals = ", ".join(f"{name} ({mode})" for name, mode in summary.goals)
        lines.append(f"Pareto front of {goals}: trials {', '.join(map(str, front))}")
    if len(completed) > MOST_TRIALS:
        lines.append(
            f"(the best {MOST_TRIALS} of {len(completed)}; all of them are in {all_trials(summary)} and MLflow)"
        )
    if len(completed) > 1:
        scores = [record.value(metric) for record in completed]
        lines.append(f"Spread of {metric} over the completed trials: {min(scores):.3f} to {max(scores):.3f}")
    lines += [f"{count} failed: {error}" for error, count in summary.errors.items()]
    for number, values in summary.confirmations.items():
        trial = f"trial {number}" + (" (guide)" if number == 0 else "")
        lines.append(f"Confirmed {len(values)} times: {trial}: validation {metric} {format_spread(values)}")
    return lines


def result_lines(summary: Summary) -> list[str]:
    """How the study ended, where its results are, and commands to type next."""
    study, next_step = summary.study, list(summary.commands)[-1]
    lines = [summary.explanation] if summary.winner else []
    lines += [summary.transfer_sentences] if summary.transfer_sentences else []
    lines += [f"The test images were {study['test_note']}."] if study["test"] else []
    lines += [f"Ended by an error: {study['error']}."] if study["error"] else []
    lines += [f"Ended because {study['ended_by']}."] if study["ended_by"] else []
    lines += [f"Note: {note}" for note in study["notes"]]
    if summary.winner and next_step == LOOK_AGAIN:
        lines.append(f"Best so far: trial {summary.winner.number}")
    lines.append(
        f"Wall time {study['seconds'].get('wall', 0):.0f} s, {study['share_training_and_evaluation']:.0%} of it "
        f"training and evaluation on {study['lanes']} lane{'' if study['lanes'] == 1 else 's'}."
    )
    if study["profile"]:
        lines.append(f"Profile: {', '.join(f'{name} {share:.1%}' for name, share in study['profile'].items())}.")
    places = {"Results": str(summary.directory / all_trials(summary))}
    places |= {"Adapter": study["adapter"]} if study["adapter"] else {}
    lines += [f"{label:15}{text}" for label, text in (places | summary.commands).items()]
    if not summary.winner and next_step == EXTEND:
        reason = "No adapter can be used" if summary.ranked else "No trial completed"
        lines.append(f"{reason}, so there is no winner. The first error is above; all are in {all_trials(summary)}.")
    return lines


def all_trials(summary: Summary) -> str:
    """The name of the file with all trials."""
    return "study.json" if (summary.directory / "study.json").is_file() else "journal.jsonl"
