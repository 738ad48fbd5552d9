"""Tables of the README and the docs are what the results files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmcore.bench.tables import LABELS, PAGES, fill

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_its_results_files_say(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- bench/results/cpu-score.json -->" in text
    assert fill(text, ROOT) == text, "run python -m rmcore.bench.tables"


def page_of(tmp_path: Path, rows: list[dict[str, object]]) -> str:
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(json.dumps({"rows": rows}))
    table = ["| ms | B = 1 | 16 |", "|---|---|---|", "| rmcore cpu, fp16 | 0 | 0 |", "| own words | 1 | 2 |"]
    loose = "| rmcore cpu, fp16 | 7 |"
    return "\n".join([loose, "<!-- bench/results/x.json -->", *table, "", loose])


def test_only_labelled_rows_of_a_marked_table_are_filled(tmp_path: Path) -> None:
    ours = {"suite": "score", "variant": "rmcore cpu", "dtype": "float16"}
    text = page_of(tmp_path, [ours | {"rows": 1, "median_s": 0.00999}, ours | {"rows": 16, "left_out": "4 s"}])
    assert "rmcore cpu, fp16" in LABELS
    assert fill(text, tmp_path) == text.replace(
        "| rmcore cpu, fp16 | 0 | 0 |", "| rmcore cpu, fp16 | 9.99 | left out |"
    )


def test_a_label_without_a_measurement_is_an_error(tmp_path: Path) -> None:
    text = page_of(tmp_path, [])
    with pytest.raises(KeyError, match="rmcore cpu float16 at B = 1"):
        fill(text, tmp_path)
