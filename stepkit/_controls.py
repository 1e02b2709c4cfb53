"""What the explorer looks like: its widgets and their places. What they do: `stepkit.explorer`."""

import ipywidgets as widgets

from stepkit import panels
from stepkit.attribution import PRESETS
from stepkit.panels import KINDS, SUM, State
from stepkit.viz._style import CMAP, OPACITY, caption

CMAPS = ("inferno", "viridis", "cividis", "gray")  # each brighter from end to end
LABELS = {"kept": "kept only", "inserted": "partly inserted"}
_WIDE = {"width": "170px"}
_SMALL = {"font_size": "13px"}


class Controls(widgets.VBox):
    """All widgets as attributes, such as ``.frame`` and ``.area``, in their places."""

    def __init__(self, state: State):
        self.state = state
        self._make_choices()
        self._make_buttons()
        self.heading, self.status, self.links = _label(), _label(), _label()
        self.energy, self.curve = (widgets.HTML(layout={"width": "100%"}) for _ in range(2))
        self.rows = {"A": _Row(), "B": _Row()}
        super().__init__(self._arrange(), layout={"max_width": "1240px", "width": "100%"})
        self.add_class("stepkit-explorer")

    def _make_choices(self) -> None:
        names, areas = list(self.state.methods), self.state.areas
        offered = [(caption(name), name) for name in names]
        self.clip = _choice("clip", list(self.state.clips))
        self.target = _choice("class", [(name, i) for i, name in enumerate(self.state.classes)])
        self.model = _choice("model", [(caption(name), name) for name in self.state.models])
        self.a = _choice("method A", offered)
        self.b = _choice("method B", offered, names[min(1, len(names) - 1)])
        shares = [(f"{100 * v:.3g} %", v) for v in areas]
        self.area = _choice("area", [*shares, ("sum (heatmap)", SUM)], areas[len(areas) // 2])
        self.cmap = _choice("colours", CMAPS, CMAP)
        self.opacity = _slider(widgets.FloatSlider, "opacity", OPACITY, 1, 0.05)
        self.frame = _slider(widgets.IntSlider, "frame", 0, 0, 1)
        self.share = _slider(widgets.FloatSlider, "inserted", 0.25, 1, 1 / self.state.steps)
        self.share.readout_format = ".0%"
        self.choices = [self.clip, self.target, self.model, self.area, self.a, self.b]
        self.choices += [self.cmap, self.opacity]

    def _make_buttons(self) -> None:
        self.play = widgets.Play(interval=200, repeat=True, layout={"width": "auto"})
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        presets = [(f"{p}, {self.state.iterations(p)} iterations", p) for p in PRESETS]
        preset = self.state.methods["step"].get("preset", "default")
        self.preset = _choice("preset", presets, preset)
        about = "Run STEP on this clip, for this class"
        self.explain = _button("Explain", "search", about, button_style="primary")
        self.stop = _button("Stop", "stop", "End STEP here, and keep its masks", disabled=True)
        self.progress = widgets.IntProgress(layout={"width": "240px", "display": "none"})
        accept = "video/*,.mkv,.avi,.gif"
        self.upload = widgets.FileUpload(accept=accept, description="Your video", layout=_WIDE)
        self.prepare = _button("Prepare downloads", "download", "Masks, overlays and scores")

    def _arrange(self) -> list[widgets.Widget]:
        energy = widgets.VBox([_line(self.play, self.frame), self.energy])
        curve = widgets.VBox([_line(self.share), self.curve])
        hint = f"up to {panels.MAX_BYTES >> 20} MB (Jupyter drops what is larger without a word)"
        return [
            _grid(self.choices, 270),
            self.heading,
            *self.rows.values(),
            _grid([energy, curve], 300),
            _line(self.preset, self.explain, self.stop, self.progress),
            _line(self.upload, _label(hint), self.prepare, self.links),
            self.status,
        ]


class _Row(widgets.VBox):
    """The pictures of one method: a title, and five films of which one frame is seen."""

    def __init__(self):
        self.found, self.films, self.title = None, {}, _label()
        self.images = {k: widgets.Image(format="jpeg", layout={"width": "100%"}) for k in KINDS}
        pairs = self.images.items()
        cells = [widgets.VBox([_label(LABELS.get(kind, kind)), image]) for kind, image in pairs]
        super().__init__([self.title, _grid(cells, 145)])


def _choice(name: str, options, value=None) -> widgets.Dropdown:
    given = {} if value is None else {"value": value}
    return widgets.Dropdown(description=name, options=options, layout={"width": "auto"}, **given)


def _slider(kind, name: str, value, high, by):
    layout = {"width": "auto", "flex": "1 1 250px"}
    return kind(value=value, min=0, max=high, step=by, description=name, layout=layout)


def _button(name: str, icon: str, about: str, **more) -> widgets.Button:
    return widgets.Button(description=name, icon=icon, tooltip=about, layout=_WIDE, **more)


def _label(text: str = "") -> widgets.HTML:
    """Return a line of text that is as high as its letters."""
    return widgets.HTML(text, layout={"margin": "2px 0", "height": "auto"}, style=_SMALL)


def _line(*children) -> widgets.HBox:
    layout = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "2px 10px"}
    return widgets.HBox(children, layout=layout)


def _grid(children, least: int) -> widgets.GridBox:
    """Lay out columns of equal width, as many as fit."""
    columns = f"repeat(auto-fit, minmax({least}px, 1fr))"
    layout = {"grid_template_columns": columns, "grid_gap": "6px 12px", "width": "100%"}
    return widgets.GridBox(children, layout=layout)
