"""llama.cpp's own OpenAI-compatible server over a GGUF file, in this process: the package xllamacpp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rmcore._base.errors import InputError

__all__ = ["PORT", "served"]

PORT = 8173
"""Where it listens unless told otherwise: the same every time, since a store files replies under the address."""


@contextmanager
def served(gguf: Path, *, slots: int = 2, context: int = 4096, threads: int = 1, port: int = PORT) -> Iterator[str]:
    """The base URL of a server of ``gguf``, until the block ends.

    Args:
        gguf: the model's file.
        slots: requests answered at once, in one batch.
        context: tokens of a slot.
        threads: of its arithmetic. They wait for each other by spinning: more than there are free cores makes every
            token a hundred times as long.
        port: 0 for any that is free.

    Raises InputError where xllamacpp is not installed.
    """
    try:
        import xllamacpp as llama
    except ImportError as error:
        raise InputError(
            "a llama.cpp server: expected xllamacpp to be installed: pip install 'rmcore[live]'"
        ) from error
    parameters = llama.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_parallel, parameters.n_ctx, parameters.warmup = slots, slots * context, False
    parameters.port = port
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = llama.Server(parameters)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server
