"""A local stand-in for the W&B server: enough of its protocol for a client to run online against it.

    with WandbStub() as stub:
        ...                                # a run with WANDB_BASE_URL=stub.url and any 40 characters as its key
        stub.runs["some-id"]["rows"]       # what arrived

`die()` closes the port under a running client; `status = 401` refuses everybody.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = "stub-entity"


class WandbStub:
    def __init__(self):
        self.runs: dict[str, dict] = {}  # run id -> rows, summary, config, exit_code and the variables of upsertBucket
        self.requests: list[str] = []  # "POST /graphql UpsertBucket", ... in order of arrival
        self.status = 200
        self._alive = True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.die()

    def die(self) -> None:
        """Refuse every connection from here on."""
        if self._alive:
            self._alive = False
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict:
        """What the server says to one POST; an operation it does not know gets an empty answer."""
        if path == "/graphql":
            request = json.loads(body)
            return {"data": self._graphql(request["operationName"], request.get("variables") or {})}
        if path.endswith("/file_stream"):
            self._file_stream(path.split("/")[-2], json.loads(body))
        return {}

    def _graphql(self, operation: str, variables: dict) -> dict:
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def _run(self, run_id: str) -> dict:
        return self.runs.setdefault(run_id, {"rows": [], "summary": {}, "config": {}, "exit_code": None})

    def _upsert(self, variables: dict) -> dict:
        run = self._run(variables["name"])
        config = json.loads(variables.pop("config", None) or "{}")
        run["config"] |= {key: entry["value"] for key, entry in config.items()}
        run.update({key: value for key, value in variables.items() if value is not None})
        project = {"id": "1", "name": run["project"], "entity": {"id": "1", "name": run.get("entity", ENTITY)}}
        return {"id": "1", "name": run["name"], "displayName": run.get("displayName"), "config": "{}",
                "project": project, "historyLineCount": 0}  # fmt: skip

    def _file_stream(self, run_id: str, body: dict) -> None:
        run, files = self._run(run_id), body.get("files") or {}
        if history := files.get("wandb-history.jsonl"):  # a chunk sent twice replaces itself
            run["rows"][history["offset"] :] = map(json.loads, history["content"])
        if summary := files.get("wandb-summary.json"):
            run["summary"] = json.loads(summary["content"][-1])
        if body.get("complete"):
            run["exit_code"] = body["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    stub: WandbStub  # HTTP/1.0, one request a connection: once the port is closed nothing is answered

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        what = json.loads(body)["operationName"] if self.path == "/graphql" else ""
        self.stub.requests.append(f"{self.command} {self.path} {what}".strip())
        known = self.command == "POST" and self.stub.status == 200
        data = json.dumps(self.stub.answer(self.path, body) if known else {"errors": [{"message": "denied"}]}).encode()
        with contextlib.suppress(OSError):  # the client may have left
            self.send_response(self.stub.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def log_message(self, *args):
        pass
