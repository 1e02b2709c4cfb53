"""The authors' scores, read out of the run logs in the history of their repository.

The logs stand in the parent of the commit that removed them. A block of a log is one run: a line
``Loaded <dataset>_<model>_<map>.pt``, then ``<video>: <score>`` for each video, then ``Finished:
<unit>, <ins|del>, <order>, <dataset>, <model>, <method>, #Step=128`` and ``Average: <mean>``.
"""

import re
import subprocess
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from stepkit._checks import require
from stepkit._files import write_whole
from tools.authors.scores import COMMIT, METHODS, RUNS, VIDEOS, Cell

LOGS = ("outs_*/*morf*.txt", "outs_all/*.txt")
EARLIER = (  # runs that the authors made again, or stopped: folder and file of each
    "outs_sthsthv2/r2p1d_ins_morf_eb.txt",
    "outs_sthsthv2/r2p1d_ins_morf_grad_cam.txt",
    "outs_sthsthv2/r2p1d_ins_morf_ig.txt",
    "outs_sthsthv2/r2p1d_ins_morf_sg.txt",
    "outs_sthsthv2/r2p1d_ins_morf_perturb_core5.txt",
    "outs_sthsthv2/r2p1d_ins_morf_perturb_core8.txt",
    "outs_sthsthv2/r2p1d_ins_morf_perturb_core11.txt",
    "outs_epic/r50l_ins_morf_perturb_rerun.txt",
    "outs_sthsthv2_old/*",
    "outs_ucf101/r2p1d_ins_morf_blur_ig_cm16.txt",  # whole; Table V has its mean, .62
)
DATASETS = {"ucf101": "ucf101-24", "epic": "epic-object", "sthsthv2": "something-v2"}
MODELS = {"r2p1d": "r2plus1d_18", "r50l": "r50l"}
UNITS = {"cm_16": "patch", "scm_256": "superpixel"}
METRICS = {"ins": "insertion", "del": "deletion"}
_MAP = re.compile(r"(?P<dataset>[^_]+)_(?P<model>[^_]+)_(?P<map>.+)\.pt")
_SCORE = re.compile(r"([^\s:]+): (\S+)")


@dataclass
class Block:
    """One run in a log."""

    file: str
    line: int
    loaded: str = ""
    scores: list = field(default_factory=list)
    finished: list = field(default_factory=list)
    average: float | None = None

    @property
    def map(self) -> str:
        """The name of the map, less the words that all of them have."""
        known = _MAP.fullmatch(self.loaded)
        return re.sub(r"_full|_test|_summed", "", known["map"]) if known else ""

    def cell(self) -> Cell | None:
        """What the scores are about; None: not among what is kept."""
        if len(self.finished) != 7 or self.finished[2] != "most_first":
            return None
        unit, metric, _, dataset, model, *_ = self.finished
        keys = (DATASETS, dataset), (MODELS, model), (UNITS, unit), (METRICS, metric)
        if not all(key in names for names, key in keys):
            return None
        return Cell(*(names[key] for names, key in keys))

    def fault(self, videos: dict[str, int]) -> str:
        """Say why the block cannot be taken; empty: it can."""
        if any(fnmatch(self.file, pattern) for pattern in EARLIER):
            return "an earlier or partial run"
        if not self.finished or self.average is None:
            return "the run did not end"
        known = _MAP.fullmatch(self.loaded)
        if not known:
            return "no map was named"
        if self.cell() is None:
            return "of a unit, an order or a network that is not kept"
        if self.map not in RUNS:
            return "of a map that is not kept"
        told = [known["dataset"], known["model"], self.map.split("_core")[0]]
        if told != self.finished[3:6]:
            return f"{' '.join(told)} was loaded, {' '.join(self.finished[3:6])} finished"
        names, scores = [name for name, _ in self.scores], [score for _, score in self.scores]
        if len(set(names)) < len(names):
            return "a video twice"
        if len(names) != videos[self.cell().dataset]:
            return f"{len(names)} of {videos[self.cell().dataset]} videos"
        if not np.isfinite(scores).all() or abs(np.mean(scores) - self.average) > 1e-6:
            return "the scores do not have the average that the log says"
        return ""


def blocks(file: str, text: str) -> list[Block]:
    """Return the runs of a log, whole or not."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("Loaded "):
            found.append(Block(file, number, PurePosixPath(line[7:].strip()).name))
        elif line.startswith("Finished: "):
            _open(found, file, number).finished = line[10:].strip().split(", ")
        elif line.startswith("Average: "):
            _open(found, file, number).average = float(line[9:])
        elif (score := _SCORE.fullmatch(line.strip())) and _number(score[2]):
            _open(found, file, number).scores.append((score[1], float(score[2])))
    return found


def _open(found: list[Block], file: str, number: int) -> Block:
    """Return the run that a line belongs to; a line behind the end of one begins another."""
    if not found or found[-1].average is not None:
        found.append(Block(file, number))
    return found[-1]


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def extract(
    repo, out, commit: str = COMMIT, videos: dict[str, int] = VIDEOS
) -> tuple[dict[Cell, pd.DataFrame], pd.DataFrame]:
    """Write the scores as one CSV per dataset, network, unit and operation into ``out``.

    Parameters
    ----------
    repo : path
        A clone of the authors' repository. Git reads it; nothing in it changes.
    out : path
        The folder to write to. ``blocks.csv`` there lists all runs, and why one was left.
    commit : str
        The commit that removed the logs: its parent is read.
    videos : dict
        How many videos a whole run has, by dataset.

    Returns
    -------
    (dict of Cell to DataFrame, DataFrame)
        Scores, four decimals, videos in order; and the runs: ``file, line, map, dataset, model,
        unit, metric, method, videos, mean, taken, why``.

    Raises
    ------
    ValueError
        No clone, no such commit, no run that is whole.
    """
    listed = _git(repo, "ls-tree", "-r", "--name-only", "-z", f"{commit}^").split("\0")
    files = sorted(f for f in listed if any(fnmatch(f, pattern) for pattern in LOGS))
    texts = {file: _git(repo, "cat-file", "blob", f"{commit}^:{file}") for file in files}
    runs = [run for file, text in texts.items() for run in blocks(file, text)]
    why = {id(run): run.fault(videos) for run in runs}
    chosen = _one_each([run for run in runs if not why[id(run)]], why)
    require(len(chosen) > 0, "--repo", f"no whole run in {repo}", f"logs in the parent of {commit}")
    tables = {}
    for (cell, method), run in chosen.items():
        tables.setdefault(cell, {})[method] = pd.Series(dict(run.scores))
    ordered = {cell: [m for m in METHODS if m in known] for cell, known in tables.items()}
    tables = {cell: pd.DataFrame(tables[cell])[order] for cell, order in ordered.items()}
    tables = {c: t.sort_index().rename_axis("video").round(4) for c, t in tables.items()}
    account = pd.DataFrame([_row(run, why[id(run)]) for run in runs])
    Path(out).mkdir(parents=True, exist_ok=True)
    written = {"_".join(cell): table.reset_index() for cell, table in tables.items()}
    for name, table in (written | {"blocks": account}).items():
        write_whole(Path(out) / f"{name}.csv", lambda path, t=table: t.to_csv(path, index=False))
    return tables, account


def _one_each(runs: list[Block], why: dict[int, str]) -> dict[tuple[Cell, str], Block]:
    """Choose the last of the whole runs of each cell and method; say of the others why not."""
    chosen = {}
    for run in runs:
        key = run.cell(), RUNS[run.map]
        if key in chosen:
            before = chosen[key]
            why[id(before)] = f"a later run: {run.file}, line {run.line}"
        chosen[key] = run
    return chosen


def _row(run: Block, why: str) -> dict:
    cell = run.cell() or Cell("", "", "", "")
    mean = np.mean([score for _, score in run.scores]) if run.scores else np.nan
    row = {"file": run.file, "line": run.line, "map": run.map, **cell._asdict()}
    row |= {"method": RUNS.get(run.map, ""), "videos": len(run.scores), "mean": round(mean, 4)}
    return row | {"taken": not why, "why": why}


def _git(repo, *arguments: str) -> str:
    """Return what a plumbing command of git prints; it reads objects and nothing else."""
    command = ["git", "-C", str(repo), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        raise ValueError("git: got none, expected git on the path") from None
    except subprocess.CalledProcessError as error:
        told = error.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(
            f"--repo: got {repo} ({told[-1] if told else 'no answer'}), expected a full clone of "
            "shinkyo0513/Spatio-Temporal-Perturbations-for-Video-Attribution"
        ) from None
    return done.stdout.decode("utf-8", "replace")
