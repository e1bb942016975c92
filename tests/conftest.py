"""What several test files share: phantom cases on disk, made once, and a cache of them."""
import os
from pathlib import Path

import pytest
import torch

import brainsyn as bs


@pytest.fixture(autouse=True)
def fixed_chance():
    """Tests that draw without saying from where draw the same every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory):
    """Twelve phantom cases, both naming generations, both header orientations."""
    folder = tmp_path_factory.mktemp("phantoms")
    bs.make_phantoms(folder, 12)
    return folder


@pytest.fixture(scope="session")
def cache(phantom_folder, tmp_path_factory):
    """Their cache at 24 pixels a slice, without tissue clusters."""
    return bs.build_cache(bs.find_cases(phantom_folder), tmp_path_factory.mktemp("cache"), 24, 192.0, "tumour")


@pytest.fixture(scope="session")
def real_folder():
    """A folder of real BraTS cases, named by the environment variable BRAINSYN_DATA."""
    folder = os.environ.get("BRAINSYN_DATA")
    if not folder:
        pytest.skip("BRAINSYN_DATA names no folder of real cases")
    return Path(folder)
