"""Train a generator, v-prediction conditional diffusion: label map -> four MRI modalities, or
request -> label map.

    python train_ddpm.py                                    phantoms are made, a model is trained
    python train_ddpm.py --data DIR --resolution 128 --minutes 30 --out runs/real
    python train_ddpm.py --minutes 1                        rough but complete
    python train_ddpm.py --generate labels                  label maps from volumes and a place, in
    runs/labels python train_ddpm.py --generate labels --label-maps FILE.npz --data DIR

Reads     a folder of BraTS cases, or makes phantoms in runs/phantoms; slices go into runs/cache
Writes    runs/ddpm: checkpoint.pt, log.csv, curves.png, sample_*.png while it learns, samples.png
          (held-out scans beside samples from their masks) and closing.json with the figures; for
          labels the same twice, in runs/labels/coarse (heads in blocks) and runs/labels/fine (their
          voxels)
Resumes   run the same command again; a run bounded by --steps ends bit for bit where it would have
Measured  two CPU cores with bfloat16: 2000 steps of 16 slices at 64x64 in 3.3 minutes after half a
          minute of phantoms and cache; ET and ED light up in all held-out slices that have them,
          100% of air at or below -0.95, fine detail 0.90 and grey-white contrast 0.95 of the real.
          Labels: 2400 and 600 steps, 7 min 9 s with phantoms and figures on a slow machine;
          held-out heads' volumes, asked for with all else they have, come within 0.5 (NCR), 0.1
          (ED) and 0.05 mL (ET) on average
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import brainsyn as bs
from kit import checks, devices, files, judging, label_training, phantoms, pictures, requests, runs, slices

STEPS, LABEL_STEPS = 2000, 3000                 # a run's length when neither bound is given
# The two networks of --generate labels: their shares of a run's steps or minutes (a fine step takes
# two to three times as long), and what --shift and --width are if nothing is said.
PARTS = {"coarse": {"steps": 0.8, "minutes": 0.6, "shift": 0.5, "width": 48},
         "fine": {"steps": 0.2, "minutes": 0.4, "shift": 0.4, "width": 64}}


def parse_arguments(argv=None):
    """All flags; argv: list of words, the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--generate", choices=("images", "labels"), default="images",
                        help="four modalities from a label map, or label maps from volumes and a "
                        "place asked for")
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="folder of BraTS cases; without it phantoms are made")
    data.add_argument("--label-maps", metavar="FILE.npz", help="for --generate labels: tumours of "
                      "these label maps, in outlines of the training cases, see read_label_maps")
    data.add_argument("--relatives", type=int, default=512, help="for --generate labels: about so "
                      "many heads are learned from, the training cases and moved copies of them")
    data.add_argument("--phantoms", type=int, default=60, help="how many phantom cases to make")
    data.add_argument("--scanner", choices=sorted(phantoms.SCANNERS), default="A",
                      help="centre the phantoms come from")
    data.add_argument("--resolution", type=int, default=64, help="pixels a side of a slice")
    data.add_argument("--fov", type=float, default=192.0, help="width of a slice in mm")
    data.add_argument("--condition", choices=sorted(bs.CONDITIONS), default="tumour",
                      help="classes of label maps: tumour (outline, NCR, ED, ET), tissue (CSF, "
                      "grey and white for the rest of the brain) or ventricles (tumour, and "
                      "ventricles)")
    data.add_argument("--split", help="JSON file with case or patient names for train, val, test")
    data.add_argument("--skip-bad", action="store_true", help="leave cases of --data out that the "
                      "check rejects")
    data.add_argument("--tumour-share", type=float, default=0.5, help="share of training slices "
                      "that show tumour")
    model = parser.add_argument_group("model")
    model.add_argument("--width", type=int, help="channels of the first level (default 64, of "
                       "coarse labels 48)")
    model.add_argument("--mults", type=int, nargs="+", default=[1, 2, 2],
                       help="channels of each level / width")
    model.add_argument("--blocks", type=int, default=1, help="residual blocks a level")
    model.add_argument("--patch", type=int, default=4, help="p x p pixels folded into channels")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--steps", type=int, help=f"end after so many steps (default {STEPS} unless "
                       "--minutes is given)")
    optim.add_argument("--minutes", type=float, help="end after so many minutes in the loop")
    optim.add_argument("--batch", type=int, default=16, help="slices a step; of labels heads, then "
                       "slabs")
    optim.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    optim.add_argument("--optimizer", choices=("muon", "adamw"), default="muon",
                       help="of the layers inside; the first and last ones and all vectors learn "
                       "by AdamW")
    optim.add_argument("--drop", type=float, default=0.1, help="share of samples trained without "
                       "labels, for guidance")
    optim.add_argument("--shift", type=float, help="noise schedule: factor on sqrt(snr); "
                       "128/resolution suits larger pictures (default 2, of labels 0.5 coarse and "
                       "0.4 fine)")
    optim.add_argument("--loss", choices=("unit", "v"), default="unit",
                       help="squared error of v in units of the prior's own error, alike at all "
                       "noise levels; or plain")
    optim.add_argument("--min-snr", type=float, default=0.0,
                       help="gamma of the min-SNR loss weight, 0 for none (5 is usual)")
    optim.add_argument("--lesion-weight", type=float, default=0.0, help="extra loss weight inside "
                       "tumour labels")
    optim.add_argument("--ema", type=float, default=0.999, help="decay a step of the averaged "
                       "weights")
    run = parser.add_argument_group("run")
    run.add_argument("--out", help="output folder (default runs/ddpm, of labels runs/labels)")
    run.add_argument("--seed", type=int, default=0, help="all chance follows from it")
    run.add_argument("--device", default="auto", choices=devices.DEVICES,
                     help="auto takes the fastest of cuda, mps and cpu; xla is TPUs")
    run.add_argument("--precision", default="auto", choices=devices.PRECISIONS,
                     help="of the layers' arithmetic in training; auto takes bfloat16 where that "
                     "is fast")
    run.add_argument("--compile", action="store_true", help="hand the network to torch.compile")
    run.add_argument("--guidance", type=float, default=1.0,
                     help="guidance scale of pictures and closing figures, 1 for none")
    run.add_argument("--sample-every", type=int, help="steps between sample pictures, 0 for none "
                     "(default 250; of labels 1000)")
    args = parser.parse_args(argv)
    labels = args.generate == "labels"
    if args.steps is None and args.minutes is None:
        args.steps = LABEL_STEPS if labels else STEPS
    args.sample_every = (1000 if labels
                         else 250) if args.sample_every is None else args.sample_every
    args.shift = 2.0 if args.shift is None and not labels else args.shift
    args.width = 64 if args.width is None and not labels else args.width
    args.out = args.out or ("runs/labels" if labels else "runs/ddpm")
    if labels and args.resolution % (4 * requests.BLOCK):
        raise bs.BadInput(f"--resolution {args.resolution}: labels need a multiple of "
                          f"{4 * requests.BLOCK}")
    if labels and args.lesion_weight:
        raise bs.BadInput("--lesion-weight is for images: generators of labels weigh all classes "
                          "alike")
    if args.label_maps and (not labels or args.condition != "tumour"):
        raise bs.BadInput("--label-maps is for --generate labels with the condition tumour: such "
                          "maps show no tissue")
    files.require_positive(args, "phantoms", "relatives", "resolution", "fov", "width", "blocks",
                           "patch", "steps", "minutes", "batch", "lr", "shift")
    return args


