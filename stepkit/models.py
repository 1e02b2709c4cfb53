"""Video classifiers: the paper's two (§V-A.2), narrow members of their families, and any other.

A model is any ``nn.Module`` that maps clips (N, 3, T, H, W) to logits (N, K); Φ_c is the softmax
probability of class c. Nothing in stepkit asks for more than that.
"""

import collections
import contextlib
import math
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
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

from stepkit.adapt import Wrapped
from stepkit.checks import finite, one_of, require, warn
from stepkit.files import is_altered
from stepkit.memory import kept
from stepkit.scores import PROBABILITY, Score


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

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them; others need scales beside them


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
    found, wanted = {}, model.state_dict()
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in names}
            needed = {key: tuple(value.shape) for key, value in wanted.items()}
            differ = sorted({key[:60] for key, _ in shapes.items() ^ needed.items()})
            given = f"other tensors: {differ[:3]}"
            require(not differ, f"weights {path}", given, "those of the model")
            for key, value in wanted.items():
                kind = file.get_slice(key).get_dtype()
                fits = (kind in FLOATS) == value.is_floating_point()
                tensor = file.get_tensor(key) if fits else value
                fits = fits and (kind in FLOATS or tensor.dtype == value.dtype)
                require(fits, f"weights {path}", f"{kind} as {key}", f"{value.dtype}")
                found[key] = tensor.to(value.dtype)
                require(finite(found[key]), f"weights {path}", f"NaN or inf in {key}", "numbers")
        damaged = is_altered(Path(path))
    except SafetensorError as error:
        raise ValueError(f"weights: got {path}, expected a .safetensors file ({error})") from None
    require(not damaged, "weights", f"{path}, damaged", "the file as it was written, by its hash")
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
    """Tell whether ``torch.compile`` or `prepare` compiled the model: then it calls no hooks."""
    return isinstance(model, OptimizedModule) or any(
        module._compiled_call_impl is not None for module in model.modules()
    )


@contextlib.contextmanager
def uncompiled(model: nn.Module):
    """Let a compiled model run layer by layer inside, so that hooks are called."""
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
    A ``torch.inference_mode`` around the call, which knows no gradients, is left for its length.
    Memory that is freed inside is kept at hand, see `stepkit.memory`.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with contextlib.ExitStack() as within:
        within.callback(_thaw, model)  # also of an interrupt on the way
        _freeze(model)
        if torch.is_inference_mode_enabled():
            within.enter_context(torch.inference_mode(False))
            within.enter_context(torch.no_grad())  # as outside
        within.enter_context(cudnn)
        within.enter_context(kept())
        yield model


_frozen = weakref.WeakKeyDictionary()  # how often, and how every part was before
_freezing = threading.Lock()


def _freeze(model: nn.Module) -> None:
    """Freeze a model; threads may overlap: the first keeps how it was."""
    with _freezing:
        if model not in _frozen:
            modes = [(part, part.training) for part in model.modules()]
            learning = [(values, values.requires_grad) for values in model.parameters()]
            _frozen[model] = [1, modes, learning]
            model.eval()
            model.requires_grad_(False)
        else:
            _frozen[model][0] += 1


def _thaw(model: nn.Module) -> None:
    """Bring back how a frozen model was, when the last thread leaves it."""
    with _freezing:
        if model not in _frozen:
            return
        _frozen[model][0] -= 1
        if not _frozen[model][0]:
            _, modes, learning = _frozen.pop(model)
            for part, training in modes:
                part.training = training
            for values, requires_grad in learning:
                values.requires_grad_(requires_grad)


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


def called(model: nn.Module, clips: Tensor) -> object:
    """Return what the model makes of clips; an error of its own becomes one that says what to do.

    Raises
    ------
    ValueError
        Whatever the model raised, but for a lack of memory.
    """
    try:
        return model(clips)
    except Exception as error:
        if "memory" in str(error):  # torch.OutOfMemoryError, and its kin of the CPU
            raise
        told = " ".join(str(error).split())[:300]
        given = f"{type(error).__name__} ({told}) for clips {tuple(clips.shape)}, {clips.dtype}"
        expected = "a network that takes them; sk.wrap adapts layout, precision and pathways"
        raise ValueError(f"model: got {given}, expected {expected}") from error


def check_model(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    score: Score = PROBABILITY,
    gradient: bool = False,
    together: int = 2,
) -> Tensor:
    """Try the model on the first clips and return their score (n,).

    ``targets`` (N,) may be those of more clips, which are still to come. A model that has not been
    seen before is shown the first clip twice, beside another one if it may get two ``together``: a
    warning tells if dropout, batch statistics or any chance give another score.

    Raises
    ------
    ValueError
        The model fails; the score cannot be read off its output, see `stepkit.scores`; NaN; it
        writes into the clips that it is given. With ``gradient=True`` also: no gradient reaches the
        clips, as behind a ``torch.no_grad``.
    """
    with torch.set_grad_enabled(gradient), uncompiled(model):  # once is not worth compiling for
        leaf = clips.detach().clone().requires_grad_(gradient)
        given = leaf * 1  # in-place work on a leaf would be an error of torch's
        output = called(model, given)
        remedy = "a forward that leaves it alone, or sk.wrap(model), which hands it a copy"
        require(torch.equal(given, clips), "model", "a forward that writes into its input", remedy)
        mine = targets[: len(clips)]
        score.tried(output, mine, targets.max())
        found = score(output, mine).detach()
        finite = bool(torch.isfinite(found).all())
        require(finite, "model", f"NaN or infinity in its {score.name}", "finite outputs")
        if gradient:
            _check_gradient(leaf, output, score.logit(output, mine), score)
    if score.name not in _met.get(model, ()):
        _look_again(model, clips[:1], mine[:1], score, found[0], together)
        _met.setdefault(model, set()).add(score.name)
    return found


