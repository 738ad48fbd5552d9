"""The simulator against systems whose times can be worked out by hand."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("simpy")

from rmcore._base.errors import InputError
from rmcore.bench import scale
from rmcore.bench.scale_model import JudgeService, Service, Step, predict

FREE = Service(0.0, 0.0, batch=1000, concurrency=1000, first_concurrency=1000)
NOBODY = JudgeService([])


@pytest.mark.parametrize(
    ("step", "service", "seconds"),
    [
        (Step(64, 4, 0.0), Service(0.1, 0.01), 0.1 + 64 * 4 * 0.01),  # one full batch
        (Step(128, 4, 0.0), Service(0.1, 0.01), 2 * (0.1 + 64 * 4 * 0.01)),  # two, one after the other
        (Step(128, 4, 0.0, replicas=2), Service(0.1, 0.01), 0.1 + 64 * 4 * 0.01),
        (Step(128, 4, 0.0, replicas=2, cores=1), Service(0.1, 0.01), 2 * (0.1 + 64 * 4 * 0.01)),  # one core does it all
        (Step(128, 4, 0.0, replicas=4, cores=2), Service(0.0, 0.01), 128 * 4 * 0.01 / 2),
        (Step(64, 4, 0.0), Service(0.0, 0.0, group_s=0.01), 64 * 0.01),
    ],
)
def test_backbones_alone(step: Step, service: Service, seconds: float) -> None:
    predicted = predict(step, service, NOBODY)
    assert predicted.seconds == pytest.approx(seconds, abs=0.011)  # a slice, and the wait for company
    assert predicted.calls == 0
    assert len(predicted.latencies_s) == step.groups


@pytest.mark.parametrize(
    ("service", "judge", "seconds"),
    [
        (FREE, JudgeService([0.5]), 0.5),
        (FREE, JudgeService([0.5], slots=10), 20 * 0.5),
        (FREE, JudgeService([0.5], per_minute=60), 199 + 0.5),
        (Service(0, 0, batch=1000, concurrency=20, first_concurrency=20), JudgeService([0.5]), 10 * 0.5),
        # One, two, four, ... in flight: after seven round trips 127 are done, the eighth takes the others.
        (Service(0, 0, batch=1000, concurrency=1000, first_concurrency=1), JudgeService([0.5]), 8 * 0.5),
        (Service(0, 0, call_s=0.02, batch=1000, concurrency=1000, first_concurrency=1000), JudgeService([0.5]), 4.5),
    ],
)
def test_judge_alone(service: Service, judge: JudgeService, seconds: float) -> None:
    predicted = predict(Step(100, 2, 1.0), service, judge)
    assert predicted.calls == 200  # both orders
    assert predicted.seconds == pytest.approx(seconds, abs=0.02)


def test_calls_and_cost() -> None:
    judge = JudgeService([1.0], tokens=(3000, 500), prices=(1.0, 4.0))
    wide = Step(128, 16, 1.0, orders=1)
    assert predict(wide, FREE, judge).calls == 15_360
    circle = predict(Step(128, 16, 1.0, "circular", orders=1), FREE, judge)
    assert circle.calls == 2_048
    assert circle.cost == pytest.approx(2_048 * (3000 * 1.0 + 500 * 4.0) / 1e6)


def test_equal_seeds_equal_predictions() -> None:
    step, service = Step(40, 4, 0.5, replicas=3, arrive_s=2.0), Service(0.01, 0.001, 0.001, 0.001)
    judge = JudgeService(scale.lognormal(0.5, 2.0), slots=8)
    one, two, other = (predict(step, service, judge, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one.latencies_s != other.latencies_s
    assert one.judge_s / one.seconds <= 8


@pytest.mark.parametrize(
    ("step", "name"), [(Step(0, 4, 0.0), "groups"), (Step(1, 4, 1.5), "share"), (Step(1, 4, 0.5), "latencies_s")]
)
def test_impossible_systems(step: Step, name: str) -> None:
    with pytest.raises(InputError, match=name):
        predict(step, FREE, NOBODY)


def test_command_says_what_it_assumes(tmp_path, capsys) -> None:
    options = ["--groups", "8", "--responses", "4", "--judge-seconds", "1", "--judge-p95", "2", "--judge-slots", "8"]
    assert scale.main([*options, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "Predicted, not measured" in told
    figures = json.loads((tmp_path / "scale.json").read_text())
    assert figures["predicted_not_measured"]
    assert figures["assumed"]["judge"]["median_s"] == 1
    seconds = {row["share"]: row["seconds"] for row in figures["rows"] if row["varied"] == "share"}
    assert sorted(seconds.values()) == [seconds[share] for share in sorted(seconds)]
    assert (tmp_path / "scale.png").stat().st_size > 10_000
