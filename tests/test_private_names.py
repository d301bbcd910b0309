"""A private name of a library is used in a module compat_LIBRARY.py only, and is listed below with its reason."""

from __future__ import annotations

import ast
import importlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tune", "train_fn", "search_spaces")

# (file, full name of what is used) -> why there is no public way.
ALLOWED = {
    ("train_fn/trial/compat_deepspeed.py", "deepspeed.ops.__compatible_ops__"): "the only switch of the compiled op",
    ("train_fn/trial/compat_deepspeed.py", "torch.Tensor._post_accumulate_grad_hooks"): "hooks without a handle",
    ("train_fn/model/compat_transformers.py", "transformers.LlavaProcessor._get_num_multimodal_tokens"): "lengths",
    ("train_fn/trial/compat_torch.py", "torch._dynamo"): "see the functions there",
    ("train_fn/trial/compat_torch.py", "torch._functorch"): "no other switch of the activation budget",
    ("train_fn/trial/compat_torch.py", "torch.fx.experimental._config"): "no other switch of duck shapes",
    ("tune/lanes/compat_ray.py", "ray._private"): "see the functions there",
    ("tune/lanes/compat_ray.py", "ray.train.torch.TorchTrainer._create_default_callbacks"): "no needless processes",
    ("tune/lanes/compat_ray.py", "ray.train.torch.TorchTrainer._initialize_and_run_controller"): "no autoscaler asked",
    ("tune/lanes/compat_ray.py", "ray.train.v2._internal"): "the same: the policy that asks is the base class",
}
# Of modules that are private as a whole, or undocumented.
BENEATH = [
    "deepspeed.runtime.compiler.compile",
    "deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam",
    "ray._private.services.canonicalize_bootstrap_address",
    "ray._private.worker.print_to_stdstream",
    "torch._dynamo.config.force_parameter_static_shapes",
    "torch._dynamo.config.force_nn_module_property_static_shapes",
    "torch._dynamo.config.fail_on_recompile_limit_hit",
    "torch._dynamo.maybe_mark_dynamic",
    "torch._dynamo.lookup_backend",
    "torch._dynamo.exc.TorchDynamoException",
    "torch._dynamo.exc.FailOnRecompileLimitHit",
    "torch._functorch.config.activation_memory_budget",
    "torch._functorch.config.force_non_lazy_backward_lowering",
    "torch.fx.experimental._config.use_duck_shape",
    "ray._private.authentication.authentication_utils.is_token_auth_enabled",
    "ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE",
    "ray.train.v2._internal.execution.scaling_policy.FixedScalingPolicy._maybe_send_resource_request",
    "ray.train.v2._internal.execution.scaling_policy.FixedScalingPolicy.after_controller_start",
]


# Public in spite of their names.
DOCUMENTED = {"_exit": "os._exit", "__ray_ready__": "of every actor's handle, in Ray's guide to actors"}

# Names that Python documents for every module, class, function, exception or object.
KINDS = (object, type, types.FunctionType, types.ModuleType, BaseException)
PYTHONS = {name for kind in KINDS for name in dir(kind)} | {
    "__future__",
    "__version__",
    "__file__",
    "__path__",
    "__all__",
}


def is_private(name: str) -> bool:
    """Whether a name is `_x`, or a dunder that is not Python's."""
    return name.startswith("_") and name.strip("_") != "" and name not in PYTHONS and name not in DOCUMENTED


def names_from_elsewhere(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a module takes from another object than `self` and `cls`, and their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr, node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((part, node.lineno) for module in modules for part in module.split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            yield ast.unparse(node.args[1]).strip("'"), node.lineno


def private_names(source: str) -> dict[str, list[int]]:
    """Lines of every private name of another object, by name."""
    found: dict[str, list[int]] = {}
    for name, line in names_from_elsewhere(ast.parse(source)):
        if is_private(name):
            found.setdefault(name, []).append(line)
    return found


def test_the_scan_finds_every_form_of_use() -> None:
    source = """
import ray._private.services
from optuna.trial import _frozen
from mlflow._internal import store
study._storage.close(); super()._begin(); layer.__secret_table__; getattr(study, "_cached"); self._own; os._exit(0)
model.__class__.__name__; torch.__version__; [_ for _ in ()]
"""
    names = {"_private", "_frozen", "_internal", "_storage", "_begin", "__secret_table__", "_cached"}
    assert private_names(source).keys() == names


def test_no_private_name_of_a_library_outside_the_list() -> None:
    allowed = {(file, name.rpartition(".")[2]) for file, name in ALLOWED}
    used = {
        (path.relative_to(ROOT).as_posix(), name): lines
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for name, lines in private_names(path.read_text(encoding="utf-8")).items()
    }
    new = [f"{file}: {name} in line {lines[0]}" for (file, name), lines in used.items() if (file, name) not in allowed]
    assert not new, f"use a public way, or a compat module and the list: {new}"
    assert not (unused := allowed - used.keys()), f"no longer used, take them out of the list: {unused}"


def test_the_listed_names_stand_in_compat_modules() -> None:
    assert all(Path(file).name.startswith("compat_") for file, _ in ALLOWED)


def resolve(name: str) -> Any:
    """The object of a full name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", sorted({name for _, name in ALLOWED} | {*BENEATH}))
def test_every_listed_name_exists_in_the_installed_library(name) -> None:
    resolve(name)


def test_the_mark_of_a_serving_mlflow_is_the_installed_versions() -> None:
    """pyfunc_model.py reads it from the environment: a model then also loads where MLflow has renamed its constant."""
    import mlflow.environment_variables

    source = (ROOT / "train_fn/pyfunc_model.py").read_text(encoding="utf-8")
    assert f'"{mlflow.environment_variables._MLFLOW_IS_IN_SERVING_ENVIRONMENT.name}"' in source


def test_the_undocumented_names_of_bitsandbytes_exist() -> None:
    """compat_bitsandbytes.py uses them; they have no underscore."""
    import inspect

    import bitsandbytes.functional
    import bitsandbytes.nn
    import bitsandbytes.optim
    from bitsandbytes.optim.optimizer import Optimizer8bit

    assert hasattr(bitsandbytes.functional.GlobalPageManager.get_instance(), "paged_tensors")
    buffer = inspect.getsource(Optimizer8bit.get_state_buffer) + inspect.getsource(bitsandbytes.functional.get_paged)
    assert "self.page_mng.paged_tensors" in buffer and "page_deviceid" in buffer and "is_paged" in buffer
    assert bitsandbytes.nn.Linear4bit(2, 2).support_avx512bf16_for_cpu is not None
