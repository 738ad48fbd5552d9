"""Every edge takes the same messages, tells the same ones apart, and refuses the same ones by the same name.

A prompt and two responses go in by each edge; what the engine is then asked to score comes out.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from support.messages import DONE, USER, as_prompt, as_response, each_refused, each_same, each_taken, each_taken_prompt
from typer.testing import CliRunner

from rmcore._base.errors import InputError
from rmcore._base.prompt import content_key
from rmcore.cli import app
from rmcore.engine import RewardEngine
from rmcore.integrations.openrlhf import make_reward_func
from rmcore.integrations.slime import GroupReward
from rmcore.integrations.trl import PairwiseReward
from rmcore.integrations.verl import PairwiseRewardManager
from rmcore.model import RewardModel
from rmcore.model.data import parse_preference
from rmcore.model.training_pairs import preference_texts

Edge = Callable[[Any, list[Any]], Any]


@pytest.fixture(scope="module")
def model(make_backbone, hand_head) -> RewardModel:
    """With a chat template that knows no tools."""
    torch.manual_seed(0)
    return RewardModel(make_backbone("qwen2"), hand_head(torch.randn(32).tolist()))


@pytest.fixture(scope="module")
def engine(model) -> RewardEngine:
    return RewardEngine(model)


def of_scores(group: Any) -> tuple[Any, bool]:
    """What tells a scored group from others, and whether its two responses are one and the same."""
    logit = group.logit.tolist()
    return json.dumps(logit), bool(group.decisions) or logit[0][1] == 0


@pytest.fixture(scope="module")
def edges(engine, model, tmp_path_factory) -> dict[str, Edge]:
    pytest.importorskip("fastapi")
    folder = tmp_path_factory.mktemp("messages")

    def score(prompt: Any, responses: list[Any]) -> Any:
        return of_scores(engine.score([prompt], [responses])[0])

    def preference(prompt: Any, responses: list[Any]) -> Any:
        row = {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
        pair = parse_preference(row)
        if content_key(pair.chosen) == content_key(pair.rejected):
            with pytest.raises(InputError, match=r"carry no signal \(1 equal responses\)"):
                preference_texts(model.backbone, [pair], "difference")
            return None, True
        texts, _ = preference_texts(model.backbone, [pair], "difference")
        return [text.ids for text in texts], texts[0].ids == texts[1].ids

    def command(prompt: Any, responses: list[Any]) -> Any:
        (folder / "groups.jsonl").write_text(json.dumps({"prompt": prompt, "responses": responses}) + "\n")
        with pytest.MonkeyPatch.context() as patched:  # what is loaded is not what is tested
            patched.setattr(RewardModel, "from_pretrained", classmethod(lambda *_, **__: model))
            patched.setattr("rmcore.model.described.describe", lambda _: None)
            result = CliRunner().invoke(app, ["score", "rm", str(folder / "groups.jsonl")])
        if result.exit_code:
            raise InputError(result.stderr.replace("\n", " "))
        record = json.loads(result.stdout)
        return json.dumps(record["logit"]), bool(record["decisions"]) or record["logit"][0][1] == 0

    def trl(prompt: Any, responses: list[Any]) -> Any:
        reward = PairwiseReward(engine, num_generations=2)
        asyncio.run(reward([prompt, prompt], responses))
        return of_scores(reward.last[0])

    def server(prompt: Any, responses: list[Any]) -> Any:
        from rmcore.integrations.server import create_app

        async def post() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(engine))) as client:
                return await client.post(
                    "http://127.0.0.1:8400/v1/groups", json={"prompt": prompt, "responses": responses}
                )

        reply = asyncio.run(post())
        if reply.status_code != 200:
            assert reply.status_code == 422
            raise InputError(reply.json()["error"]["message"])
        body = reply.json()
        return json.dumps(body["preference"]), bool(body["decisions"]["identical"]) or body["preference"][0][1] == 0

    return {"engine": score, "data": preference, "rmcore score": command, "TRL": trl, "server": server}


EDGES = ("engine", "data", "rmcore score", "TRL", "server")
each_edge = pytest.mark.parametrize("edge", EDGES)


@each_edge
@each_taken
def test_different_responses_are_not_identical(edges, edge, twins):
    _, same = edges[edge]([USER], [as_response(messages) for messages in twins])
    assert not same


@each_edge
@each_taken_prompt
def test_different_prompts_are_different(edges, edge, twins):
    one, other = (edges[edge](as_prompt(messages), ["good", "bad"])[0] for messages in twins)
    assert one != other


@each_edge
@each_same
def test_two_ways_to_say_the_same_are_identical(edges, edge, twins):
    assert edges[edge]([USER], [as_response(messages) for messages in twins])[1]


@each_edge
@each_refused
def test_what_is_no_message_is_refused_by_name(edges, edge, message, says):
    schema_first = edge == "server" and message.get("role") in (None, "")
    says = "role" if schema_first else rf"\[1\].*{says}"
    with pytest.raises(InputError, match=says):
        edges[edge]([USER, message], ["good", "bad"])
    if message.get("role") != "user":  # which would begin a whole conversation
        with pytest.raises(InputError, match=says.replace(r"\[1\]", r"\[0\]")):
            edges[edge]([USER], [[message, DONE], "bad"])


@pytest.mark.parametrize("response", [DONE, [DONE]], ids=["message", "list"])
@each_edge
def test_one_message_is_its_text(edges, edge, response):
    assert edges[edge]([USER], [response, "done"])[1]


# -- edges whose responses are text ----------------------------------------------------------------------------------


def slime_samples(prompt: Any) -> list[Any]:
    return [SimpleNamespace(prompt=prompt, response=text, status="completed") for text in ("good", "bad")]


def of_slime(engine: RewardEngine, prompt: Any) -> list[float]:
    return asyncio.run(GroupReward(engine)(SimpleNamespace(), slime_samples(prompt)))


@pytest.fixture
def of_verl(engine, served, group_client, tokenizer_of):
    def run(prompt: Any) -> list[float]:
        tokenizer = tokenizer_of()
        config = {
            "reward": {"reward_kwargs": {"rmcore": {"url": "http://127.0.0.1:8400"}}},
            "algorithm": {"adv_estimator": "rmcore"},
            "actor_rollout_ref": {"rollout": {"n": 2, "val_kwargs": {"n": 2}}},
        }
        manager = PairwiseRewardManager(config, tokenizer, client=group_client(served(engine), timeout_s=20.0))

        def item(k: int, text: str) -> Any:
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            raw = np.empty(len(prompt), dtype=object)
            raw[:] = prompt
            about = {"raw_prompt": raw, "uid": "u", "session_id": k, "global_steps": 1}
            return SimpleNamespace(
                batch={"responses": ids, "attention_mask": torch.ones_like(ids)}, non_tensor_batch=about
            )

        async def both() -> list[Any]:
            class Rows(list):
                def __getitem__(self, index: Any) -> Any:
                    return Rows(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

            calls = [manager.run_single(Rows([item(k, text)])) for k, text in enumerate(("good", "bad"))]
            return await asyncio.gather(*calls)

        return [result["reward_score"] for result in asyncio.run(both())]

    return run


@each_taken_prompt
def test_slime_and_verl_take_the_prompts_that_others_take(engine, of_verl, twins):
    for take in (lambda prompt: of_slime(engine, prompt), of_verl):
        one, other = (take(as_prompt(messages)) for messages in twins)
        assert one != other


@each_refused
def test_slime_and_verl_refuse_the_prompts_that_others_refuse(engine, of_verl, message, says):
    with pytest.raises(InputError, match=rf"samples\[0\].prompt\[1\].*{says}"):
        of_slime(engine, [USER, message])
    with pytest.raises(InputError, match=rf"raw_prompt\[1\].*{says}"):
        of_verl([USER, message])


def test_openrlhf_sends_text_and_nothing_else():
    reward = make_reward_func("http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"query\[0\]: got list, expected text"):
        reward([[USER, DONE]], ["how much?"], [""])
    with pytest.raises(InputError, match=r"prompts\[0\]: got list, expected text"):
        reward(["how much? done"], [[USER]], [""])


# -- whole rows ------------------------------------------------------------------------------------------------------


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASK = {"role": "user", "content": "2+2?"}
ROWS = {
    "a prompt beside whole conversations": (
        {"prompt": "2+2?", "chosen": [ASK, turn("4")], "rejected": [ASK, turn("5")]},
        ([ASK], "4", "5"),
    ),
    "two texts that share a beginning": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        ("\n\nHuman: 2+2?\n\nAssistant:", " 4", " 5"),
    ),
    "text parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}],
            "chosen": [turn("4")],
            "rejected": [turn("5")],
        },
        ([ASK], "4", "5"),
    ),
    "conversations that part before the last turn": (
        {"chosen": [ASK, turn("4"), ASK, turn("4")], "rejected": [ASK, turn("5"), ASK, turn("5")]},
        ([ASK], [turn("4"), ASK, turn("4")], [turn("5"), ASK, turn("5")]),
    ),
    "a message as a response": (
        {"prompt": [ASK], "chosen": turn("4"), "rejected": turn("5")},
        ([ASK], "4", "5"),
    ),
}


@pytest.mark.parametrize(("row", "parts"), ROWS.values(), ids=list(ROWS))
def test_rows_as_data_sets_have_them(edges, row, parts):
    read = parse_preference(row)
    assert (read.prompt, read.chosen, read.rejected) == parts
    for edge in EDGES:
        assert not edges[edge](parts[0], list(parts[1:]))[1]
