"""Excitation backprop and LRP: worked out by hand, conserved layer by layer, pointing right."""

import math

import pytest
import reference
import torch
from test_models import same_state, state_of
from torch import nn
from torch.nn import functional as F
from torchvision.models.video import r2plus1d_18

from stepkit.attribution import Work
from stepkit.attribution._rules import Rules, relevance
from stepkit.attribution.relevance import excitation_backprop, lrp
from stepkit.models import frozen, out_of_place
from stepkit.models.scores import PROBABILITY
from stepkit.networks import DetachedLSTM, R2Plus1DNarrow, ResNetLSTM, load_model

GAMMAS = (0, 0.25, math.inf)


def clips(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def shaken(model, biases=True, seed=0):
    """Random batch-norms (negative slopes as well) and biases, or none; float64."""
    draw = torch.Generator().manual_seed(seed)

    def fill(tensor, low, high):
        tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=draw))

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            fill(module.weight, -0.5, 1.5)
            fill(module.running_var, 0.5, 2)
            fill(module.running_mean, -0.5 * biases, 0.5 * biases)
        if getattr(module, "bias", None) is not None:
            fill(module.bias, -0.3 * biases, 0.3 * biases)
    return model.double().eval()


def rules_of(kind):
    if kind == "eb":
        return Rules(keep=0, excitatory=True)
    return Rules(1 / (1 + kind))


# --------------------------------------------------------------------------------- by hand


class Dense(nn.Module):
    """Two layers on the clip's voxels, ReLU between them."""

    def __init__(self, voxels, hidden=5, classes=3, biases=True):
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 1, groups=3, bias=False)  # the layer, put out as neurons
        nn.init.ones_(self.conv.weight)
        self.one, self.two = nn.Linear(voxels, hidden, biases), nn.Linear(hidden, classes, biases)

    def forward(self, x):
        return self.two(self.one(self.conv(x).flatten(1)).relu())


def of_hand(rows):
    return rows.tolist()


@pytest.mark.parametrize("target", [0, 2])
def test_eb_of_a_dense_network_is_the_marginal_winning_probability(target):
    torch.manual_seed(0)
    model, x = Dense(3 * 2 * 2 * 3).double(), clips(1, 3, 2, 2, 3).abs()
    hidden = model.one(x.flatten(1)).relu()[0].tolist()
    winning = [float(k == target) for k in range(3)]
    winning, _ = reference.handed_down(winning, hidden, of_hand(model.two.weight), None, math.inf)
    at_x = (winning, x.flatten().tolist(), of_hand(model.one.weight), None, math.inf)
    expected = torch.tensor(reference.handed_down(*at_x)[0]).double().view(x.shape[1:]).sum(0)
    with frozen(model):
        found = excitation_backprop(model, x, torch.tensor([target]), Work(), layer="conv")[0]
    torch.testing.assert_close(found, expected)
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize("epsilon", [0, 0.05])
def test_lrp_of_a_dense_network(epsilon):
    torch.manual_seed(0)
    model, x = Dense(3 * 2 * 2 * 3).double(), clips(1, 3, 2, 2, 3)
    hidden = model.one(x.flatten(1)).relu()[0].tolist()
    logit = model(x)[0, 1].item()
    R = [0, logit, 0]
    for a, layer in ((hidden, model.two), (x.flatten().tolist(), model.one)):
        weights, biases = of_hand(layer.weight), layer.bias.tolist()
        R, _ = reference.handed_down(R, a, weights, biases, 0, epsilon)
    with frozen(model):
        found = lrp(model, x, torch.tensor([1]), Work(), epsilon=epsilon)[0]
    torch.testing.assert_close(found, torch.tensor(R).double().view(x.shape[1:]).sum(0))


