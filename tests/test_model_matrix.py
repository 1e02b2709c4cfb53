"""Every method on every architecture: a finite map and an untouched model, or a reason why not.

Torchvision's own classes, as small as they can be built, with fresh weights. S3D and MViT are for
larger clips by their constants (a pooling over 2×7×7 cells, an embedding of positions): S3D is
given a smaller pooling, and MViT is built for the clip.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import video
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

from stepkit import attribute, load_model, methods

METHODS = list(methods().index)


class Plain(nn.Module):
    """What a user writes: functions for ReLU and average, and no name for the layer to look at."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 6, (1, 4, 4), (1, 4, 4)), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).mean((2, 3, 4)))


class PlainNamed(Plain):
    """The same with a ReLU that can be named, and its name."""

    cam_layer = "relu"

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3, 4)))


def s3d():
    model = video.s3d(num_classes=3)
    model.avgpool = nn.AvgPool3d(1)
    return model


def mvit():
    """MViT-v2's make: pooled attention, relative positions, a residual around the pooling."""

    def block(inputs, stride_q, stride_kv):
        return MSBlockConfig(2, inputs, 32, [3, 3, 3], [3, 3, 3], stride_q, stride_kv)

    blocks = [block(16, [1, 1, 1], [1, 2, 2]), block(32, [1, 2, 2], [1, 1, 1])]
    blocks.append(block(32, [1, 1, 1], [1, 1, 1]))
    v2 = {"residual_pool": True, "residual_with_cls_embed": False, "proj_after_attn": True}
    return MViT((32, 32), 4, blocks, rel_pos_embed=True, num_classes=3, **v2)


def swin3d():
    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=3)


MODELS = {  # what builds it, and the clip (T, H, W)
    "r2plus1d_18": (lambda: video.r2plus1d_18(num_classes=3), (2, 32, 24)),
    "r3d_18": (lambda: video.r3d_18(num_classes=3), (2, 32, 24)),
    "mc3_18": (lambda: video.mc3_18(num_classes=3), (2, 32, 24)),
    "s3d": (s3d, (8, 32, 32)),
    "mvit": (mvit, (4, 32, 32)),
    "swin3d": (swin3d, (4, 32, 40)),
    "r50l": (lambda: load_model("r50l", 3), (2, 32, 32)),
    "plain": (Plain, (3, 20, 28)),
    "plain, named": (PlainNamed, (3, 20, 28)),
}
TRANSFORMERS = ("mvit", "swin3d")

# options that keep the matrix quick, for whatever method has them
QUICK = {"iterations": 1, "steps": 2, "samples": 4, "areas": (0.2,), "segments": 4}
QUICK_FOR = {
    "occlusion": {"window": (2, 16, 16), "stride": (2, 16, 16)},
    "xrai": {"segments": (4, 9), "steps": 2},
}
# Score-CAM runs the model once per channel: a layer near the input has fewer
FEW_CHANNELS = dict.fromkeys(("r2plus1d_18", "r3d_18", "mc3_18"), "stem")
FEW_CHANNELS |= {"s3d": "features.0", "r50l": "cnn.conv1"}

REFUSED = {
    ("cam", "mvit"): "cam: needs a network that ends",
    ("cam", "r50l"): "cam: needs a network that ends",
    ("lrp", "mvit"): "model: got layer_norm",
    ("lrp", "swin3d"): "model: got layer_norm",
    ("excitation_backprop", "mvit"): "model: got layer_norm",
    **{("deconvnet", name): "deconvnet: got a model without ReLU" for name in TRANSFORMERS},
    **{("guided_backprop", name): "guided_backprop: got a model without" for name in TRANSFORMERS},
}


def options_of(method, name):
    known = methods().options[method].split(", ")
    quick = {key: value for key, value in QUICK.items() if key in known}
    if method == "score_cam" and name in FEW_CHANNELS:
        quick["layer"] = FEW_CHANNELS[name]
    return quick | QUICK_FOR.get(method, {})


def refusal(method, name):
    if name == "plain" and "layer" in methods().options[method].split(", "):
        told = "layer: got no name, and no default for this model, expected layer='conv', "
        return told + "the last convolution, or one of conv, fc"
    return REFUSED.get((method, name))


@functools.cache
def built(name):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return MODELS[name][0]()  # in training mode, as a user may have left it


def untouched(model):
    """Return what a call could have changed; of weights and buffers, whether they were written."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [(t.data_ptr(), t._version, t.requires_grad, t.grad) for t in tensors],
        [(type(m), m.training, sorted(vars(m)), len(m._modules)) for m in model.modules()],
        [sum(len(v) for k, v in vars(m).items() if "hooks" in k) for m in model.modules()],
        [getattr(m, "inplace", None) for m in model.modules()],
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_runs_or_says_why_not(method, name):
    model, size = built(name), MODELS[name][1]
    clip = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    before, reason = untouched(model), refusal(method, name)
    if reason:
        with pytest.raises(ValueError, match=f"^{reason}"):
            attribute(method, model, clip, 1, **options_of(method, name))
    else:
        found = attribute(method, model, clip, 1, **options_of(method, name))
        assert found.shape == (1, *size)
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
        assert not found.requires_grad
    assert untouched(model) == before
