"""What the notebooks share: data, models, maps and scores of one run, made once, found again."""

import functools
import itertools
import json
import os
import warnings
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import __version__, _keys, metrics, removal, sweep
from stepkit._checks import one_of, require
from stepkit._files import read_table, read_tensors, write_table, write_tensors, write_whole
from stepkit.attribution import methods as methods_table
from stepkit.data import Batch, batch, load_dataset
from stepkit.data.sample import balanced
from stepkit.metrics.curves import filled
from stepkit.models import device_of, frozen, precision_of
from stepkit.models.scores import probability
from stepkit.networks import load_model
from stepkit.prepare import prepare
from stepkit.published.scores import PRINTED
from stepkit.training import PAPER, Recipe, evaluate, fit, quick

ROOT = Path(__file__).parents[1]
UNPERTURBED = "_unperturbed"
PAPER_METHODS = ["random", *PRINTED, "step"]  # in the order of Table V
_POINTS = {"integrated_gradients": "steps", "blur_ig": "steps", "xrai": "steps"}
_POINTS |= {"smoothgrad": "samples", "smoothgrad_squared": "samples"}


def options(methods: list[str], preset: str, points: int, removal="blur") -> dict[str, dict]:
    """Return each method's options: STEP's preset, and at how many points gradients are averaged.

    ``methods`` may be empty: the paper's eleven. ``removal`` is STEP's.
    """
    masks = {"preset": preset, "removal": removal}
    chosen = {method: {} for method in methods or PAPER_METHODS}
    chosen |= {m: masks for m in ("step", "extremal_perturbation") if m in chosen}
    return chosen | {m: {name: points} for m, name in _POINTS.items() if m in chosen}


def _fresh(model: str, classes: int, device, seed: int) -> nn.Module:
    return load_model(model, classes, seed=seed).to(device)


class _Drawn:
    """``n`` clips of a dataset, of all classes in turn, and kept: every method asks for them."""

    def __init__(self, dataset, n: int, seed: int):
        self.indices = balanced(dataset, n, seed)
        self.name, self.ids = dataset.name, [dataset.ids[i] for i in self.indices]
        self.get = functools.cache(dataset.__getitem__)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i: int):
        return self.get(self.indices[i])


def _drawn(run: "Experiment", dataset: str) -> _Drawn:
    return _Drawn(run.dataset(dataset), run.clips, run.seed)


def _trained(run: "Experiment", model: str, dataset: str) -> nn.Module:
    return run.fit(model, dataset)[0]


def evidence_map(clips: Batch) -> Tensor:
    """Return a map of the known evidence, (N, T, H, W): its pixels all alike, then what is near."""
    evidence = clips.evidence.float()
    near = removal.gaussian_blur(evidence, min(evidence.shape[-2:]) / 16)
    return near.where(evidence == 0, 1.0)


