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
from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
from torch import Tensor

from stepkit import _checks, metrics, panels
from stepkit._checks import one_of, require
from stepkit._controls import Controls
from stepkit.attribution import METHODS, step
from stepkit.panels import State
from stepkit.viz._style import caption

__all__ = ["Explorer", "explore"]

OTHERS = ("grad_cam", "gradient", "integrated_gradients", "random")
OFFERED = {"step": {"preset": "fast"}} | {method: {} for method in OTHERS}
PERIOD = 0.5  # seconds between two looks at masks that are being optimised


def explore(models, clips, targets=None, *, classes=None, maps=None, methods=OFFERED, steps=16):
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
    methods = methods | {"step": methods.get("step", OFFERED["step"])}
    for method in methods:
        one_of("methods", method, METHODS)
    for name, clip in clips.items():
        _checks.tensor(f"clips[{name!r}]", clip, "(3, T, H, W)")
    first, start = next(iter(models.values())), next(iter(clips.values()))
    classes = range(len(panels.probabilities(first, start))) if classes is None else classes
    for name, model in models.items():
        count = len(panels.probabilities(model, start))
        fits = len(classes) == count
        require(fits, "classes", f"{len(classes)} names", f"{count}, as models[{name!r}] has")
    targets = targets if isinstance(targets, Mapping) else dict.fromkeys(clips, targets)
    aims = {}
    for name, clip in clips.items():
        target = targets.get(name)
        target = panels.probabilities(first, clip).argmax() if target is None else target
        aims[name] = int(_checks.targets(target, 1))
        require(aims[name] < len(classes), "targets", aims[name], f"classes 0..{len(classes) - 1}")
    state = State(dict(models), dict(clips), aims, [*map(str, classes)], methods, steps)
    for model, of_model in (maps or {}).items():
        for clip, of_clip in of_model.items():
            for method, found in of_clip.items():
                state.give(model, clip, method, found)
    return Explorer(state)


class Explorer(Controls):
    """What `explore` returns; its controls are attributes, such as ``.frame`` and ``.area``."""

    def __init__(self, state: State):
        super().__init__(state)
        self._queue, self._lock, self._stop = queue.Queue(), threading.RLock(), threading.Event()
        self._running, self._quiet = None, False
        for control in (*self.choices, self.frame, self.share):
            control.observe(self._change, "value")
        self.upload.observe(self._take, "value")
        self.explain.on_click(self._start)
        self.stop.on_click(lambda _: self._stop.set())
        self.prepare.on_click(lambda _: self._queue.put(self._export))
        threading.Thread(target=self._work, daemon=True, name="stepkit.explore").start()
        with self._lock:
            self._aim()
            self._render()

    # --- what is seen ---

    def _change(self, change) -> None:
        """A control has another value."""
        with self._lock:
            if self._quiet:
                return
            if change.owner is self.clip:
                self._aim()
                self.status.value = "STEP is running" if self._running else ""
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
        whole = self._fact("whole", self.model.value, self.clip.value)
        self.heading.value = _told(whole, self._heading, "")
        clip, look = self.state.clips[self.clip.value], (self.opacity.value, self.cmap.value)
        energies, curves = {}, {}
        for name, row in self.rows.items():
            key, label = self._key(name), f"{name} {caption(self._key(name)[-1])}"
            found = self._fact("map", *key)
            until = "press <i>Explain</i>" if key[-1] == "step" else "computing …"
            about = _told(found, partial(self._about, key), until)
            row.title.value = f"<b>{name}  {html.escape(caption(key[-1]))}</b> {about}"
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

    def _heading(self, whole: Tensor) -> str:
        best, target = int(whole.argmax()), self.target.value
        text = f"Φ of the whole clip: {whole[target]:.2f}"
        if best != target:
            text += f"; the model says {self.state.classes[best]}, {whole[best]:.2f}"
        return html.escape(text)

    def _about(self, key: tuple, found: Tensor) -> str:
        """Say what an explanation keeps."""
        keep = panels.see(found, self.area.value, self.state.areas).keep
        share = "" if keep is None else f"the top {100 * keep:.3g} %, "
        phi = self._fact("phi", *key, self.area.value)
        return f"keeps {share}Φ = <b>{_told(phi, '{:.2f}'.format)}</b>"

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

    def _start(self, _) -> None:
        with self._lock:
            if self._running:
                return
            if "step" not in (self.a.value, self.b.value):
                self.a.value = "step"
            self._running = self._key("A" if self.a.value == "step" else "B")
            self._stop.clear()
            self.progress.value, self.progress.max = 0, self.state.iterations(self.preset.value)
            self._show_running()
            self.status.value = "STEP is running"
        self._queue.put(partial(self._explain, self._running, self.preset.value))

    def _show_running(self) -> None:
        self.explain.disabled, self.stop.disabled = bool(self._running), not self._running
        self.progress.layout.display = "" if self._running else "none"

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
            self._show_running()
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
            self.clip.options, self.clip.value = list(self.state.clips), name
            self._aim()
            self.status.value = f"{html.escape(name)}: choose its class, then explain it"
            self._render()

    def _export(self) -> None:
        """Offer what is seen as links that hold the files themselves."""
        with self._lock:
            keys = [self._key(name) for name, row in self.rows.items() if row.found is not None]
            require(len(keys) > 0, "downloads", "no map yet", "an explanation")
            look, made = {"opacity": self.opacity.value, "cmap": self.cmap.value}, {}
            for key in keys:
                made |= panels.files(self.state, key, self.area.value, **look)
            table = pd.concat(panels.scores(self.state, key, self.area.value) for key in keys)
            made[f"{self.clip.value}_scores.csv"] = table.to_csv(index=False).encode()
            self.links.value = " ".join(panels.link(*file) for file in made.items())


def _told(fact, write: Callable, unknown: str = "…") -> str:
    """Write a fact, or what went wrong, or that it is not known yet."""
    if isinstance(fact, Exception):
        return _error(fact)
    return unknown if fact is None else write(fact)


def _error(error: Exception) -> str:
    text = html.escape(f"{type(error).__name__}: {error}")
    return f'<span role="alert" style="color:#b00020"><b>Error</b> {text}</span>'
