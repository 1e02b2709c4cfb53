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

from stepkit._checks import one_of, require
from stepkit.data.annotations import class_names, content, find_list, in_share, report_missing
from stepkit.data.folder import ClipFiles, find_clip, position

_CLIPS_IN = ("videos", "20bn-something-something-v2", "frames", "")
_LISTS = {"train": ["train_*.json"], "test": ["val_*.json"]}
_CLASSES = ["*labels_index.json"]


class SomethingV2(ClipFiles):
    """The paper's 25 classes (§V-A.1): 10,000 training and 1,000 test videos, without boxes.

    Parameters
    ----------
    root : str or Path
        As the module describes.
    split : {"test", "train", "all"}, default "test"
        "test" is the published validation list. "all": every video of both lists that is on disk.
    frames, size, mode, part, seed
        As in `ClipFiles`.
    missing : {"error", "skip"}, default "error"
        What to do about videos that the list names and the disk does not have.
    split_list, class_list : str or Path, optional
        By default the lists in ``annotations/``.
    share : (float, float), default (0.0, 1.0)
        Only the videos whose `position`, drawn from their id, lies in this range: (0, 0.9) and
        (0.9, 1) make a training and a validation part of "train".

    Attributes
    ----------
    missing : list of str
        The ids of the list that were skipped.

    Raises
    ------
    FileNotFoundError
        No such list; videos are missing and ``missing="error"``.
    ValueError
        A list that is malformed (file and entry are named), or as `ClipFiles`.

    Examples
    --------
    >>> SomethingV2("something-v2")[0].clip.shape  # doctest: +SKIP
    torch.Size([3, 16, 112, 112])
    """

    def __init__(
        self,
        root,
        split: str = "test",
        frames: int = 16,
        size: int | tuple[int, int] = 112,
        mode: str = "test",
        part: tuple[float, float] = (0.0, 1.0),
        missing: str = "error",
        split_list=None,
        class_list=None,
        seed: int = 0,
        share: tuple[float, float] = (0.0, 1.0),
    ):
        one_of("split", split, (*_LISTS, "all"))
        one_of("missing", missing, ("error", "skip"))
        require(not (split == "all" and split_list), "split_list", split_list, "None for 'all'")
        root = Path(root)
        classes = read_classes(class_list or find_list(root, _CLASSES))
        wanted = list(_LISTS) if split == "all" else [split]
        targets = {}
        for name in wanted:
            targets |= read_list(split_list or find_list(root, _LISTS[name]), classes)
        where = {id_: find_clip(root, _CLIPS_IN, id_) for id_ in in_share(targets, share, position)}
        lost = [id_ for id_, path in where.items() if path is None]
        self.missing = [] if split == "all" else lost
        report_missing(root, self.missing, len(where), missing)
        clips = [(id_, path, targets[id_]) for id_, path in where.items() if path]
        super().__init__("something-v2", split, classes, clips, frames, size, mode, part, seed)


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
