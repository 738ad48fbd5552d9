"""The date that a chat template reads, as an input like any other.

Templates may ask ``strftime_now(format)``, so what a model is fed, and with it every score, would change by the day.
Here the function answers with one given date, at midnight and in English: it is defined again by a macro in front of
the template, since transformers lets no caller pass a function in.
"""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

from rmcore._base.errors import reject

__all__ = ["parse_date", "pinned_template", "reads_clock"]

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_CLOCK = re.compile(r"\bstrftime_now\b")
_PERCENT = "\ue0f2"  # stands for %% while the other directives are replaced


def reads_clock(tokenizer: Any) -> bool:
    """Whether a chat template of a tokenizer asks what day it is."""
    found = getattr(tokenizer, "chat_template", None)
    templates = found.values() if isinstance(found, dict) else [found]
    return any(isinstance(text, str) and _CLOCK.search(text) is not None for text in templates)


def parse_date(text: str) -> datetime.date:
    """A date written YYYY-MM-DD; raises InputError."""
    try:
        return datetime.date.fromisoformat(text)
    except (TypeError, ValueError):
        reject("date", repr(text), "a date as YYYY-MM-DD, or None")


def pinned_template(template: str, date: datetime.date) -> str:
    """``template`` with ``strftime_now`` answering for ``date`` at 00:00; unchanged where it does not ask."""
    if _CLOCK.search(template) is None:
        return template
    steps = [("%%", _PERCENT), *_directives(date).items(), (_PERCENT, "%")]
    chain = "".join(f"|replace({json.dumps(a)},{json.dumps(b)})" for a, b in steps)
    # The environment eats the line's end behind a block, so the template begins on a line of its own, as before.
    return f"{{% macro strftime_now(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}\n{template}"


def _directives(date: datetime.date) -> dict[str, str]:
    """strftime's directives and what they say. Not its own answers: those of %a, %b and %c follow the locale."""
    day, month = _DAYS[date.weekday()], _MONTHS[date.month - 1]
    numbers = {"d": date.day, "m": date.month, "y": date.year % 100, "H": 0, "I": 12, "M": 0, "S": 0}
    found = {f"%{name}": f"{value:02d}" for name, value in numbers.items()}
    found |= {f"%-{name}": str(value) for name, value in numbers.items()}  # as glibc has them: without the zero
    year, week, weekday = date.isocalendar()
    ordinal = date.timetuple().tm_yday
    since_sunday = (date.weekday() + 1) % 7
    found |= {
        "%a": day[:3],
        "%A": day,
        "%b": month[:3],
        "%B": month,
        "%h": month[:3],
        "%Y": f"{date.year:04d}",
        "%C": f"{date.year // 100:02d}",
        "%G": f"{year:04d}",
        "%V": f"{week:02d}",
        "%u": str(weekday),
        "%w": str(since_sunday),
        "%j": f"{ordinal:03d}",
        "%-j": str(ordinal),
        "%U": f"{(ordinal + 6 - since_sunday) // 7:02d}",
        "%W": f"{(ordinal + 6 - date.weekday()) // 7:02d}",
        "%e": f"{date.day:2d}",
        "%k": " 0",
        "%l": "12",
        "%f": "000000",
        "%p": "AM",
        "%P": "am",
        "%z": "",
        "%Z": "",
        "%n": "\n",
        "%t": "\t",
    }
    d, m, y = found["%d"], found["%m"], found["%y"]
    return found | {
        "%c": f"{found['%a']} {found['%b']} {found['%e']} 00:00:00 {found['%Y']}",
        "%x": f"{m}/{d}/{y}",
        "%D": f"{m}/{d}/{y}",
        "%F": f"{found['%Y']}-{m}-{d}",
        "%X": "00:00:00",
        "%T": "00:00:00",
        "%R": "00:00",
        "%r": "12:00:00 AM",
    }
