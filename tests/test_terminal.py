"""What a terminal shows: the footer from records and snapshots, and a real study under a pseudo-terminal."""

from __future__ import annotations

import io
import os
import re
import sys
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console, Group
from rich.text import Text
from studies import read_to_end

from train_fn.support.tables import HELD, print_table, wrap
from train_fn.support.text import duration
from tune.config.settings import StudySettings
from tune.records.trials import TrialRecord
from tune.results.terminal import footer, live

STUDY = StudySettings(trials=20, workers_per_trial=2)
GOALS = (("auroc", "max"),)


def record(number: int, state: str, auroc: float, device_seconds: float = 0.0) -> TrialRecord:
    epochs = [{"auroc": auroc, "loss": 0.5}]
    return TrialRecord(number, {}, {}, state=state, epochs=epochs, device_seconds=device_seconds)


def work(number: int, seconds: float, **changes: object) -> dict:
    progress = {"phase": "train", "epoch": 2, "num_epochs": 3, "step": 14, "num_steps": 27, "loss": 0.4123}
    return {"label": f"trial {number}", "seconds": seconds} | ({**progress, **changes} if changes else {})


def lines(shown: Group, width: int = 120) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(shown)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_a_line_for_each_lane_and_one_for_the_study() -> None:
    records = [
        record(0, "COMPLETE", 0.7, 40.0),
        record(1, "STOPPED", 0.9, 20.0),  # never the best: it was not trained to its end
        record(2, "FAILED", 0.1, 2.0),
        record(3, "COMPLETE", 0.812, 60.0),
        record(7, "RUNNING", 0.99),
        record(8, "RUNNING", 0.99),
    ]
    running = [work(7, 15.0, phase="train"), work(8, 90.0, phase="evaluation", step=27, epoch=3), work(9, 0.0)]
    one, two, three, last = lines(footer(records, {"lanes": 4, "starting": 1, "running": running}, GOALS, STUDY, 2))
    assert re.fullmatch(r"trial 7  epoch 2/3  step 14/27  loss 0\.412  \S+", one)
    assert re.fullmatch(r"trial 8  epoch 3/3  step 27/27  loss 0\.412  \S+  evaluating", two)
    assert three == "trial 9"
    # The 16 that are left take 20 s each on a lane; 15 s and, at most, 20 s of two of them are over.
    left = (16 * 20 - 15 - 20) / 4
    assert last == (
        "starting 1 lane: loading the base · best auroc 0.812 (trial 3) · 4 of 20 done, 3 running · "
        f"about 1 min {round(left) - 60} s left"
    )


def test_before_the_first_trial_and_after_the_last() -> None:
    start = {"lanes": 2, "starting": 2, "running": []}
    assert lines(footer([], start, GOALS, STUDY, 2)) == ["starting 2 lanes: loading the base · 0 of 20 done, 0 running"]
    unlearned = work(0, 1.0, loss=None, epoch=1, step=0)
    (first, _) = lines(footer([], start | {"starting": 0, "running": [unlearned]}, GOALS, STUDY, 2))
    assert first.startswith("trial 0  epoch 1/3  step 0/27") and "loss" not in first
    test = {"lanes": 2, "starting": 0, "running": [{"label": "scoring the test images", "seconds": 1.0}]}
    done = lines(footer([record(0, "COMPLETE", 0.7, 9.0)], test, GOALS, replace(STUDY, trials=1), 2))
    assert done == ["scoring the test images", "best auroc 0.700 (trial 0) · 1 of 1 done, 1 running"]


