"""A W&B server on this machine: it answers the client's protocol as far as this project's runs use it.

    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        ...
    server.runs["1f2e..."].history

It keeps what arrives as the hosted one does: history lines at the offset that the client names, config and summary as
their last state, an artifact of known content as one version however often it is sent. What it does not know it answers
with nothing and keeps in ``unknown``.

    server.fault = lambda what: 500 if what == "file_stream" else None

lets it answer a request with an error instead: ``what`` is the name of an operation, or file_stream, upload, download.
"""

from __future__ import annotations

import gzip
import http.server
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

ENTITY = "somebody"
KEY = "0123456789abcdef" * 2 + "01234567"


@dataclass
class SentRun:
    """A run as the server has it."""

    name: str
    project: str
    fields: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    starts: int = 0

    def history(self, *keys: str) -> list[tuple[int, dict[str, Any]]]:
        """Its points in the order of its lines: step and values, of the keys asked for or all."""
        points = []
        for _, line in sorted(self.lines.items()):
            values = {key: value for key, value in line.items() if not key.startswith("_")}
            if keys:
                values = {key: value for key, value in values.items() if key in keys}
            if values:
                points.append((line["_step"], values))
        return points


@dataclass
class SentArtifact:
    """One version of an artifact."""

    id: str
    name: str
    type: str
    digest: str
    metadata: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    made_by: list[str] = field(default_factory=list)
    used_by: list[str] = field(default_factory=list)
    state: str = "PENDING"


Fault = int | Literal["hang", "cut"] | None
"""A status that is answered, no answer, a connection that ends without one, or none of these."""
MESSAGES = {
    401: "user is not logged in",
    409: "run was previously created and deleted; try a new run name",
    429: "rate limit exceeded",
    500: "internal server error",
}


class WandbServer:
    """The server; a context manager."""

    def __init__(self, fault: Callable[[str], Fault] = lambda what: None) -> None:
        self.fault = fault
        self.faults: list[tuple[str, Fault]] = []
        self.deleted: set[str] = set()
        self.without: set[str] = set()
        self._ending = threading.Event()
        self.runs: dict[str, SentRun] = {}
        self.artifacts: dict[str, SentArtifact] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.projects: set[str] = set()
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.keys: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> WandbServer:
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ending.set()
        self._http.shutdown()
        self._http.server_close()

    def artifact(self, prefix: str) -> SentArtifact:
        """The one artifact version whose name begins so."""
        (found,) = [one for one in self.artifacts.values() if one.name.startswith(prefix) and one.state == "COMMITTED"]
        return found

    # --- what arrives

    def graphql(self, operation: str, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The ``data`` of an answer."""
        answer = None if operation in self.without else getattr(self, f"_on_{operation}", None)
        with self._lock:
            self.operations.append(operation)
            if answer is None:
                self.unknown.append(operation)
                return {}
            found: dict[str, Any] = answer(given)
            return found

    def stream(self, project: str, name: str, sent: dict[str, Any]) -> None:
        """Points, summary and the end of a run."""
        with self._lock:
            run = self.runs[name]
            for file, part in sent.get("files", {}).items():
                for place, line in enumerate(part["content"], part["offset"]):
                    if file == "wandb-history.jsonl":
                        run.lines[place] = json.loads(line)
                    elif file == "wandb-summary.json":
                        run.summary = json.loads(line)
            if sent.get("complete"):
                run.exit_code = sent.get("exitcode")

    def upload(self, kind: str, owner: str, name: str, content: bytes) -> None:
        """A file of a run, a file of an artifact, or an artifact's manifest."""
        with self._lock:
            if kind == "run":
                self.runs[owner].files[name] = content
            elif kind == "manifest":
                self.artifacts[owner].manifest = json.loads(content)["contents"]
            else:
                self.artifacts[owner].files[name] = content

    # --- operations, named as the client names them

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    _on_GetDefaultEntity = _on_Viewer
    _on_GetViewer = _on_Viewer

    def _on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, SentRun(name, given["project"]))
        fresh = {key: given[key] for key in ("groupName", "jobType", "tags", "displayName") if given.get(key)}
        run.starts += bool(fresh)
        run.fields |= fresh
        for key, value in json.loads(given.get("config") or "{}").items():
            run.config[key] = value["value"]
        owner = {"id": "e", "name": given.get("entity") or ENTITY}
        bucket = {"id": f"id-{name}", "name": name, "displayName": run.fields.get("displayName"), "config": "{}"}
        bucket |= {"project": {"id": "p", "name": run.project, "entity": owner}, "historyLineCount": len(run.lines)}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        model: dict[str, Any] = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": ENTITY}}
        run = self.runs.get(given["name"])
        if run is None:
            return {"model": {**model, "bucket": None}}
        last = [json.dumps(line) for _, line in sorted(run.lines.items())[-1:]]
        bucket = {
            "id": f"id-{run.name}",
            "name": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.fields.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(run.lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps(last),
            "eventsTail": "[]",
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "tags": run.fields.get("tags", []),
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**model, "bucket": bucket}}

    def _on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": self._url("run", given["run"], name)} for name in given["files"]]
        return {"createRunFiles": {"runID": f"id-{given['run']}", "uploadHeaders": [], "files": files}}

    def _on_ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["name"].partition(":")[0]
        found = next((one for one in self.artifacts.values() if one.name == name), None)
        return {"project": {"artifact": found and {"artifactType": {"name": found.type}}}}

    def _on_CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given.get("input", given)
        name = asked.get("artifactCollectionName") or asked["artifactCollectionNames"][0]
        known = [one for one in self.artifacts.values() if (one.name, one.digest) == (name, asked["digest"])]
        if not known:
            metadata = json.loads(asked.get("metadata") or "{}")
            id = f"artifact{len(self.artifacts)}"
            known = [SentArtifact(id, name, asked["artifactTypeName"], asked["digest"], metadata)]
            self.artifacts[id] = known[0]
        (artifact,) = known
        if asked.get("runName"):
            artifact.made_by.append(asked["runName"])
        same = [one.id for one in self.artifacts.values() if one.name == name and one.state == "COMMITTED"]
        latest = {"id": same[-1], "versionIndex": len(same) - 1} if same else None
        sequence = {"id": f"sequence-{name}", "latestArtifact": latest}
        return {
            "createArtifact": {"artifact": {"id": artifact.id, "state": artifact.state, "artifactSequence": sequence}}
        }

    def _on_CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        owner = given.get("artifactID") or given["input"]["artifactID"]
        file = {"id": "f", "name": "wandb_manifest.json", "displayName": "wandb_manifest.json", "uploadHeaders": []}
        file["uploadUrl"] = self._url("manifest", owner, "wandb_manifest.json")
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{owner}", "file": file}}}

    _on_UpdateArtifactManifest = _on_CreateArtifactManifest

    def _on_CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given.get("artifactFiles") or given["input"]["artifactFiles"]
        edges = [
            {
                "node": {
                    "id": "f",
                    "name": file["name"],
                    "displayName": file["name"],
                    "uploadUrl": self._url("artifact", file["artifactID"], file["name"]),
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "storagePath": f"stored/{file['name']}",
                    "artifact": {"id": file["artifactID"]},
                }
            }
            for file in asked
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[given.get("artifactID") or given["input"]["artifactID"]]
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _on_UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given.get("input", given)
        artifact = self.artifacts[asked["artifactID"]]
        artifact.used_by.append(asked["runName"])
        return {"useArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _on_ProjectInternalId(self, given: dict[str, Any]) -> dict[str, Any]:
        known = given["projectName"] in self.projects | {run.project for run in self.runs.values()}
        return {"project": {"id": "p", "internalId": "17"} if known else None}

    def _on_GetProjects(self, given: dict[str, Any]) -> dict[str, Any]:
        projects = sorted(self.projects | {run.project for run in self.runs.values()})
        facts = {"__typename": "Project", "entityName": ENTITY, "createdAt": "2026", "isBenchmark": False, "user": None}
        edges = [{"node": {**facts, "id": f"p-{name}", "name": name}} for name in projects]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"__typename": "ProjectConnection", "totalCount": 1, "pageInfo": page, "edges": edges}}

    def _on_UpsertSweep(self, given: dict[str, Any]) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = given
        place = {"id": "p", "name": given["projectName"], "entity": {"id": "e", "name": given["entityName"]}}
        return {"upsertSweep": {"sweep": {"name": name, "project": place}, "configValidationWarnings": []}}

    def _on_upsertView(self, given: dict[str, Any]) -> dict[str, Any]:
        id = given.get("id") or f"page{len(self.reports)}"
        self.reports[id] = given
        project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        view = {key: given.get(key) for key in ("type", "name", "displayName", "description", "spec")}
        return {"upsertView": {"view": {**view, "id": id, "project": project, "updatedAt": None}, "inserted": True}}

    def _url(self, kind: str, owner: str, name: str) -> str:
        return f"{self.address}/upload/{kind}/{owner}/{name}"


