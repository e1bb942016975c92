"""Random bytes at random places of NIfTI files, for some minutes: the reader must say no or read
rightly.

    python tests/fuzz_reader.py --minutes 3 --seed 0

Three kinds of damage are tried in turn on the T2 file of a phantom: `packed` (bytes of the
.nii.gz), `header` (bytes of the header, packed again with a right checksum) and `plain` (bytes of
the header of an uncompressed file). Right is: read_case gives the same T2, up to the scale and
offset that its header then says. Anything else that it does not refuse is silent.
"""
import argparse
import gzip
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import brainsyn as bs
from kit import nifti, phantoms


def main():
    """Print how often each kind of damage was refused, read rightly, or read wrongly in silence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable()                           # nibabel and numpy comment on every odd header
    warnings.simplefilter("ignore")
    rng, counts, wrong = np.random.default_rng(args.seed), Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        phantoms.write_phantom(scratch, 0)
        case = nifti.find_cases(scratch)[0]
        path, before = case.files["t2"], nifti.read_case(case)[0][2]
        packed, end = path.read_bytes(), time.time() + 60 * args.minutes
        plain = gzip.decompress(packed)
        few = (slice(None, None, 3),) * 3
        while time.time() < end:
            kind = ("packed", "header", "plain")[sum(counts.values()) % 3]
            raw = bytearray(packed if kind == "packed" else plain)
            for _ in range(rng.integers(1, 4)):
                raw[rng.integers(len(raw) if kind == "packed" else 352)] = rng.integers(256)
            path.write_bytes(gzip.compress(bytes(raw), 1) if kind == "header" else raw)
            try:
                after = nifti.read_case(case)[0][2]
                if np.corrcoef(before[few].ravel(), after[few].ravel())[0, 1] ** 2 > 0.9999:
                    counts[kind, "right"] += 1
                else:
                    counts[kind, "silent"] += 1
                    wrong.append({i: raw[i] for i in range(352) if raw[i] != plain[i]})
            except bs.BadInput:
                counts[kind, "refused"] += 1
    for kind in ("packed", "header", "plain"):
        results = {name: counts[kind, name] for name in ("refused", "right", "silent")}
        print(f"{kind:8} {sum(results.values()):6} files: "
              + ", ".join(f"{n} {name}" for name, n in results.items()))
    for changed in wrong[:10]:
        print(f"silent: header bytes {changed}")


if __name__ == "__main__":
    main()
