"""The Ray cluster to work on."""

from __future__ import annotations

import importlib
import os
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
        remedy = "'local' starts one of this machine"
        if isinstance(error, ConnectionError) and not os.environ.get("RAY_AUTH_MODE"):
            # To a cluster that it has found on this machine Ray sends the token by itself; to an address it is told to.
            remedy += (
                ". If it asks for a token (InvalidAuthToken): set RAY_AUTH_MODE=token, with the cluster's token in "
            )
            remedy += "~/.ray/auth_token or RAY_AUTH_TOKEN"
        raise RmcoreError(f"no Ray cluster at {address!r}: {error}. {remedy}") from error
    try:
        yield
    finally:
        ray.shutdown()
