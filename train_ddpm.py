"""Train the generator: label map -> four MRI modalities, a v-prediction conditional diffusion model.

    python train_ddpm.py                                    phantoms are made, a model is trained
    python train_ddpm.py --data DIR --resolution 128 --minutes 30 --out runs/real
    python train_ddpm.py --minutes 1                        rough but complete

Reads     a folder of BraTS cases, or makes phantoms in runs/phantoms; slices go into runs/cache
Writes    runs/ddpm: checkpoint.pt, log.csv, curves.png, sample_*.png while it learns, samples.png
          (held-out scans beside samples from their masks) and closing.json with the figures
Resumes   run the same command again; a run bounded by --steps ends bit for bit where it would have
Measured  two CPU cores with bfloat16: 2000 steps of 16 slices at 64x64 in 3.3 minutes after half a minute of
          phantoms and cache; ET and ED light up in all held-out slices that have them, 100% of air at or below
          -0.95, fine detail 0.90 and grey-white contrast 0.95 of the real
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import brainsyn as bs

STEPS, LABEL_STEPS = 2000, 800                  # a run's length when neither bound is given
SHIFT, LABEL_SHIFT = 2.0, 0.2                   # the noise schedule's


def parse_arguments(argv=None):
    """All flags; argv: list of words, the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--generate", choices=("images", "labels"), default="images",
                        help="four modalities from a label map, or label maps from volumes and a place asked for")
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="folder of BraTS cases; without it phantoms are made")
    data.add_argument("--label-maps", metavar="FILE.npz", help="for --generate labels: tumours of these label maps, in "
                      "outlines of the training cases, see read_label_maps")
    data.add_argument("--phantoms", type=int, default=60, help="how many phantom cases to make")
    data.add_argument("--scanner", choices=sorted(bs.SCANNERS), default="A", help="centre the phantoms come from")
    data.add_argument("--resolution", type=int, default=64, help="pixels a side of a slice")
    data.add_argument("--fov", type=float, default=192.0, help="width of a slice in mm")
    data.add_argument("--condition", choices=sorted(bs.CONDITIONS), default="tumour",
                      help="labels given to the network: tumour and outline, or also CSF, grey, white")
    data.add_argument("--split", help="JSON file with case or patient names for train, val, test")
    data.add_argument("--skip-bad", action="store_true", help="leave cases of --data out that the check rejects")
    data.add_argument("--tumour-share", type=float, default=0.5, help="share of training slices that show tumour")
    model = parser.add_argument_group("model")
    model.add_argument("--width", type=int, default=64, help="channels of the first level")
    model.add_argument("--mults", type=int, nargs="+", default=[1, 2, 2], help="channels of each level / width")
    model.add_argument("--blocks", type=int, default=1, help="residual blocks a level")
    model.add_argument("--patch", type=int, default=4, help="p x p pixels folded into channels")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--steps", type=int, help=f"end after so many steps (default {STEPS} unless --minutes is given)")
    optim.add_argument("--minutes", type=float, help="end after so many minutes in the loop")
    optim.add_argument("--batch", type=int, help="slices a step, of labels whole volumes (default 16, labels 2)")
    optim.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    optim.add_argument("--optimizer", choices=("muon", "adamw"), default="muon",
                       help="of the layers inside; the first and last ones and all vectors learn by AdamW")
    optim.add_argument("--drop", type=float, default=0.1, help="share of samples trained without labels, for guidance")
    optim.add_argument("--shift", type=float, help="noise schedule: factor on sqrt(snr); 128/resolution suits larger "
                       f"pictures (default {SHIFT}, of labels {LABEL_SHIFT}: volumes bear far more noise)")
    optim.add_argument("--loss", choices=("unit", "v"), default="unit",
                       help="squared error of v in units of the prior's own error, alike at all noise levels; or plain")
    optim.add_argument("--min-snr", type=float, default=0.0,
                       help="gamma of the min-SNR loss weight, 0 for none (5 is usual)")
    optim.add_argument("--lesion-weight", type=float, default=0.0, help="extra loss weight inside tumour labels")
    optim.add_argument("--ema", type=float, default=0.999, help="decay a step of the averaged weights")
    run = parser.add_argument_group("run")
    run.add_argument("--out", help="output folder (default runs/ddpm, of labels runs/labels)")
    run.add_argument("--seed", type=int, default=0, help="all chance follows from it")
    run.add_argument("--device", default="auto", choices=bs.DEVICES,
                     help="auto takes the fastest of cuda, mps and cpu; xla is TPUs")
    run.add_argument("--precision", default="auto", choices=bs.PRECISIONS,
                     help="of the layers' arithmetic in training; auto takes bfloat16 where that is fast")
    run.add_argument("--compile", action="store_true", help="hand the network to torch.compile")
    run.add_argument("--guidance", type=float, default=1.0,
                     help="guidance scale of pictures and closing figures, 1 for none")
    run.add_argument("--sample-every", type=int, default=250, help="steps between sample pictures, 0 for none")
    args = parser.parse_args(argv)
    labels = args.generate == "labels"
    if args.steps is None and args.minutes is None:
        args.steps = LABEL_STEPS if labels else STEPS
    args.shift = args.shift or (LABEL_SHIFT if labels else SHIFT)
    args.out, args.batch = args.out or ("runs/labels" if labels else "runs/ddpm"), args.batch or (2 if labels else 16)
    if args.label_maps and (not labels or args.condition != "tumour"):
        raise bs.BadInput("--label-maps is for --generate labels with the condition tumour: such maps show no tissue")
    bs.require_positive(args, "phantoms", "resolution", "fov", "width", "blocks", "patch", "steps", "minutes",
                        "batch", "lr", "shift")
    return args


