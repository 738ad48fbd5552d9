"""Members that the server would put into one group have one key, whichever way their bodies are written; and meet."""

from __future__ import annotations

import asyncio
import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.json_numbers import Numbers

from rmcore._base.errors import InputError
from rmcore.integrations.ray.serve.keys import request_key
from rmcore.integrations.server import ServeSettings
from rmcore.integrations.server.schema import MemberRequest
from rmcore.integrations.server.service import RewardService

ENGINE = SimpleNamespace(head=SimpleNamespace(config=SimpleNamespace(mode="difference")), design="all", judge=None)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXTS), min_size=1, max_size=2)
CONTENTS = TEXTS | PARTS
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": CONTENTS},
    optional={"name": st.none() | st.just("") | st.text("ab", min_size=1, max_size=2), "tool_calls": st.just([])},
)
PROMPTS = TEXTS | st.lists(MESSAGES, min_size=1, max_size=2)


def spellings(prompt):
    """JSON of a member's body with that prompt, spelled differently; the same to the server."""
    body = {"prompt": prompt, "k": 3, "response": "r"}
    yield json.dumps(body).encode()
    yield json.dumps(dict(reversed(body.items())), ensure_ascii=False, indent=1).encode()
    yield json.dumps({**body, "group_id": None, "slot": None, "response": "other", "k": 3.0}).encode()
    if isinstance(prompt, list):
        turned = [dict(reversed(message.items())) for message in prompt]
        yield json.dumps({**body, "prompt": turned}).encode()
        bare = [{k: v for k, v in message.items() if v not in (None, "", []) or k == "content"} for message in prompt]
        yield json.dumps({**body, "prompt": bare}).encode()


@given(PROMPTS, PROMPTS)
@settings(max_examples=60, deadline=None)
def test_what_the_server_takes_for_one_group_has_one_key(one, other):
    async def keys(prompt):
        service = RewardService(ENGINE, ServeSettings())
        return [
            (service.member_key(MemberRequest.model_validate_json(body)), request_key("/v1/rendezvous", body))
            for body in spellings(prompt)
        ]

    try:
        found = [asyncio.run(keys(prompt)) for prompt in (one, other)]
    except InputError:  # no prompt: no assembler takes it
        return
    for pairs in found:
        assert len(set(pairs)) == 1
    (own, key), (others, other_key) = found[0][0], found[1][0]
    assert (own == others) == (key == other_key)


@pytest.mark.parametrize("prompt", ["red tree", [{"role": "user", "content": "red tree"}], [
    {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
    {"role": "user", "content": "red", "name": "ann"},
]])  # fmt: skip
def test_members_without_a_name_meet_at_one_of_many_assemblers(prompt, cluster_of):
    async def main():
        numbers = Numbers()
        cluster = cluster_of(numbers, entries=3, assemblers=5)
        bodies = list(itertools.islice(itertools.cycle(spellings(prompt)), 3))
        sent = []
        for entry, body in enumerate(bodies):
            body = json.dumps({**json.loads(body), "response": f"{entry} x"}).encode()
            sent.append(cluster.send(entry, "POST", "/v1/rendezvous", body))
        answers = [(status, json.loads(content)) for status, content in await asyncio.gather(*sent)]
        assert [status for status, _ in answers] == [200] * 3
        for entry, (_, reply) in enumerate(answers):
            assert (reply["complete"], reply["slots"]) == (True, [0, 1, 2])
            assert sorted(reply["preference"]) == sorted(entry - other for other in range(3))
        assert len(numbers.scored) == 1
        counted = [process.assembler.service.assembly.stats.groups for process in cluster.assemblers]
        assert sorted(counted) == [0, 0, 0, 0, 1]

    asyncio.run(asyncio.wait_for(main(), 30))
