"""The search itself: Ray Tune around Optuna, each trial a `QueuedTrial`; and how a search goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import ray.tune
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from train_fn.support.files import sync_folder
from tune.config.paths import study_directory
from tune.config.samplers import GridSampler, make_sampler
from tune.config.space import SpaceError, first_points, load_space, searched_settings
from tune.config.space_check import TIMEOUT_S
from tune.lanes.layout import Layout
from tune.plan.prepare import Study
from tune.records.journal import Event, read_events
from tune.records.trials import PRIOR, TrialRecord
from tune.records.trials import trial_records as fold
from tune.search.callback import StudyLog
from tune.search.queued_trial import QueuedTrial

ENDS = {"COMPLETE": TrialState.COMPLETE, "STOPPED": TrialState.PRUNED, "FAILED": TrialState.FAIL}
MAX_LOST = 20  # Tune's processes of one trial: they hand over and wait, so that no trial is to blame for their loss


class DiskSearch(OptunaSearch):
    """OptunaSearch whose state is its study on disk, that tells Optuna which trials were stopped early, and that hands
    out the unfinished trials of a killed session first.

    OptunaSearch itself would tell stopped trials as complete with the value they had, and TPE would take that for the
    value at full length.
    """

    def __init__(self, log: StudyLog, **options: Any) -> None:
        super().__init__(**options)
        self._log = log
        self._numbers: dict[str, int] = {}  # by Tune's trial id
        self.unfinished: list[optuna.Trial] = []
        self.num_prior = 0
        """Trials in Optuna's study that another study has run."""

    @property
    def optuna_study(self) -> optuna.Study:
        """The study on disk."""
        assert self._ot_study is not None
        return self._ot_study

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it for a restore that nobody here asks for

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Tune moves the file that it asks for

    def suggest(self, trial_id: str) -> dict | str | None:  # type: ignore[override]
        if self.unfinished:
            # Optuna gives a running trial the values that it already has, and samples those that are missing.
            self._ot_trials[trial_id] = self.unfinished.pop(0)
        elif isinstance(self._sampler, GridSampler) and self._sampler.exhausted:
            return Searcher.FINISHED
        try:
            config = super().suggest(trial_id)
        except (
            SpaceError
        ) as error:  # the trials that run may end; Optuna's open trial is the next one of a resumed study
            self._log.space_error = self._log.space_error or str(error)
            return Searcher.FINISHED
        assert config is not None
        number = self._numbers[trial_id] = config["number"]
        known = self._log.records.get(number)
        return {**config, "known_epochs": len(known.epochs) if known else 0}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        if not isinstance(self.metric, list) and "error" not in result:
            self._ot_trials[trial_id].report(result[self.metric], result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if error:
            self._log.check_lanes()  # raises when the dispatcher is gone: then it is not the trial that failed
            if self._numbers[trial_id] not in self._log.records:
                return  # it never began: left open for a session that goes on
        if result and "study_error" in result:
            return  # left open for a session that goes on
        if not result or "error" in result:
            super().on_trial_complete(trial_id, None, error=True)
        elif result.get("finished"):
            super().on_trial_complete(trial_id, result)
        else:
            # Tune tells the result that it stopped a trial for here only, not by `on_trial_result`.
            if not isinstance(self.metric, list):
                self._ot_trials[trial_id].report(result[self.metric], result["epoch"])
            self.optuna_study.tell(self._ot_trials[trial_id], state=TrialState.PRUNED)
            self._completed_trials.add(trial_id)


def open_search(study: Study, log: StudyLog) -> DiskSearch:
    """Optuna behind Tune, in optuna.db: a new study with its first points, or one that goes on.

    A database that cannot be read, or that contradicts the journal, is set aside and made again from the journal. One
    that another process has locked is waited for. Raises OptunaError (StorageInternalError) when it stays locked.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = study.settings.study
    space, _ = load_space(settings.space)
    path = study.directory / "optuna.db"
    if path.exists() and (fault := fault_of_database(path, study.name, log.records)):
        aside = path.with_name(f"optuna.damaged-{time.strftime('%Y%m%d-%H%M%S')}.db")
        path.rename(aside)
        log.say(f"optuna.db {fault}: it was set aside as {aside.name} and is made again from the journal")
    begun = path.exists()
    if not begun:
        # Aside, then renamed: a kill in between must not leave a search with some of its first points.
        partial = path.with_name("optuna.partial.db")
        partial.unlink(missing_ok=True)
        fill_database(partial, study, space, log)
        partial.replace(path)
        sync_folder(path.parent)
    storage = open_database(path)
    past = len(optuna.load_study(study_name=study.name, storage=storage).trials) if begun else len(log.records)
    names, modes = (list(part) for part in zip(*study.goals, strict=True))
    several = len(names) > 1

    def point(trial: Any) -> dict[str, Any]:
        number = trial.number - searcher.num_prior
        with time_limit(TIMEOUT_S):
            chosen, decided = searched_settings(study.settings, space, trial, number)
        return {"number": number, "settings": chosen, "chosen": decided}

    searcher = DiskSearch(
        log,
        space=point,
        metric=names if several else names[0],
        mode=modes if several else modes[0],
        # A sampler that began again with the same seed would draw the same points again.
        sampler=make_sampler(settings.sampler, settings.study_seed + past),
        study_name=study.name,
        storage=storage,
    )
    searcher.num_prior = sum(PRIOR in trial.user_attrs for trial in searcher.optuna_study.trials)
    agree(searcher, log)
    ended = [trial for trial in searcher.optuna_study.trials if trial.state.is_finished()]
    if isinstance(searcher._sampler, GridSampler) and ended:
        searcher._sampler.after_trial(searcher.optuna_study, ended[-1], ended[-1].state, ended[-1].values)
    return searcher


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End a space that does not return. Raises SpaceError. Python runs signal handlers in the main thread only, which
    is where Ray Tune asks its searcher."""

    def stop(*_: Any) -> None:
        raise SpaceError(f"must answer within {seconds:g} s, but does not: look for a loop without an end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


LOCK_TIMEOUT_S = 120  # how long SQLite waits for another process that has locked optuna.db


def open_database(path: Path) -> optuna.storages.RDBStorage:
    """Optuna's storage in an SQLite file."""
    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    url = url.replace("{", "{{").replace("}", "}}")  # Optuna formats it
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}})


