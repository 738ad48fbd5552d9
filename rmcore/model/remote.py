"""Hidden states from a server: the body of a model runs in vLLM, SGLang or llama.cpp, its head and all behind it here.

vLLM, ``vllm serve MODEL --runner pooling --convert embed``: ``POST /pooling`` with token ids,
``"task": "embed"`` (the state of the last token) or ``"token_embed"`` (of all), ``"use_activation": false`` (without it
states are normalised) and ``"encoding_format": "base64"``. A reply is
``{"object": "list", "data": [{"index": 0, "object": "pooling", "data": "<base64>"}], "usage": {"prompt_tokens": n}}``.

SGLang, ``python -m sglang.launch_server --model-path MODEL --enable-return-hidden-states``: ``POST /generate`` with
``"input_ids"`` and ``"return_hidden_states": true``; a reply is a list of
``{"text": ..., "meta_info": {"prompt_tokens": n, "hidden_states": [[[...], ...], ...]}}``, the prompt's states first. A
prefix that its cache knows has none, so all tokens' states need ``--disable-radix-cache``; the last one's do not.

llama.cpp, ``llama-server -m MODEL.gguf --embeddings --pooling none``: ``POST /embedding`` with token ids as ``content``
and ``"embd_normalize": -1``; a reply is a list of ``{"index": 0, "embedding": [[...], ...]}``, the states of all
tokens, or with ``--pooling last`` that of the last.

Requests go through the same client as a judge's (:mod:`rmcore._base.client.client`): slots, breaker, rate limits,
retries and deadlines. What a reply holds is checked before it is a state: as many texts as were sent, each of as many
tokens, of the width that the model has.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rmcore._base.client.address import Address
from rmcore._base.client.client import Client
from rmcore._base.client.exchange import HttpExchange
from rmcore._base.client.options import ClientOptions
from rmcore._base.errors import BackendError, InputError, JudgeError, reject
from rmcore._base.loop import run_sync

__all__ = ["REMOTE_OPTIONS", "RemoteModel", "ServerKind"]

ServerKind: TypeAlias = Literal["vllm", "sglang", "llamacpp"]

REMOTE_OPTIONS = ClientOptions(timeout_s=120.0, max_reply_bytes=1 << 30)
"""A judge's, with room and time for the states of long texts."""

_PATHS = {"vllm": "/pooling", "sglang": "/generate", "llamacpp": "/embedding"}
_TEXTS = 8
"""Texts of one request: the server batches by itself, so a request is small enough to be tried again."""


