"""That the documents speak of what is there, and that imports run one way. Style and types: `.ci/run`."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_architecture_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    modules = [
        str(path.relative_to(ROOT))
        for package in ("tune", "train_fn", "search_spaces")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert len(modules) > 15
    assert [name for name in modules if f"`{name}`" not in text] == []
    named = re.findall(r"`((?:tune|train_fn|search_spaces)/[\w/]+\.py)`", text)
    assert sorted(set(named)) == sorted(modules)


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


def test_installed_versions_are_the_pinned_ones() -> None:
    pins = re.findall(r'"([\w-]+)(?:\[[^]]*\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(pins) >= 9
    for name, version in pins:
        assert importlib.metadata.version(name).split("+")[0] == version
