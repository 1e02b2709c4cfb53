"""What a run shows in one page: ``report.html``, made of its executed notebooks.

An executed notebook carries its own account (parameters, start, duration, failure) in the metadata
that papermill writes, so the report is made of the files alone.
"""

import os
import platform
import re
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from stepkit import __version__
from stepkit._checks import warn
from stepkit._notebook import parameters, partial, read_whole, write_text

__all__ = ["machine", "write"]

VERSIONS = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "av")
TEMPLATE = Path(__file__).parent / "templates" / "report.html"


def write(page: Path, executed: list[Path], sources: list[Path], profile) -> Path:
    """Write the page of a run; return its path.

    Parameters
    ----------
    page : Path
        ``report.html`` in the folder of the run.
    executed, sources : list of Path
        The notebooks of the run, there or not yet, and what each was made of.
    profile : Profile
        What the run was made with.
    """
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    pairs = zip(executed, sources, strict=True)
    sections = [_section(page.parent, done, source, exporter) for done, source in pairs]
    text = exporter.environment.from_string(TEMPLATE.read_text("utf-8")).render(
        profile=profile,
        sections=sections,
        minutes=sum(section["seconds"] for section in sections) / 60,
        machine=machine(),
        written=datetime.now().astimezone(),
        highlighting=HtmlFormatter().get_style_defs(".highlight"),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)
    return page


def _section(folder: Path, executed: Path, source: Path, exporter) -> dict:
    """Return what the page says of one notebook; a run that stopped half-way counts as the last."""
    section = {"id": source.stem, "title": source.stem, "status": "not run", "seconds": 0}
    path = partial(executed) if partial(executed).exists() else executed
    if not path.exists():
        return section
    book = read_whole(path)
    try:
        if book is None:
            raise ValueError("it is not what was written")
        account = book.metadata.get("papermill", {})
        resources = {"metadata": {"path": str(source.parent)}}
        return section | {
            "title": _title(book) or source.stem,
            "status": "done" if path == executed else "stopped",
            "seconds": account.get("duration") or 0,
            "started": datetime.fromisoformat(account["start_time"]).astimezone(),
            "parameters": parameters(source) | account.get("parameters", {}),
            "given": account.get("parameters", {}),
            "file": path.relative_to(folder).as_posix(),
            "body": exporter.from_notebook_node(book, resources=resources)[0],
        }
    except Exception as error:  # half a file can raise nearly anything; the others are shown
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        warn(f"report: '{path}' is damaged ({told}) and left out; run it again")
        return section | {"status": "damaged"}


def _title(book) -> str:
    heads = (re.search(r"^# +(.+)", cell.source, re.M) for cell in book.cells)
    return next((head[1].strip() for head in heads if head), "")


def machine() -> dict[str, str]:
    """Return what the run depended on: device, system, versions."""
    device = f"CPU, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device = "Apple GPU (MPS)"
    found = {"device": device, "system": platform.platform(), "Python": platform.python_version()}
    found["stepkit"] = __version__
    found |= {name: metadata.version(name) for name in VERSIONS}
    commit = _commit(Path(__file__).parent)
    return found | ({"commit": commit} if commit else {})


def _commit(folder: Path) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return ""
    return answer.stdout.strip()
