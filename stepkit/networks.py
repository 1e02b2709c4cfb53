"""The paper's two networks (§V-A.2), and narrow members of their families."""

import math
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights, list_models, resnet, video
from torchvision.models.video import resnet as video_resnet

from stepkit._checks import finite, one_of, require
from stepkit._checks import model as check_model
from stepkit._files import is_altered
from stepkit.models import out_of_place

__all__ = ["R2Plus1DNarrow", "ResNetLSTM", "ResNetLSTMNarrow", "load_model", "load_weights"]


def load_model(
    name: str, num_classes: int, weights: str | Path | None = None, seed: int = 0, **options
) -> nn.Module:
    """Build a model by name and fill in its weights.

    Parameters
    ----------
    name : str
        One of torchvision's video models, ``"r2plus1d_18"``, ``"swin3d_t"``, ...; the paper's
        ``"r50l"``; narrow relatives of its two for small clips on a CPU, ``"r2plus1d_narrow"`` and
        ``"r50l_narrow"``; or ``"package.module:function"``, of one's own, a function of
        ``num_classes`` (a class, too) that returns a module.
    num_classes : int
        K, the length of the classifier's output.
    weights : path or str, optional
        A ``.safetensors`` file with the whole model; or one of torchvision's names, downloaded by
        torchvision where the internet is: ``"KINETICS400_V1"`` for ``r2plus1d_18``,
        ``"IMAGENET1K_V2"`` for ``r50l``. Their classifier is kept where it has ``num_classes``
        outputs, and a fresh one otherwise. None: fresh weights.
    seed : int
        Of fresh weights; the global random state is not touched.
    **options
        For ``r50l``: ``variant="printed" | "released"``; for a function of one's own, what it
        takes.

    Returns
    -------
    nn.Module
        On the CPU, in evaluation mode, hooks allowed everywhere (no in-place operation).

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        Unknown name; a function that returns no module; no such file; a checkpoint of another
        format (for a ``.pth``:
        ``safetensors.torch.save_file(torch.load(path, weights_only=True), "mine.safetensors")``),
        or one that does not fit, with the first keys that differ.

    Examples
    --------
    >>> model = load_model("r2plus1d_narrow", num_classes=6)
    >>> model(torch.zeros(1, 3, 8, 48, 48)).shape
    torch.Size([1, 6])
    """
    require(isinstance(num_classes, int) and num_classes > 0, "num_classes", num_classes, "K > 0")
    build, pretrained = _builder(name)
    is_file = weights is not None and str(weights).endswith(".safetensors")
    if weights is not None and not is_file:
        expected = " or ".join(["a .safetensors file", *pretrained])
        require(str(weights) in pretrained, "weights", repr(str(weights)), expected)
        options["pretrained"] = str(weights)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = out_of_place(check_model(build(num_classes, **options))).eval()
    return load_weights(model, weights) if is_file else model


def _builder(name: str) -> tuple[Callable[..., nn.Module], list[str]]:
    """Return the function of ``num_classes`` that a name stands for, and its trained weights."""
    own = {"r50l": ResNetLSTM, "r2plus1d_narrow": R2Plus1DNarrow, "r50l_narrow": ResNetLSTMNarrow}
    if ":" in str(name):
        try:
            return pkgutil.resolve_name(name), []
        except (ImportError, AttributeError, ValueError) as error:
            expected = "package.module:function, on the path (PYTHONPATH)"
            raise ValueError(f"name: got {name!r} ({error}), expected {expected}") from error
    theirs = list_models(video)
    one_of("name", name, [*own, *theirs])
    if name in theirs:
        return partial(_torchvision, name), [*get_model_weights(name).__members__]
    return own[name], [*resnet.ResNet50_Weights.__members__] if name == "r50l" else []


def _torchvision(name: str, num_classes: int, pretrained: str | None = None) -> nn.Module:
    """Return a video model of torchvision with a classifier of ``num_classes``."""
    model = get_model(name, weights=pretrained)
    place, last = [*model.named_modules()][-1]
    if isinstance(last, nn.Conv3d):  # S3D
        fresh = nn.Conv3d(last.in_channels, num_classes, last.kernel_size)
    else:
        fresh = nn.Linear(last.in_features, num_classes)
    if pretrained is None or last.weight.shape != fresh.weight.shape:
        model.set_submodule(place, fresh)
    return model


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others need scales


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill ``model`` from a ``.safetensors`` file that holds exactly its tensors.

    Floating tensors may have 16, 32 or 64 bits, whatever the model's have. Nothing is loaded before
    names and shapes are compared.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; another format; other names, shapes or types; NaN or infinity.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: got '{path}', expected a file that exists")
    try:
        found = load_file(path)
        damaged = is_altered(Path(path))
    except SafetensorError as error:
        raise ValueError(f"weights: got {path}, expected a .safetensors file ({error})") from None
    wanted = model.state_dict()
    shapes = [{key: value.shape for key, value in part.items()} for part in (found, wanted)]
    differ = sorted({key[:60] for key, _ in shapes[0].items() ^ shapes[1].items()})
    require(not differ, f"weights {path}", f"other tensors: {differ[:3]}", "those of the model")
    for key, value in wanted.items():
        given, floats = found[key].dtype, value.is_floating_point()
        fits = given in FLOATS if floats else given == value.dtype
        require(fits, f"weights {path}", f"{given} as {key}", f"{value.dtype}")
        found[key] = found[key].to(value.dtype)
        require(finite(found[key]), f"weights {path}", f"NaN or inf in {key}", "numbers")
    require(not damaged, "weights", f"{path}, damaged", "the file as it was written, by its hash")
    model.load_state_dict(found)
    return model


