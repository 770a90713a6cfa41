"""A hub on loopback: what models and streamed datasets take of the Hugging Face hub's protocol, and uploads.

    with HubServer() as hub:
        hub.add("org/name", directory)               # or "datasets/org/name"
        ... HF_ENDPOINT=hub.url ...

A repository has commits, of which branches are names. Large files are answered by a redirect to another
path, as the hub sends them to its storage, and pieces of them can be asked for. `gated` repositories show
their list of files to everybody and give the files to the token `GOOD_TOKEN` alone; private ones are not
there for others.

Who has that token may write, but not in the organization `CLOSED`: make repositories and branches, put large
files into the storage (LFS: what is there is not asked for again), and commit what is there.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import yaml

GOOD_TOKEN = "hf_goodtoken"
CLOSED = "closed"
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
    `stall_on`, the file of that name gets no end at all until the server is closed. `stored`: large files
    that were put, by their sha256; after `room` of them, others are refused.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, int] = {}
        self.stall_on = ""
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.failing = 0
        self.stored: dict[str, bytes] = {}
        self.room = 1000
        self.storing = threading.Lock()  # whoever uploads puts several files at once
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

        def do_PUT(self) -> None:
            """A large file into the storage."""
            content, digest = self._body(), self.path.rsplit("/", 1)[-1]
            hub.requests.append(("PUT", self.path, None))
            if hashlib.sha256(content).hexdigest() != digest:
                return self._send(400, b"found other content")
            with hub.storing:
                if len(hub.stored) >= hub.room:
                    return self._send(507, b"the storage is full")
                hub.stored[digest] = content
            return self._send(200, b"")

        def do_POST(self) -> None:
            body, path = self._body(), unquote(urlsplit(self.path).path)
            hub.requests.append(("POST", path, None))
            if hub.failing:
                return self._send(hub.failing, b"the hub is down")
            if self.headers.get("Authorization") != f"Bearer {GOOD_TOKEN}":
                return self._send(403 if "Authorization" in self.headers else 401, b"")
            if path == "/api/validate-yaml":
                return self._validate(json.loads(body)["content"])
            if path == "/api/repos/create":
                return self._create(**json.loads(body))
            if match := re.fullmatch(rf"/{NAME}\.git/info/lfs/objects/batch", path):
                return self._batch(json.loads(body)["objects"])
            match = re.fullmatch(rf"/api/models/{NAME}/(branch|preupload|commit)/(.+)", path)
            if match is None or match[1] not in hub.repositories:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            repository, branch = hub.repositories[match[1]], match[3]
            if match[2] == "branch":
                there = branch in repository.branches
                repository.branches.setdefault(branch, repository.branches["main"])
                return self._send_json({}, 409 if there else 200)
            if branch not in repository.branches:
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            files = repository.commits[repository.branches[branch]]
            if match[2] == "preupload":
                return self._send_json(
                    {"files": [_upload_mode(of, files.get(of["path"])) for of in json.loads(body)["files"]]}
                )
            return self._commit(match[1], branch, [json.loads(line) for line in body.splitlines()])

        def _validate(self, card: str) -> None:
            front = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
            try:
                wrong = [] if front is None or isinstance(yaml.safe_load(front[1]), dict) else ["no object"]
            except yaml.YAMLError as error:
                wrong = [str(error)]
            errors = [{"message": message} for message in wrong]
            return self._send_json({"errors": errors, "warnings": []}, 400 if wrong else 200)

        def _create(self, name: str, organization: str, visibility: str = "public", **others: Any) -> None:
            identity = f"{organization}/{name}"
            if organization == CLOSED:
                return self._send(403, b"you may not write here")
            if identity in hub.repositories:
                return self._send_json({"url": f"{hub.url}/{identity}"}, 409)
            made = hub.repositories[identity] = Repository(private=visibility == "private")
            made.commit({".gitattributes": b""})
            return self._send_json({"url": f"{hub.url}/{identity}"})

        def _batch(self, objects: list[dict[str, Any]]) -> None:
            for of in objects:
                if of["oid"] not in hub.stored:
                    href = f"{hub.url}/put/{of['oid']}"
                    of["actions"] = {"upload": {"href": href, "header": {}}}
            return self._send_json({"transfer": "basic", "objects": objects})

        def _commit(self, identity: str, branch: str, lines: list[dict[str, Any]]) -> None:
            repository = hub.repositories[identity]
            files = dict(repository.commits[repository.branches[branch]])
            for line in lines:
                of = line["value"]
                if line["key"] == "file":
                    files[of["path"]] = base64.b64decode(of["content"])
                elif line["key"] == "lfsFile":
                    files[of["path"]] = hub.stored[of["oid"]]
                elif line["key"] == "deletedFile":
                    del files[of["path"]]
            name = repository.commit(files, branch)
            self._send_json({"commitUrl": f"{hub.url}/{identity}/commit/{name}", "commitOid": name})

        def _send_json(self, content: Any, status: int = 200) -> None:
            self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

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
                within = {str(parent) for file in inside for parent in PurePosixPath(file).parents}
                folders = sorted(path for path in within if path.startswith(f"{folder}/" if folder else ""))
                content: Any = [_folder(path) for path in folders if path != "."]
                content += [_entry(file, files[file]) for file in inside]
                if "recursive=true" not in self.path.lower():
                    depth = len(PurePosixPath(folder).parts) + 1
                    content = [each for each in content if len(PurePosixPath(each["path"]).parts) == depth]
            else:
                siblings = [{"rfilename": file} for file in sorted(files)]
                content = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
                content["private"] = repository.private
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
            if self.command != "HEAD":
                self.wfile.write(body[:send])
                self.wfile.flush()

    return Handler


def _upload_mode(of: dict[str, Any], there: bytes | None) -> dict[str, Any]:
    """How a file is to be sent, and the hash of the one that is there: git's, or of large ones sha256."""
    large, oid = of["size"] > LARGE_BYTES, None
    if there is not None:
        blob = b"blob %d\0" % len(there) + there
        oid = (
            hashlib.sha256(there).hexdigest() if len(there) > LARGE_BYTES else hashlib.sha1(blob).hexdigest()
        )
    mode = "lfs" if large else "regular"
    return {"path": of["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _folder(path: str) -> dict[str, Any]:
    """A folder in the list of a tree."""
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _entry(file: str, content: bytes) -> dict[str, Any]:
    """A file in the list of a tree."""
    entry: dict[str, Any] = {"type": "file", "path": file, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if len(content) > LARGE_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry
