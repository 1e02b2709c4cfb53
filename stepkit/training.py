"""Training: the paper's recipe (§V-A.2) and a quick one, resumable, never looking at the test part.

The checkpoint that is kept is the one with the best accuracy on a *validation* part (the released
code picks it on the test set). Removal can serve as augmentation: a model that has seen what
perturbation methods will show it is not fooled by the edges of a mask.
"""

import io
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from stepkit import _files, _keys
from stepkit._checks import require, warn
from stepkit._workers import end_with_parent
from stepkit.data.sample import collate
from stepkit.models import device_of, frozen
from stepkit.models.scores import probability
from stepkit.networks import load_model, load_weights
from stepkit.removal import blur, remove_at_random

__all__ = [
    "PAPER",
    "QUICK",
    "Recipe",
    "describe",
    "evaluate",
    "fit",
    "quick",
    "save_model",
    "train",
]


@dataclass(frozen=True)
class Recipe:
    """How to train; ``dataclasses.replace(PAPER, epochs=12)`` is another.

    Attributes
    ----------
    epochs, batch_size : int
        Passes over the training part; clips per step.
    clips_per_video : int
        Clips drawn from every training video in an epoch.
    optimiser : ``"sgd"`` (momentum 0.9) or ``"adamw"``
    learning_rate, weight_decay : float
        The largest learning rate; decay of the weights.
    step_epochs : int
        The learning rate falls to a tenth every so many epochs; 0: rises for the first fifth of
        the training, then falls along a cosine ("one cycle").
    removal_share : float
        Share of the training clips from which `stepkit.removal.remove_at_random` takes blobs, by
        `stepkit.removal.blur`; it rises from 0 to this over the first half of the epochs.
    start : str
        Where `fit` starts: ``weights`` of `stepkit.networks.load_model`, or the name of a
        checkpoint that travels with stepkit. Empty: fresh weights.
    """

    epochs: int = 40
    batch_size: int = 48
    clips_per_video: int = 3
    optimiser: str = "sgd"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    step_epochs: int = 20
    removal_share: float = 0.0
    start: str = ""


WEIGHTS = Path(__file__).parent / "weights"  # small checkpoints that travel with the package
MODEL, STATE, HISTORY = "model.safetensors", "state.safetensors", "history.csv"
PAPER = Recipe()
QUICK = Recipe(30, 32, 1, "adamw", 3e-3, 0.02, step_epochs=0, removal_share=0.35)
_SLOW = {("r2plus1d_narrow", "object"), ("r50l_narrow", "object"), ("r50l_narrow", "motion")}


def quick(model: str, dataset: str) -> Recipe:
    """Return the quick recipe of one of the narrow models on one of the generated datasets.

    A recurrent network whose state is detached learns less well through removed blobs, so it sees
    fewer of them. Small objects, and motion without a gradient through time, take more epochs. For
    motion it has to know already what an actor looks like, or it never leaves chance: a step learns
    only what its own frame tells, which is nothing. The paper's starts from ImageNet.
    """
    share = 0.1 if model == "r50l_narrow" else QUICK.removal_share
    epochs = 80 if (model, dataset) in _SLOW else QUICK.epochs
    start = "r50l_narrow_appearance" if (model, dataset) == ("r50l_narrow", "motion") else ""
    return replace(QUICK, epochs=epochs, removal_share=share, start=start)


def train(
    model: nn.Module,
    dataset,
    validation,
    out: str | Path,
    recipe: Recipe = PAPER,
    *,
    seed: int = 0,
    workers: int = 0,
    progress: bool = False,
    tag: str = "",
) -> pd.DataFrame:
    """Train ``model`` in place; it ends with the weights that did best on ``validation``.

    Parameters
    ----------
    model : nn.Module
        Clips (N, 3, T, H, W) to logits (N, K), on the device to train on. Mixed precision
        (bfloat16) is used on CUDA.
    dataset, validation : datasets of stepkit
        ``dataset.epoch`` is counted up, so that every pass sees other clips.
    out : path
        Folder for ``model.safetensors`` (best so far), ``history.csv`` and ``state.safetensors``,
        from which a killed run goes on with the epoch it was in. A finished run is not repeated.
        What is damaged is named in a warning, and made again from the first epoch on.
    recipe : Recipe, default `PAPER`
    seed : int
        Order of the clips and the removed blobs. The weights are initialised by the caller.
    workers : int
        Processes that load clips beside the training.
    tag : str
        For code and attributes of a network that no key can name, see `stepkit._keys`.

    Returns
    -------
    DataFrame
        ``epoch, loss, train_top1, val_top1, val_top5``.

    Raises
    ------
    TypeError, ValueError
        Part of the model cannot be named; training and validation share clip ids; ``out`` holds
        another run (`describe`); logits are no longer finite.
    """
    shared = set(dataset.ids) & set(validation.ids)
    require(not shared, "validation", f"{len(shared)} clips of the training part", "other clips")
    out, run = Path(out), describe(model, dataset, validation, recipe, seed, tag)
    best, table = _files.read_tensors(out / MODEL, run), _files.read_table(out / HISTORY)
    if best and table is not None and len(table) == recipe.epochs:
        model.load_state_dict(best)
        return table
    steps = recipe.clips_per_video * math.ceil(len(dataset) / recipe.batch_size)
    parts = {"model": model, **_optimiser(model, recipe, steps)}
    history = _resume(out, run, parts)
    epochs = range(len(history), recipe.epochs)
    for epoch in tqdm(epochs, desc="training", disable=not progress, leave=False):
        row = _epoch(parts, dataset, recipe, seed, epoch, workers)
        scores = evaluate(model, validation, recipe.batch_size)
        history.append(row | {f"val_{key}": scores[key] for key in ("top1", "top5")})
        if scores["top1"] >= max(past["val_top1"] for past in history):
            save_model(model, out / MODEL, run)
        packed = io.BytesIO()
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"history": history}, packed)
        packed = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)
        _files.write_tensors(out / STATE, run, {"state": packed})
    table = pd.DataFrame(history)
    _files.write_table(out / HISTORY, table)
    load_weights(model, out / MODEL)
    return table


