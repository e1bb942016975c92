"""Plain `pytest` in two processes with one core each: a training in a test gains little from a
second core, so two tests side by side take little more than one. Each process takes the next file
that the other has not taken. Where files or tests are named on the command line, and on one core,
nothing is changed.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

LONG = ("test_learning", "test_requests", "test_scripts", "test_readme", "test_seg_scripts",
        "test_the_tests", "test_faults", "test_real")
other = []                                      # the second process, and where it prints
mine = set()                                    # files that this process has taken


def pytest_configure(config):
    """Start the second process with the same words. config.shared: a folder that both processes
    see, which holds an entry for every file that is taken; None in a process that is alone."""
    words = config.invocation_params.args
    named = any(Path(word.split("::")[0]).exists() for word in words if not word.startswith("-"))
    inside = "PYTEST_CURRENT_TEST" in os.environ            # a test has started this pytest
    config.shared = os.environ.pop("BRAINSYN_SHARED", None)
    if config.shared or named or inside or (os.cpu_count() or 1) < 2:
        return
    config.shared = tempfile.mkdtemp()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    other.append(subprocess.Popen([sys.executable, "-m", "pytest", *words], text=True,
                                  env={**os.environ, "BRAINSYN_SHARED": config.shared},
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT))


def pytest_collection_modifyitems(items):
    """The long files first: what is left at the end is short."""
    items.sort(key=lambda item: (item.path.stem not in LONG, item.path.stem))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Leave out a test whose file the other process has taken."""
    if item.config.shared is None or item.path in mine:
        return None
    try:
        os.mkdir(Path(item.config.shared) / item.path.stem)
    except FileExistsError:
        return True
    mine.add(item.path)
    return None


def pytest_sessionfinish(session):
    """Wait for the second process; what failed there has failed here."""
    for process in other:
        print("\n" + process.communicate()[0])
        if process.returncode not in (0, 5):    # 5: no test was selected
            session.exitstatus = process.returncode
