"""A class's score handed back by rules: excitation backprop and LRP (paper §V-B, refs. 24-27).

The rules, one for each torch function, stand in `stepkit.attribution._rules`.
"""

import math
from functools import partial

import torch
from torch import Tensor

from stepkit._checks import require
from stepkit.attribution._cells import reader, record_layer
from stepkit.attribution._methods import method
from stepkit.attribution._rules import Rules, relevance
from stepkit.attribution.cam import upsample
from stepkit.models.scores import Score

__all__ = ["excitation_backprop", "lrp"]

_method = partial(method, family="backprop", needs_gradient=True, reads_layers=True)


@_method(
    "excitation_backprop",
    order=9,
    label="Excitation BP",
    source="§V-B; Zhang 2018, Bargal 2018",
    resolution="cell and step of the layer",
)
def excitation_backprop(model, clips, targets, work, *, layer=None) -> Tensor:
    """Excitation backprop (EB): marginal winning probabilities at a layer; (N, T, H, W).

    The class wins with probability one, and a winner z hands its probability to its children a in
    proportion of a·w⁺, the excitation that each brought; negative weights and biases do not count:

        P(a) = Σ_z  a·w⁺_az / Σ_a' a'·w⁺_a'z  ·  P(z)

    so the layer's probabilities sum to one (a winner whose children are all silent, excited by its
    bias alone, loses its own). They are summed over channels and up-sampled as in `cam.grad_cam`.
    Through an LSTM (EB-R, Bargal 2018) they pass as through any sum, the gates being weights, back
    through the states as well: also where these are detached, and with ReLU candidates only, for a
    neuron below zero cannot win. The steps of `models.ResNetLSTM` as printed win by their part in
    the mean softmax, as released by their logits' excitation. No contrastive EB: the paper has
    none.

    The released code takes the absolute value and, for R50L, brings the features' probabilities to
    a sum of one over the frames before they enter the CNN. They are positive anyway, and the latter
    makes good what was lost by one factor per clip: as printed and as released rank alike.

    Parameters
    ----------
    layer : str, optional
        As for Grad-CAM: a layer with output (N, K, T', H', W') or (N·T, K, H', W'); see
        `stepkit.models.find_layer` for the default. Behind it only ReLU may be the activation.

    Raises
    ------
    ValueError
        Behind the layer the model does something that has no rule, or other neurons than ReLU.
    """
    _check_score(work.score)
    rules, clips = Rules(keep=0, excitatory=True), clips.detach()
    with record_layer(model, len(clips), layer) as seen, torch.enable_grad(), rules:
        output = model(clips)
    arranged = reader(model, layer, clips, seen)
    won = relevance(rules.score(output, targets, work.score), seen.kept, "layer")
    return upsample(arranged(won).sum(1), clips.shape[2:])


@_method("lrp", order=7, label="LRP", source="Bach 2015")
def lrp(model, clips, targets, work, *, gamma=math.inf, epsilon=1e-6) -> Tensor:
    """Layer-wise relevance propagation of the class's logit to the voxels; (N, T, H, W).

    The usual composite (Kohlbrenner 2020): LRP-z⁺ in convolutions, i.e. αβ with α = 1, β = 0 (Bach
    2015), and LRP-ε in dense layers and LSTMs; with a finite ``gamma``, LRP-γ in convolutions
    (Montavon 2019). In the first one, where inputs have both signs, "positive" is said of the
    contribution x·w. Summed over RGB and signed: negative relevance speaks against the class. The
    paper names LRP (Table I, ref. 24), but neither prints nor releases it.

    - Batch-norm in evaluation mode scales the sum before it (a negative slope turns what adds into
      what takes away); behind a neuron it is a layer of its own with one child.
    - A residual sum belongs to the sum of the convolution before it: both branches take relevance
      by their contributions to that sum.
    - A sigmoid is a gate: a constant weight; all relevance goes to what it lets through (Arras
      2017). The state of an LSTM passes relevance on, also where the gradient is detached.
    - The log of a mean softmax over time (`models.ResNetLSTM`, printed) starts at the steps'
      logits s_t, as Σ q_t·s_t, where q_t is step t's share of the class's probability.

    What is conserved: the relevance of a layer's children, plus what its bias takes, is that of its
    parents up to ε. Each bias (a batch-norm's as well) is a child with activation one that
    passes nothing on, so without biases, and with ε → 0, the map's sum is the logit.

    Parameters
    ----------
    gamma : float
        In convolutions, positive contributions count 1 + γ times as much as negative ones; infinity
        is LRP-z⁺, 0 is LRP-0.
    epsilon : float
        Takes ε/(|z| + ε) of a dense parent's relevance, so that weak ones pass on less.

    Raises
    ------
    ValueError
        The model does something that has no rule, such as layer-norm or attention.
    """
    _check_score(work.score)
    require(gamma >= 0, "gamma", gamma, "at least 0")
    require(epsilon >= 0, "epsilon", epsilon, "at least 0")
    pixels = clips.detach().requires_grad_()
    with torch.enable_grad(), Rules(1 / (1 + gamma), epsilon=epsilon) as rules:
        output = model(pixels)
    return relevance(rules.score(output, targets, work.score), [pixels], "model")[0].sum(1)


def _check_score(score: Score) -> None:
    require(score.one_logit, "score", score.name, "that of one class, whose logit is handed back")