def test_many_lanes_and_a_narrow_terminal_keep_their_height() -> None:
    running = [work(number, 1.0, epoch=1) for number in range(64)]
    shown = lines(footer([], {"lanes": 64, "starting": 0, "running": running}, GOALS, STUDY, 2), width=40)
    assert len(shown) == 9 and shown[-1].startswith("and 56 more lanes")


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "1 min 0 s"), (12, "12 s"), (3600 * 2 + 301, "2 h 5 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


LONG = "a_class_of_" + "_".join(["invasive", "ductal", "carcinoma"] * 4)
SCORE = f"-0.108 (-0.197{HELD}to{HELD}-0.018)"
COLUMNS = ["metric", "winner (trial 1)", "winner minus guide, paired", "gradient_accumulation_steps", "note"]


def printed(capsys, width: int | None, monkeypatch, rows: list[list[str]], **options: object) -> list[str]:
    """A table's lines on a terminal of a width; None: in a file."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    print_table("The title of a table that is longer than a narrow terminal: study x", COLUMNS, rows, **options)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 132, None])
@pytest.mark.parametrize(
    "name", ["auroc", "sensitivity_at_specificity_90", LONG, "\u4e73\u817a\u7ed3\u8282 \u826f\u6027", "[/red]"]
)
def test_a_table_breaks_no_word_at_any_width(capsys, monkeypatch, width: int | None, name: str) -> None:
    rows = [[name, SCORE, SCORE, "8", "yes"], ["ece", "0.2", "-", "16", "a remark of several words"]]
    out = printed(capsys, width, monkeypatch, rows)
    text = " ".join(re.sub("[│┃━┡┏┓┩╇┳─└┘┴]", " ", " ".join(out)).split())
    assert "-0.197 to -0.018" in text.replace(") -0.108 (", " ") and HELD not in text
    atoms = {part for row in [COLUMNS, *rows] for cell in row for part in re.findall(r"[^ _\u00a0]+_?", cell)}
    shown = set(re.findall(r"[^ _]+_?", text))
    assert atoms <= shown, atoms - shown
    limit = width or 160
    assert all(cell_len(line) <= limit or line == f"metric {LONG}" for line in out)
    assert any("┃" in line for line in out) == (limit >= 100) or width == 80


def test_columns_become_narrower_before_rows_become_blocks(capsys, monkeypatch) -> None:
    rows = [["sensitivity_at_specificity_90", SCORE, SCORE, "8", "yes"]]
    heights = [len(printed(capsys, width, monkeypatch, rows)) for width in (160, 140, 120)]
    assert heights == sorted(heights) and heights[0] < heights[-1]
    narrow = (["metric", "settings"], [["sensitivity", f"lora_r{HELD}8, learning_rate{HELD}0.001"]])
    out = printed(capsys, 60, monkeypatch, rows, narrow=narrow)
    assert "│ sensitivity │ lora_r 8, learning_rate 0.001 │" in out
    out = printed(capsys, 30, monkeypatch, rows, narrow=narrow)
    assert out[-3:] == ["metric sensitivity", "  settings  lora_r 8,", "            learning_rate 0.001"]


def test_prose_is_wrapped_between_words_only() -> None:
    text = "the winner is /a/very/long/path/that/has/no/space here"
    assert wrap(text, 14) == "the winner is\n/a/very/long/path/that/has/no/space\nhere"
    assert wrap("", 14) == "" and wrap("a\n\nb", 14) == "a\n\nb"


def test_without_a_terminal_nothing_is_added(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with live(lambda: pytest.fail("nobody sees it")):
        print("one line")
    assert capsys.readouterr().out == "one line\n"


def test_an_interrupt_leaves_the_terminal_as_it_was(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        with pytest.raises(KeyboardInterrupt), live(lambda: Text("the footer")):
            print("a line that stays")
            raise KeyboardInterrupt
        assert sys.stdout is terminal
        print("after")
    shown = read_to_end(reader)
    assert shown.index("a line that stays") < shown.index("the footer") < shown.rindex("\x1b[2K") < shown.index("after")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_a_trial_reports_its_progress(base, splits) -> None:
    from train_fn.jobs import EpochReport
    from train_fn.settings import TrialSettings
    from train_fn.trial.loop import run_trial

    settings = TrialSettings(num_train_epochs=2, lora_r=4, lora_alpha=8, logging_steps=2)
    progress: list[dict] = []
    reports: list[EpochReport] = []
    run_trial(base, splits, settings, lambda report: bool(reports.append(report)), progress=progress.append)
    per_epoch = -(-len(splits.train) // 16)
    steps = [(entry["phase"], entry["epoch"], entry["step"]) for entry in progress]
    logged = [step for step in range(2, 2 * per_epoch + 1, 2)]
    wanted = [("train", 1, 0), *(("train", -(-step // per_epoch), step) for step in logged)]
    wanted += [("evaluation", epoch, epoch * per_epoch) for epoch in (1, 2)]
    assert sorted(steps, key=lambda step: (step[2], step[0] == "evaluation")) == steps
    assert sorted(steps) == sorted(wanted)
    assert {(entry["num_epochs"], entry["num_steps"]) for entry in progress} == {(2, 2 * per_epoch)}
    losses = [entry["loss"] for entry in progress if entry["phase"] == "evaluation"]
    assert progress[0]["loss"] is None and losses == [report.metrics["train_loss"] for report in reports]
