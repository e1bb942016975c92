"""Plain `pytest` in two processes with one core each: a training in a test gains little from a
second core, so two tests side by side take little more than one. Where files or tests are named on
the command line, and on one core, nothing is changed."""
import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = sorted(Path(__file__).parent.glob("test_*.py"))
other = []                                      # the second process, and where it prints


def pytest_configure(config):
    """Start the second process with every other file; keep the rest."""
    words = config.invocation_params.args
    named = any(Path(word.split("::")[0]).exists() for word in words if not word.startswith("-"))
    if named or "BRAINSYN_HALF" in os.environ or (os.cpu_count() or 1) < 2:
        return
    os.environ |= {"BRAINSYN_HALF": "1", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    config.args[:] = map(str, TESTS[::2])
    command = [sys.executable, "-m", "pytest", *words, *map(str, TESTS[1::2])]
    other.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT))


def pytest_sessionfinish(session, exitstatus):
    """Wait for the second process; what failed there has failed here."""
    for process in other:
        print("\n" + process.communicate()[0])
        if process.returncode not in (0, 5):    # 5: no test was selected
            session.exitstatus = process.returncode
