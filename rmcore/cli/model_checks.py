"""Options that a model cannot go by, found out from its folder's JSON before it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base.errors import reject
from rmcore.cli.judge_options import as_options

if TYPE_CHECKING:
    from rmcore.engine.selection import Measure
    from rmcore.head.estimators import VarianceKind
    from rmcore.model.backbone import Deterministic
    from rmcore.model.described import Described
    from rmcore.model.text import OverlongPolicy

__all__ = ["check_options"]


def check_options(
    model: str,
    *,
    uncertainty: str | None = None,
    variance: VarianceKind | None = None,
    max_length: int | None = None,
    overlong: OverlongPolicy | None = None,
    deterministic: Deterministic | None = None,
    measure: Measure = "u",
    design: str = "all",
    novelty: bool = False,
    mode: str | None = None,
) -> None:
    """Raises what loading and asking it would: InputError for an option, by its name, CheckpointError for the model.

    What the folder does not say is left to those who load it.

    Args:
        model: a folder or a hub name.
        uncertainty: of ``--uncertainty``, as are the next four.
        variance: which part of it.
        max_length: most tokens of a text.
        overlong: what happens to longer ones.
        deterministic: as of loading.
        measure: of responses, by which a command goes.
        design: of comparisons.
        novelty: whether pairs are ranked by it.
        mode: the one that a command needs.
    """
    from rmcore.model.described import describe
    from rmcore.model.text import TextLimit

    with as_options(
        max_length="--max-length", overlong="--overlong", uncertainty="--uncertainty", variance="--variance"
    ):
        TextLimit(max_length, overlong or "error")
        known = describe(model)
        if known is None:
            return
        if max_length is not None:
            from rmcore.model.encoding.limits import check_positions

            check_positions(max_length, known.positions)
        _check_uncertainty(known, uncertainty, variance, deterministic, measure)
    if mode is not None and known.mode not in (None, mode):
        reject("model", f"one in {known.mode} mode", f"one in {mode} mode, whose pairs share the responses' rows")
    if known.mode == "concat" and design.startswith("swiss"):
        reject("--design", repr(design), "another in concat mode, where a standing takes all pairs to begin with")
    if novelty and known.mode is not None and not known.novelty:
        reject("--rank-by", "novelty", "another for this model, whose head has no row posterior, or fit the head again")


def _check_uncertainty(
    known: Described,
    uncertainty: str | None,
    variance: VarianceKind | None,
    deterministic: Deterministic | None,
    measure: Measure,
) -> None:
    from rmcore.head.estimators import check_part, estimator_named
    from rmcore.model.uncertainties import known_uncertainty

    name = known_uncertainty(uncertainty, known.features, known.estimators, known.uncertainty)
    if name is None:
        if variance in ("aleatoric", "total") and not known.spread:
            reject("variance", repr(variance), "'epistemic': the head alone tells no other part")
    else:
        if known.mode == "concat":
            reject("uncertainty", f"{name!r} in concat mode", "'head', or a model in difference mode")
        if deterministic == "batch":
            reject("uncertainty", f"{name!r} with --deterministic batch", "head: others score all pairs together")
        if variance is not None:
            check_part(variance, estimator_named(name))
    if measure != "u" and name != "urme":
        from rmcore.engine.selection import check_measured

        check_measured(measure, ())
