"""Train the segmenter: four MRI modalities -> tumour labels, a ResNet U-Net; or study what
synthesis is worth.

    python train_seg.py                                     phantoms are made, a model is trained
    python train_seg.py --data DIR --synthetic SYN --out runs/seg_mix
    python train_seg.py --study                             real / synthetic / both / strong
    augmentation

Reads     a folder of BraTS cases, or makes phantoms in runs/phantoms; slices go into runs/cache
Writes    runs/seg: best.pt (best on validation cases), checkpoint.pt, log.csv, curves.png,
          cases.csv, predictions.png, predictions/*.nii.gz on the grid of the scans, closing.json
Resumes   run the same command again; a study goes on with what is missing
Measured  two CPU cores with bfloat16: 1200 steps of 16 slices at 64x64 in 2.3 minutes; Dice over 12
          held-out phantoms WT 0.863, TC 0.855, ET 0.797; one of them has no tumour and counts 0,
          since one is found
"""
from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import brainsyn as bs
from kit import checks, devices, files, metrics, nifti, phantoms, pictures, runs, slices, writing

STEPS = 1200                                    # a run's length when neither bound is given
# of every segmenter of a study, whatever it is trained on
STUDY_STEPS = 200
FEW = 8                                         # patients an interval needs before it may speak
PATIENTS = ["2", "10", "all"]                   # of the default study
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


