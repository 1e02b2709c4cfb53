"""One run and its folder: its datasets and networks, and where its tables and figures are kept."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from stepkit import __version__, _keys, removal
from stepkit._checks import one_of, require
from stepkit._files import read_table, write_table, write_whole
from stepkit._registry import bring
from stepkit.data import Batch, batch, load_dataset
from stepkit.data.sample import as_dataset, balanced, file_name
from stepkit.prepare import prepare
from stepkit.training import PAPER, Recipe, fit, quick

__all__ = ["UNPERTURBED", "Drawn", "Run"]

ROOT = Path(__file__).parents[1]
UNPERTURBED = "_unperturbed"
NO_SETTINGS = ("out", "device", "progress", "made")  # they change no result


@dataclass
class Run:
    """What `stepkit.study.Study` is of; see there for the fields."""

    models: Any = ()
    datasets: Any = ()
    methods: Any = ()
    metrics: Any = ()
    out: str = ""
    frames: int = 8
    size: int = 48
    clips: int = 6
    data: str = ""
    parts: bool = False
    recipe: dict = field(default_factory=dict)
    retrain: bool = False
    seed: int = 0
    device: str = ""
    extra: str = ""
    progress: bool = False
    made: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        bring(self.extra)
        for kind in ("models", "datasets", "methods", "metrics"):
            setattr(self, kind, by_name(getattr(self, kind)))

    def __getstate__(self):
        return self.__dict__ | {"made": {}}  # a worker makes its own

    def __setstate__(self, state: dict):
        self.__dict__ = state
        bring(self.extra)

    def _once(self, *key: str, make: Callable):
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    # ------------------------------------------------------------------------------ data, networks

    def dataset(self, name: str, split: str = "test", n: int | None = None):
        """Return one split of a dataset; ``n`` counts generated clips."""
        given, options = self.datasets.get(name, (name, {}))
        if _is_ready(given):
            told = f"dataset {name!r}, which has no part {split!r}"
            require(split == "test", "models", told, "networks that are trained already")
            return as_dataset(given, name)
        sizes = {"train": 1200, "val": 120, "test": self.clips}
        where = {"data": self.data, "parts": self.parts, "seed": self.seed} | options
        clips = {"frames": self.frames, "size": self.size, "n": n or sizes[split]}
        return load_dataset(given, split, **clips, **where)

    def batch(self, dataset: str = "") -> Batch:
        """Return the test clips that are explained, of all classes in turn."""
        name = dataset or self.first("datasets")
        return self._once("batch", name, make=lambda: batch(self.drawn(name)))

    def drawn(self, dataset: str) -> "Drawn":
        """Return the test clips that are explained, as a dataset."""

        def draw():
            return Drawn(self.dataset(dataset), self.clips, self.seed, dataset)

        return self._once("drawn", dataset, make=draw)

    def first(self, kind: str) -> str:
        """Return the name of the first dataset, or model, ..."""
        return next(iter(getattr(self, kind)))

    def example(self, dataset: str = "") -> int:
        """Return which of the test clips to draw: the second that has a box in every frame."""
        boxes = self.batch(dataset).boxes
        boxed = [i for i, frames in enumerate(boxes) if frames and all(map(len, frames))]
        return boxed[1] if len(boxed) > 1 else 0

    def mean_colour(self, dataset: str = "") -> removal.Removal:
        """Return the removal that paints with the mean colour of the training clips (§V-C).

        Of a dataset that is given as it is, and has no training part, of the test clips.
        """
        name = dataset or self.first("datasets")

        def colour():
            if _is_ready(self.datasets.get(name, [name])[0]):
                return removal.mean(self.batch(name).clips)
            return removal.mean(batch(Drawn(self.dataset(name, "train"), 64, self.seed)).clips)

        return self._once("colour", name, make=colour)

    def network(self, model: str = "", dataset: str = "") -> nn.Module:
        """Return a network, trained if it is a named one, and prepared."""
        return self.fit(model or self.first("models"), dataset or self.first("datasets"))[0]

    def fit(self, model: str, dataset: str) -> tuple[nn.Module, pd.DataFrame | None, str]:
        """Return a trained and prepared model, its history and origin; see `stepkit.training.fit`.

        ``model`` may end in "_unperturbed": trained without removal as augmentation. By the paper's
        recipe all models are. A network of one's own is returned as it is.
        """
        given, own = self.models.get(model, (model, {}))
        if isinstance(given, nn.Module):
            return given, None, "given"
        own = self.recipe | own
        if own.get("like") == "paper":
            given = given.removesuffix(UNPERTURBED)
        make = functools.partial(self._fit, given, dataset, own)
        return self._once("fit", given, dataset, repr(own), make=make)

    def _fit(self, model: str, dataset: str, own: dict) -> tuple:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        # a GPU trains faster than one process draws clips; on a CPU the two would compete
        workers = max(1, (os.cpu_count() or 2) - 1) if device != "cpu" else 0
        how = {"shipped": not self.retrain, "progress": self.progress, "seed": self.seed}
        parts = [self.dataset(dataset, split) for split in ("train", "val")]
        place = self.folder / "models" / file_name(f"{model}_{dataset}")
        name, recipe = model.removesuffix(UNPERTURBED), _recipe(model, dataset, **own)
        network, *known = fit(name, *parts, place, recipe, device=device, workers=workers, **how)
        return prepare(network), *known

    # --------------------------------------------------------------------------------- its folder

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out) if self.out else ROOT / "runs" / "quick"

    @property
    def key(self) -> str:
        """Eight digits that stand for the settings: for all fields that results depend on."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NO_SETTINGS}
        return self._once("key", make=lambda: _keys.key(**own)[:8])

    def _place(self, kind: str) -> Path:
        """Return the folder of these settings; ``settings.json`` in it says what they are."""
        path = self.folder / kind / self.key
        path.mkdir(parents=True, exist_ok=True)
        made = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NO_SETTINGS}
        made |= {"models": [*self.models], "datasets": [*self.datasets], "data": bool(self.data)}
        made |= {name: version(name) for name in ("torch", "matplotlib")}
        made["stepkit"] = __version__
        text = json.dumps(made, indent=1, ensure_ascii=False, default=_word) + "\n"
        write_whole(path / "settings.json", lambda partial: partial.write_text(text, "utf-8"))
        return path

    def picture(self, name: str) -> Path:
        """Return where a picture or a video of the run goes."""
        return self._place("pictures") / name

    def figure(self, name: str, picture: Figure) -> Figure:
        """Write a picture to ``figures/<settings>/<name>.png`` and ``.svg``, and return it."""
        place = self._place("figures")
        with matplotlib.rc_context({"svg.hashsalt": "stepkit"}):  # the same picture, the same bytes
            for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None})):
                save = functools.partial(picture.savefig, format=kind, metadata=facts)
                write_whole(place / f"{name}.{kind}", save)
        return picture

    def keep(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write a table to ``scores/<settings>/<name>.csv`` of the run, and return it."""
        write_table(self._place("scores") / f"{name}.csv", table)
        return table

    def kept(self, name: str, any_settings: bool = False) -> pd.DataFrame:
        """Read a table that these settings made; or, if asked, else the newest of any settings."""
        path = self.folder / "scores" / self.key / f"{name}.csv"
        path = self._newest(name).get(name, path) if any_settings else path
        table = read_table(path)
        given = f"{'a damaged' if path.is_file() else 'no'} {path}"
        require(table is not None, "kept", given, "the notebook that makes it to have run")
        return table

    def _newest(self, pattern: str) -> dict[str, Path]:
        """Return tables by name, of each that of these settings, or else the newest."""
        found = self.folder.glob(f"scores/*/{pattern}.csv")
        ordered = sorted(found, key=lambda p: (p.parent.name == self.key, p.stat().st_mtime_ns))
        return {path.stem: path for path in ordered}

    def claims(self) -> pd.DataFrame:
        """Gather the notebooks' tables ``claims_*`` into one, ``claims``."""
        tables = {n.split("_")[1]: read_table(p) for n, p in self._newest("claims_*").items()}
        tables = [t.assign(notebook=n) for n, t in sorted(tables.items()) if t is not None]
        told = f"none in {self.folder}"
        require(len(tables) > 0, "claims", told, "notebooks 03 to 06 to have run")
        names = ["notebook", "claim", "dataset", "model", "unit", "ratio", "against"]
        names += ["mean", "low", "high", "verdict"]
        return self.keep(pd.concat(tables, ignore_index=True).reindex(columns=names), "claims")


class Drawn:
    """``n`` clips of a dataset, of all classes in turn, and kept: every method asks for them."""

    def __init__(self, dataset, n: int, seed: int, name: str = ""):
        self.indices = balanced(dataset, n, seed)
        self.name, self.ids = name or dataset.name, [dataset.ids[i] for i in self.indices]
        self.classes = dataset.classes
        self.get = functools.cache(dataset.__getitem__)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i: int):
        return self.get(self.indices[i])


