"""A Hub on this machine: the endpoints that huggingface_hub uses to make, fill and read model repositories, over real HTTP.

```python
server = Server()                       # listens on 127.0.0.1, port chosen by the system; `server.url` goes into HF_ENDPOINT
server.repos["tester/name"]             # commits, branches, files
server.faults.append(Fault("GET", "model.safetensors", cut_after=1000))
server.log                              # (method, path, Range header) of every request
```

Only the standard library. The transfer protocol is Git LFS, so clients must set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".png")
LFS_SIZE = 10 * 1024 * 1024


@dataclass
class File:
    """One file of one commit; `sha256` is None for a file that is not in LFS."""

    data: bytes
    sha256: str | None

    @property
    def oid(self) -> str:
        """What git calls it: the SHA-1 of the blob, or of what stands for its pointer."""
        content = self.data if self.sha256 is None else self.sha256.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass
class Repo:
    """The commits of a repository, and where its branches and tags point."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        sha = hashlib.sha1(f"{self.references.get(branch)} {message} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.references[branch] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        revision = urllib.parse.unquote(revision)
        return self.references.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.resolve(revision)]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path ends so: a status, or a connection cut after some bytes."""

    method: str
    ending: str
    status: int | None = None
    cut_after: int | None = None
    times: int = 1


class Server:
    """The Hub, its one user and its token."""

    def __init__(self, token: str = "hf_loopback", user: str = "tester") -> None:
        self.token, self.user = token, user
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, str]] = []
        self.connections: list[socket.socket] = []
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Closes the port and the connections that clients keep; whoever asks again finds nobody."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and path.endswith(fault.ending):
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    def change(self, repo: str, path: str, data: bytes, revision: str = "main") -> str:
        """A commit that somebody else made."""
        there = self.repos[repo]
        sha256 = hashlib.sha256(data).hexdigest() if path.endswith(LFS_ENDINGS) else None
        return there.commit(revision, {**there.files(revision), path: File(data, sha256)}, f"change {path}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Server

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def do_any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        body = self._body()
        self.hub.log.append((self.command, urllib.parse.unquote(url.path), self.headers.get("Range", "")))
        self._cut_after = None
        if fault := self.hub.fault(self.command, urllib.parse.unquote(url.path)):
            if fault.status is not None:
                return self.refuse(fault.status, "Fault", "the server has a fault")
            self._cut_after = fault.cut_after
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found and method == self.command:
                return answer(self, body, dict(urllib.parse.parse_qsl(url.query)), **found.groupdict())
        return self.refuse(404, "NoRoute", f"this Hub has no {self.command} {url.path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, payload: Any = None, status: int = 200, headers: dict[str, str] | None = None, raw: bytes | None = None) -> None:
        data = raw if raw is not None else json.dumps(payload).encode()
        self.send_response(status)
        kind = "application/json" if raw is None else "application/octet-stream"
        for name, value in {"Content-Length": str(len(data)), "Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._cut_after is None:
            self.wfile.write(data)
        else:
            self.wfile.write(data[: self._cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._cut_after = None
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def user_or_refuse(self) -> bool:
        if not self.known:
            self.refuse(401, "Unauthorized", "Invalid username or password.")
        return self.known

    def find(self, name: str, revision: str = "main") -> tuple[Repo | None, str | None]:
        """The repository and the commit; (None, None) after an answer that says what is missing."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
            return None, None
        sha = repo.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None, None
        return repo, sha


# ------------------------------------------------------------------------------------------------------------------------ the answers


def whoami(h: Handler, body: bytes, query: dict) -> None:
    if h.user_or_refuse():
        token = {"displayName": "test", "role": "write"}
        h.answer({"type": "user", "id": "0", "name": h.hub.user, "fullname": h.hub.user, "orgs": [], "auth": {"accessToken": token}})


def create_repo(h: Handler, body: bytes, query: dict) -> None:
    if not h.user_or_refuse():
        return
    given = json.loads(body)
    name = f"{given.get('organization') or h.hub.user}/{given['name']}"
    url = f"{h.hub.url}/{name}"
    if name in h.hub.repos:
        h.answer({"error": "You already created this model repo", "url": url}, 409)
    elif not name.startswith(f"{h.hub.user}/"):
        h.refuse(403, "Forbidden", "You don't have the rights to create a model under this namespace")
    else:
        h.hub.repos[name] = Repo(private=given.get("visibility") == "private" or bool(given.get("private")))
        h.answer({"url": url, "name": name, "id": name})


def create_branch(h: Handler, body: bytes, query: dict, repo: str, revision: str) -> None:
    there, _ = h.find(repo)
    if there is None or not h.user_or_refuse():
        return
    start = json.loads(body or b"{}").get("startingPoint", "main")
    name = urllib.parse.unquote(revision)
    if name in there.references:
        h.refuse(409, "Conflict", "Reference already exists")
    else:
        there.references[name] = there.resolve(start)
        h.answer({})


