"""Is synthetic data worth anything? The same segmenter is trained on different sets and tested on
the same patients.
"""
import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import brainsyn as bs
from kit import edits, files, metrics, nifti, pictures, runs, slices, writing

STUDY_STEPS = 200               # of every segmenter of a study, whatever it is trained on
PATIENTS = ["2", "10", "all"]   # of the default study
FEW = 8                         # test patients below which an interval is "too few to tell"
# What the study compares, arm by arm: the synthetic set (see make_sets), whether real cases are
# beside it, how all are augmented, and the arms that it is compared with.
ARMS = {"real": (None, True, "standard", ()),
        "real + strong augmentation": (None, True, "strong", ("real",)),
        "synthetic": ("synthetic", False, "standard", ("real",)),
        "real + synthetic": ("synthetic", True, "standard", ("real", "real + strong augmentation")),
        "real + balanced": ("balanced", True, "standard", ("real + synthetic",))}


def rarest():
    """The region of which there is least: the last one, ET in BraTS."""
    return list(bs.REGIONS)[-1]


def columns():
    """The columns of the table."""
    return [*bs.REGIONS, f"small {rarest()}"]


def synthetic_cache(folder, held, args):
    """-> (the cache of a folder of synthetic cases, sidecar_hash of each). BadInput where one of
    them was made from, or by a generator trained on, a validation or test case; held: the
    case_hashes of those."""
    cases = nifti.find_cases(folder)
    bad = [case.case for case in cases if writing.contaminated(case, held)]
    if bad:
        raise bs.BadInput(f"{folder}: {len(bad)} of {len(cases)} cases ({bad[0]} for one) come "
                          "from validation or test patients; make them from training cases alone")
    cache = slices.build_cache(cases, Path(args.out).parent / "cache", args.resolution, args.fov,
                               "tumour", {"train": cases})
    return cache, sorted(writing.sidecar_hash(case) for case in cases)


def hashes_of_all(cases):
    """case_hashes of Cases on disk, of label map and outline, sorted."""
    return sorted(digest for case in cases for digest in slices.hashes_of(case))


def make_sets(args, cases, held, out):
    """Train a generator on these real Cases alone and sample sets with it -> {name: their Cache}:
    "synthetic" from their edited label maps, "balanced" from the same with volumes of the rarest
    region spread evenly over 2 to 40 mL, where a map has it. What is there already is kept. The
    commands are printed: anyone can type them. held: see synthetic_cache."""
    files.write_json(out / "split.json", {"train": sorted(case.case for case in cases)})
    here, data = [shlex.quote(str(path)) for path in (out, args.data or cases[0].folder.parent)]
    split = f"--split {here}/split.json --device {args.device} --seed {args.seed}"
    split += " --skip-bad" * args.skip_bad
    split += f" --label-map {args.label_map}" * bool(args.label_map)
    scans = f" --modalities {' '.join(args.modalities)}" if args.modalities else ""
    sets = {"synthetic": "--edit random"}
    if any(edits.volume_ml(*nifti.read_labels(case), rarest()) for case in cases):
        sets["balanced"] = f"--edit random --balance {rarest()} --range 2 40"
    if not (out / "ddpm/closing.json").exists():
        run_command(f"train_ddpm.py --data {data} {split}{scans} --resolution {args.resolution} "
                    f"--fov {args.fov} --steps {args.generator_steps} --sample-every 0 "
                    f"--out {here}/ddpm")
    for name, words in sets.items():
        run_command(f"sample.py --checkpoint {here}/ddpm --labels {data} --part train {split} "
                    f"{words} --count {args.made} --steps {args.calls} --out {here}/{name}")
    return {name: synthetic_cache(out / name, held, args)[0] for name in sets}


def run_command(command):
    """Print a command and run it: a script of this project and its arguments, as text for a shell.
    BadInput with its error message where it fails."""
    print(f"python {command}", flush=True)
    script, *words = shlex.split(command)
    words = [sys.executable, Path(__file__).parents[1] / script, *words]
    done = subprocess.run(words, text=True, errors="replace", capture_output=True)
    if done.returncode:
        raise bs.BadInput(f"{script}: {done.stderr.strip()}")