def pick_rows(cache, rows, first_lesion, count):
    """`count` rows spread evenly over those that show tumour (over all if none does)."""
    ill = rows[slices.has_label(cache, rows, first_lesion)]
    rows = ill if len(ill) else rows
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]


def learn_images(args, cache):
    """Images from label maps, as the loop sees them: network (arguments of UNet), prior, words for
    the log, draw_batch, who (whose slices a step drew), draw (a picture of what has been learned),
    close (what a run ends with)."""
    names, alpha_bar = bs.CONDITIONS[args.condition], bs.cosine_alpha_bar(args.shift)
    first_lesion, modalities = names.index(bs.LABELS[0]), cache.meta["modalities"]
    train, val, test = [cache.part(part) for part in ("train", "val", "test")]
    ill = slices.has_label(cache, train, first_lesion)
    tumour, other = train[ill], train[~ill]
    picture = (len(modalities), *cache.rows.shape[2:])                          # (C, R, R)
    # slices, not volumes
    settings = {**bs.SAMPLING, "guidance": args.guidance, "coherence": 0.0}
    shown = cache.batch(pick_rows(cache, val if len(val) else train, first_lesion, 4))
    # of every batch; all of it unless several processes share it
    mine = devices.share_of(args.batch)

    def draw_rows(step):
        return bs.batch_rows(tumour, other, args.tumour_share, args.seed, step, args.batch)[mine]

    def draw_batch(step):
        t, eps, keep, given, mirror = [part[mine] for part in bs.training_noise(
            args.seed, step, (args.batch, *picture), args.drop)]
        # (B, C, H, W), (B, H, W), (B,)
        x0, classes, position = cache.batch(draw_rows(step), mirror)
        # all zeros: no labels
        onehot = bs.one_hot(classes, len(names)) * keep.view(-1, 1, 1, 1)
        scalars = torch.where(given, position, torch.nan).unsqueeze(1)              # (B, 1)
        weight = bs.lesion_weight(classes, first_lesion, args.lesion_weight)
        weight = weight * bs.min_snr_weight(alpha_bar, t, args.min_snr)             # (B, 1, H, W)
        return (t, x0, eps, onehot, scalars, weight, *bs.signal_sigma(alpha_bar, t),
                *bs.expected(its.prior, onehot, scalars[:, 0]))

    def draw(denoiser, step):
        drawn = bs.sample_volume(denoiser, shown[1], shown[2], 1.0, (args.seed, "shown"), settings)
        pictures.draw_rows(Path(args.out) / f"sample_{step:06d}.png",
                           [[c, *p] for c, p in zip(shown[1], drawn)], ["labels", *modalities],
                           args.condition, f"SYNTHETIC, step {step}")

    def close(denoiser, pace):
        held_out = np.concatenate([val, test])
        who = "held-out" if len(held_out) else "training"       # a split file may hold out nobody
        rows = pick_rows(cache, held_out if len(held_out) else train, first_lesion, 64)
        real, classes, position = cache.batch(rows)
        sampled = bs.sample_volume(denoiser, classes, position, 1.0, (args.seed, "closing"),
                                   settings)
        few = np.linspace(0, len(rows) - 1, min(6, len(rows))).astype(int)
        pictures.draw_rows(Path(args.out) / "samples.png",
                           [[classes[i], *real[i], None, *sampled[i]] for i in few],
                           ["labels", *(f"{who}\n{n}" for n in modalities), "",
                            *(f"SYNTHETIC\n{n}" for n in modalities)], args.condition)
        print(f"--- slices of {who} cases, sampled from their label maps")
        runs.report(args, {"steps": pace.step, "minutes": round(pace.seconds / 60, 2),
                      "slices": f"{len(rows)} {who}", "sampler_calls": settings["steps"],
                      **judging.judge_slices(real, sampled, classes, args.condition)})

    its = SimpleNamespace(network={"channels": len(modalities), "classes": len(names)},
                          draw_batch=draw_batch, draw=draw, close=close,
                          prior=bs.measure_prior(cache, train, args.condition), cache=cache,
                          who=lambda step: cache.names(draw_rows(step)),
                          words=f"{len(train)} training slices ({len(tumour)} with tumour) of "
                          f"{args.resolution}x{args.resolution}, {len(val) + len(test)} held out")
    return its


