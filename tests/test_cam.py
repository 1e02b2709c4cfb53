"""The CAM family: twins, second witnesses, layers of every layout, known answers."""

import functools
import math

import pytest
import reference
import torch
from test_models import same_state, state_of
from torch import nn
from torchvision.models import video
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

from stepkit import attribute, load_model
from stepkit.attribution._cells import readings, record_layer
from stepkit.attribution.cam import upsample
from stepkit.models import find_layer

FAMILY = ("cam", "grad_cam", "grad_cam_pp", "score_cam")


def clips(n=2, T=4, H=24, W=32, seed=0):
    return torch.randn(n, 3, T, H, W, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two convolutions, ReLU, average, one linear layer; ``layout`` turns the layer's output."""

    cam_layer = "out"

    def __init__(self, steps=2, layout="as it comes", side=4):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            self.first = nn.Conv3d(3, 6, (steps, side, side), (steps, side, side))
            self.second = nn.Conv3d(6, 5, (1, 3, 3), padding=(0, 1, 1))
            self.fc = nn.Linear(5, 3)
            nn.init.normal_(self.fc.weight)
        there, self.back = LAYOUTS[layout]
        self.out = Turn(there)

    def forward(self, x):
        a = self.second(self.first(x).relu_()).relu_()
        turned = self.out(a)
        return self.fc(self.back(turned, a).mean((2, 3, 4)))


class Turn(nn.Module):
    def __init__(self, turn):
        super().__init__()
        self.turn = turn

    def forward(self, a):
        return self.turn(a)


def tokens(a):
    return a.flatten(2).transpose(1, 2)  # (N, K, t, h, w) -> (N, thw, K)


def with_class_token(x):
    return torch.cat([x.mean(1, keepdim=True), x], 1)


def frames(a):
    return a.transpose(1, 2).flatten(0, 1)  # (N·t, K, h, w)


def from_frames(x, a):
    return x.unflatten(0, (len(a), -1)).transpose(1, 2)


def from_tokens(x, a):
    return x.transpose(1, 2).unflatten(2, a.shape[2:])


def image_tokens(a):
    return frames(a).flatten(2).transpose(1, 2)  # (N·t, hw, K)


def from_image_tokens(x, a):
    return from_frames(x.transpose(1, 2).unflatten(2, a.shape[3:]), a)


def in_time(x, n, size, **told):
    return readings(x.shape, n, size, **told)[0]([x], n)


LAYOUTS = {
    "as it comes": (lambda a: a, lambda x, a: x),
    "in a tuple": (lambda a: (a, "more"), lambda x, a: x[0]),
    "channels last": (lambda a: a.movedim(1, -1), lambda x, a: x.movedim(-1, 1)),
    "tokens": (tokens, from_tokens),
    "class token": (lambda a: with_class_token(tokens(a)), lambda x, a: from_tokens(x[:, 1:], a)),
    "frames": (frames, from_frames),
    "frames, channels last": (
        lambda a: frames(a).movedim(1, -1),
        lambda x, a: from_frames(x.movedim(-1, 1), a),
    ),
    "tokens of frames": (image_tokens, from_image_tokens),
    "class token of frames": (
        lambda a: with_class_token(image_tokens(a)),
        lambda x, a: from_image_tokens(x[:, 1:], a),
    ),
}


def layer_and_slope(model, clip, target):
    """A and ∂logit/∂A of one clip, (K, t, h, w) in float64."""
    kept = {}
    handle = model.out.register_forward_hook(lambda m, i, o: kept.update(a=o))
    logit = model(clip[None])[0, target]
    handle.remove()
    (slope,) = torch.autograd.grad(logit, kept["a"])
    return kept["a"][0].detach(), slope[0]


# ------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("size", [(4, 24, 32), (6, 20, 28), (5, 23, 31)])
def test_cam_equals_its_literal_twin(size):
    model, x = Net(), clips(2, *size)
    found = attribute("cam", model, x, [0, 2])
    double = Net().double()
    for i, target in enumerate((0, 2)):
        a, _ = layer_and_slope(double, x[i].double(), target)
        expected = reference.enlarge(reference.cam(a, double.fc.weight[target].detach()), *size)
        torch.testing.assert_close(found[i], expected.float(), rtol=1e-4, atol=1e-6)
    assert (found < 0).any(), "CAM has no ReLU"


def test_grad_cam_pp_equals_its_literal_twin():
    model, x = Net(), clips(2)
    found = attribute("grad_cam_pp", model, x, [0, 2])
    double = Net().double()
    for i, target in enumerate((0, 2)):
        cells = reference.grad_cam_pp(*layer_and_slope(double, x[i].double(), target))
        expected = reference.enlarge(cells, *x.shape[2:]).float()
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)
    assert found.amax() > 0


