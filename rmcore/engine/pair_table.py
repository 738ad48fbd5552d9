"""All pairs i < j of a score call as one flat table, from the kernel through router and judge to the advantages.

    row   group  i  j     g     v     u     p̃    state
    0     0      0  1    0.8   0.3   1.1   0.7   head
    1     0      0  2   -0.2   2.1   1.5   2.0   judge
    ...

Rows are laid out as :class:`~rmcore.ops.pair_layout.PairLayout` says. The values are float64 on the head's device until
somebody asks for them elsewhere; what the host knows by itself (group, i, j, state) is on the CPU. Squares (K, K) are
made on demand, for all groups of equal K at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from rmcore._base.prompt import Response, content_key
from rmcore.engine.advantage import Baseline, group_rewards, rloo_advantages, rloo_variance
from rmcore.engine.comparisons import graph_advantages, graph_rewards
from rmcore.head.frozen import PairScores
from rmcore.head.posterior import all_finite
from rmcore.judge.base import Verdict
from rmcore.model.signal import PairSignal
from rmcore.ops import reference
from rmcore.ops.functional import Scores
from rmcore.ops.pair_layout import PairLayout, PartialLayout, squares
from rmcore.ops.reference import OrderMean

__all__ = ["PairLayout", "PairState", "PairTable"]


class PairState(IntEnum):
    """Who decided a pair."""

    HEAD = 0
    JUDGE = 1
    JUDGE_FAILED = 2
    """It was to be judged and there is no verdict: the head's p̃ stands."""
    UNAFFORDABLE = 3
    """The head has no p̃ for it, and the router's budget had no room."""
    IDENTICAL = 4
    """Equal responses: 0 by rule."""
    NOBODY = 5
    """Its inputs tell nothing (:class:`~rmcore.model.signal.PairSignal`) and no judge was asked: no preference."""


