"""Keep what a run made where git tracks it: ``python -m tools.store [--profile quick]``.

Of ``quick``: the outputs in ``notebooks/*.ipynb``, and ``figures/``; of another profile its figures
and scores in ``figures/<profile>/`` and ``results/<profile>/``. Its claims go into
``results/claims.csv`` and ``claims.md``, beside those of other profiles.
"""

import argparse
import base64
import html
import io
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image

from stepkit._files import read_table
from stepkit._notebook import write_notebook, write_text
from stepkit.reproduce import QUICK, ROOT, find_notebooks, numbers_of
from stepkit.study import Study
from tools.authors import claims as authors_claims


def store_run(folder: Path, profile: str, only=(), root: Path = ROOT) -> str:
    """Keep what lies in a run's folder; say how much it was."""
    own, notebooks = "" if profile == QUICK else profile, find_notebooks(root)
    chosen = [notebooks[number] for number in numbers_of(notebooks, only)]
    for notebook in chosen if profile == QUICK else ():
        names = {folder: f"runs/{profile}", root: "."}
        store(folder / "notebooks" / notebook.name, notebook, names)
    kept = keep(folder, "figures/*/*", root / "figures" / own)
    kept += keep(folder, "scores/*/*.csv", root / "results" / own) if own else 0
    claims = keep_claims(folder, profile, root / "results" / "claims.csv")
    return f"{len(chosen)} notebooks, {kept} files, {claims} claims"


def keep(folder: Path, pattern: str, place: Path) -> int:
    """Copy files of a run to where they are tracked, of each name the newest; return how many."""
    ordered = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    files = {file.name: file for file in ordered}
    for name, file in files.items():
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place / name)
    return len(files)


def keep_claims(folder: Path, profile: str, path: Path) -> int:
    """Put a run's claims into the table of all runs, in place of its earlier ones; count them."""
    if not any(folder.glob("scores/*/claims_*.csv")):
        return 0
    claims = Study(out=str(folder)).claims()
    claims.insert(0, "profile", profile)
    tables = [claims]
    known = read_table(path, notebook=str)
    if known is not None:
        tables.insert(0, known[known["profile"] != profile])
    table = pd.concat(tables).sort_values("profile", ascending=False, kind="stable")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        path, table.to_csv(index=False, lineterminator="\n")
    )  # git keeps it: no hash beside it
    write_text(path.with_suffix(".md"), claims_page(table))
    return len(claims)


def claims_page(table) -> str:
    """Return the claims as Markdown: by the authors' own scores, then a table per profile of ours.

    A profile's table has a column per dataset and model.
    """
    table = table.astype({"unit": object, "against": object})
    table = table.fillna({"unit": "", "against": "", "ratio": 0.0})
    told = ["`python -m tools.store --profile <name>` writes this page and its CSV after a run."]
    told += ["Each cell: the difference that the claim is about, its 95 % interval over clips, and"]
    told += ["what follows. *Against* is the best other method or setting on the same clips."]
    head = "# The paper's claims, as they come out here"
    parts = [authors_claims.page(), head, "\n".join(told)]
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


def _claim(row) -> str:
    marks = {"holds": "**holds**", "does not hold": "*does not hold*"}
    against = f"<br>against {plain(row['against'])}" if row["against"] else ""
    number = f"{row['mean']:.2g} [{row['low']:.2g}, {row['high']:.2g}]"
    return f"{marks.get(row['verdict'], plain(row['verdict']))}<br>{number}{against}"


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
    write_notebook(book, notebook)


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


def main() -> None:
    """Store the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default=QUICK, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", default=[], help="notebooks, by number or name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="default: %(default)s")
    given = parser.parse_args()
    print("Stored", store_run(given.out.resolve() / given.profile, given.profile, given.only))


if __name__ == "__main__":
    main()
