"""Several servers behind one trainer: members that come to different ones meet at their group's owner."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rmcore._base.errors import InputError
from rmcore.integrations.client import ConflictError, GroupClient, ServerError
from rmcore.integrations.server import ServeSettings, create_app
from rmcore.integrations.server.placing import group_key, owner, ranked

URLS = ("http://127.0.0.1:8401", "http://127.0.0.1:8402", "http://127.0.0.1:8403")
TEXTS = ["1 good", "2 bad", "3 red", "5 kind"]
PROMPTS = ["red tree", "blue river", "green house", "stone cloud", "red river", "blue tree"]


class Network(httpx.AsyncBaseTransport):
    """Servers by their addresses; ``down`` are refused. Notes where each request went: (path, port)."""

    def __init__(self) -> None:
        self.apps: dict[str, httpx.ASGITransport] = {}
        self.down: set[str] = set()
        self.seen: list[tuple[str, str]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = f"{request.url.scheme}://{request.url.netloc.decode()}"
        self.seen.append((request.url.path, url))
        if url in self.down:
            raise httpx.ConnectError("refused")
        await request.aread()
        return await self.apps[url].handle_async_request(request)


@pytest.fixture
def network(new_echo_engine) -> Callable[..., Network]:
    """A network of servers that know each other, each with an engine of its own."""

    def make(urls: tuple[str, ...] = URLS, lists: dict[str, tuple[str, ...]] | None = None, **options: Any) -> Network:
        net = Network()
        for url in urls:
            settings = ServeSettings(
                peers=(lists or {}).get(url, urls), advertise=url, batch_wait_s=0.0, time_limit_s=20.0, **options
            )
            app = create_app(new_echo_engine(), settings, transport=net)
            net.apps[url] = httpx.ASGITransport(app, raise_app_exceptions=False)
        return net

    return make


def service(net: Network, url: str) -> Any:
    return net.apps[url].app.state.service  # type: ignore[attr-defined]


def scored(net: Network) -> dict[str, int]:
    return {url: len(service(net, url).scorer.engine.scored) for url in net.apps}


async def spread(net: Network, calls: list[tuple[str, dict[str, Any]]], urls: tuple[str, ...] = URLS) -> list[Any]:
    """Each call to the next address of the list, all at once, as OpenRLHF's executor does it."""
    turn = itertools.cycle(urls)
    async with httpx.AsyncClient(transport=net) as client:
        posts = [client.post(f"{next(turn)}{path}", json=body) for path, body in calls]
        return await asyncio.wait_for(asyncio.gather(*posts), 30)


def openrlhf_calls() -> list[tuple[str, dict[str, Any]]]:
    return [("/get_reward", {"query": [p + " " + t], "prompts": [p], "labels": ["x"]}) for p in PROMPTS for t in TEXTS]


def test_openrlhfs_single_calls_meet_whichever_server_they_come_to(network):
    net = network(group_size=4)
    answers = asyncio.run(spread(net, openrlhf_calls()))
    assert [answer.status_code for answer in answers] == [200] * 24
    rewards = [answer.json()["rewards"][0] for answer in answers]
    # p̃_ij is the difference of the numbers in the texts, so every group's rewards are these, and nobody else's.
    assert len({tuple(round(value, 6) for value in rewards[k : k + 4]) for k in range(0, 24, 4)}) == 1
    assert rewards[0] < rewards[1] < rewards[2] < rewards[3]
    assert sum(scored(net).values()) == 6, "each group was scored once"
    placed = Counter(owner(group_key(prompt), URLS) for prompt in PROMPTS)
    assert scored(net) == {url: placed[url] for url in URLS}
    assert len(placed) > 1, "or the test would show nothing"
    counted = [service(net, url).peers.members for url in URLS]
    passed_on = sum(one["passed_on"] for one in counted)
    assert passed_on == sum(one["taken_over"] for one in counted) > 0
    assert f'rmcore_peer_members_total{{outcome="passed_on"}} {float(counted[0]["passed_on"])}' in (
        service(net, URLS[0]).metrics.page()[0].decode()
    )


def test_rendezvous_and_verify_meet_too(network):
    net = network(group_size=4, nemo_gym=True)

    def verify(k: int, text: str, **more: Any) -> tuple[str, dict[str, Any]]:
        item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
        body = {"responses_create_params": {"input": "blue river"}, "response": {"output": [item]}}
        return "/verify", body | more

    calls: list[tuple[str, dict[str, Any]]] = []
    for group in ("a", "b", 7):
        body = {"group_id": group, "k": 4, "prompt": "red tree", "attempt": 1}
        calls += [("/v1/rendezvous", body | {"slot": k, "response": text}) for k, text in enumerate(TEXTS)]
    calls += [verify(k, text, _ng_group_id="g", _ng_rollout_index=k) for k, text in enumerate(TEXTS)]
    calls += [verify(k, text) for k, text in enumerate(TEXTS)]
    answers = asyncio.run(spread(net, calls))
    assert [answer.status_code for answer in answers] == [200] * 20
    advantages = [answer.json()["advantage"] for answer in answers[:12]]
    assert advantages[:4] == advantages[4:8] == advantages[8:]
    assert advantages[0] < advantages[3]
    rewards = [answer.json()["reward"] for answer in answers[12:]]
    assert rewards[:4] == rewards[4:]
    assert rewards[0] < rewards[3]
    assert sum(scored(net).values()) == 5


