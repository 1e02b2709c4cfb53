"""What people see: pictures, plots and short videos."""

from stepkit.viz.film import save_video
from stepkit.viz.pictures import (
    CMAP,
    DPI,
    FONT,
    OPACITY,
    ROWS,
    Picture,
    caption,
    display,
    frames_rgb,
    render,
    show,
    show_clips,
    top,
)
from stepkit.viz.plots import (
    forest,
    plot_curves,
    plot_history,
    plot_intervals,
    plot_pairs,
    plot_training,
)

__all__ = [
    "CMAP",
    "DPI",
    "FONT",
    "OPACITY",
    "ROWS",
    "Picture",
    "caption",
    "display",
    "forest",
    "frames_rgb",
    "plot_curves",
    "plot_history",
    "plot_intervals",
    "plot_pairs",
    "plot_training",
    "render",
    "save_video",
    "show",
    "show_clips",
    "top",
]
