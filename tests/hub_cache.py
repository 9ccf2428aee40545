"""Creates cache folders in huggingface_hub's layout, and a local server that imitates the hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's files by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def commit_of(name: str) -> str:
    """Return a commit hash for a name: 40 hexadecimal digits."""
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()


def add_snapshot(cache: Path, repo: str, commit: str, files: Files, *, refs: Sequence[str] = (), shared: bool = False) -> Path:
    """Add a commit of a repository to the cache. Returns its snapshot folder.

    Each ``snapshots/<commit>/<file>`` is a link to ``blobs/<hash>``. With ``shared``, each blob is itself a link to a store for the whole cache, with one
    folder per file. huggingface_hub 2 stores files this way if the hub sends them in chunks, as it does with large files. A ref (branch or tag) is a file that
    contains the commit hash.
    """
    repository = cache / f"models--{repo.replace('/', '--')}"
    for name, data in files.items():
        blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        if shared:
            key = hashlib.sha256(b"chunks" + data).hexdigest()
            store = cache / "blobs" / key[:2] / key
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(data)
            if not blob.is_symlink():
                blob.symlink_to(Path("../../blobs") / key[:2] / key)
        else:
            blob.write_bytes(data)
        link = repository / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    for ref in refs:
        path = repository / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return repository / "snapshots" / commit


class Hub:
    """State of the local server: the published repositories, and a log of the requests."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}  # files by repository and commit
        self.refs: dict[str, dict[str, str]] = {}  # commits by repository and ref
        self.failures: dict[str, tuple[int, str]] = {}  # HTTP status and error code by repository that fails
        self.requests: list[str] = []  # method and path of each request
        self.url = ""

    def add(self, repo: str, commit: str, files: Files, *, refs: Sequence[str] = ("main",)) -> None:
        """Publish a commit of a repository, and point ``refs`` to it."""
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {}).update(dict.fromkeys(refs, commit))

    def downloaded(self) -> set[str]:
        """Return the names of the files that clients downloaded."""
        return {path.rsplit("/", 1)[1] for path in self.requests if path.startswith("GET ") and "/resolve/" in path}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return the HTTP status, headers and body of the response to a request for a path."""
        parts = unquote(path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, verb, rest = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", parts[5:]
        else:
            repo, verb, rest = "/".join(parts[:2]), parts[2], parts[3:]
        if repo in self.failures:
            status, code = self.failures[repo]
            return status, {"X-Error-Code": code} if code else {}, b""
        if repo not in self.commits:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        revision = rest[0] if rest else "main"
        commit = self.refs[repo].get(revision, revision)
        files = self.commits[repo].get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if verb == "revision":
            return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}).encode()
        if verb == "tree":
            entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha256(data).hexdigest()} for name, data in files.items()]
            return 200, {}, json.dumps(entries).encode()
        name = "/".join(rest[1:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"'}, files[name]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Context manager: run the server on a local port and set ``hub.url``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
