"""Train a generator, v-prediction conditional diffusion: label map -> four MRI modalities, or
request -> label map.

    python train_ddpm.py                                    phantoms are made, a model is trained
    python train_ddpm.py --data DIR --resolution 128 --minutes 30 --out runs/real
    python train_ddpm.py --minutes 1 --out runs/rough       rough but complete
    python train_ddpm.py --generate labels                  label maps from volumes and a place, in
                                                            runs/labels
    python train_ddpm.py --generate labels --label-maps MAPS --data DIR

Reads     a folder of BraTS cases, or makes phantoms in runs/phantoms; slices go into runs/cache
Writes    runs/ddpm: checkpoint.pt, log.csv, curves.png, sample_*.png while it learns, samples.png
          (held-out scans beside samples from their label maps) and closing.json with the figures;
          for labels the same twice, in runs/labels/coarse (heads in blocks) and runs/labels/fine
          (their voxels)
Resumes   run the same command again; a run bounded by --steps ends bit for bit where it would have
Measured  two CPU cores, float32: skill 0.70, 0.72, 0.61, 0.30 at four noise levels, texture
          distance of held-out heads drawn whole 0.042, 0.048, 0.041 along three axes
"""
import argparse
from pathlib import Path

import numpy as np
import torch

import brainsyn as bs
from kit import (checks, devices, files, judging, label_training, options, phantoms, pictures,
                 requests, runs, slices)

STEPS, LABEL_STEPS = 1000, 3000                 # of a run with neither --steps nor --minutes
# Defaults of --generate labels. None: see PARTS.
LABEL_DEFAULTS = {"steps": LABEL_STEPS, "sample_every": 1000, "shift": None, "width": None,
                  "around": 0, "out": "runs/labels"}
# The two networks of --generate labels: their fractions of a run's steps or minutes (a fine step
# takes two to three times as long), and the defaults of --shift and --width.
PARTS = {"coarse": {"steps": 0.8, "minutes": 0.6, "shift": 0.5, "width": 48},
         "fine": {"steps": 0.2, "minutes": 0.4, "shift": 0.4, "width": 64}}
FLAGS = [
    *options.COMMON, *options.TRAINING,
    # data
    ("--condition", list(bs.CONDITIONS), "tumour", "tumour, and perhaps tissue or ventricles"),
    ("--label-maps", str, None, "for labels: tumours of this folder in the cases' outlines"),
    ("--relatives", options.count, 512, "for labels: heads, training cases and moved copies"),
    # model
    ("--generate", ["images", "labels"], "images", "scans, or label maps from requests"),
    ("--width", options.count, 48, "channels of the first level; of fine labels 64"),
    ("--mults", options.count, [1, 2, 2], "channels of each level / width", {"nargs": "+"}),
    ("--blocks", options.count, 1, "residual blocks a level"),
    ("--patch", options.count, 4, "p x p pixels folded into channels"),
    ("--around", options.natural, 1, "slices on either side that the network sees too"),
    # optimisation
    ("--steps", options.count, STEPS, f"of labels {LABEL_STEPS}; no bound with --minutes"),
    ("--ema", options.fraction, 0.999, "decay of the averaged weights a step"),
    ("--drop", options.fraction, 0.1, "fraction trained without labels, for guidance"),
    ("--shift", options.positive, 2.0, "factor on sqrt(snr); of labels 0.5 coarse, 0.4 fine"),
    # run
    ("--out", str, "runs/ddpm", "output folder; of labels runs/labels"),
    ("--guidance", float, 1.0, "guidance scale of pictures and closing figures, 1: none"),
    ("--sample-every", options.natural, 100, "steps between pictures, 0: none; labels 1000")]


def parse_arguments(argv=None):
    """All flags; argv: list of words, the command line by default. Sets what is read, see
    options.use_names. BadInput where flags are wrong or do not go together."""
    parser = options.Parser(__doc__, FLAGS)
    args = parser.parse_training(argv, "generate", {"labels": LABEL_DEFAULTS})
    options.use_names(args.modalities, args.label_map)
    labels = args.generate == "labels"
    if labels and args.resolution % (4 * requests.BLOCK):
        raise bs.BadInput(f"--resolution: labels need a multiple of {4 * requests.BLOCK} pixels")
    if args.condition == "tissue" and not {"t1", "t2", "flair"} <= set(bs.MODALITIES):
        raise bs.BadInput("--condition tissue: finding tissue takes t1, t2 and flair")
    if labels and args.around:
        raise bs.BadInput("--around is for --generate images")
    if args.label_maps and (not labels or args.condition != "tumour"):
        raise bs.BadInput("--label-maps needs --generate labels and the condition tumour")
    return args


