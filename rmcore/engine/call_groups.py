"""The groups of one score call: what it may be given, checked, and which of them are left to be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import NonFiniteError, reject
from rmcore._base.prompt import Prompt, Response, canonical_group, canonical_groups, check_nesting
from rmcore.engine.comparisons import design_pairs
from rmcore.engine.pair_table import PairTable
from rmcore.head.config import HeadConfig
from rmcore.head.posterior import all_finite, check_finite
from rmcore.model.critiques import StateCounts, read_critiques
from rmcore.ops.pair_layout import PairLayout, PartialLayout

__all__ = ["CallGroups", "OnError", "check_group_sizes", "errors_by_group"]

OnError: TypeAlias = Literal["raise", "return"]
"""What becomes of a group that cannot be scored: ``raise`` ends the call; ``return`` leaves it out, as if it had never
been in the call, and hands its error back beside the scores of the others."""


def check_group_sizes(group_sizes: Sequence[int] | Tensor) -> list[int]:
    """K of each group as a list; raises InputError unless it holds positive integers, at least one."""
    given: Any = group_sizes.tolist() if isinstance(group_sizes, Tensor) else group_sizes
    if not isinstance(given, Iterable):
        reject("group_sizes", repr(given), "a sequence of positive integers")
    sizes = list(given)
    if not sizes:
        reject("group_sizes", "an empty list", "at least one group")
    if set(map(type, sizes)) == {int} and min(sizes) >= 1:
        return sizes
    for k, size in enumerate(sizes):  # which is it? A subclass of int is fine
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            reject(f"group_sizes[{k}]", size, "a positive integer")
    return sizes


def errors_by_group(
    check: Callable[[Prompt, Sequence[Response]], None],
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Response]],
) -> dict[int, Exception]:
    """What ``check`` raises, by group: whatever it is (a tokenizer's own, say), it is this group's alone."""
    errors: dict[int, Exception] = {}
    for k, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        try:
            check(prompt, group)
        except Exception as error:
            errors[k] = error
    return errors


@dataclass
class CallGroups:
    """What one score call was given, and which of its groups are left to be scored.

    ``sizes``, ``prompts``, ``responses`` and ``hidden`` are of the groups that are to be scored. Those that cannot are
    taken out when that is found, under ``on_error="return"``; ``numbers`` says which of the caller's groups are left.
    """

    config: HeadConfig
    orders: Literal["both", "one"] = "both"
    design: str = "all"
    """Which pairs of a group are compared."""
    on_error: OnError = "raise"
    learning: bool = False
    """Whether verdicts will teach the head."""
    prompts: Sequence[Prompt] | None = None
    responses: Sequence[Sequence[Response]] | None = None
    critiques: list[list[tuple[str, ...]]] | None = None
    """Of each group's responses, where these are scored behind critiques."""
    principles: list[str] | None = None
    """What the judge is to judge each group by; an empty one for its own."""
    counts: StateCounts | None = None
    """How many states each response has, where that is not one each."""
    sizes: list[int] = field(default_factory=list)
    hidden: Tensor | None = None
    numbers: list[int] = field(default_factory=list)
    errors: dict[int, Exception] = field(default_factory=dict)
    _layout: PairLayout | None = None
    """Of all groups that are left."""
    _designs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def one_order(self) -> bool:
        """Whether hidden rows are of pairs i < j only."""
        return self.config.mode == "concat" and self.orders == "one"

    # -- what came, checked ------------------------------------------------------------------------------------------

    def check_texts(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]]) -> None:
        """Take texts: check every group's, and that the groups are of the sizes given (for hidden rows)."""
        if self.on_error == "raise":
            self.prompts, self.responses = canonical_groups(prompts, responses)
            sizes = [len(group) for group in self.responses]
        else:
            check_nesting(prompts, responses)
            self.prompts, self.responses = prompts, responses
            if self.sizes and len(responses) != len(self.sizes):
                reject("responses", f"{len(responses)} groups", f"{len(self.sizes)}, as in group_sizes")
            self.numbers = list(range(len(prompts)))
            found: list[tuple[Prompt, Sequence[Response]]] = []
            self.take_out(errors_by_group(lambda *group: found.append(canonical_group(*group)), prompts, responses))
            self.prompts, self.responses = [prompt for prompt, _ in found], [group for _, group in found]
            sizes = [len(group) for group in self.responses]
        if self.sizes and sizes != self.sizes:
            reject("responses", f"group sizes {sizes}", f"{self.sizes} as in group_sizes")
        self.sizes = sizes
        self.numbers = self.numbers or list(range(len(sizes)))

    def check_critiques(self, critiques: object) -> None:
        """Take critiques of the texts there are; raises InputError for what is none, or what cannot go with them."""
        _, responses = self.texts()
        if self.learning:
            reject(
                "critiques", "some for an engine with a learner", "None: verdicts teach a head of one state a response"
            )
        if self.errors:
            if not isinstance(critiques, Sequence) or isinstance(critiques, str):
                reject("critiques", type(critiques).__name__, "a list with one list a prompt")
            critiques = [own for k, own in enumerate(critiques) if k not in self.errors]
        self.critiques = read_critiques(critiques, responses)
        if self.config.mode == "difference":
            self.counts = StateCounts.of(self.critiques)

    def check_principles(self, principles: Sequence[str]) -> None:
        """Take a principle a group; raises InputError for what is none."""
        if isinstance(principles, str) or len(principles) != len(self.sizes) + len(self.errors):
            expected = f"{len(self.sizes) + len(self.errors)} texts, one a group"
            reject("principles", "one text" if isinstance(principles, str) else len(principles), expected)
        for k, principle in enumerate(principles):
            if not isinstance(principle, str):
                reject(f"principles[{k}]", type(principle).__name__, "a text, empty for the judge's own")
        self.principles = [own for k, own in enumerate(principles) if k not in self.errors]

    def check_states(self, states: object) -> None:
        """Take how many hidden rows each response has; raises InputError for what does not fit the groups."""
        if self.config.mode != "difference":
            reject("states", "some in concat mode", "None, or a model in difference mode")
        if self.learning:
            reject("states", "some for an engine with a learner", "None: verdicts teach a head of one state a response")
        self.counts = StateCounts.read(states, self.sizes)

    def check_hidden(self, hidden: Tensor) -> None:
        """Check that hidden rows fit the head and the groups."""
        self.numbers = list(range(len(self.sizes)))
        if not isinstance(hidden, Tensor):
            reject("hidden", type(hidden).__name__, "a torch.Tensor")
        if hidden.dim() != 2 or hidden.shape[1] != self.config.hidden_size:
            reject("hidden", f"shape {tuple(hidden.shape)}", f"(rows, {self.config.hidden_size})")
        rows = self.layout_of(self.numbers).rows(self.config.mode, one_order=self.one_order)
        if self.counts is not None:
            rows = int(self.counts.rows.sum())
        if hidden.shape[0] != rows:
            unit = "state" if self.counts is not None else "response"
            if self.config.mode == "concat":
                unit = f"{'i < j' if self.one_order else 'ordered'} pair"
            reject("hidden", f"{hidden.shape[0]} rows", f"{rows}, one a {unit} for group sizes {self.sizes[:8]}")
        self.hidden = hidden

    def texts(self) -> tuple[Sequence[Prompt], Sequence[Sequence[Response]]]:
        """Prompts and responses of the groups that are left; there must be some."""
        assert self.prompts is not None
        assert self.responses is not None
        return self.prompts, self.responses

    # -- those that cannot be scored -----------------------------------------------------------------------------------

    def take_out(self, errors: Mapping[int, Exception]) -> None:
        """Go on without some groups, given by their numbers among those that are left."""
        if not errors:
            return
        self._note(errors)
        left = [k for k in range(len(self.numbers)) if k not in errors]
        if self.hidden is not None:
            counts = self._row_counts(list(range(len(self.sizes))))
            keep = torch.tensor([k not in errors for k in range(len(counts))])
            self.hidden = self.hidden[torch.repeat_interleave(keep, counts).to(self.hidden.device)]
        self.numbers = [self.numbers[k] for k in left]
        if self.sizes:
            self.sizes = [self.sizes[k] for k in left]
        if self.critiques is not None:
            self.critiques = [self.critiques[k] for k in left]
        if self.principles is not None:
            self.principles = [self.principles[k] for k in left]
        if self.counts is not None:
            self.counts = self.counts.part(left)
        prompts, responses = self.texts()
        self.prompts, self.responses = [prompts[k] for k in left], [responses[k] for k in left]

    def _note(self, errors: Mapping[int, Exception]) -> None:
        """Note groups' errors, under the caller's numbers."""
        self.errors.update((self.numbers[k], error) for k, error in errors.items())

    def without_bad_rows(self, hidden: Tensor, groups: list[int]) -> tuple[Tensor, list[int]]:
        """Hidden rows and their groups (``numbers`` of this call), but for groups with a row that is NaN or Inf."""
        if all_finite(hidden):
            return hidden, groups
        finite = torch.isfinite(hidden).all(dim=1).cpu()
        if bool(finite.all()):
            return hidden, groups
        counts = self._row_counts(groups)
        owner = torch.repeat_interleave(counts)
        bad = owner[~finite].unique()
        errors: dict[int, Exception] = {}
        for k in bad.tolist():
            try:
                check_finite(hidden[(owner == k).to(hidden.device)])
            except NonFiniteError as error:
                errors[groups[k]] = error
        self._note(errors)
        keep = ~torch.isin(owner, bad)
        return hidden[keep.to(hidden.device)], [k for k in groups if k not in errors]

    def without_overflows(
        self, hidden: Tensor, groups: list[int], table: PairTable
    ) -> tuple[Tensor, list[int], PairTable]:
        """The same for groups with finite rows that overflow in the head."""
        if table.complete:
            return hidden, groups, table
        finite = table.uncertainty.isfinite().cpu()
        bad = table.layout.group[~finite].unique()
        message = "hidden: got finite rows that overflow the head's dtype, expected results to be finite"
        errors = {groups[k]: NonFiniteError(message) for k in bad.tolist()}
        self._note(errors)
        keep = ~torch.isin(torch.repeat_interleave(self._row_counts(groups)), bad)
        return hidden[keep.to(hidden.device)], [k for k in groups if k not in errors], table.without(bad)

    # -- how rows lie ------------------------------------------------------------------------------------------------

    def layout_of(self, groups: list[int]) -> PairLayout:
        """The layout of some of the groups, given in order; of all, as nearly always, it is made once.

        In difference mode of all pairs: what a design leaves out is left out when the head has scored.
        """
        if len(groups) < len(self.sizes):
            return self._layout_of([self.sizes[k] for k in groups])
        if self._layout is None or len(self._layout) != len(self.sizes):
            self._layout = self._layout_of(self.sizes)
        return self._layout

    def _layout_of(self, sizes: list[int]) -> PairLayout:
        if self.design == "all" or self.config.mode == "difference":
            return PairLayout(sizes)
        return PartialLayout(sizes, [self.design_of(size) for size in sizes])

    def design_of(self, size: int) -> Tensor:
        """(P, 2) the pairs of a design that depends on K alone."""
        if size not in self._designs:
            self._designs[size] = design_pairs(size, self.design)
        return self._designs[size]

    def states_of(self, groups: list[int]) -> StateCounts | None:
        """How many hidden rows each response of some of the groups has; None: one each."""
        return None if self.counts is None else self.counts.part(groups)

    def _row_counts(self, groups: list[int]) -> Tensor:
        states = self.states_of(groups)
        if states is not None:
            return states.rows
        return self.layout_of(groups).row_counts(self.config.mode, one_order=self.one_order)
