"""A local HTTP server that behaves as badly as a test asks it to."""

import contextlib
import http.server
import threading
import time
import urllib.parse

CONTENT = bytes(range(256)) * 1000
TEXT = b"Error 17: the file has moved.\n"
KINDS = {"ok", "nolength", "page", "flaky", "short", "stall", "busy", "drip", "text", "packed", "huge", "length"}
PAGE = b"\n<!DOCTYPE html>\n<html>Please log in.</html>"


class Handler(http.server.BaseHTTPRequestHandler):
    """The path says what happens; `server.content` and `.failures` can be changed between requests.

    /ok/...          the content
    /nolength/...    the content, its length not announced
    /page/...        a web page
    /flaky/...       as /ok, but the first `failures` answers break off half-way
    /short/...       every answer breaks off after 1000 bytes
    /drip/...        announces the content, and sends a byte now and then
    /text/...        a message in plain text
    /packed/...      the content, said to be compressed
    /huge/...        announces a petabyte
    /length/...      announces a length that is no number
    /stall/...       announces the content, sends some of it and then nothing
    /busy/...        as /ok after `failures` answers of 503
    /redirect/...    to /ok/...
    /loop            to itself
    /<number>        that status
    """

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.server.requests.append(self.path)
        kind = path.split("/")[1]
        if kind == "redirect":
            self._redirect(path.replace("/redirect", "/ok"))
        elif kind == "loop":
            self._redirect("/loop")
        elif kind.isdigit():
            self.send_error(int(kind))
        elif kind == "busy" and self._fails():
            self.send_error(503)
        elif kind in KINDS:
            self._send(kind)
        else:
            self.send_error(404)

    def _fails(self):
        self.server.failures -= 1
        return self.server.failures >= 0

    def _redirect(self, path):
        self.send_response(302)
        self.send_header("Location", path)
        self.end_headers()

    def _send(self, kind):
        body = {"page": PAGE, "text": TEXT}.get(kind, self.server.content)
        length = {"huge": 10**15, "length": "many"}.get(kind, len(body))
        self.send_response(200)
        if kind != "nolength":
            self.send_header("Content-Length", str(length))
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if kind == "flaky" and self._fails():
            body = body[: len(body) // 2]
        elif kind in ("short", "stall"):
            body = body[:1000]
        with contextlib.suppress(ConnectionError):
            for byte in body if kind == "drip" else ():
                self.wfile.write(bytes([byte]))
                if self.server.released.wait(0.02):
                    return
            self.wfile.write(body)
            self.wfile.flush()
            if kind == "stall":
                self.server.released.wait(10)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running():
    """A server in a thread; `.base` is its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.base = f"http://127.0.0.1:{server.server_address[1]}"
    server.released = threading.Event()
    reset(server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def reset(server):
    server.requests, server.failures, server.content = [], 0, CONTENT
    server.released.clear()


def wait_until(condition, seconds=10):
    """Poll; for what another thread is about to do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
