"""`rdsnet fit-refiner`: the boundary refinement fitted to a COCO results JSON of any model, against ground truth."""

from __future__ import annotations

import json

from rdsnet.cli.options import File, NewFile
from rdsnet.files import write_text


def fit_refiner(
    results: File,
    *,
    truth: File,
    output: NewFile,
    gammas: tuple[float, ...] | None = None,
    apply: NewFile | None = None,
    apply_to: File | None = None,
) -> None:
    """Fit the boundary refinement to the results of any model.

    The file that it writes is for `rdsnet.refine_boxes`.

    Args:
        results: COCO results with masks (RLE), such as `rdsnet evaluate` writes, or predictions.json
        truth: COCO JSON of the same images
        output: JSON of the refiner to write
        gammas: width of the prior, times the size of a box; of several, the likeliest; default: 0.025 to 0.15
        apply: JSON to write: the results with refined boxes
        apply_to: results that --apply refines, of other images for example; default: those that were fitted to
    """
    if apply_to is not None and apply is None:
        raise ValueError("--apply_to needs --apply, the file to write")
    from rich.console import Console

    from rdsnet.cli.tables import ap_table
    from rdsnet.data.coco import CocoFolder
    from rdsnet.refine.boxes import GAMMAS, fit_refiner, refine_results
    from rdsnet.results.exchange import read_results
    from rdsnet.results.metrics import box_ap
    from rdsnet.terminal import progress_bar

    true = CocoFolder(truth, need_images=False)
    found = read_results(results, true)
    records = {record.id: record for record in true.images}
    predictions = (found.prediction(image) for image in progress_bar("reading", found.images, leave=False))
    refiner = fit_refiner(predictions, (records[image].truth() for image in found.images), gammas=gammas or GAMMAS)
    refiner.save(output)
    print(
        f"{refiner.edges} edges of {refiner.masks} masks, gamma {refiner.gamma:g}: "
        f"{refiner.before:.3f} nats an edge before, {refiner.after:.3f} after"
    )
    boxes = refine_results(found, refiner)
    before, after = (box_ap(true, found, corners) for corners in (found.boxes(), boxes))
    Console().print(ap_table({"as given": before, "refined": after}))
    if apply is not None:
        other = found if apply_to is None else read_results(apply_to)
        refined = other.with_boxes(boxes if other is found else refine_results(other, refiner))
        write_text(apply, json.dumps(refined))
        print(f"results with refined boxes: {apply}")
    print(f"refiner: {output}")