def test_grad_cam_pp_leaves_out_one_factor_of_the_clip():
    # the derivatives of Y = exp(S) themselves, by autograd, for a score S that is linear in A
    g = torch.Generator().manual_seed(0)
    a = torch.rand(3, 1, 2, 2, generator=g, dtype=torch.float64)
    w = torch.randn(3, 1, 2, 2, generator=g, dtype=torch.float64)
    weight = torch.zeros(3, dtype=torch.float64)
    for k in range(3):
        for i in range(2):
            for j in range(2):
                v = a[k, 0, i, j].clone().requires_grad_()
                y = torch.exp((w * a).sum() - (w * a)[k, 0, i, j] + w[k, 0, i, j] * v)
                (d1,) = torch.autograd.grad(y, v, create_graph=True)
                (d2,) = torch.autograd.grad(d1, v, create_graph=True)
                (d3,) = torch.autograd.grad(d2, v)
                weight[k] += d2 / (2 * d2 + a[k].sum() * d3) * d1.clamp(min=0)
    printed = (weight[:, None, None, None] * a).sum(0).clamp(min=0)
    ours = reference.grad_cam_pp(a, w)
    torch.testing.assert_close(printed, ours * torch.exp((w * a).sum()))


def test_score_cam_equals_its_literal_twin():
    model, x = Net(), clips(2, 4, 12, 16)
    found = attribute("score_cam", model, x, [0, 2])
    double = Net().double()
    for i, target in enumerate((0, 2)):
        a, _ = layer_and_slope(double, x[i].double(), target)

        def score(clip, target=target):
            with torch.no_grad():
                return double(clip[None])[0, target].item()

        cells = reference.score_cam(score, x[i].double(), a)
        expected = reference.enlarge(cells, *x.shape[2:]).float()
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)


def test_up_sampling_equals_its_literal_twin():
    cells = torch.rand(1, 3, 2, 5, dtype=torch.float64)
    expected = reference.enlarge(cells[0], 8, 7, 11)
    torch.testing.assert_close(upsample(cells, (8, 7, 11))[0], expected)
    torch.testing.assert_close(
        upsample(cells[:, :1, :1, :1], (3, 4, 5))[0], cells[0, :1, :1, :1].expand(3, 4, 5)
    )


