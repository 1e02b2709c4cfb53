"""Video classifiers: the paper's two (§V-A.2), narrow members of their families, and any other.

A model is any ``nn.Module`` that maps clips (N, 3, T, H, W) to logits (N, K); Φ_c is the softmax
probability of class c. Nothing in stepkit asks for more than that.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet
from torchvision.models.video import (
    S3D,
    MViT,
    R2Plus1D_18_Weights,
    SwinTransformer3d,
    VideoResNet,
    r2plus1d_18,
)
from torchvision.models.video import resnet as video_resnet

from stepkit.checks import one_of, require
from stepkit.memory import kept


def load_model(
    name: str, num_classes: int, weights: str | Path | None = None, seed: int = 0, **options
) -> nn.Module:
    """Build a model by name and fill in its weights.

    Parameters
    ----------
    name : str
        ``"r2plus1d_18"``, ``"r50l"``, or their narrow relatives ``"r2plus1d_narrow"`` and
        ``"r50l_narrow"`` for small clips on a CPU.
    num_classes : int
        K, the length of the new classifier's output.
    weights : path or str, optional
        A ``.safetensors`` file with the whole model; or one of torchvision's names, downloaded by
        torchvision where the internet is: ``"KINETICS400_V1"`` for ``r2plus1d_18``,
        ``"IMAGENET1K_V2"`` for ``r50l``, under a fresh classifier. None: fresh weights.
    seed : int
        Of fresh weights; the global random state is not touched.
    **options
        For ``r50l``: ``variant="printed" | "released"``.

    Returns
    -------
    nn.Module
        On the CPU, in evaluation mode, hooks allowed everywhere (no in-place operation).

    Raises
    ------
    FileNotFoundError, ValueError
        Unknown name; no such file; a checkpoint of another format (for a ``.pth``:
        ``safetensors.torch.save_file(torch.load(path, weights_only=True), "mine.safetensors")``),
        or one that does not fit, with the first keys that differ.

    Examples
    --------
    >>> model = load_model("r2plus1d_narrow", num_classes=6)
    >>> model(torch.zeros(1, 3, 8, 48, 48)).shape
    torch.Size([1, 6])
    """
    makers = {
        "r2plus1d_18": _r2plus1d_18,
        "r2plus1d_narrow": R2Plus1DNarrow,
        "r50l": ResNetLSTM,
        "r50l_narrow": ResNetLSTMNarrow,
    }
    one_of("name", name, makers)
    require(isinstance(num_classes, int) and num_classes > 0, "num_classes", num_classes, "K > 0")
    is_file = weights is not None and str(weights).endswith(".safetensors")
    if weights is not None and not is_file:
        known = [*_PRETRAINED[name].__members__] if name in _PRETRAINED else []
        expected = " or ".join(["a .safetensors file", *known])
        require(str(weights) in known, "weights", repr(str(weights)), expected)
        options["pretrained"] = weights
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = out_of_place(makers[name](num_classes, **options)).eval()
    return load_weights(model, weights) if is_file else model


_PRETRAINED = {"r2plus1d_18": R2Plus1D_18_Weights, "r50l": resnet.ResNet50_Weights}


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill ``model`` from a ``.safetensors`` file that holds exactly its tensors."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: got '{path}', expected a file that exists")
    try:
        found, wanted = load_file(path), model.state_dict()
    except SafetensorError as error:
        raise ValueError(f"weights: got {path}, expected a .safetensors file ({error})") from None
    differ = [
        key
        for key in sorted(wanted.keys() | found.keys())
        if key not in found or key not in wanted or found[key].shape != wanted[key].shape
    ]
    require(not differ, f"weights {path}", f"other tensors: {differ[:3]}", "those of the model")
    model.load_state_dict(found)
    return model


def _r2plus1d_18(num_classes: int, pretrained: str | None = None) -> nn.Module:
    """Return torchvision's R(2+1)D-18 with a new classifier layer."""
    model = r2plus1d_18(weights=pretrained)
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


