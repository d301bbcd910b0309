"""Search spaces of the user's own: every fault in one is reported before Ray starts."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from train_fn.settings import TrialSettings
from tune.config.base_shape import BaseShape, read_base_shape
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.config.settings import SAMPLERS, Settings
from tune.config.space import SHIPPED, SpaceError, load_space, searched_settings, space_hash
from tune.config.space_check import corners, problems_of_space
from tune.plan.prepare import Study, prepare, resume
from tune.records.plan import FORMAT, checksum

FINE = "GUIDE = {'r': 8}\ndef space(trial): return {'lora_r': trial.suggest_categorical('r', [4, 8])}\n"


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse(argv)
    return caught.value.problems


def asked(folder: Path, text: str, **study: Any) -> list[str]:
    """The problems of a space, checked in this process."""
    file = folder / "mine.py"
    file.write_text(text)
    settings = parse([])
    return problems_of_space(
        dataclasses.replace(settings, study=dataclasses.replace(settings.study, space=str(file), **study))
    )


def returning(value: str, guide: str = "{}") -> str:
    return f"import random, numpy as np\nGUIDE = {guide}\ndef space(trial):\n    return {value}\n"


def asking(call: str, guide: str = "{}") -> str:
    return f"import numpy as np\nGUIDE = {guide}\ndef space(trial):\n    x = trial.{call}\n    return {{}}\n"


RARE = "GUIDE = {}\ndef space(trial):\n    x = [trial.suggest_categorical(n, 'a b c'.split()) for n in 'abcd']\n"
REFUSED = {
    # Optuna's rules
    "tuples as choices": (asking("suggest_categorical('x', [('a', 'b'), ('c',)])"), "'x' among numbers, texts"),
    "lists as choices": (asking("suggest_categorical('x', [['a'], ['c']])"), "'x' among numbers, texts"),
    "NumPy's integers as choices": (asking("suggest_categorical('x', [np.int64(4)])"), "'x' among numbers"),
    "a set as choices, whose order changes": (asking("suggest_categorical('x', {'a', 'b'})"), "a list or tuple of"),
    "a text as choices": (asking("suggest_categorical('x', 'q_proj')"), "a list or tuple of choices"),
    "the same choice twice": (asking("suggest_categorical('x', [1, 2, True])"), "'x' among different choices"),
    "an error at one point of 81": (RARE + "    return {'lora_r': 8 // (x != ['b', 'c', 'b', 'a'])}\n", "ZeroDivision"),
    "other choices at one point of 81": (
        RARE + "    trial.suggest_categorical('r', [4] if x == ['b', 'c', 'b', 'a'] else [8])\n    return {}\n",
        "dynamic value space",
    ),
    "an error in one of 40 branches": (
        "GUIDE = {}\ndef space(trial):\n    trial.suggest_float('y', 0, 1)\n"
        "    return {'lora_r': 8 // (trial.suggest_int('x', 1, 40) != 17)}\n",
        "ZeroDivisionError",
    ),
    "whole numbers that no float holds": (asking("suggest_int('x', 0, 2**60)"), "whole numbers from -9,007"),
    "no choices": (asking("suggest_categorical('x', [])"), "'x' as Optuna allows"),
    "NaN among choices": (asking("suggest_categorical('x', [1.0, float('nan')])"), "finite numbers"),
    "control characters in a choice": (asking("suggest_categorical('x', ['a', 'b\\x1b[2J'])"), "control characters"),
    "half a character in a choice": (asking("suggest_categorical('x', ['a', '\\ud800'])"), "control characters"),
    "log range from 0": (asking("suggest_float('x', 0.0, 0.1, log=True)"), "`low > 0` must hold"),
    "log range of whole numbers from 0": (asking("suggest_int('x', 0, 8, log=True)"), "`low >= 1` must hold"),
    "low above high": (asking("suggest_int('x', 8, 4)"), "`low <= high` must hold"),
    "step 0": (asking("suggest_float('x', 0, 1, step=0)"), "`step > 0` must hold"),
    "step in a log range": (asking("suggest_float('x', 0.1, 1, step=0.1, log=True)"), "'x' as Optuna allows"),
    "NaN as an end": (asking("suggest_float('x', float('nan'), 1)"), "'x'"),
    "range without an end": (asking("suggest_float('x', 0, float('inf'))"), "finite numbers"),
    "whole numbers without an end": (asking("suggest_int('x', 0, float('inf'))"), "'x' as Optuna allows"),
    "texts as ends": (asking("suggest_float('x', 'a', 'b')"), "'x' as Optuna allows"),
    "other choices under one name": (
        "GUIDE = {}\ndef space(trial):\n    dora = trial.suggest_categorical('dora', [False, True])\n"
        "    return {'lora_r': trial.suggest_categorical('r', [4, 8] if dora else [16, 32])}\n",
        "dynamic value space",
    ),
    "a second range under one name": (
        asking("suggest_float('x', 0, 1)\n    trial.suggest_float('x', 0, 2)"),
        "ask under a second name",
    ),
    "a second kind under one name": (
        asking("suggest_float('x', 0, 1)\n    trial.suggest_int('x', 0, 2)"),
        "'x' as Optuna allows",
    ),
    # names
    "a slash in a name": (asking("suggest_float('a/b', 0, 1)"), "'a/b'"),
    "an empty name": (asking("suggest_float('', 0, 1)"), "names"),
    "a name that is none": (asking("suggest_float(3, 0, 1)"), "asks for 3"),
    "a name of 300 characters": (asking("suggest_int('x' * 300, 0, 1)"), "at most 250"),
    # GUIDE
    "GUIDE outside a range": (asking("suggest_float('x', 0, 1)", "{'x': 2}"), "GUIDE: x must be between 0 and 1"),
    "GUIDE outside the choices": (asking("suggest_categorical('x', [4, 8])", "{'x': 5}"), "x must be one of 4, 8"),
    "GUIDE between steps": (asking("suggest_int('x', 0, 8, step=4)", "{'x': 3}"), "in steps of 4, but got 3"),
    "GUIDE of another type": (asking("suggest_float('x', 0, 1)", "{'x': 'a'}"), "GUIDE: x must be between"),
    "True for a number in GUIDE": (asking("suggest_int('x', 0, 8)", "{'x': True}"), "x must be between 0 and 8, but"),
    "GUIDE of NumPy": (asking("suggest_int('x', 0, 8)", "{'x': np.int64(4)}"), "GUIDE must hold plain values"),
    "GUIDE with a name that is none": (asking("suggest_int('x', 0, 8)", "{3: 4}"), "GUIDE must have texts as names"),
    "GUIDE with a stray name": (asking("suggest_int('x', 0, 8)", "{'y': 4}"), "has y"),
    # what is returned
    "nothing": (returning("None"), "must return a dict"),
    "a list": (returning("[('lora_r', 8)]"), "must return a dict"),
    "an unknown setting": (returning("{'lora_rank': 8}"), "'lora_rank'"),
    "a setting without a name": (returning("{None: 8}"), "unknown setting None"),
    "epochs of 2.5": (returning("{'num_train_epochs': 2.5}"), "`num_train_epochs` must be a whole number"),
    "a whole float": (returning("{'num_train_epochs': 3.0}"), "`num_train_epochs` must be a whole number"),
    "a rank as text": (returning("{'lora_r': '8'}"), "`lora_r` must be a whole number"),
    "True as a rank": (returning("{'lora_r': True}"), "`lora_r` must be a whole number"),
    "1 as a switch": (returning("{'use_dora': 1}"), "`use_dora` must be true or false"),
    "NumPy's integer": (returning("{'lora_r': np.int64(8)}"), "`lora_r` must be a whole number"),
    "NumPy's array": (returning("{'lora_r': np.arange(3)}"), "`lora_r` must be a whole number"),
    "NaN": (returning("{'learning_rate': float('nan')}"), "`learning_rate` must be a number"),
    "a huge rank": (returning("{'lora_r': 10**9}"), "from 1 to 16,384"),
    "a number that cannot be printed": (returning("{'lora_r': 10**6000}"), "`--space`"),
    "modules as one text": (returning("{'lora_target_modules': 'q_proj'}"), "must be a list of texts"),
    "no modules": (returning("{'lora_target_modules': []}"), "must name a layer"),
    "a regular expression": (returning("{'lora_exclude_patterns': ['(a+)+$']}"), "no regular expression"),
    "nothing to train": (returning("{'use_lora': False}"), "leaves nothing to train"),
    "other settings each time": (returning("{'learning_rate': random.random() / 100 + 1e-4}"), "the same settings for"),
    # what is raised
    "an error": (returning("1 / 0"), "raised ZeroDivisionError"),
    "an error at one end": (
        "GUIDE = {}\ndef space(trial): return {'lora_r': 64 // (8 - trial.suggest_int('x', 1, 8))}\n",
        "raised ZeroDivisionError",
    ),
    "an error in the middle": (
        "GUIDE = {}\ndef space(trial):\n    x = trial.suggest_int('x', 1, 4)\n    return {'lora_r': 8 // (x != 2)}\n",
        "raised ZeroDivisionError",
    ),
    "a failed look-up": (returning("{'lora_r': GUIDE['r']}"), "raised KeyError"),
    "an exit": (returning("exit(0)"), "raised SystemExit"),
    "an exit of sys": (returning("__import__('sys').exit(0)"), "raised SystemExit"),
    "recursion": (returning("space(trial)"), "raised RecursionError"),
    "a method that is none": (asking("suggest_choice('x', [1])"), "raised AttributeError"),
    "a wrong call": (asking("suggest_float('x')"), "'x' as Optuna allows"),
    # the file
    "an exit of the file": ("import sys; sys.exit(0)", "raised SystemExit"),
    "an error of the file": ("raise OSError('no')", "raised OSError"),
    "no Python": ("syntax(", "raised SyntaxError"),
    "NUL": ("GUIDE = {}\0", "raised"),
    "no space": ("GUIDE = {}", "must define"),
    "a GUIDE that is no dict": ("GUIDE = 3\ndef space(trial): return {}", "must define"),
    "a space that is no function": ("GUIDE = {}\nspace = 3", "must define"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_an_unusable_space_is_refused(tmp_path: Path, text: str, words: str) -> None:
    problems = asked(tmp_path, text)
    assert words in "\n".join(problems) and all("`--space`" in problem and "\n" not in problem for problem in problems)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "gp"])  # which loads torch
def test_a_usable_space_is_accepted(tmp_path: Path, sampler: str) -> None:
    text = (
        "import functools, warnings\nGUIDE = {'r': 8, 'modules': 'q_proj,v_proj'}\n"
        "def make(trial, alpha):\n"
        "    warnings.warn('a note of its own')\n"
        "    print('and a line')\n"
        "    modules = trial.suggest_categorical('modules', ['q_proj,v_proj', 'q_proj', None])\n"
        "    found = {'lora_r': trial.suggest_categorical(name='r', choices=[4, 8]), 'lora_alpha': alpha}\n"
        "    if modules: found['lora_target_modules'] = modules.split(',')\n"
        "    if trial.suggest_categorical('train_projector', [False, True]):\n"
        "        found['projector_learning_rate'] = trial.suggest_float('rate', 1e-5, 1e-3, log=True)\n"
        "    found['num_train_epochs'] = trial.suggest_int('epochs', 1, 3)\n"
        "    return found\n"
        "space = functools.partial(make, alpha=16)\n"
    )
    assert asked(tmp_path, text, sampler=sampler) == []


@pytest.mark.parametrize("trials", [1, 3, 8])
def test_a_space_may_choose_by_the_trials_number(tmp_path: Path, trials: int) -> None:
    text = f"GUIDE = {{}}\ndef space(trial): return {{'lora_r': list(range(1, {trials + 1}))[trial.number]}}\n"
    assert asked(tmp_path, text, trials=trials) == []


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("[a-z]*.py")))
def test_shipped_spaces_have_three_different_corners(name: str) -> None:
    settings = parse(["--space", name])
    assert len({json.dumps(dataclasses.asdict(trial)) for trial in corners(settings)}) == 3


# ------------------------------------------------------------------------------------------------ what a space may know


def shape_of(folder: Path, **config: Any) -> BaseShape:
    (folder / "config.json").write_text(json.dumps(config))
    return read_base_shape(str(folder))


def test_width_and_type_of_the_base_are_those_of_its_language_model(tmp_path: Path) -> None:
    nested = shape_of(tmp_path, model_type="llava", text_config={"model_type": "llama", "hidden_size": 2048})
    assert (nested.model_type, nested.hidden_size) == ("llama", 2048)
    flat = shape_of(tmp_path, model_type="hulumed_qwen2", hidden_size=3584, vision_encoder_config={"hidden_size": 1152})
    assert (flat.model_type, flat.hidden_size) == ("hulumed_qwen2", 3584)
    mixed = shape_of(tmp_path, model_type="internvl_chat", llm_config={"model_type": "qwen2"}, hidden_size=896)
    assert (mixed.model_type, mixed.hidden_size) == ("qwen2", 896)
    silent = shape_of(tmp_path, model_type="llava", text_config={"model_type": "llama"})
    assert (silent.model_type, silent.hidden_size) == ("llama", 4096)  # the default of transformers' LlamaConfig
    for width in ("wide", 0, True, None, [3]):
        assert shape_of(tmp_path, model_type="x", hidden_size=width) == BaseShape.of("x")
    assert read_base_shape("OWNER/not-here") == BaseShape.of()
    assert read_base_shape("nano").model_type == "qwen3"


def test_the_usual_rate_is_that_of_the_published_fit() -> None:
    for model_type, width, rate in (
        ("llama", 2000, 5e-4), ("qwen3", 2000, 5e-4), ("llama", 8192, 1.66e-4), ("qwen2", 8192, 4.48e-4),
        ("llama", 4096, 2.86e-4), ("mistral", 4096, 4.73e-4), ("qwen3", 128, 5.27e-4), ("qwen3", 1024, 5.27e-4),
    ):  # fmt: skip
        assert BaseShape.of(model_type, width).learning_rate == pytest.approx(rate, rel=2e-3)


@pytest.mark.parametrize("name", ["lora", "qlora", "vision", "schedule"])
@pytest.mark.parametrize("width", [64, 2048, 4096, 8192, 20_000])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_ranges_follow_the_base_and_hold_the_guide(name: str, width: int, kind: str) -> None:
    settings = dataclasses.replace(parse(["--space", name]), base=BaseShape.of(kind, width))
    assert problems_of_space(settings) == []
    rates = [trial.learning_rate for trial in corners(settings)]
    assert rates[0] == 2e-4 and rates[1] <= rates[0] < settings.base.learning_rate * 4 <= rates[2]


@pytest.mark.parametrize("name", ["lora", "qlora", "vision", "schedule", "wide"])
@pytest.mark.parametrize(
    ("options", "batches"),
    [("", {4, 8, 16, 32}), ("--workers-per-trial 2", {4, 8, 16, 32}), ("--workers-per-trial 8", {8, 16, 32}),
     ("--workers-per-trial 16", {16, 32}), ("--per-device-train-batch-size 4", {4, 8, 16, 32}),
     ("--per-device-train-batch-size 16", {16, 32, 128}), ("--gradient-accumulation-steps 5", {10}),
     ("--workers-per-trial 3 --gradient-accumulation-steps 12", {24})],
)  # fmt: skip
def test_the_global_batches_are_those_that_the_workers_can_share(name: str, options: str, batches: set[int]) -> None:
    """16 micro-batches of 16 are the guide's 8 steps, which stay one of the choices."""
    settings = parse(["--space", name, *options.split()])
    space, _ = load_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [searched_settings(settings, space, study.ask())[0] for _ in range(60)]
    found = {point.global_batch_size for point in points}
    assert found <= batches if name in ("wide", "schedule") else found == batches


