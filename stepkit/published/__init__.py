"""What is published: the tables that the paper prints, and what its authors' own scores decide.

The authors' repository holds, in its history, the score of every map of Tables IV and V, video by
video. It has no licence, so the scores are not part of this project; what our code computes from
them is, ``stepkit/paper/authors_*.csv``. ``python tools/authors.py --help`` says how to read
the scores out of a clone, and how to compute these tables again.
"""

import pandas as pd

from stepkit._checks import one_of
from stepkit.published import decided, scores
from stepkit.published.printed import FOLDER, LABELS, STANDS_FOR, TABLES, beside, family, table

__all__ = ["FOLDER", "LABELS", "STANDS_FOR", "TABLES", "authors", "beside", "family", "table"]


def authors(name: str, folder: str = "") -> pd.DataFrame:
    """Return what the authors' own scores say; every row names the runs that it was computed from.

    Parameters
    ----------
    name : str
        ``"means"``: of every method, the paper's number beside. ``"differences"``: STEP (T_K = 8)
        minus every method, T_K and variant. ``"reliability"``: α as printed and as coded.
        ``"ranks"``: mean ranks among the methods of Table V. ``"classes"``: differences by class of
        UCF101-24. ``"power"``: for each pair of methods, how many scenes tell a difference.
    folder : str
        Where ``python tools/authors.py scores`` put the scores: the table is computed from
        them, in seconds. Empty: the tracked table, which is the same.

    Returns
    -------
    DataFrame
        Columns as `stepkit.published.decided` says. Intervals are over scenes.
    """
    one_of("name", name, decided.TABLES)
    if folder:
        return decided.TABLES[name](scores.read(folder))
    return pd.read_csv(FOLDER / f"authors_{name}.csv")
