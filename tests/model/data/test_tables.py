"""Parquet, ``datasets`` objects, folders and hub names; other names for columns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import DataError, InputError
from rmcore.model.data import parse_columns, read_groups, read_preferences, read_rows
from rmcore.model.data.parts import Part

USER = {"role": "user", "content": "hi"}
ROWS = [
    {"prompt": [USER], "chosen": [{"role": "assistant", "content": f"yes {k}"}], "rejected": "no", "margin": None}
    for k in range(600)
]


@pytest.fixture
def datasets() -> Any:
    return pytest.importorskip("datasets")


def uniform() -> list[dict[str, Any]]:
    return [{**row, "rejected": [{"role": "assistant", "content": "no"}]} for row in ROWS]


def test_parquet_is_read_from_a_file_and_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(uniform()), path)
    expected = [f"yes {k}" for k in range(600)]
    assert [pair.chosen for pair in read_preferences(path)] == expected
    with path.open("rb") as stream:
        monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": stream}))
        assert [pair.chosen for pair in read_preferences("-")] == expected
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        list(read_preferences(path))


def test_a_bad_row_of_a_table_is_named(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": None, "rejected": "c"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    reader = read_preferences(path)
    assert next(reader).chosen == "b"
    with pytest.raises(DataError, match=r"p.parquet, row 2: chosen") as caught:
        next(reader)
    assert (caught.value.line, caught.value.source) == (2, str(path))


def test_datasets_and_plain_rows_are_read(datasets: Any) -> None:
    expected = [f"yes {k}" for k in range(600)]
    assert [pair.chosen for pair in read_preferences(ROWS)] == expected
    dataset = datasets.Dataset.from_list(uniform())
    assert [pair.chosen for pair in read_preferences(dataset)] == expected
    assert [pair.chosen for pair in read_preferences(dataset.to_iterable_dataset())] == expected
    with pytest.raises(InputError, match="one split of it"):
        list(read_preferences(datasets.DatasetDict(train=dataset)))
    with pytest.raises(DataError, match=r"list, row 2: got a str, expected a mapping"):
        list(read_preferences([ROWS[0], "text"]))  # type: ignore[list-item]


def test_a_saved_dataset_is_a_folder(datasets: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_list(uniform()).save_to_disk(tmp_path / "saved")
    assert len(list(read_preferences(tmp_path / "saved"))) == 600
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match="not readable by datasets"):
        list(read_preferences(tmp_path / "saved"))


class Hub:
    """Stands for the hub: data sets by name, as ``load_dataset`` finds them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, datasets: Any, splits: list[str]) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.splits = splits
        self.dataset = datasets.Dataset.from_list(uniform()[:2])
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: self.splits)

    def load(self, name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        self.asked.append((name, config, split, revision))
        if name == "org/gone":
            raise FileNotFoundError("no such data set")
        if name == "org/far":
            raise ConnectionError("Couldn't reach it")
        return self.dataset


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://org/name", ("org/name", None, "only", None)),
        ("hf://org/name:test", ("org/name", None, "test", None)),
        ("hf://datasets/org/name:train[:10%]", ("org/name", None, "train[:10%]", None)),
        ("hf://org/name@v1.0/math:train", ("org/name", "math", "train", "v1.0")),
        ("hf://org/name@refs%2Fpr%2F1", ("org/name", None, "only", "refs/pr/1")),
    ],
)
def test_hub_names(datasets: Any, monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[Any, ...]) -> None:
    hub = Hub(monkeypatch, datasets, ["only"])
    assert [pair.chosen for pair in read_preferences(name)] == ["yes 0", "yes 1"]
    assert hub.asked == [asked]


def test_hub_errors_name_what_was_asked(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, datasets, ["train", "test"])
    with pytest.raises(InputError, match=r"splits \['train', 'test'\], expected one of them, as in hf://o/n:train"):
        list(read_preferences("hf://o/n"))
    with pytest.raises(DataError, match="hf://org/gone:train: FileNotFoundError: no such data set"):
        list(read_preferences("hf://org/gone:train"))
    with pytest.raises(
        DataError, match=r"Couldn't reach it\. Where .*: hf download org/far --repo-type dataset --local-dir"
    ):
        list(read_preferences("hf://org/far:train"))
    with pytest.raises(InputError, match="expected hf://org/name"):
        list(read_preferences("hf://name"))


@pytest.mark.parametrize(("missing", "data"), [("pyarrow", b"\x28\xb5\x2f\xfd...."), ("pyarrow", b"PAR1....")])
def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, data: bytes
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"pip install 'rmcore\[data\]'"):
        list(read_preferences(path))


