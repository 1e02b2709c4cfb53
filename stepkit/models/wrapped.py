"""Networks as people have them, as stepkit takes them: clips (N, 3, T, H, W) in, numbers out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stepkit._checks import model as check_model
from stepkit._checks import require
from stepkit.clips import MEAN, STD, mean_std

__all__ = ["Wrapped", "wrap"]


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
    check_model(model)
    twice = isinstance(model, Wrapped)
    require(not twice, "model", "one that is wrapped already", "the network itself, its .model")
    if isinstance(layout, str):
        fits = sorted(layout) == sorted("NCTHW")
        require(fits, "layout", repr(layout), "an order of the letters N, C, T, H and W")
    elif not callable(layout):
        counts = layout if isinstance(layout, list | tuple) else ()
        fits = counts and all(isinstance(n, int) and n >= 1 for n in counts)
        require(fits, "layout", layout, "a number of at least 1 a pathway")
    return Wrapped(model, layout, output, normalise)


class Wrapped(nn.Module):
    """What `wrap` returns; ``.model`` is the network inside."""

    def __init__(self, model: nn.Module, layout, output, normalise):
        super().__init__()
        self.model, self.layout, self.output = model, layout, output
        mean, std = mean_std(normalise)
        self.scale = [ours / own for ours, own in zip(STD, std, strict=True)]
        self.shift = [(ours - own) / s for ours, own, s in zip(MEAN, mean, std, strict=True)]

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to float32, (N, K) for a classifier."""
        scale, shift = (clips.new_tensor(v).view(3, 1, 1, 1) for v in (self.scale, self.shift))
        clips = clips * scale + shift  # also a copy: a network may write into what it is given
        floats = (values.dtype for values in self.model.parameters() if values.is_floating_point())
        clips = clips.to(next(floats, torch.float32))
        picked = self._pick(self.model(self._arrange(clips)))
        return picked.float() if isinstance(picked, Tensor) else picked

    def _arrange(self, clips: Tensor):
        """Return the clips as the network takes them."""
        if callable(self.layout):
            return self.layout(clips)
        if isinstance(self.layout, str):
            return clips.permute(*("NCTHW".index(axis) for axis in self.layout))
        last = clips.shape[2] - 1
        chosen = [torch.linspace(0, last, max(1, (last + 1) // n)).long() for n in self.layout]
        return [clips[:, :, frames.to(clips.device)] for frames in chosen]

    def _pick(self, returned):
        """Return the part of what the network returned that is to be explained."""
        name = self.output
        if callable(name):
            return name(returned)
        if isinstance(returned, Tensor):
            given = f"{name!r}, of a network that returns a tensor"
            require(name == "logits", "output", given, '"logits", or a function')
            return returned
        if name == "logits" and type(returned) in (tuple, list):
            return returned[0]
        if isinstance(name, str) and hasattr(returned, name):
            return getattr(returned, name)
        try:
            return returned[name]
        except (KeyError, IndexError, TypeError):
            parts = list(returned)[:8] if hasattr(returned, "keys") else type(returned).__name__
            given = f"{name!r}, which {parts} does not hold"
            require(False, "output", given, "the name or number of a part, or a function")
