"""Downloads from a server that truncates, stalls, redirects and changes its mind."""

import contextlib
import hashlib
import http.server
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from di_refine_http import CONTENT

from di_refine.files import download
from di_refine.files.download import DownloadError

SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "net.pkl"


def files(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(str(path.relative_to(folder)) for path in found)


@pytest.mark.parametrize("kind", ["ok", "nolength", "redirect"])
def test_download(server, target, kind, capsys):
    download.fetch(f"{server.base}/{kind}/net.pkl", target)
    assert target.read_bytes() == CONTENT
    assert files(target.parent) == ["checksums/net.pkl.json", "net.pkl"]
    assert download.remembered(target) == SHA256
    assert capsys.readouterr().err.startswith("net.pkl: 256000"), "one line of progress"


@pytest.mark.parametrize("failures", [1, 3])
def test_a_broken_connection_is_tried_again(server, target, failures):
    server.failures = failures
    download.fetch(f"{server.base}/flaky/net.pkl", target, SHA256)
    assert target.read_bytes() == CONTENT and len(server.requests) == failures + 1


def test_a_busy_server_is_asked_again(server, target):
    server.failures = 2
    download.fetch(f"{server.base}/busy/net.pkl", target, SHA256)
    assert target.read_bytes() == CONTENT and len(server.requests) == 3


@pytest.mark.parametrize("content", [CONTENT, CONTENT[::-1], CONTENT[:1000]])
def test_the_next_call_starts_over(server, target, monkeypatch, content):
    """Nothing of a download that failed gets into the file, whatever the server has meanwhile."""
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.failures = 1
    with pytest.raises(DownloadError, match="the connection ended"):
        download.fetch(f"{server.base}/flaky/net.pkl", target)
    assert files(target.parent) == []
    server.content = content
    download.fetch(f"{server.base}/flaky/net.pkl", target)
    assert target.read_bytes() == content and len(server.requests) == 2


def test_a_web_page_is_no_file(server, target):
    with pytest.raises(DownloadError, match="the server sends a web page instead of the file"):
        download.fetch(f"{server.base}/page/net.pkl", target)
    assert files(target.parent) == [] and len(server.requests) == 1


def test_https_stays_https(target, monkeypatch):
    answer = contextlib.nullcontext(SimpleNamespace(url="http://example.invalid/net.pkl"))
    monkeypatch.setattr("requests.get", lambda *_, **__: answer)
    with pytest.raises(DownloadError, match="it redirects to http://example.invalid/net.pkl, which is not https"):
        download.fetch("https://example.invalid/net.pkl", target)
    assert files(target.parent) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_others_may_read_the_file(server, target):
    download.fetch(f"{server.base}/ok/net.pkl", target)
    (target.parent / "other").write_bytes(b"")
    assert target.stat().st_mode == (target.parent / "other").stat().st_mode


@pytest.mark.parametrize(
    "path, reason, requests",
    [
        ("404", "the server answers 404 Not Found", 1),
        ("403", "the server answers 403 Forbidden", 1),
        ("500", "the server answers 500 Internal Server Error", 5),
        ("loop", "redirects", 31),
    ],
)
def test_refusals(server, target, path, reason, requests):
    with pytest.raises(DownloadError, match=reason):
        download.fetch(f"{server.base}/{path}", target)
    assert len(server.requests) == requests
    assert files(target.parent) == []


def test_a_server_that_always_breaks_off(server, target, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 3)
    with pytest.raises(DownloadError, match="the connection ended"):
        download.fetch(f"{server.base}/short/net.pkl", target)
    assert len(server.requests) == 3 and files(target.parent) == []


def test_a_stalled_server_is_given_up(server, target, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    with pytest.raises(DownloadError, match="no answer within 0.2 seconds"):
        download.fetch(f"{server.base}/stall/net.pkl", target)
    server.released.set()


def test_nobody_there(server, target):
    with pytest.raises(DownloadError, match="cannot be reached"):
        download.fetch("http://127.0.0.1:9/net.pkl", target)


def test_a_wrong_checksum_leaves_nothing(server, target):
    with pytest.raises(DownloadError, match=rf"its SHA-256 is {SHA256} instead of 00000000"):
        download.fetch(f"{server.base}/ok/net.pkl", target, "00000000")
    assert files(target.parent) == []


def test_a_checksum_is_learnt_and_enforced(server, target):
    url = f"{server.base}/ok/net.pkl"
    download.fetch(url, target)
    target.unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(DownloadError, match="recorded at its first use in .*checksums/net.pkl.json"):
        download.fetch(url, target)
    assert files(target.parent) == ["checksums/net.pkl.json"]
    download.memory_path(target).unlink()
    download.fetch(url, target)
    assert target.read_bytes() == CONTENT[::-1]


def test_changed_files_are_noticed(server, target):
    target.write_bytes(b"by hand")
    assert download.fault(target, "url") is None, "seen for the first time"
    assert download.fault(target, "url") is None
    target.write_bytes(b"altered")
    assert "recorded at its first use" in download.fault(target, "url")
    target.write_bytes(b"by hand")
    assert download.fault(target, "url") is None, "only its time is new"
    assert "instead of 1234" in download.fault(target, "url", "1234")


def test_several_processes_download_once(server, target):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download.fetch(f"{server.base}/ok/net.pkl", target), range(4)))
    assert target.read_bytes() == CONTENT and len(server.requests) == 1


class Proxy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"proxy")

    def log_message(self, *_):
        pass


def test_proxies_are_honoured(server, target, monkeypatch):
    proxy = http.server.HTTPServer(("127.0.0.1", 0), Proxy)
    proxy.requests = []
    thread = threading.Thread(target=proxy.handle_request, daemon=True)
    thread.start()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
    download.fetch("http://example.invalid/net.pkl", target)
    thread.join(5)
    proxy.server_close()
    assert target.read_bytes() == b"proxy" and proxy.requests == ["http://example.invalid/net.pkl"]
