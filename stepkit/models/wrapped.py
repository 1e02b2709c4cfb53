"""Networks as people have them, as stepkit takes them: clips (N, 3, T, H, W) in, numbers out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stepkit._checks import require
from stepkit.clips import MEAN, STD, mean_std


def wrap(
    model: nn.Module,
    layout: str | Sequence[int] | Callable = "NCTHW",
    output: str | int | Callable = "logits",
    normalise=(MEAN, STD),
) -> "Wrapped":
    """Return a network that takes clips as `stepkit.read_clip` makes them.

    The network inside stays the same object. It is handed a copy of the clips in its own precision
    (half, bfloat16, double), and gives float32 back.

    Parameters
    ----------
    model : nn.Module
        Any; TorchScript and compiled ones too.
    layout : str, sequence of int, or callable
        The order of the axes that the network takes: ``"NTCHW"`` for Hugging Face's. Or its
        pathways: for each, how many times fewer frames it sees, evenly chosen and the last one
        among them, ``[4, 1]`` for SlowFast with α = 4. Or a function of the clips.
    output : str, int or callable
        Which part of what it returns is to be explained. ``"logits"``: the tensor itself; of an
        object or dict its ``logits``, of a tuple or list the first. Another name, or a number; or a
        function of what it returns.
    normalise : optional
        How it was trained: its mean and standard deviation, or torchvision's ``weights``, or a
        Hugging Face processor, or None for RGB in [0, 1], see `stepkit.clips.mean_std`. Clips stay
        in the normalisation of `stepkit.read_clip`, in which pictures, black and grey are right.

    Raises
    ------
    TypeError, ValueError
        No network; an unknown layout; at the first clips: no such output.

    Examples
    --------
    >>> from stepkit.networks import load_model
    >>> half = load_model("r2plus1d_narrow", num_classes=6).bfloat16()
    >>> wrap(half)(torch.zeros(1, 3, 8, 48, 48)).dtype
    torch.float32
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    twice = isinstance(model, Wrapped)
    require(not twice, "model", "one that is wrapped already", "the network itself, its .model")
    if isinstance(layout, str):
        fits = sorted(layout) == sorted("NCTHW")
        require(fits, "layout", repr(layout), "an order of the letters N, C, T, H and W")
    elif not callable(layout):
        counts = [isinstance(n, int) and n >= 1 for n in layout] if _is_list(layout) else []
        require(bool(counts) and all(counts), "layout", layout, "a number of at least 1 a pathway")
    return Wrapped(model, layout, output, normalise)


class Wrapped(nn.Module):
    """What `wrap` returns; ``.model`` is the network inside."""

    def __init__(self, model: nn.Module, layout, output, normalise):
        super().__init__()
        self.model, self.layout, self.output = model, layout, output
        self.constants = mean_std(normalise)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to float32, (N, K) for a classifier."""
        clips = clips.clone()  # a network may write into what it is given
        if self.constants != (MEAN, STD):
            (mean, std), shape = self.constants, (3, 1, 1, 1)
            rgb = clips * clips.new_tensor(STD).view(shape) + clips.new_tensor(MEAN).view(shape)
            clips = (rgb - clips.new_tensor(mean).view(shape)) / clips.new_tensor(std).view(shape)
        found = self.picked(self.model(self.arranged(clips.to(self.precision()))))
        return found.float() if isinstance(found, Tensor) else found

    def precision(self) -> torch.dtype:
        """Return the type of the network's numbers."""
        floats = (values.dtype for values in self.model.parameters() if values.is_floating_point())
        return next(floats, torch.float32)

    def arranged(self, clips: Tensor):
        """Return the clips as the network takes them."""
        if callable(self.layout):
            return self.layout(clips)
        if isinstance(self.layout, str):
            return clips.permute(*("NCTHW".index(axis) for axis in self.layout))
        last = clips.shape[2] - 1
        chosen = [torch.linspace(0, last, max(1, (last + 1) // n)).long() for n in self.layout]
        return [clips[:, :, frames.to(clips.device)] for frames in chosen]

    def picked(self, found):
        """Return the part of what the network gave that is to be explained."""
        if callable(self.output):
            return self.output(found)
        name = self.output
        if name == "logits" and isinstance(found, Tensor):
            return found
        if name == "logits" and type(found) in (tuple, list):
            name = 0
        given = f"{name!r}, of a network that returns a tensor"
        require(not isinstance(found, Tensor), "output", given, '"logits", or a function')
        if isinstance(name, str) and hasattr(found, name):
            return getattr(found, name)
        try:
            return found[name]
        except (KeyError, IndexError, TypeError):
            given = f"{self.output!r}, which {_about(found)} does not hold"
            require(False, "output", given, "the name or number of a part, or a function")


def _is_list(given) -> bool:
    return isinstance(given, list | tuple)


def _about(found) -> str:
    keys = list(found)[:8] if hasattr(found, "keys") else f"{type(found).__name__}"
    return f"{keys}"
