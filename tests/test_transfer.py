"""`--warm-start` and `--model-small`: what a search takes over from another study, of this base or of another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from studies import LAYOUT, SMALL, finish, start, wait_for, write_plan

from search_spaces import lora
from train_fn.nano import CHECKPOINT
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.plan.checks import check_warm_start, family_of
from tune.plan.prepare import Study
from tune.records.journal import Journal
from tune.records.optuna_study import ONLY_RANKING, as_optuna, distributions_json
from tune.records.trials import TrialRecord, trial_records
from tune.results.summary import Summary
from tune.results.transferred import transfer_facts, transfer_sentences
from tune.search.points import propose
from tune.search.prior import NEAR, near, position, prior_trials, warm_start, with_prior_points
from tune.search.searcher import JournalSearcher
from tune.transfer import prepare_both, resume_both, settings_of_both

GOALS = (("auroc", "max"),)
GUIDE = {name: value for name, value in lora.GUIDE.items() if name != "lora_alpha_ratio"}  # which is not asked


def make_study(folder: Path, *argv: str, name: str = "s", base: str = "large", family: str = "f") -> Study:
    """A study without data. Its folder has an empty journal."""
    settings = parse(["--results", str(folder), *argv])
    (folder / name).mkdir(exist_ok=True)
    plan = {"settings": settings.to_dict(), "base_hash": base, "data_hash": "d", "family": family}
    nothing: Any = None
    return Study(settings, name, folder / name, GOALS, nothing, nothing, plan, nothing,
                 Journal(folder / name / "journal.jsonl"), nothing, nothing)  # fmt: skip


def finished_study(folder: Path, *argv: str, base: str = "small", trials: int = 12, family: str = "f") -> list[dict]:
    """The study "other" of completed random points, scored by their distance from a rate of 1e-3. Returns the points,
    best first."""
    study = make_study(folder, "--sampler", "random", *argv, name="other", base=base)
    plan = {"base_hash": base, "data_hash": "d", "family": family, "settings": study.plan["settings"]}
    write_plan(study.directory, {}, **plan)
    records: dict[int, TrialRecord] = {}
    for number in range(trials):
        point = propose(study, records, number)
        assert point is not None
        add_trial(study.journal, number, point, auroc=1 / (1 + abs(point.settings.learning_rate - 1e-3)))
    records = trial_records(study.journal.events)
    return [r.searched for r in sorted(records.values(), key=lambda r: -r.metrics["auroc"])]


def add_trial(journal: Journal, number: int, point: Any, auroc: float, state: str = "COMPLETE") -> None:
    """A trial's events, of one epoch and two device-seconds."""
    journal.write("started", number=number, params={}, searched=point.searched, distributions=point.distributions,
                  settings=dataclasses.asdict(point.settings))  # fmt: skip
    if state == "RUNNING":
        return
    journal.write("report", number=number, epoch=1, step=1, metrics={"auroc": auroc, "loss": 1 - auroc}, seconds={},
                  wall_s=2.0, waited_s=0.0, device_s=2.0, finished=state == "COMPLETE")  # fmt: skip
    journal.write("ended", number=number, state=state, error="", step=1, device_s=2.0)


class Log:
    """Stands for `StudyLog`."""

    def __init__(self, study: Study) -> None:
        self.records, self.space_error = trial_records(study.journal.events), ""
        self.said: list[str] = []
        self.num_trials = 100

    def end_stopped(self, handed_out: Any) -> None:
        pass  # the user has stopped none

    def say(self, text: str) -> None:
        self.said.append(text)


def search(study: Study, num_trials: int) -> list[dict[str, Any]]:
    """The points of a study's trials up to a number, tried one after the other; what has ended is not repeated."""
    log = Log(study)
    searcher = JournalSearcher(study, log)  # type: ignore[arg-type]
    for _ in range(num_trials - len(log.records)):
        asked = searcher.suggest("")
        point, number = asked["point"], asked["number"]  # type: ignore[index]
        add_trial(study.journal, number, point, 1 / (1 + abs(point.settings.learning_rate - 2e-3)))
        log.records.update(trial_records(study.journal.events))
    return [record.searched for record in log.records.values()]


# ------------------------------------------------------------------------------------------------ the same base


