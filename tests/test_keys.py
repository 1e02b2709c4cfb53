"""What is kept is found again by all that made it, and by nothing else."""

import functools
import json
import linecache
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import stepkit as sk
from stepkit import _files, _keys, attribution, removal, store, training
from stepkit.attribution import METHODS
from stepkit.data import Synthetic
from stepkit.models import scores
from stepkit.study import Study
from stepkit.training import QUICK, describe, train

ROOT = Path(_keys.__file__).parents[1]


def halved(x):
    return x * 0.5


class Net(nn.Module):
    """Small, with everything in it on which an answer may depend."""

    gain = 1.0
    act = staticmethod(torch.relu)

    def __init__(self, temperature=1.0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.conv = nn.Conv3d(3, 4, (1, 3, 3), 2)
            self.norm = nn.BatchNorm3d(4)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.body = nn.Sequential(nn.ReLU())
        self.temperature, self._shift = temperature, 0.0
        self.register_buffer("mean", torch.zeros(1), persistent=False)

    def forward(self, clips):
        features = self.body(self.norm(self.conv(clips - self.mean)))
        return self.read(features.mean((2, 3, 4)))

    def read(self, features):
        logits = self.second(self.first(features)) + self._shift
        return halved(logits) * self.gain / self.temperature


class Data:
    """Two clips, a dataset as anybody might write one."""

    name, split, classes, frames, size, seed, epoch = "two", "test", "abcd", 2, (16, 16), 0, 0

    def __init__(self, change=0.0, targets=(0, 1), ids=("a", "b"), order=(0, 1)):
        noise = torch.Generator().manual_seed(1)
        self.clips = torch.randn(2, 3, 2, 16, 16, generator=noise)
        self.clips[:, 0, 0, 0, 0] += change
        self.clips, self.targets = self.clips[[*order]], [targets[i] for i in order]
        self.ids = [ids[i] for i in order]

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return sk.data.Sample(self.clips[i], self.targets[i], self.ids[i], [])


def written(**globals_):
    """Return `halved` as a notebook would write it: code of no file, and a global of its own."""
    source = "def halved(x):\n    return x * FACTOR\n"
    space = {"FACTOR": 0.5, "__name__": "__main__"} | globals_
    exec(source, space)
    return space["halved"]


def enclosing(factor, power=1):
    def score(output, targets, power=power):
        return factor * output[:, 0] ** power

    return score


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Explain into one folder; return how many times the method was run for it."""
    runs, real = [], store._make
    monkeypatch.setattr(store, "_make", lambda *a: runs.append(1) or real(*a))

    def explain(model=None, data=None, method="gradient", out=tmp_path, **options):
        before = len(runs)
        given = model or Net(), data or Data(), out
        store.maps(method, *given, model_name="net", **options)
        return len(runs) - before

    return explain


def with_(change):
    def build():
        model = Net()
        change(model)
        return model

    return build


def exchange(model):
    first, second = model.first.state_dict(), model.second.state_dict()
    model.first.load_state_dict(second | {"bias": first["bias"]})
    model.second.load_state_dict(first | {"bias": second["bias"]})


class Other(Net):
    """The same tensors, another way through them."""

    def read(self, features):
        return self.first(self.second(features))


NETWORKS = {
    "a weight": with_(lambda m: m.first.weight.data[0, 0].add_(1e-6)),
    "a statistic": with_(lambda m: m.norm.running_var.mul_(2)),
    "a buffer that is not persistent": with_(lambda m: m.mean.add_(1)),
    "two weights exchanged": with_(exchange),
    "the type of a weight": with_(
        lambda m: setattr(m.norm, "num_batches_tracked", torch.tensor(0.0))
    ),
    "an attribute": functools.partial(Net, temperature=2.0),
    "an attribute with an underscore": with_(lambda m: setattr(m, "_shift", 1.0)),
    "an attribute of a layer": with_(lambda m: setattr(m.norm, "eps", 1e-2)),
    "an activation": with_(lambda m: setattr(m, "body", nn.Sequential(nn.GELU()))),
    "a layer more": with_(lambda m: m.body.append(nn.ReLU())),
    "the class, with the same tensors": Other,
    "a hook": with_(lambda m: m.body.register_forward_hook(lambda m, i, o: o * 2)),
    "a hook before a layer": with_(lambda m: m.body.register_forward_pre_hook(lambda m, i: None)),
    "forward replaced": with_(lambda m: setattr(m, "read", functools.partial(Net.read, m))),
    "precision": lambda: sk.prepare(Net(), "bfloat16"),
    "a wrapper's normalisation": lambda: sk.wrap(Net(), normalise=None),
}


@pytest.mark.parametrize("change", NETWORKS)
def test_another_network_is_made_anew(made, change):
    assert (made(), made()) == (1, 0)
    assert made(NETWORKS[change]()) == 1
    assert made() == 0  # and what was there before stays


LAPLACE = removal.Removal("blur(levels=8, sigma=None)", removal.fade().ladder)
STEP = {"method": "step", "iterations": 1, "areas": (0.2,), "learning_rate": 0.1}
GIVEN = {  # before, after
    "clip content": ({}, {"data": Data(change=1e-3)}),
    "a label": ({}, {"data": Data(targets=(0, 2))}),
    "an id": ({}, {"data": Data(ids=("a", "c"))}),
    "the seed": ({}, {"seed": 1}),
    "the method": ({}, {"method": "gradient_x_input"}),
    "an option": ({"method": "smoothgrad", "samples": 1}, {"method": "smoothgrad", "samples": 2}),
    "the score": ({}, {"score": "logit"}),
    "a function's constant": (
        {"score": lambda output, targets: output[:, 0]},
        {"score": lambda output, targets: output[:, 1]},
    ),
    "what a function encloses": ({"score": enclosing(1.0)}, {"score": enclosing(2.0)}),
    "a function's default": ({"score": enclosing(1.0)}, {"score": enclosing(1.0, power=2)}),
    "a score of the same name": (
        {"score": replace(scores.VALUE, name="mine", value=enclosing(1.0))},
        {"score": replace(scores.VALUE, name="mine", value=enclosing(2.0))},
    ),
    "a removal of the same name": (
        {**STEP, "removal": removal.blur()},
        {**STEP, "removal": LAPLACE},
    ),
    "a preset": ({**STEP, "preset": "default"}, {**STEP, "preset": "released"}),
    "the tag": ({"tag": "first"}, {"tag": "second"}),
}


@pytest.mark.parametrize("change", GIVEN)
def test_other_data_and_options_are_made_anew(made, change):
    before, after = GIVEN[change]
    assert (made(**before), made(**before)) == (1, 0)
    assert made(**after) == 1
    assert made(**before) == 0


def test_all_methods_have_a_key():
    def key(method):
        model = Net()
        return store.Store(method, model, store.model_key(model), Path()).file(Data()[0])[1]

    found = {name: key(name) for name in sk.methods().index}
    assert len(set(found.values())) == len(found) >= 25
    assert key("step") == found["step"]
    with pytest.raises(ValueError, match="method: got 'magic'"):
        key("magic")


def test_a_change_of_the_library_is_made_anew(made, monkeypatch):
    short = {"method": "smoothgrad", "samples": 1}
    given = [{}, short, STEP]
    assert [made(**g) for g in given] == [1, 1, 1]
    # the content of a preset
    preset = replace(attribution.PRESETS["default"], core_weight=1.0)
    monkeypatch.setitem(attribution.PRESETS, "default", preset)
    assert [made(**g) for g in given] == [0, 0, 1]
    # the default of an option
    monkeypatch.setitem(METHODS["smoothgrad"].run.__kwdefaults__, "noise", 0.3)
    assert [made(**g) for g in given] == [0, 1, 0]
    # a method's code
    of_mine = replace(METHODS["gradient"], run=METHODS["gradient_x_input"].run)
    monkeypatch.setitem(METHODS, "gradient", of_mine)
    assert [made(**g) for g in given] == [1, 0, 0]
    # the version
    monkeypatch.setattr(_keys, "__version__", "9.9")
    _keys.library.cache_clear()
    assert [made(**g) for g in given] == [1, 1, 1]
    _keys.library.cache_clear()


def test_code_that_a_network_reaches_enters_and_its_comments_do_not(made, monkeypatch):
    assert made() == 1
    monkeypatch.setattr(sys.modules[__name__], "halved", written())
    assert made() == 1
    monkeypatch.setattr(sys.modules[__name__], "halved", written())  # made again, the same
    assert made() == 0
    monkeypatch.setattr(sys.modules[__name__], "halved", written(FACTOR=0.25))
    assert made() == 1
    monkeypatch.setattr(Net, "gain", 2.0)
    assert made() == 1


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("# a comment\n\n\ndef f(x):\n    '''What it does.'''\n    return x + 1\n", True),
        ("def f(x):\n    'same'\n    return x + 2\n", False),
        ("def f(x):\n    'same'\n    return x - 1\n", False),
        ("def f(x, /):\n    'same'\n    return x + 1\n", False),
    ],
)
def test_the_librarys_own_code_counts_and_its_comments_do_not(monkeypatch, text, same):
    found = []
    for source in ("def f(x):\n    'same'\n    return x + 1\n", text):
        monkeypatch.setattr(_keys, "_SOURCES", {"models.py": source.encode(), "viz.py": b"1"})
        found.append(_keys.library.__wrapped__("models.py"))
    assert (found[0] == found[1]) == same


def test_maps_depend_on_every_file_that_their_methods_import():
    known, seen, todo = _keys.MAPS, set(), {n for n in _keys._SOURCES if n.startswith(_keys.MAPS)}
    while todo:
        name = todo.pop()
        seen.add(name)
        for line in _keys._SOURCES[name].decode().splitlines():
            words = line.replace(",", " ").split()
            if words[:1] == ["from"] and words[1].startswith("stepkit"):
                places = [words[1], *(f"{words[1]}.{word}" for word in words[3:])]
                for place in places:
                    file = place.removeprefix("stepkit").strip(".").replace(".", "/") + ".py"
                    if file in _keys._SOURCES and file not in seen and file.startswith(known):
                        todo.add(file)
                    elif file in _keys._SOURCES and not file.startswith(known):
                        seen.add(file)
    # errors and what reads a clip, whose content enters itself
    extra = {name for name in seen if not name.startswith(known)}
    allowed = {"_checks.py", "_registry.py", "_sources.py", "_files.py"}
    assert extra <= allowed | {"data/__init__.py"}


# ---------------------------------------------------------------------------- what changes nothing


HITS = {
    "batch size": {"batch_size": 1},
    "progress": {"progress": True},
    "order of clips": {"data": Data(order=(1, 0))},
    "a default, said": {"score": "probability"},
    "mode of training": {"model": Net().train()},
    "gradients of the weights": {"model": Net().requires_grad_(False)},
}


@pytest.mark.parametrize("change", HITS)
def test_what_changes_no_map_is_found_again(made, change):
    model = Net().eval()
    assert made(model) == 1
    assert made(**{"model": model} | HITS[change]) == 0


def test_a_folder_that_was_moved_is_found_again(made, tmp_path):
    made(out=tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert made(out=tmp_path / "there") == 0


def test_workers_and_executors_find_what_others_made(tmp_path):
    """A network of a script's own: the workers know its module under another name."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = [sys.executable, str(script), str(tmp_path / "out")]
    done = subprocess.run(given, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    found = [line.strip() for line in done.stdout.splitlines()]
    assert found == ["made made", "found found", "found found"], done.stderr


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "random"}
SCRIPT = """
import sys
from functools import partial
import torch
import stepkit as sk

SCALE = {"of logits": 2.0}

def scaled(x):
    return x * SCALE["of logits"]

class Net(torch.nn.Module):
    kinds = {torch.nn.ReLU, torch.nn.GELU}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv3d(3, 6, 3)

    def forward(self, clips):
        return scaled(self.conv(clips).mean((2, 3, 4))) if self.kinds else None

def score(output, targets):
    return scaled(output[:, 0])

if __name__ == "__main__":
    source = partial(sk.load_dataset, "object", "test", n=2, frames=3, size=24)
    methods, where = {"gradient": {"score": score}}, {"model_name": "net"}
    for name in ("loop", "threads", "processes"):
        where |= {"executor": name, "workers": 1}
        table = sk.sweep(source, Net, methods, sys.argv[1], **where)
        print(*table["what"], *table["error"])
"""


# -------------------------------------------------------------------------- what cannot be named


class Locked(Net):
    def __init__(self):
        super().__init__()
        self.lock = __import__("threading").Lock()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": Locked()}, r"^model\.lock: got _thread.lock, which cannot be named"),
        ({"score": scores.Score("mine", (x for x in "a"), None)}, "^options.*: got builtins.gener"),
        ({"model": torch.jit.script(nn.Sequential(nn.Flatten()))}, "^model: got torch.jit"),
    ],
)
def test_what_cannot_be_named_is_refused_with_the_remedy(made, given, said):
    with pytest.raises(TypeError, match=rf"{said}.*tag='...'"):
        made(**given)