@dataclass
class Experiment:
    """One run and its folder.

    Attributes
    ----------
    out : str
        The run's folder, with ``models/``, ``maps/`` and ``scores/``; empty: ``runs/quick``.
    frames, size : int
        T, and H = W, of every clip.
    clips : int
        Test clips to explain and score, per dataset.
    train_clips : int
        Generated training clips per epoch.
    data : str
        Folder of real data.
    parts : bool
        Split videos in time, see `stepkit.load_dataset`.
    like : str
        Whose recipe to train by: ``"quick"`` (`stepkit.training.quick`) or ``"paper"``.
    epochs, batch_size : int
        Of training, where they differ from the recipe's; 0: they do not.
    weights : dict of str to str
        Where the training of a model starts, by model, as for `stepkit.load_model`:
        ``{"r2plus1d_18": "KINETICS400_V1"}``. The others start as their recipe says.
    retrain : bool
        Train here, also where a checkpoint travels with stepkit.
    seed : int
        Of data, training and attribution.
    device : str
        Where the models run; empty: on a CUDA GPU where there is one, else on the CPU.
    """

    out: str = ""
    frames: int = 8
    size: int = 48
    clips: int = 6
    train_clips: int = 1200
    data: str = ""
    parts: bool = False
    like: str = "quick"
    epochs: int = 0
    batch_size: int = 0
    weights: dict = field(default_factory=dict)
    retrain: bool = False
    seed: int = 0
    device: str = ""
    progress: bool = False
    _models: dict = field(default_factory=dict, repr=False)
    _tests: dict = field(default_factory=dict, repr=False)
    _batches: dict = field(default_factory=dict, repr=False)
    _colours: dict = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out) if self.out else ROOT / "runs" / "quick"

    def picture(self, name: str) -> Path:
        """Return where a picture or a video of the run goes."""
        path = self.folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def dataset(self, name: str, split: str = "test", n: int | None = None):
        """Return one split of a dataset; ``n`` counts generated clips."""
        sizes = {"train": self.train_clips, "val": 120, "test": self.clips}
        return load_dataset(
            name,
            split,
            frames=self.frames,
            size=self.size,
            n=n or sizes[split],
            data=self.data,
            parts=self.parts,
            seed=self.seed,
        )

    def batch(self, dataset: str) -> Batch:
        """Return the test clips that are explained, of all classes in turn."""
        if dataset not in self._batches:
            self._batches[dataset] = batch(self._test(dataset))
        return self._batches[dataset]

    def _test(self, dataset: str) -> _Drawn:
        if dataset not in self._tests:
            self._tests[dataset] = _drawn(self, dataset)
        return self._tests[dataset]

    def example(self, dataset: str) -> int:
        """Return which of the test clips to draw: the second that has a box in every frame."""
        boxes = self.batch(dataset).boxes
        boxed = [i for i, frames in enumerate(boxes) if frames and all(map(len, frames))]
        return boxed[1] if len(boxed) > 1 else 0

    def fit(self, model: str, dataset: str) -> tuple[nn.Module, pd.DataFrame, str]:
        """Return a trained and prepared model, its history and origin; see `stepkit.training.fit`.

        ``model`` may end in "_unperturbed": trained without removal as augmentation. By the paper's
        recipe all models are.
        """
        one_of("like", self.like, ("quick", "paper"))
        name = model.removesuffix(UNPERTURBED)
        model = model if self.like == "quick" else name
        key = model, dataset
        if key not in self._models:
            recipe = quick(name, dataset) if self.like == "quick" else PAPER
            share = recipe.removal_share if name == model else 0.0
            given = {"epochs": self.epochs, "batch_size": self.batch_size}
            given["start"] = self.weights.get(name)
            given = {k: v for k, v in given.items() if v}
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            # a GPU trains faster than one process draws clips; on a CPU the two would compete
            workers = max(1, (os.cpu_count() or 2) - 1) if device != "cpu" else 0
            network, *known = fit(
                name,
                self.dataset(dataset, "train"),
                self.dataset(dataset, "val"),
                self.folder / "models" / f"{model}_{dataset}",
                replace(recipe, removal_share=share, **given),
                seed=self.seed,
                shipped=not self.retrain,
                device=device,
                workers=workers,
                progress=self.progress,
            )
            self._models[key] = prepare(network), *known
        return self._models[key]

    def accuracy(self, models: list[str], datasets: list[str], n: int) -> pd.DataFrame:
        """Return one row per model, dataset and test clip: ``correct``, ``probability``."""
        rows = []
        for dataset in datasets:
            test = self.dataset(dataset, n=n)
            for model in models:
                found = evaluate(self.fit(model, dataset)[0], test, progress=self.progress)
                columns = {"clip": found["ids"], "correct": found["correct"].float()}
                columns["probability"] = found["probability"]
                rows.append(pd.DataFrame(columns).assign(dataset=dataset, model=model))
        return self.keep(pd.concat(rows, ignore_index=True), "accuracy")

    def explain(self, method: str, model: str, dataset: str, **options) -> dict:
        """Return the maps of the test clips (and STEP's masks); see `stepkit.sweep.explain`.

        ``"step@cylinder"`` is method ``"step"`` with ``options`` that deserve a name and a folder.
        """
        return sweep.explain(
            method.partition("@")[0],
            self.fit(model, dataset)[0],
            self._test(dataset),
            self.folder / "maps",
            model_name=model,
            folder=method,
            seed=self.seed,
            progress=self.progress,
            **options,
        )

    def sweep(
        self, methods: dict[str, dict], models: list[str], datasets: list[str], executor: str
    ) -> pd.DataFrame:
        """Make what `explain` then finds, clip by clip on many workers; see `stepkit.sweep.run`.

        ``executor`` is a name that `stepkit.sweep.executor` knows. Returns a row per clip and
        method, with what became of it.
        """
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        alone = Experiment(**settings | {"out": str(self.folder.resolve()), "progress": False})
        tables = []
        with sweep.executor(executor) as pool:
            for dataset, model in itertools.product(datasets, models):
                self.fit(model, dataset)  # once, here: the workers find its weights
                table = sweep.run(
                    functools.partial(_drawn, alone, dataset),
                    functools.partial(_trained, alone, model, dataset),
                    methods,
                    self.folder / "maps",
                    model_name=model,
                    batch_size=sweep.TOGETHER,
                    executor=pool,
                    seed=self.seed,
                    progress=self.progress,
                )
                tables.append(table.assign(dataset=dataset, model=model))
        return pd.concat(tables, ignore_index=True)

    def gallery(
        self, methods: dict[str, dict], model: str, dataset: str, i: int
    ) -> tuple[dict, pd.DataFrame]:
        """Explain one test clip by many methods, each by itself.

        ``methods`` gives each method's options. Returns maps by label, and a table with a row per
        method: its cost (`stepkit.sweep.measure`), or why it refused this model.
        """
        maps, rows = {}, {}
        labels = methods_table()["label"]
        where = self.fit(model, dataset)[0], self._test(dataset), self.folder / "maps"
        for method in tqdm(methods, desc=model, disable=not self.progress, leave=False):
            try:
                found, rows[method] = sweep.measure(
                    method, *where, model_name=model, i=i, seed=self.seed, **methods[method]
                )
            except ValueError as error:
                rows[method] = {"refused": str(error)}
                continue
            passes = rows[method]["forward"] + rows[method]["backward"]
            label = f"{labels[method]}\n{passes:.0f} passes\n{rows[method]['seconds']:.2g} s"
            maps[label] = found
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
        table = table.reindex(columns=["forward", "backward", "seconds", "refused"]).reset_index()
        self.keep(table, f"cost_{model}_{dataset}")
        refused = table["refused"].astype(object).fillna("")
        return maps, table.assign(refused=refused).set_index("method")

    def curves(
        self, methods: dict[str, dict], model: str, dataset: str, **options
    ) -> dict[str, dict[str, Tensor]]:
        """Return the insertion and deletion curves (N, L+1) of each method, found again or made.

        ``methods`` gives each method's options; ``options`` are those of
        `stepkit.metrics.auc_metrics`. The baseline is the mean colour of the dataset's training
        clips, as in the paper, unless one is given.
        """
        maps = {m: self.explain(m, model, dataset, **kw)["maps"] for m, kw in methods.items()}
        shown, network = self.batch(dataset), self.fit(model, dataset)[0]
        options |= {"baseline": options.get("baseline") or self.mean_colour(dataset)}
        made_of = {"clips": shown.clips, "targets": shown.targets, "options": filled(options)}
        made_of |= {"model": _keys.model(network), "precision": precision_of(network)}
        made_of = _keys.key(**made_of, library=_keys.library(*_keys.CURVES))
        place = self.folder / "curves" / dataset / model / filled(options)["unit"]
        found, places, todo = {}, {}, {}
        for method, of_method in maps.items():
            key = _keys.key(maps=of_method, made_of=made_of)
            places[method] = place / f"{method}.{key[:8]}.safetensors", key
            found[method] = read_tensors(*places[method])
            if found[method] is None:
                todo[method] = of_method
        if todo:
            where = network, shown.clips, todo, shown.targets
            options |= {"progress": self.progress}
            curves = metrics.auc_metrics(*where, ("cm_insertion", "cm_deletion"), **options)
            for method in todo:
                kinds = {"insertion": "cm_insertion", "deletion": "cm_deletion"}
                found[method] = {kind: curves[name][method].curve for kind, name in kinds.items()}
                write_tensors(*places[method], found[method])
        return found

    def mean_colour(self, dataset: str) -> removal.Removal:
        """Return the removal that paints with the mean colour of the training clips (§V-C)."""
        if dataset not in self._colours:
            train = self.dataset(dataset, "train")
            some = batch(train, balanced(train, 64, self.seed))
            self._colours[dataset] = removal.mean(some.clips)
        return self._colours[dataset]

    def auc(
        self,
        methods: dict[str, dict],
        models: list[str],
        datasets: list[str],
        units: tuple[str, ...] = ("patch",),
        name: str = "auc",
        **options,
    ) -> pd.DataFrame:
        """Score methods by insertion and deletion AUC (Table V); kept as ``scores/<name>.csv``.

        One row per dataset, model, unit, method and clip: ``insertion``, ``deletion``. Arguments
        as for `curves`.
        """
        rows = []
        for dataset, model, unit in itertools.product(datasets, models, units):
            names = {"dataset": dataset, "model": model, "unit": unit}
            curves = self.curves(methods, model, dataset, unit=unit, **options)
            for method, found in curves.items():
                scores = {kind: metrics.auc(curve) for kind, curve in found.items()}
                scores = {"method": method, "clip": self.batch(dataset).ids, **scores}
                rows.append(pd.DataFrame(scores).assign(**names))
        return self.keep(pd.concat(rows, ignore_index=True), name)

    def located(
        self,
        methods: dict[str, dict],
        models: list[str],
        datasets: list[str],
        name: str = "located",
    ) -> pd.DataFrame:
        """Score methods by the pointing game (Table VI) and by the pixels of the evidence.

        One row per dataset, model, method and clip: ``hit`` (share of the frames that count),
        ``mass``, ``iou`` (NaN for a clip without box); ``boxed`` and ``flat``, the shares of the
        clip's frames that have a box, and where the map points nowhere. Where only boxes are known,
        all their pixels are evidence.
        """
        rows = []
        for dataset, model, method in itertools.product(datasets, models, methods):
            shown = self.batch(dataset)
            maps = self.explain(method, model, dataset, **methods[method])["maps"]
            with warnings.catch_warnings():  # the tables say of themselves where nothing is known
                warnings.filterwarnings("ignore", "pointing_game")
                pointing = metrics.pointing_game(maps, shown.boxes)
            scores = {"clip": shown.ids, "hit": pointing.by_clip}
            scores |= {name: getattr(pointing, name).float().mean(1) for name in ("boxed", "flat")}
            scores["mass"] = metrics.relevance_mass(maps, shown.evidence)
            scores["iou"] = metrics.iou(maps, shown.evidence)
            names = {"dataset": dataset, "model": model, "method": method}
            rows.append(pd.DataFrame(scores).assign(**names))
        return self.keep(pd.concat(rows, ignore_index=True), name)

    def smallest_masks(
        self, models: list[str], datasets: list[str], settings: dict
    ) -> pd.DataFrame:
        """Compare what STEP's smallest mask keeps with the whole clip.

        One row per dataset, model and clip: Φ of the clip, Φ of what the smallest area keeps,
        whether that is ``higher``, the share of the mask ``on evidence``, and ``chance``.
        """
        rows = []
        for dataset, model in itertools.product(datasets, models):
            shown = self.batch(dataset)
            found = self.explain("step", model, dataset, **settings)
            phi = self.watch(model, dataset, shown.clips)
            kept = found["probabilities"][:, 0]
            mass = metrics.relevance_mass(found["masks"][:, 0], shown.evidence)
            chance = shown.evidence.float().mean((1, 2, 3))
            names = {"dataset": dataset, "model": model}
            columns = {"clip": shown.ids, "Φ clip": phi, "Φ smallest mask": kept}
            columns |= {"higher": (kept > phi).float(), "on evidence": mass, "chance": chance}
            rows.append(pd.DataFrame(columns).assign(**names))
        return pd.concat(rows, ignore_index=True)

    def watch(self, model: str, dataset: str, clips: Tensor) -> Tensor:
        """Return Φ_c (N,) of the test clips' classes when the model sees ``clips`` instead."""
        network = self.fit(model, dataset)[0]
        with frozen(network), torch.no_grad():
            logits = network(clips.to(device_of(network, "cpu"), copy=True)).cpu()
        return probability(logits, self.batch(dataset).targets)

    def table(self, name: str) -> pd.DataFrame:
        """Read ``scores/<name>.csv``, which an earlier notebook of the run wrote."""
        path = self.folder / "scores" / f"{name}.csv"
        table = read_table(path)
        given = f"{'a damaged' if path.is_file() else 'no'} {path}"
        require(table is not None, "table", given, "the notebook that makes it to have run")
        return table

    def claims(self) -> pd.DataFrame:
        """Gather the notebooks' ``scores/claims_*.csv`` into ``scores/claims.csv``."""
        paths = sorted(self.folder.glob("scores/claims_*.csv"))
        parts = {path.stem[7:]: read_table(path) for path in paths}
        parts = {number: table for number, table in parts.items() if table is not None}
        require(
            len(parts) > 0, "claims", f"none in {self.folder}", "notebooks 03 to 06 to have run"
        )
        table = pd.concat(parts)
        first = ["notebook", "claim", "dataset", "model", "unit", "ratio", "against"]
        last = ["mean", "low", "high", "verdict"]
        table = table.rename_axis(["notebook", None]).reset_index("notebook")
        return self.keep(table.reindex(columns=first + last).reset_index(drop=True), "claims")

    def figure(self, name: str, picture: Figure, about: str, **settings) -> Figure:
        """Write a picture to ``figures/<name>.png`` and ``.svg`` of the run, and return it.

        ``<name>.json`` says which run made it: the experiment's settings, others, and versions.
        """
        place = self.folder / "figures"
        place.mkdir(parents=True, exist_ok=True)
        settings |= {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        settings |= {"out": self.folder.name, "data": bool(self.data)}  # no paths of this machine
        made = {"figure": name, "about": about, "run": settings}
        versions = {name: version(name) for name in ("torch", "matplotlib")}
        made["versions"] = {"stepkit": __version__} | versions
        text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
        with matplotlib.rc_context({"svg.hashsalt": "stepkit"}):  # the same picture, the same bytes
            for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None})):
                save = functools.partial(picture.savefig, format=kind, metadata=facts)
                write_whole(place / f"{name}.{kind}", save)
        write_whole(place / f"{name}.json", lambda path: Path(path).write_text(text, "utf-8"))
        return picture

    def retrained(
        self,
        methods: dict[str, dict],
        models: list[str],
        datasets: list[str],
        counts: dict[str, int],
        recipe: Recipe,
        **options,
    ) -> pd.DataFrame:
        """Retrain on what each method keeps or removes (Fig. 8); kept as ``scores/retrained.csv``.

        ``counts`` says how many clips of ``"train"``, ``"val"`` and ``"test"`` are explained and
        used, of all classes in turn, fewer where a part is smaller. Beside the methods stands
        ``"evidence"``, the known pixels (or boxes) themselves, see `evidence_map`, where any are
        known. ``options`` and the rows are those of `stepkit.metrics.retrain`, with ``dataset`` and
        ``model``.
        """
        tables = []
        for dataset, model in itertools.product(datasets, models):
            sets = {split: self.dataset(dataset, split, n) for split, n in counts.items()}
            classes = len(sets["train"].classes)
            sets = {split: _Drawn(all_, counts[split], self.seed) for split, all_ in sets.items()}
            parts = {split: batch(clips) for split, clips in sets.items()}
            network = self.fit(model, dataset)[0]
            maps = {"evidence": {split: evidence_map(part) for split, part in parts.items()}}
            if not any(part.evidence.any() for part in parts.values()):
                maps = {}
            where = {"out": self.folder / "maps", "model_name": model, "batch_size": 48}
            where |= {"seed": self.seed, "progress": self.progress}
            for method, own in methods.items():
                maps[method] = {
                    split: sweep.explain(method, network, clips, **where, **own)["maps"]
                    for split, clips in sets.items()
                }
            device = device_of(network, "cpu")
            fresh = functools.partial(_fresh, model, classes, device)
            folder = self.folder / "retrained" / dataset / model
            known = {"progress": self.progress} | options
            table = metrics.retrain(fresh, parts, maps, folder, recipe, **known)
            tables.append(table.assign(dataset=dataset, model=model))
        return self.keep(pd.concat(tables, ignore_index=True), "retrained")

    def keep(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write a table to ``scores/<name>.csv`` of the run, and return it."""
        write_table(self.folder / "scores" / f"{name}.csv", table)
        return table