def test_of_the_same_base_the_scores_count_and_nothing_is_tried_again(tmp_path: Path) -> None:
    points = finished_study(tmp_path, base="large")
    study = make_study(tmp_path, "--warm-start", "other")
    said: list[str] = []
    trials = prior_trials(study, said.append)
    assert said == ["Warm start: 12 of the 12 completed trials of other fit the space"]
    assert sorted(str(trial.params) for trial in trials) == sorted(map(str, points))
    assert max(trials, key=lambda trial: trial.value).params == points[0]
    assert not any(trial.user_attrs for trial in trials) and with_prior_points(study) is study
    assert propose(study, {}, 0, trials).searched == GUIDE  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "other")  # the study that goes on keeps what it has taken
    assert [t.params for t in prior_trials(study, said.append)] == [t.params for t in trials] and len(said) == 1


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    finished_study(tmp_path)
    said: list[str] = []
    pinned = make_study(tmp_path, "--warm-start", "other", "--lora-r", "16")
    assert prior_trials(pinned, said.append) == [] and "0 of the 12" in said[0]


def test_a_study_that_is_elsewhere_is_said(tmp_path: Path) -> None:
    """A study that goes on from object storage has its own trials only."""
    study = make_study(tmp_path)
    object.__setattr__(study.settings.study, "warm_start", "/nowhere/other")
    said: list[str] = []
    assert prior_trials(study, said.append) == [] and "/nowhere/other is not on this machine" in said[0]
    assert with_prior_points(study) is study


# ------------------------------------------------------------------------------------------------ another base


@pytest.mark.parametrize(("argv", "why"), [([], "other base"), (["--weight-decay", "0.5"], "other --weight-decay")])
def test_of_another_base_or_other_settings_only_the_ranking_counts(tmp_path: Path, argv: list[str], why: str) -> None:
    points = finished_study(tmp_path, base="large" if argv else "small")
    study = make_study(tmp_path, "--warm-start", "other", *argv)
    said: list[str] = []
    trials = prior_trials(study, said.append)
    assert all(trial.user_attrs == {ONLY_RANKING: True} for trial in trials) and len(trials) == 12
    assert len(said) == 2 and f"({why})" in said[1] and "best 5 points come first" in said[1]
    first = with_prior_points(study).settings.first_points
    assert first[0] == next(point for point in points if point != GUIDE)
    assert len(first) == 5 and all(point in points for point in first)
    assert [points.index(point) for point in first] == sorted(points.index(point) for point in first)


def test_settings_without_effect_on_the_scores_do_not_matter(tmp_path: Path) -> None:
    finished_study(tmp_path, base="large")
    study = make_study(tmp_path, "--warm-start", "other", "--logging-steps", "1", "--feature-cache-gib", "1")
    assert warm_start(study, print)["only_ranking"] is False


@pytest.mark.parametrize(("family", "lines"), [("f", 2), ("g", 3), ("", 3)])
def test_another_family_is_allowed_and_said(tmp_path: Path, family: str, lines: int) -> None:
    finished_study(tmp_path, family=family)
    said: list[str] = []
    assert prior_trials(make_study(tmp_path, "--warm-start", "other"), said.append)
    assert len(said) == lines
    assert lines == 2 or f"the other base's is {family or 'unknown'} and this one's f" in said[2]


def test_the_family_of_a_base_is_its_and_its_text_models_type() -> None:
    assert family_of("nano") == "video_llama_3/qwen3"


def test_first_points_are_spread_over_the_space(tmp_path: Path) -> None:
    """Ten points near the best one, of which one is tried, and two others."""
    wide = ["--space", "wide"]
    study = make_study(tmp_path, *wide, name="other", base="small")
    write_plan(study.directory, {}, base_hash="small", data_hash="d", settings=study.plan["settings"])
    best = {"lora_r": 8, "lora_alpha_ratio": 1.0, "learning_rate": 1e-3, "train_projector": False}
    points = [best | {"learning_rate": 1e-3 + 1e-5 * n} for n in range(10)]
    points += [best | {"learning_rate": 3e-3}, best | {"lora_alpha_ratio": 4.0}]
    for number, point in enumerate(points):
        asked = propose(with_points(study, point), {}, 1)
        add_trial(study.journal, number, asked, auroc=0.9 - 0.01 * number)
    event = warm_start(make_study(tmp_path, *wide, "--warm-start", "other"), print)
    assert event["first_points"] == [points[0], points[10], points[11]]
    pair = ["--model-small", "nano", "--model", str(tiny(tmp_path))]
    sibling = make_study(tmp_path, *wide, "--warm-start", "other", *pair)
    assert warm_start(sibling, print)["first_points"] == [points[0], points[10], points[11], points[1], points[2]]


