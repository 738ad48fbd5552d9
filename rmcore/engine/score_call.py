"""One score call under way: what it may be given, its groups, what is known so far, and the result it becomes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base import tracing
from rmcore._base.clock import Clock
from rmcore._base.errors import NonFiniteError, reject
from rmcore._base.progress import Progress
from rmcore._base.prompt import Prompt, Response, canonical_group, canonical_groups, check_nesting
from rmcore.engine.comparisons import design_pairs
from rmcore.engine.groups import GroupScores
from rmcore.engine.judging import JudgeQueue, Submission
from rmcore.engine.micro_batches import MicroBatch
from rmcore.engine.overlap import StoppedError
from rmcore.engine.pair_table import PairTable
from rmcore.engine.scored_part import ScoredPart
from rmcore.engine.usage import Overlap, Span, tally_by_judge
from rmcore.head.estimators import PairEstimator, VarianceKind
from rmcore.head.frozen import FrozenHead
from rmcore.head.posterior import all_finite, check_finite
from rmcore.judge.base import JudgeUsage, Pair
from rmcore.model.critiques import StateCounts, merged_texts, read_critiques
from rmcore.model.encoding_stats import EncodingStats
from rmcore.model.reward_model import RewardModel
from rmcore.model.signal import PairSignal, pair_signals
from rmcore.model.text import EncodedText, TextLimit
from rmcore.ops.dispatch import Backend
from rmcore.ops.pair_layout import PairLayout, PartialLayout

__all__ = ["OnError", "ScoreCall", "check_group_sizes", "check_nesting"]

OnError: TypeAlias = Literal["raise", "return"]
"""What becomes of a group that cannot be scored: ``raise`` ends the call; ``return`` leaves it out, as if it had never
been in the call, and hands its error back beside the scores of the others."""


# -- what a call may be given ----------------------------------------------------------------------------------------


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


def _errors(
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
class ScoreCall:
    """The state of one score call. The working thread writes; the judge's loop only reports progress.

    ``sizes``, ``prompts``, ``responses`` and ``hidden`` are of the groups that are to be scored. Those that cannot are
    taken out when that is found, under ``on_error="return"``; ``numbers`` says which of the caller's groups are left.
    """

    clock: Clock
    head: FrozenHead
    """The engine's head when the call began: an update meanwhile is for the next call."""
    model: RewardModel | None = None
    orders: Literal["both", "one"] = "both"
    nonfinite: Literal["raise", "route"] = "raise"
    backend: Backend = "auto"
    on_error: OnError = "raise"
    design: str = "all"
    """Which pairs of a group are compared."""
    estimator: PairEstimator | None = None
    """What scores pairs in the head's place."""
    variance: VarianceKind | None = None
    """Which part of the variance u is made of."""
    head_version: int | None = None
    """Which version of a head that changes ``head`` is."""
    novelty: bool = False
    """Whether the head is asked how far each response is from its training data."""
    prompts: Sequence[Prompt] | None = None
    responses: Sequence[Sequence[Response]] | None = None
    critiques: list[list[tuple[str, ...]]] | None = None
    """Of each group's responses, where these are scored behind critiques."""
    principles: list[str] | None = None
    """What the judge is to judge each group by; an empty one for its own."""
    counts: StateCounts | None = None
    """How many states each response has, where that is not one each."""
    progress: Progress | None = None
    limit: TextLimit | None = None
    """Of this call's texts, instead of the backbone's own."""
    encoding: EncodingStats | None = None
    sizes: list[int] = field(default_factory=list)
    hidden: Tensor | None = None
    deadline: float | None = None
    queue: JudgeQueue | None = None
    encoded: list[list[EncodedText]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    errors: dict[int, Exception] = field(default_factory=dict)
    parts: list[ScoredPart] = field(default_factory=list)
    kept: list[Tensor] | None = None
    """Hidden rows of each micro-batch, where a learner will want them."""
    spans: dict[str, list[Span]] = field(default_factory=dict)
    micro_batches: int = 1
    why_no_overlap: str = ""
    unwanted: threading.Event = field(default_factory=threading.Event)
    _layout: PairLayout | None = None
    """Of all groups that are left."""
    _designs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = self.clock.now()

    @property
    def one_order(self) -> bool:
        """Whether hidden rows are of pairs i < j only."""
        return self.head.config.mode == "concat" and self.orders == "one"

    # -- checking and encoding, before anything is scored ------------------------------------------------------------

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
            self.take_out(_errors(lambda *group: found.append(canonical_group(*group)), prompts, responses))
            self.prompts, self.responses = [prompt for prompt, _ in found], [group for _, group in found]
            sizes = [len(group) for group in self.responses]
        if self.sizes and sizes != self.sizes:
            reject("responses", f"group sizes {sizes}", f"{self.sizes} as in group_sizes")
        self.sizes = sizes
        self.numbers = self.numbers or list(range(len(sizes)))

    def check_critiques(self, critiques: object) -> None:
        """Take critiques of the texts there are; raises InputError for what is none, or what cannot go with them."""
        _, responses = self._texts()
        if self.kept is not None:
            reject(
                "critiques", "some for an engine with a learner", "None: verdicts teach a head of one state a response"
            )
        if self.errors:
            if not isinstance(critiques, Sequence) or isinstance(critiques, str):
                reject("critiques", type(critiques).__name__, "a list with one list a prompt")
            critiques = [own for k, own in enumerate(critiques) if k not in self.errors]
        self.critiques = read_critiques(critiques, responses)
        if self.head.config.mode == "difference":
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
        if self.head.config.mode != "difference":
            reject("states", "some in concat mode", "None, or a model in difference mode")
        if self.kept is not None:
            reject("states", "some for an engine with a learner", "None: verdicts teach a head of one state a response")
        self.counts = StateCounts.read(states, self.sizes)

    def check_hidden(self, hidden: Tensor) -> None:
        """Check that hidden rows fit the head and the groups."""
        config = self.head.config
        self.numbers = list(range(len(self.sizes)))
        if not isinstance(hidden, Tensor):
            reject("hidden", type(hidden).__name__, "a torch.Tensor")
        if hidden.dim() != 2 or hidden.shape[1] != config.hidden_size:
            reject("hidden", f"shape {tuple(hidden.shape)}", f"(rows, {config.hidden_size})")
        rows = self.layout_of(self.numbers).rows(config.mode, one_order=self.one_order)
        if self.counts is not None:
            rows = int(self.counts.rows.sum())
        if hidden.shape[0] != rows:
            unit = "response" if config.mode == "difference" else f"{'i < j' if self.one_order else 'ordered'} pair"
            unit = unit if self.counts is None else "state"
            reject("hidden", f"{hidden.shape[0]} rows", f"{rows}, one a {unit} for group sizes {self.sizes[:8]}")
        self.hidden = hidden

    def encode(self) -> None:
        """Encode every group's texts."""
        assert self.model is not None
        model = self.model
        settings: dict[str, Any] = {"orders": self.orders, "limit": self.limit}
        if self.design != "all" and model.mode == "concat":
            settings["compared"] = self.design_of
        prompts, responses = self._texts()
        critiques = self.critiques
        with self.time("backbone"):
            if self.on_error == "raise":
                self.encoded = model.encode_groups(prompts, responses, critiques=critiques, **settings)
                return
            model.notice_critiques(critiques is not None)
            left = iter(critiques or ())

            def encode(prompt: Prompt, group: Sequence[Response]) -> None:
                own: dict[str, Any] = {} if critiques is None else {"critiques": next(left)}
                self.encoded.append(model.encode_group(prompt, group, **own, **settings))

            errors = _errors(encode, prompts, responses)
        self.take_out(errors)

    def take_out(self, errors: Mapping[int, Exception]) -> None:
        """Go on without some groups, given by their numbers among those that are left."""
        if not errors:
            return
        self.note(errors)
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
        prompts, responses = self._texts()
        self.prompts, self.responses = [prompts[k] for k in left], [responses[k] for k in left]

    def _texts(self) -> tuple[Sequence[Prompt], Sequence[Sequence[Response]]]:
        assert self.prompts is not None
        assert self.responses is not None
        return self.prompts, self.responses

    def note(self, errors: Mapping[int, Exception]) -> None:
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
        self.note(errors)
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
        self.note(errors)
        keep = ~torch.isin(torch.repeat_interleave(self._row_counts(groups)), bad)
        return hidden[keep.to(hidden.device)], [k for k in groups if k not in errors], table.without(bad)

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
        if self.design == "all" or self.head.config.mode == "difference":
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
        return self.layout_of(groups).row_counts(self.head.config.mode, one_order=self.one_order)

    # -- while it runs -----------------------------------------------------------------------------------------------

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the time inside as the stage's; raise StoppedError instead if nobody wants the result any more."""
        self.stop_if_unwanted()
        began = self.clock.now()
        try:
            with tracing.span(f"rmcore.{stage}"):
                yield
        finally:
            self.spans.setdefault(stage, []).append((began, self.clock.now()))

    def stop_if_unwanted(self) -> None:
        """Raise StoppedError if the caller was cancelled or the judging has failed."""
        if self.unwanted.is_set() or (self.queue is not None and self.queue.broken.is_set()):
            raise StoppedError

    def encoding_progress(self, part: MicroBatch) -> Progress:
        """A callback for one micro-batch that reports in terms of all, and stops the backbone between two passes."""
        total = sum(sum(len(text) for text in group) for group in self.encoded)

        def update(stage: str, done: int, of: int) -> None:
            self.stop_if_unwanted()
            if self.progress is not None:
                # Equal texts are encoded once, so the backbone may have less to do than the plan says.
                self.progress(stage, part.tokens_before + (part.tokens * done // of if of else part.tokens), total)

        return update

    def report_answers(self, done: int, asked: int) -> None:
        """Called on the judge's loop after each of its calls."""
        if self.progress is not None:
            self.progress("judging", done, asked)

    def find_silent(self, part: ScoredPart) -> None:
        """Mark a part's pairs whose inputs tell nothing: different responses with equal inputs, unread texts."""
        table, mode = part.table, self.head.config.mode
        if self.encoded:
            texts = [text for k in part.groups for text in self.encoded[k]]
            states = self.states_of(part.groups)
            if states is not None:
                texts = merged_texts(texts, states.flat.tolist())
            signal = pair_signals(texts, table.layout.pair_rows(mode, one_order=self.one_order), mode)
            if table.alike is not None:  # states may be the same where texts are not: a window's, the first token's
                signal = torch.where(signal == PairSignal.PRESENT, table.alike.cpu().to(torch.uint8), signal)
            if any(unread := [text.unread for text in texts]):
                mask = torch.tensor(unread)
                table.measures = {name: of.masked_fill(mask, torch.nan) for name, of in table.measures.items()}
                if table.row_novelty is not None:
                    table.row_novelty = table.row_novelty.masked_fill(mask.to(table.row_novelty.device), torch.nan)
        elif self.responses is not None and mode == "difference":
            # Hidden rows from elsewhere: v = ‖U(φ_i − φ_j)‖² is 0 where they are equal; answers' own spread is not.
            nothing = table.logit == 0 if "aleatoric" in table.parts else table.variance == 0
            signal = nothing.cpu().to(torch.uint8) * int(PairSignal.EQUAL_INPUTS)
        elif self.responses is not None and table.alike is not None:
            signal = table.alike.cpu().to(torch.uint8) * int(PairSignal.EQUAL_INPUTS)
        else:
            return
        table.silence(signal)

    def submit(self, part: ScoredPart, rows: Tensor, preference: Tensor, uncertainty: Tensor) -> None:
        """Hand rows (n,) of a part to the judge, with the head's p̃ and u of each; raises InputError without texts."""
        part.rows = rows.tolist()
        if not part.rows:
            part.submission = Submission([], usage=JudgeUsage())
            return
        if self.prompts is None or self.responses is None:
            reject("prompts, responses", "None", f"texts, since {len(part.rows)} pairs need the judge")
        assert self.queue is not None
        layout = part.table.layout
        columns = (layout.group[rows], layout.i[rows], layout.j[rows], preference, uncertainty)
        questions = []
        for number, i, j, p, u in zip(*(column.tolist() for column in columns), strict=True):
            group = part.groups[number]
            questions.append(
                Pair(
                    self.prompts[group],
                    self.responses[group][i],
                    self.responses[group][j],
                    id=f"{part.first + number}:{i}:{j}",
                    uncertainty=u,
                    preference=p if math.isfinite(p) else None,
                    deadline=self.deadline,
                    principle="" if self.principles is None else self.principles[group],
                )
            )
        part.submission = self.queue.submit(questions)

    # -- when all is known -------------------------------------------------------------------------------------------

    def result(self, epsilon: float) -> GroupScores:
        """Put the verdicts in: p̃ = J where there is one, the head's elsewhere."""
        verdicts = self.queue.verdicts if self.queue is not None else []
        for part in self.parts:
            if part.submission is not None and part.rows:
                part.table.decide(part.rows, [verdicts[slot] for slot in part.submission.slots], epsilon)
        table = PairTable.joined([part.table for part in self.parts])
        overlap = self._overlap()
        seconds = {stage: math.fsum(end - begin for begin, end in spans) for stage, spans in self.spans.items()}
        if verdicts:
            seconds["judge"] = overlap.judge_s
        seconds["total"] = self.clock.now() - self.started
        return GroupScores(
            table,
            seconds,
            self.encoding,
            tally_by_judge(verdicts),
            overlap,
            self.queue.unaccounted if self.queue is not None else 0,
            None if self.kept is None else torch.cat([torch.empty(0, self.head.config.hidden_size), *self.kept]),
            dict(sorted(self.errors.items())),
            self.head_version,
        )

    def _overlap(self) -> Overlap:
        busy = [span for spans in self.spans.values() for span in spans]
        judging = self.queue.spans if self.queue is not None else []
        return Overlap.of(judging, busy, micro_batches=self.micro_batches, why_not=self.why_no_overlap)
