"""What becomes of executed notebooks: made fit to keep, stored with outputs, bound in one page.

An executed notebook carries its own account (parameters, start, duration, failure) in the metadata
that papermill writes, so the report is made of the files alone.
"""

import base64
import hashlib
import html
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

from PIL import Image

from stepkit import __version__
from stepkit._checks import warn
from stepkit._files import read_table, write_whole

HASH = "stepkit_sha256"  # in the metadata of executed notebooks
INERT = "application/vnd.jupyter.widget-view+json"
VERSIONS = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "av", "captum")


def partial(executed: Path) -> Path:
    """Return the name that an executed notebook has until it is whole."""
    return executed.with_name(f"{executed.stem}.partial.ipynb")


def tidy(path: Path) -> None:
    """Take out of an executed notebook what has no meaning without its kernel.

    Widget views (their static twins stay), the widget state that papermill adds, and all but the
    last state of each progress bar. It then carries a hash, by which `write` tells if it is whole.
    """
    import nbformat

    book = nbformat.read(path, 4)
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if INERT not in out.get("data", {})]
            for out in cell.outputs:
                if out.output_type == "stream":
                    out.text = re.sub(r"[^\n]*\r(?!\n)", "", out.text)
    book.metadata[HASH] = _content(book)
    _write_notebook(book, path)


def _content(book) -> str:
    metadata = {name: value for name, value in book.metadata.items() if name != HASH}
    return hashlib.sha256(json.dumps([book.cells, metadata], sort_keys=True).encode()).hexdigest()


def _read_whole(path: Path):
    """Return an executed notebook; None, with a warning, for a damaged one."""
    import nbformat

    try:
        book = nbformat.read(path, 4)
        if book.metadata.get(HASH) in (None, _content(book)):
            return book
    except Exception:  # not text, not JSON, no notebook
        pass
    warn(f"{path}: damaged, left out of the report; run its notebook again")
    return None


def keep(folder: Path, pattern: str, place: Path) -> int:
    """Copy files of a run to where they are tracked; return how many."""
    files = sorted(folder.glob(pattern))
    for file in files:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place / file.name)
    return len(files)


def keep_claims(folder: Path, profile: str, path: Path) -> int:
    """Put a run's claims into the table of all runs, in place of its earlier ones; count them."""
    if not any(folder.glob("scores/claims_*.csv")):
        return 0
    import pandas as pd

    from stepkit.study import Experiment

    claims = Experiment(str(folder)).claims()
    claims.insert(0, "profile", profile)
    tables = [claims]
    known = read_table(path, notebook=str)
    if known is not None:
        tables.insert(0, known[known["profile"] != profile])
    table = pd.concat(tables).sort_values("profile", ascending=False, kind="stable")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, table.to_csv(index=False, lineterminator="\n"))  # git keeps it: no hash beside it
    _write(path.with_suffix(".md"), claims_page(table))
    return len(claims)


def claims_page(table) -> str:
    """Return the claims as Markdown: by the authors' own scores, then a table per profile of ours.

    A profile's table has a column per dataset and model.
    """
    from stepkit.published import claims

    table = table.astype({"unit": object, "against": object})
    table = table.fillna({"unit": "", "against": "", "ratio": 0.0})
    told = ["`python -m stepkit reproduce --profile <name> --store` writes this page and its CSV."]
    told += ["Each cell: the difference that the claim is about, its 95 % interval over clips, and"]
    told += ["what follows. *Against* is the best other method or setting on the same clips."]
    head = "# The paper's claims, as they come out here"
    parts = [claims.page(), head, "\n".join(told)]
    for profile, rows in table.groupby("profile", sort=False):
        cells = rows[["dataset", "model"]].drop_duplicates().sort_values(["dataset", "model"])
        names = [f"{plain(d)}<br>{plain(m)}" for d, m in cells.itertuples(index=False)]
        lines = [["claim", *names], ["---"] * (len(names) + 1)]
        for (claim, unit, ratio), of_claim in rows.groupby(["claim", "unit", "ratio"], sort=False):
            known = of_claim.set_index(["dataset", "model"])
            where = unit or (f"{ratio:.0%}" if ratio else "")
            line = [plain(f"{claim}, {where}" if where else claim)]
            for cell in cells.itertuples(index=False, name=None):
                line.append(_claim(known.loc[cell]) if cell in known.index else "")
            lines.append(line)
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## Profile `{profile}`\n\n{body}")
    return "\n\n".join(parts) + "\n"


