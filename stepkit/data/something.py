"""Something-Something-V2, 25 classes: short videos of hands and things, told apart by motion alone.

On disk, under ``root`` (each video where it is found first, from top to bottom)::

    annotations/train_10000.json          the training list: [{"id": …, "template": …}, …]
    annotations/val_1000.json             the test list
    annotations/top25_labels_index.json   the classes: {template without brackets: number}
    videos/78687.webm                     the videos as handed out (or in another container)
    20bn-something-something-v2/78687.webm
    frames/78687/000001.jpg               or folders of frames
    78687.webm
"""

import json
import re
from pathlib import Path

from stepkit._checks import require
from stepkit.data.listed import Listed, Video, class_names, content, find_list
from stepkit.data.sample import dataset

__all__ = ["SomethingV2", "read_classes", "read_list"]

_LISTS = {"train": "train_*.json", "test": "val_*.json"}


@dataset(
    "something-v2",
    label="Something-V2",
    about="25 ways of moving things by hand; its authors hand it out, no boxes",
    folder="something-v2",
)
class SomethingV2(Listed):
    """The paper's 25 classes (§V-A.1): 10,000 training and 1,000 test videos, without boxes.

    Parameters
    ----------
    root, split, frames, size, seed, parts, missing
        As in `stepkit.data.listed.Listed`; the layout on disk is the module's.

    Examples
    --------
    >>> SomethingV2("something-v2")[0].clip.shape  # doctest: +SKIP
    torch.Size([3, 16, 112, 112])
    """

    name = "something-v2"
    places = ("videos", "20bn-something-something-v2", "frames", "")

    def read_lists(self, root: Path, split: str) -> tuple[list[str], list[Video]]:
        """Return the classes, in order of their numbers, and the videos of a list."""
        classes = read_classes(find_list(root, "*labels_index.json"))
        names = _LISTS if split == "all" else ["test" if split == "test" else "train"]
        lists = [read_list(find_list(root, _LISTS[name]), classes) for name in names]
        targets = {id_: target for each in lists for id_, target in each.items()}
        return classes, [Video(*item) for item in targets.items()]


def read_classes(path) -> list[str]:
    """Read the class index, ``{"Opening something": 8, …}``: the templates in order.

    Raises
    ------
    ValueError
        No JSON, another structure, or numbers other than 0, 1, … K − 1.
    """
    index = _json(path, "class_list")
    fits = isinstance(index, dict) and all(type(number) is int for number in index.values())
    require(fits, "class_list", f"'{path}'", "{template: number}")
    return class_names(index, path)


def read_list(path, classes: list[str]) -> dict[str, int]:
    """Read a list of videos; other keys than ``id`` and ``template`` are ignored.

    A template marks what a video fills in, ``"Opening [something]"``; the class index does not.

    Returns
    -------
    dict
        Id to class, in the order of the file.

    Raises
    ------
    ValueError
        No JSON, or an entry without one of the two keys, with an id that is no number, or with a
        template that is no class; the message names file, entry (from 0) and key.

    Examples
    --------
    >>> len(read_list("annotations/val_1000.json", classes))  # doctest: +SKIP
    1000
    """
    entries = _json(path, "split_list")
    expected = 'a list of {"id": …, "template": …}'
    fits = isinstance(entries, list) and len(entries) > 0
    require(fits, "split_list", f"'{path}' without entries", expected)
    numbers, targets = {name: i for i, name in enumerate(classes)}, {}
    for at, entry in enumerate(entries):
        for key in ("id", "template"):
            found = isinstance(entry, dict) and isinstance(entry.get(key), str)
            require(found, "split_list", f"no text as {key} in entry {at} of '{path}'", expected)
        id_, template = entry["id"], re.sub(r"[\[\]]", "", entry["template"])
        given = f"id {id_!r} in entry {at} of '{path}'"  # it becomes part of a path
        require(bool(re.fullmatch("[0-9]{1,20}", id_)), "split_list", given, "a number, as text")
        require(id_ not in targets, "split_list", f"{given}, again", "each id once")
        given = f"template {entry['template']!r} in entry {at} of '{path}'"
        require(template in numbers, "split_list", given, "one of " + ", ".join(classes))
        targets[id_] = numbers[template]
    return targets


def _json(path, argument: str):
    try:
        return json.loads(content(path, argument).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: got '{path}' ({error}), expected a JSON file") from error
