"""The explorer: a video, its masks and its curves under sliders, in JupyterLab and Voilà.

`stepkit.panels` says what is seen of a choice; `Explorer` wires it to core widgets of ipywidgets.

All that asks a network is done by one thread beside the kernel's, so that the controls stay alive
and two computations never change one model. What it found is kept as *facts*; every redraw shows
the facts that are there and asks for those that are missing. Frames are encoded when a choice
changes: moving in time only swaps bytes, so nothing flickers.
"""

import html
import queue
import threading
import time
from collections.abc import Mapping
from functools import partial

import ipywidgets as widgets
import pandas as pd
from torch import Tensor

from stepkit import _checks, metrics, panels
from stepkit.attribution import PRESETS, attribute, step
from stepkit.attribution import methods as known_methods
from stepkit.panels import KINDS, SUM
from stepkit.viz._style import CMAP, OPACITY, caption

OTHERS = ("grad_cam", "gradient", "integrated_gradients", "random")
METHODS = {"step": {"preset": "fast"}} | {method: {} for method in OTHERS}
AREAS = (0.05, 0.10, 0.15, 0.20)
CMAPS = ("inferno", "viridis", "cividis", "gray")  # each brighter from end to end
LABELS = {"kept": "kept only", "inserted": "partly inserted"}
OF_A_MAP = KINDS[1:]  # all but the clip itself
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
    _checks.require(len(models) > 0, "models", "none", "at least one")
    _checks.require(len(clips) > 0, "clips", "none", "at least one")
    methods = {**methods}
    methods.setdefault("step", METHODS["step"])
    for method in methods:
        _checks.one_of("methods", method, known_methods().index)
    for name, clip in clips.items():
        _checks.tensor(f"clips[{name!r}]", clip, "(3, T, H, W)")
    first, start = next(iter(models.values())), next(iter(clips.values()))
    count = len(panels.probabilities(first, start))
    classes = list(map(str, range(count) if classes is None else classes))
    _checks.require(len(classes) == count, "classes", f"{len(classes)} names", f"{count}")
    for name, model in models.items():
        given = len(panels.probabilities(model, start))
        _checks.require(
            given == len(classes), f"models[{name!r}]", given, f"{len(classes)} classes"
        )
    if not isinstance(targets, Mapping):
        targets = dict.fromkeys(clips, targets)
    known = {}
    for name, clip in clips.items():
        given = targets.get(name)
        given = panels.probabilities(first, clip).argmax() if given is None else given
        known[name] = int(_checks.targets(given, 1))
        fits = known[name] < count
        _checks.require(fits, "targets", known[name], f"classes 0..{count - 1}")
    return Explorer(dict(models), dict(clips), known, classes, maps or {}, methods, steps)


