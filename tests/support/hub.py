"""A Hub on this machine: serves directories as repositories, and misbehaves when told."""

import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    def __init__(self, repos: dict[str, Path]):
        self.repos = repos
        self.sent: Counter = Counter()  # bytes sent, by file
        self.requests: list[tuple[str, str | None]] = []  # file, Range
        self.drop_after: dict[str, list[int]] = {}  # file → after how many bytes the next answers break off
        self.wrong_size: dict[str, int] = {}  # file → what is added to the size that is told
        self.url = ""


def object_id(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def handler(hub: Hub) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self._send(self._info("/".join(parts[2:4]), tree=parts[4:5] == ["tree"]))
            repo, file = "/".join(parts[:2]), "/".join(parts[4:])
            path = hub.repos.get(repo, Path("/nowhere")) / file
            hub.requests.append((file, self.headers.get("Range")))
            return self._send(path.read_bytes() if path.is_file() and parts[3] == COMMIT else None, file)

        do_HEAD = do_GET

        def _info(self, repo: str, tree: bool) -> bytes | None:
            if repo not in hub.repos:
                return None
            files = [path for path in sorted(hub.repos[repo].iterdir()) if path.is_file()]
            if tree:
                rows = [(path, path.read_bytes()) for path in files]
                fields = [{"type": "file", "path": p.name, "size": len(d), "oid": object_id(d)} for p, d in rows]
            else:
                fields = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
            return json.dumps(fields).encode()

        def _send(self, data, file=None):
            if data is None:
                self.send_error(404)
                return
            begin, end, status = 0, len(data), 200
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin, end, status = int(first), int(last) + 1 if last else len(data), 206
            body = data[begin:end]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if file is not None:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{object_id(data)}"')
            if status == 206:
                size = len(data) + hub.wrong_size.get(file, 0)
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.end_headers()
            if self.command == "HEAD":
                return
            drops = hub.drop_after.get(file)
            if drops and len(body) > 100_000:
                body = body[: drops.pop(0)]
                self.close_connection = True
            self.wfile.write(body)
            hub.sent[file] += len(body)

        def log_message(self, *arguments):
            """Tests print nothing."""

    return Handler


@contextmanager
def serving(**repos: Path):
    """`serving(mimo=DIR)` serves DIR as the repository test/mimo."""
    hub = Hub({f"test/{name}": Path(path) for name, path in repos.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
