"""Options that take one of several words: the words are those of the library's types, others are refused at once."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.engine import selection
from rmcore.engine.acquisition import Acquisition
from rmcore.engine.routing import LearnedScore, RankBy
from rmcore.engine.routing.risk_bounds import RiskMethod
from rmcore.evaluation.benchmarks.routing import RouteBy
from rmcore.head.attributes import GateConfig
from rmcore.head.attributes.fit import Objective
from rmcore.head.config import PairMode
from rmcore.head.estimators import VarianceKind
from rmcore.integrations.server.settings import Baseline
from rmcore.judge.genrm import JudgeKind
from rmcore.judge.labelling import Keep
from rmcore.judge.orders import Orders
from rmcore.judge.question.contract import Output
from rmcore.judge.store.database import Reuse
from rmcore.model.backbone import Deterministic
from rmcore.model.backbone_config import BackboneConfig, Pooling
from rmcore.model.plan import PlanConfig, Strategy
from rmcore.model.remote import ServerKind
from rmcore.model.text import OverlongPolicy
from rmcore.model.uncertainties import UNCERTAINTIES
from rmcore.ops.dispatch import Backend
from rmcore.ops.reference import Likelihood
from rmcore.ops.weights import SERVING_DTYPES

BACKBONE = typing.get_type_hints(BackboneConfig)
REUSE_WORDS = typing.get_args(Reuse)[0]  # besides sets of reasons, which are --ask-again
ASKING = ("score", "serve", "best-of", "filter", "benchmark", "label", "critique")  # commands that may ask a judge
CHOICES = {
    ("train", "mode"): typing.get_args(PairMode),
    ("train", "pooling"): tuple(
        word for word in typing.get_args(Pooling) if word not in ("classifier", "reward")
    ),  # upgrade's
    ("train", "likelihood"): typing.get_args(Likelihood),
    **{
        (name, "overlong"): typing.get_args(OverlongPolicy)
        for name in (
            "train",
            "upgrade",
            "score",
            "serve",
            "best-of",
            "filter",
            "evaluate",
            "benchmark",
            "check",
            "select",
        )
    },
    **{
        (name, "deterministic"): typing.get_args(Deterministic)
        for name in ("score", "serve", "best-of", "filter", "evaluate", "benchmark", "check")
    },
    **{(name, "chat"): typing.get_args(BACKBONE["chat"]) for name in ("train", "upgrade")},
    **{(name, "dtype"): ("float32", "float16", "bfloat16", "int8") for name in ("train", "upgrade")},
    **{(name, "backend"): typing.get_args(Backend) for name in ("score", "serve", "best-of", "filter")},
    **{
        (name, "rank_by"): (LearnedScore.name, *typing.get_args(RankBy))
        for name in ("score", "serve", "best-of", "filter")
    },
    **{(name, "judge_orders"): typing.get_args(Orders) for name in ASKING},
    **{(name, "judge_kind"): typing.get_args(JudgeKind) for name in ASKING},
    **{(name, "judge_output"): typing.get_args(Output) for name in ASKING},
    **{(name, "reuse"): typing.get_args(REUSE_WORDS) for name in ASKING},
    **{(name, "uncertainty"): UNCERTAINTIES for name in ("score", "serve", "best-of", "filter", "evaluate", "select")},
    **{
        (name, "variance"): typing.get_args(VarianceKind)
        for name in ("score", "serve", "best-of", "filter", "evaluate", "benchmark")
    },
    ("plan", "mode"): typing.get_args(typing.get_type_hints(PlanConfig)["mode"]),
    ("plan", "precision"): ("bf16", "fp32"),
    ("plan", "strategy"): typing.get_args(Strategy),
    ("train", "objective"): tuple(word for word in typing.get_args(Objective) if word != "pinball"),  # of quantiles
    ("train", "gate"): (*typing.get_args(typing.get_type_hints(GateConfig)["kind"]), "none"),
    ("evaluate", "risk_method"): typing.get_args(RiskMethod),
    ("label", "hard"): typing.get_args(Keep),
    ("label", "one_order"): typing.get_args(Keep),
    ("select", "by"): typing.get_args(Acquisition),
    ("check", "dtype"): ("float32", "float16", "bfloat16"),
    ("check", "server_kind"): typing.get_args(ServerKind),
    ("benchmark", "rank_by"): typing.get_args(RouteBy),
    ("serve", "baseline"): typing.get_args(Baseline),
    ("best-of", "ties"): typing.get_args(selection.Ties),
    ("best-of", "penalty_by"): typing.get_args(selection.Measure),
    ("filter", "by"): typing.get_args(typing.get_type_hints(selection.filter_groups)["by"]),
}


def words(annotation: object) -> tuple[str, ...]:
    """The words of ``Annotated[Literal[...] | None, ...]``; none of another type."""
    kind = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) is typing.Literal:
            return typing.get_args(part)
    return ()


def test_an_option_offers_exactly_what_the_library_takes() -> None:
    offered = {
        (command.name, parameter.name): words(parameter.annotation)
        for command in app.registered_commands
        for parameter in inspect.signature(command.callback, eval_str=True).parameters.values()
        if words(parameter.annotation)
    }
    assert offered == CHOICES


def test_the_serving_dtypes_offered_are_those_a_head_takes() -> None:
    assert {getattr(torch, word) for word in CHOICES["train", "dtype"]} == set(SERVING_DTYPES)


@pytest.mark.parametrize(("name", "option"), sorted(CHOICES))
def test_another_word_exits_2_with_the_choices_before_anything_is_loaded(name: str, option: str, tmp_path) -> None:
    flag, missing = "--" + option.replace("_", "-"), str(tmp_path / "none")
    needed = {
        "train": [missing, "-o", missing, "--backbone", missing],
        "upgrade": [missing, missing, "-o", missing],
        "score": [missing, missing],
        "serve": [missing],
        "best-of": [missing, missing],
        "filter": [missing, missing, "--max-u", "2"],
        "evaluate": [missing, missing],
        "check": [missing],
        "select": [missing, missing, "1"],
        "label": [missing],
        "plan": ["--backbone", missing],
        "critique": [missing],
        "benchmark": [missing, "rmb"],
    }
    result = CliRunner().invoke(app, [name, *needed[name], flag, "abacus"], env={"COLUMNS": "500", "TERM": "dumb"})
    assert result.exit_code == 2
    assert flag in result.stderr
    assert all(word in result.stderr for word in CHOICES[name, option])