def pick_rows(cache, rows, first_lesion, count):
    """`count` of these cache rows, spread evenly over those that show tumour (over all if none
    does): int array."""
    with_tumour = rows[slices.has_label(cache, rows, first_lesion)]
    rows = with_tumour if len(with_tumour) else rows
    return rows[slices.evenly(len(rows), count)]


class Images:
    """What the generator of images learns from: slices of training cases and their label maps.
    label_training.Heads and Voxels have the same attributes and methods.

    network: arguments of UNet that depend on the data; prior: see measure_prior; words: for the
    log.
    """

    def __init__(self, args, cache):
        self.args, self.cache = args, cache
        self.modalities, classes = cache.meta["modalities"], bs.CONDITIONS[args.condition]
        self.network = {"channels": len(self.modalities), "classes": len(classes),
                        "around": args.around}
        self.slice = devices.slice_of_batch(args.batch)         # this process's part
        train, val, test = [cache.part(part) for part in ("train", "val", "test")]
        self.prior = bs.measure_prior(cache.batches(cache.part("train", [0])), args.condition)
        self.first_lesion = classes.index(bs.LABELS[0])
        has_tumour = slices.has_label(cache, train, self.first_lesion)
        self.pool = train[has_tumour], train[~has_tumour]
        held_out = np.concatenate([val, test])
        self.shown, self.part = (held_out, "held-out") if len(held_out) else (train, "training")
        self.words = f"{len(train)} training slices, {len(held_out)} held out"

    def rows(self, step):
        """Cache rows of this process's part of the batch of step 0, 1, ...: int (B,)."""
        args = self.args
        return bs.batch_rows(*self.pool, args.tumour_share, args.seed, step, args.batch)[self.slice]

    def case_names(self, step):
        """Names of the cases in that batch."""
        return self.cache.names(self.rows(step))

    def batch(self, step):
        """That batch, on the CPU: t (B,), x0 and eps (B, (2 around + 1) C, R, R), slabs, onehot
        (B, K, R, R), scalars (B, 2), signal and sigma (B, 1, 1, 1), mean and std of the prior
        (B, C, R, R)."""
        args, channels = self.args, (2 * self.args.around + 1) * len(self.modalities)
        shape = args.batch, channels, *self.cache.rows[0].shape[1:]
        noise = bs.training_noise(args.seed, step, shape, args.drop)
        t, eps, keep, mirror = [part[self.slice] for part in noise]
        x0, classes, place = self.cache.batch(self.rows(step), mirror, args.around)
        onehot = bs.one_hot(classes, self.network["classes"]) * keep.view(-1, 1, 1, 1)
        signal, sigma = bs.signal_sigma(bs.cosine_alpha_bar(args.shift), t)
        mean, std = bs.expected(self.prior, onehot, place)
        return t, x0, eps, onehot, place, signal, sigma, mean, std

    def plot(self, real, classes, sampled, planes, name, headline):
        """Draw slices (N, C, R, R) of these planes, label maps and samples into a file."""
        shown = [[pictures.upright(part, plane) for part in (seen, *scan)] + [None]
                 + [pictures.upright(part, plane) for part in drawn]
                 for scan, seen, drawn, plane in zip(real, classes, sampled, planes)]
        titles = ["labels", *self.modalities, "", *(f"SYNTHETIC\n{m}" for m in self.modalities)]
        pictures.plot_rows(f"{self.args.out}/{name}", shown, titles, self.args.condition, headline)

    def picture(self, denoiser, step):
        """Draw three samples into sample_*.png, a slice of each plane between its neighbours:
        faster than a head, and not as good."""
        _, [real], [classes] = self.heads(self.part, 1)
        settings, shown = {**bs.SAMPLING, "guidance": self.args.guidance}, []
        for plane, (scan, seen) in enumerate(judging.planes_of(real, classes)):
            at = pictures.fullest(seen >= self.first_lesion, seen > 0)
            near = slice(max(0, at - self.args.around), at + self.args.around + 1)
            onehot = bs.one_hot(seen[near], self.network["classes"])
            drawn = bs.sample_guided(denoiser, onehot, [bs.places(len(seen), plane)[near]],
                                     (self.args.seed, "shown"), settings)
            shown.append((scan[at], seen[at], drawn[at - near.start], plane))
        self.plot(*zip(*shown), f"sample_{step:06d}.png", f"step {step}")

    def heads(self, part, count):
        """`count` heads of a part, "held-out" or "training": numbers of cases, scans float
        (D, C, R, R) and label maps int64 (D, R, R), three lists."""
        numbers = [i for i, case in enumerate(self.cache.cases)
                   if (case["part"] == "train") == (part == "training")]
        numbers = [numbers[i] for i in slices.evenly(len(numbers), count)]
        cubes = [torch.from_numpy(self.cache.cubes[i]) for i in numbers]
        return (numbers, [bs.to_images(cube[:, :-1]) for cube in cubes],
                [cube[:, -1].long() for cube in cubes])

    def report(self, denoiser, run):
        """End a run: samples.png, and the figures of a few whole heads, held out where the
        split holds out any, beside those of the prior alone."""
        numbers, real, classes = self.heads(self.part, judging.HEADS)
        settings = {**bs.SAMPLING, "guidance": self.args.guidance}
        sampled, prior = [[bs.sample_volume(model, head, (self.args.seed, "closing", i), settings)
                           for i, head in zip(numbers, classes)]
                          for model in (denoiser, judging.prior_alone(denoiser))]
        shown = []              # two heads in three planes, each in the slice with most tumour
        for pair in list(zip(real, sampled, classes))[:2]:
            for plane, ((scan, seen), (drawn, _)) in enumerate(zip(*[
                    judging.planes_of(part, pair[2]) for part in pair[:2]])):
                at = pictures.fullest(seen >= self.first_lesion, seen > 0)
                shown.append((scan[at], seen[at], drawn[at], plane))
        self.plot(*zip(*shown), "samples.png", self.part)
        others = self.heads("training", len(real))[1:] if self.part == "held-out" else None
        figures = judging.judge_run(real, sampled, prior, classes, self.args.condition, others)
        rows = pick_rows(self.cache, self.shown, self.first_lesion, 64)
        scans, maps, place = self.cache.batch(rows, around=self.args.around)
        figures["skill"] = judging.skill(denoiser, scans, maps, place, (self.args.seed, "skill"))
        print(f"--- {len(real)} heads of {self.part} cases, sampled from their label maps")
        lines = judging.head_table(figures) + judging.doubts(figures)
        figures["heads"] = f"{len(real)} {self.part}"
        runs.report(self.args, run, settings, figures, lines)