def test_a_tag_stands_for_what_cannot_be_named(made):
    assert (made(Locked(), tag="v1"), made(Locked(), tag="v1")) == (1, 0)
    assert made(Locked(), tag="v2") == 1
    changed = Locked()
    changed.first.weight.data += 1
    assert made(changed, tag="v1") == 1
    with pytest.raises(ValueError, match="tag: got 3"):
        made(tag=3)


def test_the_same_things_have_one_name_wherever_they_lie():
    cases = [
        lambda: np.arange(3.0),
        lambda: SimpleNamespace(a=1, b=[2]),
        lambda: OrderedDict(a=1),
        lambda: functools.partial(enclosing(1.0), power=3),
        lambda: {torch.float32, "a", (1, 2)},
        lambda: Path("a") / "b",
        lambda: [nn.Linear(2, 2).eval().requires_grad_(False).load_state_dict({}, strict=False)],
        lambda: Net().read,
        lambda: linecache.getline,
        lambda: (torch.relu, torch.Tensor.relu, nn.functional.gelu, np.exp),
    ]
    names = [json.dumps(_keys.name_of(make(), "x")) for make in cases]
    assert names == [json.dumps(_keys.name_of(make(), "x")) for make in cases]
    assert len(set(names)) == len(cases)
    assert not any("0x" in name for name in names)  # no addresses
    assert _keys.key(a=1, b=2) == _keys.key(b=2, a=1)
    assert (
        len({_keys.key(a=value) for value in (1, 1.0, True, "1", [1], {"1": 1}, None, b"1")}) == 8
    )


