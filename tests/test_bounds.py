"""Every option with impossible values: each is refused in a sentence that names the option."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.settings import Range, TrialSettings, broken_rules, rules
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.config.settings import GROUPS, flag
from tune.records.goals import goal

ROOT = Path(__file__).parents[1]
FIELDS = {field.name: (group, field) for group in GROUPS for field in dataclasses.fields(group)}
NUMBERS = {n: rules(g)[n] for n, (g, _) in FIELDS.items() if rules(g)[n][0] in (int, int | None, float, float | None)}
TEXTS = {n: rules(g)[n] for n, (g, _) in FIELDS.items() if rules(g)[n][0] in (str, tuple[str, ...])}
SWITCHES = {n for n, (g, _) in FIELDS.items() if rules(g)[n][0] in (bool, bool | None)}
# Options that some numbers need.
WITH = {"folds": ("--confirm", "3"), "trial": ("--replay", "none"), "run": ("--replay", "none"),
        "projector_learning_rate": ("--train-projector",),
        "vision_learning_rate": ("--train-vision", "lora")}  # fmt: skip

NEVER_A_NUMBER = ["", " ", "x", "nan", "-inf", "inf", "1e999", "0x10", "1,5", "--", "9" * 5000, "-9" + "9" * 30, "１ x"]
NEVER_A_TEXT = ["", " ", "\t", "a\nb", "a\x1b[31mb", "a\x00b", "\ud800", "\udce9", "\x7f", "a\u2028b", "x" * 5000]


def refusal(*argv: str) -> str:
    """The problems of a command line; "" if it is accepted."""
    try:
        parse(argv)
    except SettingsError as error:
        assert all(len(problem) < 1500 and "\n" not in problem and "\x1b" not in problem for problem in error.problems)
        return "\n".join(error.problems)
    return ""


@pytest.fixture(autouse=True)
def without_a_space(monkeypatch) -> None:
    """Spaces are not the subject here; checking one a thousand times would take minutes."""
    monkeypatch.setattr("tune.config.rules.check_space", lambda settings: [])


def test_these_tests_cover_every_field() -> None:
    assert len(NUMBERS) > 35 and len(TEXTS) > 30
    assert set(NUMBERS) | set(TEXTS) | SWITCHES == set(FIELDS)
    assert all(isinstance(rule, Range) for _, rule in NUMBERS.values())


def test_defaults_satisfy_their_own_rules() -> None:
    assert [broken_rules(group()) for group in GROUPS] == [{}] * len(GROUPS)


@pytest.mark.parametrize("name", NUMBERS)
def test_an_impossible_number_is_refused(name: str) -> None:
    kind, rule = NUMBERS[name]
    beyond = [f"{int(rule.least) - 1}", f"{int(rule.most) + 1}", f"{10**30}"]
    beyond += [str(rule.least)] * rule.above + [str(rule.most)] * rule.below + ["2.5", "1e3"] * (kind is int)
    for text in [*NEVER_A_NUMBER, *beyond]:
        assert f"`{flag(name)}`" in refusal(f"{flag(name)}={text}", *WITH.get(name, ())), text


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_a_range_are_accepted(name: str) -> None:
    kind, rule = NUMBERS[name]
    inside = (rule.least + rule.most) / 2
    ends = [inside if rule.above else rule.least, inside if rule.below else rule.most]
    for end in ends:
        problems = refusal(f"{flag(name)}={int(end) if kind is int else end}", *WITH.get(name, ()))
        assert f"`{flag(name)}` must be a" not in problems, end


@pytest.mark.parametrize("name", TEXTS)
def test_an_impossible_text_is_refused(name: str) -> None:
    for text in NEVER_A_TEXT:
        if name == "lora_exclude_patterns" and not text.strip():
            continue  # nothing is excluded
        assert f"`{flag(name)}`" in refusal(f"{flag(name)}={text}"), repr(text)


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_a_switch_takes_no_value(name: str) -> None:
    for text in ("", "true", "0", "--"):
        assert f"`{flag(name)}` must stand alone" in refusal(f"{flag(name)}={text}")


@pytest.mark.parametrize("name", sorted(set(FIELDS) - SWITCHES))
def test_an_option_without_its_value_is_refused(name: str) -> None:
    for rest in ([], ["--verbose"], ["-h"]):
        if rest != ["-h"]:
            assert f"`{flag(name)}` must be followed by a value" in refusal(flag(name), *rest)


ACCEPTED = [
    ["--metric", "-loss"],
    ["--metric", "auroc,-trainable_params"],
    ["--metric=-train_s"],
    ["--lora-exclude-patterns", ""],
    ["--lora-exclude-patterns", "vision,layers.0.,mlp"],
    ["--time-budget", "90m"],
    ["--time-budget", "1.5h"],
    ["--time-budget", "20"],
    ["--require", "sensitivity>=0.9,auroc >= 0.5"],
    ["--stop-when", "loss<=0.1"],
    ["--name", "良い研究 1"],
    ["--name", "x" * 200],
    ["--mlflow-uri", "http://localhost:5000"],
    ["--mlflow-uri", "postgresql+psycopg2://host/db"],
    ["--mlflow-uri", "databricks"],
    ["--register", "my model.v2"],
    ["--vision-tower", "model.vision_tower.0"],
    ["--storage", "s3://bucket"],
    ["--learning_rate", "1e-3", "--no_class_balanced_loss"],
]


@pytest.mark.parametrize("argv", ACCEPTED, ids=" ".join)
def test_possible_command_lines_are_accepted(argv: list[str]) -> None:
    assert refusal(*argv) == ""


REFUSED = [
    (["--metric", "auroc,auroc"], "--metric"),
    (["--metric", "auroc,-auroc"], "--metric"),
    (["--metric", ","], "--metric"),
    (["--metric", "--loss"], "--metric"),
    (["--require", "auroc>=nan"], "--require"),
    (["--require", "auroc>=inf"], "--require"),
    (["--require", "auroc>=95"], "from 0 to 1"),
    (["--require", "loss<=-1"], "at least 0"),
    (["--require", "auroc>0.5"], "METRIC>=X"),
    (["--require", "auroc>=0.5x"], "--require"),
    (["--require", "auroc>=0.5,auroc>=0.5"], "only once"),
    (["--stop-when", "sensitivity<=nan"], "--stop-when"),
    (["--stop-when", "f2>=0.5"], "--stop-when"),
    (["--time-budget=-1h"], "--time-budget"),
    (["--time-budget", "nan"], "--time-budget"),
    (["--time-budget", "infh"], "--time-budget"),
    (["--time-budget", "1e300h"], "--time-budget"),
    (["--time-budget", "0s"], "--time-budget"),
    (["--time-budget", "h"], "--time-budget"),
    (["--time-budget", "2d"], "--time-budget"),
    (["--lora-exclude-patterns", "visi[on"], "no regular expression"),
    (["--lora-exclude-patterns", "(a+)+$"], "no regular expression"),
    (["--lora-exclude-patterns", ".*"], "no regular expression"),
    (["--lora-target-modules", ","], "--lora-target-modules"),
    (["--lora-target-modules", "q_proj,q_proj"], "only once"),
    (["--lora-target-modules", "q_proj,v proj"], "module name"),
    (["--vision-tower", "vision tower/"], "module name"),
    (["--projector", "a..b"], "module name"),
    (["--name", ".."], "--name"),
    (["--name", "."], "--name"),
    (["--name", "a/b"], "--name"),
    (["--name", "/"], "--name"),
    (["--name", "-x"], "--name"),
    (["--name", "x "], "--name"),
    (["--name", "良" * 100], "--name"),
    (["--name", "x" * 256], "--name"),
    (["--results", "s3://bucket/results"], "no address"),
    (["--results", "x" * 256], "--results"),
    (["--results", "x/" * 2000], "--results"),
    (["--results", "/dev/null"], "--results"),
    (["--results", "/dev/null/x"], "--results"),
    (["--results", "/proc/none/x"], "--results"),
    (["--mlflow-uri", "nonsense"], "--mlflow-uri"),
    (["--mlflow-uri", "://x"], "--mlflow-uri"),
    (["--register", "a/b"], "--register"),
    (["--register", ".."], "--register"),
    (["--register", "a:1"], "--register"),
    (["--report-to", ","], "--report-to"),
    (["--report-to", "mlflow,files"], "--report-to"),
    (["--storage", "s3:///x"], "--storage"),
    (["--storage", "/mnt/x"], "--storage"),
    (["--experiment", "x" * 501], "--experiment"),
    (["--num-phantoms", "1000000000"], "--num-phantoms"),
    (["--seed", "4294967295"], "--seed"),
    (["--resume", ""], "--resume"),
    (["--resume="], "--resume"),
    (["--resume", "/"], "--resume"),
    (["--resume", "/dev/zero"], "--resume"),
    (["--resume", "x" * 300], "--resume"),
    (["--resume", "../" * 2000], "--resume"),
    (["--show", ""], "--show"),
    (["--show", "s3:"], "--show"),
    (["--show", "s3://"], "s3://BUCKET/PREFIX/STUDY"),
    (["--resume", "s3://bucket/.."], "s3://BUCKET/PREFIX/STUDY"),
    (["--resume", "http://host/s"], "s3://BUCKET/PREFIX/STUDY"),
    (["--resume", "s3://key:secret@bucket/s"], "with a key or password"),
    (["--replay", "none", "--resume", "none"], "keep one"),
    (["--trial", "3"], "--replay"),
    (["--run", "3"], "--replay"),
    (["--data", "/dev/zero"], "existing manifest"),
    (["--data", "x/" * 1400], "existing manifest"),
    (["--data", "phantoms/x", "--image-root", "/dev/null"], "must be a folder"),
    (["--model", "/dev"], "config.json"),
    (["--first-points", "/dev/zero"], "--first-points"),
    (["--first-points", "/"], "--first-points"),
    (["--warm-start", "/dev/null"], "--warm-start"),
    (["--x=--"], "'--x=--'"),
    (["--"], "'--'"),
    (["-"], "'-'"),
    (["--=3"], "'--=3'"),
    (["--no-trials"], "'--no-trials'"),
    (["--no-verbose=1"], "stand alone"),
    (["--trials", "3", "4"], "'4'"),
    (["--lora-rr", "8"], "--lora-r?"),
    (["x" * 100_000], "must follow an option"),
    (["--" + "x" * 100_000], "known ones"),
]


@pytest.mark.parametrize(("argv", "word"), REFUSED, ids=lambda value: "".join(value)[:40])
def test_impossible_command_lines_are_refused(argv: list[str], word: str) -> None:
    problems = refusal(*argv)
    assert word in problems and "secret" not in problems


def test_pipes_devices_and_broken_links_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    for option in ("--data", "--val-data", "--first-points", "--image-root", "--warm-start", "--resume", "--model"):
        for name in ("pipe", "dangling", "loop", "model/config.json"):
            more = ["--data", str(tmp_path / "pipe")] if option in ("--val-data", "--image-root") else []
            assert f"`{option}`" in refusal(option, str(tmp_path / name), *more), name
    assert "--model" in refusal("--model", str(tmp_path / "model"))


def test_malformed_first_points_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    for content in (b"", b"{}", b"[1]", b"[[]]", b"null", b"[{]", b"\xff\xfe", b"[" * 100_000, b"[{}" + b" " * 10**7):
        file.write_bytes(content)
        assert "`--first-points`" in refusal("--first-points", str(file)), content[:20]


@pytest.mark.parametrize("value", [2.5, True, "3", None, float("nan"), 10**400, [3], -1])
def test_a_trial_accepts_only_values_of_the_right_type(value: Any) -> None:
    (problem,) = TrialSettings(num_train_epochs=value).problems()
    assert "`num_train_epochs` must be a whole number from 1 to 10,000" in problem


def test_wrong_types_of_other_settings_are_refused() -> None:
    wrong: dict[str, Any] = {
        "learning_rate": "1e-3", "lora_alpha": True, "use_dora": 1, "lora_dropout": float("inf"), "optim": 3,
        "lora_target_modules": ("q_proj", 3), "lora_exclude_patterns": "vision",
        "projector_learning_rate": float("nan"),
    }  # fmt: skip
    problems = TrialSettings(**wrong).problems()
    assert [re.findall("`(\\w+)`", problem)[0] for problem in problems] == [
        field.name for field in dataclasses.fields(TrialSettings) if field.name in wrong
    ]
    assert TrialSettings(lora_alpha=16, weight_decay=0).problems() == []


# ------------------------------------------------------------------------------------------------ the environment


def run(*argv: str, cwd: Path | None = None, command: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The script in an environment of its own."""
    words = [sys.executable, str(ROOT / "tune" / "run.py"), *argv]
    if command:
        words = ["sh", "-c", command + ' && exec "$@"', "sh", *words]
    kept = {"PATH": os.environ["PATH"]}
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=kept | environment, encoding="utf-8")