class R2Plus1DNarrow(nn.Module):
    """R(2+1)D for small clips: the family's stem and blocks, one block a stage, three stages.

    At 8×48×48 the last stage holds 2×6×6 cells, about the 2×7×7 that R(2+1)D-18 has at 16×112×112.
    """

    cam_layer = "layer3"

    def __init__(self, num_classes: int, width: int = 8):
        super().__init__()
        block, conv = video_resnet.BasicBlock, video_resnet.Conv2Plus1D
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (1, 5, 5), (1, 2, 2), (0, 2, 2), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.Conv3d(width, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
        )
        self.layer1 = block(width, width, conv)
        self.layer2 = block(width, 2 * width, conv, 2, _shortcut(width, 2 * width))
        self.layer3 = block(2 * width, 4 * width, conv, 2, _shortcut(2 * width, 4 * width))
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to logits (N, K)."""
        features = self.layer3(self.layer2(self.layer1(self.stem(clips))))
        return self.fc(features.mean((2, 3, 4)))


def _shortcut(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm3d(outputs)
    )


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

    def __init__(
        self, num_classes: int, variant: str = "printed", pretrained: str | None = None, **sizes
    ):
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
        require(pretrained is None, "weights", pretrained, "a .safetensors file or None")
        return NarrowResNet(width), 16 * 4 * width


class NarrowResNet(nn.Module):
    """ResNet of three stages, one basic block each, on small frames (no pooling in the stem).

    Its features are pooled to 4×4 cells, not to one: a motion is told from *where* things are in
    each frame, and a narrow network has no channels to spare for encoding that.
    """

    def __init__(self, width: int):
        super().__init__()

        def down(inputs):
            return nn.Sequential(
                nn.Conv2d(inputs, 2 * inputs, 1, 2, bias=False), nn.BatchNorm2d(2 * inputs)
            )

        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.layer1 = resnet.BasicBlock(width, width)
        self.layer2 = resnet.BasicBlock(width, 2 * width, 2, down(width))
        self.layer3 = resnet.BasicBlock(2 * width, 4 * width, 2, down(2 * width))

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (N, 3, H, W) to features (N, 16·4·width)."""
        features = self.layer3(self.layer2(self.layer1(self.stem(frames))))
        return F.adaptive_avg_pool2d(features, 4).flatten(1)


def out_of_place(model: nn.Module) -> nn.Module:
    """Replace in-place operations, which break hooks on their inputs, by their equals; in place.

    Turns off the ``inplace`` flag of activations, and the ``out += residual`` of torchvision's
    residual blocks. Outputs, parameters and their names stay as they are.
    """
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        if type(module) in _RESIDUAL:
            module.__class__ = _RESIDUAL[type(module)]
    return model


class _VideoBlock(video_resnet.BasicBlock):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv2(self.conv1(x)) + residual)


class _VideoBottleneck(video_resnet.Bottleneck):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + residual)


class _ImageBlock(resnet.BasicBlock):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + residual)


class _ImageBottleneck(resnet.Bottleneck):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + residual)


_OURS = (_VideoBlock, _VideoBottleneck, _ImageBlock, _ImageBottleneck)
_RESIDUAL = {ours.__base__: ours for ours in _OURS}


def is_compiled(model: nn.Module) -> bool:
    """Tell whether `prepare` compiled the model: then it calls no hooks."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextlib.contextmanager
def uncompiled(model: nn.Module):
    """Let a model that `prepare` compiled run layer by layer inside, so that hooks are called."""
    if not is_compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):  # it holds from being made, not from ``with`` on
        yield


@contextlib.contextmanager
def frozen(model: nn.Module):
    """Evaluation mode and no parameter gradients inside; everything as it was afterwards.

    Holds also when the body raises or is interrupted. An ``nn.LSTM`` and its kin cannot be
    differentiated by cuDNN in evaluation mode, so cuDNN is not used for models that contain one.
    Memory that is freed inside is kept at hand, see `stepkit.memory`.
    """
    modes = [(module, module.training) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    recurrent = any(isinstance(module, nn.RNNBase) for module, _ in modes)
    try:
        model.eval()
        for parameter, _ in learning:
            parameter.requires_grad_(False)
        cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
        with cudnn, kept():
            yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in learning:
            parameter.requires_grad_(requires_grad)


def device_of(model: nn.Module, default) -> torch.device:
    """Return where the model's parameters live; ``default`` for a model that has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device(default)


