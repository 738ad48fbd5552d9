"""NeMo-Gym's genrm_compare, spoken by the group server: requests as its releases send them, and its own client."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess

import httpx
import pytest

from rmcore._base.errors import InputError
from rmcore.engine import RewardEngine
from rmcore.engine.routing import AlwaysRoute, BudgetRouter
from rmcore.integrations.server.gym_bonuses import GymBonuses, Shape
from rmcore.integrations.server.nemo_gym import _output_text, conversation
from rmcore.judge import GenRMJudge
from rmcore.judge.base import JudgeUsage, Verdict

ANSWERS = ["good clear right", "bad vague wrong", "good bad red", "kind exact helpful"]


def response(text: str, k: int = 0) -> dict[str, object]:
    """An object of the Responses API, as vLLM's model server in NeMo-Gym gives it."""
    reasoning = {"id": f"r{k}", "type": "reasoning", "summary": [{"type": "summary_text", "text": "SECRET plan"}]}
    content = [{"type": "output_text", "text": text, "annotations": []}]
    message = {"id": f"m{k}", "type": "message", "role": "assistant", "status": "completed", "content": content}
    return {
        "id": f"resp_{k}", "created_at": 1.0, "model": "policy", "object": "response", "output": [reasoning, message],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    }  # fmt: skip


def compare(texts=ANSWERS, **more):
    history = [{"role": "user", "content": "red tree"}]
    return {"conversation_history": history, "response_objs": [response(text) for text in texts]} | more


def member(k: int, text: str, **more):
    """As the simple agent of NeMo-Gym 0.7 posts it."""
    params = {"input": [{"role": "user", "content": "red tree", "type": "message"}], "temperature": 1.0}
    body = {"responses_create_params": params, "response": response(text, k), "agent_ref": {"name": "simple"}}
    return body | {"_ng_task_index": 0, "_ng_rollout_index": k} | more


@pytest.fixture
def serve(make_app, talk):
    def run(engine, main, **options):
        return talk(make_app(engine, nemo_gym=True, **options), main)

    return run


def test_compare_rewards_tells_and_counts(serve, judged_engine):
    async def main(client):
        return (await client.post("/compare", json=compare())).json()

    told = serve(judged_engine, main)
    assert len(told["rewards"]) == 4
    assert all(1 <= reward <= 5 for reward in told["rewards"])
    assert max(told["rewards"]) in (told["rewards"][0], told["rewards"][3])
    assert min(told["rewards"]) == told["rewards"][1]
    pairs = [(one["response_i"], one["response_j"]) for one in told["comparison_results"]]
    assert pairs == [(i, j) for i in range(4) for j in range(i + 1, 4)]
    sums = [0.0] * 4
    for one in told["comparison_results"]:
        assert {"score_1", "score_2", "ranking", "judge_idx"} <= one.keys()
        assert (one["score_1"] - one["score_2"]) * (3.5 - one["ranking"]) >= 0
        sums[one["response_i"]] += one["score_1"] / 3
        sums[one["response_j"]] += one["score_2"] / 3
    assert sums == pytest.approx(told["rewards"])  # the mean of its scores, as their aggregator has it
    assert told["metrics"]["genrm_pairs_asked"] == told["metrics"]["genrm_pairs"] == 6
    assert told["metrics"]["genrm_pairs_saved"] == 0
    assert all(isinstance(value, float) for value in told["metrics"].values())


def test_only_uncertain_pairs_are_asked_and_the_rest_is_said_to_be_saved(serve, reward_model, judged_engine):
    judge = judged_engine.judge

    async def main(client):
        return (await client.post("/compare", json=compare())).json()

    told = serve(RewardEngine(reward_model, judge, BudgetRouter(0.5)), main)
    assert told["metrics"]["genrm_pairs_asked"] == 3
    assert told["metrics"]["genrm_pairs_saved"] == 3
    assert told["metrics"]["genrm_calls"] == 3
    by = [one["decided_by"] for one in told["comparison_results"]]
    assert (by.count("judge"), by.count("head")) == (3, 3)
    assert all(one["uncertainty"] >= 1 for one in told["comparison_results"])


def test_the_circular_design_compares_a_ring(serve, reward_model, judged_engine):
    engine = RewardEngine(reward_model, judged_engine.judge, BudgetRouter(1.0), design="circular")

    async def main(client):
        return (await client.post("/compare", json=compare())).json()

    told = serve(engine, main)
    pairs = {(one["response_i"], one["response_j"]) for one in told["comparison_results"]}
    assert pairs == {(0, 1), (1, 2), (2, 3), (0, 3)}
    assert told["metrics"]["genrm_pairs"] == 4


class Unreadable:
    """A generative reward model whose replies cannot be read."""

    async def judge(self, pairs):
        return [Verdict(None, "unparsable", usage=JudgeUsage(calls=1, attempts=1)) for _ in pairs]


