"""Clips made on the device, and a network trained on them in seconds: masks of it then matter."""

import math
import time

import torch
from torch.nn import functional as F

from stepkit.removal import gaussian_blur

DIRECTIONS = 8


def gratings(n, frames, size, draw):
    """Return clips (n, 3, T, H, W) of a grating that moves in a disc on ground that rests, and its
    direction (n,), one of eight.
    """

    device = draw.device

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=draw, device=device)

    classes = torch.randint(DIRECTIONS, (n,), generator=draw, device=device)
    angle = classes.view(-1, 1, 1, 1) * 2 * math.pi / DIRECTIONS
    axes = (torch.arange(float(k), device=device) for k in (frames, size, size))
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    along = x * angle.cos() + y * angle.sin() - t * size / 56
    wave = torch.sin(2 * math.pi * (along / size / uniform(0.09, 0.14) + uniform(0, 1)))
    away = torch.hypot(x - size * uniform(0.25, 0.75), y - size * uniform(0.25, 0.75))
    inside = torch.sigmoid((0.2 * size - away) / 2)
    ground = torch.randn(n, 1, size, size, generator=draw, device=device)
    ground = gaussian_blur(ground, size / 28)
    found = inside * wave + (1 - inside) * 0.5 * ground / ground.std()
    noise = torch.randn(n, 3, frames, size, size, generator=draw, device=device)
    return found[:, None] + 0.1 * noise, classes


def train(network, frames, size, draw, seconds, rate=1e-3, batch=32) -> int:
    """Train for so many seconds, the rate falling to zero, and freeze; return the steps done."""
    optimiser, steps = torch.optim.Adam(network.train().parameters(), rate), 0
    end = time.time() + seconds
    while (left := end - time.time()) > 0:
        optimiser.param_groups[0]["lr"] = rate * left / seconds
        clips, classes = gratings(batch, frames, size, draw)
        with torch.autocast(draw.device.type, torch.bfloat16):
            loss = F.cross_entropy(network(clips).float(), classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()  # waits, so that the clock is right
        steps += 1
    network.eval().requires_grad_(False)
    return steps
