"""Encoding groups in concat mode: rows padded as published code does, rows sorted by length, packed prefix trees.

K responses a prompt, every ordered pair, pooled at the last token; a randomly initialised Llama (timing does not depend
on the weights) of SmolLM2-135M's shape in float32 on a CPU, of Llama-3.1-8B's in bfloat16 on a GPU. Lengths are drawn
like those of a set of human preferences, or are 512 for prompt and responses alike. The variants take turns, round by
round, so that what else the machine does hits all of them; ratios are taken within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from .harness import synchronize
from .rows import dtype_name

if TYPE_CHECKING:
    from rmcore.model.backbone import Backbone
    from rmcore.model.text import EncodedText

    from .setup import Row, Setup

__all__ = ["AUTOJ", "Lengths", "Shape", "draw_encode", "encode", "encode_table", "flop"]


@dataclass(frozen=True)
class Shape:
    """A Llama. ``vocabulary`` only costs memory: the embedding is a lookup."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Weights of the matrix products a token goes through."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


SMOLLM2 = Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152)
LLAMA_8B = Shape("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256)
SMALL = Shape("4 layers of SmolLM2-135M", 576, 4, 9, 3, 1536, 49152)

LEVELS = (*(k / 20 for k in range(20)), 0.975, 0.99)


@dataclass(frozen=True)
class Lengths:
    """Quantiles of prompt and response lengths in tokens at ``LEVELS``, and how two responses to a prompt go together.

    ``alike`` is the correlation of two such responses' normal scores, ``given`` that of a prompt's and a response's.
    The longest 1% are drawn as the 99% quantile.
    """

    name: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    alike: float = 0.0
    given: float = 0.0

    def groups(self, count: int, k: int, rng: random.Random) -> list[tuple[int, list[int]]]:
        """Lengths of a prompt and of K responses to it, ``count`` times.

        Prompts are spread evenly over the distribution, and so is what a group's responses have in common, so that few
        groups stand for many.
        """
        levels = [NormalDist().inv_cdf((n + 0.5) / count) for n in range(count)]
        found = []
        for of_prompt, of_group in zip(rng.sample(levels, count), rng.sample(levels, count), strict=True):
            shared = self.given * of_prompt + max(self.alike - self.given**2, 0.0) ** 0.5 * of_group
            scores = [shared + (1 - self.alike) ** 0.5 * rng.gauss(0, 1) for _ in range(k)]
            found.append((_quantile(self.prompt, of_prompt), [_quantile(self.response, score) for score in scores]))
        return found


# Measured with SmolLM2's tokenizer on the 1018 pairs of Auto-J's test set (58 scenarios).
# fmt: off
AUTOJ = Lengths(
    "autoj",
    prompt=(5, 9, 10, 12, 13, 15, 17, 21, 26, 33, 40, 52, 60, 76, 108, 159, 231, 313, 418, 716, 972, 1635),
    response=(0, 16, 27, 38, 49, 61, 78, 95, 111, 129, 156, 185, 223, 258, 300, 342, 400, 471, 545, 702, 830, 1141),
    alike=0.65,
    given=0.16,
)
# fmt: on
FIXED = Lengths("512+512", (512,), (512,))
CHARACTERS_PER_TOKEN = (4.02, 4.35)
"""Prompts, responses: of the same text and tokenizer."""


def _quantile(values: Sequence[int], score: float) -> int:
    if len(values) == 1:
        return values[0]
    return max(1, round(float(np.interp(min(NormalDist().cdf(score), LEVELS[-1]), LEVELS, values))))


def lengths_of(data: Path) -> Lengths:
    """As ``AUTOJ``, from the data folder: characters are counted and converted, correlations kept."""
    from rmcore.model.data import read_lines

    rows = [row for _, row in read_lines(data / "autoj.jsonl.gz")]
    prompts = [len(row["prompt"]) / CHARACTERS_PER_TOKEN[0] for row in rows]
    responses = [len(row[name]) / CHARACTERS_PER_TOKEN[1] for row in rows for name in ("chosen", "rejected")]
    prompt, response = (tuple(round(v) for v in np.quantile(x, LEVELS)) for x in (prompts, responses))
    return Lengths("autoj", prompt, response, AUTOJ.alike, AUTOJ.given)


# -- what is measured ------------------------------------------------------------------------------------------------


def encode(setup: Setup) -> Iterator[Row]:
    """Every variant at every K and both kinds of lengths."""
    gpu = setup.device.type == "cuda"
    shape = SMALL if setup.quick else LLAMA_8B if gpu else SMOLLM2
    if setup.layers is not None:
        shape = replace(shape, layers=setup.layers, name=f"{setup.layers} layers of {shape.name}")
    dtype = torch.bfloat16 if gpu else torch.float32
    budgets = (16384,) if gpu else (2048, 8192)
    model = make_model(shape, setup.device, dtype)
    autoj = AUTOJ if setup.data is None else lengths_of(setup.data)
    for k in setup.groups or ((2, 4) if setup.quick else (2, 4, 8, 16)):
        for lengths in (autoj, FIXED):
            if lengths.name not in (setup.lengths or (("autoj",) if setup.quick else ("autoj", FIXED.name))):
                continue
            # Enough pairs for full batches: about 70 on a CPU, 200 on a GPU.
            groups = max(1, (24 if setup.quick else 200 if gpu else 70) // (k * (k - 1)))
            groups = min(groups, 2) if lengths is FIXED else max(groups, 2)
            texts = draw_texts(lengths, k, groups, shape.vocabulary)
            variants = make_variants(model, budgets)
            setup.note(f"encode K={k} {lengths.name}: {groups} groups, {len(texts)} pairs")
            # A round of K = 16, or of 8 long ones, takes many minutes on a CPU.
            rounds = 1 if setup.quick or (not gpu and (k > 8 or (k > 4 and lengths is FIXED))) else 3
            measured = _measure(variants, texts, setup.device, setup.rounds or rounds)
            yield from _rows(setup, shape, lengths, k, groups, texts, measured, dtype_name(dtype))


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """A randomly initialised Llama of the shape."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaModel(config).eval()
    finally:
        torch.set_default_dtype(usual)


class _Ids:
    """A tokenizer for texts that are token ids already."""

    pad_token_id = 0
    eos_token_id = None
    chat_template = None

    def __call__(self, _text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1]}


def draw_texts(lengths: Lengths, k: int, groups: int, vocabulary: int) -> list[EncodedText]:
    """Every ordered pair of groups of random token ids."""
    from rmcore.model.text import EncodedText, Segment

    rng = random.Random(k)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, vocabulary) for _ in range(count))

    texts: list[EncodedText] = []
    for prompt, responses in lengths.groups(groups, k, rng):
        x, ys = Segment("prompt", ids(prompt)), [ids(n) for n in responses]
        texts += [EncodedText((x, Segment("first", a), Segment("second", b)), 1) for a, b in permutations(ys, 2)]
    return texts


Variant = Callable[["Sequence[EncodedText]"], tuple[Tensor, int]]
"""Texts → (pooled states, tokens computed, padding included)."""


def make_variants(model: Any, budgets: Sequence[int]) -> dict[str, Variant]:
    """The published way, length-sorted rows at each token budget, and rmcore's default."""
    from rmcore.model.backbone import Backbone, BackboneConfig

    def backbone(packing: Any, budget: int) -> Backbone:
        return Backbone(model, _Ids(), BackboneConfig(), tokens_per_batch=budget, packing=packing)

    def run(made: Backbone, texts: Sequence[EncodedText]) -> tuple[Tensor, int]:
        before = made.stats.computed_tokens
        hidden = made.hidden(texts)
        return hidden, made.stats.computed_tokens - before

    rows = backbone("padded", budgets[-1])
    variants: dict[str, Variant] = {"padded rows, 8 a batch": lambda texts: _published(rows, texts)}
    for budget in budgets:
        sorted_rows = backbone("padded", budget)
        variants[f"sorted rows, {budget} tokens"] = lambda texts, made=sorted_rows: run(made, texts)  # type: ignore[misc]
    tree = backbone("auto", budgets[-1])
    variants[f"rmcore packed tree, {tree.explain().backend}"] = lambda texts: run(tree, texts)
    return variants


def _published(backbone: Backbone, texts: Sequence[EncodedText]) -> tuple[Tensor, int]:
    """Pairs as they come, eight a batch, padded to the longest of the batch."""
    states, computed = [], 0
    with torch.inference_mode():
        for start in range(0, len(texts), 8):
            ids = [text.ids for text in texts[start : start + 8]]
            longest = max(map(len, ids))
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
            rows = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
            states.append(backbone.pooled_states(rows.to(backbone.device), mask.to(backbone.device)))
            computed += rows.numel()
    return torch.cat(states), computed


@dataclass
class _Measured:
    seconds: list[float]
    cpu_seconds: list[float]
    computed: int
    peak_bytes: int
    error: float


def _measure(
    variants: dict[str, Variant], texts: Sequence[EncodedText], device: torch.device, rounds: int
) -> dict[str, _Measured]:
    found: dict[str, _Measured] = {}
    truth: Tensor | None = None
    for number in range(rounds + 1):
        for name, run in variants.items():
            if number == 0:  # warm-up: compilation, allocator and caches; all texts where shapes compile
                run(texts if device.type == "cuda" else texts[:2])
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            synchronize(device)
            started, cpu = time.perf_counter(), time.process_time()
            hidden, computed = run(texts)
            synchronize(device)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            truth = hidden if truth is None else truth
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            error = float((hidden - truth).norm() / truth.norm())
            entry = found.setdefault(name, _Measured([], [], computed, peak, error))
            entry.seconds.append(seconds)
            entry.cpu_seconds.append(cpu)
    return found


def flop(shape: Shape, texts: Sequence[EncodedText], *, packed: bool) -> float:
    """Multiply-adds of the products and of causal attention, padding left out: of every text, or of their tree."""
    ids = [text.ids for text in texts]
    if packed:
        from rmcore.model.encoding.packing import PrefixTree

        (pack,) = PrefixTree(ids).packs(sum(map(len, ids)) + 1)
        tokens, seen = len(pack), int(pack.positions.sum()) + len(pack)
    else:
        tokens, seen = sum(map(len, ids)), sum(len(i) * (len(i) + 1) // 2 for i in ids)
    return 2.0 * shape.parameters * tokens + 4.0 * shape.layers * shape.hidden * seen


def _rows(
    setup: Setup,
    shape: Shape,
    lengths: Lengths,
    k: int,
    groups: int,
    texts: Sequence[EncodedText],
    measured: dict[str, _Measured],
    dtype: str,
) -> Iterator[Row]:
    names = list(measured)
    published, rows = names[0], [name for name in names if name.startswith("sorted")]
    flat = sum(map(len, texts))
    for name, entry in measured.items():
        packed = "tree" in name
        median = statistics.median(entry.seconds)
        work = flop(shape, texts, packed=packed)
        row: Row = {
            "suite": "encode",
            "variant": name,
            "dtype": dtype,
            "model": shape.name,
            "lengths": lengths.name,
            "k": k,
            "groups": groups,
            "pairs": len(texts),
            "rounds": len(entry.seconds),
            "median_s": median,
            "low_s": min(entry.seconds),
            "high_s": max(entry.seconds),
            "cpu_s": statistics.median(entry.cpu_seconds),
            "pairs_per_s": len(texts) / median,
            "flat_tokens": flat,
            "computed_tokens": entry.computed,
            "tokens_saved": 1 - entry.computed / measured[published].computed,
            "flop": work,
            "flop_per_s": work / median,
            "of_limit": work / median / setup.limits.matrix[dtype],
            "speedup_padded": _ratio(measured[published].seconds, entry.seconds),
            "speedup_sorted": min(_ratio(measured[r].seconds, entry.seconds) for r in rows),
            "error": entry.error,
            "right": entry.error < (0.1 if dtype == "bfloat16" else 1e-4),
        }
        if setup.device.type == "cuda":
            row["peak_bytes"] = entry.peak_bytes
        else:
            row["speedup_padded_cpu"] = _ratio(measured[published].cpu_seconds, entry.cpu_seconds)
            row["speedup_sorted_cpu"] = min(_ratio(measured[r].cpu_seconds, entry.cpu_seconds) for r in rows)
        yield row


def _ratio(base: Sequence[float], mine: Sequence[float]) -> float:
    """Median over rounds of base / mine."""
    return statistics.median(a / b for a, b in zip(base, mine, strict=True))


# -- what is shown ---------------------------------------------------------------------------------------------------


def encode_table(rows: Sequence[Row], limits: dict[str, Any]) -> Table:
    """One row a variant, K and lengths."""
    encoded = [row for row in rows if row["suite"] == "encode"]
    rate = limits["matrix"][encoded[0]["dtype"]] / 1e12
    table = Table(
        title=f"encode, {encoded[0]['model']}, {encoded[0]['dtype']}",
        caption=f"rate measured: {rate:.2f} TFLOP/s. Ratios to padded rows, and to the better of the sorted rows",
    )
    for name in ("lengths", "K", "variant", "pairs/s", "of rate", "tokens", "saved", "vs padded", "vs sorted"):
        table.add_column(name, justify="left" if name in ("lengths", "variant") else "right")
    for before, row in pairwise([None, *encoded]):
        assert row is not None
        if before is not None and (before["k"], before["lengths"]) != (row["k"], row["lengths"]):
            table.add_section()
        table.add_row(
            row["lengths"],
            str(row["k"]),
            row["variant"] + ("" if row["right"] else " WRONG"),
            f"{row['pairs_per_s']:.2f}",
            f"{100 * row['of_limit']:.0f}%",
            str(row["computed_tokens"]),
            f"{100 * row['tokens_saved']:.0f}%",
            f"{row['speedup_padded']:.2f}×",
            f"{row['speedup_sorted']:.2f}×",
        )
    return table


def draw_encode(rows: Sequence[Row], axes: Sequence[Any]) -> None:
    """Pairs per second of each variant by K, relative to padded rows; one axis a kind of lengths."""
    colours = {"padded": "0.6", "sorted": "#E69F00", "rmcore": "#0072B2"}
    for axis, lengths in zip(axes, dict.fromkeys(row["lengths"] for row in rows), strict=True):
        mine = [row for row in rows if row["lengths"] == lengths]
        sizes = list(dict.fromkeys(row["k"] for row in mine))
        variants = list(dict.fromkeys(row["variant"] for row in mine))
        width = 0.8 / len(variants)
        shades = dict.fromkeys(variants, 1.0)
        for name in [v for v in variants if v.startswith("sorted")][1:]:
            shades[name] = 0.6
        for n, variant in enumerate(variants):
            heights = [next(r["speedup_padded"] for r in mine if (r["k"], r["variant"]) == (k, variant)) for k in sizes]
            places = [at - 0.4 + (n + 0.5) * width for at in range(len(sizes))]
            colour = colours[variant.split()[0]]
            bars = axis.bar(places, heights, 0.95 * width, color=colour, alpha=shades[variant], label=variant)
            if variant.startswith("rmcore"):
                axis.bar_label(bars, fmt="%.1f×", fontsize=8, padding=1)
        axis.set_xticks(range(len(sizes)), [f"K = {k}" for k in sizes])
        axis.set_title(f"lengths: {lengths}", fontsize=9)
        axis.set_ylabel("pairs per second, padded rows = 1")
        axis.spines[["top", "right"]].set_visible(False)
