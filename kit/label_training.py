"""What the network of --generate labels learns from: slices of label volumes and their requests.

`Labels` has what the training loop in train_ddpm.py uses, as its `Images` does:

network, prior, words    arguments of UNet; see bs.expected; the data in words, for the log
batch(step)              t, x0, eps, onehot, scalars, signal, sigma, mean, std of a training step
case_names(step)         the cases that the batch of this step came from
picture(denoiser, step)  sample_STEP.png: what has been learned so far
report(denoiser, run)    samples.png and the figures at the end; run has .step and .seconds
"""
from pathlib import Path

import numpy as np
import torch

import brainsyn as bs
from kit import judging, metrics, pictures, recipes, requests, runs, slices


def compare(names, asked, got, source=""):
    """Mean error and rank correlation of the named columns of (N, E), as a dict; columns
    without a number are left out. source: begins the names of figures."""
    figures = {}
    for name, a, b in zip(names, asked.T, got.T):
        a, b = torch.stack([a, b])[:, ~torch.isnan(a + b)]
        if len(a):
            figures[f"{source}{name}_error"] = (a - b).abs().mean().item()
            correlation = metrics.rank_correlation(a.tolist(), b.tolist())
            figures[f"{source}{name}_rank_correlation"] = correlation
    return figures


def error_rows(figures, units):
    """Rows of a closing table: errors in figures of compare, of samples and of those of networks
    that output 0 (source "prior_"). units: {name: mm, mL or nothing}."""
    keys = {name: f"{name}_error" for name in units}
    return [(", ".join([f"{name} error", *unit]), figures.get(keys[name], np.nan),
             figures.get(f"prior_{keys[name]}", np.nan), 0.0) for name, unit in units.items()]


