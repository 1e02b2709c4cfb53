"""R(2+1)D with each convolution's bias, skip, ReLU and mask of ReLU in one kernel: an experiment.

Every unit, a flat convolution and what follows it, tries what there is, forward and back, times it,
and keeps the fastest: cuDNN and passes over memory, cuDNN's fused calls, or one kernel in Triton.
"""

import os
from functools import partial

import torch
from common import clocked
from torch import Tensor, nn
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# isort: split
import triton
from triton import language as tl

from stepkit import _convolutions

if os.environ.get("TRITON_INTERPRET") == "1":
    # its integers are arrays, which NumPy no longer takes
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patched(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patched

CONFIGS = [  # rows, columns, more columns, depth, warps, stages: of twelve, those that won most
    (128, 128, 0, 32, 4, 4),
    (128, 128, 32, 32, 8, 4),
    (128, 256, 0, 64, 8, 3),
]
FREE = ["rows", "I1", "I2", "D1", "D2", "K2", "taps", "S1", "S2", "P1", "P2"]


@triton.jit
def _finish(acc, bias, add, gate, out, at, columns, inside, BIAS: tl.constexpr, ADD: tl.constexpr,
            RELU: tl.constexpr, GATE: tl.constexpr, N):  # fmt: skip
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0)
    if GATE:
        acc = tl.where(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32) > 0, acc, 0.0)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=FREE)
