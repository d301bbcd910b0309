"""The winner's adapter as an MLflow model and, given a name, as a version in the model registry.

All calls go through the client: MLflow's fluent API acts on the run and the store of the whole process.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.model.adapters import read_task
from train_fn.support.files import file_hash

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "scipy", "pillow")  # that predicting imports


def log_model(client: MlflowClient, run_id: str, adapter: Path, *, register: str = "", tags: dict[str, str]) -> str:
    """Log an adapter as the run's model and, with a name to `register`, as a version of that registered model.

    The model is complete except for the frozen base: it contains `train_fn` and pins the packages it needs.
    `train_fn/pyfunc_model.py` says how to use it. A second call for the same run and adapter changes nothing.

    Args:
        adapter: an adapter's folder with its task.json.
        tags: set on the model and on the version.

    Returns the model's URI, `models:/NAME/VERSION` or `models:/ID`. Raises MlflowException if the store refuses.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException

    digest = file_hash(adapter / "adapter_model.safetensors")
    tags = {**tags, "adapter_sha256": digest}
    experiment = client.get_run(run_id).info.experiment_id
    # A resumed study may find another winner: its run then has two models.
    same = f"source_run_id = '{run_id}' AND tags.adapter_sha256 = '{digest}'"
    model = next(iter(client.search_logged_models([experiment], filter_string=same)), None)
    if model is None:
        model = client.create_logged_model(experiment, "adapter", run_id, tags, model_type="vlm-adapter")
    if model.status != LoggedModelStatus.READY:  # new, or its upload was interrupted
        with tempfile.TemporaryDirectory() as folder:
            # MLflow accepts no path with a space or a `#` in it.
            copy = shutil.copytree(adapter, Path(folder) / "adapter")
            save_model(model, run_id, copy, Path(folder) / "model")
            client.log_model_artifacts(model.model_id, f"{folder}/model")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    if not register:
        return f"models:/{model.model_id}"
    try:
        client.create_registered_model(register)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = model.artifact_location  # a SQL store would look up `models:/ID` in the process's own store
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    registered = next((v for v in versions if (v.name, v.source) == (register, source)), None)
    registered = registered or client.create_model_version(register, source, run_id, tags, model_id=model.model_id)
    return f"models:/{register}/{registered.version}"


def save_model(model: LoggedModel, run_id: str, adapter: Path, directory: Path) -> None:
    """Write the folder of an MLflow model."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    import train_fn

    code = Path(train_fn.__path__[0])
    task = read_task(adapter)
    optional = [ColSpec("string", name, required=False) for name in ("text", "question_type")]
    inputs = Schema([ColSpec("string", "image"), *optional])
    outputs = Schema([
        *(ColSpec("double", answer) for answer in task.candidates),
        *(ColSpec("string", name) for name in task.columns[len(task.candidates) :]),
    ])  # fmt: skip
    identity: dict[str, Any] = {"model_uuid": model.model_id, "model_id": model.model_id, "run_id": run_id}
    mlflow.pyfunc.save_model(
        str(directory),
        python_model=str(code / "pyfunc_model.py"),
        artifacts={"adapter": str(adapter)},
        code_paths=[str(code)],
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES],
        signature=ModelSignature(inputs, outputs),
        input_example=pd.DataFrame(
            {
                "image": ["base64 of an image file, or a JSON list of several"],
                "text": ["a question, or nothing"],
                "question_type": ["the type of question, or nothing"],
            }
        ),
        mlflow_model=Model(artifact_path=model.artifact_location, **identity),
    )
