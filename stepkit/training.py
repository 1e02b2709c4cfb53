"""Training: the paper's recipe (§V-A.2) and a quick one, resumable, never looking at the test part.

The checkpoint that is kept is the one with the best accuracy on a *validation* part (the released
code picks it on the test set). Removal can serve as augmentation, so that a model has seen what
perturbation methods will show it and is not fooled by the edges of a mask.
"""

import functools
import io
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from stepkit import _files, _keys
from stepkit._checks import require, warn
from stepkit._workers import end_with_parent
from stepkit.data.sample import collate
from stepkit.models import device_of, frozen
from stepkit.networks import load_model, load_weights
from stepkit.removal import Removal, blur, gaussian_blur


@dataclass(frozen=True)
class Recipe:
    """How to train; every field can be replaced, ``dataclasses.replace(PAPER, epochs=12)``.

    Attributes
    ----------
    epochs, batch_size : int
        Passes over the training part; clips per step.
    clips_per_video : int
        Clips drawn from every training video in an epoch.
    optimiser : str
        ``"sgd"`` (momentum 0.9) or ``"adamw"``.
    learning_rate, weight_decay : float
        The largest learning rate; decay of the weights.
    step_epochs : int
        The learning rate falls to a tenth every so many epochs; 0: rises for the first fifth of
        the training, then falls along a cosine ("one cycle").
    removal_share : float
        Share of the training clips from which random blobs are removed (`remove_at_random`); it
        rises from 0 to this over the first half of the epochs.
    start : str
        Where `fit` starts: ``weights`` of `stepkit.networks.load_model`, such as
        ``"KINETICS400_V1"``, or the name of a checkpoint that travels with stepkit. Empty: fresh
        weights.
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
QUICK = Recipe(
    epochs=30,
    batch_size=32,
    clips_per_video=1,
    optimiser="adamw",
    learning_rate=3e-3,
    weight_decay=0.02,
    step_epochs=0,
    removal_share=0.35,
)

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
    removal: Removal | None = None,
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
    recipe : Recipe
        `PAPER` or `QUICK` or one of your own.
    removal : Removal, optional
        Operator for ``recipe.removal_share``; the blur pyramid by default.
    seed : int
        Order of the clips and the removed blobs. The weights are initialised by the caller.
    workers : int
        Processes that load clips beside the training.
    progress : bool
        Show a bar.
    tag : str
        Stands for code and attributes of a network that no key can name, see `stepkit._keys`.

    Returns
    -------
    DataFrame
        One row per epoch: ``epoch, loss, train_top1, val_top1, val_top5``.

    Raises
    ------
    TypeError
        Part of the model cannot be named.
    ValueError
        Training and validation share clip ids; ``out`` holds another run (`describe`); logits are
        no longer finite.
    """
    shared = set(dataset.ids) & set(validation.ids)
    require(not shared, "validation", f"{len(shared)} clips of the training part", "other clips")
    out = Path(out)
    run = describe(model, dataset, validation, recipe, seed, removal, tag)
    best, table = _files.read_tensors(out / MODEL, run), _files.read_table(out / HISTORY)
    if best and table is not None and len(table) == recipe.epochs:
        model.load_state_dict(best)
        return table
    steps = recipe.clips_per_video * math.ceil(len(dataset) / recipe.batch_size)
    optimiser, schedule = _optimiser(model, recipe, steps)
    history = _resume(out, run, model, optimiser, schedule)
    epochs = range(len(history), recipe.epochs)
    for epoch in tqdm(epochs, desc="training", disable=not progress, leave=False):
        # a loader draws more from its generator with workers than without: blobs have their own
        draw = seed * 100_003 + epoch
        order, blobs = (torch.Generator().manual_seed(draw + salt) for salt in (0, 2**31))
        loader = DataLoader(
            dataset,
            recipe.batch_size,
            shuffle=True,
            num_workers=workers,
            worker_init_fn=_begin_loading,
            collate_fn=collate,
            generator=order,
        )
        share = recipe.removal_share * min(1, 2 * epoch / recipe.epochs)
        augment = functools.partial(
            remove_at_random, share=share, removal=removal or blur(), generator=blobs
        )
        with torch.random.fork_rng(_cuda(model)):  # for dropout
            torch.manual_seed(draw)
            passes = []
            for i in range(recipe.clips_per_video):
                dataset.epoch = epoch * recipe.clips_per_video + i
                passes.append(_pass(model, loader, augment, optimiser, schedule))
        loss, top1 = (sum(values) / len(values) for values in zip(*passes, strict=True))
        scores = evaluate(model, validation, recipe.batch_size)
        highest = max((row["val_top1"] for row in history), default=-1.0)
        row = {"epoch": epoch, "loss": loss, "train_top1": top1}
        history.append(row | {f"val_{key}": scores[key] for key in ("top1", "top5")})
        if scores["top1"] >= highest:
            save_model(model, out / MODEL, run)
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
        state |= {"schedule": schedule.state_dict(), "history": history}
        packed = io.BytesIO()
        torch.save(state, packed)
        packed = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)
        _files.write_tensors(out / STATE, run, {"state": packed})
    table = pd.DataFrame(history)
    _files.write_table(out / HISTORY, table)
    load_weights(model, out / MODEL)
    return table


