"""The page of `python -m di_refine view`: controls, and the pictures that a `Viewer` draws for them."""

import base64
import contextlib
import html
import io
import logging
import math
import socket
from collections.abc import Sequence
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from fastapi.responses import PlainTextResponse

from di_refine.commands.viewer import MAX_PICTURES, MAX_STEPS, NOISE_MODES, Panel, Request, Viewer
from di_refine.errors import InputError
from di_refine.files import pictures

CELL = 96  # pixels to which small pictures are enlarged
LARGE = 128  # pixels; of larger pictures fewer are shown at first
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")  # of the machine: none is fetched
MONO = ("ui-monospace", "Consolas", "monospace")

API = "/gradio_api"
SERVED = (
    "/assets/",
    "/static/",
    *("/theme.css", "/favicon.ico", "/manifest.json", "/config"),
    *(f"{API}/{name}" for name in ("queue/", "heartbeat/", "info", "app_id", "cancel", "reset")),
)
"""Beginnings of the paths that the page needs. gradio has others, by which files are sent and fetched."""

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""What the browser is told: to ask nobody but this server, whatever gradio's scripts would like to ask."""

CSS = """
.panels { display: flex; flex-wrap: wrap; gap: 20px 28px; align-items: flex-start; }
.panels figure { margin: 0; max-width: 100%; }
.panels figcaption { margin-bottom: 6px; font-weight: 600; }
.panels figcaption small { display: block; font-weight: 400; opacity: .75; }
.panels img { display: block; max-width: 100%; }
.panels img.enlarged { image-rendering: pixelated; }
.shown .pending { opacity: .6 !important; transition: opacity .2s .4s; }  /* what is drawn quickly does not flicker */
.shown h2 { font-size: 1.1rem; font-weight: 600; margin: 28px 0 10px; }
.shown h2:first-child { margin-top: 0; }
.shown .fault { color: var(--error-text-color); }
"""


