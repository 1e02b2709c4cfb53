"""The explorer: a video, its masks and its curves under sliders, in JupyterLab and Voilà.

`stepkit.panels` says what is seen of a choice; `Explorer` wires it to core widgets of ipywidgets.

All that asks a network is done by one thread beside the kernel's, so that the controls stay alive
and two computations never change one model. What it found is kept as *facts*; every redraw shows
the facts that are there and asks for those that are missing.
"""

import html
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import ipywidgets as widgets
import pandas as pd
from torch import Tensor, nn

from stepkit import _checks, metrics, panels
from stepkit._checks import one_of, require
from stepkit.attribution import _METHODS as KNOWN
from stepkit.attribution import PRESETS, attribute, step
from stepkit.panels import KINDS, SUM
from stepkit.viz._style import CMAP, OPACITY, caption

__all__ = ["Explorer", "explore"]

OTHERS = ("grad_cam", "gradient", "integrated_gradients", "random")
METHODS = {"step": {"preset": "fast"}} | {method: {} for method in OTHERS}
AREAS = (0.05, 0.10, 0.15, 0.20)
CMAPS = ("inferno", "viridis", "cividis", "gray")  # each brighter from end to end
LABELS = {"kept": "kept only", "inserted": "partly inserted"}
PERIOD = 0.5  # seconds between two looks at masks that are being optimised


def explore(models, clips, targets=None, *, classes=None, maps=None, methods=METHODS, steps=16):
    """Explore what methods mark in clips, with sliders; in JupyterLab or Voilà.

    Parameters
    ----------
    models : nn.Module or dict of str to nn.Module
        Clips (N, 3, T, H, W) to logits (N, K), all of the same classes.
    clips : Tensor or dict of str to Tensor
        float32 (3, T, H, W), normalised. An uploaded video is read in the size of the first.
    targets : int or dict of str to int, optional
        The class to explain, of each clip. Default: the one that the first model names.
    classes : list of str, optional
        Their names. Default: numbers.
    maps : dict, optional
        What is known already: ``maps[model][clip][method]``, for these targets. (T, H, W); of
        ``"step"`` the masks (A, T, H, W). The rest is computed when it is chosen, STEP on a click.
    methods : dict of str to dict
        The methods to choose from, ids of `stepkit.methods`, each with its options; the first two
        stand side by side. STEP is always among them. Its areas (5, 10, 15 and 20 %) are those to
        choose from; of another method's map, each is the share of its highest voxels.
    steps : int, default 16
        Of the insertion curves.

    Returns
    -------
    Explorer
        A widget; as the last value of a notebook cell it shows itself.

    Raises
    ------
    TypeError, ValueError
        Clips, maps or models that do not fit each other; unknown methods; a target outside the
        classes. What goes wrong later is said in the widget.

    Notes
    -----
    STEP runs beside the notebook: until it ends, leave the model alone in other cells.

    Examples
    --------
    >>> sk.explore(model, clip, 3, classes=names)  # doctest: +SKIP
    """
    models = models if isinstance(models, Mapping) else {"model": models}
    clips = clips if isinstance(clips, Mapping) else {"clip": clips}
    require(len(models) > 0, "models", "none", "at least one")
    require(len(clips) > 0, "clips", "none", "at least one")
    methods = methods | {"step": methods.get("step", METHODS["step"])}
    for method in methods:
        one_of("methods", method, KNOWN)
    for name, clip in clips.items():
        _checks.tensor(f"clips[{name!r}]", clip, "(3, T, H, W)")
    first, start = next(iter(models.values())), next(iter(clips.values()))
    counts = {name: len(panels.probabilities(model, start)) for name, model in models.items()}
    count = next(iter(counts.values()))
    classes = list(map(str, range(count) if classes is None else classes))
    require(len(classes) == count, "classes", f"{len(classes)} names", f"{count}")
    for name, given in counts.items():
        require(given == count, f"models[{name!r}]", given, f"{count} classes")
    targets = targets if isinstance(targets, Mapping) else dict.fromkeys(clips, targets)
    aims = {}
    for name, clip in clips.items():
        target = targets.get(name)
        target = panels.probabilities(first, clip).argmax() if target is None else target
        aims[name] = int(_checks.targets(target, 1))
        require(aims[name] < count, "targets", aims[name], f"classes 0..{count - 1}")
    state = State(dict(models), dict(clips), aims, classes, methods, steps)
    for model, of_model in (maps or {}).items():
        for clip, of_clip in of_model.items():
            for method, found in of_clip.items():
                state.give(model, clip, method, found)
    return Explorer(state)


