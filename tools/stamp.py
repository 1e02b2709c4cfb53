"""Write anew what the checkpoints in ``stepkit/weights`` say of themselves; their tensors stay.

`stepkit.training.fit` finds a checkpoint by its recipe (`stepkit.training.recipe_of`). Run this
where that has changed its form.
"""

import json
from dataclasses import fields

from safetensors import safe_open
from safetensors.torch import load_file

from stepkit._files import write_tensors
from stepkit.data import load_dataset
from stepkit.training import WEIGHTS, Recipe, recipe_of

OF_DATA = ("name", "split", "n", "frames", "size", "seed")


def stamp(path) -> None:
    """Write one checkpoint anew, after what it says itself."""
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["key"].rpartition(" ")[0])
    parts = [load_dataset(**{key: part[key] for key in OF_DATA}) for part in said["data"]]
    recipe = Recipe(**{f.name: said[f.name] for f in fields(Recipe) if f.name in said})
    write_tensors(path, recipe_of(said["model"], *parts, recipe, said["seed"]), load_file(path))


if __name__ == "__main__":
    for checkpoint in sorted(WEIGHTS.glob("*.safetensors")):
        stamp(checkpoint)
        print(checkpoint.name)
