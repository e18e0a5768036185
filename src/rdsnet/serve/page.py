"""The page: what it is made of, and what happens when something on it is touched.

The network runs when an image or the weights are chosen. What it detected is kept for the session that asked, and every
other control only draws it again.
"""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from rdsnet.files import write_image
from rdsnet.serve import session
from rdsnet.serve.session import Controls, Detected, Models
from rdsnet.weights.bundled import WEIGHTS

MAX_UPLOAD = "100mb"

SESSIONS = 20  # each keeps an image; of more, the least recently used is forgotten

NOTHING_YET = "Drop an image, or pick a sample."

CSS = """
.gradio-container { max-width: 1500px !important; }
#title h1 { font-size: 1.2rem; margin: 0; }
#samples .gallery { flex-wrap: nowrap; }
#samples .gallery-item, #samples .gallery-item > div { min-width: 0; flex: 1; }
#samples .gallery-item .container { height: 56px; }
#weights input { text-overflow: ellipsis; margin-right: 1.5rem; }
footer { display: none !important; }
"""

# Runs when the file has been written: Gradio's own download button offers what was there before the click.
DOWNLOAD = """(file) => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""

# events that only read what was detected
QUICK: Any = {"concurrency_limit": 4, "show_progress": "hidden", "api_visibility": "private"}


class Handlers:
    """What the page's events call. An error that a user can make is a message on the page; what was shown stays.
    `last` is what was detected last.

    Args:
        models: where weights come from.
        samples: image files to pick from.
        folder: pictures and downloads are written here; in the system's folder for temporary files, from where alone
            Gradio serves what a function returns.
    """

    def __init__(self, models: Models, samples: Sequence[Path], folder: Path) -> None:
        self.models = models
        self.samples = samples
        self.folder = folder

    def detect_in_upload(self, file: str, weights: str, last: Detected | None) -> tuple[Detected | None, None]:
        """None empties the box for the next file."""
        return self._detect(lambda: (session.read_upload(Path(file)), Path(file).name), weights, last), None

    def detect_in_sample(self, index: int, weights: str, last: Detected | None) -> Detected | None:
        sample = self.samples[index]
        return self._detect(lambda: (session.read_upload(sample), sample.name), weights, last)

    def detect_again(self, weights: str, last: Detected | None) -> Detected | None:
        """With other weights; a choice from the list comes twice, when it is made and when the list is left."""
        if last is None or last.weights == weights:
            return last
        return self._detect(lambda: (last.image, last.name), weights, last)

    def _detect(
        self, read: Callable[[], tuple[np.ndarray, str]], weights: str, last: Detected | None
    ) -> Detected | None:
        try:
            image, name = read()
            return session.detect(self.models.predictor(weights), image, name=name, weights=weights)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch's "out of memory" is a RuntimeError
            gr.Warning(html.escape(str(error)))
            return last

    def redraw(self, last: Detected | None, *values: Any) -> tuple[str | None, list[list[Any]], str]:
        """The picture's file, the rows of the table, and the line that sums up."""
        if last is None:
            return None, [], NOTHING_YET
        controls = Controls(*values)
        path = self._new_folder() / "picture.jpg"
        write_image(path, session.picture(last, controls))  # PNG takes 8 times as long
        return str(path), session.rows_of(last, controls.threshold), html.escape(session.summarise(last, controls))

    def overlay(self, last: Detected | None, *values: Any) -> str | None:
        return None if last is None else str(session.save_overlay(last, Controls(*values), self._new_folder()))

    def coco_json(self, last: Detected | None, *values: Any) -> str | None:
        return None if last is None else str(session.save_json(last, Controls(*values).threshold, self._new_folder()))

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


