"""Costs come from the user's table or not at all."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import DataError, InputError
from rmcore.judge import JudgeUsage, Pair, Price, PriceTable
from rmcore.judge.store.prices import price_call

USAGE = JudgeUsage(
    calls=1, attempts=1, prompt_tokens=1000, cached_tokens=400, completion_tokens=200, reasoning_tokens=150
)
TABLE = PriceTable({"m": Price(2.0, 10.0, cached=0.5, reasoning=20.0), "plain": {"prompt": 2, "completion": 10}})


def test_parts_are_charged_as_parts():
    # 600 at 2, 400 at 0.5, 50 at 10, 150 at 20, per million
    assert TABLE.cost(USAGE, "m") == pytest.approx((1200 + 200 + 500 + 3000) / 1e6, rel=1e-12)


def test_parts_without_a_price_cost_what_their_whole_costs():
    assert TABLE.cost(USAGE, "plain") == pytest.approx((2000 + 2000) / 1e6, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "usage"),
    [
        ("unknown", USAGE),
        ("M", USAGE),  # a likeness is no price
        ("m", JudgeUsage(calls=1, attempts=1)),  # nothing reported is not nothing charged
        ("m", JudgeUsage(calls=1, prompt_tokens=10, cached_tokens=11)),  # a part above its whole
        ("m", JudgeUsage(calls=1, prompt_tokens=10, completion_tokens=5, reasoning_tokens=6)),
    ],
)
def test_what_cannot_be_known_is_counted_and_never_zero(model, usage):
    assert TABLE.cost(usage, model) is None
    priced = TABLE.priced(usage, model)
    assert (priced.cost, priced.unpriced_calls) == (0.0, 1)


def test_a_hit_costs_nothing():
    assert TABLE.cost(JudgeUsage(cache_hits=3), "unknown") == 0


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 10**6)), min_size=1, max_size=8))
def test_costs_add_up(tokens):
    """The cost of a sum is the sum of the costs: a total over calls may be priced at once."""
    usages = [JudgeUsage(calls=1, prompt_tokens=p, completion_tokens=c) for p, c in tokens]
    whole = TABLE.cost(JudgeUsage.total(usages), "m")
    assert whole == pytest.approx(JudgeUsage.total(TABLE.priced(u, "m") for u in usages).cost, rel=1e-9)


@pytest.mark.parametrize(
    ("prices", "says"),
    [
        ({"m": {"prompt": 1}}, "m.*prompt and completion"),
        ({"m": {"prompt": 1, "completion": 1, "output": 2}}, "output"),
        ({"m": {"prompt": -1, "completion": 1}}, "prompt: got -1"),
        ({"m": {"prompt": True, "completion": 1}}, "prompt: got True"),
        ({"m": {"prompt": 1, "completion": float("nan")}}, "completion: got nan"),
        ({"m": {"prompt": "1", "completion": 1}}, "prompt: got '1'"),
        ({"m": {"prompt": None, "completion": 1}}, "prompt: got None"),
        ({"m": 3}, "int"),
        ({"": {"prompt": 1, "completion": 1}}, "name of a model"),
        ([], "list"),
    ],
)
def test_a_bad_table_says_what_is_wrong(prices, says):
    with pytest.raises(InputError, match=says):
        PriceTable(prices)


@pytest.mark.parametrize("currency", ["", "\x1b[31m", 3, "x" * 17])
def test_a_currency_is_a_short_name(currency):
    with pytest.raises(InputError, match="currency"):
        PriceTable({}, currency=currency)


def test_from_a_file(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"currency": "EUR", "models": {"m": {"prompt": 1, "completion": 2.5, "cached": 0}}}))
    table = PriceTable.of(path)
    assert (table.currency, dict(table)) == ("EUR", {"m": Price(1, 2.5, cached=0)})
    assert PriceTable.of(table) is table
    assert len(PriceTable.of({"m": Price(1, 2)})) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a JSON list"),
        ('{"m": {"prompt": 1, "completion": 1}}', "expected models"),
        ('{"models": {}, "unit": "token"}', "unit"),
        (
            '{"models": {"m": {"prompt": 1, "completion": 1}, "m": {"prompt": 2, "completion": 2}}}',
            "the key 'm' comes twice",
        ),
        ('{"models": {"m": {"prompt": 1, "completion": NaN}}}', "completion: got nan"),
        ('{"models": {}, "currency": 7}', "currency"),
    ],
)
def test_a_bad_file_names_itself(tmp_path, text, says):
    path = tmp_path / "prices.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=says) as caught:
        PriceTable.from_file(path)
    assert "prices.json" in str(caught.value)


@pytest.mark.parametrize(
    ("usage", "reason", "unpriced"),
    [
        (JudgeUsage(calls=1, attempts=3), "http_429", 0),  # an error status is not charged
        (JudgeUsage(calls=1, attempts=1), "insufficient_quota", 0),
        (JudgeUsage(calls=1, attempts=1), "timeout", 1),  # nobody knows
        (JudgeUsage(calls=1, attempts=1), "not_json", 1),
        (JudgeUsage(), "no_api_key", 0),
        (JudgeUsage(calls=1, attempts=2, prompt_tokens=5), "http_500", 1),  # an earlier request had been answered
    ],
)
def test_failed_calls(usage, reason, unpriced):
    assert price_call(None, usage, "m", reason).unpriced_calls == unpriced


def test_a_judge_prices_its_calls(ask, mock_judge, chat_reply, tmp_path):
    def handler(request):
        reply = json.loads(chat_reply(request, "<verdict>$win</verdict>").content)
        reply["usage"] = {"prompt_tokens": 1000, "completion_tokens": 100}
        return httpx.Response(200, json=reply)

    prices = {"judge-model": {"prompt": 2, "completion": 10}}
    store = tmp_path / "v.db"
    usage = ask(mock_judge(handler, prices=prices, store=store)).usage
    assert (usage.calls, usage.cost, usage.unpriced_calls) == (2, pytest.approx(2 * 0.003), 0)
    hit = ask(mock_judge(handler, prices=prices, store=store)).usage
    assert hit == JudgeUsage(cache_hits=2)
    for unknown in ({}, {"other": Price(1, 1)}):
        usage = ask(mock_judge(handler, prices=unknown), Pair("p", "a", "b"))[0].usage
        assert (usage.cost, usage.unpriced_calls) == (0, 2)
    assert ask(mock_judge(handler)).usage.unpriced_calls == 2
