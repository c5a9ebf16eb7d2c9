"""Downloads from a server that truncates, stalls, lies and changes its mind."""

import hashlib
import http.server
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from di_refine_http import CONTENT, reset, running

from di_refine.files import download
from di_refine.files.download import DownloadError

SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def running_server():
    with running() as server:
        yield server


@pytest.fixture
def server(running_server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)
    reset(running_server)
    return running_server


@pytest.fixture
def target(tmp_path):
    return tmp_path / "net.pkl"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["ok", "noranges", "notags", "nolength", "redirect"])
def test_download(server, target, kind, capsys):
    download.fetch(f"{server.base}/{kind}/net.pkl", target)
    assert target.read_bytes() == CONTENT
    assert files(target.parent) == ["checksums/net.pkl.json", "net.pkl"]
    assert download.remembered(target)["sha256"] == SHA256
    assert "net.pkl: 256000" in capsys.readouterr().err


@pytest.mark.parametrize("failures", [1, 3])
def test_a_broken_connection_is_resumed_in_one_go(server, target, failures):
    server.failures = failures
    download.fetch(f"{server.base}/flaky/net.pkl", target, SHA256)
    assert target.read_bytes() == CONTENT
    asked = [asked for _, asked in server.requests]
    assert len(asked) == failures + 1 and asked[:2] == [None, "bytes=128000-"]


def test_a_busy_server_is_asked_again(server, target):
    server.failures = 2
    download.fetch(f"{server.base}/busy/net.pkl", target, SHA256)
    assert target.read_bytes() == CONTENT and len(server.requests) == 3


def test_an_interrupted_download_is_resumed_by_the_next_process(server, target, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.failures = 1
    with pytest.raises(DownloadError, match="the connection ended"):
        download.fetch(f"{server.base}/flaky/net.pkl", target)
    assert files(target.parent) == ["partial/net.pkl", "partial/net.pkl.json"]
    assert list(download.waiting(target.parent)) == [target.parent / "partial" / "net.pkl"]
    download.fetch(f"{server.base}/flaky/net.pkl", target, SHA256)
    assert target.read_bytes() == CONTENT and server.requests[-1][1] == "bytes=128000-"
    assert list(download.waiting(target.parent)) == []


@pytest.mark.parametrize("kind", ["ok", "noranges", "notags", "wrongrange"])
def test_a_file_that_changed_meanwhile_is_not_stitched_together(server, target, monkeypatch, kind):
    """The server ignores ranges, has nothing to tell versions apart, or sends another part than the one asked for."""
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.failures = 1
    url = f"{server.base}/{kind}/net.pkl"
    with pytest.raises(DownloadError):
        download.fetch(url.replace(kind, "flaky"), target)
    partial = target.parent / "partial"
    meta = json.loads((partial / "net.pkl.json").read_text())
    (partial / "net.pkl.json").write_text(json.dumps({**meta, "url": url}))
    server.content, server.tag = CONTENT[::-1], '"1"' if kind == "wrongrange" else '"2"'
    if kind in ("wrongrange", "notags"):  # noticed; the next attempt starts over
        with pytest.raises(DownloadError, match="another part"):
            download.fetch(url, target)
    download.fetch(url, target)
    assert target.read_bytes() == CONTENT[::-1]


def test_another_address_starts_over(server, target, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.failures = 1
    with pytest.raises(DownloadError):
        download.fetch(f"{server.base}/flaky/net.pkl", target)
    download.fetch(f"{server.base}/ok/net.pkl", target)
    assert target.read_bytes() == CONTENT and server.requests[-1][1] is None


def test_a_shrunken_file_starts_over(server, target, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.failures = 1
    with pytest.raises(DownloadError):
        download.fetch(f"{server.base}/flaky/net.pkl", target)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.content = CONTENT[:1000]
    download.fetch(f"{server.base}/flaky/net.pkl", target)  # asks for a range that is no more
    assert target.read_bytes() == CONTENT[:1000]


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
    assert (target.parent / "partial" / "net.pkl").read_bytes() == CONTENT[:3000]


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
    server.content, server.tag = CONTENT[::-1], '"2"'
    with pytest.raises(DownloadError, match="recorded at its first use in .*checksums/net.pkl.json"):
        download.fetch(url, target)
    assert files(target.parent) == ["checksums/net.pkl.json"]
    download.memory_path(target).unlink()
    download.fetch(url, target)
    assert target.read_bytes() == CONTENT[::-1]


def test_changed_files_are_noticed(server, target):
    target.write_bytes(b"by hand")
    assert download.fault(target, "url") is None, "seen for the first time"
    assert download.fault(target, "url", thorough=True) is None
    target.write_bytes(b"altered")
    assert "which" in download.fault(target, "url")
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
