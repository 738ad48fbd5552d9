"""The processes of one ``torch.distributed`` job that fit one head together: :class:`Ranks`.

Three collectives are all a fit needs: :meth:`Ranks.share` (from rank 0), :meth:`Ranks.total` (a sum, in rank order)
and :meth:`Ranks.each` (a few numbers of every rank). They run on the CPU over gloo whatever the job trains with: what
they move is small beside the encoding (a step's sums for D = 4096 are 69 MB), it is float64, and a gloo transfer ends
with an error where a process was killed, where NCCL's waits.

No rank waits for one that is gone. Each writes a heartbeat to the job's store; rank 0 names one that fell silent, a
rank whose work raised says so there before it leaves, and whoever waits looks there between looks at its transfer.
Encoding may therefore take one rank hours longer than another, and a dead one is still told within ``patience``.
A rank whose torchrun is gone tells the others and ends, whatever it is at.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rmcore._base.errors import RankError, reject
from rmcore._base.launcher import Launcher, end_with_launcher
from rmcore.head.meeting import meet

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Ranks", "Shared", "end_with_launcher", "working"]

_FOREVER = timedelta(days=30)
"""Of a transfer: who is waited for is watched by heartbeat, not by a limit on how long its work may take."""
_made: Counter[str] = Counter()
"""How many :class:`Ranks` this process made of a group, so that those of one time know each other."""


class Shared(NamedTuple):
    """What rank 0 gave to all."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Ranks:
    """All processes of a group, as one of them sees them; made by every one at the same point. A context manager.

    Args:
        group: a gloo process group, used by nothing else meanwhile.
        store: of the job, where ranks tell each other how they are.
        patience: seconds without a heartbeat after which a rank is taken for dead. A killed process is noticed at once;
            this is for a machine that is gone, or a process that is stopped.

    Attributes:
        rank: of this process, 0 .. size − 1.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup, store: Store, *, patience: float = 60.0) -> None:
        if not patience > 0:
            reject("patience", patience, "a positive number of seconds")
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.patience = patience
        self._group, self._store = group, store.clone()  # type: ignore[attr-defined]
        self._interval = patience / 12
        self._names = {r: f"rank {r}" for r in range(self.size)}
        self._launcher = Launcher()
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, args=(store.clone(),), daemon=True)  # type: ignore[attr-defined]
        self._pulse.start()
        me = f"{socket.gethostname()}, process {os.getpid()}".encode()[:120].ljust(120)
        for r, name in enumerate(self.each(torch.tensor(list(me), dtype=torch.float64)).to(torch.uint8).tolist()):
            self._names[r] = f"rank {r} ({bytes(name).decode(errors='replace').strip()})"

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None, *, patience: float = 60.0) -> Ranks:
        """All processes of an initialised ``torch.distributed``, or those of a group of it; called by every one.

        Args:
            group: such as the data-parallel one; None for all.
            patience: see the class.

        Raises:
            InputError: ``torch.distributed`` is not initialised.
        """
        whole = dist.group.WORLD if group is None else group
        if whole is None:
            reject("group", "None without torch.distributed", "an initialised process group", "Start under torchrun")
        name = str(whole.group_name)
        _made[name] += 1
        own = dist.new_group(
            dist.get_process_group_ranks(whole), timeout=_FOREVER, backend="gloo", use_local_synchronization=True
        )
        prefix = f"rmcore/{name}/{_made[name]}"
        store = dist.PrefixStore(prefix, whole.get_group_store())  # type: ignore[attr-defined]
        return cls(own, store, patience=patience)

    @classmethod
    def here(cls, *, patience: float = 60.0, meet_within: float = 300.0) -> Ranks | None:
        """Those this process was started with (torchrun, or an initialised ``torch.distributed``); None if it is alone.

        Where only the environment says so (WORLD_SIZE, as torchrun sets it), ``torch.distributed`` is initialised, over
        gloo.

        Args:
            patience: see the class.
            meet_within: seconds until all ranks must have come, where ``torch.distributed`` is initialised here.

        Raises:
            RankError: some did not come, and the message says which; or the launcher or the job's store is gone.
            InputError: the environment has WORLD_SIZE but not the rest of what torchrun sets.
        """
        if not dist.is_available():
            return None
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            meet(meet_within)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        return cls.of(patience=patience)

    # -- collectives -------------------------------------------------------------------------------------------------

    def share(self, tensors: Mapping[str, Tensor] | None = None, values: Mapping[str, Any] | None = None) -> Shared:
        """What rank 0 gives, on every rank, bit for bit: tensors (on the CPU) and JSON values. Others give nothing."""
        from safetensors.torch import load, save

        payload, sizes = b"", torch.zeros(2, dtype=torch.int64)
        if self.rank == 0:
            told = json.dumps(dict(values or {})).encode()
            payload = told + save({name: t.detach().cpu().contiguous() for name, t in (tensors or {}).items()})
            sizes = torch.tensor([len(told), len(payload)])
        self._wait(dist.broadcast(sizes, group=self._group, group_src=0, async_op=True))
        told_bytes, all_bytes = sizes.tolist()
        data = torch.empty(all_bytes, dtype=torch.uint8)
        if self.rank == 0:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self._wait(dist.broadcast(data, group=self._group, group_src=0, async_op=True))
        received = payload if self.rank == 0 else data.numpy().tobytes()
        return Shared(load(received[told_bytes:]), json.loads(received[:told_bytes]))

    def total(self, vector: Tensor) -> Tensor:
        """(n,) float64 → the sum over all ranks, added in rank order: ((v₀ + v₁) + v₂) + …, the same bits everywhere.

        Each rank adds up one slice of all ranks' vectors and gives it to the others, so a rank sends and receives 2n
        numbers however many there are. (all_reduce sends as many, and adds in an order that depends on their number.)
        """
        if vector.dim() != 1 or vector.dtype != torch.float64:
            reject("vector", f"{tuple(vector.shape)} {vector.dtype}", "(n,) float64")
        width = -(-len(vector) // self.size)
        sent = torch.zeros(self.size * width, dtype=torch.float64)
        sent[: len(vector)] = vector.detach().cpu()
        slices = torch.empty_like(sent)
        self._wait(dist.all_to_all_single(slices, sent, group=self._group, async_op=True))
        first, *others = slices.view(self.size, width)
        added = first.clone()
        for other in others:
            added += other
        self._wait(dist.all_gather_into_tensor(sent, added, group=self._group, async_op=True))
        return sent[: len(vector)].to(vector.device)

    def each(self, vector: Tensor) -> Tensor:
        """(n,) float64 → (size, n), every rank's, on the CPU; n is the same on all ranks."""
        gathered = torch.empty(self.size * len(vector), dtype=torch.float64)
        mine = vector.detach().to("cpu", torch.float64).contiguous()
        self._wait(dist.all_gather_into_tensor(gathered, mine, group=self._group, async_op=True))
        return gathered.view(self.size, len(vector))

    def counts(self, mine: int) -> list[int]:
        """A whole number of every rank."""
        return [int(count) for count in self.each(torch.tensor([mine], dtype=torch.float64))[:, 0].tolist()]

    def rows(self, mine: Tensor, at: Tensor, count: int) -> Tensor:
        """(count, h) rows, on every rank: of each, ``mine`` (m, h) are those at ``at`` (m,); each is one rank's."""
        placed = torch.zeros(count, mine.shape[1], dtype=torch.float64)
        placed[at.cpu()] = mine.detach().to("cpu", torch.float64)
        return self.total(placed.flatten()).view(count, -1).to(mine)

    # -- how the others are ------------------------------------------------------------------------------------------

    @contextmanager
    def work(self, what: str) -> Iterator[None]:
        """Work that all ranks do; where it raises on this one, the others are told, and raise RankError."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            self._failed(what, error)
            raise

    def close(self) -> None:
        """Stop the heartbeat; the group is destroyed with its job."""
        if not self._ended.is_set():
            self._ended.set()
            self._pulse.join()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, RankError):
            self._failed("the job", error)
        self.close()

    def _wait(self, transfer: Any) -> None:
        """Until a transfer is through, or one of the others is known to be gone."""
        pause, look = 1e-5, time.monotonic() + self._interval
        while not transfer.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.002)
            if time.monotonic() >= look:
                self._look()
                look = time.monotonic() + self._interval
        try:
            transfer.wait()
        except RuntimeError as error:  # a connection broke
            raise self._broken(error) from error

    def _look(self) -> None:
        """Raise RankError where somebody told why the job cannot go on."""
        try:
            if self._store.check(["gone"]):
                raise self._told()
        except RuntimeError as error:  # who keeps the store (torchrun, or rank 0) is gone
            if isinstance(error, RankError):
                raise
            raise RankError(f"the job's store does not answer any more, so its keeper died ({error})", (0,)) from error

    def _broken(self, error: RuntimeError) -> RankError:
        """The error for a connection that broke: who of the others does not live any more."""
        try:
            before, deadline = self._beats(self._store), time.monotonic() + 4 * self._interval
            while time.monotonic() < deadline and not self._store.check(["gone"]):
                time.sleep(self._interval / 4)
            after = self._beats(self._store)
            silent = [r for r in range(self.size) if r != self.rank and after[r] == before[r] != b"end"]
            if silent or self._store.check(["gone"]):
                self._tell(silent, f"{', '.join(self._names[r] for r in silent)} died")
                return self._told()
        except RuntimeError as lost:
            return RankError(f"a rank died, and the job's store with it ({lost})", (0,))
        return RankError(f"the connection to another rank broke, though all ranks live: {error}", ())

    def _failed(self, what: str, error: BaseException) -> None:
        self._tell([self.rank], f"{self._names[self.rank]} failed in {what}: {type(error).__name__}: {error}")

    def _tell(self, ranks: list[int], message: str) -> None:
        """Write down why the job cannot go on; the first to do so is believed."""
        with suppress(RuntimeError):  # the store went with its keeper: then the others see that
            self._store.compare_set("gone", "", json.dumps([ranks, message]))

    def _told(self) -> RankError:
        ranks, message = json.loads(self._store.get("gone"))
        return RankError(message, tuple(ranks))

    def _beats(self, store: Store) -> list[bytes]:
        """Each rank's last heartbeat; empty for one that has given none yet."""
        keys = [f"beat/{r}" for r in range(self.size)]
        if store.check(keys):
            return [bytes(value) for value in store.multi_get(keys)]
        return [bytes(store.get(key)) if store.check([key]) else b"" for key in keys]

    def _beat(self, store: Store) -> None:
        """The heartbeat, in a thread of its own: rank 0 watches the others', the others rank 0's, and all torchrun."""
        watched = list(range(1, self.size)) if self.rank == 0 else [0]
        heard = {r: (b"", time.monotonic()) for r in watched}
        with suppress(RuntimeError):  # the store's keeper is gone: told by _look
            for beat in range(1 << 62):
                store.set(f"beat/{self.rank}", str(beat))
                if self._ended.wait(self._interval):
                    store.set(f"beat/{self.rank}", "end")
                    return
                if self._launcher.gone:
                    told = f"{self._launcher} of {self._names[self.rank]} ended"
                    store.compare_set("gone", "", json.dumps([[self.rank], told]))
                    break
                beats = self._beats(store)
                for r in watched:
                    if beats[r] != heard[r][0] or beats[r] == b"end":
                        heard[r] = (beats[r], time.monotonic())
                silent = [r for r in watched if time.monotonic() - heard[r][1] > self.patience]
                if silent:
                    names = ", ".join(self._names[r] for r in silent)
                    store.compare_set(
                        "gone", "", json.dumps([silent, f"{names} gave no sign of life for {self.patience:g} s"])
                    )
        while not self._ended.wait(self._interval):  # who waits for a transfer has read why by then
            if self._launcher.gone:
                os.kill(os.getpid(), signal.SIGTERM)  # as the launcher would have, had it had the time


def working(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """:meth:`Ranks.work`, which is nothing for one process."""
    return nullcontext() if ranks is None else ranks.work(what)
