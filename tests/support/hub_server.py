"""A Hugging Face Hub for the tests, on loopback: as much of its HTTP as huggingface_hub uses to download and publish.

Large files (model.safetensors) are redirected to a second port, as the Hub does to its CDN. `faults` make it misbehave.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = "model.safetensors"


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by sha, in order; the last is main
    token: str | None = None  # who may read; None for everyone
    private: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit of these files over the last one's and returns its sha."""
        before = next(reversed(self.commits.values()), {})
        content = {**before, **files}
        text = repr((len(self.commits), sorted((k, hashlib.sha256(v).hexdigest()) for k, v in content.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = content
        return sha

    @property
    def head(self) -> str:
        return next(reversed(self.commits), "0" * 40)


@dataclass
class Fault:
    """What goes wrong the next `times` that a request of this method asks for this file."""

    file: str
    method: str = "GET"
    times: int = 1
    status: int = 0  # answer with it, and nothing else
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = -1  # bytes of the body after which the connection breaks
    length: int = -1  # bytes that the body has, and says it has
    flip: bool = False  # one byte of the body is another
    delay: float = 0.0  # seconds before the answer
    stall: float = 0.0  # seconds in the middle of the body


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """A client that went away, which is what some tests are about."""


class HubServer:
    """Runs from construction until `close`; `url` is for HF_ENDPOINT, `log` has (method, path, range, status)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, str, int]] = []
        self.large: dict[str, bytes] = {}  # uploaded objects by their SHA-256
        self.leaked: list[str] = []  # paths on the CDN that came with an authorization header
        self.write_token = "hf_writer"
        self._lock = threading.Lock()
        self._handler = type("Handler", (_Handler,), {"hub": self})
        self.connections: set[socket.socket] = set()
        self._ports = [0, 0]
        self._start()
        self.url, self.cdn = (f"http://127.0.0.1:{port}" for port in self._ports)

    def _start(self) -> None:
        self._servers = [_Server(("127.0.0.1", port), self._handler) for port in self._ports]
        self._ports = [server.server_address[1] for server in self._servers]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def gone(self):
        """Nobody listens on the ports meanwhile."""
        self.close()
        try:
            yield
        finally:
            self._start()

    def fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.method == method and path.endswith(fault.file) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def requests(self, method: str, end: str) -> list[tuple[str, str, str, int]]:
        """Those of the log, oldest first."""
        return [entry for entry in self.log if entry[0] == method and entry[1].endswith(end)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *args) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        with contextlib.suppress(ConnectionError):
            super().finish()

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(self.command, path)
        if fault and fault.delay:
            time.sleep(fault.delay)
        if fault and fault.status:
            return self._answer(fault.status, headers=fault.headers)
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})/[^/]+", path):
            if self.headers.get("authorization"):
                self.hub.leaked.append(path)
            return self._file(self.hub.large[match[1]], {}, fault)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repo = self._repo(match[1])
            if repo:
                self._json({"id": match[1], "sha": repo.head, "private": repo.private, "tags": [], "siblings": []})
            return None
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups(), fault)
        return self._answer(404)

    def _repo(self, name: str) -> Repo | None:
        """The repository, or None after the answer that the Hub gives to whoever may not see it."""
        repo = self.hub.repos.get(name)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if repo and (repo.token is None or token == repo.token):
            return repo
        self._answer(404 if token else 401, headers={"X-Error-Code": "RepoNotFound"})
        return None

    def _resolve(self, name: str, revision: str, file: str, fault: Fault | None) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        sha = repo.head if revision == "main" else revision
        if sha not in repo.commits:
            return self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        if file not in repo.commits[sha]:
            return self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = repo.commits[sha][file]
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": sha}
        if file != LARGE:
            return self._file(content, {**headers, "ETag": f'"{_git_sha(content)}"'}, fault)
        self.hub.large[digest] = content
        headers.update({"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))})
        return self._answer(
            302, headers={**headers, "Location": f"{self.hub.cdn}/cdn/{digest}/{name.replace('/', '-')}"}
        )

    def _file(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or ""):
            status, start = 206, int(match[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = bytearray(content[start:])
        if fault and fault.flip:
            body[len(body) // 2] ^= 1
        if fault and fault.length >= 0:
            body = body[: fault.length]
        self._answer(status, bytes(body), headers, fault)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.hub.fault("POST", path)
        if fault and fault.status:
            return self._answer(fault.status, headers=fault.headers)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("authorization") != f"Bearer {self.hub.write_token}":
            return self._answer(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            known = name in self.hub.repos
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.hub.repos.setdefault(name, Repo(private=private, token=self.hub.write_token if private else None))
            return self._json({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = self._last(match[1])
            return self._json({"files": [self._mode(f["path"], files) for f in json.loads(data)["files"]]})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [dict(o, **self._upload(o["oid"])) for o in json.loads(data)["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            added = {}
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    added[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    added[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
            sha = self.hub.repos[match[1]].commit(added)
            return self._json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{match[1]}/commit/{sha}"})
        return self._answer(404)

    def _last(self, name: str) -> dict[str, bytes]:
        repo = self.hub.repos[name]
        return repo.commits.get(repo.head, {})

    def _mode(self, path: str, files: dict[str, bytes]) -> dict:
        mode = {"path": path, "uploadMode": "lfs" if path == LARGE else "regular", "shouldIgnore": False}
        if path in files:
            mode["oid"] = hashlib.sha256(files[path]).hexdigest() if path == LARGE else _git_sha(files[path])
        return mode

    def _upload(self, oid: str) -> dict:
        return {} if oid in self.hub.large else {"actions": {"upload": {"href": f"{self.hub.cdn}/upload/{oid}"}}}

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        fault = self.hub.fault("PUT", LARGE)
        if fault and fault.status:
            return self._answer(fault.status)
        self.hub.large[hashlib.sha256(data).hexdigest()] = data
        return self._answer(200)

    def _json(self, value: dict, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes = b"", headers: dict | None = None, fault: Fault | None = None) -> None:
        self.hub.log.append((self.command, urlsplit(self.path).path, self.headers.get("range") or "", status))
        with contextlib.suppress(ConnectionError):  # a client that gave up
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = fault.cut if fault and fault.cut >= 0 else len(body)
            middle = cut // 2 if fault and fault.stall else 0
            self.wfile.write(body[:middle])
            self.wfile.flush()
            if fault and fault.stall:
                time.sleep(fault.stall)
            self.wfile.write(body[middle:cut])
            self.wfile.flush()
            if cut < len(body):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
