"""Groups of responses made on the spot, and the verdicts of a judge that counts praise and blame."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from rmcore.judge.keys import pair_key

PRAISE = ["good", "clear", "right", "exact", "helpful", "kind"]
BLAME = ["bad", "vague", "wrong", "rude", "lazy", "odd"]
NEUTRAL = ["red", "blue", "green", "tree", "house", "river", "stone", "cloud"]


def merit(text: str) -> int:
    words = text.split()
    return sum(word in PRAISE for word in words) - sum(word in BLAME for word in words)


def groups_of(count: int) -> list[dict[str, Any]]:
    rng = random.Random(7)
    return [
        {
            "id": k,
            "prompt": " ".join([*rng.choices(NEUTRAL, k=4), str(k)]),
            "responses": [" ".join(rng.sample(PRAISE + BLAME + NEUTRAL, 5)) for _ in range(rng.choice([2, 3, 4]))],
        }
        for k in range(count)
    ]


def verdicts_of(groups: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for group in groups:
        for a, b in itertools.permutations(group["responses"], 2):
            lead = merit(a) - merit(b)
            found[pair_key(group["prompt"], a, b)] = "win" if lead > 0 else "loss" if lead < 0 else "tie"
    return found


def write_groups(path: Path, groups: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in groups))
    return path
