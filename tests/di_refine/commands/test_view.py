"""The command `view` and its page: what it refuses, what it serves, and how the page works in a browser."""

import base64
import io
import json
import re
import shutil
import socket
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from browsing import chromium
from click.testing import CliRunner
from golden_io import GOLDEN
from PIL import Image

from di_refine.commands import view
from di_refine.commands.viewer import Real, Viewer
from di_refine.denoisers import load_denoiser
from di_refine.files import networks, registry
from di_refine.files.datasets import ImageDataset
from di_refine.generators import load_sampler
from di_refine.metrics.detectors import load_detector

SHIPPED = registry.pretrained_folder()
GAN, EDM = SHIPPED / "stylegan2-digits.pkl", SHIPPED / "edm-digits-16x16-cond.pkl"

needs_gradio = pytest.mark.skipif(view.find_spec("gradio") is None, reason="needs the optional package gradio")


def refused(*arguments):
    """The one sentence by which the command refuses."""
    result = CliRunner().invoke(view.main, ["--device=cpu", "--no-browser", *map(str, arguments)])
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.fixture
def port():
    """A port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_without_gradio_the_extra_is_named(monkeypatch, port):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'di-refine[view]'" in refused(GAN, f"--port={port}")


@needs_gradio
def test_a_port_in_use_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port} is in use" in refused(GAN, f"--port={port}")


@needs_gradio
def test_what_is_no_network_is_said(tmp_path, port):
    broken = tmp_path / "broken.pkl"
    broken.write_bytes(b"no network")
    at = f"--port={port}"
    assert "broken.pkl" in refused(GAN, broken, at)
    assert "neither a file nor a name" in refused("nowhere.pkl", at)
    assert "--teacher" in refused(GAN, f"--teacher={GAN}", at)
    assert "give --data, too" in refused(GAN, "--detector=digits", at)
    assert "--host=no.such.host.invalid is no address" in refused(GAN, "--host=no.such.host.invalid", at)
    other = GOLDEN / "edm/ddpmpp_uncond.pkl"
    assert "--difference: stylegan2-digits makes pictures of 16x16" in refused(GAN, other, "--difference", at)


@needs_gradio
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_serves_what_it_is_given(monkeypatch, port, host):
    from di_refine.commands import view_page

    served = []
    monkeypatch.setattr(view_page, "serve", lambda viewer, listening: served.append((viewer, listening.getsockname())))
    arguments = [str(GAN), str(EDM), f"--teacher={EDM}", f"--host={host}", f"--port={port}", "--no-browser"]
    result = CliRunner().invoke(view.main, ["--device=cpu", *arguments])
    assert result.exit_code == 0, result.stderr
    ((viewer, address),) = served
    assert viewer.titles == ["stylegan2-digits", "edm-digits-16x16-cond"] and viewer.difference
    assert viewer.teacher is not None and viewer.real is None and address == (host, port)
    assert ("anyone who reaches port" in result.stderr) == (host == "0.0.0.0")
    assert json.loads(result.stdout.splitlines()[-1])["url"] == f"http://{host}:{port}"


@needs_gradio
@pytest.mark.parametrize("screen, opens", [("", True), (":0", False), (":0", True)])
def test_a_browser_is_opened_where_there_is_one(monkeypatch, port, screen, opens):
    from di_refine.commands import view_page

    opened = []
    monkeypatch.setattr(view_page, "serve", lambda viewer, listening: None)
    monkeypatch.setattr(view.sys, "platform", "linux")
    monkeypatch.setattr(view.webbrowser, "open", lambda url: opened.append(url) or opens)
    monkeypatch.setenv("DISPLAY", screen)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    result = CliRunner().invoke(view.main, ["--device=cpu", str(GAN), f"--port={port}"])
    assert result.exit_code == 0 and opened == ([f"http://127.0.0.1:{port}"] if screen else [])
    assert ("no browser was found" in result.stderr) == (not screen or not opens)


def test_features_are_those_that_go_with_what_is_given(tmp_path, monkeypatch):
    """Of the data, as the registry says; of unknown data and networks, the teacher's."""
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))
    known = ImageDataset(SHIPPED / "digits-16x16.zip")
    assert view._real(known, None, tmp_path / "mine.pkl", None, "cpu").detector.identity.name == "digits"
    mine = shutil.copy(known.path, tmp_path / "mine.zip")
    judge = networks.load(EDM)
    assert view._real(ImageDataset(mine), None, tmp_path / "mine.pkl", judge, "cpu").detector.identity.name == "teacher"
    assert view._real(ImageDataset(mine), None, GAN, judge, "cpu").detector.identity.name == "digits"