def _epoch(parts: dict, dataset, recipe: Recipe, seed: int, epoch: int, workers: int) -> dict:
    """Train for one epoch; return its row of the history."""
    model, draw = parts["model"].train(), seed * 100_003 + epoch
    device = device_of(model, "cpu")
    # a loader draws more from its generator with workers than without: blobs have their own
    order, blobs = (torch.Generator().manual_seed(draw + salt) for salt in (0, 2**31))
    how = {"num_workers": workers, "worker_init_fn": _begin_loading, "collate_fn": collate}
    loader = DataLoader(dataset, recipe.batch_size, shuffle=True, generator=order, **how)
    share = recipe.removal_share * min(1, 2 * epoch / recipe.epochs)
    on_gpu = device.type == "cuda"
    losses, correct = [], []
    with torch.random.fork_rng([device.index or 0] if on_gpu else []):  # for dropout
        torch.manual_seed(draw)
        for i in range(recipe.clips_per_video):
            dataset.epoch = epoch * recipe.clips_per_video + i
            for batch in loader:
                clips = remove_at_random(batch.clips.to(device), share, blur(), blobs)
                targets = batch.targets.to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                    logits = model(clips).float()
                loss = F.cross_entropy(logits, targets, reduction="none")
                parts["optimiser"].zero_grad()
                loss.mean().backward()
                parts["optimiser"].step()
                parts["schedule"].step()
                losses.append(loss.detach())
                correct.append(_ranks(logits.detach(), targets, batch.ids) == 0)
    means = [torch.cat(each).double().mean().item() for each in (losses, correct)]
    return {"epoch": epoch, "loss": means[0], "train_top1": means[1]}


def evaluate(model: nn.Module, dataset, batch_size: int = 32, progress: bool = False) -> dict:
    """Return the accuracy of ``model`` on a dataset (Table III).

    A dict: ``top1`` and ``top5`` in [0, 1], and per clip, in order: ``ids``, ``correct`` (bool
    (N,)), ``probability`` (N,), Φ of the true class. A class that ties with the true one counts
    against it. ValueError names the clips whose logits are not finite.
    """
    device, parts = device_of(model, "cpu"), []
    own = torch.Generator()  # a loader without one draws from the global state
    loader = DataLoader(dataset, batch_size, collate_fn=collate, generator=own)
    with frozen(model), torch.no_grad():
        for batch in tqdm(loader, desc="evaluating", disable=not progress, leave=False):
            logits = model(batch.clips.to(device)).float().cpu()
            ranks = _ranks(logits, batch.targets, batch.ids)
            parts.append((ranks, probability(logits, batch.targets), batch.ids))
    ranks, probabilities, ids = zip(*parts, strict=True)
    rank = torch.cat(ranks)
    top = {f"top{k}": (rank < k).float().mean().item() for k in (1, 5)}
    ids = [id_ for part in ids for id_ in part]
    return top | {"ids": ids, "correct": rank < 1, "probability": torch.cat(probabilities)}


def _ranks(logits: Tensor, targets: Tensor, ids: list[str]) -> Tensor:
    """Return how many other classes (N,) score as high as the true one, or higher; 0: right."""
    bad = [id_ for id_, row in zip(ids, logits.isfinite().all(1).tolist(), strict=True) if not row]
    given = f"logits that are NaN or infinite for {len(bad)} clips: {', '.join(bad[:3])}"
    require(not bad, "model", given, "finite logits; has the training diverged?")
    return (logits >= logits.gather(1, targets[:, None])).sum(1) - 1


