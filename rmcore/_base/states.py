"""Saved states as strict pydantic models, and errors that name the field, what it holds and what was expected.

Imported where a state is read, so that what never reads one needs no pydantic.
"""

from __future__ import annotations

from typing import Annotated, Any, NoReturn, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from rmcore._base.errors import CheckpointError

__all__ = ["FirstVersion", "State", "checked", "refuse"]


def _first_version(value: int) -> int:
    if value != 1:
        raise ValueError("1")
    return value


FirstVersion: TypeAlias = Annotated[int, AfterValidator(_first_version)]
"""The version of a state that has had only one; no Literal, for which True would pass for 1."""


class State(BaseModel):
    """Base of all models of saved states.

    Strict: a text is no number, a number no boolean; nothing may be missing and nothing unknown be there.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], state: object, where: str) -> M:
    """``state`` as a ``model``.

    Args:
        model: what it must be.
        state: plain JSON values, or such a model already.
        where: what to call it in messages, such as ``router.budgets[0]``.

    Raises:
        CheckpointError: it is not. The message names the field, what it holds and what was expected.
    """
    try:
        return model.model_validate(state)
    except ValidationError as error:
        raise CheckpointError(_message(error.errors(include_url=False), where)) from None


def refuse(where: str, got: object, expected: str) -> NoReturn:
    """Raise for a field that is well-formed, and not what the object that loads it can take."""
    raise CheckpointError(f"{where}: got {str(got)[:80]!r}, expected {expected}")


def _message(problems: list[Any], where: str) -> str:
    first = problems[0]
    path = _path(where, first["loc"])
    if first["type"] in ("missing", "extra_forbidden"):
        parent = first["loc"][:-1]
        beside = [p for p in problems if p["loc"][:-1] == parent]
        missing, unknown = (
            sorted(str(p["loc"][-1]) for p in beside if p["type"] == kind) for kind in ("missing", "extra_forbidden")
        )
        return f"{_path(where, parent)}: fields missing {missing}, fields unknown {unknown}"
    if first["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"{path}: got {type(first['input']).__name__}, expected an object"
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{path}: got {str(first['input'])[:80]!r}, expected {expected}"


def _path(where: str, location: tuple[int | str, ...]) -> str:
    return where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