def parse_arguments(argv=None):
    """All flags; argv: list of words, the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="folder of BraTS cases; without it phantoms are made")
    data.add_argument("--phantoms", type=int, help="how many phantom cases to make (default 60; "
                      "for a study 120)")
    data.add_argument("--scanner", choices=sorted(phantoms.SCANNERS), default="A",
                      help="centre the phantoms come from")
    data.add_argument("--resolution", type=int, default=64, help="pixels a side of a slice")
    data.add_argument("--fov", type=float, default=192.0, help="width of a slice in mm")
    data.add_argument("--split", help="JSON file with case or patient names for train, val, test")
    data.add_argument("--skip-bad", action="store_true", help="leave cases of --data out that the "
                      "check rejects")
    data.add_argument("--tumour-share", type=float, default=0.5, help="share of training slices "
                      "that show tumour")
    data.add_argument("--synthetic", help="folder of cases made by sample.py, for training only")
    data.add_argument("--synthetic-share", type=float, default=0.5, help="their share of every "
                      "batch")
    data.add_argument("--augment", choices=list(bs.AUGMENT), default="standard",
                      help="how slices are varied")
    model = parser.add_argument_group("model")
    model.add_argument("--depth", type=int, choices=list(bs.STAGES), default=18,
                       help="ResNet-18, 34 or 50")
    model.add_argument("--predict", choices=["regions", "labels"], default="regions",
                       help="WT, TC, ET by a sigmoid each, or background, NCR, ED, ET by one "
                       "softmax")
    model.add_argument("--weights", help="encoder to start from: a file in torchvision's names, or "
                       "imagenet")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--steps", type=int, help=f"end after so many steps (default {STEPS} unless "
                       "--minutes is given)")
    optim.add_argument("--minutes", type=float, help="end after so many minutes in the loop")
    optim.add_argument("--batch", type=int, default=16, help="slices a step")
    optim.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    optim.add_argument("--ema", type=float, default=0.99, help="decay a step of the averaged "
                       "weights")
    run = parser.add_argument_group("run")
    run.add_argument("--out", help="output folder (default runs/seg; of a study runs/study)")
    run.add_argument("--seed", type=int, default=0, help="all chance follows from it")
    run.add_argument("--device", default="auto", choices=devices.DEVICES,
                     help="auto takes the fastest of cuda, mps and cpu; xla is TPUs")
    run.add_argument("--precision", default="auto", choices=devices.PRECISIONS,
                     help="of the layers' arithmetic in training; auto takes bfloat16 where that "
                     "is fast")
    run.add_argument("--compile", action="store_true", help="hand the network to torch.compile")
    run.add_argument("--validate-every", type=int, default=150, help="steps between two "
                     "validations")
    study = parser.add_argument_group("study")
    study.add_argument("--study", action="store_true", help="compare training sets, not train one "
                       "segmenter")
    study.add_argument("--seeds", type=int, default=3, help="trainings of every kind")
    study.add_argument("--patients", nargs="+", help="how many real training patients (default "
                       f"{' '.join(PATIENTS)})")
    study.add_argument("--test-scanner", choices=sorted(phantoms.SCANNERS),
                       help="test on the same phantoms in this scanner")
    study.add_argument("--generator-steps", type=int, default=400, help="training steps of each "
                       "generator")
    study.add_argument("--label-steps", type=int, default=0, help="training steps of a generator "
                       "of labels; more than 0 adds sets of generated labels, as they come and "
                       "with ET volumes spread evenly")
    study.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM",
                       help="only these training sets, of: " + "; ".join(ARMS))
    study.add_argument("--made", type=int, default=24, help="synthetic cases a set")
    study.add_argument("--calls", type=int, default=10, help="network calls a slice when they are "
                       "sampled")
    args = parser.parse_args(argv)
    if args.steps is None and args.minutes is None:
        args.steps = STUDY_STEPS if args.study else STEPS
    elif args.study and args.minutes:
        raise bs.BadInput("--minutes does not go with --study, whose trainings all get the same "
                          "--steps")
    args.out = args.out or ("runs/study" if args.study else "runs/seg")
    args.phantoms = args.phantoms or (120 if args.study else 60)
    try:
        # the path itself is not kept
        args.encoder = args.weights and files.file_hash(args.weights)
    except OSError as error:
        raise bs.BadInput(f"--weights {args.weights}: cannot be read ({error.strerror})") from error
    files.require_positive(args, "phantoms", "resolution", "fov", "steps", "minutes", "batch", "lr",
                           "validate_every", "seeds", "generator_steps", "made", "calls")
    if args.batch < 2:
        raise bs.BadInput("--batch 1: batch norms need at least two slices")
    return args


def source(cache, rows, share=1.0):
    """Where a part of every batch comes from: rows of a cache, those with tumour and the others
    apart."""
    ill = slices.has_label(cache, rows, 2)
    return SimpleNamespace(cache=cache, tumour=rows[ill], other=rows[~ill], share=share)


def draw_rows(sources, args, step):
    """This process's share of the batch of one step: [(Cache, its rows)], one for each source that
    has any."""
    mine, parts, first = devices.share_of(args.batch), [], 0
    for i, its in enumerate(sources):
        count = args.batch - first if i + 1 == len(sources) else round(args.batch * its.share)
        rows = bs.batch_rows(its.tumour, its.other, args.tumour_share, (args.seed, i), step, count)
        rows = rows[max(mine.start - first, 0):max(mine.stop - first, 0)]
        if len(rows):
            parts.append((its.cache, rows))
        first += count
    return parts


def cases_of_batch(sources, args, step):
    """Names of the cases in the batch of one step."""
    return sorted({name for cache, rows in draw_rows(sources, args, step)
                   for name in cache.names(rows)})


def draw_batch(sources, args, step):
    """The slices of one step, this process's share of them: images float (B, C, R, R) in [-1, 1]
    and labels int (B, R, R) in 0..3."""
    mine, parts = devices.share_of(args.batch), [cache.batch(rows) for cache,
                                                 rows in draw_rows(sources, args, step)]
    images, classes = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return bs.augment(images, bs.tumour_labels(classes), args.augment, (args.seed, "augment", step),
                      (args.batch, mine))


def validate(segmenter, cache):
    """Dice over the voxels of all validation cases together, mean over WT, TC, ET, on the model's
    grid; NaN without cases, or where there is nothing to find and nothing found. Together, since
    else a single voxel found in a case without tumour, Dice 0 in place of 1, decides which weights
    are the best."""
    shared, total = np.zeros(3), np.zeros(3)
    for entry in (c for c in cache.cases if c["part"] == "val"):
        images, classes, _ = cache.batch(np.arange(entry["first"], entry["first"] + entry["count"]))
        found, true = [bs.regions_of(its) for its in (segmenter.slice_labels(images),
                                                      bs.tumour_labels(classes))]
        shared += (found & true).sum((1, 2, 3)).numpy()
        total += (found.sum((1, 2, 3)) + true.sum((1, 2, 3))).numpy()
    return float(np.mean(2 * shared / np.maximum(total, 1))) if total.any() else float("nan")


def sound_best(out):
    """Whether best.pt can be used; if not it is said, and the next validation writes another."""
    try:
        return bool(runs.load_checkpoint(out, "segmenter", names=("best.pt",)))
    except bs.BadInput as error:
        print(f"note: {error}; the next validation writes another")
        return False


def fit(args, sources, cache, device, trained_on=None):
    """Train one segmenter on `sources` -> (Segmenter, Pace); of several processes the first one
    alone gets the Segmenter, the others None.

    trained_on: hashes for its checkpoint; then it is validated on the val cases of `cache`, the
    real ones, and the best weights are returned. Without (in the study) nothing is written or
    validated: the last ones are."""
    torch.manual_seed(args.seed)
    network = {"depth": args.depth, "channels": len(cache.meta["modalities"]),
               "predict": args.predict}
    net = devices.place_network(bs.ResUNet(**network), device)
    ema = bs.EMA(net, args.ema, to_host=devices.to_host)
    optimizer = bs.make_optimizer(net, args.lr, device)
    keep, state, best = trained_on is not None, None, {"dice": -1.0, "step": 0}
    if keep:
        state = runs.resume(args, "seg", trained_on, net, ema, optimizer)
    if state and state["best"]["step"] and sound_best(args.out):
        best = state["best"]
    if args.weights and not state:
        runs.load_encoder(net.encoder, args.depth, args.weights)
        ema = bs.EMA(net, args.ema, to_host=devices.to_host)
    trained = devices.prepare_training(net, optimizer, device, args.compile)
    pace = runs.Pace(args, state["step"], state["seconds"]) if state else runs.Pace(args)
    book, guard = runs.LogBook(args.out, pace.step, ("val_dice",)) if keep else None, runs.Guard()
    if keep:
        print(f"ResNet-{args.depth} U-Net, {bs.count_parameters(net) / 1e6:.1f} M parameters | "
              "training slices " + ", ".join(f"{len(s.tumour) + len(s.other)} ({len(s.tumour)} "
                                             "with tumour)" for s in sources), flush=True)
    stop = files.catch_signals() if keep else []

    def save():
        runs.save_checkpoint(args.out, {"kind": "seg", "version": bs.__version__, "step": pace.step,
                                        "seconds": pace.seconds, "args": runs.kept_arguments(args),
                                        "network": network, "weights": net.state_dict(),
                                        "ema": ema.weights, "optimizer": optimizer.state_dict(),
                                        "best": best, "trained_on": trained_on})

    def check():
        """Validate the averaged weights and keep them if they are the best so far -> their Dice."""
        twin = ema.copy_of(net, pace.step)
        score = validate(metrics.Segmenter(twin, args.resolution, args.fov, device), cache)
        def write():
            files.replace_file(Path(args.out) / "best.pt",
                               lambda path: runs.save_state(path,
                                                            {"kind": "segmenter",
                                                             "version": bs.__version__,
                                                             "dice": score, "step": pace.step,
                                                             "args": runs.kept_arguments(args),
                                                             "network": network,
                                                             "weights": twin.state_dict(),
                                                             "resolution": args.resolution,
                                                             "fov": args.fov,
                                                             "seen": sorted(
                {*trained_on, *cache.hashes("val")})}))
            best.update(dice=score, step=pace.step)             # once it is written

        # NaN: nobody to validate on, the last one counts
        if not score <= best["dice"]:
            files.attempt("best.pt", write)
        return score

    while pace.progress() < 1 and not devices.agreed(len(stop)):
        # ------------------------------------------------------------------ one training step ---
        # (B, C, R, R), (B, R, R)
        images, labels = devices.to_device(device, *draw_batch(sources, args, pace.step))
        for group in optimizer.param_groups:
            group["lr"] = lr = bs.learning_rate(args.lr, pace.progress(), pace.step)
        with bs.fast_math(device, args.precision):
            # (B, K, R, R)
            logits = trained(images)
        losses = bs.segmentation_loss(logits, labels, args.predict).view(1)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        finite = devices.step_if_finite(device, optimizer, losses, norm)
        optimizer.zero_grad()
        devices.end_step(device, losses, finite)
        finite = bool(devices.to_host(finite))
        pace.tick()
        if finite and devices.first_process():
            ema.update(net, pace.step)
        # ---------------------------------------------------------------------------------------
        if not guard.sound(finite, pace.step, lambda: cases_of_batch(sources, args, pace.step - 1)):
            if guard.go_back(pace.step):
                if not keep:
                    raise bs.BadInput(f"seed {args.seed}: loss or gradient not finite three steps "
                                      "in a row; lower --lr")
                pace.step = runs.resume(args, "seg", trained_on, net, ema, optimizer)["step"]
                trained = devices.prepare_training(net, optimizer, device, args.compile)
                book = runs.LogBook(args.out, pace.step, ("val_dice",))
                continue
        elif keep:
            book.add(losses)
        if not keep or not devices.first_process():
            continue
        score = float("nan")
        if pace.step % args.validate_every == 0 or pace.progress() >= 1:
            score = check()
        if pace.due("log", 5) or score == score or pace.progress() >= 1:
            text = book.line(pace.step, lr, args.batch, pace.seconds, (score,))[1]
            pace.say(text + (f" | validation Dice {score:.3f}" if score == score else ""))
        if pace.step == 1:
            save()                              # finds a full or read-only disk at once
        elif pace.due("save", 60):
            files.attempt("the checkpoint", save)
    del trained
    first = devices.leave_processes()
    if not keep:
        return metrics.Segmenter(ema.copy_of(net, pace.step), args.resolution, args.fov,
                                 device), pace
    if not first:
        return None, pace
    save()
    if stop:
        print(f"stopped by signal {stop[0]} after step {pace.step}; the same command continues")
        sys.exit(128 + stop[0])
    # resumed at its end, and there is none to be used
    if not best["step"]:
        check()
    return runs.load_segmenter(args.out, device), pace


def close(args, segmenter, split, pace):
    """What a run ends with: every held-out case segmented on its own grid, table, CSV, pictures."""
    out, part = Path(args.out), "test" if split["test"] else "val"
    cases, shown_cases = split[part] or split["train"], {}
    who = f"{len(cases)} " + ("training cases" if not split[part] else "test cases" if part
                              == "test" else "validation cases (which chose the weights)")

    def see(case, got, predicted):
        nifti.write_labels(out / "predictions" / f"{case.case}_prediction.nii.gz", predicted, case,
                           got["grid"].affine)
        truth, guess = slices.to_slices(nifti.read_labels(case)[0]), slices.to_slices(predicted)
        at = int(((truth > 0) | (guess > 0)).sum((1, 2)).argmax())
        pictured = bs.to_images(got["images"][at]).numpy()
        scans = [got["grid"].grow(pictured[bs.MODALITIES.index(m)]) for m in ("t1ce", "flair")]
        shown_cases[case.case] = [*scans, pictures.overlay(scans[0], truth[at]),
                                  pictures.overlay(scans[0], guess[at])]

    rows = segmenter.evaluate(metrics.prepare_blind(cases, args.resolution, args.fov), see)
    mean = {name: np.mean([row["dice"] for row in rows if row["case"] == name])
            for name in shown_cases}
    order = sorted(mean, key=mean.get)
    shown = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, min(6, len(order))).astype(
        int))]
    pictures.draw_rows(out / "predictions.png", [shown_cases[name] for name in shown],
                       ["t1ce", "flair", "truth", "prediction"], "tumour",
                       f"{who}, worst (above) to best")
    files.write_csv(out / "cases.csv", rows)
    log = runs.read_log(out / "log.csv")
    lines = {"loss": ([r["step"] for r in log], [r["loss"] for r in log])}
    checked = [r for r in log if r["val_dice"] == r["val_dice"]]
    dices = {"validation cases": ([r["step"] for r in checked], [r["val_dice"] for r in checked])}
    pictures.draw_lines(out / "curves.png", [("Dice + cross-entropy", "log", lines),
                                       ("mean Dice of WT, TC, ET", "linear", dices)])
    files.write_json(out / "closing.json", {"steps": pace.step,
                                            "minutes": round(pace.seconds / 60, 2), "cases": who,
                                            **metrics.summarise(rows)})
    print(f"--- {who}, whole volumes on their own grid, after {pace.step} steps in "
          f"{pace.seconds / 60:.1f} minutes")
    print("\n".join(metrics.table_of(rows)))
    for name in ("best.pt", "cases.csv", "predictions.png", "predictions", "curves.png",
                 "closing.json"):
        print(f"wrote: {out / name}")


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
        done = subprocess.run([sys.executable, Path(__file__).with_name(command[0]), *command[1:]],
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


def study(args, split, device):
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


def train(args, device):
    """One training run, start to end, resumed where one was begun; or a study."""
    cases, split = checks.find_data(args)
    if args.study:
        return study(args, split, device)
    cache = devices.in_turn(lambda: slices.build_cache(cases, Path(args.out).parent / "cache",
                                                       args.resolution, args.fov, "tumour", split))
    sources = [source(cache, cache.part("train"))]
    trained_on = set(cache.hashes("train"))
    if args.synthetic:
        made, digests = devices.in_turn(lambda: synthetic_cache(args.synthetic,
                                                                cache.hashes("val", "test"), args))
        print(f"synthetic: {len(made.cases)} cases, {args.synthetic_share:.0%} of every batch")
        trained_on |= {*made.hashes("train"), *digests}
        sources = [source(made, made.part("train"), args.synthetic_share), *sources]
    segmenter, pace = fit(args, sources, cache, device, sorted(trained_on))
    if segmenter:                               # in the first process; the others are done
        close(args, segmenter, split, pace)


def main(argv=None):
    """The command line: device, lock, training."""
    args = parse_arguments(argv)
    device = devices.pick_device(args.device, several=not args.study)
    print(devices.describe(device, args.precision), flush=True)
    devices.require_divisible(args.batch, device)
    with files.sole_writer(args.out):
        train(args, device)


if __name__ == "__main__":
    files.run_script(main)
