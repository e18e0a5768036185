"""`rdsnet predict`, and `rdsnet demo`: a page on this machine to try a model with."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from rdsnet.cli.options import add_device, add_speed


def define_predict(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("source", type=Path, help="image, folder of images, or video")
    parser.add_argument("--weights", type=str, required=True, help="nuclei, a run folder or a .safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and predictions.json")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score, 0..1")
    parser.add_argument("--save", type=Literal["pictures", "json", "both"], default="both", help="what to write")
    parser.add_argument("--max_detections", type=int | None, default=None, help="objects an image; default: the run's")
    add_speed(parser)


def run_predict(options: Namespace) -> None:
    """Find the objects of images or of a video: overlays, and for images a COCO JSON of what was found."""
    from rdsnet.cli.pictures import save_predictions, save_video
    from rdsnet.predict.predictor import load
    from rdsnet.predict.sources import VIDEO_SUFFIXES, list_images
    from rdsnet.structures import require_threshold

    require_threshold(options.threshold)
    is_video = options.source.suffix.lower() in VIDEO_SUFFIXES
    files = [] if is_video else list_images(options.source)
    predictor = load(options.weights, device=options.device, precision=options.precision, compile=options.compile)
    if options.max_detections is not None:
        predictor.set_max_detections(options.max_detections)
    if is_video:
        print(f"video: {save_video(predictor, options.source, options.output, threshold=options.threshold)}")
        return
    count = save_predictions(
        predictor,
        files,
        options.output,
        threshold=options.threshold,
        pictures=options.save != "json",
        results=options.save != "pictures",
    )
    print(f"{count} objects with a score of {options.threshold:g} or more in {len(files)} images: {options.output}")


def define_demo(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument(
        "--weights", type=str, default="nuclei", help="to begin with: nuclei, run folder or .safetensors"
    )
    parser.add_argument("--port", type=int, default=7860, help="of the page")
    host = "127.0.0.1 serves this machine only; for others, the page offers no weights but those named here"
    parser.add_argument("--host", type=str, default="127.0.0.1", help=host)
    parser.add_argument("--no_browser", action="store_true", help="print the address, open no browser")
    add_device(parser)


def run_demo(options: Namespace) -> None:
    """Open a page in the browser: drop an image, see its objects, move their boxes from regressed to refined."""
    require_free(options.host, options.port)
    try:
        from rdsnet.serve.page import Handlers, build_page, launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs Gradio: pip install 'rdsnet[demo]'") from error
    from rdsnet.serve.session import Models
    from rdsnet.weights.bundled import sample_images

    models = Models(options.device)
    models.predictor(options.weights)  # before the page opens, in case they cannot be read
    with tempfile.TemporaryDirectory(prefix="rdsnet-demo-") as folder:
        handlers = Handlers(models, sample_images(), Path(folder))
        page = build_page(handlers, weights=options.weights, any_weights=is_this_machine(options.host))
        bypass_proxy(options.host)
        url = launch(page, options.host, options.port, browser=not options.no_browser)
        print(f"page: {url} (Ctrl-C stops it)", flush=True)
        try:
            wait()
        finally:
            page.close(verbose=False)


def require_free(host: str, port: int) -> None:
    """Raise a ValueError where no page can be served."""
    if not 1 <= port <= 65535:
        raise ValueError(f"expected a port of 1 to 65535, got {port}")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python adds the address, which is said already
        raise ValueError(
            f"the page cannot be served at {host}:{port} ({reason}): choose another with --port or --host"
        ) from error


def bypass_proxy(host: str) -> None:
    """Gradio asks its own server whether it has started, which no proxy could answer."""
    already = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = ",".join([*filter(None, [already]), "localhost", "127.0.0.1", host])


def is_this_machine(host: str) -> bool:
    """Whether a page served there can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def wait() -> None:
    """Until Ctrl-C."""
    while True:
        time.sleep(1)