def test_a_space_works_outside_a_study() -> None:
    """As in a benchmark: with Optuna's own trials, which know nothing of the base."""
    for name in ("lora", "qlora", "vision", "schedule", "wide"):
        space, guide = load_space(name)
        settings = TrialSettings.from_dict(space(optuna.trial.FixedTrial(guide)))
        assert (settings.lora_r, settings.lora_alpha, settings.learning_rate) == (64, 128, 2e-4)
        assert (settings.global_batch_size, settings.num_train_epochs, settings.train_projector) == (16, 3, False)
        TrialSettings.from_dict(space(optuna.create_study().ask()))


def test_a_space_may_go_on_from_a_shipped_one_and_its_hash_follows_that(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from search_spaces import lora\nGUIDE = lora.GUIDE\n"
        "def space(trial): return lora.space(trial) | {'use_dora': trial.suggest_categorical('d', [False, True])}\n"
    )
    assert parse(["--space", str(tmp_path / "mine.py")])
    (tmp_path / "through.py").write_text(
        "from search_spaces import wide, vision\nGUIDE, space = wide.GUIDE, wide.space\n"
    )
    own = [str(tmp_path / "mine.py"), str(tmp_path / "through.py")]  # the second one uses lora through vision
    before = {name: space_hash(name) for name in (*own, "vision", "wide")}
    for name in ("lora", "vision", "wide"):
        (tmp_path / f"{name}.py").write_bytes((SHIPPED / f"{name}.py").read_bytes() + b"#" * (name == "lora"))
    monkeypatch.setattr("tune.config.space.SHIPPED", tmp_path)
    assert [space_hash(name) != digest for name, digest in before.items()] == [True, True, True, False]


