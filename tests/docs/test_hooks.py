"""What is made at build time: the commands' page, links out of Sphinx roles, links to files of the repository."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from support.pages import ROOT

MODULE = '''
class Judge:
    """A judge; see :meth:`ask`."""

    def ask(self):
        """Ask. See :class:`Judge`, :class:`~json.JSONDecoder`, :func:`helper` and :meth:`the verb <Judge.ask>`."""

def helper(a, b, c):
    """Help.

    Args:
        a, b: two
            things.
        c: one: two, three.
    """
'''


@pytest.fixture
def module(tmp_path):
    griffe = pytest.importorskip("griffe")
    (tmp_path / "sample.py").write_text(MODULE)
    return griffe.load("sample", search_paths=[tmp_path], allow_inspection=False)


def test_roles_become_links_to_the_full_name(hooks, module):
    links = hooks["roles"].links
    ask = module["Judge.ask"]
    assert links(module["Judge"].docstring.value, module["Judge"]) == (
        'A judge; see <autoref identifier="sample.Judge.ask" optional><code>ask()</code></autoref>.'
    )
    found = re.findall(r'identifier="([^"]+)" optional><code>([^<]+)<', links(ask.docstring.value, ask))
    assert found == [
        ("sample.Judge", "Judge"),
        ("json.JSONDecoder", "JSONDecoder"),
        ("sample.helper", "helper()"),
        ("sample.Judge.ask", "the verb"),
    ]


def test_a_name_that_does_not_exist_stays_as_it_is(hooks, module):
    assert 'identifier="Nobody"' in hooks["roles"].links(":class:`Nobody`", module)


def test_several_names_in_one_entry_become_an_entry_each(hooks, module):
    text = hooks["roles"].split_entries(module["helper"].docstring.value)
    entries = re.findall(r"^    (\w+): (.*)", text, re.MULTILINE)
    assert entries == [
        ("a", "two"),
        ("b", "two"),
        ("c", "one: two, three."),
    ]
    assert text.count("things.") == 2


def test_text_outside_lists_of_arguments_is_left_alone(hooks):
    text = "Names, words: what they are.\n\n    a, b: code\n"
    assert hooks["roles"].split_entries(text) == text.rstrip("\n")


def test_the_page_has_every_command_and_option(hooks):
    page = hooks["commands"].commands_markdown()
    for name, command in hooks["commands"].command_table().items():
        (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
        assert command.help.splitlines()[0] in section
        for parameter in command.params:
            assert parameter.hidden or re.search(rf"^\| `[^`]*{re.escape(parameter.opts[0])}\b", section, re.MULTILINE)
    assert "--suite" in page, "rmcore bench reads its own options"


def test_links_to_files_of_the_repository_are_turned(hooks):
    def turned(markdown: str, page: str) -> str:
        at = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        return hooks["pages"].on_page_markdown(markdown, page=at, config=None, files=None)

    assert turned("![x](../bench/results/quality.png)", "concepts.md") == "![x](results/quality.png)"
    assert turned("![x](../../bench/results/quality.png)", "adapters/trl.md") == "![x](../results/quality.png)"
    assert turned("[r](docs/api/routing.md#x)", "contributing.md") == "[r](api/routing.md#x)"
    for kept in ("[a](adapters/index.md)", "[a](https://x.y/z)", "[a](#here)"):
        assert turned(kept, "index.md") == kept


def test_every_picture_used_is_kept_in_the_repository(hooks):
    outside = hooks["pages"].outside_files()
    assert all((ROOT / path).is_file() for path in outside)


def test_a_notebook_becomes_text_code_and_outputs(hooks):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [{"text": ["1\n"]}, {"data": {"image/png": "aGk=\n", "text/plain": "<Figure>"}}],
        },
        {"cell_type": "code", "source": ["x = 1"], "outputs": []},
    ]
    page = hooks["pages"].notebook_markdown({"cells": cells}, "n.ipynb")
    assert page.startswith("# Title\ntext\n\n```python\nprint(1)\n```\n\n```text")
    assert "\n1\n```" in page
    assert "(data:image/png;base64,aGk=)" in page
    assert "Figure" not in page
    assert page.endswith("```python\nx = 1\n```\n\n[Download the notebook](examples/n.ipynb)\n")