def plain(text) -> str:
    r"""Return text as Markdown that shows it as it is, in a cell of a table too.

    Examples
    --------
    >>> print(plain("a_b | <i> $x$ *y*"))
    a_b \| &lt;i&gt; \$x\$ \*y\*
    """
    text = "".join(
        sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(text)
    )
    text = re.sub(r"[\\`*$|\[\]~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return html.escape(text, quote=False)


def _claim(row) -> str:
    marks = {"holds": "**holds**", "does not hold": "*does not hold*"}
    against = f"<br>against {plain(row['against'])}" if row["against"] else ""
    number = f"{row['mean']:.2g} [{row['low']:.2g}, {row['high']:.2g}]"
    return f"{marks.get(row['verdict'], plain(row['verdict']))}<br>{number}{against}"


def store(executed: Path, notebook: Path, names: dict[Path, str]) -> None:
    """Copy the outputs of ``executed`` into ``notebook``, which keeps everything else it has.

    Parameters
    ----------
    executed, notebook : Path
        The executed notebook, and the source that it was made of.
    names : dict of Path to str
        What stands in the outputs for paths of this machine, the longest first.

    Raises
    ------
    ValueError
        A cell of ``notebook`` was edited meanwhile: outputs and source would not belong together.
    """
    import nbformat

    ran = [
        cell
        for cell in nbformat.read(executed, 4).cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    book = nbformat.read(notebook, 4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    if [cell.source for cell in cells] != [cell.source for cell in ran]:
        raise ValueError(f"{notebook.name} was edited while it ran; run it again")
    names = names | {Path(sys.prefix): "<environment>", Path.home(): "~"}
    count = 0
    for cell, done in zip(cells, ran, strict=True):
        count += done.execution_count is not None
        # Counted anew without papermill's cell. nbval refuses outputs that have no count.
        cell.execution_count = count if done.execution_count is not None else None
        cell.outputs = [_light(_portable(out, names)) for out in done.outputs]
        for out in cell.outputs:
            if out.output_type == "execute_result":
                out.execution_count = count
    book.metadata.pop("widgets", None)
    book.metadata.language_info = {"name": "python"}  # no version, which would differ each time
    _write_notebook(book, notebook)


def _light(output):
    """Return an output whose pictures have 256 colours each: half of the bytes."""
    data = output.get("data", {})
    if "image/png" in data:
        with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as picture:
            few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        packed = io.BytesIO()
        few.save(packed, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(packed.getvalue()).decode()
    return output


def _portable(output, names: dict[Path, str]):
    """Return an output without the paths of this machine."""
    import nbformat

    # Pictures name no path, and the patterns below would crawl through megabytes of them.
    data = output.get("data", {})
    pictures = {kind: data[kind] for kind in data if kind.startswith("image/")}
    rest = (
        output | {"data": {k: v for k, v in data.items() if k not in pictures}} if data else output
    )
    text = json.dumps(rest, ensure_ascii=False)
    for path, name in names.items():
        if path != Path(path.anchor):
            text = re.sub(re.escape(json.dumps(str(path))[1:-1]) + r"(?![\w.-])", name, text)
    # The file that a traceback or a warning names for a cell lies in the system's temporary folder.
    text = re.sub(r'[^\s"\'(<]*ipykernel_\d+[/\\]+\d+\.py', "<cell>", text)
    portable = json.loads(text)
    if pictures:
        portable["data"] |= pictures
    return nbformat.from_dict(portable)


def _write_notebook(book, path: Path) -> None:
    import nbformat

    _write(path, nbformat.writes(book, 4) + "\n")


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write(folder: Path, notebooks, profile) -> Path:
    """Write ``report.html`` of what lies in ``folder/notebooks``; return its path.

    Parameters
    ----------
    folder : Path
        The folder of the run.
    notebooks : iterable of Path
        The sources, in order: an executed notebook whose source is gone is left out.
    profile : Profile
        What the run was made with.
    """
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter = HTMLExporter(template_name="basic", embed_images=True)
    sections = [_section(folder, notebook, exporter) for notebook in notebooks]
    template = (Path(__file__).parent / "templates" / "report.html").read_text("utf-8")
    page = exporter.environment.from_string(template).render(
        profile=profile,
        sections=sections,
        minutes=sum(section["seconds"] for section in sections) / 60,
        machine=machine(),
        written=datetime.now().astimezone(),
        highlighting=HtmlFormatter().get_style_defs(".highlight"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "report.html", page)
    return folder / "report.html"


def _section(folder: Path, notebook: Path, exporter) -> dict:
    """Return what the page says of one notebook; a run that stopped half-way counts as the last."""
    from stepkit.reproduce import parameters

    section = {"id": notebook.stem, "title": notebook.stem, "status": "not run", "seconds": 0}
    executed = folder / "notebooks" / notebook.name
    path = partial(executed) if partial(executed).exists() else executed
    if not path.exists():
        return section
    book = _read_whole(path)
    if book is None:
        return section | {"status": "damaged"}
    try:
        account = book.metadata.get("papermill", {})
        body, _ = exporter.from_notebook_node(
            book, resources={"metadata": {"path": str(notebook.parent)}}
        )
        return section | {
            "title": _title(book) or notebook.stem,
            "status": "done" if path == executed else "stopped",
            "seconds": account.get("duration") or 0,
            "started": datetime.fromisoformat(account["start_time"]).astimezone(),
            "parameters": parameters(notebook) | account.get("parameters", {}),
            "given": account.get("parameters", {}),
            "file": path.relative_to(folder).as_posix(),
            "body": body,
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
    import torch

    device = f"CPU, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device = "Apple GPU (MPS)"
    found = {"device": device, "system": platform.platform(), "Python": platform.python_version()}
    found["stepkit"] = __version__
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit(Path(__file__).parent)
    return found | ({"commit": commit} if commit else {})


def _commit(folder: Path) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return ""
    return answer.stdout.strip()
