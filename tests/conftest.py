"""What several test files share: phantom cases on disk, made once, and a cache of them."""
import fcntl
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import brainsyn as bs
from kit import judging, nifti, phantoms, requests, slices

bs.SAMPLING["steps"] = requests.SETTINGS["steps"] = 3   # calls, where a test does not say how many
judging.DRAWS, judging.HEADS = 2, 1
judging.PATCHES = 5_000
os.fsync = lambda handle: None                  # no power is cut here: nobody waits for the disk
pytest_plugins = ["hand_ins", "halves"]         # pytest --impl=student.py -m a1; two processes


@pytest.fixture(autouse=True)
def fixed_chance():
    """Tests that draw without saying from where draw the same every time."""
    torch.manual_seed(0)


@contextmanager
def sole_maker(request, name):
    """A folder of this name that both processes of the tests see, one at a time; the body fills
    it."""
    root = request.config.shared or request.getfixturevalue("tmp_path_factory").getbasetemp()
    with open(Path(root, f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(root, name)


@pytest.fixture(scope="session")
def phantom_folder(request):
    """Six phantom cases, both naming generations, both header orientations: for anatomy and
    thresholds."""
    with sole_maker(request, "phantoms") as folder:
        phantoms.make_phantoms(folder, 6)
    return folder


@pytest.fixture(scope="session")
def coarse_folder(request):
    """Twelve on a coarse grid, which are read and made in a fraction of the time: for what is done
    with files."""
    with sole_maker(request, "coarse") as folder:
        phantoms.make_phantoms(folder, 12, scale=2)
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
    phantoms.make_phantoms(folder, 44, scale=2)
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
