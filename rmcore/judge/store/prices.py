"""What tokens cost, by a table the user gives. What has no price has no cost: it is counted, and never taken for free.

A table is a mapping of model to price, or a JSON file, prices in one currency per million tokens::

    {"currency": "USD", "models": {"judge-large": {"prompt": 2.5, "completion": 10, "cached": 1.25}}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rmcore._base.errors import DataError, InputError, reject
from rmcore._base.json_members import DuplicateKeyError, unique_members
from rmcore._base.numbers import Within, check_number
from rmcore.judge.base import JudgeUsage

__all__ = ["Price", "PriceTable", "answering_model", "price_call"]

# A dated or numbered release of the model that was asked for: -2024-08-06, -20241022, -0613, @001, :latest.
_RELEASE = re.compile(r"(?:-(?:\d{4}-\d{2}-\d{2}|\d{8}|\d{4}|\d{3}|latest)|[@:][\w.-]{1,40})")


@dataclass(frozen=True, slots=True)
class Price:
    """Prices of one model, per million tokens.

    Attributes:
        prompt: of prompt tokens that were not cached.
        completion: of completion tokens that were not reasoning.
        cached: of cached prompt tokens; ``None``: as ``prompt``.
        reasoning: of reasoning tokens; ``None``: as ``completion``.

    Raises:
        InputError: a price is not a finite number of at least 0.
    """

    prompt: float
    completion: float
    cached: float | None = None
    reasoning: float | None = None

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if value is None and part.name in ("cached", "reasoning"):
                continue
            expected = "a price per million tokens: a finite number, at least 0"
            check_number(part.name, value, Within(least=0), expected)

    def most(self, tokens: int) -> float:
        """The most that so many tokens can cost, whichever they are."""
        return tokens * max(self.prompt, self.completion, self.cached or 0.0, self.reasoning or 0.0) / 1e6

    def cost(self, usage: JudgeUsage) -> float | None:
        """What ``usage``'s tokens cost; ``None`` if its counts contradict each other.

        Cached tokens are part of the prompt and reasoning is part of the completion. A usage in which a part is larger
        than its whole was counted in some other way, and any sum made of it would be a guess.
        """
        prompt, completion = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens - usage.reasoning_tokens
        if min(prompt, completion) < 0:
            return None
        cached = self.prompt if self.cached is None else self.cached
        reasoning = self.completion if self.reasoning is None else self.reasoning
        total = prompt * self.prompt + usage.cached_tokens * cached
        return (total + completion * self.completion + usage.reasoning_tokens * reasoning) / 1e6


class PriceTable(Mapping[str, Price]):
    """Models and their prices, in one currency. Model names match exactly: a price is never guessed from a likeness.

    Args:
        prices: model → :class:`Price`, or a mapping with a price's fields.
        currency: its name, for people to read.

    Raises:
        InputError: naming the model and what is wrong with its price.
    """

    def __init__(self, prices: Mapping[str, Price | Mapping[str, float]], *, currency: str = "USD") -> None:
        if not isinstance(prices, Mapping):
            reject("prices", type(prices).__name__, "a mapping of model names to prices")
        if not isinstance(currency, str) or not currency.strip() or not currency.isprintable() or len(currency) > 16:
            reject("currency", repr(currency)[:80], "a short name such as 'USD'")
        self.currency = currency
        self._prices = {_name(model): _price(model, price) for model, price in prices.items()}

    @classmethod
    def from_file(cls, path: str | Path) -> PriceTable:
        """From a UTF-8 JSON file as the module describes; ``currency`` may be missing (USD).

        Raises:
            DataError: no JSON, a name that comes twice, an unknown field, or a price that is none.
            OSError: the file cannot be read.
        """
        path = Path(path)
        try:
            table = json.loads(path.read_bytes(), object_pairs_hook=unique_members)
            if not isinstance(table, dict):
                reject("the file", f"a JSON {type(table).__name__}", "an object with currency and models")
            unknown = sorted(table.keys() - {"currency", "models"})
            if unknown or "models" not in table:
                reject("the file", f"the fields {sorted(table)}", "models, and optionally currency")
            return cls(table["models"], currency=table.get("currency", "USD"))
        except InputError as error:
            raise DataError(f"{path.name}: {error}") from None
        except DuplicateKeyError as error:  # or a price would be dropped without a word
            raise DataError(f"{path.name}: {error}, expected each name once") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path.name}: not JSON: {error}"[:300]) from None

    @classmethod
    def of(cls, prices: PriceTable | Mapping[str, Any] | str | Path) -> PriceTable:
        """``prices`` as a table: as it is, from a mapping, or from a file."""
        if isinstance(prices, PriceTable):
            return prices
        return cls.from_file(prices) if isinstance(prices, (str, Path)) else cls(prices)

    def __getitem__(self, model: str) -> Price:
        return self._prices[model]

    def __iter__(self) -> Iterator[str]:
        return iter(self._prices)

    def __len__(self) -> int:
        return len(self._prices)

    def __repr__(self) -> str:
        return f"PriceTable({len(self)} models, {self.currency})"

    def cost(self, usage: JudgeUsage, model: str) -> float | None:
        """What ``usage`` cost at ``model``; ``None`` where that cannot be known.

        That is: the model has no price, the counts contradict each other (:meth:`Price.cost`), or there were calls and
        no prompt tokens, since an endpoint that reports nothing is not one that charges nothing. A usage without calls
        (a cache hit) costs 0.
        """
        if usage.calls == 0:
            return 0.0
        price = self._prices.get(model)
        return None if price is None or usage.prompt_tokens == 0 else price.cost(usage)

    def priced(self, usage: JudgeUsage, model: str) -> JudgeUsage:
        """``usage`` of one call with its ``cost``, or with the call among ``unpriced_calls``."""
        cost = self.cost(usage, model)
        return replace(usage, cost=cost or 0.0, unpriced_calls=usage.calls if cost is None else 0)


def answering_model(asked: str, said: str) -> str:
    """The model that answered: ``asked``, unless the reply says another name (``said``).

    The same model are ``asked`` itself, also in other letters and with another path before it (``org/name``, a file's
    folder), and a release of it (``name-2024-08-06``, of ``name-latest`` too): endpoints put their aliases in full. An
    empty name says nothing.
    """
    if not said:
        return asked
    short, long = (name.casefold().rstrip("/").rpartition("/")[2].removesuffix(".gguf") for name in (asked, said))
    base = re.sub(r"[-:]latest$", "", short)
    same = long in (short, base) or (long.startswith(base) and _RELEASE.fullmatch(long[len(base) :]) is not None)
    return asked if same else said


def price_call(prices: PriceTable | None, usage: JudgeUsage, model: str, reason: str, answered: str = "") -> JudgeUsage:
    """``usage`` of one call with its cost, or among ``unpriced_calls``; without a table every call that may cost is.

    The price is that of the model that ``answered``, by the very name that it gave; where that name is not in the
    table, that of :func:`answering_model`.

    A call that ended with an error status (``reason`` is ``http_<status>`` or ``insufficient_quota``) and reported no
    tokens cost nothing. Of one that timed out or broke off nobody knows.
    """
    if not usage.prompt_tokens and reason.startswith(("http_", "insufficient_quota")):
        return usage
    if prices is None:
        return replace(usage, unpriced_calls=usage.calls)
    return prices.priced(usage, answered if answered in prices else answering_model(model, answered))


def _name(model: object) -> str:
    if not isinstance(model, str) or not model:
        reject("prices", f"the model {model!r}"[:80], "the name of a model")
    return model


def _price(model: str, price: object) -> Price:
    if isinstance(price, Price):
        return price
    names = [part.name for part in fields(Price)]
    if not isinstance(price, Mapping) or not {"prompt", "completion"} <= price.keys() <= set(names):
        got = sorted(map(str, price)) if isinstance(price, Mapping) else type(price).__name__
        reject(f"prices[{model!r:.80}]", got, f"an object with prompt and completion out of {', '.join(names)}")
    try:
        return Price(**price)
    except InputError as error:
        raise InputError(f"prices[{model!r:.80}]: {error}") from None
