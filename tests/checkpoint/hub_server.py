"""A hub on loopback: what models and streamed datasets take of the Hugging Face hub's protocol.

    with HubServer() as hub:
        hub.add("org/name", directory)               # or "datasets/org/name"
        ... HF_ENDPOINT=hub.url ...

A repository has commits, of which branches are names. Large files are answered by a redirect to another
path, as the hub sends them to its storage, and pieces of them can be asked for. `gated` repositories show
their list of files to everybody and give the files to the token `GOOD_TOKEN` alone; private ones are not
there for others.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

GOOD_TOKEN = "hf_goodtoken"
LARGE_BYTES = 50_000
NAME = "((?:datasets/)?[^/]+/[^/]+)"


@dataclass
class Repository:
    """`commits`: commit -> file name -> content; `branches`: name -> commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit, which becomes the head of the branch; returns its name."""
        digest = hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items())))
        name = digest.hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name


class HubServer:
    """`requests`: (method, path, range) of all that was asked; `cuts`: file name -> times to break it off.

    An answer that is cut ends after half of what was asked for, as when a connection is lost. With
    `stall_on`, the file of that name gets no end at all until the server is closed.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, int] = {}
        self.stall_on = ""
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.failing = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, directory: Path, **extra: bytes) -> str:
        """A repository with the files of a directory; returns its commit."""
        files = {
            str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }
        return self.repositories.setdefault(name, Repository()).commit(files | extra)

    def downloaded(self, name: str = "") -> list[str]:
        """The names of files that were sent (GET), or those that end so."""
        paths = [path for method, path, _ in self.requests if method == "GET" and "/storage/" in path]
        paths += [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return sorted({path.rsplit("/", 1)[-1] for path in paths if path.endswith(name)})


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if hub.failing:
                return self._send(hub.failing, b"the hub is down")
            path = path.replace("/api/models/", "/api/")
            if match := re.fullmatch(rf"/api/{NAME}(/(revision|tree)/(.+))?", path):
                return self._describe(match[1], match[3] or "revision", match[4] or "main")
            if match := re.fullmatch(rf"/{NAME}/(resolve|storage)/([^/]+)/(.+)", path):
                return self._file(match[1], match[2], match[3], match[4])
            return self._send(404, b"")

        def _found(self, name: str, revision: str) -> tuple[Repository, str] | None:
            """The repository and the commit, or an answer that says why not."""
            repository = hub.repositories.get(name)
            authorized = self.headers.get("Authorization") == f"Bearer {GOOD_TOKEN}"
            if repository is None or (repository.private and not authorized):
                known = "Authorization" in self.headers
                self._send(404 if known else 401, b"", {"X-Error-Code": "RepoNotFound"})
                return None
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return None
            return repository, commit

        def _describe(self, name: str, what: str, revision: str) -> None:
            commit, _, folder = revision.partition("/")
            if what == "revision" or not re.fullmatch("[0-9a-f]{40}", commit):  # of branches, / is a part
                commit, folder = revision, ""
            if (found := self._found(name, commit)) is None:
                return None
            repository, commit = found
            files = repository.commits[commit]
            if folder and not any(file.startswith(f"{folder}/") for file in files):
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            if what == "tree":
                inside = [file for file in sorted(files) if file.startswith(f"{folder}/" if folder else "")]
                content: Any = [_entry(file, files[file]) for file in inside]
            else:
                siblings = [{"rfilename": file} for file in sorted(files)]
                content = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
            return self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _file(self, name: str, what: str, revision: str, file: str) -> None:
            if (found := self._found(name, revision)) is None:
                return None
            repository, commit = found
            if repository.gated and self.headers.get("Authorization") != f"Bearer {GOOD_TOKEN}":
                status = 403 if "Authorization" in self.headers else 401
                return self._send(status, b"", {"X-Error-Code": "GatedRepo"})
            content = repository.commits[commit].get(file)
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if content is None:
                return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            digest = hashlib.sha256(content).hexdigest()
            if what == "resolve" and len(content) > LARGE_BYTES:
                headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
                return self._send(
                    302, b"", headers | {"Location": f"{hub.url}/{name}/storage/{commit}/{file}"}
                )
            return self._send_piece(file, content, headers | {"ETag": f'"{digest}"'})

        def _send_piece(self, file: str, content: bytes, headers: dict[str, str]) -> None:
            status = 200
            if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start, status = int(asked[1]), 206
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content = content[start:]
            cut = self.command == "GET" and hub.cuts.get(file, 0) > 0
            stall = self.command == "GET" and hub.stall_on == file
            if not cut and not stall:
                self._send(status, content, headers)
                return
            hub.cuts[file] = hub.cuts.get(file, 0) - 1
            self._send(status, content, headers, send=len(content) // 2)
            if stall:
                hub.stalled.set()
                hub.closing.wait()
            self.close_connection = True

        def _send(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, send: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:send])
                self.wfile.flush()

    return Handler


def _entry(file: str, content: bytes) -> dict[str, Any]:
    """A file in the list of a tree."""
    entry: dict[str, Any] = {"type": "file", "path": file, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if len(content) > LARGE_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry
