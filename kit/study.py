"""Is synthetic data worth anything? The same segmenter trained on different sets, tested on the same patients.
"""
from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import brainsyn as bs
from kit import files, metrics, nifti, phantoms, pictures, runs, slices, writing

# of every segmenter of a study, whatever it is trained on
STUDY_STEPS = 200
PATIENTS = ["2", "10", "all"]                   # of the default study
FEW = 8                                         # patients an interval needs before it may speak
# What the study compares: which synthetic set (see make_sets), real cases beside it or not, how all
# are augmented.
ARMS = {"real": (None, True, "standard"), "real + strong augmentation": (None, True, "strong"),
        "synthetic": ("synthetic", False, "standard"),
        "real + synthetic": ("synthetic", True, "standard"),
        "real + balanced": ("balanced", True, "standard"),
        "generated": ("generated", False, "standard"),
        "real + generated": ("generated", True, "standard"),
        "real + generated, flat": ("flat", True, "standard")}
# Which differences it reports: the second one is what the first must beat.
AGAINST = [("real + strong augmentation", "real"), ("synthetic", "real"),
           ("real + synthetic", "real"), ("real + synthetic", "real + strong augmentation"),
           ("real + balanced", "real + synthetic"), ("real + generated", "real"),
           ("real + generated", "real + synthetic"), ("real + generated, flat", "real + generated")]
BALANCED_ML = (2, 40)                           # ET volumes of the balanced and flat sets


def synthetic_cache(folder, held, args):
    """The cache of a folder of synthetic cases and digests of their sidecars. Refused are cases
    that owe anything, by the hashes in their sidecars, to the validation or test cases whose hashes
    `held` are."""
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
    """case_hashes of Cases on disk, both of each, sorted."""
    return sorted(digest for case in cases for digest in slices.hashes_of(case))


