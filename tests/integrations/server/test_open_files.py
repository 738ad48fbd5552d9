"""As many open files as connections are let in, or a warning that names the limits."""

from __future__ import annotations

import pytest

from rmcore.integrations.server import ServeSettings
from rmcore.integrations.server.open_files import make_room

resource = pytest.importorskip("resource")

SETTINGS = ServeSettings(max_members=5000, max_queue=1000, max_groups=1000)
NEEDED = 5000 + 1000 + 1024


@pytest.mark.parametrize(
    ("soft", "hard", "becomes", "warns"),
    [
        (1024, 20_000, NEEDED, False),
        (1024, resource.RLIM_INFINITY, NEEDED, False),
        (1024, 4096, 4096, True),
        (4096, 4096, 4096, True),
        (NEEDED, 20_000, None, False),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, False),
    ],
)
def test_the_limit_becomes_what_the_settings_let_in(monkeypatch, caplog, soft, hard, becomes, warns):
    made = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: made.append((kind, limits)))
    with caplog.at_level("WARNING"):
        make_room(SETTINGS)
    assert made == ([] if becomes is None else [(resource.RLIMIT_NOFILE, (becomes, hard))])
    assert ("4096 open files, and max_members = 5000 and max_queue = 1000" in caplog.text) == warns


@pytest.mark.parametrize("error", [ValueError, PermissionError])
def test_where_it_cannot_be_raised_the_limit_that_stays_is_told(monkeypatch, caplog, error):
    def refuse(kind, limits):
        raise error

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with caplog.at_level("WARNING"):
        make_room(SETTINGS)
    assert "may have 256 open files" in caplog.text
