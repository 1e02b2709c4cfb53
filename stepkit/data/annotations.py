"""What annotated datasets share: finding their lists, ordering classes, boxes, missing videos."""

import csv
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepkit._checks import require

_LISTS_IN = ("annotations", "splitfiles", "")  # under a root
MOST_BYTES = 2**24  # of a list or an annotation: several times the largest of the three datasets


def find_list(root: Path, patterns) -> Path:
    """Return the first file under ``root``, or in its ``annotations/``, that fits a pattern.

    Raises
    ------
    FileNotFoundError
        None does; the message names all places.
    """
    tried = [(root / folder, pattern) for folder in _LISTS_IN for pattern in patterns]
    for folder, pattern in tried:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                return path
    places = ", ".join(f"'{folder / pattern}'" for folder, pattern in tried)
    raise FileNotFoundError(f"root: expected one of {places}")


def class_names(index: dict[str, int], path: Path) -> list[str]:
    """Return the names of ``index`` in order of their numbers, which are 0, 1, … K − 1."""
    fits = bool(index) and sorted(index.values()) == list(range(len(index)))
    given = f"numbers {sorted(index.values())} in '{path}'"
    require(fits, "class_list", given, "one number per class: 0, 1, 2, …")
    return sorted(index, key=index.get)


def content(path, argument: str) -> bytes:
    """Return the bytes of a list: of a file of at most 16 MiB, neither pipe nor device.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; a larger one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: got '{path}', expected a file")
    size = path.stat().st_size
    require(size <= MOST_BYTES, argument, f"'{path}' of {size} bytes", f"at most {MOST_BYTES}")
    return path.read_bytes()


def csv_rows(path, argument: str, columns) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row of a CSV file, and in words where it is.

    Raises
    ------
    ValueError
        No text, no rows, a column or a value of ``columns`` that is not there.
    """
    row = None
    try:
        reader = csv.DictReader(io.StringIO(content(path, argument).decode(), newline=""))
        names = reader.fieldnames or ()
        lacking = ", ".join(column for column in columns if column not in names)
        require(not lacking, argument, f"'{path}' without column {lacking}", ", ".join(columns))
        for row in reader:
            at = f"in line {reader.line_num} of '{path}'"
            lacking = ", ".join(column for column in columns if row[column] is None)
            require(not lacking, argument, f"a row without {lacking} {at}", ", ".join(columns))
            yield at, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: got '{path}' ({error}), expected a CSV file") from error
    require(row is not None, argument, f"'{path}' without rows", "at least one")


def in_share(clips: list, share: tuple[float, float], position) -> list:
    """Return the clips whose ``position`` in [0, 1) lies in ``share``, its end excluded."""
    low, high = share
    require(0 <= low < high <= 1, "share", share, "0 <= a < b <= 1")
    return [clip for clip in clips if low <= position(clip) < high]


def boxes_in_clip(boxes, annotated_at: tuple[int, int], size: int | tuple[int, int]) -> Tensor:
    """Return boxes in pixels of a clip of ``size``, to which every frame is squashed whole.

    A box scales by the ratio of ``size`` to the frame it was annotated on: the size of the video
    file cancels out.

    Parameters
    ----------
    boxes : array-like
        (n, 4): x, y, width, height in pixels of the annotated frame; n may be 0.
    annotated_at : (int, int)
        H, W of the annotated frame.
    size : int or (int, int)
        Side, or height and width, of the clip.

    Returns
    -------
    Tensor
        float32 (m, 4), ``x0, y0, x1, y1``, cut to the frame; m < n where boxes lie outside it.
    """
    height, width = height_width(size)
    found = np.array(boxes, np.float64).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    found *= np.array([width / annotated_at[1], height / annotated_at[0]] * 2)
    found = np.clip(found, 0, [width, height] * 2)
    seen = (found[:, 2:] > found[:, :2]).all(1)
    return torch.from_numpy(found[seen].astype(np.float32))


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of a ``size``, which may be one side."""
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def report_missing(root: Path, missing: list[str], of: int, how: str) -> None:
    """Raise (``how="error"``) or warn about listed videos that are not there; none: do nothing.

    To be called by a dataset's ``__init__``: the warning then points at who made the dataset.
    """
    if not missing:
        return
    first = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
    said = f"root: {len(missing)} of {of} listed videos are not under '{root}': {first}"
    if how == "error":
        raise FileNotFoundError(f"{said}; missing='skip' leaves them out")
    warnings.warn(f"{said}; left out", stacklevel=3)
