"""Models whose evidence is known: does each method find it?"""

import pytest
import torch
from planted import Planted, PlantedRNN, near, noise, tube

from stepkit import attribute, step

SIZES = [(8, 48, 48), (12, 48, 80), (16, 112, 112)]  # the second is not square
START, STOP = (0.3, 0.3), (0.65, 0.7)


def planted(kind, size):
    """Return a model, the region that it reads, and that region grown by 7 px at 112."""
    if kind == "two objects":
        regions = [tube(*size, (0.25, 0.3), share=0.0225), tube(*size, (0.7, 0.7), share=0.0225)]
    else:
        regions = [tube(*size, START, None if kind == "static tube" else STOP)]
    region = torch.stack(regions).any(0)
    model = PlantedRNN(region) if kind == "rnn" else Planted(*regions)
    return model, region, near(region, 7 * min(size[1:]) / 112)


def mass_inside(mask, region):
    return float((mask * region).sum() / mask.sum())


CASES = [(kind, size) for kind in ("moving tube", "rnn") for size in SIZES]
CASES += [(kind, size) for kind in ("static tube", "two objects") for size in SIZES[:2]]


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_step_puts_its_mass_on_the_evidence(kind, size):
    model, _, around = planted(kind, size)
    assert around.float().mean() < 0.25, "too easy: chance alone would come close"
    found = step(model, noise(*size), 1, areas=(0.05,), iterations=300)
    assert mass_inside(found.masks[0, 0], around) >= 0.75
    assert mass_inside(torch.ones(size), around) == pytest.approx(float(around.float().mean()))


def test_step_finds_nothing_where_nothing_is():
    # the control: a mask for a model that reads another tube does not lie on this one
    size = SIZES[0]
    elsewhere = Planted(tube(*size, (0.75, 0.75)))
    around = near(tube(*size, (0.2, 0.2)), 3)
    found = step(elsewhere, noise(*size), 1, areas=(0.05,), iterations=100)
    assert mass_inside(found.masks[0, 0], around) < 0.25


@pytest.mark.parametrize("variant", ["deletion", "dual"])
def test_the_other_variants_find_the_evidence_too(variant):
    size = SIZES[0]
    model, _, around = planted("moving tube", size)
    options = {"areas": (0.05,), "iterations": 300, "variant": variant, "removal": "fade"}
    found = step(model, noise(*size), 1, **options)
    assert mass_inside(found.masks[0, 0], around) >= 0.75


@pytest.mark.parametrize("size", SIZES)
def test_gradient_is_zero_outside_the_evidence_and_nowhere_else(size):
    model, region, _ = planted("moving tube", size)
    found = attribute("gradient", model, noise(*size), 1)[0]
    assert torch.equal(found > 0, region)


class _Detector(torch.nn.Module):
    """A convolution that sees bright squares; class 1 is sure once one is seen anywhere."""

    def __init__(self):
        super().__init__()
        self.detect = torch.nn.Conv3d(3, 1, (1, 8, 8), stride=(2, 8, 8), bias=False)
        torch.nn.init.constant_(self.detect.weight, 5 / 192)

    def forward(self, clips):
        seen = self.detect(clips).relu().amax((1, 2, 3, 4))
        return torch.stack([torch.zeros_like(seen), seen], 1)


@pytest.mark.parametrize("time", [0, 3])
def test_grad_cam_points_at_the_cell_and_the_time_step_of_the_evidence(time):
    clip = torch.zeros(1, 3, 8, 48, 64)
    clip[:, :, 2 * time, 16:24, 40:48] = 1  # cell (2, 5) of the layer, at its time step `time`
    found = attribute("grad_cam", _Detector(), clip, 1, layer="detect")[0]
    t, y, x = torch.unravel_index(found.argmax(), found.shape)
    assert t // 2 == time
    assert (y // 8, x // 8) == (2, 5)
    assert found[[i for i in range(8) if i // 2 != time]].abs().max() == 0


def test_random_maps_point_anywhere():
    size = SIZES[0]
    region = tube(*size)
    found = attribute("random", Planted(region), noise(*size, n=200), 1)
    hits = region.flatten()[found.flatten(1).argmax(1)].float().mean()
    assert abs(hits - region.float().mean()) < 0.05
