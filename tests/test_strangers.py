"""Files and names that a stranger made: refused by name, before they cost memory, time or more."""

import os

import pytest

from stepkit.data.folder import position
from stepkit.data.sample import file_name

# --- ids that become names of files --------------------------------------------------------------


@pytest.mark.parametrize("id_", ["v_Diving_g01_c01", "P20_04_22332", "class__vidéo 1@0.7-1", "-"])
def test_a_harmless_id_is_its_own_file_name(id_):
    assert file_name(id_) == id_


HOSTILE = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "C:x",
    "con",
    "NUL.txt",
    " a",
] + ["a\0b", "a\nb", "a\u202efdp", "\udcff", "x" * 196, "é" * 98, "a|b", "a_b", "a?b"]


def test_hostile_ids_become_names_that_any_file_system_takes(tmp_path):
    names = [file_name(id_) for id_ in HOSTILE]
    assert len(set(names)) == len(names)
    for name in names:
        path = tmp_path / (name + "y" * 60)
        path.write_text("")
        assert path.parent.resolve() == tmp_path and path.name[0] != "."
    assert len(os.listdir(tmp_path)) == len(names)


def test_no_id_can_pass_for_another():
    """The name of a hostile id, taken as an id, is another clip's."""
    assert file_name(file_name("../x")) != file_name("../x")


def test_a_file_whose_name_is_no_text_has_a_place_in_the_splits():
    assert 0 <= position(os.fsdecode(b"\xff.mp4")) < 1
