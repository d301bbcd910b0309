"""The report of a finished study: the decision, every trial, right numbers, nothing fetched, nothing unescaped."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import optuna
import pytest

from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.data.splits_file import save_splits
from train_fn.data.splitting import DataReport
from train_fn.settings import ModelSettings, TrialSettings
from tune.config.settings import DataSettings, StudySettings
from tune.records.goals import Goal
from tune.records.optuna_study import distributions_json
from tune.records.trials import TrialRecord
from tune.results.answer_pictures import calibration, confusions
from tune.results.decision import answer_rows, rule_sentence, score_table
from tune.results.outcome import Outcome
from tune.results.pictures import PICTURES, curves, history, importances, parameter_axis, spans
from tune.results.report import write_report
from tune.results.summary import Summary
from tune.results.view import View
from tune.tracking.note import study_note

HOSTILE = "<img src=x onerror=alert('$x$')>"
ANSWERS = ("Normal", "Malignant")
SPACE = {
    "lora_r": optuna.distributions.CategoricalDistribution([4, 16, 64]),
    "learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
    "train_projector": optuna.distributions.CategoricalDistribution([False, True]),
    "projector_learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True),
}
COMPLETE, PRUNED, FAILED = (
    optuna.trial.TrialState.COMPLETE,
    optuna.trial.TrialState.PRUNED,
    optuna.trial.TrialState.FAIL,
)


class Page(HTMLParser):
    """What a page holds: links, and the rows of its table of trials."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._in_trials = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.links += [found[name] or "" for name in ("src", "href") if name in found]
        self._in_trials = "trials" in (found.get("class") or "") if tag == "table" else self._in_trials
        if self._in_trials and tag == "tr":
            self.rows.append([])
        elif self._in_trials and tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_trials and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_trials = self._in_trials and tag != "table"

    @property
    def numbers(self) -> list[int]:
        """The trials, in the table's order."""
        return [int(row[0]) for row in self.rows if row and row[0].strip()]


def make_record(number: int, state: str, rng: np.random.Generator) -> TrialRecord:
    searched: dict[str, Any] = {
        "lora_r": int(rng.choice([4, 16, 64])),
        "learning_rate": float(10 ** rng.uniform(-4, -2)),
    }
    searched["train_projector"] = bool(rng.random() < 0.5)
    if searched["train_projector"]:
        searched["projector_learning_rate"] = 1e-3
    score = 0.9 - 0.1 * abs(np.log10(searched["learning_rate"]) + 3) + 0.01 * rng.normal()
    length = {"COMPLETE": 3, "STOPPED": 1, "INTERRUPTED": 2}.get(state, 0)
    epochs = [{"auroc": score - 0.1 / (e + 1), "macro_f1": 0.5, "loss": 1 - score} for e in range(length)]
    return TrialRecord(
        number,
        searched,
        {},
        distributions_json({name: SPACE[name] for name in searched if name in SPACE}),
        state=state,
        epochs=epochs,
        applied={"trainable_params": 1007 - number} if length else {},
        lane=number % 2 if length else None,
        seconds={"train": 9.0, "wall": 10.0, "waited": 1.0} if length else {},
        error=f"OutOfMemory: {HOSTILE}\nTraceback" if state == "FAILED" else "",
        started_at=1e9 + number // 2 * 10,
        ended_at=1e9 + number // 2 * 10 + 10,
    )


