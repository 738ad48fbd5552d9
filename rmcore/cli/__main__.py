"""``python -m rmcore.cli``."""

from __future__ import annotations

from rmcore.cli import main

if __name__ == "__main__":
    main()
