"""A web server on this machine that stalls, fails, truncates or changes bytes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Site:
    """What a server does: serve the files of a folder, with some faults."""

    def __init__(self, folder: Path, faulty: str) -> None:
        self.folder = folder
        self.faulty = faulty
        """How the names of the files begin to which the faults apply."""
        self.faults: list[str] = []
        """The faults of the next requests for such files, one each."""
        self.ranges = True
        self.over = threading.Event()
        self.requests: list[tuple[str, str]] = []


@contextmanager
def serving(folder: Path, faulty: str) -> Iterator[tuple[Site, str]]:
    """A server of the files below a folder, and its URL."""
    site = Site(folder, faulty)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            name, span = Path(self.path).name, self.headers.get("Range", "")
            site.requests.append((name, span))
            file = site.folder / self.path.removeprefix("/files/")
            fault = site.faults.pop(0) if name.startswith(site.faulty) and site.faults else ""
            if fault.isdecimal():
                self.send_error(int(fault))
                return
            if not file.exists():
                self.send_error(404)
                return
            data, start = file.read_bytes(), 0
            if span and site.ranges:
                start = int(span.removeprefix("bytes=").removesuffix("-"))
            body = data[start:]
            if fault == "damage":
                body = body[:-1] + bytes([body[-1] ^ 1])
            if fault == "stall":
                site.over.wait()
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError):  # the client has given up
                self.wfile.write(body[: len(body) // 2] if fault in ("truncate", "pause") else body)
            if fault == "pause":
                self.wfile.flush()
                site.over.wait()
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield site, f"http://127.0.0.1:{server.server_address[1]}/files"
        site.over.set()
        server.shutdown()
