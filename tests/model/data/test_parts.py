"""Each process reads its part of the rows, all of them together every row once, in order."""

from __future__ import annotations

import gzip
import json

import pytest

from rmcore._base.errors import DataError, InputError
from rmcore.model.data import Part, read_preferences, read_rows

ROWS = [{"prompt": f"p{k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(10)]
LINES = "\n\n".join(json.dumps(row) for row in ROWS) + "\n"


def sources(folder):
    (folder / "rows.jsonl").write_text(LINES)
    (folder / "rows.json").write_text("  \n" + json.dumps(ROWS))
    (folder / "array.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    made = [str(path) for path in folder.iterdir() if path.name != "rows.json"]
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=3)
    datasets = pytest.importorskip("datasets").Dataset.from_list(ROWS)
    datasets.save_to_disk(folder / "saved")
    return [*made, str(folder / "rows.parquet"), str(folder / "saved"), datasets, ROWS]


def test_the_parts_are_the_whole(tmp_path):
    for source in sources(tmp_path):
        whole = list(read_rows(source))
        assert [row.value for row in whole] == ROWS
        for of in (2, 3, 7, 13):
            parts = [list(read_rows(source, Part(which, of))) for which in range(of)]
            assert [row for part in parts for row in part] == whole, (source, of)  # numbers of lines too
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_lines_of_others_are_not_parsed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES + "{broken\n")
    assert len(list(read_preferences(path, part=Part(0, 2)))) == 5
    with pytest.raises(DataError, match=r"rows.jsonl:20: not JSON"):
        list(read_preferences(path, part=Part(1, 2)))


@pytest.mark.parametrize(
    ("source", "part", "said"),
    [("-", Part(0, 2), "'-' in one of several processes"), (iter(ROWS), Part(0, 2), "list_iterator in one of"),
     (ROWS, Part(2, 2), "part: got 2 of 2")],
)  # fmt: skip
def test_what_has_no_parts_is_refused(source, part, said):
    with pytest.raises(InputError, match=said):
        list(read_rows(source, part))