def make_study(
    folder: Path,
    states: list[str],
    *,
    tested: bool = True,
    closed: bool = True,
    answers: Sequence[str] = ANSWERS,
    goals: Sequence[Goal] = (("auroc", "max"),),
    **outcome: Any,
) -> tuple[dict[str, Any], Path]:
    """A study on disk as the driver leaves it: study.json's content, and the study's directory."""
    directory = folder / "a study & more"
    directory.mkdir()
    rng = np.random.default_rng(0)
    records = [make_record(number, state, rng) for number, state in enumerate(states)]
    labels = [0] * 6 + [1] * 4 + list(range(2, len(answers))) * 2
    test = tuple(
        Sample((f"/x/{HOSTILE}{i}.png",), "?", answers[label], label if closed else -1)
        for i, label in enumerate(labels)
    )
    splits = Splits(test, test, test, closed_set(answers if closed else (), answers[1]))
    save_splits(splits, directory / "splits.json")
    done = Outcome(directory.name, directory, tuple(goals), records, lanes=2, **outcome)
    done.seconds["wall"] = 4000.0
    complete = [record for record in records if record.state == "COMPLETE"]
    done.winner = max(complete, key=lambda record: record.value("auroc"), default=None)
    done.adapter = directory / "best_adapter" if complete else None
    if tested and complete:
        score = {name: {"value": 0.8, "interval": [0.7, 0.9]} for name in ("loss", "auroc")}
        done.tests = {"winner": score, "guide": score, "difference": copy.deepcopy(score)}
        done.tests["difference"]["auroc"] = {"value": 0.0, "interval": [-0.1, 0.1]}
        probabilities = np.full((len(labels), len(answers)), 0.01)
        probabilities[:10, :2] = [[0.9, 0.1]] * 5 + [[0.3, 0.7]] + [[0.2, 0.8]] * 3 + [[0.6, 0.4]]
        probabilities[range(10, len(labels)), labels[10:]] = 0.9
        if closed:
            one = {"answers": labels, "probabilities": probabilities.tolist()}
            done.predictions = {"winner": one, "guide": one}
    parts = {"study": StudySettings(), "model": ModelSettings(), "data": DataSettings(), "trial": TrialSettings()}
    plan = {
        "settings": {name: dataclasses.asdict(part) for name, part in parts.items()} | {"pinned": []},
        "tracking_uri": "sqlite:///mlflow.db",
        "data_report": dataclasses.asdict(
            DataReport(30, 2, 4, ((f"{HOSTILE}: Normal", "b.png: Malignant"),), 0, {"test": 1}, 0.3, (0,))
        ),
        "candidates": splits.candidates,
        "positive_label": answers[1] if closed else "",
        "class_counts": {part: splits.class_counts(part) for part in ("train", "validation", "test")},
        "data_hash": "d" * 64,
        "versions": {"version_ray": "1"},
        "git": {},
    }
    return done.save(plan, {"lanes": 2}), directory


MIXED = ["COMPLETE", "STOPPED", "COMPLETE", "FAILED", "COMPLETE", "INTERRUPTED", "STOPPED", "COMPLETE", "COMPLETE"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Path], Page]:
    """study.json's content, what was written, and the report of a study with every kind of trial and hostile names."""
    folder = tmp_path_factory.mktemp("mixed")
    study, directory = make_study(folder, MIXED, confirmations={0: [0.8, 0.7], 2: [0.9, 0.8]}, ended_by=HOSTILE)
    return (
        study,
        write_report(study, directory),
        Page((directory / "report.html").read_text()),
    )


def test_the_report_is_whole_and_fetches_nothing(mixed) -> None:
    study, paths, page = mixed
    names = {path.name for path in paths}
    assert names == {"report.html", "explore.html", *(f"{picture.__name__}.svg" for picture in PICTURES)}
    links = [link for link in page.links if not link.startswith("data:image/svg+xml;base64,")]
    assert links == ["pictures/explore.html"] and len(page.links) == 1 + len(PICTURES) == 11
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert f"Trial {study['winner']} is the best adapter found" in page.text
    assert "not distinguishable from the guide's defaults" in page.text
    assert "0.800 (0.700 to 0.900)" in page.text and "0.750" in page.text and "d" * 64 in page.text
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().get("viewBox") and path.stat().st_size < 80_000
    (explore,) = (path.read_text() for path in paths if path.name == "explore.html")
    assert explore.count("plotly.js v") == 1 and explore.count("Plotly.newPlot(") == 5
    assert not [link for link in Page(explore).links if "//" in link]


