"""Where the cache is, by the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmcore._base.cache import cache_folder


@pytest.mark.parametrize("value", ["off", "OFF", "0", "no", "false"])
def test_it_can_be_turned_off(monkeypatch, value):
    monkeypatch.setenv("RMCORE_CACHE", value)
    assert cache_folder() is None


def test_it_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RMCORE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("RMCORE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rmcore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(tmp_path / "home" / ".cache" / "rmcore")


def test_without_a_home_there_is_none(monkeypatch):
    """As where a container runs under a number that no user has."""
    for name in ("RMCORE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987654)
    assert cache_folder() is None
    monkeypatch.setenv("RMCORE_CACHE", "~nobody-of-that-name/rmcore")
    assert cache_folder() is None