def pick_rows(cache, rows, first_lesion, count):
    """`count` rows spread evenly over those that show tumour (over all if none does)."""
    ill = rows[bs.has_label(cache, rows, first_lesion)]
    rows = ill if len(ill) else rows
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]


def report(args, closing, *more):
    """The end of a run: curves.png, closing.json and the same figures on screen."""
    out, log = Path(args.out), bs.read_log(Path(args.out) / "log.csv")
    quarters = ("cleanest quarter of t", "second", "third", "noisiest quarter")
    what = "squared error of v" + (" in units of the prior's" if args.loss == "unit" else "")
    bs.draw_lines(out / "curves.png", [(what, "log", {
        label: ([r["step"] for r in log], [r[name] for r in log]) for name, label in zip(bs.QUARTERS, quarters)})])
    bs.write_json(out / "closing.json", closing)
    for name, value in closing.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    for name in ("checkpoint.pt", "samples.png", *more, "curves.png", "log.csv", "closing.json"):
        print(f"wrote: {out / name}")


def learn_images(args, cache):
    """Images from label maps, as the loop sees them: network (arguments of UNet), prior, words for the log,
    draw_batch, who (whose slices a step drew), draw (a picture of what has been learned), close (what a run ends
    with), patients (how many), trained_on (hashes of their label maps and outlines)."""
    names, alpha_bar = bs.CONDITIONS[args.condition], bs.cosine_alpha_bar(args.shift)
    first_lesion, modalities = names.index(bs.LABELS[0]), cache.meta["modalities"]
    train, val, test = [cache.part(part) for part in ("train", "val", "test")]
    ill = bs.has_label(cache, train, first_lesion)
    tumour, other = train[ill], train[~ill]
    picture = (len(modalities), *cache.rows.shape[2:])                          # (C, R, R)
    settings = {**bs.SAMPLING, "guidance": args.guidance, "coherence": 0.0}      # slices, not volumes
    shown = cache.batch(pick_rows(cache, val if len(val) else train, first_lesion, 4))
    mine = bs.share_of(args.batch)              # of every batch; all of it unless several processes share it

    def draw_rows(step):
        return bs.batch_rows(tumour, other, args.tumour_share, args.seed, step, args.batch)[mine]

    def draw_batch(step):
        t, eps, keep, given, mirror = [part[mine] for part in bs.training_noise(
            args.seed, step, (args.batch, *picture), args.drop)]
        x0, classes, position = cache.batch(draw_rows(step), mirror)                # (B, C, H, W), (B, H, W), (B,)
        onehot = bs.one_hot(classes, len(names)) * keep.view(-1, 1, 1, 1)           # all zeros: no labels
        scalars = torch.where(given, position, torch.nan).unsqueeze(1)              # (B, 1)
        weight = bs.lesion_weight(classes, first_lesion, args.lesion_weight)
        weight = weight * bs.min_snr_weight(alpha_bar, t, args.min_snr)             # (B, 1, H, W)
        return (t, x0, eps, onehot, scalars, weight, *bs.signal_sigma(alpha_bar, t),
                *bs.expected(its.prior, onehot, scalars[:, 0]))

    def draw(denoiser, step):
        pictures = bs.sample_volume(denoiser, shown[1], shown[2], 1.0, (args.seed, "shown"), settings)
        bs.draw_rows(Path(args.out) / f"sample_{step:06d}.png", [[c, *p] for c, p in zip(shown[1], pictures)],
                     ["labels", *modalities], args.condition, f"SYNTHETIC, step {step}")

    def close(denoiser, pace):
        held_out = np.concatenate([val, test])
        who = "held-out" if len(held_out) else "training"       # a split file may hold out nobody
        rows = pick_rows(cache, held_out if len(held_out) else train, first_lesion, 64)
        real, classes, position = cache.batch(rows)
        sampled = bs.sample_volume(denoiser, classes, position, 1.0, (args.seed, "closing"), settings)
        few = np.linspace(0, len(rows) - 1, min(6, len(rows))).astype(int)
        bs.draw_rows(Path(args.out) / "samples.png", [[classes[i], *real[i], None, *sampled[i]] for i in few],
                     ["labels", *(f"{who}\n{n}" for n in modalities), "", *(f"SYNTHETIC\n{n}" for n in modalities)],
                     args.condition)
        print(f"--- slices of {who} cases, sampled from their label maps")
        report(args, {"steps": pace.step, "minutes": round(pace.seconds / 60, 2), "slices": f"{len(rows)} {who}",
                      "sampler_calls": settings["steps"],
                      **bs.judge_slices(real, sampled, classes, args.condition)})

    its = SimpleNamespace(
        network={"channels": len(modalities), "classes": len(names)}, draw_batch=draw_batch, draw=draw, close=close,
        prior=bs.measure_prior(cache, train, args.condition), who=lambda step: cache.names(draw_rows(step)),
        patients=len({its["patient"] for its in cache.cases if its["part"] == "train"}),
        trained_on=cache.hashes("train"),
        words=f"{len(train)} training slices ({len(tumour)} with tumour) of {args.resolution}x{args.resolution}, "
              f"{len(val) + len(test)} held out")
    return its