def test_the_note_and_the_page_state_the_same_result(mixed) -> None:
    study, paths, page = mixed
    note = study_note(paths[0].parent)
    summary = Summary(study, paths[0].parent)
    for sentence in (summary.headline, summary.explanation):
        assert sentence in note and sentence in page.text
    winner = next(line for line in note.splitlines() if line.startswith("| winner |"))
    assert winner.startswith(f"| winner | {summary.winner.metrics['auroc']:.3f} | 0.800 (0.700 to 0.900) | lora_r ")
    assert "(9 trials: 5 complete, 2 stopped, 1 failed, 1 interrupted)" in note
    assert study["adapter"] in note and study["adapter"] in page.text


def test_what_users_named_is_escaped(mixed) -> None:
    _, _, page = mixed
    assert page.tags.count("img") == len(PICTURES) and "x" not in page.links
    # What ended the study, the two mistakes' images, the error's first line, and a contradiction.
    assert page.text.count(HOSTILE) == 1 + 2 + 1 + 1
    assert "Traceback" not in page.text
    (failed,) = [row for row in page.rows if len(row) == 2]
    assert failed[1].startswith("OutOfMemory")
    assert page.text.index("70 %") < page.text.index("60 %")  # the surer mistake first


def test_trials_are_ordered_and_named_by_their_end(mixed) -> None:
    study, _, page = mixed
    assert sorted(page.numbers) == list(range(len(MIXED)))
    states = [row[1].split()[0] for row in page.rows if row and row[0].strip()]
    assert states[:5] == ["complete"] * 5 and states[8] == "failed"
    assert sorted(states[5:8]) == ["interrupted", "stopped", "stopped"]
    completed = [study["trials"][number]["epochs"][-1]["auroc"] for number in page.numbers[:5]]
    assert completed == sorted(completed, reverse=True) and page.numbers[0] == study["winner"]


@pytest.mark.parametrize(
    ("states", "changes", "text"),
    [
        (["FAILED"] * 3, {}, "No adapter: no trial completed"),
        (["COMPLETE"], {"test": {}}, "The guide's defaults (trial 0) are the best found"),
        (["COMPLETE", "COMPLETE", "INTERRUPTED"], {"test": {}, "state": "INTERRUPTED"}, "The study was interrupted"),
        (["INTERRUPTED"], {"state": "INTERRUPTED"}, "No adapter: interrupted before a trial was completed"),
        (["FAILED", "COMPLETE", "COMPLETE"], {}, "is the best adapter found"),
        ([], {}, "No adapter"),
    ],
)
def test_every_end_of_a_study_has_its_report(
    tmp_path: Path, states: list[str], changes: dict[str, Any], text: str
) -> None:
    study, directory = make_study(tmp_path, states, tested=changes.get("test") != {})
    study |= changes
    write_report(study, directory)
    page = Page((directory / "report.html").read_text())
    assert text in page.text
    assert sorted(page.numbers) == list(range(len(states)))
    assert "Not drawn: it takes 4 completed trials" in page.text