def study_sizes(args, patients, tests):
    """How many training patients the rows of a study have, sorted: --patients, or those of PATIENTS
    that are fewer than there are. patients, tests: numbers of training patients and test cases."""
    wanted = args.patients or [size for size in PATIENTS if size == "all" or int(size) < patients]
    numbers = [size.replace("all", str(patients)) for size in wanted]
    sizes = sorted({int(size) if size.isdecimal() else 0 for size in numbers})
    if not tests or not 1 <= sizes[0] <= sizes[-1] <= patients:
        raise bs.BadInput(f"--patients {' '.join(wanted)}: the split has only {patients} training "
                          f"patients and {tests} test cases")
    return sizes


def read_json(path):
    """What a file of a study holds. BadInput where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise bs.BadInput(f"{path}: damaged ({error}); choose another --out") from error


def require_settings(args, settings):
    """Write settings.json of a study. BadInput where the folder holds a study with others, or the
    file is damaged."""
    path, free = Path(args.out) / "settings.json", ("device", "seeds", "patients", "skip_bad")
    flags = runs.kept_arguments(args).items()
    settings |= {name: value for name, value in flags if name not in free}
    if path.exists() and read_json(path) != settings:
        raise bs.BadInput(f"{args.out} is a study with other settings; choose another --out")
    files.write_json(path, settings)


def study(args, split, device, fit, source):
    """Train the same segmenter on different training sets with equal optimiser steps and several
    seeds, test all on the same held-out patients. No validation: the last (averaged) weights are
    tested. A training whose result is there is not repeated. fit, source: of train_seg.py.

    The rows of evaluate of every training are in patients_NNN/ARM-SEED.json."""
    out, train, test = Path(args.out), split["train"], split["test"]
    order = np.random.default_rng(0).permutation(sorted({case.patient for case in train}))
    sizes = study_sizes(args, len(order), len(test))
    held = hashes_of_all([*split["val"], *test])
    given, digests = synthetic_cache(args.synthetic, held, args) if args.synthetic else (None, [])
    require_settings(args, {"trained_on": hashes_of_all(train), "synthetic": digests,
                            "tested_on": hashes_of_all(test)})
    real = slices.build_cache(train, out.parent / "cache", args.resolution, args.fov, "tumour",
                              {"train": train})
    prepared, results = list(metrics.prepare_blind(test, args.resolution, args.fov)), {}
    for size in sizes:
        rows = real.part("train", [0])
        rows = rows[np.isin(real.of_rows("patient")[rows], order[:size])]
        cases = [case for case in train if case.patient in order[:size]]
        here = out / f"patients_{size:03d}"
        caches = {"synthetic": given} if given else make_sets(args, cases, held, here)
        for arm, (name, with_real, augment, _) in ARMS.items():
            if name and name not in caches:
                continue
            sources = [source(real, rows)] if with_real else []
            if name:
                chosen = caches[name].part("train", [0])
                sources.insert(0, source(caches[name], chosen, args.synthetic_share))
            for seed in range(args.seeds):
                path = here / f"{arm.replace(' ', '_')}-{seed}.json"
                if not path.exists():
                    changed = {**vars(args), "seed": args.seed + seed, "augment": augment}
                    segmenter, _ = fit(argparse.Namespace(**changed), sources, real, device)
                    files.write_json(path, {"rows": segmenter.evaluate(prepared, full=False)})
                tested = read_json(path)["rows"]
                dice = [row["dice"] for row in tested]
                results.setdefault((size, arm), []).append(dice)
                print(f"{size} patients, {arm}, seed {seed}: Dice {np.mean(dice):.3f}", flush=True)
    rare = np.array([row["true_ml"] for row in tested if row["region"] == rarest()])
    report(args, test, results, rare, len(order))


def dice_table(results, small, patients):
    """Dice of a study -> float64 (A, columns, P, S): arm (with its number of training patients),
    one of columns(), test patient (mean over time points), seed. results: see report; small: bool
    (N,), the cases of the last column, which is NaN for other patients; patients: name of each
    case's patient (N,)."""
    dice = torch.tensor(list(results.values()), dtype=torch.float64)
    dice = dice.unflatten(2, (-1, len(bs.REGIONS)))
    rare = torch.where(torch.from_numpy(small), dice[..., -1], np.nan)
    dice = torch.cat([dice, rare[..., None]], 3)                                # (A, S, N, columns)
    time_points = [np.where(np.array(patients) == name)[0] for name in dict.fromkeys(patients)]
    by_patient = [dice[:, :, points].nanmean(2) for points in time_points]
    return torch.stack(by_patient, 2).permute(0, 3, 2, 1).contiguous().numpy()


