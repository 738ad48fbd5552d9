"""One over-long response at every edge: its pairs say nothing, the others are scored, no reward is invented."""

from __future__ import annotations

import asyncio
import math
from argparse import Namespace
from types import SimpleNamespace

import httpx
import pytest

from rmcore import RewardEngine, RewardModel
from rmcore._base.errors import InputError
from rmcore.integrations.slime import GroupReward
from rmcore.integrations.trl import PairwiseReward

PROMPT = "red tree house"
TEXTS = ["good clear", "bad rude", "good " * 60]
LIMIT = {"max_length": 24, "overlong": "no-reward"}


@pytest.fixture(scope="module")
def engine(reward_model):
    return RewardEngine(reward_model)


@pytest.fixture(scope="module")
def expected(engine):
    """What the two that are read get against each other alone."""
    return engine.score([PROMPT], [TEXTS[:2]])[0]


def samples():
    return [
        SimpleNamespace(
            prompt=PROMPT, response=text, status=SimpleNamespace(value="completed"), reward=None, loss_mask=None,
            response_length=2, remove_sample=False, metadata={},
        )
        for text in TEXTS
    ]  # fmt: skip


def test_at_the_call_and_at_load_alike(engine, expected, reward_model_path):
    loaded = RewardEngine(RewardModel.from_pretrained(reward_model_path, **LIMIT))
    for scores in (engine.score([PROMPT], [TEXTS], **LIMIT)[0], loaded.score([PROMPT], [TEXTS])[0]):
        advantages = scores.advantages.tolist()
        assert advantages[:2] == pytest.approx(expected.advantages.tolist())
        assert math.isnan(advantages[2])


def test_without_a_policy_the_message_names_it(engine):
    with pytest.raises(InputError, match=r"max_length|overlong"):
        engine.score([PROMPT], [TEXTS], max_length=24)
    for policy in ("truncate-right", "truncate-prompt-left", "truncate-longest"):
        if policy != "truncate-prompt-left":  # it leaves responses alone
            scores = engine.score([PROMPT], [TEXTS], max_length=24, overlong=policy)[0]
            assert all(math.isfinite(value) for value in scores.advantages.tolist())


def test_slime_masks_the_sample_and_keeps_the_others(engine, expected, caplog):
    found = samples()
    rewards = asyncio.run(GroupReward(engine, **LIMIT)(Namespace(), found))
    assert rewards[:2] == pytest.approx(expected.advantages.tolist())
    assert rewards[2] == 0.0
    assert [sample.remove_sample for sample in found] == [False, False, True]
    assert "1 of 3 samples" in caplog.text


def test_slime_in_its_own_process_keeps_the_limits(reward_model_path, monkeypatch):
    monkeypatch.delenv("RMCORE_SERVE_URL", raising=False)
    found = samples()
    arguments = Namespace(rm_url=None, rmcore_model=str(reward_model_path))
    asyncio.run(GroupReward(**LIMIT)(arguments, found))
    assert [sample.remove_sample for sample in found] == [False, False, True]


def test_trl_gives_none(engine, expected):
    reward = PairwiseReward(engine, **LIMIT)
    rewards = asyncio.run(reward(prompts=[PROMPT] * 3, completions=TEXTS))
    assert rewards[2] is None
    assert rewards[0] > rewards[1]
    assert rewards[0] == pytest.approx(-rewards[1])


def get_reward(reward_model_path, **limit):
    pytest.importorskip("fastapi")
    from rmcore.integrations.server import ServeSettings, create_app

    model = RewardModel.from_pretrained(reward_model_path, **limit)
    app = create_app(RewardEngine(model), ServeSettings(group_size=3))

    async def main():
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8400") as client:
                body = {"query": [PROMPT + text for text in TEXTS], "prompts": [PROMPT] * 3}
                return (await client.post("/get_reward", json=body)).json()

    return asyncio.run(main())


def test_a_server_names_its_own_options(reward_model_path):
    """A client has no limits to set, so "pass a policy" alone would be no remedy."""
    got = get_reward(reward_model_path, max_length=LIMIT["max_length"])
    assert got["error"]["message"].endswith("no-reward; to the server, that is: rmcore serve --max-length, --overlong")


def test_get_reward_gives_the_neutral_value(reward_model_path):
    got = get_reward(reward_model_path, **LIMIT)
    assert (got["rewards"][2], got["scores"][2]) == (0.0, 0.5)
    assert got["rewards"][0] > 0 > got["rewards"][1]


# -- responses that become equal when they are cut --------------------------------------------------------------------

CUT = ["good " * 60 + "clear", "good " * 60 + "rude", "bad rude"]
POLICIES = ["truncate-right", "truncate-longest", "no-reward"]


@pytest.fixture(scope="module")
def cut_engines(reward_model_path):
    return {
        policy: RewardEngine(RewardModel.from_pretrained(reward_model_path, max_length=24, overlong=policy))
        for policy in POLICIES
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pair_that_is_equal_when_cut_is_known_to_nobody_at_any_edge(
    policy, cut_engines, served, group_client, caplog
):
    """No edge gives it a preference, or certainty: engine, server (verl asks by rendezvous), TRL, slime."""
    from rmcore.integrations.server import ServeSettings

    engine = cut_engines[policy]
    scores = engine.score([PROMPT], [CUT])[0]
    unread = policy == "no-reward"
    assert scores.preference[0, 1].isnan()
    assert scores.uncertainty[0, 1] == math.inf
    right = [None if value != value else value for value in scores.advantages.tolist()]
    assert (right == [None] * 3) is unread
    if not unread:
        assert right[0] == pytest.approx(right[1]), "what is known of the two is the same"
        assert right[0] == pytest.approx(scores.preference[0, 2].item()), "the pair of the two counts for nothing"

    async def main():
        client = group_client(served(engine, ServeSettings(group_size=3)), timeout_s=20.0)
        reply = await client.groups(PROMPT, CUT)
        parts = await asyncio.gather(*(client.rendezvous("g", k, 3, PROMPT, text) for k, text in enumerate(CUT)))
        rewards = await client.get_reward([PROMPT + text for text in CUT], [PROMPT] * 3)
        trl = await PairwiseReward(engine)(prompts=[PROMPT] * 3, completions=CUT)
        found = samples()
        for sample, text in zip(found, CUT, strict=True):
            sample.response = text
        slime = await GroupReward(engine)(Namespace(), found)
        return reply, parts, rewards, trl, found, slime

    reply, parts, rewards, trl, found, slime = asyncio.run(main())
    assert [advantage if advantage is None else pytest.approx(advantage) for advantage in right] == list(
        reply.advantages
    )
    assert [part.advantage for part in parts] == list(reply.advantages)
    assert [part.preference[other] for part, other in zip(parts[:2], (1, 0), strict=True)] == [None, None]
    assert [part.uncertainty[other] for part, other in zip(parts[:2], (1, 0), strict=True)] == [None, None]
    if unread:
        assert (rewards["rewards"], rewards["scores"]) == ([0.0] * 3, [0.5] * 3)
        assert trl == [None] * 3
        assert "3 of 3 responses carry no signal" in caplog.text
    else:
        assert rewards["rewards"][0] == pytest.approx(rewards["rewards"][1])
        assert trl[0] == pytest.approx(trl[1])
    assert [sample.remove_sample for sample in found] == [unread] * 3
    assert slime == pytest.approx([value or 0.0 for value in right])
