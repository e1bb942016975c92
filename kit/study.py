"""Is synthetic data worth anything? The same segmenter is trained on different sets and tested on
the same patients.
"""
import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import brainsyn as bs
from kit import files, metrics, nifti, phantoms, pictures, runs, slices, writing

STUDY_STEPS = 200               # of every segmenter of a study, whatever it is trained on
PATIENTS = ["2", "10", "all"]   # of the default study
FEW = 8                         # test patients below which an interval is "too few to tell"
BALANCED_ML = (2, 40)           # ET volumes of the balanced and flat sets
# What the study compares: the synthetic set (see make_sets), whether real cases are beside it, how
# all are augmented.
ARMS = {"real": (None, True, "standard"), "real + strong augmentation": (None, True, "strong"),
        "synthetic": ("synthetic", False, "standard"),
        "real + synthetic": ("synthetic", True, "standard"),
        "real + balanced": ("balanced", True, "standard"),
        "generated": ("generated", False, "standard"),
        "real + generated": ("generated", True, "standard"),
        "real + generated, flat": ("flat", True, "standard")}
# Which differences it reports: the first less the second.
AGAINST = [("real + strong augmentation", "real"), ("synthetic", "real"),
           ("real + synthetic", "real"), ("real + synthetic", "real + strong augmentation"),
           ("real + balanced", "real + synthetic"), ("real + generated", "real"),
           ("real + generated", "real + synthetic"), ("real + generated, flat", "real + generated")]
COLUMNS = (*bs.REGIONS, "small ET")


def synthetic_cache(folder, held, args):
    """-> (the cache of a folder of synthetic cases, sidecar_hash of each). BadInput where one of
    them was made from, or by a generator trained on, a validation or test case; held: the
    case_hashes of those."""
    cases = nifti.find_cases(folder)
    bad = [case.case for case in cases if writing.contaminated(case, held)]
    if bad:
        raise bs.BadInput(f"{folder}: {len(bad)} of {len(cases)} cases ({bad[0]} for one) come "
                          "from label maps or a generator that used validation or test patients; "
                          "make them from training cases alone")
    cache = slices.build_cache(cases, Path(args.out).parent / "cache", args.resolution, args.fov,
                               "tumour", {"train": cases, "val": [], "test": []})
    return cache, sorted(writing.sidecar_hash(case) for case in cases)


def hashes_of_all(cases):
    """case_hashes of Cases on disk, of label map and outline, sorted."""
    return sorted(digest for case in cases for digest in slices.hashes_of(case))


def make_sets(args, folder, cases, out):
    """Train a generator on these real Cases alone and sample sets with it -> {name: folder}:
    "synthetic" from their edited label maps, "balanced" from the same with ET volumes spread
    evenly, where a map has ET; with --label-steps "generated" from label maps of a generator of
    labels that was trained on these cases alone, and "flat" from such with ET volumes spread
    evenly. What is there already is kept. The commands are printed: anyone can type them."""
    files.write_json(out / "split.json", {"train": sorted(case.case for case in cases)})
    here, data = shlex.quote(str(out)), shlex.quote(str(folder))
    low, high = BALANCED_ML
    chance = f"--device {args.device} --seed {args.seed}"
    common = f"--split {here}/split.json {chance}" + " --skip-bad" * args.skip_bad
    train = (f"train_ddpm.py --data {data} {common} --resolution {args.resolution} "
             f"--fov {args.fov} --sample-every 0")
    edited = f"--labels {data} --part train {common} --edit random"
    generated = f"--label-checkpoint {here}/labels {chance} --request"
    sets = {"synthetic": edited}
    if any((nifti.read_labels(case)[0] == 3).any() for case in cases):
        sets["balanced"] = f"{edited} --balance ET --range {low} {high}"
    if args.label_steps:
        sets |= {"generated": f"{generated} ''", "flat": f"{generated} et={low}..{high}"}
    if not (out / "ddpm/closing.json").exists():
        run_command(f"{train} --steps {args.generator_steps} --out {here}/ddpm")
    if args.label_steps and not (out / "labels/fine/closing.json").exists():
        run_command(f"{train} --generate labels --steps {args.label_steps} --out {here}/labels")
    for name, words in sets.items():
        run_command(f"sample.py --checkpoint {here}/ddpm {words} --count {args.made} "
                    f"--steps {args.calls} --out {here}/{name}")
    return {name: out / name for name in sets}