def report(args, test, results, rare, patients):
    """Table, study.json and study.png of a study with so many training patients. results: {(size,
    arm): for each seed Dice by case and region, a flat list}; test: the Cases; rare: mL of the
    rarest region of each, array (N,).

    Intervals are about patients: seeds are averaged first, time points of one patient too, and
    differences are paired. "better" and "worse" only where an interval leaves out 0 and at least
    FEW patients are behind it. All seeds of a row share its training patients, generator and
    synthetic set: what other patients or another generator would have given is not in the interval.
    """
    out, tumours = Path(args.out), [i for i in np.argsort(rare, kind="stable") if rare[i] > 0]
    small = tumours[:max(1, len(tumours) // 2)]         # the half of the tumours with less of it
    dice = dice_table(results, np.isin(range(len(rare)), small), [case.patient for case in test])
    by_seed = np.nanmean(dice, 2)                                               # (A, columns, S)
    mean, sd = by_seed.mean(2), by_seed.std(2, ddof=min(1, args.seeds - 1))
    print(f"--- Dice on {len(test)} held-out cases, mean ± spread over {args.seeds} seeds; small "
          f"{rarest()}: the {len(small)} cases with least of it, up to "
          f"{max(rare[small], default=0):.1f} mL")
    summary, panels = [], []
    for (size, arm), means, sds in zip(results, mean.tolist(), sd.tolist()):
        saw_all = args.synthetic and ARMS[arm][0] and size < patients
        row = {"patients": size, "arm": arm, "note": "generator saw all" if saw_all else ""}
        text = f"{size:3d} patients  {arm:28}"
        for column, value, spread in zip(columns(), means, sds):
            row[column] = {"dice": value, "sd_over_seeds": spread}
            text += f"  {column} {value:.3f} ± {spread:.3f}"
        print(text, row["note"])
        summary.append(row)
    differences = compare_arms(dict(zip(results, dice.mean(3))))
    files.write_json(out / "study.json", {"rows": summary, "differences": differences,
                                          "small": [test[i].case for i in small]})
    sizes, arms = map(np.array, zip(*results))
    for i, column in enumerate(columns()):
        lines = {arm: (sizes[arms == arm], mean[arms == arm, i], sd[arms == arm, i])
                 for arm in dict.fromkeys(arms)}
        panels.append((f"Dice, {column}", "linear", lines))
    pictures.plot_lines(out / "study.png", panels, "real training patients", "log")
    print(f"wrote: {out / 'study.json'}\nwrote: {out / 'study.png'}")


def compare_arms(dice):
    """Print the paired differences that ARMS names, with intervals -> list of dicts. dice: {(size,
    arm): float (columns, P)}, by one of columns() and test patient."""
    print("--- paired differences of Dice with 95% interval over patients")
    pairs = [(size, arm, base) for size, arm in dice for base in ARMS[arm][3]]
    differences = []
    for size, arm, base in pairs:
        print(f"{size:3d} patients  {arm} against {base}:")
        for column, change in zip(columns(), dice[size, arm] - dice[size, base]):
            mean, low, high = metrics.bootstrap_interval(change)
            count = int((~np.isnan(change)).sum())
            verdict = "better" * (low > 0) + "worse" * (high < 0)
            verdict = "too few to tell" if count < FEW else verdict
            print(f"    {column:8} {mean:+.3f} [{low:+.3f}, {high:+.3f}] {verdict}")
            differences.append({"patients": size, "arm": arm, "against": base, "region": column,
                                "difference": mean, "low": low, "high": high,
                                "test_patients": count, "verdict": verdict})
    return differences
