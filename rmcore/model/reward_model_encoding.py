"""From groups of texts to a reward model's hidden rows: a row a response, or one an ordered pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from rmcore._base.errors import InputError
from rmcore._base.progress import Progress
from rmcore._base.prompt import Prompt, Response
from rmcore.head.attributes.scores import AttributeScores
from rmcore.head.frozen import FrozenHead
from rmcore.model.backbone import Backbone
from rmcore.model.critiques import behind_critique, critiqued_texts
from rmcore.model.encoding_stats import EncodingStats
from rmcore.model.text import EncodedText, TextLimit
from rmcore.model.training_pairs import encoding_progress

__all__ = ["RewardModelEncoding"]

log = logging.getLogger("rmcore.model.reward_model")


class RewardModelEncoding:
    """What a :class:`~rmcore.model.reward_model.RewardModel` makes of texts; these are its methods."""

    _warned_of_critiques = False

    if TYPE_CHECKING:
        critiqued: bool | None
        backbone: Backbone
        head: FrozenHead

    @property
    def mode(self) -> str:
        """``difference`` or ``concat``."""
        return self.head.config.mode

    def notice_critiques(self, read: bool) -> None:
        """Warn, once, where the head was fitted behind critiques and reads none, or the other way round."""
        if self.critiqued is None or self.critiqued == read or self._warned_of_critiques:
            return
        self._warned_of_critiques = True
        told = ("behind critiques", "without them") if self.critiqued else ("without critiques", "behind them")
        log.warning("the head was fitted %s and is asked %s: its states are not those it was fitted on", *told)

    def encode_group(
        self,
        prompt: Prompt,
        responses: Sequence[Response],
        *,
        orders: Literal["both", "one"] = "both",
        limit: TextLimit | None = None,
        compared: Callable[[int], Tensor] | None = None,
        critiques: Sequence[Sequence[str]] | None = None,
    ) -> list[EncodedText]:
        """The backbone inputs of one group: K responses, or the ordered pairs (i, j) row-major (i < j for ``one``).

        With ``critiques`` each response is there once for each of its own; in concat mode it has one at most, which
        stands behind it in every text (:func:`~rmcore.model.critiques.behind_critique`). ``compared`` gives for K
        the pairs (P, 2), i < j, that are wanted; None are all.
        """
        encode = self.backbone.encoder.encode
        if critiques is not None and self.mode == "difference":
            return critiqued_texts(self.backbone.encoder, prompt, responses, critiques, limit)
        if critiques is not None:
            behind = zip(responses, critiques, strict=True)
            responses = [behind_critique(*one, f"critiques[{k}]") for k, one in enumerate(behind)]
        if self.mode == "difference":
            return [encode(prompt, response, limit=limit) for response in responses]
        wanted = None if compared is None else {(i, j) for i, j in compared(len(responses)).tolist()}
        return [
            encode(prompt, a, b, limit=limit)
            for i, a in enumerate(responses)
            for j, b in enumerate(responses)
            if (i != j if orders == "both" else i < j) and (wanted is None or (min(i, j), max(i, j)) in wanted)
        ]

    def encode_groups(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        orders: Literal["both", "one"] = "both",
        limit: TextLimit | None = None,
        compared: Callable[[int], Tensor] | None = None,
        critiques: Sequence[Sequence[Sequence[str]]] | None = None,
    ) -> list[list[EncodedText]]:
        """:meth:`encode_group` of every group. An InputError names the group by its place among ``prompts``."""
        encode = self.encode_group if compared is None else partial(self.encode_group, compared=compared)
        self.notice_critiques(critiques is not None)
        groups = []
        for k, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
            own: dict[str, Any] = {} if critiques is None else {"critiques": critiques[k]}
            try:
                groups.append(encode(prompt, group, orders=orders, limit=limit, **own))
            except InputError as error:
                raise InputError(f"group {k}: {error}") from error
        return groups

    def hidden_rows(
        self,
        groups: Sequence[Sequence[EncodedText]],
        *,
        progress: Progress | None = None,
        stats: EncodingStats | None = None,
    ) -> Tensor:
        """Hidden rows of encoded groups, in the order ``RewardEngine.score_hidden`` takes them.

        What texts have in common at their beginning is computed once where the backbone allows it (a prompt, each first
        response, a system prompt of all groups): the more groups a call has, the more there is to share.

        Args:
            groups: some or all of what :meth:`encode_groups` returned.
            progress: called with ("encoding", tokens done, tokens in all) after each forward pass.
            stats: what this call did is added to it, besides to the backbone's own running counts.
        """
        return self.backbone.hidden(
            [t for group in groups for t in group], progress=encoding_progress(progress), stats=stats
        )

    def hidden_rows_and_attributes(
        self,
        groups: Sequence[Sequence[EncodedText]],
        *,
        progress: Progress | None = None,
        stats: EncodingStats | None = None,
    ) -> tuple[Tensor, AttributeScores | None]:
        """:meth:`hidden_rows`, and of the same passes the attributes of a published model that scores several."""
        texts = [t for group in groups for t in group]
        return self.backbone.hidden_and_attributes(texts, progress=encoding_progress(progress), stats=stats)

    @property
    def tells_attributes(self) -> bool:
        """Whether the body is a published model of several attributes whose spread is known (difference mode)."""
        return self.mode == "difference" and self.backbone.tells_spread

    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        orders: Literal["both", "one"] = "both",
        progress: Progress | None = None,
    ) -> Tensor:
        """:meth:`encode_groups` and :meth:`hidden_rows` in one."""
        return self.hidden_rows(self.encode_groups(prompts, responses, orders=orders), progress=progress)
