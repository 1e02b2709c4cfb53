import errno
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

import stepkit as sk
from stepkit import _files as whole_files
from stepkit import store
from stepkit.__main__ import main
from stepkit.attribution import attribute
from stepkit.data import Synthetic, batch, load_dataset
from stepkit.networks import load_model
from stepkit.sweep import sweep
from stepkit.training import save_model


@pytest.fixture
def data():
    return Synthetic("object", n=4, frames=3, size=24)


@pytest.fixture
def model():
    return load_model("r2plus1d_narrow", 6)


def explain(method, model, data, out, **options):
    return store.maps(method, model, data, out, model_name="narrow", **options)


def files(out):
    paths = sorted(out.rglob("*.safetensors"))
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def test_one_file_per_clip_at_its_place(tmp_path, model, data):
    found = explain("gradient", model, data, tmp_path)
    assert found["maps"].shape == (4, 3, 24, 24)
    paths = sorted((tmp_path / "object" / "narrow" / "gradient").iterdir())
    assert [path.name.split(".")[0] for path in paths] == data.ids
    assert all(len(path.stem.split(".")[1]) == 8 for path in paths)  # of the key
    shown = batch(data)
    expected = attribute("gradient", model, shown.clips, shown.targets)
    torch.testing.assert_close(found["maps"], expected)


def test_step_keeps_its_masks(tmp_path, model, data):
    found = explain("step", model, data, tmp_path, n=2, iterations=2, areas=(0.1, 0.3))
    assert found["masks"].shape == (2, 2, 3, 24, 24)
    assert found["probabilities"].shape == (2, 2)
    again = explain("step", model, data, tmp_path, n=2, iterations=2, areas=(0.1, 0.3))
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_one_clip_by_itself_and_what_it_cost(tmp_path, model, data, monkeypatch):
    where = {"model_name": "narrow", "i": 2}
    maps, cost = store.measure("gradient", model, data, tmp_path, **where)
    shown = batch(data, [2])
    torch.testing.assert_close(maps, attribute("gradient", model, shown.clips, shown.targets)[0])
    assert (cost["forward"], cost["backward"]) == (1, 1)
    assert cost["seconds"] > 0
    monkeypatch.setattr(store, "_make", lambda *a: pytest.fail("computed again"))
    again, same = store.measure("gradient", model, data, tmp_path, **where)
    assert torch.equal(maps, again)
    assert cost["seconds"] == pytest.approx(same["seconds"])


def test_a_rerun_computes_nothing(tmp_path, model, data, monkeypatch):
    first = explain("random", model, data, tmp_path)
    monkeypatch.setattr(store, "_make", lambda *a: pytest.fail("computed again"))
    assert torch.equal(first["maps"], explain("random", model, data, tmp_path)["maps"])


@pytest.mark.parametrize("change", ["option", "weights", "seed", "clip"])
def test_what_depends_on_something_else_is_made_anew(tmp_path, model, data, change):
    before = explain("grad_cam", model, data, tmp_path)["maps"]
    options = {"layer": "layer2"} if change == "option" else {}
    if change == "weights":
        model = load_model("r2plus1d_narrow", 6, seed=1)
    if change == "clip":
        data = Synthetic("object", n=4, frames=3, size=24, seed=9)
        data.ids = Synthetic("object", n=4, frames=3, size=24).ids
    made = []
    real = store._make
    store._make = lambda *a: made.append(1) or real(*a)
    try:
        seed = 1 if change == "seed" else 0
        after = explain("grad_cam", model, data, tmp_path, seed=seed, **options)["maps"]
    finally:
        store._make = real
    assert made
    assert torch.equal(before, after) == (change == "seed")  # Grad-CAM draws no random numbers


def test_a_killed_sweep_resumes_to_the_same_bytes(tmp_path, model, data):
    explain("random", model, data, tmp_path / "whole", batch_size=1)
    calls, real = [], store._make

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    store._make = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            explain("random", model, data, tmp_path / "killed", batch_size=1)
    finally:
        store._make = real
    assert len(files(tmp_path / "killed")) == 2
    explain("random", model, data, tmp_path / "killed", batch_size=3)
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
    assert not list(tmp_path.rglob("*.part"))