@pytest.mark.parametrize("model", [Net(), load_model("r2plus1d_narrow", 3)])
def test_where_cam_applies_grad_cam_is_its_positive_part(model):
    # ∂logit/∂A is then w over the number of cells, everywhere
    x = clips()
    with record_layer(model, len(x)) as seen, torch.no_grad():
        model(x)
    kept = seen.kept
    count = kept[0][0, 0].numel()
    cells = torch.einsum("nk,nkthw->nthw", model.fc.weight[[0, 2]].detach(), kept[0])
    assert (cells > 0).any()
    assert (cells < 0).any()
    for name, expected in (("cam", cells), ("grad_cam", cells.relu() / count)):
        found = attribute(name, model, x, [0, 2])
        torch.testing.assert_close(found, upsample(expected, x.shape[2:]), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- second witnesses


def at_one_step(found, x):
    """A witness's cells (N, 1, h, w), up-sampled as ours are."""
    cells = torch.as_tensor(found).detach()
    size = x.shape[3:]
    return nn.functional.interpolate(cells, size, mode="bilinear").expand(-1, x.shape[2], -1, -1)


@pytest.mark.parametrize("name", ["grad_cam", "cam"])
def test_agrees_with_captum_at_one_time_step(name):
    attr = pytest.importorskip("captum.attr")
    model, x, targets = Net(steps=4), clips(), torch.tensor([2, 0])
    witness = attr.LayerGradCam(model, model.out)
    found = witness.attribute(x, target=targets, relu_attributions=name == "grad_cam")
    if name == "cam":  # without its ReLU, Grad-CAM is CAM over the number of cells
        found = found * found[0, 0].numel()
    expected = at_one_step(found[:, 0], x)
    torch.testing.assert_close(attribute(name, model, x, targets), expected, rtol=1e-4, atol=1e-6)


# not grad_cam_pp: torchcam 0.5.0 divides a copy by the denominator of α, and goes on without
@pytest.mark.parametrize("name", ["cam", "grad_cam", "score_cam"])
def test_agrees_with_torchcam_at_one_time_step(name):
    methods = pytest.importorskip("torchcam.methods")
    # cells of an odd side: a pixel lies in the middle of each, so that its Score-CAM, which brings
    # channels to [0, 1] before it enlarges them and not after, does the same as the paper
    model, x, targets = Net(steps=4, side=3).eval(), clips(W=33), [2, 0]
    witness = {
        "cam": functools.partial(methods.CAM, fc_layer="fc"),
        "grad_cam": methods.GradCAM,
        "score_cam": methods.ScoreCAM,
    }[name](model, "out", input_shape=tuple(x.shape[1:]))
    cells = witness(targets, model(x), normalized=False)[0]
    witness.remove_hooks()
    found, expected = attribute(name, model, x, targets), at_one_step(cells, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "witness"), [("grad_cam", "GradCAM"), ("grad_cam_pp", "PP")])
def test_agrees_with_pytorch_grad_cam_at_one_time_step(name, witness):
    library = pytest.importorskip("pytorch_grad_cam")
    kind = library.GradCAMPlusPlus if witness == "PP" else library.GradCAM
    outputs = pytest.importorskip("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    model, x, targets = Net(steps=4).eval(), clips(), [2, 0]
    with torch.no_grad():
        model.fc.weight *= 1000  # it adds 1e-6 to the denominator of α, which is to be nothing
    wanted = [outputs(c) for c in targets]
    with kind(model, [model.out]) as cam:
        cam.outputs = cam.activations_and_grads(x)
        sum(t(o) for t, o in zip(wanted, cam.outputs, strict=True)).backward()
        kept = cam.activations_and_grads
        image = cam.get_cam_image(
            x, model.out, wanted, kept.activations[0].numpy(), kept.gradients[0].numpy()
        )
    expected = at_one_step(torch.from_numpy(image).relu(), x)
    torch.testing.assert_close(attribute(name, model, x, targets), expected, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "as it comes"])
@pytest.mark.parametrize("method", FAMILY)
def test_the_layout_of_the_layer_changes_nothing(method, layout):
    x = clips(3)
    plain = attribute(method, Net(), x, [0, 1, 2])
    turned = attribute(method, Net(layout=layout), x, [0, 1, 2])
    torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "size", "cells"),
    [
        ((1, 393, 4), (16, 224, 224), (8, 7, 7)),  # an MViT, its class token in front
        ((1, 1568, 4), (16, 224, 224), (8, 14, 14)),  # a VideoMAE
        ((2, 16 * 8 * 12, 4), (16, 128, 192), (16, 8, 12)),
    ],
)
def test_tokens_lie_as_the_convolutions_that_ran_did(shape, size, cells):
    x = torch.arange(math.prod(shape)).reshape(shape)
    found = in_time(x, shape[0], size, seen={(8, 56, 56), cells})
    assert found.shape == (shape[0], shape[2], *cells)
    assert torch.equal(found.flatten(2), x[:, shape[1] - math.prod(cells) :].transpose(1, 2))


