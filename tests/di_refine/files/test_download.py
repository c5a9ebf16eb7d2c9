"""Downloads from a server that truncates, stalls, redirects and changes its mind."""

import contextlib
import hashlib
import http.server
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
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
    assert capsys.readouterr().err == "", "what is quick is not worth a line"


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
    for kind in ("page", "text"):
        with pytest.raises(DownloadError, match="the server sends a web page or another text instead of the file"):
            download.fetch(f"{server.base}/{kind}/net.pkl", target)
    assert files(target.parent) == [] and len(server.requests) == 2
    target.write_text("Not found")
    assert download.fault(target, "url") == "it is a web page or another text" and download.remembered(target) is None


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("packed", "the server sends it compressed"),
        ("huge", r"it has 1e\+06 GB, and there may be 69"),
        ("drip", "the server is too slow"),
    ],
)
def test_what_a_server_sends_has_bounds(server, target, monkeypatch, kind, reason):
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    with pytest.raises(DownloadError, match=reason):
        download.fetch(f"{server.base}/{kind}/net.pkl", target)
    server.released.set()
    assert files(target.parent) == [] and len(server.requests) == 1


def test_a_file_without_an_announced_length_has_bounds(server, target, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", len(CONTENT) - 1)
    with pytest.raises(DownloadError, match="it has 0.000256 GB, and there may be 0"):
        download.fetch(f"{server.base}/nolength/net.pkl", target)
    assert files(target.parent) == []


def test_a_length_that_is_no_number(server, target):
    with contextlib.suppress(DownloadError):  # requests may refuse it
        download.fetch(f"{server.base}/length/net.pkl", target)
        assert target.read_bytes() == CONTENT


def test_a_damaged_memory_is_not_passed_over(server, target):
    download.fetch(f"{server.base}/ok/net.pkl", target)
    for damage in ("{", "[]", '{"sha256": 5}', '{"sha256": ""}', '{"sha256": "a"}', "[" * 9999):
        download.memory_path(target).write_text(damage)
        assert "which was recorded at its first use in" in download.fault(target, "url")


def test_a_password_is_not_remembered(server, target):
    url = f"{server.base}/ok/net.pkl".replace("http://", "http://me:pass@")
    download.fetch(url, target)
    assert "pass" not in download.memory_path(target).read_text()


def test_https_stays_https(target, monkeypatch):
    asked = []

    def send(_, request, **__):
        asked.append(request.url)
        answer = requests.Response()
        answer.status_code, answer.url, answer.request, answer.raw = 302, request.url, request, io.BytesIO()
        answer.headers["Location"] = "http://example.invalid/net.pkl"
        return answer

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with pytest.raises(DownloadError, match="it redirects to an address that is not https"):
        download.fetch("https://example.invalid/net.pkl", target)
    assert files(target.parent) == [] and asked == ["https://example.invalid/net.pkl"]


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
        ("loop", "redirects", 11),
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
    target.write_bytes(b"by\0hand")
    assert download.fault(target, "url") is None, "seen for the first time"
    assert download.fault(target, "url") is None
    target.write_bytes(b"altered")
    assert "recorded at its first use" in download.fault(target, "url")
    target.write_bytes(b"by\0hand")
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
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"proxy\0")

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
    assert target.read_bytes() == b"proxy\0" and proxy.requests == ["http://example.invalid/net.pkl"]
