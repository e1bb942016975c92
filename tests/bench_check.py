"""What checking costs beside reading, on one core: ratios of times taken in turn on the same cases.

    python tests/bench_check.py                 five phantoms
    python tests/bench_check.py DIR
    python tests/bench_check.py DIR --plant     how many of all cases are warned of or refused, as
                                                they are and with a fault planted in each

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


def with_scans(*order):
    """A plant: scans in another order."""
    return lambda scans, labels: (scans[list(order)], labels)


def with_labels(*values):
    """A plant: other values in the place of labels 1, 2, 3."""
    return lambda scans, labels: (scans, np.array([0, *values], np.uint8)[labels])


def with_t2(change):
    """A plant: T2 is changed."""
    return lambda scans, labels: (np.stack([*scans[:2], change(scans[2]), scans[3]]), labels)


PLANTS = {"as they are": lambda scans, labels: (scans, labels),
          "t1 and t1ce exchanged": with_scans(1, 0, 2, 3),
          "t1 and t2 exchanged": with_scans(2, 1, 0, 3),
          "t1ce and t2 exchanged": with_scans(0, 2, 1, 3),
          "t2 and flair exchanged": with_scans(0, 1, 3, 2),
          "t2 mirrored": with_t2(lambda scan: scan[::-1]),
          "t2 shifted by 5 voxels": with_t2(lambda scan: np.roll(scan, 5, 1)),
          "labels of BraTS-PED (3 1 2)": with_labels(2, 3, 1), "NCR and ED swapped":
          with_labels(2, 1, 3), "ET and ED swapped": with_labels(1, 3, 2)}


def count_warned(cases):
    """Print in how many cases something is said, for each plant."""
    read = nifti.read_case
    for name, plant in PLANTS.items():
        said = []
        for case in cases:
            nifti.read_case = lambda case, notes: (*plant(*read(case, notes)[:2]), read(case)[2])
            found = checks.check_case(case)["findings"]
            said.append(any(kind in ("warned", "rejected") for kind, _, text in found))
        print(f"{name:30} {sum(said):3d} of {len(cases)}", flush=True)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plant", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.plant:
        return count_warned(nifti.find_cases(args.folder))
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
