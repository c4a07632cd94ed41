"""A stand-in for the Hugging Face Hub on this machine: the calls that pushing and fetching a model make."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar, Self
from urllib.parse import unquote, urlsplit

WRITE, READ = "Bearer hf_write", "Bearer hf_read"


@dataclass
class Repository:
    """Commits by their hash, each a whole tree of `path: content`, and which one each branch is at."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)

    def tree(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class FakeHub:
    """Stored repositories and files, and the downloads so far as `(id, path)`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.downloads: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[FakeHub]
    body: bytes

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def route(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        for wanted, pattern, answer in ROUTES:
            if method in wanted and (match := re.fullmatch(pattern, path)):
                user = self.headers.get("Authorization")
                if "POST" in wanted and user != WRITE:
                    self.refuse(403 if user == READ else 401, "", "you may not write here")
                else:
                    answer(self, *map(unquote, match.groups()))
                return
        self.refuse(404, "", f"no route for {method} {path}")

    def send(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def visible(self, name: str) -> Repository | None:
        """The repository, or None after an error response; private ones exist for authorised users only."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") not in (READ, WRITE)):
            self.refuse(401, "RepoNotFound", "Repository Not Found")
            return None
        return repository

    # -- writing -----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        self.send({"warnings": [], "errors": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.hub.repositories
        if not there:
            private = asked.get("private", asked.get("visibility") == "private")  # by the client's version
            self.hub.repositories[name] = Repository(private)
        self.send({"url": f"{self.hub.endpoint}/{name}"}, 409 if there else 200)

    def branch(self, name: str, branch: str) -> None:
        repository = self.hub.repositories[name]
        there = branch in repository.branches
        repository.branches.setdefault(branch, repository.branches["main"])
        self.send({}, 409 if there else 200)

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(("safetensors", "pt")) else "regular",
                  "shouldIgnore": False} for f in files]  # fmt: skip
        self.send({"files": modes})

    def batch(self, name: str) -> None:
        asked = json.loads(self.body)["objects"]
        self.send({"transfer": "basic", "objects": [
            {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{o['oid']}"}}} for o in asked
        ]})  # fmt: skip

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.send({})

    def commit(self, name: str, revision: str) -> None:
        repository = self.hub.repositories[name]
        tree = dict(repository.tree(revision) or {})
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del tree[value["path"]]
        oid = hashlib.sha1(self.body).hexdigest()
        repository.commits[oid], repository.branches[revision] = tree, oid
        self.send({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    # -- reading -----------------------------------------------------------------------------------------------

    def info(self, name: str, revision: str = "main") -> None:
        if (repository := self.visible(name)) is None:
            return
        if repository.tree(revision) is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        else:
            self.send({"id": name, "sha": repository.branches.get(revision, revision), "siblings": []})

    def listing(self, name: str, revision: str) -> None:
        if (repository := self.visible(name)) is not None:
            files = (repository.tree(revision) or {}).items()
            self.send([{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                       for path, data in files])  # fmt: skip

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repository := self.visible(name)) is None:
            return
        if (data := (repository.tree(revision) or {}).get(path)) is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        if self.command == "GET":
            self.hub.downloads.append((name, path))
        commit = repository.branches.get(revision, revision)
        self.send(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[list[str], str, Callable[..., None]]] = [
    (["POST"], "/api/validate-yaml", _Handler.validate),
    (["POST"], "/api/repos/create", _Handler.create),
    (["POST"], f"/api/models/{NAME}/branch/([^/]+)", _Handler.branch),
    (["POST"], f"/api/models/{NAME}/preupload/([^/]+)", _Handler.preupload),
    (["POST"], f"/api/models/{NAME}/commit/([^/]+)", _Handler.commit),
    (["POST"], f"/{NAME}.git/info/lfs/objects/batch", _Handler.batch),
    (["PUT"], "/lfs/(.+)", _Handler.store),
    (["GET"], f"/api/models/{NAME}", _Handler.info),
    (["GET"], f"/api/models/{NAME}/revision/([^/]+)", _Handler.info),
    (["GET"], f"/api/models/{NAME}/tree/([^/]+)", _Handler.listing),
    (["GET", "HEAD"], f"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
