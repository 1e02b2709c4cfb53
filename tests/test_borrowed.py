"""What a caller lends (clips, model, random state, settings) comes back as it was."""

import contextlib
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import stepkit as sk
from stepkit import panels
from stepkit.data import Synthetic, batch
from stepkit.training import evaluate

DATA = Synthetic("object", n=4, frames=4, size=24)


class Net(nn.Module):
    """Where it writes, then what only a later clip is changed by: no look at the first tells."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes
        self.model = sk.load_model("r2plus1d_narrow", 6)

    def forward(self, clips):
        if self.writes and not clips.requires_grad:
            clips.clamp_(-3, 3)
        return self.model(clips)


@pytest.fixture
def lent():
    shown = batch(DATA)
    shown.clips.clamp_(-2, 2)
    shown.clips[2, :, 1, 5, 5] = 9
    return shown.clips, shown.targets


def curve(model, clips, targets):
    maps = torch.rand(clips[:, 0].shape, generator=torch.Generator().manual_seed(0))
    sk.insertion(model, clips, maps, targets, unit="patch", patch=12, steps=2)


FEW = {"iterations": 2, "areas": (0.2,)}
CALLS = {
    "step": lambda *given: sk.step(*given, **FEW),
    "insertion": curve,
    "watch": sk.metrics.watch,
    "panels": lambda model, clips, targets: panels.probabilities(model, clips[2]),
    "evaluate": lambda model, clips, targets: evaluate(model, DATA),
} | {
    method: lambda *given, method=method, own=own: sk.attribute(method, *given, **own)
    for method, own in {
        "gradient": {},
        "grad_cam": {"layer": "model.layer3"},
        "score_cam": {"layer": "model.layer3"},
        "occlusion": {},
        "rise": {"samples": 8},
        "lime": {"samples": 8},
        "blur_ig": {"steps": 2},
        "extremal_perturbation": {"iterations": 2},
    }.items()
}


def state(model):
    names = (
        "get_num_threads",
        "get_default_dtype",
        "is_grad_enabled",
        "get_deterministic_debug_mode",
    )
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "random": random.getstate(),
        "settings": [getattr(torch, name)() for name in names],
        "cudnn": [torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark],
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "modes": [part.training for part in model.modules()],
        "learning": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(part._forward_hooks) for part in model.modules()],
        "weights": [value.clone() for value in model.state_dict().values()],
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_lent_comes_back_as_it_was(lent, writes, name):
    model = Net(writes).train()
    clips, before = lent[0], lent[0].clone()
    known = state(model)
    with contextlib.suppress(ValueError) if writes else contextlib.nullcontext():  # or is refused
        CALLS[name](model, *lent)
    assert torch.equal(clips, before)
    found = state(model)
    torch.testing.assert_close(found.pop("weights"), known.pop("weights"), rtol=0, atol=0)
    assert found == known
