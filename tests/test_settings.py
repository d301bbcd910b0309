"""The command line: what it accepts and refuses, its help, and that neither loads a heavy library."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train_fn.settings import TrialSettings
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.config.settings import BASIC, GROUPS, flag
from tune.config.space import load_space, searched_settings
from tune.config.space_check import check_space, corners, make_corner
from tune.config.spelling import ADVICE, SAME
from tune.run import main

ROOT = Path(__file__).parents[1]
GUIDE_VALUES = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": None,
    "gradient_accumulation_steps": 8,
    "learning_rate": 2e-4,
    "warmup_ratio": 0.03,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "lora_r": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "train_projector": False,
    "zero_stage": 2,
}


def words(line: str) -> list[str]:
    return line.split()


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse(argv)
    return caught.value.problems


def test_defaults_are_the_guides() -> None:
    settings = parse([])
    assert {name: getattr(settings.trial, name) for name in GUIDE_VALUES} == GUIDE_VALUES
    assert settings.study.trials == 20
    assert settings.trial.global_batch_size == 16


def help_text(option: str) -> str:
    script = [sys.executable, ROOT / "tune" / "run.py", option]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout


def test_help_all_shows_every_option_in_80_columns() -> None:
    shown = help_text("--help-all")
    fields = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert len(fields) > 35 and len(set(fields)) == len(fields), "two groups share a field name, hence a flag"
    assert re.findall(r"^  (--[\w-]+)", shown, re.MULTILINE) == [flag(name) for name in fields]
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_help_shows_the_basic_options_and_names_help_all() -> None:
    shown = help_text("--help")
    assert set(re.findall(r"^  (--[\w-]+)", shown, re.MULTILINE)) == set(map(flag, BASIC))
    assert 12 <= len(BASIC) <= 18 and "--help-all" in shown and help_text("-h") == shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_values_reach_their_fields() -> None:
    settings = parse(
        words(
            "--trials 3 --learning-rate 1e-3 --lora-target-modules q_proj,v_proj --train-projector "
            "--no-class-balanced-loss --projector-learning-rate 5e-5 --dtype bfloat16"
        )
    )
    assert settings.study.trials == 3
    assert settings.trial.lora_target_modules == ("q_proj", "v_proj")
    assert settings.trial.train_projector is True
    assert settings.trial.class_balanced_loss is False
    assert settings.trial.projector_learning_rate == 5e-5
    assert settings.model.dtype == "bfloat16"
    assert set(settings.pinned) == {
        "learning_rate", "lora_target_modules", "train_projector", "class_balanced_loss", "projector_learning_rate",
    }  # fmt: skip


def test_the_guides_spelling_is_understood() -> None:
    trial = parse(words("--lora_r 8 --learning_rate=1e-3 --lora_target_modules q_proj --data phantoms")).trial
    assert (trial.lora_r, trial.learning_rate, trial.lora_target_modules) == (8, 1e-3, ("q_proj",))


def test_all_problems_are_reported_at_once() -> None:
    problems = problems_of(
        *words(
            "--trials 0 --lora-rr 8 --learning-rate abc --metric foo --data nowhere.json --val-fraction 2 "
            "--lora-dropout 1.5 --model nowhere --lr-scheduler-type sine stray"
        )
    )
    text = "\n".join(problems)
    for word in (
        "--trials", "did you mean --lora-r?", "'abc'", "'foo'", "nowhere.json", "--val-fraction", "--lora-dropout",
        "--model", "sine", "'stray'",
    ):  # fmt: skip
        assert word in text
    assert len(problems) == 10


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("--lr 1e-4", "give --learning-rate"),
        ("--lr=1e-4", "give --learning-rate"),
        ("--batch-size 8", "--gradient-accumulation-steps N gives a global batch of 2 x N images"),
        ("--per_device_batch_size 8", "a global batch of 2 x N images"),
        ("--epochs 3", "give --num-train-epochs"),
        ("--rank 8", "give --lora-r"),
        ("--output-dir x", "give --results"),
        ("--output_dir x", "give --results"),
        ("--num-trials 3", "give --trials"),
        ("--n_trials 3", "give --trials"),
        ("--model_name_or_path x", "give --model"),
        ("--load_in_4bit", "give --use-qlora"),
        ("--warmup_steps 10", "give --warmup-ratio"),
        ("--eval_strategy epoch", "each epoch is evaluated"),
        ("--metric_for_best_model auroc", "give --metric"),
        ("--num_gpus 2", "--workers-per-trial for the workers of one trial, --lanes for trials side by side"),
        ("--trails 3", "did you mean --trials?"),
        ("--Learning-Rate 1", "did you mean --learning-rate?"),
        ("--learning 1", "did you mean --learning-rate or --projector-learning-rate or "),
        ("-trials 3", "did you mean --trials?"),
        ("\N{EM DASH}trials 3", "did you mean --trials?"),
        ("--zzz 3", "see --help-all"),
        ("resume", "did you mean --resume?"),
        ("--lora-target-modules q_proj v_proj", "give --lora-target-modules its values with commas"),
        ("--bf16 true", "leave the value out"),
    ],
)
def test_a_wrong_spelling_gets_the_right_hint(words: str, fix: str) -> None:
    (problem,) = problems_of(*words.split())
    assert fix in problem


def test_the_names_of_other_tools_lead_to_settings() -> None:
    settings = {field.name for group in GROUPS for field in dataclasses.fields(group)}
    others = [name for names in SAME.values() for name in names] + list(ADVICE)
    assert len(others) > 200 and len(set(others)) == len(others) and SAME.keys() <= settings
    assert not settings & set(others), "a setting of that name exists"
    named = {flag for text in ADVICE.values() for flag in re.findall(r"--[a-z-]+", text)}
    assert named <= set(map(flag, settings))


@pytest.mark.parametrize(("command", "listed"), [("--trials 0", 1), ("--lr 1 --trials 0", 2), ("--resume s --lr 1", 2)])
def test_a_wrong_option_hides_no_problem_of_the_data(tmp_path, monkeypatch, capsys, command: str, listed: int) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('[{"image": "none.png", "text": "q", "answer": "a", "label": "a"}]')
    assert main([*command.split(), "--data", "bad.json"]) == 2
    problems = capsys.readouterr().err.splitlines()[1:]
    assert ("'none.png' must be an existing file" in problems[-1]) == ("--resume" not in command)
    assert len(problems) == listed + ("--resume" not in command)
    assert main(["--image-rot", ".", "--data", "bad.json"]) == 2  # the misspelt one may be what is missing
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("--lora-r 0", "--lora-r"),
        ("--lora-r 2.5", "whole number"),
        ("--learning-rate -1", "--learning-rate"),
        ("--learning-rate nan", "--learning-rate"),
        ("--learning-rate inf", "--learning-rate"),
        ("--num-train-epochs 0", "--num-train-epochs"),
        ("--zero-stage 3", "3 would split up the frozen base"),
        ("--workers-per-trial 3", "multiple of the 3 workers"),
        ("--val-fraction 0.6 --test-fraction 0.5", "leave images to train on"),
        ("--image-root .", "goes with --data"),
        ("--name a/b", "plain folder name"),
        ("--space nowhere", "lora"),
        ("--space wide --lora-alpha 32", "--lora-alpha"),
        ("--search-alpha --lora-alpha 32", "--lora-alpha"),
        ("--trials", "followed by a value"),
        ("--seed -1", "seed"),
        ("--zero-stage 0 --fp16", "must be 1 or 2 with a float16 base"),
    ],
)
def test_a_bad_value_is_refused(argv: str, word: str) -> None:
    assert word in "\n".join(problems_of(*argv.split()))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--data", "nowhere", "--trials", "x"), ("nowhere", "'x'")),
        (("--data", "empty.json"), ("at least one entry",)),  # the command line is right, the data is not
        (("--data", "empty.json", "--model-small", str(ROOT / "tests")), ("config.json",)),
    ],
)
def test_script_answers_without_heavy_imports(tmp_path: Path, argv: tuple[str, ...], words: tuple[str, ...]) -> None:
    (tmp_path / "empty.json").write_text("[]")
    code = (
        f"import runpy, sys; sys.argv = ['run.py', *{argv!r}]\n"
        f"try: runpy.run_path({str(ROOT / 'tune' / 'run.py')!r}, run_name='__main__')\n"
        f"except SystemExit as end: print(end.code)\n"
        f"print([m for m in ('ray', 'torch', 'transformers', 'mlflow', 'deepspeed') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.splitlines() == ["2", "[]"]
    assert "Traceback" not in run.stderr and all(word in run.stderr for word in words)


def test_every_space_gives_the_guides_settings_first() -> None:
    names = sorted(path.stem for path in (ROOT / "search_spaces").glob("[a-z]*.py"))
    assert "lora" in names
    for name in names:
        settings = parse(["--space", name])
        point = corners(settings)[0]
        assert {n: getattr(point, n) for n in GUIDE_VALUES} == GUIDE_VALUES
        assert check_space(settings) == []


def draws(count: int) -> list[Any]:
    """Optuna's trials at random."""
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask() for _ in range(count)]


