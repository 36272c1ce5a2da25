"""A tracking server that misbehaves in one of eight ways: ``python faulty_server.py WAY`` prints its port.

Each request that it gets is a line on stdout.
"""

import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

EXPERIMENT = {"experiment_id": "7", "lifecycle_stage": "active", "artifact_location": "mlflow-artifacts:/7"}
RUN = {
    "info": {"run_id": "ab" * 16, "experiment_id": "7", "status": "RUNNING", "artifact_uri": "mlflow-artifacts:/7/a"}
}


class Handler(BaseHTTPRequestHandler):
    way = ""

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        print(self.command, self.path, flush=True)
        with contextlib.suppress(OSError):
            getattr(self, self.way)()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *_: object) -> None: ...

    def reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def drip(self) -> None:
        """A byte every second, of an answer that has no end."""
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b" ")
            time.sleep(1)

    def endless(self) -> None:
        """An answer without end, as fast as it is read."""
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b" " * 2**16)

    def empty(self) -> None:
        """An empty object, whatever was asked."""
        self.reply(b"{}")

    def error(self) -> None:
        self.reply(b'{"error_code": "INTERNAL_ERROR", "message": "\\u001b[31mno\\n"}', 500)

    def reset(self) -> None:
        """The connection is reset in mid-answer."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def silent(self) -> None:
        """No answer."""
        time.sleep(3600)

    def slow(self) -> None:
        """A right answer, after three seconds."""
        time.sleep(3)
        url = urlsplit(self.path)
        what = url.path.partition("/api/2.0/mlflow/")[2] or url.path
        name = parse_qs(url.query).get("experiment_name", ["?"])[0]
        answers = {
            "experiments/get-by-name": {"experiment": {**EXPERIMENT, "name": name}},
            "runs/create": {"run": RUN},
            "runs/get": {"run": RUN},
            "runs/update": {"run_info": RUN["info"]},
        }
        self.reply(json.dumps(answers.get(what, {})).encode())

    def garbage(self) -> None:
        """Redirects in a circle, and what is not JSON."""
        if "again" in self.path:
            self.reply(bytes(range(256)) * 20)
        else:
            self.reply(b"", 302, Location=f"{self.path}{'&' if '?' in self.path else '?'}again")


WAYS = ("drip", "endless", "empty", "error", "reset", "silent", "slow", "garbage")


@contextlib.contextmanager
def serving(way: str, requests: Path) -> Iterator[str]:
    """The address of a server in a process of its own, which writes the requests that it gets to a file."""
    with requests.open("w") as out:
        process = subprocess.Popen([sys.executable, __file__, way], stdout=out)
    try:
        while not requests.read_text().strip():
            time.sleep(0.05)
        yield f"http://127.0.0.1:{requests.read_text().split()[0]}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    Handler.way = sys.argv[1]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
