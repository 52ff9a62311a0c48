"""Who may speak to the control plane: users made at any time, and the key that signs service account tokens."""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class Identities:
    """Answers the API server's question whose a token is (a TokenReview webhook), from this process.

    Unlike a file of tokens it knows new users without a restart, and unlike certificates it needs nothing that signs.
    """

    def __init__(self) -> None:
        self._users: dict[str, dict[str, object]] = {}
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        assert self._server is not None, "not started"
        return f"http://127.0.0.1:{self._server.server_port}/"

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="identities", daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def add(self, user: str, groups: Sequence[str] = ()) -> str:
        """A new token of ``user``, who is in ``groups``."""
        token = secrets.token_urlsafe(32)
        self._users[token] = {"username": user, "uid": user, "groups": list(groups)}
        return token

    def review(self, request: dict[str, object]) -> dict[str, object]:
        """The answer to a TokenReview; an unknown token is nobody's."""
        spec = request.get("spec")
        user = self._users.get(spec["token"]) if isinstance(spec, dict) else None
        status: dict[str, object] = {"authenticated": False} if user is None else {"authenticated": True, "user": user}
        return {"apiVersion": request["apiVersion"], "kind": "TokenReview", "status": status}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        review = self.review

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = json.dumps(review(json.loads(body))).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: tokens come by here."""

        return Handler


def signing_key() -> str:
    """A new P-256 private key (PEM, SEC 1). The public point is left out: readers compute it."""
    scalar = (1 + secrets.randbelow(_P256_ORDER - 1)).to_bytes(32, "big")
    version, curve = bytes.fromhex("020101"), bytes.fromhex("a00a06082a8648ce3d030107")
    body = version + b"\x04\x20" + scalar + curve
    text = base64.encodebytes(bytes((0x30, len(body))) + body).decode()
    return f"-----BEGIN EC PRIVATE KEY-----\n{text}-----END EC PRIVATE KEY-----\n"
