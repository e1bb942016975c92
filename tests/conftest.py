"""What several test files share: phantom cases on disk, made once, and a cache of them; hand-ins
put in place."""
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from kit import nifti, phantoms, slices
from blank import ASSIGNMENTS, hand_in, home


def pytest_addoption(parser):
    """For hand-ins, see blank.py."""
    parser.addoption("--impl", help="a hand-in: its functions take the place of brainsyn's, of the "
                     "assignment named by -m")
    parser.addoption("--blank-rest", action="store_true", help="functions that the hand-in lacks "
                     "are blank, not brainsyn's")
    parser.addoption("--student", help="student number, for the exercise that differs by it")


def pytest_configure(config):
    """The graft: functions of the hand-in in the place of brainsyn's."""
    path = config.getoption("--impl")
    if not path:
        return
    for assignment in re.findall(r"\ba\d\b", config.getoption("-m")) or ASSIGNMENTS:
        try:
            found = hand_in(path, assignment, config.getoption("--blank-rest"))
        except (Exception, SystemExit) as error:
            raise pytest.UsageError(f"{path} does not run: {type(error).__name__}: {error}") from error
        for name, its in found.items():
            setattr(home(name), name, its)


@pytest.fixture(autouse=True)
def fixed_chance():
    """Tests that draw without saying from where draw the same every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory):
    """Twelve phantom cases, both naming generations, both header orientations."""
    folder = tmp_path_factory.mktemp("phantoms")
    phantoms.make_phantoms(folder, 12)
    return folder


@pytest.fixture(scope="session")
def lay_phantoms(phantom_folder):
    """lay_phantoms(folder, count) -> folder, with the first of them where scripts look that write
    into `runs` there: a copy takes no time, making them a second each."""
    def lay(folder, count, runs="runs"):
        for path in phantom_folder.iterdir():
            if phantoms.phantom_seed(path.name) < count:
                shutil.copytree(path, folder / runs / "phantoms/A" / path.name)
        return folder
    return lay


@pytest.fixture(scope="session")
def many_phantoms(phantom_folder, tmp_path_factory):
    """Forty-four, the twelve among them."""
    folder = shutil.copytree(phantom_folder, tmp_path_factory.mktemp("many") / "A")
    phantoms.make_phantoms(folder, 44)
    return folder


@pytest.fixture(scope="session")
def cache(phantom_folder, tmp_path_factory):
    """Their cache at 24 pixels a slice, without tissue clusters."""
    return slices.build_cache(nifti.find_cases(phantom_folder), tmp_path_factory.mktemp("cache"),
                              24, 192.0, "tumour")


@pytest.fixture(scope="session")
def real_folder():
    """A folder of real BraTS cases, named by the environment variable BRAINSYN_DATA."""
    folder = os.environ.get("BRAINSYN_DATA")
    if not folder:
        pytest.skip("BRAINSYN_DATA names no folder of real cases")
    return Path(folder)
