"""Devices by name, checked before anything is loaded."""

from __future__ import annotations

import torch

from rmcore._base.errors import reject

__all__ = ["checked_device"]


def checked_device(name: torch.device | str | None) -> torch.device:
    """The device called ``name``; for None CUDA where there is one, else the CPU.

    Raises InputError for what torch does not know, or this machine or build of torch does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "cpu" + (f", or cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "")
    try:
        device = torch.device(name)
        if device.type == "meta":
            reject("device", repr(str(name)), f"a device with memory: {expected}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # torch raises all of these
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        reject("device", f"{str(name)!r}, which cannot be used here ({reason})", expected)
    return device
