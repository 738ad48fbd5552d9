"""Attention over a packed prefix tree, for Hugging Face decoders as they are.

Everything in a decoder but attention works token by token, so a packed tree needs one thing of the model: that its
attention lets a token see its own path only. transformers looks the attention function up by name at each call; for
the time of a forward pass the name is ours (:func:`attending`).

``flex``   FlexAttention with a block mask, compiled. The block mask is made from the tree, never from a T × T mask.
``sdpa``   ``scaled_dot_product_attention`` once a node (and 256 query rows), over the keys of the node's path.

With a graph the second takes each node's keys from its path anew, where without one siblings write over one another.

Both compute what the padded forward computes, up to rounding, where a token's state depends on the tokens before it and
on its position alone. :func:`rmcore.model.encoding.architecture.unfit` names the models for which that is not so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rmcore._base.errors import RmcoreError, reject
from rmcore.model.encoding.architecture import unfit
from rmcore.model.encoding.packing import Pack
from rmcore.ops.dispatch import Explanation

__all__ = ["Kind", "Packing", "Plan", "TreeAttentionError", "attending", "block_mask_of", "explain"]

Packing: TypeAlias = Literal["auto", "flex", "sdpa", "padded"]
Kind: TypeAlias = Literal["flex", "sdpa"]

# On CUDA one launch a layer beats several a node. On CPUs sdpa takes half the time of compiled FlexAttention (9 heads,
# 900 to 14,000 tokens) and does not compile for 20 seconds first.
_ORDER: dict[str, tuple[Kind, ...]] = {"cuda": ("flex", "sdpa")}
_NAME = "rmcore_tree"
_ROWS = 256
_BLOCK = 128
# What attention functions are passed that does not change the result, or is checked by hand below.
_HARMLESS = {"is_causal", "position_ids", "output_attentions", "output_hidden_states", "use_cache", "cache_position"}
_HARMLESS |= {"return_dict", "logits_to_keep", "output_router_logits"}


class TreeAttentionError(RmcoreError):
    """A model asked for attention that cannot be had on a packed tree; the message says what."""


# -- what can run ----------------------------------------------------------------------------------------------------


def explain(
    model: Any,
    packing: Packing = "auto",
    *,
    kinds: tuple[Kind, ...] | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """How a model's shared prefixes would be encoded, and why not otherwise.

    Args:
        model: a Hugging Face model.
        packing: as asked for.
        kinds: those that ``auto`` may choose from; None for all.
        device: None takes the model's.

    Returns:
        ``flex``, ``sdpa`` or ``padded`` (every text in a row of its own), ``none`` where the one asked for cannot run.

    Raises InputError for an unknown packing.
    """
    if packing not in ("auto", "flex", "sdpa", "padded"):
        reject("packing", repr(packing), "auto, flex, sdpa or padded")
    if packing == "padded":
        return Explanation("padded", {"flex": "padded was asked for", "sdpa": "padded was asked for"})
    where = torch.device(device) if device is not None else next(model.parameters()).device
    reasons: dict[str, str] = {}
    if packing != "auto":
        order: tuple[Kind, ...] = (packing,)
    elif kinds is None:
        order = _ORDER.get(where.type, ("sdpa",))
    else:
        order = kinds
        reasons = {kind: "another attn_implementation was asked for" for kind in ("flex", "sdpa") if kind not in kinds}
    why = unfit(model)
    for name in order:
        reason = why or (_no_flex(where) if name == "flex" else None)
        if reason is None:
            if packing == "auto" and kinds is None and name == "sdpa" and where.type != "cuda":
                reasons["flex"] = "slower here than sdpa, and compiled for seconds first"
            return Explanation(name, reasons)
        reasons[name] = reason
    return Explanation("padded" if packing == "auto" else "none", reasons)


def _no_flex(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "FlexAttention needs triton to compile"
    if device.type != "cpu":
        return f"FlexAttention is not compiled for {device.type}"
    return None if any(map(shutil.which, ("g++", "clang++", "c++"))) else "FlexAttention needs a C++ compiler on a CPU"


# -- one forward pass ------------------------------------------------------------------------------------------------

_active = threading.local()
_training: list[Plan] = []
"""The plan of a training step, for all threads: autograd computes checkpointed layers again in threads of its own."""


class Plan:
    """What the attention calls of one forward pass share; ``calls`` counts them."""

    def __init__(self, pack: Pack, kind: str) -> None:
        self.pack = pack
        self.kind = kind
        self.calls = 0
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` made for ``key`` in this forward pass."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@contextlib.contextmanager
def attending(model: Any, pack: Pack, kind: Literal["flex", "sdpa"], *, every_thread: bool = False) -> Iterator[Plan]:
    """Within, a forward pass of ``model`` over (1, T) ids and positions of ``pack`` attends along the tree.

    The attention function's name in the model's configuration changes meanwhile: no other thread may run the model.
    ``every_thread`` is for a training step, backward pass included, of which a process has one at a time.

    Raises TreeAttentionError from the forward pass where a layer asks for what a tree cannot give.
    """
    _register()
    if every_thread and _training:
        raise TreeAttentionError("a training step within another one")
    configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs]
    plan = Plan(pack, kind)
    if every_thread:
        _training.append(plan)
    else:
        _active.plan = plan
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield plan
    finally:
        if every_thread:
            _training.clear()
        else:
            _active.plan = None
        for config, implementation in before:
            config._attn_implementation = implementation


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    # No mask function of this name is registered: transformers then makes no mask at all.
    AttentionInterface.register(_NAME, _attention)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, H, T, d) queries against (1, H_kv, T, d) keys and (1, H_kv, T, d_v) values → (1, T, H, d_v)."""
    plan: Plan | None = getattr(_active, "plan", None) or next(iter(_training), None)
    if plan is None:
        raise TreeAttentionError("model: run by two threads at once, while one of them encodes a packed tree")
    length = len(plan.pack)
    asked = sorted(name for name, setting in kwargs.items() if setting is not None and name not in _HARMLESS)
    if asked:
        raise TreeAttentionError(f"attention with {', '.join(asked)}")
    if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != length or key.shape[2] != length:
        raise TreeAttentionError("attention with a mask or a cache of the model's own")
    if dropout or kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise TreeAttentionError("attention with dropout" if dropout else "attention that is not causal")
    if sliding_window is not None and plan.pack.longest > sliding_window:
        raise TreeAttentionError(f"a sliding window of {sliding_window} for a text of {plan.pack.longest} tokens")
    plan.calls += 1
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    # Less than two blocks are not worth a block mask, and shapes of one block would be compiled apart.
    run = _flex if plan.kind == "flex" and length > 2 * _BLOCK else _by_node
    return run(plan, query, key, value, scale, softcap), None


