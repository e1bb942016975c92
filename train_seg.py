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
Measured  two CPU cores, float32: Dice over 12 held-out phantoms WT 0.851, TC 0.841, ET 0.771; one
          of them has no tumour and counts 0, since one is found
"""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import brainsyn as bs
from kit import checks, devices, files, metrics, nifti, options, pictures, runs, slices, study

STEPS = 1200                                    # of a run with neither --steps nor --minutes
STUDY_DEFAULTS = {"phantoms": 120, "steps": study.STUDY_STEPS, "out": "runs/study"}
FLAGS = [
    *options.COMMON, *options.TRAINING,
    # data
    ("--synthetic", str, None, "folder of cases made by sample.py, for training only"),
    ("--synthetic-share", options.fraction, 0.5, "fraction of every batch that is synthetic"),
    ("--augment", list(bs.AUGMENT), "standard", "how slices are varied"),
    # model
    ("--depth", list(bs.STAGES), 18, "ResNet-18 or 34"),
    ("--predict", ["regions", "labels"], "regions", "WT, TC, ET (or each label) by sigmoids, or "
     "one softmax"),
    # optimisation
    ("--steps", options.count, STEPS, f"of a study {study.STUDY_STEPS}; no bound with --minutes"),
    ("--ema", options.fraction, 0.99, "decay of the averaged weights a step"),
    # run
    ("--out", str, "runs/seg", "output folder; of a study runs/study"),
    ("--validate-every", options.count, 150, "steps between two validations"),
    # study
    ("--study", bool, False, "compare training sets; 120 phantoms unless --phantoms is given"),
    ("--seeds", options.count, 3, "trainings of every kind"),
    ("--patients", str, None, "numbers of real patients: 2 10 all", {"nargs": "+"}),
    ("--generator-steps", options.count, 400, "training steps of each generator"),
    ("--made", options.count, 24, "synthetic cases a set"),
    ("--calls", options.count, 10, "network calls a slice when they are sampled")]


def parse_arguments(argv=None):
    """All flags; argv: list of words, the command line by default. Sets what is read, see
    options.use_names. BadInput where a flag is wrong."""
    parser = options.Parser(__doc__, FLAGS)
    args = parser.parse_training(argv, "study", {True: STUDY_DEFAULTS})
    options.use_names(args.modalities, args.label_map)
    if args.study and args.minutes:
        raise bs.BadInput("--minutes does not go with --study: give --steps")
    if args.batch < 2:
        raise bs.BadInput("--batch 1: batch norms need at least two slices")
    return args


def source(cache, rows, fraction=1.0):
    """A source of training slices: rows of a cache, with and without tumour, and its fraction of
    every batch; the last one of several sources gets the rest."""
    has_tumour = slices.has_label(cache, rows, 2)
    return SimpleNamespace(cache=cache, tumour=rows[has_tumour], other=rows[~has_tumour],
                           fraction=fraction)


def draw_rows(sources, args, step):
    """This process's part of the batch of step 0, 1, ...: [(Cache, row of it)]."""
    drawn = []
    for i, part in enumerate(sources):
        last = i + 1 == len(sources)
        n = args.batch - len(drawn) if last else round(args.batch * part.fraction)
        rows = bs.batch_rows(part.tumour, part.other, args.tumour_share, (args.seed, i), step, n)
        drawn += [(part.cache, row) for row in rows]
    return drawn[devices.slice_of_batch(args.batch)]


def draw_batch(sources, args, step):
    """The slices of that part, augmented: images float (B, C, R, R) in [-1, 1] and labels int (B,
    R, R) in 0..L."""
    parts = [cache.batch([row]) for cache, row in draw_rows(sources, args, step)]
    images, classes, _ = map(torch.cat, zip(*parts))
    return bs.augment(images, bs.tumour_labels(classes), args.augment, (args.seed, "augment", step),
                      (args.batch, devices.slice_of_batch(args.batch)))


def validate(segmenter, cache):
    """Dice over the voxels of all validation cases together, mean over regions, on the model's
    grid; NaN without cases, or where there is nothing to find and nothing found. Together, since
    otherwise a single voxel found in a case without tumour, Dice 0 in place of 1, decides.
    """
    shared, total = np.zeros((2, len(bs.REGIONS)))
    for case in [case for case in cache.cases if case["part"] == "val"]:
        images, classes, _ = cache.batch(case["first"] + np.arange(case["axial"]))
        found = bs.regions_of(segmenter.slice_labels(images))
        true = bs.regions_of(bs.tumour_labels(classes))
        shared += (found & true).sum((1, 2, 3)).numpy()
        total += (found.sum((1, 2, 3)) + true.sum((1, 2, 3))).numpy()
    return float(np.mean(2 * shared / np.maximum(total, 1))) if total.any() else math.nan