class Labels:
    """The heads that the network learns from: the training cases of a cache, or the maps of
    --label-maps in their outlines, and moved copies of them, --relatives in all. args: of the
    command line. BadInput where no map is left.

    cases       names of the N training cases
    hashes      see case_hashes
    heads       uint8 (M, R, R, R): N training heads, then relatives, N at a time
    asked       (M, E), their characteristics
    shown       uint8: heads that pictures and figures compare with
    shown_are   "held-out" or "training"
    """

    def __init__(self, args, cache):
        self.args, self.names = args, bs.CONDITIONS[args.condition]
        self.step_mm = step = args.fov / args.resolution                        # mm a voxel
        train = requests.label_volumes(cache, ("train",))
        held_out = requests.label_volumes(cache, ("val", "test"))
        self.cases = [case["case"] for case in cache.cases if case["part"] == "train"]
        self.hashes = cache.hashes("train")
        if args.label_maps:
            maps, names, hashes, lost = recipes.read_label_maps(args.label_maps, train, step,
                                                                args.seed)
            dice = requests.nearest_tumour(maps, held_out, args.condition)
            keep = [i for i in range(len(maps)) if not dice[i] > 0.8]           # NaN: no other
            print(f"label maps: {len(maps)} in outlines of training cases, {lost:.1%} of tumours "
                  f"cut off; {len(maps) - len(keep)} show the tumour of a held-out case: left out")
            if not keep:
                raise bs.BadInput(f"{args.label_maps}: no map is left; add others")
            train, self.cases = maps[keep], [names[i] for i in keep]
            self.hashes = sorted({*self.hashes, *(hashes[i] for i in keep)})
        relatives = [requests.move_volumes(train, (args.seed, "moves", i))
                     for i in range(1, args.relatives // len(train))]
        self.heads = torch.cat([train, *relatives])
        self.shown = (held_out if len(held_out) else train)[:12]
        self.shown_are = "held-out" if len(held_out) else "training"
        self.asked = self.measure(self.heads)
        self.network = {"channels": len(self.names), "classes": 0, "around": args.around,
                        "scalars": 2 + len(requests.entries())}
        self.prior = requests.label_prior(self.heads, len(self.names))
        # rows count head, plane, slice; slices without brain or tumour are left out
        views = [self.heads.transpose(1, axis) for axis in (1, 2, 3)]
        shown, tumour = [torch.stack([(view > least).sum((2, 3)) for view in views], 1).flatten()
                         for least in (0, len(self.names) - len(bs.LABELS) - 1)]
        empty = (tumour == 0) & (shown > 0.01 * args.resolution ** 2)
        self.pool = [torch.where(some)[0].numpy() for some in (tumour > 0, empty)]
        self.words = f"slices of {len(self.heads)} heads, {len(self.cases)} of them not moved"

    def measure(self, volumes):
        """Characteristics of label maps int (N, R, R, R) -> (N, E)."""
        return torch.stack([requests.characteristics(classes.long(), self.args.condition,
                                                     self.step_mm) for classes in volumes])

    def rows(self, step):
        """Head, plane and number of the slices in the batch of this step: three lists."""
        args = self.args
        rows = bs.batch_rows(*self.pool, args.tumour_share, args.seed, step, args.batch)
        heads, rest = np.divmod(rows, 3 * args.resolution)
        return heads.tolist(), *(part.tolist() for part in np.divmod(rest, args.resolution))

    def case_names(self, step):
        """Names of the cases in the batch of this step."""
        return [self.cases[i % len(self.cases)] for i in self.rows(step)[0]]

    def batch(self, step):
        """The batch of a training step, see the module. Where a slice is mirrored, its head is
        turned left for right before it is cut."""
        args, size = self.args, self.args.resolution
        heads, planes, index = self.rows(step)
        shape = args.batch, (2 * args.around + 1) * len(self.names), size, size
        t, eps, keep, mirror = bs.training_noise(args.seed, step, shape, args.drop)
        near = torch.arange(-args.around, args.around + 1)
        slabs, place = [], []
        for head, plane, at, turn in zip(heads, planes, index, mirror.tolist()):
            volume = self.heads[head].flip(-1) if turn else self.heads[head]
            at = size - 1 - at if turn and plane == 2 else at
            slabs.append(volume.transpose(0, plane)[(at + near).clamp(0, size - 1)].long())
            place.append(bs.places(size, plane)[at])
        x0 = 2 * bs.one_hot(torch.cat(slabs), len(self.names)) - 1
        x0 = x0.unflatten(0, (args.batch, -1)).flatten(1, 2)
        asked = self.asked[heads]
        asked[:, requests.entries().index("x")] *= torch.where(mirror, -1.0, 1.0)
        is_open = requests.open_entries(args.batch, args.seed, step)
        asked[(keep == 0)[:, None] | is_open] = torch.nan
        scalars = requests.label_scalars(torch.stack(place), asked)
        levels = bs.signal_sigma(bs.cosine_alpha_bar(args.shift), t)
        onehot = x0[:, :0]
        return t, x0, eps, onehot, scalars, *levels, *bs.expected(self.prior, onehot, scalars)

    def sample(self, denoiser, count):
        """Label maps sampled with the characteristics of the first `count` shown heads."""
        args = self.args
        model = requests.LabelGenerator(denoiser, args.condition, self.step_mm, args.resolution,
                                        self.asked)
        settings = {**bs.SAMPLING, "guidance": args.guidance}
        return torch.stack([
            requests.sample_labels(model, wanted, (args.seed, "shown", i), settings, drafts=1)
            for i, wanted in enumerate(self.measure(self.shown[:count]))])

    def picture(self, denoiser, step):
        """sample_STEP.png: one head."""
        rows = [[head] for head in self.sample(denoiser, 1)]
        pictures.plot_planes(Path(self.args.out) / f"sample_{step:06d}.png", rows,
                             [f"SYNTHETIC, step {step}"], self.args.condition)

    def report(self, denoiser, run):
        """The end of a run: samples.png, held-out heads beside those sampled with their
        characteristics; how well requests are met, how label maps hang together, how close they are
        to the heads learned from."""
        condition, names, shown = self.args.condition, requests.entries(), self.shown
        unmoved = self.heads[:len(self.cases)]
        sampled, prior = [self.sample(model, len(shown))
                          for model in (denoiser, judging.prior_alone(denoiser))]
        asked, got, without = [self.measure(heads) for heads in (shown, sampled, prior)]
        figures, alone = [judging.judge_labels(heads, shown, condition, self.step_mm)
                          for heads in (sampled, prior)]
        figures |= compare(names, asked, got) | compare(names, asked, without, "prior_")
        figures |= {f"prior_{name.removeprefix('made_')}": value for name, value in alone.items()
                    if not name.startswith("real_")}
        held_out = self.shown_are == "held-out"
        others = unmoved[slices.evenly(len(unmoved), len(shown))]
        figures["real_shape_distance"] = (judging.shape_distance(
            others, shown, condition, self.step_mm) if held_out else np.nan)
        near = requests.nearest_tumour(sampled, self.heads, condition)
        near_shown = requests.nearest_tumour(shown, self.heads if held_out else self.heads[:0],
                                             condition)
        figures |= {"nearest_training_tumour_dice": near.nanmean().item(),
                    "the_same_of_held_out_cases": near_shown.nanmean().item(),
                    "copies": int((near > 0.9).sum())}
        pictures.plot_planes(Path(self.args.out) / "samples.png", list(zip(shown, sampled))[:6],
                             [self.shown_are, "SYNTHETIC"], condition)
        print(f"--- {len(shown)} heads with the characteristics of {self.shown_are} cases")
        runs.report(self.args, run, {"heads": f"{len(shown)} {self.shown_are}", **figures},
                    label_lines(figures))


# What says how a label map hangs together, see judging.label_figures, in words.
HANGS_TOGETHER = {"pieces": "pieces of tumour", "slice_dice": "Dice from slice to slice",
                  "outside": "fraction outside of the head", "apart": "fraction of ET apart"}


def label_lines(figures):
    """The end of a run of label maps in lines of text: volumes in a sentence, then what the
    network decides as a table. figures: see Labels.report."""
    volumes = [f"{name} {figures[f'{name}_error']:.2f} mL"
               for name in (*bs.LABELS, "ventricles") if f"{name}_error" in figures]
    rows = error_rows(figures, {"x": ["mm"], "y": ["mm"], "z": ["mm"], "sphericity": [],
                                "lesions": []})
    rows += [(words, *(figures[f"{source}_{name}"] for source in ("made", "prior", "real")))
             for name, words in HANGS_TOGETHER.items()]
    rows.append(("shape distance", *(figures[f"{source}shape_distance"]
                                     for source in ("", "prior_", "real_"))))
    rows.append(("Dice with nearest training tumour", figures["nearest_training_tumour_dice"],
                 np.nan, figures["the_same_of_held_out_cases"]))
    return [f"volumes are off by {', '.join(volumes)}: settle makes them, no network does",
            *judging.table(rows),
            f"copies of training tumours (Dice above 0.9): {figures['copies']}"]
