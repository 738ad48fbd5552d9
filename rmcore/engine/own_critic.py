"""A language model as the critic of responses that its own body will score: CLoud's second stage, by ``generate``.

The model continues the very text that it is scored on later: prompt, response, and CLoud's turn up to where the
critique begins (:data:`rmcore.model.text.CRITIQUE_TURN`), so its tokens follow those they will follow then.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import torch

from rmcore._base.errors import InputError, reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore._base.prompt import Prompt, Response, canonical_json, canonical_prompt, canonical_response
from rmcore.judge.base import JudgeUsage
from rmcore.judge.critics.critique import MAX_CHARS, Critique, bounded, junk_reason
from rmcore.model.critiques import critique_lead
from rmcore.model.text import TextEncoder

__all__ = ["OwnCritic"]


class OwnCritic:
    """Critiques by a causal language model in this process: a :class:`~rmcore.judge.critics.critique.Critic`.

    Equal arguments, model and machine give equal critiques, whatever else is asked and in what order: each response's
    samples are drawn from a seed of its own texts.

    Args:
        model: with ``generate``, on the device where it is to run; put in eval mode.
        encoder: of its tokenizer; a reward model's own (``backbone.encoder``) writes exactly what that model reads.
        samples: critiques a response.
        max_new_tokens: longest critique in tokens.
        temperature: 0 is greedy, and then one sample is all there is.
        seed: of sampling.
        max_chars: longest critique kept, in characters; what is left out is counted.

    Raises:
        InputError: an argument is out of range, or ``model`` cannot generate.
    """

    def __init__(
        self,
        model: Any,
        encoder: TextEncoder,
        *,
        samples: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int = 0,
        max_chars: int = MAX_CHARS,
    ) -> None:
        if not callable(getattr(model, "generate", None)):
            reject("model", type(model).__name__, "a causal language model with generate()")
        for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens)):
            check_number(name, value, COUNT, "a number, at least 1")
        check_number("temperature", temperature, Within(least=0), "a finite number, 0 or more")
        if samples > 1 and temperature == 0:
            reject("temperature", f"0 for {samples} samples", "one above 0, or they are all equal")
        bounded("", max_chars)
        self.model, self.encoder = model.eval(), encoder
        self.samples, self.max_new_tokens, self.temperature = samples, max_new_tokens, float(temperature)
        self.seed, self.max_chars = seed, max_chars
        self._lock = threading.Lock()  # generation is not meant to run twice at once on one model

    def __repr__(self) -> str:
        return f"OwnCritic({self.name!r}, samples={self.samples}, temperature={self.temperature:g})"

    @property
    def name(self) -> str:
        """The model's."""
        return str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)

    async def critiques(self, items: Sequence[tuple[Prompt, Response]]) -> list[tuple[Critique, ...]]:
        """``samples`` critiques of each (prompt, response), one after another, in a thread."""
        return [await asyncio.to_thread(self.critique, prompt, response) for prompt, response in items]

    def critique(self, prompt: Prompt, response: Response) -> tuple[Critique, ...]:
        """Those of one response. What cannot be asked has a reason: ``bad_pair``, or ``too_long`` for the model."""
        try:
            given = self.lead(prompt, response)
        except InputError as error:
            reason = "too_long" if "tokens" in str(error) else "bad_pair"
            return (Critique("", reason, model=self.name),) * self.samples
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and len(given) + self.max_new_tokens > limit:
            return (Critique("", "too_long", model=self.name),) * self.samples
        with self._lock:
            said = self._generate(given, self._seed_of(prompt, response))
        return tuple(self._read(tokens, response, len(given)) for tokens in said)

    def lead(self, prompt: Prompt, response: Response) -> tuple[int, ...]:
        """The token ids that a critique of a response follows. Raises InputError as the encoder does."""
        return critique_lead(self.encoder, prompt, response)

    def _seed_of(self, prompt: Prompt, response: Response) -> int:
        texts = [canonical_prompt(prompt), canonical_response(response)]
        content = "\0".join([str(self.seed), *(t if isinstance(t, str) else canonical_json(t) for t in texts)])
        return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:7], "big")

    def _generate(self, given: Sequence[int], seed: int) -> list[list[int]]:
        device = self.model.device
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "num_return_sequences": self.samples}
        ids = torch.tensor([list(given)], dtype=torch.int64, device=device)
        padding = getattr(self.encoder.tokenizer, "pad_token_id", None)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=0 if padding is None else padding,
                **sampling,
            )
        found: list[list[int]] = out[:, len(given) :].tolist()
        return found

    def _read(self, tokens: list[int], response: Response, asked: int) -> Critique:
        ends = self._ends()
        stop = next((k for k, token in enumerate(tokens) if token in ends), None)
        said = tokens if stop is None else tokens[:stop]
        text, cut = bounded(self.encoder.tokenizer.decode(said, skip_special_tokens=True), self.max_chars)
        usage = JudgeUsage(calls=1, attempts=1, prompt_tokens=asked, completion_tokens=len(said))
        if not text:
            return Critique("", "no_content", "empty", model=self.name, usage=usage)
        reason = "length" if stop is None else ""
        return Critique(text, reason, junk_reason(text, response), cut, self.name, usage)

    def _ends(self) -> set[int]:
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        known = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        return {end for end in known | {getattr(self.encoder.tokenizer, "eos_token_id", None)} if end is not None}
