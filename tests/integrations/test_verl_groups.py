"""verl's samples without a name, its custom function, and groups that meet in an actor; Ray and verl left out."""

from __future__ import annotations

import asyncio
import random
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.verl_samples import GROUPS, config, exact, run_all, sample

from rmcore._base.errors import InputError
from rmcore.engine import RewardEngine
from rmcore.integrations.client import ConflictError, LateError, ServerError
from rmcore.integrations.ray.groups import ActorGroups, GroupHost
from rmcore.integrations.server.settings import ServeSettings
from rmcore.integrations.verl import PairwiseRewardManager, compute_score, function, source
from rmcore.judge import ChatJudge, GenRMJudge

CALLS = [(u, k) for u in range(2) for k in range(4)]


@pytest.fixture(scope="module")
def engine(reward_model) -> RewardEngine:
    return RewardEngine(reward_model)


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of()


class Handle:
    """An actor's handle as Ray gives it, around a host in this process; the first ``deaths`` calls find it dead."""

    def __init__(self, host: GroupHost, deaths: int = 0) -> None:
        self.host, self.deaths = host, deaths
        self.join = SimpleNamespace(remote=self._join)
        self.metrics = SimpleNamespace(remote=host.metrics)

    async def _join(self, body: dict[str, Any], again: bool = False) -> dict[str, Any]:
        if self.deaths:
            self.deaths -= 1
            raise sys.modules["ray.exceptions"].RayActorError("gone")
        return await self.host.join(body, again)


@pytest.fixture
def ray_exceptions(monkeypatch) -> None:
    module = ModuleType("ray.exceptions")
    module.RayActorError = type("RayActorError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.exceptions", module)


def in_random_order(make: Any) -> list[Any]:
    """``make(u, k)`` of all members at once; results in the order of the groups."""
    mixed = random.Random(1).sample(CALLS, len(CALLS))

    async def gathered() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*(make(u, k) for u, k in mixed)), 30)

    results = dict(zip(mixed, asyncio.run(gathered()), strict=True))
    return [results[call] for call in CALLS]


def close(values: list[float], engine: RewardEngine) -> None:
    # Members come in any order, and a text's row changes a little what float32 makes of it.
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), exact(engine), rtol=0, atol=2e-3)


def test_samples_without_a_name_meet_by_their_prompts(engine, tokenizer, served, group_client):
    """What the trainer has where the reward model shares the policy's GPUs: the messages and nothing else."""
    manager = PairwiseRewardManager(config(), tokenizer, client=group_client(served(engine), timeout_s=20.0))

    def one(u: int, k: int) -> Any:
        data = sample(tokenizer, GROUPS[u][0], GROUPS[u][1][k])
        data.non_tensor_batch = {"raw_prompt": data.non_tensor_batch["raw_prompt"]}
        return manager.run_single(data)

    results = in_random_order(one)
    close([result["reward_score"] for result in results], engine)
    assert {result["reward_extra_info"]["rmcore_members"] for result in results} == {4.0}


def test_groups_meet_in_an_actor_as_they_do_at_the_server(engine, tokenizer):
    groups = ActorGroups(lambda: Handle(GroupHost(lambda: engine, ServeSettings())))
    manager = PairwiseRewardManager(config(), tokenizer, client=groups)
    close([result["reward_score"] for result in run_all(manager, tokenizer)], engine)
    page = asyncio.run(groups.metrics())
    assert 'rmcore_members_total{outcome="joined"} 8.0' in page


def test_an_actors_errors_are_the_servers(engine):
    groups = ActorGroups(lambda: Handle(GroupHost(lambda: engine, ServeSettings())))

    async def main() -> None:
        first = asyncio.create_task(groups.rendezvous("g", 0, 2, "red", "good"))
        await asyncio.sleep(0)
        with pytest.raises(ConflictError, match="size"):
            await groups.rendezvous("g", 1, 3, "red", "bad")
        second = await groups.rendezvous("g", 1, 2, "red", "bad")
        part = await first
        assert (part.slot, second.slot) == (0, 1)
        assert part.advantage == -second.advantage != 0

    asyncio.run(main())


def test_an_actor_that_died_is_found_anew_and_its_callers_come_again(engine, ray_exceptions):
    host = GroupHost(lambda: engine, ServeSettings())
    handles = [Handle(host, deaths=2), Handle(host)]
    groups = ActorGroups(lambda: handles.pop(0))

    async def main() -> list[Any]:
        return await asyncio.gather(*(groups.rendezvous("g", k, 2, "red", text) for k, text in enumerate(["a", "b"])))

    handles.append(handles[-1])
    parts = asyncio.run(main())
    assert parts[0].complete
    assert parts[1].complete
    mortal = ActorGroups(lambda: Handle(host, deaths=9))
    with pytest.raises(ServerError, match="died 3 times"):
        asyncio.run(mortal.rendezvous("h", 0, 1, "red", "a"))


def test_only_who_comes_again_after_an_actors_death_needs_the_whole_group(engine, ray_exceptions):
    """An actor that is new is no server that began anew: those whose calls another one had say so."""
    host = GroupHost(lambda: engine, ServeSettings(time_limit_s=0.2))
    part = asyncio.run(ActorGroups(lambda: Handle(host)).rendezvous("g", 0, 3, "red", "a"))
    assert (part.slot, part.complete) == (0, False)
    handles = [Handle(host, deaths=1), Handle(host)]
    with pytest.raises(LateError, match="got 1 of 3"):
        asyncio.run(ActorGroups(lambda: handles.pop(0)).rendezvous("h", 0, 3, "red", "a"))


