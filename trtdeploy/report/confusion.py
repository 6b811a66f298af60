"""Which classes are taken for which: the most frequent mistakes, and the matrix as far as a reader can take it in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtdeploy.report.content import Report

MOST_CLASSES = 100
"""With more classes than this, the matrix holds those with the most mistakes."""
PAIRS_FROM = 12
"""With more classes than this, the most frequent mistakes are listed above the matrix."""
PAIRS = 20
SMALL_CELLS_FROM = 30
LEVELS = 8
"""Shades of a cell."""


@dataclass(frozen=True)
class Mistake:
    """A class that was taken for another: how many of its samples."""

    label: str
    answer: str
    count: int
    of: int


@dataclass(frozen=True)
class Row:
    """One true class of the matrix.

    Attributes:
        label: Its name.
        of: How many samples it has.
        cells: How many samples got each answer, and the shade from 0 to ``LEVELS``. Mistakes have shades of their
            own: beside the right answers they would all be pale.
        diagonal: Which cell holds the right answers.
    """

    label: str
    of: int
    cells: tuple[tuple[int, int], ...]
    diagonal: int


@dataclass(frozen=True)
class Confusion:
    """What the page shows.

    Attributes:
        classes: Names of the columns, and of the rows.
        rows: True classes.
        mistakes: The most frequent ones, worst first; empty where the matrix says it as well.
        mistakes_in_all: Pairs of classes that were mixed up.
        left_out: Classes that the matrix does not show.
        upright: Whether the names are too long for a column and stand upright.
        many: Whether the matrix has small cells, and is not printed.
    """

    classes: tuple[str, ...]
    rows: tuple[Row, ...]
    mistakes: tuple[Mistake, ...]
    mistakes_in_all: int
    left_out: int
    upright: bool
    many: bool


def confusion(report: Report) -> Confusion:
    """Choose what of a confusion matrix is shown."""
    counts = np.asarray(report.confusion, dtype=np.int64)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    shown = np.arange(len(counts))
    if len(counts) > MOST_CLASSES:
        by_mistakes = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")
        shown = np.sort(by_mistakes[:MOST_CLASSES])
    most_right, most_wrong = max(1, int(counts.diagonal().max())), max(1, int(wrong.max()))
    rows = tuple(
        Row(
            label=report.classes[row],
            of=int(counts[row].sum()),
            cells=tuple(
                (
                    int(counts[row, column]),
                    _shade(int(counts[row, column]), most_right if row == column else most_wrong),
                )
                for column in shown
            ),
            diagonal=place,
        )
        for place, row in enumerate(shown)
    )
    classes = tuple(report.classes[column] for column in shown)
    return Confusion(
        classes=classes,
        rows=rows,
        mistakes=_most_frequent(report, wrong) if len(counts) > PAIRS_FROM else (),
        mistakes_in_all=int((wrong > 0).sum()),
        left_out=len(counts) - len(shown),
        upright=max(map(len, classes)) > 3,
        many=len(classes) > SMALL_CELLS_FROM,
    )


def _most_frequent(report: Report, wrong: NDArray[np.int64]) -> tuple[Mistake, ...]:
    rows, columns = np.nonzero(wrong)
    order = np.argsort(-wrong[rows, columns], kind="stable")[:PAIRS]
    return tuple(
        Mistake(
            label=report.classes[row],
            answer=report.classes[column],
            count=int(wrong[row, column]),
            of=sum(report.confusion[row]),
        )
        for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    )


def _shade(count: int, most: int) -> int:
    """Return a shade: the root lets a few among many still be seen."""
    return math.ceil(LEVELS * math.sqrt(count / most))
