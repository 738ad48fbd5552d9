"""A pair may have a principle of its own: who judges by it, who passes it on, and who says that nobody does."""

from __future__ import annotations

import asyncio

import pytest

from rmcore.integrations.ray import ActorJudge, SharedJudge
from rmcore.judge import CanaryJudge, ChatJudge, GenRMJudge, Pair, RecordedJudge, Tier, TieredJudge, VerdictStore
from rmcore.judge.base import JudgeUsage, Verdict, takes_principles
from rmcore.judge.context import Fit
from rmcore.judge.question.constitution import Constitution

PAIR = Pair("red tree", "good clear", "bad")


class Asked:
    """A completion that says win, and keeps what it was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def __call__(self, messages, **_):
        self.texts.append("\n".join(f"{message['role']}: {message['content']}" for message in messages))
        text = '{"score_1": 5, "score_2": 1, "ranking": 1}'
        return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def chat(kind=ChatJudge, **more):
    return kind(complete=Asked(), model="m", **more)


def with_principle(text):
    return Pair(PAIR.prompt, PAIR.first, PAIR.second, principle=text)


def test_who_takes_them():
    recorded = RecordedJudge({})
    assert takes_principles(chat())
    assert takes_principles(chat(GenRMJudge))
    assert takes_principles(CanaryJudge(chat()))
    assert takes_principles(TieredJudge([Tier(CanaryJudge(chat()), "a", uncertainty=(1, 2)), Tier(chat(), "b")]))
    assert not takes_principles(recorded)
    assert not takes_principles(None)
    assert not takes_principles(CanaryJudge(recorded))
    assert not takes_principles(TieredJudge([Tier(recorded, "a", uncertainty=(1, 2)), Tier(chat(), "b")]))
    assert takes_principles(ActorJudge(None))


@pytest.mark.parametrize("kind", [ChatJudge, GenRMJudge])
def test_it_stands_in_the_question_in_place_of_the_judges_own(kind):
    own = {"principle": "be short"} if kind is GenRMJudge else {"constitution": Constitution(["be short"])}
    complete = Asked()
    judge = kind(complete=complete, model="m", orders="one", **own)
    asyncio.run(judge.judge([PAIR]))
    asyncio.run(judge.judge([with_principle("be kind to trees")]))
    assert ["be short" in text for text in complete.texts] == [True, False]
    assert ["be kind to trees" in text for text in complete.texts] == [False, True]


def test_it_is_part_of_what_a_store_knows_a_question_by(tmp_path):
    complete = Asked()
    with VerdictStore(tmp_path / "v.db") as store:
        judge = GenRMJudge(complete=complete, model="m", judge_id="j", store=store, principle="be short")
        pairs = [PAIR, with_principle("be long"), with_principle("be short"), PAIR, with_principle("be long")]
        asyncio.run(judge.judge(pairs))
    assert len(complete.texts) == 2  # the judge's own by name is no other question


def test_a_long_one_takes_its_room_from_the_texts():
    pair = Pair("p " * 300, "first " * 300, "second " * 300, principle="kindly " * 400)
    judge = chat(context_tokens=1400, max_tokens=100, tokenizer=lambda text: len(text.split()))

    async def cut(aside):
        fit = Fit(aside=aside)
        await judge.context.fit(pair, fit)
        return fit.cut

    whole, shorter = (asyncio.run(cut(aside)) for aside in (0, judge.context.tokens(pair.principle)))
    assert judge.context.tokens(pair.principle) == 400
    assert sum((shorter.prompt, shorter.first, shorter.second)) > sum((whole.prompt, whole.first, whole.second))


def test_the_shared_judge_of_a_cluster_asks_each_once_and_fails_what_its_own_cannot():
    class Plain:
        async def judge(self, pairs):
            return [Verdict.of("win", usage=JudgeUsage(calls=1)) for _ in pairs]

    async def asked(shared):
        return await shared.judge([with_principle("a"), PAIR, with_principle("a"), with_principle("b")])

    complete = Asked()
    taking = SharedJudge(lambda: GenRMJudge(complete=complete, model="m"))
    assert [one.failed for one in asyncio.run(asked(taking))] == [False] * 4
    assert len(complete.texts) == 3
    verdicts = asyncio.run(asked(SharedJudge(Plain)))
    assert [one.reason for one in verdicts] == ["no_principles", "", "no_principles", "no_principles"]