def test_recursion_is_named_and_endless_lists_are_refused():
    def odd(n):
        return n and not even(n - 1)

    def even(n):
        return not n or odd(n - 1)

    assert _keys.key(f=odd) == _keys.key(f=odd) != _keys.key(f=even)
    endless = []
    endless.append(endless)
    with pytest.raises(TypeError, match=r"x: got .*, which cannot be named \(maximum recursion"):
        _keys.key(x=endless)


# ---------------------------------------------------------------------------------------- curves


def test_curves_of_other_baselines_of_one_name_are_made_anew(tmp_path):
    network = sk.load_model("r2plus1d_narrow", 6)
    study = Study(network, "object", out=str(tmp_path), clips=2, frames=3, size=24)
    grey = removal.Removal("black", removal.constant((0.5, 0.5, 0.5)).ladder)

    def scored(baseline):
        return study.measure("auc", "random", steps=3, baseline=baseline)["insertion curve"]

    first, second = scored("black"), scored(grey)
    assert not torch.equal(first, second)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("measured/**/*.safetensors")}
    assert len(before) == 2  # neither in the other's way
    assert scored("black").equal(first)
    assert before == {p: p.stat().st_mtime_ns for p in before}


# -------------------------------------------------------------------------------------- trainings


RECIPE = replace(QUICK, epochs=2, batch_size=6)
SYNTHETIC = {"n": 6, "frames": 2, "size": 24}


