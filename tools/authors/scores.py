"""The authors' scores in a folder: which files, whose columns, which videos share a scene."""

import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from stepkit._checks import require
from stepkit.published import PRINTED, UNPRINTED

RANKED = [PRINTED[i] for i in (1, 2, 3, 4, 8)]  # G, IG, SG, SG2, GC: those of α, §V-C
LENGTHS = ["step_t0", "step_t5", "step_t11", "step_t14"]  # T_K; "step" is 8
VARIANTS = ["step_t5_cylinder", "step_t8_cylinder", "step_t8_fade"]
METHODS = ["random", *PRINTED, *UNPRINTED, "step", *LENGTHS, *VARIANTS]
COMMIT = "f247bbc"  # of the authors' repository: "remove outs_files"; its parent has them
RUNS = {  # the maps' names in their logs
    "random": "random",
    "g": "gradient",
    "la": "gradient_x_input",
    "ig": "integrated_gradients",
    "sg": "smoothgrad",
    "sg2": "smoothgrad_squared",
    "blur_ig": "blur_ig",
    "xrai": "xrai",
    "eb": "excitation_backprop",
    "grad_cam": "grad_cam",
    "score_cam": "score_cam",
    "gbp": "guided_backprop",
    "perturb": "step_t0",
    "perturb_core5": "step_t5",
    "perturb_core8": "step",
    "perturb_core11": "step_t11",
    "perturb_core14": "step_t14",
    "perturb_core5_cylinder": "step_t5_cylinder",
    "perturb_core8_cylinder": "step_t8_cylinder",
    "perturb_core8_fade": "step_t8_fade",
}
VIDEOS = {"ucf101-24": 910, "epic-object": 500, "something-v2": 1000}
SCENES = {  # groups of UCF101, recordings of EPIC-Kitchens; a video of Something-V2 is a scene
    "ucf101-24": r"v_.+_g\d+",
    "epic-object": r"P\d+_\d+",
    "something-v2": r".+",
}
MODELS, UNITS = ["r2plus1d_18", "r50l"], ["patch", "superpixel"]


class Cell(NamedTuple):
    """What one file of scores is about."""

    dataset: str
    model: str
    unit: str
    metric: str

    @property
    def lower_is_better(self) -> bool:
        """True of deletion."""
        return self.metric == "deletion"

    @property
    def step(self) -> str:
        """STEP's column: T_K = 8; for deletion the authors ran it without L_K only."""
        return "step_t0" if self.lower_is_better else "step"


CELLS = [
    Cell(dataset, model, unit, metric)
    for dataset in VIDEOS
    for model in MODELS
    for unit in UNITS
    for metric in ("insertion", "deletion")
]


def read(folder) -> dict[Cell, pd.DataFrame]:
    """Return the scores by cell: a row per video, a column per method, in the order of `METHODS`.

    Raises
    ------
    ValueError
        No scores in ``folder``, a method that is not known or that is missing (STEP, those of α), a
        score that is missing.
    """
    paths = {cell: Path(folder) / ("_".join(cell) + ".csv") for cell in CELLS}
    found = {cell: path for cell, path in paths.items() if path.is_file()}
    wanted = "a folder that `python -m tools.authors scores` wrote, such as "
    require(len(found) > 0, "authors", f"no scores in {folder}", wanted + paths[CELLS[0]].name)
    return {cell: _table(cell, path) for cell, path in found.items()}


def _table(cell: Cell, path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype={"video": str}).set_index("video").sort_index()
    strange = sorted(set(table) - set(METHODS))
    require(not strange, path.name, f"columns {strange}", f"some of {METHODS}")
    missing = [m for m in ["random", *RANKED, cell.step] if m not in table]
    require(not missing, path.name, f"no {missing}", "STEP, random, and the methods of α")
    known = bool(table.notna().all(axis=None)) and table.index.is_unique
    require(known, path.name, "a gap or a video twice", "one score for each video and method")
    return table[[method for method in METHODS if method in table]]


def scenes(dataset: str, videos) -> list[str]:
    """Return the scene of each video."""
    return [re.match(SCENES[dataset], video)[0] for video in videos]


def classes(dataset: str, videos) -> list[str] | None:
    """Return the class of each video where its name says it: UCF101-24."""
    if dataset != "ucf101-24":
        return None
    return [video.split("_")[1] for video in videos]
