"""Takes the actions that the user asks for with `python -m tune.control`: checked, written to the journal, removed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train_fn.settings import SHOWN, broken_rules
from tune.config.settings import Settings, flag
from tune.config.space_check import check_space
from tune.plan.prepare import Study
from tune.records.control import Request, read_request, sentence, waiting_requests
from tune.records.end_state import DONE_STATES
from tune.records.journal import Event
from tune.records.trials import TrialRecord, trial_records


def problems_of(request: Request, records: Mapping[int, TrialRecord], settings: Settings, running: bool) -> list[str]:
    """Why an action cannot be taken: one sentence (rule, value, fix) for each reason.

    Args:
        running: whether the study runs now.
    """
    value, whole = request.value, isinstance(request.value, int) and not isinstance(request.value, bool)
    if request.action == "pause":
        return [] if running else ["`pause` needs a study that runs, but this one does not: there is nothing to pause"]
    if request.action == "add":
        return problems_of_point(value, settings)
    if request.action == "stop":
        left = sorted(number for number, record in records.items() if record.state not in DONE_STATES)
        names = f"choose one of {', '.join(map(str, left))}" if left else "no trial has begun and not ended"
        if not whole or value not in records:
            return [f"`stop` must name a trial that has begun, but got {SHOWN.repr(value)}: {names}"]
        if value not in left:
            state = records[value].state.lower()
            return [f"`stop` must name a trial that has not ended, but trial {value} is {state}: {names}"]
        return []
    ended = sum(record.state in DONE_STATES for record in records.values())
    if not whole or value < ended:
        why = f" of at least {ended}, since so many have ended" if ended else ""
        fix = "give another, or `pause` to end the study now"
        return [f"`trials` must be a whole number{why}, but got {SHOWN.repr(value)}: {fix}"]
    broken = broken_rules(dataclasses.replace(settings.study, trials=value), fix="give another")
    return [broken["trials"]] if "trials" in broken else []


def problems_of_point(point: Any, settings: Settings) -> list[str]:
    """Why a point cannot be tried: the checks of --first-points."""
    if not isinstance(point, dict):
        return [f"`add` must be a JSON object such as '{{\"lora_r\": 16}}', but got {SHOWN.repr(point)}: fix it"]
    if settings.study.sampler == "grid":
        return ["`add` needs a sampler that takes points, but `--sampler grid` has its own: begin a new study"]
    fixed = settings.pinned_values
    problems = [
        f"`add` must leave what the command line has fixed, {flag(name)} {fixed[name]}, but got {SHOWN.repr(value)}: "
        f"leave {name} out"
        for name, value in point.items()
        if name in fixed and value != fixed[name]
    ]
    named = dataclasses.replace(settings, first_points=(point,))
    return problems or [text.replace("`--first-points` point 0", "`add`") for text in check_space(named)]


def take_requests(
    study: Study, records: Mapping[int, TrialRecord], num_trials: int, running: bool = True
) -> Iterator[Event]:
    """Take the actions that wait, the oldest first: a "control" event for each, which the caller acts on before the
    next. A file is removed once that is done; one that an event names, as after a kill, is removed only.

    Args:
        num_trials: how many trials the study is to have.
        running: whether the search runs.
    """
    names = waiting_requests(study.directory)
    seen = {event["file"] for event in study.journal.events if event["event"] == "control"} if names else set()
    for name in names:
        if name not in seen:
            event = answer(study, name, records, num_trials, running)
            num_trials = event["trials"]
            yield event
        with contextlib.suppress(OSError):  # the folder may be another user's
            (study.directory / "control" / name).unlink()


def answer(study: Study, name: str, records: Mapping[int, TrialRecord], num_trials: int, running: bool) -> Event:
    """Write the "control" event of a request: its `action` and `value`, why it is `refused` or else what is `done`, and
    how many `trials` the study is to have now."""
    try:
        request = read_request(study.directory, name)
        refused = "; ".join(problems_of(request, records, study.settings, running))
    except (OSError, ValueError) as error:
        request, refused = Request("unknown"), str(error)
    done, value = "", request.value
    if refused:
        pass
    elif request.action == "stop":
        cost = "; it has the guide's defaults, with which the winner can then not be compared" if value == 0 else ""
        done = f"trial {value} ends as stopped{cost}"
    elif request.action == "add":
        num_trials += 1
        done = f"the point is tried next, as one of now {num_trials} trials"
    elif request.action == "trials":
        num_trials = max(value, len(records))
        begun = ", since so many have begun" if num_trials > value else ""
        done = f"the study ends after {num_trials} trials{begun}"
    else:
        done = "the trials that run write their state, and the study ends; --resume goes on with it"
    fields = {"action": request.action, "value": value, "refused": refused, "done": done, "trials": num_trials}
    return study.journal.write("control", file=name, **fields)


def act_before_session(study: Study, say: Callable[[str], None]) -> Study:
    """Take the actions that were asked for while the study did not run. Returns the study with its number of trials.
    Trials that are stopped and points that are added come from the journal, as after a kill."""
    num_trials = study.settings.study.trials
    for event in take_requests(study, trial_records(study.journal.events), num_trials, running=False):
        say(f"Control: {sentence(event)}")
        num_trials = event["trials"]
    if num_trials == study.settings.study.trials:
        return study
    study.plan["settings"]["study"]["trials"] = num_trials
    settings = dataclasses.replace(study.settings.study, trials=num_trials)
    return dataclasses.replace(study, settings=dataclasses.replace(study.settings, study=settings))
