"""A comparison's numbers as a table: on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rdsnet.reproduce.plan import SPEED, PaperNumbers
from rdsnet.reproduce.study import Numbers


@dataclass(frozen=True)
class Line:
    """A row of a table: what was measured with each seed, and the paper's figures."""

    name: str
    values: Sequence[Numbers]
    paper: PaperNumbers = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A table, measured.

    baseline  the line that changes are to; None: no changes are shown
    facts     what a reader must know of the run, by name
    digits    after the decimal point
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[Line]
    baseline: str | None
    note: str
    facts: Mapping[str, str]
    digits: int = 1

    @property
    def accuracies(self) -> list[str]:
        """The columns in which changes are shown: speed is another machine's in the paper."""
        return [column for column in self.columns if column != SPEED]


def changes(result: Result) -> list[Line]:
    """Each line's difference to the baseline, seed by seed: what the seeds share falls out of it."""
    if result.baseline is None:
        return []
    base = next(line for line in result.lines if line.name == result.baseline)
    columns = result.accuracies
    return [
        Line(
            line.name,
            [
                {column: _minus(own[column], other[column]) for column in columns}
                for own, other in zip(line.values, base.values, strict=True)
            ],
            {
                column: tuple(a - b for a, b in zip(line.paper[column], base.paper[column], strict=True))
                for column in columns
                if len(line.paper.get(column, ())) == len(base.paper.get(column, ())) > 0
            },
        )
        for line in result.lines
        if line is not base
    ]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def spread(values: Sequence[Numbers], column: str) -> tuple[float | None, float | None]:
    """Mean and standard deviation over the seeds that have a number."""
    known = [value for numbers in values if (value := numbers[column]) is not None]
    return mean(known) if known else None, stdev(known) if len(known) > 1 else None


def terminal(result: Result) -> list[Table]:
    """The tables for `rich`: the numbers, and their changes; the paper's figures stand below."""
    tables = []
    for heading, columns, rows in _tables(result):
        longest = max(len(word) for name, *_ in rows for word in name.split())
        table = Table(title=heading, box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", min_width=longest)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, *cells in rows:
            narrow = (cell.replace(" ± ", "±").replace(" (", "\n(").replace(" / ", "/\n") for cell in cells)
            table.add_row(name, *narrow)
        tables.append(table)
    return tables


def markdown(result: Result) -> str:
    """The tables with what a reader must know of the run."""
    parts = [f"# {result.title}", "\n".join(f"- {name}: {text}" for name, text in result.facts.items())]
    for heading, columns, rows in _tables(result):
        lines = ["| " + " | ".join(row) + " |" for row in (["", *columns], *rows)]
        lines.insert(1, "|---" + "|---:" * len(columns) + "|")
        parts += [f"{heading}:", "\n".join(lines)]
    if result.note:
        parts.append(f"In brackets, the paper's figures: {result.note}.")
    return "\n\n".join(parts) + "\n"


def _tables(result: Result) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Headings, columns and rows of text: of the numbers, and of their changes if there is a baseline."""
    count = len(result.lines[0].values)
    over = f"Mean and standard deviation of {count} seeds" if count > 1 else "One seed"
    kinds = [(over, result.columns, result.lines, "")]
    if changed := changes(result):
        kinds.append((f"Change against {result.baseline}, seed by seed", result.accuracies, changed, "+"))
    tables = []
    for heading, columns, lines, sign in kinds:
        rows = [[line.name, *(_cell(line, column, sign, result.digits) for column in columns)] for line in lines]
        tables.append((heading, columns, rows))
    return tables


def _cell(line: Line, column: str, sign: str, digits: int) -> str:
    """Such as "37.1 ± 0.2 (37.3 / 40.3)"."""
    average, deviation = spread(line.values, column)
    form = f"{sign}.{digits}f"
    text = "-" if average is None else f"{round(average, digits) + 0.0:{form}}"  # no -0.0
    if deviation is not None:
        text += f" ± {deviation:.{digits}f}"
    if column in line.paper:
        text += f" ({' / '.join(f'{value:{form}}' for value in line.paper[column])})"
    return text


def comma_separated(result: Result) -> str:
    """One line a row and column: mean, spread, the paper's figures, the same of the change, and each seed's value."""
    seeds = [f"seed{i}" for i in range(len(result.lines[0].values))]
    changed = {line.name: line for line in changes(result)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "column", "mean", "std", "paper", "change", "change_std", "paper_change", *seeds])
    for line in result.lines:
        for column in result.columns:
            change = changed.get(line.name) if column != SPEED else None
            writer.writerow(
                [
                    line.name,
                    column,
                    *spread(line.values, column),
                    " ".join(f"{value:g}" for value in line.paper.get(column, ())),
                    *(spread(change.values, column) if change else (None, None)),
                    " ".join(f"{value:.1f}" for value in change.paper.get(column, ())) if change else "",
                    *(numbers[column] for numbers in line.values),
                ]
            )
    return text.getvalue()
