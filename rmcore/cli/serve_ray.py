"""``rmcore serve --ray``: the group server on a Ray cluster, as long as this command runs."""

from __future__ import annotations

import dataclasses
import functools
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmcore._base.errors import reject
from rmcore.cli.build_engine import check_key, check_routing
from rmcore.cli.console import notes
from rmcore.cli.judge_options import reject_unused
from rmcore.cli.numbers import number
from rmcore.cli.on_ray import asks_a_judge, batch_routing, check_settings, engine_of, ray_errors, shared_judge, tell
from rmcore.cli.options import Judging

if TYPE_CHECKING:
    from rmcore.integrations.ray.serve import GroupServer, ServeScale
    from rmcore.integrations.server import ServeSettings

__all__ = ["ServingOnRay", "serve_on_ray"]

_REPLICAS = re.compile(r"([1-9][0-9]*)(?::([1-9][0-9]*))?")


@dataclass(frozen=True)
class ServingOnRay:
    """The options of ``rmcore serve`` on a cluster."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Serve on a Ray cluster: auto joins the one of this machine, local starts one of it alone.",
        ),
    ] = None
    ray_replicas: Annotated[
        str, typer.Option(metavar="N|MIN:MAX", help="With --ray: models loaded; MIN:MAX as there is work.")
    ] = "1"
    ray_assemblers: Annotated[
        int,
        number(
            help="With --ray: processes in which groups come together, fixed while it serves. Of three any two may die "
            "at once.",
            least=1,
        ),
    ] = 3
    ray_entries: Annotated[int, number(help="With --ray: processes that let requests in.", least=1)] = 2
    ray_gpus: Annotated[float, number(help="With --ray: GPUs of a replica; 0.5 puts two on one.", least=0)] = 0.0
    ray_cpus: Annotated[float, number(help="With --ray: CPUs of a replica.", least=0)] = 1.0

    def check(self) -> None:
        """Raise InputError for options that mean nothing without --ray."""
        if self.ray is not None:
            return
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                name = "--" + field.name.replace("_", "-")
                reject(name, f"{getattr(self, field.name)} without --ray", "together with it")

    def scale(self) -> ServeScale:
        """How many processes that is."""
        from rmcore.integrations.ray.serve import ServeScale

        found = _REPLICAS.fullmatch(self.ray_replicas)
        if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
            reject("--ray-replicas", repr(self.ray_replicas), "a number, or MIN:MAX, as in 1:8")
        return ServeScale(
            replicas=int(found[1]),
            max_replicas=None if found[2] is None else int(found[2]),
            assemblers=self.ray_assemblers,
            entries=self.ray_entries,
            num_cpus=self.ray_cpus,
            num_gpus=self.ray_gpus,
        )


def serve_on_ray(
    on_ray: ServingOnRay,
    model: str,
    judging: Judging,
    engine: Mapping[str, Any],
    settings: ServeSettings,
    journal: Path | None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was accepted, and end. A second signal ends it at once."""
    from rmcore.engine.learning.follow import following
    from rmcore.integrations.ray.cluster import connect
    from rmcore.integrations.ray.serve import GroupServer
    from rmcore.model.hub import folder_of

    assert on_ray.ray is not None
    scale, own, asks = on_ray.scale(), batch_routing(judging), asks_a_judge(judging)
    if settings.peers:
        reject("--peers", "given with --ray", "one of the two: any entry leads to the same assemblers")
    if settings.port == 0:
        reject("--port", "0 with --ray", "one that is free on every node")
    check_routing(own, asks)
    if judging.judge_url is None:
        reject_unused(judging)
    check_key(judging)
    folder_of(model, expected="a folder with rmcore.json, or a hub name")
    check_settings(model, engine)
    source = str(Path(model).resolve()) if Path(model).exists() else model
    with ExitStack() as stack:
        stack.enter_context(connect(on_ray.ray))
        stop = stack.enter_context(_signals())
        judge = shared_judge(judging, None) if asks else None
        if judge is not None:
            stack.callback(tell, judge)
        server = GroupServer(
            functools.partial(engine_of, source, own, dict(engine), judge),
            settings,
            scale,
            model=Path(model).name,
            journal=None if journal is None else journal.resolve(),
            principle=judging.judge_principle,
            takes_principles=judging.judge_url is not None,
        )
        if journal is not None:
            stack.enter_context(following(journal, server.publish))
        stack.callback(server.stop)
        with ray_errors():
            url = server.start()
        notes.print(f"serving {url}")
        stop.first.wait()
        _drain(server, stop)


@dataclass(frozen=True)
class _Stop:
    first: threading.Event = dataclasses.field(default_factory=threading.Event)
    second: threading.Event = dataclasses.field(default_factory=threading.Event)


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Events of the first and second SIGTERM or SIGINT; Ray's own handler would end the process at the first."""
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        (stop.second if stop.first.is_set() else stop.first).set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drain(server: GroupServer, stop: _Stop) -> None:
    draining = threading.Thread(target=server.drain, name="rmcore drain", daemon=True)
    draining.start()
    while draining.is_alive() and not stop.second.is_set():
        draining.join(0.1)