def make_sets(args, folder, cases, out):
    """Train a generator on these real cases alone and sample sets with it -> {name: folder}:
    "synthetic" from their edited label maps, "balanced" from the same with ET volumes spread
    evenly, where a map has ET; with --label-steps "generated" from label maps of a generator of
    labels that has seen these cases alone, and "flat" from such with ET volumes spread evenly. What
    is there already is kept. The commands are printed: anyone can type them."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "split.json").write_text(json.dumps({"train": sorted(case.case for case in cases)}))
    common = ["--split", out / "split.json", "--device", args.device, "--seed", args.seed,
              *["--skip-bad"] * args.skip_bad]
    commands = [] if (out / "ddpm/closing.json").exists() else [
        ["train_ddpm.py", "--data", folder, *common, "--resolution", args.resolution, "--fov",
         args.fov, "--steps", args.generator_steps, "--sample-every", 0, "--out", out / "ddpm"]]
    edited = ["--labels", folder, "--part", "train", *common, "--edit", "random"]
    sets = {"synthetic": edited}
    if any((nifti.read_labels(case)[0] == 3).any() for case in cases):
        sets["balanced"] = [*edited, "--balance", "ET", "--range", *BALANCED_ML]
    if args.label_steps:
        if not (out / "labels/fine/closing.json").exists():
            commands.append(["train_ddpm.py", "--generate", "labels", "--data", folder, *common,
                             "--resolution", args.resolution, "--fov", args.fov, "--steps",
                             args.label_steps, "--sample-every", 0, "--out", out / "labels"])
        asked = ["--label-checkpoint", out / "labels", "--device", args.device, "--seed", args.seed,
                 "--request"]
        sets |= {"generated": [*asked, ""], "flat": [*asked, "et={}..{}".format(*BALANCED_ML)]}
    for name, its in sets.items():
        commands.append(["sample.py", "--checkpoint", out / "ddpm", *its, "--count", args.made,
                         "--steps", args.calls, "--out", out / name])
    for command in commands:
        command = [str(word) for word in command]
        print("python " + shlex.join(command), flush=True)
        done = subprocess.run([sys.executable, Path(__file__).parents[1] / command[0], *command[1:]],
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise bs.BadInput(f"{command[0]} ended with status {done.returncode}: "
                              + (done.stdout.strip().splitlines() or ["no word"])[-1])
    return {name: out / name for name in sets}


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


def report(args, rows, note):
    """Table, study.csv, study.json and study.png from all rows of a study. note: function
    (patients, arm) -> what has to be said of that row, or "".

    Intervals are about patients: seeds are averaged first, time points of one patient too, and
    differences are paired. "better" and "worse" only where an interval leaves out 0 and at least
    FEW patients are behind it. All seeds of a row share its training patients, generator and
    synthetic set: what other patients or another generator would have given is not in the interval.
    """
    out, everyone = Path(args.out), {row["case"]: row for row in rows if row["region"] == "ET"}
    ill = sorted((name for name, row in everyone.items() if row["true_ml"] > 0),
                 key=lambda n: everyone[n]["true_ml"])
    small = ill[:max(1, len(ill) // 2)]         # the rare end: the half of the tumours with less ET
    columns = {**{region: lambda row, r=region: row["region"] == r for region in bs.REGIONS},
               "small ET": lambda row: row["region"] == "ET" and row["case"] in small}

    # {patient: Dice, seeds averaged}, [mean over patients of every seed]
    def per_patient(size, arm, column):
        scores = {}
        for row in rows:
            if row["patients"] == size and row["arm"] == arm and columns[column](row):
                scores.setdefault(row["patient"], {}).setdefault(row["seed"], []).append(
                    row["dice"])
        scores = {patient: [np.mean(its[seed]) for seed in sorted(its)] for patient,
                  its in scores.items()}
        return {patient: float(np.mean(its)) for patient, its in scores.items()}, np.mean(
            list(scores.values()), 0)

    print(f"--- Dice on {len(everyone)} held-out cases, mean ± spread over {args.seeds} seeds; "
          f"small ET: the {len(small)} cases with least ET, up to "
          f"{max((everyone[n]['true_ml'] for n in small), default=0):.1f} mL")
    summary, lines, done = [], {column: {} for column in columns}, {(row["patients"], row["arm"])
                                                                    for row in rows}
    for size in sorted({size for size, _ in done}):
        for arm in (arm for arm in ARMS if (size, arm) in done):
            entry, text = {"patients": size, "arm": arm,
                           "note": note(size, arm)}, f"{size:3d} patients  {arm:28}"
            for column in columns:
                by_seed = per_patient(size, arm, column)[1]
                spread = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else float("nan")
                entry[column] = {"dice": float(by_seed.mean()), "sd_over_seeds": spread}
                text += f"  {column} {by_seed.mean():.3f} ± {spread:.3f}"
                line = lines[column].setdefault(arm, ([], [], []))
                for values, value in zip(line, (size, float(by_seed.mean()), 0.0 if spread != spread
                                                else spread)):
                    values.append(value)
            summary.append(entry)
            print(text + (f"  [{entry['note']}]" if entry["note"] else ""))
    print("--- paired differences of Dice with 95% interval over patients")
    differences = []
    for size, arm, base in ((size, *pair) for size in sorted({size for size, _ in done})
                            for pair in AGAINST):
        if {(size, arm), (size, base)} <= done:
            text = f"{size:3d} patients  {arm} against {base}:"
            for column in columns:
                mine, theirs = per_patient(size, arm, column)[0], per_patient(size, base, column)[0]
                mean, low, high = metrics.bootstrap_interval([mine[p] - theirs[p] for p in mine])
                verdict = ("too few to tell" if len(mine) < FEW else "better" if low > 0 else
                           "worse" if high < 0 else "")
                differences.append({"patients": size, "arm": arm, "against": base, "region": column,
                                    "difference": mean, "low": low, "high": high,
                                    "test_patients": len(mine), "verdict": verdict})
                text += f"  {column} {mean:+.3f} [{low:+.3f}, {high:+.3f}]{' ' * bool(verdict)}{verdict}"
            print(text)
    files.write_csv(out / "study.csv", rows)
    files.write_json(out / "study.json", {"rows": summary, "differences": differences,
                                          "small_et": small})
    pictures.draw_lines(out / "study.png", [(f"Dice, {c}", "linear", its) for c,
                                            its in lines.items()], "real training patients", "log")
    for name in ("study.csv", "study.json", "study.png"):
        print(f"wrote: {out / name}")


def study(args, split, device, fit, source):
    """Train the same segmenter on different training sets with equal optimiser steps and several
    seeds, test all on the same held-out patients. No validation: the last (averaged) weights are
    tested."""
    out, started = Path(args.out), time.time()
    test, patients = study_test(args, split), sorted({case.patient for case in split["train"]})
    order = [patients[i] for i in np.random.default_rng(0).permutation(len(patients))]
    wanted = args.patients or [n for n in PATIENTS if n == "all" or int(n) < len(order)]
    try:
        sizes = sorted({len(order) if size == "all" else int(size) for size in wanted})
    except ValueError:
        sizes = [0]
    if not test or not 1 <= sizes[0] <= sizes[-1] <= len(order):
        raise bs.BadInput(f"--patients {' '.join(wanted)}: the split has {len(order)} training "
                          f"patients and {len(test)} test cases; name numbers up to that, or all")
    held = hashes_of_all([*split["val"], *split["test"]])
    given, digests = synthetic_cache(args.synthetic, held, args) if args.synthetic else (None, [])
    settings = {k: v for k, v in runs.kept_arguments(args).items()
                if k not in ("device", "seeds", "patients", "skip_bad", "arms")}
    settings.update(trained_on=hashes_of_all(split["train"]), tested_on=hashes_of_all(test),
                    synthetic=digests)
    if (out / "settings.json").exists() and json.loads((out / "settings.json").read_text(
        )) != settings:
        raise bs.BadInput(f"{out} holds a study with other settings or data; choose another --out, "
                          "or delete it")
    files.write_json(out / "settings.json", settings)
    real = slices.build_cache(split["train"], Path(args.out).parent / "cache", args.resolution,
                              args.fov, "tumour", {"train": split["train"]})
    folder = Path(args.data) if args.data else split["train"][0].folder.parent
    prepared = list(metrics.prepare_blind(test, args.resolution, args.fov))
    rows, patient_of = [], {case.case: case.patient for case in test}
    for size in sizes:
        cases = [case for case in split["train"] if case.patient in order[:size]]
        caches = {"synthetic": given} if given else {
            name: synthetic_cache(made, held, args)[0] for name, made in
            make_sets(args, folder, cases, out / f"patients_{size:03d}").items()}
        mine = [np.arange(c["first"], c["first"] + c["count"]) for c in real.cases
                if c["patient"] in order[:size]]
        mine = source(real, np.concatenate(mine))
        for arm, (name, with_real, kind) in ARMS.items():
            if name and name not in caches or args.arms and arm not in args.arms:
                # one given set, no ET to scale, no generator of labels; not wanted
                continue
            sources = [mine] if with_real else []
            if name:
                sources.insert(0, source(caches[name], caches[name].part("train"),
                                         args.synthetic_share))
            for seed in range(args.seeds):
                path = out / f"patients_{size:03d}" / f"{arm.replace(' ', '_')}-{seed}.json"
                if not path.exists():
                    asked = argparse.Namespace(**{**vars(args), "seed": args.seed + seed,
                                                  "augment": kind})
                    segmenter, _ = fit(asked, sources, real, device)
                    files.write_json(path, {"rows": segmenter.evaluate(prepared, full=False)})
                scores = json.loads(path.read_text())["rows"]
                rows += [{"patients": size, "arm": arm, "seed": seed,
                          "patient": patient_of[row["case"]],
                          **{k: float("nan") if v is None else v for k, v in row.items()}}
                         for row in scores]
                mean = {region: np.mean([r["dice"] for r in scores if r["region"] == region])
                        for region in bs.REGIONS}
                print(f"{(time.time() - started) / 60:5.1f} min | {size:3d} patients | {arm:26} "
                      f"seed {seed} | " + "  ".join(f"{region} {value:.3f}" for region,
                                                    value in mean.items()), flush=True)
    report(args, rows, lambda size, arm: "generator saw all" if given and size < len(order)
           and arm != "real" and "strong" not in arm else "")
