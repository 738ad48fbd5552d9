"""``python -m rmcore``, which ``accelerate launch -m rmcore`` and ``torchrun -m rmcore`` start on every rank."""

from __future__ import annotations

from rmcore.cli import main

if __name__ == "__main__":
    main()