# -- sdpa: node by node ----------------------------------------------------------------------------------------------


def _by_node(plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
    pack = plan.pack
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type != "cpu":
        # Elsewhere grouped heads with a mask fall back to a kernel that keeps all scores.
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        grouped = False
    mask = plan.once((query.dtype, query.device), lambda: _causal_rows(pack.longest, query))
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _by_path(pack, query, key, value, mask, scale, softcap, grouped)
    # Keys and values of the current path, by position. Preorder: a node's ancestors are in place when its turn comes,
    # and siblings write over one another.
    keys = key.new_empty(1, key.shape[1], pack.longest, key.shape[-1])
    values = value.new_empty(1, value.shape[1], pack.longest, value.shape[-1])
    for start, stop, position, _ in pack.spans:
        end = position + stop - start
        keys[:, :, position:end] = key[:, :, start:stop]
        values[:, :, position:end] = value[:, :, start:stop]
        own = query[:, :, start:stop], keys[:, :, :end], values[:, :, :end]
        at = start
        for states in _node(*own, position, mask, scale, softcap, grouped):
            out[:, at : at + states.shape[2]] = states.transpose(1, 2)
            at += states.shape[2]
    return out


def _by_path(
    pack: Pack,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    grouped: bool,
) -> Tensor:
    """As :func:`_by_node` with a graph, which nothing is written over."""
    parts: list[Tensor] = []
    paths: list[list[slice]] = []
    for start, stop, position, parent in pack.spans:
        paths.append([*(paths[parent] if parent >= 0 else []), slice(start, stop)])
        keys, values = (torch.cat([t[:, :, part] for part in paths[-1]], 2) for t in (key, value))
        parts += _node(query[:, :, start:stop], keys, values, position, mask, scale, softcap, grouped)
    return torch.cat(parts, 2).transpose(1, 2)


def _node(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: int,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    grouped: bool,
) -> Iterator[Tensor]:
    """(1, H, n, d_v) of a node's rows, in parts; its first token is at ``position`` of the path that keys are of."""
    count = query.shape[2]
    if position == 0 and softcap is None:
        yield scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        return
    for first in range(0, count, _ROWS):
        last = min(first + _ROWS, count)
        seen = position + last
        # The last `last - first` rows and `seen` columns of a causal mask.
        rows = mask[: last - first, mask.shape[1] - _ROWS - seen + last - first :][:, :seen]
        yield _dense(query[:, :, first:last], keys[:, :, :seen], values[:, :, :seen], rows, scale, softcap, grouped)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None, grouped: bool
) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if grouped:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = softcap * torch.tanh(query @ key.mT * scale / softcap) + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _causal_rows(longest: int, like: Tensor) -> Tensor:
    """(256, longest + 256) additive mask: row r sees all columns but the last 255 − r.

    For c query rows whose last one sees L keys, the mask is rows [0, c) and L columns of it, so all nodes use views.
    """
    columns = torch.arange(longest + _ROWS, device=like.device)
    visible = columns <= torch.arange(_ROWS, device=like.device)[:, None] + longest
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, -torch.inf)


