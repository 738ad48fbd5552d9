"""What the Triton kernels share: the launch, tile arithmetic of triangles, and the elementwise functions.

Every kernel of this folder goes through :func:`launch`, so fused multiply-add is set explicitly (its default differs
between Triton versions) and a test can put a recorder in its place. Nothing here or beside it uses libdevice, inline
assembly or autotuning, nor atomics but to count (score_tail.py): the same source runs in the interpreter, and twice the
same input gives the same bits.
"""

import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import heuristics

IDENTITY = tl.constexpr(0)
COSINE = tl.constexpr(1)
TANH = tl.constexpr(2)

EDGE = tl.constexpr(128)
"""Edge of the packed tiles of U (``rmcore.ops.reference.TILE``)."""
AREA = tl.constexpr(128 * 128)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and taking it away rounds |t| < 2^22 to an integer
# sin(2πq) = q · S(q²) on |q| ≤ 1/4, fitted for the least largest error: 3.4e-9, below float32's own rounding.
_S0 = tl.constexpr(6.283185160)
_S1 = tl.constexpr(-41.34165592)
_S2 = tl.constexpr(81.60100407)
_S3 = tl.constexpr(-76.54978229)
_S4 = tl.constexpr(39.53670607)


local = threading.local()
"""``recorder``: what takes this thread's launches instead of the device, or None."""


DIRECT = [True]
"""Whether kernels that are compiled already are started without Triton's own look-up of them."""
_known: dict[tuple[object, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int, **constants: Any) -> None:
    """Run ``kernel`` over ``grid``, or hand it to this thread's recorder (launches.py)."""
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **constants}
    if "PDL" in kernel.arg_names:
        options["PDL"] = heuristics.FORMS["launch"] == "overlapped"
        if options["PDL"]:
            options["launch_pdl"] = True
    recorder = getattr(local, "recorder", None)
    if recorder is not None:
        recorder.launch(kernel, grid, arguments, options)
    elif not DIRECT[0] or not isinstance(kernel, triton.runtime.JITFunction) or not _directly():
        kernel[grid](*arguments, **options)
    else:
        _start(kernel, grid, arguments, options)


def _directly() -> bool:
    """Whether nobody wants to hear of launches, as profilers do, and the device is one whose launcher we know."""
    runtime = triton.knobs.runtime
    return not (runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or torch.version.hip)


def _start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What ``kernel[grid](...)`` does, without the 30 µs a launch that Triton takes to bind and to specialise.

    Which compiled kernel it is depends on the options and on what Triton knows of an argument: a tensor's dtype and
    whether it lies at a multiple of 16 bytes; whether a number is 1, a multiple of 16, or of 64 bits.
    """
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key: list[object] = [id(kernel), device, *options.values()]
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            key += argument.dtype, not address & 15
            values.append(address)
            continue
        if type(argument) is int:
            wide = 0 if -(1 << 31) <= argument < 1 << 31 else 64
            key.append(1 if argument == 1 else wide if argument & 15 else wide + 16)
        else:
            key.append(type(argument))
        values.append(argument)
    compiled = _known.get(tuple(key))
    if compiled is None:
        compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled  # compiled in the background
        _known[tuple(key)] = compiled
    values += [options[name] for name in kernel.arg_names[len(arguments) :]]
    x, y, z = (*grid, 1, 1)[:3]
    # The three None: launch metadata and hooks, which only profilers want.
    compiled.run(
        x,
        y,
        z,
        driver.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *values,
    )


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A workspace: memory whose contents do not matter and that no caller sees after the call."""
    recorder = getattr(local, "recorder", None)
    if recorder is not None:
        made: Tensor = recorder.empty(shape, dtype, device)
        return made
    return torch.empty(shape, dtype=dtype, device=device)


@triton.jit
def after_the_last(PDL: tl.constexpr):
    """Nothing of this kernel runs before the one launched before it is done, and the next one may get ready.

    What is gained is the launch: the next kernel's programs are placed while this one's last are still at work. It is
    safe because every kernel waits here, before it reads or writes anything.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def cos_turns(t):
    """cos(2πt): absolute error below 2^-22 for any finite t, NaN for the others.

    r = t − round(t) is exact, cos(2πr) = −sin(2π(|r| − ¼)), and |r| − ¼ is exact where the sine is small. From 2^22
    turns on that way of rounding ends; such a t has at most a half behind the point, which floor gives.
    """
    r = tl.where(tl.abs(t) < 4194304.0, t - ((t + _ROUND) - _ROUND), t - tl.floor(t))
    q = tl.abs(r) - 0.25
    s = q * q
    p = ((_S4 * s + _S3) * s + _S2) * s + _S1
    return -q * (p * s + _S0)


@triton.jit
def tanh(x):
    """tanh x: relative error below 3e-7. A short series near zero, where (1 − e)/(1 + e) would cancel."""
    s = x * x
    series = (((0.021869489 * s - 0.053968254) * s + 0.13333333) * s - 0.33333333) * s * x + x
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -far, far))


@triton.jit
def triangle_row(t):
    """The largest a with a(a+1)/2 ≤ t: the row of the t-th tile of a lower triangle."""
    a = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    a = tl.where(a * (a + 1) // 2 > t, a - 1, a)
    return tl.where((a + 1) * (a + 2) // 2 <= t, a + 1, a)


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and right columns of a BM×BN tile: an epilogue done in parts needs fewer registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def grouped(task, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Task number → (m, n), in strips of GROUP row tiles so that concurrent programs share operands in the L2."""
    strip = GROUP * tiles_n
    first = (task // strip) * GROUP
    width = tl.minimum(tiles_m - first, GROUP)
    local = task % strip
    return first + local % width, local // width