def with_points(study: Study, *points: dict[str, Any]) -> Study:
    return dataclasses.replace(study, settings=dataclasses.replace(study.settings, first_points=points))


def tiny(folder: Path) -> Path:
    """A folder that passes for a model where nothing reads it."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text('{"model_type": "video_llama_3"}')
    (folder / "model" / "model.safetensors").touch()
    return folder / "model"


RANGES = {
    "rate": FloatDistribution(1e-4, 1e-2, log=True),
    "rank": CategoricalDistribution([4, 8, 16, 32, 64, 128]),
    "kind": CategoricalDistribution(["linear", "cosine"]),
    "fixed": FloatDistribution(1.0, 1.0),
}


def test_positions_of_values_in_their_ranges() -> None:
    assert position(RANGES["rate"], 1e-3) == pytest.approx(0.5)
    assert [position(RANGES["rank"], rank) for rank in (4, 8, 128)] == [0, 0.2, 1]
    assert [position(RANGES["kind"], kind) for kind in ("linear", "cosine")] == [0, 1]
    assert position(RANGES["fixed"], 1.0) == 0
    assert position(CategoricalDistribution([2, 1, 3]), 3) == 2  # in no order, so they are no numbers on a scale


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({}, True), ({"rate": 2e-3}, True), ({"rate": 3e-3}, False), ({"rank": 16}, True), ({"rank": 32}, False),
     ({"kind": "cosine"}, False), ({"other": 1}, False)],
)  # fmt: skip
def test_points_are_near_if_they_differ_in_no_value_by_much(changed: dict[str, Any], expected: bool) -> None:
    params = {"rate": 1e-3, "rank": 8, "kind": "linear", "fixed": 1.0}
    trial: Any = optuna.trial.create_trial(params=params, distributions=RANGES, value=0.0)
    assert near(trial, params | changed) is expected and NEAR == 0.2


@pytest.mark.parametrize("kept", [1, 4, 9])
def test_a_killed_search_tries_the_points_of_an_undisturbed_one(tmp_path: Path, kept: int) -> None:
    points = finished_study(tmp_path)
    whole = search(make_study(tmp_path, "--warm-start", "other", name="whole"), 12)
    assert whole[0] == GUIDE and all(point in points for point in whole[1:6])
    assert not any(point in points for point in whole[6:])
    search(make_study(tmp_path, "--warm-start", "other", name="killed"), kept)
    again = make_study(tmp_path, "--warm-start", "other", name="killed")
    shutil.rmtree(tmp_path / "other")
    assert search(again, 12) == whole


# ------------------------------------------------------------------------------------------------ one scale

X = FloatDistribution(0.0, 1.0)


def at(x: float, value: float | None, state: TrialState = TrialState.COMPLETE, **attributes: bool) -> FrozenTrial:
    values = {"value": value} if value is not None else {}
    return optuna.trial.create_trial(
        params={"x": x}, distributions={"x": X}, state=state, user_attrs=attributes, **values
    )


def scaled(prior: dict[float, float], own: dict[float, float | None]) -> dict[float, float]:
    """The other study's trials on this study's scale, by their points. None: a trial that failed."""
    records = {
        number: TrialRecord(
            number,
            {"x": x},
            {},
            distributions_json({"x": X}),
            "FAILED" if value is None else "COMPLETE",  # type: ignore[arg-type]
            [] if value is None else [{"auroc": value}],
        )
        for number, (x, value) in enumerate(own.items())
    }
    trials = [at(x, value, only_ranking=True) for x, value in prior.items()]
    study = as_optuna(records, GOALS, trials)
    assert [trial.params["x"] for trial in study.trials[-len(own) :] if own] == list(own)
    return {trial.params["x"]: trial.value for trial in study.trials[: len(study.trials) - len(own)]}  # type: ignore[misc]


def test_shared_points_give_the_scale() -> None:
    prior = {0.1: 0.50, 0.2: 0.60, 0.3: 0.70, 0.4: 0.80, 0.5: 0.90, 0.6: 0.95}
    # 0.2 and 0.5 are tried here, with the order the other way round: each side is sorted by itself.
    assert scaled(prior, {0.2: 0.40, 0.5: 0.30}) == pytest.approx(
        {0.1: 0.30, 0.3: 1 / 3, 0.4: 0.30 + 0.2 / 3, 0.6: 0.40}
    )


def test_a_point_that_ended_here_counts_by_its_own_result_alone() -> None:
    assert scaled({0.1: 0.5, 0.2: 0.6, 0.3: 0.7}, {0.2: None, 0.3: 0.9}) == {0.1: 0.9}


def test_without_a_shared_point_the_values_stay() -> None:
    assert scaled({0.1: 0.5, 0.2: 0.6}, {}) == {0.1: 0.5, 0.2: 0.6}
    assert scaled({0.1: 0.5, 0.2: 0.6}, {0.7: 0.8}) == {0.1: 0.5, 0.2: 0.6}


def test_scores_of_the_same_base_stay_as_they_are() -> None:
    records = {0: TrialRecord(0, {"x": 0.1}, {}, distributions_json({"x": X}), "COMPLETE", [{"auroc": 0.2}])}  # type: ignore[arg-type]
    values = [trial.value for trial in as_optuna(records, GOALS, [at(0.1, 0.5), at(0.2, 0.6)]).trials]
    assert values == [0.5, 0.6, 0.2]


def test_tpe_proposes_where_the_other_study_was_good_until_this_ones_scores_say_otherwise(tmp_path: Path) -> None:
    """The other study's best rates are about 1e-3; here the score rises with the rate."""
    options = ["--space", "wide", "--lora-r", "8"]
    finished_study(tmp_path, *options, trials=40)
    study = make_study(tmp_path, "--warm-start", "other", *options)
    log = Log(study)
    searcher = JournalSearcher(study, log)  # type: ignore[arg-type]
    rates: list[float] = []
    for _ in range(40):
        asked = searcher.suggest("")
        rate = asked["point"].settings.learning_rate  # type: ignore[index]
        rates.append(rate)
        add_trial(study.journal, asked["number"], asked["point"], 0.5 + 50 * rate)  # type: ignore[index]
        log.records.update(trial_records(study.journal.events))
    assert 5e-4 < sorted(rates[1:6])[2] < 2e-3
    assert sorted(rates[-10:])[5] > 3e-3