def fitting(work: Callable[[], object], device: torch.device) -> int:
    """Return how many clips fit into a CUDA device at once, when ``work`` does one.

    Its peak into four fifths of the memory that is free; what larger batches need beside takes the
    rest.
    """
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - held
    torch.cuda.reset_peak_memory_stats(device)
    work()
    taken = torch.cuda.max_memory_allocated(device) - held
    return max(1, int(0.8 * free / max(1, taken)))


def check_model(model: nn.Module, clips: Tensor, gradient: bool = False) -> int:
    """Try the model on a few clips and return K, its number of classes.

    Raises
    ------
    ValueError
        The output is no (N, K) tensor; holds NaN; its rows are probabilities already (softmax
        would be applied twice, and every attribution would be wrong in silence). With
        ``gradient=True`` also: no gradient reaches the clips, as behind a ``torch.no_grad``.
    """
    with torch.set_grad_enabled(gradient), uncompiled(model):  # once is not worth compiling for
        clips = clips.detach().requires_grad_(gradient)
        logits = model(clips)
    check_logits(logits, len(clips))
    require(bool(torch.isfinite(logits).all()), "model", "NaN or infinity", "finite logits")
    if gradient:
        # weights break the symmetry of a classifier whose logits sum to a constant
        weighted = (logits * torch.arange(1, 1 + logits.shape[1]).to(logits)).sum()
        slope = (
            torch.autograd.grad(weighted, clips, allow_unused=True)[0]
            if logits.requires_grad
            else None
        )
        reaches = slope is not None and bool((slope != 0).any())
        expected = "a model that is differentiable with respect to the clips"
        require(reaches, "model", "no gradient at the clips", expected)
    return logits.shape[1]


def check_logits(logits: object, n: int) -> int:
    """Return K of what a model returned for ``n`` clips, or raise as `check_model` does."""
    given = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    shaped = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == n
    require(shaped, "model", f"output {given} for {n} clips", "logits (N, K)")
    values = logits.detach()
    sums = values.sum(1)
    simplex = values.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
    several = logits.shape[1] > 1
    require(not (simplex and several), "model", "probabilities (rows sum to 1)", "logits")
    return logits.shape[1]


def find_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """Return the layer that activation methods look at.

    ``name`` as in ``model.named_modules()``. By default the attribute ``cam_layer`` of models that
    carry one, and for torchvision's video models the last layer where space is left and that the
    classifier listens to: the last stage of a ResNet and of S3D, the last normalisation of a Swin
    transformer, the last block but one of an MViT (of the last, only the class token is read). For
    any other model it has to be named: which of its layers comes last, no list of layers tells.

    Raises
    ------
    ValueError
        No such layer, or none known for this model; lists those that there are.
    """
    layers = {key: layer for key, layer in model.named_modules() if key}
    name = _usual_layer(model) if name is None else name
    given = "no name, and no default for this model" if name is None else repr(name)[:80]
    convolutions = [key for key, layer in layers.items() if isinstance(layer, _CONVOLUTIONS)]
    usual = f"layer={convolutions[-1]!r}, the last convolution, or " if convolutions else ""
    known = isinstance(name, str) and name in layers
    require(known, "layer", given, f"{usual}one of {', '.join(layers)}")
    return layers[name]


_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def _usual_layer(model: nn.Module) -> str | None:
    """Return the name of `find_layer`'s default."""
    if isinstance(model, VideoResNet):
        usual = "layer4"
    elif isinstance(model, S3D):
        usual = f"features.{len(model.features) - 1}"
    elif isinstance(model, SwinTransformer3d):
        usual = "norm"
    elif isinstance(model, MViT):
        usual = f"blocks.{len(model.blocks) - 2}"
    else:
        usual = None
    return getattr(model, "cam_layer", usual)


def probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Return Φ_c, the softmax probability (N,) of each row's target."""
    return logits.softmax(1).gather(1, targets[:, None])[:, 0]