def train(args, device):
    """Train what --generate asks for: one network for images, two for labels."""
    cases, split = checks.find_data(args)
    cache = devices.first_process_first(lambda: slices.build_cache(
        cases, Path(args.out).parent / "cache", args.resolution, args.fov, args.condition, split))
    patients = len({case["patient"] for case in cache.cases if case["part"] == "train"})
    only_phantoms = all(phantoms.phantom_seed(case.case) is not None for case in split["train"])
    facts = {"condition": args.condition, "classes": list(bs.CONDITIONS[args.condition]),
             "modalities": list(cache.meta["modalities"]), "resolution": args.resolution,
             "fov": args.fov, "patients": patients, "trained_on": cache.hashes("train"),
             "data": "phantoms" if only_phantoms and not args.label_maps else "patients"}
    if args.generate == "images":
        return learn(args, device, "ddpm", Images(args, cache), facts)
    data = label_training.LabelData(args, cache)
    # in random order and rounded: no row leads back to a case
    order = torch.randperm(len(data.asked), generator=bs.generator(args.seed, "measured"))
    digits = [2 if name == "sphericity" else 1 for name in requests.entries()]
    facts["measured"] = [list(map(round, row, digits)) for row in data.asked[order].tolist()]
    facts["trained_on"] = data.hashes
    facts["patients"] += len(data.cases) if args.label_maps else 0
    for part, task in (("coarse", label_training.Heads), ("fine", label_training.Voxels)):
        print(f"--- {part} network")
        part_args = arguments_of_part(args, part)
        learn(part_args, device, "labels", task(part_args, data), facts)