class RemoteModel(torch.nn.Module):
    """A body of which only the hidden states are here, as a :class:`~rmcore.model.Backbone` takes it.

    Args:
        url: of the server, without a path: ``http://host:8000``.
        model: the name it serves; None asks ``/v1/models`` and takes the first.
        server: ``vllm``, ``sglang`` or ``llamacpp``.
        api_key_env: environment variable with its key, if it wants one.
        client: limits, retries, breaker, timeouts, transport and clock; None is :data:`REMOTE_OPTIONS`.
        deadline_s: most seconds for all requests of one call; None for no limit beyond those of each request.

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
        client: ClientOptions | None = None,
        deadline_s: float | None = None,
    ) -> None:
        super().__init__()
        if server not in _PATHS:
            reject("server", repr(server), "'vllm', 'sglang' or 'llamacpp'")
        if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s > 0):
            reject("deadline_s", deadline_s, "seconds above 0, or None")
        options = client or REMOTE_OPTIONS
        try:
            places = [Address.of(url, path) for path in ("/v1/models", _PATHS[server])]
            listing = HttpExchange(places[0], api_key_env, options, method="GET")
            self.client = Client(HttpExchange(places[1], api_key_env, options), options)
        except JudgeError as error:
            raise InputError(str(error).replace("base_url", "url")) from None
        self.url, self.server, self.deadline_s = places[0].base_url, server, deadline_s
        self._place = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # states arrive on the CPU, in float32
        listed = run_sync(_asked(Client(listing, options), {}, 0, None))
        known = [entry for entry in _entries(listed, "data") if isinstance(entry.get("id"), str)]
        found = [entry for entry in known if model is None or entry["id"] == model]
        if not found:
            raise BackendError(f"{self.url}: got models {[e['id'] for e in known]}, expected {model or 'one'}")
        self.name = str(found[0]["id"])
        meta = found[0].get("meta")  # llama.cpp's
        longest = found[0].get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
        self.config = SimpleNamespace(
            model_type="remote",
            max_position_embeddings=longest if isinstance(longest, int) and longest > 0 else None,
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
        found, error = self.states_so_far(texts, every=every)
        if error is not None:
            raise error
        return [found[k] for k in range(len(texts))]

    def states_so_far(
        self, texts: Sequence[Sequence[int]], *, every: bool
    ) -> tuple[dict[int, Tensor], BackendError | None]:
        """:meth:`states` by a text's number, and what came between where some are missing.

        After the first request that fails for good no further one is begun; those under way are waited for.
        """
        return run_sync(self._states([list(text) for text in texts], every))

    async def _states(self, texts: list[list[int]], every: bool) -> tuple[dict[int, Tensor], BackendError | None]:
        deadline = None if self.deadline_s is None else self.client.clock.now() + self.deadline_s
        found: dict[int, Tensor] = {}
        failed: list[BackendError] = []
        waiting = iter(range(0, len(texts), _TEXTS))

        async def work() -> None:
            for start in waiting:  # shared: each takes the next
                if failed:
                    return
                part = texts[start : start + _TEXTS]
                try:
                    found.update(enumerate(await self._part(part, every, deadline), start))
                except BackendError as error:
                    failed.append(error)
                except Exception as error:  # of a reply that is read here; the others' requests are waited for
                    kind = type(error).__name__
                    failed.append(BackendError(f"{self.url}: got a reply of another form ({kind}), expected states"))

        requests = -(-len(texts) // _TEXTS)
        await asyncio.gather(*(work() for _ in range(min(self.client.options.concurrency, requests))))
        return found, failed[0] if failed else None

    async def _part(self, texts: list[list[int]], every: bool, deadline: float | None) -> list[Tensor]:
        payload: dict[str, Any]
        if self.server == "vllm":
            payload = {"model": self.name, "input": texts, "task": "token_embed" if every else "embed"}
            payload |= {"use_activation": False, "encoding_format": "base64"}
            payload |= {"embed_dtype": "float32", "endianness": "little"}
        elif self.server == "llamacpp":
            payload = {"content": texts, "embd_normalize": -1}
        else:
            payload = {"input_ids": texts, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
            payload |= {"return_hidden_states": True}
        reply = await _asked(self.client, payload, sum(map(len, texts)), deadline)
        if self.server == "vllm":
            return self._checked(self._vllm(reply, texts), texts, every)
        read = self._sglang if self.server == "sglang" else self._llamacpp
        return self._checked(read(reply, texts, every), texts, every)

    # -- the servers ---------------------------------------------------------------------------------------------

    def _vllm(self, reply: Any, texts: list[list[int]]) -> list[np.ndarray]:
        data = self._by_index(reply, "data", len(texts))
        usage = reply.get("usage")
        self._same_tokens(usage.get("prompt_tokens") if isinstance(usage, dict) else None, sum(map(len, texts)))
        return [self._array(one) for one in data]

    def _by_index(self, reply: Any, name: str, count: int) -> list[object]:
        data = {entry.get("index"): entry.get(name) for entry in _entries(reply, "data")}
        if sorted(data, key=str) != sorted(range(count), key=str):
            raise BackendError(f"{self.url}: got states of the texts {list(data)}, expected of 0 to {count - 1}")
        return [data[k] for k in range(count)]

    def _llamacpp(self, reply: Any, texts: list[list[int]], every: bool) -> list[np.ndarray]:
        states = []
        for one, text in zip(self._by_index({"data": reply}, "embedding", len(texts)), texts, strict=True):
            found = np.atleast_2d(self._array(one))
            if len(found) != len(text) and (every or len(found) != 1):
                raise BackendError(
                    f"{self.url}: got the states of {len(found)} of {len(text)} tokens: start llama-server with "
                    "--embeddings --pooling none and room for the text (--ubatch-size)"
                )
            states.append(found if every else found[-1])
        return states

    def _sglang(self, reply: Any, texts: list[list[int]], every: bool) -> list[np.ndarray]:
        entries = _entries({"data": reply}, "data")
        if len(entries) != len(texts):
            raise BackendError(f"{self.url}: got states of {len(entries)} texts, expected {len(texts)}")
        states = []
        for text, entry in zip(texts, entries, strict=True):
            info: dict[str, Any] = held if isinstance(held := entry.get("meta_info"), dict) else {}
            found = info.get("hidden_states")
            if not isinstance(found, list) or not found:
                raise BackendError(f"{self.url}: got no hidden states: start SGLang with --enable-return-hidden-states")
            self._same_tokens(info.get("prompt_tokens"), len(text))
            prompt = np.atleast_2d(self._array(found[0]))
            if every and len(prompt) != len(text):
                raise BackendError(
                    f"{self.url}: got the states of {len(prompt)} of {len(text)} tokens, the others are in its cache: "
                    "start SGLang with --disable-radix-cache, or pool the last token"
                )
            states.append(prompt if every else prompt[-1])
        return states

    def _same_tokens(self, read: object, sent: int) -> None:
        if isinstance(read, int) and read != sent:
            raise BackendError(
                f"{self.url}: got states of a server that read {read} tokens, expected the {sent} that were sent: it "
                "cuts texts, or adds tokens of its own"
            )

    def _array(self, data: object) -> np.ndarray:
        try:
            if isinstance(data, str):
                return np.frombuffer(base64.b64decode(data, validate=True), dtype="<f4")
            return np.asarray(data, dtype=np.float32)  # a server that knows no encoding_format
        except (binascii.Error, ValueError, TypeError):
            raise BackendError(f"{self.url}: got states that are neither base64 of float32 nor numbers") from None

    def _checked(self, found: list[np.ndarray], texts: list[list[int]], every: bool) -> list[Tensor]:
        width = self.config.hidden_size or found[0].size // (len(texts[0]) if every else 1)
        states = []
        for array, text in zip(found, texts, strict=True):
            shape = (len(text), width) if every else (width,)
            flat = array.ndim == 1 and array.size == math.prod(shape)  # base64 has no shape
            if not width or not (flat or array.shape == shape):
                raise BackendError(
                    f"{self.url}: got states of shape {array.shape} for {len(text)} tokens, expected {shape}: it "
                    "serves another model, or cuts texts"
                )
            states.append(torch.from_numpy(array.reshape(shape).astype(np.float32, copy=True)))
        return states


async def _asked(client: Client, payload: dict[str, Any], tokens: int, deadline: float | None) -> Any:
    """The JSON reply of one request through the client's gates. Raises BackendError, in the server's words."""
    place = client.exchange.place
    key, reason = client.exchange.secret()
    if reason:
        name = getattr(client.exchange, "api_key_env", None)
        raise BackendError(f"environment variable {name}: got no key that can be sent ({reason}), expected {place}'s")
    call = await client.call(payload, json.dumps(payload).encode(), key, deadline=deadline, tokens=tokens)
    if call.last.body is None:
        told = f"{call.last.reason}{f': {call.last.detail}' if call.last.detail else ''}"
        raise BackendError(f"{place}: got {told} after {call.attempts} tries, expected a reply")
    try:
        return json.loads(call.last.body)
    except (ValueError, RecursionError):
        raise BackendError(f"{place}: got a reply that is no JSON") from None


def _entries(reply: object, name: str) -> list[dict[str, Any]]:
    held = reply.get(name) if isinstance(reply, dict) else None
    entries: Iterable[object] = held if isinstance(held, list) else ()
    return [entry for entry in entries if isinstance(entry, dict)]
