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
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import brainsyn as bs
from kit import checks, devices, files, metrics, nifti, phantoms, pictures, runs, slices, study

STEPS = 1200                                    # a run's length when neither bound is given
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
                       f"{' '.join(study.PATIENTS)})")
    study.add_argument("--test-scanner", choices=sorted(phantoms.SCANNERS),
                       help="test on the same phantoms in this scanner")
    study.add_argument("--generator-steps", type=int, default=400, help="training steps of each "
                       "generator")
    study.add_argument("--label-steps", type=int, default=0, help="training steps of a generator "
                       "of labels; more than 0 adds sets of generated labels, as they come and "
                       "with ET volumes spread evenly")
    study.add_argument("--arms", nargs="+", choices=list(study.ARMS), metavar="ARM",
                       help="only these training sets, of: " + "; ".join(study.ARMS))
    study.add_argument("--made", type=int, default=24, help="synthetic cases a set")
    study.add_argument("--calls", type=int, default=10, help="network calls a slice when they are "
                       "sampled")
    args = parser.parse_args(argv)
    if args.steps is None and args.minutes is None:
        args.steps = study.STUDY_STEPS if args.study else STEPS
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


def train(args, device):
    """One training run, start to end, resumed where one was begun; or a study."""
    cases, split = checks.find_data(args)
    if args.study:
        return study.study(args, split, device, fit, source)
    cache = devices.in_turn(lambda: slices.build_cache(cases, Path(args.out).parent / "cache",
                                                       args.resolution, args.fov, "tumour", split))
    sources = [source(cache, cache.part("train"))]
    trained_on = set(cache.hashes("train"))
    if args.synthetic:
        made, digests = devices.in_turn(lambda: study.synthetic_cache(args.synthetic,
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
