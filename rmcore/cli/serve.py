"""``rmcore serve``: the command line of the group server."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rmcore._base.errors import reject
from rmcore.cli import options
from rmcore.cli.build_engine import close_engine, make_engine
from rmcore.cli.console import notes, reported_errors
from rmcore.cli.serve_ray import ServingOnRay, serve_on_ray

__all__ = ["serve"]

_TOKEN_VARIABLE = "RMCORE_SERVE_TOKEN"  # noqa: S105 - a name, no secret
_JUDGE_S = 40.0
"""Left to the judge: with the time limit of a group, within the 180 s after which OpenRLHF gives up."""


@dataclass(frozen=True)
class ServeJudging(options.Judging):
    """The options of every command that may ask a judge, with a deadline: a client waits for the answer."""

    judge_deadline: options.JudgeDeadline = _JUDGE_S


@options.with_options
def serve(
    *,
    model: options.Model,
    host: Annotated[str, typer.Option(help="Where to listen; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8400,
    token_env: Annotated[
        str, typer.Option(help="Environment variable with the bearer token clients must send, if it is set.")
    ] = _TOKEN_VARIABLE,
    group_size: Annotated[
        int | None, typer.Option(help="K of OpenRLHF's groups (n_samples_per_prompt); needed for its single calls.")
    ] = None,
    baseline: Annotated[
        Literal["leave-one-out", "group-mean"],
        typer.Option(help="What OpenRLHF's rewards are for: leave-one-out (rloo) or group-mean (dr_grpo)."),
    ] = "leave-one-out",
    reliability_tau: Annotated[
        float | None,
        typer.Option(
            help="OpenRLHF's rewards give back advantages times 1/(1 + variance/τ): those the head leaves open "
            "count less. Difference mode."
        ),
    ] = None,
    prompt_prefix: Annotated[str, typer.Option(help="Taken off OpenRLHF's prompts: the chat template's start.")] = "",
    prompt_suffix: Annotated[str, typer.Option(help="Taken off OpenRLHF's prompts: the chat template's end.")] = "",
    end_token: Annotated[
        list[str] | None, typer.Option(help="Special token at the end of OpenRLHF's responses, besides common ones.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds a group waits for its members.")] = 120.0,
    drain: Annotated[float, typer.Option(help="After SIGTERM: seconds open groups may wait for members.")] = 20.0,
    batch: Annotated[int, typer.Option(help="Groups scored together at most.")] = 64,
    batch_wait: Annotated[float, typer.Option(help="Seconds an idle server waits for company.")] = 0.004,
    max_queue: Annotated[int, typer.Option(help="Groups that may wait for a batch.")] = 1024,
    max_members: Annotated[int, typer.Option(help="Single responses that may wait for their siblings.")] = 8192,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = 16 * 2**20,
    max_responses: Annotated[int, typer.Option(help="Responses in a group.")] = 64,
    max_chars: Annotated[int, typer.Option(help="Characters of a prompt or a response.")] = 200_000,
    nemo_gym: Annotated[
        bool,
        typer.Option(
            "--nemo-gym", help="Also speak NeMo-Gym's genrm_compare: /compare, /verify in cohorts of --group-size."
        ),
    ] = False,
    nemo_gym_bonus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="With --nemo-gym: what short and plain responses get, by the names of genrm_compare's configuration, "
            "as in answer_bonus=0.1.",
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="URLs of all servers that share a trainer's members, this one's too, separated by commas. A group is "
            "put together at one of them, whichever its members come to. The same list and token at each."
        ),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="Which URL of --peers this server is. [default: http://HOST:PORT]")
    ] = None,
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
        from rmcore.integrations.server.gym_bonuses import bonuses_of
        from rmcore.integrations.server.settings import END_TOKENS, ServeSettings

        on_ray.check()
        if journal is not None and not journal.is_dir():
            reject("--journal", repr(str(journal)), "the folder of a learner's journal")
        token = os.environ.get(token_env) if token_env else None
        if token == "":  # set, but empty: somebody's secret did not arrive
            reject(f"the variable {token_env}", "an empty value", "a token, or no such variable")
        settings = ServeSettings(
            host=host,
            port=port,
            token=token,
            group_size=group_size,
            baseline=baseline,
            reliability_tau=reliability_tau,
            prompt_prefix=prompt_prefix,
            prompt_suffix=prompt_suffix,
            end_tokens=(*END_TOKENS, *(end_token or ())),
            time_limit_s=time_limit,
            answer_within_s=time_limit + (_JUDGE_S if judging.judge_deadline is None else judging.judge_deadline) + 10,
            drain_s=drain,
            batch_groups=batch,
            batch_wait_s=batch_wait,
            max_queue=max_queue,
            max_groups=min(256, max_queue),
            max_members=max_members,
            max_body=max_body,
            max_responses=max_responses,
            max_chars=max_chars,
            nemo_gym=nemo_gym,
            gym_bonuses=bonuses_of(nemo_gym_bonus or ()),
            peers=() if peers is None else tuple(url.strip() for url in peers.split(",")),
            advertise=advertise,
        )
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
