"""A Hugging Face Hub on localhost: enough of its HTTP interface to fetch small repositories for real."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by kind and name: {"models": {"owner/name": {path: bytes}}}; names in `gated` want a token."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {"models": {}, "datasets": {}}
        self.branches = {"main", "refs/convert/parquet", COMMIT}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.url = ""


def environment(url: str, cache: Path) -> dict[str, str]:
    """Settings of a process that takes this server for the Hub, and the network for there."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer()

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            if match := re.fullmatch(
                r"api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|auth-check)/?(.*))?", path
            ):
                kind, name, action, rest = match.groups()
                self.api(kind, name, action or "revision", rest or "main")
            elif match := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/(.+)", path):
                self.file("datasets" if match[1] else "models", match[2], match[3])
            else:
                self.fail(404, "EntryNotFound")

        def api(self, kind: str, name: str, action: str, rest: str) -> None:
            files = hub.repositories[kind].get(name)
            if files is None:
                return self.fail(401, "RepoNotFound")  # as the real Hub answers those without a token
            if action == "auth-check":
                return self.fail(401, "GatedRepo") if name in hub.gated else self.json({})
            branch = next((b for b in hub.branches if rest == b or rest.startswith(b + "/")), None)
            if branch is None:
                return self.fail(404, "RevisionNotFound")
            if action == "revision":
                siblings = [{"rfilename": path} for path in files]
                return self.json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False})
            below = rest[len(branch) + 1 :]
            if action == "paths-info":
                wanted = json.loads(self.body).get("paths", [])
                return self.json([self.entry(path, files[path]) for path in wanted if path in files])
            prefix = f"{below}/" if below else ""
            found = [self.entry(path, content) for path, content in files.items() if path.startswith(prefix)]
            if "recursive=true" not in self.path.lower():
                deeper = [entry for entry in found if "/" in str(entry["path"])[len(prefix) :]]
                folders = sorted({prefix + str(entry["path"])[len(prefix) :].split("/")[0] for entry in deeper})
                found = [entry for entry in found if entry not in deeper]
                found += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
            return self.json(found) if found or not below else self.fail(404, "EntryNotFound")

        def entry(self, path: str, content: bytes) -> dict[str, object]:
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": self.oid(content)}
            if path.endswith((".safetensors", ".bin", ".parquet")):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            return entry

        def oid(self, content: bytes) -> str:
            return hashlib.sha1(content).hexdigest()

        def file(self, kind: str, name: str, rest: str) -> None:
            files = hub.repositories[kind].get(name, {})
            branch = next((b for b in hub.branches if rest.startswith(b + "/")), None)
            path = rest[len(branch) + 1 :] if branch else rest
            if name in hub.gated:
                return self.fail(401, "GatedRepo")
            if path not in files:
                return self.fail(404, "EntryNotFound")
            content = files[path]
            start = 0
            if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                start = int(match[1])
                content = content[start : int(match[2]) + 1 if match[2] else None]
            large = path.endswith((".safetensors", ".bin", ".parquet"))
            etag = hashlib.sha256(files[path]).hexdigest() if large else self.oid(files[path])
            if self.command == "GET":
                hub.fetched.append(path)
            self.send_response(206 if "Range" in self.headers else 200)
            if "Range" in self.headers:
                end = start + len(content) - 1
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(files[path])}")
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def json(self, content: object) -> None:
            self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def fail(self, status: int, code: str) -> None:
            self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
