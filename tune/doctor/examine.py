"""`python tune/run.py --doctor`: checks whether a study with these settings could run here, and starts none."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from train_fn.support import tables
from train_fn.support.text import plain
from tune.config.paths import SettingsError
from tune.config.settings import Settings
from tune.config.uris import tracking_uri
from tune.doctor.collectives import measure_collectives
from tune.doctor.estimate import estimate
from tune.doctor.findings import Facts, Finding, Need, check_nodes, check_times
from tune.doctor.nodes import ask_nodes, probe_folder
from tune.doctor.probe import probe_nodes
from tune.lanes.layout import Layout, plan_layout
from tune.lanes.ray_start import start_ray
from tune.plan.prepare import Study, generate_phantoms, prepare
from tune.tracking.store_check import check_store


def examine(settings: Settings, say: Callable[[str], None]) -> int:
    """Check data, machines, memory, storage and records for these settings, and print one table.

    It leaves only the results folder, with phantoms in it. Returns the exit code: 1 if a check fails, else 0.
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
        need = Need(layout=layout, torch_compile=settings.trial.torch_compile)
        if study:
            say("Estimating memory and time from the model's shapes")
            need = estimate(study, need, facts, findings)
        findings += check_nodes(facts, need)
        if need.times:
            findings += check_times(facts, probe_nodes(layout, facts), need)
        findings += measure_collectives(layout, facts, storage, say)
        findings += [*check_records(settings), *check_access(facts)]
    print_table(findings)
    return int(any(finding.status == "FAIL" for finding in findings))


def read_data(settings: Settings, say: Callable[[str], None], findings: list[Finding]) -> Study | None:
    """The study as `prepare` makes it, in a temporary folder; None, with findings, if its data cannot be used."""
    study, data = settings.study, settings.data
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if data.data == "phantoms":  # in the real results folder, so that the nodes see them
                data = dataclasses.replace(data, data=str(generate_phantoms(settings, say)))
            aside = dataclasses.replace(study, results=scratch, report_to=())  # `check_records` checks the stores
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
    """The study's lanes on this cluster; None, with a finding, if it can never hold one."""
    found = f"{resources.get('CPU', 0):g} CPU cores, {resources.get('GPU', 0):g} GPUs"
    try:
        layout = plan_layout(settings, resources)
    except SettingsError as error:
        findings.append(Finding("lanes", "cluster", found, error.problems[0]))
        return None
    kind, workers = "GPU" if layout.use_gpu else "CPU", layout.workers_per_trial
    missing = layout.lanes * workers * layout.worker_resources[kind] > resources.get(kind, 0) + 1e-6
    fix = "what is missing must come from the autoscaler: run the doctor again when the nodes are there"
    text = f"{found}: {layout.lanes} lane(s) of {workers} {kind} worker(s)"
    findings.append(Finding("lanes", "cluster", text, fix if missing else "", warning=True))
    return layout


def check_records(settings: Settings) -> Iterator[Finding]:
    """Whether the stores of --report-to can take the study's records, and their packages are installed."""
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


def check_access(facts: dict[str, Facts]) -> Iterator[Finding]:
    """Whether an existing cluster needs a token, and whether other machines reach its dashboard."""
    if not os.environ.get("RAY_ADDRESS"):
        return
    import ray

    closed = all(node["token"] for where, node in facts.items() if where != "driver" and "token" in node)
    fix = "anybody who reaches this cluster can run code on it: start Ray with RAY_AUTH_MODE=token, see docs/cluster.md"
    yield Finding("access", "cluster", "with a token" if closed else "open", "" if closed else fix, warning=True)
    url = ray.init(ignore_reinit_error=True, configure_logging=False).dashboard_url or ""
    fix = "other machines reach the dashboard: leave out --dashboard-host and look through SSH, see docs/cluster.md"
    local = not url or url.startswith(("127.0.0.1", "localhost"))
    yield Finding("dashboard", "cluster", url or "none", "" if local else fix, warning=True)


def print_table(findings: Sequence[Finding]) -> None:
    """Print the findings as a table, and below it the fixes."""
    rows = [(finding.check, finding.where, finding.found, finding.status) for finding in findings]
    tables.print_table("", ["check", "where", "found", "status"], rows, width=140)
    for finding in findings:
        if finding.fix:
            print(f"  - {finding.status}: {plain(finding.fix)}")
    failed = sum(finding.status == "FAIL" for finding in findings)
    print(f"A study cannot run: {failed} check(s) fail." if failed else "A study can run.")
