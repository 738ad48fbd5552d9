"""Hidden states from a server: the body of a model runs in vLLM or SGLang, its head and all behind it here.

vLLM, ``vllm serve MODEL --runner pooling --convert embed``: ``POST /pooling`` with token ids,
``"task": "embed"`` (the state of the last token) or ``"token_embed"`` (of all), ``"use_activation": false`` (without it
states are normalised) and ``"encoding_format": "base64"``. A reply is
``{"object": "list", "data": [{"index": 0, "object": "pooling", "data": "<base64>"}], ...}``.

SGLang, ``python -m sglang.launch_server --model-path MODEL --enable-return-hidden-states``: ``POST /generate`` with
``"input_ids"`` and ``"return_hidden_states": true``; a reply is a list of
``{"text": ..., "meta_info": {"prompt_tokens": n, "hidden_states": [[[...], ...], ...]}}``, the prompt's states first. A
prefix that its cache knows has none, so all tokens' states need ``--disable-radix-cache``; the last one's do not.

Requests are tried again, and wait as long as the server asks, like those to a judge (:mod:`rmcore._base.retry`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import BackendError, InputError, JudgeError, reject
from rmcore._base.http import Connections, check_base_url
from rmcore._base.loop import run_sync
from rmcore._base.retry import RetryPolicy, retry_delay_s, should_retry

if TYPE_CHECKING:
    import httpx

__all__ = ["RemoteModel", "ServerKind"]

ServerKind: TypeAlias = Literal["vllm", "sglang"]

_TEXTS = 8
"""Texts of one request: the server batches by itself, so a request is small enough to be tried again."""
_MAX_REPLY = 1 << 30


class RemoteModel(torch.nn.Module):
    """A body of which only the hidden states are here, as a :class:`~rmcore.model.Backbone` takes it.

    Args:
        url: of the server, without a path: ``http://host:8000``.
        model: the name it serves; None asks ``/v1/models`` and takes the first.
        server: ``vllm`` or ``sglang``.
        api_key_env: environment variable with its key, if it wants one.
        concurrency: requests in flight at most.
        timeout_s: of one request and its whole reply.
        retry: when a request is tried again.
        clock: for waits between tries.
        transport: instead of the network.

    Raises:
        InputError: an argument that makes no sense.
        BackendError: the server does not answer, or with states that cannot be the model's own.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        server: ServerKind = "vllm",
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__()
        if server not in ("vllm", "sglang"):
            reject("server", repr(server), "'vllm' or 'sglang'")
        if concurrency < 1:
            reject("concurrency", concurrency, "at least 1")
        try:
            self.url, loopback = check_base_url(url)
        except JudgeError as error:
            raise InputError(str(error).replace("base_url", "url")) from None
        self.server = server
        self.concurrency = concurrency
        self._api_key_env = api_key_env
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._clock = clock or SystemClock()
        self._connections = Connections(timeout_s=timeout_s, trust_env=not loopback, transport=transport)
        self._place = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # states arrive on the CPU, in float32
        listed = run_sync(self._ask("GET", "/v1/models", None))
        found = [entry for entry in (listed.get("data") or []) if model is None or entry.get("id") == model]
        if not found:
            names = [entry.get("id") for entry in listed.get("data") or []]
            raise BackendError(f"{self.url}: got models {names}, expected {model or 'one'}")
        self.name = str(found[0].get("id"))
        self.config = SimpleNamespace(
            model_type="remote",
            max_position_embeddings=found[0].get("max_model_len"),
            hidden_size=0,
            num_hidden_layers=0,
            pad_token_id=None,
        )
        # Two tokens whose states are not of length 1, unless somebody makes them so.
        probe = self.states([(0, 1), (1, 0)], every=False)
        self.config.hidden_size = int(probe[0].shape[-1])
        norms = torch.stack([state.norm() for state in probe])
        if bool(((norms - 1).abs() < 1e-3).all()):
            raise BackendError(
                f"{self.url}: got states of length 1, expected raw ones. This server normalises them whatever a "
                "request says: use a vLLM that knows use_activation on /pooling, or start it with "
                "--pooler-config '{\"use_activation\": false}'"
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """States (B, T, h) of a right-padded batch (B, T), zeros where there is padding."""
        lengths = attention_mask.sum(1).tolist()
        texts = [tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        states = self.states(texts, every=True)
        out = torch.zeros(*input_ids.shape, states[0].shape[-1])
        for row, state in enumerate(states):
            out[row, : len(state)] = state
        return SimpleNamespace(last_hidden_state=out)

    def get_input_embeddings(self) -> None:
        """None: what the server knows of the vocabulary is its own."""

    def states(self, texts: Sequence[Sequence[int]], *, every: bool) -> list[Tensor]:
        """For each text the states (T, h) of all its tokens, or (h,) of its last, in float32 on the CPU.

        Raises BackendError, with the server's words, where it fails after all tries.
        """
        return run_sync(self._states([list(text) for text in texts], every))

    async def _states(self, texts: list[list[int]], every: bool) -> list[Tensor]:
        gate = asyncio.Semaphore(self.concurrency)

        async def one(part: list[list[int]]) -> list[Tensor]:
            async with gate:
                read = self._vllm if self.server == "vllm" else self._sglang
                return await read(part, every)

        parts = [texts[k : k + _TEXTS] for k in range(0, len(texts), _TEXTS)]
        tasks = [asyncio.ensure_future(one(part)) for part in parts]
        try:
            return [state for states in await asyncio.gather(*tasks) for state in states]
        finally:
            for task in tasks:  # after an error nobody waits for the others
                task.cancel()

    # -- the two servers ---------------------------------------------------------------------------------------------

    async def _vllm(self, texts: list[list[int]], every: bool) -> list[Tensor]:
        payload: dict[str, Any] = {"model": self.name, "input": texts, "task": "token_embed" if every else "embed"}
        payload |= {"use_activation": False, "encoding_format": "base64"}
        payload |= {"embed_dtype": "float32", "endianness": "little"}
        reply = await self._ask("POST", "/pooling", payload)
        data = sorted(reply.get("data") or [], key=lambda entry: int(entry.get("index", 0)))
        return self._checked([self._decoded(entry.get("data")) for entry in data], texts, every)

    def _decoded(self, data: object) -> np.ndarray:
        if isinstance(data, str):
            try:
                return np.frombuffer(base64.b64decode(data, validate=True), dtype="<f4")
            except (binascii.Error, ValueError):
                raise BackendError(f"{self.url}: got states that are no base64 of float32") from None
        return np.asarray(data, dtype=np.float32)  # a server that knows no encoding_format

    async def _sglang(self, texts: list[list[int]], every: bool) -> list[Tensor]:
        payload: dict[str, Any] = {"input_ids": texts, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        reply = await self._ask("POST", "/generate", payload | {"return_hidden_states": True})
        states = []
        for text, entry in zip(texts, reply if isinstance(reply, list) else [], strict=False):
            found = (entry.get("meta_info") or {}).get("hidden_states")
            if not found:
                raise BackendError(f"{self.url}: got no hidden states: start SGLang with --enable-return-hidden-states")
            prompt = np.asarray(found[0], dtype=np.float32)
            prompt = prompt[None] if prompt.ndim == 1 else prompt
            if every and len(prompt) != len(text):
                raise BackendError(
                    f"{self.url}: got the states of {len(prompt)} of {len(text)} tokens, the others are in its cache: "
                    "start SGLang with --disable-radix-cache, or pool the last token"
                )
            states.append(prompt if every else prompt[-1])
        return self._checked(states, texts, every)

    def _checked(self, found: list[np.ndarray], texts: list[list[int]], every: bool) -> list[Tensor]:
        if len(found) != len(texts):
            raise BackendError(f"{self.url}: got states of {len(found)} texts, expected {len(texts)}")
        width = self.config.hidden_size or found[0].size // (len(texts[0]) if every else 1)
        states = []
        for array, text in zip(found, texts, strict=True):
            shape = (len(text), width) if every else (width,)
            if array.size != int(np.prod(shape)):
                raise BackendError(f"{self.url}: got {array.size} numbers of {len(text)} tokens, expected {shape}")
            states.append(torch.from_numpy(array.reshape(shape).astype(np.float32, copy=True)))
        return states

    # -- HTTP --------------------------------------------------------------------------------------------------------

    async def _ask(self, method: str, path: str, payload: dict[str, Any] | None) -> Any:
        """The JSON reply of one request, tried again as the policy says. Raises BackendError."""
        import httpx

        body = None if payload is None else json.dumps(payload).encode()
        attempt = 0
        while True:
            headers: Any = {}
            try:
                async with asyncio.timeout(self._timeout_s):
                    status, headers, content = await self._send(method, path, body)
            except (httpx.TransportError, TimeoutError) as error:  # without its words: they may quote headers
                told, retry = f"no reply ({type(error).__name__})", True
            else:
                if status == 200:
                    try:
                        return json.loads(content)
                    except ValueError:
                        raise BackendError(f"{self.url}{path}: got a reply that is no JSON") from None
                told, retry = f"HTTP {status}: {content[:300].decode(errors='replace')}", should_retry(status)
            wall, unit = self._clock.wall(), random.random()
            delay = retry_delay_s(self._retry, attempt, headers, wall, unit) if retry else None
            if delay is None:
                raise BackendError(f"{self.url}{path}: got {told} after {attempt + 1} tries, expected hidden states")
            attempt += 1
            await self._clock.sleep(delay)

    async def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, Any, bytes]:
        headers = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
        if self._api_key_env is not None:
            key = os.environ.get(self._api_key_env, "").strip()
            if not key or not (key.isascii() and key.isprintable()):
                raise BackendError(f"environment variable {self._api_key_env}: got no key that can be sent")
            headers["authorization"] = f"Bearer {key}"
        content = bytearray()
        with self._connections.here().client() as client:
            async with client.stream(method, f"{self.url}{path}", content=body, headers=headers) as response:
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _MAX_REPLY:
                        raise BackendError(f"{self.url}{path}: got a reply beyond {_MAX_REPLY} bytes")
        return response.status_code, response.headers, bytes(content)