def build_page(handlers: Handlers, *, weights: str, any_weights: bool) -> gr.Blocks:
    """The page, not yet served.

    Args:
        weights: to begin with.
        any_weights: whether others than these and the bundled ones may be named on the page.
    """
    with gr.Blocks(title="RDSNet", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        detected = gr.State(None)
        gr.Markdown("# RDSNet: tight boxes and full-resolution masks", elem_id="title")
        with gr.Row():
            with gr.Column(scale=5):
                shown = gr.Image(
                    show_label=False, height=640, interactive=False, buttons=["fullscreen"], elem_id="picture"
                )
                summary = gr.HTML(NOTHING_YET, elem_id="summary")
            with gr.Column(scale=2, min_width=320):
                sources = _sources(handlers.samples, weights, any_weights)
                controls = _controls()
                with gr.Row():
                    overlay_button = gr.Button("Save overlay (PNG)", size="sm", elem_id="overlay")
                    json_button = gr.Button("Save COCO JSON", size="sm", elem_id="json")
        table = gr.Dataframe(
            headers=session.HEADERS,
            datatype=["number", "str", "number", "str", "str", "str", "number"],
            interactive=False,
            label="Objects, in pixels: boxes as x1 y1 x2 y2, edge std of left, top, right and bottom",
            max_height=360,
            buttons=[],
            elem_id="objects",
        )
        _when_touched(handlers, sources, detected, shown, controls, [shown, table, summary])
        download = gr.File(visible="hidden")
        for button, save in ((overlay_button, handlers.overlay), (json_button, handlers.coco_json)):
            saved = button.click(save, [detected, *controls], download, **QUICK)
            saved.success(None, download, None, js=DOWNLOAD, api_visibility="private")
    return page


def _sources(samples: Sequence[Path], weights: str, any_weights: bool) -> tuple[gr.File, gr.Dataset, gr.Dropdown]:
    """Where an image comes from, and the weights."""
    upload = gr.File(label="Image", height=124, elem_id="upload")
    gallery = gr.Dataset(
        label="Samples",
        components=[gr.Image(visible=False)],
        samples=[[str(path)] for path in samples],
        type="index",
        elem_id="samples",
    )
    weights_box = gr.Dropdown(
        list(dict.fromkeys((*WEIGHTS, weights))),
        value=weights,
        label="Weights: name, run folder or .safetensors" if any_weights else "Weights",
        allow_custom_value=any_weights,
        elem_id="weights",
    )
    return upload, gallery, weights_box


def _controls() -> list[gr.Slider | gr.Checkbox]:
    """In the order of `Controls`."""
    with gr.Group():
        threshold = gr.Slider(0, 1, 0.5, step=0.01, label="Score at least", buttons=[], elem_id="threshold")
        refinement = gr.Slider(
            0, 1, 1, step=0.05, label="Boxes: 0 regressed, 1 refined", buttons=[], elem_id="refinement"
        )
        with gr.Row():
            masks = gr.Checkbox(True, label="Masks", min_width=80, elem_id="masks")
            uncertainty = gr.Checkbox(False, label="Uncertainty", min_width=80, elem_id="uncertainty")
            names = gr.Checkbox(False, label="Names", min_width=80, elem_id="names")
    return [threshold, refinement, masks, uncertainty, names]


def _when_touched(
    handlers: Handlers,
    sources: tuple[gr.File, gr.Dataset, gr.Dropdown],
    detected: gr.State,
    shown: gr.Image,
    controls: list[gr.Slider | gr.Checkbox],
    drawn: list[gr.components.Component],
) -> None:
    """A source runs the network, then draws; a control draws."""
    upload, gallery, weights = sources
    network: Any = {
        "concurrency_limit": 1,
        "concurrency_id": "network",
        "show_progress_on": shown,
        "api_visibility": "private",
    }
    for event in (
        upload.upload(handlers.detect_in_upload, [upload, weights, detected], [detected, upload], **network),
        gallery.click(handlers.detect_in_sample, [gallery, weights, detected], detected, **network),
        weights.input(handlers.detect_again, [weights, detected], detected, **network),
    ):
        event.success(handlers.redraw, [detected, *controls], drawn, **QUICK)
    touched = [control.input for control in controls]
    gr.on(touched, handlers.redraw, [detected, *controls], drawn, trigger_mode="always_last", **QUICK)


def launch(page: gr.Blocks, host: str, port: int, *, browser: bool) -> str:
    """Serve the page beside the caller, to nobody but who reaches `host`; returns its address."""
    _, url, _ = page.queue(api_open=False).launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        max_file_size=MAX_UPLOAD,
        state_session_capacity=SESSIONS,
        theme=gr.themes.Default(
            text_size="sm", spacing_size="sm", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
    )
    return url