def test_a_reply_that_cannot_be_read_is_an_outcome_and_no_score(serve, reward_model, engine):
    async def main(client):
        return (await client.post("/compare", json=compare())).json()

    failed = serve(RewardEngine(reward_model, Unreadable(), BudgetRouter(1.0)), main)
    alone = serve(engine, main)
    assert failed["rewards"] == pytest.approx(alone["rewards"])  # the reward model's own, not 3.0
    assert {one["decided_by"] for one in failed["comparison_results"]} == {"judge_failed"}
    assert {one["reason"] for one in failed["comparison_results"]} == {"unparsable"}
    assert failed["metrics"]["genrm_pairs_failed"] == 6
    assert len({one["score_1"] for one in failed["comparison_results"]}) > 1


@pytest.mark.parametrize("identity", [{"_ng_group_id": "g", "_ng_group_attempt": 1}, {}])
def test_a_cohort_is_rewarded_when_it_is_whole(serve, judged_engine, identity):
    async def main(client):
        together = (await client.post("/compare", json=compare())).json()["rewards"]
        posts = [client.post("/verify", json=member(k, text, **identity)) for k, text in enumerate(ANSWERS)]
        return together, [reply.json() for reply in await asyncio.gather(*posts)]

    together, told = serve(judged_engine, main, group_size=4)
    assert [one["reward"] for one in told] == pytest.approx(together)
    for k, one in enumerate(told):
        sent = member(k, ANSWERS[k], **identity)
        assert sent.items() <= one.items()  # what was sent comes back
        assert one["mask_sample"] is False
        assert one["genrm"]["genrm_pairs"] == 6


def longer_wins(asked):
    """A GenRM that prefers the longer response where the principle says so, and the shorter one otherwise."""

    async def complete(messages, **parameters):
        roles = {message["role"]: message["content"] for message in messages}
        asked.append(roles.get("principle", ""))
        longer = len(roles["response_1"]) > len(roles["response_2"])
        best, worst = (4, 2) if longer == ("longer" in roles.get("principle", "")) else (2, 4)
        text = json.dumps({"score_1": best, "score_2": worst, "ranking": 2 if best > worst else 5})
        return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}

    return complete


LENGTHS = ["red", "red blue", "red blue tree", "red blue tree river"]


def test_a_request_is_judged_by_a_principle_of_its_own(serve, reward_model, tmp_path):
    """Equal texts by two principles are two questions, two groups, and two entries of the store."""
    asked: list[str] = []
    judge = GenRMJudge(complete=longer_wins(asked), model="m", judge_id="j", store=tmp_path / "v.db", rules=False)
    engine = RewardEngine(reward_model, judge, AlwaysRoute())
    mine = {"principle": "the longer one"}

    async def main(client):
        plain, own = [
            (await client.post("/compare", json=compare(LENGTHS, **more))).json()["rewards"] for more in ({}, mine)
        ]
        posts = [
            client.post("/verify", json=member(k, text, **more))
            for k, text in enumerate(LENGTHS) for more in ({}, mine)
        ]  # fmt: skip
        told = [reply.json()["reward"] for reply in await asyncio.gather(*posts)]
        again = (await client.post("/compare", json=compare(LENGTHS, **mine))).json()
        return plain, own, told, again

    plain, own, told, again = serve(engine, main, group_size=4)
    assert plain == sorted(plain, reverse=True)
    assert own == sorted(own)
    assert (told[::2], told[1::2]) == (pytest.approx(plain), pytest.approx(own))
    assert sorted(asked) == [""] * 6 + ["the longer one"] * 6  # the store answered all that came a second time
    assert again["metrics"]["genrm_calls"] == 0


def test_members_of_a_named_group_have_one_principle(serve, reward_model):
    engine = RewardEngine(reward_model, GenRMJudge(complete=longer_wins([]), model="m"), AlwaysRoute())

    async def main(client):
        waiting = asyncio.ensure_future(client.post("/verify", json=member(0, "a", _ng_group_id="g")))
        await asyncio.sleep(0.05)
        other = await client.post("/verify", json=member(1, "b", _ng_group_id="g", principle="another"))
        waiting.cancel()
        return other

    reply = serve(engine, main, group_size=2)
    assert (reply.status_code, "got another principle" in reply.text) == (409, True)


def test_tasks_with_one_prompt_are_groups_of_their_own(serve, judged_engine):
    async def main(client):
        posts = [client.post("/verify", json=member(k, ANSWERS[k], _ng_task_index=k % 2)) for k in range(4)]
        replies = [reply.json() for reply in await asyncio.gather(*posts)]
        pairs = [(await client.post("/compare", json=compare([ANSWERS[k], ANSWERS[k + 2]]))).json() for k in (0, 1)]
        return [reply["reward"] for reply in replies], [pair["rewards"] for pair in pairs]

    rewards, (even, odd) = serve(judged_engine, main, group_size=2)
    assert (rewards[::2], rewards[1::2]) == (pytest.approx(even), pytest.approx(odd))


