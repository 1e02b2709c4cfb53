"""What would be wrong in silence is noticed at the door: chance, checkpointing, folded layers."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_scores import FEW, ROW, Net, clips
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stepkit as sk

ROWS = [ROW, [1.0, 0.0, 2.0, -1.0]]


class Dropping(Net):
    def forward(self, x):
        return self.fc(F.dropout(self.relu(self.conv(x)), 0.5, training=True).mean((2, 3, 4)))


class Batched(Net):
    def forward(self, x):
        seen = F.batch_norm(self.conv(x), None, None, training=True)
        return self.fc(self.relu(seen).mean((2, 3, 4)))


@pytest.mark.parametrize("kind", [Dropping, Batched])
@pytest.mark.parametrize("call", [
    lambda model: sk.attribute("gradient", model, clips(), 0),
    lambda model: sk.step(model, clips(1), 0, "fast", iterations=1),
    lambda model: sk.insertion(model, clips(), clips().mean(1), 0, steps=2),
])  # fmt: skip
def test_chance_and_batch_statistics_draw_a_warning(kind, call):
    with pytest.warns(UserWarning, match="when asked again beside another clip"):
        call(kind(ROWS))


def test_a_network_that_repeats_itself_draws_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.attribute("gradient", Net(ROWS), clips(), 0)


class Checkpointed(Net):
    def __init__(self, rows, reentrant):
        super().__init__(rows)
        self.reentrant = reentrant

    def forward(self, x):
        features = checkpoint(lambda x: self.relu(self.conv(x)), x, use_reentrant=self.reentrant)
        return self.fc(features.mean((2, 3, 4)))


def test_checkpointing_is_refused_where_it_would_change_the_map():
    model = Checkpointed(ROWS, False)
    expected = sk.attribute("gradient", Net(ROWS), clips(), 0)
    torch.testing.assert_close(sk.attribute("gradient", model, clips(), 0), expected)
    with pytest.raises(ValueError, match=r"model: got RuntimeError \(.*reentrant.*on the way back"):
        sk.attribute("gradient", Checkpointed(ROWS, True), clips(), 0)
    for method in ("deeplift", "guided_backprop", "deconvnet", "lrp", "fg_vis"):
        with pytest.raises(ValueError, match="model: got activation checkpointing"):
            sk.attribute(method, model, clips(), 0, **FEW.get(method, {}))


def test_calls_under_inference_mode_are_as_those_outside():
    model, x = Net(ROWS), clips()
    expected = sk.attribute("gradient", model, x, 0), sk.step(model, x, 0, iterations=2).masks
    curve = sk.insertion(model, x, expected[0], 0, steps=3).curve
    with torch.inference_mode():
        inner = clips()
        found = sk.attribute("gradient", model, inner, 0), sk.step(model, inner, 0, iterations=2)
        again = sk.insertion(model, inner, found[0], 0, steps=3).curve
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].masks, expected[1])
    torch.testing.assert_close(again, curve)


@pytest.mark.parametrize("layout", ["N", "NC"])
def test_an_error_of_the_network_names_what_to_do(layout):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("expected 16 channels")

    with pytest.raises(ValueError, match=r"model: got RuntimeError \(expected 16 ch.*sk.wrap") as e:
        sk.attribute("gradient", Fails(), clips(), 0)
    assert isinstance(e.value.__cause__, RuntimeError)


# ------------------------------------------------------------------ layers that ran several times


class Frames(nn.Module):
    """A network over frames: all at once, in a loop, backwards, or frames before clips."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.cnn, self.fc = how, nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 2)

    def features(self, x):
        T = x.shape[2]
        if self.how == "folded":
            frames = self.cnn(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), T))
        elif self.how == "frames first":
            frames = self.cnn(x.permute(2, 0, 1, 3, 4).flatten(0, 1)).unflatten(0, (T, len(x)))
            frames = frames.transpose(0, 1)
        else:
            order = range(T) if self.how == "loop" else reversed(range(T))
            frames = torch.stack([self.cnn(x[:, :, t]) for t in order], 1)
            frames = frames if self.how == "loop" else frames.flip(1)
        return frames.relu()

    def forward(self, x):
        frames = self.features(x)
        weight = torch.arange(1.0, 1 + frames.shape[1], device=x.device)
        return self.fc((frames.mean((3, 4)) * weight[:, None]).mean(1))


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp", "score_cam"])
def test_a_loop_over_frames_is_stacked_in_time(method):
    expected = sk.attribute(method, Frames("folded"), clips(), 1, layer="cnn")
    found = sk.attribute(method, Frames("loop"), clips(), 1, layer="cnn")
    torch.testing.assert_close(found, expected)
    assert (expected.amax((2, 3)).diff(dim=1) != 0).any()  # frames differ


def test_a_loop_in_another_order_than_time_is_refused():
    with pytest.raises(ValueError, match=r"layer: got 4 outputs, of which a change of the last 1"):
        sk.attribute("grad_cam", Frames("backwards"), clips(), 1, layer="cnn")