def _convolve(x, w, bias, add, gate, out, rows, N, C, pixel, I1, I2, D1, D2, K2, taps,
              S1, S2, P1, P2, BIAS: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr,
              GATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr,
              BK: tl.constexpr):  # fmt: skip
    """out[row, o] = f(Σ over taps and channels of x·w), rows being places of images (B, D1, D2)."""
    across = tl.cdiv(N, BN + BX)
    block, side = tl.program_id(0) // across, tl.program_id(0) % across
    row = block * BM + tl.arange(0, BM)
    j, i, n = row % D2, (row // D2) % D1, row // (D1 * D2)
    i, j = i * S1 - P1, j * S2 - P2
    start = x + ((n * I1 + i) * I2 + j) * pixel
    left = side * (BN + BX) + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if BX > 0:
        right = side * (BN + BX) + BN + tl.arange(0, BX)
        more = tl.zeros((BM, BX), tl.float32)
    pieces = tl.cdiv(C, BK)
    for step in range(taps * pieces):
        tap = step // pieces
        c = (step % pieces) * BK + tl.arange(0, BK)
        k1, k2 = tap // K2, tap % K2
        seen = (row < rows) & (i + k1 >= 0) & (i + k1 < I1) & (j + k2 >= 0) & (j + k2 < I2)
        a = tl.load(start[:, None] + ((k1 * I2 + k2) * pixel + c)[None, :],
                    mask=seen[:, None] & (c < C)[None, :], other=0.0)  # fmt: skip
        line = w + (tap * C + c)[:, None] * N
        b = tl.load(line + left[None, :], mask=(c < C)[:, None] & (left < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
        if BX > 0:
            b = tl.load(line + right[None, :],
                        mask=(c < C)[:, None] & (right < N)[None, :], other=0.0)  # fmt: skip
            more = tl.dot(a, b, more)
    at = row[:, None] * N + left[None, :]
    inside = (row < rows)[:, None] & (left < N)[None, :]
    _finish(acc, bias, add, gate, out, at, left, inside, BIAS, ADD, RELU, GATE, N)
    if BX > 0:
        at = row[:, None] * N + right[None, :]
        inside = (row < rows)[:, None] & (right < N)[None, :]
        _finish(more, bias, add, gate, out, at, right, inside, BIAS, ADD, RELU, GATE, N)


@triton.jit
def _pointwise(x, bias, add, gate, out, count, N, BIAS: tl.constexpr, ADD: tl.constexpr,
               RELU: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias + at % N).to(tl.float32)
    if ADD:
        acc += tl.load(add + at, mask=at < count, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0)
    if GATE:
        acc = tl.where(tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32) > 0, acc, 0.0)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < count)


def pointwise(x, bias=None, add=None, relu=False, gate=None):
    """Bias, addition, ReLU, mask of ReLU in place, in one pass; all (B, N, D1, D2)."""
    flags = bias is not None, add is not None, relu, gate is not None
    given = (x if t is None else t for t in (bias, add, gate))
    grid = (triton.cdiv(x.numel(), 4096),)
    _pointwise[grid](x, *given, x, x.numel(), x.shape[1], *flags, 4096, num_warps=8)
    return x


def convolve(x, weight, size, stride, padding, config, bias=None, add=None, relu=False, gate=None):
    """Convolve in one kernel: x (B, C, I1, I2) -> (B, N, *size), channels last.

    ``weight`` (K1, K2, C, N); rows and columns beyond the image are zeros. If its C is more than
    x's, a tap reads the next pixels of the row as further channels.
    """
    (k1, k2, c, n), (bm, bn, bx, bk, warps, stages) = weight.shape, config
    out = torch.empty(x.shape[0], *size, n, dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    bn = min(bn, max(16, triton.next_power_of_2(n)))
    bk = min(bk, max(16, triton.next_power_of_2(c)))
    rows = x.shape[0] * size[0] * size[1]
    flags = bias is not None, add is not None, relu, gate is not None
    given = (out if t is None else t for t in (bias, add, gate))
    _convolve[(triton.cdiv(rows, bm) * triton.cdiv(n, bn + bx),)](
        x, weight, *given, out, rows, n, c, *x.shape[1:], *size, k2, k1 * k2, *stride, *padding,
        *flags, bm, bn, bx, bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Unit:
    """A flat convolution, frozen, then perhaps a skip's addition and a ReLU; forward and back.

    ``gates``: it masks its input's gradient by the ReLU that gave the input. ``gated``: its reader
    does so, so that it need not mask what comes.
    """

    def __init__(self, name: str, conv: nn.Module, relu=True, gates=True, gated=False):
        self.name, self.relu, self.gates, self.gated = name, relu, gates, gated
        self.frames = conv.kernel_size[0] == 1 and conv.stride[0] == 1
        self.squares = getattr(conv, "squares", False)
        flat = (lambda t: t[1:]) if self.frames else (lambda t: t[:2])
        self.stride, self.padding = flat(conv.stride), flat(conv.padding)
        weight = conv.weight.detach()
        if self.squares:  # its input comes in squares
            weight, self.stride, self.padding = _convolutions._kernel(conv), (1, 1), (0, 0)
        weight = weight[:, :, 0] if self.frames else weight[..., 0]
        self.weight, self.bias = channels_last(weight), conv.bias.detach()
        self.back = channels_last(weight.flip(2, 3).transpose(0, 1))
        self.taps = weight.permute(2, 3, 1, 0).contiguous()  # (K1, K2, C, N)
        self.rows = self.taps.flatten(1, 2).unsqueeze(1)  # a row of taps as channels of one
        self.back_taps = self.back.permute(2, 3, 1, 0).contiguous()
        self.best, self.table = {}, []

    def size(self, x):
        given = zip(x.shape[2:], self.weight.shape[2:], self.stride, self.padding, strict=True)
        return tuple((i + 2 * p - k) // s + 1 for i, k, s, p in given)

    def ways(self, back: bool) -> dict:
        """Return the ways to compute it: name -> function(input, skip or gate, size)."""
        fused = ["finish"] if triton_runs(self.weight) else []
        found = {"cudnn": partial(self.separate, back)}
        found |= {f"cudnn + {name}": partial(self.finished, back) for name in fused}
        if back and self.stride == (1, 1):
            found["cudnn forward + finish"] = partial(self.finished, None)
        if not back and self.relu and self.weight.is_cuda:
            found["cudnn fused"] = self.fused
        for config in CONFIGS if fused and (not back or self.stride == (1, 1)) else []:
            found[f"triton {config}"] = partial(self.one_kernel, back, config)
        return found

    def plain(self, back, x, size):
        """Return the convolution alone, or its transpose; ``back`` of None: by a convolution."""
        if back is None:
            padding = [k - 1 - p for k, p in zip(self.weight.shape[2:], self.padding, strict=True)]
            return F.conv2d(x, self.back, None, 1, padding)
        if not back:
            return F.conv2d(x, self.weight, None, self.stride, self.padding)
        seen = x.new_empty(1).expand(len(x), self.weight.shape[1], *size)
        seen = torch.empty_like(seen, memory_format=torch.channels_last)
        given = x, seen, self.weight, None, self.stride, self.padding, (1, 1), False, (0, 0), 1
        return torch.ops.aten.convolution_backward(*given, [True, False, False])[0]

    def separate(self, back, x, other, size):
        y = self.plain(back, x, size)
        if back:
            return y if other is None else torch.ops.aten.threshold_backward(y, other, 0)
        y += self.bias[:, None, None]
        y = y if other is None else y.add_(other)
        return y.relu_() if self.relu else y

    def finished(self, back, x, other, size):
        y = channels_last(self.plain(back, x, size))
        if back is False:
            return pointwise(y, self.bias, other, self.relu)
        return y if other is None else pointwise(y, gate=other)

    def fused(self, x, other, size):
        if other is None:
            given = self.bias, self.stride, self.padding, (1, 1), 1
            return torch.cudnn_convolution_relu(x, self.weight, *given)
        given = other, 1.0, self.bias, self.stride, self.padding, (1, 1), 1
        return torch.cudnn_convolution_add_relu(x, self.weight, *given)

    def one_kernel(self, back, config, x, other, size):
        if back:
            padding = [k - 1 - p for k, p in zip(self.weight.shape[2:], self.padding, strict=True)]
            return convolve(x, self.back_taps, size, (1, 1), padding, config, gate=other)
        taps = self.rows if self.squares else self.taps
        return convolve(
            x, taps, size, self.stride, self.padding, config, self.bias, other, self.relu
        )

    def run(self, back: bool, x, other, size):
        key = back, x.shape[1:], other is None
        if key not in self.best:
            self.best[key] = self.choose(back, x, other, size)
        return self.best[key](x, other, size)

    def choose(self, back, x, other, size):
        """Time the ways, record them, and return the fastest whose result is right."""
        ways, took, right = self.ways(back), {}, self.separate(back, x, other, size).float()
        for name, way in ways.items():
            row = {"unit": self.name, "pass": "back" if back else "forward", "way": name}
            try:
                off = (way(x, other, size).float() - right).norm() / right.norm()
                row |= {"off": off.item(), "ms": clocked(partial(way, x, other, size))}
                if row["off"] < 0.02:
                    took[name] = row["ms"]
            except Exception as error:  # as of a shape that a library has no kernel for
                row["error"] = str(error)[:200]
            work = 2 * self.weight.numel() * x.shape[0] * size[0] * size[1]
            if not back:
                row["gflop"] = work / 1e9
            else:
                row["gflop"] = 2 * self.weight.numel() * x.shape[0] * x.shape[2] * x.shape[3] / 1e9
            self.table.append(row)
        return ways[min(took, key=took.get)]


def triton_runs(tensor: Tensor) -> bool:
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


class _Run(torch.autograd.Function):
    """A unit, on clips (N, T, H, W, C)."""

    @staticmethod
    def forward(ctx, clips, skip, unit):
        x, other = (None if c is None else _images(c, unit.frames) for c in (clips, skip))
        y = unit.run(False, x, other, unit.size(x))
        ctx.unit, ctx.skips = unit, skip is not None
        out = _clips(y, unit.frames, clips.shape)
        ctx.save_for_backward(clips if unit.gates else clips[:0], out)
        ctx.shape = clips.shape
        return out

    @staticmethod
    def backward(ctx, upstream):
        unit, (clips, out) = ctx.unit, ctx.saved_tensors
        g = upstream.contiguous()
        if unit.relu and not unit.gated:
            g = torch.ops.aten.threshold_backward(g, out, 0)
        shape = ctx.shape[2:4] if unit.frames else (ctx.shape[1], ctx.shape[2] * ctx.shape[3])
        gate = _images(clips, unit.frames) if unit.gates else None
        given = unit.run(True, _images(g, unit.frames), gate, shape)
        found = _clips(given, unit.frames, ctx.shape)
        return found, (g if ctx.skips else None), None


def _images(clips: Tensor, frames: bool) -> Tensor:
    """See clips (N, T, H, W, C) as images, channels last: frames, or time by place."""
    return (clips.flatten(0, 1) if frames else clips.flatten(2, 3)).permute(0, 3, 1, 2)


def _clips(images: Tensor, frames: bool, shape) -> Tensor:
    """See images as clips again, of as many frames, or of the places, as in ``shape``."""
    clips = images.permute(0, 2, 3, 1).contiguous()
    return clips.unflatten(0, (-1, shape[1])) if frames else clips.unflatten(2, shape[2:4])


class Lean(nn.Module):
    """A prepared R(2+1)D, rewritten by squares, of units: the same function of the clips."""

    def __init__(self, prepared: nn.Module):
        super().__init__()
        self.prepared, self.stages = prepared, []
        stem, self.fc = prepared.stem, prepared.fc
        self.first = stem[0]
        self.stem = [Unit("stem.0", stem[0], gates=False, gated=True), Unit("stem.3", stem[3])]
        for name, stage in prepared.named_children():
            if name.startswith("layer"):
                blocks = [stage] if hasattr(stage, "conv1") else stage
                self.stages += [self.block(f"{name}.{i}", b) for i, b in enumerate(blocks)]

    @staticmethod
    def block(name, block):
        inner = [block.conv1[0][0], block.conv1[0][3], block.conv2[0][0], block.conv2[0][3]]
        units = [Unit(f"{name}.{i}", c, gates=i > 0, gated=i < 3) for i, c in enumerate(inner)]
        return units, block.downsample

    @property
    def units(self):
        return self.stem + [unit for units, _ in self.stages for unit in units]

    def forward(self, clips: Tensor) -> Tensor:
        x = clips.to(self.fc.weight.dtype)
        x = _convolutions._cut(x, self.first).permute(0, 2, 3, 4, 1)
        for unit in self.stem:
            x = _Run.apply(x.contiguous(), None, unit)
        for units, down in self.stages:
            skip = x if down is None else down(x.movedim(4, 1)).movedim(1, 4)
            for unit in units[:-1]:
                x = _Run.apply(x, None, unit)
            x = _Run.apply(x, skip.contiguous(), units[-1])
        return self.fc(x.mean((1, 2, 3))).float()