# ------------------------------------------------------------------------------------------------ before the start


def test_a_study_without_this_ones_goal_is_refused(tmp_path: Path) -> None:
    finished_study(tmp_path)
    settings = parse(["--results", str(tmp_path), "--warm-start", "other"])
    assert check_warm_start(settings, GOALS) == []
    (problem,) = check_warm_start(settings, (("auroc", "max"), ("macro_f1", "max")))
    assert "other lacks macro_f1 (it has auroc, loss)" in problem


def test_a_study_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.json").write_text("{}")
    (problem,) = check_warm_start(parse(["--results", str(tmp_path), "--warm-start", "other"]), GOALS)
    assert problem.startswith("`--warm-start` must name a study that can be read")


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["--model-small", "nano"], "`--model-small` must be another base"),
     (["--model-small", "/nowhere"], "`--model-small`"),
     (["--transfer-trials", "3"], "`--transfer-trials` goes with --model-small"),
     (["--model-small", "/dev", "--transfer-trials", "0"], "`--transfer-trials`")],
)  # fmt: skip
def test_impossible_pairs_of_bases_are_refused(argv: list[str], word: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse(argv)
    assert any(word in problem for problem in refused.value.problems)


# ------------------------------------------------------------------------------------------------ two bases


def test_the_two_studies_of_one_command(tmp_path: Path) -> None:
    (tmp_path / "points.json").write_text('[{"lora_r": 16}]')
    argv = ["--results", str(tmp_path), "--name", "s", "--model-small", str(tiny(tmp_path)), "--trials", "30"]
    argv += ["--transfer-trials", "4", "--confirm", "2", "--register", "m", "--gpu-hours", "3", "--sampler", "gp"]
    argv += ["--first-points", str(tmp_path / "points.json"), "--learning-rate", "1e-3"]
    search, target = settings_of_both(parse(argv))
    assert (search.study.name, search.model.model, search.study.trials) == ("s-small", str(tmp_path / "model"), 30)
    assert (target.study.name, target.model.model, target.study.trials) == ("s", "nano", 5)
    assert (search.study.scheduler, target.study.scheduler) == ("asha", "none")
    assert (search.study.confirm, search.study.register, target.study.confirm, target.study.register) == (0, "", 2, "m")
    assert target.study.warm_start == str(tmp_path / "s-small") and not search.study.model_small
    assert len(search.first_points) == 1 and target.first_points == () and target.study.first_points == ""
    assert (
        search.pinned == target.pinned == ("learning_rate",) and search.study.gpu_hours == target.study.gpu_hours == 3
    )


def test_the_problems_of_both_bases_come_at_once_and_nothing_stays(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    argv = ["--results", str(folder), "--name", "s", "--num-phantoms", "30", "--metric", "mae"]
    with pytest.raises(SettingsError) as refused:
        prepare_both(parse([*argv, "--model-small", str(tiny(tmp_path))]), lambda text: None)
    problems = refused.value.problems
    assert any("`--metric`" in problem for problem in problems) and len(problems) == len(set(problems))
    with pytest.raises(SettingsError) as refused:  # the small base alone is at fault
        prepare_both(parse([*argv[:-2], "--model-small", str(tiny(tmp_path))]), lambda text: None)
    assert not any("`--model`" in problem for problem in refused.value.problems)
    with pytest.raises(SettingsError, match="`--model-small` must be another base than --model"):
        prepare_both(parse([*argv[:-2], "--model-small", str(CHECKPOINT)]), lambda text: None)
    assert [path.name for path in folder.iterdir()] == ["phantoms-30-0"]


def prepared(folder: Path) -> Study:
    """The two studies of one command, as they are on disk when the first one begins."""
    from tune.study import write_plan as write

    if not (folder / "sibling").exists():
        shutil.copytree(CHECKPOINT, folder / "sibling")
        config = json.loads((folder / "sibling" / "config.json").read_text())
        (folder / "sibling" / "config.json").write_text(json.dumps(config | {"sibling": True}))  # another hash
    argv = ["--results", str(folder), "--name", "s", "--num-phantoms", "30", "--transfer-trials", "2"]
    search = prepare_both(parse([*argv, "--model-small", str(folder / "sibling")]), lambda text: None)
    write(search)
    return search


def test_a_killed_pair_goes_on_where_it_was(tmp_path: Path) -> None:
    search = prepared(tmp_path)
    assert search.then and (search.name, search.then.name) == ("s-small", "s")
    assert search.plan["base_hash"] != search.then.plan["base_hash"]
    assert search.plan["family"] == search.then.plan["family"] == "video_llama_3/qwen3"
    target_id = search.then.plan["study_id"]
    search.journal.write("session", params=LAYOUT, tags={}, startup_s=5.0)
    write_ended(search, 3, "INTERRUPTED")
    release(search)

    def go_on() -> Study:
        study = resume_both(parse(["--results", str(tmp_path), "--resume", "s"]), lambda text: None)
        release(study)
        return study

    again = go_on()
    assert again.name == "s-small" and again.then and again.then.plan["study_id"] == target_id
    write_ended(again, 20, "COMPLETE", first=3)
    assert go_on().name == "s" and go_on().then is None
    target = go_on()
    target.journal.write("warm_start", trials=[])
    shutil.rmtree(tmp_path / "s-small")  # its part is in the journal
    assert go_on().name == "s"
    (tmp_path / "s" / "journal.jsonl").write_bytes(b"")
    with pytest.raises(SettingsError, match="the search of a study with --model-small must be here"):
        go_on()


def write_ended(study: Study, trials: int, state: str, first: int = 0) -> None:
    """Completed trials, with adapters, and the end of a session."""
    for number in range(first, trials):
        point = propose(study, trial_records(study.journal.events), number)
        add_trial(study.journal, number, point, auroc=0.5 + 0.01 * number)
        (study.directory / "trials" / f"{number:04d}" / "final_model").mkdir(parents=True)
    study.journal.write("study_ended", state=state, tags={}, metrics={}, num_trials=trials, artifacts=[])


def release(study: Study | None) -> None:
    """Give the locks back, as the end of a process does."""
    while study:
        study.lock._file.close()
        study = study.then


# ------------------------------------------------------------------------------------------------ what it was worth


def facts_of(prior: dict[str, Any], scores: dict[float, float], **event: Any) -> dict[str, Any] | None:
    """The facts of a study with these scores by rate, each trial of two epochs and ten device-seconds."""
    records = [
        TrialRecord(
            number, {"rate": rate}, {}, {}, "COMPLETE", [{"auroc": score}] * 2, device_seconds=10.0, finished=True
        )  # type: ignore[arg-type]
        for number, (rate, score) in enumerate(scores.items())
    ]
    trials = [{"params": {"rate": rate}, "values": [value]} for rate, value in prior.items()]
    fields = {"trials": trials, "only_ranking": True, "study": "s-small", "model": "tiny", "device_seconds": 30.0,
              "num_epochs": 40, "model_small": True}  # fmt: skip
    return transfer_facts(fields | event, records, GOALS[0])


def test_the_correlation_of_the_rankings_and_what_was_saved() -> None:
    facts = facts_of({1.0: 0.5, 2.0: 0.6, 3.0: 0.7, 4.0: 0.8}, {1.0: 0.1, 2.0: 0.3, 3.0: 0.2, 9.0: 0.9})
    assert facts and facts["num_points"] == 3 and facts["spearman"] == pytest.approx(0.5)
    assert facts["device_seconds_saved"] == pytest.approx(40 * 5 - 30 - 40)
    text = transfer_sentences(facts, 40.0)
    assert "3 settings" in text and "0.50 (n = 3)" in text
    assert "Both studies took 70 device-seconds" in text and "about 200, so 130 were saved" in text


def test_too_few_settings_give_no_correlation() -> None:
    for prior in ({1.0: 0.5, 2.0: 0.6}, {1.0: 0.5, 2.0: 0.5, 3.0: 0.5}):
        facts = facts_of(prior, {1.0: 0.1, 2.0: 0.3, 3.0: 0.2}, model_small=False)
        assert facts and facts["spearman"] is None and facts["device_seconds_saved"] is None
        assert "too few, or too alike" in transfer_sentences(facts, 40.0)


def test_a_study_that_took_over_no_ranking_says_nothing_of_it() -> None:
    assert facts_of({1.0: 0.5}, {1.0: 0.1}, only_ranking=False) is None
    assert transfer_facts({}, [], GOALS[0]) is None and transfer_facts({"trials": []}, [], GOALS[0]) is None
    assert Summary({"device_seconds": 1.0}, Path()).transfer_sentences == ""


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.mark.slow
@pytest.mark.ray
def test_one_command_searches_on_the_sibling_ends_on_the_base_and_survives_kills(tmp_path: Path) -> None:
    """Killed once in each of the two studies, it comes to the numbers of an undisturbed run."""
    ended = []
    for name, kills in (("whole", ()), ("killed", ("trial 1 complete", "Now its best settings", "trial 0 complete"))):
        folder = tmp_path / name
        folder.mkdir()
        sibling(folder)
        argv = ["--model-small", "sibling", "--trials", "4", "--transfer-trials", "2", "--lanes", "1", *SMALL]
        process = start(folder, *argv)
        if kills:
            wait_for(process, kills[0])
            process.kill()
            process.communicate()
            process = start(folder, "--resume", "s", name="")
            wait_for(process, kills[1])
            wait_for(process, kills[2])
            process.kill()
            process.communicate()
            process = start(folder, "--resume", "s", name="")
        finished = finish(process, folder)
        assert finished.code == 0, finished.err
        ended.append(finished)
    whole, killed = (
        [json.loads((each.folder / "results" / name / "study.json").read_text()) for name in ("s-small", "s")]
        for each in ended
    )
    for undisturbed, again in zip(whole, killed, strict=True):
        assert [t["searched"] for t in again["trials"]] == [t["searched"] for t in undisturbed["trials"]]
        assert [t["epochs"] for t in again["trials"]] == [t["epochs"] for t in undisturbed["trials"]]
    search, study = whole
    assert [len(each["trials"]) for each in whole] == [4, 3] and study["test"]["winner"] and search["transfer"] is None
    assert study["trials"][0]["searched"] == GUIDE and {t["state"] for t in study["trials"]} == {"COMPLETE"}
    facts = study["transfer"]
    assert facts["study"] == "s-small" and facts["num_points"] == 3 and facts["device_seconds_saved"] is not None
    assert "Transfer: 3 settings were trained both here and in s-small" in ended[0].out
    assert "Transfer: 3 settings" in (ended[0].folder / "results" / "s" / "report.html").read_text()
    parents = {run.info.run_name: run.data.tags for run in ended[0].runs() if "mlflow.parentRunId" not in run.data.tags}
    assert parents["s"]["warm_start"] == "s-small" and "warm_start" not in parents["s-small"]


def sibling(folder: Path) -> None:
    """A base of nano's shape with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(CHECKPOINT, folder / "sibling")
    weights = load_file(folder / "sibling" / "model.safetensors")
    noisy = {name: weight * (1.05 if weight.ndim > 1 else 1.0) for name, weight in weights.items()}
    save_file(noisy, folder / "sibling" / "model.safetensors", metadata={"format": "pt"})
