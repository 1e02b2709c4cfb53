"""Write anew what the checkpoints in ``stepkit/weights`` say of themselves; their tensors stay.

`stepkit.training.fit` finds a checkpoint by its recipe (`stepkit.training.recipe_of`). Run this
where that has changed its form, or where a checkpoint was put there by an older stepkit.
"""

import json
from dataclasses import fields

from safetensors import safe_open
from safetensors.torch import load_file

from stepkit._files import write_tensors
from stepkit.data import Synthetic
from stepkit.training import WEIGHTS, Recipe, recipe_of

VALIDATION = 120  # clips; `stepkit.study.Study.dataset`


def stamp(path) -> None:
    """Write one checkpoint anew, after what it says itself, in this form or in that of 0.1.0."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
    said = json.loads(told["run"] if "run" in told else told["key"].rpartition(" ")[0])
    if "run" in told:  # 0.1.0
        name, options = path.stem.partition(f"_{said['dataset']}")[0], {"seed": said["data_seed"]}
        options |= {"frames": said["frames"], "size": tuple(said["size"])}
        counts = {"train": said["clips"], "val": VALIDATION}
        parts = [Synthetic(said["dataset"], split, n, **options) for split, n in counts.items()]
    else:
        names, name = ("name", "split", "n", "frames", "size", "seed"), said["model"]
        parts = [Synthetic(**{key: part[key] for key in names}) for part in said["data"]]
    recipe = Recipe(**{f.name: said[f.name] for f in fields(Recipe) if f.name in said})
    write_tensors(path, recipe_of(name, *parts, recipe, said["seed"]), load_file(path))


if __name__ == "__main__":
    for checkpoint in sorted(WEIGHTS.glob("*.safetensors")):
        stamp(checkpoint)
        print(checkpoint.name)
