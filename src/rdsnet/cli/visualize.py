"""`rdsnet visualize`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from rdsnet.cli.options import add_device


def define_visualize(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    source = "image or folder of images; default: the images of --truth"
    parser.add_argument("source", type=Path | None, nargs="?", default=None, help=source)
    parser.add_argument("--weights", type=str, required=True, help="nuclei, a run folder or a .safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="folder; gets NAME_KIND.png for each image and kind")
    kinds = Literal["overlay", "uncertainty", "comparison", "refinement", "representations", "all"]
    meanings = (
        "overlay: masks, boxes before and after refinement; uncertainty: boxes with a band of one standard deviation "
        "around each edge; comparison: truth, prediction and errors; refinement: how one object's mask moves its box; "
        "representations: those of pixels, as colours; all: what the model and --truth allow"
    )
    parser.add_argument("--what", type=kinds, nargs="+", default=["all"], help=meanings)
    truth = "COCO JSON; images are matched by file name; comparison needs it"
    parser.add_argument("--truth", type=Path | None, default=None, help=truth)
    images = "folder of the images that --truth names; default: beside the JSON"
    parser.add_argument("--images", type=Path | None, default=None, help=images)
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score, 0..1")
    explained = "whose refinement is explained: 0 for the highest score, and so on; default: the box that changed most"
    parser.add_argument("--object", type=int | None, default=None, help=explained)
    add_device(parser)


def run_visualize(options: Namespace) -> None:
    """Draw what a model finds: overlays, uncertainty, errors against the truth, how boxes are refined, and the pixel
    representations as colours."""
    from rdsnet.cli.pictures import save_visualizations
    from rdsnet.predict.predictor import load
    from rdsnet.structures import require_threshold

    require_threshold(options.threshold)
    drawn = save_visualizations(
        load(options.weights, device=options.device),
        options.source,
        options.output,
        what=options.what,
        truth=options.truth,
        images=options.images,
        threshold=options.threshold,
        object=options.object,
    )
    for kind, reason in drawn.left_out.items():
        print(f"no {kind}: {reason}")
    print(f"{len(drawn.pictures)} pictures of {drawn.images} images (NAME_KIND.png): {options.output}")