def label_maps(args, outlines, held, step_mm, hashes):
    """The maps of --label-maps in outlines (M, D, R, R) of training cases, without those that show a tumour of the
    cases held out (N, D, R, R) -> (volumes, names, hashes of the maps and of the outlines' cases)."""
    volumes, names, its, lost = bs.read_label_maps(args.label_maps, outlines, step_mm, args.seed)
    near, _ = bs.nearest_tumour(volumes, held, args.condition)
    keep = ~(near > 0.9)
    print(f"label maps: {len(names)} in outlines of {len(outlines)} training cases, {lost:.1%} of the tumours cut off; "
          f"{int((~keep).sum())} show the tumour of a validation or test case (Dice above 0.9): left out", flush=True)
    kept = [i for i in range(len(names)) if keep[i]]
    return volumes[keep], [names[i] for i in kept], sorted({*hashes, *(its[i] for i in kept)})


def learn_labels(args, cache):
    """Label maps from what is asked of them, as the loop sees them; see learn_images."""
    names, alpha_bar = bs.CONDITIONS[args.condition], bs.cosine_alpha_bar(args.shift)
    depth, step_mm = round(args.resolution * 0.75 / bs.SLAB) * bs.SLAB, args.fov / args.resolution
    slabs, mine = depth // bs.SLAB, bs.share_of(args.batch)
    train, held = [bs.label_volumes(cache, parts, depth) for parts in (("train",), ("val", "test"))]
    cases, hashes = [its["case"] for its in cache.cases if its["part"] == "train"], cache.hashes("train")
    if args.label_maps:
        train, cases, hashes = label_maps(args, train, held, step_mm, hashes)
    settings = {**bs.SAMPLING, "guidance": args.guidance}
    shape = (args.batch, depth, len(names), args.resolution, args.resolution)

    def draw_cases(step):
        return bs.endless(np.arange(len(train)), (args.seed, "volumes"), step * args.batch, args.batch)[mine]

    def draw_batch(step):
        t, eps, keep, *_ = [part[mine] for part in bs.training_noise(args.seed, step, shape, args.drop)]
        open_ = torch.rand(2, args.batch, len(bs.ASKED), generator=bs.generator(args.seed, "open", step))[:, mine]
        volumes = bs.move_volumes(train[draw_cases(step)], (args.seed, "moves", step), (args.batch, mine))
        asked = torch.stack([bs.characteristics(its.long(), args.condition, step_mm) for its in volumes])   # (B, 8)
        asked[(open_[0] > open_[1, :, :1]) | (keep == 0).unsqueeze(1)] = torch.nan  # from none to all of a request
        x0 = 2 * bs.one_hot(volumes.flatten(0, 1).long(), len(names)) - 1           # (B D, K, H, W)
        x0, eps = [bs.to_slabs(part.view(-1, *shape[1:])) for part in (x0, eps)]    # (B D / SLAB, SLAB K, H, W)
        scalars, t = bs.slab_scalars(asked, slabs), t.repeat_interleave(slabs)
        weight = bs.min_snr_weight(alpha_bar, t, args.min_snr)
        return (t, x0, eps, x0[:, :0], scalars, weight, *bs.signal_sigma(alpha_bar, t),
                *bs.expected(its.prior, x0[:, :0], scalars[:, 0]))

    def draw(denoiser, step):
        made = [bs.sample_labels(denoiser, asked, (args.seed, "shown", i), settings)
                for i, asked in enumerate(shown_wanted[:2])]
        bs.draw_planes(Path(args.out) / f"sample_{step:06d}.png", [[volume] for volume in made],
                       [f"SYNTHETIC, step {step}"], args.condition)

    def close(denoiser, pace):
        made = torch.stack([bs.sample_labels(denoiser, asked, (args.seed, "closing", i), settings)
                            for i, asked in enumerate(shown_wanted)])
        got = torch.stack([bs.characteristics(its, args.condition, step_mm) for its in made])
        bs.draw_planes(Path(args.out) / "samples.png", list(zip(shown, made))[:6], [who, "SYNTHETIC"], args.condition)
        figures = {"steps": pace.step, "minutes": round(pace.seconds / 60, 2), "volumes": f"{len(made)} {who}",
                   "sampler_calls": settings["steps"]}
        for name, a, b in zip(bs.ASKED, shown_wanted.T, got.T):
            both = ~torch.isnan(a + b)
            figures |= {f"{name}_error": (a - b)[both].abs().mean().item(),
                        f"{name}_rank_correlation": bs.rank_correlation(a[both], b[both])}
        near, _ = bs.nearest_tumour(made, train, args.condition)
        print(f"--- label maps as asked for by what {who} cases have")
        report(args, {**figures, **bs.judge_labels(made, shown, args.condition, step_mm),
                      "nearest_training_tumour_dice": near.nanmean().item(), "copies": int((near > 0.9).sum())})

    shown, who = (held, "held-out") if len(held) else (train[:12], "training")
    shown_wanted = torch.stack([bs.characteristics(its.long(), args.condition, step_mm) for its in shown])
    its = SimpleNamespace(
        network={"channels": bs.SLAB * len(names), "classes": 0, "scalars": 1 + len(bs.ASKED), "depth": slabs},
        prior=bs.label_prior(train, len(names)), draw_batch=draw_batch, draw=draw, close=close,
        who=lambda step: [cases[i] for i in draw_cases(step)], patients=len(cases), trained_on=hashes,
        words=f"{len(train)} training volumes of {depth}x{args.resolution}x{args.resolution}, {len(held)} held out")
    return its


