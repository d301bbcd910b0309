"""`python tune/run.py --doctor`: whether a study with these settings could run here, told without starting one.

Every node is asked by a task of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train_fn.support.text import plain
from tune.config.paths import SettingsError
from tune.config.settings import Settings
from tune.config.uris import tracking_uri
from tune.doctor.collectives import measure_collectives
from tune.doctor.nodes import ask_nodes, probe_folder
from tune.doctor.verdicts import Finding, Need, reckon, verdicts
from tune.lanes.layout import Layout, plan_layout
from tune.lanes.ray_start import start_ray
from tune.plan.prepare import Study, prepare
from tune.tracking.store_check import check_store


def examine(settings: Settings, say: Callable[[str], None]) -> int:
    """Check data, machines, memory, storage and records for these settings, and print one table.

    Leaves nothing but the results folder, and the phantoms in it. Returns the exit code: 0 nothing fails, 1 something
    does.
    """
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        study = read_data(settings, say, findings)
        storage = probe_folder(settings, stack, findings)
        say("Asking the nodes")
        resources = start_ray(settings)
        import ray  # after what `start_ray` sets for it

        stack.callback(ray.shutdown)
        layout = lay_out(settings, resources, findings)
        facts = ask_nodes(settings, study, storage)
        need = Need(layout=layout, compiler=settings.trial.torch_compile)
        if study:
            say("Reckoning memory from the model's shapes")
            need = reckon(study, need, facts, findings)
        findings += verdicts(facts, need)
        findings += measure_collectives(layout, facts, storage, say)
        findings += [*check_records(settings), *check_access(facts)]
    print_table(findings)
    return int(any(finding.verdict == "FAIL" for finding in findings))


def read_data(settings: Settings, say: Callable[[str], None], findings: list[Finding]) -> Study | None:
    """The data as a study would have it: `prepare` in a folder that is thrown away."""
    study, data = settings.study, settings.data
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if data.data == "phantoms":
                from train_fn.data.phantoms import generate

                folder = Path(study.results) / f"phantoms-{data.num_phantoms}-{data.split_seed}"
                data = dataclasses.replace(data, data=str(generate(folder, data.num_phantoms, data.split_seed)))
            aside = dataclasses.replace(study, results=scratch, report_to=())  # `check_records` asks the stores
            prepared = prepare(dataclasses.replace(settings, study=aside, data=data), say)
        except (SettingsError, OSError) as error:
            problems = error.problems if isinstance(error, SettingsError) else [str(error)]
            findings += [Finding("data", "driver", "cannot be used", problem) for problem in problems]
            return None
    taken = bool(study.name) and (Path(study.results) / study.name / "plan.json").exists()
    fix = f"`--name` must be new, but {study.name} is a study: choose another, or go on with --resume" if taken else ""
    counts = ", ".join(f"{part} {len(getattr(prepared.splits, part))}" for part in ("train", "validation", "test"))
    findings += [Finding("data", "driver", f"images: {counts}"), Finding("name", "driver", study.name or "new", fix)]
    return prepared


def lay_out(settings: Settings, resources: dict[str, float], findings: list[Finding]) -> Layout | None:
    """The study's lanes on what the cluster has."""
    found = f"{resources.get('CPU', 0):g} CPU cores, {resources.get('GPU', 0):g} GPUs"
    try:
        layout = plan_layout(settings, resources)
    except SettingsError as error:
        findings.append(Finding("lanes", "cluster", found, error.problems[0]))
        return None
    kind, workers = "GPU" if layout.use_gpu else "CPU", layout.workers_per_trial
    awaited = layout.lanes * workers * layout.worker_resources[kind] > resources.get(kind, 0) + 1e-6
    fix = "what is missing must come from the autoscaler: run the doctor again when the nodes are there"
    asked = f"{found}: {layout.lanes} lane(s) of {workers} {kind} worker(s)"
    findings.append(Finding("lanes", "cluster", asked, fix if awaited else "", warning=True))
    return layout


def check_records(settings: Settings) -> Iterator[Finding]:
    """The stores of --report-to and their packages, as a study checks them before it begins."""
    study = settings.study
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        fix = "" if importlib.util.find_spec(module) else f"`--report-to` {name} needs {module}: pip install {module}"
        if name in study.report_to:
            yield Finding("report to", "driver", name, fix)
    unreachable: list[str] = []
    uri = tracking_uri(study.mlflow_uri)
    problems = check_store(settings, Path(study.results).resolve() / (study.name or "study"), uri, unreachable.append)
    for problem in problems:
        yield Finding("records", "driver", "would be refused", problem)
    for problem in unreachable:
        yield Finding("MLflow", "driver", "no answer", problem, warning=True)
    if "mlflow" in study.report_to and not problems and not unreachable:
        yield Finding("MLflow", "driver", f"{uri} can take the records")


def check_access(facts: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Whether a cluster that was joined wants a token, and who reaches its dashboard."""
    if not os.environ.get("RAY_ADDRESS"):
        return
    import ray

    closed = all(told["token"] for where, told in facts.items() if where != "driver" and "token" in told)
    fix = "who reaches this cluster may run code on it: start Ray with RAY_AUTH_MODE=token, see docs/cluster.md"
    yield Finding("access", "cluster", "with a token" if closed else "open", "" if closed else fix, warning=True)
    url = ray.init(ignore_reinit_error=True, configure_logging=False).dashboard_url or ""
    fix = "other machines reach the dashboard: leave out --dashboard-host and look through SSH, see docs/cluster.md"
    here = not url or url.startswith(("127.0.0.1", "localhost"))
    yield Finding("dashboard", "cluster", url or "none", "" if here else fix, warning=True)


def print_table(findings: Sequence[Finding]) -> None:
    """The findings, and below them what to do about those that are not ok."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 140
    table = Table("check", "where", "found", "verdict")
    for finding in findings:
        table.add_row(*map(plain, (finding.check, finding.where, finding.found, finding.verdict)))
    console.print(table)
    for finding in findings:
        if finding.fix:
            console.print(f"  - {finding.verdict}: {plain(finding.fix)}", soft_wrap=True)
    failed = sum(finding.verdict == "FAIL" for finding in findings)
    console.print(f"A study cannot run: {failed} check(s) fail." if failed else "A study can run.")