def test_bonuses_are_added_to_both_routes_rewards(serve, judged_engine):
    async def main(client):
        together = (await client.post("/compare", json=compare())).json()
        posts = [client.post("/verify", json=member(k, text)) for k, text in enumerate(ANSWERS)]
        return together["rewards"], [reply.json()["reward"] for reply in await asyncio.gather(*posts)]

    plain, _ = serve(judged_engine, main, group_size=4)
    bonuses = GymBonuses(answer_bonus=0.25, top_percentile=1.0, group_answer_length_penalty_coeff=0.5)
    compared, verified = serve(judged_engine, main, group_size=4, gym_bonuses=bonuses)
    assert compared == pytest.approx(verified)
    assert compared == pytest.approx(bonuses.applied(plain, [Shape.of("SECRET plan", text) for text in ANSWERS]))
    assert sum(compared) == pytest.approx(sum(plain) + 0.25)


def test_a_retry_gets_its_reward_again_and_another_answer_is_refused(serve, judged_engine):
    async def main(client):
        identity = {"_ng_group_id": "g"}
        posts = [client.post("/verify", json=member(k, text, **identity)) for k, text in enumerate(ANSWERS)]
        first = [reply.json()["reward"] for reply in await asyncio.gather(*posts)]
        again = await client.post("/verify", json=member(2, ANSWERS[2], **identity))
        other = await client.post("/verify", json=member(2, "odd", **identity))
        return first, again.json()["reward"], other.status_code

    first, again, other = serve(judged_engine, main, group_size=4)
    assert again == first[2]
    assert other == 409