class Page:
    """The controls, by name, and what they mean.

    Args:
        viewer: draws.
    """

    def __init__(self, viewer: Viewer):
        self.viewer = viewer
        self.controls: dict[str, Any] = {}
        self.blocks = self._build()

    def _build(self) -> gr.Blocks:
        title = " | ".join(self.viewer.titles)
        with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as blocks, gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._pictures()
                if self.viewer.layers:
                    self._styles()
                if self.viewer.teacher is not None or self.viewer.real is not None:
                    self._further()
            with gr.Column(scale=4, min_width=320):
                shown = gr.HTML(elem_classes="shown")
            gr.on(
                [blocks.load, *(control.change for control in self.controls.values())],
                self.draw,
                list(self.controls.values()),
                shown,
                trigger_mode="always_last",  # while one picture is drawn, a slider's values in between are passed over
                show_progress="minimal",
                concurrency_limit=1,
            )
        return blocks

    def _pictures(self) -> None:
        viewer, add = self.viewer, self.controls
        add["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0)
        large = any(sampler.resolution > LARGE for sampler in viewer.samplers)
        add["count"] = gr.Slider(1, MAX_PICTURES, 4 if large else 9, step=1, label="Pictures")
        if viewer.class_names:
            choices = [("as trained", -1), *((name, number) for number, name in enumerate(viewer.class_names))]
            add["label"] = gr.Dropdown(choices, value=-1, label="Class")
        add["between"] = gr.Slider(0, 1, 0, step=0.01, label="On the way to the second seed")
        add["other"] = gr.Number(100, label="Second seed", precision=0, minimum=0)
        if viewer.has_steps:
            add["steps"] = gr.Slider(2, MAX_STEPS, 18, step=1, label="Steps of the sampler")

    def _styles(self) -> None:
        add, layers = self.controls, self.viewer.layers
        add["psi"] = gr.Slider(-1, 1.5, 1, step=0.05, label="Truncation psi")
        add["noise_mode"] = gr.Radio(list(NOISE_MODES), value="const", label="Noise")
        with gr.Accordion("Style mixing", open=False):
            add["mixes"] = gr.Checkbox(False, label="Take the styles of some layers from another seed")
            add["mix"] = gr.Number(200, label="Seed of the styles", precision=0, minimum=0)
            chosen = list(range(layers // 2))
            add["layers"] = gr.CheckboxGroup(list(range(layers)), value=chosen, label="Layers, coarsest first")

    def _further(self) -> None:
        viewer, add = self.viewer, self.controls
        if viewer.real is not None:
            add["nearest"] = gr.Checkbox(False, label="Nearest real pictures")
        if viewer.teacher is not None:
            add["judged"] = gr.Checkbox(False, label="What the teacher makes of them")
            low, high = (math.log10(level) for level in viewer.sigmas)
            low, high = math.ceil(low * 100) / 100, math.floor(high * 100) / 100
            add["sigma"] = gr.Slider(low, high, min(high, 0.0), step=0.01, label="log10(sigma)")
            if len(viewer.titles) > 1:
                choices = [(title, number) for number, title in enumerate(viewer.titles)]
                add["which"] = gr.Radio(choices, value=0, label="Pictures of")

    # ------------------------------------------------------------------------------------------------------------------

    def draw(self, *values: Any) -> str:
        """The markup of all that is shown, for the values of the controls; a sentence where they are out of range."""
        given = dict(zip(self.controls, values))
        try:
            request = _request(given)
            found = _section("", self.viewer.pictures(request))
            if given.get("nearest"):
                found += _section("The nearest real pictures", self.viewer.nearest(request))
            if given.get("judged"):
                sigma = _within(10 ** _number(given["sigma"]), self.viewer.sigmas)
                judged = self.viewer.judged(request, sigma, int(given.get("which") or 0))
                found += _section("What the teacher makes of them", judged)
            return found
        except InputError as error:
            return f'<p class="fault">{html.escape(str(error))}</p>'


def _request(given: dict[str, Any]) -> Request:
    label = int(given.get("label", -1))
    return Request(
        seed=int(_number(given["seed"])),
        count=int(given["count"]),
        label=label if label >= 0 else None,
        psi=_number(given.get("psi", 1.0)),
        noise_mode=given.get("noise_mode", "const"),
        other=int(_number(given["other"])),
        between=_number(given["between"]),
        mix=int(_number(given["mix"])) if given.get("mixes") else None,
        layers=tuple(sorted(map(int, given["layers"]))) if given.get("mixes") else None,
        steps=int(given.get("steps", 18)),
    )


def _number(value: float | None) -> float:
    """The value of a control; one that was emptied counts as 0."""
    return 0 if value is None else value


def _within(value: float, bounds: tuple[float, float]) -> float:
    """The value, where rounding has brought it out of the bounds the nearer of these."""
    return min(max(value, bounds[0]), bounds[1])


def _section(heading: str, panels: Sequence[Panel]) -> str:
    head = f"<h2>{html.escape(heading)}</h2>" if heading else ""
    return f'{head}<div class="panels">{"".join(map(_figure, panels))}</div>'


def _figure(panel: Panel) -> str:
    scale = pictures.enlargement(panel.images.shape[-1], CELL)
    grid = pictures.make_grid(panel.images, panel.columns, scale, gap=2)
    file = io.BytesIO()
    pictures.on_paper(pictures.to_pillow(grid)).save(file, format="PNG", compress_level=1)
    enlarged = ' class="enlarged"' if scale > 1 else ""
    content, title = base64.b64encode(file.getvalue()).decode(), html.escape(panel.title)
    note = f"<small>{html.escape(panel.note)}</small>" if panel.note else ""
    return (
        f'<figure style="width: {grid.shape[2]}px"><figcaption>{title}{note}</figcaption>'
        f'<img{enlarged} src="data:image/png;base64,{content}" alt="{title}"></figure>'
    )


# ----------------------------------------------------------------------------------------------------------------------
# Serving


class _Guard:
    """Lets through what the page needs, and nothing by which files are sent or fetched; adds `POLICY`.

    Args:
        app: serves.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serve a request, or answer it with 404."""
        path = scope.get("path", "")
        if scope["type"] == "http" and path != "/" and not path.startswith(SERVED):
            await PlainTextResponse("not found", 404)(scope, receive, send)
            return

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, guarded)


def application(viewer: Viewer) -> fastapi.FastAPI:
    """The page as an application of FastAPI: no analytics, no share link, no documentation of an API, no uploads."""
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard)
    theme = gr.themes.Default(font=FONTS, font_mono=MONO)
    settings: dict[str, Any] = {"footer_links": [], "pwa": False, "mcp_server": False, "ssr_mode": False}
    settings |= {"run_history": False, "enable_monitoring": False, "max_file_size": 1}
    return gr.mount_gradio_app(app, Page(viewer).blocks, path="/", theme=theme, css=CSS, **settings)


class Server(uvicorn.Server):
    """A server of the page, which says warnings alone, and does not wait for open pages at its end.

    Args:
        viewer: draws.
    """

    def __init__(self, viewer: Viewer):
        super().__init__(uvicorn.Config(application(viewer), log_level="warning", timeout_graceful_shutdown=1))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; that connections of open pages are cut off is no error."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def serve(viewer: Viewer, listening: socket.socket) -> None:
    """Serve the page at a socket until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        Server(viewer).run(sockets=[listening])