# -- flex: one call --------------------------------------------------------------------------------------------------


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Every pack has its own length; with dynamic shapes they share one kernel.
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _flex(plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
    block_mask = plan.once(("blocks", query.device), lambda: block_mask_of(plan.pack, query.device))
    heads = query.shape[1]
    grouped = heads != key.shape[1]
    if grouped and heads & (heads - 1):  # the kernels want a power of two
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
        grouped = False
    score_mod = None if softcap is None else plan.once(softcap, lambda: _softcapped(softcap, query.device))
    try:
        out = _compiled()(
            query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=grouped
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compilers raise many kinds, and at any new shape
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise TreeAttentionError(f"FlexAttention, which does not compile here ({reason})") from error
    return out.transpose(1, 2).contiguous()


def _softcapped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    cap = torch.tensor(
        softcap, device=device
    )  # a float would be a symbol of the dynamic shapes, which fails to compile

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def block_mask_of(pack: Pack, device: torch.device) -> Any:
    """The tree's FlexAttention BlockMask, in O((T / 128)²) memory.

    With ``kv <= q < subtree_ends[kv]`` the mask, a block of keys before a block of queries is full where the least of
    its ends is past the last query, and empty where the greatest is not past the first.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends = torch.from_numpy(pack.subtree_ends).to(device)
    length = len(ends)
    count = -(-length // _BLOCK)
    padded = torch.nn.functional.pad(ends, (0, count * _BLOCK - length), value=0).view(count, _BLOCK)
    greatest = padded.amax(1)
    least = padded.amin(1)  # 0 in a block that the sequence does not fill: never full
    first = torch.arange(count, device=device) * _BLOCK
    before = first[None, :] < first[:, None]
    full = before & (least[None, :] >= (first + _BLOCK).clamp(max=length)[:, None])
    some = (before & (greatest[None, :] > first[:, None])) | torch.eye(count, dtype=torch.bool, device=device)

    # The lengths of packs are dynamic shapes; the mask's own tensor is not, so that its indices compile to plain ones
    # (with torch 2.13 they do not compile at all on CPUs otherwise).
    table = torch.zeros(1 << max(14, (length - 1).bit_length()), dtype=torch.int32, device=device)
    table[:length] = ends
    torch._dynamo.mark_static(table)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q < table[kv])

    numbers, indices = _block_lists(some & ~full)
    full_numbers, full_indices = _block_lists(full)
    return BlockMask.from_kv_blocks(
        numbers,
        indices,
        full_numbers,
        full_indices,
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, n) counts and (1, 1, n, n) indices of each row's set columns, those first."""
    indices = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()
