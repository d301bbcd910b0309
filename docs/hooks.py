"""Hooks of MkDocs: the pages that nobody writes by hand.

The home page is README.md. The reference is made from the settings' docstrings and the commands' help. A file outside
docs/ that a page links to becomes a part of the site.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")  # the target of a Markdown link, without its anchor
OTHER_COMMANDS = ("train_fn.inspect", "train_fn.predict", "tune.control", "tune.tracking.__main__")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files outside docs/ that are linked."""
    sys.path.insert(0, str(ROOT))
    files.append(File.generated(config, "options.md", content=options_page()))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    waiting = ["README.md", "CHANGELOG.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    while waiting:
        path = ROOT / waiting.pop()
        uri = site_uri(str(path.relative_to(ROOT)))
        if uri not in files.src_uris and path.is_file():
            content = notebook_page(path) if path.suffix == ".ipynb" else None
            its: dict[str, Any] = {"content": content} if content else {"abs_src_path": str(path)}
            files.append(File.generated(config, uri, **its))
        elif not path.is_file() or path.suffix != ".md":
            continue
        if path.suffix == ".md":
            targets = {(path.parent / target).resolve() for target in LINK.findall(path.read_text(encoding="utf-8"))}
            inside = [target for target in targets if target.is_relative_to(ROOT)]
            known = files.src_uris.keys()
            waiting += [name for t in inside if site_uri(name := str(t.relative_to(ROOT))) not in known]
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point the links of a page, which are those of the repository, to the site's files."""
    here = page.file.src_uri
    outside = (ROOT / here).is_file() or here == "index.md"
    folder = os.path.dirname("README.md" if here == "index.md" else here if outside else f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = site_uri(os.path.normpath(os.path.join(folder, link[1])))
        return os.path.relpath(target, os.path.dirname(here) or ".")

    # Python-Markdown takes the lines right below a comment for a part of it.
    return LINK.sub(moved, markdown).replace("-->\n", "-->\n\n")


def site_uri(path: str) -> str:
    """The site's file for a file of the repository."""
    if path == "README.md":
        return "index.md"
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: text, code, and what the code has shown."""
    page = ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        page += f"```python\n{source}\n```\n\n" if cell["cell_type"] == "code" else f"{source}\n\n"
        for output in cell.get("outputs", []):
            shown = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
            if picture := shown.get("image/png"):
                page += f"![](data:image/png;base64,{picture.replace(chr(10), '')})\n\n"
            elif table := shown.get("text/html"):
                page += "\n".join(filter(str.strip, table.splitlines())) + "\n\n"
            elif text := shown.get("text/plain", "".join(output.get("text", ""))):
                page += f"```text\n{text}\n```\n\n"
    return page


# ------------------------------------------------------------------------------------------------ reference


def options_page() -> str:
    """Every option of `tune/run.py`, from the settings that it is derived from."""
    from train_fn.settings import field_docs, flag
    from tune.config.cli import is_switch
    from tune.config.settings import GROUPS, show

    page = "# All options\n\nOf `python tune/run.py`, made from its settings as `--help-all` is.\n"
    names = {flag(field.name) for group in GROUPS for field in dataclasses.fields(group)}
    for group in GROUPS:
        page += f"\n## {(group.__doc__ or '').partition('.')[0]}\n"
        docs = field_docs(group)
        for field in dataclasses.fields(group):
            option, switch = flag(field.name), is_switch(group, field.name)
            default = f"`{option if field.default else '--no-' + option[2:]}`" if switch else f"`{show(field.default)}`"
            facts = [f"Default: {'none' if field.default in ('', (), None) else default}", rule_of(group, field.name)]
            other = f", `--no-{option[2:]}`" if switch else ""
            page += f"\n### `{option}`{other} {{ #{option[2:]} }}\n\n{linked(docs[field.name], names)}\n\n"
            page += f"{'. '.join(filter(None, facts))}.\n"
    return page


def rule_of(group: type, name: str) -> str:
    """The values that a setting may have, as its error message says it; "" if every text is allowed."""
    from train_fn.settings import broken_rule, rules

    kind, rule = rules(group)[name]
    if kind in (bool, bool | None):
        return ""
    if kind in (str, tuple[str, ...]):
        return escaped(f"Must be {'a list; each must be ' * (kind is not str)}{rule.words}") if rule else ""
    return escaped(broken_rule("", kind, rule).capitalize())


def linked(text: str, options: set[str]) -> str:
    """A docstring as Markdown, its options as links."""
    parts = text.split("`")
    parts[::2] = [
        re.sub(r"--[a-z][\w-]*", lambda m: f"[`{m[0]}`](#{m[0][2:]})" if m[0] in options else m[0], escaped(part))
        for part in parts[::2]
    ]
    return "`".join(parts)


def escaped(text: str) -> str:
    """Plain text as Markdown."""
    return re.sub(r"([\\*_\[\]])", r"\\\1", html.escape(text, quote=False))


def commands_page() -> str:
    """What the other commands print for `--help`."""
    page = "# Other commands\n\nWhat they print for `--help`.\n"
    for module in OTHER_COMMANDS:
        text = io.StringIO()
        with (
            mock.patch.dict(os.environ, COLUMNS="100"),  # argparse reads it
            contextlib.redirect_stdout(text),
            contextlib.suppress(SystemExit),
        ):
            importlib.import_module(module).main(["--help"])
        page += f"\n## `python -m {module.removesuffix('.__main__')}`\n\n```text\n{text.getvalue()}```\n"
    return page
