"""Convolutions written otherwise: the same values, in shapes that matrix units are good at.

A video network's convolutions are mostly flat: 1×k×k, or k×1×1. With the channels last in memory a
flat one is a convolution of images, without a copy: of all frames, or of the time axis by the
places of a frame, and libraries are better at images. A first layer has too few channels, and a
stride: its input is cut into squares of stride × stride pixels, each the channels of one place
(space to depth), where the kernel has fewer taps and no stride.
"""

from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 4  # channels, up to which a strided convolution goes by squares
LANE = 8  # channels that a matrix unit reads at once, in bfloat16


def rewrite(model: nn.Module) -> None:
    """Let the frozen convolutions of a model compute in these shapes; names and weights stay."""
    for layer in model.modules():
        kind = {nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}.get(type(layer))
        if kind is None or layer.groups > 1 or layer.padding_mode != "zeros":
            continue
        if isinstance(layer.padding, str) or any(n > 1 for n in layer.dilation):
            continue
        cut = layer.in_channels <= FEW and layer.stride[-1] == layer.stride[-2] > 1
        images = kind is _Conv3d and _is_flat(layer)
        if cut or images:
            layer.__class__, layer.squares, layer.images = kind, cut, images


def _is_flat(layer: nn.Conv3d) -> bool:
    """Whether the layer looks at single frames, or at single places."""
    frames = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    places = layer.kernel_size[1:] + layer.stride[1:] + layer.padding[1:]
    return frames == (1, 1, 0) or places == (1, 1, 1, 1, 0, 0)


class _Conv2d(nn.Conv2d):
    """A strided convolution of few channels, on squares of pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(_cut(x, self), _kernel(self), self.bias)


class _Conv3d(nn.Conv3d):
    """A convolution that is flat, on images; or one of few channels, on squares of pixels."""

    def forward(self, x: Tensor) -> Tensor:
        weight, stride, padding = self.weight, self.stride, self.padding
        if self.squares:
            x, weight = _cut(x, self), _kernel(self)
            stride, padding = (stride[0], 1, 1), (padding[0], 0, 0)
        if not self.images:
            return F.conv3d(x, weight, self.bias, stride, padding)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        n, _, frames, *places = x.shape
        if weight.shape[2] == 1:
            images = x.transpose(1, 2).flatten(0, 1)
            found = F.conv2d(images, weight[:, :, 0], self.bias, stride[1:], padding[1:])
            return found.unflatten(0, (n, frames)).transpose(1, 2)
        along = (stride[0], 1), (padding[0], 0)
        return F.conv2d(x.flatten(3), weight[..., 0], self.bias, *along).unflatten(3, places)


def _spans(layer: nn.Module) -> list[tuple[int, int, int]]:
    """Return zeros before the kernel, zeros before the input, and squares of the kernel, by axis.

    The former align the kernel with the squares.
    """
    s, found = layer.stride[-1], []
    for size, padding in zip(layer.kernel_size[-2:], layer.padding[-2:], strict=True):
        lead = -padding % s
        found.append((lead, padding + lead, -(-(lead + size) // s)))
    return found


def _kernel(layer: nn.Module) -> Tensor:
    """Return the layer's weights on squares: (O, C·s², ..., taps, taps)."""
    s, around = layer.stride[-1], []
    for size, (lead, _, taps) in zip(layer.kernel_size[-2:], _spans(layer), strict=True):
        around = [lead, taps * s - lead - size, *around]
    return _by_squares(layer.weight, around, s)


def _cut(x: Tensor, layer: nn.Module) -> Tensor:
    """Return the layer's input on squares, as many as its output and the kernel's taps need."""
    s, around = layer.stride[-1], []
    sizes = x.shape[-2:], layer.kernel_size[-2:], layer.padding[-2:], _spans(layer)
    for size, kernel, padding, (_, before, taps) in zip(*sizes, strict=True):
        squares = (size + 2 * padding - kernel) // s + taps
        around = [before, squares * s - size - before, *around]
    return _by_squares(x, around, s)


def _by_squares(x: Tensor, around: list[int], s: int) -> Tensor:
    """Pad height and width, cut both in steps of s, put the pixels of a square into the channels.

    (N, C, ..., s·h, s·w) -> (N, C'·s², ..., h, w), the channels last in memory; so many of zeros
    are added that C'·s² is a multiple of `LANE`.
    """
    more = next(n for n in count() if (x.shape[1] + n) * s**2 % LANE == 0)
    x = F.pad(x, (*around, *(0, 0) * (x.ndim - 4), 0, more))
    x = x.unflatten(-1, (-1, s)).unflatten(-3, (-1, s))  # (N, C', ..., h, s, w, s)
    return x.movedim((-3, -1, 1), (-3, -2, -1)).flatten(-3).movedim(-1, 1)
