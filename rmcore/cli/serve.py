"""``rmcore serve``: the command line of the group server."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from rmcore._base.errors import reject
from rmcore.cli import options
from rmcore.cli.build_engine import close_engine, make_engine
from rmcore.cli.console import notes, reported_errors
from rmcore.cli.numbers import number
from rmcore.cli.serve_options import GymOptions, OpenRLHFOptions, PeerOptions, ServeJudging, ServeLimits, serve_settings
from rmcore.cli.serve_ray import ServingOnRay, serve_on_ray

__all__ = ["serve"]

_TOKEN_VARIABLE = "RMCORE_SERVE_TOKEN"  # noqa: S105 - a name, no secret


@options.with_options
def serve(
    *,
    model: options.Model,
    host: Annotated[str, typer.Option(help="Where to listen; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, number(help="0 takes a free one.", least=0, most=65_535)] = 8400,
    token_env: Annotated[
        str, typer.Option(help="Environment variable with the bearer token clients must send, if it is set.")
    ] = _TOKEN_VARIABLE,
    openrlhf: OpenRLHFOptions,
    limits: ServeLimits,
    gym: GymOptions,
    peering: PeerOptions,
    design: Annotated[
        str, typer.Option(help="Which pairs of a group are compared: all, circular, regular:k, swiss:k.")
    ] = "all",
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a learner's journal, which another process writes: its current version of the head is "
            "served, and each later one, without a restart."
        ),
    ] = None,
    judging: ServeJudging,
    doubting: options.Doubting,
    on_ray: ServingOnRay,
    backend: options.Backend = "auto",
    device: options.Device = None,
    attn_implementation: options.AttnImplementation = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    deterministic: options.Deterministic = None,
    max_length: options.MaxLength = None,
    overlong: options.Overlong = None,
) -> None:
    """Serve rewards of groups over HTTP, for OpenRLHF, verl and others; /docs describes the interface.

    Requests are scored together in batches. SIGTERM answers everything accepted, then ends with status 0. Without
    --threshold, --budget or --judge-fraction no pair goes to a judge. --router-state is written after every batch, so
    budgets hold over restarts and crashes. --ray serves from a cluster, with as many models as there is work for.

    Example: `rmcore serve my-rm --group-size 8 --budget 0.1 --judge-url http://localhost:8000/v1 --judge-model judge
    --judge-key-env ''` (a judge without keys)
    """
    with reported_errors():
        from rmcore.engine.learning.follow import following, served_from
        from rmcore.integrations.server import run

        on_ray.check()
        if journal is not None and not journal.is_dir():
            reject("--journal", repr(str(journal)), "the folder of a learner's journal")
        token = os.environ.get(token_env) if token_env else None
        if token == "":  # set, but empty: somebody's secret did not arrive
            reject(f"the variable {token_env}", "an empty value", "a token, or no such variable")
        settings = serve_settings(host, port, token, openrlhf, limits, gym, peering, judging.judge_deadline)
        if settings.answer_within_s >= 180:
            notes.print(
                f"[yellow]answers may take {settings.answer_within_s:g} s, and OpenRLHF gives up after 180: lower "
                "--time-limit or --judge-deadline if it calls this server[/yellow]"
            )
        loading: dict[str, Any] = {
            "backend": backend,
            "device": device,
            "attn_implementation": attn_implementation,
            "trust_remote_code": trust_remote_code,
            "deterministic": deterministic,
            "max_length": max_length,
            "overlong": overlong,
            "doubting": doubting,
            "design": design,
        }
        if on_ray.ray is not None:
            serve_on_ray(on_ray, model, judging, loading, settings, journal)
            return
        engine, save_router = make_engine(model, judging, **loading)
        try:
            with nullcontext() if journal is None else following(journal, served_from(journal, engine)):
                run(
                    engine,
                    settings,
                    model=Path(model).name,
                    started=lambda url: notes.print(f"serving {url}"),
                    save_state=None if judging.router_state is None else save_router,
                )
        finally:
            try:
                save_router()
            finally:
                close_engine(engine)
