"""The group server on Ray Serve: which deployments there are, and what may change while they serve.

    Serve's proxies  →  entries  →  assemblers  →  replicas of the model
    one a node          any number   a fixed number   scaled as there is work

Serve does what it is there for: proxies, restarts, health, scaling, draining, versions. What is ours: an entry sends a
request to the assembler that the group's key names, an assembler is the application of ``rmcore serve``, and it sends
whole batches to replicas, of which any will do.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmcore._base.errors import RmcoreError, reject
from rmcore._base.loop import cancelled_here
from rmcore._base.numbers import COUNT, Within, check_numbers
from rmcore._base.prompt import Prompt, Response
from rmcore.engine.engine import RewardEngine
from rmcore.engine.groups import GroupScores
from rmcore.integrations.ray.cluster import ray_module
from rmcore.integrations.ray.serve.assembler import Assembler, RawReply, RawRequest
from rmcore.integrations.ray.serve.copies import Aged
from rmcore.integrations.ray.serve.entry import Entry
from rmcore.integrations.ray.serve.replica import RemoteEngine, Replica
from rmcore.integrations.server.settings import ServeSettings

__all__ = ["GroupServer", "ServeScale"]

log = logging.getLogger(__name__)

_ERROR = re.compile(r"[\w.]*(?:Error|Exception)\b.*: ")
_MANY = 1_000_000
"""Requests that an entry or an assembler may have under way: it has limits of its own."""
_PROXY = "SERVE_PROXY_ACTOR"
_PING_S = 1.0
_WAIT_LOOP_S = 0.5
_HEALTH_S = 5.0


@dataclass(frozen=True)
class ServeScale:
    """How many processes of each kind, and what they take.

    Attributes:
        replicas: of the model, at least.
        max_replicas: at most, as there is work; None for always ``replicas``.
        batches: under way or waiting a replica, at which another one is started.
        upscale_delay_s: for so long there must be as many before one is started.
        downscale_delay_s: for so long there must be fewer before one goes.
        assemblers: processes that put groups together. Fixed while the server runs. Each has the copies of its scored
            groups at the next two, so of three any two may die at once.
        entries: processes that let requests in.
        num_cpus, num_gpus: of a replica.
        overhead_cpus: of an assembler, and of an entry; above 0 keeps them off a head node that has no CPUs.
    """

    replicas: int = 1
    max_replicas: int | None = None
    batches: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    assemblers: int = 3
    entries: int = 2
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    overhead_cpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("replicas", "assemblers", "entries"):
            check_numbers(self, COUNT, name, expected="at least 1")
        check_numbers(self, COUNT, "max_replicas")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            reject("max_replicas", self.max_replicas, f"at least replicas = {self.replicas}, or None")
        check_numbers(self, Within(above=0), "batches", expected="a finite number above 0")
        for name in ("num_cpus", "num_gpus", "overhead_cpus", "upscale_delay_s", "downscale_delay_s"):
            check_numbers(self, Within(least=0), name, expected="at least 0")

    @property
    def most(self) -> int:
        """Replicas at most."""
        return self.max_replicas or self.replicas


class GroupServer:
    """A group server on a Ray cluster that this process is connected to.

    Args:
        make: makes a replica's engine; pickled, so a function of a module or ``functools.partial`` of one.
        settings: as of ``rmcore serve``.
        scale: how many processes.
        model: a name for ``/health``.
        journal: folder of a learner's journal, where every node sees it: :meth:`publish` serves its versions.
        principle: of the judge, where that is a GenRM with one.
        takes_principles: whether the judge takes a principle with a pair (:func:`rmcore.judge.base.takes_principles`).
        name: of the Serve application.

    Raises MissingPackageError without ray.
    """

    def __init__(
        self,
        make: Callable[[], RewardEngine],
        settings: ServeSettings | None = None,
        scale: ServeScale | None = None,
        *,
        model: str = "",
        journal: Path | None = None,
        principle: str = "",
        takes_principles: bool = False,
        name: str = "rmcore",
    ) -> None:
        self.serve = ray_module("ray.serve")
        self.settings, self.scale_now = settings or ServeSettings(), scale or ServeScale()
        if self.settings.peers:
            reject("peers", "some", "none: any entry leads to the same assemblers")
        if not self.settings.port:
            reject("port", 0, "one that every node has free")
        self.name = name
        self._make, self._model, self._journal = make, model, journal
        self._judge = {"principle": principle, "takes_principles": takes_principles}
        self._version: int | None = None
        self._started = False
        self._deploying = threading.Lock()
        # Serve starts processes of another code version anew. Here a version is this object, so that what changes
        # later (a head's version, the number of replicas) is taken over by those that run.
        self._code = uuid.uuid4().hex

    def start(self) -> str:
        """Start everything, and return the URL when all is ready.

        Raises RmcoreError where a process cannot start: a model that is not there, no GPU.
        """
        if self.name in self.serve.status().applications:
            reject("name", repr(self.name), "one that no application on this cluster has", "Or end that one first")
        settings = self.settings
        options = {"host": settings.host, "port": settings.port, "keep_alive_timeout_s": 120}
        self.serve.start(proxy_location="EveryNode", http_options=options)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # or every change is told here, too
        with self._deploying:
            self._deploy(wait=True)
            self._started = True
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return f"http://{host}:{settings.port}"

    def publish(self, version: int) -> None:
        """Have all replicas serve a version of the journal's head, those that start later, too.

        They change one after the other, soon after this returns; every batch is scored by one version, which its
        answers name. Before :meth:`start` it is what they start with. Raises InputError without a journal.
        """
        if self._journal is None:
            reject("version", version, "none, since there is no journal")
        with self._deploying:
            before, self._version = self._version, version
            try:
                if self._started:
                    self._deploy()
            except BaseException:
                self._version = before
                raise

    def scale(self, replicas: int, max_replicas: int | None = None) -> None:
        """Change the number of replicas, soon after this returns; those that go finish what they have."""
        with self._deploying:
            self.scale_now = replace(self.scale_now, replicas=replicas, max_replicas=max_replicas)
            self._deploy()

    def drain(self) -> None:
        """Take no new groups; return when all accepted ones are answered."""
        handles = [self.serve.get_deployment_handle(name, self.name) for name in self._assembler_names()]
        for response in [handle.drain.remote() for handle in handles]:
            response.result()

    def stop(self) -> None:
        """End the application; what else Serve runs goes on."""
        self.serve.delete(self.name)

    # -- deployments -------------------------------------------------------------------------------------------------

    def _deploy(self, *, wait: bool = False) -> None:
        target = self.serve.RunTarget(self.application(), name=self.name, route_prefix="/")
        try:
            self.serve.run_many([target], wait_for_applications_running=wait)
        except RuntimeError as error:
            raise RmcoreError(f"Ray Serve could not start {self.name!r}: {self._why() or error}") from error

    def _why(self) -> str:
        """What a process that could not start said last; Serve hands on its whole trace."""
        found = self.serve.status().applications.get(self.name)
        for deployment in found.deployments.values() if found is not None else ():
            lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
            if "failed to start" in deployment.message and lines:
                return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])
        return ""

    def application(self) -> Any:
        """The application as Serve takes it, with the present version and scale."""
        settings = self.settings
        replicas = self._replicas()
        # Those that only wait for their judge are under way, too.
        own = replace(settings, batches_in_flight=settings.batches_in_flight * self.scale_now.most)
        make = functools.partial(_remote_engine, ask_again_s=settings.answer_within_s, **self._judge)
        assemblers = {
            name: self._deployment(
                _Assembler,
                name,
                ray_actor_options={"num_cpus": self.scale_now.overhead_cpus},
                max_ongoing_requests=_MANY,
                graceful_shutdown_timeout_s=settings.answer_within_s,
            ).bind(replicas, make, own, self._model, name, self._assembler_names(), self.name)
            for name in self._assembler_names()
        }
        entry = self._deployment(
            _Entry,
            "Entry",
            num_replicas=self.scale_now.entries,
            ray_actor_options={"num_cpus": self.scale_now.overhead_cpus},
            max_ongoing_requests=_MANY,
            graceful_shutdown_timeout_s=settings.answer_within_s,
        )
        return entry.bind(list(assemblers), list(assemblers.values()), settings)

    def _replicas(self) -> Any:
        scale = self.scale_now
        options: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
            "max_ongoing_requests": self.settings.batches_in_flight,
            "graceful_shutdown_timeout_s": self.settings.answer_within_s,
            "user_config": {"head_version": self._version},
        }
        if scale.max_replicas is None:
            options["num_replicas"] = scale.replicas
        else:
            options["autoscaling_config"] = {
                "min_replicas": scale.replicas,
                "max_replicas": scale.max_replicas,
                "target_ongoing_requests": scale.batches,
                "upscale_delay_s": scale.upscale_delay_s,
                "downscale_delay_s": scale.downscale_delay_s,
            }
        return self._deployment(Replica, "Replica", **options).bind(
            self._make, self._journal, self.settings.reliability_tau
        )

    def _deployment(self, of: type, name: str, **options: Any) -> Any:
        health = {"health_check_period_s": _HEALTH_S, "graceful_shutdown_wait_loop_s": _WAIT_LOOP_S}
        made = self.serve.deployment(name=name, **health, **options)(of)
        # There is no public way to say that the code is the same but for files that the dashboard deploys.
        return made.options(version=self._code, _internal=True)

    def _assembler_names(self) -> list[str]:
        return [f"Assembler{number}" for number in range(self.scale_now.assemblers)]


# -- what runs on the cluster ----------------------------------------------------------------------------------------


class _Assembler(Assembler):
    def __init__(
        self,
        replicas: Any,
        make: Callable[..., RemoteEngine],
        settings: ServeSettings,
        model: str,
        name: str,
        names: Sequence[str],
        application: str,
    ) -> None:
        others = {other: _Other(other, application) for other in names}
        super().__init__(functools.partial(make, replicas), settings, model, name=name, assemblers=others)


class _Other:
    """An assembler, for another one: by its name, since of two only one could be bound to the other."""

    def __init__(self, name: str, application: str) -> None:
        self._name, self._application = name, application
        self._handle: Any = None

    async def hold(self, origin: str, copies: Sequence[Aged], reached: Mapping[str, Sequence[int]]) -> None:
        await _answer((await self._found()).hold.remote(origin, copies, reached))

    async def held(self, asker: str) -> list[Aged]:
        copies: list[Aged] = await _answer((await self._found()).held.remote(asker))
        return copies

    async def _found(self) -> Any:
        if self._handle is None:
            find = ray_module("ray.serve").get_deployment_handle
            self._handle = await asyncio.to_thread(find, self._name, self._application)
        return self._handle


class _Entry(Entry):
    def __init__(self, names: Sequence[str], handles: Sequence[Any], settings: ServeSettings) -> None:
        assemblers = dict(zip(names, map(_Called, handles), strict=True))
        super().__init__(assemblers, _lost(), settings, callers=_Proxies())


class _Proxies:
    """Serve's proxies, by what Ray's names say: whether all of them answer. Where none has such a name, they do."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._looking: asyncio.Future[list[Any]] | None = None

    async def __call__(self) -> bool:
        try:
            async with asyncio.timeout(_PING_S):
                handles = await self._looked()
                await asyncio.gather(*(handle.check_health.remote() for handle in handles))
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and cancelled_here():
                raise
            log.info("a proxy does not answer: %s", type(error).__name__)
            return False
        return True

    async def _looked(self) -> list[Any]:
        # No time limit ends a thread, so there is one at a time: while Ray does not answer, every beat would add one.
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(asyncio.to_thread(self._found))
            self._looking.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._looking)

    def _found(self) -> list[Any]:
        ray = ray_module()
        named = ray_module("ray.util").list_named_actors(all_namespaces=True)
        names = {one["name"] for one in named if one["namespace"] == "serve" and _PROXY in one["name"]}
        self._handles = {
            name: self._handles.get(name) or ray.get_actor(name, namespace="serve") for name in sorted(names)
        }
        return list(self._handles.values())