def test_pinned_values_are_not_searched() -> None:
    import optuna

    settings = parse(["--lora-r", "8", "--learning-rate", "0.001"])
    space, guide = load_space("lora")
    trial = optuna.create_study(sampler=make_corner(guide, -1)).ask()
    point, _ = searched_settings(settings, space, trial)
    assert (point.lora_r, point.lora_alpha, point.learning_rate) == (8, 16, 0.001)
    assert trial.params.keys() == {"gradient_accumulation_steps", "num_train_epochs", "train_projector"}
    settings = parse(["--lora-alpha", "32"])
    assert {searched_settings(settings, space, trial)[0].lora_alpha for trial in draws(9)} == {32}
    settings = parse(["--search-alpha"])
    ratios = [
        point.lora_alpha / point.lora_r for point in (searched_settings(settings, space, t)[0] for t in draws(20))
    ]
    assert set(ratios) == {0.5, 1.0, 2.0, 4.0}


def test_an_unknown_setting_of_a_space_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("GUIDE = {}\ndef space(trial):\n    return {'lora_rank': 8}\n")
    (problem,) = problems_of("--space", str(file))
    assert "'lora_rank'" in problem and "lora_r" in problem


def test_a_guide_with_a_stray_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "GUIDE = {'lora_rank': 64}\ndef space(trial):\n    return {'lora_r': trial.suggest_int('lora_r', 4, 8)}\n"
    )
    assert "lora_rank" in "\n".join(problems_of("--space", str(file)))


