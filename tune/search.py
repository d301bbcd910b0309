"""The search itself: Ray Tune around Optuna, each trial a `QueuedTrial`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from train_fn.metrics import MODES
from tune.lane import QueuedTrial
from tune.settings import load_space
from tune.study import Layout, Study, make_space


class DiskSearch(OptunaSearch):
    """OptunaSearch whose state is its study on disk, and that tells Optuna which trials were stopped early.

    OptunaSearch itself would tell them as complete with the value they had, and TPE would take that for the value at
    full length.
    """

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Tune moves the file that it asks for

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if error or not result or result.get("finished"):
            super().on_trial_complete(trial_id, result, error)
        else:
            assert self._ot_study is not None
            # Tune tells the result that it stopped a trial for here only, not by `on_trial_result`.
            self._ot_trials[trial_id].report(result[self.metric], result["epoch"])
            self._ot_study.tell(self._ot_trials[trial_id], state=optuna.trial.TrialState.PRUNED)
            self._completed_trials.add(trial_id)


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name, seeded."""
    samplers = optuna.samplers
    with warnings.catch_warnings():
        # multivariate, group and constant_liar are marked experimental; they have been stable for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        kinds = {
            "random": samplers.RandomSampler,
            "gp": samplers.GPSampler,
            "cmaes": samplers.CmaEsSampler,
            "qmc": samplers.QMCSampler,
        }
        return kinds[name](seed=seed)


def make_search(study: Study) -> DiskSearch:
    """Optuna behind Tune: the guide's defaults first, the study in optuna.db."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _, guide = load_space(study.settings.study.space)
    pinned = study.settings.pinned
    return DiskSearch(
        space=make_space(study),
        metric=study.metric,
        mode=MODES[study.metric],
        points_to_evaluate=[{name: value for name, value in guide.items() if name not in pinned}],
        sampler=make_sampler(study.settings.study.sampler, study.settings.study.study_seed),
        study_name=study.name,
        storage=optuna.storages.RDBStorage(f"sqlite:///{study.directory / 'optuna.db'}"),
    )


class SparingGuide:
    """Mixed into a scheduler: it hears of the guide's trial like of any other, but lets it run to its end, for its
    test score is what the winner's is compared with."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        return TrialScheduler.CONTINUE if trial.config["number"] == 0 else decision


class SparingASHA(SparingGuide, AsyncHyperBandScheduler):
    """ASHA that stops and never pauses, so that a lane is never held by a waiting trial."""


class SparingMedian(SparingGuide, MedianStoppingRule):
    """The median rule."""


def make_scheduler(name: str, grace_period: int) -> TrialScheduler | None:
    """Tune's scheduler of that name, with epochs as the measure of effort."""
    if name == "asha":
        # No upper end: a trial's own last epoch ends it, which the space may choose.
        return SparingASHA(time_attr="epoch", max_t=10**6, grace_period=grace_period, reduction_factor=3)
    if name == "median":
        return SparingMedian(time_attr="epoch", grace_period=grace_period, min_samples_required=3)
    return None


def search(study: Study, layout: Layout, dispatcher: Any, log: ray.tune.Callback) -> None:
    """Run all trials; `log` hears of each. A failed trial does not end the study."""
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(QueuedTrial, dispatcher=dispatcher, trials=str(study.directory / "trials")),
        {"node:__internal_head__": 0.001},  # it only waits: no CPU of a worker, no place on a GPU node
    )
    ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            metric=study.metric,
            mode=MODES[study.metric],
            num_samples=study.settings.study.trials,
            max_concurrent_trials=layout.lanes,
            reuse_actors=True,
            search_alg=make_search(study),
            scheduler=make_scheduler(study.settings.study.scheduler, study.settings.study.grace_period),
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}",
        ),
        run_config=ray.tune.RunConfig(
            storage_path=str(study.directory / "ray"),
            name="tune",
            verbose=1 if study.settings.study.verbose else 0,
            callbacks=[log],
        ),
    ).fit()
