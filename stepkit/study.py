"""A comparison: methods on models on datasets, scored by metrics, made once and found again.

`Study` takes all four by name or as objects. Maps, trainings and scores are kept whole, under a key
of all that made them; tables and figures in a folder per settings, so that no run reads or
overwrites what one with other settings wrote.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pandas as pd
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import _keys, metrics, removal, stats, store
from stepkit._checks import one_of
from stepkit._files import read_tensors, write_tensors
from stepkit._run import UNPERTURBED, Drawn, Run, by_name
from stepkit._workers import executor as opened
from stepkit.attribution import METHODS
from stepkit.data import Batch, batch
from stepkit.data.sample import file_name
from stepkit.metrics import METRICS
from stepkit.models import device_of
from stepkit.networks import load_model
from stepkit.published import PRINTED
from stepkit.sweep import sweep
from stepkit.training import Recipe, evaluate

__all__ = ["PAPER_METHODS", "UNPERTURBED", "Study", "evidence_map", "options"]

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


def evidence_map(clips: Batch) -> Tensor:
    """Return a map of the known evidence, (N, T, H, W): its pixels all alike, then what is near."""
    evidence = clips.evidence.float()
    near = removal.gaussian_blur(evidence, min(evidence.shape[-2:]) / 16)
    return near.where(evidence == 0, 1.0)


class Study(Run):
    """Methods on models on datasets, by metrics.

    Attributes
    ----------
    models, datasets, methods, metrics : list, or dict by name
        Of each any number: a name that the library knows (`stepkit.load_model`,
        `stepkit.load_dataset`, `stepkit.methods`, `stepkit.metrics.METRICS`), or an object of one's
        own: a network (nn.Module), a dataset or a list of samples, a function. A dict gives them
        names, and options: ``{"auc": {"steps": 16}}``; those of a model are its ``recipe``. What
        has several sets of options has several names, as in
        ``{"one frame": ("step", {"kernel_length": 1})}``. A network that is named is trained on the
        dataset, which then is named as well.
    out : str
        The run's folder; empty: ``runs/quick``.
    frames, size : int
        T, and H = W, of every clip.
    clips : int
        Test clips to explain and score, per dataset.
    data : str
        Folder of real data.
    parts : bool
        Split videos in time, see `stepkit.load_dataset`.
    recipe : dict
        How to train, where it differs. ``like``: ``"quick"`` (`stepkit.training.quick`) or
        ``"paper"``; ``weights``: where a model starts, by model, as for `stepkit.load_model`:
        ``{"r2plus1d_18": "KINETICS400_V1"}``; the rest are fields of `stepkit.training.Recipe`.
    retrain : bool
        Train here, also where a checkpoint travels with stepkit.
    seed : int
        Of data, training and attribution.
    device : str
        Where named models run; empty: on a CUDA GPU where there is one, else on the CPU.
    extra : str
        A module of one's own, by its dotted name: what its ``@sk.method``, ``@sk.metric`` and
        ``@sk.dataset`` register is known by name.
    progress : bool
        Show bars.

    Examples
    --------
    >>> study = Study(["r2plus1d_narrow"], ["motion"], ["grad_cam", "random"], out="runs/mine")
    >>> study.score("auc", steps=16)  # doctest: +SKIP
    """

    def maps(self, method, model: str = "", dataset: str = "", **options) -> dict[str, Tensor]:
        """Return what a method finds of the test clips; see `stepkit.store.maps`.

        ``maps`` (N, T, H, W), of STEP also its ``masks`` and their ``probabilities``. ``method`` is
        one of the study's, with its options, or any other name or function; model and dataset are
        by default the study's first.
        """
        name, run, own = self._one("methods", method)
        model, dataset = model or self.first("models"), dataset or self.first("datasets")
        where = name, run, model, self.network(model, dataset), self.drawn(dataset)
        return self._explain(*where, **own | options)

    def _explain(self, name: str, run, model: str, network, clips, **options) -> dict[str, Tensor]:
        given = {"model_name": file_name(model), "folder": _folder(name, run)} | options
        given |= {"seed": self.seed, "progress": self.progress}
        return store.maps(run, network, clips, self.folder / "maps", **given)

    def measure(self, metric, method, model: str = "", dataset: str = "", **options) -> dict:
        """Return all that a metric says of a method: columns (N,), and curves, if it has any.

        Found again, or made. Arguments as for `maps`; ``options`` are the metric's.
        """
        named, run, own = self._one("metrics", metric)
        name, how, given = self._one("methods", method)
        model, dataset = model or self.first("models"), dataset or self.first("datasets")
        row, found, options = METRICS.find(run), self.maps(method, model, dataset), own | options
        one_of(f"{row.name}: what {name} finds", row.reads, found)
        if row.baseline and "baseline" not in options:
            options["baseline"] = self.mean_colour(dataset)
        network, shown = self.network(model, dataset), self.batch(dataset)
        made_of = {"model": store.model_key(network, given.get("tag", ""))}
        made_of |= {"library": _keys.library("metrics/")}
        made_of |= {"metric": row.run, "options": options, "clips": shown}
        key = _keys.key(maps=found[row.reads], **made_of)
        place = self.folder.joinpath("measured", *map(file_name, (dataset, model, named)))
        path = place / f"{_folder(name, how)}.{key[:8]}.safetensors"
        scores = read_tensors(path, key)
        if scores is None:
            scores = row.run(network, shown, found[row.reads], **options)
            write_tensors(path, key, scores)
        return scores

    def score(
        self, metric=None, *, models=(), datasets=(), methods=None, over=None, name="", **options
    ) -> pd.DataFrame:
        """Score methods by a metric (Tables V and VI); kept as ``scores/<settings>/<name>.csv``.

        Parameters
        ----------
        metric : str or callable
            By default the study's first.
        models, datasets : list of str
            Some of the study's, or other names; by default all of the study's.
        methods : list or dict
            As for `Study`; what a list names is the study's, with its options.
        over : dict of str to list
            Options of the metric that are varied, ``{"unit": ["patch", "superpixel"]}``: each is a
            column.
        name : str
            Of the table; by default the metric's.
        **options
            The metric's.

        Returns
        -------
        DataFrame
            A row per dataset, model, choice ``over`` options, method and clip, with the columns
            that the metric has.
        """
        metric, over, rows = self.first("metrics") if metric is None else metric, over or {}, []
        methods = self.methods if methods is None else self._asked("methods", methods)
        cells = product(datasets or self.datasets, models or self.models, *over.values(), methods)
        for dataset, model, *chosen, method in tqdm([*cells], disable=not self.progress):
            choice = dict(zip(over, chosen, strict=True))
            one = {method: methods[method]}
            found = self.measure(metric, one, model, dataset, **options, **choice)
            columns = {c: values.numpy() for c, values in found.items() if values.ndim == 1}
            where = {"dataset": dataset, "model": model, "method": method} | choice
            rows.append(pd.DataFrame({"clip": self.batch(dataset).ids} | columns).assign(**where))
        table = pd.concat(rows, ignore_index=True)
        return self.keep(table, name or self._one("metrics", metric)[0])

    def table(self, metric=None, column: str = "", **options) -> pd.DataFrame:
        """Return means and intervals of a metric's column, its first: `stepkit.stats.intervals`.

        ``options`` are those of `score`. Indexed by dataset, model, what it is ``over``, method.
        """
        scores = self.score(metric, **options)
        by = ["dataset", "model", *options.get("over", ()), "method"]
        column = column or next(c for c in scores if c not in (*by, "clip"))
        return stats.intervals(scores, column, by)

    def _asked(self, kind: str, given) -> dict[str, tuple]:
        """Return methods or metrics by name, each with its options, which a study may have."""
        asked = by_name(given)
        if not isinstance(given, Mapping):
            asked |= {name: own for name, own in getattr(self, kind).items() if name in asked}
        return asked

    def _one(self, kind: str, given) -> tuple:
        ((name, (run, own)),) = self._asked(kind, given).items()
        return name, run, own

    def sweep(self, executor: str, methods=None) -> pd.DataFrame:
        """Make what `maps` then finds, clip by clip on many workers; see `stepkit.sweep`.

        ``executor`` is one of its names. Returns a row per clip and method, with what became of it.
        """
        alone = replace(self, out=str(self.folder.resolve()), progress=False)
        methods = self.methods if methods is None else self._asked("methods", methods)
        jobs = {_folder(name, run): (run, own) for name, (run, own) in methods.items()}
        how = {"batch_size": store.TOGETHER, "seed": self.seed, "progress": self.progress}
        tables = []
        with opened(executor) as pool:
            for dataset, model in product(self.datasets, self.models):
                self.network(model, dataset)  # once, here: the workers find its weights
                source = functools.partial(alone.drawn, dataset)
                network = functools.partial(alone.network, model, dataset)
                where = {"model_name": file_name(model), "executor": pool}
                table = sweep(source, network, jobs, self.folder / "maps", **where, **how)
                tables.append(table.assign(dataset=dataset, model=model))
        return pd.concat(tables, ignore_index=True)

    def gallery(self, model: str, dataset: str, i: int) -> tuple[dict, pd.DataFrame]:
        """Explain one test clip by every method of the study, each by itself.

        Returns maps by label, and a table with a row per method: its cost
        (`stepkit.store.measure`), or why it ``refused`` this model.
        """
        maps, rows = {}, {}
        where = self.network(model, dataset), self.drawn(dataset), self.folder / "maps"
        known = {"model_name": file_name(model), "i": i, "seed": self.seed}
        for name, (run, own) in tqdm(self.methods.items(), model, disable=not self.progress):
            try:
                found, cost = store.measure(run, *where, **known, **own)
            except ValueError as error:
                rows[name] = {"refused": str(error)}
                continue
            passes, rows[name] = cost["forward"] + cost["backward"], cost | {"refused": ""}
            label = METHODS.find(run).label or name
            maps[f"{label}\n{passes:.0f} passes\n{cost['seconds']:.2g} s"] = found
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
        table = table.reindex(columns=["forward", "backward", "seconds", "refused"])
        self.keep(table.reset_index(), f"cost_{model}_{dataset}")
        return maps, table

    def accuracy(self, n: int) -> pd.DataFrame:
        """Return one row per dataset, model and test clip: ``correct``, ``probability``."""
        rows = []
        for dataset, model in product(self.datasets, self.models):
            test = self.dataset(dataset, n=n)
            found = evaluate(self.network(model, dataset), test, progress=self.progress)
            columns = {"clip": found["ids"], "correct": found["correct"].float()}
            columns["probability"] = found["probability"]
            rows.append(pd.DataFrame(columns).assign(dataset=dataset, model=model))
        return self.keep(pd.concat(rows, ignore_index=True), "accuracy")

    def retrained(self, counts: dict[str, int], recipe: Recipe, **options) -> pd.DataFrame:
        """Retrain on what each method keeps or removes (Fig. 8); kept as ``retrained.csv``.

        ``counts`` says how many clips of ``"train"``, ``"val"`` and ``"test"`` are explained and
        used, of all classes in turn, fewer where a part is smaller. Beside the methods stands
        ``"evidence"``, the known pixels (or boxes) themselves, see `evidence_map`, where any are
        known. ``options`` and the rows are those of `stepkit.metrics.retrain`, with ``dataset`` and
        ``model``.
        """
        tables, options = [], {"progress": self.progress} | options
        for dataset, model in product(self.datasets, self.models):
            network, drawn, maps = self.network(model, dataset), {}, {}
            for split, n in counts.items():
                drawn[split] = Drawn(self.dataset(dataset, split, n), n, self.seed, dataset)
            parts = {split: batch(clips) for split, clips in drawn.items()}
            if any(part.evidence.any() for part in parts.values()):
                maps["evidence"] = {split: evidence_map(part) for split, part in parts.items()}
            for name, (run, own) in self.methods.items():
                where, own = (name, run, model, network), {"batch_size": 48} | own
                found = {split: self._explain(*where, drawn[split], **own) for split in drawn}
                maps[name] = {split: of_part["maps"] for split, of_part in found.items()}
            device, classes = device_of(network, "cpu"), len(drawn["train"].classes)
            fresh = functools.partial(_fresh, model, classes, device)
            place = self.folder / "retrained" / dataset / model
            table = metrics.retrain(fresh, parts, maps, place, recipe, **options)
            tables.append(table.assign(dataset=dataset, model=model))
        return self.keep(pd.concat(tables, ignore_index=True), "retrained")


def _fresh(model: str, classes: int, device, seed: int) -> nn.Module:
    return load_model(model, classes, seed=seed).to(device)


def _folder(name: str, run) -> str:
    """Return the folder of a method's maps; ``"step@one frame"`` for options with a name."""
    return file_name(f"{run}@{name}" if isinstance(run, str) and name != run else name)