def test_datasets_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'rmcore\[data\]'"):
        list(read_preferences("hf://org/name"))


def test_values_of_numpy_and_pandas_are_pythons_own(tmp_path: Path) -> None:
    """As rows of a DataFrame or of a formatted data set have them: arrays for lists, NA for nothing, in any column."""
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    more = {"state": numpy.arange(3.0), "margin": pandas.NA, "images": numpy.array([]), "label": numpy.float32(0.75)}
    assert [pair.label for pair in read_preferences([{**row, **more}, {**row, "label": pandas.NA}])] == [0.75, 1.0]
    with pytest.raises(DataError, match="images: got images, video or sound"):
        list(read_preferences([{**row, "images": numpy.array([1, 2])}]))
    for label in (numpy.True_, numpy.int8(0), numpy.array([0.75]), float("nan")):
        with pytest.raises(DataError, match="row 1: label: got "):
            list(read_preferences([{**row, "label": label}]))
    (group,) = read_groups([{"prompt": "q", "responses": numpy.array(["a", "b"], dtype=object), "id": numpy.int64(3)}])
    assert (group.responses, group.id) == (("a", "b"), 3)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(uniform()[:2]), tmp_path / "p.parquet")
    records = pandas.read_parquet(tmp_path / "p.parquet").to_dict("records")
    assert [pair.chosen for pair in read_preferences(records)] == ["yes 0", "yes 1"]


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_data_sets_in_another_format(datasets: Any, form: str) -> None:
    row = {**uniform()[0], "label": 0.75, "state": [1.0, 2.0]}
    (pair,) = read_preferences(datasets.Dataset.from_list([row]).with_format(form))
    assert (pair.prompt, pair.chosen, pair.label) == ([USER], "yes 0", 0.75)


