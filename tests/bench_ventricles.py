"""Ventricles: does a generator of labels whose volumes can be chosen help to measure them?

    python tests/bench_ventricles.py        trains generators of labels and of images, both with
                                            ventricles, makes two synthetic sets, trains segmenters
                                            of ventricles on each

Phantoms, whose ventricles are known exactly. Real cases have the ventricles that the condition
finds (slices.deep_fluid), as for a person who has only scans and tumour labels; synthetic cases
have those of the label maps they were made from. "flat" requests volumes spread evenly from the
least to the most of the training cases. Each segmenter is trained as in train_seg.py --study; half
of every batch is synthetic where there are real cases too. It measures the ventricles of held-out
heads. Errors are against the exact volumes and against those the condition finds in the held-out
scans.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import brainsyn as bs
from kit import checks, devices, files, metrics, nifti, phantoms, slices, study, writing
import sample
import train_ddpm
import train_seg

# What segmenters are trained on: real cases and whose ventricles those have, the synthetic set.
ARMS = {"real, exact": ("exact", None), "real": ("found", None), "generated": (None, "natural"),
        "generated, flat": (None, "flat"), "real + generated": ("found", "natural"),
        "real + generated, flat": ("found", "flat")}
# of air, brain, ventricles, as classes of the condition tumour
LIKE_ET = torch.tensor([0, 1, 4])


class Slices:
    """Slices of cases in memory with ventricles where train_seg.py looks for tumour; used like a
    slices.Cache. truth: "exact", the ventricles of the phantom; "found", those of the condition;
    "made", those the case was made from."""

    def __init__(self, cases, resolution, fov, truth):
        rows, first = [], 0
        self.cases, self.meta = [], {"modalities": list(bs.MODALITIES)}
        for case in cases:
            got = slices.prepare_case(case, resolution, fov, "ventricles")
            grid = got["grid"]
            voxel = (fov / resolution) ** 3 / 1000
            if truth == "found":
                fluid = (got["classes"] == 2).astype(np.float32)                # (D, R, R)
            else:
                if truth == "exact":
                    fluid = phantoms.phantom(phantoms.phantom_seed(case.case))[2]["ventricles"]
                else:
                    path = case.folder / writing.CLASSES_NAME.format(case.case)
                    fluid = np.asanyarray(nib.load(path).dataobj) == 2
                fluid = grid.shrink(slices.to_slices(fluid))                    # fractions
            classes = np.where(fluid >= 0.5, 2, got["classes"] > 0).astype(np.uint8)
            keep = (classes > 0).mean((1, 2)) > 0.01
            rows.append(np.concatenate([got["images"], classes[:, None]], 1)[keep])
            self.cases.append({"case": case.case, "first": first, "count": int(keep.sum()),
                               "voxel": float(voxel), "ml": float(fluid.sum() * voxel)})
            first += int(keep.sum())
        # uint8 (N, C + 1, R, R)
        self.rows = np.concatenate(rows)

    def batch(self, rows):
        """See slices.Cache.batch; places are NaN."""
        block = torch.from_numpy(self.rows[rows])
        return (bs.to_images(block[:, :-1]), LIKE_ET[block[:, -1].long()],
                torch.full((len(block),), torch.nan))

    def names(self, rows):
        """Names of the cases that these rows show, sorted."""
        first = np.array([entry["first"] for entry in self.cases])
        return sorted({self.cases[i]["case"] for i in np.searchsorted(first, rows, "right") - 1})


def measure(segmenter, test):
    """mL and Dice of the ventricles a segmenter finds in every case of Slices, (N,) each."""
    ml, dices = [], []
    for entry in test.cases:
        rows = np.arange(entry["first"], entry["first"] + entry["count"])
        images, classes, _ = test.batch(rows)
        found = segmenter.slice_labels(images) == 3
        ml.append(entry["voxel"] * int(found.sum()))
        dices.append(bs.dice(found, classes == 4))
    return np.array(ml), np.array(dices)


def make_sets(args, out, fov, low, high):
    """Train both generators and make both sets of cases, where they are not there yet (whatever
    their settings were: another study, another --out) -> {name: Slices of them}."""
    common = ["--phantoms", args.phantoms, "--resolution", args.resolution, "--condition",
              "ventricles", "--sample-every", 0, "--device", args.device, *args.words.split()]
    labels = ["--generate", "labels", "--steps", args.label_steps]
    for folder, last, words in (("ddpm", "closing.json", ["--steps", args.image_steps]),
                                ("labels", "fine/closing.json", labels)):
        if not (out / folder / last).exists():
            train_ddpm.main([str(word) for word in (*common, *words, "--out", out / folder)])
    sets = {}
    for name, request in (("natural", ""), ("flat", f"ventricles={low:.1f}..{high:.1f}")):
        words = ["--request", request, "--label-checkpoint", out / "labels", "--checkpoint",
                 out / "ddpm", "--count", args.count, "--steps", args.calls, "--device",
                 args.device, "--out", out / name]
        sample.main([str(word) for word in words])
        sets[name] = Slices(nifti.find_cases(out / name), args.resolution, fov, "made")
    facts = [json.loads(path.read_text()) for path in (out / "flat").glob("*/*.json")]
    requested = np.array([row["Requested"]["ventricles"] for row in facts])
    measured = np.array([row["VolumesML"]["ventricles"] for row in facts])
    print(f"ventricles requested, {requested.min():.1f} to {requested.max():.1f} mL: mean error "
          f"{np.abs(requested - measured).mean():.2f} mL, correlation "
          f"{np.corrcoef(requested, measured)[0, 1]:.3f}")
    return sets


def main():
    """Read flags and go."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantoms", type=int, default=60)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--image-steps", type=int, default=train_ddpm.STEPS,
                        help="training of the image generator")
    parser.add_argument("--label-steps", type=int, default=train_ddpm.LABEL_STEPS,
                        help="of the label generator")
    parser.add_argument("--words", default="", help="more words for train_ddpm.py")
    parser.add_argument("--count", type=int, default=24, help="synthetic cases a set")
    parser.add_argument("--calls", type=int, default=10, help="network calls a slice")
    parser.add_argument("--seg-steps", type=int, default=study.STUDY_STEPS,
                        help="training of every segmenter")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every kind")
    parser.add_argument("--device", default="auto", choices=devices.DEVICES)
    parser.add_argument("--out", default="runs/ventricles")
    args = parser.parse_args()
    run(args, Path(args.out))