class Block(nn.Module):
    """Stem, a residual block whose sum mixes neurons and a convolution's output, pooling, class."""

    def __init__(self, pool):
        super().__init__()
        self.conv0, self.norm0 = nn.Conv3d(3, 2, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(2)
        self.conv1, self.norm1 = nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(2)
        self.conv2 = nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm2, self.pool, self.fc = nn.BatchNorm3d(2), pool, nn.Linear(2, 3)

    def forward(self, x):
        x = F.relu(self.norm0(self.conv0(x)), inplace=True)
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.fc(self.pool(out.relu_()).mean((2, 3, 4)))


def folded(conv, norm, sizes):
    """The convolution and the batch-norm behind it as one matrix, and the biases of each."""
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    old = torch.zeros_like(slope) if conv.bias is None else conv.bias
    kernel = conv.weight * slope[:, None, None, None, None]
    rows, out = reference.convolution_matrix(kernel, sizes, conv.padding)
    biases = old * slope, norm.bias - norm.running_mean * slope
    return rows, [[float(b) for b in bias for _ in range(math.prod(out))] for bias in biases]


def handed_down(parents, activations, layer, gamma):
    """What children receive, and both biases: the convolution's is one more child, of one."""
    rows, biases = layer
    if biases is None:
        return reference.handed_down(parents, activations, rows, None, gamma)
    rows = [[*row, bias] for row, bias in zip(rows, biases[0], strict=True)]
    given = parents, [*activations, 1.0], rows, biases[1]
    below, taken = reference.handed_down(*given, gamma)
    return below[:-1], taken + below[-1]


def block_by_hand(model, x, target, gamma, excitatory):
    """Relevance of the stem's neurons, of the voxels, and of all biases, for one clip."""
    sizes, kept = x.shape[1:], {}
    norms = (model.norm0, model.norm1)
    hooks = [n.register_forward_hook(lambda m, _, y: kept.update({m: y})) for n in norms]
    pooled = model.pool.register_forward_hook(lambda _, i, y: kept.update(i=i[0], y=y))
    logit = float(model(x[None])[0, target])
    for hook in (*hooks, pooled):
        hook.remove()
    first, second = (kept[n].relu()[0].flatten().tolist() for n in norms)
    third, pooled = kept["i"], kept["y"]
    layers = [
        folded(model.conv0, model.norm0, sizes),
        folded(model.conv1, model.norm1, sizes),
        folded(model.conv2, model.norm2, sizes),
    ]
    if excitatory:
        layers = [(rows, None) for rows, _ in layers]

    # class → means → pooled cells → the block's neurons
    means = pooled.mean((2, 3, 4))[0].tolist()
    fc = None if excitatory else model.fc.bias.tolist()
    R = [(1.0 if excitatory else logit) * (k == target) for k in range(3)]
    rows, dense = of_hand(model.fc.weight), math.inf if excitatory else 0
    R, taken = reference.handed_down(R, means, rows, fc, dense)
    cells = torch.zeros_like(pooled[0])
    for k, share in enumerate(R):
        cells[k] = share * pooled[0, k] / pooled[0, k].sum()
    R = torch.zeros_like(third[0])
    step = [n // m for n, m in zip(third.shape[2:], pooled.shape[2:], strict=True)]
    for k, t, y, z in torch.cartesian_prod(*(torch.arange(n) for n in cells.shape)):
        corner = [slice(int(i) * s, (int(i) + 1) * s) for i, s in zip((t, y, z), step, strict=True)]
        window = third[0][(k, *corner)]
        if isinstance(model.pool, nn.MaxPool3d):
            share = (window == window.max()).double()
        else:
            share = window / window.sum()
        R[(k, *corner)] += cells[k, t, y, z] * share.nan_to_num()

    # the block's sum: children are the second neurons, by conv2, and the first, by one each
    n = len(first)
    rows = [[*row, *(float(i == j) for i in range(n))] for j, row in enumerate(layers[2][0])]
    parents = R.flatten().tolist()
    below, bias = handed_down(parents, second + first, (rows, layers[2][1]), gamma)
    taken += bias
    R, straight = below[: len(second)], below[len(second) :]
    R, bias = handed_down(R, first, layers[1], gamma)
    taken += bias
    stem = [a + b for a, b in zip(R, straight, strict=True)]
    voxels, bias = handed_down(stem, x.flatten().tolist(), layers[0], gamma)
    return torch.tensor(stem), torch.tensor(voxels).view(x.shape).sum(0), taken + bias, logit


POOLS = [nn.MaxPool3d(2), nn.AvgPool3d(2)]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_lrp_through_a_residual_block_and_what_the_biases_take(pool, gamma):
    torch.manual_seed(1)
    model, x = shaken(Block(pool)), clips(3, 2, 4, 6)
    with frozen(model):
        _, expected, taken, logit = block_by_hand(model, x, 1, gamma, False)
        found = lrp(model, x[None], torch.tensor([1]), Work(), gamma=gamma, epsilon=0)[0]
    torch.testing.assert_close(found, expected.double())
    assert abs(taken) > 1e-3
    assert float(found.sum()) + taken == pytest.approx(logit)  # the leak, to the last bit of it


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("biases", [True, False])
def test_eb_through_a_residual_block(pool, biases):
    torch.manual_seed(1)
    model, x = shaken(Block(pool), biases), clips(3, 2, 4, 6)
    with frozen(model):
        expected, *_ = block_by_hand(model, x, 1, math.inf, True)
        seen = {}
        model.norm0.register_forward_hook(lambda _, __, y: seen.update(y=y))
        found = excitation_backprop(model, x[None], torch.tensor([1]), Work(), layer="norm0")[0]
    assert (seen["y"] < 0).any()  # the layer's neurons below zero do not win
    expected = expected.double().view(2, *x.shape[1:]).sum(0)
    torch.testing.assert_close(found, expected)
    lost = 1 - float(found.sum())  # by winners that their bias alone excited
    assert lost > 0.5 if biases and isinstance(pool, nn.AvgPool3d) else abs(lost) < 1e-9


class TinyLSTM(ResNetLSTM):
    """R50L with one convolution for a ResNet."""

    cam_layer, widths = "cnn.1", (9, 8, 8)

    @staticmethod
    def backbone(pretrained):
        return nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.ReLU(), nn.Flatten()), 2 * 2 * 3


def lstm_parts(lstm):
    if isinstance(lstm, DetachedLSTM):
        return lstm.input.weight, lstm.state.weight, lstm.input.bias
    return lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0


def through(layers, given, R, excitatory):
    """Hand relevance down a chain of dense layers and ReLUs, one clip, one step."""
    inputs = []
    for layer in layers:
        inputs.append(given)
        given = layer(given)
    for layer, a in reversed(list(zip(layers, inputs, strict=True))):
        if isinstance(layer, nn.Linear):
            bias = None if excitatory else layer.bias.tolist()
            gamma = math.inf if excitatory else 0
            R, _ = reference.handed_down(R, a.tolist(), of_hand(layer.weight), bias, gamma)
    return R


@pytest.mark.parametrize("excitatory", [True, False], ids=["eb", "lrp"])
@pytest.mark.parametrize("variant", ["printed", "released"])
def test_through_time_by_hand(variant, excitatory):
    torch.manual_seed(0)
    model, x, target = TinyLSTM(3, variant).double().eval(), clips(1, 3, 3, 8, 12), 2
    with frozen(model), torch.no_grad():
        features = model.cnn(x[0].transpose(0, 1))  # (T, 12)
        before = [m for m in model.before.modules() if isinstance(m, (nn.Linear, nn.ReLU))]
        after = [m for m in model.after.modules() if isinstance(m, (nn.Linear, nn.ReLU))]
        seen = model.before(features)
        hidden = model.lstm(seen[None])[0]
        logits = model.after(hidden)  # (T, K)
        if variant == "printed":  # its part in the mean softmax
            q = (logits.softmax(1)[:, target] / logits.softmax(1)[:, target].sum()).tolist()
            start = q if excitatory else (torch.tensor(q) * logits[:, target]).tolist()
        elif excitatory:  # its part in the excitation of the mean
            weight = model.after.weight[target].clamp(min=0)
            excitation = hidden @ weight
            start = (excitation / excitation.sum()).tolist()
        else:
            start = (logits[:, target] / 3).tolist()
        R = [
            through(after, h, [s * (k == target) for k in range(3)], excitatory)
            for h, s in zip(hidden, start, strict=True)
        ]
        relu = lambda z: max(z, 0.0)  # noqa: E731
        R = reference.lstm_handed_down(lstm_parts(model.lstm), seen, R, excitatory, relu)
        R = [through(before, f, r, excitatory) for f, r in zip(features, R, strict=True)]
        expected = torch.tensor(R).double().view(3, 2, 2, 3)
        if excitatory:
            found = excitation_backprop(model, x, torch.tensor([target]), Work())
            expected = F.interpolate(expected.sum(1)[None], (8, 12), mode="bilinear")
            assert sum(sum(r) for r in R) == pytest.approx(1)
        else:
            rules, given = Rules(0), x.clone().requires_grad_()
            kept = {}
            hook = model.cnn[1].register_forward_hook(lambda _, __, y: kept.update(y=y))
            with rules, torch.enable_grad():
                out = model(given)
            hook.remove()
            score = rules.score(out, torch.tensor([target]), PROBABILITY)
            (found,) = relevance(score, [kept["y"]], "layer")
    torch.testing.assert_close(found, expected)
    assert expected.abs().amax(tuple(range(1, expected.ndim))).min() > 0  # every step has a part


class WithLSTM(nn.Module):
    """PyTorch's own LSTM, on one number per frame and channel; the class reads the last step."""

    def __init__(self, **options):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True, **options)
        self.fc = nn.Linear(8 if options.get("bidirectional") else 4, 2)

    def forward(self, x):
        return self.fc(self.lstm(x.mean((3, 4)).transpose(1, 2))[0][:, -1])