def fit(args, sources, cache, device, trained_on=None):
    """Train one segmenter on `sources` -> (Segmenter, Run); of several processes only the first
    gets the Segmenter, the others None.

    trained_on: hashes for its checkpoint; then it is validated on the val cases of `cache`, the
    real ones, and the best weights are returned. Without (in the study) nothing is written or
    validated: the last averaged weights are returned.
    """
    torch.manual_seed(args.seed)
    network = {"depth": args.depth, "channels": len(bs.MODALITIES), "predict": args.predict}
    net = devices.place_network(bs.ResUNet(**network), device)
    ema = bs.EMA(net, args.ema, to_host=devices.to_host)
    optimizer = bs.make_optimizer(net, args.lr, device)
    keep = trained_on is not None
    run = runs.Run(args, "seg", net, ema, optimizer,
                   {"network": network, "trained_on": trained_on}, keep)
    trained = devices.prepare_training(net, optimizer, device)
    if keep and devices.first_process():
        if not run.step:
            (Path(args.out) / "best.pt").unlink(missing_ok=True)    # of a run that was deleted
        counts = " + ".join(str(len(part.tumour) + len(part.other)) for part in sources)
        size = pictures.count_parameters(net) / 1e6
        print(f"ResNet-{args.depth} U-Net, {size:.1f} M parameters | training slices {counts}",
              flush=True)

    def case_names(step):
        return sorted({part.names([row])[0] for part, row in draw_rows(sources, args, step)})

    # Training in pseudo-code, repeated (keys as in brainsyn.py):
    #         images, labels ~ training slices: moved and recoloured at random
    #         logits = U-Net(images),  its encoder a ResNet                   [UNET, RESNET]
    #         loss   = 1 - Dice (soft) + cross-entropy                        [VNET]
    #         weights <- a step of AdamW against the gradient of the loss     [ADAMW]
    #         averaged weights <- d averaged weights + (1 - d) weights
    #         now and then: Dice of the averaged weights on the validation cases; keep the best
    while run.going():
        # ------------------------------------------------------------------ one training step ---
        images, labels = draw_batch(sources, args, run.step)                    # (B, C, R, R)
        images, labels = devices.to_device(device, images, labels)              # (B, R, R)
        lr = bs.learning_rate(args.lr, run.progress(), run.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with bs.fast_math(device, args.precision):
            logits = trained(images)                                            # (B, K, R, R)
        losses = bs.segmentation_loss(logits, labels, args.predict).view(1)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        finite = devices.step_if_finite(device, optimizer, losses, norm)
        optimizer.zero_grad()
        devices.end_step(device)
        # ---------------------------------------------------------------------------------------
        run.after_step(finite, losses, case_names)
        validate_now = run.step % args.validate_every == 0 or run.progress() >= 1
        if keep and devices.first_process():
            run.record(keep_best(run, cache, device) if validate_now else math.nan)
    del trained
    first = run.finish()
    if not keep:
        return averaged(run, device), run
    if first and best_dice(args.out) is None:   # resumed at its end, and best.pt cannot be used
        keep_best(run, cache, device)
    return runs.load_segmenter(args.out, device) if first else None, run


def averaged(run, device):
    """The Segmenter with the averaged weights of a run."""
    twin = run.ema.copy_of(run.net, run.step)
    return metrics.Segmenter(twin, run.args.resolution, run.args.fov, device)


def best_dice(out):
    """The validation Dice of best.pt; None where there is none that can be used."""
    try:
        return runs.load_checkpoint(out, "segmenter", names=("best.pt",))["dice"]
    except bs.BadInput:
        return None


def keep_best(run, cache, device):
    """Validate the averaged weights and write best.pt if they are the best so far -> their Dice."""
    args, best, segmenter = run.args, best_dice(run.args.out), averaged(run, device)
    score = validate(segmenter, cache)
    state = {"kind": "segmenter", "version": bs.__version__, "dice": score, "step": run.step,
             "args": runs.kept_arguments(args), "network": run.facts["network"],
             "weights": segmenter.net.state_dict(), "resolution": args.resolution,
             "fov": args.fov, "seen": sorted({*run.facts["trained_on"], *cache.hashes("val")})}
    if best is None or not score <= best:       # NaN: no validation cases, the last weights count
        files.attempt("best.pt", lambda: files.replace_file(
            Path(args.out) / "best.pt", lambda path: runs.save_state(path, state)))
    return score


def finish_report(args, segmenter, split, run):
    """What a run ends with: every held-out case segmented on its own grid, table, CSV, pictures."""
    out = Path(args.out)
    part = next(name for name in ("test", "val", "train") if split[name])
    title = f"{len(split[part])} {part} cases"
    shown = []

    def keep_prediction(case, prepared, predicted):
        path = out / "predictions" / f"{case.case}_prediction.nii.gz"
        nifti.write_labels(path, predicted, case, prepared["grid"].affine)
        shown.append(picture_of(case, prepared, predicted))

    prepared = metrics.prepare_blind(split[part], args.resolution, args.fov)
    rows = segmenter.evaluate(prepared, keep_prediction)
    dice = np.reshape([row["dice"] for row in rows], (len(shown), -1)).mean(1)
    worst_first = np.argsort(dice, kind="stable")[slices.evenly(len(dice), 6)]
    pictures.plot_rows(out / "predictions.png", [shown[i] for i in worst_first],
                       [*shown_modalities(), "truth", "prediction"], "tumour",
                       f"{title}, worst first")
    log = runs.read_log(out / "log.csv")
    pictures.plot_lines(out / "curves.png", [
        ("Dice + cross-entropy", "log", {"training": runs.curve(log, "loss")}),
        ("mean Dice of regions", "linear", {"validation": runs.curve(log, "val_dice")})])
    files.write_csv(out / "cases.csv", rows)
    closing = {"steps": run.step, "minutes": round(run.seconds / 60, 2), "cases": title}
    files.write_json(out / "closing.json", closing | metrics.summarise(rows))
    print(f"--- {title}, whole volumes on their own grid, after {run.step} steps; nothing: Dice of "
          "a segmenter that finds nothing")
    print("\n".join(metrics.table_of(rows)))
    print(f"wrote: {out} with best.pt, cases.csv, closing.json, predictions.png, curves.png")


def shown_modalities():
    """What predictions.png shows: T1ce and FLAIR where they are there, else the first two."""
    return sorted(bs.MODALITIES, key=lambda name: name not in ("t1ce", "flair"))[:2]


def picture_of(case, prepared, predicted):
    """A row of predictions.png: two scans, true and predicted labels on the first of them, in the
    slice with most tumour, true or predicted."""
    true, predicted = slices.to_slices(nifti.read_labels(case)[0]), slices.to_slices(predicted)
    at = int(((true > 0) | (predicted > 0)).sum((1, 2)).argmax())
    names = [bs.MODALITIES.index(name) for name in shown_modalities()]
    scans = bs.to_images(prepared["images"][:, names]).movedim(1, 0)
    shown = [*prepared["grid"].grow(scans.numpy())[:, at]]
    return [*shown, *(pictures.overlay(shown[0], labels[at]) for labels in (true, predicted))]


def train(args, device):
    """One training run, start to end, resumed where one was begun; or a study."""
    cases, split = checks.find_data(args)
    if args.study:
        return study.study(args, split, device, fit, source)
    cache = devices.first_process_first(lambda: slices.build_cache(
        cases, Path(args.out).parent / "cache", args.resolution, args.fov, "tumour", split))
    sources = [source(cache, cache.part("train", [0]))]
    if not len(sources[0].tumour):
        raise bs.BadInput("no training slice shows tumour, so there is nothing to learn; add cases "
                          f"with tumour, or give more than --resolution {args.resolution}")
    trained_on = set(cache.hashes("train"))
    if args.synthetic:
        synthetic, sidecars = devices.first_process_first(lambda: study.synthetic_cache(
            args.synthetic, cache.hashes("val", "test"), args))
        print(f"synthetic: {len(synthetic.cases)} cases, {args.synthetic_share:.0%} of every batch")
        trained_on |= {*synthetic.hashes("train"), *sidecars}
        sources.insert(0, source(synthetic, synthetic.part("train", [0]), args.synthetic_share))
    segmenter, run = fit(args, sources, cache, device, sorted(trained_on))
    if segmenter:                               # in the first process; the others are done
        finish_report(args, segmenter, split, run)


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
