"""The paper's tables and figures, measured: `rdsnet reproduce`.

`plan` says what is compared, `study` trains and evaluates, `tables` and `figures` show it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from rdsnet.data.coco import CocoFolder
from rdsnet.device import Device, choose_device
from rdsnet.files import make_folder, require_folder, write_text
from rdsnet.predict.predictor import Predictor
from rdsnet.presets import Changes
from rdsnet.reproduce import figures
from rdsnet.reproduce.plan import BUDGETS, COMPARISONS, FAMILIES, FULL, SIZES, TITLES, Row
from rdsnet.reproduce.study import Numbers, Study, find_data, measure_rows, stored
from rdsnet.reproduce.tables import Line, Result, comma_separated, markdown


def reproduce(
    what: str,
    output: str | Path,
    *,
    data: str = "shapes",
    budget: str = "small",
    seeds: int = 3,
    family: str | None = None,
    settings: Changes | None = None,
    device: Device = "auto",
) -> Result:
    """Measure one of the paper's tables or figures, with what is missing in `output` of trainings and evaluations.

    Args:
        what: table1 to table4, figure3 to figure5.
        output: gets WHAT.csv, WHAT.md and WHAT.png; its trainings are shared by all that is measured there.
        data: "shapes", made here, or a folder with train.json and val.json, or COCO's.
        budget: "tiny", "small" or "full", see `plan.BUDGETS`.
        seeds: trainings of each kind.
        family: of presets; default: the paper's for COCO, else the tiny ones.
        settings: changes over every preset, such as `{"detect": {"max_detections": 500}}`.

    Raises:
        FileNotFoundError, ValueError: no such data, or a name or setting that is not known.
    """
    for name, value, known in (("WHAT", what, TITLES), ("budget", budget, BUDGETS), ("family", family, FAMILIES)):
        if value is not None and value not in known:
            raise ValueError(f"expected {name} among {', '.join(known)}, got {value!r}")
    if seeds < 1:
        raise ValueError(f"expected at least 1 seed, got {seeds}")
    settings = settings or {}
    if not isinstance(settings, dict) or not all(isinstance(values, dict) for values in settings.values()):
        raise ValueError(f"expected settings by section, such as {{'train': {{'epochs': 2}}}}, got {settings!r}")
    output = Path(output)
    require_folder(output)
    source = find_data(data, output, budget)
    make_folder(output)
    study = Study(output, source, budget, family or source.family, settings, tuple(range(seeds)), device)
    result = {"figure3": _figure3, "figure5": _figure5}.get(what, _table)(study, what)
    write_text(output / f"{what}.csv", comma_separated(result))
    write_text(output / f"{what}.md", markdown(result))
    _draw(study, what, result, output / f"{what}.png")
    return result


def _table(study: Study, what: str) -> Result:
    comparison = COMPARISONS[what]
    measured = measure_rows(study, comparison)
    lines = [Line(row.name, measured[row.name], row.paper) for row in comparison.rows]
    facts = _facts(study, comparison.rows)
    return Result(comparison.title, comparison.columns, lines, comparison.baseline, comparison.note, facts)


def _figure3(study: Study, what: str) -> Result:
    measured = [_once(study, seed, "figure3", figures.similarities) for seed in study.seeds]
    lines = [Line(place, [numbers[place] for numbers in measured]) for place in figures.PLACES]
    return Result(TITLES[what], figures.PLACE_COLUMNS, lines, None, "", _facts(study, [FULL]), digits=2)


def _figure5(study: Study, what: str) -> Result:
    fitted_to = study.train_images()
    measured = [_once(study, seed, "figure5", partial(figures.sweep, fitted_to=fitted_to)) for seed in study.seeds]
    lines = [Line(name, [numbers[name] for numbers in measured]) for name in measured[0]]
    return Result(TITLES[what], SIZES, lines, "gamma = 0", "", _facts(study, [FULL]))


def _once(
    study: Study, seed: int, name: str, measure: Callable[[Predictor, CocoFolder], dict[str, Numbers]]
) -> dict[str, Numbers]:
    """What is measured with the full model; kept beside its training."""
    return stored(study.train(FULL, seed) / f"{name}.json", lambda: measure(study.predictor(FULL, seed), study.val()))


def _draw(study: Study, what: str, result: Result, path: Path) -> None:
    if what == "figure3":
        shown = figures.scenes(study.predictor(FULL, study.seeds[0]), study.val(), figures.SCENES)
        figures.draw_spheres(list(shown), path)
    elif what == "figure4":
        predictors = {row.name: study.predictor(row, study.seeds[0]) for row in COMPARISONS[what].rows}
        figures.draw_pictures(predictors, study.val(), path)
    elif what == "figure5":
        figures.draw_curves(result, path)
    else:
        figures.draw_table(result, path)


def _facts(study: Study, rows: Sequence[Row]) -> dict[str, str]:
    """What a reader must know of a run."""
    val = study.val()
    areas = [annotation.area for record in val.images for annotation in record.objects()]
    small, large = sum(area < 32**2 for area in areas), sum(area > 96**2 for area in areas)
    trainings = {FAMILIES[study.family][row.preset]: study.training_config(row, 0).train for row in rows}
    lengths = {
        preset: f"{recipe.max_steps} steps" if recipe.max_steps else f"{recipe.epochs} epochs"
        for preset, recipe in trainings.items()
    }
    chosen = choose_device(study.device)
    machine = (
        torch.cuda.get_device_name(chosen)
        if chosen.type == "cuda"
        else f"{torch.get_num_threads()} threads of {platform.machine()}"
    )
    facts = {
        "data": study.data.title,
        "evaluated": f"{len(val)} images, {len(areas)} objects ({small} small, {len(areas) - small - large} medium, "
        f"{large} large)",
        "training": ", ".join(
            f"{preset} {lengths[preset]} of {recipe.batch_size} images" for preset, recipe in trainings.items()
        ),
        "budget": study.budget,
        "seeds": f"{len(study.seeds)} ({', '.join(map(str, study.seeds))})",
        "machine": f"torch {torch.__version__}, {machine}",
    }
    return facts | ({"settings": json.dumps(study.settings)} if study.settings else {})
