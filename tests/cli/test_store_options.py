"""Where verdicts are kept and what all machines together may ask, as the command line names it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from rmcore._base.errors import InputError
from rmcore.cli import app
from rmcore.cli.build_engine import _limits, make_budgets, make_judge
from rmcore.cli.options import Asking, Judging, store_file
from rmcore.judge import GenRMJudge
from rmcore.judge.store.prices import Price

ENDPOINT = {"judge_url": "http://127.0.0.1:9/v1", "judge_model": "m", "judge_key_env": ""}


def test_limits_of_one_process():
    judge = make_judge(Asking(**ENDPOINT, judge_requests_per_minute=7, judge_tokens_per_minute=900))
    options = judge.client.options
    assert (options.requests_per_minute, options.tokens_per_minute, options.limits) == (7, 900, None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (ENDPOINT | {"run": "r"}, "--run: got without a --store in PostgreSQL"),
        (ENDPOINT | {"run": "r", "store": "v.db"}, "--run: got without a --store in PostgreSQL"),
        (
            ENDPOINT | {"run": "r", "store": "postgresql://h/d"},
            "--run: got without --max-calls, --max-tokens and --max-cost",
        ),
        (ENDPOINT | {"store": "postgresql://u:hunter2@h/d"}, "store: got one with a password"),
        ({"judge_requests_per_minute": 5}, "without --judge-url"),
    ],
)
def test_what_cannot_be_is_said(given, says):
    with pytest.raises(InputError) as caught:
        make_judge(Asking(**given))
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_budget_of_all_machines_needs_no_router_of_its_own():
    assert [budget.limit for budget in make_budgets(Judging(**ENDPOINT, max_calls=5, run="r"))] == [5]


@pytest.fixture
def shared(monkeypatch):
    """What SharedLimits is given; there is no database."""
    given: list[dict[str, object]] = []
    monkeypatch.setattr("rmcore.judge.store.shared_limits.SharedLimits", lambda *_, **how: given.append(how))
    return given


def test_a_runs_money_is_counted_by_the_models_price(shared, tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text('{"currency": "EUR", "models": {"m": {"prompt": 1, "completion": 4}}}')
    asked = {**ENDPOINT, "run": "r", "store": "postgresql://h/d", "prices": prices}
    _limits(Asking(**asked, max_cost=2.5), ENDPOINT["judge_url"])
    _limits(Asking(**asked, max_calls=7), ENDPOINT["judge_url"])  # counts money for another that limits it
    assert [(how["max_cost"], how["price"], how["currency"]) for how in shared] == [
        (2.5, Price(1, 4), "EUR"),
        (None, Price(1, 4), "EUR"),
    ]
    for lacking in ({"prices": None}, {"judge_model": "other"}):
        with pytest.raises(InputError, match="--max-cost"):
            _limits(Asking(**asked | lacking, max_cost=2.5), ENDPOINT["judge_url"])


def test_a_url_is_no_file_that_an_output_could_overwrite(tmp_path):
    assert store_file("postgresql://h/d") is None
    assert store_file(None) is None
    assert store_file(str(tmp_path / "v.db")) == tmp_path / "v.db"


def test_reading_a_url_repeats_no_password():
    told = CliRunner().invoke(app, ["verdicts", "stats", "postgresql://u:hunter2@h/d"])
    assert told.exit_code == 2
    assert "PGPASSWORD" in told.stderr
    assert "hunter2" not in told.output


def test_a_generative_reward_model_is_a_kind_of_judge():
    judge = make_judge(Asking(**ENDPOINT, judge_kind="genrm", judge_principle="Be brief.", judge_orders="one"))
    assert isinstance(judge, GenRMJudge)
    assert (judge.principle, judge.orders) == ("Be brief.", "one")
    with pytest.raises(InputError, match="--judge-principle"):
        make_judge(Asking(**ENDPOINT, judge_principle="Be brief."))
    with pytest.raises(InputError, match="--judge-kind genrm"):
        make_judge(Asking(**ENDPOINT, judge_kind="genrm", judge_soft=True))
