"""Rows of values as CSV and as a table in plain text, and values and text in short."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A header and a line for each row; missing values are empty, other keys than ``columns`` are ignored."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # file names need not be valid UTF-8


def text_table(rows: Sequence[Sequence[str]], align: str = "<") -> str:
    """Rows of strings as aligned columns: ``<`` to the left, ``>`` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{align}{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def short(value: Any) -> str:
    """A value to show: floats have four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def one_line(text: object, limit: int = 200) -> str:
    """Text from a file or an exception, for a message: on one line and not too long."""
    return " ".join(str(text).split())[:limit]


def printable(text: object, limit: int = 200) -> str:
    """Like ``one_line``, with ? for what a terminal would obey or cannot show."""
    return "".join(each if each.isprintable() else "?" for each in one_line(text, limit))
