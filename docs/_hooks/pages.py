"""mkdocs hooks: files from outside ``docs/`` become part of the site, and generated parts are put in.

A page links to other files of the repository the way they lie (``../bench/results/quality.png``), so that the pages can
also be read where they are kept; here those links are turned to where the site has the files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from commands import commands_markdown  # mkdocs puts this folder on the path
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

__all__ = ["notebook_markdown", "on_files", "on_page_markdown"]

ROOT = Path(__file__).parents[2]
COMMANDS = "<!-- commands -->"
# A file of the repository, and where the site has it. Markdown files become pages.
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "LICENSE": "LICENSE.txt"}
FOLDERS = {"bench/results": ("*.png", "results"), "examples": ("*.py", "examples")}
NOTEBOOKS = {"examples/quickstart.ipynb": "notebook.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures kept elsewhere in the repository."""
    for source, target in outside_files().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for source, target in NOTEBOOKS.items():
        text = notebook_markdown(json.loads((ROOT / source).read_text(encoding="utf-8")), Path(source).name)
        files.append(File.generated(config, target, content=text))
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def outside_files() -> dict[str, str]:
    """Each file from outside ``docs/``, relative to the repository, and its place on the site."""
    found = dict(OUTSIDE)
    for folder, (pattern, target) in FOLDERS.items():
        found |= {f"{folder}/{path.name}": f"{target}/{path.name}" for path in (ROOT / folder).glob(pattern)}
    return found


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the commands in, and turn links to files of the repository."""
    del config, files
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands_markdown())
    depth = page.file.src_uri.count("/")
    places = outside_files() | NOTEBOOKS | {name: name for name in NOTEBOOKS}
    kept_in_root = page.file.src_uri in OUTSIDE.values()

    def turn(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if kept_in_root:
            inside = target.removeprefix("docs/") if target.startswith("docs/") else places.get(target)
        else:
            inside = places.get(target.removeprefix("../" * (depth + 1)))
        return match[0] if inside is None else f"]({'../' * depth}{inside}{anchor})"

    return re.sub(r"\]\((?!https?:)([^()#\s]+)(#[^()\s]*)?\)", turn, markdown)


def notebook_markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook as a page: its texts, its code, and the outputs stored with it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts += _output(output)
    parts.append(f"[Download the notebook](examples/{name})")
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> list[str]:
    data = output.get("data", {})
    if "image/png" in data:
        return [f"![output](data:image/png;base64,{''.join(data['image/png'].split())})"]
    text = "".join(output.get("text", data.get("text/plain", "")))
    return [f'```text title="printed"\n{text.rstrip()}\n```'] if text.strip() else []