def parts(**changes):
    given = SYNTHETIC | changes
    return [Synthetic("object", split, **given) for split in ("train", "val")]


def altered(dataset, **attributes):
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


class Inverted(Synthetic):
    def __getitem__(self, i):
        found = super().__getitem__(i)
        return replace(found, clip=-found.clip)


def narrow(seed=0):
    return sk.load_model("r2plus1d_narrow", 6, seed=seed)


TRAININGS = {
    "initial weights": {"model": narrow(seed=1)},
    "architecture": {"model": altered(narrow(), cam_layer="layer1")},
    "seed": {"seed": 1},
    "recipe": {"recipe": replace(RECIPE, learning_rate=0.1)},
    "other clips": {"dataset": parts(seed=1)[0]},
    "fewer clips": {"dataset": parts(n=5)[0]},
    "larger clips": {"dataset": parts(size=32)[0]},
    "ids": {"dataset": altered(parts()[0], ids=list("abcdef"))},
    "labels": {"dataset": altered(parts()[0], targets=[1, 0, 2, 3, 4, 5])},
    "names of classes": {"dataset": altered(parts()[0], classes=list("abcdef"))},
    "clip content, by a class of one's own": {"dataset": Inverted("object", "train", **SYNTHETIC)},
    "validation part": {"validation": parts(n=5)[1]},
    "labels of the validation part": {"validation": altered(parts()[1], targets=[0] * 6)},
}


