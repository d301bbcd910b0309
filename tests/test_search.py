"""Samplers and schedulers, as the search uses them, without Ray's processes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from ray.tune.schedulers import TrialScheduler

from search_spaces import lora
from tune.config.cli import parse
from tune.config.samplers import GridSampler, make_sampler
from tune.config.settings import SAMPLERS
from tune.config.space import searched_settings
from tune.search.tuner import make_scheduler, warm_start


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_goes_on_from_the_guide(name: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings, scores = parse(["--sampler", name]), random.Random(0)
    study = optuna.create_study(direction="maximize", sampler=make_sampler(name, 0))
    study.enqueue_trial(lora.GUIDE)
    seen = []
    for number in range(14):
        trial = study.ask()
        chosen, names = searched_settings(settings, lora.space, trial, number)
        seen.append(tuple(str(chosen[name]) for name in names))
        study.tell(trial, scores.random())
    assert {key: chosen for key, chosen in study.trials[0].params.items()} == lora.GUIDE
    assert len(set(seen)) > 7
    assert name != "grid" or len(set(seen)) == 14


def test_a_grid_is_known_to_be_through_by_a_later_session() -> None:
    pinned = ["--lora-r", "8", "--learning-rate", "1e-3", "--sampler", "grid"]
    settings = parse(pinned)
    study = optuna.create_study(sampler=make_sampler("grid", 0))
    later = GridSampler(seed=1)
    while True:
        trial = study.ask()
        searched_settings(settings, lora.space, trial, trial.number)
        assert not later.exhausted and len(study.trials) < 50
        study.tell(trial, 0.0)
        last = study.trials[-1]
        later.after_trial(study, last, last.state, last.values)
        if study.sampler.exhausted:  # type: ignore[attr-defined]
            break
    assert later.exhausted


def median_rule() -> Any:
    settings = SimpleNamespace(study=SimpleNamespace(scheduler="median", grace_period=1))
    scheduler: Any = make_scheduler(SimpleNamespace(goals=(("auroc", "max"),), settings=settings))  # type: ignore[arg-type]
    return scheduler


def test_the_median_rule_spares_the_guide_and_never_pauses() -> None:
    rule = median_rule()
    for epoch in (1, 2, 3):
        for number, auroc in enumerate([0.1, 0.8, 0.9, 0.85]):
            assert rule.decide(number, {"epoch": epoch, "auroc": auroc}) == TrialScheduler.CONTINUE
    assert rule.decide(4, {"epoch": 1, "auroc": 0.2}) == TrialScheduler.STOP
    assert rule.decide(0, {"epoch": 4, "auroc": 0.1}) == TrialScheduler.CONTINUE


def test_the_median_rule_hears_a_journal_again() -> None:
    events: list[Any] = []
    for number, auroc in enumerate([0.7, 0.8, 0.9, 0.85, 0.2]):
        events.append({"event": "started", "number": number})
        events += [{"event": "report", "number": number, "epoch": e, "metrics": {"auroc": auroc}} for e in (1, 2)]
    assert median_rule().replay(events) == {4}


def test_a_warm_start_whose_study_is_elsewhere_is_said(tmp_path: Any) -> None:
    """A study that goes on from object storage has its own trials only."""
    study: Any = SimpleNamespace(settings=parse(["--results", str(tmp_path)]))
    object.__setattr__(study.settings.study, "warm_start", "/nowhere/other")
    optuna_study = optuna.create_study()
    assert "/nowhere/other is not on this machine" in warm_start(study, optuna_study) and not optuna_study.trials