def test_a_truncated_file_is_made_again(tmp_path, model, data):
    before = explain("gradient", model, data, tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    after = explain("gradient", model, data, tmp_path)
    assert torch.equal(before["maps"], after["maps"])


def test_a_failed_write_leaves_nothing_behind(tmp_path, model, data, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        explain("gradient", model, data, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------ over many workers

SOURCE = partial(load_dataset, "object", "test", n=4, frames=3, size=24)
NETWORK = partial(load_model, "r2plus1d_narrow", 6)
METHODS = {"gradient": {}, "step@short": {"iterations": 2, "areas": (0.1, 0.3)}}


def run(out, source=SOURCE, network=NETWORK, methods=METHODS, **options):
    return sweep(source, network, methods, out, model_name="narrow", **options)


class Moody(torch.nn.Module):
    """Cannot make anything of bright clips."""

    def __init__(self, bound):
        super().__init__()
        self.model, self.bound = NETWORK(), bound

    def forward(self, clips):
        logits = self.model(clips)
        return logits.where(clips.mean((1, 2, 3, 4))[:, None] < self.bound, float("nan"))


class Deadly(Synthetic):
    """The third clip takes its process with it, until there is a file that says enough."""

    def __init__(self, enough):
        super().__init__("object", n=4, frames=3, size=24)
        self.enough = enough

    def __getitem__(self, i):
        if i == 2 and not self.enough.exists():
            self.enough.touch()
            signal.raise_signal(signal.SIGKILL)
        return super().__getitem__(i)


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    out = tmp_path_factory.mktemp("looped")
    table = run(out)
    return out, table


def test_a_loop_does_what_explain_does(tmp_path, looped, model, data):
    out, table = looped
    assert len(table) == 8
    assert (table["status"] == "done").all()
    assert (table["what"] == "made").all()
    assert (table["attempts"] == 1).all()
    assert table["clip"].tolist() == [*data.ids, *data.ids]
    torch.set_num_threads(1)
    explain("gradient", model, data, tmp_path, batch_size=1)
    mine = files(tmp_path / "object" / "narrow" / "gradient")
    assert mine == files(out / "object" / "narrow" / "gradient")
    kept = pd.read_csv(out / "object" / "narrow" / "manifest.csv", keep_default_na=False)
    assert kept["method"].tolist() == ["gradient"] * 4 + ["step@short"] * 4


@pytest.mark.parametrize("name", ["threads", "processes", "dask"])
def test_workers_write_the_same_bytes(tmp_path, looped, name):
    if name == "dask":
        pytest.importorskip("distributed")
    table = run(tmp_path, executor=name, workers=2)
    assert (table["status"] == "done").all()
    assert files(tmp_path) == files(looped[0])


def test_a_second_sweep_finds_everything(looped):
    before = {path: path.stat().st_mtime_ns for path in looped[0].rglob("*.safetensors")}
    assert (run(looped[0])["what"] == "found").all()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_clip_that_fails_is_named_tried_again_and_stops_nothing(tmp_path, data):
    bright = [float(data[i].clip.mean()) for i in range(4)]
    bound = (sorted(bright)[2] + sorted(bright)[3]) / 2
    network = partial(Moody, bound)
    methods = {"gradient": {}, "integrated_gradients": {"steps": 1}}  # its one point is the clip
    table = run(tmp_path, network=network, methods=methods, batch_size=2, retries=1)
    bad = table[table["status"] == "failed"]
    assert bad["clip"].tolist() == [data.ids[bright.index(max(bright))]] * 2
    assert bad["error"].str.contains("NaN").all()
    assert (bad["attempts"] == 2).all()
    assert len(files(tmp_path)) == 6


class Certain(torch.nn.Module):
    """Says the first class whatever it sees, with a probability of exactly 1."""

    def __init__(self):
        super().__init__()
        self.model = NETWORK()

    def forward(self, clips):
        return self.model(clips) + torch.tensor([1e4] + [0.0] * 5)


def test_a_map_that_says_nothing_is_named_and_stops_nothing(tmp_path):
    methods = {"gradient": {}, "random": {}}
    for what in ("made", "found"):
        table = run(tmp_path, network=Certain, methods=methods, n=2)
        assert table["what"].tolist() == [what] * 4
        assert table["note"].tolist() == ["the map is the same everywhere"] * 2 + [""] * 2


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_a_damaged_file_is_found_named_and_made_again(tmp_path, harm):
    run(tmp_path)
    whole, path = files(tmp_path), sorted(tmp_path.rglob("*.safetensors"))[5]
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes({"cut": content[:-9], "flip": content, "empty": b""}[harm])
    table = run(tmp_path)
    assert table["what"].str.contains("damaged").tolist() == [i == 5 for i in range(8)]
    assert files(tmp_path) == whole


def test_two_sweeps_into_one_folder_both_end_well(tmp_path, looped):
    with ThreadPoolExecutor(2) as pool:
        tables = [pool.submit(run, tmp_path) for _ in range(2)]
    assert all((table.result()["status"] == "done").all() for table in tables)
    assert files(tmp_path) == files(looped[0])
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_disk_stops_the_sweep_and_harms_nothing(tmp_path, looped, monkeypatch):
    real, written = whole_files.save_file, []

    def fills(tensors, path, metadata):
        if len(written) == 3:
            path.write_bytes(b"half")
            full = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise SafetensorError(full)  # as it comes from a disk that is full
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(whole_files, "save_file", fills)
    with pytest.raises(OSError, match=r"No space left on device.*safetensors"):
        run(tmp_path)
    kept = files(tmp_path)
    assert len(kept) == 3
    assert all(files(looped[0])[name] == content for name, content in kept.items())
    assert not list(tmp_path.rglob("*.part"))
    manifest = pd.read_csv(tmp_path / "object" / "narrow" / "manifest.csv")
    assert manifest["status"].tolist() == ["done"] * 3 + ["left"] * 5
    monkeypatch.undo()
    assert run(tmp_path)["what"].tolist() == ["found"] * 3 + ["made"] * 5


@pytest.mark.parametrize("name", ["EACCES", "EDQUOT", "EIO", "EISDIR", "ENAMETOOLONG", "EROFS"])
def test_a_store_that_cannot_be_written_to_stops_the_sweep(tmp_path, name, monkeypatch):
    real, number = whole_files.save_file, getattr(errno, name)

    def breaks(tensors, path, metadata):
        if list(tmp_path.rglob("*.safetensors")):
            raise OSError(number, os.strerror(number), str(path))
        real(tensors, path, metadata)

    monkeypatch.setattr(whole_files, "save_file", breaks)
    with pytest.raises(OSError, match=f"{os.strerror(number)}; 7 of 8 maps are left") as error:
        run(tmp_path)
    assert error.value.errno == number


def test_a_limit_of_file_sizes_stops_the_sweep(tmp_path):
    resource = pytest.importorskip("resource", reason="limits are set on Unix only")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))  # a map takes 7 kB
    try:
        with pytest.raises(OSError, match="8 of 8 maps are left, and the same call goes on"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run(tmp_path)["what"].tolist() == ["made"] * 8


class Named(Synthetic):
    def __init__(self, names, fault=None):
        super().__init__("object", n=4, frames=3, size=24)
        self.ids, self.fault = names, fault

    def __getitem__(self, i):
        if i == 2 and self.fault:
            raise self.fault
        return super().__getitem__(i)


def test_what_is_in_the_way_is_said_before_the_first_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["stepkit.sweep"], "work", lambda *_: pytest.fail("began"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"8 of 8 maps are left.*same call.*file"):
        run(tmp_path / "file")
    (tmp_path / "out" / "object" / "narrow").mkdir(parents=True)
    (tmp_path / "out" / "object" / "narrow" / "step@short").touch()
    with pytest.raises(FileExistsError, match=r"8 of 8 maps are left.*step@short"):
        run(tmp_path / "out")
    with pytest.raises(OSError, match=r"too long; 8 of 8 maps are left.*é{140}"):
        run(tmp_path / ("é" * 140))
    assert not files(tmp_path)


def test_an_error_of_one_video_is_that_clips_failure(tmp_path, data):
    fault = PermissionError(errno.EACCES, "Permission denied", "/videos/2.avi")
    table = run(tmp_path, partial(Named, data.ids, fault), methods={"gradient": {}}, retries=0)
    assert table["status"].tolist() == ["done", "done", "failed", "done"]
    assert "/videos/2.avi" in table["error"][2]


def test_a_worker_that_dies_ends_a_pool_of_processes_and_the_rerun_goes_on(tmp_path):
    source = partial(Deadly, tmp_path / "enough")
    with pytest.raises(BrokenExecutor):
        run(tmp_path / "out", source=source, executor="processes", workers=1)
    done = len(files(tmp_path / "out"))
    assert done >= 1
    table = run(tmp_path / "out", source=source)
    assert (table["what"] == "found").sum() == done
    assert (table["status"] == "done").all()


def test_dask_replaces_a_worker_that_dies(tmp_path, looped):
    pytest.importorskip("distributed")
    source = partial(Deadly, tmp_path / "x")
    table = run(tmp_path / "out", source=source, executor="dask", workers=2)
    assert (table["status"] == "done").all()
    assert files(tmp_path / "out") == files(looped[0])


def manifest(out):
    return pd.read_csv(out / "object" / "narrow" / "manifest.csv", keep_default_na=False)


def test_a_manifest_keeps_the_rows_of_other_sweeps(tmp_path, data):
    methods = {"smoothgrad": {"samples": 2}}
    run(tmp_path, methods=methods)
    assert len(run(tmp_path, methods=methods, n=2)) == 2
    run(tmp_path, methods={"smoothgrad": {"samples": 3}, "gradient": {}}, n=1)
    kept = manifest(tmp_path)
    assert kept["clip"].tolist() == [*data.ids, data.ids[0], data.ids[0]]
    assert kept["method"].tolist() == ["smoothgrad"] * 5 + ["gradient"]
    assert kept["options"].tolist() == ["samples=2"] * 4 + ["samples=3", ""]
    assert kept["what"].tolist() == ["found"] * 2 + ["made"] * 4


def test_sweeps_at_a_time_share_a_manifest(tmp_path):
    def one(samples):
        return run(tmp_path, methods={f"smoothgrad@{samples}": {"samples": samples}}, n=1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(1, 9)))
    assert sorted(manifest(tmp_path)["options"]) == [f"samples={i}" for i in range(1, 9)]
    assert (manifest(tmp_path)["status"] == "done").all()


@pytest.mark.parametrize("harm", [b"method,clip\nstep,a\n", b"", b"\xff\xfe", None])
def test_a_damaged_manifest_is_named_and_begun_anew(tmp_path, harm):
    run(tmp_path)
    path = tmp_path / "object" / "narrow" / "manifest.csv"
    path.write_bytes(path.read_bytes()[:-15] if harm is None else harm)
    with pytest.warns(UserWarning, match=r"manifest\.csv: damaged"):
        run(tmp_path, methods={"gradient": {}}, n=3)
    assert manifest(tmp_path)["what"].tolist() == ["found"] * 3


def test_a_sweep_leaves_signals_and_threads_as_they_were(tmp_path):
    numbers = signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, partial(Signalled, signal.SIGTERM))
        assert seen == ["mine"]  # afterwards, what would have been done
        assert manifest(tmp_path)["status"].tolist() == ["done"] * 2 + ["left"] * 6
    finally:
        signal.signal(signal.SIGTERM, before[0][0])
    run(tmp_path)
    assert before == ([signal.getsignal(number) for number in numbers], torch.get_num_threads())