def _check_gradient(leaf: Tensor, output: object, logit: Tensor, score: Score) -> None:
    if isinstance(output, Tensor) and output.ndim == 2 and score.one_logit:
        # weights break the symmetry of a classifier whose logits sum to a constant
        logit = output * torch.arange(1, 1 + output.shape[1]).to(output)
    try:
        wanted = logit.sum(), leaf
        slope = torch.autograd.grad(*wanted, allow_unused=True) if logit.requires_grad else ()
    except RuntimeError as error:
        told = " ".join(str(error).split())[:200]
        given, expected = f"{type(error).__name__} ({told})", "one that autograd can go through"
        raise ValueError(f"model: got {given} on the way back, expected {expected}") from error
    reaches = any(part is not None and bool((part != 0).any()) for part in slope)
    expected = "a model, and a score, that are differentiable with respect to the clips"
    require(reaches, "model", "no gradient at the clips", expected)


_met = weakref.WeakKeyDictionary()  # the scores by which `check_model` has looked at a model


def meet(model: nn.Module, clip: Tensor, targets: Tensor, score: Score, together: int) -> None:
    """Try a model that has not been seen with this score before, see `check_model`."""
    if score.name not in _met.get(model, ()):
        check_model(model, clip, targets, score, together=together)


def _look_again(model, clip: Tensor, target: Tensor, score: Score, once: Tensor, together: int):
    """Show the clip again, beside another: chance, or what others in the batch change, is seen."""
    both = torch.cat([clip, -10 * clip])
    with torch.no_grad(), uncompiled(model):
        try:
            outputs = [called(model, part) for part in both.split(min(together, 2))]
        except ValueError:  # a network that takes one clip at a time
            outputs = [called(model, part) for part in both.split(1)]
        again = score(outputs[0], target.repeat(2 // len(outputs)))[0]
        if all(isinstance(output, Tensor) for output in outputs):
            score.doubt(torch.cat(outputs))
    sizes = [output.abs().max() for output in outputs[:1] if isinstance(output, Tensor)]
    least = 1e-5 * max([*sizes, once.abs()])  # a margin near 0 is all rounding
    if (once - again).abs() > REPEATS[precision_of(model)] * max(once.abs(), again.abs()) + least:
        warn(
            f"model: its {score.name} of one clip is {once:.4g}, and {again:.4g} when asked again "
            "beside another clip. Is dropout on, or batch statistics? Maps will differ from call "
            "to call, and with batch_size."
        )


# what rounding may change when a clip is seen again in another batch, relative to its score
REPEATS = collections.defaultdict(lambda: 0.1, float64=1e-3, float32=1e-3)


def precision_of(model: nn.Module, default: torch.dtype = torch.float32) -> str:
    """Return in what a model computes, such as "float32": the type of its first parameter."""
    first = next(model.parameters(), None)
    return str(default if first is None else first.dtype).removeprefix("torch.")


def inside(model: nn.Module) -> nn.Module:
    """Return the network that `stepkit.wrap` or ``torch.compile`` holds, whose layers have names.

    Raises
    ------
    ValueError
        It is compiled by TorchScript, whose layers nobody can look at or change.
    """
    while isinstance(model, Wrapped | OptimizedModule):
        model = model.model if isinstance(model, Wrapped) else model._orig_mod
    expected = "the Python module, or a method that does not look at layers (gradient, step, ...)"
    require(not isinstance(model, torch.jit.ScriptModule), "model", "TorchScript", expected)
    return model


def find_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """Return the layer that activation methods look at.

    ``name`` as in ``model.named_modules()``, of the network itself where it is wrapped or compiled.
    By default the attribute ``cam_layer`` of models that carry one, and for torchvision's video
    models the last layer where space is left and that the classifier listens to: the last stage of
    a ResNet and of S3D, the last normalisation of a Swin transformer, the last block but one of an
    MViT (of the last, only the class token is read). For any other model it has to be named: which
    of its layers comes last, no list of layers tells.

    Raises
    ------
    ValueError
        No such layer, or none known for this model; lists those that there are.
    """
    model = inside(model)
    layers = {key: layer for key, layer in model.named_modules() if key}
    name = _usual_layer(model) if name is None else name
    given = "no name, and no default for this model" if name is None else repr(name)[:80]
    usual = _worth_a_try(layers)
    known = isinstance(name, str) and name in layers
    require(known, "layer", given, f"{usual}one of {', '.join(layers)}")
    return layers[name]


def _worth_a_try(layers: dict[str, nn.Module]) -> str:
    """Name the last block but one of a transformer (of the last, often only the class token is
    read), the last convolution of any other network.
    """
    kinds = {type(layer).__name__.lower() for layer in layers.values()}
    lists = [
        (len(layer), name)
        for name, layer in layers.items()
        if isinstance(layer, nn.ModuleList | nn.Sequential) and len({*map(type, layer)}) == 1
    ]
    if lists and max(lists)[0] > 1 and any("attention" in kind for kind in kinds):
        length, name = max(lists)
        return f"layer={name + f'.{length - 2}'!r}, the last block but one, or "
    convolutions = [k for k, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.Conv3d)]
    return f"layer={convolutions[-1]!r}, the last convolution, or " if convolutions else ""


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