def test_frames_folded_before_clips_are_refused_or_taken_one_by_one():
    expected = sk.attribute("grad_cam", Frames("folded"), clips(), 1, layer="cnn")
    with pytest.raises(ValueError, match=r"several clips in another order.*batch_size=1"):
        sk.attribute("grad_cam", Frames("frames first"), clips(), 1, layer="cnn")
    found = sk.attribute("grad_cam", Frames("frames first"), clips(), 1, layer="cnn", batch_size=1)
    torch.testing.assert_close(found, expected)


class Again(Net):
    """The same layer at two depths: neither output is the layer's."""

    def __init__(self, rows):
        super().__init__(rows)
        self.again = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.fc(self.again(self.again(self.conv(x)).relu()).mean((2, 3, 4)))


@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "grad_cam_pp"])
def test_a_layer_that_runs_on_what_it_gave_is_refused(method):
    with pytest.raises(ValueError, match="layer: got one that runs again on what it gave before"):
        sk.attribute(method, Again(ROWS), clips(), 0, layer="again")


class Crops(Net):
    """Two halves of the frame, one after the other: two calls, and neither is a part of time."""

    def forward(self, x):
        halves = x.chunk(2, 4)
        return self.fc(sum(self.relu(self.conv(half)).mean((2, 3, 4)) for half in halves))


def test_calls_that_are_no_parts_of_time_are_refused():
    with pytest.raises(ValueError, match=r"layer: got 2 outputs, of which a change of the last 2"):
        sk.attribute("grad_cam", Crops(ROWS), clips(), 0, layer="conv")


class Parallel(Net):
    """The same layer on a clip and on one of more contrast, side by side."""

    def forward(self, x):
        return self.fc(sum(self.relu(self.conv(c * x)).mean((2, 3, 4)) for c in (1, 2)))


class Windows(Net):
    """Windows that overlap, one after the other."""

    def forward(self, x):
        parts = [x[:, :, t : t + 6] for t in range(0, x.shape[2] - 5, 2)]
        return self.fc(sum(self.relu(self.conv(part)).mean((2, 3, 4)) for part in parts))


@pytest.mark.parametrize(("kind", "frames"), [(Parallel, 4), (Windows, 8), (Windows, 12)])
def test_calls_beside_each_other_are_no_time(kind, frames):
    with pytest.raises(ValueError, match=r"layer: got .* outputs.*expected one that runs"):
        sk.attribute("grad_cam", kind(ROWS), clips(1, frames), 0, layer="conv")


