"""Members of one group have one key, whatever their bodies look like, and all processes agree where it is."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore.integrations.ray.serve.keys import request_key
from rmcore.integrations.server.placing import owner

NAMES = st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=8))


def key(path, body, **more):
    return request_key(path, json.dumps(body).encode(), **more)


@given(NAMES, NAMES, st.integers(0, 7), st.text(max_size=5))
@settings(max_examples=25, deadline=None)
def test_members_by_slot_go_by_group_and_attempt(group, attempt, slot, response):
    body = {"group_id": group, "attempt": attempt, "slot": 0, "k": 8, "prompt": "p", "response": "r"}
    other = {**body, "slot": slot, "response": response}
    shuffled = dict(reversed(other.items()))
    assert key("/v1/rendezvous", body) == key("/v1/rendezvous", shuffled)
    spelled = json.dumps(shuffled, ensure_ascii=False, indent=2).encode("utf-8", "surrogatepass")
    assert request_key("/v1/rendezvous", spelled) == key("/v1/rendezvous", body)
    assert key("/v1/rendezvous", {**body, "group_id": f"{group}x"}) != key("/v1/rendezvous", body)
    assert key("/v1/rendezvous", {**body, "attempt": f"{attempt}x"}) != key("/v1/rendezvous", body)


def test_an_attempt_left_out_is_0_and_a_float_without_a_fraction_an_integer():
    body = {"group_id": 7, "slot": 0}
    assert key("/v1/rendezvous", body) == key("/v1/rendezvous", {**body, "attempt": 0})
    assert key("/v1/rendezvous", body) == request_key("/v1/rendezvous", b'{"group_id": 7.0, "attempt": 0.0}')
    assert key("/v1/rendezvous", body) != key("/v1/rendezvous", {"group_id": "7"})


def test_members_without_a_name_go_by_their_prompt():
    body = {"k": 2, "prompt": [{"role": "user", "content": "red tree"}], "response": "a"}
    other = {"prompt": [{"content": "red tree", "role": "user"}], "response": "b", "k": 2, "group_id": None}
    assert key("/v1/rendezvous", body) == key("/v1/rendezvous", other)
    assert key("/v1/rendezvous", body) != key("/v1/rendezvous", {**body, "prompt": "blue river"})


def test_single_rewards_go_by_their_prompt():
    one = {"query": ["a long prompt yes"], "prompts": ["a long prompt"], "labels": [None]}
    other = {"prompts": ["a long prompt"], "query": ["a long prompt no"]}
    assert key("/get_reward", one) == key("/get_reward", other)
    assert key("/get_reward", one) != key("/get_reward", {**one, "prompts": ["another"]})
    several = {"query": ["a b", "a c"], "prompts": ["a", "a"]}  # a whole group of its own
    assert key("/get_reward", several) != key("/get_reward", {**several, "query": ["a b", "a d"]})


def test_rollouts_go_by_their_group_or_by_what_is_judged_of_their_conversation():
    def body(**more):
        item = {"role": "user", "content": "hello", "type": "message"}
        return {"responses_create_params": {"input": [item], "id": more.get("id")}, "response": {}, **more}

    assert key("/verify", body(id=1)) == key("/verify", body(id=2))
    with_reasoning = body()
    with_reasoning["responses_create_params"]["input"].append({"type": "reasoning", "summary": []})
    assert key("/verify", with_reasoning) == key("/verify", body())
    text = {"responses_create_params": {"input": "hello"}, "response": {}}
    assert key("/verify", text) != key("/verify", body(_ng_group_id="g", _ng_rollout_index=0))
    named = body(_ng_group_id="g", _ng_rollout_index=0)
    assert key("/verify", named) == key("/verify", body(_ng_group_id="g", _ng_rollout_index=1, id=5))
    assert key("/verify", named) != key("/verify", body(_ng_group_id="g", _ng_rollout_index=0, _ng_group_attempt=1))
    assert key("/verify", body(_ng_group_id="g")) == key("/verify", body())  # without its place, by its text


def test_a_retry_of_a_whole_group_goes_where_it_went():
    group = {"prompt": "p", "responses": ["a", "b"], "id": 1}
    assert key("/v1/groups", group) == key("/v1/groups", group)
    assert key("/v1/groups", group, idempotency_key="k") == key("/v1/groups", {}, idempotency_key="k")


@pytest.mark.parametrize("path", ["/v1/rendezvous", "/get_reward", "/verify", "/v1/groups", "/other"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"7", b"{}", b"\xff\xfe{", b'{"prompts": [7]}', b'{"group_id": {}}', b"[" * 20_000,
             b'{"responses_create_params": 3}', b'{"responses_create_params": {}, "_ng_group_attempt": "x"}']
)  # fmt: skip
def test_what_no_assembler_takes_has_some_key(path, body):
    assert len(request_key(path, body)) == 32


def test_places_are_fixed_and_used_alike():
    """The same in every process: Python's own hashes of texts are not."""
    names = [f"Assembler{k}" for k in range(3)]
    places = [owner(key("/v1/rendezvous", {"group_id": k}), names) for k in range(3000)]
    assert [name[-1] for name in places[:12]] == list("210222121211")
    assert all(900 < count < 1100 for count in Counter(places).values())
