"""What STEP can be told (paper §III; SPEC §9): its settings, and the presets."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from stepkit import removal as removals
from stepkit._checks import in_proportion, one_of, require
from stepkit.attribution.objective import SIGNS
from stepkit.attribution.smoothmax import MaskGeometry
from stepkit.removal import Removal

__all__ = ["FULL_RUN", "PRESETS", "Settings", "settings_for"]

FULL_RUN = 1200  # iterations of the released code, for which the weights below were set


@dataclass(frozen=True)
class Settings:
    """What STEP can be told; lengths of None follow the clip's size.

    Attributes
    ----------
    areas : tuple of float
        Preserved shares v, of the canvas.
    iterations : int
        Steps of the optimiser. The schedules of the weights stretch with it, and SGD's learning
        rate with its inverse, so that the path is the same length.
    optimiser : str
        ``"sgd"`` (the released code's) or ``"adam"``, which gets there in a twentieth of the steps.
    learning_rate : float
        Of SGD, for 1200 iterations; Adam takes it as it is.
    momentum, dampening : float
        Of SGD.
    area_weight, area_growth, core_weight : float
        λ1, the factor by which it has grown at the end, λ2. They count per seed cell: on a clip
        with fewer cells each is pushed as hard as on the paper's 16×112×112 (SPEC §9).
    core_start : float
        λ2 is 0 for this share of the iterations.
    kernel_length, kernel_size : int or None
        T_K (0: no L_K) and H_K = W_K; by default 8 and 11 at 16×112×112, in proportion. T_K
        is at least 3 and H_K at least 5, or the clip's: smaller ellipsoids are poles with no body.
    kernel_shape : str
        ``"ellipsoid"`` or ``"cylinder"``.
    core_form : str
        L_K as ``"printed"`` or as ``"released"``, see `objective.core_loss`.
    reward : str or None
        ``"probability"`` for Φ_c, ``"log"`` for log Φ_c; by default the former, and the latter for
        the deletion variant: it begins with everything deleted, where Φ_c has no slope left. A
        score that is no probability has no logarithm, and is rewarded by what it is, in units of
        what removing the whole clip takes of it.
    removal : str or Removal
        What stands where the mask is 0.
    on_canvas : bool
        Area terms on the padded canvas, or on the visible mask only.
    variant : str
        ``"preservation"``: M⊗X keeps the class. ``"deletion"``: (1−M)⊗X loses it. ``"dual"``: both.
        Deletion goes best with ``removal="fade"``: on the blur ladder a faint mask everywhere
        already takes the finest texture away everywhere.
    step, sigma : int or None
        Of the mask generator, see `MaskGeometry`; by default 7 and 11 at 112×112, in proportion.
    """

    areas: Sequence[float] = (0.05, 0.10, 0.15, 0.20)
    iterations: int = FULL_RUN
    optimiser: str = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    dampening: float = 0.9
    area_weight: float = 300.0
    area_growth: float = 1.0008668**FULL_RUN
    core_weight: float = 300.0
    core_start: float = 101 / FULL_RUN
    kernel_length: int | None = None
    kernel_size: int | None = None
    kernel_shape: str = "ellipsoid"
    core_form: str = "printed"
    reward: str | None = None
    removal: str | Removal = "blur"
    on_canvas: bool = True
    variant: str = "preservation"
    step: int | None = None
    sigma: int | None = None

    def __post_init__(self):
        areas = tuple(self.areas) if isinstance(self.areas, Iterable) else ()
        rising = all(0 < v < 1 for v in areas) and list(areas) == sorted(set(areas))
        require(areas and rising, "areas", self.areas, "rising shares between 0 and 1")
        object.__setattr__(self, "areas", areas)
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            absent = value is None and name != "iterations"
            fits = absent or (type(value) is int and value >= least)
            require(fits, name, value, f"a whole number, at least {least}")
        for name, (low, high, expected) in _REAL.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and math.isfinite(value)
            require(number and low <= value <= high, name, value, expected)
        for name, words in _WORDS.items():
            one_of(name, getattr(self, name), words)
        object.__setattr__(self, "removal", removals.named(self.removal))


_WHOLE = {"iterations": 1, "kernel_length": 0, "kernel_size": 1, "step": 1, "sigma": 1}
_REAL = dict.fromkeys(("momentum", "dampening", "core_start"), (0, 1, "between 0 and 1"))
_REAL |= dict.fromkeys(("area_weight", "core_weight"), (0, math.inf, "at least 0"))
_REAL |= dict.fromkeys(("learning_rate", "area_growth"), (math.ulp(0), math.inf, "more than 0"))
_WORDS = {
    "optimiser": ("sgd", "adam"),
    "kernel_shape": ("ellipsoid", "cylinder"),
    "core_form": ("printed", "released"),
    "reward": (None, "probability", "log"),
    "variant": tuple(SIGNS),
}


PRESETS = {
    "default": Settings(),
    "printed": Settings(removal=removals.blur(levels=2), on_canvas=False),
    "released": Settings(areas=(0.05, 0.10, 0.15, 0.50), reward="log", core_form="released"),
    "fast": Settings(iterations=60, optimiser="adam", learning_rate=0.1, reward="log"),
}


def settings_for(preset: str, options: dict, size) -> Settings:
    """Return the preset with ``options`` in it, and with what follows from them and the size."""
    one_of("preset", preset, PRESETS)
    names = [field.name for field in fields(Settings)]
    for name in options:
        one_of("option", name, names)
    chosen = replace(PRESETS[preset], **options)
    frames, height, width = size
    scaled = MaskGeometry.scaled(height, width)
    edge = min(height, width, max(5, round(in_proportion(11, size))))
    implied = {
        "kernel_length": kernel_length(8, frames),
        "kernel_size": edge - (edge + 1) % 2,  # odd: an even ellipsoid has no poles
        "step": scaled.step,
        "sigma": scaled.sigma,
        "reward": "log" if chosen.variant == "deletion" else "probability",
    }
    return replace(chosen, **{k: v for k, v in implied.items() if getattr(chosen, k) is None})


def kernel_length(printed: int, frames: int) -> int:
    """Return T_K for a clip of ``frames`` frames, as ``printed`` for the paper's 16, in proportion.

    At least 3, of which the middle one is whole, and at most the clip; 0 (no L_K) stays 0.
    """
    return min(frames, max(3, round(printed * frames / 16))) if printed else 0
