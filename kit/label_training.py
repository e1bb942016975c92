"""What the two networks of --generate labels learn from: heads in blocks, then their voxels.

`Heads` and `Voxels` have what the training loop in train_ddpm.py uses, as its `Images` does:

network, prior, words    arguments of UNet; see `expected`; the data in words, for the log
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


class LabelData:
    """The heads that both networks learn from: the training cases of a cache, or the maps of
    --label-maps in their outlines, and moved copies of them, --relatives in all. args: of the
    command line. BadInput where no map is left.

    cases       names of the N training cases
    hashes      see case_hashes
    heads       uint8 (M, D, R, R): N training heads, then relatives, N at a time
    asked       (M, E), their characteristics
    fractions   (M, D', K, r, r), their blocks
    shown       uint8: heads that pictures and figures compare with
    shown_are   "held-out" or "training"
    """

    def __init__(self, args, cache):
        self.args, self.names = args, bs.CONDITIONS[args.condition]
        self.step_mm = step = args.fov / args.resolution                        # mm a voxel
        depth = args.resolution * 3 // 4
        edge = (args.resolution - depth) // 2
        tall = [case["case"] for case, cube in zip(cache.cases, cache.cubes)
                if cube[:edge, -1].any() or cube[-edge:, -1].any()]
        if tall:
            print(f"note: {len(tall)} heads ({tall[0]} for one) are cut at {depth * step:.0f} mm")
        train = requests.label_volumes(cache, ("train",), depth)
        held_out = requests.label_volumes(cache, ("val", "test"), depth)
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
        self.fractions = requests.block_fractions(self.heads, len(self.names))

    def measure(self, volumes):
        """Characteristics of label maps int (N, D, R, R) -> (N, E)."""
        return torch.stack([requests.characteristics(classes.long(), self.args.condition,
                                                     self.step_mm) for classes in volumes])

    def draw(self, function, args, count, *networks, untrained=False, **settings):
        """What sample_blocks or sample_labels makes of the characteristics of the first `count`
        shown heads. args: of this network's run; untrained: every network outputs 0."""
        if untrained:
            networks = [net and judging.prior_alone(net) for net in networks]
        model = requests.LabelGenerator(*networks, args.condition, self.step_mm, self.asked)
        sampling = {**requests.SETTINGS, "guidance": args.guidance}
        return torch.stack([function(model, wanted, (args.seed, "shown", i), sampling, **settings)
                            for i, wanted in enumerate(self.measure(self.shown[:count]))])

    def report(self, args, run, real, sampled, figures, lines):
        """The end of a run: samples.png, classes of `shown` heads beside those sampled with their
        characteristics, and runs.report of figures and lines. args: of this network's run."""
        pictures.plot_planes(Path(args.out) / "samples.png", list(zip(real, sampled))[:6],
                             [self.shown_are, "SYNTHETIC"], args.condition)
        print(f"--- {len(real)} heads with the characteristics of {self.shown_are} cases")
        figures["heads"] = f"{len(sampled)} {self.shown_are}"
        runs.report(args, run, requests.SETTINGS, figures, lines)


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


def with_levels(learner, t, x0, eps, onehot, scalars):
    """A batch of Heads or Voxels with the noise levels and the prior of t, see the module."""
    levels = bs.signal_sigma(bs.cosine_alpha_bar(learner.args.shift), t)
    return t, x0, eps, onehot, scalars, *levels, *bs.expected(learner.prior, onehot, scalars)


def draw_progress(args, step, volumes):
    """sample_STEP.png: sampled classes (N, D, H, W), a row each."""
    pictures.plot_planes(Path(args.out) / f"sample_{step:06d}.png", [[head] for head in volumes],
                         [f"SYNTHETIC, step {step}"], args.condition)


class Heads:
    """The coarse network learns the class fractions of all blocks of a head, conditioned on its
    characteristics, of which a random part is left open."""

    def __init__(self, args, data):
        self.args, self.data = args, data
        self.x0 = requests.head_pictures(data.fractions)                        # (M, D' K, r, r)
        self.network = {"channels": self.x0.shape[1], "classes": 0,
                        "scalars": 2 + len(requests.entries()), "patch": 1, "fine": 48}
        self.prior = requests.label_prior(self.x0)
        self.words = f"blocks of {len(data.heads)} heads, {len(data.cases)} of them not moved"

    def rows(self, step):
        """The heads in the batch of this step, int (B,)."""
        return bs.endless(np.arange(len(self.x0)), (self.args.seed, "heads"),
                          step * self.args.batch, self.args.batch)

    def case_names(self, step):
        """Names of the cases in the batch of this step."""
        return [self.data.cases[i % len(self.data.cases)] for i in self.rows(step)]

    def batch(self, step):
        """The batch of a training step, see the module."""
        seed, heads = self.args.seed, self.rows(step)
        x0, asked = self.x0[heads], self.data.asked[heads]
        t, eps, keep, mirror = bs.training_noise(seed, step, x0.shape, self.args.drop)
        x0 = torch.where(mirror.view(-1, 1, 1, 1), x0.flip(-1), x0)
        asked[:, requests.entries().index("x")] *= torch.where(mirror, -1.0, 1.0)
        asked[(keep == 0)[:, None] | requests.open_entries(len(x0), seed, step)] = torch.nan
        return with_levels(self, t, x0, eps, x0[:, :0], requests.head_scalars(asked))

    def sample(self, denoiser, count, untrained=False):
        """Blocks sampled with the characteristics of the first `count` shown heads. untrained: see
        LabelData.draw."""
        return self.data.draw(requests.sample_blocks, self.args, count, denoiser, None,
                              untrained=untrained)

    def picture(self, denoiser, step):
        """sample_STEP.png: three heads in blocks."""
        draw_progress(self.args, step, self.sample(denoiser, 3).argmax(2))

    def report(self, denoiser, run):
        """The end of a run: how well the volumes of blocks come as asked for."""
        data, real = self.data, requests.block_fractions(self.data.shown, len(self.data.names))
        sampled, prior = [self.sample(denoiser, len(real), untrained=word)
                          for word in (False, True)]
        asked, got, without = [
            requests.block_characteristics(heads, self.args.condition, data.step_mm)
            for heads in (real, sampled, prior)]
        figures = (compare(bs.LABELS, asked, got)
                   | compare(bs.LABELS, asked, without, "prior_"))
        data.report(self.args, run, real.argmax(2), sampled.argmax(2), figures,
                    judging.table(error_rows(figures, dict.fromkeys(bs.LABELS, ["mL"]))))


class Voxels:
    """The fine network learns the voxels of a slab, conditioned on the blocks of its head and on
    the characteristics that blocks do not show, each left open with probability 0.3."""

    def __init__(self, args, data):
        self.args, self.data = args, data
        self.slabs = data.fractions.shape[1]
        # a row is head * slabs + slab; those with almost no brain are left out
        rows = np.where((data.fractions[:, :, 0].mean((2, 3)) < 0.99).flatten())[0]
        tumour = data.fractions[:, :, -len(bs.LABELS):].sum((2, 3, 4)).flatten()[rows] > 0
        self.with_tumour, self.without = rows[tumour], rows[~tumour]
        channels = requests.BLOCK * len(data.names)
        self.network = {"channels": channels, "classes": channels, "scalars": 4}  # of slab_scalars
        self.prior = {"shares": torch.tensor(0.1)}
        self.words = f"{len(rows)} slabs of {len(data.heads)} heads"

    def rows(self, step):
        """The heads and the slabs in the batch of this step, int (B,) each."""
        rows = bs.batch_rows(self.with_tumour, self.without, self.args.tumour_share,
                             self.args.seed, step, self.args.batch)
        return np.divmod(rows, self.slabs)

    def case_names(self, step):
        """Names of the cases in the batch of this step."""
        return [self.data.cases[i % len(self.data.cases)] for i in self.rows(step)[0]]

    def batch(self, step):
        """The batch of a training step, see the module."""
        seed, data = self.args.seed, self.data
        heads, index = [torch.from_numpy(part) for part in self.rows(step)]
        # (B, BLOCK, R, R)
        classes = data.heads.unflatten(1, (self.slabs, requests.BLOCK))[heads, index].long()
        # (B, BLOCK K, R, R)
        x0 = 2 * bs.one_hot(classes, len(data.names)).transpose(1, 2).flatten(1, 2) - 1
        blocks = requests.slab_fractions(data.fractions[heads], index)          # the same shape
        t, eps, _, mirror = bs.training_noise(seed, step, x0.shape, 0.0)
        x0, blocks = [torch.where(mirror.view(-1, 1, 1, 1), part.flip(-1), part)
                      for part in (x0, blocks)]
        asked = data.asked[heads]
        chance = torch.rand(asked.shape, generator=bs.generator(seed, "open", step))
        asked[chance < 0.3] = torch.nan
        return with_levels(self, t, x0, eps, blocks,
                           requests.slab_scalars(index, self.slabs, asked))

    def sample(self, denoiser, count, untrained=False):
        """Label maps sampled with the characteristics of the first `count` shown heads. untrained:
        see LabelData.draw."""
        folder = Path(self.args.out).parent / "coarse"
        coarse, _ = runs.load_generator(folder, denoiser.device, kind="labels")
        return self.data.draw(requests.sample_labels, self.args, count, coarse, denoiser, drafts=1,
                              untrained=untrained)

    def picture(self, denoiser, step):
        """sample_STEP.png: three heads."""
        draw_progress(self.args, step, self.sample(denoiser, 3))

    def report(self, denoiser, run):
        """The end of a run: how well requests are met, how label maps hang together, how close they
        are to the heads learned from."""
        condition, data, names = self.args.condition, self.data, requests.entries()
        shown, unmoved = data.shown, data.heads[:len(data.cases)]
        sampled, prior = [self.sample(denoiser, len(shown), untrained=word)
                          for word in (False, True)]
        asked, got, without = [data.measure(heads) for heads in (shown, sampled, prior)]
        figures, alone = [judging.judge_labels(heads, shown, condition, data.step_mm)
                          for heads in (sampled, prior)]
        figures |= compare(names, asked, got) | compare(names, asked, without, "prior_")
        figures |= {f"prior_{name.removeprefix('made_')}": value for name, value in alone.items()
                    if not name.startswith("real_")}
        held_out = data.shown_are == "held-out"
        others = unmoved[slices.evenly(len(unmoved), len(shown))]
        figures["real_shape_distance"] = (judging.shape_distance(
            others, shown, condition, data.step_mm) if held_out else np.nan)
        near = requests.nearest_tumour(sampled, data.heads, condition)
        near_shown = requests.nearest_tumour(shown, data.heads if held_out else data.heads[:0],
                                             condition)
        figures |= {"nearest_training_tumour_dice": near.nanmean().item(),
                    "the_same_of_held_out_cases": near_shown.nanmean().item(),
                    "copies": int((near > 0.9).sum())}
        data.report(self.args, run, shown, sampled, figures, label_lines(figures))


# What says how a label map hangs together, see judging.label_figures, in words.
HANGS_TOGETHER = {"pieces": "pieces of tumour", "slice_dice": "Dice from slice to slice",
                  "outside": "fraction outside of the head", "apart": "fraction of ET apart"}


def label_lines(figures):
    """The end of a run of label maps in lines of text: volumes in a sentence, then what the
    networks decide as a table. figures: see Voxels.report."""
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