@dataclass(eq=False)
class PairTable:
    """Pairs and what is known of them.

    Attributes:
        layout: the columns group, i and j, and where a pair's hidden rows are.
        values: (4, Q) float64 on the head's device: g, v, u and p̃. Where the head has no answer p̃ is NaN and u is Inf.
        one_order: concat mode scored only (i, j), i < j.
        state: (Q,) uint8 on the CPU, a :class:`PairState` each.
        signal: (Q,) uint8 on the CPU, a :class:`~rmcore.model.signal.PairSignal` each: what the head had to go by,
            whoever decided.
        verdicts: of the pairs that were put to a judge, by row; those without an outcome too.
        complete: known on the host: every pair has a finite u and p̃. False: one may have none.
        silent: known on the host: ``signal`` has something else than ``PRESENT``.
        row_novelty: (ΣK,) float64 on the head's device, each response's distance from the training data
            (:mod:`rmcore.head.rows`), NaN where it has none; None where the head was not asked, or knows of none.
        parts: (Q,) float64 on the head's device by name: ``epistemic`` and ``aleatoric`` variance of a pair's logit, as
            far as they are told apart.
        measures: (ΣK,) float64 on the CPU by name: what the engine's uncertainty says of each response besides
            (:class:`~rmcore.head.estimators.PairEstimate`), NaN where it was left unread.
        shared: difference mode: v is the variance of a difference of two rows' scores, which a group's pairs share.
        alike: (Q,) bool on the head's device: the hidden rows of a pair are the same, as far as the head's scores tell:
            in concat mode those of its two orders. None where there is one order.
    """

    layout: PairLayout
    values: Tensor
    one_order: bool = False

    def __post_init__(self) -> None:
        self.state = torch.full((self.layout.pairs,), PairState.HEAD, dtype=torch.uint8)
        self.signal = torch.full((self.layout.pairs,), PairSignal.PRESENT, dtype=torch.uint8)
        self.verdicts: dict[int, Verdict] = {}
        self.complete = self.silent = False
        self.row_novelty: Tensor | None = None
        self.parts: dict[str, Tensor] = {}
        self.measures: dict[str, Tensor] = {}
        self.shared = False
        self.alike: Tensor | None = None

    def __len__(self) -> int:
        return self.layout.pairs

    # -- from the kernels --------------------------------------------------------------------------------------------

    @classmethod
    def of_difference(cls, scores: PairScores, layout: PairLayout, *, finite: bool = False) -> PairTable:
        """From difference mode: a row a pair already. ``finite``: the head has made sure that all are."""
        table = cls._of(torch.stack([value.double() for value in scores]), layout, finite=finite)
        table.row_novelty = None if scores.row_novelty is None else scores.row_novelty.double()
        table.shared = True
        table.alike = (table.logit == 0) & (table.variance == 0)
        return table

    @classmethod
    def of_concat(
        cls, scores: Scores, layout: PairLayout, orders: Literal["both", "one"], mean: OrderMean = "logits"
    ) -> PairTable:
        """From concat mode: with both orders g and p̃ are half their difference, v and u their mean (design 2.6).

        ``mean`` is the head's ``order_mean``: ``probabilities`` averages those of g and p̃ instead.
        """
        values = torch.stack([value.double() for value in scores])
        if orders == "one":
            return cls._of(values, layout, one_order=True)
        forward, backward = layout.pair_rows("concat").to(values.device).unbind(1)
        g, v, u, p = values
        both = [reference.mean_of_orders(x[forward], x[backward], mean) for x in (g, p)]
        sure = [(x[forward] + x[backward]) / 2 for x in (v, u)]
        table = cls._of(torch.stack([both[0], *sure, both[1]]), layout)
        table.alike = (g[forward] == g[backward]) & (v[forward] == v[backward])
        return table

    @classmethod
    def _of(cls, values: Tensor, layout: PairLayout, *, one_order: bool = False, finite: bool = False) -> PairTable:
        table = cls(layout, values, one_order)
        table.complete = finite or all_finite(values[2:])
        if not table.complete:
            bad = ~(values[2].isfinite() & values[3].isfinite())
            values[2].masked_fill_(bad, torch.inf)
            values[3].masked_fill_(bad, torch.nan)
        return table

    @classmethod
    def joined(cls, tables: Sequence[PairTable]) -> PairTable:
        """The tables of consecutive groups as one, with their states and verdicts."""
        if len(tables) == 1:
            return tables[0]
        if not tables:
            return cls(PairLayout([]), torch.empty(4, 0, dtype=torch.float64))
        sizes = torch.cat([table.layout.sizes for table in tables])
        edges = [own for table in tables if isinstance(table.layout, PartialLayout) for own in table.layout.edges]
        layout = PairLayout(sizes) if len(edges) < len(sizes) else PartialLayout(sizes, edges)
        result = cls(layout, torch.cat([table.values for table in tables], 1), tables[0].one_order)
        result.state = torch.cat([table.state for table in tables])
        result.signal = torch.cat([table.signal for table in tables])
        result.complete = all(table.complete for table in tables)
        result.silent = any(table.silent for table in tables)
        known = [table.row_novelty for table in tables if table.row_novelty is not None]
        result.row_novelty = torch.cat(known) if len(known) == len(tables) else None
        for name in sorted(set.intersection(*(set(table.parts) for table in tables))):
            result.parts[name] = torch.cat([table.parts[name] for table in tables])
        for name in sorted(set.intersection(*(set(table.measures) for table in tables))):
            result.measures[name] = torch.cat([table.measures[name] for table in tables])
        result.shared = all(table.shared for table in tables)
        alike = [table.alike for table in tables if table.alike is not None]
        result.alike = torch.cat(alike) if len(alike) == len(tables) else None
        start = 0
        for table in tables:
            result.verdicts |= {start + row: verdict for row, verdict in table.verdicts.items()}
            start += len(table)
        return result

    def without(self, groups: Tensor) -> PairTable:
        """A table that has not been routed yet, without some groups."""
        keep = torch.ones(len(self.layout), dtype=torch.bool)
        keep[groups] = False
        pairs = torch.repeat_interleave(keep, self.layout.pair_counts)
        sizes = self.layout.sizes[keep]
        layout = PairLayout(sizes)
        if isinstance(self.layout, PartialLayout):
            layout = PartialLayout(sizes, [self.layout.edges[k] for k in keep.nonzero()[:, 0].tolist()])
        table = PairTable(layout, self.values[:, pairs.to(self.values.device)], self.one_order)
        table.shared = self.shared
        table.alike = None if self.alike is None else self.alike[pairs.to(self.alike.device)]
        table.parts = {name: part[pairs.to(part.device)] for name, part in self.parts.items()}
        rows = torch.repeat_interleave(keep, self.layout.sizes)
        table.measures = {name: values[rows] for name, values in self.measures.items()}
        if self.row_novelty is not None:
            table.row_novelty = self.row_novelty[rows.to(self.row_novelty.device)]
        return table

    def narrowed(self, layout: PartialLayout) -> PairTable:
        """A table of all pairs that has not been routed yet, with some pairs only."""
        left = layout.among_all().to(self.values.device)
        table = PairTable(layout, self.values[:, left], self.one_order)
        table.parts = {name: part[left] for name, part in self.parts.items()}
        table.measures = dict(self.measures)
        table.complete, table.row_novelty, table.shared = self.complete, self.row_novelty, self.shared
        table.alike = None if self.alike is None else self.alike[left]
        return table

    # -- columns -----------------------------------------------------------------------------------------------------

    @property
    def logit(self) -> Tensor:
        """(Q,) g, on the head's device, as are the next three."""
        return self.values[0]

    @property
    def variance(self) -> Tensor:
        """(Q,) v."""
        return self.values[1]

    @property
    def uncertainty(self) -> Tensor:
        """(Q,) u, the head's own, also where somebody else decided."""
        return self.values[2]

    @property
    def preference(self) -> Tensor:
        """(Q,) p̃ of i against j."""
        return self.values[3]

    @property
    def novelty(self) -> Tensor | None:
        """(Q,) the mean of a pair's two ``row_novelty``, on the head's device; None without it."""
        if self.row_novelty is None:
            return None
        return reference.pair_novelty(self.row_novelty, self.layout.first, self.layout.second)

    @property
    def routed(self) -> Tensor:
        """(Q,) bool: to be decided by the judge."""
        return torch.isin(self.state, _ROUTED)

    # -- decisions ---------------------------------------------------------------------------------------------------

    def decide_identical(self, responses: Iterable[Sequence[Response]]) -> None:
        """Equal responses of a group: nothing between them, and no doubt about it."""
        known: dict[Hashable, int] = {}
        ids = [known.setdefault(content_key(text), len(known)) for group in responses for text in group]
        if len(known) == len(ids):
            return
        by_response = torch.tensor(ids)
        same = by_response[self.layout.first] == by_response[self.layout.second]
        self.state[same] = PairState.IDENTICAL
        decided = self.values.new_tensor([0.0, 0.0, 1.0, 0.0])[:, None]
        self.values = torch.where(same.to(self.values.device), decided, self.values)
        self.parts = {name: part.masked_fill(same.to(part.device), 0.0) for name, part in self.parts.items()}

    def silence(self, signal: Tensor) -> None:
        """Take back what the head says of pairs whose inputs tell nothing: p̃ becomes NaN and u Inf.

        Equal responses stay decided by rule; a pair with an unread text, whose g and v mean nothing, does not.

        Args:
            signal: (Q,) uint8, a :class:`~rmcore.model.signal.PairSignal` each, on the CPU.
        """
        if not bool(signal.any()):
            return
        self.complete, self.silent = False, True
        unread = signal == PairSignal.UNREAD
        self.state[unread] = PairState.HEAD
        self.signal = torch.where(self.state == PairState.IDENTICAL, int(PairSignal.PRESENT), signal)
        told = self.values.new_tensor([torch.nan, torch.nan, torch.inf, torch.nan])[:, None]
        self.values = torch.where(unread.to(self.values.device), told, self.values)
        self.parts = {name: part.masked_fill(unread.to(part.device), torch.nan) for name, part in self.parts.items()}
        silent = (self.signal != PairSignal.PRESENT).to(self.values.device)
        self.values[2:] = torch.where(silent, told[2:], self.values[2:])

    def undecided(self) -> Tensor:
        """(n,) rows that nobody but the head has decided yet."""
        return (self.state == PairState.HEAD).nonzero()[:, 0]

    def decide(self, rows: Sequence[int], verdicts: Sequence[Verdict], epsilon: float) -> None:
        """Put verdicts in: p̃ = J where there is one, the head's elsewhere."""
        self.verdicts.update(zip(rows, verdicts, strict=True))
        found = [(row, v.preference) for row, v in zip(rows, verdicts, strict=True) if v.preference is not None]
        self.state[torch.tensor(rows, dtype=torch.int64)] = PairState.JUDGE_FAILED
        if found:
            judged, preferences = torch.tensor([row for row, _ in found]), torch.tensor([q for _, q in found])
            self.state[judged] = PairState.JUDGE
            values = reference.verdict_logit(preferences.double(), epsilon)
            self.preference[judged.to(self.values.device)] = values.to(self.values.device)

    # -- by group ----------------------------------------------------------------------------------------------------

    @property
    def partial(self) -> bool:
        """Whether some pairs were not compared, by design."""
        return isinstance(self.layout, PartialLayout)

    def advantages(self) -> Tensor:
        """(ΣK,) leave-one-out advantages on the CPU: means over all pairs, or least squares over those compared."""
        if self.partial:
            return self.per_response(lambda p: graph_advantages(p)[0])
        return self.per_response(lambda p: rloo_advantages(p, complete=self.complete))

    def rewards(self, baseline: Baseline) -> Tensor:
        """(ΣK,) rewards that give the advantages back under a baseline."""
        if self.partial:
            return self.per_response(lambda p: graph_rewards(p, baseline))
        return self.per_response(lambda p: group_rewards(p, baseline, complete=self.complete))

    def advantage_variance(self) -> Tensor | None:
        """(ΣK,) on the CPU, of :meth:`advantages`: what the head's posterior leaves open of them, u taken as it is.

        None in concat mode, whose pairs have no covariance, and where a design left pairs out, whose v is not known.
        """
        if not self.shared or self.partial:
            return None
        judged = (self.state == PairState.JUDGE).to(self.values.device)
        weight = torch.where(judged, 0.0, 1 / self.uncertainty).masked_fill(self.preference.isnan(), torch.nan)
        result = torch.empty(self.layout.responses, dtype=torch.float64)
        for block in self.layout.blocks:
            found = rloo_variance(*(squares(column, block, sign=1) for column in (self.variance, weight))).cpu()
            if block.responses is None:
                return found.flatten()
            result[block.responses] = found
        return result

    def per_response(self, of_squares: Callable[[Tensor], Tensor], column: Tensor | None = None) -> Tensor:
        """(ΣK,) on the CPU: what a function of squares, (n, K, K) → (n, K), says of each response.

        Args:
            of_squares: the function.
            column: (Q,) whose squares, the same above the diagonal and below; p̃, which is antisymmetric, if None.
        """
        result = torch.empty(self.layout.responses, dtype=torch.float64)
        column, sign = (self.preference, -1) if column is None else (column, 1)
        for block in self.layout.blocks:
            values = of_squares(squares(column, block, sign=sign)).cpu()
            if block.responses is None:
                return values.flatten()
            result[block.responses] = values
        return result

    def squares(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """For each group its number and its columns by name, each (K, K) on the CPU; in no order."""
        g, v, u, p = self.values.cpu()
        columns = {
            "preference": (p, -1, 0.0),  # value below the diagonal: times -1; on it: 0
            "uncertainty": (u, 1, 1.0),
            "logit": (g, -1, 0.0),
            "variance": (v, 1, 0.0),
            "routed": (self.routed, 1, False),
        } | {name: (part.cpu(), 1, 0.0) for name, part in self.parts.items()}
        for block in self.layout.blocks:
            made = [squares(column, block, sign=sign, diagonal=own) for column, sign, own in columns.values()]
            for number, *of_group in zip(block.groups.tolist(), *made, strict=True):
                yield number, dict(zip(columns, of_group, strict=True))


_ROUTED = torch.tensor([PairState.JUDGE, PairState.JUDGE_FAILED, PairState.UNAFFORDABLE], dtype=torch.uint8)
