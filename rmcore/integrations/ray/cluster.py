"""The Ray cluster to work on."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rmcore._base.errors import MissingPackageError, RmcoreError

__all__ = ["connect", "ray_module"]


def ray_module(name: str = "ray") -> Any:
    """``ray``, or a module of it; raises MissingPackageError naming the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is not installed; pip install 'rmcore[ray]'") from error


@contextmanager
def connect(address: str) -> Iterator[None]:
    """A cluster while the body runs: ``local`` starts one of this machine alone, ``auto`` and an address join one.

    Where this process is connected already, that cluster is used, whatever ``address`` says, and left as it is.

    Raises:
        MissingPackageError: ray is not installed.
        RmcoreError: there is no cluster at the address.
    """
    ray = ray_module()
    if ray.is_initialized():
        yield
        return
    where = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **where)
    except (ConnectionError, ValueError) as error:
        raise RmcoreError(f"no Ray cluster at {address!r}: {error}. 'local' starts one of this machine") from error
    try:
        yield
    finally:
        ray.shutdown()
