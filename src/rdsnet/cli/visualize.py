"""`rdsnet visualize`."""

from __future__ import annotations

from rdsnet.cli.options import Device, File, Folder, NewFolder, PictureKind, Share, Source, Weights


def visualize(
    source: Source | None,
    weights: Weights,
    *,
    output: NewFolder,
    what: tuple[PictureKind, ...] = ("all",),
    truth: File | None = None,
    images: Folder | None = None,
    threshold: Share = 0.5,
    object: int | None = None,
    device: Device = "auto",
) -> None:
    """Draw what a model finds, its errors, and how boxes are refined.

    Also how sure it is of each edge, and the pixel representations as colours.

    Args:
        source: image or folder of images; default: the images of --truth
        output: gets NAME_KIND.png for each image and kind
        what: overlay: masks, boxes before and after refinement; uncertainty: boxes with a band of one standard
            deviation around each edge; comparison: truth, prediction and errors; refinement: how one object's mask
            moves its box; representations: those of pixels, as colours; all: what the model and --truth allow
        truth: COCO JSON; images are matched by file name; comparison needs it
        images: of the images that --truth names; default: images/ beside the JSON, else its own folder
        threshold: smallest score
        object: whose refinement is explained: 0 for the highest score, and so on; default: the box that changed most
    """
    from rdsnet.cli.pictures import save_visualizations
    from rdsnet.predict.predictor import load

    drawn = save_visualizations(
        load(weights, device=device),
        source,
        output,
        what=what,
        truth=truth,
        images=images,
        threshold=threshold,
        object=object,
    )
    for kind, reason in drawn.left_out.items():
        print(f"no {kind}: {reason}")
    print(f"{len(drawn.pictures)} pictures of {drawn.images} images (NAME_KIND.png): {output}")
