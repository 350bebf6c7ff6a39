"""The part of a Kubernetes API server that discovery needs, with TLS.

``python kubernetes_server.py PORT CERTIFICATE [RESOURCE:VERB …]``; without verbs, an account may do everything.
A POST to ``/trouble`` with a status makes it answer everything with that, until one with 200 comes.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_KIND = "dynamoworkermetadatas"


class Objects:
    """The stored objects, by the last two parts of their paths."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._version = 1
        self._objects: dict[tuple[str, str], dict[str, Any]] = {}

    def put(self, key: tuple[str, str], value: dict[str, Any]) -> None:
        with self.changed:
            self._version += 1
            metadata = {**value.get("metadata", {}), "resourceVersion": str(self._version), "uid": "/".join(key)}
            self._objects[key] = {**value, "metadata": metadata}
            self.changed.notify_all()

    def get(self, key: tuple[str, str]) -> dict[str, Any] | None:
        with self.changed:
            return self._objects.get(key)

    def remove(self, key: tuple[str, str]) -> bool:
        with self.changed:
            self._version += 1
            self.changed.notify_all()
            return self._objects.pop(key, None) is not None

    def kind(self, name: str) -> dict[str, dict[str, Any]]:
        with self.changed:
            return {key[1]: value for key, value in self._objects.items() if key[0] == name}

    @property
    def version(self) -> str:
        return str(self._version)


class Handler(BaseHTTPRequestHandler):
    """Lists, watches, applies and patches; anybody with the right token may do all of it."""

    protocol_version = "HTTP/1.1"
    objects = Objects()
    trouble = 200
    asked = 0

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def _answer(self, body: Any, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _refused(self) -> bool:
        Handler.asked += 1
        if Handler.trouble != 200:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer({"kind": "Status", "code": Handler.trouble, "message": "in trouble"}, Handler.trouble)
            return True
        may = not sys.argv[3:] or all(action in sys.argv[3:] for action in self._actions())
        if may and self.headers.get("Authorization") == "Bearer right":
            return False
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer({"kind": "Status", "status": "Failure", "code": 403, "message": "this account may not list"}, 403)
        return True

    def _actions(self) -> list[str]:
        """Return what RBAC would have to allow for this request, as ``RESOURCE:VERB``."""
        parts = urlsplit(self.path)
        *_, above, last = parts.path.split("/")
        if self.command == "GET" and above == _KIND:
            return [f"{above}:get"]
        if self.command == "GET":
            return [f"{last}:{'watch' if 'watch' in parse_qs(parts.query) else 'list'}"]
        creates = (
            self.command == "PATCH" and "fieldManager" in parse_qs(parts.query) and not self.objects.get((above, last))
        )
        return [f"{above}:{self.command.lower()}", *([f"{above}:create"] if creates else [])]

    def do_GET(self) -> None:
        if self._refused():
            return
        parts = urlsplit(self.path)
        *_, above, kind = parts.path.split("/")
        if above == _KIND:
            value = self.objects.get((above, kind))
            if value is None:
                self._missing(kind)
            else:
                self._answer(value)
            return
        if "watch" in parse_qs(parts.query):
            self._watch(kind)
            return
        items = list(self.objects.kind(kind).values())
        metadata = {"resourceVersion": self.objects.version}
        self._answer({"apiVersion": "v1", "kind": "List", "metadata": metadata, "items": items})

    def _watch(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        seen: dict[str, dict[str, Any]] = {}
        try:
            while True:
                now = self.objects.kind(kind)
                for name, value in now.items():
                    if seen.get(name) != value:
                        self._event("MODIFIED" if name in seen else "ADDED", value)
                seen = now
                with self.objects.changed:
                    self.objects.changed.wait(0.1)
        except OSError:
            return

    def _event(self, kind: str, value: dict[str, Any]) -> None:
        text = json.dumps({"type": kind, "object": value}).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        self.wfile.flush()

    def do_DELETE(self) -> None:
        if self._refused():
            return
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = (*urlsplit(self.path).path.split("/")[-2:],)
        if self.objects.remove(key):  # type: ignore[arg-type]
            self._answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})
        else:
            self._missing(key[1])

    def do_POST(self) -> None:
        Handler.trouble = int(self.rfile.read(int(self.headers["Content-Length"])))
        asked, Handler.asked = Handler.asked, 0
        self._answer({"asked": asked})

    def _missing(self, name: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        self._answer({**status, "message": f"{name} not found", "details": {"name": name, "kind": _KIND}}, 404)

    def do_PATCH(self) -> None:
        if self._refused():
            return
        key = (*urlsplit(self.path).path.split("/")[-2:],)
        change = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Content-Type"] == "application/json-patch+json":
            value = self.objects.get(key)  # type: ignore[arg-type]
            if value is None:
                self._missing(key[1])
                return
            assert [(each["op"], each["path"]) for each in change] == [("replace", "/spec/data")]
            change = {**value, "spec": {"data": change[0]["value"]}}
        else:
            # Fields of an owner with another name would stay when the runtime removes them.
            assert parse_qs(urlsplit(self.path).query) == {"force": ["true"], "fieldManager": ["dynamo-worker"]}
            before = self.objects.get(key)  # type: ignore[arg-type]
            version = change["metadata"].get("resourceVersion")
            if version is not None and (before is None or before["metadata"]["resourceVersion"] != version):
                self._answer({"kind": "Status", "code": 409, "message": "the object has been modified"}, 409)
                return
        self.objects.put(key, change)  # type: ignore[arg-type]
        self._answer(self.objects.get(key))  # type: ignore[arg-type]


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[2])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