def test_tokens_that_could_lie_in_two_ways_need_a_grid():
    x, size = torch.rand(1, 1568, 4), (16, 224, 224)
    with pytest.raises(ValueError, match=r"1568 tokens, .*\(8, 14, 14\).*grid=\(T', H', W'\)"):
        in_time(x, 1, size)
    assert in_time(x, 1, size, grid=(8, 14, 14)).shape == (1, 4, 8, 14, 14)
    for wrong in ((8, 14, 13), (8, 196), "8x14x14", (8, 14, 14.0)):
        with pytest.raises(ValueError, match="grid: got"):
            in_time(x, 1, size, grid=wrong)
    with pytest.raises(ValueError, match="31 tokens, no even division"):
        in_time(torch.rand(1, 31, 4), 1, size)


def test_grid_says_which_axis_holds_the_channels():
    x = torch.rand(1, 4, 3, 4, 4)  # (K, T', H', W'), or (T', H', W', K)?
    assert in_time(x, 1, (4, 16, 16)).shape == (1, 4, 3, 4, 4)
    assert in_time(x, 1, (4, 12, 16), grid=(4, 3, 4)).shape == (1, 4, 4, 3, 4)
    with pytest.raises(ValueError, match=r"grid: got \(2, 3, 4\)"):
        in_time(x, 1, (4, 12, 16), grid=(2, 3, 4))


def test_layers_of_no_known_layout_are_refused():
    for shape in ((2, 8), (3, 4, 2, 6, 6), (5, 4, 6, 6)):
        with pytest.raises(ValueError, match=r"layer: got output .*tokens \(N, L, K\)"):
            in_time(torch.rand(shape), 2, (4, 24, 24))


# -------------------------------------------------------------------------------- video networks


def small_mvit(H=32, W=32):
    def block(inputs, stride, kv):
        return MSBlockConfig(2, inputs, 32, [3, 3, 3], [3, 3, 3], stride, kv)

    blocks = [block(16, [1, 1, 1], [1, 2, 2]), block(32, [1, 2, 2], [1, 1, 1])]
    blocks.append(block(32, [1, 1, 1], [1, 1, 1]))
    modern = {"residual_pool": True, "residual_with_cls_embed": False, "proj_after_attn": True}
    return MViT((H, W), 8, blocks, rel_pos_embed=True, num_classes=3, **modern).eval()


def small_swin():
    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=3).eval()


