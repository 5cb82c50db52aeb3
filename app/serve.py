"""serve: show a built page to browsers, on this machine unless another address is given.

usage: python -m app.serve FOLDER --host 127.0.0.1 --port 8490
"""

import argparse
import errno
import http.server
import ipaddress
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

from app.page import POLICY

# Seldom used: a browser keeps the page for this address, and shows it in place of another program's.
PORT = 8490
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",  # the system's own camera takes the photograph
    "Cache-Control": "no-cache",  # a browser asks each time whether a file is still the same
}
SERVICE_WORKER = "/service-worker.js"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Send the files of one folder, with the page's policy."""

    path = ""  # until a request has been understood
    # Not as this machine's own table has it: with `nosniff`, a script of another type does not run.
    extensions_map = {  # noqa: RUF012
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".txt": "text/plain; charset=utf-8",
        ".png": "image/png",
        ".webmanifest": "application/manifest+json",
        "": "application/octet-stream",
    }

    def end_headers(self) -> None:
        # The page may connect to nothing; its service worker fetches the page's own files.
        own = self.path.partition("?")[0] == SERVICE_WORKER
        policy = POLICY.replace("connect-src 'none'", "connect-src 'self'") if own else POLICY
        for name, value in (HEADERS | {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}).items():
            self.send_header(name, value)
        super().end_headers()

    def send_head(self) -> Any:
        try:
            return super().send_head()
        except ValueError as error:  # a path that no file can have
            self.send_error(400, explain=str(error))
            return None

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serve a folder on an address of IPv4 or IPv6."""

    daemon_threads = True

    def __init__(self, host: str, port: int, folder: Path) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), partial(Handler, directory=str(folder)))

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave when it likes
            super().handle_error(request, client_address)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = Path(args.folder)
    if not (folder / "index.html").is_file():
        raise SystemExit(f"serve: there is no page in {folder}. `make page` builds it.")
    if not args.host:
        raise SystemExit("serve: the host is empty. 127.0.0.1 is this machine, and 0.0.0.0 opens the page to its network.")
    try:
        server = Server(args.host, args.port, folder)
    except (OSError, OverflowError, TypeError) as error:  # TypeError: a name that no host can have
        raise SystemExit(f"serve: cannot listen on {args.host}, port {args.port}: {advise(error, args.port)}") from None
    with server:
        host, port = server.server_address[:2]
        print(says(str(host), port), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def advise(error: Exception, port: int) -> str:
    """Say why a server cannot listen, and name another port where one may help."""
    if not isinstance(error, OSError):
        return f"{str(error).rstrip('.')}."
    helps = error.errno in (errno.EADDRINUSE, errno.EACCES)
    return f"{error.strerror}." + (f" Try PORT={PORT + (port == PORT)}." if helps else "")


def says(host: str, port: int) -> str:
    """Say where the page is, and who can open it, of the address that the server listens on."""
    shown = own_address() if host in ("0.0.0.0", "::") else host
    shown = f"[{shown}]" if ":" in shown else shown
    if ipaddress.ip_address(host).is_loopback:
        return f"\nSee:   http://{shown}:{port}/   on this machine only; end it with Ctrl+C\nPhone: make app HOST=0.0.0.0\n"
    return (
        f"\nSee:   http://{shown}:{port}/\n\n"
        "Whoever is in the same network can open this page and read the model. A photograph stays on the phone.\n"
        "It is plain http: somebody in that network could change the page on its way. Use it where you trust the network.\n"
        "Taking and choosing photographs works. Only https lets a phone install the page, and use it without a network:\n"
        "for that, put the folder on a web server. End this one with Ctrl+C.\n"
    )


def own_address() -> str:
    """Find the address of this machine in its network, as far as it is known; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of nobody, by RFC 5737
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=PORT)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
