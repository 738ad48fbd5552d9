"""accelerate's FSDP on processors: it shards over devices that it knows as accelerators, and has gloo for DDP alone.

    accelerate launch --use_fsdp ... -m support.accelerate_gloo MODULE ARGUMENTS...

One answer of accelerate's is replaced, which process group there is to be; all else is its own code.
"""

from __future__ import annotations

import os
import runpy
import sys


def shard_over_gloo() -> None:
    """Where ``accelerate launch --use_fsdp`` has asked for sharding: over gloo, as if the processors were GPUs."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *given, **named: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    shard_over_gloo()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
