"""A file system elsewhere that fails now and then: WebHDFS, which Hadoop's client speaks, over a folder of this machine."""

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Serve a folder.

    Attributes
    ----------
    url : of the folder, for Spark
    fails : by the path of a file below the folder, how often its reading fails, and how
        busy: the server says that it cannot now; cut: it stops in the middle;
        short: it gives half of the file as if it were all; gone: the file is listed, but not there
    asked : how often each path was read
    listed : how often each folder was listed
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"webhdfs://127.0.0.1:{self.server_address[1]}"
        self.fails: dict[str, tuple[int, str]] = {}
        self.asked: Counter[str] = Counter()
        self.listed: Counter[str] = Counter()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing where a client has left."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def handle_one(self) -> None:
        address = urlsplit(self.path)
        query = {key.lower(): values[0] for key, values in parse_qs(address.query, keep_blank_values=True).items()}
        below = unquote(address.path).removeprefix("/webhdfs/v1").strip("/")
        body = self.read_body()
        try:
            getattr(self, f"op_{query['op'].lower()}")(below, self.server.folder / below, query, body)
        except FileNotFoundError:
            self.refuse(404, "java.io.FileNotFoundException", f"File does not exist: /{below}")
        except AttributeError:
            self.refuse(400, "java.lang.UnsupportedOperationException", query["op"])

    do_GET = do_PUT = do_DELETE = do_POST = handle_one

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, error: str, message: str) -> None:
        name = error.rpartition(".")[2]
        self.answer({"RemoteException": {"exception": name, "javaClassName": error, "message": message}}, status)

    def send_elsewhere(self) -> None:
        """Send the client to the node that has the data: here again."""
        self.answer(status=307, Location=f"http://127.0.0.1:{self.server.server_address[1]}{self.path}&node=true")

    def status_of(self, file: Path, name: str) -> dict[str, Any]:
        status, is_folder = file.stat(), file.is_dir()
        return {
            "accessTime": 0,
            "blockSize": 0 if is_folder else 2**27,
            "group": "nobody",
            "length": 0 if is_folder else status.st_size,
            "modificationTime": int(status.st_mtime * 1000),
            "owner": "nobody",
            "pathSuffix": name,
            "permission": "755",
            "replication": 0 if is_folder else 1,
            "type": "DIRECTORY" if is_folder else "FILE",
        }

    def op_getfilestatus(self, below: str, file: Path, query: dict[str, str], body: bytes) -> None:
        self.answer({"FileStatus": self.status_of(file, "")})

    def op_liststatus(self, below: str, file: Path, query: dict[str, str], body: bytes) -> None:
        self.server.listed[below] += 1
        named = [(each, each.name) for each in sorted(file.iterdir())] if file.is_dir() else [(file, "")]
        self.answer({"FileStatuses": {"FileStatus": [self.status_of(*each) for each in named]}})

    def op_getfileblocklocations(self, below: str, file: Path, query: dict[str, str], body: bytes) -> None:
        self.answer({"BlockLocations": {"BlockLocation": []}})

    op_get_block_locations = op_getfileblocklocations

    def op_open(self, below: str, file: Path, query: dict[str, str], body: bytes) -> None:
        if "node" not in query:
            return self.send_elsewhere()
        self.server.asked[below] += 1
        content, (times, way) = file.read_bytes()[int(query.get("offset", 0)) :], self.server.fails.get(below, (0, ""))
        if self.server.asked[below] > times:
            return self.answer(content)
        if way == "busy":
            return self.refuse(503, "java.io.IOException", f"Please reduce your request rate: {below}")
        if way == "gone":
            raise FileNotFoundError
        if way == "short":
            return self.answer(content[: len(content) // 2])
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        return None

    def op_create(self, below: str, file: Path, query: dict[str, str], body: bytes) -> None:
        if "node" not in query:
            return self.send_elsewhere()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
        return self.answer(status=201)

    def op_mkdirs(self, below: str, file: Path, query: dict[str, str], body: bytes) -> None:
        file.mkdir(parents=True, exist_ok=True)
        self.answer({"boolean": True})

    def op_rename(self, below: str, file: Path, query: dict[str, str], body: bytes) -> None:
        to = self.server.folder / query["destination"].strip("/")
        os.replace(file, to / file.name if to.is_dir() else to)
        self.answer({"boolean": True})

    def op_delete(self, below: str, file: Path, query: dict[str, str], body: bytes) -> None:
        there = file.exists()
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        self.answer({"boolean": there})

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder while the block runs."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
