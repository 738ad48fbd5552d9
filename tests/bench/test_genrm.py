"""The replayed generative reward model says what was recorded, whichever response it is shown first."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from rmcore.bench.genrm import Replay, interval, walked
from rmcore.evaluation.evaluate import PairStates
from rmcore.evaluation.streams import StreamPair
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.judge import GenRMJudge, Pair

VERDICTS = [("win", "win"), ("loss", "loss"), ("tie", "tie"), (None, None), ("win", "loss")]
PAIRS = [
    StreamPair(f"prompt {k} <|im_end|>", f"first {k}", f"second {k}", 1.0, "made up", verdicts)
    for k, verdicts in enumerate(VERDICTS)
]


@pytest.mark.parametrize(("orders", "said"), [("both", [0.5, -0.5, 0.0, None, 0.0])])
def test_what_was_recorded_is_said(orders, said):
    judge = GenRMJudge(complete=Replay(PAIRS), model="genrm", orders=orders)
    asked = [Pair(pair.prompt, pair.first, pair.second) for pair in PAIRS]
    there = asyncio.run(judge.judge(asked))
    assert [verdict.preference for verdict in there] == said
    assert there[3].reason == "unparsable"
    back = asyncio.run(judge.judge([Pair(pair.prompt, pair.second, pair.first) for pair in PAIRS]))
    assert [verdict.preference for verdict in back] == [None if x is None else 0.0 - x for x in said]


def test_all_or_none_are_asked():
    torch.manual_seed(0)
    hidden = torch.randn(40, 8)
    pairs = torch.randint(40, (60, 2))
    labels = torch.randint(2, (60,)).float()
    head = fit(SNGPHead(HeadConfig(8, num_features=16)), hidden, labels, pairs=pairs, dtype=torch.float32)[0]
    some = PAIRS[:3]
    states = PairStates(torch.randn(3, 2, 8), torch.ones(3, 2))
    walk = walked(head, None, some, states, 1.0)
    assert (walk.calls, walk.failed) == (3, 0)
    assert walk.right.tolist() == [1.0, 0.0, 0.5]
    own = walked(head, None, some, states, 0.0)
    assert own.calls == 0
    assert own.right.tolist() == own.combined.tolist()
    assert walk.combined[2] == own.right[2], "a tie is the head's to decide"
    learned = walked(head, None, some, states, 1.0, learn=True)
    assert learned.right.tolist() == walk.right.tolist()


def test_an_interval_is_around_the_mean():
    gain = np.array([0.0, 1.0] * 50)
    low, high = interval(gain, [str(k) for k in range(100)])
    assert 30 < low < 50 < high < 70
