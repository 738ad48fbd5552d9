"""Files written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore._base.files import atomic_file, atomic_folder, same_file, write_atomic


@given(st.binary(), st.binary())
def test_a_file_holds_what_was_written_last(tmp_path_factory: pytest.TempPathFactory, old: bytes, new: bytes) -> None:
    folder = tmp_path_factory.mktemp("files")
    path = folder / "below" / "file"
    for data in (old, new):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with atomic_file(path) as work:
            work.write_text("half of it")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_atomic(link, "κ")
    assert link.is_symlink()
    assert real.read_bytes() == "κ".encode()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o000, 0o666)])
def test_files_have_the_permissions_of_any_new_file(tmp_path: Path, umask: int, expected: int) -> None:
    """Whatever made them: safetensors makes files that nobody else may read, under any umask."""

    def private(file: Path) -> None:
        file.touch(mode=0o600)

    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as work:
            private(work)
        with atomic_folder(tmp_path / "folder", marker="x") as folder:
            (folder / "inner").mkdir()
            private(folder / "inner" / "tensors")
        (tmp_path / "run").touch(mode=0o700)
        with atomic_file(tmp_path / "run") as work:
            private(work)
    finally:
        os.umask(before)
    found = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder/inner/tensors", "run")]
    assert found == [expected, expected, 0o700], "a file that is replaced keeps its own"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder", "run"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="one that rmcore wrote"), atomic_folder(tmp_path, marker="rmcore.json"):
        pytest.fail("the block must not run")
    assert (tmp_path / "thesis.tex").read_text() == "x"
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "model", marker="rmcore.json") as folder:
            (folder / "rmcore.json").write_text(text)
    assert (tmp_path / "model" / "rmcore.json").read_text() == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "model"}


def test_one_file_under_two_names_is_known(tmp_path: Path) -> None:
    real, link, hard = tmp_path / "real", tmp_path / "link", tmp_path / "hard"
    assert same_file(real, tmp_path / "x" / ".." / "real"), "as it would be"
    real.write_text("x")
    link.symlink_to(real)
    os.link(real, hard)
    assert same_file(real, link)
    assert same_file(hard, link)
    assert not same_file(real, tmp_path / "other")