@dataclass
class State:
    """What is explored, and all that is known of it."""

    models: dict[str, nn.Module]
    clips: dict[str, Tensor]
    targets: dict[str, int]
    classes: list[str]
    methods: dict[str, dict]
    steps: int
    facts: dict[tuple, object] = field(default_factory=dict)  # None: asked for

    @property
    def areas(self) -> tuple:
        """The areas of STEP's masks."""
        return tuple(self.methods["step"].get("areas", AREAS))

    def give(self, model: str, clip: str, method: str, found: Tensor) -> None:
        """Take a map or STEP's masks that the caller has."""
        one_of("maps, model", model, self.models)
        one_of("maps, clip", clip, self.clips)
        one_of("maps, method", method, self.methods)
        areas = f"{len(self.areas)}, " if method == "step" and found.ndim == 4 else ""
        shape = ", ".join(map(str, self.clips[clip].shape[1:]))
        where = f"maps[{model!r}][{clip!r}][{method!r}]"
        found = _checks.tensor(where, found, f"({areas}{shape})").detach().cpu()
        self.facts["map", model, clip, self.targets[clip], method] = found

    def find(self, kind: str, model: str, clip: str, target=None, method=None, area=None):
        """Ask a network: Φ of the "whole" clip, a "map", Φ of what it keeps, its "curve"."""
        network, given = self.models[model], self.clips[clip]
        if kind == "whole":
            return panels.probabilities(network, given)
        if kind == "map":
            options = self.methods[method]
            return attribute(method, network, given[None], target, **options)[0].cpu()
        found = self.facts["map", model, clip, target, method]
        if kind == "phi":
            removal = self.methods["step"].get("removal", "blur")
            kept = panels.keep(given, panels.see(found, area, self.areas), removal)
            return float(panels.probabilities(network, kept)[target])
        heat = panels.see(found, SUM, self.areas).drawn[None].to(given.device)
        return metrics.insertion(network, given[None], heat, target, steps=self.steps)

    def forget(self, *key) -> None:
        """Drop what was found for a model, clip, class and method."""
        for fact in [fact for fact in self.facts if fact[1 : 1 + len(key)] == key]:
            del self.facts[fact]