def evaluate(model: nn.Module, dataset, batch_size: int = 32, progress: bool = False) -> dict:
    """Return the accuracy of ``model`` on a dataset (Table III).

    Returns
    -------
    dict
        ``top1`` and ``top5`` in [0, 1], and per clip, in order: ``ids``, ``correct`` (bool (N,)),
        ``probability`` (N,), Φ of the true class. A class that ties with the true one counts
        against it.

    Raises
    ------
    ValueError
        Logits that are not finite; the clips are named.
    """
    device, ids, ranks, probability = device_of(model, "cpu"), [], [], []
    own = torch.Generator()  # a loader without one draws from the global state
    loader = DataLoader(dataset, batch_size, collate_fn=collate, generator=own)
    with frozen(model), torch.no_grad():
        for batch in tqdm(loader, desc="evaluating", disable=not progress, leave=False):
            logits = model(batch.clips.to(device)).float().cpu()
            ranks.append(_ranks(logits, batch.targets, batch.ids))
            probability.append(logits.softmax(1).gather(1, batch.targets[:, None])[:, 0])
            ids += batch.ids
    rank = torch.cat(ranks)
    return {
        "top1": (rank < 1).float().mean().item(),
        "top5": (rank < 5).float().mean().item(),
        "ids": ids,
        "correct": rank < 1,
        "probability": torch.cat(probability),
    }


def _ranks(logits: Tensor, targets: Tensor, ids: list[str]) -> Tensor:
    """Return how many other classes (N,) score as high as the true one, or higher; 0: right."""
    bad = [id_ for id_, row in zip(ids, logits.isfinite().all(1).tolist(), strict=True) if not row]
    given = f"logits that are NaN or infinite for {len(bad)} clips: {', '.join(bad[:3])}"
    require(not bad, "model", given, "finite logits; has the training diverged?")
    return (logits >= logits.gather(1, targets[:, None])).sum(1) - 1


