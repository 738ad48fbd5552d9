"""What is wrong with a judge's options: told by their names, and before anything is loaded or asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmcore._base.errors import InputError
from rmcore.cli.build_engine import check_routing, make_budgets, make_judge
from rmcore.cli.label import SoftAsking
from rmcore.cli.options import Asking, Judging

LIVE = Judging(judge_url="http://127.0.0.1:9/v1", judge_model="m", judge_key_env="", budget=0.5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"judge_url": "127.0.0.1:9/v1"}, "--judge-url: got a URL without http(s) scheme"),
        ({"judge_url": "unix:///tmp/judge.sock"}, "--judge-url: got a URL without http(s) scheme"),
        ({"judge_url": ""}, "--judge-url: got a URL without"),
        ({"judge_url": "http://127.0.0.1:99999/v1"}, "--judge-url: got a malformed URL"),
        ({"judge_key_env": "sk-123"}, "--judge-key-env: got no variable name"),
        ({"judge_timeout": 0.0}, "--judge-timeout: got 0.0"),
        ({"judge_timeout": float("nan")}, "--judge-timeout: got nan"),
        ({"judge_concurrency": 0}, "--judge-concurrency: got 0"),
        ({"judge_max_reply": -1}, "--judge-max-reply: got -1"),
        ({"judge_context": 1}, "--judge-context: got 1"),
        ({"judge_requests_per_minute": 0}, "--judge-requests-per-minute: got 0"),
        ({"judge_tokens_per_minute": -1}, "--judge-tokens-per-minute: got -1"),
        ({"judge_model": " "}, "--judge-model: got ' ', expected a model's name"),
        ({"judge_model": "m\nn"}, "--judge-model: got 'm\\nn', expected a model's name"),
        ({"judge_template": Path("{folder}/user.txt")}, "--judge-template: got the field $third"),
        ({"store": "{folder}"}, "--store: got"),
        ({"store": "{file}/verdicts.db"}, "--store: got"),
        ({"store": "{folder}/v.db", "ask_again": ["nonsense"]}, "--ask-again: got 'nonsense', expected one of length,"),
        ({"store": "{folder}/v.db", "ask_again": ["length", "Length"]}, "--ask-again: got 'Length', expected one of"),
        ({"store": "{folder}/v.db", "ask_again": ["timeout"]}, "--ask-again: got 'timeout', expected one of"),
        ({"store": "{folder}/v.db", "ask_again": [""]}, "--ask-again: got '', expected one of"),
    ],
)
def test_a_value_that_cannot_be_is_told_by_its_option(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "user.txt").write_text("$contract $prompt $first $second $third")
    places = {"folder": tmp_path, "file": tmp_path / "file"}
    files = {"store": str, "judge_template": Path}
    given = {k: files[k](str(v).format(**places)) if k in files else v for k, v in given.items()}
    with pytest.raises(InputError) as error:
        make_judge(replace(LIVE, **given))
    assert str(error.value).startswith(says)
    assert "sk-123" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": 1.5}, "--budget: got 1.5"),
        ({"budget": float("nan")}, "--budget: got nan"),
        ({"budget": None, "threshold": float("nan")}, "--threshold: got nan"),
        ({"budget": None, "threshold": float("nan"), "rank_by": "learned"}, "--threshold: got nan"),
        ({"budget": 2.0, "rank_by": "u"}, "--budget: got 2.0"),
        ({"budget": None, "judge_fraction": 2.0}, "--judge-fraction: got 2.0"),
        ({"budget": None, "judge_fraction": 0.1, "max_calls": -1}, "--max-calls: got -1"),
        ({"budget": None, "judge_fraction": 0.1, "max_tokens": -1}, "--max-tokens: got -1"),
        ({"judge_deadline": 0.0}, "--judge-deadline: got 0.0"),
    ],
)
def test_so_is_one_of_routing(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        check_routing(replace(LIVE, **given), True)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("cost", [-1.0, float("nan")])
def test_so_is_a_budget_in_money(cost: float, tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"models": {"m": {"prompt": 1, "completion": 2}}}')
    with pytest.raises(InputError, match="--max-cost: got"):
        make_budgets(replace(LIVE, prices=prices, max_cost=cost))


def test_a_budget_without_room_for_a_pair_is_refused(tmp_path: Path) -> None:
    """It would ask nothing, and the run would end well."""
    prices, state = tmp_path / "prices.json", tmp_path / "state.json"
    prices.write_text('{"models": {"m": {"prompt": 1, "completion": 2}}}')
    for given, least in (
        ({"max_calls": 1}, "--max-calls: got 1, expected at least 2, which"),
        ({"max_calls": 0, "judge_orders": "one"}, "--max-calls: got 0, expected at least 1, which"),
        ({"max_tokens": 8191}, "--max-tokens: got 8191, expected at least 8192, which"),
        ({"max_cost": 0.01, "prices": prices}, "--max-cost: got 0.01, expected at least 0.010"),
    ):
        asking: Any = {"budget": None, "judge_fraction": 0.1, **given}
        with pytest.raises(InputError) as error:
            make_budgets(replace(LIVE, **asking))
        assert str(error.value).startswith(least)
        state.write_text("{}")
        assert len(make_budgets(replace(LIVE, **asking, router_state=state))) == 1, "which may know what pairs cost"
    for given in ({"max_calls": 2}, {"max_calls": 1, "judge_orders": "one"}, {"max_tokens": 8192}):
        assert len(make_budgets(replace(LIVE, budget=None, judge_fraction=0.1, **given))) == 1


def test_a_budget_in_money_for_a_model_that_costs_nothing_is_refused(tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"models": {"m": {"prompt": 0, "completion": 0}}}')
    with pytest.raises(InputError, match=r"--max-cost: got a price of 0 for 'm' in .*prices\.json"):
        make_budgets(replace(LIVE, prices=prices, max_cost=1.0))


ASKED = {
    "judge_model": "m",
    "judge_key_env": "KEY",
    "judge_kind": "genrm",
    "judge_principle": "be kind",
    "judge_orders": "one",
    "judge_output": "json_schema",
    "judge_soft": True,
    "judge_template": Path("template.txt"),
    "judge_max_tokens": 7,
    "judge_context": 4096,
    "judge_timeout": 5.0,
    "judge_concurrency": 3,
    "judge_retries": 1,
    "judge_max_reply": 1000,
    "judge_requests_per_minute": 3,
    "judge_tokens_per_minute": 3,
    "run": "a",
    "store": "verdicts.db",
    "reuse": "verdicts",
    "ask_again": ["length"],
    "prices": Path("prices.json"),
}


def test_options_of_a_judge_that_is_not_asked_are_refused(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.jsonl"
    verdicts.write_text('{"prompt": "p", "first": "a", "second": "b", "verdict": 1}\n')
    assert make_judge(Asking()) is make_judge(SoftAsking()) is None
    for name, value in ASKED.items():
        option = f"--{name.replace('_', '-')}: got without --judge-url"
        with pytest.raises(InputError) as error:
            make_judge(replace(Asking(), **{name: value}))
        assert str(error.value).startswith(option)
        if name != "judge_orders":
            with pytest.raises(InputError) as error:
                make_judge(replace(Asking(verdicts=verdicts), **{name: value}))
            assert str(error.value).startswith(f"{option} beside --verdicts")
    assert make_judge(Asking(verdicts=verdicts, judge_orders="one")) is not None
    for given in ({"rank_by": "u"}, {"judge_deadline": 5.0}):
        with pytest.raises(InputError, match="--rank-by, --judge-deadline: got without --threshold, --budget"):
            check_routing(Judging(**given), False)


@pytest.mark.parametrize("value", ["sk-a\nb", "sk-\u043a", "  "])
def test_a_key_that_no_header_can_hold_is_told_before_the_run(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(InputError, match="--judge-key-env: got MY_KEY") as error:
        check_routing(replace(LIVE, judge_key_env="MY_KEY"), True)
    assert value.strip() not in str(error.value) or not value.strip()