def run_command(command):
    """Print a command and run it: a script of this project and its arguments, as text for a shell.
    BadInput with the last line that it printed where it fails."""
    print(f"python {command}", flush=True)
    script, *words = shlex.split(command)
    done = subprocess.run([sys.executable, Path(__file__).parents[1] / script, *words], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
        raise bs.BadInput(f"{script} ended with status {done.returncode}: {last}")


def study_test(args, split):
    """The test cases of a study; with --test-scanner the same phantoms as another scanner shows
    them."""
    if not args.test_scanner:
        return split["test"]
    if args.data:
        raise bs.BadInput("--test-scanner is for phantoms; give other centres of --data as test in "
                          "a --split file")
    folder = Path(args.out).parent / "phantoms" / args.test_scanner
    phantoms.make_phantoms(folder, args.phantoms, args.test_scanner)
    wanted = {case.case for case in split["test"]}
    return [case for case in nifti.find_cases(folder) if case.case in wanted]


def study_sizes(args, patients, tests):
    """How many training patients the rows of a study have, sorted: --patients, or those of PATIENTS
    that are fewer than there are. patients, tests: numbers of training patients and test cases."""
    wanted = args.patients or [size for size in PATIENTS if size == "all" or int(size) < patients]
    numbers = [str(patients) if size == "all" else size for size in wanted]
    sizes = sorted({int(size) if size.isdecimal() else 0 for size in numbers})
    if not tests or not 1 <= sizes[0] <= sizes[-1] <= patients:
        raise bs.BadInput(f"--patients {' '.join(wanted)}: the split has {patients} training "
                          f"patients and {tests} test cases; name numbers up to that, or all")
    return sizes


def require_settings(args, settings):
    """Write settings.json of a study. BadInput where the folder holds a study with others."""
    path = Path(args.out) / "settings.json"
    settings = {name: value for name, value in runs.kept_arguments(args).items() if name not in
                ("device", "seeds", "patients", "skip_bad", "arms")} | settings
    if path.exists() and json.loads(path.read_text()) != settings:
        raise bs.BadInput(f"{args.out} holds a study with other settings or data; choose another "
                          "--out, or delete it")
    files.write_json(path, settings)


def read_rows(path, facts, patient_of):
    """The rows of evaluate in a JSON file, with `facts` and the patient in front; null is NaN."""
    rows = []
    for row in json.loads(path.read_text())["rows"]:
        figures = {name: math.nan if value is None else value for name, value in row.items()}
        rows.append({**facts, "patient": patient_of[row["case"]], **figures})
    return rows


def study(args, split, device, fit, source):
    """Train the same segmenter on different training sets with equal optimiser steps and several
    seeds, test all on the same held-out patients. No validation: the last (averaged) weights are
    tested. A training whose result is there is not repeated. fit, source: of train_seg.py."""
    out, started, rows = Path(args.out), time.time(), []
    test = study_test(args, split)
    patient_of = {case.case: case.patient for case in test}
    patients = sorted({case.patient for case in split["train"]})
    order = [patients[i] for i in np.random.default_rng(0).permutation(len(patients))]
    sizes = study_sizes(args, len(order), len(test))
    held = hashes_of_all([*split["val"], *split["test"]])
    given, digests = synthetic_cache(args.synthetic, held, args) if args.synthetic else (None, [])
    require_settings(args, {"trained_on": hashes_of_all(split["train"]),
                            "tested_on": hashes_of_all(test), "synthetic": digests})
    real = slices.build_cache(split["train"], out.parent / "cache", args.resolution, args.fov,
                              "tumour", {"train": split["train"]})
    folder = Path(args.data) if args.data else split["train"][0].folder.parent
    prepared = list(metrics.prepare_blind(test, args.resolution, args.fov))
    for size in sizes:
        cases = [case for case in split["train"] if case.patient in order[:size]]
        caches, here = {"synthetic": given}, out / f"patients_{size:03d}"
        if not given:
            sets = make_sets(args, folder, cases, here)
            caches = {name: synthetic_cache(path, held, args)[0] for name, path in sets.items()}
        names = {case.case for case in cases}
        chosen = [np.arange(entry["first"], entry["first"] + entry["count"])
                  for entry in real.cases if entry["case"] in names]
        for arm, (name, with_real, augment) in ARMS.items():
            if name and name not in caches or args.arms and arm not in args.arms:
                continue
            sources = [source(real, np.concatenate(chosen))] if with_real else []
            if name:
                made = caches[name].part("train")
                sources.insert(0, source(caches[name], made, args.synthetic_share))
            for seed in range(args.seeds):
                path = here / f"{arm.replace(' ', '_')}-{seed}.json"
                changed = {**vars(args), "seed": args.seed + seed, "augment": augment}
                if not path.exists():
                    segmenter, _ = fit(argparse.Namespace(**changed), sources, real, device)
                    files.write_json(path, {"rows": segmenter.evaluate(prepared, full=False)})
                rows += read_rows(path, {"patients": size, "arm": arm, "seed": seed}, patient_of)
                dices = np.reshape([row["dice"] for row in rows[-3 * len(test):]], (-1, 3)).mean(0)
                print(f"{(time.time() - started) / 60:5.1f} min | {size:3d} patients | {arm:26} "
                      f"seed {seed} | WT {dices[0]:.3f}  TC {dices[1]:.3f}  ET {dices[2]:.3f}",
                      flush=True)
    report(args, rows, len(order))


def dice_table(rows, seeds, small):
    """Dice of all rows of a study, which come by arm, seed, case and region -> float (A, 4, P, S):
    arm (with its number of training patients), column of COLUMNS, test patient (mean over time
    points), seed. The column small ET is the ET of the cases `small`, NaN for other patients."""
    cases = len({row["case"] for row in rows})
    dice = torch.tensor([row["dice"] for row in rows], dtype=torch.float64)
    dice = dice.view(-1, seeds, cases, 3)
    is_small = torch.tensor([row["case"] in small for row in rows[:3 * cases:3]])
    dice = torch.cat([dice, torch.where(is_small, dice[..., 2], math.nan)[..., None]], 3)
    patient = np.array([row["patient"] for row in rows[:3 * cases:3]])
    time_points = [np.where(patient == name)[0] for name in dict.fromkeys(patient)]
    by_patient = [dice[:, :, points].nanmean(2) for points in time_points]
    return torch.stack(by_patient, 2).permute(0, 3, 2, 1).contiguous().numpy()


def report(args, rows, patients):
    """Table, study.csv, study.json and study.png from all rows of a study with so many training
    patients.

    Intervals are about patients: seeds are averaged first, time points of one patient too, and
    differences are paired. "better" and "worse" only where an interval leaves out 0 and at least
    FEW patients are behind it. All seeds of a row share its training patients, generator and
    synthetic set: what other patients or another generator would have given is not in the interval.
    """
    out, arms = Path(args.out), list(dict.fromkeys((row["patients"], row["arm"]) for row in rows))
    et = {row["case"]: row["true_ml"] for row in rows if row["region"] == "ET"}
    tumours = sorted((case for case in et if et[case] > 0), key=et.get)
    small = tumours[:max(1, len(tumours) // 2)]         # the half of the tumours with less ET
    dice = dice_table(rows, args.seeds, small)
    by_seed = np.nanmean(dice, 2)                                               # (A, 4, S)
    mean = by_seed.mean(2)
    sd = by_seed.std(2, ddof=1) if args.seeds > 1 else np.full_like(mean, math.nan)
    print(f"--- Dice on {len(et)} held-out cases, mean ± spread over {args.seeds} seeds; small "
          f"ET: the {len(small)} cases with least ET, up to "
          f"{max((et[case] for case in small), default=0):.1f} mL")
    summary = []
    for i, (size, arm) in enumerate(arms):
        saw_all = args.synthetic and ARMS[arm][0] and size < patients
        entry = {"patients": size, "arm": arm, "note": "generator saw all" if saw_all else ""}
        text = f"{size:3d} patients  {arm:28}"
        for column, value, spread in zip(COLUMNS, mean[i].tolist(), sd[i].tolist()):
            entry[column] = {"dice": value, "sd_over_seeds": spread}
            text += f"  {column} {value:.3f} ± {spread:.3f}"
        print(text + (f"  [{entry['note']}]" if saw_all else ""))
        summary.append(entry)
    differences = compare_arms(arms, dice.mean(3))
    files.write_csv(out / "study.csv", rows)
    files.write_json(out / "study.json", {"rows": summary, "differences": differences,
                                          "small_et": small})
    panels = []
    for i, column in enumerate(COLUMNS):
        lines = {}
        for arm in dict.fromkeys(arm for _, arm in arms):
            at = [k for k, (_, name) in enumerate(arms) if name == arm]
            lines[arm] = [arms[k][0] for k in at], mean[at, i], np.nan_to_num(sd[at, i])
        panels.append((f"Dice, {column}", "linear", lines))
    pictures.plot_lines(out / "study.png", panels, "real training patients", "log")
    for name in ("study.csv", "study.json", "study.png"):
        print(f"wrote: {out / name}")


def compare_arms(arms, dice):
    """Print the paired differences AGAINST with intervals -> list of dicts. arms: (training
    patients, arm); dice: float (A, 4, P), by arm, column of COLUMNS and test patient."""
    print("--- paired differences of Dice with 95% interval over patients")
    differences = []
    for size in dict.fromkeys(size for size, _ in arms):
        for arm, base in AGAINST:
            if not {(size, arm), (size, base)} <= set(arms):
                continue
            text = f"{size:3d} patients  {arm} against {base}:"
            changes = dice[arms.index((size, arm))] - dice[arms.index((size, base))]
            for column, change in zip(COLUMNS, changes):
                mean, low, high = metrics.bootstrap_interval(change)
                count = int((~np.isnan(change)).sum())
                verdict = "better" if low > 0 else "worse" if high < 0 else ""
                verdict = "too few to tell" if count < FEW else verdict
                differences.append({"patients": size, "arm": arm, "against": base, "region": column,
                                    "difference": mean, "low": low, "high": high,
                                    "test_patients": count, "verdict": verdict})
                text += f"  {column} {mean:+.3f} [{low:+.3f}, {high:+.3f}] {verdict}".rstrip()
            print(text)
    return differences
