"""stepkit: which pixels of a video, in which frames, made a network decide.

The paper "Spatio-Temporal Perturbations for Video Attribution" (STEP, arXiv 2109.00222) as a
library. ``import stepkit as sk``; the names below are its public face.
"""

import getpass
import os
import pkgutil
import tempfile

__version__ = "0.1.0"  # said here alone: a clone on the path has no metadata

try:
    getpass.getuser()
except (KeyError, OSError):  # a number without a name, as in containers: torchvision would fail
    _folder = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _folder)

from stepkit import data, metrics, models, removal, stats, training, viz
from stepkit.attribution import attribute, method, methods, step
from stepkit.clips import read_clip, read_clips
from stepkit.data import dataset, load_dataset
from stepkit.metrics import deletion, insertion, metric, pointing_game, reliability
from stepkit.models import scores
from stepkit.models.wrapped import wrap
from stepkit.networks import load_model
from stepkit.prepare import prepare
from stepkit.study import Study
from stepkit.sweep import sweep
from stepkit.viz import save_video, show

__all__ = [
    "Study",
    "attribute",
    "data",
    "dataset",
    "deletion",
    "explore",
    "insertion",
    "load_dataset",
    "load_model",
    "method",
    "methods",
    "metric",
    "metrics",
    "models",
    "plots",
    "pointing_game",
    "prepare",
    "read_clip",
    "read_clips",
    "reliability",
    "removal",
    "save_video",
    "scores",
    "show",
    "stats",
    "step",
    "sweep",
    "training",
    "viz",
    "wrap",
]


_LATER = {"explore": "stepkit.explorer:explore", "plots": "stepkit.viz.plots"}


def __getattr__(name: str):
    """Import what needs Jupyter's widgets, as seaborn does, when it is first asked for."""
    if name in _LATER:
        return pkgutil.resolve_name(_LATER[name])
    raise AttributeError(f"module 'stepkit' has no attribute {name!r}")
