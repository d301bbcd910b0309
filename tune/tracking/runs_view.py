"""How MLflow's pages show a study: its saved view of the run table, the experiment's tags, the datasets, the address.

MLflow 3.17 opens an experiment on its GenAI pages, whatever its tags say: the browser remembers "GenAI" or "Model
training". Only an address with `workflowType` overrides that. A saved view is a tag of the experiment, and the address
with its key opens the run table with the view's filter, order, columns and charts. It holds the fields that the page
itself stores (mlflow/server/js, ExperimentPageUIState and savedViewEnvelope), as plain JSON, which the page reads, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.data.samples import PARTS
from tune.tracking.target import Target

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

KIND, NOTE, VIEW = "mlflow.experimentKind", "mlflow.note.content", "mlflow.sharedViewState."
TAG_LENGTH = 5000  # of an experiment's tag in MLflow
SHOWN_RUNS = 100  # most trials in a chart
LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mlflow ui` answers
DESCRIPTION = (
    "A run is a study of vlm-tune, its child runs are the trials. **Views**, at the top, opens a study's trials."
)


def runs_address(uri: str, experiment_id: str, study_id: str) -> str:
    """The address of a study's trials in MLflow's pages.

    Args:
        uri: the store, without credentials. A local one is shown by `mlflow ui`.

    Returns "" for a store of which only its owner knows the address, such as Databricks or a remote database.
    """
    server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL_SERVER
    if not experiment_id or uri.startswith(("databricks", "uc")):
        return ""
    view = f"workflowType=machine_learning&viewStateShareKey={view_key(study_id)}"
    return f"{server}/#/experiments/{experiment_id}/runs?{view}"


def view_key(study_id: str) -> str:
    """The key of a study's view, with letters, digits and dashes only: it is part of a tag's name and of an address."""
    return re.sub(r"\W", "-", study_id, flags=re.ASCII)


def experiment_tags(
    tags: Mapping[str, str], target: Target, parent: str, searched: Iterable[str], now: int
) -> dict[str, str]:
    """The experiment's tags to set: its kind and description unless it has some, and the study's view if it changes.

    Args:
        tags: the experiment's tags.
        parent: id of the study's run.
        searched: names of the parameters that a trial searched; the view also shows those of earlier trials.
        now: ms since the epoch.
    """
    new = {KIND: "custom_model_development", NOTE: DESCRIPTION}
    new = {name: text for name, text in new.items() if not tags.get(name)}
    key = VIEW + view_key(target.study_id)
    created, names, common = read_view(tags.get(key, ""))
    if searched := list(searched):
        # MLflow draws no line for a trial that lacks a parameter, such as the rate of a projector that stays frozen.
        common = [name for name in searched if name in common or not names]
        names = [*dict.fromkeys([*names, *searched])]
    view = saved_view(target, parent, names, common, created or now)
    return new if tags.get(key) == view else new | {key: view}


def read_view(text: str) -> tuple[int, list[str], list[str]]:
    """A stored view: when it was created (ms since the epoch; 0: there is none), the parameters among its columns, and
    those in its chart."""
    try:
        view = json.loads(text)
        state = json.loads(view["state"])
        params = [column[8:-1] for column in state["selectedColumns"] if column.startswith("params.`")]
        return int(view["createdAt"]), params, list(state["compareRunCharts"][0]["selectedParams"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return 0, [], []  # none, or a person's change: it is made anew


def saved_view(target: Target, parent: str, searched: list[str], common: list[str], created: int) -> str:
    """A study's view as the value of its tag. Parameters that would make it too long are left out."""
    while True:
        state = json.dumps(view_state(target, parent, searched, common))
        text = json.dumps({"name": target.study, "createdAt": created, "updatedAt": created, "state": state})
        if len(text) <= TAG_LENGTH or not searched:
            return text
        searched, common = searched[:-1], [name for name in common if name != searched[-1]]


def view_state(target: Target, parent: str, searched: list[str], common: list[str]) -> dict[str, Any]:
    """What a study's view shows: its trials, best first; objective, end state and what was searched.

    Args:
        common: what every trial searched, for the chart of parallel coordinates.
    """
    score, metric = f"metrics.`{target.score}`", target.metric
    columns = [score, "tags.`end_state`", *(f"params.`{name}`" for name in searched)]
    widths = {column: 30 + 6 * len(column.split("`")[1]) for column in columns}  # in pixels: no name is cut
    chart = {"runsCountToCompare": SHOWN_RUNS, "metricSectionId": "study", "deleted": False, "isGenerated": False}
    parallel = {
        "type": "PARALLEL", "uuid": "searched", "selectedParams": common, "selectedMetrics": [target.score],
        "showAllRuns": False,
    }  # fmt: skip
    curves = {
        "type": "LINE", "uuid": "curves", "metricKey": metric, "selectedMetricKeys": [metric], "xAxisKey": "step",
        "scaleType": "linear", "xAxisScaleType": "linear", "lineSmoothness": 0,
    }  # fmt: skip
    section = {"uuid": "study", "name": f"Study {target.study}", "display": True, "columns": 1, "cardHeight": 420}
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "orderByKey": score,
        "orderByAsc": target.mode == "min",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": widths | {score: widths[score] + 30, "tags.`end_state`": 120},  # the order's sign; INTERRUPTED
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [parallel | chart, curves | chart],
        "compareRunSections": [section],
        "isAccordionReordered": True,  # else the page would move the study's section behind its own
    }


def datasets(target: Target, tags: Mapping[str, Any], params: Mapping[str, Any]) -> list[DatasetInput]:
    """The study's train, validation and test parts as inputs of its run.

    `data_hash` covers all parts in their order, so with the sizes it identifies each.

    Args:
        tags, params: of the "session" event.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    sizes = [params.get(f"num_{part}") for part in PARTS]
    if not target.data_hash or None in sizes:
        return []  # a study of an earlier version
    inputs = []
    for part, size in zip(PARTS, sizes, strict=True):
        digest = hashlib.sha256(f"{target.data_hash} {sizes} {part}".encode()).hexdigest()[:12]
        data = str(tags.get("data") or "phantoms")
        dataset = Dataset(
            name=Path(data).stem or "data",
            digest=digest,
            source_type="local",
            source=json.dumps({"uri": data}),
            profile=json.dumps({"num_rows": size}),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", part)]))
    return inputs
