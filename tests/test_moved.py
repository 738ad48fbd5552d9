"""Names and modules that moved say where they are now."""

from __future__ import annotations

import importlib
import re

import pytest

import rmcore
from rmcore._base.moved import MODULES, NAMES


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_moved_module_names_its_new_home(name):
    with pytest.raises(
        ImportError, match=rf"^rmcore\.{re.escape(name)} has moved: it is {re.escape(MODULES[name])} now$"
    ):
        importlib.import_module(f"rmcore.{name}")
    importlib.import_module(MODULES[name])


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_moved_name_says_where_to_import_it_from(name):
    with pytest.raises(ImportError, match=rf"rmcore\.{name} has moved: import it from rmcore\.") as caught:
        getattr(rmcore, name)
    assert hasattr(importlib.import_module(str(caught.value).rsplit(" ", 1)[1]), name)


def test_from_import_of_a_moved_name_raises_with_the_same_words():
    with pytest.raises(ImportError, match=r"import it from rmcore\.engine\.routing"):
        exec("from rmcore import ThresholdRouter", {})


def test_a_submodule_of_a_moved_package_is_told_too():
    with pytest.raises(ImportError, match=r"rmcore\.routing has moved: it is rmcore\.engine\.routing now"):
        importlib.import_module("rmcore.routing.budget")


def test_errors_can_be_caught_by_a_public_name():
    from rmcore import errors

    with pytest.raises(errors.InputError):
        rmcore.rloo_advantages(__import__("torch").zeros(2, 3))


def test_the_errors_public_module_has_every_class_that_there_is():
    from rmcore import errors
    from rmcore._base import errors as defined
    from rmcore.errors import InputError

    assert InputError is defined.InputError
    classes = {name for name, value in vars(defined).items() if isinstance(value, type)}
    assert set(errors.__all__) == classes


def test_what_never_was_is_an_ordinary_error():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'rmcore\.nothing'"):
        importlib.import_module("rmcore.nothing")
    with pytest.raises(AttributeError, match="module 'rmcore' has no attribute 'nothing'"):
        rmcore.nothing  # noqa: B018
