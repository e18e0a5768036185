"""The numbers of a benchmark as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rdsnet.benchmark.measure import VERSIONS

MIB = 2**20


def format_table(result: dict[str, Any]) -> Group:
    """What `rdsnet.benchmark.benchmark` measured, as tables and lines for `rich`; with its "source", if it has one."""
    return Group(_stage_table(result), _throughput_table(result), *(Text(line) for line in _lines(result)))


def _stage_table(result: dict[str, Any]) -> Table:
    facts, network, after = result["input"], result["network"], result["after_network"]
    area = "" if facts["mean_box_area"] is None else f" of {facts['mean_box_area']:.0f} pixels on average"
    model = f"{result.get('source', 'model')}, {result['model']['dtype']}"
    model += ", compiled" if result["model"]["compiled"] else ""
    title = (
        f"{model}; image {_size(facts['size'])}, network {_size(facts['network_size'])}, {facts['objects']} boxes "
        f"{'drawn' if facts['forced'] else 'found'}{area}; medians of {facts['rounds']} rounds"
    )
    table = Table("stage", title=title)
    for heading in ("ms", "share", "GMAC", "of convolution", "MiB"):
        table.add_column(heading, justify="right")
    for name, stage in result["stages"].items():
        table.add_row(name, *_cells(stage))
    table.add_section()
    table.add_row("network, in all", *_cells(network))
    table.add_row("after the network", *_cells({**after, "memory": None}))  # over another level than the others
    table.add_row("sum", *_cells({"ms": result["sum_ms"], "memory": result["memory"]["peak"]}))
    table.add_row("complete, without probes", *_cells({"ms": result["complete_ms"]}))
    return table


def _cells(numbers: dict[str, Any]) -> list[str]:
    """One cell a column; empty for what there is no number of."""
    forms = {"ms": (1, "{:.2f}"), "share": (1, "{:.1%}"), "macs": (1e-9, "{:.2f}"), "of_convolution": (1, "{:.0%}")}
    forms["memory"] = (1 / MIB, "{:.0f}")
    return [
        "" if numbers.get(name) is None else form.format(numbers[name] * factor)
        for name, (factor, form) in forms.items()
    ]


def _throughput_table(result: dict[str, Any]) -> Table:
    table = Table("batch size", *result["throughput"], title="throughput")
    table.add_row("images/s", *(f"{rate:.3g}" for rate in result["throughput"].values()))
    return table


def _lines(result: dict[str, Any]) -> list[str]:
    convolution, memory, machine = result["network"]["convolution"], result["memory"], result["machine"]
    model = f"memory: the model {memory['model'] / MIB:.0f} MiB"
    if memory["peak"] is not None:
        model += (
            f"; a prediction {memory['peak'] / MIB:.0f} MiB more at its peak; after the network, "
            f"{result['after_network']['memory'] / MIB:.0f} MiB over what was in use when that ended"
        )
    versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS)
    processors = f"{machine['cpu']}, cores: {machine['cores']}, threads: {machine['threads']}"
    return [
        f"convolution: 3x3, {convolution['channels']} channels, {_size(convolution['size'])} cells, "
        f"{convolution['dtype']}: {convolution['macs_per_second'] / 1e9:.1f} GMAC/s",
        model,
        f"machine: {processors if machine['gpu'] is None else machine['gpu'] + '; ' + processors}; {machine['system']}",
        f"versions: Python {machine['python']}, {versions}",
    ]


def _size(size: list[int]) -> str:
    return f"{size[0]}x{size[1]}"