def arguments_of_part(args, part):
    """The arguments of one network of --generate labels: its folder, its fraction of the run, its
    defaults. See PARTS."""
    usual = PARTS[part]
    changed = {"out": str(Path(args.out) / part), "shift": args.shift or usual["shift"],
               "width": args.width or usual["width"],
               "steps": args.steps and max(1, round(args.steps * usual["steps"])),
               "minutes": args.minutes and args.minutes * usual["minutes"]}
    return argparse.Namespace(**{**vars(args), **changed})


def learn(args, device, kind, task, facts):
    """One training run, start to end, resumed where one was begun. kind: of the checkpoint; task:
    Images, Heads or Voxels; facts: what a checkpoint says of the data."""
    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in ("width", "mults", "blocks", "patch")}
    network = {"around": 0, **sizes, **task.network}
    net = devices.place_network(bs.UNet(**network), device)
    ema = bs.EMA(net, args.ema, to_host=devices.to_host)
    optimizer = bs.make_optimizer(net, args.lr, device, net.hidden())
    run = runs.Run(args, kind, net, ema, optimizer,
                   {"network": network, "prior": task.prior, "shift": args.shift, **facts})
    task.prior = run.facts["prior"]             # of a resumed run: measured again it may round
    trained = devices.prepare_training(net, optimizer, device)
    print(f"{pictures.count_parameters(net) / 1e6:.1f} M parameters | {task.words}", flush=True)

    def denoiser():
        return bs.Denoiser(ema.copy_of(net, run.step), task.prior, bs.cosine_alpha_bar(args.shift),
                           device, to_device=devices.to_device, to_host=devices.result_to_host)

    # Training in pseudo-code, repeated (keys as in brainsyn.py):
    #         x0, onehot, scalars ~ slabs, label maps, places    some without labels
    #         t ~ uniform{1..T},  eps ~ N(0, I)
    #         x_t   = signal x0 + sigma eps                                   [DDPM eq. 4]
    #         v     = signal eps - sigma x0                                   [VPRED]
    #         v_hat = guess(x_t, prior) + unit UNet(x_t, t, onehot, scalars)  [EDM]
    #         loss  = mean ((v_hat - v) / unit)^2,  unit = error of the guess
    #         weights <- a step of Muon against the gradient of the loss      [MUON]
    #         averaged weights <- d averaged weights + (1 - d) weights
    while run.going():
        # ------------------------------------------------------------------ one training step ---
        levels, *batch = task.batch(run.step)
        batch = devices.to_device(device, levels, *batch)
        t, x0, eps, onehot, scalars, signal, sigma, mean, std = batch
        x_t = bs.add_noise(x0, eps, signal, sigma)
        v = bs.v_target(x0, eps, signal, sigma)[:, :mean.shape[1]]      # of the slices themselves
        lr = bs.learning_rate(args.lr, run.progress(), run.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with bs.fast_math(device, args.precision):
            out = trained(x_t, t, onehot, scalars)
        v_hat = bs.precondition(out, x_t, signal, sigma, mean, std)
        unit = bs.prior_error(signal, sigma, std)                                   # (B, C, H, W)
        losses = (((v_hat - v) / unit) ** 2).mean((1, 2, 3))                        # (B,)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        finite = devices.step_if_finite(device, optimizer, losses, norm)
        optimizer.zero_grad()
        devices.end_step(device)
        # ---------------------------------------------------------------------------------------
        run.after_step(finite, losses, task.case_names, levels)
        if args.sample_every and run.step % args.sample_every == 0 and devices.first_process():
            files.attempt("the sample pictures", lambda: task.picture(denoiser(), run.step),
                          Exception)
        run.record()
    del trained
    if run.finish():
        task.report(denoiser(), run)
        run.end_if_stopped()                    # by a signal since: another network may follow


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