def fit(
    name: str,
    dataset,
    validation,
    out: str | Path,
    recipe: Recipe,
    *,
    seed: int = 0,
    shipped: bool = True,
    device: str | torch.device = "cpu",
    **options,
) -> tuple[nn.Module, pd.DataFrame, str]:
    """Return a trained model: the one that travels with stepkit if it is of this very recipe.

    Parameters
    ----------
    name : str
        Of the model, see `stepkit.networks.load_model`.
    shipped : bool
        False: train in any case. A checkpoint of ``stepkit/weights`` is used only if it was made
        from the same data, recipe and seed as are asked for here.
    device : str or torch.device
    dataset, validation, out, recipe, seed, **options
        As for `train`, which is called otherwise, in a folder of this training in ``out``.

    Returns
    -------
    model, history (see `train`), ``"shipped"`` or ``"trained here"``
    """
    ours = WEIGHTS / f"{recipe.start}.safetensors"
    start = ours if ours.is_file() else recipe.start or None
    model = load_model(name, len(dataset.classes), start, seed=seed).to(device)
    wanted = recipe_of(name, dataset, validation, recipe, seed)
    for checkpoint in WEIGHTS.glob(f"{name}_{dataset.name}*.safetensors") if shipped else ():
        run, tensors = _files.read(checkpoint) or ("", {})
        if not run:
            warn(f"{checkpoint}: damaged, left out")
        elif run == wanted:
            model.load_state_dict(tensors)
            return model, pd.read_csv(checkpoint.with_suffix(".csv")), "shipped"
    run = describe(model, dataset, validation, recipe, seed)
    out = Path(out) / _keys.key(run=run)[:8]
    history = train(model, dataset, validation, out, recipe, seed=seed, **options)
    return model.eval(), history, "trained here"


def describe(model, dataset, validation, recipe, seed, tag: str = "") -> str:
    """Return, as JSON, all that a training depends on (see `train`); the key of a checkpoint."""
    facts = asdict(recipe) | {
        "model": _keys.model(model, tag),  # as it is at the start
        "data": _keys.data(dataset),
        "validation": [_keys.data(validation), getattr(validation, "epoch", 0)],
        "library": _keys.library(*_keys.TRAINING),
        "seed": seed,
    }
    del facts["start"]
    return json.dumps(facts)


def recipe_of(name: str, dataset, validation, recipe: Recipe, seed: int) -> str:
    """Return, as JSON, by what recipe a checkpoint that travels with stepkit was made.

    Neither stepkit's code and version nor the bytes of fresh weights, which differ between
    machines, make it another.
    """
    parts = [_keys.data(part) for part in (dataset, validation)]
    parts = [{key: value for key, value in part.items() if key != "code"} for part in parts]
    return json.dumps({"model": name, "data": parts, "seed": seed} | asdict(recipe))


def save_model(model: nn.Module, path: str | Path, run: str = "") -> None:
    """Write the model's tensors to a ``.safetensors`` file, and what made them (`describe`)."""
    _files.write_tensors(Path(path), run, model.state_dict())


def _begin_loading(_: int) -> None:
    end_with_parent()  # PyTorch's own watch looks at the server that forks, where there is one


def _optimiser(model: nn.Module, recipe: Recipe, steps_per_epoch: int) -> dict:
    """Return the optimiser, and its schedule counted in steps."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "sgd":
        optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    else:
        require(recipe.optimiser == "adamw", "optimiser", recipe.optimiser, "'sgd' or 'adamw'")
        optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    if recipe.step_epochs:
        schedule = lr_scheduler.StepLR(optimiser, recipe.step_epochs * steps_per_epoch, 0.1)
    else:
        steps = recipe.epochs * steps_per_epoch
        schedule = lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.2)
    return {"optimiser": optimiser, "schedule": schedule}


def _resume(out: Path, run: str, parts: dict) -> list[dict]:
    """Load the state that a killed run left; return its history, empty for a new run."""
    found = {name: _files.read(out / name) for name in (MODEL, STATE) if (out / name).is_file()}
    for known, _ in filter(None, found.values()):
        given, wanted = json.loads(known or "{}"), json.loads(run)
        differ = ", ".join(name for name in wanted if given.get(name) != wanted[name])
        require(not differ, "out", f"{out}, a run of another {differ}", "a folder of its own")
    for name in (name for name, content in found.items() if content is None):
        warn(f"{out / name}: damaged, trained again from the first epoch on")
    if not all(found.get(name) for name in (MODEL, STATE)):
        return []
    packed = io.BytesIO(found[STATE][1]["state"].numpy().tobytes())
    state = torch.load(packed, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["history"]