@pytest.mark.parametrize("W", [32, 64])
@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp", "score_cam"])
def test_mvit_is_looked_at_on_its_own_grid(method, W):
    torch.manual_seed(0)
    model, x, noted = small_mvit(W=W), clips(2, 8, 32, W), []
    assert find_layer(model) is model.blocks[1]
    handle = model.blocks[1].register_forward_hook(lambda m, i, o: noted.append(o[1]))
    found = attribute(method, model, x, [0, 2])
    handle.remove()
    assert set(noted) == {(4, 4, W // 8)}  # what the network itself says of its tokens
    assert found.shape == (2, 8, 32, W)
    asked = attribute(method, model, x, [0, 2], grid=noted[0])
    torch.testing.assert_close(found, asked, rtol=1e-4, atol=1e-8)
    assert found.amax() > 0


def test_the_last_block_of_an_mvit_is_refused_for_only_its_class_token_is_read():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="layer: got tokens of which only the class token counts"):
        attribute("grad_cam", small_mvit(), clips(1, 8, 32, 32), 0, layer="blocks.2")


@pytest.mark.parametrize("method", FAMILY)
def test_swin_is_looked_at_with_its_channels_last(method):
    torch.manual_seed(0)
    model, x = small_swin(), clips(2, 4, 32, 40)
    with record_layer(model, len(x), "norm") as seen, torch.no_grad():
        model(x)
    kept = seen.kept
    assert kept[0].shape == (2, 2, 4, 5, 32)
    found = attribute(method, model, x, 1)
    if method == "cam":
        a, w = kept[0], model.head.weight[1].detach()
        torch.testing.assert_close(found, upsample(a @ w, x.shape[2:]), rtol=1e-4, atol=1e-6)
    assert found.shape == (2, 4, 32, 40)
    assert found.amax() > 0


def s3d(pool):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = video.s3d(num_classes=3).eval()
    model.avgpool = nn.AvgPool3d(pool, stride=1)  # (2, 7, 7) in the original: frames of 209 px
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = 1e-6  # fresh weights: the signal would fade
    return model


def test_cam_finds_a_classifier_that_is_a_convolution():
    model, x = s3d((2, 2, 2)), clips(1, 16, 64, 64)
    with record_layer(model, len(x)) as seen, torch.no_grad():
        model(x)
    kept = seen.kept
    weight = model.classifier[1].weight.flatten(1).detach()
    expected = upsample(torch.einsum("k,nkthw->nthw", weight[2], kept[0]), x.shape[2:])
    torch.testing.assert_close(attribute("cam", model, x, 2), expected, rtol=1e-3, atol=1e-9)


class LastStep(Net):
    """Only the last time step is classified: no average."""

    def forward(self, x):
        return self.fc(self.out(self.second(self.first(x).relu()).relu())[:, :, -1].mean((2, 3)))


@pytest.mark.parametrize("model", [LastStep(), load_model("r50l_narrow", 3), small_mvit()])
def test_cam_says_what_it_needs(model):
    T = 8 if isinstance(model, MViT) else 4
    with pytest.raises(ValueError, match=r"^cam: needs .* an average over time and space"):
        attribute("cam", model, clips(1, T, 32, 32), 0)


def test_cam_takes_the_average_of_image_models_over_frames():
    class Frames(Net):  # logits of each frame, averaged: a linear classifier of the average
        def forward(self, x):
            a = self.out(frames(self.second(self.first(x).relu()).relu()))
            return self.fc(a.mean((2, 3))).unflatten(0, (len(x), -1)).mean(1)

    x = clips(2)
    torch.testing.assert_close(
        attribute("cam", Frames(), x, 1), attribute("cam", Net(), x, 1), rtol=1e-4, atol=1e-6
    )


def test_default_layers_of_torchvisions_families():
    for build, layer in ((video.r3d_18, "layer4"), (video.s3d, "features.15")):
        with torch.device("meta"):
            model = build()
        assert find_layer(model) is model.get_submodule(layer)
    swin = small_swin()
    assert find_layer(swin) is swin.norm
    named = Net()
    assert find_layer(named) is named.out


def test_a_layer_that_cannot_be_used_is_refused():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle, self.aside = nn.Conv3d(3, 2, 1), nn.Conv3d(3, 2, 1)

        def forward(self, x):
            self.aside(x)
            return super().forward(x)

    for method in ("grad_cam", "grad_cam_pp"):
        with pytest.raises(ValueError, match="layer: got one that did not run"):
            attribute(method, Idle(), clips(), 0, layer="idle")
        with pytest.raises(ValueError, match="layer: got one that the score does not depend on"):
            attribute(method, Idle(), clips(), 0, layer="aside")
    with pytest.raises(ValueError, match=r"layer: got 'nowhere', .*one of .*first, second.*fc"):
        attribute("score_cam", Idle(), clips(), 0, layer="nowhere")


# --------------------------------------------------------------------------- what the door promises


@pytest.mark.parametrize("method", FAMILY)
def test_neither_batch_size_nor_seed_nor_neighbours_matter(method):
    x = clips(5)
    whole = attribute(method, Net(), x, [0, 1, 2, 1, 0], batch_size=8)
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"seed": 7}):
        again = attribute(method, Net(), x, [0, 1, 2, 1, 0], **options)
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-6)
    alone = attribute(method, Net(), x[3:4], 1)
    torch.testing.assert_close(alone, whole[3:4], rtol=1e-4, atol=1e-6)