class Signalled(Synthetic):
    """A signal comes while the third clip is read."""

    def __init__(self, number):
        super().__init__("object", n=4, frames=3, size=24)
        self.number = number

    def __getitem__(self, i):
        if i == 2:
            signal.raise_signal(self.number)
        return super().__getitem__(i)


def test_what_cannot_be_pickled_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"network: got .*lambda.* expected a function of a module"):
        run(tmp_path, network=lambda: None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 5}, "n: got 5, expected 1..4 clips"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"retries": -1}, "retries: got -1"),
    ],
)
def test_bad_arguments_of_a_sweep_are_named(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        run(tmp_path, **options)


def test_unknown_executors_are_named(tmp_path):
    with pytest.raises(ValueError, match="executor: got 'fork', expected one of"):
        run(tmp_path, executor="fork")


def test_the_cost_of_a_sweep_is_clips_times_passes():
    page = (Path(store.__file__).parents[1] / "docs" / "scale.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(passes = .*?)```", page, re.DOTALL)
    said = {"sk": sk}
    exec(code, said)
    assert said["passes"]["gradient"] == 2
    assert said["passes"]["step"] == 4822 + 4801
    assert said["hours"]["integrated_gradients"] == pytest.approx(17, abs=0.3)  # as the table says


# -------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    save_model(NETWORK(), path)
    return path


def command(weights, out, *others):
    size = ["--dataset", "object", "--n", "4", "--frames", "3", "--size", "24"]
    model = ["--model", "r2plus1d_narrow", "--weights", str(weights)]
    return ["sweep", *size, *model, "--out", str(out), *others]


def test_the_command_line_sweeps(tmp_path, weights, capsys):
    options = ["--method", "gradient", "smoothgrad", "--set", "samples=2"]
    options += ["--precision", "bfloat16"]
    assert main(command(weights, tmp_path, *options)) == 0
    assert "8 of 8 done: 8 made" in capsys.readouterr().out
    assert len(files(tmp_path)) == 8
    assert main(command(weights, tmp_path, *options)) == 0
    assert "8 of 8 done: 8 found" in capsys.readouterr().out
    kept = pd.read_csv(tmp_path / "object" / "r2plus1d_narrow" / "manifest.csv")
    assert set(kept["precision"]) == {"bfloat16"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "magic"], "method: got 'magic'"),
        (
            ["--set", "preset=!!python/name:os.getcwd"],
            "--set preset: expected YAML of plain values",
        ),
        (["--set", "samples=2"], "--set: got samples, expected an option of step"),
        (["--weights", ""], "--weights: got none, expected a .safetensors file or a name of"),
        (["--weights", "nowhere"], "weights: got 'nowhere', expected a .safetensors file"),
        (["--weights", "nowhere.safetensors"], "weights: got 'nowhere.safetensors', expected"),
        (["--extra", "no.such"], "extra: got 'no.such'"),
        (["--preset", "quick"], "--preset: got 'quick'"),
        (["--model", "mine:net"], "mine"),
        (["--executor", "fork"], "executor: got 'fork'"),
        (["--dataset", "ucf101-24"], "data: got ''"),
        (["--model", "r2plus1d_narow"], "name: got 'r2plus1d_narow', expected 'r2plus1d_narrow'?"),
        (["--weights", __file__], "weights: got"),
        (["--precision", "float16"], "precision: got 'float16'"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path, weights, options, said, capsys):
    assert main(command(weights, tmp_path, *options)) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_command_that_is_killed_goes_on_where_it_was(tmp_path, weights):
    step = ["--method", "step", "--preset", "fast", "--set", "iterations=8"]
    main(command(weights, tmp_path / "whole", *step))
    given = [sys.executable, "-m", "stepkit", *command(weights, tmp_path / "killed", *step)]
    process = subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(files(tmp_path / "killed")) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("*.safetensors")}
    main(command(weights, tmp_path / "killed", *step))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(before) >= 2


