"""What people see: pictures, plots and short videos."""

from stepkit.viz._frames import display, frames_rgb
from stepkit.viz._style import caption, palette
from stepkit.viz.film import save_video
from stepkit.viz.pictures import show, show_clips
from stepkit.viz.plots import (
    forest,
    plot_curves,
    plot_history,
    plot_intervals,
    plot_pairs,
    plot_training,
)

__all__ = [
    "caption",
    "display",
    "forest",
    "frames_rgb",
    "palette",
    "plot_curves",
    "plot_history",
    "plot_intervals",
    "plot_pairs",
    "plot_training",
    "save_video",
    "show",
    "show_clips",
]