class R2Plus1DNarrow(nn.Module):
    """R(2+1)D for small clips: the family's stem and blocks, one block a stage, three stages.

    At 8×48×48 the last stage holds 2×6×6 cells, about the 2×7×7 that R(2+1)D-18 has at 16×112×112.
    """

    cam_layer = "layer3"

    def __init__(self, num_classes: int, width: int = 8):
        super().__init__()
        block, conv = video_resnet.BasicBlock, video_resnet.Conv2Plus1D
        past = partial(_shortcut, nn.Conv3d, nn.BatchNorm3d)
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (1, 5, 5), (1, 2, 2), (0, 2, 2), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.Conv3d(width, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
        )
        self.layer1 = block(width, width, conv)
        self.layer2 = block(width, 2 * width, conv, 2, past(width))
        self.layer3 = block(2 * width, 4 * width, conv, 2, past(2 * width))
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to logits (N, K)."""
        features = self.layer3(self.layer2(self.layer1(self.stem(clips))))
        return self.fc(features.mean((2, 3, 4)))


def _shortcut(conv: type[nn.Module], norm: type[nn.Module], inputs: int) -> nn.Sequential:
    """Return the way past a block that halves the size and doubles the channels."""
    return nn.Sequential(conv(inputs, 2 * inputs, 1, 2, bias=False), norm(2 * inputs))


class DetachedLSTM(nn.Module):
    """One-layer LSTM with ReLU for the candidate and the output, and a detached state.

    Gates stay sigmoid. No gradient flows through the hidden and the cell state, so that the first
    frames are not drowned (§V-A.2); the parameters still learn to read the state.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(inputs, 4 * hidden)
        self.state = nn.Linear(hidden, 4 * hidden, bias=False)
        nn.init.ones_(self.input.bias[hidden : 2 * hidden])  # remember, to begin with

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, T, D) to hidden states (N, T, hidden)."""
        h = c = features.new_zeros(features.shape[0], self.hidden)
        states = []
        for x in self.input(features).unbind(1):
            i, f, g, o = (x + self.state(h.detach())).chunk(4, 1)
            c = f.sigmoid() * c.detach() + i.sigmoid() * g.relu()
            h = o.sigmoid() * c.relu()
            states.append(h)
        return torch.stack(states, 1)


class ResNetLSTM(nn.Module):
    """R50L: ResNet-50 per frame, features through an LSTM over time, one prediction per step.

    ``variant="printed"`` (§V-A.2): LSTM, two fully-connected layers, mean of the per-step softmax
    (its logarithm is returned, so that softmax of the output is that mean). ``"released"``: fully
    connected 2048→1024→512 with ReLU and dropout *before* an LSTM(256), one layer after, mean of
    the per-step logits.
    """

    cam_layer = "cnn.layer3"  # conv4, 7×7 cells per frame at 112×112

    def __init__(self, num_classes: int, variant: str = "printed", pretrained: str | None = None):
        super().__init__()
        one_of("variant", variant, ("printed", "released"))
        self.variant = variant
        self.cnn, features = self.backbone(pretrained)
        wide, narrow, hidden = self.widths
        if variant == "printed":
            self.before = nn.Identity()
            self.lstm = DetachedLSTM(features, narrow)
            self.after = nn.Sequential(
                nn.Linear(narrow, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
            )
        else:
            self.before = nn.Sequential(
                *(nn.Linear(features, wide), nn.ReLU(), nn.Dropout(0.5)),
                *(nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(0.5)),
            )
            self.lstm = DetachedLSTM(narrow, hidden)
            self.after = nn.Linear(hidden, num_classes)

    widths = (1024, 512, 256)

    @staticmethod
    def backbone(pretrained: str | None) -> tuple[nn.Module, int]:
        """Return ResNet-50 without its classifier, and the length of its features."""
        cnn = resnet.resnet50(weights=pretrained)
        features, cnn.fc = cnn.fc.in_features, nn.Identity()
        return cnn, features

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to logits (N, K)."""
        frames = clips.transpose(1, 2)  # (N, T, 3, H, W)
        features = self.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        steps = self.after(self.lstm(self.before(features)))  # (N, T, K)
        if self.variant == "released":
            return steps.mean(1)
        return steps.log_softmax(2).logsumexp(1) - math.log(steps.shape[1])


class ResNetLSTMNarrow(ResNetLSTM):
    """R50L for small clips: a narrow ResNet of three stages in place of ResNet-50."""

    widths = (128, 128, 64)

    @staticmethod
    def backbone(pretrained: str | None, width: int = 12) -> tuple[nn.Module, int]:
        """Return a narrow ResNet whose last stage keeps 6×6 cells of a 48×48 frame."""
        return NarrowResNet(width), 16 * 4 * width


class NarrowResNet(nn.Module):
    """ResNet of three stages, one basic block each, on small frames (no pooling in the stem).

    Its features are pooled to 4×4 cells, not to one: a motion is told from *where* things are in
    each frame, and a narrow network has no channels to spare for encoding that.
    """

    def __init__(self, width: int):
        super().__init__()
        past = partial(_shortcut, nn.Conv2d, nn.BatchNorm2d)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.layer1 = resnet.BasicBlock(width, width)
        self.layer2 = resnet.BasicBlock(width, 2 * width, 2, past(width))
        self.layer3 = resnet.BasicBlock(2 * width, 4 * width, 2, past(2 * width))

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (N, 3, H, W) to features (N, 16·4·width)."""
        features = self.layer3(self.layer2(self.layer1(self.stem(frames))))
        return F.adaptive_avg_pool2d(features, 4).flatten(1)