def info(h: Handler, body: bytes, query: dict, repo: str, revision: str = "main") -> None:
    there, sha = h.find(repo, revision)
    if there is not None:
        when = "2026-01-01T00:00:00.000Z"
        files = [{"rfilename": name} for name in sorted(there.commits[sha])]
        h.answer({"_id": "0", "id": repo, "modelId": repo, "sha": sha, "private": there.private, "disabled": False, "gated": False,
                  "downloads": 0, "likes": 0, "tags": [], "createdAt": when, "lastModified": when, "siblings": files})  # fmt: skip


def tree(h: Handler, body: bytes, query: dict, repo: str, revision: str, path: str | None = None) -> None:
    there, sha = h.find(repo, revision)
    if there is None:
        return
    rows = []
    for name, file in sorted(there.commits[sha].items()):
        if not path or name.startswith(path.strip("/") + "/"):
            row: dict[str, Any] = {"type": "file", "path": name, "oid": file.oid, "size": len(file.data)}
            if file.sha256:
                row["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
            rows.append(row)
    h.answer(rows)


def preupload(h: Handler, body: bytes, query: dict, repo: str, revision: str) -> None:
    there, sha = h.find(repo, revision)
    if there is None or not h.user_or_refuse():
        return
    rows = []
    for given in json.loads(body)["files"]:
        large = given["path"].endswith(LFS_ENDINGS) or given["size"] > LFS_SIZE
        row = {"path": given["path"], "shouldIgnore": False, "uploadMode": "lfs" if large else "regular"}
        if file := there.commits[sha].get(given["path"]):
            row["oid"] = file.etag
        rows.append(row)
    h.answer({"files": rows})


def lfs_batch(h: Handler, body: bytes, query: dict, repo: str) -> None:
    rows = []
    for given in json.loads(body)["objects"]:
        row = {"oid": given["oid"], "size": given["size"]}
        if given["oid"] not in h.hub.lfs:
            where = f"{h.hub.url}/_lfs/{given['oid']}"
            row["actions"] = {"upload": {"href": where}, "verify": {"href": f"{where}/verify"}}
        rows.append(row)
    h.answer({"transfer": "basic", "objects": rows})


def lfs_put(h: Handler, body: bytes, query: dict, oid: str) -> None:
    if hashlib.sha256(body).hexdigest() != oid:
        h.refuse(400, "BadRequest", "sha256 mismatch")
    else:
        h.hub.lfs[oid] = body
        h.answer({})


def lfs_verify(h: Handler, body: bytes, query: dict, oid: str) -> None:
    h.answer({}, 200 if len(h.hub.lfs.get(oid, b"")) == json.loads(body)["size"] else 400)


def commit(h: Handler, body: bytes, query: dict, repo: str, revision: str) -> None:
    there, base = h.find(repo, revision)
    if there is None or not h.user_or_refuse():
        return
    with there.lock:
        files, message = dict(there.commits[base]), ""
        for item in map(json.loads, body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), None)
            elif key == "lfsFile":
                if value["oid"] not in h.hub.lfs:
                    return h.refuse(400, "BadRequest", f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = File(h.hub.lfs[value["oid"]], value["oid"])
            elif key == "deletedFile":
                files.pop(value["path"], None)
        branch, answer = urllib.parse.unquote(revision), {"success": True, "hookOutput": ""}
        if query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in there.references)
            branch = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{h.hub.url}/{repo}/discussions/{number}"
        sha = there.commit(branch, files, message)
    return h.answer({**answer, "commitOid": sha, "commitUrl": f"{h.hub.url}/{repo}/commit/{sha}"})


def resolve(h: Handler, body: bytes, query: dict, repo: str, revision: str, path: str) -> None:
    there, sha = h.find(repo, revision)
    if there is None:
        return
    file = there.commits[sha].get(urllib.parse.unquote(path))
    if file is None:
        return h.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
    headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.sha256:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range", ""))
    if wanted and h.command == "GET":
        first, last = int(wanted[1]), min(int(wanted[2] or len(file.data)), len(file.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        return h.answer(status=206, headers=headers, raw=file.data[first : last + 1])
    return h.answer(headers=headers, raw=file.data)


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("POST", r"/api/validate-yaml", lambda h, body, query: h.answer({"errors": [], "warnings": []})),
    ("POST", rf"/api/models/{REPO}/branch/{REVISION}", create_branch),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", commit),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?P<path>/.*)?", tree),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", info),
    ("GET", rf"/api/models/{REPO}", info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("POST", r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", lfs_verify),
    ("HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
]
