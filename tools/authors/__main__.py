"""``python -m tools.authors scores --repo CLONE`` writes the authors' scores of every video,
``… tables`` computes from them what ``stepkit/paper/authors_*.csv`` holds.
"""

import argparse
import sys
from pathlib import Path

from stepkit._files import write_whole
from stepkit.published import FOLDER
from tools.authors import decided
from tools.authors.logs import extract
from tools.authors.scores import COMMIT, read


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    text = (
        "What the authors' own scores say: read them out of their repository, compute the tables."
    )
    top = argparse.ArgumentParser(prog="python -m tools.authors", description=text)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    text = "write the scores of every video, out of a clone's history; the clone is only read"
    add = commands.add_parser("scores", help=text, description=text).add_argument
    name = "shinkyo0513/Spatio-Temporal-Perturbations-for-Video-Attribution"
    add("--repo", required=True, metavar="CLONE", help=f"a clone of {name}")
    add("--commit", default=COMMIT, help="whose parent is read (default: %(default)s)")
    add("--out", default="runs/authors", metavar="DIR", help="default: %(default)s")
    text = "compute the tables that notebooks and claims show, from such scores"
    add = commands.add_parser("tables", help=text, description=text).add_argument
    add(
        "--authors", default="runs/authors", metavar="DIR", help="the scores (default: %(default)s)"
    )
    add("--out", type=Path, default=FOLDER, metavar="DIR", help="default: where git tracks them")
    return top


def write_scores(repo: str, commit: str, out: str) -> int:
    """Write the scores; say which runs were taken, which not, and where the paper differs."""
    tables, runs = extract(repo, out, commit)
    for row in runs.itertuples():
        state = "taken" if row.taken else f"left: {row.why}"
        print(f"{row.file}, line {row.line}: {row.map}, {row.videos} videos, {row.mean}; {state}")
    means = decided.means(tables)
    told = means[means["paper"].notna()]
    for row in told[~told["agrees"].astype(bool)].itertuples():
        where = f"{row.dataset}, {row.model}, {row.unit}, {row.method}"
        print(f"mean {row.mean}, the paper prints {row.paper}: {where}", file=sys.stderr)
    print(f"{runs['taken'].sum()} of {len(runs)} runs taken, {len(tables)} files in {out}")
    print(f"{told['agrees'].sum()} of {len(told)} means are the printed ones")
    return 0


def write_tables(authors: str, out: Path) -> int:
    """Write the tables."""
    cells = read(authors)
    for name, table in decided.TABLES.items():
        found = table(cells)
        write_whole(out / f"authors_{name}.csv", lambda path, t=found: t.to_csv(path, index=False))
        print(f"{out / f'authors_{name}.csv'}: {len(found)} rows")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status (2: the command cannot be carried out)."""
    options = vars(parser().parse_args(arguments))
    try:
        return {"scores": write_scores, "tables": write_tables}[options.pop("command")](**options)
    except ValueError as error:
        print(f"stepkit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