def fault_of_database(path: Path, name: str, records: Mapping[int, TrialRecord]) -> str:
    """Why a study cannot go on with its optuna.db, as the end of a sentence; empty when it can.

    Raises OptunaError when another process keeps it locked.
    """
    try:
        storage = open_database(path)
        try:
            trials = optuna.load_study(study_name=name, storage=storage).trials
        finally:
            storage.engine.dispose()
    except Exception as error:  # a damaged file gives errors of SQLite, SQLAlchemy, json and Optuna
        if "database is locked" in str(error):
            raise
        return f"cannot be read ({str(error).strip().splitlines()[0]:.80})"
    trials = [trial for trial in trials if PRIOR not in trial.user_attrs]
    if len(trials) <= max(records, default=-1):
        return "lacks trials of the journal"
    for number, trial in enumerate(trials):
        record = records.get(number)
        if record is None:
            # A trial is in the database first. What the journal lacks of it is no more than its begin.
            if trial.state.is_finished():
                return f"has a result of trial {number}, of which the journal knows nothing"
            continue
        if trial.params and json.loads(json.dumps(trial.params)) != record.searched:
            return f"has other values for trial {number} than the journal"
        if trial.state == TrialState.WAITING or (
            record.state in ENDS and trial.state.is_finished() and (trial.state != ENDS[record.state])
        ):
            return f"has another state of trial {number} than the journal"
    return ""


def fill_database(path: Path, study: Study, space: Any, log: StudyLog) -> None:
    """Make an optuna.db: the trials of another study (--warm-start), those of the journal, and the first points that
    have not run."""
    storage = open_database(path)
    kinds = optuna.study.StudyDirection
    directions = [kinds.MINIMIZE if mode == "min" else kinds.MAXIMIZE for _, mode in study.goals]
    optuna_study = optuna.create_study(study_name=study.name, storage=storage, directions=directions)
    settings = study.settings.study
    if settings.warm_start:
        log.say(warm_start(study, optuna_study))
    first = first_points(study.settings)
    for number in range(max(max(log.records, default=-1) + 1, len(first))):
        record = log.records.get(number)
        if record is None and number < len(first):  # so that trial 0 is the guide's, whatever the journal has lost
            values = {name: value for name, value in first[number].items() if name not in study.settings.pinned}
            optuna_study.enqueue_trial(values)
        else:
            optuna_study.add_trial(trial_of_record(study, space, record, number))
    storage.engine.dispose()


