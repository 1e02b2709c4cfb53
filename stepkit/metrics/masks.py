"""What the smallest mask of a perturbation method keeps, beside the whole clip."""

import torch
from torch import Tensor, nn

from stepkit import removal as removals
from stepkit._checks import tensor
from stepkit.data import Batch
from stepkit.metrics._metric import metric
from stepkit.metrics.pointing import relevance_mass
from stepkit.models import device_of, frozen
from stepkit.models.scores import PROBABILITY, Score
from stepkit.removal import Removal

__all__ = ["smallest_mask", "watch"]


@metric("smallest_mask", label="what the smallest mask keeps", reads="masks")
def smallest_mask(
    model: nn.Module, batch: Batch, masks: Tensor, *, removal: Removal | str = "blur"
) -> dict[str, Tensor]:
    """Compare Φ_c of the smallest mask, Φ_c(M_v ⊗ X) of Eq. 4, with Φ_c of the whole clip.

    Of masks (N, A, T, H, W) the first is scored. Returns, (N,) each: Φ of the clip, Φ of what the
    mask keeps, whether that is ``higher``, the share of the mask ``on evidence``, and ``chance``,
    the share of the clip that is evidence.
    """
    first = tensor("masks", masks, "(N, A, T, H, W)")[:, 0].contiguous()
    shown = batch.clips, removals.named(removal).apply(batch.clips, first)
    phi, kept = (watch(model, clips, batch.targets) for clips in shown)
    found = {"Φ clip": phi, "Φ smallest mask": kept, "higher": (kept > phi).float()}
    found["on evidence"] = relevance_mass(first, batch.evidence)
    return found | {"chance": batch.evidence.float().mean((1, 2, 3))}


def watch(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    score: Score = PROBABILITY,
    batch_size: int = 32,
) -> Tensor:
    """Return Φ_c (N,) of ``clips`` (N, 3, T, H, W); the model is left as it was."""
    device = device_of(model, clips.device)
    with frozen(model), torch.no_grad():
        parts = zip(clips.split(batch_size), targets.split(batch_size), strict=True)
        phi = [score(model(c.to(device, copy=True)), t.to(device)).cpu() for c, t in parts]
    return torch.cat(phi)
