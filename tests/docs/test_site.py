"""``make docs``: the site builds without a warning and needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import ROOT
from support.shared import made_once

import rmcore
from rmcore import ops

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings_handlers.python")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def build(out: Path) -> None:
        environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr  # not --quiet, which hides warnings from --strict too
        assert "WARNING" not in done.stdout + done.stderr

    return made_once(tmp_path_factory, "site", build)


def html(site: Path) -> dict[str, str]:
    return {str(page.relative_to(site)): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for name, text in html(site).items():
        assert re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\s\">]*", text) == [], (
            name
        )
    for sheet in site.rglob("*.css"):
        assert re.findall(r"url\(\"?https?:|@import", sheet.read_text(encoding="utf-8")) == [], sheet.name


def test_no_role_is_left_as_text(site: Path) -> None:
    for name, text in html(site).items():
        assert re.findall(r":(?:class|func|meth|mod|attr|data):`?<?", text) == [], name
        assert "<autoref" not in text, name


def test_every_public_name_has_a_place(site: Path) -> None:
    page = html(site)["api/rmcore.html"]
    names = [name for name in rmcore.__all__ if name not in ("__version__", "ops")]
    assert [name for name in names if f'id="rmcore.{name}"' not in page] == []
    page = html(site)["api/ops.html"]
    assert [name for name in ops.OPS if f'id="rmcore.ops.{name}"' not in page] == []


def test_links_between_names_lead_somewhere(site: Path) -> None:
    page = html(site)["api/rmcore.html"]
    assert re.search(r'href="[^"]*#rmcore\.RewardEngine\.score_hidden"[^>]*><code>score_hidden\(\)</code>', page)


def test_commands_pictures_and_included_pages_are_there(site: Path) -> None:
    assert 'id="rmcore-score"' in html(site)["commands.html"]
    assert (site / "results" / "quality.png").is_file()
    for page in ("contributing.html", "changelog.html", "notebook.html"):
        assert (site / page).is_file()
    assert not list(site.rglob("_hooks"))