def test_lrp_through_a_tanh_lstm_by_hand():
    torch.manual_seed(3)
    model, x = WithLSTM().double().eval(), clips(1, 3, 2, 2, 2)
    with frozen(model):
        features = x.mean((3, 4))[0].T
        hidden = model.lstm(features[None])[0][0]
        logit = float(model(x)[0, 1])
        weights, biases = of_hand(model.fc.weight), model.fc.bias.tolist()
        last, _ = reference.handed_down([0, logit], hidden[-1].tolist(), weights, biases, 0)
        R = [[0.0] * 4, last]
        R = reference.lstm_handed_down(lstm_parts(model.lstm), features, R, False, math.tanh)
        share = x[0] / x[0].sum((2, 3), keepdim=True)  # (C, T, H, W)
        expected = (torch.tensor(R).double().T[:, :, None, None] * share).sum(0)
        found = lrp(model, x, torch.tensor([1]), Work(), epsilon=0)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True, "num_layers": 2}])
def test_lrp_through_stacked_lstms_is_conserved(options):
    torch.manual_seed(4)
    model, x = WithLSTM(bias=False, **options).double().eval(), clips(2, 3, 4, 2, 2)
    nn.init.zeros_(model.fc.bias)
    with frozen(model):
        found = lrp(model, x, torch.tensor([0, 1]), Work(), epsilon=0)
        logits = model(x)
    torch.testing.assert_close(found.sum((1, 2, 3)), logits.diagonal())