def described(**changes):
    dataset, validation = parts()
    given = {"model": narrow(), "dataset": dataset, "validation": validation}
    return describe(**given | {"recipe": RECIPE, "seed": 0} | changes)


@pytest.mark.parametrize("change", TRAININGS)
def test_another_training_has_another_key(change):
    assert described() == described()
    assert described(**TRAININGS[change]) != described()


@pytest.mark.parametrize("kind", [Synthetic, Inverted])
def test_a_training_that_is_under_way_keeps_its_key(kind):
    dataset = kind("object", "train", **SYNTHETIC)
    before = described(dataset=dataset)
    dataset.epoch = 7  # as training counts it up
    assert described(dataset=dataset) == before
    assert dataset.epoch == 7


def clip_files(root, shade=0, names=("one", "two")):
    for label, name in enumerate(names):
        for i in range(2):
            folder = root / "train" / name / f"{name}{i}"
            folder.mkdir(parents=True, exist_ok=True)
            for t in range(2):
                image = np.full((24, 24, 3), 40 * label + 10 * i + t + shade, np.uint8)
                Image.fromarray(image).save(folder / f"{t}.png")
    return sk.load_dataset("folder", "train", frames=2, size=24, data=str(root))


def test_videos_are_known_by_their_content_not_by_their_names_or_place(tmp_path):
    first = _keys.data(clip_files(tmp_path / "a"))
    assert _keys.data(clip_files(tmp_path / "a")) == first
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = sk.load_dataset("folder", "train", frames=2, size=24, data=str(tmp_path / "moved"))
    assert _keys.data(moved) == first
    assert _keys.data(clip_files(tmp_path / "b", shade=1)) != first
    c = clip_files(tmp_path / "c")
    one, two, aside = (tmp_path / "c" / "train" / name for name in ("one", "two", "aside"))
    one.rename(aside), two.rename(one), aside.rename(two)  # class folders exchanged
    assert _keys.data(c.__class__(tmp_path / "c", "train", 2, 24)) != first


# ------------------------------------------------------------------------------------- the store


def flip(content, at):
    content = bytearray(content)
    content[at] ^= 1
    return bytes(content)


