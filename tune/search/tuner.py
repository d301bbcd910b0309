"""The search: Ray Tune over the trials that are left, each a `QueuedTrial`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray.tune

from tune.config.space import SpaceError
from tune.lanes.layout import Layout
from tune.plan.prepare import Study
from tune.records.end_state import DONE_STATES, EndState
from tune.search.callback import StudyLog
from tune.search.queued_trial import QueuedTrial
from tune.search.searcher import JournalSearcher

MAX_LOST = 20  # Tune's processes of one trial: they hand over and wait, so that no trial is to blame for their loss


def search(study: Study, layout: Layout, dispatcher: Any, log: StudyLog) -> None:
    """Run the trials that are left. `log` writes their events. A failed trial does not end the study."""
    settings = study.settings.study
    end_decided_trials(study, log)
    ended = sum(record.state in DONE_STATES for record in log.records.values())
    if ended >= log.num_trials or log.spent():
        return
    try:
        searcher = JournalSearcher(study, log)
    except SpaceError as error:
        log.space_error, log.ended_by = str(error), f"the space {settings.space} {error}"
        return
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(QueuedTrial, dispatcher=dispatcher, trials=str(study.directory / "trials")),
        {"node:__internal_head__": 0.001},  # it only waits: no CPU of a worker, no place on a GPU node
    )
    ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            num_samples=-1,  # the searcher ends the search, since the user may change the number of trials
            max_concurrent_trials=layout.lanes,
            reuse_actors=True,
            search_alg=searcher,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}",
        ),
        run_config=ray.tune.RunConfig(
            storage_path=f"{study.storage.uri or study.directory}/ray",
            name=f"tune-{len([e for e in study.journal.events if e['event'] == 'session'])}",
            verbose=1 if settings.verbose else 0,
            callbacks=[log],
            failure_config=ray.tune.FailureConfig(max_failures=MAX_LOST),
            stop=log,
            # A trial's own files hold all that it goes on from.
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    if log.failure:
        raise log.failure
    if searcher.exhausted:
        log.ended_by = log.ended_by or exhausted(settings.sampler, study.settings.pinned)
    if log.space_error:
        log.ended_by = log.ended_by or f"the space {settings.space} {log.space_error}"


def exhausted(sampler: str, pinned: Sequence[str]) -> str:
    """Why a search without a point left has ended."""
    if sampler == "grid":
        return "every point of the grid has been tried"
    return f"every point of the space has been tried{', and --seed allows no other seed' * ('seed' in pinned)}"


def end_decided_trials(study: Study, log: StudyLog) -> None:
    """After a kill, end the trials whose last report was their own last or would have stopped them, and those that the
    user has stopped."""
    for record in list(log.records.values()):
        if record.state in DONE_STATES:
            continue
        if record.finished:
            log.end(record.number, EndState.COMPLETE)
        elif reason := log.stop_reason(record.number):
            log.end(record.number, EndState.STOPPED, note=reason)
    log.end_stopped()
