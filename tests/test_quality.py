"""The import graph, and that the documents name what exists. Style and types: `.ci/run`."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    names = re.findall(r"[`(]((?:tune|train_fn|search_spaces|tests|docs|benchmarks)/[\w/.-]+\.\w+)", text)
    assert len(names) > 3 and [name for name in names if not (ROOT / name).exists()] == []


def imports(package: str) -> dict[str, str]:
    """Import lines of a package's modules, also those within functions."""
    return {
        str(path.relative_to(ROOT)): "\n".join(
            re.findall(r"^\s*(?:from|import) .*", path.read_text(), flags=re.MULTILINE)
        )
        for path in (ROOT / package).rglob("*.py")
    }


def test_imports_run_one_way() -> None:
    for name, lines in imports("train_fn").items():
        assert not re.search(r"\b(tune|search_spaces)\b(?!\.)", lines.replace("ray.tune", "")), name
    for name, lines in imports("search_spaces").items():
        assert not re.search(r"\b(tune|train_fn)\b", lines), name
    with_ray = [name for name, lines in imports("train_fn").items() if re.search(r"(from|import) ray\b", lines)]
    assert with_ray == ["train_fn/worker.py"]


# The rooms from top to bottom: a module imports its own room and those below. ARCHITECTURE.md has the same lists.
ROOMS = {
    "tune": ["api", "child", "run", "control", "transfer", "study", "replay", "show", "doctor", "final_test", "confirm",
             "conclude", "signals", "search", "lanes", "plan", "tracking", "results", "config", "records"],
    "train_fn": ["main", "worker", "pyfunc_model", "predictor", "predict", "inspect", "serving", "datasheet", "trial",
                 "scoring", "jobs", "model", "data", "support", "execution", "settings", "nano"],
}  # fmt: skip
MAX_LINES = 420  # "about 400"


def modules(package: str) -> dict[str, Path]:
    """The source file of each module of a package, by the module's full name. The package itself and empty files are
    left out."""
    files = [path for path in (ROOT / package).rglob("*.py") if path.stat().st_size]
    files = [path for path in files if path != ROOT / package / "__init__.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def import_graph(package: str) -> dict[str, set[str]]:
    """The modules of its package that each module imports, from the source; imports within functions count, too."""
    files = modules(package)
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        graph[module] = names & files.keys()
    return graph


@pytest.mark.parametrize(("package", "num_modules"), [("tune", 50), ("train_fn", 35)])
def test_imports_run_down_the_rooms_and_in_no_circle(package: str, num_modules: int) -> None:
    graph, rooms = import_graph(package), ROOMS[package]
    position = {module: rooms.index(module.split(".")[1]) for module in graph}
    assert len(graph) >= num_modules and sum(map(len, graph.values())) > 2 * num_modules
    assert {module.split(".")[1] for module in graph} == set(rooms)
    assert [(m, other) for m in graph for other in graph[m] if position[other] < position[m]] == []
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize("package", ROOMS)
def test_the_packages_themselves_import_nothing(package: str) -> None:
    assert "import" not in (ROOT / package / "__init__.py").read_text()


def test_the_import_graph_has_imports_within_functions_and_shows_circles() -> None:
    graph = import_graph("tune")
    assert "tune.study" in graph["tune.run"]
    graph["tune.records.plan"] |= {"tune.study"}
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", ROOMS)
def test_architecture_lists_the_rooms_in_order(package: str) -> None:
    (table,) = re.findall(rf"<!-- rooms of {package} -->\n((?:.+\n)+)", (ROOT / "ARCHITECTURE.md").read_text())
    assert re.findall(rf"^\| `{package}/(\w+)", table, re.MULTILINE) == ROOMS[package]


def test_no_module_is_long() -> None:
    lengths = {name: path.read_text().count("\n") for package in ROOMS for name, path in modules(package).items()}
    assert len(lengths) > 90
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_installed_versions_are_the_pinned_ones() -> None:
    pins = re.findall(r'"([\w-]+)(?:\[[^]]*\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(pins) >= 9
    for name, version in pins:
        assert importlib.metadata.version(name).split("+")[0] == version
