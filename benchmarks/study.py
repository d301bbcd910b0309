"""This study against its alternatives on the same trials, in one run on the CPU of one machine, as ratios.

    python benchmarks/study.py [--trials 20] [--repeats 3] [--only a,d] [--before DIR] [--output study.json]
    python benchmarks/study.py --growth [100 1000 10000]

a   `python tune/run.py`, process start to end, as two lanes of one worker
a0  the same with another version of this project, in the folder --before
a1  the same as one lane of one worker with all cores; a2: as one lane of two ZeRO-2 workers (three trials each)
b   Ray's documented pattern, one TorchTrainer per trial (benchmarks/lanes.py), two at once: four times trial 0; its
    time for as many trials as the others train adds the rounds that are missing, each as long as its median trial
c   transformers' `Trainer.hyperparameter_search` over Optuna in one process, base loaded per trial by `model_init`
d   the floor: a bare PyTorch loop in two processes, features and batches in memory, no framework; d1: in one process

All train the same list, the guide's settings and points drawn from search_spaces/wide.py with a fixed seed, each to its
end, on the same images, base, seeds, order and global batch,
without dropout. Micro-batches: b and c the guide's 2 images, d 16, the others their version's default. Each begins with
an empty cache and ends with the adapters on
disk (a and c: also what a killed trial goes on from). Nobody wins by doing less: validation loss and AUROC must agree,
but those of a2, whose workers draw their dropout apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(Path(__file__).resolve().parent))]

ALTERNATIVES = ROOT / "benchmarks" / "alternatives.py"
PARTS = ("a", "a0", "a1", "a2", "b", "c", "d", "d1")
FEW = {"a1": 3, "a2": 3, "b": 4}  # trials of the parts that are not trained through
# Sums of the same terms in another order differ in the last bits, and training lets them grow. Metrics that count
# decisions are told, but not asserted: a trial that has hardly learned puts many images close to the line.
TOLERANCES = {"loss": 0.002, "auroc": 0.005}
TITLES = {"ray::RayTrainWorker": "worker", "ray::TrainController": "lane"}


# ------------------------------------------------------------------------------------------------ measuring


def measure(commands: Sequence[list[str]], folder: Path, **environment: str) -> dict[str, Any]:
    """Run processes side by side to their end: wall time, and every second the memory (resident, so what processes
    share counts in each) of the largest process of each kind in their trees. Raises CalledProcessError."""
    import psutil

    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **environment}
    began, start = time.time(), time.perf_counter()
    running = [psutil.Popen(command, cwd=folder, env=environment, stdout=sys.stderr) for command in commands]
    samples: dict[str, list[float]] = defaultdict(list)  # GiB
    while any(process.poll() is None for process in running):
        largest: dict[str, float] = defaultdict(float)
        for root in running:
            for process in (root, *(root.children(recursive=True) if root.is_running() else ())):
                try:
                    title, gib = " ".join(process.cmdline()), process.memory_info().rss / 2**30
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
                kind = next((kind for begin, kind in TITLES.items() if title.startswith(begin)), "Ray's own")
                kind = "driver" if process in running else kind
                largest[kind] = max(largest[kind], gib)
                largest["together"] += gib
        for kind, gib in largest.items():
            samples[kind].append(gib)
        time.sleep(1)
    wall_s = time.perf_counter() - start
    for process, command in zip(running, commands, strict=True):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    peaks = {kind: max(found) for kind, found in samples.items()}
    return {"began": began, "wall_s": wall_s, "peak_gib": peaks, "driver_gib": samples["driver"]}


def run_study(folder: Path, trials: int, *options: str, code: Path = ROOT) -> dict[str, Any]:
    """One `tune/run.py` whose trials all run to their end: what was measured, and what its journal and record tell."""
    command = [sys.executable, str(code / "tune" / "run.py"), "--trials", str(trials), "--name", "study", *options]
    measured = measure([[*command, "--scheduler", "none", "--device", "cpu"]], folder, PYTHONPATH=str(code))
    study = json.loads((folder / "results" / "study" / "study.json").read_text())
    journal = [json.loads(line) for line in (folder / "results" / "study" / "journal.jsonl").read_text().splitlines()]
    reports = [event for event in journal if event["event"] == "report"]
    since = [event["time"] - sum(event["seconds"].values()) + event["seconds"]["setup"] for event in reports]
    found = [
        {**trial["seconds"], **{name: trial[name] for name in ("number", "step")}}
        | {"metrics": trial["epochs"][-1], "later": trial["turn"] > 0}
        for trial in study["trials"]
    ]
    return {**measured, "start_up_s": min(since) - measured["began"], "trials": found, "reports": reports}


def run_part(part: str, folder: Path, work: dict[str, Any], before: Path) -> dict[str, Any]:
    """One alternative in a folder of its own: what was measured, and the seconds and metrics of each trial."""
    folder.mkdir()
    count = min(FEW.get(part, len(work["trials"])), len(work["trials"]))
    if part.startswith("a"):
        space = f"TRIALS = {work['trials']!r}\nGUIDE = {{}}\n\n\ndef space(trial):\n    return TRIALS[trial.number]\n"
        (folder / "listed.py").write_text(space)
        lanes, workers = {"a": "21", "a0": "21", "a1": "11", "a2": "12"}[part]
        data = ("--data", work["manifest"], "--image-root", str(Path(work["manifest"]).parent))
        layout = ("--lanes", lanes, "--workers-per-trial", workers)
        code = before if part == "a0" else ROOT
        measured = run_study(folder, count, "--space", "listed.py", *data, *layout, code=code)
        parts = [json.loads(path.read_text()) for path in (folder / "results/study/splits.json", Path(work["splits"]))]
        for name in ("train", "validation", "test"):
            images, expected = ([(s["images"], s["answer"]) for s in part[name]] for part in parts)
            assert images == expected, f"the study has another {name} part"
        return {name: value for name, value in measured.items() if name not in ("reports", "driver_gib")}
    shares = 2 if part == "d" else 1
    threads = str(max(1, (os.cpu_count() or 1) // (2 if part in "bd" else 1)))
    commands = []
    for share in range(shares):
        told = work | {"numbers": list(range(share, count, shares)), "folder": str(folder), "at_once": 2}
        (folder / f"work-{share}.json").write_text(json.dumps(told))
        commands.append([sys.executable, str(ALTERNATIVES), part[0], str(folder / f"work-{share}.json")])
    measured = measure(commands, folder, OMP_NUM_THREADS=threads, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    found = [json.loads((folder / f"work-{share}.json").read_text()) for share in range(shares)]
    return measured | {"trials": sorted((trial for one in found for trial in one), key=lambda trial: trial["number"])}


# ------------------------------------------------------------------------------------------------ the command


def prepare(folder: Path, trials: int, num_phantoms: int) -> dict[str, Any]:
    """Images, splits and the list of trials, for all alternatives alike."""
    import dataclasses

    import optuna

    from search_spaces import wide
    from train_fn.data.phantoms import generate
    from train_fn.data.settings import split_rules, task_rules
    from train_fn.data.splits_file import save_splits
    from train_fn.data.splitting import make_splits
    from tune.config.cli import parse
    from tune.plan.prepare import read_manifests

    splits_file = folder / "splits.json"
    manifest = Path(generate(folder / "phantoms", num_phantoms, 0))
    settings = parse(["--data", str(manifest), "--image-root", str(manifest.parent), "--results", str(folder)])
    samples = read_manifests(settings, lambda line: None)["data"] or []
    rules = split_rules(settings.data, settings.model.image_options)
    splits, _, problems = make_splits(samples, None, None, rules, task_rules(settings.data), folder / "hashes.json")
    assert not problems, problems
    save_splits(dataclasses.replace(splits, decide="macro_f1"), splits_file)
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    listed = [wide.space(optuna.trial.FixedTrial(wide.GUIDE)), *(wide.space(drawn.ask()) for _ in range(trials - 1))]
    # Dropout would draw other numbers where a step is cut otherwise; scores could not be compared.
    return {"manifest": str(manifest), "splits": str(splits_file),
            "trials": [{**settings, "lora_dropout": 0.0} for settings in listed]}  # fmt: skip


def row(part: str, run: dict[str, Any], count: int) -> dict[str, float]:
    """What the table says of one run; medians are over the trials that were not the first of their process."""
    trials = run["trials"]
    later = [trial for trial in trials if trial["later"]] or trials
    trial_s = median(trial["wall"] for trial in later)
    count = count if part == "b" else len(trials)
    wall_s = run["wall_s"] + (count - len(trials)) / 2 * trial_s
    found = {"trials": count, "wall_s": wall_s, "wall_per_trial_s": wall_s / count, "trial_s": trial_s}
    if "step" in later[0]:
        found["step_s"] = median(trial["train"] / trial["step"] for trial in later)
        found["images_per_s"] = 16 / found["step_s"]
    if "start_up_s" in run:
        found["start_up_s"] = run["start_up_s"]
    found |= {f"{phase}_s": median(trial[phase] for trial in later) for phase in later[0]
              if phase in ("setup", "train", "evaluation", "checkpoint", "report", "waited")}  # fmt: skip
    return found | {f"{kind}_gib": gib for kind, gib in run["peak_gib"].items()}


def check_equal(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The largest difference of each metric between two alternatives' same trial. Raises AssertionError."""
    largest: dict[str, float] = defaultdict(float)
    reference: dict[str, Any] = next((runs[part] for part in ("a", "d", "c", "d1") if part in runs), {"trials": []})
    expected = {trial["number"]: trial["metrics"] for trial in reference["trials"]}
    for part, run in runs.items():
        for trial in run["trials"] if part != "a2" else ():  # its two workers draw different dropout
            for name in expected.get(trial["number"], {}).keys() - {"train_loss"}:
                apart = abs(trial["metrics"][name] - expected[trial["number"]][name])
                told = f"{part}, trial {trial['number']}: {name} {apart} apart"
                assert apart <= TOLERANCES.get(name, 1.0), told
                if apart > 0.05:
                    print(told)
                largest[name] = max(largest[name], apart)
    return largest


