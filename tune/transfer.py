"""`--model-small`: the search on a smaller base, then its best settings on the base itself, as two studies."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

from tune.config.cli import parse
from tune.config.paths import SettingsError, study_directory
from tune.config.settings import Settings, StudySettings
from tune.config.space import is_own
from tune.plan.prepare import Study, name_of, prepare, resume
from tune.search.prior import warm_start_event
from tune.show import show
from tune.study import discard

SUFFIX = "-small"  # of the name of the search


def settings_of_both(settings: Settings) -> tuple[Settings, Settings]:
    """The settings of the search on the small base, and those of the study on the base itself.

    The search has all trials and early stopping, and no confirmation. The other one trains the guide's settings and the
    best of the search, which reach it as its --warm-start, each to its end. The search keeps the ranges of the base
    itself (`Settings.base`), so that its points fit there; from the hub, each base has its own.
    """
    study = settings.study
    name = name_of(settings)
    plain = StudySettings()
    search = dataclasses.replace(
        study,
        name=name + SUFFIX,
        model_small=plain.model_small,
        transfer_trials=plain.transfer_trials,
        confirm=plain.confirm,
        folds=plain.folds,
        register=plain.register,
    )
    target = dataclasses.replace(
        study,
        name=name,
        trials=study.transfer_trials + 1,
        scheduler="none",
        first_points="",
        warm_start=str(Path(study.results).resolve() / (name + SUFFIX)),
    )
    small = dataclasses.replace(settings.model, model=study.model_small)
    return (
        dataclasses.replace(settings, study=search, model=small),
        dataclasses.replace(settings, study=target, first_points=()),
    )


def prepare_both(settings: Settings, say: Callable[[str], None]) -> Study:
    """The search on the small base, as a new study; the study on the base itself is its `then`. Raises SettingsError
    with the problems of both."""
    studies: list[Study] = []
    problems: list[str] = []
    for each, option in zip(settings_of_both(settings), ("`--model-small`", "`--model`"), strict=True):
        say(f"Preparing {each.study.name} on {each.model.model}")
        try:
            studies.append(prepare(each, say))
        except SettingsError as error:
            problems += [problem.replace("`--model`", option) for problem in error.problems]
    if not problems and studies[0].plan["base_hash"] == studies[1].plan["base_hash"]:
        problems = [
            f"`--model-small` must be another base than --model, but {settings.study.model_small} holds the same"
        ]
    if problems:
        for study in studies:
            discard(study)
            study.lease.release()
        raise SettingsError(list(dict.fromkeys(problems)))
    search, target = studies
    return dataclasses.replace(search, then=target)


def examine_both(settings: Settings, say: Callable[[str], None]) -> int:
    """`--doctor` for both studies. Returns the exit code."""
    from tune.doctor.examine import examine  # here: it loads torch and transformers

    codes = []
    for each in settings_of_both(settings):
        say(f"Examining {each.study.name} on {each.model.model}")
        codes.append(examine(each, say))
    return max(codes)


def resume_both(settings: Settings, say: Callable[[str], None]) -> Study:
    """The study of `--resume`. If it waits for a search on a small base that has not ended, that search, with the study
    as its `then`. Raises SettingsError as `resume`."""
    target = resume(settings, say)
    study = target.settings.study
    if not study.model_small or warm_start_event(target):
        return target
    directory = study_directory(study.warm_start, study.results)
    if directory is None:
        name = Path(study.warm_start).name
        problem = f"the search of a study with --model-small must be here, but {study.warm_start} is not"
        raise SettingsError([f"{problem}: put it there, or --resume {shlex.quote(name)} from its storage first"])
    if not show(directory).unfinished:
        return target
    own = ["--space", study.space] if is_own(study.space) else []  # was checked with the study's own plan
    return dataclasses.replace(resume(parse(["--resume", str(directory), *own]), say), then=target)
