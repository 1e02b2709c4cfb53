"""What a sweep has done: the table of its clips, kept among those of other sweeps."""

import contextlib
import os
import time
from pathlib import Path

import pandas as pd
from filelock import FileLock

from stepkit._files import read_table, write_table, write_whole
from stepkit.data.sample import file_name

__all__ = ["Manifest", "probe"]

SAVED_EVERY = 30.0  # seconds between two writings of the manifest
ROW = ["method", "options", "clip"]
COLUMNS = [*ROW, "status", "what", "note", "error", "precision", "seconds", "attempts"]


def probe(folders: list[Path], ids) -> None:
    """Write and remove a file with the longest name in each folder: what is wrong is known early.

    Raises
    ------
    OSError
        A folder cannot be written to, names of this length are not possible, the disk is full.
    """
    name = max((f"{file_name(id_)}.safetensors" for id_ in ids), key=lambda n: len(os.fsencode(n)))
    for folder in folders:
        path = folder / ("_" * len(os.fsencode(name)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda partial: partial.write_bytes(bytes(4096)))
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder / name)) from error


class Manifest:
    """The table of what is done, failed, left; kept as ``manifest.csv``, whole at any time.

    A row per method, options and clip. The file grows: rows of other sweeps stay as they are.
    """

    def __init__(self, folder: Path, methods: dict[str, dict], ids: dict[int, str]):
        self.path, self.saved = folder / "manifest.csv", time.monotonic()
        left = dict.fromkeys(COLUMNS, "")
        left |= {"status": "left", "seconds": float("nan"), "attempts": 0}
        self.rows = {
            (method, i): left | {"method": method, "options": _said(own), "clip": id_}
            for method, own in methods.items()
            for i, id_ in ids.items()
        }

    def note(self, method: str, clips, outcomes: list[dict]) -> list[int]:
        """Enter what became of clips of a method; return those that failed."""
        for i, outcome in zip(clips, outcomes, strict=True):
            row = self.rows[method, i]
            row.update(outcome, attempts=row["attempts"] + 1)
        if time.monotonic() - self.saved > SAVED_EVERY:
            self.save()
        return [i for i in clips if self.rows[method, i]["status"] == "failed"]

    @property
    def table(self) -> pd.DataFrame:
        """One row per method and clip."""
        return pd.DataFrame(self.rows.values(), columns=COLUMNS)

    @property
    def rest(self) -> str:
        """What is left to do, in words."""
        left = sum(row["status"] != "done" for row in self.rows.values())
        return f"{left} of {len(self.rows)} maps are left, and the same call goes on with them"

    def save(self) -> None:
        """Write the rows among those that the file holds already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(".manifest.lock")):
            kept = read_table(self.path, **dict.fromkeys(COLUMNS, str))
            kept = pd.DataFrame(kept, columns=COLUMNS).fillna("").to_dict("records")
            rows = {tuple(row[name] for name in ROW): row for row in kept}
            for row in self.rows.values():
                key = tuple(row[name] for name in ROW)
                if row["status"] != "left" or key not in rows:
                    rows[key] = row
            write_table(self.path, pd.DataFrame(rows.values(), columns=COLUMNS))
        self.saved = time.monotonic()

    def __enter__(self):
        self.save()
        return self

    def __exit__(self, error, *_):
        # an error that is on its way says more than another one of the same disk
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.save()


def _said(options: dict) -> str:
    """Return options in words that are the same in every process."""
    names = {k: getattr(v, "name", getattr(v, "__name__", v)) for k, v in options.items()}
    return ", ".join(f"{key}={name!r}" for key, name in sorted(names.items()))
