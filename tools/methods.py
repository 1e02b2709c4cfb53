"""Write ``docs/methods.md``, the table of `stepkit.methods`: ``python tools/methods.py``."""

from pathlib import Path

from stepkit.attribution import methods

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
HEAD = """\
# Methods of attribution

Written by `python tools/methods.py` from `sk.methods()`. What a method *works on*, the three
columns of the paper's Table I and the passes per clip were found by trying each method on small
networks (`python tools/trial.py`); the passes are those at default options on a clip
of 4 frames. Methods that optimise masks try the model out once beside. *Resolution* is what a map
has by itself, in space and time, before it is stretched to the clip.

Two rows differ from the paper's Table I, as tried here: I-GOS takes no gradient but the network's
own ("unmodified rule"), and DeepLIFT ran on all networks.

"""


def page() -> str:
    """Return the page as Markdown."""
    table = methods()
    table = table[table["forward"].notna()].reset_index()  # a test may have registered its own
    table["method"] = "`" + table["method"] + "`"
    table["options"] = table["options"].str.replace(r"(\w+)", r"`\1`", regex=True)
    table = table.replace({True: "yes", False: "no"}).astype(str)
    rows = [list(table), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return HEAD + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), "utf-8")