@pytest.mark.parametrize("text", ["raise OSError('no')", "x = 1", "def space(trial): pass\nGUIDE = {}", "syntax("])
def test_a_broken_space_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert "--space" in problems_of("--space", str(file))[0]


def test_settings_survive_json() -> None:
    settings = TrialSettings(lora_target_modules=("q_proj",))
    assert TrialSettings.from_dict(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_workers_share_the_global_batch_equally() -> None:
    """16 images of one size each, or eight micro-batches of two: so many workers can have an equal share."""
    auto, pairs = TrialSettings(), TrialSettings(per_device_train_batch_size=2)
    assert auto.global_batch_size == pairs.global_batch_size == 16
    assert [n for n in range(1, 20) if not auto.problems(n)] == [1, 2, 4, 8, 16]
    assert [n for n in range(1, 20) if not pairs.problems(n)] == [1, 2, 4, 8]


def test_a_micro_batch_is_a_number_or_auto() -> None:
    assert parse(words("--per-device-train-batch-size auto")).trial.per_device_train_batch_size is None
    assert parse(words("--per-device-train-batch-size 4")).trial.global_batch_size == 32
    assert "must be auto, or a whole number" in problems_of("--per-device-train-batch-size", "many")[0]
    assert parse([]).trial.torch_compile is None
    assert [parse([option]).trial.torch_compile for option in ("--torch-compile", "--no-torch-compile")] == [
        True,
        False,
    ]


def test_threads_of_cpu_workers(monkeypatch) -> None:
    """The cores are shared out, and OMP_NUM_THREADS is the most that a worker takes."""
    from tune.lanes.layout import plan_layout

    settings = parse(["--lanes", "2"])
    for asked, threads in (("", 4), ("1", 1), ("3", 3), ("64", 4), ("4,2", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert plan_layout(settings, {"CPU": 8}).num_threads == threads
    assert plan_layout(parse(["--device", "gpu", "--lanes", "1"]), {"CPU": 8, "GPU": 2}).num_threads == 0


def test_lanes_share_a_gpu() -> None:
    from tune.lanes.layout import plan_layout

    shared = plan_layout(parse(["--lanes-per-gpu", "3"]), {"CPU": 8, "GPU": 2})
    assert (shared.lanes, shared.worker_resources) == (6, {"CPU": 1, "GPU": pytest.approx(1 / 3)})
    assert shared.devices_per_trial == pytest.approx(1 / 3)
    whole = plan_layout(parse([]), {"CPU": 8, "GPU": 2})
    assert (whole.lanes, whole.worker_resources) == (2, {"CPU": 1, "GPU": 1})
    with pytest.raises(SettingsError, match="6 shares of GPUs"):
        plan_layout(parse(["--lanes-per-gpu", "3", "--lanes", "7"]), {"CPU": 8, "GPU": 2})
    assert plan_layout(parse(["--lanes-per-gpu", "3", "--device", "cpu"]), {"CPU": 4}).worker_resources == {"CPU": 1}
    with pytest.raises(SettingsError, match="--lanes-per-gpu"):
        parse(["--lanes-per-gpu", "2", "--workers-per-trial", "2"])


@pytest.mark.parametrize(
    ("workers", "lanes", "sharing", "nodes", "strategy"),
    [
        (2, 2, 1, [{"GPU": 2, "CPU": 8}, {"GPU": 2, "CPU": 8}], "STRICT_PACK"),
        (2, 4, 1, [{"GPU": 8, "CPU": 64}, {"CPU": 4}], "STRICT_PACK"),
        (2, 3, 1, [{"GPU": 3, "CPU": 8}, {"GPU": 3, "CPU": 8}], "PACK"),  # the third lane's workers lie on two nodes
        (2, 2, 1, [{"GPU": 4, "CPU": 3}], "PACK"),  # each worker takes a core, too
        (4, 1, 1, [{"GPU": 2, "CPU": 8}, {"GPU": 2, "CPU": 8}], "PACK"),
        (2, 1, 1, [{"CPU": 8}], "PACK"),  # an autoscaler's nodes are not there yet
        (2, 3, 3, [{"GPU": 2, "CPU": 8}], "STRICT_PACK"),
    ],
)
def test_the_workers_of_a_lane_stay_on_one_node_where_every_lane_finds_one(
    workers, lanes, sharing, nodes, strategy
) -> None:
    from tune.lanes.layout import Layout, placement_strategy

    layout = Layout(lanes, workers, use_gpu=True, num_threads=0, lanes_per_gpu=sharing)
    assert placement_strategy(layout, nodes) == strategy


def test_gpu_workers_get_variables_unless_the_user_has_set_them(monkeypatch) -> None:
    from tune.lanes.trainers import gpu_environment

    compilers = "TORCHINDUCTOR_COMPILE_THREADS"
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", compilers)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    beat = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "1260"}
    assert gpu_environment(1260, 6) == beat | {compilers: "6"} | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    assert gpu_environment(1260, 0)["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "9")
    assert gpu_environment(1260, 0) == {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "9"}
    monkeypatch.setenv(compilers, "3")
    assert gpu_environment(1260, 6)[compilers] == "3"


@pytest.mark.parametrize(
    ("lanes", "workers", "sharing", "nodes", "threads"),
    [
        (4, 1, 1, [{"CPU": 48, "GPU": 4}], 12),
        (2, 1, 1, [{"CPU": 48, "GPU": 4}], 24),  # two GPUs stay free
        (1, 4, 1, [{"CPU": 48, "GPU": 4}], 12),
        (2, 1, 2, [{"CPU": 8, "GPU": 1}], 4),
        (1, 1, 1, [{"CPU": 192, "GPU": 1}], 32),
        (8, 1, 1, [{"CPU": 4, "GPU": 8}], 1),
        (2, 1, 1, [{"CPU": 16}, {"CPU": 16, "GPU": 1}, {"CPU": 8, "GPU": 1}], 8),
        (2, 1, 1, [{"CPU": 16}], 0),  # an autoscaler has yet to bring GPUs
    ],
)
def test_gpu_workers_share_the_cores_of_their_node_when_they_compile(lanes, workers, sharing, nodes, threads) -> None:
    from tune.lanes.layout import Layout, compile_threads

    assert compile_threads(Layout(lanes, workers, use_gpu=True, num_threads=0, lanes_per_gpu=sharing), nodes) == threads
