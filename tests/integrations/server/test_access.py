"""Who may come in: tokens, host names and settings that would let in others."""

from __future__ import annotations

import logging

import pytest
from support.server_calls import GROUP

from rmcore._base.errors import InputError
from rmcore.integrations.server import ServeSettings

# -- who may come in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401), ("Bearer wrong", 401), ("Bearer ", 401), ("Basic s3cret-token", 401), ("s3cret-token", 401),
        ("Bearer s3cret-tokenx", 401), ("Bearer s3cret-toke", 401), ("Bearer s3cret-token", 200),
        ("bearer s3cret-token", 200),
    ],
)  # fmt: skip
def test_a_token_guards_everything_but_health(make_app, talk, echo_engine, caplog, header, status):
    caplog.set_level(logging.DEBUG)

    async def main(client):
        headers = {} if header is None else {"authorization": header}
        guarded = [await client.post("/v1/groups", json=GROUP, headers=headers)]
        guarded += [await client.get(path, headers=headers) for path in ("/metrics", "/docs", "/openapi.json")]
        return guarded, [await client.get(path) for path in ("/health", "/ready")]

    app = make_app(echo_engine, token="s3cret-token", host="0.0.0.0")
    guarded, open_ = talk(app, main)
    assert [answer.status_code for answer in guarded] == [status] * 4
    assert all(answer.headers["www-authenticate"] == "Bearer" for answer in guarded if status == 401)
    assert [answer.status_code for answer in open_] == [200] * 2
    assert "s3cret" not in caplog.text
    assert "s3cret" not in repr(app.state.service.settings)
    page = app.openapi()
    assert page["paths"]["/v1/groups"]["post"]["security"] == [{"token": []}]
    assert page["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8400", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("LOCALHOST.", 200), ("evil.example:8400", 421)],
)
def test_without_a_token_only_this_machines_names_are_answered(make_app, talk, host, status):
    """A web page can point a name of its own at 127.0.0.1."""

    async def main(client):
        return await client.get("/health", headers={"host": host})

    assert talk(make_app(), main).status_code == status


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "host: got '0.0.0.0', expected a loopback address"),
        ({"host": "example.org"}, "host"),
        ({"host": "::"}, "host"),
        ({"token": ""}, "token"),
        ({"token": "a b"}, "token: got other characters"),
        ({"port": 70_000}, "port"),
        ({"group_size": 1}, "group_size"),
        ({"group_size": 65}, "group_size"),
        ({"baseline": "mean"}, "baseline"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"time_limit_s": 170}, "below answer_within_s"),
        ({"keep_s": float("nan")}, "keep_s"),
        ({"max_body": 0}, "max_body"),
        ({"max_groups": 2000}, "max_groups"),
        ({"end_tokens": ("",)}, "end_tokens"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        ServeSettings(**options)
