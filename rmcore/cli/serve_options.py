"""The options of ``rmcore serve`` in groups, and the server's settings that they come to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmcore._base.errors import InputError
from rmcore.cli import options
from rmcore.cli.numbers import number

if TYPE_CHECKING:
    from rmcore.integrations.server.settings import ServeSettings

__all__ = ["GymOptions", "OpenRLHFOptions", "PeerOptions", "ServeJudging", "ServeLimits", "serve_settings"]

_JUDGE_S = 40.0
"""Left to the judge: with the time limit of a group, within the 180 s after which OpenRLHF gives up."""
_OPTIONS = {
    "group_size": "--group-size",
    "max_responses": "--max-responses",
    "gym_bonuses": "--nemo-gym-bonus",
    "nemo_gym": "--nemo-gym",
    "peers": "--peers",
    "advertise": "--advertise",
    "host": "--host",
    "end_tokens": "--end-token",
    "time_limit_s": "--time-limit",
}
"""Settings that others may not go with, by name, and the options that they come from."""
_SETTING = re.compile(rf"(?<![\w-])(?:{'|'.join(_OPTIONS)})(?=:| =)|(?<=without )nemo_gym|(?<=Set )advertise")


@dataclass(frozen=True)
class ServeJudging(options.Judging):
    """The options of every command that may ask a judge, with a deadline: a client waits for the answer."""

    judge_deadline: options.JudgeDeadline = _JUDGE_S


@dataclass(frozen=True)
class OpenRLHFOptions:
    """What OpenRLHF's calls do not say."""

    group_size: Annotated[
        int | None, number(help="K of OpenRLHF's groups (n_samples_per_prompt); needed for its single calls.", least=2)
    ] = None
    baseline: Annotated[
        Literal["leave-one-out", "group-mean"],
        typer.Option(help="What OpenRLHF's rewards are for: leave-one-out (rloo) or group-mean (dr_grpo)."),
    ] = "leave-one-out"
    reliability_tau: Annotated[
        float | None,
        number(
            help="OpenRLHF's rewards give back advantages times 1/(1 + variance/τ): those the head leaves open "
            "count less. Difference mode.",
            above=0,
        ),
    ] = None
    prompt_prefix: Annotated[str, typer.Option(help="Taken off OpenRLHF's prompts: the chat template's start.")] = ""
    prompt_suffix: Annotated[str, typer.Option(help="Taken off OpenRLHF's prompts: the chat template's end.")] = ""
    end_token: Annotated[
        list[str] | None, typer.Option(help="Special token at the end of OpenRLHF's responses, besides common ones.")
    ] = None


@dataclass(frozen=True)
class ServeLimits:
    """Times, places and sizes."""

    time_limit: Annotated[float, number(help="Seconds a group waits for its members.", above=0)] = 120.0
    first_start: Annotated[
        bool,
        typer.Option(
            "--first-start",
            help="No server was here before: in its first --time-limit, too, groups are scored without members that do "
            "not come. Otherwise those are refused, since a server that was killed may have answered some of them.",
        ),
    ] = False
    drain: Annotated[float, number(help="After SIGTERM: seconds open groups may wait for members.", least=0)] = 20.0
    batch: Annotated[int, number(help="Groups scored together at most.", least=1)] = 64
    batch_wait: Annotated[float, number(help="Seconds an idle server waits for company.", least=0)] = 0.004
    max_queue: Annotated[int, number(help="Groups that may wait for a batch.", least=1)] = 1024
    max_members: Annotated[int, number(help="Single responses that may wait for their siblings.", least=1)] = 8192
    max_body: Annotated[int, number(help="Bytes of a request.", least=1)] = 16 * 2**20
    max_responses: Annotated[int, number(help="Responses in a group.", least=1)] = 64
    max_chars: Annotated[int, number(help="Characters of a prompt or a response.", least=1)] = 200_000


@dataclass(frozen=True)
class GymOptions:
    """NeMo-Gym's interface, and its bonuses."""

    nemo_gym: Annotated[
        bool,
        typer.Option(
            "--nemo-gym", help="Also speak NeMo-Gym's genrm_compare: /compare, /verify in cohorts of --group-size."
        ),
    ] = False
    nemo_gym_bonus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="With --nemo-gym: what short and plain responses get, by the names of genrm_compare's configuration, "
            "as in answer_bonus=0.1.",
        ),
    ] = None


@dataclass(frozen=True)
class PeerOptions:
    """The servers that share a trainer's members."""

    peers: Annotated[
        str | None,
        typer.Option(
            help="URLs of all servers that share a trainer's members, this one's too, separated by commas. A group is "
            "put together at one of them, whichever its members come to. The same list and token at each."
        ),
    ] = None
    advertise: Annotated[
        str | None, typer.Option(help="Which URL of --peers this server is. [default: http://HOST:PORT]")
    ] = None


def serve_settings(
    host: str,
    port: int,
    token: str | None,
    openrlhf: OpenRLHFOptions,
    limits: ServeLimits,
    gym: GymOptions,
    peering: PeerOptions,
    judge_deadline: float | None,
) -> ServeSettings:
    """The settings; raises InputError for those that cannot be, by their options' names."""
    from rmcore.integrations.server.gym_bonuses import bonuses_of
    from rmcore.integrations.server.settings import END_TOKENS, ServeSettings

    with _told_by_option():
        return ServeSettings(
            host=host,
            port=port,
            token=token,
            group_size=openrlhf.group_size,
            baseline=openrlhf.baseline,
            reliability_tau=openrlhf.reliability_tau,
            prompt_prefix=openrlhf.prompt_prefix,
            prompt_suffix=openrlhf.prompt_suffix,
            end_tokens=(*END_TOKENS, *(openrlhf.end_token or ())),
            time_limit_s=limits.time_limit,
            first_start=limits.first_start,
            answer_within_s=limits.time_limit + (_JUDGE_S if judge_deadline is None else judge_deadline) + 10,
            drain_s=limits.drain,
            batch_groups=limits.batch,
            batch_wait_s=limits.batch_wait,
            max_queue=limits.max_queue,
            max_groups=min(256, limits.max_queue),
            max_members=limits.max_members,
            max_body=limits.max_body,
            max_responses=limits.max_responses,
            max_chars=limits.max_chars,
            nemo_gym=gym.nemo_gym,
            gym_bonuses=bonuses_of(gym.nemo_gym_bonus or ()),
            peers=() if peering.peers is None else tuple(url.strip() for url in peering.peers.split(",")),
            advertise=peering.advertise,
        )


@contextmanager
def _told_by_option() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(_SETTING.sub(lambda found: _OPTIONS[found[0]], str(error))) from None