def trial_of_record(study: Study, space: Any, record: TrialRecord | None, number: int) -> FrozenTrial:
    """A trial of the journal as Optuna keeps it. One without a record is running, and gets its values when asked."""
    fixed = optuna.trial.FixedTrial(record.searched if record else {})
    if record:
        searched_settings(study.settings, space, fixed, number)
    state = ENDS.get(record.state, TrialState.RUNNING) if record else TrialState.RUNNING
    complete = record is not None and state == TrialState.COMPLETE
    epochs = enumerate(record.epochs, 1) if record and len(study.goals) == 1 else ()
    return optuna.trial.create_trial(
        state=state,
        params=fixed.params,
        distributions=fixed.distributions,
        values=[record.value(name) for name, _ in study.goals] if record and complete else None,
        intermediate_values={epoch: metrics[study.metric] for epoch, metrics in epochs if study.metric in metrics},
    )


def warm_start(study: Study, optuna_study: optuna.Study) -> str:
    """Tell Optuna the completed trials of another study that fit this one's space, with their value of this study's
    goals. Returns a sentence on how many they were."""
    other = study_directory(study.settings.study.warm_start, study.settings.study.results)
    if other is None:  # a study that goes on where its files are not
        return f"Warm start: {study.settings.study.warm_start} is not on this machine; the search goes on without it"
    space, _ = load_space(study.settings.study.space)
    records = fold(read_events(other / "journal.jsonl"))
    complete = [record for record in records.values() if record.state == "COMPLETE"]
    taken = 0
    for record in complete:
        values = [record.value(name) for name, _ in study.goals]
        asked = ask_with(study, space, record.searched)
        if asked is None or not all(map(math.isfinite, values)):
            continue
        optuna_study.add_trial(
            optuna.trial.create_trial(
                params=asked.params, distributions=asked.distributions, values=values, user_attrs={PRIOR: other.name}
            )
        )
        taken += 1
    return f"Warm start: {taken} of the {len(complete)} completed trials of {other.name} fit the space"


def ask_with(study: Study, space: Any, searched: dict[str, Any]) -> optuna.trial.FixedTrial | None:
    """This study's space, asked with another study's values; None when it asks for other names or other ranges."""
    fixed = optuna.trial.FixedTrial(searched)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a value outside its range only warns
            searched_settings(study.settings, space, fixed)
    except (ValueError, UserWarning):
        return None
    return fixed if fixed.params.keys() == searched.keys() else None


def agree(search: DiskSearch, log: StudyLog) -> None:
    """After a kill, let Optuna and the journal tell the same of every trial, and note which are unfinished."""
    study, records = search.optuna_study, log.records
    ends = {theirs: ours for ours, theirs in ENDS.items()}
    for trial in study.trials[search.num_prior :]:
        record = records.get(trial.number - search.num_prior)
        unended = record is not None and record.state not in ENDS
        if trial.state in ends and record is not None and unended:
            lost = "the study was killed before the error was written down" if trial.state == TrialState.FAIL else ""
            log.end(record.number, ends[trial.state], lost)
        elif trial.state == TrialState.RUNNING and record is not None and unended and record.finished:
            log.end(record.number, "COMPLETE")
        if trial.state == TrialState.RUNNING:
            live = optuna.Trial(study, trial._trial_id)
            if record is None or record.state not in ENDS:
                search.unfinished.append(live)
            else:
                tell(search, live, record)


def tell(search: DiskSearch, trial: optuna.Trial, record: TrialRecord) -> None:
    """Tell Optuna a trial's end from its record."""
    names = search.metric if isinstance(search.metric, list) else [search.metric]
    if record.state == "COMPLETE":
        search.optuna_study.tell(trial, [record.value(name) for name in names])
    else:
        search.optuna_study.tell(trial, state=ENDS[record.state])


# ------------------------------------------------------------------------------------------------ early stopping


class Known(NamedTuple):
    """A trial as a scheduler knows it: by its number, under which a later session finds it again."""

    trial_id: str


