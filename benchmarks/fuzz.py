"""Random command lines, manifests and damaged study folders: no traceback, and nothing accepted that must be refused.

    python benchmarks/fuzz.py [--command-lines 10000] [--manifests 10000] [--studies 3000] [--seed 0]

Each input is made from sound parts and hostile ones, and its maker knows what may happen (the oracle):

- command lines: one with a value that no setting of its type can have must be refused; what is accepted must go into
  plan.json and come back, hold finite numbers, no control characters, and make a trial that can be trained. Every
  problem is one line that names an option or a file.
- manifests: one with a fault must be refused; one without must be accepted.
- studies: each file of a finished and of an unfinished study is cut, flipped, emptied, swapped, removed, or replaced by
  JSON of another type. What `--show` and `--resume` (up to Ray) then know must be a part of what was true; what `sync`
  calls delivered must be in the store; what `predict` (up to the model) accepts must be the adapter as it was.

Everything runs in this process, and a seed gives the same inputs again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

HOSTILE = ["", " ", "\0", "a\0b", "\ud800", "x" * 5000, "..", "../..", "/", "~", "[red]", "[/red]", "\x1b[2J", "nan",
           "-nan", "inf", "-inf", "1e400", "-1", "0", "-0", "9" * 40, "1.5", "1e3", "true", "None", "[]", "{}", "%s",
           "{x}", "$(id)", "`id`", "'", '"', "é", "\u202e", "💥", "\r\n", "a\nb", ",", ",,", "--", "-", "=", "a=b",
           "sensitivity>=0.9", "auroc>=nan", "-loss", "2h", "-1h", "s3://b/p", "file:///etc", "/dev/zero",
           "http://u:p@h/"]  # fmt: skip
NO_NUMBER = ["", " ", "nan", "inf", "-inf", "1e400", "abc", "1,5", "[]", "0x10", "9" * 400, "\0", "--3"]
NO_WHOLE_NUMBER = [*NO_NUMBER, "1.5", "1e3"]


@dataclasses.dataclass
class Tally:
    """What came of the inputs of one kind."""

    kind: str
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def run(self, what: str, check: Callable[[], str]) -> None:
        """Count an input's outcome; an assertion or any other exception is a fault of the program."""
        try:
            self.outcomes[check()] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = "WRONG" if isinstance(error, AssertionError) else "TRACEBACK"
            self.outcomes[kind] += 1
            self.faults.append(f"{kind} {what[:300]!r}: {error!r:.300} ({Path(where.filename).name}:{where.lineno})")


def check_problems(problems: list[str]) -> None:
    """Every problem is one printable line that is not endless."""
    assert problems
    for problem in problems:
        assert len(problem) < 2000, f"a problem of {len(problem)} characters: {problem[:80]}"
        assert problem.isprintable() or problem.startswith("..."), f"not printable: {problem[:200]!r}"


# ------------------------------------------------------------------------------------------------ command lines


def command_lines(count: int, seed: int) -> Tally:
    """Random command lines through `parse`."""
    from train_fn.settings import rules
    from tune.config.cli import parse
    from tune.config.paths import SettingsError
    from tune.config.settings import GROUPS, flag

    tally, rng = Tally("command lines"), random.Random(seed)
    fields = {field.name: (group, field) for group in GROUPS for field in dataclasses.fields(group)}
    heavy = {"resume", "show", "replay", "doctor"}  # of studies: see `studies`
    names = [name for name in fields if name not in heavy]
    begun = time.perf_counter()
    for _ in range(count):
        argv: list[str] = []
        must_fail = False
        for name in rng.sample(names, rng.choice([0, 1, 1, 1, 2, 2, 3, 6])):
            group, field = fields[name]
            kind = rules(group)[name][0]
            if isinstance(field.default, bool):
                argv.append(flag(name) if rng.random() < 0.5 else "--no-" + name.replace("_", "-"))
                continue
            draw = rng.random()
            if draw < 0.3 and field.default not in ("", None, ()):
                default = field.default
                text = ",".join(default) if isinstance(default, tuple) else str(default)
            elif draw < 0.6 and kind in (int, float, float | None):
                text = rng.choice(NO_WHOLE_NUMBER if kind is int else NO_NUMBER)
                must_fail = True
            else:
                text = rng.choice(HOSTILE)
            spelt = flag(name) if rng.random() < 0.8 else "--" + name
            argv += [f"{spelt}={text}"] if rng.random() < 0.7 else [spelt, text]
        if rng.random() < 0.15:
            argv.insert(
                rng.randrange(len(argv) + 1), rng.choice([*HOSTILE, "--nonsense", "--lora-rr=3", "-x", "--x=--"])
            )

        def check(argv: list[str] = argv, must_fail: bool = must_fail) -> str:
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    settings = parse(argv)
            except SettingsError as error:
                check_problems(error.problems)
                return "refused"
            assert not must_fail, "accepted"
            check_accepted(settings)
            return "accepted"

        tally.run(" ".join(argv), check)
    tally.seconds = time.perf_counter() - begun
    return tally