class _Called:
    """An assembler, by its handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def request(self, entry: str, request: RawRequest, resent: bool = False, knew: str = "") -> RawReply:
        reply: RawReply = await _answer(self._handle.request.remote(entry, request, resent, knew))
        return reply

    async def beat(self, entry: str, vouched: bool = True, knew: str = "") -> str:
        life: str = await _answer(self._handle.beat.remote(entry, vouched, knew))
        return life

    async def metrics(self) -> str:
        page: str = await _answer(self._handle.metrics.remote())
        return page

    async def ready(self) -> bool:
        found: bool = await _answer(self._handle.ready.remote())
        return found


async def _answer(response: Any) -> Any:
    """Of a call by handle. What is cancelled over there, or on its way, was lost: only what is cancelled here ends."""
    try:
        return await response
    except asyncio.CancelledError:
        if cancelled_here():
            with contextlib.suppress(Exception):  # it may never have been taken to anybody
                response.cancel()
            raise
        raise ray_module("ray.exceptions").TaskCancelledError from None


def _remote_engine(replicas: Any, *, ask_again_s: float, **judge: Any) -> RemoteEngine:
    async def call(
        prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]], *principles: Sequence[str]
    ) -> GroupScores:
        scores: GroupScores = await _answer(replicas.score.remote(prompts, responses, *principles))
        return scores

    return RemoteEngine(call, _lost(), ask_again_s=ask_again_s, **judge)


def _lost() -> tuple[type[Exception], ...]:
    """What Ray raises where the other process has died, cannot be reached or lets go: never what that one raised."""
    errors = ray_module("ray.exceptions")
    return (errors.RayActorError, errors.TaskCancelledError)
