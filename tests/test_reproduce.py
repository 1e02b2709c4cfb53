"""The runner on small notebooks; the real ones run under nbval and `make reproduce`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from stepkit import report
from stepkit.__main__ import main
from stepkit._notebook import WATCHED, parameters, partial, tidy
from stepkit._settings import read_settings
from stepkit.reproduce import ROOT, find_notebooks, plan, read_profile, reproduce
from tools import store

DEFAULTS = """\
out: str = ""  # folder of the run
data: str = ""  # folder of videos
seed: int = 0  # of everything
rate: float = 0.5  # a fraction
areas: list[float] = [0.1, 0.2]  # preserved shares
fast: bool = True  # or slow"""

LOGGED = 'open(f"{out}/log", "a").write(NAME)'


def notebook(root: Path, name: str, *cells: str, defaults=DEFAULTS, after=()) -> Path:
    """Write ``notebooks/<name>.ipynb``: a title, the parameters, and ``cells``."""
    v4 = nbformat.v4
    first = v4.new_code_cell(defaults, metadata={"tags": ["parameters"]})
    book = v4.new_notebook(
        cells=[v4.new_markdown_cell(f"# Title {name}"), first, *map(v4.new_code_cell, cells)],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
            "stepkit": {"after": list(after)},
        },
    )
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(book, path)
    return path


def texts(path: Path) -> str:
    """All that the cells of an executed notebook printed or returned."""
    outputs = [out for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])]
    return "\n".join(
        out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs
    )


def jobs(root: Path, profile="quick", only=(), settings=(), data=None):
    given = read_settings(settings)
    return plan(root, read_profile(root, profile), only, given, data, root / "runs" / profile)


@pytest.fixture
def other_kernel(tmp_path, monkeypatch):
    """Put another environment's kernel of the same name first on Jupyter's path."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {"argv": ["/nowhere/python"], "display_name": "Other", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


@pytest.fixture
def root(tmp_path):
    """Three notebooks and one profile; nothing is executed."""
    notebook(tmp_path, "00_first")
    notebook(tmp_path, "02_last", defaults="out: str = ''  # folder\ndepth: int = 3  # of it")
    notebook(tmp_path, "01_middle")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "big.yaml").write_text(
        'about: an hour\ndefaults: {seed: 7, rate: 1e-3}\n"01": {seed: 8}\n2: {depth: 9}\n'
    )
    return tmp_path


def test_the_order_is_that_of_the_numbers(root):
    assert [job.notebook.stem for job in jobs(root)] == ["00_first", "01_middle", "02_last"]
    assert [job.notebook.name[:2] for job in jobs(root, only=["2", "00_first"])] == ["00", "02"]


def test_quick_injects_the_folder_alone(root):
    folder = {"out": str(root / "runs" / "quick")}
    assert [job.parameters for job in jobs(root)] == [folder] * 3


def test_a_profile_sets_defaults_sections_and_what_was_asked_wins(root):
    first, middle, last = (job.parameters for job in jobs(root, "big", settings=["areas=[.3]"]))
    assert (first["seed"], middle["seed"], last["depth"]) == (7, 8, 9)
    assert (first["rate"], middle["areas"]) == (0.001, [0.3])
    assert "seed" not in last
    seeds = [job.parameters.get("seed") for job in jobs(root, "big", settings=["seed=1"])]
    assert seeds == [1, 1, None]


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["a=1 b=2", "c=x"], {"a": 1, "b": 2, "c": "x"}),
        (["a=[b, c] d=[1, [2, 3]]"], {"a": ["b", "c"], "d": [1, [2, 3]]}),
        (["a={b: 1e-3, c: [x, 2E+1]} d=-.5e2"], {"a": {"b": 1e-3, "c": ["x", 20.0]}, "d": -50.0}),
        (
            ["a=None b= c=null d=[None] e=Nones"],
            dict(zip("abcde", [None] * 3 + [[None], "Nones"], strict=True)),
        ),
        (["a=True b=false c=e5 d=1e"], {"a": True, "b": False, "c": "e5", "d": "1e"}),
        (["a=/my clips/b c.mp4 d=1"], {"a": "/my clips/b c.mp4", "d": 1}),
        (["a=tcp://host:8786 b=x=y"], {"a": "tcp://host:8786", "b": "x=y"}),
        (["""a='b c=d' e="f \\" g=h" i=1"""], {"a": "b c=d", "e": 'f " g=h', "i": 1}),
        (["a='it''s b=c' d=['e f=g']"], {"a": "it's b=c", "d": ["e f=g"]}),
        (["a=/Ann's/b.mp4 c=/Bob's/d.mp4"], {"a": "/Ann's/b.mp4", "c": "/Bob's/d.mp4"}),
        ([" a = 1  b = 2 "], {"a": 1, "b": 2}),
        ([], {}),
    ],
)
def test_settings_are_yaml_one_or_several_in_a_text(texts, values):
    assert read_settings(texts) == values