def check_accepted(settings: Any) -> None:
    """What must be true of settings that a study begins with."""
    stored = json.loads(json.dumps(settings.to_dict()))
    for part in ("study", "model", "data", "trial"):
        for name, value in stored[part].items():
            texts = value if isinstance(value, list) else [value]
            for text in texts:
                if isinstance(text, str):
                    # Format characters stay: some scripts are written with them. A terminal gets them escaped.
                    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in text), f"{name}={text!r}"
                    assert len(text.encode()) <= 4096, f"{name}={text!r}"
                if isinstance(text, float):
                    assert math.isfinite(text), f"{name}={text!r}"
    assert not settings.trial.problems(settings.study.workers_per_trial)
    assert settings.study.name not in (".", "..") and "/" not in settings.study.name
    assert settings.study.trials >= 1 and settings.study.lanes >= 0


# ------------------------------------------------------------------------------------------------ manifests


def make_images(folder: Path, count: int = 18) -> list[str]:
    """Small images that differ, and a few files that are none."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.kron(rng.integers(0, 255, (8, 8), dtype=np.uint8), np.ones((8, 8), dtype=np.uint8))
        Image.fromarray(pixels).save(folder / f"{number}.png")
    Image.fromarray(np.zeros((40, 40), dtype=np.uint16)).save(folder / "sixteen.png")
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to("nowhere")
    (folder.parent / "outside.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "out.png").symlink_to("../outside.png")
    return [f"{number}.png" for number in range(count)]


BAD_IMAGES = ["sixteen.png", "text.png", "cut.png", "empty.png", "pipe.png", "folder.png", "dangling.png", "out.png",
              "../outside.png", "/etc/passwd", "none.png", "", " ", "\0", "a" * 300, "x/" * 3000]  # fmt: skip
BAD_VALUES = [None, 1.5, True, [], {}, "", "  ", ["a"], {"a": 1}, float("nan")]


def damage_manifest(rng: random.Random, entries: list[Any]) -> Any:
    """Put one fault into a sound manifest; returns its JSON value, or text that is none."""
    fault, number = rng.randrange(8), rng.randrange(len(entries))
    entry = entries[number]
    if fault == 0:
        entries[number] = rng.choice([None, 3, "text", [], True, {}])
    elif fault == 1:
        entry.pop(rng.choice(["image", "text", "answer", "label"]))
    elif fault == 2:
        name = rng.choice(["image", "text", "answer"])
        entry[name] = rng.choice([*BAD_VALUES, 3])
    elif fault == 3:
        entry["label"] = rng.choice([value for value in BAD_VALUES if value != ""])
    elif fault == 4:
        entry["image"] = rng.choice(BAD_IMAGES)
    elif fault == 5:
        entry["label"] = next(other["label"] for other in entries if other["answer"] != entry["answer"])
    elif fault == 6:
        return rng.choice([{}, [], "text", 3, None, {"images": entries}])
    else:
        text = json.dumps(entries)
        return rng.choice(
            [text[: rng.randrange(1, len(text) - 1)], text + "]", "\ufffe" + text, text.replace(":", "=", 1)]
        )
    return entries


def manifests(count: int, seed: int, folder: Path) -> Tally:
    """Random manifests, as a study reads them before it looks at the base."""
    from train_fn.data.manifest import read_manifest, unreadable_images
    from train_fn.data.splitting import SplitRules, make_splits

    tally, rng = Tally("manifests"), random.Random(seed)
    images = make_images(folder / "images")
    answers = ["Normal", "Benign", "Malignant"]
    path = folder / "images" / "manifest.json"
    begun = time.perf_counter()
    for _ in range(count):
        entries: list[Any] = [
            {"image": image, "text": "Which?", "answer": answers[n % 3], "label": rng.choice([n % 3, n % 3])}
            for n, image in enumerate(images)
        ]
        sound = rng.random() < 0.1
        value = entries if sound else damage_manifest(rng, entries)
        text = value if isinstance(value, str) and value[:1] in "[{\ufffe" else json.dumps(value)
        path.write_text(text, encoding="utf-8")

        def check(sound: bool = sound) -> str:
            reading = read_manifest(path, path.parent)
            found, problems = reading.samples, reading.problems
            problems = problems + unreadable_images([sample.image for sample in found])
            if not problems:
                rules = SplitRules(val_fraction=0.2, test_fraction=0.2, seed=0)
                problems = make_splits(found, None, None, rules, hash_cache=folder / "cache.json")[2]
            if problems:
                check_problems(problems)
                assert not sound, problems
                return "refused"
            assert sound, "accepted"
            return "accepted"

        tally.run(text, check)
    tally.seconds = time.perf_counter() - begun
    return tally


# ------------------------------------------------------------------------------------------------ studies


def build_study(results: Path, name: str, finished: bool) -> Path:
    """The folder of a study as a run leaves it, without a run: its own plan and splits, adapters of the nano base, and
    a journal of four trials, of which the last has not ended if the study is not `finished`."""
    import torch

    from train_fn.model.base import load_base
    from train_fn.settings import ModelSettings
    from train_fn.support.storage import Storage
    from train_fn.trial.lora import adapted
    from train_fn.trial.outputs import save_final
    from tune.config.cli import parse
    from tune.plan.prepare import prepare
    from tune.results.outcome import Outcome
    from tune.show import show
    from tune.study import write_plan

    argv = ["--results", str(results), "--name", name, "--num-phantoms", "60", "--trials", "4"]
    argv += ["--mlflow-uri", f"sqlite:///{results}/mlflow.db"]
    study = prepare(parse(argv), lambda text: None)
    write_plan(study)
    base = load_base(ModelSettings(), torch.device("cpu"))
    folder, journal = study.directory, study.journal
    journal.write("session", params={"lanes": 1, "workers_per_trial": 1}, tags={"metric": "auroc"})
    for number in range(4):
        settings = dataclasses.asdict(study.settings.trial) | {"num_train_epochs": 2}
        searched = {
            "lora_r": 64,
            "lora_alpha_ratio": 2.0,
            "learning_rate": 2e-4 * (number + 1),
            "train_projector": False,
        }
        journal.write("started", number=number, searched=searched, settings=settings, params=searched)
        metrics: dict[str, float] = {}
        for epoch in (1, 2):
            metrics = {"loss": 1.0 / (number + epoch), "auroc": 0.5 + (number + epoch) / 20, "train_loss": 0.5}
            journal.write(
                "report", number=number, epoch=epoch, step=3 * epoch, metrics=metrics, log=[], finished=epoch == 2,
                applied={"trainable_params": 1000}, seconds={"train": 1.0, "evaluation": 0.5}, lane=0, turn=number,
                device="cpu", notes=[], wall_s=1.6, waited_s=0.1, device_s=1.6, system={},
            )  # fmt: skip
            if number == 3 and not finished:
                break
        else:
            output = folder / "trials" / f"{number:04d}"
            with adapted(base, dataclasses.replace(study.settings.trial, lora_r=4)) as model:
                save_final(base, model, study.settings.trial, study.splits, output, Storage(folder))
            journal.write(
                "ended", number=number, state="COMPLETE", error="", best=metrics["auroc"], num_ended=number + 1, step=6,
                seconds={"train": 1.0, "evaluation": 0.5, "wall": 1.6}, applied={"trainable_params": 1000}, lane=0,
                device="cpu", notes=[], device_s=1.6,
            )  # fmt: skip
    if finished:
        shutil.copytree(folder / "trials" / "0003" / "final_model", folder / "best_adapter")
        outcome: Outcome = show(folder)
        outcome.save(study.plan, {})
        journal.write(
            "study_ended", state="COMPLETE", tags={"winner": 3, "adapter": "", "ended_by": ""}, metrics={"wall_s": 9.0},
            num_trials=4, artifacts=["study.json"], adapter="best_adapter", register="", model_tags={},
        )  # fmt: skip
    return folder


JSON_VALUES = ["null", "3", '"text"', "[]", "{}", "[null]", '{"a": {}}', "[[[[]]]]", "true", "NaN", '{"format": 99}']


def damage_file(rng: random.Random, path: Path, others: list[Path]) -> str:
    """Damage one file of a study; returns how."""
    content = path.read_bytes()
    how = rng.choice(["cut", "flip", "flip", "empty", "swap", "gone", "json", "zeros", "folder", "line"])
    if how == "cut":
        path.write_bytes(content[: rng.randrange(len(content) or 1)])
    elif how == "flip" and content:
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
    elif how == "swap":
        path.write_bytes(rng.choice(others).read_bytes())
    elif how == "json":
        path.write_text(rng.choice(JSON_VALUES))
    elif how == "zeros":
        place = rng.randrange(len(content) or 1)
        path.write_bytes(content[:place] + bytes(len(content) - place))
    elif how == "line":  # one line less
        lines = content.split(b"\n")
        lines.pop(rng.randrange(len(lines)))
        path.write_bytes(b"\n".join(lines))
    elif how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    else:
        path.write_bytes(b"")
    return how


def truth(folder: Path) -> dict[int, Any]:
    """Each trial's settings and epochs, from a journal."""
    from tune.records.journal import read_events
    from tune.records.trials import trial_records

    return trial_records(read_events(folder / "journal.jsonl"))