OWN = """
import torch, stepkit as sk

@sk.method("mine", needs_gradient=True)
def mine(model, clips, targets, work, *, power=1):
    return clips.abs().mean(1) ** power

@sk.dataset("bright")
def bright(split, *, n, frames, size):
    clips = torch.rand(3, 3, frames, size, size, generator=torch.Generator().manual_seed(0))
    return [sk.data.Sample(clip, i % 2, f"{split} {i}", []) for i, clip in enumerate(clips)]

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(classes))

    def forward(self, clips):
        return (clips**2).mean((2, 3, 4))[:, : len(self.scale)] * self.scale
"""


def test_methods_data_and_networks_of_ones_own_on_the_command_line(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    given = ["--model", "own:Net", "--extra", "own", "--dataset", "bright", "--split", "all"]
    given += ["--method", "mine", "gradient", "--set", "power=2", "--frames", "3", "--size", "16"]
    given += ["--out", str(tmp_path / "out"), "--executor", "processes", "--workers", "1"]
    path = os.pathsep.join([str(tmp_path), str(Path(store.__file__).parents[1])])

    def told(*more):
        ran = [sys.executable, "-m", "stepkit", "sweep", *given, *more]
        env = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(ran, capture_output=True, text=True, env=env, check=False)
        return done.stdout, done.stderr, done.returncode

    said, errors, status = told()
    assert (said, status) == ("6 of 6 done: 6 made\n", 0), errors
    folder = tmp_path / "out" / "bright" / "own.Net"
    assert len(files(folder)) == 6
    kept = pd.read_csv(folder / "manifest.csv", keep_default_na=False)
    assert kept["options"].tolist() == ["power=2"] * 3 + [""] * 3
    (tmp_path / "own.py").write_text(OWN.replace("** power", "** (power + 1)"))
    assert told("--executor", "loop")[0] == "6 of 6 done: 3 made, 3 found\n"


def bold(model, clips, targets, work, *, power=1):
    return clips.abs().mean(1) ** power


def samples():
    noise = torch.Generator().manual_seed(0)
    clips = torch.rand(2, 3, 3, 24, 24, generator=noise)
    return [sk.data.Sample(clip, i, f"clip {i}", []) for i, clip in enumerate(clips)]


def test_a_function_and_a_list_of_samples_are_swept_and_found(tmp_path):
    table = run(tmp_path, samples, methods={"own@2": (bold, {"power": 2})})
    assert table["what"].tolist() == ["made", "made"]
    before = files(tmp_path / "samples" / "narrow" / "own@2")
    where = {"model_name": "narrow", "folder": "own@2", "batch_size": 1, "power": 2}
    found = store.maps(bold, NETWORK(), samples(), tmp_path, **where)["maps"]
    for values, sample in zip(found, samples(), strict=True):
        torch.testing.assert_close(values, sample.clip.abs().mean(0) ** 2)
    assert before == files(tmp_path / "samples" / "narrow" / "own@2")
    assert len(before) == len(files(tmp_path)) == 2


class Sorted(Synthetic):
    """Clips of a list on disk: sorted by class."""

    def __init__(self):
        super().__init__("object", n=12, frames=3, size=24)
        order = sorted(range(12), key=self.targets.__getitem__)
        self.order, self.targets = order, [self.targets[i] for i in order]
        self.ids = [self.ids[i] for i in order]

    def __getitem__(self, i):
        return super().__getitem__(self.order[i])


def test_a_few_clips_of_a_sorted_list_are_of_all_classes(tmp_path):
    table = sweep(Sorted, NETWORK, {"gradient": {}}, tmp_path, model_name="narrow", n=6)
    shown = Sorted()
    assert sorted(shown.targets[shown.ids.index(id_)] for id_ in table["clip"]) == [*range(6)]
    maps = store.maps("gradient", NETWORK(), shown, tmp_path, model_name="narrow", n=6)["maps"]
    assert len(maps) == 6
    assert len(files(tmp_path)) == 6  # found, not made
