"""A page of results that keeps itself current, for this machine alone.

The server knows two addresses, the page and the part about unfinished runs. It answers nothing
else, takes no path or name from a request, and listens on 127.0.0.1 only. Requests under another
host name are refused, so that no page of another site can read it through a name of its own.
"""

import hashlib
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from steelyard.lab.report import (
    find_results,
    find_unfinished,
    read_entries,
    render_live,
    render_page,
)

HOST = "127.0.0.1"
PORT = 8765

Answer = tuple[str, bytes]  # a name that changes with the content, and the content


class Site:
    """The page of what lies in some places, rendered again when something there has changed.

    Args:
        places: gives the places; asked again at each look, since new runs appear.
        scratch: where figures are drawn.
    """

    def __init__(self, places: Callable[[], Sequence[Path]], scratch: Path) -> None:
        self._places = places
        self._scratch = scratch
        self._lock = threading.Lock()
        self._page: Answer = ("", b"")
        self._live: Answer = ("", b"")

    def version(self) -> str:
        """Return a name of all results as they are now."""
        return _name(_watched(find_results(self._places())))

    def page(self) -> Answer:
        """Return the page; where it cannot be rendered anew, the one before."""
        with self._lock:
            places = self._places()
            files = find_results(places)
            version = _name(_watched(files))
            if self._page[0] != version:
                try:
                    entries = list(read_entries(files, self._scratch).values())
                    html = render_page(entries, unfinished=find_unfinished(places), version=version)
                    self._page = (version, html.encode())
                except (ValueError, OSError) as error:
                    if not self._page[0]:
                        raise
                    print(f"steelyard: the page stays as it was: {error}", file=sys.stderr)
            return self._page

    def live(self) -> Answer:
        """Return the part about unfinished runs."""
        with self._lock:
            html = render_live(find_unfinished(self._places())).encode()
            return hashlib.sha256(html).hexdigest()[:16], html


def make_server(site: Site, port: int | None = None) -> ThreadingHTTPServer:
    """Return a server of a site, bound but not yet serving.

    Args:
        site: what it shows.
        port: where it listens; 0 for any. Without one :data:`PORT`, or any if that is taken.

    Raises:
        OSError: the port is taken.
    """
    handler = partial(_Handler, site)
    ports = (PORT, 0) if port is None else (port,)
    for attempt in ports:
        try:
            return _Server((HOST, attempt), handler)
        except OSError as error:
            if attempt == ports[-1]:
                reason = error.strerror or str(error)
                raise OSError(f"cannot listen on port {attempt}: {reason}") from error
    raise AssertionError


def serve(
    places: Callable[[], Sequence[Path]], port: int | None, say: Callable[[str], None]
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        places: gives what :class:`Site` shows.
        port: as in :func:`make_server`.
        say: prints a line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        server = make_server(Site(places, Path(scratch)), port)
        with server:
            say(f"http://{HOST}:{server.server_address[1]} shows the results and keeps up with")
            say("runs that go on. Ctrl-C ends it; no run is touched.")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say("")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


class _Handler(BaseHTTPRequestHandler):
    server_version = "steelyard"
    sys_version = ""

    def __init__(self, site: Site, *arguments: object) -> None:
        self._site = site
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        """Keep the terminal quiet: the page asks every two seconds."""

    def _answer(self, *, with_body: bool) -> None:
        _, port = self.connection.getsockname()[:2]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            return self._plain(HTTPStatus.FORBIDDEN, "this page is for this machine")
        routes = {"/": self._site.page, "/live": self._site.live}
        route = routes.get(self.path.partition("?")[0])
        if route is None:
            return self._plain(HTTPStatus.NOT_FOUND, "there is nothing here")
        try:
            tag, body = route()
            version = self._site.version()
        except (ValueError, OSError) as error:
            return self._plain(HTTPStatus.INTERNAL_SERVER_ERROR, f"steelyard: {error}")
        known = self.headers.get("If-None-Match") == f'"{tag}"'
        self.send_response(HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Page", version)
        self._send("text/html; charset=utf-8", b"" if known else body, with_body=with_body)

    def _plain(self, status: HTTPStatus, text: str) -> None:
        self.send_response(status)
        self._send("text/plain; charset=utf-8", text.encode(), with_body=self.command != "HEAD")

    def _send(self, kind: str, body: bytes, *, with_body: bool) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _watched(files: Iterable[Path]) -> list[Path]:
    """Result files and the folders of their figures."""
    return [path for file in files for path in (file, file.parent / "figures")]


def _name(paths: Iterable[Path]) -> str:
    """Name the state of some files by their times and sizes."""
    state = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        state.append((str(path), stat.st_mtime_ns, stat.st_size))
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]
