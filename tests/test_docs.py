"""The Python of guide and README runs as it stands: with fresh weights, small and short."""

import re
from pathlib import Path

import pytest
import torch

import stepkit as sk

ROOT = Path(__file__).resolve().parents[1]
SMALLER = {  # what costs minutes or a download, and what stands here in its place
    "r2plus1d_18(weights=weights)": "r2plus1d_18(weights=None)",
    "frames=16, size=112": "frames=4, size=32",
    '"fast", progress=True': '"fast", iterations=2',
}


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = torch.randn(3, 6, 48, 48, generator=torch.Generator().manual_seed(0))
    sk.save_video(tmp_path / "mine.mp4", clip)
    return tmp_path


def test_the_guide(here):
    names = {}
    for code in blocks("docs/guide.md"):
        exec(code, names)
    made = {path.name for path in here.iterdir()}
    assert {"masks.png", "areas.png", "overlay.mp4", "masks.npz"} <= made


def test_the_readme(here):
    (code,) = blocks("README.md")
    exec(code, {})
    assert (here / "masks.png").is_file()
