"""A study's summary in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from train_fn.support.tables import HELD, new_console, print_table, wrap
from train_fn.support.text import duration, plain
from tune.records.process import clock
from tune.records.trials import TrialRecord
from tune.results.comparison import CLEAN, Score
from tune.results.outcome import EXTEND, Outcome
from tune.results.summary import LOOK_AGAIN, Summary, format_metric, format_score, format_spread, format_value

MOST_TRIALS = 10  # rows of the table, winner and guide apart
MOST_LISTED = 16  # unfinished trials
NO_WIDTH = 1_000_000  # of a file: its lines are not wrapped


def print_summary(outcome: Outcome) -> None:
    """Print the table of trials, the test scores, where the results are, and what to type next."""
    summary = Summary(outcome.to_dict(), outcome.directory)
    winner, guide, tests = summary.winner, summary.guide, summary.study["test"]
    trials = {record.number: record for record in (*summary.ranked[:MOST_TRIALS], winner, guide) if record}
    goals = [name for name, _ in summary.goals]
    best = "winner" if EXTEND in summary.commands else "best so far"
    rows, short = [], []
    for record in trials.values():
        role = f" ({best})" if record is winner else " (guide)" if record is guide else ""
        role = role.replace(" ", HELD)
        role += f" (repeats{HELD}{record.repeats})" if record.repeats is not None else ""
        row = [f"{record.number}{role}", *(format_value(record.searched.get(name, "-")) for name in summary.parameters)]
        row += [format_metric(record.value(name)) for name in summary.metrics]
        rows.append([*row, f"{record.seconds.get('train', 0):.1f}", record.state.lower()])
        scores = [format_metric(record.value(name)) for name in goals]
        short.append([row[0], *scores, settings_cell(record), record.state.lower()])
    title = f"Study {summary.study['name']}: {summary.counts_text}. Validation scores, best first by {summary.metric}"
    columns = ["trial", *summary.parameters, *summary.metrics, "train s", "state"]
    print_table(title, columns, rows, narrow=(["trial", *goals, "settings", "state"], short), justify="right")
    print_prose(search_lines(summary))
    print_unfinished(summary)
    names = [name for name in summary.test_metrics if not name.endswith("_raw")]
    for whose in summary.test_tables:
        rows = [[name, *(score_cell(tests[who].get(name)) for who in whose)] for name in names]
        title = f"Test scores{CLEAN if CLEAN in whose[0] else ''} (95 % interval)"
        print_table(title, ["metric", *(title_cell(summary, who) for who in whose)], rows)
    rows = [
        [title_cell(summary, who), *(score_cell(tests[who].get(name)) for name in summary.compared_metrics)]
        for who in summary.compared
    ]
    print_table("Beside baselines (95 % interval)", ["test scores", *summary.compared_metrics], rows)
    print_prose([f"State: {outcome.status}."] if outcome.status else [])
    print_prose(result_lines(summary))
    for label, text in places(summary).items():
        print(plain(f"{label:15}{text}"))  # in one line, to be copied


def score_cell(score: Score | None) -> str:
    """A test score whose interval stays in one line."""
    value, between, interval = format_score(score).partition(" ")
    return value + between + interval.replace(" ", HELD)


def title_cell(summary: Summary, who: str) -> str:
    """`Summary.title` with a trial's number in one line."""
    return summary.title(who).replace("(trial ", f"(trial{HELD}")


def print_unfinished(summary: Summary) -> None:
    """Print the trials that have begun and not ended, and how far each has come."""
    unfinished = [record for record in summary.records if record.state in ("RUNNING", "INTERRUPTED")]
    rows = []
    for record in unfinished[:MOST_LISTED]:
        total = "" if record.settings.get("max_steps") else f" of {record.settings.get('num_train_epochs', '?')}"
        row = [str(record.number), f"{record.progress:.3g}{total}", format_metric(record.value(summary.metric))]
        rows.append([*row, clock(record.started_at), settings_cell(record)])
    title = "Trials that run or wait for a lane" if "RUNNING" in summary.counts else "Unfinished trials"
    more = f" (the first {MOST_LISTED} of {len(unfinished)})" if len(unfinished) > MOST_LISTED else ""
    print_table(title + more, ["trial", "epochs trained", f"{summary.metric} so far", "begun", "settings"], rows)


def settings_cell(record: TrialRecord) -> str:
    """The searched settings of a trial, each in one piece."""
    return ", ".join(f"{name}{HELD}{format_value(value)}" for name, value in record.searched.items())


def print_prose(lines: Iterable[str]) -> None:
    """Print sentences without characters that control the terminal. A terminal gets them in lines that fit."""
    console = new_console(NO_WIDTH)
    for line in lines:
        print(wrap(plain(line), console.width))


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
    """How the study ended."""
    study, next_step = summary.study, list(summary.commands)[-1]
    lines = [summary.probe_sentence, summary.guide_sentence] if summary.winner else []
    lines += [summary.transfer_sentences]
    lines += [f"The test images were {study['test_note']}."] if study["test"] else []
    lines += [f"Ended by an error: {study['error']}."] if study["error"] else []
    lines += [f"Ended because {study['ended_by']}."] if study["ended_by"] else []
    lines += [f"Note: {note}" for note in study["notes"]]
    if summary.winner and next_step != EXTEND:  # the study is to go on, or runs
        confirmed = summary.confirmations.get(summary.winner.number)
        score = format_spread(confirmed) if confirmed else format_metric(summary.winner.value(summary.metric))
        lines.append(f"Best so far: trial {summary.winner.number}, validation {summary.metric} {score}")
    lines.append(
        f"Wall time {duration(study['seconds'].get('wall', 0))}, {study['share_training_and_evaluation']:.0%} of it "
        f"training and evaluation on {study['lanes']} lane{'' if study['lanes'] == 1 else 's'}."
    )
    if study["profile"]:
        lines.append(f"Profile: {', '.join(f'{name} {share:.1%}' for name, share in study['profile'].items())}.")
    if not summary.winner and next_step == EXTEND:
        reason = "No adapter can be used" if summary.ranked else "No trial completed"
        lines.append(f"{reason}, so there is no winner. The first error is above; all are in {all_trials(summary)}.")
    return list(filter(None, lines))


def places(summary: Summary) -> dict[str, str]:
    """Where the results are, the report first, and commands to type next, by what they are for."""
    report, running = summary.directory / "report.html", LOOK_AGAIN in summary.commands
    found = {} if running or not report.is_file() else {"Report": str(report)}
    found |= {"Adapter": summary.study["adapter"]} if summary.study["adapter"] else {}
    return found | {"Results": str(summary.directory / all_trials(summary))} | summary.commands


def all_trials(summary: Summary) -> str:
    """The name of the file with all trials."""
    return "study.json" if (summary.directory / "study.json").is_file() else "journal.jsonl"