def test_what_agents_call_around_it(serve, judged_engine):
    rows = [{"reward": 2.0}, {"reward": 4.0}, {"reward": 0.0, "mask_sample": True}]

    async def main(client):
        seeded = await client.post("/seed_session", json={})
        closed = await client.post("/close_session", json={})
        told = await client.post("/aggregate_metrics", json={"verify_responses": rows})
        return seeded.json(), closed.json(), told.json()

    seeded, closed, told = serve(judged_engine, main)
    assert seeded == closed == {}
    assert told["agent_metrics"] == {"masked": 1.0, "mean/reward": 3.0, "std/reward": 1.0}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/verify", member(0, "good"), "group size"),
        ("/compare", compare(principle="mine"), "principle"),
        ("/compare", compare() | {"conversation_history": [{"type": "reasoning"}]}, "input"),
        ("/compare", compare() | {"response_objs": [{"text": "x"}]}, "response_objs[0]"),
        ("/compare", {"response_objs": []}, "conversation_history"),
        ("/compare", compare() | {"response_objs": [response("a")] * 65}, "at most 64"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(serve, judged_engine, path, body, says):
    async def main(client):
        return await client.post(path, json=body)

    reply = serve(judged_engine, main)
    assert reply.status_code == 422
    assert says in reply.text
    assert "SECRET" not in reply.text


def test_nothing_and_one_alone(serve, judged_engine):
    async def main(client):
        none = await client.post("/compare", json=compare(texts=[]))
        one = await client.post("/compare", json=compare(texts=["good"]))
        return none.json(), one.json()

    none, one = serve(judged_engine, main)
    assert none == {"rewards": [], "comparison_results": [], "metrics": {}}
    assert (one["rewards"], one["comparison_results"]) == ([3.0], [])
    assert all(math.isfinite(value) for value in one["metrics"].values())


def test_it_is_there_only_if_asked_for(make_app, talk, judged_engine):
    async def main(client):
        return await client.post("/compare", json=compare())

    assert talk(make_app(judged_engine), main).status_code == 404


CLIENT = """
import asyncio, json, sys
from nemo_gym.server_utils import ServerClient
from nemo_gym.base_resources_server import BaseVerifyResponse
from nemo_gym.config_types import AggregateMetrics
from omegaconf import OmegaConf
from resources_servers.genrm_compare.app import GenRMCompareRequest, GenRMCompareResponse, GenRMCompareVerifyRequest
from resources_servers.genrm_compare.comparison_strategies import GenRMStrategy, GenRMStrategyConfig

from resources_servers.genrm_compare.utils import apply_length_bonuses, apply_style_penalties

NAMES = ("reasoning_bonus", "answer_bonus", "top_percentile", "group_reasoning_length_penalty_coeff",
         "group_answer_length_penalty_coeff", "group_style_penalty_coeff")
port, compare, members, bonuses, plain = json.loads(sys.stdin.read())
where = {"host": "127.0.0.1", "port": port, "entrypoint": "app.py", "domain": "rlhf"}
config = OmegaConf.create({"genrm_compare": {"resources_servers": {"genrm_compare": where}}})
client = ServerClient(head_server_config={"host": "127.0.0.1", "port": port}, global_config_dict=config)
GenRMCompareRequest.model_validate(compare)
bodies = [GenRMCompareVerifyRequest.model_validate(member) for member in members]

async def verify(body):
    reply = await client.post(server_name="genrm_compare", url_path="/verify", json=body)
    return BaseVerifyResponse.model_validate(json.loads(await reply.read())).reward

async def main():
    strategy = GenRMStrategy(GenRMStrategyConfig(num_generations_per_prompt=len(members)))
    rewards, metrics = await strategy.compare(compare["conversation_history"], compare["response_objs"], client)
    reply = await client.post(server_name="genrm_compare", url_path="/compare", json=compare)
    GenRMCompareResponse.model_validate(json.loads(await reply.read()))
    verified = await asyncio.gather(*(verify(body) for body in bodies))
    rows = {"verify_responses": [{"reward": reward} for reward in verified]}
    reply = await client.post(server_name="genrm_compare", url_path="/aggregate_metrics", json=rows)
    AggregateMetrics.model_validate(json.loads(await reply.read()))
    # Its own sums of bonuses, over rewards as they come without a comparison.
    named = {**{name: 0.0 for name in NAMES}, **bonuses}
    theirs, *_ = apply_length_bonuses(list(plain), compare["response_objs"], *(named[name] for name in NAMES[:-1]))
    theirs, _ = apply_style_penalties(theirs, compare["response_objs"], named["group_style_penalty_coeff"])
    print(json.dumps({"rewards": rewards, "metrics": metrics, "verified": verified, "theirs": theirs}))

asyncio.run(main())
"""


@pytest.mark.skipif(
    "RMCORE_NEMO_GYM_PYTHON" not in os.environ, reason="no RMCORE_NEMO_GYM_PYTHON: make test-nemo-gym installs nemo-gym"
)
def test_nemo_gyms_own_client_and_models_take_it(judged_engine, make_app, serve_app, tmp_path):
    """Its ServerClient, GenRMStrategy and reply models, in an environment of their own."""
    texts = ["# good\n- clear **right**", "bad vague wrong", "good 1. bad red \U0001f600", "kind exact helpful"]
    given = {"reasoning_bonus": 0.1, "answer_bonus": 0.2, "top_percentile": 0.6, "group_style_penalty_coeff": 0.7}
    given |= {"group_reasoning_length_penalty_coeff": 0.3, "group_answer_length_penalty_coeff": 0.5}
    body = compare(texts)
    body["response_objs"][1]["output"][0]["summary"][0]["text"] = "a longer plan"
    members = [member(k, "", _ng_group_id="own") | {"response": one} for k, one in enumerate(body["response_objs"])]
    with serve_app(make_app(judged_engine, nemo_gym=True)) as url:
        plain = httpx.post(f"{url}/compare", json=body, trust_env=False, timeout=60).json()["rewards"]
    python = os.path.abspath(os.environ["RMCORE_NEMO_GYM_PYTHON"])  # a link, which must stay one
    with serve_app(make_app(judged_engine, nemo_gym=True, group_size=4, gym_bonuses=GymBonuses(**given))) as url:
        sent = json.dumps([int(url.rpartition(":")[2]), body, members, given, plain])
        done = subprocess.run(
            [python, "-c", CLIENT], input=sent, capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["rewards"] == pytest.approx(told["verified"])
    assert told["rewards"] == pytest.approx(told["theirs"])  # its own functions add the same
    assert told["metrics"]["genrm_pairs_asked"] == 6


def test_what_is_said_in_parts_is_said_and_what_is_no_text_is_refused():
    """A refusal was nothing, and so worse than any answer; an image in a question was not there."""
    said = [{"type": "output_text", "text": "I am sorry. "}, {"type": "refusal", "refusal": "I cannot."}]
    response = {"output": [{"type": "reasoning"}, {"type": "message", "content": said}, {"type": "function_call"}]}
    assert _output_text(response, "response") == "I am sorry. I cannot."
    assert conversation([{"role": "user", "content": said[:1]}]) == [{"role": "user", "content": "I am sorry. "}]
    for part in ({"type": "input_image", "image_url": "x"}, {"type": "input_file"}, {"type": "output_text"}, 7):
        with pytest.raises(InputError, match=r"input\[0\]\.content: got a part of type"):
            conversation([{"role": "user", "content": [part]}])
        with pytest.raises(InputError, match=r"response\.output: got a part of type"):
            _output_text({"output": [{"type": "message", "content": [part]}]}, "response")
    with pytest.raises(InputError, match=r"input\[0\]\.content: got int"):
        conversation([{"role": "user", "content": 3}])
