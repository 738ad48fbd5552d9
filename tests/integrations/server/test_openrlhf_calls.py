"""OpenRLHF's calls of /get_reward."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
import torch
from support.server_calls import single, until

# -- OpenRLHF --------------------------------------------------------------------------------------------------------


def test_openrlhfs_whole_batches(make_app, talk, echo_engine):
    prompts = ["a>", "b>", "a>", "b>", "a>", "a>"]
    answers = ["1", "5", "2", "9", "3", "7"]
    body = {"query": [p + a + "</s><pad>" for p, a in zip(prompts, answers, strict=True)], "prompts": prompts}

    async def main(client):
        return (await client.post("/get_reward", json={**body, "labels": ["", None, 3, {}, [], "x"]})).json()

    got = talk(make_app(echo_engine, group_size=2), main)
    assert echo_engine.scored == [("a>", ["1", "2"]), ("a>", ["3", "7"]), ("b>", ["5", "9"])]
    assert got["rewards"] == [-0.5, -2.0, 0.5, 2.0, -2.0, 2.0]
    assert got["extra_logs"] == {}
    for first, second in ((0, 2), (4, 5), (1, 3)):
        assert 0 < got["scores"][first] < 0.5 < got["scores"][second] < 1
        assert got["scores"][first] + got["scores"][second] == pytest.approx(1)
    other = talk(make_app(echo_engine, group_size=2, baseline="group-mean"), main)
    assert other["rewards"] == [-1.0, -4.0, 1.0, 4.0, -4.0, 4.0]


def test_openrlhfs_single_calls_find_their_siblings_equal_ones_too(make_app, talk, echo_engine):
    texts = ["4", "1", "1", "2"]

    async def main(client):
        calls = [client.post("/get_reward", json=single(text, prompt=p)) for p in ("p>", "q>") for text in texts]
        second_server = await client.post("/get_reward", json={"query": [], "prompts": [], "labels": []})
        return [a.json() for a in await asyncio.gather(*calls)], second_server.json()

    app = make_app(echo_engine, group_size=4)
    answers, second_server = talk(app, main)
    expected = [2.0, -1.0, -1.0, 0.0]  # S_i / 4
    assert [a["rewards"] for a in answers] == [[value] for value in expected * 2]
    assert sorted(prompt for prompt, _ in echo_engine.scored) == ["p>", "q>"]
    assert second_server == {"rewards": [], "scores": [], "extra_logs": {}}


def test_openrlhfs_curves_are_the_prometheus_figures(make_app, talk, judged_engine):
    """It averages each log over a step's samples, as tensors: the same names in all, and ratios of sums."""
    texts = ["good clear", "bad vague", "odd tree", "good good right", "stone kind"]

    async def main(client):
        calls = [client.post("/get_reward", json=single(text, prompt=p)) for p in ("red ", "blue ") for text in texts]
        answers = [answer.json()["extra_logs"] for answer in await asyncio.gather(*calls)]
        return answers, (await client.get("/metrics")).text

    logs, page = talk(make_app(judged_engine, group_size=5), main)
    assert len({tuple(one) for one in logs}) == 1
    mean = {name: float(torch.cat([torch.tensor([one[name]]) for one in logs]).mean()) for name in logs[0]}
    counted = {name: float(value) for name, value in re.findall(r"^(rmcore_\w+)(?:{[^}]*})? (\S+)$", page, re.M)}
    for name in ("judge_disagreement", "judge_disagreement_expected"):
        seen = counted[f"rmcore_{name}_total"] / counted["rmcore_judged_weight_total"]
        assert mean[f"rmcore_{name}"] / mean["rmcore_judged"] == pytest.approx(seen, rel=1e-5)
    assert counted["rmcore_judged_weight_total"] > 0
    assert mean["rmcore_judge_rate"] == counted["rmcore_routed_pairs_total"] / 20 == 1.0
    assert mean["rmcore_uncertainty"] == pytest.approx(counted["rmcore_pair_uncertainty_sum"] / 20, rel=1e-5)


