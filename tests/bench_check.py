"""What checking costs beside reading, on one core: ratios of times taken in turn on the same cases.

    python tests/bench_check.py                 five phantoms
    python tests/bench_check.py DIR

Rows      nibabel reads the five files of a case as float32, without verifying checksums; read_case;
          check_case, which reads and then looks at what reading does not show. A ratio is the
          median over cases and rounds.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit import checks, nifti, phantoms


def plain(case):
    """What a user would write without this project."""
    for path in case.files.values():
        np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj, dtype=np.float32)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.folder:
            phantoms.make_phantoms(scratch, 5)
        cases, rows = nifti.find_cases(args.folder or scratch)[:5], {}
        for _ in range(args.rounds):
            for case in cases:
                times = []
                for function in (plain, nifti.read_case, checks.check_case):
                    start = time.perf_counter()
                    function(case)
                    times.append(time.perf_counter() - start)
                rows.setdefault("read_case / nibabel", []).append(times[1] / times[0])
                rows.setdefault("check_case / nibabel", []).append(times[2] / times[0])
                rows.setdefault("check_case / read_case", []).append(times[2] / times[1])
    for name, ratios in rows.items():
        print(f"{name:24} {np.median(ratios):.2f}  ({np.min(ratios):.2f} to {np.max(ratios):.2f})")


if __name__ == "__main__":
    main()