APART = {
    "os._exit": (returning("__import__('os')._exit(0)"), "ended the process"),
    "os._exit of the file": ("import os\nos._exit(0)", "ended the process"),
    "a signal": (returning("__import__('os').kill(__import__('os').getpid(), 9)"), "ended the process"),
    "a loop": (returning("[1 for _ in iter(int, 1)]"), "within 3 s"),
    "a loop of the file": ("while True: pass", "within 3 s"),
    "a question": (returning("{'lora_r': int(input())}"), "raised EOFError"),
}


@pytest.mark.parametrize(("text", "words"), APART.values(), ids=APART)
def test_a_space_that_ends_or_blocks_its_process_is_refused(tmp_path: Path, monkeypatch, text: str, words: str) -> None:
    if "within" in words:
        monkeypatch.setattr("tune.config.space_check.TIMEOUT_S", 3.0)
    (tmp_path / "mine.py").write_text(text)
    (problem,) = problems_of("--space", str(tmp_path / "mine.py"))
    assert words in problem


def test_output_of_a_space_does_not_hide_its_problems(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('[]')\n" + returning("{'lora_r': print('{}') or 0}"))
    problems = problems_of("--space", str(tmp_path / "mine.py"), "--trials", "0")
    assert ["--trials" in problem for problem in problems] == [True, False] and "`lora_r`" in problems[1]


def test_files_that_are_no_spaces_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    os.symlink("/dev/zero", tmp_path / "zero.py")
    os.symlink("nowhere.py", tmp_path / "dangling.py")
    (tmp_path / "large.py").write_bytes(b"#" * 10_000_001)
    for name in ("pipe.py", "folder.py", "zero.py", "dangling.py", "none.py", "large.py"):
        assert "`--space` must" in problems_of("--space", str(tmp_path / name))[0]
    for name in ("os", "lora.x", "../lora", "__init__", "x" * 300, "test_spaces"):
        assert "`--space`" in problems_of("--space", name)[0]


def test_first_points_outside_the_ranges_are_refused(tmp_path: Path) -> None:
    points = [
        {"lora_r": 16},
        {"lora_r": 5, "learning_rate": 1.0},
        {"lora_rank": 8},
        {"lora_r": [8]},
        {"lora_r": None},
    ]
    (tmp_path / "points.json").write_text(json.dumps(points))
    text = "\n".join(problems_of("--first-points", str(tmp_path / "points.json")))
    assert "point 0" not in text and "point 1: lora_r must be one of" in text and "point 1: learning_rate" in text
    assert "point 3: lora_r" in text and "point 4: lora_r" in text
    (tmp_path / "points.json").write_text(json.dumps([{"lora_r": 16}, {"lora_alpha_ratio": 4}]))
    (problem,) = problems_of("--first-points", str(tmp_path / "points.json"))
    assert "point 1 must name what the space asks for, but has lora_alpha_ratio" in problem
    assert parse(["--search-alpha", "--first-points", str(tmp_path / "points.json")])


def test_an_error_of_optunas_storage_is_not_blamed_on_the_space(tmp_path: Path) -> None:
    class Trial:
        def suggest_categorical(self, name: str, choices: Any) -> None:
            raise RuntimeError("database is locked")

    (tmp_path / "mine.py").write_text(FINE)
    space, _ = load_space(str(tmp_path / "mine.py"))
    with pytest.raises(RuntimeError, match="locked"):
        searched_settings(parse([]), space, Trial())


def test_errors_and_loops_of_a_space_during_a_study_become_space_errors() -> None:
    """The searcher catches SpaceError and ends the search."""
    from tune.search.points import time_limit

    def fails(trial: Any) -> dict[str, Any]:
        raise SystemExit(0)

    with pytest.raises(SpaceError, match="raised SystemExit"):
        searched_settings(parse([]), fails, None)

    def loops(trial: Any) -> dict[str, Any]:
        while True:
            time.sleep(0.01)

    with pytest.raises(SpaceError, match=r"within 0.2 s"), time_limit(0.2):
        searched_settings(parse([]), loops, None)


# ------------------------------------------------------------------------------------------------ order of trust


@pytest.fixture
def begun(tmp_path: Path, monkeypatch) -> Study:
    """A study with a space of its own, begun here; its first points are a file."""
    from tune.study import write_plan

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(FINE + "open('ran', 'a').write('x')\n")
    (tmp_path / "points.json").write_text('[{"r": 4}]')
    argv = ["--space", "mine.py", "--num-phantoms", "30", "--name", "s", "--first-points", "points.json"]
    study = prepare(parse(argv), lambda text: None)
    write_plan(study)
    study.lock._file.close()
    load_anew()
    (tmp_path / "ran").unlink()
    return study


def load_anew() -> None:
    """Forget the sources that were read, as in another process."""
    from tune.config.space import read_source, run_source

    read_source.cache_clear()
    run_source.cache_clear()


def resumed(*argv: str) -> Settings:
    load_anew()
    return parse(["--resume", "s", *argv])


def test_a_study_of_this_user_goes_on_without_its_points_file(begun: Study, tmp_path: Path) -> None:
    (tmp_path / "points.json").unlink()
    settings = resumed()
    assert settings.first_points == ({"r": 4},) and settings.study.space == str(tmp_path / "mine.py")
    again = resume(settings, print)
    assert again.plan["first_points"] == ({"r": 4},)


def test_a_changed_space_does_not_run(begun: Study, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("open('ran', 'a').write('x')\n" + FINE)
    for argv in ([], ["--space", "mine.py"]):
        load_anew()
        (problem,) = problems_of("--resume", "s", *argv)
        assert "must have the content that the study was begun with" in problem
    (tmp_path / "mine.py").unlink()
    load_anew()
    assert "must be an existing Python file" in problems_of("--replay", "s")[0]
    assert not (tmp_path / "ran").exists()


def test_a_strangers_space_runs_only_when_the_command_line_names_it(begun: Study, tmp_path: Path, monkeypatch) -> None:
    """The stranger's plan names the hash of the stranger's space."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    for command in ("--resume", "--replay"):
        load_anew()
        (problem,) = problems_of(command, "s")
        assert "must be given" in problem and f"--space {tmp_path / 'mine.py'}" in problem
    assert not (tmp_path / "ran").exists()
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_bytes((tmp_path / "mine.py").read_bytes())
    (tmp_path / "mine.py").unlink()
    settings = resumed("--space", "elsewhere.py")
    assert settings.study.space == str(elsewhere) and (tmp_path / "ran").exists()
    resume(settings, print).lock._file.close()
    assert parse(["--resume", "s", "--space", "elsewhere.py"])
    assert "existing Python file" in problems_of("--resume", "s")[0]  # plan.json is written when the study starts


def test_a_compiled_file_beside_a_space_is_not_run(begun: Study, tmp_path: Path) -> None:
    import importlib.util
    import py_compile

    (tmp_path / "evil.py").write_text("raise AssertionError('a compiled file ran')")
    place = importlib.util.cache_from_source(str(tmp_path / "mine.py"))
    py_compile.compile(
        str(tmp_path / "evil.py"), place, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    assert resumed().study.name == "s"


def test_another_space_is_refused_on_resume(begun: Study) -> None:
    assert "must have the content" in problems_of("--resume", "s", "--space", "lora")[0]


# ------------------------------------------------------------------------------------------------ plan.json


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """plan.json of a study with first points."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "points.json").write_text('[{"lora_r": 4}]')
    argv = ["--num-phantoms", "30", "--results", str(folder), "--first-points", str(folder / "points.json")]
    study = prepare(parse(argv), lambda text: None)
    study.lock._file.close()
    return json.loads(json.dumps(study.plan | {"splits_hash": ""}))


def sealed(plan: dict[str, Any]) -> bytes:
    """A plan as it is written, with its checksum."""
    plain = plan | {"format": FORMAT}
    return json.dumps(plain | {"checksum": checksum(plain)}).encode()


def with_change(plan: bytes, change: Any) -> bytes:
    """A plan that somebody has edited, checksum included."""
    edited = json.loads(plan)
    del edited["checksum"]
    change(edited)
    return sealed(edited)


PLANS = {
    "empty": lambda plan: b"",
    "cut": lambda plan: plan[: len(plan) // 2],
    "zeros": lambda plan: bytes(len(plan)),
    "no UTF-8": lambda plan: b"\xff" + plan,
    "a list": lambda plan: b"[1]",
    "deep": lambda plan: b"[" * 100_000,
    "without settings": lambda plan: with_change(plan, lambda p: p.pop("settings")),
    "settings as text": lambda plan: with_change(plan, lambda p: p.update(settings="x")),
    "a part as a list": lambda plan: with_change(plan, lambda p: p["settings"].update(study=[])),
    "a part missing": lambda plan: with_change(plan, lambda p: p["settings"].pop("data")),
    "trials as text": lambda plan: with_change(plan, lambda p: p["settings"]["study"].update(trials="20")),
    "epochs of 2.5": lambda plan: with_change(plan, lambda p: p["settings"]["trial"].update(num_train_epochs=2.5)),
    "space as a number": lambda plan: with_change(plan, lambda p: p["settings"]["study"].update(space=3)),
    "metric as an object": lambda plan: with_change(plan, lambda p: p["settings"]["study"].update(metric={})),
    "an unknown setting": lambda plan: with_change(plan, lambda p: p["settings"]["model"].update(rank=3)),
    "a base without its width": lambda plan: with_change(plan, lambda p: p["base"].pop("hidden_size")),
    "a base as text": lambda plan: with_change(plan, lambda p: p.update(base="qwen3")),
    "a rate of 0": lambda plan: with_change(plan, lambda p: p["base"].update(learning_rate=0.0)),
    "pinned as text": lambda plan: with_change(plan, lambda p: p["settings"].update(pinned="lora_r")),
    "pinned nonsense": lambda plan: with_change(plan, lambda p: p["settings"].update(pinned=["x", {}])),
    "points as text": lambda plan: with_change(plan, lambda p: p.update(first_points="x")),
    "a point as a number": lambda plan: with_change(plan, lambda p: p.update(first_points=[3])),
}


@pytest.mark.parametrize("damage", PLANS.values(), ids=PLANS)
def test_a_damaged_plan_is_refused(plan: dict[str, Any], tmp_path: Path, damage: Any) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "plan.json").write_bytes(sealed(plan))
    assert parse(["--resume", "s", "--results", str(tmp_path)]).study.trials == 20  # as it is, it is taken
    (tmp_path / "s" / "plan.json").write_bytes(damage(sealed(plan)))
    for command in ("--resume", "--replay"):
        problems = problems_of(command, "s", "--results", str(tmp_path))
        assert all("plan.json" in problem and "\n" not in problem for problem in problems)


def test_an_older_plan_gets_newer_settings_by_default(plan: dict[str, Any], tmp_path: Path) -> None:
    older = json.loads(json.dumps(plan))
    del (
        older["first_points"],
        older["base"],
        older["family"],
        older["tasks"],
        older["settings"]["study"]["lanes_per_gpu"],
        older["settings"]["trial"]["torch_compile"],
    )
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "plan.json").write_text(json.dumps(older))
    settings = parse(["--resume", "s", "--results", str(tmp_path)])
    assert settings.study.lanes_per_gpu == 1 and settings.trial.torch_compile is None
    assert settings.first_points == ({"lora_r": 4},)  # from the file, as then