def remove_at_random(
    clips: Tensor, share: float, removal: Removal, generator: torch.Generator
) -> Tensor:
    """Remove moving random blobs from a random ``share`` of the clips; labels stay as they are.

    The blobs are level sets of smooth noise in space-time; between a fifth and nine tenths of a
    clip is kept. ``clips`` (N, 3, T, H, W) -> the same shape.
    """
    chosen = (torch.rand(len(clips), generator=generator) < share).nonzero()[:, 0]
    if not len(chosen):
        return clips
    noise = torch.randn(len(chosen), 1, 3, 6, 6, generator=generator)
    noise = F.interpolate(noise, clips.shape[2:], mode="trilinear", align_corners=True)[:, 0]
    kept = torch.empty(len(chosen)).uniform_(0.2, 0.9, generator=generator)
    level = torch.stack(
        [field.quantile(1 - q) for field, q in zip(noise.flatten(1), kept, strict=True)]
    )
    mask = (noise > level[:, None, None, None]).float()
    mask = gaussian_blur(mask, 0.02 * min(clips.shape[-2:])).clamp(0, 1).to(clips.device)
    clips = clips.clone()
    chosen = chosen.to(clips.device)
    clips[chosen] = removal.apply(clips[chosen], mask)
    return clips


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
        Where to train, and where the model stays.
    dataset, validation, out, recipe, seed, **options
        As for `train`, which is called otherwise, and resumes, in a folder of this training in
        ``out``.

    Returns
    -------
    model : nn.Module
    history : DataFrame
        See `train`.
    origin : str
        ``"shipped"`` or ``"trained here"``.
    """
    ours = WEIGHTS / f"{recipe.start}.safetensors"
    start = ours if ours.is_file() else recipe.start or None
    model = load_model(name, len(dataset.classes), start, seed=seed).to(device)
    removal = options.get("removal")
    usual = _keys.key(removal=removal or blur()) == _keys.key(removal=blur())
    asked = recipe_of(name, dataset, validation, recipe, seed) if shipped and usual else None
    for checkpoint in WEIGHTS.glob(f"{name}_{dataset.name}*.safetensors") if asked else ():
        found = _files.read(checkpoint)
        if found is None:
            warn(f"{checkpoint}: damaged, left out")
        elif found[0] == asked:
            model.load_state_dict(found[1])
            return model, pd.read_csv(checkpoint.with_suffix(".csv")), "shipped"
    run = describe(model, dataset, validation, recipe, seed, removal)
    out = Path(out) / _keys.key(run=run)[:8]
    history = train(model, dataset, validation, out, recipe, seed=seed, **options)
    return model.eval(), history, "trained here"


def describe(
    model: nn.Module,
    dataset,
    validation,
    recipe: Recipe,
    seed: int,
    removal: Removal | None = None,
    tag: str = "",
) -> str:
    """Return, as JSON, all that a training depends on; the key of every checkpoint.

    That is the network as it is at the start, both parts of the data, and how it is trained.
    """
    facts = {
        "model": _keys.model(model, tag),
        "data": _keys.data(dataset),
        "validation": [_keys.data(validation), getattr(validation, "epoch", 0)],
        "removal": _keys.key(removal=removal or blur()),
        "library": _keys.library(*_keys.TRAINING),
        "seed": seed,
        **{name: value for name, value in asdict(recipe).items() if name != "start"},  # in model
    }
    return json.dumps(facts)


def recipe_of(name: str, dataset, validation, recipe: Recipe, seed: int) -> str:
    """Return, as JSON, by what recipe a checkpoint that travels with stepkit was made.

    It is the checkpoint of that recipe as long as stepkit ships it: neither stepkit's code and
    version nor the bytes of fresh weights, which differ between machines, make it another.
    """
    parts = [_keys.data(part) for part in (dataset, validation)]
    parts = [{key: value for key, value in part.items() if key != "code"} for part in parts]
    facts = {"model": name, "data": parts, "seed": seed}
    return json.dumps(facts | asdict(recipe))


def save_model(model: nn.Module, path: str | Path, run: str = "") -> None:
    """Write the model's tensors to a ``.safetensors`` file, and what made them (`describe`)."""
    _files.write_tensors(Path(path), run, model.state_dict())


def _begin_loading(_: int) -> None:
    end_with_parent()  # PyTorch's own watch looks at the server that forks, where there is one


def _pass(model, loader, augment, optimiser, schedule) -> tuple[float, float]:
    """One pass over the training part; returns the mean loss and the accuracy."""
    device = device_of(model, "cpu")
    model.train()
    total = correct = seen = 0.0
    for batch in loader:
        clips, targets = augment(batch.clips.to(device)), batch.targets.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(clips).float()
        loss = F.cross_entropy(logits, targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        total += loss.item() * len(targets)
        correct += (_ranks(logits.detach(), targets, batch.ids) == 0).sum().item()
        seen += len(targets)
    return total / seen, correct / seen


def _cuda(model: nn.Module) -> list[int]:
    """Return the CUDA devices whose random state the model uses."""
    device = device_of(model, "cpu")
    return [device.index or 0] if device.type == "cuda" else []


def _optimiser(model: nn.Module, recipe: Recipe, steps_per_epoch: int):
    """Return the optimiser, and its schedule counted in steps."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "sgd":
        optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    else:
        require(recipe.optimiser == "adamw", "optimiser", recipe.optimiser, "'sgd' or 'adamw'")
        optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    if recipe.step_epochs:
        every = recipe.step_epochs * steps_per_epoch
        return optimiser, torch.optim.lr_scheduler.StepLR(optimiser, every, 0.1)
    steps = recipe.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.2)
    return optimiser, schedule


def _resume(out: Path, run: str, model, optimiser, schedule) -> list[dict]:
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
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    return state["history"]
