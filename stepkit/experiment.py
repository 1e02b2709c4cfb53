"""What the notebooks share: data, models, maps and scores of one run, made once, found again."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from stepkit import metrics, removal, sweep
from stepkit.attribution import methods as methods_table
from stepkit.data import Batch, batch, load_dataset
from stepkit.files import write_whole
from stepkit.training import QUICK, evaluate, fit, quick

ROOT = Path(__file__).parents[1]


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
    epochs, batch_size : int
        Of training; the rest of the recipe, and the epochs if 0, are `stepkit.training.quick`'s.
    retrain : bool
        Train here, also where a checkpoint travels with stepkit.
    seed : int
        Of data, training and attribution.
    """

    out: str = ""
    frames: int = 8
    size: int = 48
    clips: int = 6
    train_clips: int = 1200
    data: str = ""
    parts: bool = False
    epochs: int = 0
    batch_size: int = QUICK.batch_size
    retrain: bool = False
    seed: int = 0
    progress: bool = False
    _models: dict = field(default_factory=dict, repr=False)

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
        test = self.dataset(dataset)
        return batch(test, range(min(self.clips, len(test))))

    def fit(self, model: str, dataset: str) -> tuple[nn.Module, pd.DataFrame, str]:
        """Return a trained model, its history and its origin; see `stepkit.training.fit`."""
        key = model, dataset
        if key not in self._models:
            recipe = quick(model, dataset)
            epochs = self.epochs or recipe.epochs
            self._models[key] = fit(
                model,
                self.dataset(dataset, "train"),
                self.dataset(dataset, "val"),
                self.folder / "models" / f"{model}_{dataset}",
                replace(recipe, epochs=epochs, batch_size=self.batch_size),
                seed=self.seed,
                shipped=not self.retrain,
                progress=self.progress,
            )
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
        """Return the maps of the test clips (and STEP's masks); see `stepkit.sweep.explain`."""
        test = self.dataset(dataset)
        return sweep.explain(
            method,
            self.fit(model, dataset)[0],
            test,
            self.folder / "maps",
            model_name=model,
            n=min(self.clips, len(test)),
            seed=self.seed,
            progress=self.progress,
            **options,
        )

    def gallery(
        self, methods: dict[str, dict], model: str, dataset: str, i: int = 1
    ) -> tuple[dict, pd.DataFrame]:
        """Explain one test clip by many methods, each by itself.

        ``methods`` gives each method's options. Returns maps by label, and a table with a row per
        method: its cost (`stepkit.sweep.measure`), or why it refused this model.
        """
        maps, rows = {}, {}
        labels = methods_table()["label"]
        where = self.fit(model, dataset)[0], self.dataset(dataset), self.folder / "maps"
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
        return maps, table.set_index("method").assign(refused=table["refused"].fillna("").values)

    def insertion(
        self, methods: dict[str, dict], models: list[str], datasets: list[str], **options
    ) -> pd.DataFrame:
        """Score methods by insertion and deletion AUC; one row per clip, method, model, dataset.

        ``methods`` gives each method's options; ``options`` are those of
        `stepkit.metrics.auc_metrics`. The baseline is the mean colour of the dataset's training
        clips, as in the paper.
        """
        rows = []
        for dataset in datasets:
            shown = self.batch(dataset)
            train = self.dataset(dataset, "train")
            seen = batch(train, range(0, len(train), max(1, len(train) // 64)))
            options["baseline"] = removal.mean(seen.clips)
            for model in models:
                maps = {
                    method: self.explain(method, model, dataset, **settings)["maps"]
                    for method, settings in methods.items()
                }
                where = self.fit(model, dataset)[0], shown.clips, maps, shown.targets
                curves = metrics.auc_metrics(*where, **options)
                unit = options.get("unit", "patch")
                for method in methods:
                    scores = {
                        "clip": shown.ids,
                        "insertion": curves["cm_insertion"][method].auc,
                        "deletion": curves["cm_deletion"][method].auc,
                    }
                    names = {"dataset": dataset, "model": model, "method": method}
                    rows.append(pd.DataFrame(scores).assign(**names, unit=unit))
        return self.keep(pd.concat(rows, ignore_index=True), "insertion")

    def keep(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write a table to ``scores/<name>.csv`` of the run, and return it."""
        (self.folder / "scores").mkdir(parents=True, exist_ok=True)
        path = self.folder / "scores" / f"{name}.csv"
        write_whole(path, lambda partial: table.to_csv(partial, index=False))
        return table
