"""gzip, bzip2, xz and zstd files of one member or several, read as far as they are whole.

Python's own readers lose what stands before an error (they read ahead), and bzip2's and xz's stop without a word at
whatever follows a member that is none, a damaged second member for one.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

__all__ = ["Members", "Zstd"]

_STEP, _TAKEN = 65_536, 512
_MAKE: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


class Members(io.RawIOBase):
    """The bytes of all members of a compressed file, one after another; zeros behind a member are padding.

    Args:
        stream: the compressed bytes, from their beginning.
        kind: ``gzip``, ``bzip2`` or ``xz``.

    Raises:
        OSError: on reading what is damaged, or is no further member; it names the byte. What stands more than 512 bytes
            before it has been read then.
        EOFError: on reading on where the file breaks off.
    """

    def __init__(self, stream: BinaryIO, kind: str) -> None:
        super().__init__()
        self._stream, self._kind = stream, kind
        self._at = 0  # bytes taken from the stream
        self._given, self._held = b"", b""  # compressed, not looked at yet; decompressed, not asked for yet
        self._inner: Any = None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` or the beginning of it; 0 at the end."""
        while not self._held:
            if self._inner is None and not self._begin():
                return 0
            self._go_on()
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count

    def _begin(self) -> bool:
        """Begin the next member; false where the file ends."""
        padded = self._at > 0
        while True:
            self._given = self._given or self._more()
            if padded:
                self._given = self._given.lstrip(b"\0")
            if self._given:
                self._inner = _MAKE[self._kind]()
                return True
            if not self._more_waits():
                return False

    def _go_on(self) -> None:
        waits = not getattr(self._inner, "needs_input", True)
        data = b"" if waits else self._given or self._more()
        if not data and not waits:
            raise EOFError(f"it breaks off after byte {self._at}")
        begins = self._at - len(data)
        try:
            self._held = self._inner.decompress(data, _STEP)
        except (OSError, zlib.error, lzma.LZMAError) as error:
            raise OSError(f"{error}; in or after byte {begins}") from error
        self._given = getattr(self._inner, "unconsumed_tail", b"")
        if self._inner.eof:
            self._given, self._inner = self._inner.unused_data, None

    def _more(self) -> bytes:
        found = self._stream.read(_TAKEN)
        self._at += len(found)
        return found

    def _more_waits(self) -> bool:
        self._given = self._more()
        return bool(self._given)


class Zstd(io.RawIOBase):
    """The bytes of a zstd file, as :class:`Members` gives those of others.

    Args:
        stream: the compressed bytes, from their beginning.
        reader: ``pyarrow.CompressedInputStream``.

    Raises:
        OSError: on reading what is damaged or breaks off, or is no further frame; it names the byte.
    """

    def __init__(self, stream: BinaryIO, reader: Callable[[Any, str], Any]) -> None:
        super().__init__()
        self._taken = _Taken(stream)
        self._inner = reader(self._taken, "zstd")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` or the beginning of it; 0 at the end."""
        try:
            data = self._inner.read(len(buffer))
        except OSError as error:
            ends = "Truncated" in str(error)
            place = f"it breaks off after byte {self._taken.at}" if ends else f"in or after byte {self._taken.begins}"
            raise OSError(f"{error}; {place}") from error
        buffer[: len(data)] = data
        return len(data)


class _Taken(io.RawIOBase):
    """The bytes of a stream, counted as they are taken, few at a time."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.begins = self.at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Some bytes."""
        found = self._stream.read(_TAKEN if size < 0 else min(size, _TAKEN))
        if found:
            self.begins, self.at = self.at, self.at + len(found)
        return found
