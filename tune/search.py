"""The search itself: Ray Tune around Optuna, each trial a `QueuedTrial`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from optuna.samplers import TPESampler
from ray.tune.search.optuna import OptunaSearch

from train_fn.metrics import MODES
from tune.lane import QueuedTrial
from tune.settings import load_space
from tune.study import Layout, Study, make_space


class DiskSearch(OptunaSearch):
    """OptunaSearch whose state is its study on disk: no pickle of it beside that."""

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Tune moves the file that it asks for


def make_search(study: Study) -> DiskSearch:
    """Optuna behind Tune: seeded TPE, the guide's defaults first, the study in optuna.db."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        # multivariate, group and constant_liar are marked experimental; they have been stable for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = TPESampler(seed=study.settings.study.study_seed, multivariate=True, group=True, constant_liar=True)
    _, guide = load_space(study.settings.study.space)
    pinned = study.settings.pinned
    return DiskSearch(
        space=make_space(study),
        metric=study.metric,
        mode=MODES[study.metric],
        points_to_evaluate=[{name: value for name, value in guide.items() if name not in pinned}],
        sampler=sampler,
        study_name=study.name,
        storage=optuna.storages.RDBStorage(f"sqlite:///{study.directory / 'optuna.db'}"),
    )


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
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}",
        ),
        run_config=ray.tune.RunConfig(
            storage_path=str(study.directory / "ray"),
            name="tune",
            verbose=1 if study.settings.study.verbose else 0,
            callbacks=[log],
        ),
    ).fit()
