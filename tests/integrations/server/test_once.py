"""What is the whole group's is worked out once, and every member's answer is as if it had been made for it alone."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from typing import Any

import pytest

from rmcore.integrations.server import nemo_gym, schema, service
from rmcore.integrations.server.members import Outcome
from rmcore.integrations.server.once import FEW_RESPONSES, Once

SIZES = (1, 2, FEW_RESPONSES, FEW_RESPONSES + 1, 16)


def _reward(text: str, slot: int, size: int) -> tuple[str, dict[str, Any]]:
    return "/get_reward", {"query": [f"red tree {text}"], "prompts": ["red tree"]}


def _named(text: str, slot: int, size: int) -> tuple[str, dict[str, Any]]:
    return "/v1/rendezvous", {"group_id": "g", "slot": slot, "k": size, "prompt": "red tree", "response": text}


def _unnamed(text: str, slot: int, size: int) -> tuple[str, dict[str, Any]]:
    return "/v1/rendezvous", {"k": size, "prompt": "red tree", "response": text}


def _rollout(text: str, slot: int, size: int) -> tuple[str, dict[str, Any]]:
    output = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
    return "/verify", {"responses_create_params": {"input": "red tree"}, "response": {"output": [output]}}


def _numbers(row: Any) -> list[float | None]:
    return [value if abs(value) < float("inf") else None for value in row.tolist()]


def _alone(app: Any, path: str, body: dict[str, Any], outcome: Outcome, i: int) -> dict[str, Any]:
    """The answer of row ``i``, everything in it worked out for this one."""
    group, size = outcome.score, outcome.score.size
    if path == "/get_reward":
        figures = service.group_figures(group)
        values = [values[i] for values in app.state.service._rewards_of(group)]
        logs = {f"rmcore_{name}": value for name, value in figures.items()}
        return {"rewards": values[:1], "scores": values[1:], "extra_logs": logs}
    if path == "/verify":
        reward = nemo_gym._rewards(app.state.service, group, outcome.notes)[i]
        return body | {"reward": reward, "mask_sample": False, "genrm": nemo_gym._metrics(group)}
    variance = group.advantage_variance
    return {
        "group_id": body.get("group_id"),
        "attempt": 0,
        "slot": outcome.slots[i],
        "reward": {
            "leave_one_out": _numbers(group.rewards_for("leave-one-out"))[i],
            "group_mean": _numbers(group.rewards_for("group-mean"))[i],
        },
        "advantage": _numbers(group.advantages)[i],
        "advantage_variance": None if variance is None else _numbers(variance)[i],
        "preference": _numbers(group.preference[i]),
        "uncertainty": _numbers(group.uncertainty[i]),
        "routed": group.routed[i].tolist(),
        "slots": list(range(size)),
        "complete": True,
        "head_version": group.head_version,
    }


CALLS = {
    "get_reward": (_reward, "group_figures"),
    "rendezvous": (_named, "_values"),
    "rendezvous by content": (_unnamed, "_values"),
    "verify": (_rollout, "_metrics"),
}
CASES = [(*CALLS[name], size) for name in CALLS for size in SIZES if size > 1 or name.startswith("rendezvous")]


@pytest.mark.parametrize(("call", "name", "size"), CASES)
def test_members_read_what_was_worked_out_once_and_get_the_bytes_of_their_own(
    make_app, talk, judged_engine, some_texts, monkeypatch, call, name, size
):
    texts = [f"{text} {'good ' * k}".strip() for k, text in enumerate(some_texts(random.Random(size), size))]
    app = make_app(judged_engine, nemo_gym=True, **({"group_size": size} if size > 1 else {}))
    outcomes, made = list[Outcome](), list[int]()

    async def note(group):
        outcomes.append(group.outcome)

    app.state.service.assembly.finished = note
    where = next(one for one in (service, schema, nemo_gym) if hasattr(one, name))
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a: (made.append(threading.get_ident()), real(*a))[1])

    async def main(client):
        calls = [call(text, slot, size) for slot, text in enumerate(texts)]
        answers = await asyncio.gather(*(client.post(path, json=body) for path, body in calls))
        if call is _named:  # asked again: read, too
            again = await asyncio.gather(*(client.post(path, json=body) for path, body in calls))
            assert [answer.content for answer in again] == [answer.content for answer in answers]
        return threading.get_ident(), calls, answers

    loop, calls, answers = talk(app, main)
    assert [answer.status_code for answer in answers] == [200] * size
    assert len(made) == 1, "once for the group, not once a member"
    assert (made[0] == loop) is (size <= FEW_RESPONSES)
    (outcome,) = outcomes
    monkeypatch.undo()
    got = Counter(answer.content for answer in answers)
    want = []
    for i in range(size):
        path, body = calls[outcome.slots[i]]
        want.append(json.dumps(_alone(app, path, body, outcome, i), separators=(",", ":")).encode())
    # By content the rows have the order of the arrivals, which for calls made at once is theirs.
    assert got == Counter(want)
    assert size == 1 or len(got) > 1


def test_who_goes_away_does_not_take_it_along_and_a_failure_is_told_and_not_kept():
    go, begun = threading.Event(), threading.Event()
    tries = []

    def make(result: Any = None) -> Any:
        tries.append(threading.get_ident())
        begun.set()
        assert go.wait(30)
        if result is None:
            raise ZeroDivisionError("of one try")
        return result

    async def main() -> None:
        once, size = Once(), FEW_RESPONSES + 1
        first = asyncio.create_task(once.get("x", lambda: make(7), size))
        await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(once.get("x", lambda: make(8), size)) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        go.set()
        assert (await asyncio.gather(*others), first.cancelled(), len(tries)) == ([7] * 3, True, 1)
        assert await once.get("x", lambda: make(9), size) == 7
        failed = [once.get("y", make, size) for _ in range(2)]
        told = await asyncio.gather(*failed, return_exceptions=True)
        assert ([type(one) for one in told], len(tries)) == ([ZeroDivisionError] * 2, 2)
        assert await once.get("y", lambda: make(5), size) == 5
        with pytest.raises(ZeroDivisionError):
            await once.get("z", make, FEW_RESPONSES)
        assert await once.get("z", lambda: 4, FEW_RESPONSES) == 4

    asyncio.run(asyncio.wait_for(main(), 60))
