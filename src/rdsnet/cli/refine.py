"""`rdsnet fit-refiner`: the boundary refinement fitted to a COCO results JSON of any model, against ground truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from rdsnet.files import write_text


def define_fit_refiner(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    results = "COCO results with masks (RLE), such as `rdsnet evaluate` writes, or predictions.json"
    parser.add_argument("results", type=Path, help=results)
    parser.add_argument("--truth", type=Path, required=True, help="COCO JSON of the same images")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the refiner to write")
    gammas = "width of the prior, times the size of a box; of several, the likeliest; default: 0.025 to 0.15"
    parser.add_argument("--gammas", type=float, nargs="+", default=None, help=gammas)
    parser.add_argument("--apply", type=Path | None, default=None, help="JSON to write: the results with refined boxes")
    applied = "results that --apply refines, of other images for example; default: those that were fitted to"
    parser.add_argument("--apply_to", type=Path | None, default=None, help=applied)


def run_fit_refiner(options: Namespace) -> None:
    """Fit the boundary refinement to the results of any model, for `rdsnet.refine_boxes`."""
    from rich.console import Console

    from rdsnet.cli.tables import ap_table
    from rdsnet.data.coco import CocoFolder
    from rdsnet.refine.boxes import GAMMAS, fit_refiner, refine_results
    from rdsnet.results.exchange import read_results
    from rdsnet.results.metrics import box_ap
    from rdsnet.terminal import progress_bar

    if options.apply_to is not None and options.apply is None:
        raise ValueError("--apply_to needs --apply, the file to write")
    truth = CocoFolder(options.truth, need_images=False)
    results = read_results(options.results, truth)
    records = {record.id: record for record in truth.images}
    found = (results.prediction(image) for image in progress_bar("reading", results.images, leave=False))
    objects = (records[image].truth() for image in results.images)
    refiner = fit_refiner(found, objects, gammas=options.gammas or GAMMAS)
    refiner.save(options.output)
    print(
        f"{refiner.edges} edges of {refiner.masks} masks, gamma {refiner.gamma:g}: "
        f"{refiner.before:.3f} nats an edge before, {refiner.after:.3f} after"
    )
    boxes = refine_results(results, refiner)
    before, after = (box_ap(truth, results, corners) for corners in (results.boxes(), boxes))
    Console().print(ap_table({"as given": before, "refined": after}))
    if options.apply is not None:
        other = results if options.apply_to is None else read_results(options.apply_to)
        write_text(
            options.apply, json.dumps(other.with_boxes(boxes if other is results else refine_results(other, refiner)))
        )
        print(f"results with refined boxes: {options.apply}")
    print(f"refiner: {options.output}")