def test_no_bit_of_a_file_of_tensors_can_turn_unseen(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"maps": torch.rand(2), "masks": torch.rand(1)}
    _files.write_tensors(path, "some key", tensors)
    whole = path.read_bytes()
    assert set(_files.read_tensors(path, "some key")) == {"maps", "masks"}
    for at in range(len(whole)):
        path.write_bytes(flip(whole, at))
        found = _files.read_tensors(path, "some key")
        assert found is None or all(found[name].equal(tensors[name]) for name in tensors), at
        assert found is None or set(found) == set(tensors), at
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert _files.is_damaged(path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "history.csv"])
@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_a_damaged_training_is_named_and_made_again(tmp_path, name, harm):
    out, short = tmp_path, replace(RECIPE, epochs=1)
    train(Net(), Data(), Validation(), out, short)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    content = whole[name]
    content = {"cut": content[: len(content) // 2], "flip": flip(content, -3), "empty": b""}[harm]
    (out / name).write_bytes(content)
    if name == "state.safetensors":  # which a finished training needs no more
        (out / "history.csv").unlink()
    with pytest.warns(UserWarning, match=rf"{name}: damaged"):
        train(Net(), Data(), Validation(), out, short)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


class Validation(Data):
    def __init__(self):
        super().__init__(change=1.0, ids=("c", "d"))


def test_a_folder_of_another_training_is_refused_and_says_what_differs(tmp_path):
    train(Net(), Data(), Validation(), tmp_path, replace(RECIPE, epochs=1))
    with pytest.raises(ValueError, match=r"out: got .*, a run of another data, seed, expected"):
        train(Net(), Data(1), Validation(), tmp_path, replace(RECIPE, epochs=1), seed=1)


def test_a_damaged_checkpoint_is_not_loaded(tmp_path):
    path = tmp_path / "net.safetensors"
    training.save_model(Net(), path)
    path.write_bytes(flip(path.read_bytes(), -3))
    with pytest.raises(ValueError, match=r"weights: got .*net.safetensors, damaged"):
        sk.networks.load_weights(Net(), path)


def test_a_damaged_shipped_checkpoint_is_named_and_left_out(tmp_path, monkeypatch):
    dataset, validation = parts()
    asked = training.recipe_of("r2plus1d_narrow", dataset, validation, RECIPE, 0)
    path = tmp_path / "r2plus1d_narrow_object.safetensors"
    training.save_model(narrow(seed=5), path, asked)
    path.with_suffix(".csv").write_text("epoch\n0\n")
    monkeypatch.setattr(training, "WEIGHTS", tmp_path)
    monkeypatch.setattr(training, "train", lambda *a, **k: "trained")
    given = "r2plus1d_narrow", dataset, validation, tmp_path / "out", RECIPE
    assert training.fit(*given)[2] == "shipped"
    assert training.fit(*given, shipped=False)[2] == "trained here"
    path.write_bytes(flip(path.read_bytes(), -3))
    with pytest.warns(UserWarning, match="r2plus1d_narrow_object.safetensors: damaged"):
        assert training.fit(*given)[2] == "trained here"


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "not text"])
def test_a_damaged_table_is_named_and_left_out(tmp_path, harm):
    study = Study(out=str(tmp_path))
    table = sk.stats.pd.DataFrame({"claim": ["c", "d"], "mean": [0.25, 1.5], "verdict": "holds"})
    study.keep(table, "claims_03")
    study.keep(table, "claims_04")
    assert len(study.claims()) == 4
    path = tmp_path / "scores" / study.key / "claims_03.csv"
    whole = path.read_bytes()
    harms = {"cut": whole[:-8], "flip": flip(whole, -9), "empty": b"", "not text": b"\xff" + whole}
    path.write_bytes(harms[harm])
    with pytest.warns(UserWarning, match=r"claims_03\.csv: damaged"):
        assert study.claims()["notebook"].tolist() == ["04", "04"]
    with (
        pytest.raises(ValueError, match=r"kept: got a damaged .*claims_03\.csv, expected the note"),
        pytest.warns(UserWarning, match="damaged"),
    ):
        study.kept("claims_03")
    study.keep(table, "claims_03")
    assert len(study.claims()) == 4


def test_a_table_is_whole_whenever_its_writer_dies(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "table.csv", _files.write_whole, []
    old, new = (sk.stats.pd.DataFrame({"a": [value]}) for value in (1, 2))
    _files.write_table(path, old)

    def dies(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(_files, "write_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        _files.write_table(path, new)
    assert _files.read_table(path).equals(old)
    _files.write_table(path, new)
    assert _files.read_table(path).equals(new)


def test_what_dead_processes_had_begun_is_removed(tmp_path):
    host = _files.socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".{host}-{dead.pid}-0123.part", f".{host}-{os.getpid()}-0123.part"]
    names += [".elsewhere-1-0123.part", ".elsewhere-1-4567.part", "a.safetensors.0123.part"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    for name in names[3:]:
        os.utime(tmp_path / name, (0, 0))
    _files.write_whole(tmp_path / "a.txt", lambda partial: partial.write_text("whole"))
    kept = {path.name for path in tmp_path.glob("*.part")}
    assert kept == {names[1], names[2]}  # of this process, and of another machine a moment ago
