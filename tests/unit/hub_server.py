"""A Hugging Face Hub on localhost: enough of its HTTP interface to fetch and push small repositories for real."""

import base64
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
        self.token = "hf_writes"
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
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
            self.read()
            self.answer()

        def do_PUT(self) -> None:
            self.read()
            hub.large[self.path.rsplit("/", 1)[-1]] = self.body
            self.reply(200, b"", {})

        def read(self) -> None:
            if self.headers.get("Transfer-Encoding") != "chunked":
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            if self.push(path):
                return
            if match := re.fullmatch(
                r"api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|auth-check)/?(.*))?", path
            ):
                kind, name, action, rest = match.groups()
                self.api(kind, name, action or "revision", rest or "main")
            elif match := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/(.+)", path):
                self.file("datasets" if match[1] else "models", match[2], match[3])
            else:
                self.fail(404, "EntryNotFound")

        def push(self, path: str) -> bool:
            """Whether a request belongs to sending files, which is then answered; only the right token may."""
            match = re.fullmatch(
                r"api/(?:(whoami)-v2|repos/(create)|validate-(yaml)|models/([^/]+/[^/]+)/(preupload|commit)/main)"
                r"|[^/]+/[^/]+\.git/info/lfs/objects/(batch)",
                path,
            )
            if match is None:
                return False
            whoami, create, yaml, named, action, batch = match.groups()
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.reply(401, b"{}", {})
                return True
            if whoami:
                self.json({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
            elif yaml:
                self.json({"errors": [], "warnings": []})
            elif create:
                self.create(json.loads(self.body))
            elif batch:
                self.json({"transfer": "basic", "objects": [self.store(o) for o in json.loads(self.body)["objects"]]})
            elif action == "preupload":
                files = [file["path"] for file in json.loads(self.body)["files"]]
                modes = {name: "lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in files}
                self.json(
                    {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
                )
            else:
                self.commit(named, self.body.decode().splitlines())
            return True

        def create(self, asked: dict[str, str]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repositories["models"]
            hub.repositories["models"].setdefault(name, {})
            if not known and asked.get("visibility") == "private":
                hub.private.add(name)
            self.reply(409 if known else 200, json.dumps({"url": f"{hub.url}/{name}"}).encode(), {})

        def store(self, wanted: dict[str, object]) -> dict[str, object]:
            return {**wanted, "actions": {"upload": {"href": f"{hub.url}/store/{wanted['oid']}"}}}

        def commit(self, name: str, lines: list[str]) -> None:
            files = hub.repositories["models"][name]
            for line in map(json.loads, lines):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            self.json({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

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