class SparingGuide:
    """Mixed into a scheduler: it hears of the guide's trial like of any other, but lets it run to its end, for its
    test score is what the winner's is compared with."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, Known(str(trial.config["number"])))  # type: ignore[misc]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        return self.decide(trial.config["number"], result, tune_controller)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        if "error" not in result:
            super().on_trial_complete(tune_controller, Known(str(trial.config["number"])), result)  # type: ignore[misc]

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, Known(str(trial.config["number"])))  # type: ignore[misc]

    def decide(self, number: int, result: dict, tune_controller: Any = None) -> str:
        """What becomes of a trial after a result."""
        decision = super().on_trial_result(tune_controller, Known(str(number)), result)  # type: ignore[misc]
        return TrialScheduler.CONTINUE if number == 0 else decision

    def replay(self, events: Sequence[Event]) -> set[int]:
        """Hear again what a journal tells; the trials that the last result of each would stop."""
        stopped: set[int] = set()
        known: set[int] = set()
        for event in events:
            number = event.get("number", -1)
            if event["event"] == "started" and number not in known:
                known.add(number)
                super().on_trial_add(None, Known(str(number)))  # type: ignore[misc]
            elif event["event"] == "report":
                decision = self.decide(number, {**event["metrics"], "epoch": event["epoch"]})
                (stopped.discard if decision == TrialScheduler.CONTINUE else stopped.add)(number)
        return stopped


class SparingASHA(SparingGuide, AsyncHyperBandScheduler):
    """ASHA that stops and never pauses, so that a lane is never held by a waiting trial."""


class SparingMedian(SparingGuide, MedianStoppingRule):
    """The median rule, without its pauses."""

    def decide(self, number: int, result: dict, tune_controller: Any = None) -> str:
        self._stopped_trials.clear()  # it refuses to hear again of one that it has stopped, but the guide's goes on
        return super().decide(number, result, tune_controller)

    def _on_insufficient_samples(self, *told: Any) -> str:
        return TrialScheduler.CONTINUE


def make_scheduler(study: Study) -> SparingASHA | SparingMedian | None:
    """The study's scheduler, with epochs as the measure of effort; none with several goals, for which no trial can be
    called hopeless by one of them."""
    name, grace_period = study.settings.study.scheduler, study.settings.study.grace_period
    metric, mode = study.goals[0]
    goal: dict[str, Any] = {"time_attr": "epoch", "metric": metric, "mode": mode, "grace_period": grace_period}
    if len(study.goals) > 1 or name == "none":
        return None
    if name == "asha":
        # No upper end: a trial's own last epoch ends it, which the space may choose.
        return SparingASHA(max_t=10**6, reduction_factor=3, **goal)
    return SparingMedian(min_samples_required=3, **goal)


def search(study: Study, layout: Layout, dispatcher: Any, log: StudyLog) -> None:
    """Run the trials that are left; `log` hears of each. A failed trial does not end the study."""
    try:
        searcher = open_search(study, log)
    except SpaceError as error:  # it is asked again for the trials of the journal
        log.space_error, log.ended_by = str(error), f"the space {study.settings.study.space} {error}"
        return
    scheduler = make_scheduler(study)
    if scheduler is not None:
        doomed = scheduler.replay(study.journal.events)
        for trial in list(searcher.unfinished):  # the kill came before the verdict
            number = trial.number - searcher.num_prior
            if number in doomed:
                searcher.unfinished.remove(trial)
                log.end(number, "STOPPED")
                tell(searcher, trial, log.records[number])
    left = study.settings.study.trials - sum(r.state in ENDS for r in log.records.values())
    if left <= 0 or log.spent():
        return
    # Asking Optuna may take more than a second on a busy machine; there is nothing to be done about it.
    warnings.filterwarnings("ignore", "Define-by-run function passed")
    # After the journal has lost an epoch, that one is reported to Optuna once more, with the same value.
    warnings.filterwarnings("ignore", "The reported value is ignored")
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(QueuedTrial, dispatcher=dispatcher, trials=str(study.directory / "trials")),
        {"node:__internal_head__": 0.001},  # it only waits: no CPU of a worker, no place on a GPU node
    )
    ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            num_samples=left,
            max_concurrent_trials=layout.lanes,
            reuse_actors=True,
            search_alg=searcher,
            scheduler=scheduler,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}",
        ),
        run_config=ray.tune.RunConfig(
            storage_path=f"{study.storage.uri or study.directory}/ray",
            name=f"tune-{len([e for e in study.journal.events if e['event'] == 'session'])}",
            verbose=1 if study.settings.study.verbose else 0,
            callbacks=[log],
            failure_config=ray.tune.FailureConfig(max_failures=MAX_LOST),
            stop=log,
            # A trial's own files tell all that there is to go on from.
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    if isinstance(searcher._sampler, GridSampler) and searcher._sampler.exhausted:
        log.ended_by = log.ended_by or "every point of the grid has been tried"
    if log.space_error:
        log.ended_by = log.ended_by or f"the space {study.settings.study.space} {log.space_error}"