class TimeFirst(nn.Module):
    """A layer that puts out (N, T, K, H, W), or (T, N, K, H, W), or (N, heads, L, L)."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.conv, self.block = how, nn.Conv3d(3, 7, 4, 4), nn.Identity()
        self.fc = nn.Linear(7, 2)

    def forward(self, x):
        z = self.conv(x)  # (N, K, T, H, W)
        if self.how == "ntkhw":
            return self.fc(self.block(z.transpose(1, 2)).relu().mean((1, 3, 4)))
        if self.how == "tnkhw":
            return self.fc(self.block(z.permute(2, 0, 1, 3, 4)).relu().mean((0, 3, 4)))
        tokens = z.flatten(2).transpose(1, 2)
        weights = self.block((tokens @ tokens.transpose(1, 2)).softmax(2)[:, None])
        return self.fc((weights[:, 0] @ tokens).relu().mean(1))


@pytest.mark.parametrize("how", ["ntkhw", "tnkhw", "attention"])
def test_what_has_no_reading_is_refused(how):
    x = torch.randn(4, 3, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match="layer: got"):
        sk.attribute("grad_cam", TimeFirst(how), x, 1, layer="block")


def test_two_threads_may_explain_one_model():
    model, x = Net(ROWS).train(), clips(2, 4, 32)
    asked = {"gradient": {}, "grad_cam": {"layer": "relu"}}
    expected = {name: sk.attribute(name, model, x, 0, **o) for name, o in asked.items()}
    with ThreadPoolExecutor(4) as pool:
        names = list(asked) * 10
        found = [pool.submit(sk.attribute, n, model, x, 0, batch_size=1, **asked[n]) for n in names]
        for name, future in zip(names, found, strict=True):
            torch.testing.assert_close(future.result(), expected[name])
    assert model.training
    assert all(values.requires_grad for values in model.parameters())


# ------------------------------------------------------------------------------- order of tokens


class Tokens(nn.Module):
    """Patches as tokens; ``block`` sees them in one of the ways of video transformers."""

    def __init__(self, how, class_token=False):
        super().__init__()
        torch.manual_seed(1)
        self.how, self.class_token = how, class_token
        self.embed, self.block = nn.Conv3d(3, 6, (1, 4, 4), (1, 4, 4)), nn.Linear(6, 6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        z = self.embed(x)  # (N, D, t, h, w)
        tokens = torch.einsum(f"ndthw->n{self.how.replace(' ', '')}d", z)
        groups = self.how.split(" ")
        sides = dict(zip("thw", z.shape[2:], strict=True))
        lengths = [torch.Size(sides[a] for a in group).numel() for group in groups]
        tokens = tokens.reshape(len(x), *lengths, 6).flatten(0, len(groups) - 1)
        if self.class_token:
            tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        return self.fc(torch.relu(self.block(tokens)).unflatten(0, (len(x), -1)).mean((1, 2)))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("how", ["thw", "hwt", "t hw", "hw t"])
def test_tokens_are_put_where_the_clip_changes_them(how, class_token):
    """VideoMAE, TimeSformer, attention in space, attention in time."""
    model = Tokens(how, class_token)
    plain = Tokens("thw")
    x = torch.randn(2, 3, 6, 12, 20, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        z = plain.embed(x)
        a = plain.block(z.movedim(1, -1)).movedim(-1, 1)  # (N, D, t, h, w), what `block` puts out
    a.requires_grad_()
    rows = a.relu().flatten(2).mean(2)
    if class_token:  # its own part of the mean does not come from the cells of the layer
        count = a[0, 0].numel() + {"thw": 1, "hwt": 1, "t hw": 6, "hw t": 15}[how]
        rows = rows * a[0, 0].numel() / count
    slope = torch.autograd.grad(plain.fc(rows)[:, 1].sum(), a)[0]
    expected = (slope.mean((3, 4), keepdim=True) * a).sum(1).relu().detach()
    expected = F.interpolate(expected, (12, 20), mode="bilinear")
    found = sk.attribute("grad_cam", model, x, 1, layer="block")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    told = sk.attribute("grad_cam", model, x, 1, layer="block", grid=(6, 3, 5))
    torch.testing.assert_close(told, found)


def test_an_order_that_is_given_is_taken():
    x = torch.randn(1, 3, 6, 12, 20, generator=torch.Generator().manual_seed(2))
    found = sk.attribute("grad_cam", Tokens("hwt"), x, 1, layer="block", grid_order="hwt")
    torch.testing.assert_close(found, sk.attribute("grad_cam", Tokens("hwt"), x, 1, layer="block"))
    with pytest.raises(ValueError, match="grid_order: got 'htw'"):
        sk.attribute("grad_cam", Tokens("hwt"), x, 1, layer="block", grid_order="htw")


def test_tokens_that_no_change_of_the_clip_places_are_refused():
    class Mixed(Tokens):
        def forward(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            tokens = tokens[:, torch.randperm(tokens.shape[1], generator=torch.manual_seed(0))]
            return self.fc(self.block(tokens).mean(1))

    x = torch.randn(1, 3, 6, 12, 20)
    with pytest.raises(ValueError, match=r"no change of it tells .*grid_order="):
        sk.attribute("grad_cam", Mixed("thw"), x, 1, layer="block")


def test_transformers_are_told_a_block_and_not_the_embedding_of_patches():
    model = nn.Module()
    model.embed = nn.Conv3d(3, 8, 4, 4)
    layers = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)]
    model.blocks = nn.ModuleList(layers)
    model.forward = lambda x: model.embed(x).mean((2, 3, 4))
    with pytest.raises(ValueError, match=r"expected layer='blocks.2', the last block but one"):
        sk.attribute("grad_cam", model, clips(), 0)


# --------------------------------------------------------------------- masks that are worth nothing


class Evidence(nn.Module):
    """Knows the class by the brightness of the top left quarter."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        z = self.weight * x[..., : x.shape[-2] // 2, : x.shape[-1] // 2].mean((1, 2, 3, 4))
        return torch.stack([z, 1.5 + 0 * z], 1)


def planted():
    x = 0.1 * clips(1, 4, 32)
    x[..., :16, :16] += 1
    return x


def test_a_mask_that_beats_random_ones_draws_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sk.step(Evidence(4.0), planted(), 0, "fast", iterations=40)
    expected = Evidence(4.0)(planted()).softmax(1)[:, 0].detach()
    torch.testing.assert_close(found.clip_probability, expected)
    assert (found.probabilities - found.random_probabilities).max() > 0.05
    assert f"of the clip: {expected.item():.2f}" in repr(found)


@pytest.mark.parametrize("weight", [0.05, 400.0])  # it hardly knows; anything is enough for it
def test_a_mask_that_does_not_beat_random_ones_says_so(weight):
    with pytest.warns(UserWarning, match=r"step: no mask of clips \[0\] does better than random"):
        sk.step(Evidence(weight), planted() + 1, 0, "fast", iterations=20)


def test_random_masks_show_as_many_pixels_as_the_mask():
    masks = torch.rand(2, 3, 4, 9, 7, generator=torch.Generator().manual_seed(0)) ** 3
    random = sk.attribution.smoothmax.random_masks(masks, 1)
    assert set(random.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(random.sum((2, 3, 4)), masks.sum((2, 3, 4)).round())
    assert torch.equal(random, sk.attribution.smoothmax.random_masks(masks, 1))
