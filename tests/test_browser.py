"""Notebook 09 in a real JupyterLab and a real Chromium: every control does what it says.

The same in Voilà, without its code: it opens and moves.

Screenshots go to the folder that STEPKIT_SCREENSHOTS names, if it names one.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

import stepkit as sk
from stepkit.panels import KINDS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.timeout(300),
]

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {  # no question about news, no asking the network, every cell in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
WAIT = 30_000  # ms


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with settings, and in books/ a small copy of notebook 09."""
    folder = tmp_path_factory.mktemp("lab")
    book = nbformat.read(ROOT / "notebooks" / "09_explorer.ipynb", 4)
    cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    smaller = {"out": str(folder / "run"), "clips": 2, "steps": 8}
    smaller |= {"methods": ["step", "grad_cam", "random"]}
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in smaller.items())
    for c in book.cells:
        if c.cell_type == "code":
            c.outputs, c.execution_count = [], None
    (folder / "books").mkdir()
    nbformat.write(book, folder / "books" / "09_explorer.ipynb")
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return folder


@contextlib.contextmanager
def served(folder: Path, module: str, *options: str):
    """Run a server, and wait until it answers; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {f"JUPYTER_{name.upper()}_DIR": str(folder / name) for name in ("config", "runtime")}
    places |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "PYTHONPATH": str(ROOT)}
    log = folder / f"{module}.log"
    with log.open("w") as said:
        server = subprocess.Popen(
            [sys.executable, "-m", module, f"--port={port}", "--no-browser", *options],
            env=os.environ | places,
            cwd=folder / "books",
            stdout=said,
            stderr=said,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=60).close()
                break
            except urllib.error.HTTPError:  # Voilà has no such page, but it answers
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, harmless: str = "nothing is"):
    """A page; afterwards, nothing was complained of on its console but what is ``harmless``."""
    said = []
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(WAIT)
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    page.close()
    assert not [text for text in said if harmless not in text]


@pytest.fixture(scope="module")
def page(folder, browser):
    """The notebook in JupyterLab, all its cells run."""
    options = ["--IdentityProvider.token=stepkit", f"--ServerApp.root_dir={folder / 'books'}"]
    options += ["--LabApp.expose_app_in_browser=True", "--allow-root"]
    with served(folder, "jupyterlab", *options) as address, opened(browser) as page:
        page.goto(f"{address}/doc/tree/09_explorer.ipynb?token=stepkit")
        page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget")
        page.evaluate("window.jupyterapp.shell.currentWidget.context.sessionContext.ready")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.locator("img.widget-image").first.wait_for(timeout=4 * WAIT)
        yield page


DIGEST = """async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return bytes.reduce((sum, byte) => (31 * sum + byte) | 0, 0);
}"""
DIGESTS = f"images => Promise.all(images.map({DIGEST}))"


def pictures(page) -> dict[tuple[str, str], int]:
    """A digest of each picture, by row and kind."""
    names = [(row, kind) for row in "AB" for kind in KINDS]
    return dict(zip(names, page.locator("img.widget-image").evaluate_all(DIGESTS), strict=True))


def charts(page) -> list[str]:
    """The two charts, as drawn."""
    return page.locator(".widget-html svg").evaluate_all("all => all.map(e => e.outerHTML)")


def until(page, what, message: str):
    """Wait for a true value, and return it."""
    for _ in range(WAIT // 100):
        if found := what():
            return found
        page.wait_for_timeout(100)
    pytest.fail(message)


def told(page, text: str) -> None:
    page.locator(".widget-html-content", has_text=text).last.wait_for()


def changes(page, act, *expected) -> None:
    """Do it, and wait until these pictures are others: "kind" in both rows, or "row kind"."""
    before = pictures(page)
    keys = [key for key in before if {key[1], " ".join(key)} & set(expected)]
    act()

    def changed():
        now = pictures(page)
        return [key for key in now if now[key] != before[key]]

    until(page, lambda: set(changed()) >= set(keys), f"not all of {expected} changed")
    page.wait_for_timeout(200)
    assert changed() == keys


def named(page, name: str, kind: str):
    label = page.locator("label.widget-label").get_by_text(name, exact=True)
    return page.locator(f".{kind}", has=label)


def choose(page, name: str, value: str):
    return lambda: named(page, name, "widget-dropdown").locator("select").select_option(label=value)


def slide(page, name: str, key: str):
    return lambda: named(page, name, "widget-slider").locator(".noUi-handle").press(key)


def click(page, name: str) -> None:
    page.locator("button.jupyter-button", has_text=name).last.click()


def shoot(page, name: str, width: int, height: int, tmp_path: Path) -> None:
    """Photograph the whole explorer; it must not be wider than its cell."""
    folder = Path(os.environ.get("STEPKIT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(700)
    explorer = page.locator(".stepkit-explorer")
    explorer.scroll_into_view_if_needed()
    explorer.screenshot(path=folder / f"{name}.png")
    assert explorer.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    page.set_viewport_size({"width": 1280, "height": 1000})


def complete(page) -> None:
    """Wait until all is there: Φ, both charts, and nine pictures (the clip stands in both rows)."""
    told(page, "Φ of the whole clip")
    until(page, lambda: len(charts(page)) == 2 and "Grad-CAM: Φ" in charts(page)[1], "no curve")
    assert len(set(pictures(page).values())) == 9


# The tests run in this order on one page.


def test_it_opens_with_pictures_of_the_maps_that_are_given(page, tmp_path):
    complete(page)
    shoot(page, "desktop", 1280, 1600, tmp_path)
    shoot(page, "narrow", 420, 2800, tmp_path)


def test_every_choice_changes_what_it_must_and_nothing_else(page):
    every = "clip", "overlay", "kept", "mask", "inserted"
    changes(page, slide(page, "opacity", "Home"), "overlay")
    changes(page, choose(page, "colours", "viridis"), "mask")
    changes(page, slide(page, "opacity", "End"), "overlay")
    changes(page, choose(page, "area", "5 %"), "A overlay", "A mask", "kept")
    changes(page, choose(page, "area", "sum (heatmap)"), "A overlay", "A mask", "kept")
    changes(page, choose(page, "model", "r50l narrow"), *every[1:])
    changes(page, choose(page, "method B", "Random"), *[f"B {kind}" for kind in every[1:]])
    told(page, "Random keeps the top 15 %")  # grey until it is computed
    changes(page, slide(page, "inserted", "ArrowRight"), "inserted")
    assert "38%" in charts(page)[1]  # three of eight steps
    changes(page, slide(page, "frame", "ArrowRight"), *every)
    changes(page, lambda: choose(page, "clip", page_clips(page)[1])(), *every)


def page_clips(page) -> list[str]:
    return named(page, "clip", "widget-dropdown").locator("option").all_inner_texts()


def test_play_moves_the_frames(page):
    before = charts(page)[0]
    page.locator(".widget-play button").nth(0).click()
    until(page, lambda: charts(page)[0] != before, "the frame stands still")
    page.locator(".widget-play button").nth(0).click()


def test_explain_shows_masks_on_the_way_and_stop_ends_it(page):
    choose(page, "area", "10 %")()
    choose(page, "preset", "default, 1200 iterations")()
    before = pictures(page)["A", "mask"]
    click(page, "Explain")
    told(page, "STEP is running")
    until(page, lambda: pictures(page)["A", "mask"] != before, "no mask on the way")
    slide(page, "opacity", "Home")()  # alive meanwhile
    until(page, lambda: "0.00" in named(page, "opacity", "widget-slider").inner_text(), "stuck")
    click(page, "Stop")
    told(page, "STEP stopped after")


def test_a_class_of_ones_own_asks_for_an_explanation(page):
    choose(
        page, "class", named(page, "class", "widget-dropdown").locator("option").last.inner_text()
    )()
    told(page, "press Explain")
    choose(page, "preset", "fast, 60 iterations")()
    click(page, "Explain")
    told(page, "STEP finished 60 iterations")


def test_downloads_hold_what_is_seen(page):
    click(page, "Prepare downloads")
    links = page.locator(".widget-html a[download]")
    links.first.wait_for()
    files = {}
    for i in range(links.count()):
        with page.expect_download() as waiting:
            links.nth(i).click()
        files[waiting.value.suggested_filename] = Path(waiting.value.path()).read_bytes()
    kinds = [Path(name).suffix for name in files]
    assert kinds == [".npz", ".mp4", ".gif"] * 2 + [".csv"]
    mask, film, _, *_, table = files.values()
    assert np.load(io.BytesIO(mask))["masks"].shape == (4, 8, 48, 48)
    assert b"ftyp" in film[:16]
    assert set(pd.read_csv(io.BytesIO(table))["method"]) == {"step", "random"}


def give(page, path: Path) -> None:
    with page.expect_file_chooser() as waiting:
        click(page, "Your video")
    waiting.value.set_files(path)


def test_a_video_of_ones_own(page, tmp_path):
    clip = torch.randn(3, 12, 40, 60, generator=torch.Generator().manual_seed(0))
    video = sk.save_video(tmp_path / "mine.mp4", clip)
    (tmp_path / "notes.mp4").write_text("no video")
    give(page, tmp_path / "notes.mp4")
    told(page, "notes.mp4")
    told(page, "not a video")
    give(page, video)
    told(page, "mine.mp4: choose its class")
    assert page_clips(page)[-1] == "mine.mp4"


@pytest.fixture
def voila(folder, browser):
    """The notebook in Voilà, which runs its cells and shows no code."""
    pytest.importorskip("voila", reason="voila is not installed")
    offline = "ERR_NAME_NOT_RESOLVED"  # its page asks the network for MathJax and fonts
    options = ["09_explorer.ipynb"]
    with served(folder, "voila", *options) as address, opened(browser, offline) as page:
        page.goto(address, timeout=4 * WAIT)
        page.locator("img.widget-image").first.wait_for(timeout=4 * WAIT)
        yield page


def test_voila_shows_it_without_code(voila, tmp_path):
    complete(voila)
    assert not any(code.is_visible() for code in voila.get_by_text("sk.Study(").all())
    shoot(voila, "voila", 1280, 1600, tmp_path)
    # Grad-CAM's layer has one time step for these two frames: its mask stands still
    moving = "clip", "overlay", "kept", "A mask", "inserted"
    changes(voila, slide(voila, "frame", "ArrowRight"), *moving)