def test_a_value_takes_the_type_of_the_default_in_lists_too(root):
    given = jobs(root, settings=["areas=[1, 2e-1] rate=1"])[0].parameters
    assert given["areas"] == [1.0, 0.2]
    assert [type(value) for value in [*given["areas"], given["rate"]]] == [float] * 3


def test_none_of_a_text_is_the_empty_text(tmp_path):
    notebook(tmp_path, "00_first", defaults='out: str = ""  # folder\nexecutor: str = ""  # whose')
    (tmp_path / "params").mkdir()
    for text in ("executor=None", "executor=null", "executor="):
        assert jobs(tmp_path, settings=[text])[0].parameters["executor"] == ""


def test_data_is_passed_as_an_absolute_path(root, monkeypatch):
    monkeypatch.chdir(root)
    assert jobs(root, data="params")[0].parameters["data"] == str(root / "params")
    assert "data" not in jobs(root, data="params")[2].parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "huge"}, "got 'huge', expected one of 'quick', 'big'"),
        ({"settings": ["sead=1"]}, "got 'sead', expected 'seed'? It is one of 'areas', 'depth',"),
        ({"settings": ["depth=1"], "only": ["00"]}, "got 'depth', expected one of"),
        ({"settings": ["seed"]}, "expected key=value"),
        ({"settings": ["seed=many"]}, "seed: got 'many', expected int"),
        ({"settings": ["seed=1.5"]}, "seed: got 1.5, expected int"),
        ({"settings": ["fast=1"]}, "fast: got 1, expected bool"),
        ({"settings": ["rate=yes"]}, "rate: got True, expected float"),
        ({"settings": ["seed=None"]}, "seed: got None, expected int like its default 0"),
        ({"settings": ["areas=[0.1, all]"]}, "areas: got 'all', expected float"),
        ({"settings": ["areas=[0.1, [1]]"]}, "areas: got [1], expected float"),
        ({"settings": ["areas=[0.1, 0.2"]}, "--set areas: expected YAML of plain values"),
        ({"settings": ["data=None"]}, "--set: got data, expected the option --data"),
        ({"settings": ["out=x"]}, "--set: got out, expected the option --out"),
        ({"only": ["7"]}, "got 7, expected one of 00_first, 01_middle, 02_last"),
        ({"data": "nowhere"}, "expected a folder that exists"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(root, arguments, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        jobs(root, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: {sead: 1}", "got 'sead', expected 'seed'"),
        ('"01": {depth: 1}', "got 'depth', expected one of"),
        ("default: {seed: 1}", "got default, expected about, defaults"),
        ("- seed", "expected a mapping"),
        ("seed: !!python/object/apply:os.getcwd []", "wrong.yaml: expected YAML of plain values"),
        ("data_required: true", "expected the folder of videos"),
    ],
)
def test_a_wrong_profile_is_refused(root, text, message):
    (root / "params" / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        jobs(root, "wrong")


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_profile_fits_the_notebooks(path):
    profile = read_profile(ROOT, path.stem)
    found = plan(ROOT, profile, [], {}, ROOT if profile.data_required else None, ROOT / "runs")
    assert found
    assert profile.about


def test_a_profile_can_name_its_notebooks(root):
    (root / "params" / "part.yaml").write_text("only: [1, '02']\n")
    assert [job.notebook.name[:2] for job in jobs(root, "part")] == ["01", "02"]
    assert [job.notebook.name[:2] for job in jobs(root, "part", only=["00"])] == ["00"]


def test_without_a_clone_the_error_says_so(tmp_path):
    with pytest.raises(ValueError, match="come with a clone"):
        find_notebooks(tmp_path)


def test_parameters_come_with_their_defaults(root):
    path = root / "notebooks" / "00_first.ipynb"
    assert parameters(path)["areas"] == [0.1, 0.2]
    assert list(parameters(path)) == ["out", "data", "seed", "rate", "areas", "fast"]


MADE = [("figures/key", "fig.svg"), ("scores/key", "claims_03.csv")]
CLAIM = "claim,mean,low,high,verdict\nSTEP leads,0.1,0.0,0.2,undecided\n"


@pytest.mark.usefixtures("other_kernel")
def test_a_run(tmp_path, capfd):
    """Order, parameters, folder, interpreter, report, stored outputs: one run shows them all."""
    root = tmp_path / "a {clone}"  # papermill fills braces
    root.mkdir()
    first = notebook(
        root,
        "00_first",
        'import os, sys\nprint(os.getcwd(), file=open(f"{out}/cwd", "w"))',
        'print("10%\\r100%", flush=True)\nprint(f"{out}/maps, seed {seed}")',
        "[seed, sys.executable]",
        "import ipywidgets\nipywidgets.IntSlider()",
        LOGGED.replace("NAME", '"first "'),
    )
    makes = "\n".join(
        f'os.makedirs(f"{{out}}/{d}"); open(f"{{out}}/{d}/{n}", "w").write({CLAIM!r})'
        for d, n in MADE
    )
    second = LOGGED.replace("NAME", '"second "'), "1 / 3", f"import os\n{makes}"
    notebook(root, "01_second", *second, after=["00"])
    before = nbformat.read(first, 4)

    assert reproduce(root=root) == 0
    store.store_run(root / "runs" / "quick", "quick", root=root)

    folder = root / "runs" / "quick"
    assert (folder / "log").read_text() == "first second "
    assert Path((folder / "cwd").read_text().strip()) == first.parent
    assert sorted(path.name for path in (folder / "notebooks").iterdir()) == [
        "00_first.ipynb",
        "01_second.ipynb",
    ]
    executed = nbformat.read(folder / "notebooks" / "00_first.ipynb", 4)
    assert "widgets" not in executed.metadata
    assert sys.executable in texts(folder / "notebooks" / "00_first.ipynb")

    page = (folder / "report.html").read_text("utf-8")
    for said in ("Title 00_first", "Title 01_second", "0.333", "notebooks/00_first.ipynb", "torch"):
        assert said in page
    assert "stopped</td>" not in page

    assert (root / "figures" / "fig.svg").is_file()
    claims = pd.read_csv(root / "results" / "claims.csv", dtype={"notebook": str})
    assert claims[["profile", "notebook", "verdict"]].to_numpy().tolist() == [
        ["quick", "03", "undecided"]
    ]

    stored = nbformat.read(first, 4)
    assert [cell.source for cell in stored.cells] == [cell.source for cell in before.cells]
    assert [cell.metadata for cell in stored.cells] == [cell.metadata for cell in before.cells]
    assert [c.execution_count for c in stored.cells[1:]] == [1, 2, 3, 4, 5, 6]
    assert stored.cells[4].outputs[0].execution_count == 4
    assert stored.metadata == before.metadata
    printed = texts(first)
    assert printed.startswith("100%\n")
    assert "\nruns/quick/maps, seed 0" in printed
    assert str(tmp_path) not in first.read_text("utf-8")
    assert sys.prefix not in first.read_text("utf-8")
    assert "IntSlider" not in printed
    said = capfd.readouterr().err
    assert "00_first" in said  # the progress bar
    assert "IPKernelApp" not in said  # what kernels complain of would tear the bar


MEETS = """import pathlib, time
pathlib.Path(out, "OWN").touch()
while not pathlib.Path(out, "OTHER").exists():
    time.sleep(0.1)
"""


def test_two_notebooks_run_at_a_time_and_a_third_waits_for_what_it_builds_on(tmp_path, capfd):
    notebook(tmp_path, "00_a", MEETS.replace("OWN", "a").replace("OTHER", "b"))
    notebook(tmp_path, "01_late", LOGGED.replace("NAME", '"late"'), after=["00", "02"])
    notebook(tmp_path, "02_b", MEETS.replace("OWN", "b").replace("OTHER", "a"))
    assert reproduce(root=tmp_path) == 0
    assert (tmp_path / "runs" / "quick" / "log").read_text() == "late"
    names = re.findall(r"^ +(\d\d_\w+) +\d+ s$", capfd.readouterr().out, re.MULTILINE)
    assert names[-1] == "01_late"
    assert sorted(names[:2]) == ["00_a", "02_b"]


def test_ctrl_c_ends_all_kernels_and_keeps_what_ran(tmp_path):
    waits = "import os, time\nprint(os.getpid(), file=open(f'{out}/NAME', 'w'))\ntime.sleep(600)"
    for name in ("00_a", "01_b"):
        notebook(tmp_path, name, waits.replace("NAME", name))
    code = "import pathlib, signal; from stepkit.reproduce import reproduce as go\n"
    # A job in the background is born deaf to Ctrl-C; a person's terminal is not.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"raise SystemExit(go(root=pathlib.Path({str(tmp_path)!r})))"
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs" / "quick"
    pids = [_number_in(folder / name) for name in ("00_a", "01_b")]
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Interrupted in 00_a.ipynb, 01_b.ipynb" in said
    assert (folder / "report.html").is_file()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere Jupyter watches the parent")
def test_a_kernel_whose_parent_died_while_it_started_ends(tmp_path):
    """Jupyter's own watch does not see it where a service manager adopts orphans."""
    env = os.environ | {"JPY_PARENT_PID": str(os.getppid())}  # not ours: as if it had gone
    kernel = [sys.executable, "-c", WATCHED, "-f", str(tmp_path / "connection.json")]
    assert subprocess.run(kernel, env=env, timeout=60).returncode == 1


def _number_in(path: Path) -> int:
    """Wait until a number stands in a file."""
    for _ in range(600):
        if path.is_file() and (text := path.read_text()):
            return int(text)
        time.sleep(0.1)
    raise TimeoutError(path)


def test_a_failing_notebook_keeps_what_ran_and_the_report_is_written(tmp_path, capfd):
    notebook(tmp_path, "00_fine", "1 + 1")
    notebook(tmp_path, "01_broken", "print('so far')", "undefined_name", "print('never')")
    notebook(tmp_path, "02_after", "1", after=["01"])
    before = (tmp_path / "notebooks" / "00_fine.ipynb").read_bytes()

    assert reproduce(root=tmp_path, out=tmp_path / "elsewhere") == 1

    said = capfd.readouterr().err
    assert "01_broken.ipynb, cell In [4] (undefined_name)" in said
    assert "NameError: name 'undefined_name' is not defined" in said
    folder = tmp_path / "elsewhere" / "quick"
    assert sorted(path.name for path in (folder / "notebooks").iterdir()) == [
        "00_fine.ipynb",
        "01_broken.partial.ipynb",
    ]
    assert "so far" in texts(folder / "notebooks" / "01_broken.partial.ipynb")
    assert "never" not in texts(folder / "notebooks" / "01_broken.partial.ipynb")
    page = (folder / "report.html").read_text("utf-8")
    assert page.count('<td class="done">') == 1
    assert page.count('<td class="stopped">') == 1
    assert page.count('<td class="not run">') == 1
    assert (tmp_path / "notebooks" / "00_fine.ipynb").read_bytes() == before

    # Mended, the same command replaces the partial one, and the report keeps the first notebook.
    notebook(tmp_path, "01_broken", "print('mended')")
    assert reproduce(only=["01"], root=tmp_path, out=tmp_path / "elsewhere") == 0
    assert not partial(folder / "notebooks" / "01_broken.ipynb").exists()
    assert (folder / "report.html").read_text("utf-8").count('<td class="done">') == 2


def test_a_kernel_that_dies_is_reported(tmp_path, capfd):
    notebook(tmp_path, "00_dies", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert reproduce(root=tmp_path) == 1
    assert "DeadKernelError" in capfd.readouterr().err


def test_outputs_are_not_stored_in_a_notebook_edited_meanwhile(tmp_path):
    path = notebook(tmp_path, "00_first", "1")
    executed = tmp_path / "executed.ipynb"
    executed.write_bytes(path.read_bytes())
    notebook(tmp_path, "00_first", "2")
    with pytest.raises(ValueError, match=r"00_first\.ipynb was edited while it ran"):
        store.store(executed, path, {})


def test_runs_with_other_settings_are_not_in_each_others_way(tmp_path):
    path = notebook(tmp_path, "00_first", "print(seed)")
    for given in ([], ["seed=5"], ["seed=6"], ["seed=5"]):
        assert reproduce(settings=given, root=tmp_path) == 0
    folder = tmp_path / "runs" / "quick"
    found = {texts(made).strip()[-1] for made in folder.glob(f"notebooks-*/{path.name}")}
    assert found == {"5", "6"}
    assert not texts(folder / "notebooks" / path.name).strip().endswith(("5", "6"))
    assert len([*folder.glob("report-*.html")]) == 2
    assert (folder / "report.html").is_file()


def test_the_command_line(capsys, monkeypatch, root):
    given = {}
    monkeypatch.setattr("stepkit.__main__.reproduce", lambda **options: given.update(options) or 0)
    assert main(["reproduce", "--only", "01", "02", "--set", "a=1", "--set", "b=2"]) == 0
    assert given["only"] == ["01", "02"]
    assert given["settings"] == ["a=1", "b=2"]
    assert given["profile"] == "quick"
    for wrong in ([], ["reprodcue"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert "usage: stepkit" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("stepkit 0.")


def test_an_error_of_the_user_is_one_line_and_status_2(capsys):
    assert main(["reproduce", "--profile", "no-such"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_claims_of_profiles_stand_side_by_side_and_are_replaced(tmp_path):
    for profile, verdict in (("quick", "holds"), ("gpu", "undecided"), ("quick", "does not hold")):
        scores = tmp_path / profile / "scores" / "key"
        scores.mkdir(parents=True, exist_ok=True)
        row = f"STEP leads,motion,narrow,0.1,0,0.2,{verdict}"
        (scores / "claims_05.csv").write_text(f"claim,dataset,model,mean,low,high,verdict\n{row}\n")
        assert store.keep_claims(tmp_path / profile, profile, tmp_path / "claims.csv") == 1
    kept = pd.read_csv(tmp_path / "claims.csv")
    assert kept["profile"].tolist() == ["quick", "gpu"]
    assert kept["verdict"].tolist() == ["does not hold", "undecided"]
    page = (tmp_path / "claims.md").read_text("utf-8")
    assert "| STEP leads | *does not hold*<br>0.1 [0, 0.2] |" in page
    assert page.index("`quick`") < page.index("`gpu`")


def test_a_run_without_claims_leaves_the_table_alone(tmp_path):
    assert store.keep_claims(tmp_path, "quick", tmp_path / "claims.csv") == 0
    assert not (tmp_path / "claims.csv").exists()


@pytest.mark.parametrize("harm", ["cut", "turned", "empty"])
def test_a_damaged_notebook_is_named_and_stops_no_report(tmp_path, harm):
    source = notebook(tmp_path, "00_first", "print('whole')")
    executed = tmp_path / "run" / "notebooks" / source.name
    executed.parent.mkdir(parents=True)
    book = nbformat.read(source, 4)
    book.metadata["papermill"] = {"start_time": "2026-01-01T00:00:00+00:00", "parameters": {}}
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", text="0.25\n")]
    nbformat.write(book, executed)
    tidy(executed)
    page = tmp_path / "run" / "report.html"
    given = page, [executed], [source], read_profile(ROOT, "quick")
    assert '<td class="done">' in report.write(*given).read_text("utf-8")
    text = executed.read_text("utf-8")
    damaged = {"cut": text[: len(text) // 2], "turned": text.replace("0.25", "0.35"), "empty": ""}
    executed.write_text(damaged[harm], "utf-8")
    with pytest.warns(UserWarning, match=r"00_first\.ipynb' is damaged"):
        page = report.write(*given).read_text("utf-8")
    assert '<td class="damaged">' in page
    assert "0.35" not in page
