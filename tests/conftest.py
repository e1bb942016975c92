"""What several test files share: phantom cases on disk, made once, and a cache of them."""
import os
import shutil
from pathlib import Path

import pytest
import torch

from kit import nifti, phantoms, slices

pytest_plugins = ["hand_ins", "halves"]         # pytest --impl=student.py -m a1; two processes

# How many times coarser than a scan phantoms are where a test needs files and not anatomy.
SCALE = 2


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
def coarse_folder(request, tmp_path_factory):
    """The same twelve on a coarse grid, which are read and made in a fraction of the time: for
    tests of what is done with files, not of anatomy and thresholds."""
    if SCALE == 1:
        return request.getfixturevalue("phantom_folder")
    folder = tmp_path_factory.mktemp("coarse")
    phantoms.make_phantoms(folder, 12, scale=SCALE)
    return folder


@pytest.fixture(scope="session")
def lay_phantoms(coarse_folder):
    """lay_phantoms(folder, count) -> folder, with the first of the coarse ones where scripts look
    that write into `runs` there: a copy takes no time."""
    def lay(folder, count, runs="runs"):
        for path in coarse_folder.iterdir():
            if phantoms.phantom_seed(path.name) < count:
                shutil.copytree(path, folder / runs / "phantoms/A" / path.name)
        return folder
    return lay


@pytest.fixture(scope="session")
def many_phantoms(coarse_folder, tmp_path_factory):
    """Forty-four of the coarse ones, the twelve among them."""
    folder = shutil.copytree(coarse_folder, tmp_path_factory.mktemp("many") / "A")
    phantoms.make_phantoms(folder, 44, scale=SCALE)
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
