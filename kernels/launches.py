"""A call's launches, recorded once and made again with other pointers.

Triton binds, specialises and looks up every launch anew, some 20 µs of Python each. Calls that differ in nothing but
where two tensors lie (``hidden`` and ``out``) launch the same compiled kernels with the same numbers: those are kept
here as integers, and a replay is one call of the compiled kernel's launcher each. Workspaces are parts of one arena,
so that plans of many shapes share its memory; work of one stream runs in order, so they never meet.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from . import common

_ALIGNMENT = 256


class Call(NamedTuple):
    """A launch as the kernels' functions ask for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Recorder:
    """Takes launches instead of the device, and gives out workspaces from ``arena`` (None: only counts them)."""

    def __init__(self, arena: Tensor | None) -> None:
        self.arena, self.used = arena, 0
        self.calls: list[Call] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A workspace."""
        size, start = dtype.itemsize, self.used
        for length in shape:
            size *= length
        self.used += -(-size // _ALIGNMENT) * _ALIGNMENT
        if self.arena is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return self.arena[start : start + size].view(dtype).view(*shape)

    def launch(self, *call: Any) -> None:
        """A launch that is not made."""
        self.calls.append(Call(*call))


@contextmanager
def recording(arena: Tensor | None) -> Iterator[Recorder]:
    """What this thread launches inside goes to the recorder that is yielded."""
    recorder = Recorder(arena)
    common.local.recorder = recorder
    try:
        yield recorder
    finally:
        common.local.recorder = None


Step = Callable[[int, Tensor, Tensor], None]
"""(stream, hidden, out): one launch, with everything but these known."""


def steps(calls: Sequence[Call], hidden: Tensor, out: Tensor, fixed: set[int], arena: Tensor) -> list[Step] | None:
    """The recorded calls ready to be made; None where a tensor is neither of them, nor weights, nor of the arena.

    ``fixed``: addresses of tensors that live as long as the plan. Compiles what is not compiled yet, launches nothing.
    """
    made = []
    low, high = arena.data_ptr(), arena.data_ptr() + arena.numel()
    for call in calls:
        arguments, moving = list(call.arguments), []
        for place, argument in enumerate(arguments):
            if argument is hidden or argument is out:
                moving.append((place, argument is out))
            elif isinstance(argument, Tensor):
                address = argument.data_ptr()
                if address not in fixed and not low <= address < high:
                    return None
        compiled = call.kernel.run(*arguments, grid=call.grid, warmup=True, **call.options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled  # compiled in the background
        make = _interpreted if compiled is None else _compiled
        made.append(make(call, compiled, arguments, moving))
    return made


def _compiled(call: Call, compiled: Any, arguments: list[Any], moving: list[tuple[int, bool]]) -> Step:
    names = call.kernel.arg_names[len(arguments) :]
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    values += [call.options[name] for name in names]
    x, y, z = (*call.grid, 1, 1)[:3]
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    # The three None: launch metadata and hooks, which only profilers want.
    def still(stream: int, hidden: Tensor, out: Tensor) -> None:
        run(x, y, z, stream, function, packed, None, None, None, *values)

    def moved(stream: int, hidden: Tensor, out: Tensor) -> None:
        own = values.copy()  # two threads may replay one plan
        for place, is_out in moving:
            own[place] = (out if is_out else hidden).data_ptr()
        run(x, y, z, stream, function, packed, None, None, None, *own)

    return moved if moving else still


def _interpreted(call: Call, compiled: None, arguments: list[Any], moving: list[tuple[int, bool]]) -> Step:
    def step(stream: int, hidden: Tensor, out: Tensor) -> None:
        own = arguments.copy()
        for place, is_out in moving:
            own[place] = out if is_out else hidden
        call.kernel[call.grid](*own, **call.options)

    return step


def hooked() -> bool:
    """Whether somebody wants to hear of launches, as profilers do: then they must be made the usual way."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