def test_without_a_closed_set_of_answers(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE"] * 5, closed=False)
    study |= {"metric": "loss", "mode": "min", "goals": [["loss", "min"]]}
    paths = write_report(study, directory)
    assert "reliability.svg" not in {path.name for path in paths}
    page = Page((directory / "report.html").read_text())
    assert "Where the answers go wrong" not in page.text and not answer_rows(View(study, directory))
    assert "The winner's answers are taken as the model gives them; no rule is fitted." in page.text
    assert "no small closed set" in page.text and "Not drawn: it takes a positive answer" in page.text
    losses = [study["trials"][number]["epochs"][-1]["loss"] for number in page.numbers]
    assert losses == sorted(losses)


def test_several_goals_name_the_front(tmp_path: Path) -> None:
    goals = (("auroc", "max"), ("trainable_params", "min"))
    study, directory = make_study(tmp_path, ["COMPLETE"] * 8, goals=goals)
    paths = write_report(study, directory)
    assert {"importances.svg", "explore.html"} <= {path.name for path in paths}
    page = Page((directory / "report.html").read_text())
    assert study["front"]
    assert sorted(int(row[0]) for row in page.rows if row and "front" in row[1]) == study["front"]
    assert "trainable_params" in page.text and "1,007" in page.text


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE"] * 6)
    study["trials"][1]["epochs"][-1]["auroc"] = None
    study["trials"][2]["epochs"] = []
    for scores in study["test"].values():
        scores["auroc"] = {"value": None, "interval": None}
    write_report(json.loads(json.dumps(study)), directory)
    page = Page((directory / "report.html").read_text())
    assert sorted(page.numbers[-2:]) == [1, 2] and "undefined" in page.text


def test_more_than_a_hundred_trials(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE", "STOPPED", "STOPPED"] * 40)
    paths = write_report(study, directory)
    page = Page((directory / "report.html").read_text())
    assert sorted(page.numbers) == list(range(120))
    assert all(path.stat().st_size < 200_000 for path in paths if path.suffix == ".svg")


def test_confusion_counts_the_test(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, MIXED)
    tables = confusions(View(study, directory))
    assert [table.title for table in tables] == [f"winner (trial {study['winner']})", "guide's defaults"]
    for table in tables:  # of six normal images five are called so, of four malignant ones three
        assert table.counts == [[5, 1], [1, 3]] and table.shares == [[0.833, 0.167], [0.25, 0.75]]


def test_calibration_error() -> None:
    sure = np.array([0.6, 0.6, 0.9, 0.9])
    rows, error = calibration(np.array([True, False, True, True]), sure, 2)
    assert rows == pytest.approx(np.array([[0.6, 0.5, 2], [0.9, 1.0, 2]]))
    assert error == pytest.approx(0.1)
    perfect = np.linspace(0, 1, 1000)
    right = np.random.default_rng(0).random(1000) < perfect
    assert calibration(right, perfect, 10)[1] < 0.05 < calibration(~right, perfect, 10)[1]


def test_axes_follow_the_search(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE"] * 5)
    view = View(study, directory)
    record = view.records[3]  # number 3 is moved by (3 * 0.618 % 1 - 0.5) * 0.04
    moved = (3 * 0.618 % 1 - 0.5) * 0.04
    record.searched |= {"learning_rate": 1e-3, "lora_r": 16}
    place, ticks = parameter_axis(view, "learning_rate")
    assert place(record) == pytest.approx(0.5 + moved)
    assert list(ticks) == pytest.approx([0, 0.5, 1]) and list(ticks.values()) == ["0.0001", "0.001", "0.01"]
    place, ticks = parameter_axis(view, "lora_r")
    assert place(record) == pytest.approx(0.5 + moved) and list(ticks.values()) == ["4", "16", "64"]


def test_importances_find_what_matters_and_leave_conditional_settings_out(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE"] * 60)
    figure = importances(View(study, directory))
    assert not isinstance(figure, str)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[-1] == "learning_rate" and sorted(names) == ["learning_rate", "lora_r", "train_projector"]


def test_spans_exclude_the_time_a_trial_waited(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE"] * 4)
    found = [(record.number, start, end) for record, start, end in spans(View(study, directory))]
    assert found == [(0, 0.0, 9.0), (1, 0.0, 9.0), (2, 10.0, 19.0), (3, 10.0, 19.0)]


UNPRINTABLE = "$a_b$ [/red] \x1b[2J \x00 \udcff \u202e <b>"


def test_text_that_cannot_be_printed_is_escaped(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE"] * 3 + ["FAILED"], ended_by=UNPRINTABLE)
    study |= {"candidates": [UNPRINTABLE, "b"], "notes": [UNPRINTABLE], "error": UNPRINTABLE}
    for trial in study["trials"]:
        trial["searched"][UNPRINTABLE] = UNPRINTABLE
    study["trials"][3]["error"] = UNPRINTABLE
    paths = write_report(study, directory)
    text = (directory / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not set(text) & {"\x1b", "\x00", "\u202e", "\udcff"}
    assert page.text.count("$a_b$ [/red] \\x1b[2J \\x00 \\udcff \\u202e <b>") > 8
    drawn = [path for path in paths if path.suffix == ".svg"]
    assert {"roc.svg", "slices.svg"} <= {path.name for path in drawn}
    words = " ".join(text for path in drawn for text in ElementTree.parse(path).getroot().itertext())
    assert "$a_b$ [/red] \\x1b[2J" in words


def test_a_study_of_an_older_version_without_ranges_has_a_report(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE"] * 5)
    for trial in study["trials"]:
        del trial["distributions"], trial["report_seqs"]
    write_report(study, directory)
    page = Page((directory / "report.html").read_text())
    assert "Not drawn: it takes 4 completed trials and 2 settings that vary" in page.text
    assert sorted(page.numbers) == list(range(5))


def test_a_study_interrupted_after_its_test_is_described_correctly(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE", "COMPLETE", "INTERRUPTED"])
    study |= {"state": "INTERRUPTED", "winner": 0}
    study["test"].pop("difference")
    write_report(study, directory)
    text = Page((directory / "report.html").read_text()).text
    assert "were not looked at" not in text  # they were: the study was interrupted afterwards
    assert "--resume" in text and "--trials" not in text.partition("Go on with the study")[2]


# ------------------------------------------------------------------------------------------------ the first page


def score(value: float | None, low: float = 0.0, high: float = 0.0) -> dict[str, Any]:
    return {"value": value, "interval": [low, high] if high > low else None}


def with_baselines(study: dict[str, Any], clean: bool = False) -> dict[str, Any]:
    """The study, with a rule fitted for macro_f1 and a linear probe that is better than the winner."""
    its = {
        "winner": {"auroc": score(0.607, 0.507, 0.698), "macro_f1": score(0.418, 0.305, 0.539)},
        "guide": {"auroc": score(0.610, 0.511, 0.701), "macro_f1": score(0.402, 0.298, 0.516)},
        "difference": {"auroc": score(0.005, -0.042, 0.053), "macro_f1": score(0.016, -0.046, 0.092)},
        "linear probe": {"auroc": score(0.713, 0.617, 0.792), "macro_f1": score(0.481, 0.397, 0.566)},
        "winner minus probe": {"auroc": score(-0.108, -0.197, -0.018), "macro_f1": score(-0.063, -0.1, -0.02)},
        "untuned base": {"auroc": score(0.5), "macro_f1": score(None)},
    }
    facts = {"num_seeds": [2, 2], "num_samples": 9}
    for who in ("difference", "winner minus probe"):
        its[who] = {name: {**its[who][name], **facts} for name in its[who]}
    if clean:
        for who in ("winner", "guide", "difference", "winner minus probe"):
            its[f"{who}, clean part"] = its[who]
        study["data_report"]["test_clean"] = list(range(9))
    study["test"] = its
    study["settings"]["study"]["decide"] = "macro_f1"
    return study


def test_the_first_sentence_is_the_rule_its_score_and_what_it_is_compared_with(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, MIXED)
    view = View(with_baselines(study), directory)
    assert rule_sentence(view) == (
        "A rule fitted on the validation images for macro_f1 gives the answers. On the test images its macro_f1 is "
        "0.418 (0.305 to 0.539): not distinguishable from the guide's defaults (0.402), worse than a linear probe "
        "(0.481)."
    )
    study["settings"]["study"]["decide"] = "sensitivity>=0.9"
    for who in ("sensitivity", "specificity"):
        study["test"]["winner"][who] = score(0.9, 0.8, 0.95)
    assert rule_sentence(View(study, directory)) == (
        "A threshold fitted on the validation images gives the answers, for a sensitivity of at least 0.9. On the test "
        "images its sensitivity is 0.900 (0.800 to 0.950), and its specificity is 0.900 (0.800 to 0.950)."
    )
    study["settings"]["study"]["decide"] = "argmax"
    assert rule_sentence(View(study, directory)).startswith("The winner gives its most probable answer; no rule was")


def test_the_first_sentence_is_of_the_clean_part_if_there_is_one(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, MIXED)
    view = View(with_baselines(study, clean=True), directory)
    assert "On the test images without a near-copy in training its macro_f1 is 0.418" in rule_sentence(view)
    assert rule_sentence(view).endswith("the guide's defaults (0.402), worse than a linear probe.")  # scored on all
    table = score_table(view)
    assert (
        table
        and table.clean == 9
        and [row.title for row in table.rows][:2]
        == [
            "winner, clean part",
            "guide, clean part",
        ]
    )


def test_the_first_table_draws_intervals_and_no_differences(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, MIXED)
    table = score_table(View(with_baselines(study), directory))
    assert table and table.columns == ["auroc", "macro_f1"] and not table.clean
    bars = {row.title: row.bar for row in table.rows}
    assert bars["winner minus guide, paired, mean of 2 seeds"] is None
    assert bars["winner minus probe, paired, mean of 2 seeds"] is None
    assert bars["untuned base"] == [4.0, 4.0, 4.0]  # the lowest, without an interval
    assert bars["linear probe"] == pytest.approx([40.9, 96.0, 71.1], abs=0.5)  # 0.617 and 0.713 of 0.5 to 0.792
    assert [text for _, text in table.ticks] == ["0.5", "0.6", "0.7"]
    study["test"] = {}
    assert score_table(View(study, directory)) is None


CHINESE = ("良性", "恶性肿瘤", "正常组织")
MANY = tuple(f"grade {i} of an invasive carcinoma with {'microcalcifications ' * 3}in quadrant {i}" for i in range(12))


def test_answers_are_rows_of_tables_and_every_script_stays_text(tmp_path: Path) -> None:
    answers = CHINESE + MANY[3:]
    study, directory = make_study(tmp_path, MIXED, answers=answers)
    rows = answer_rows(View(study, directory))
    assert [row.answer for row in rows] == list(answers)
    assert rows[0].counts == [6, 6, 6] and rows[0].right == ["5 of 6", "5 of 6"]
    assert rows[1].right == ["3 of 4", "3 of 4"] and rows[11].right == ["2 of 2", "2 of 2"]
    paths = write_report(study, directory)
    first, _, rest = (directory / "report.html").read_text(encoding="utf-8").partition('<section class="rest">')
    shown, evidence = Page(first).text, Page(rest).text
    assert "And 6 more answers, below" in shown and f"{MANY[5][:43]}…" in shown and MANY[6][:40] not in shown
    assert all(shown.count(answer) == 1 for answer in CHINESE) and MANY[11] in evidence
    assert all(f"{number} {answer}" in evidence for number, answer in enumerate(CHINESE, 1))  # rows of the confusions
    (roc,) = (path for path in paths if path.name == "roc.svg")
    assert any("恶性肿瘤" in text for text in ElementTree.parse(roc).getroot().itertext())


def test_scores_beyond_an_axis_are_said_on_the_picture(tmp_path: Path) -> None:
    study, directory = make_study(tmp_path, ["COMPLETE"] * 6)
    drawn = curves(View(study, directory))
    assert not isinstance(drawn, str) and drawn.get_supxlabel() == ""
    lowest = min(epoch["auroc"] for trial in study["trials"] for epoch in trial["epochs"])
    assert drawn.axes[0].get_ylim()[0] < lowest  # nothing is cut, although first epochs are far below the last
    study["trials"][4]["epochs"][0]["auroc"] = -50.0
    study["trials"][5]["epochs"][0]["auroc"] = None
    drawn = curves(View(study, directory))
    assert not isinstance(drawn, str) and drawn.axes[0].get_ylim()[0] > -1
    assert drawn.get_supxlabel() == "Not to scale: 1 score beyond this axis, as far as -50.000; 1 score missing"
    assert -50.0 in [y for line in drawn.axes[0].lines for y in line.get_ydata()]  # true to its value, not clamped
    study["trials"][4]["state"] = study["trials"][3]["state"] = "STOPPED"
    study["trials"][4]["epochs"][-1]["auroc"] = study["trials"][3]["epochs"][-1]["auroc"] = -50.0
    drawn = history(View(study, directory))
    assert not isinstance(drawn, str)
    assert drawn.get_supxlabel() == "Not to scale: 2 scores beyond this axis, as far as -50.000"


# ------------------------------------------------------------------------------------------------ in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<iframe width=390 height=9000 style="border:0" src="report.html"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const found = {broken: [], outside: [], scrolls: 0, edges: 0};
  for (const box of page.querySelectorAll("details")) box.open = true;
  found.width = page.documentElement.scrollWidth;
  for (const box of page.querySelectorAll("table, figure img, pre")) {
    const around = box.closest(".scroll, pre");
    if (!around) {
      if (box.getBoundingClientRect().right > 391) found.outside.push(box.outerHTML.slice(0, 200));
      continue;
    }
    found.scrolls += around.scrollWidth > around.clientWidth;
    found.edges += around.scrollWidth > around.clientWidth && getComputedStyle(around).backgroundImage != "none";
  }
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), range = page.createRange();
  for (let node; node = texts.nextNode();) {
    for (const word of node.data.matchAll(/[A-Za-z0-9.]+/g)) {
      if (word[0].length > 24 || node.parentElement.closest("code, pre, style")) continue;
      range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) found.broken.push(word[0]);
    }
  }
  document.body.textContent = JSON.stringify(found);
});</script>"""


def browse(*arguments: str, folder: Path) -> str:
    """What headless Chromium prints."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    command = [str(CHROMIUM), *options, f"--user-data-dir={folder / 'chromium'}", *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=300).stdout.decode()


def browser_study(kind: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """A study whose page is hard to lay out."""
    goals = (("auroc", "max"), ("trainable_params", "min"))
    if kind == "no winner":
        study, directory = make_study(folder, ["FAILED"] * 9)
        return study | {"error": "RuntimeError: " + "the store is unavailable " * 40}, directory
    if kind == "open":
        return make_study(folder, MIXED, closed=False)
    study, directory = make_study(folder, MIXED, answers=MANY if kind == "many" else CHINESE, goals=goals)
    study = with_baselines(study, clean=kind == "many")
    if kind == "many":
        study["adapter"] = "/a/long/path" * 20
        study["settings"]["study"]["decide"] = "sensitivity>=0.9"
        for scores in study["test"].values():
            scores |= {"sensitivity": score(0.9, 0.8, 0.95), "specificity": score(0.6, 0.5, 0.7)}
        study["notes"] = ["a note that says what the user should know about this study"] * 8
    return study, directory


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("kind", ["chinese", "many", "open", "no winner"])
def test_in_a_browser_a_phone_breaks_no_word_and_the_decision_prints_on_one_page(tmp_path: Path, kind: str) -> None:
    study, directory = browser_study(kind, tmp_path)
    write_report(study, directory)
    (directory / "phone.html").write_text(MEASURE)
    dom = browse("--window-size=500,900", "--dump-dom", (directory / "phone.html").as_uri(), folder=tmp_path)
    found = json.loads(re.search(r"\{.*\}", dom)[0])  # type: ignore[index]
    assert found["width"] == 390 and not found["outside"] and not found["broken"]
    assert found["scrolls"] == found["edges"] and found["scrolls"] > (0 if kind == "no winner" else 3)
    text = (directory / "report.html").read_text(encoding="utf-8")
    first, _, rest = text.partition('<section class="rest">')
    (directory / "print.html").write_text(f"{first}<section class='rest'><p>The rest begins.</p></section></main>")
    pdf = tmp_path / "print.pdf"
    browse(f"--print-to-pdf={pdf}", (directory / "print.html").as_uri(), folder=tmp_path)
    assert rest and len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) == 2
