"""What people see: pictures and short videos here, plots in `stepkit.viz.plots`."""

from stepkit.viz._frames import display
from stepkit.viz._style import caption
from stepkit.viz.film import save_video
from stepkit.viz.pictures import show, show_clips

__all__ = ["caption", "display", "save_video", "show", "show_clips"]