def by_name(given) -> dict[str, tuple[Any, dict]]:
    """Return what is given under names, each with its options.

    A name's name is its own, an object's the one that it has, and a dict tells it.
    """
    given = [given] if isinstance(given, (str, nn.Module)) or callable(given) else given
    told, found = isinstance(given, Mapping), {}
    for each in given:
        name, value = each if isinstance(each, str) else _word(each), given[each] if told else each
        require(name not in found, "names", f"{name!r} twice", "a dict that tells them apart")
        value = (name, dict(value)) if isinstance(value, Mapping) else value
        found[name] = value if isinstance(value, tuple) else (value, {})
    return found


def _recipe(model: str, dataset: str, like="quick", weights=None, **own) -> Recipe:
    """Return how to train a model: as ``like`` does, but for its ``own`` fields."""
    one_of("like", like, ("quick", "paper"))
    for each in own:
        one_of("recipe", each, [f.name for f in fields(Recipe)])
    name = model.removesuffix(UNPERTURBED)
    own |= {"start": weights[name]} if name in (weights or {}) else {}
    own |= {"removal_share": 0.0} if name != model else {}
    return replace(quick(name, dataset) if like == "quick" else PAPER, **own)


def _is_ready(dataset) -> bool:
    """Tell whether a dataset is one: no name of one, nor a function that makes its parts."""
    return not (isinstance(dataset, str) or callable(dataset))


def _word(setting) -> str:
    """Return what an object is called, the same in every run."""
    return getattr(setting, "name", getattr(setting, "__name__", type(setting).__name__))
