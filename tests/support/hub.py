"""A Hugging Face hub on the loopback: enough of its HTTP interface for huggingface_hub and transformers to use it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits by hash, and what branches and tags point to."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    private: bool | None = None

    def commit(self, files: Files, branch: str = "main") -> str:
        """A new commit that holds ``files`` and nothing else."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha

    def files(self, branch: str = "main") -> Files:
        return self.commits[self.refs[branch]]


class FakeHub:
    """Serves ``repos`` until it is closed; ``requests`` has the (method, path) of each request, in order."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.down = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def add(self, repo_id: str, folder: Path, **repo: object) -> str:
        """A repository with a folder's files; returns the commit."""
        self.repos[repo_id] = Repo(**repo)  # type: ignore[arg-type]
        return self.repos[repo_id].commit(read_folder(folder))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


def read_folder(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its head

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def _reply(self, status: int, body: bytes | list | dict = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self._reply(status, {"error": code}, X_Error_Code=code)

    def _route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.down:
            return self._reply(self.hub.down)
        if path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/").split("/", 2), body)
        owner, _, rest = path.removeprefix("/").partition("/")
        name, _, rest = rest.partition("/resolve/")
        revision, _, file = rest.partition("/")
        found = self._commit(f"{owner}/{name}", revision)
        if found is None:
            return None
        _, sha, files = found
        if file not in files:
            return self._reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self._reply(200, files[file], ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"', X_Repo_Commit=sha)

    def _commit(self, repo_id: str, revision: str) -> tuple[Repo, str, Files] | None:
        repo = self.hub.repos.get(repo_id)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.token is not None and repo.token != bearer and not repo.gated):
            self._fail(401, "RepoNotFound")
        elif repo.gated and repo.token != bearer:
            self._fail(403, "GatedRepo")
        else:
            sha = repo.refs.get(revision, revision)
            if sha in repo.commits:
                return repo, sha, repo.commits[sha]
            self._fail(404, "RevisionNotFound")
        return None

    def _create(self, asked: dict) -> None:
        repo_id = f"{asked.get('organization', 'me')}/{asked['name']}"
        if self.headers.get("Authorization") is None:
            return self._reply(401, {"error": "no token"})
        if repo_id in self.hub.repos:
            return self._reply(409, {"error": "exists", "url": f"{self.hub.url}/{repo_id}"})
        repo = self.hub.repos[repo_id] = Repo(private=asked.get("private") or asked.get("visibility") == "private")
        repo.commit({".gitattributes": b""})
        return self._reply(200, {"url": f"{self.hub.url}/{repo_id}"})

    def _api(self, parts: list[str], body: bytes) -> None:
        repo_id, (verb, _, rest) = "/".join(parts[:2]), (parts[2] if len(parts) > 2 else "revision/main").partition("/")
        revision, _, folder = rest.partition("/")
        found = self._commit(repo_id, revision)
        if found is None:
            return None
        repo, sha, files = found
        if verb == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._reply(200, {"id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, "tags": []})
        if verb == "tree":
            inside = [name for name in files if name.startswith(folder)]
            if folder and not inside:
                return self._fail(404, "EntryNotFound")
            return self._reply(200, [_entry(name, files[name]) for name in inside])
        if verb == "preupload":
            asked = [f["path"] for f in json.loads(body)["files"]]
            return self._reply(
                200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]}
            )
        assert verb == "commit"
        new = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        sha = repo.commit(new, revision)
        return self._reply(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that this process's huggingface_hub asks, with an empty cache and no token."""
    import huggingface_hub.constants
    import huggingface_hub.hf_api
    import huggingface_hub.utils._http
    import transformers.utils.hub

    hub = FakeHub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made for good on first use
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # between its retries
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()