def test_openrlhfs_retry_after_180_seconds_gets_the_result_of_its_first_call(make_app, serve_app, echo_engine):
    """The client's timeout closes the socket; a second later it asks again, from a new one."""
    echo_engine.open = False
    app = make_app(echo_engine, group_size=3)
    texts = ["4", "4", "1"]
    with serve_app(app) as url:

        async def main():
            assembly = app.state.service.assembly
            async with httpx.AsyncClient(base_url=url) as client:

                async def call(text):
                    return await client.post("/get_reward", json=single(text), timeout=20)

                first = [asyncio.create_task(call(text)) for text in texts]
                await until(lambda: assembly.waiting == 3)
                for task in first:
                    task.cancel()
                await until(lambda: assembly.waiting == 0)
                again = [asyncio.create_task(call(text)) for text in texts]
                await until(lambda: assembly.waiting == 3)
                echo_engine.open = True
                return [(await task).json()["rewards"] for task in again], assembly.stats

        rewards, stats = asyncio.run(asyncio.wait_for(main(), 60))
    assert rewards == [[1.0], [1.0], [-2.0]]
    assert len(echo_engine.scored) == 1
    assert (stats.members, stats.retries, stats.groups) == (3, 3, 1)


def test_openrlhf_is_told_503_before_it_gives_up_and_asks_again(make_app, talk, echo_engine, manual_clock):
    async def main(client):
        echo_engine.open = False
        calls = [client.post("/get_reward", json=single(text)) for text in ("3", "1")]
        early = await asyncio.gather(*calls)
        echo_engine.open = True
        again = await asyncio.gather(*(client.post("/get_reward", json=single(text)) for text in ("3", "1")))
        return early, again

    app = make_app(echo_engine, clock=manual_clock, group_size=2, time_limit_s=0.05, answer_within_s=0.1)
    early, again = talk(app, main)
    assert [(a.status_code, a.json()["error"]["type"]) for a in early] == [(503, "timeout")] * 2
    assert [a.json()["rewards"] for a in again] == [[1.0], [-1.0]]
    assert len(echo_engine.scored) == 1


def test_a_missing_preference_is_503_again_and_again_never_0(make_app, talk, echo_engine):
    async def main(client):
        first = await asyncio.gather(*(client.post("/get_reward", json=single(text)) for text in ("3", "1", "nan")))
        return first, await client.post("/get_reward", json=single("nan"))

    first, retry = talk(make_app(echo_engine, group_size=3), main)
    assert [a.status_code for a in first] == [200, 200, 503]
    assert first[2].json()["error"]["type"] == retry.json()["error"]["type"] == "no_preference"


def test_openrlhfs_chat_template_can_be_taken_off(make_app, talk, echo_engine):
    prefix, suffix = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    prompt = f"{prefix}What?{suffix}"

    async def main(client):
        good = {"query": [f"<s>{prompt}{k}<|im_end|>" for k in (1, 2)], "prompts": [prompt] * 2}
        bad = {"query": ["What?1", "What?2"], "prompts": ["What?"] * 2}
        return await client.post("/get_reward", json=good), await client.post("/get_reward", json=bad)

    good, bad = talk(make_app(echo_engine, prompt_prefix=prefix, prompt_suffix=suffix), main)
    assert echo_engine.scored == [("What?", ["1", "2"])]
    assert good.status_code == 200
    assert (bad.status_code, "expected a text between" in bad.json()["error"]["message"]) == (422, True)


def test_single_calls_need_a_group_size(make_app, talk, echo_engine):
    async def main(client):
        return await client.post("/get_reward", json=single("1"))

    answer = talk(make_app(echo_engine), main)
    assert answer.status_code == 422
    assert "--group-size" in answer.json()["error"]["message"]
