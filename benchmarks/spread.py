"""What refinement changes: box AP of several runs (seeds) as regressed, direct and refined, by object size.

for s in 0 1 2; do rdsnet train ... --seed $s --output runs/s$s; done
python benchmarks/spread.py runs/s0 runs/s1 runs/s2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one a seed")
    runs = [json.loads((run / "metrics.json").read_text()) for run in parser.parse_args().runs]

    boxes = [run["box"] for run in runs]
    rows: list[tuple[str, list[dict[str, Any]]]] = [
        (f"box {kind}", [box[kind] for box in boxes]) for kind in ("regressed", "direct", "refined")
    ]
    for kind in ("direct", "refined"):
        change = [{c: difference(box[kind][c], box["regressed"][c]) for c in COLUMNS} for box in boxes]
        rows.append((f"{kind} - regressed", change))
    rows.append(("mask", [run["mask"] for run in runs]))
    if all("boundary" in run for run in runs):
        rows.append(("boundary", [run["boundary"] for run in runs]))

    print(f"| {len(runs)} runs, mean +- standard deviation | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, values in rows:
        print(f"| {name} | " + " | ".join(spread([value[c] for value in values]) for c in COLUMNS) + " |")


def difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def spread(values: list[float | None]) -> str:
    """In percent; a dash where the data has no object of that size."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):.1f}" + (f" +- {stdev(known):.1f}" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