def test_an_ascii_terminal_gets_escaped_text(tmp_path: Path) -> None:
    ended = run("--show", "研究", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert ended.returncode == 2 and "\\u7814" in ended.stderr and "Traceback" not in ended.stderr
    assert run("--help", PYTHONIOENCODING="ascii").returncode == 0


def test_a_deleted_working_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    ended = run("--trials", "2", cwd=tmp_path / "gone", command='rmdir "$PWD"')
    assert ended.returncode == 2 and "working folder" in ended.stderr and "Traceback" not in ended.stderr


def test_unwritable_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    for argv, cwd in (([], tmp_path), (["--results", "/proc/x"], tmp_path), ([], Path("/proc"))):
        ended = run(*argv, cwd=cwd)
        assert ended.returncode == 2 and "--results" in ended.stderr and "Traceback" not in ended.stderr


def test_errors_of_the_operating_system_become_sentences(monkeypatch, capsys) -> None:
    from tune import run as script

    errors: list[tuple[Exception, str]] = [
        (PermissionError(13, "Permission denied", "/x/m.json"), "'/x/m.json' must be usable, but Permission denied"),
        (OSError(28, "No space left on device"), "a disk must be usable, but No space left on device"),
        (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates"), "'\\ud800'"),
    ]
    for error, words in errors:
        monkeypatch.setattr(script, "parse_all", lambda argv, error=error: (_ for _ in ()).throw(error))
        assert script.main([]) == 2 and words in capsys.readouterr().err
    for error in (OSError("cannot identify image file"), ValueError("a bug")):
        monkeypatch.setattr(script, "parse_all", lambda argv, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            script.main([])


def test_the_cache_of_a_user_without_a_home(monkeypatch, tmp_path: Path) -> None:
    from train_fn.support.cache import cache_folder

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for given, ends in ((str(tmp_path), "vlm-tune"), ("", ".cache/vlm-tune"), ("relative", ".cache/vlm-tune")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert str(cache_folder()).endswith(ends) and cache_folder().is_absolute()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 61_234)  # no entry in the password file
    with pytest.raises(PermissionError, match="XDG_CACHE_HOME"):
        cache_folder()  # the folder belongs to another user
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vlm-tune"


# ------------------------------------------------------------------------------------------------ metrics of the data


def splits_of(train: str, validation: str, positive: str = "", closed: bool = True) -> Splits:
    """One image per letter: B(enign), M(alignant) or N(ormal)."""
    names = {"B": "Benign", "M": "Malignant", "N": "Normal"}
    candidates = tuple(names[letter] for letter in sorted(set(train + validation))) if closed else ()
    label = {name: index for index, name in enumerate(candidates)}
    parts = [
        tuple(Sample(("x.png",), "?", names[c], label.get(names[c], -1)) for c in part) for part in (train, validation)
    ]
    return Splits(*parts, (), closed_set(candidates, positive))


GOALS = [
    ("--require sensitivity>=0.9", "BN", "BN", "", "a positive class (--positive-label, one of Benign, Normal)"),
    ("--stop-when specificity>=0.9", "BN", "BN", "", "a positive class"),
    ("--metric sensitivity", "BN", "BN", "", "a positive class"),
    ("--require sensitivity>=0.9", "BM", "BB", "Malignant", "validation images whose answer is 'Malignant'"),
    ("--metric accuracy,specificity", "BM", "MM", "Malignant", "validation images whose answer is not 'Malignant'"),
    ("--stop-when auroc>=0.9", "BM", "BB", "Malignant", "validation images of two answers"),
    ("--require sensitivity>=0.9,auroc>=0.5,loss<=1", "BM", "BM", "Malignant", ""),
    ("--stop-when accuracy>=0.9", "BM", "BB", "", ""),
    ("--metric loss", "BM", "BB", "", ""),
]


@pytest.mark.parametrize(("options", "train", "validation", "positive", "words"), GOALS)
def test_metrics_that_the_data_cannot_give_are_refused(
    options: str, train: str, validation: str, positive: str, words: str
) -> None:
    from tune.plan.checks import check_goals

    settings = parse(options.split())
    goals = tuple(map(goal, settings.study.metric))
    problems = check_goals(settings, goals, splits_of(train, validation, positive))
    assert len(problems) == bool(words)
    assert all(words in problem and options.split()[0] in problem for problem in problems)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ""),  # the default's 16 images, of 8: as few as there are
        ("--gradient-accumulation-steps 4", ""),
        (
            "--gradient-accumulation-steps 5",
            "must give a global batch of at most the 8 training",
        ),
        ("--per-device-train-batch-size 2 --gradient-accumulation-steps 65536", "but it is 131,072: lower one"),
    ],
)
def test_a_global_batch_above_the_training_images_is_refused(options: str, words: str) -> None:
    from tune.plan.checks import check_global_batch

    problems = check_global_batch(parse(options.split()), splits_of("BMBMBMBM", "BM"))
    assert len(problems) == bool(words) and all(words in problem for problem in problems)


def test_open_answers_have_no_metric_of_classes() -> None:
    from tune.plan.checks import check_goals

    settings = parse(["--metric", "loss,accuracy", "--require", "auroc>=0.5,loss<=1", "--stop-when", "macro_f1>=0.5"])
    problems = check_goals(settings, tuple(map(goal, settings.study.metric)), splits_of("BM", "BM", closed=False))
    assert len(problems) == 3 and "accuracy" in problems[0] and "auroc" in problems[1] and "macro_f1" in problems[2]


def test_a_metric_of_ones_own_that_is_gone_is_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tune.config.paths import SettingsError
    from tune.plan.prepare import prepare

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as refused:
        prepare(parse(["--num-phantoms", "30", "--metric", "gone.py:score"]), lambda text: None)
    (problem,) = refused.value.problems
    assert problem.startswith("`--metric` a metric of one's own must be in an existing Python file")


def test_the_message_about_open_answers_names_the_limit_that_was_given() -> None:
    from tune.plan.checks import check_goals

    settings = parse(["--metric", "accuracy", "--max-answers", "30"])
    (problem,) = check_goals(settings, tuple(map(goal, settings.study.metric)), splits_of("BM", "BM", closed=False))
    assert "at most --max-answers 30 answers" in problem