def check_records(records: dict[int, Any], true: dict[int, Any]) -> None:
    """What is known of a damaged study's trials must be a part of what is true."""
    for number, record in records.items():
        assert number in true, f"trial {number} never was"
        whole = true[number]
        assert record.settings == whole.settings and record.searched == whole.searched, f"trial {number}: settings"
        assert record.epochs == whole.epochs[: len(record.epochs)], f"trial {number}: epochs"
        if record.state == "COMPLETE":
            assert (whole.state, record.epochs) == ("COMPLETE", whole.epochs), f"trial {number}: end"


def studies(count: int, seed: int, folder: Path, sync_every: int = 20) -> Tally:
    """Damaged copies of two studies through `--show`, `--resume`, `predict` and, one in `sync_every`, `sync`."""
    from train_fn.model.adapters import BadAdapter, check_files, read_config, read_shapes, read_task
    from train_fn.support.files import DamagedFile
    from tune.config.paths import SettingsError
    from tune.records.trials import trial_records
    from tune.run import begin

    tally, rng = Tally("studies"), random.Random(seed)
    wholes = [build_study(folder / "whole", name, name == "finished") for name in ("finished", "unfinished")]
    truths = {whole: truth(whole) for whole in wholes}
    adapters = {whole: describe_adapter(whole / "trials" / "0001" / "final_model") for whole in wholes}
    begun = time.perf_counter()
    for number in range(count):
        whole = rng.choice(wholes)
        copy = folder / "copies" / "s"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        files = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.name != "lock"]
        core = [path for path in files if path.parent == copy] + [copy / "trials" / "0001" / "final_model" / name for
                name in ("adapter_config.json", "adapter_model.safetensors", "task.json")]  # fmt: skip
        path = rng.choice(core if rng.random() < 0.8 else files)
        how = damage_file(rng, path, files)
        what = f"{whole.name}: {path.relative_to(copy)} {how}"

        def check(command: str, copy: Path = copy, whole: Path = whole) -> str:
            told = io.StringIO()
            try:
                with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                    study = begin([command, str(copy)])
            except SettingsError as error:
                check_problems(error.problems)
                return f"{command} refused"
            assert "Traceback" not in told.getvalue()
            if command == "--resume":
                check_records(trial_records(study.journal.events), truths[whole])
                assert (
                    study.splits.test
                    and study.plan["study_id"] == json.loads((whole / "plan.json").read_text())["study_id"]
                )
            return f"{command} went on"

        def check_adapter(copy: Path = copy, whole: Path = whole) -> str:
            adapter = copy / "trials" / "0001" / "final_model"
            try:
                read_task(adapter)
                read_shapes(adapter, read_config(adapter))
                check_files(adapter)
            except (BadAdapter, DamagedFile):
                return "predict refused"
            assert describe_adapter(adapter) == adapters[whole], "another adapter is accepted"
            return "predict went on"

        def check_sync(copy: Path = copy, number: int = number) -> str:
            from tune.tracking.__main__ import main

            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                code = main(["sync", str(copy), "--mlflow-uri", f"sqlite:///{folder}/mlflow-{number}.db"])
            assert "Traceback" not in told.getvalue() and code in (0, 1, 2)
            if code == 0:
                check_store(f"sqlite:///{folder}/mlflow-{number}.db", truth(copy))
            (folder / f"mlflow-{number}.db").unlink(missing_ok=True)
            return f"sync {code}"

        tally.run(f"{what} --show", lambda check=check: check("--show"))  # type: ignore[misc]
        tally.run(f"{what} --resume", lambda check=check: check("--resume"))  # type: ignore[misc]
        tally.run(f"{what} predict", check_adapter)
        if number % sync_every == 0:
            tally.run(f"{what} sync", check_sync)
    tally.seconds = time.perf_counter() - begun
    return tally


