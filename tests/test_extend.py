"""What a reader adds in a file of their own: found everywhere, no file of the library touched.

The file is `docs/extend.md`'s own code.
"""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import papermill
import pytest
import torch

import stepkit as sk
from stepkit.attribution import METHODS
from stepkit.data import DATASETS
from stepkit.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAMES = "frame_drop", "sparseness", "flashes"
CLIPS = {"frames": 4, "size": 16}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """``mine.py`` on the path, not yet imported; forgotten afterwards."""
    (tmp_path / "mine.py").write_text("\n\n".join(BLOCKS[:4]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)
    for registry, name in zip((METHODS, METRICS, DATASETS), NAMES, strict=True):
        registry.pop(name, None)


def study(out, **more):
    names = ["mine:network"], ["flashes"], ["frame_drop", "gradient", "random"]
    given = {"extra": "mine", "clips": 4, **CLIPS}
    return sk.Study(*names, ["sparseness", "located"], out=str(out), recipe=RECIPE, **given, **more)


RECIPE = {"epochs": 1, "batch_size": 4}


def test_each_is_shorter_than_fifteen_lines():
    for block in BLOCKS[:4]:
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) - sum(line.startswith("import") for line in lines) <= 15


def test_the_page_runs_and_its_table_has_intervals(mine):
    names = {"__name__": "mine"}
    exec("\n\n".join(BLOCKS[:4]), names)
    exec(BLOCKS[4].replace('study.table("sparseness")', 'found = study.table("sparseness")'), names)
    found = names["found"]
    methods = found.index.get_level_values("method").tolist()
    assert methods == ["frame_drop", "gradient", "random"]
    assert {"mean", "low", "high"} <= set(found)
    assert found.loc["flashes", "mine", "frame_drop"]["mean"] > 0.5  # nearly all in one frame


def test_they_are_listed_beside_the_librarys_own(mine):
    sk.load_dataset("flashes", "test", n=2, extra="mine", **CLIPS)
    assert sk.methods().loc["frame_drop", "label"] == "Frame drop"
    assert sk.methods().loc["frame_drop", "options"] == "fill"
    assert {"sparseness", "auc"} <= set(METRICS)
    assert {"flashes", "ucf101-24"} <= set(DATASETS)


def test_a_study_takes_all_four_by_name(mine):
    found = study(mine / "run")
    table = found.table("located", "mass")
    assert table.index.get_level_values("method").tolist() == ["frame_drop", "gradient", "random"]
    assert table[["mean", "low", "high"]].notna().all(axis=None)
    shown, network = found.batch(), found.network()
    maps = sk.attribute("frame_drop", network, shown.clips, shown.targets)
    assert found.maps("frame_drop")["maps"].equal(maps)
    with torch.no_grad():
        dark = shown.clips.clone()
        dark[:, :, 2] = 0
        phi = network(shown.clips).softmax(1), network(dark).softmax(1)
    lost = (phi[0] - phi[1]).gather(1, shown.targets[:, None])[:, 0]
    assert maps[:, 2, 5, 5].tolist() == pytest.approx(lost.tolist(), abs=1e-6)


def test_a_sweep_on_processes_takes_them_and_resumes(mine):
    source = partial(sk.load_dataset, "flashes", "test", n=4, extra="mine", **CLIPS)
    network = partial(sk.load_model, "mine:network", 2)
    given = source, network, {"frame_drop": {"fill": 0.5}, "gradient": {}}, mine / "maps"
    how = {"model_name": "mine", "executor": "processes", "workers": 2}
    first = sk.sweep(*given, **how)
    assert first["what"].tolist() == ["made"] * 8
    gone = sorted((mine / "maps").rglob("frame_drop/*.safetensors"))[0]
    gone.unlink()
    again = sk.sweep(*given, **how)
    assert sorted(again["what"]) == ["found"] * 7 + ["made"]


def test_the_command_line_takes_them(mine):
    from safetensors.torch import save_file

    save_file(sk.load_model("mine:network", 2).state_dict(), mine / "mine.safetensors")
    command = re.search(r"^stepkit (sweep .*?)\n```", PAGE, re.DOTALL | re.MULTILINE)[1]
    words = [*command.replace("\\\n", " ").split(), "--n", "4"]
    run = [sys.executable, "-m", "stepkit", *words]
    done = subprocess.run(run, cwd=mine, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 of 8 done: 8 made" in done.stdout


def test_notebook_05_takes_them_by_its_parameters(mine):
    """As `make reproduce SET=...` of the page, at a small size."""
    given = {"extra": "mine", "also": ["frame_drop"], "datasets": ["flashes"]}
    given |= {"models": ["mine:network"], "out": str(mine / "run"), "recipe": RECIPE}
    given |= {"clips": 4, "points": 2, "steps": 3, "units": ["patch"], **CLIPS}
    path, executed = ROOT / "notebooks" / "05_comparison.ipynb", mine / "05.ipynb"
    papermill.execute_notebook(path, executed, given, cwd=path.parent, progress_bar=False)
    shown = [
        out["data"].get("text/plain", "")
        for cell in nbformat.read(executed, 4).cells
        for out in cell.get("outputs", [])
        if "data" in out
    ]
    assert any("frame_drop" in text and "grad_cam" in text and "[" in text for text in shown)
