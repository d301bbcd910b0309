"""`--warm-start`: what a search takes over from another study.

The first session reads the other study and writes what it takes to the journal, as one event "warm_start". Later
sessions read the event, so that a change of the other study has no effect.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from train_fn.support.files import DamagedFile
from tune.config.paths import study_directory
from tune.config.settings import flag
from tune.config.space import first_points
from tune.plan.prepare import Study
from tune.records.end_state import EndState
from tune.records.journal import Event, read_events
from tune.records.optuna_study import ONLY_RANKING, distributions_json, read_distributions
from tune.records.plan import read_plan
from tune.records.ranking import ranked
from tune.records.trials import TrialRecord, trial_records
from tune.search.points import as_json, ask_with
from tune.search.tried import NOT_TRAINED_BY

NUM_FIRST = 5  # points of another base that are tried first: each costs a trial
NEAR = 0.2
"""Share of a range. Points that differ by no more in any value train much alike: neighbouring ranks of `lora`, and
learning rates up to a factor of 2.2."""
WITHOUT_EFFECT = (*NOT_TRAINED_BY, "model", "per_device_eval_batch_size", "feature_cache_gib")
"""Settings that change no score; a base is compared by its files."""


def prior_trials(study: Study, say: Callable[[str], None]) -> list[FrozenTrial]:
    """The trials of `--warm-start`, for the sampler. Writes the event "warm_start" in a study's first session."""
    if not study.settings.study.warm_start:
        return []
    event = warm_start_event(study)
    if event is None:
        event = study.journal.write("warm_start", **warm_start(study, say))
    return [
        optuna.trial.create_trial(
            params=trial["params"],
            distributions=read_distributions(trial["distributions"]),
            values=trial["values"],
            user_attrs={ONLY_RANKING: True} if event.get("only_ranking") else {},
        )
        for trial in event["trials"]
    ]


def with_prior_points(study: Study) -> Study:
    """The study, with the points that `prior_trials` has chosen to be tried first after those of `--first-points`."""
    event = warm_start_event(study) if study.settings.study.warm_start else None
    if event is None or not event.get("first_points"):
        return study
    points = (*study.settings.first_points, *event["first_points"])
    return dataclasses.replace(study, settings=dataclasses.replace(study.settings, first_points=points))


def warm_start_event(study: Study) -> Event | None:
    """The event of the study's first session."""
    return next((event for event in study.journal.events if event["event"] == "warm_start"), None)


def warm_start(study: Study, say: Callable[[str], None]) -> dict[str, Any]:
    """What another study gives, as the fields of the event "warm_start".

    Returns:
        `trials`: its completed trials that fit this study's space, each with `params`, `distributions` and the `values`
        of this study's goals. If its scores cannot be compared with this study's, `only_ranking` is True, and
        `first_points` has its best points. Beside them, for the results: its name (`study`), its base (`model`), all of
        its `device_seconds` and `num_epochs`, and whether it was the search of `--model-small`.
    """
    settings = study.settings.study
    other = study_directory(settings.warm_start, settings.results)
    try:
        if other is None:
            raise FileNotFoundError(f"{settings.warm_start} is not on this machine")
        plan = read_plan(other)
        records = list(trial_records(read_events(other / "journal.jsonl")).values())
    except (OSError, DamagedFile) as error:  # a study that goes on where the other one's files are not
        say(f"Warm start: {error}; the search goes on without it")
        return {"trials": []}
    complete = [record for record in records if record.state == EndState.COMPLETE]
    fitting: dict[int, optuna.trial.FixedTrial] = {}
    for record in complete:
        asked = ask_with(study, record.searched)
        if asked is not None and all(math.isfinite(record.value(goal)) for goal, _ in study.goals):
            fitting[record.number] = asked
    say(f"Warm start: {len(fitting)} of the {len(complete)} completed trials of {other.name} fit the space")
    trials = [
        {
            "params": fitting[record.number].params,
            "distributions": distributions_json(fitting[record.number].distributions),
            "values": [record.value(goal) for goal, _ in study.goals],
        }
        for record in complete
        if record.number in fitting
    ]
    differing = differences(study, plan)
    points = best_points(study, [fitting[r.number] for r in best_first(study, complete) if r.number in fitting])
    if differing:
        say(
            f"Warm start: its scores cannot be compared with this study's ({', '.join(differing)}), so only their "
            f"order counts; its best {len(points)} points come first, with the settings that they had"
        )
        if problem := other_family(study, plan):
            say(f"Warm start: {problem}")
    return {
        "trials": trials,
        "only_ranking": bool(differing),
        "first_points": points if differing else [],
        "study": other.name,
        "model": plan["settings"]["model"].get("model", ""),
        "device_seconds": sum(record.device_seconds for record in records),
        "num_epochs": sum(len(record.epochs) for record in records),
        "model_small": bool(settings.model_small),
    }


