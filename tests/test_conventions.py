"""Section 1 and the shape of the code itself."""
import ast
import re
from pathlib import Path

import numpy as np
import pytest

import brainsyn as bs
from kit import files, slices

ROOT = Path(bs.__file__).parent
SCRIPTS = ("brainsyn.py", "train_ddpm.py", "train_seg.py", "sample.py")


def test_source_keys_used_are_the_keys_defined():
    """A reader must be able to look up every key in brackets, and none may be listed for show."""
    text = (ROOT / "brainsyn.py").read_text()
    listed = set(re.findall(r"^    \[([A-Z+]+)\]", bs.__doc__, re.M))
    used = set(re.findall(r"\[([A-Z][A-Z+]+)\]", text.split('"""', 2)[2]))
    assert used == listed, f"only used: {used - listed}, only listed: {listed - used}"
    entry = r"^    \[[A-Z+]+\] +.+: .+ \d{4}, (arXiv \d{4}\.\d{5}|\S+\.\S+/\S+|.+ conference)\n {14}\S.+$"
    assert len(re.findall(entry, bs.__doc__, re.M)) == len(listed), "each: what it is used for, who, when, where; its title"


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_and_classes_are_specified(script):
    """Every function and class says what it does: the docstrings are the exercise texts."""
    tree = ast.parse((ROOT / script).read_text())
    silent = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not ast.get_docstring(node)]
    assert not silent, f"no docstring: {silent}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_fit_a_page(script):
    """Code is read in an evening: no line over 120 columns."""
    lines = (ROOT / script).read_text().splitlines()
    long = [i for i, line in enumerate(lines, 1) if len(line) > 120]
    assert not long, f"{script}: lines {long} are longer than 120 columns"


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    """A write that fails half-way leaves what was there, and no litter."""
    path = tmp_path / "a" / "file.txt"
    files.replace_file(path, lambda p: p.write_text("old"))

    def broken(p):
        p.write_text("ne")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        files.replace_file(path, broken)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_hashes_name_a_label_map_and_an_outline():
    """The same labels give the same hash whatever their dtype, and any changed voxel, axis order or
    shape another; maps without tumour, all alike, go by the brain's outline."""
    labels, brain = np.arange(24).reshape(2, 3, 4) % 4, np.ones((2, 3, 4), bool)
    of_labels, of_brain = slices.case_hashes(labels.astype(np.uint8), brain)
    assert slices.case_hashes(labels.astype(np.float32), brain) == (of_labels, of_brain) and of_labels != of_brain
    assert slices.case_hashes(np.asfortranarray(labels), brain)[0] == of_labels
    other, narrow = labels.copy(), brain.copy()
    other[1, 2, 3], narrow[0, 0, 0] = (other[1, 2, 3] + 1) % 4, False
    for changed in (other, labels.reshape(3, 2, 4)):
        assert slices.case_hashes(changed, brain)[0] != of_labels
    assert slices.case_hashes(labels, narrow) == (of_labels,
                                                  slices.case_hashes(labels * 0, narrow)[0]) != (
        of_labels, of_brain)


def test_only_the_devices_section_names_devices():
    """A new device is a change in one place."""
    library = (ROOT / "brainsyn.py").read_text()
    start, end = library.index("# 6  DEVICES"), library.index("# 7  SAMPLING")
    code = {"brainsyn.py": library.split('"""', 2)[2].replace(library[start:end], "")}
    code |= {script: (ROOT / script).read_text() for script in SCRIPTS[1:]}
    named = {name: re.findall(r"[\"'.](cuda|mps|xla)\b", text) for name, text in code.items()}
    assert not any(named.values()), named