def test_score_cam_keeps_to_its_batch_size_and_skips_constant_channels():
    sizes = []

    class Counts(Net):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    attribute("score_cam", Counts(), clips(3), 0, batch_size=2)
    assert max(sizes) == 2
    tried = 3  # one clip, and it beside another
    assert sum(sizes) == tried + 3 + 3 * 5  # the activations, five channels a clip
    model = Net()
    nn.init.zeros_(model.second.weight)  # every channel is constant: nothing to say
    assert attribute("score_cam", model, clips(), 0).abs().max() == 0


class Fails(Net):
    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, x):
        self.calls += 1
        found = super().forward(x)  # every hook has run
        if self.calls == self.at:
            raise self.error
        return found


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", FAMILY)
def test_the_model_is_as_it_was(method, error):
    model = Fails(4 if error else math.inf, error)  # the model has been tried in three passes
    before = state_of(model)
    if error:
        with pytest.raises(error):
            attribute(method, model, clips(), 0, batch_size=1)
    else:
        attribute(method, model, clips(), 0)
    assert same_state(before, state_of(model))


# ------------------------------------------------------------------------------------ known answers


class Colours(nn.Module):
    """Sees red and blue squares of 8 px: red speaks for class 1, blue for class 0."""

    cam_layer = "relu"

    def __init__(self):
        super().__init__()
        self.see, self.relu = nn.Conv3d(3, 2, (2, 8, 8), (2, 8, 8)), nn.ReLU(inplace=True)
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.see.weight.zero_()
            self.see.weight[0, 0] = self.see.weight[1, 2] = 1 / 128
            self.see.bias.fill_(-0.5)
            self.fc.weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]) * 500)

    def forward(self, x):
        return self.fc(self.relu(self.see(x)).mean((2, 3, 4)))


def squares(n=40, T=4, H=40, W=56, seed=0):
    """Dim noise with one red and one blue square, which stay where they are; and both regions."""
    g = torch.Generator().manual_seed(seed)
    x = 0.2 * torch.randn(n, 3, T, H, W, generator=g)
    regions = torch.zeros(n, 2, T, H, W, dtype=torch.bool)
    for i in range(n):
        places = torch.randperm((H // 8) * (W // 8), generator=g)[:2].tolist()
        for colour, place in zip((0, 1), places, strict=True):
            top, left = 8 * (place // (W // 8)), 8 * (place % (W // 8))
            regions[i, colour, :, top : top + 8, left : left + 8] = True
            x[i, 2 * colour, :, top : top + 8, left : left + 8] += 1
    return x, regions


def hit_rate(maps, regions):
    at = maps.flatten(1).argmax(1)
    return float(regions.flatten(1).gather(1, at[:, None]).float().mean())


@pytest.mark.parametrize("method", FAMILY)
def test_points_at_the_square_that_speaks_for_the_class(method):
    x, regions = squares()
    for target, colour in ((1, 0), (0, 1)):
        found = attribute(method, Colours(), x, target, batch_size=40)
        assert hit_rate(found, regions[:, colour]) >= 0.95
    assert hit_rate(torch.rand(len(x), *x.shape[2:]), regions[:, 0]) < 0.2


def test_random_hits_are_what_chance_gives_by_area():
    _, regions = squares()
    assert regions[:, 0].float().mean() == pytest.approx(1 / 35)


def test_time_steps_are_weighted_each_by_itself():
    class Late(Net):  # only the second half of the clip reaches the logits
        def forward(self, x):
            a = self.out(self.second(self.first(x).relu()).relu())
            return self.fc(a[:, :, a.shape[2] // 2 :].mean((2, 3, 4)))

    for method in ("grad_cam", "grad_cam_pp"):
        found = attribute(method, Late(), clips(2, 8), 1)
        assert found[:, :4].abs().max() == 0
        assert found[:, 4:].max() > 0
