"""Table I, made executable: what each method needs is found by trying, not typed.

``python tools/trial.py`` tries every method and writes ``stepkit/attribution/tried.csv``, which
`stepkit.methods` shows. The three columns of Table I:

- *unmodified rule*: every gradient that the method takes on its way back through a network is that
  of the network's own operations, or it takes none;
- *all networks*: it runs on a 3D-CNN, a CNN-RNN, a video transformer, and on a network of which it
  knows nothing;
- *unreduced resolution*: its map is no up-sampled grid of a few cells.
"""

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video import SwinTransformer3d

from stepkit.attribution import METHODS, TRIED, attribute
from stepkit.attribution.cost import measured
from stepkit.networks import load_model

QUICK = {  # enough to see whether and how a method works
    "step": {"iterations": 12},
    "extremal_perturbation": {"iterations": 12},
    "meaningful_perturbation": {"iterations": 12},
    "i_gos": {"iterations": 2, "steps": 3},
    "fg_vis": {"iterations": 12},
    "rise": {"samples": 64},
    "lime": {"samples": 64},
}


class Plain(nn.Module):
    """A user's own network, as far from what a library knows as can be: functions, no layers."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.filters = nn.Parameter(0.3 * torch.randn(6, 3, 3, 5, 5, generator=draw))
        self.classes = nn.Parameter(3 * torch.randn(3, 6, generator=draw))

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to logits (N, 3)."""
        seen = F.softplus(F.conv3d(clips, self.filters, padding=(1, 2, 2)))
        return torch.tanh(seen.square().mean((2, 3, 4))) @ self.classes.T


def networks() -> dict[str, nn.Module]:
    """Return one small network of each kind, with random weights and 3 classes."""
    sizes = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": [2, 3, 3]}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        transformer = SwinTransformer3d(patch_size=[2, 4, 4], **sizes, num_classes=3).eval()
        kinds = {
            "3D-CNN": load_model("r2plus1d_narrow", 3),
            "CNN-RNN": load_model("r50l_narrow", 3),
            "transformer": transformer,
            "any": Plain(),
        }
    with torch.no_grad():
        for network in list(kinds.values())[:3]:  # of firmer opinions, as a trained network is
            list(network.parameters())[-2].mul_(20)
    return kinds


def clips(size=(4, 48, 48)) -> Tensor:
    """Return the clip that methods are tried on: noise on a smooth scene."""
    draw = torch.Generator().manual_seed(1)
    scene = F.interpolate(torch.randn(1, 3, 2, 4, 4, generator=draw), size, mode="trilinear")
    return scene + 0.3 * torch.randn(1, 3, *size, generator=draw)


def works(method: str, network: nn.Module) -> bool:
    """Tell whether a method explains a network, rather than refuse to."""
    try:
        found = attribute(method, network, clips(), 0, **QUICK.get(method, {}))
    except ValueError:
        return False
    return bool(found.std() > 0)


class Tapped(nn.Module):
    """Convolutions and ReLUs that record the gradient of every tensor between them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv3d(3, 4, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv3d(4, 4, 3, padding=1), nn.ReLU()
        self.fc = nn.Linear(4, 3)
        self.record = [[] for _ in range(6)]  # per place (value, gradient) in order of arrival
        draw = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=draw)

    def layers(self) -> tuple:
        """Return what lies between the places."""
        head = lambda x: self.fc(x.mean((2, 3, 4)))  # noqa: E731
        return self.conv1, self.relu1, self.conv2, self.relu2, head

    def forward(self, x: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to logits (N, 3)."""
        self._tap(x, 0)
        for place, layer in enumerate(self.layers(), 1):
            x = layer(x)
            self._tap(x, place)
        return x

    def _tap(self, x: Tensor, place: int) -> None:
        if x.requires_grad:
            value = x.detach().clone()
            x.register_hook(lambda slope: self.record[place].append((value, slope.clone())))

    def true_to_itself(self) -> bool:
        """Tell whether each gradient recorded is the one behind it, through the layer between."""
        for layer, lower, upper in zip(self.layers(), self.record, self.record[1:], strict=False):
            if len(lower) > len(upper):
                return False  # came by another way
            for (value, slope), (_, arrived) in zip(lower, upper, strict=False):
                with torch.enable_grad():
                    x = value.clone().requires_grad_()
                    (expected,) = torch.autograd.grad(layer(x), x, arrived)
                if not torch.allclose(slope, expected, rtol=1e-3, atol=1e-7):
                    return False
        return True


def unmodified_rule(method: str) -> bool:
    """Tell whether a method takes no gradients but a network's own."""
    network = Tapped()
    options = QUICK.get(method, {}) | ({"layer": "relu2"} if _has_layer(method) else {})
    try:
        attribute(method, network, clips((4, 16, 16)), 0, **options)
    except ValueError:
        return False
    if not METHODS[method].needs_gradient:
        return not any(network.record)
    return any(network.record) and network.true_to_itself()


def _has_layer(method: str) -> bool:
    return "layer" in METHODS[method].option_names()


def unreduced(method: str) -> bool:
    """Tell whether a map is more than a grid of cells stretched to the clip.

    A map is one if some bilinear stretching of at most a quarter as many cells along an edge gives
    it back, or if neighbouring frames are alike.
    """
    found = attribute(method, networks()["3D-CNN"], clips(), 0, **QUICK.get(method, {}))[0]
    alike = bool((found.diff(dim=0).abs().amax((1, 2)) == 0).any())
    return not alike and not any(_stretched(found, cells) for cells in range(1, len(found[0]) // 4))


def _stretched(maps: Tensor, cells: int) -> bool:
    """Tell whether square frames (T, H, H) are cells×cells grids, stretched bilinearly."""
    size = maps.shape[1:]
    ends = torch.eye(cells)[None, None]
    line = F.interpolate(ends, (size[0], cells), mode="bilinear")[0, 0].double()  # (H, cells)
    onto = line @ torch.linalg.pinv(line)  # projects on what stretching can reach
    maps = maps.double()
    return bool((maps - onto @ maps @ onto.T).norm() < 1e-4 * maps.norm())


def passes(method: str) -> dict:
    """Return forward and backward passes per clip at a method's default options."""
    model, shown = networks()["3D-CNN"], clips((4, 24, 24))
    attribute("random", model, shown, 0)  # the passes that every model is met with, once
    _, cost = measured(lambda *given: attribute(method, *given), model, shown, 0)
    return {name: int(cost[name]) for name in ("forward", "backward")}


def row(method: str) -> dict:
    """Try one method: a row of ``tried.csv`` without the passes."""
    runs = {kind: works(method, network) for kind, network in networks().items()}
    return {
        "works on": ", ".join(kind for kind, well in runs.items() if well),
        "unmodified rule": unmodified_rule(method),
        "all networks": all(runs.values()),
        "unreduced resolution": unreduced(method),
    }


def main() -> None:
    """Try all methods and write the table."""
    rows = {method: row(method) | passes(method) for method in METHODS}
    pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").to_csv(TRIED)


if __name__ == "__main__":
    main()
