"""Cross-references of our docstrings (:class:`~rmcore.RewardEngine`, Sphinx's form) as links of mkdocs-autorefs.

Also splits ``a, b: text`` in a list of arguments into one entry a name, as mkdocstrings wants it.
"""

from __future__ import annotations

import html
import re
from typing import Any

import griffe

__all__ = ["SphinxRoles", "links", "split_entries"]

_ROLE = re.compile(r":(?:py:)?(class|func|meth|mod|attr|data|exc|obj):`([^`]+)`")
_TITLED = re.compile(r"(.+?)\s*<([^<>]+)>", re.DOTALL)
_SECTION = re.compile(r"^(\s*)(Args|Attributes|Raises):\s*$")
_ENTRY = re.compile(r"^(\s+)([*\w]+(?:, [*\w]+)+): ?(.*)$")


class SphinxRoles(griffe.Extension):
    """Rewrites each docstring once, after the package is loaded and names can be resolved."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that is defined in the package."""
        if obj.docstring is not None:
            obj.docstring.value = links(split_entries(obj.docstring.value), obj)


def links(text: str, scope: griffe.Object) -> str:
    """``text`` with every role as a link; what has no place on the site stays code without one."""

    def link(match: re.Match[str]) -> str:
        kind, body = match.groups()
        titled = _TITLED.fullmatch(body.strip())
        target = " ".join((titled[2] if titled else body).split())
        short = target.startswith("~")
        target = target.lstrip("~!")
        title = titled[1].strip() if titled else target.rpartition(".")[2] if short else target
        if kind in ("func", "meth") and not titled:
            title += "()"
        where, what = html.escape(resolve(target, scope)), html.escape(title)
        return f'<autoref identifier="{where}" optional><code>{what}</code></autoref>'

    return _ROLE.sub(link, text)


def resolve(target: str, scope: griffe.Object) -> str:
    """The full path of a name as seen from ``scope``; the name itself if nothing there is called so."""
    first, dot, rest = target.partition(".")
    try:
        return scope.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        return target


def split_entries(text: str) -> str:
    """In lists of arguments, attributes and exceptions: ``a, b: text`` twice, once for ``a`` and once for ``b``."""
    out: list[str] = []
    lines = text.splitlines()
    section: int | None = None
    k = 0
    while k < len(lines):
        line = lines[k]
        head = _SECTION.match(line)
        if head:
            section = len(head[1])
        elif section is not None and line.strip() and _indent(line) <= section:
            section = None
        entry = _ENTRY.match(line) if section is not None else None
        k += 1
        if entry is None:
            out.append(line)
            continue
        body = [entry[3]]
        while k < len(lines) and lines[k].strip() and _indent(lines[k]) > len(entry[1]):
            body.append(lines[k])
            k += 1
        for name in entry[2].split(", "):
            out += [f"{entry[1]}{name}: {body[0]}", *body[1:]]
    return "\n".join(out)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