def train(args, device):
    """All that --generate asks for: one network for images, two for labels."""
    cases, split = checks.find_data(args)
    cache = devices.in_turn(lambda: slices.build_cache(cases, Path(args.out).parent / "cache",
                                                       args.resolution, args.fov, args.condition,
                                                       split))
    only_phantoms = not args.label_maps and all(phantoms.phantom_seed(case.case) is not None
                                                for case in split["train"])
    facts = {"condition": args.condition, "classes": list(bs.CONDITIONS[args.condition]),
             "modalities": list(cache.meta["modalities"]), "resolution": args.resolution,
             "fov": args.fov, "data": "phantoms" if only_phantoms else "patients"}
    patients = len({its["patient"] for its in cache.cases if its["part"] == "train"})
    if args.generate == "images":
        facts |= {"trained_on": cache.hashes("train"), "patients": patients}
        return learn(args, device, "ddpm", learn_images(args, cache), facts)
    data = label_training.heads_to_learn(args, cache)
    order = torch.randperm(len(data.asked), generator=bs.generator(args.seed, "measured"))
    # nobody's row, nor to the voxel
    measured = [[round(value, 2 if name == "sphericity" else 1) for name,
                 value in zip(requests.ASKED, row)] for row in data.asked[order].tolist()]
    facts |= {"trained_on": data.hashes, "measured": measured,
              "patients": patients + (len(data.cases) if args.label_maps else 0)}
    for part, usual in PARTS.items():
        print(f"--- {part} network")
        its = argparse.Namespace(**{**vars(args), "out": str(Path(args.out) / part),
                                    "shift": args.shift or usual["shift"], "width": args.width
                                    or usual["width"], "steps": args.steps
                                    and max(1, round(args.steps * usual["steps"])),
                                    "minutes": args.minutes and args.minutes * usual["minutes"]})
        Path(its.out).mkdir(parents=True, exist_ok=True)
        learn(its, device, "labels", (label_training.learn_heads if part == "coarse" else label_training.learn_voxels)(its, data),
              facts)