def train(args, device):
    """One training run, start to end, resumed where one was begun."""
    cases, split = bs.find_data(args)
    cache = bs.in_turn(lambda: bs.build_cache(cases, Path(args.out).parent / "cache", args.resolution, args.fov,
                                              args.condition, split))
    its = (learn_labels if args.generate == "labels" else learn_images)(args, cache)
    kind, alpha_bar = "labels" if args.generate == "labels" else "ddpm", bs.cosine_alpha_bar(args.shift)

    torch.manual_seed(args.seed)
    network = {**its.network, "width": args.width, "mults": args.mults, "blocks": args.blocks, "patch": args.patch}
    net = bs.place_network(bs.UNet(**network), device)
    ema = bs.EMA(net, args.ema)
    optimizer = bs.make_optimizer(net, args.lr, device, args.precision,
                                  net.hidden() if args.optimizer == "muon" else ())
    phantoms = not args.label_maps and all(bs.phantom_seed(case.case) is not None for case in split["train"])
    state = bs.resume(args, kind, its.trained_on, net, ema, optimizer)
    if state:
        its.prior = state["prior"]              # not as measured again: that may differ by rounding
    trained = bs.prepare_training(net, optimizer, device, args.compile)
    pace = bs.Pace(args, state["step"], state["seconds"]) if state else bs.Pace(args)
    book, guard = bs.LogBook(args.out, pace.step), bs.Guard()
    print(f"{bs.count_parameters(net) / 1e6:.1f} M parameters | {its.words}", flush=True)

    def denoiser():
        volumes = max(1, 32 // net.depth)
        return bs.Denoiser(ema.copy_of(net, pace.step), its.prior, alpha_bar, device, volumes * net.depth)

    def save():
        bs.save_checkpoint(args.out, {
            "kind": kind, "version": bs.__version__, "step": pace.step, "seconds": pace.seconds,
            "args": bs.kept_arguments(args),
            "network": network, "weights": net.state_dict(), "ema": ema.weights,
            "optimizer": optimizer.state_dict(), "prior": its.prior, "condition": args.condition,
            "classes": list(bs.CONDITIONS[args.condition]),
            "modalities": list(cache.meta["modalities"]), "shift": args.shift,
            "resolution": args.resolution, "fov": args.fov, "trained_on": its.trained_on, "patients": its.patients,
            "data": "phantoms" if phantoms else "patients"})

    stop = bs.catch_signals()

    while pace.progress() < 1 and not bs.agreed(len(stop)):
        # ------------------------------------------------------------------ one training step ---
        levels, *batch = its.draw_batch(pace.step)
        t, x0, eps, onehot, scalars, weight, signal, sigma, mean, std = bs.to_device(device, levels, *batch)
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
        finite = bs.step_if_finite(device, optimizer, losses, norm)
        optimizer.zero_grad()
        bs.end_step(device, losses, finite)
        finite = bool(bs.to_host(finite))
        pace.tick()
        if finite and bs.first_process():
            ema.update(net, pace.step)
        # ---------------------------------------------------------------------------------------
        if guard.sound(finite, pace.step, lambda: its.who(pace.step - 1)):
            book.add(losses, levels)
        elif guard.go_back(pace.step):
            pace.step = bs.resume(args, kind, its.trained_on, net, ema, optimizer)["step"]
            trained, book = bs.prepare_training(net, optimizer, device, args.compile), bs.LogBook(args.out, pace.step)
            continue
        if not bs.first_process():
            continue
        if pace.due("log", 5) or pace.progress() >= 1:
            pace.say(book.line(pace.step, lr, args.batch, pace.seconds)[1])
        if args.sample_every and pace.step % args.sample_every == 0:
            bs.attempt("the sample pictures", lambda: its.draw(denoiser(), pace.step))
        if pace.step == 1:
            save()                              # finds a full or read-only disk at once
        elif pace.due("save", 60):
            bs.attempt("the checkpoint", save)
    del trained
    if not bs.leave_processes():
        return
    save()
    if stop:
        print(f"stopped by signal {stop[0]} after step {pace.step}; the same command continues")
        sys.exit(128 + stop[0])
    its.close(denoiser(), pace)


def main(argv=None):
    """The command line: device, lock, training."""
    args = parse_arguments(argv)
    device = bs.pick_device(args.device, several=True)
    print(bs.describe(device, args.precision), flush=True)
    bs.require_divisible(args.batch, device)
    with bs.sole_writer(args.out):
        train(args, device)


if __name__ == "__main__":
    bs.run_script(main)
