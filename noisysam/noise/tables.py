"""Label files that other tools write: .csv, .txt and .npy."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noisysam.core.errors import UserError
from noisysam.core.text import one_line
from noisysam.core.untrusted import check_file

SUFFIXES = (".csv", ".txt", ".npy")
NAMES = ("noisy", "label", "labels", "noisy_label", "noisy_labels")  # of the column of labels


def read_labels(path: Path) -> dict[str, NDArray[Any]]:
    """``labels`` and, if there, ``clean`` of a file with one of ``SUFFIXES``, in the order of the training images.

    A CSV may name columns in its first line (a label, and ``clean`` and ``index``, positions from 0); a .txt, or a CSV
    without names, holds one label a line. ``UserError`` for anything else.
    """
    check_file(path)
    return {"labels": _npy(path)} if path.suffix.lower() == ".npy" else _table(path)


def _npy(path: Path) -> NDArray[Any]:
    """The array of a .npy file, mapped first, so that no memory is taken for what the file does not hold."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            return np.array(array)
    except Exception as error:  # of numpy, and of the parser that reads headers
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
    raise UserError(f"{path}: not one array; name an .npz file .npz")


def _table(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[field.strip() for field in row] for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
    header = rows[0] if rows else []
    if len(header) == 1 and header[0] not in NAMES:  # no names: a label a line
        return {"labels": _column(path, "of labels", [row[0] if len(row) == 1 else "" for row in rows])}
    label = next((name for name in NAMES if name in header), None)
    if label is None:
        raise UserError(f"{path}: its first line must name a column noisy (and may name index and clean)")
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise UserError(f"{path}: data row {number} has {len(row)} fields for {len(header)} columns")
    found = {
        name: _column(path, name, [row[header.index(name)] for row in rows[1:]])
        for name in (label, "clean", "index")
        if name in header
    }
    arrays = {"labels": found[label]} | ({"clean": found["clean"]} if "clean" in found else {})
    if "index" in found:
        order = np.argsort(found["index"], kind="stable")
        if not np.array_equal(found["index"][order], np.arange(len(rows) - 1)):
            raise UserError(f"{path}: column index must hold each of 0 to {len(rows) - 2} once")
        arrays = {name: array[order] for name, array in arrays.items()}
    return arrays


def _column(path: Path, name: str, fields: list[str]) -> NDArray[np.int64]:
    try:
        return np.array([int(field) for field in fields], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: column {name} holds something that is no integer label") from error