def test_errors_and_contradictions_are_the_owners_as_they_are(network):
    net = network()
    client = GroupClient(list(URLS), transport=net)

    async def main() -> None:
        first = asyncio.create_task(client.rendezvous("g", 0, 2, "red", "1"))
        await asyncio.sleep(0)
        for url in URLS:  # whichever server is asked
            with pytest.raises(ConflictError, match="size"):
                await GroupClient(url, transport=net).rendezvous("g", 1, 3, "red", "2")
        await GroupClient(URLS[0], transport=net).rendezvous("g", 1, 2, "red", "2")
        await first

    asyncio.run(main())


def test_a_server_that_is_down_leaves_its_groups_unscored_and_says_so(network):
    net = network(group_size=4)
    prompt = next(p for p in PROMPTS if owner(group_key(p), URLS) == URLS[2])
    net.down.add(URLS[2])
    body = {"query": [f"{prompt} 1"], "prompts": [prompt]}
    (answer,) = asyncio.run(spread(net, [("/get_reward", body)]))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["type"] == "peer_unreachable"
    assert URLS[2] in answer.json()["error"]["message"]
    assert service(net, URLS[0]).peers.members == {"unreachable": 1}
    assert sum(scored(net).values()) == 0


def test_an_owner_that_went_without_a_word_is_not_waited_for_for_ever(new_echo_engine):
    """Its machine is gone, so no connection breaks: here one that takes requests and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        gone = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = ServeSettings(
            peers=(URLS[0], gone), advertise=URLS[0], time_limit_s=0.1, answer_within_s=0.2, batch_wait_s=0.0
        )
        transport = httpx.ASGITransport(create_app(new_echo_engine(), settings), raise_app_exceptions=False)
        group = next(name for name in itertools.count() if owner(group_key(name, 0), settings.peers) == gone)
        body = {"group_id": group, "slot": 0, "k": 2, "prompt": "p", "response": "1"}

        async def main() -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await asyncio.wait_for(client.post("/v1/rendezvous", json=body), 30)

        answer = asyncio.run(main())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert f"belongs to {gone}, which does not answer (ReadTimeout)" in answer.json()["error"]["message"]


def test_a_client_tries_until_the_owner_is_back(network, manual_clock):
    net = network(group_size=2)
    prompt = next(p for p in PROMPTS if owner(group_key(p), URLS) == URLS[1])
    net.down.add(URLS[1])

    async def main() -> list[Any]:
        clients = [GroupClient(url, transport=net, clock=manual_clock) for url in (URLS[0], URLS[2])]
        calls = [
            asyncio.create_task(client.get_reward([f"{prompt} {k}"], [prompt])) for k, client in enumerate(clients)
        ]
        await manual_clock.advance(0.1)
        net.down.clear()
        for _ in range(20):
            await manual_clock.advance(2.0)
        return await asyncio.gather(*calls)

    answers = asyncio.run(main())
    assert answers[0]["rewards"][0] == -answers[1]["rewards"][0] != 0


def test_lists_that_differ_are_refused_rather_than_groups_split(network):
    net = network(lists={URLS[0]: URLS[:2]})
    calls = [
        ("/v1/rendezvous", {"group_id": k, "k": 1, "slot": 0, "prompt": "red", "response": "1"}) for k in range(20)
    ]
    answers = asyncio.run(spread(net, calls, URLS[1:]))  # 8402 and 8403 have the whole list
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 421}, "only what belongs to 8401 is refused"
    refused = next(answer for answer in answers if answer.status_code == 421)
    assert "another list" in refused.json()["error"]["message"]


def test_a_peer_with_another_token_is_named(new_echo_engine):
    net = Network()
    for url, token in zip(URLS[:2], ("s3cret", "other"), strict=True):
        settings = ServeSettings(peers=URLS[:2], advertise=url, token=token)
        net.apps[url] = httpx.ASGITransport(create_app(new_echo_engine(), settings, transport=net))
    prompt_of = {"group_id": next(k for k in range(99) if owner(group_key(k, 0), URLS[:2]) == URLS[1])}
    body = {"k": 1, "slot": 0, "prompt": "red", "response": "1", "attempt": 0} | prompt_of

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=net, headers={"authorization": "Bearer s3cret"}) as client:
            return await client.post(f"{URLS[0]}/v1/rendezvous", json=body)

    answer = asyncio.run(main())
    assert answer.status_code == 421, "which no client tries again"
    assert "another token" in answer.json()["error"]["message"]
    assert "s3cret" not in answer.text


def test_whole_groups_are_scored_where_they_come(network):
    net = network(group_size=4)
    body = {"prompt": "red", "responses": TEXTS}
    answers = asyncio.run(spread(net, [("/v1/groups", body)] * 3))
    assert [answer.status_code for answer in answers] == [200] * 3
    query = {"query": [f"red {text}" for text in TEXTS], "prompts": ["red"] * 4}
    assert [a.status_code for a in asyncio.run(spread(net, [("/get_reward", query)] * 3))] == [200] * 3
    assert scored(net) == dict.fromkeys(URLS, 2)


def test_a_clients_list_sends_a_group_to_one_server_that_knows_of_no_others(new_echo_engine):
    """Servers without --peers: what the client chooses is enough, if every worker has the same list."""
    net = Network()
    for url in URLS:
        app = create_app(new_echo_engine(), ServeSettings(group_size=4, batch_wait_s=0.0))
        net.apps[url] = httpx.ASGITransport(app)
    lists = [list(URLS), list(reversed(URLS)), ",".join(URLS), ", ".join(f"{url}/" for url in URLS)]

    async def main() -> list[Any]:
        clients = [GroupClient(urls, transport=net) for urls in lists]
        return await asyncio.gather(
            *(clients[k].rendezvous(f"g{g}", k, 4, "red", text) for g in range(8) for k, text in enumerate(TEXTS)),
            *(clients[k].get_reward([f"{p} {t}"], [p]) for p in PROMPTS for k, t in enumerate(TEXTS)),
        )

    parts = asyncio.run(asyncio.wait_for(main(), 30))
    assert all(part.complete for part in parts[:32])
    assert sum(scored(net).values()) == 8 + len(PROMPTS)
    assert min(scored(net).values()) > 0


def test_whole_groups_go_to_the_next_server_where_one_cannot_be_reached(network, manual_clock):
    net = network()
    net.down = {URLS[0], URLS[1]}

    async def main(client: GroupClient) -> list[Any]:
        calls = [asyncio.create_task(client.groups("red", TEXTS)) for _ in range(12)]
        for _ in range(10):
            await manual_clock.advance(5.0)
        return await asyncio.gather(*calls)

    results = asyncio.run(main(GroupClient(list(URLS), transport=net, clock=manual_clock)))
    assert len(results) == 12
    assert scored(net) == {URLS[0]: 0, URLS[1]: 0, URLS[2]: 12}
    net.down.add(URLS[2])

    async def fails(client: GroupClient) -> None:
        call = asyncio.create_task(client.rendezvous("g", 0, 2, "red", "1"))
        for _ in range(200):
            await manual_clock.advance(5.0)
        await call

    with pytest.raises(ServerError, match="ConnectError"):
        asyncio.run(fails(GroupClient(list(URLS), transport=net, clock=manual_clock, timeout_s=60.0)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"peers": URLS, "port": 9000}, "127.0.0.1:9000"),
        ({"peers": URLS, "advertise": "http://127.0.0.1:1"}, "advertise"),
        ({"peers": (*URLS, URLS[0]), "advertise": URLS[0]}, "equal"),
        ({"peers": (*URLS, f"{URLS[0]}/"), "advertise": URLS[0]}, "equal"),
        ({"peers": ("a:8400",), "advertise": "a:8400"}, "peers"),
        ({"advertise": URLS[0]}, "no peers"),
    ],
)
def test_lists_that_cannot_be_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        ServeSettings(**options)


def test_a_servers_own_address_is_found_by_host_and_port():
    assert ServeSettings(peers=URLS, port=8402).own_address == URLS[1]
    with pytest.raises(InputError, match="equal"):
        GroupClient([URLS[0], URLS[0]])
    with pytest.raises(InputError, match="url"):
        GroupClient([])


def test_all_find_the_same_owner_and_only_the_groups_of_one_that_leaves_move():
    names = [f"http://node{k}:8400" for k in range(5)]
    for number in range(200):
        key = group_key(number, "x")
        first = owner(key, names)
        assert owner(key, names[::-1]) == first == ranked(key, names[2:] + names[:2])[0]
        for gone in names:
            left = [name for name in names if name != gone]
            assert owner(key, left) == (first if gone != first else ranked(key, names)[1])


def test_keys_tell_numbers_from_texts_and_groups_are_shared_out():
    assert group_key(1) != group_key("1")
    assert group_key("a", 0) != group_key("a", 1)
    shares = Counter(owner(group_key(k, 0), URLS) for k in range(3000))
    assert all(900 < share < 1100 for share in shares.values())