# ------------------------------------------------------------------------------ conservation


def stages(model, x, kind):
    """Sums of relevance (S, N) at the clip and behind each stage of the network, and its parts."""
    names = ("stem", "layer1", "layer2", "layer3", "layer4", "cnn", "before", "lstm")
    kept, rules = {"": x.clone().requires_grad_()}, rules_of(kind)

    def keep(name):
        return lambda _, __, output: kept.update({name: rules.sum(output)})

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name.split(".")[-1] in names
    ]
    with frozen(model), rules:
        logits = model(kept[""])
    for hook in hooks:
        hook.remove()
    score = rules.score(logits, torch.arange(len(x)), PROBABILITY).sum()
    slopes = torch.autograd.grad(score, list(kept.values()))
    shares = [a.detach() * g for a, g in zip(kept.values(), slopes, strict=True)]
    sums = [share.reshape(len(x), -1).sum(1) for share in shares]  # frames of a clip together
    return torch.stack(sums), shares


SIZES = {"torchvision's r2plus1d_18": (1, 3, 4, 24, 24)}
NETWORKS = {
    "r2plus1d_narrow": lambda: load_model("r2plus1d_narrow", 3),
    "torchvision's r2plus1d_18": lambda: r2plus1d_18(num_classes=3),
    "r50l_narrow, printed": lambda: load_model("r50l_narrow", 3),
    "r50l_narrow, released": lambda: load_model("r50l_narrow", 3, variant="released"),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("gamma", [0.25, math.inf])
def test_lrp_without_biases_keeps_the_logit_at_every_stage(network, gamma):
    torch.manual_seed(0)
    model = shaken(NETWORKS[network](), biases=False)
    x = clips(*SIZES.get(network, (2, 3, 4, 32, 32)))
    sums, _ = stages(model, x, gamma)
    assert len(sums) >= 5
    logits = model(x).detach().diagonal()
    if "printed" in network:  # Σ q_t·s_t, the steps' logits by their part in the mean softmax
        frames = x.transpose(1, 2)
        features = model.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        steps = model.after(model.lstm(model.before(features))).detach()  # (N, T, K)
        p = steps.softmax(2)
        logits = ((p * steps).sum(1) / p.sum(1)).diagonal()
    torch.testing.assert_close(sums, logits.expand_as(sums), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("biases", [True, False])
def test_eb_is_a_probability_at_every_stage(network, biases):
    torch.manual_seed(0)
    model = shaken(NETWORKS[network](), biases)
    x = clips(*SIZES.get(network, (2, 3, 4, 32, 32))).abs()
    sums, shares = stages(model, x, "eb")
    assert len(sums) >= 5
    assert all(share.min() >= 0 for share in shares)
    lost = 1 - sums
    # with biases, where a bias alone excites a winner in the narrow network's stem
    assert lost.abs().max() < (1e-3 if biases and network == "r2plus1d_narrow" else 1e-9)


def test_eb_of_r2plus1d_has_a_closed_form_at_its_default_layer():
    model, x = load_model("r2plus1d_narrow", 4), clips(2, 3, 4, 32, 40).float()
    targets, kept = torch.tensor([3, 1]), {}
    hook = model.layer3.register_forward_hook(lambda _, __, y: kept.update(a=y))
    with frozen(model):
        model(x)
        hook.remove()
        found = excitation_backprop(model, x, targets, Work())
    for n, c in enumerate(targets):
        won = kept["a"][n] * model.fc.weight[c].relu()[:, None, None, None]
        cells = (won / won.sum()).sum(0)
        expected = F.interpolate(cells[None], (32, 40), mode="bilinear")[0]
        for t in range(4):
            torch.testing.assert_close(found[n, t], expected[t * len(cells) // 4])


def test_in_place_blocks_as_they_are_and_out_of_place_agree():
    torch.manual_seed(0)
    model, x = R2Plus1DNarrow(3).eval(), clips(1, 3, 2, 16, 16).float()
    with frozen(model):
        ours = [
            method(model, x, torch.tensor([1]), Work()) for method in (lrp, excitation_backprop)
        ]
        out_of_place(model)
        for method, expected in zip((lrp, excitation_backprop), ours, strict=True):
            assert torch.equal(method(model, x, torch.tensor([1]), Work()), expected)


class Bottleneck(nn.Module):
    """Sums with no activation between them: they are neurons too, below zero as well."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(3, 4, 1, bias=False)
        self.conv2 = nn.Conv3d(4, 4, 1, groups=2, bias=False)
        self.norm, self.fc = nn.BatchNorm3d(4), nn.Conv3d(4, 3, 1, bias=False)

    def forward(self, x):
        x = self.norm(F.avg_pool3d(self.conv2(self.conv1(x)), 2))
        return (0.5 * self.fc(F.silu(x)) / 2).mean((2, 3, 4))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_lrp_is_conserved_through_neurons_below_zero(gamma):
    torch.manual_seed(0)
    model, x = shaken(Bottleneck(), biases=False), clips(3, 3, 2, 4, 4)
    with frozen(model):
        found = lrp(model, x, torch.arange(3), Work(), gamma=gamma)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum((1, 2, 3)), model(x).detach().diagonal())


# -------------------------------------------------------------------------- a second witness


def plain_network():
    torch.manual_seed(2)
    conv = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 8, 3, 2), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU())
    return nn.Sequential(*conv, *head, nn.Linear(12, 3)).double().eval()


@pytest.mark.parametrize("gamma", [0.25, math.inf])
def test_lrp_agrees_with_zennit(gamma):
    rules = pytest.importorskip("zennit.rules")
    attribution = pytest.importorskip("zennit.attribution")
    core, types = pytest.importorskip("zennit.composites"), pytest.importorskip("zennit.types")
    conv = rules.ZPlus(stabilizer=1e-12) if math.isinf(gamma) else rules.Gamma(gamma, 1e-12)
    norm = (nn.AdaptiveAvgPool3d, rules.Norm(1e-12))
    dense = (types.Linear, rules.Epsilon(1e-12))
    passing = (types.Activation, rules.Pass())
    composite = core.LayerMapComposite([(types.Convolution, conv), norm, dense, passing])
    model, x = plain_network(), clips(2, 3, 5, 7, 8)
    with attribution.Gradient(model, composite) as attributor:
        _, expected = attributor(x, lambda y: y * torch.eye(3)[[0, 2]])
    with frozen(model):
        found = lrp(model, x, torch.tensor([0, 2]), Work(), gamma=gamma, epsilon=0)
    torch.testing.assert_close(found, expected.sum(1), rtol=1e-6, atol=1e-10)


def test_eb_agrees_with_zennit():
    attribution = pytest.importorskip("zennit.attribution")
    composites = pytest.importorskip("zennit.composites")
    composite = composites.ExcitationBackprop(stabilizer=1e-12, zero_params="bias")
    model, x = plain_network(), clips(2, 3, 5, 7, 8)
    behind, neurons = model[2:], model[:2](x).detach()
    with attribution.Gradient(behind, composite) as attributor:
        _, expected = attributor(neurons, torch.eye(3)[[0, 2]])
    torch.testing.assert_close(expected.sum((1, 2, 3, 4)), torch.ones(2).double())
    expected = F.interpolate(expected.sum(1), (7, 8), mode="bilinear")
    with frozen(model):
        found = excitation_backprop(model, x, torch.tensor([0, 2]), Work(), layer="1")
    times = torch.arange(5) * expected.shape[1] // 5
    torch.testing.assert_close(found, expected[:, times], rtol=1e-6, atol=1e-10)


# --------------------------------------------------------------------------------- promises


class Detector(nn.Module):
    """Class 0 sees dark squares, class 1 bright ones."""

    def __init__(self):
        super().__init__()
        self.detect = nn.Conv3d(3, 2, (1, 8, 8), stride=(2, 8, 8), bias=False)
        with torch.no_grad():
            self.detect.weight.fill_(5 / 192)[0].neg_()

    def forward(self, clips):
        return self.detect(clips).relu().mean((2, 3, 4))


@pytest.mark.parametrize("method", [lrp, excitation_backprop])
@pytest.mark.parametrize("target", [0, 1])
def test_the_class_is_seen_where_it_is_and_not_where_the_other_is(method, target):
    draw, hits, n = torch.Generator().manual_seed(0), 0, 40
    model = Detector()
    options = {"layer": "detect"} if method is excitation_backprop else {}
    x, places = 0.3 * clips(n, 3, 8, 48, 64).float(), []
    for clip in x:  # two different cells: a dark square in one, a bright one in the other
        cells = torch.randperm(4 * 6 * 8, generator=draw)[:2]
        t, y, z = (int(i[target]) for i in torch.unravel_index(cells, (4, 6, 8)))
        places.append((t, y, z))
        for sign, cell in zip((-1, 1), cells, strict=True):
            at = [int(i) for i in torch.unravel_index(cell, (4, 6, 8))]
            rows, columns = (slice(8 * i, 8 * i + 8) for i in at[1:])
            clip[:, 2 * at[0], rows, columns] = sign
    with frozen(model):
        maps = method(model, x, torch.full((n,), target), Work(), **options)
    for found, (t, y, z) in zip(maps, places, strict=True):
        at = [int(i) for i in torch.unravel_index(found.argmax(), found.shape)]
        hits += (at[0] // 2, at[1] // 8, at[2] // 8) == (t, y, z)
    assert hits / n >= 0.95


@pytest.mark.parametrize("method", [lrp, excitation_backprop])
@pytest.mark.parametrize("name", ["r2plus1d_narrow", "r50l_narrow"])
def test_a_clip_does_not_depend_on_its_neighbours(method, name):
    model, x = load_model(name, 4), clips(3, 3, 4, 24, 32).float()
    targets = torch.tensor([0, 3, 1])
    with frozen(model):
        whole = method(model, x, targets, Work())
        single = torch.cat(
            [method(model, x[n : n + 1], targets[n : n + 1], Work()) for n in range(3)]
        )
    torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-6 * float(whole.abs().max()))
    assert whole.shape == (3, 4, 24, 32)
    assert not whole.requires_grad


class Trouble(nn.Module):
    """Raises in the middle of its second forward pass."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0
        self.net = R2Plus1DNarrow(2)  # blocks with in-place operations, as torchvision has them

    def forward(self, x):
        features = self.net.layer2(self.net.layer1(self.net.stem(x)))
        self.calls += 1
        if self.error and self.calls == 2:
            raise self.error
        return self.net.fc(self.net.layer3(features).mean((2, 3, 4)))


@pytest.mark.parametrize("method", [lrp, excitation_backprop])
@pytest.mark.parametrize("error", [None, RuntimeError("full"), KeyboardInterrupt()])
def test_the_model_is_as_it_was(method, error):
    torch.manual_seed(0)
    model, x = Trouble(error), clips(1, 3, 4, 16, 16).float().requires_grad_()
    options = {"layer": "net.stem"} if method is excitation_backprop else {}
    before, kinds = state_of(model), [type(module) for module in model.modules()]
    with frozen(model):
        plain = model(x)
        if error:
            with pytest.raises(type(error)):
                method(model, x, torch.tensor([1]), Work(), **options)
        else:
            method(model, x, torch.tensor([1]), Work(), **options)
        again = model(x)
    assert same_state(before, state_of(model))
    assert kinds == [type(module) for module in model.modules()]
    assert torch.equal(plain, again)
    assert x.grad is None
    assert not hasattr(x.relu(), "_value")  # no rule outlives the call
    for y in (plain, again):  # ordinary gradients, before and after
        assert torch.autograd.grad(y.sum(), x)[0].abs().max() > 0


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.conv, self.fc, self.what = nn.Conv3d(3, 4, 1), nn.Linear(4, 2), what

    def forward(self, x):
        return self.fc(self.what(self.conv(x).relu().mean((2, 3, 4))))


def scattered(x):
    found = torch.zeros_like(x)
    found[:, 1:] = x[:, :-1]
    return found


ODD = {
    "layer_norm": nn.LayerNorm(4),
    "multi_head_attention": lambda x: F.multi_head_attention_forward(
        *(x[:, None], x[:, None], x[:, None], 4, 2, torch.ones(12, 4), torch.zeros(12)),
        *(None, None, False, 0.0, torch.ones(4, 4), torch.zeros(4)),
    )[0],
    "a product or quotient of two": lambda x: x * x / 2,
    "a product or quotient": lambda x: x / x,
    "square": torch.square,
    "softmax": lambda x: x.softmax(1),
    "__setitem__": scattered,
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("method", [lrp, excitation_backprop])
def test_what_has_no_rule_is_refused_by_name(name, method):
    model = Odd(ODD[name]).eval()
    options = {"layer": "conv"} if method is excitation_backprop else {}
    with frozen(model), pytest.raises(ValueError, match=rf"model: got {name}.*convolution, dense"):
        method(model, clips(1, 3, 2, 4, 4).float(), torch.tensor([0]), Work(), **options)


def test_eb_wants_relu_behind_the_layer_and_only_there():
    model, x = Odd(torch.tanh), clips(1, 3, 2, 4, 4).float()
    below = r"got tanh, which goes below zero, expected ReLU"
    with frozen(model), pytest.raises(ValueError, match=below):
        excitation_backprop(model, x, torch.tensor([0]), Work(), layer="conv")
    model.what, model.conv = nn.Identity(), nn.Sequential(model.conv, nn.LayerNorm(4), nn.Tanh())
    with frozen(model):
        assert (
            excitation_backprop(model, x, torch.tensor([0]), Work(), layer="conv").isfinite().all()
        )


def test_what_relevance_cannot_pass_is_an_error():
    gate, x = Odd(torch.sigmoid), clips(1, 3, 2, 4, 4).float()
    with frozen(gate), pytest.raises(ValueError, match="no path from the class back"):
        lrp(gate, x, torch.tensor([0]), Work())
    gate.spare = nn.Conv3d(3, 3, 1)
    with frozen(gate), pytest.raises(ValueError, match="layer: got one that did not run"):
        excitation_backprop(gate, x, torch.tensor([0]), Work(), layer="spare")


@pytest.mark.parametrize("options", [{"gamma": -1}, {"epsilon": -0.1}])
def test_values_are_checked(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got -.*at least 0"):
        lrp(Detector(), clips(1, 3, 2, 8, 8).float(), torch.tensor([0]), Work(), **options)