def test_what_a_parquet_file_may_hold_besides(tmp_path: Path) -> None:
    """Messages as maps; a key twice in a map that nobody reads; a column twice; text that is none."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, maps = tmp_path / "p.parquet", pyarrow.map_(pyarrow.string(), pyarrow.string())

    def written(*more: Any, **columns: Any) -> Path:
        plain = {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"], **columns}
        names = [*plain, *(name for name, _ in more)]
        parquet.write_table(pyarrow.table([*plain.values(), *(value for _, value in more)], names=names), path)
        return path

    said = {
        name: pyarrow.array([[[("role", role), ("content", name)]]], pyarrow.list_(maps))
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }
    (pair,) = read_preferences(written(**said))
    assert (pair.prompt, pair.chosen) == ([{"role": "user", "content": "prompt"}], "chosen")
    (pair,) = read_preferences(written(meta=pyarrow.array([[("k", "1"), ("k", "2")]], maps)))
    assert pair.chosen == "a"
    with pytest.raises(DataError, match="got the column 'chosen' twice"):
        list(read_preferences(written(("chosen", ["c"]))))
    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    with pytest.raises(DataError, match=r"row 1: chosen: got a value that cannot be read \('utf-8' codec can't decode"):
        list(read_preferences(written(chosen=pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers))))


def test_values_that_python_has_nothing_for(tmp_path: Path) -> None:
    """They are refused by row and column where they are used, and only there."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, whole = tmp_path / "p.parquet", pyarrow.array([0, 2**60, 3], pyarrow.int64())
    text = [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffc")]
    days = pyarrow.array([0, 9_000_000, 3], pyarrow.int32()).cast(pyarrow.date32())
    twice = pyarrow.StructArray.from_arrays([whole, whole], names=["a", "a"])
    plain = {"prompt": ["p", "q", "r"], "chosen": ["a"] * 3, "rejected": ["b"] * 3}
    for odd in (
        days,
        pyarrow.ListArray.from_arrays([0, 1, 2, 3], days),
        whole.cast(pyarrow.timestamp("ms")),
        whole.cast(pyarrow.timestamp("ms", tz="Mars/Phobos")),
        whole.cast(pyarrow.duration("ms")),
        pyarrow.Array.from_buffers(pyarrow.string(), 3, text),
        twice,
    ):
        parquet.write_table(pyarrow.table({**plain, "extra": odd}), path)
        assert [pair.prompt for pair in read_preferences(path)] == ["p", "q", "r"]
        with pytest.raises(
            DataError, match=r", row [12]: (extra: got a value that cannot be read|chosen(\[0\])?: got \w+, exp)"
        ):
            list(read_preferences(path, {"chosen": "extra"}))
    # where the others are what a used column holds, the one that is not is named
    parquet.write_table(pyarrow.table({**plain, "chosen": pyarrow.Array.from_buffers(pyarrow.string(), 3, text)}), path)
    with pytest.raises(DataError, match=r", row 2: chosen: got a value that cannot be read \('utf-8' codec"):
        list(read_preferences(path))


def test_of_lists_and_structures_only_what_cannot_be_read_is_missing(tmp_path: Path) -> None:
    """Other rows are read, others of its members where they are used alone, and the one is named with its place."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, ends = tmp_path / "p.parquet", pyarrow.array([0, 2, 4, 6], pyarrow.int32())

    def text(*values: bytes) -> Any:  # unchecked, as writers leave it
        binary = pyarrow.array(values, pyarrow.binary())
        return pyarrow.Array.from_buffers(pyarrow.string(), len(values), binary.buffers())

    def lists(values: Any) -> Any:
        return pyarrow.ListArray.from_arrays(ends, values)

    roles = pyarrow.array(["user", "assistant"] * 3)
    content = text(b"hi", b"a", b"hi", b"caf\xe9", b"hi", b"c")
    messages = lists(pyarrow.StructArray.from_arrays([roles, content], names=["role", "content"]))
    times = pyarrow.array([2**60, 0, 3], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    meta = pyarrow.StructArray.from_arrays([pyarrow.array([0.5, 0.75, 1.0]), times], names=["p", "when"])
    plain = {"prompt": ["p", "q", "r"], "chosen": ["a"] * 3, "rejected": ["b"] * 3}

    parquet.write_table(pyarrow.table({"chosen": messages, "rejected": messages}), path)
    rows = [row.value for row in read_rows(path)]
    assert [row["chosen"][1]["content"] for row in (rows[0], rows[2])] == ["a", "c"]
    assert [message["role"] for message in rows[1]["chosen"]] == ["user", "assistant"]
    assert (rows[1]["chosen"][0]["content"], type(rows[1]["chosen"][1]["content"]).__name__) == ("hi", "Unreadable")
    with pytest.raises(DataError, match=r", row 2: chosen\[1\]\.content: got a value that cannot be read \('utf-8'"):
        list(read_preferences(path))

    parquet.write_table(pyarrow.table({"prompt": plain["prompt"], "responses": lists(content)}), path)
    found = read_groups(path)
    assert next(found).responses == ("hi", "a")
    with pytest.raises(DataError, match=r", row 2: responses\[1\]: got a value that cannot be read \('utf-8'"):
        next(found)
    assert [group.prompt for group in read_groups(path, part=Part(2, 3))] == ["r"], "which begins behind it"

    parquet.write_table(pyarrow.table({**plain, "meta": meta}), path)
    assert [pair.label for pair in read_preferences(path, {"label": "meta.p"})] == [0.5, 0.75, 1.0]
    with pytest.raises(DataError, match=r", row 1: meta\.when: got a value that cannot be read"):
        list(read_preferences(path, {"label": "meta.when"}))


# -- columns ---------------------------------------------------------------------------------------------------------


def test_columns_are_taken_from_other_names() -> None:
    row = {"question": "hi", "good": "yes", "bad": "no", "prompt": 7, "meta": {"p": 0.75}}
    columns = parse_columns(["prompt=question", "chosen=good,rejected=bad", "label=meta.p"])
    (pair,) = read_preferences([row], columns)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.label) == ("hi", "yes", "no", 0.75)
    (group,) = read_groups([{"q": "hi", "a.b": ["x", "y"]}], {"prompt": "q", "responses": "a.b"})
    assert (group.prompt, group.responses) == ("hi", ("x", "y"))


@given(st.permutations(["p", "c", "r"]))
def test_columns_may_be_exchanged(names: list[str]) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    by_text = {text: name for name, text in row.items()}
    mapping = dict(zip(("prompt", "chosen", "rejected"), (by_text[name] for name in names), strict=True))
    (pair,) = read_preferences([row], mapping)
    assert [pair.prompt, pair.chosen, pair.rejected] == names


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["prompt"], "expected NAME=COLUMN"),
        (["=x"], "expected NAME=COLUMN"),
        (["prompt=a", "prompt=b"], "prompt twice"),
        (["promt=question"], "'promt', expected one of"),
        (["prompt=answer"], r"no column 'answer' to take prompt from \(found"),
        (["prompt=question.text"], "no column 'question.text'"),
    ],
)
def test_bad_columns_are_named(given: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        list(read_preferences([{"question": "hi", "chosen": "a", "rejected": "b"}], parse_columns(given)))