def describe_adapter(adapter: Path) -> Any:
    """What an adapter says of itself: the task and the configuration by value, the names and shapes of its tensors."""
    from train_fn.model.adapters import read_config, read_shapes, read_task

    config = read_config(adapter)
    return read_task(adapter), config, read_shapes(adapter, config)


def check_store(uri: str, records: dict[int, Any]) -> None:
    """A store that was called complete must hold each trial's end and its epochs."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    by_number = {run.data.tags.get("trial"): run for run in runs}
    for number, record in records.items():
        if record.state == "COMPLETE":
            run = by_number[str(number)]
            assert run.info.status == "FINISHED", f"trial {number} is {run.info.status} in the store"
            history = client.get_metric_history(run.info.run_id, "auroc")
            assert len({metric.step for metric in history}) == len(record.epochs), f"trial {number} lacks epochs"


# ------------------------------------------------------------------------------------------------


def main() -> int:
    """Run all, print the table and every fault. 0: there was none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--command-lines", type=int, default=10_000)
    parser.add_argument("--manifests", type=int, default=10_000)
    parser.add_argument("--studies", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        working = folder / "working"
        working.mkdir()
        os.chdir(working)
        tallies = []
        if options.command_lines:
            tallies.append(command_lines(options.command_lines, options.seed))
            show(tallies[-1])
        if options.manifests:
            tallies.append(manifests(options.manifests, options.seed, folder / "manifests"))
            show(tallies[-1])
        if options.studies:
            tallies.append(studies(options.studies, options.seed, folder / "studies"))
            show(tallies[-1])
        os.chdir(ROOT)
    return 1 if any(tally.faults for tally in tallies) else 0


def show(tally: Tally) -> None:
    """Print what came of one kind of inputs."""
    total = sum(tally.outcomes.values())
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.outcomes.items()))
    print(f"{tally.kind}: {total} checks in {tally.seconds:.0f} s: {outcomes}; {len(tally.faults)} faults", flush=True)
    for fault in tally.faults[:40]:
        print(f"  {fault}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
