"""``rmcore train --attributes``: models of several attributes (URM, URME)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rmcore._base.errors import reject
from rmcore.cli.benchmark_options import numbers_of
from rmcore.cli.checks import Kept, save_or_say
from rmcore.cli.console import progress_bar
from rmcore.cli.files import file_read
from rmcore.cli.numbers import number
from rmcore.cli.train.options import HeadOptions

if TYPE_CHECKING:
    from rmcore._base.progress import Progress
    from rmcore.model.attribute_training import AttributeFit
    from rmcore.model.backbone import Backbone
    from rmcore.model.data import AttributeRow
    from rmcore.model.training_pairs import Preference

__all__ = ["AttributeOptions", "AttributePlan", "train_attributes"]


@dataclass(frozen=True)
class AttributeOptions:
    """The options of training by attributes."""

    attributes: Annotated[
        str | None,
        typer.Option(
            help="Train URM: the first argument is labelled responses then (prompt, response, a column an attribute), "
            "and these are its attributes, as in helpfulness,correctness,coherence,complexity,verbosity."
        ),
    ] = None
    pairs: Annotated[
        str | None,
        file_read(
            help="With --attributes: preferences for the gate and the head. Default: made of the labels.", rows=True
        ),
    ] = None
    prefer: Annotated[
        str | None,
        typer.Option(help="Without --pairs: the attribute that says which response is preferred; default: the first."),
    ] = None
    members: Annotated[int, number(help="With --attributes: heads; several are URME.", least=1)] = 1
    objective: Annotated[
        Literal["mle", "regression"],
        typer.Option(help="With --attributes: mle keeps σ, the reparametrised regression learns means alone."),
    ] = "mle"
    gate: Annotated[
        Literal["selu", "softmax", "none"],
        typer.Option(help="With --attributes: URM's network, ArmoRM's, or fixed weights."),
    ] = "selu"
    weights: Annotated[
        str | None,
        typer.Option(
            help="With --attributes: fixed weights, or where the gate starts, as in 0.3,0.74,0.46,0.47,-0.33."
        ),
    ] = None
    steps: Annotated[int, number(help="With --attributes: optimiser steps of each stage.", least=1)] = 1000
    label_range: Annotated[
        str | None,
        typer.Option(help="With --attributes: labels outside are errors, as in 1,5. HelpSteer2's attributes have 0,4."),
    ] = None


@dataclass(frozen=True)
class AttributePlan:
    """What is asked for, checked, and the data.

    Attributes:
        names: of the attributes.
        rows: labelled responses.
        preferences: given pairs; None where they are made of the labels.
        members: heads.
        prefer: the attribute that makes the pairs.
        training: for the heads.
    """

    names: tuple[str, ...]
    rows: list[AttributeRow]
    preferences: list[Preference] | None
    members: int
    prefer: str | None
    training: dict[str, Any]

    @classmethod
    def read(cls, given: AttributeOptions, source: str, columns: dict[str, str], mode: str) -> AttributePlan:
        """Check the options and read the data; raises InputError or DataError."""
        from rmcore.head.attributes import HELPSTEER2, URM_WEIGHTS, AttributeConfig, FitOptions, GateConfig
        from rmcore.model.data import read_attributes, read_preferences
        from rmcore.model.data.attributes import check_attributes

        assert given.attributes is not None
        if mode != "difference":
            reject("--mode", mode, "difference with --attributes: they are of a response")
        names = tuple(word.strip() for word in given.attributes.split(","))
        limits = numbers_of("--label-range", given.label_range)
        if given.label_range is not None and len(limits) != 2:
            reject("--label-range", repr(given.label_range), "two numbers, as in 0,4")
        check_attributes(names, (limits[0], limits[1]) if limits else None)
        if given.prefer is not None and (given.pairs is not None or given.prefer not in names):
            reject("--prefer", repr(given.prefer), f"one of {', '.join(names)}, without --pairs")
        weights = numbers_of("--weights", given.weights) or None
        gate = None if given.gate == "none" else GateConfig(given.gate)
        if gate is None and weights is None and names == HELPSTEER2:
            weights = URM_WEIGHTS
        AttributeConfig(1, names, weights=weights, gate=gate)  # what does not fit is told now
        own = {name: column for name, column in columns.items() if name in (*names, "prompt", "response")}
        rows = list(read_attributes(source, names, own, limits=(limits[0], limits[1]) if limits else None))
        if not rows:
            reject("preferences", "no lines", "at least one labelled response")
        items = None if given.pairs is None else list(read_preferences(given.pairs, _others(columns, names)))
        if items is not None and not items:
            reject("--pairs", "no lines", "at least one")
        return cls(
            names,
            rows,
            items,
            given.members,
            given.prefer,
            {
                "gate": gate,
                "weights": weights,
                "objective": given.objective,
                "options": FitOptions(steps=given.steps),
                "gate_options": FitOptions(steps=given.steps),
            },
        )


def _others(columns: dict[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """The columns of pairs, where those of attributes are mapped beside."""
    return {name: column for name, column in columns.items() if name not in (*names, "response")}


def _told(found: AttributeFit, plan: AttributePlan) -> str:
    """One line about what was trained."""
    of = f"made of {plan.prefer or plan.names[0]}, {found.ties} ties left out" if found.derived else "given"
    heads = "" if plan.members == 1 else f"{plan.members} heads; "
    return (
        f"{found.responses} labelled responses, {len(plan.names)} attributes; {found.pairs} pairs ({of}); {heads}"
        f"training accuracy {100 * found.accuracy:.1f}%"
    )


def _plan_progress(bar: Any) -> Progress:
    """Shows on ``bar`` what is done, tokens or steps."""
    task = bar.add_task("encoding", total=None)

    def update(stage: str, done: int, total: int) -> None:
        if total:
            unit = "tokens" if stage == "encoding" else "steps"
            bar.update(task, description=f"{stage} ({unit})", completed=done, total=total)

    return update


def train_attributes(
    plan: AttributePlan,
    spine: Backbone,
    head: HeadOptions,
    out: Path,
    kept: Kept,
    *,
    storing: Literal["name", "embed"],
) -> str:
    """Train by attributes and save; returns a line about it."""
    from rmcore.model.attribute_training import fit_attribute_model

    with progress_bar() as bar:
        model, found = fit_attribute_model(
            spine,
            plan.rows,
            plan.names,
            preferences=plan.preferences,
            prefer=plan.prefer,
            members=plan.members,
            config=head.config(spine.hidden_size),
            dtype=head.serving_dtype,
            seed=head.seed,
            progress=_plan_progress(bar),
            **plan.training,
        )
    save_or_say(out, lambda path: model.save_pretrained(path, backbone=storing), kept)
    return _told(found, plan)
