"""What a server is told: where it listens, whom it lets in, how much it takes, how long it waits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal, get_args

from rmcore._base.errors import InputError, JudgeError, reject
from rmcore._base.http import check_base_url
from rmcore._base.numbers import COUNT, Within, check_numbers
from rmcore.engine.advantage import check_tau
from rmcore.integrations.server.gym_bonuses import GymBonuses

__all__ = ["END_TOKENS", "Baseline", "ServeSettings", "is_loopback"]

Baseline = Literal["leave-one-out", "group-mean"]

END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|eot|>",
    "<|eom|>",
    "<|eom_id|>",
    "<|END_OF_TURN_TOKEN|>",
    "[|endofturn|]",
    "<seed:eos>",
    "[e~[",
    "<eod>",
    "<end_of_turn>",
    "<turn|>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<pad>",
    "[EOS]",
    "[PAD]",
)
"""What common policies end a response with, as decoding with special tokens shows it."""


@dataclass(frozen=True)
class ServeSettings:
    """Settings of :func:`rmcore.integrations.server.create_app` and :func:`rmcore.integrations.server.run`.

    Attributes:
        host, port: where to listen; port 0 takes a free one. Other hosts than loopback need a token.
        token: what clients must send as ``Authorization: Bearer``; None lets everybody in who can reach the port.
        group_size: K of the groups behind ``/get_reward``, OpenRLHF's n_samples_per_prompt. None: its lists are grouped
            by equal prompts, and single responses are refused.
        baseline: what ``/get_reward``'s rewards are for: ``leave-one-out`` for OpenRLHF's ``rloo``, ``group-mean`` for
            its ``dr_grpo``.
        reliability_tau: ``/get_reward``'s rewards give back advantages weighted by 1/(1 + variance/τ), less their
            group's mean (:meth:`~rmcore.engine.group_score.GroupScore.rewards_for`). None: unweighted. The other routes
            have ``advantage_variance`` in their replies, for their clients to weigh by.
        end_tokens: taken off the end of a response in ``query``, and off its start before the prompt.
        prompt_prefix, prompt_suffix: of the policy's chat template; taken off the prompts of ``/get_reward``.
        time_limit_s: from the first member of a group to its scoring, whoever is missing by then.
        answer_within_s: a call of ``/get_reward`` that takes longer is answered 503, before OpenRLHF gives up at 180 s.
            On Ray also how long a batch may be without an answer before a further replica is asked for it too.
        first_start: no server was here before this one. Otherwise one may have answered members of groups that open in
            this one's first ``time_limit_s``: they are scored whole, or refused
            (:mod:`rmcore.integrations.server.doubts`).
        keep_s: how long results are remembered for callers that ask again.
        drain_s: after SIGTERM, how long open groups may wait for missing members.
        read_s: how long a request's head may take to arrive, and then its body.
        max_body: bytes of a request's body.
        max_groups: groups in a request.
        max_responses: responses in a group.
        max_chars: characters of a prompt or a response.
        max_members: members that may wait for their groups.
        max_queue: groups that may wait for a batch.
        batch_groups, batch_wait_s, batches_in_flight: as in :class:`~rmcore.integrations.server.batching.BatchScorer`.
        replay_bytes: memory for answers that are kept for ``Idempotency-Key``.
        nemo_gym: also speak NeMo-Gym's ``genrm_compare`` (:mod:`rmcore.integrations.server.nemo_gym`); ``group_size``
            is its ``num_rollouts_per_prompt``.
        gym_bonuses: what its rewards get for short and plain responses.
        peers: addresses of all servers that share a trainer's members, this one's included; a group is put together at
            one of them (:mod:`rmcore.integrations.server.peers`). The same list, and the same token, at each.
        advertise: which of ``peers`` this server is; None: ``http://host:port``.
        hosts: names by which a server without a token may be called, besides ``host``; others are refused, since a web
            page can make a browser call any name.
    """

    host: str = "127.0.0.1"
    port: int = 8400
    token: str | None = field(default=None, repr=False)
    group_size: int | None = None
    baseline: Baseline = "leave-one-out"
    reliability_tau: float | None = None
    end_tokens: tuple[str, ...] = END_TOKENS
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    time_limit_s: float = 120.0
    answer_within_s: float = 170.0
    first_start: bool = False
    keep_s: float = 600.0
    drain_s: float = 20.0
    read_s: float = 60.0
    max_body: int = 16 * 2**20
    max_groups: int = 256
    max_responses: int = 64
    max_chars: int = 200_000
    max_members: int = 8192
    max_queue: int = 1024
    batch_groups: int = 64
    batch_wait_s: float = 0.004
    batches_in_flight: int = 4
    replay_bytes: int = 128 * 2**20
    nemo_gym: bool = False
    gym_bonuses: GymBonuses = field(default_factory=GymBonuses)
    peers: tuple[str, ...] = ()
    advertise: str | None = None
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")

    def __post_init__(self) -> None:
        check_numbers(self, Within(whole=True, least=0, most=65_535), "port", expected="0 to 65535")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            reject("token", "other characters", "printable ASCII without spaces")
        if self.token == "":
            reject("token", "an empty one", "characters, or None")
        if self.token is None and not is_loopback(self.host):
            reject("host", repr(self.host), "a loopback address, since there is no token")
        if self.baseline not in get_args(Baseline):
            reject("baseline", repr(self.baseline), "'leave-one-out' or 'group-mean'")
        if self.reliability_tau is not None:
            check_tau(self.reliability_tau, "reliability_tau")
        check_numbers(self, COUNT, "group_size")
        if self.group_size is not None and not 2 <= self.group_size <= self.max_responses:
            reject("group_size", self.group_size, f"2 to max_responses = {self.max_responses}, or None")
        if "" in self.end_tokens:
            reject("end_tokens", "an empty string", "tokens")
        if self.gym_bonuses and not self.nemo_gym:
            reject("gym_bonuses", "some", "none without nemo_gym")
        for name in ("time_limit_s", "answer_within_s", "read_s"):
            check_numbers(self, Within(above=0), name, expected="seconds above 0")
        for name in ("keep_s", "drain_s", "batch_wait_s"):
            check_numbers(self, Within(least=0), name, expected="seconds, at least 0")
        if self.time_limit_s >= self.answer_within_s:
            reject("time_limit_s", self.time_limit_s, f"below answer_within_s = {self.answer_within_s:g}")
        limits = ("max_body", "max_groups", "max_responses", "max_chars", "max_members", "max_queue")
        for name in (*limits, "batch_groups", "batches_in_flight", "replay_bytes"):
            check_numbers(self, COUNT, name, expected="at least 1")
        if self.max_groups > self.max_queue:
            reject("max_groups", self.max_groups, f"at most max_queue = {self.max_queue}, or it could never be taken")
        self._check_peers()

    @property
    def own_address(self) -> str:
        """What the other servers call this one."""
        if self.advertise is not None:
            return self.advertise.rstrip("/")
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def _check_peers(self) -> None:
        if not self.peers:
            if self.advertise is not None:
                reject("advertise", repr(self.advertise), "None, since there are no peers")
            return
        urls = [_address(url) for url in self.peers]
        if len(set(urls)) != len(urls):
            reject("peers", f"{len(urls)} addresses, some of them equal", "different ones")
        if self.own_address not in urls:
            reject("peers", f"none that is this server's, {self.own_address}", "it among them", "Set advertise")


def _address(url: str) -> str:
    try:
        return check_base_url(url)[0]
    except JudgeError as error:
        raise InputError(str(error).replace("base_url", "peers", 1)) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