class Explorer(widgets.VBox):
    """What `explore` returns; its controls are attributes, such as ``.frame`` and ``.area``."""

    def __init__(self, models, clips, targets, classes, maps, methods, steps):
        self._models, self._clips, self._targets = models, clips, targets
        self._classes, self._methods, self._steps = classes, methods, steps
        self._areas = tuple(methods["step"].get("areas", AREAS))
        self._facts: dict[tuple, object] = {}  # None: asked for
        self._queue: queue.Queue = queue.Queue()
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._running, self._quiet = None, False
        for model, of_model in maps.items():
            for clip, of_clip in of_model.items():
                for method, found in of_clip.items():
                    self._give(model, clip, method, found)
        self._make_controls()
        super().__init__(self._arrange(), layout=widgets.Layout(max_width="1240px", width="100%"))
        self.add_class("stepkit-explorer")
        self._observe()
        threading.Thread(target=self._work, daemon=True, name="stepkit.explore").start()
        self._pick()

    def _give(self, model: str, clip: str, method: str, found: Tensor) -> None:
        """Take a map or STEP's masks that the caller has."""
        for argument, name, names in (("model", model, self._models), ("clip", clip, self._clips)):
            _checks.one_of(f"maps, {argument}", name, names)
        _checks.one_of("maps, method", method, self._methods)
        several = method == "step" and found.ndim == 4
        size = (*([len(self._areas)] if several else []), *self._clips[clip].shape[1:])
        shape = "(A, T, H, W)" if several else "(T, H, W)"
        where = f"maps[{model!r}][{clip!r}][{method!r}]"
        found = _checks.tensor(where, found, shape).detach().cpu()
        _checks.require(tuple(found.shape) == size, where, f"shape {tuple(found.shape)}", size)
        self._facts["map", (model, clip, self._targets[clip], method)] = found

    # --- the controls ---

    def _make_controls(self) -> None:
        names = list(self._methods)
        offered = [(caption(name), name) for name in names]
        areas = [(f"{100 * v:.3g} %", v) for v in self._areas]
        self.clip = _choice("clip", list(self._clips))
        self.target = _choice("class", [(name, i) for i, name in enumerate(self._classes)])
        self.model = _choice("model", [(caption(name), name) for name in self._models])
        self.a = _choice("method A", offered)
        self.b = _choice("method B", offered, names[min(1, len(names) - 1)])
        middle = self._areas[len(self._areas) // 2]
        self.area = _choice("area", [*areas, ("sum (heatmap)", SUM)], middle)
        self.cmap = _choice("colours", CMAPS, CMAP)
        self.opacity = _slider(widgets.FloatSlider, "opacity", OPACITY, 1, 0.05)
        self.frame = _slider(widgets.IntSlider, "frame", 0, 0, 1)
        self.share = _slider(widgets.FloatSlider, "inserted", 0.25, 1, 1 / self._steps)
        self.share.readout_format = ".0%"
        self.play = widgets.Play(interval=200, repeat=True, layout={"width": "auto"})
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        preset = self._methods["step"].get("preset", "default")
        presets = [(f"{name}, {self._iterations(name)} iterations", name) for name in PRESETS]
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
        choices += [self.cmap, self.opacity]
        charts = [
            widgets.VBox([_line(self.play, self.frame), self.energy]),
            widgets.VBox([_line(self.share), self.curve]),
        ]
        hint = f"up to {panels.MAX_BYTES >> 20} MB (Jupyter drops what is larger without a word)"
        return [
            _grid(choices, 270),
            self.heading,
            *self.rows.values(),
            _grid(charts, 300),
            _line(self.preset, self.explain, self.stop, self.progress),
            _line(self.upload, _label(hint), self.prepare, self.links),
            self.status,
        ]

    def _observe(self) -> None:
        def on(control, call):
            control.observe(lambda _: call(), "value")

        on(self.clip, self._pick)
        on(self.target, self._aim)
        for control in (self.model, self.a, self.b):
            on(control, self._redraw)
        on(self.area, partial(self._redraw, ("overlay", "kept", "mask")))
        on(self.cmap, partial(self._redraw, ("overlay", "mask")))
        on(self.opacity, partial(self._redraw, ("overlay",)))
        on(self.share, partial(self._redraw, ("inserted",)))
        on(self.frame, self._move)
        on(self.upload, self._take)
        self.explain.on_click(self._start)
        self.stop.on_click(lambda _: self._stop.set())
        self.prepare.on_click(lambda _: self._queue.put(self._export))

    # --- what is seen ---

    def _key(self, row: str) -> tuple[str, str, int, str]:
        method = self.a if row == "A" else self.b
        return self.model.value, self.clip.value, self.target.value, method.value

    def _pick(self) -> None:
        """Show another clip: its class, its length."""
        with self._lock:
            self._quiet = True
            self.target.value = self._targets[self.clip.value]
            last = self._clips[self.clip.value].shape[1] - 1
            self.play.max = self.frame.max = last
            self._quiet = False
            self._redraw(KINDS)

    def _aim(self) -> None:
        if not self._quiet:
            self._targets[self.clip.value] = self.target.value
            self._redraw()

    def _redraw(self, kinds=OF_A_MAP) -> None:
        """Draw these kinds of pictures anew, and all that is written."""
        with self._lock:
            if self._quiet:
                return
            if kinds:
                self.links.value = ""  # they are of what was seen before
            self._head()
            clip, given = self._clips[self.clip.value], (self.share.value, self._look())
            for name, row in self.rows.items():
                row.found = self._fact("map", self._key(name))
                row.seen = None
                if isinstance(row.found, Tensor):
                    row.seen = panels.see(row.found, self.area.value, self._areas)
                for kind in kinds:
                    row.films[kind] = panels.film(clip, row.found, row.seen, kind, *given)
                row.title.value = self._title(name, row)
            seen = {name: row.seen for name, row in self.rows.items() if row.seen}
            self._energies = {self._label(name): panels.energy(of) for name, of in seen.items()}
            self._move()
            self._draw_curve()

    def _head(self) -> None:
        whole = self._fact("whole", (self.model.value, self.clip.value))
        if isinstance(whole, Tensor):
            best = int(whole.argmax())
            text = f"Φ of the whole clip: {_number(whole[self.target.value])}"
            if best != self.target.value:
                text += f"; the model says {self._classes[best]}, {_number(whole[best])}"
            self.heading.value = html.escape(text)
        else:
            self.heading.value = "" if whole is None else _error(whole)

    def _title(self, name: str, row: "_Row") -> str:
        key = self._key(name)
        title = f"<b>{name}  {html.escape(caption(key[3]))}</b> "
        if isinstance(row.found, Exception):
            return title + _error(row.found)
        if row.seen is None:
            return title + ("press <i>Explain</i>" if key[3] == "step" else "computing …")
        phi = self._fact("phi", key, self.area.value)
        if isinstance(phi, Exception):
            return title + _error(phi)
        share = "" if row.seen.keep is None else f"the top {100 * row.seen.keep:.3g} %, "
        return f"{title}keeps {share}Φ = <b>{'…' if phi is None else _number(phi)}</b>"

    def _move(self) -> None:
        """Show another frame: only bytes are swapped."""
        with self._lock:
            if self._quiet:
                return
            for row in self.rows.values():
                row.show(self.frame.value)
            self.energy.value = panels.energy_chart(self._energies, self.frame.value)

    def _draw_curve(self) -> None:
        seen = [name for name, row in self.rows.items() if row.seen]
        curves = {name: self._fact("curve", self._key(name)) for name in seen}
        values = {
            self._label(name): curve.curve[0].tolist()
            for name, curve in curves.items()
            if isinstance(curve, metrics.Curve)
        }
        self.curve.value = panels.curve_chart(values, self.share.value)

    def _label(self, row: str) -> str:
        return f"{row} {caption(self._key(row)[3])}"

    # --- what is known, and the thread that finds it out ---

    def _fact(self, kind: str, key: tuple, *more):
        """Return what is known; None if nothing is, and then it is asked for."""
        fact = kind, key, *more
        on_click = kind == "map" and key[-1] == "step"
        if fact not in self._facts and not on_click and key != self._running:
            self._facts[fact] = None
            self._queue.put(partial(self._learn, fact))
        return self._facts.get(fact)

    def _known(self, *fact):
        """Return what is known; None, if nothing is or it went wrong."""
        found = self._facts.get(fact)
        return None if isinstance(found, Exception) else found

    def _learn(self, fact: tuple) -> None:
        if fact not in self._facts:  # forgotten meanwhile
            return
        kind, key, *rest = fact
        try:
            self._facts[fact] = getattr(self, f"_find_{kind}")(key, *rest)
        except Exception as error:
            self._facts[fact] = error
        self._redraw(OF_A_MAP if kind == "map" else ())

    def _find_whole(self, key) -> Tensor:
        return panels.probabilities(self._models[key[0]], self._clips[key[1]])

    def _find_map(self, key) -> Tensor:
        model, clip, target, method = key
        options = self._methods[method]
        clips = self._clips[clip][None]
        return attribute(method, self._models[model], clips, target, **options)[0].cpu()

    def _find_phi(self, key, area) -> float:
        model, clip, target, _ = key
        seen = panels.see(self._facts["map", key], area, self._areas)
        kept = panels.keep(self._clips[clip], seen, self._methods["step"].get("removal", "blur"))
        return float(panels.probabilities(self._models[model], kept)[target])

    def _find_curve(self, key) -> metrics.Curve:
        model, clip, target, _ = key
        heat = panels.see(self._facts["map", key], SUM, self._areas).drawn
        clips = self._clips[clip][None]
        where = self._models[model], clips, heat[None].to(clips.device), target
        return metrics.insertion(*where, steps=self._steps)

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
        return self._methods["step"].get("iterations", PRESETS[preset].iterations)

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

    def _explain(self, key, preset: str) -> None:
        """Run STEP in the thread; the masks appear on the way."""
        model, clip, target, method = key
        options = self._methods[method] | {"preset": preset, "areas": self._areas}
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
            clips = self._clips[clip][None]
            found = step(self._models[model], clips, target, callback=look, **options)
            done = found.history["iteration"].nunique()
            seconds = time.monotonic() - begun
            words = "stopped after" if found.interrupted else "finished"
            self.status.value = f"STEP {words} {done} iterations, {seconds:.1f} s"
            self.progress.value = done
        finally:
            self._running = None
            self.explain.disabled, self.stop.disabled = False, True
            self.progress.layout.display = "none"
        self._keep_masks(key, found.masks, found.probabilities)

    def _keep_masks(self, key, masks: Tensor, phi: Tensor) -> None:
        for fact in list(self._facts):
            if fact[1] == key:
                del self._facts[fact]  # of the masks before
        self._facts["map", key] = masks[0].detach().cpu().clone()
        for area, value in zip(self._areas, phi[0].tolist(), strict=True):
            self._facts["phi", key, area] = value
        self._redraw()

    # --- in and out ---

    def _take(self) -> None:
        if self.upload.value:
            file = self.upload.value[0]
            name = panels.plain_name(file["name"])
            self.status.value = f"reading {html.escape(name)} …"
            self._queue.put(partial(self._read, name, file["content"]))

    def _read(self, name: str, content) -> None:
        like = next(iter(self._clips.values()))
        try:
            clip = panels.read_upload(name, content, like.shape[1], tuple(like.shape[2:]))
            said = panels.probabilities(self._models[self.model.value], clip)
        finally:
            self.upload.value = ()  # the same file can be chosen again
        with self._lock:
            for fact in list(self._facts):
                if fact[1][1] == name:
                    del self._facts[fact]  # of another video of this name
            self._clips[name], self._targets[name] = clip, int(said.argmax())
            self._quiet = True
            self.clip.options = list(self._clips)
            self.clip.value = name
            self._quiet = False
            self.status.value = f"{html.escape(name)}: choose its class, then explain it"
            self._pick()

    def _export(self) -> None:
        """Offer what is seen as links that hold the files themselves."""
        with self._lock:
            rows = {name: row for name, row in self.rows.items() if row.seen}
            _checks.require(len(rows) > 0, "downloads", "no map yet", "an explanation")
            links, tables = [], []
            for name, row in rows.items():
                key = model, clip, target, method = self._key(name)
                given = self._clips[clip], row.found, row.seen, self._areas, self._look()
                stem = f"{clip}_{model}_{method}"
                links += [panels.link(stem + end, d) for end, d in panels.files(*given).items()]
                names = {"clip": clip, "model": model, "class": self._classes[target]}
                names |= {"method": method, "area": self.area.value}
                known = self._known("phi", key, self.area.value), self._known("curve", key)
                tables.append(panels.scores(row.seen, *known, **names))
            table = pd.concat(tables).to_csv(index=False)
            links.append(panels.link(f"{clip}_scores.csv", table.encode()))
            self.links.value = " ".join(links)

    def _look(self) -> tuple[float, str]:
        return self.opacity.value, self.cmap.value


_WIDE = {"width": "170px"}
_SMALL = {"font_size": "13px"}


class _Row(widgets.VBox):
    """The pictures of one method: a title, and five films of which one frame is seen."""

    def __init__(self):
        self.found, self.seen, self.films = None, None, {}
        self.title = _label()
        self.images = {
            kind: widgets.Image(format="jpeg", layout={"width": "100%"}) for kind in KINDS
        }
        cells = [
            widgets.VBox([_label(LABELS.get(kind, kind)), image])
            for kind, image in self.images.items()
        ]
        super().__init__([self.title, _grid(cells, 145)])

    def show(self, frame: int) -> None:
        for kind, film in self.films.items():
            self.images[kind].value = film[min(frame, len(film) - 1)]


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


def _number(value) -> str:
    return f"{float(value):.2f}"


def _error(error: Exception) -> str:
    text = html.escape(f"{type(error).__name__}: {error}")
    return f'<span role="alert" style="color:#b00020"><b>Error</b> {text}</span>'