def _handler(server: WandbServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self._content()
            answer: Any = {}
            if self.path == "/graphql":
                asked = json.loads(content)
                named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                operation = asked.get("operationName") or (named[1] if named else "")
                gone = operation == "UpsertBucket" and asked["variables"].get("name") in server.deleted
                if self._failed(operation, 409 if gone else None):
                    return
                answer = {"data": server.graphql(operation, asked["query"], asked.get("variables") or {})}
            elif found := re.fullmatch(r"/files/[^/]+/([^/]+)/([^/]+)/file_stream", self.path):
                if self._failed("file_stream"):
                    return
                server.stream(found[1], found[2], json.loads(content))
            self._answer(json.dumps(answer).encode())

        def do_PUT(self) -> None:
            content = self._content()
            _, _, kind, owner, name = self.path.split("/", 4)
            if not self._failed("upload"):
                server.upload(kind, owner, name, content)
                self._answer(b"")

        def do_GET(self) -> None:
            self._content()
            if not self._failed("download"):
                self._answer(b"{}")

        def _failed(self, what: str, of_itself: Fault = None) -> bool:
            """Do what is wanted in place of an answer, if anything is."""
            fault = server.fault(what) or of_itself
            if fault is None:
                return False
            server.faults.append((what, fault))
            if fault == "hang":
                server._ending.wait(600)
            if isinstance(fault, int):
                self._answer(json.dumps({"errors": [{"message": MESSAGES.get(fault, "")}]}).encode(), fault)
            else:
                self.close_connection = True
                self.connection.close()
            return True

        def _content(self) -> bytes:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                content = gzip.decompress(content)
            server.bodies.append(content)
            server.paths.append(self.path)
            server.keys.add(self.headers.get("authorization") or "")
            return content

        def _answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
