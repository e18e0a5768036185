"""`rdsnet predict`, and `rdsnet demo`: a page on this machine to try a model with."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Literal

from rdsnet.cli.options import Compile, Count, Device, NewFolder, Precision, Share, Source, Weights
from rdsnet.serve.address import bypass_proxy, is_this_machine, require_free


def predict(
    source: Source,
    weights: Weights,
    *,
    output: NewFolder,
    threshold: Share = 0.5,
    save: Literal["pictures", "json", "both"] = "both",
    max_detections: Count | None = None,
    device: Device = "auto",
    precision: Precision = "32",
    compile: Compile = False,
) -> None:
    """Find the objects of images or of a video.

    Writes overlays, and for images a COCO JSON of what was found.

    Args:
        source: image, folder of images, or video
        output: for pictures and predictions.json
        threshold: smallest score
        save: what to write
        max_detections: objects an image; default: the run's
    """
    from rdsnet.cli.pictures import save_predictions, save_video
    from rdsnet.predict.predictor import load
    from rdsnet.predict.sources import VIDEO_SUFFIXES, list_images

    is_video = source.suffix.lower() in VIDEO_SUFFIXES
    files = [] if is_video else list_images(source)
    predictor = load(weights, device=device, precision=precision, compile=compile)
    if max_detections is not None:
        predictor.set_max_detections(max_detections)
    if is_video:
        print(f"video: {save_video(predictor, source, output, threshold=threshold)}")
        return
    count = save_predictions(
        predictor, files, output, threshold=threshold, pictures=save != "json", results=save != "pictures"
    )
    print(f"{count} objects with a score of {threshold:g} or more in {len(files)} images: {output}")


def demo(
    weights: Weights = "nuclei",
    *,
    port: int = 7860,
    host: str = "127.0.0.1",
    no_browser: bool = False,
    device: Device = "auto",
) -> None:
    """Open a page in the browser to try a model with.

    Drop an image, see its objects, move their boxes from regressed to refined.

    Args:
        weights: to begin with
        port: of the page
        host: 127.0.0.1 serves this machine only; for others, the page offers no weights but those named here
        no_browser: print the address, open no browser
    """
    require_free(host, port)
    try:
        from rdsnet.serve.page import Handlers, build_page, launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs Gradio: pip install 'rdsnet[demo]'") from error
    from rdsnet.serve.session import Models
    from rdsnet.weights.bundled import sample_images

    models = Models(device)
    models.predictor(weights)  # before the page opens, in case they cannot be read
    with tempfile.TemporaryDirectory(prefix="rdsnet-demo-") as folder:
        handlers = Handlers(models, sample_images(), Path(folder))
        page = build_page(handlers, weights=weights, any_weights=is_this_machine(host))
        bypass_proxy(host)
        url = launch(page, host, port, browser=not no_browser)
        print(f"page: {url} (Ctrl-C stops it)", flush=True)
        try:
            wait()
        finally:
            page.close(verbose=False)


def wait() -> None:
    """Until Ctrl-C."""
    while True:
        time.sleep(1)