def differences(study: Study, plan: Mapping[str, Any]) -> list[str]:
    """Why another study's scores cannot be compared with this one's; empty if they can: the same point would have the
    same score.

    Args:
        plan: the other study's.
    """
    ours, theirs = as_json(study.plan["settings"]), plan["settings"]
    found = [f"other {what}" for what in ("base", "data") if plan[f"{what}_hash"] != study.plan[f"{what}_hash"]]
    names = [
        name
        for part in ("trial", "model")
        for name, value in ours[part].items()
        if name not in WITHOUT_EFFECT and theirs[part].get(name, value) != value  # an older version's plan lacks some
    ]
    return [*found, *(f"other {flag(name)}" for name in names)]


def other_family(study: Study, plan: Mapping[str, Any]) -> str:
    """That the evidence for rankings that carry over is for bases of one family, if these two are of two; else ""."""
    ours, theirs = study.plan.get("family", ""), plan.get("family", "")
    if ours and ours == theirs:
        return ""
    return (
        f"rankings are known to carry over within a family of bases, but the other base's is {theirs or 'unknown'} and "
        f"this one's {ours or 'unknown'}; this study's own scores outweigh the other's as they come in"
    )


def best_first(study: Study, complete: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Another study's completed trials by this study's goals and rules, best first."""
    return ranked(complete, study.goals, study.settings.study.require)


def best_points(study: Study, ordered: Sequence[optuna.trial.FixedTrial]) -> list[dict[str, Any]]:
    """The points that this study tries first: the best ones of another study, none near one that is tried before it.

    `--model-small` asks for a fixed number, so the best of the near ones fill it up.

    Args:
        ordered: the other study's, best first.
    """
    settings = study.settings.study
    first = first_points(study.settings)

    def taken(trial: optuna.trial.FixedTrial) -> list[dict[str, Any]]:
        """The points that come first anyway, in the names that this trial's point has."""
        return [{name: point[name] for name in trial.params if name in point} for point in first]

    ordered = [trial for trial in ordered if trial.params not in taken(trial)]
    count = settings.transfer_trials if settings.model_small else NUM_FIRST
    chosen: list[dict[str, Any]] = []
    for trial in ordered:
        if len(chosen) < count and not any(near(trial, point) for point in (*taken(trial), *chosen)):
            chosen.append(trial.params)
    if settings.model_small:
        chosen += [trial.params for trial in ordered if trial.params not in chosen][: count - len(chosen)]
    return chosen


def near(trial: optuna.trial.FixedTrial, point: Mapping[str, Any]) -> bool:
    """Whether a trial's point and another one differ in no value by more than `NEAR` of its range."""
    return trial.params.keys() == point.keys() and all(
        abs(position(range_, trial.params[name]) - position(range_, point[name])) <= NEAR
        for name, range_ in trial.distributions.items()
    )


def position(range_: BaseDistribution, value: Any) -> float:
    """Where a value lies in its range, 0 to 1. Choices that are no numbers in rising order are 1 and more apart."""
    if isinstance(range_, CategoricalDistribution):
        choices = list(range_.choices)
        numbers = all(isinstance(choice, int | float) for choice in choices)
        step = len(choices) - 1 if numbers and choices == sorted(choices) else 1  # type: ignore[type-var]
        return choices.index(value) / max(1, step)
    low, high = range_.low, range_.high  # type: ignore[attr-defined]
    if range_.log:  # type: ignore[attr-defined]
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / ((high - low) or 1)
