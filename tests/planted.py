"""Models whose evidence is known because it was put there, and the clips they look at.

A clip is white noise. A model measures the texture energy inside regions that it was given and is
sure of class 1 if there is enough of it in every one of them; blurred noise has next to none.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def noise(T, H, W, n=1, seed=0):
    return torch.randn(n, 3, T, H, W, generator=torch.Generator().manual_seed(seed))


def tube(T, H, W, start=(0.35, 0.3), stop=None, share=0.045):
    """A disc that covers so large a share of each frame and goes from start to stop."""
    stop = start if stop is None else stop
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    clock = torch.linspace(0, 1, T)[:, None, None]
    cy, cx = ((a + (b - a) * clock) * e for a, b, e in zip(start, stop, (H, W), strict=True))
    return (y - cy) ** 2 + (x - cx) ** 2 < share * H * W / math.pi


def near(region, pixels):
    """The region grown by so many pixels (a disc) in every frame."""
    reach = int(pixels)
    offsets = torch.arange(-reach, reach + 1)
    disc = (offsets[:, None] ** 2 + offsets**2 <= pixels**2).float()[None, None]
    grown = F.conv2d(region.float()[:, None], disc, padding=reach)[:, 0]
    return grown > 0


class Planted(nn.Module):
    """Logit of class 1: how far the smallest energy of its regions is above a half."""

    def __init__(self, *regions, gain=10.0):
        super().__init__()
        self.register_buffer("regions", torch.stack(regions).float())  # (R, T, H, W)
        self.gain = gain

    def forward(self, clips):
        texture = clips.square().mean(1)  # (N, T, H, W)
        energy = torch.einsum("nthw,rthw->nr", texture, self.regions)
        energy = energy / self.regions.sum((1, 2, 3))  # 1 where nothing is removed
        soft = -torch.logsumexp(-8 * energy, 1) / 8
        logit = self.gain * (soft - 0.5)
        return torch.stack([torch.zeros_like(logit), logit], 1)


class PlantedRNN(nn.Module):
    """The same question asked frame by frame: a recurrent layer adds up the energy in the tube."""

    def __init__(self, region, gain=10.0):
        super().__init__()
        self.register_buffer("region", region.float())  # (T, H, W)
        self.gain, self.rnn = gain, nn.RNN(1, 1, nonlinearity="relu", batch_first=True)
        with torch.no_grad():
            for name, value in self.rnn.named_parameters():
                value.fill_(1.0 if name.startswith("weight") else 0.0)

    def forward(self, clips):
        texture = clips.square().mean(1) * self.region
        energy = texture.sum((2, 3)) / self.region.sum((1, 2))  # (N, T)
        total = self.rnn(energy[:, :, None])[0][:, -1, 0]
        logit = self.gain * (total / clips.shape[2] - 0.5)
        return torch.stack([torch.zeros_like(logit), logit], 1)