class Explorer(widgets.VBox):
    """What `explore` returns; its controls are attributes, such as ``.frame`` and ``.area``."""

    def __init__(self, state: State):
        self.state, self._queue = state, queue.Queue()
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._running, self._quiet = None, False
        self._make_controls()
        super().__init__(self._arrange(), layout=widgets.Layout(max_width="1240px", width="100%"))
        self.add_class("stepkit-explorer")
        for control in (self.clip, self.target, self.model, self.a, self.b, self.area, self.cmap):
            control.observe(self._change, "value")
        for control in (self.opacity, self.share, self.frame):
            control.observe(self._change, "value")
        self.upload.observe(self._take, "value")
        self.explain.on_click(self._start)
        self.stop.on_click(lambda _: self._stop.set())
        self.prepare.on_click(lambda _: self._queue.put(self._export))
        threading.Thread(target=self._work, daemon=True, name="stepkit.explore").start()
        with self._lock:
            self._aim()
            self._render()

    def _make_controls(self) -> None:
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
        self.play = widgets.Play(interval=200, repeat=True, layout={"width": "auto"})
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        presets = [(f"{name}, {self._iterations(name)} iterations", name) for name in PRESETS]
        preset = self.state.methods["step"].get("preset", "default")
        self.preset = _choice("preset", presets, preset)
        about = "Run STEP on this clip, for this class"
        self.explain = _button("Explain", "search", about, button_style="primary")
        self.stop = _button("Stop", "stop", "End STEP here, and keep its masks", disabled=True)
        self.progress = widgets.IntProgress(layout={"width": "240px", "display": "none"})
        accept = "video/*,.mkv,.avi,.gif"
        self.upload = widgets.FileUpload(accept=accept, description="Your video", layout=_WIDE)
        self.prepare = _button("Prepare downloads", "download", "Masks, overlays and scores")
        self.heading, self.status, self.links = _label(), _label(), _label()
        self.energy, self.curve = (widgets.HTML(layout={"width": "100%"}) for _ in range(2))
        self.rows = {"A": _Row(), "B": _Row()}

    def _arrange(self) -> list[widgets.Widget]:
        choices = [self.clip, self.target, self.model, self.area, self.a, self.b]
        charts = [
            widgets.VBox([_line(self.play, self.frame), self.energy]),
            widgets.VBox([_line(self.share), self.curve]),
        ]
        hint = f"up to {panels.MAX_BYTES >> 20} MB (Jupyter drops what is larger without a word)"
        return [
            _grid([*choices, self.cmap, self.opacity], 270),
            self.heading,
            *self.rows.values(),
            _grid(charts, 300),
            _line(self.preset, self.explain, self.stop, self.progress),
            _line(self.upload, _label(hint), self.prepare, self.links),
            self.status,
        ]

    # --- what is seen ---

    def _change(self, change) -> None:
        """A control has another value."""
        with self._lock:
            if self._quiet:
                return
            if change.owner is self.clip:
                self._aim()
            self.state.targets[self.clip.value] = self.target.value
            self._render()

    def _aim(self) -> None:
        """Set the class and the length of the clip that is chosen."""
        self._quiet = True
        self.target.value = self.state.targets[self.clip.value]
        self.play.max = self.frame.max = self.state.clips[self.clip.value].shape[1] - 1
        self._quiet = False

    def _key(self, row: str) -> tuple[str, str, int, str]:
        method = self.a if row == "A" else self.b
        return self.model.value, self.clip.value, self.target.value, method.value

    def _render(self) -> None:
        """Show what is known of what is chosen, and ask for the rest."""
        self.heading.value = self._heading(self._fact("whole", self.model.value, self.clip.value))
        clip, look = self.state.clips[self.clip.value], (self.opacity.value, self.cmap.value)
        energies, curves = {}, {}
        for name, row in self.rows.items():
            key, label = self._key(name), f"{name} {caption(self._key(name)[-1])}"
            found = self._fact("map", *key)
            row.title.value = f"<b>{name}  {html.escape(label[2:])}</b> {self._about(key, found)}"
            row.found = found if isinstance(found, Tensor) else None
            given = self.area.value, self.state.areas
            films = panels.films(clip, row.found, *given, self.share.value, *look)
            if films != row.films:
                self.links.value, row.films = "", films  # they are of what was seen before
            for kind, image in row.images.items():
                image.value = films[kind][self.frame.value]
            if row.found is not None:
                energies[label] = panels.energy(panels.see(found, *given))
                curve = self._fact("curve", *key)
                if isinstance(curve, metrics.Curve):
                    curves[label] = curve.curve[0].tolist()
        self.energy.value = panels.energy_chart(energies, self.frame.value)
        self.curve.value = panels.curve_chart(curves, self.share.value)

    def _heading(self, whole) -> str:
        if not isinstance(whole, Tensor):
            return "" if whole is None else _error(whole)
        best, classes = int(whole.argmax()), self.state.classes
        text = f"Φ of the whole clip: {whole[self.target.value]:.2f}"
        if best != self.target.value:
            text += f"; the model says {classes[best]}, {whole[best]:.2f}"
        return html.escape(text)

    def _about(self, key: tuple, found) -> str:
        """Say what an explanation keeps, or why there is none."""
        if found is None:
            return "press <i>Explain</i>" if key[-1] == "step" else "computing …"
        if isinstance(found, Exception):
            return _error(found)
        phi = self._fact("phi", *key, self.area.value)
        if isinstance(phi, Exception):
            return _error(phi)
        keep = panels.see(found, self.area.value, self.state.areas).keep
        share = "" if keep is None else f"the top {100 * keep:.3g} %, "
        return f"keeps {share}Φ = <b>{'…' if phi is None else f'{phi:.2f}'}</b>"

    # --- what is known, and the thread that finds it out ---

    def _fact(self, *fact):
        """Return what is known; None if nothing is, and then it is asked for."""
        on_click = fact[0] == "map" and fact[-1] == "step"
        if fact not in self.state.facts and not on_click and fact[1:5] != self._running:
            self.state.facts[fact] = None
            self._queue.put(partial(self._learn, fact))
        return self.state.facts.get(fact)

    def _learn(self, fact: tuple) -> None:
        if fact not in self.state.facts:  # forgotten meanwhile
            return
        try:
            found = self.state.find(*fact)
        except Exception as error:
            found = error
        with self._lock:
            self.state.facts[fact] = found
            self._render()

    def _work(self) -> None:
        while True:
            self._do(self._queue.get())

    def _do(self, job) -> None:
        try:
            job()
        except Exception as error:  # shown, not lost with the thread
            self.status.value = _error(error)
        finally:
            self._queue.task_done()

    # --- STEP ---

    def _iterations(self, preset: str) -> int:
        return self.state.methods["step"].get("iterations", PRESETS[preset].iterations)

    def _start(self, _) -> None:
        with self._lock:
            if self._running:
                return
            if "step" not in (self.a.value, self.b.value):
                self.a.value = "step"
            self._running = self._key("A" if self.a.value == "step" else "B")
            self._stop.clear()
            self.explain.disabled, self.stop.disabled = True, False
            self.progress.value, self.progress.max = 0, self._iterations(self.preset.value)
            self.progress.layout.display = ""
            self.status.value = "STEP is running"
        self._queue.put(partial(self._explain, self._running, self.preset.value))

    def _explain(self, key: tuple, preset: str) -> None:
        """Run STEP in the thread; the masks appear on the way."""
        model, clip, target, method = key
        options = self.state.methods[method] | {"preset": preset, "areas": self.state.areas}
        begun = shown = time.monotonic()

        def look(done: int, masks: Tensor, phi: Tensor) -> bool:
            nonlocal shown
            while not self._queue.empty():  # what else was asked meanwhile
                self._do(self._queue.get())
            if time.monotonic() - shown > PERIOD:
                self.progress.value = done
                self._keep_masks(key, masks, phi)
                shown = time.monotonic()
            return self._stop.is_set()

        try:
            clips = self.state.clips[clip][None]
            found = step(self.state.models[model], clips, target, callback=look, **options)
            done, seconds = found.history["iteration"].nunique(), time.monotonic() - begun
            words = "stopped after" if found.interrupted else "finished"
            self.status.value = f"STEP {words} {done} iterations, {seconds:.1f} s"
        finally:
            self._running = None
            self.explain.disabled, self.stop.disabled = False, True
            self.progress.layout.display = "none"
        self._keep_masks(key, found.masks, found.probabilities)

    def _keep_masks(self, key: tuple, masks: Tensor, phi: Tensor) -> None:
        with self._lock:
            self.state.forget(*key)  # of the masks before
            self.state.facts["map", *key] = masks[0].detach().cpu().clone()
            for area, value in zip(self.state.areas, phi[0].tolist(), strict=True):
                self.state.facts["phi", *key, area] = value
            self._render()

    # --- in and out ---

    def _take(self, _) -> None:
        if self.upload.value:
            file = self.upload.value[0]
            name = panels.plain_name(file["name"])
            self.status.value = f"reading {html.escape(name)} …"
            self._queue.put(partial(self._read, name, file["content"]))

    def _read(self, name: str, content) -> None:
        like = next(iter(self.state.clips.values()))
        try:
            clip = panels.read_upload(name, content, like.shape[1], tuple(like.shape[2:]))
            said = panels.probabilities(self.state.models[self.model.value], clip)
        finally:
            self.upload.value = ()  # the same file can be chosen again
        with self._lock:
            for model in self.state.models:
                self.state.forget(model, name)  # of another video of this name
            self.state.clips[name], self.state.targets[name] = clip, int(said.argmax())
            self._quiet = True
            self.clip.options = list(self.state.clips)
            self.clip.value = name
            self._aim()
            self.status.value = f"{html.escape(name)}: choose its class, then explain it"
            self._render()

    def _export(self) -> None:
        """Offer what is seen as links that hold the files themselves."""
        with self._lock:
            rows = {name: row for name, row in self.rows.items() if row.found is not None}
            require(len(rows) > 0, "downloads", "no map yet", "an explanation")
            links, tables = [], []
            look = {"opacity": self.opacity.value, "cmap": self.cmap.value}
            for name, row in rows.items():
                key = model, clip, target, method = self._key(name)
                seen = panels.see(row.found, self.area.value, self.state.areas)
                given = self.state.clips[clip], row.found, seen, self.state.areas
                made = panels.files(*given, **look)
                links += [panels.link(f"{clip}_{model}_{method}{end}", made[end]) for end in made]
                names = {"clip": clip, "model": model, "class": self.state.classes[target]}
                names |= {"method": method, "area": self.area.value}
                facts = ("phi", *key, self.area.value), ("curve", *key)
                known = [self.state.facts.get(fact) for fact in facts]
                known = [None if isinstance(found, Exception) else found for found in known]
                tables.append(panels.scores(seen, *known, **names))
            table = pd.concat(tables).to_csv(index=False)
            links.append(panels.link(f"{clip}_scores.csv", table.encode()))
            self.links.value = " ".join(links)


_WIDE = {"width": "170px"}
_SMALL = {"font_size": "13px"}


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


def _error(error: Exception) -> str:
    text = html.escape(f"{type(error).__name__}: {error}")
    return f'<span role="alert" style="color:#b00020"><b>Error</b> {text}</span>'