# ----------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the page of two networks, a data set and a teacher is served."""
    pytest.importorskip("gradio", reason="needs the optional package gradio")
    from di_refine.commands import view_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DI_REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        real = Real.of(ImageDataset(SHIPPED / "digits-16x16.zip"), load_detector("digits"))
    networks = [("<b>gan</b>", load_sampler(GAN, noise_mode="const")), ("edm", load_sampler(EDM))]
    viewer = Viewer(networks, real=real, teacher=load_denoiser(EDM))
    listening = socket.create_server(("127.0.0.1", 0))
    server = view_page.Server(viewer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def fetch(url, content=None):
    """Status, headers and text of an answer; proxies are for other machines."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, content and json.dumps(content).encode())
    request.add_header("content-type", "application/json")
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, ""


def test_only_what_the_page_needs_is_served(address):
    status, headers, text = fetch(address)
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert not re.search(r'(src|href)="?(https?:)?//', text), "nothing comes from elsewhere"
    for path in ("gradio_api/upload", f"gradio_api/file={GAN}", "gradio_api/proxy=http://localhost", "docs", "login"):
        assert fetch(f"{address}/{path}")[0] == 404, path
    assert fetch(f"{address}/gradio_api/upload", {})[0] == 404
    style = fetch(f"{address}/theme.css")[2]
    assert "system-ui" in style and not re.search(r"@import|@font-face|https?://(?!www\.w3\.org)", style)


def drawn(address, **changes):
    """The markup for changed values of controls, asked for as the page asks."""
    config = json.loads(fetch(f"{address}/config")[2])
    (dependency,) = config["dependencies"]
    components = {each["id"]: each["props"] for each in config["components"]}
    labels = {components[number]["label"]: number for number in dependency["inputs"]}
    values = {number: components[number]["value"] for number in dependency["inputs"]}
    values |= {labels[label.replace("_", " ")]: value for label, value in changes.items()}
    asked = {"data": list(values.values()), "fn_index": dependency["id"], "session_hash": f"test{time.time()}"}
    fetch(f"{address}/gradio_api/queue/join", asked)
    events = fetch(f"{address}/gradio_api/queue/data?session_hash={asked['session_hash']}")[2]
    messages = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")]
    (done,) = (message for message in messages if message["msg"] == "process_completed")
    assert done["success"], done
    return done["output"]["data"][0]


def images_of(markup):
    found = re.findall(r"data:image/png;base64,([^\"]+)", markup)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


def test_the_page_draws_what_its_controls_say(address):
    before = drawn(address)
    gan, edm, change = images_of(before)
    assert gan.shape == edm.shape == change.shape == (3 * 96 + 4, 3 * 96 + 4, 3)
    assert "&lt;b&gt;gan&lt;/b&gt;" in before and "<b>gan" not in before, "names are no markup"
    after = images_of(drawn(address, Seed=7))
    assert all((a != b).any() for a, b in zip(after, (gan, edm, change)))
    truncated = images_of(drawn(address, Truncation_psi=0.5))
    assert (truncated[0] != gan).any() and (truncated[1] == edm).all()
    everything = drawn(address, Nearest_real_pictures=True, What_the_teacher_makes_of_them=True)
    assert len(images_of(everything)) == 3 + 2 + 4
    assert "sigma 1" in everything
    assert '<p class="fault">' not in everything


def test_a_value_out_of_range_is_a_sentence(address):
    assert "the seed is 4294967296, and may be 0 to 4294967295" in drawn(address, Seed=2**32)
    assert len(images_of(drawn(address, Seed=None))) == 3, "an empty field counts as 0"


def test_the_end_is_quiet_though_a_page_is_open(capfd):
    pytest.importorskip("gradio", reason="needs the optional package gradio")
    from di_refine.commands import view_page

    listening = socket.create_server(("127.0.0.1", 0))
    server = view_page.Server(Viewer([("gan", load_sampler(GAN))]))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with socket.create_connection(listening.getsockname()) as page:
        page.sendall(b"GET /gradio_api/heartbeat/test HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in page.recv(100)
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive() and capfd.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    yield from chromium()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_follows_its_controls(address, browser, width):
    tab = browser.new_page(viewport={"width": width, "height": 900})
    heard, asked = [], []
    tab.on("console", lambda message: heard.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.wait_for_selector(".panels img")
    source = "document.querySelector('.panels img').src"

    def changed(before):
        tab.wait_for_function(f"({source}) !== {json.dumps(before)}")
        return tab.evaluate(source)

    first = tab.evaluate(source)
    tab.get_by_label("Seed", exact=True).fill("7")
    second = changed(first)
    tab.get_by_label("Truncation psi").first.fill("0.5")
    changed(second)
    assert heard == []
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert tab.evaluate("document.documentElement.scrollWidth") == width, "nothing is wider than the screen"
    tab.close()
