"""Spans for OpenTelemetry, where the process has set it up; nothing at all where it has not.

The program decides: once it has imported ``opentelemetry.trace`` (an SDK does, and ``opentelemetry-instrument`` does),
rmcore's spans go to its tracer provider. Otherwise a span is a look into ``sys.modules``. No span holds a text: not of
a prompt, a response or a reply; what they hold are counts, models, seconds by their nature, and reasons of failures.

Context variables carry the parent along: into the thread of a score call, onto the judge's loop, into its tasks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from rmcore._base.version import __version__

__all__ = ["Span", "span"]


class Span:
    """A span that is open, or nothing."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Any = None) -> None:
        self._inner = inner

    @property
    def recording(self) -> bool:
        """Whether somebody will see what is set."""
        return self._inner is not None and bool(self._inner.is_recording())

    def set(self, **attributes: str | float | bool | None) -> None:
        """Attributes; ``__`` in a name stands for a dot, ``None`` for none."""
        if self._inner is not None:
            for name, value in attributes.items():
                if value is not None:
                    self._inner.set_attribute(name.replace("__", "."), value)

    def fail(self, reason: str) -> None:
        """The work did not come to what it was to; ``reason`` is a short word, no text of anybody's."""
        if self._inner is not None:
            from opentelemetry.trace import StatusCode

            self._inner.set_attribute("error.type", reason)
            self._inner.set_status(StatusCode.ERROR)


_NOTHING: Final = Span()


@contextmanager
def span(name: str, *, client: bool = False, **attributes: str | float | bool | None) -> Iterator[Span]:
    """Everything inside is part of the span ``name``.

    Args:
        name: as in ``rmcore.backbone``.
        client: a request to another service.
        attributes: as of :meth:`Span.set`.
    """
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        yield _NOTHING
        return
    kind = api.SpanKind.CLIENT if client else api.SpanKind.INTERNAL
    tracer = api.get_tracer("rmcore", __version__)
    # An exception's message may quote a text, so its type is kept, and neither message nor traceback.
    with tracer.start_as_current_span(name, kind=kind, record_exception=False, set_status_on_exception=False) as inner:
        opened = Span(inner)
        opened.set(**attributes)
        try:
            yield opened
        except BaseException as error:
            opened.fail(type(error).__qualname__)
            raise