@pytest.fixture
def at_the_server(monkeypatch, engine, served, group_client):
    """compute_score's client talks to the real application."""
    function._groups.cache_clear()
    transport = served(engine)
    monkeypatch.setattr(source, "GroupClient", lambda url, **_: group_client(transport, timeout_s=20.0))
    yield transport
    function._groups.cache_clear()


def score(u: int, k: int, **settings: Any) -> Any:
    prompt, texts = GROUPS[u]
    about = {"split": "train", "prompt": prompt, "num_turns": 2, "rollout_reward_scores": {}}
    return compute_score(
        data_source="x", solution_str=texts[k], ground_truth="", extra_info=about,
        **{"n": 4, "url": "http://127.0.0.1:8400"} | settings,
    )  # fmt: skip


def test_the_custom_function_scores_whole_groups(at_the_server, engine):
    results = in_random_order(score)
    close([result["score"] for result in results], engine)
    assert {frozenset(result) for result in results} == {frozenset({"score", "rmcore_advantage", "rmcore_members"})}
    shares = in_random_order(lambda u, k: score(u, k, returns="leave-one-out"))
    loo = torch.tensor([one["score"] for one in shares]).view(2, 4)
    close((loo * 4 / 3 - loo.mean(1, keepdim=True) * 4 / 3).flatten().tolist(), engine)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n": None}, "reward_kwargs.n"),
        ({"retunrs": "advantage"}, r"keys \['retunrs'\]"),
        ({"returns": "zero"}, "returns"),
        ({"prompt_key": "question"}, r"extra_info\['question'\]"),
        ({"val_n": 1, "extra_info": {"prompt": "red"}}, "val_n"),
        ({"model": "my-rm"}, r"\['model'\] beside url"),
        ({"url": None}, "rmcore serve"),
    ],
)
def test_the_functions_settings_are_refused_by_name(settings, says, monkeypatch):
    monkeypatch.delenv("RMCORE_SERVE_URL", raising=False)
    about = settings.pop("extra_info", {"prompt": "red"})
    with pytest.raises(InputError, match=says):
        asyncio.run(
            compute_score("x", "good", "", extra_info=about, **{"n": 4, "url": "http://127.0.0.1:8400"} | settings)
        )


@pytest.fixture
def started(monkeypatch) -> list[Any]:
    """What start_groups is called with, instead of an actor."""
    calls: list[Any] = []

    def start(make: Any, settings: Any, *, name: str, **options: Any) -> object:
        calls.append(SimpleNamespace(make=make, settings=settings, name=name, options=options))
        return object()

    monkeypatch.setattr(source, "start_groups", start)
    return calls


def verl_config(rmcore: dict[str, Any], path: str | None = "pkg://rmcore.integrations.verl") -> dict[str, Any]:
    made = config(rmcore=rmcore)
    made["reward"] |= {"reward_model": {"model_path": "org/genrm"}, "custom_reward_function": {"path": path}}
    return made


def test_verls_generative_reward_model_judges_in_the_actor(started, reward_model_path, tokenizer):
    settings = {"model": str(reward_model_path), "judge_fraction": 0.25, "judge_kind": "genrm", "num_gpus": 0.5}
    for _ in range(2):  # two workers
        PairwiseRewardManager(verl_config(settings), tokenizer, reward_router_address="10.0.0.7:31234")
    assert started[0].name == started[1].name, "one actor for all"
    assert started[0].options == {"num_gpus": 0.5}
    assert started[0].settings.time_limit_s == 900
    made = started[0].make()
    assert isinstance(made.judge, GenRMJudge)
    assert made.judge.model == "org/genrm"
    assert made.judge.client.exchange.address.url.startswith("http://10.0.0.7:31234/v1")
    PairwiseRewardManager(
        verl_config({**settings, "judge_kind": "chat"}), tokenizer, reward_router_address="10.0.0.7:31234"
    )
    assert started[2].name != started[0].name
    assert isinstance(started[2].make().judge, ChatJudge)
    PairwiseRewardManager(verl_config({"model": str(reward_model_path)}, None), tokenizer)
    assert started[3].make().judge is None, "no reward model served: the head alone"


@pytest.mark.parametrize(
    ("settings", "address", "path", "says"),
    [
        ({"model": "m"}, "h:1", "x", "judge_fraction"),
        ({"model": "m", "judge_fraction": 0.1}, None, "x", "reward_model.enable"),
        ({"model": "m", "judge_fraction": 0.1}, "h:1", None, "custom_reward_function.path"),
        ({"model": "m", "judge_fraction": 0.1, "judge_kind": "x"}, "h:1", "x", "judge_kind"),
        ({"model": "m", "timeout_s": 3.0}, None, "x", r"\['timeout_s'\] beside model"),
        ({"url": "http://127.0.0.1:1", "num_gpus": 1}, None, "x", r"\['num_gpus'\] beside url"),
    ],
)
def test_settings_of_the_actor_that_do_not_fit_are_refused(started, settings, address, path, says, tokenizer):
    with pytest.raises(InputError, match=says):
        PairwiseRewardManager(verl_config(settings, path), tokenizer, reward_router_address=address)


def test_a_router_that_is_not_asked_is_said(tokenizer, caplog):
    PairwiseRewardManager(verl_config({"url": "http://127.0.0.1:8400"}), tokenizer, reward_router_address="h:1")
    assert "is not asked" in caplog.text


def test_several_servers_are_taken_as_a_list_or_with_commas(tokenizer):
    urls = ["http://127.0.0.1:8400", "http://127.0.0.1:8401"]
    for given in (urls, ",".join(urls)):
        manager = PairwiseRewardManager(config(rmcore={"url": given}), tokenizer)
        assert manager.client.urls == tuple(urls)