def compare(
    folder: Path, parts: Sequence[str], num_trials: int, num_phantoms: int, repeats: int, before: Path
) -> dict[str, Any]:
    """Measure the parts in turn, print their table and ratios."""
    work = prepare(folder, num_trials, num_phantoms)
    repeated: list[dict[str, dict[str, Any]]] = []
    for repeat in range(repeats):
        repeated.append({part: run_part(part, folder / f"{part}-{repeat}", work, before) for part in parts})
        print(f"largest differences of metrics: {dict(check_equal(repeated[-1]))}", flush=True)
        for part, run in repeated[-1].items():  # so far, should the rest be interrupted
            print(f"{part}: {row(part, run, num_trials)}", flush=True)
    rows = [{part: row(part, run, num_trials) for part, run in runs.items()} for runs in repeated]
    ratios = [("wall_s", part, "a") for part in parts if part in ("a0", "b", "c", "d", "d1")]
    ratios += [
        ("step_s", "a", "d"),
        ("step_s", "a0", "a"),
        ("trial_s", "a", "d"),
        ("trial_s", "b", "a"),
        ("images_per_s", "a2", "a1"),
    ]
    # A second in which another process was seen may be in one repeat only.
    told = {part: {name: [found[part].get(name, 0.0) for found in rows] for name in rows[0][part]} for part in parts}
    names = dict.fromkeys(name for part in parts for name in told[part])
    print(f"{'medians':20}" + "".join(f"{part:>12}" for part in parts))
    for name in names:
        cells = (f"{median(told[part][name]):.3f}" if name in told[part] else "" for part in parts)
        print(f"{name:20}" + "".join(f"{cell:>12}" for cell in cells))
    found = {}
    for name, above, below in ratios:
        if above in parts and below in parts:
            values = [one[above][name] / one[below][name] for one in rows]
            found[f"{name} {above} / {below}"] = values
            print(f"{name} {above} / {below}: {median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    return {"table": told, "ratios": found, "runs": repeated, **work}


def growth(folder: Path, sizes: Sequence[int], num_tiny: int) -> dict[str, Any]:
    """Cost of an epoch by number of images, and whether anything grows over many trials of one lane."""
    found: dict[str, Any] = {}
    for size in sizes:
        (folder / str(size)).mkdir()
        run = run_study(folder / str(size), 3, "--num-phantoms", str(size), "--lanes", "1")
        later = [trial for trial in run["trials"] if trial["later"]]
        found[f"{size} images"] = {
            "wall_s": run["wall_s"],
            "start_up_s": run["start_up_s"],
            "epoch_s": median(trial["train"] + trial["evaluation"] for trial in later) / 3,
            "step_s": median(trial["train"] / trial["step"] for trial in later),
            "first_epoch_s": min(run["reports"], key=lambda event: event["time"])["seconds"]["train"],
        } | {f"{kind}_gib": gib for kind, gib in run["peak_gib"].items()}
    (folder / "tiny").mkdir()
    run = run_study(folder / "tiny", num_tiny, "--num-phantoms", "60", "--lanes", "1", "--max-steps", "1")
    tenth = max(1, num_tiny // 10)
    series = {"worker_gib": [event["system"]["memory_gib"] for event in run["reports"]]}
    series |= {f"{name}_s": [trial[name] for trial in run["trials"]] for name in ("wall", "waited", "setup")}
    for name, values in series.items():
        found[f"{num_tiny} trials, {name}"] = {"first": median(values[:tenth]), "last": median(values[-tenth:])}
    first, last = (reports["time"] for reports in (run["reports"][0], run["reports"][-1]))
    driver = run["driver_gib"][int(first - run["began"]) : int(last - run["began"])]
    tenth = max(1, len(driver) // 10)
    found[f"{num_tiny} trials, driver_gib"] = {"first": median(driver[:tenth]), "last": median(driver[-tenth:])}
    for label, values in found.items():
        print(f"{label:28}" + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--phantoms", type=int, default=240, help="images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="parts, with commas between")
    parser.add_argument("--before", type=Path, help="another version of this project, for a0")
    parser.add_argument("--growth", type=int, nargs="*", metavar="IMAGES", help="measure growth instead")
    parser.add_argument("--tiny-trials", type=int, default=200, help="trials of --growth on one lane")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    parts = options.only.split(",") if options.only else [part for part in PARTS if part != "a0" or options.before]
    if "a0" in parts and not options.before:
        parser.error("a0 needs --before DIR")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only must name parts of {','.join(PARTS)}, but got {','.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="study-") as name:
        if options.growth is None:
            found = compare(Path(name), parts, options.trials, options.phantoms, options.repeats, options.before)
        else:
            found = growth(Path(name), options.growth or [100, 1000], options.tiny_trials)
    if options.output:
        from train_fn.worker import versions

        options.output.write_text(json.dumps({**found, "cores": os.cpu_count(), "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