def run(args, out):
    """Make phantoms and synthetic sets, train the segmenters of every arm, print the table."""
    words = ["--phantoms", args.phantoms, "--steps", args.seg_steps, "--resolution",
             args.resolution, "--device", args.device, "--out", out / "seg"]
    seg_args = train_seg.parse_arguments([str(word) for word in words])
    fov = seg_args.fov
    data = argparse.Namespace(**{**vars(seg_args), "out": str(out / "ddpm")})
    _, split = checks.find_data(data)
    real, held_out, truth = {}, {}, {}
    for kind in ("exact", "found"):
        real[kind] = Slices(split["train"], args.resolution, fov, kind)
        held_out[kind] = Slices([*split["val"], *split["test"]], args.resolution, fov, kind)
        truth[kind] = np.array([entry["ml"] for entry in held_out[kind].cases])
    volumes = [entry["ml"] for entry in real["found"].cases]
    print(f"ventricles of {len(volumes)} training cases: {min(volumes):.1f} to {max(volumes):.1f} "
          f"mL, median {np.median(volumes):.1f}; of {len(truth['exact'])} held-out ones exactly "
          f"{truth['exact'].min():.1f} to {truth['exact'].max():.1f}, found "
          f"{np.abs(truth['exact'] - truth['found']).mean():.2f} mL off")
    sets, rows = make_sets(args, out, fov, min(volumes), max(volumes)), []
    device = devices.pick_device(args.device)
    for arm, (kind, made) in ARMS.items():
        caches = [sets[made]] if made else []
        caches += [real[kind]] if kind else []
        sources = [train_seg.source(cache, np.arange(len(cache.rows)), 0.5) for cache in caches]
        row = {"arm": arm, "exact": [], "found": [], "dice": []}
        for seed in range(args.seeds):
            changed = argparse.Namespace(**{**vars(seg_args), "seed": seed})
            segmenter, _ = train_seg.fit(changed, sources, caches[0], device)
            ml, dices = measure(segmenter, held_out["exact"])
            row["dice"].append(dices.tolist())
            for name in truth:
                row[name].append((ml - truth[name]).tolist())
        rows.append(row)
        print(f"{arm}: mean error {np.abs(row['exact']).mean():.2f} mL", flush=True)
    report(out, rows)


def report(out, rows):
    """The table, and differences of errors from those of real cases with intervals over held-out
    cases."""
    print("\n| trained on | error, mL | bias, mL | error against those found, mL | Dice | error "
          "less that of real |\n|" + "---|" * 6)
    # of "real", (N,)
    base = np.abs(np.array(rows[1]["exact"])).mean(0)
    for row in rows:
        exact, found = np.array(row["exact"]), np.array(row["found"])               # (seeds, N)
        per_seed = np.abs(exact).mean(1)
        mean, low, high = metrics.bootstrap_interval((np.abs(exact).mean(0) - base).tolist())
        print(f"| {row['arm']} | {per_seed.mean():.2f} ± "
              f"{per_seed.std(ddof=1) if len(per_seed) > 1 else 0:.2f} | {exact.mean():+.2f} | "
              f"{np.abs(found).mean():.2f} | {np.mean(row['dice']):.3f} | {mean:+.2f} [{low:+.2f}, "
              f"{high:+.2f}] |")
    files.write_json(out / "ventricles.json", {"rows": rows})


if __name__ == "__main__":
    files.run_script(main)