def close(its, denoiser, pace):
    """What a run ends with: pictures and figures."""
    its.close(denoiser, pace)


def learn(args, device, kind, its, facts):
    """One training run, start to end, resumed where one was begun. its: what learn_images and its
    like return; facts: what a checkpoint says of the data."""
    alpha_bar = bs.cosine_alpha_bar(args.shift)
    torch.manual_seed(args.seed)
    network = {"width": args.width, "mults": args.mults, "blocks": args.blocks, "patch": args.patch,
               **its.network}
    net = devices.place_network(bs.UNet(**network), device)
    ema = bs.EMA(net, args.ema, to_host=devices.to_host)
    optimizer = bs.make_optimizer(net, args.lr, device, args.precision,
                                  net.hidden() if args.optimizer == "muon" else ())
    state = runs.resume(args, kind, facts["trained_on"], net, ema, optimizer)
    if state:
        its.prior = state["prior"]              # not as measured again: that may differ by rounding
    trained = devices.prepare_training(net, optimizer, device, args.compile)
    pace = runs.Pace(args, state["step"], state["seconds"]) if state else runs.Pace(args)
    book, guard = runs.LogBook(args.out, pace.step), runs.Guard()
    print(f"{bs.count_parameters(net) / 1e6:.1f} M parameters | {its.words}", flush=True)

    def denoiser():
        return bs.Denoiser(ema.copy_of(net, pace.step), its.prior, alpha_bar, device,
                           to_device=devices.to_device)

    def save():
        runs.save_checkpoint(args.out, {
            "kind": kind, "version": bs.__version__, "step": pace.step, "seconds": pace.seconds,
            "args": runs.kept_arguments(args),
            "network": network, "weights": net.state_dict(), "ema": ema.weights,
            "optimizer": optimizer.state_dict(), "prior": its.prior, "shift": args.shift, **facts})

    stop = files.catch_signals()

    while pace.progress() < 1 and not devices.agreed(len(stop)):
        # ------------------------------------------------------------------ one training step ---
        levels, *batch = its.draw_batch(pace.step)
        t, x0, eps, onehot, scalars, weight, signal, sigma, mean, std = devices.to_device(device,
                                                                                          levels,
                                                                                          *batch)
        x_t, v = bs.add_noise(x0, eps, signal, sigma), bs.v_target(x0, eps, signal, sigma)
        for group in optimizer.param_groups:
            group["lr"] = lr = bs.learning_rate(args.lr, pace.progress(), pace.step)
        with bs.fast_math(device, args.precision):
            out = trained(x_t, t, onehot, scalars)
        v_hat = bs.precondition(out, x_t, signal, sigma, mean, std)
        unit = bs.prior_error(signal, sigma, std) if args.loss == "unit" else 1.0   # (B, C, H, W)
        losses = (weight * ((v_hat - v) / unit) ** 2).mean((1, 2, 3))               # (B,)
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
        if guard.sound(finite, pace.step, lambda: its.who(pace.step - 1)):
            book.add(losses, levels)
        elif guard.go_back(pace.step):
            pace.step = runs.resume(args, kind, facts["trained_on"], net, ema, optimizer)["step"]
            trained, book = devices.prepare_training(net, optimizer, device,
                                                     args.compile), runs.LogBook(args.out,
                                                                                 pace.step)
            continue
        if not devices.first_process():
            continue
        if pace.due("log", 5) or pace.progress() >= 1:
            pace.say(book.line(pace.step, lr, args.batch, pace.seconds)[1])
        if args.sample_every and pace.step % args.sample_every == 0:
            files.attempt("the sample pictures", lambda: its.draw(denoiser(), pace.step))
        if pace.step == 1:
            save()                              # finds a full or read-only disk at once
        elif pace.due("save", 60):
            files.attempt("the checkpoint", save)
    del trained
    if not devices.leave_processes():
        return
    # a run that was at its end stays as it is, and so does its hash
    if not state or pace.step > state["step"]:
        save()
    if stop:
        print(f"stopped by signal {stop[0]} after step {pace.step}; the same command continues")
        sys.exit(128 + stop[0])
    close(its, denoiser(), pace)
    # while it closed: there may be another network to learn
    if stop:
        sys.exit(128 + stop[0])


def main(argv=None):
    """The command line: device, lock, training."""
    args = parse_arguments(argv)
    device = devices.pick_device(args.device, several=args.generate == "images")
    print(devices.describe(device, args.precision), flush=True)
    devices.require_divisible(args.batch, device)
    with files.sole_writer(args.out):
        train(args, device)


if __name__ == "__main__":
    files.run_script(main)
