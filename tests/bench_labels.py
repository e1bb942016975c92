"""Label generators: how slices hang together, whether what comes is what was asked for, and how it
is distributed.

    python tests/bench_labels.py ways --minutes 6
        four ways to generate a whole head, trained for equal time
    python tests/bench_labels.py asked runs/labels
        requests against volumes, guidance 1 to 3, and a plot
    python tests/bench_labels.py shapes runs/labels
        generated label maps beside those of cases, and a plot

ways      blocks: a head in blocks, then its voxels, as train_ddpm.py --generate labels does. The
          others generate the voxels of slabs of four slices, conditioned on the request: alone,
          every slab by itself; neighbour, from the feet up, each conditioned on the slab below it;
          along z, all slabs at once, joined by convolution and attention along z
asked     one thing at a time (--only ET for one), the rest left open, spread evenly over RANGES
shapes    all left open: what would be asked for (volumes, place, sphericity, lesions), of heads as
          the generator draws them, of its training cases and of cases it has not seen, as many of
          each (phantoms, or --words "--data DIR")
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import brainsyn as bs
from kit import checks, devices, files, judging, label_training, pictures, requests, slices
import train_ddpm

WAYS = ("blocks", "alone", "neighbour", "along z")
RANGES = {"NCR": (2, 30), "ED": (15, 90), "ET": (2, 40), "ventricles": (25, 70),        # mL
          "sphericity": (0.45, 0.7), "lesions": (1, 5)}
PLOTTED = ("ED", "ET", "sphericity", "lesions")
SHOWN = {"pieces": "pieces", "slice_dice": "slice to slice Dice", "outside": "outside the brain",
         "apart": "ET apart"}


class AlongZ(nn.Module):
    """A block of the U-Net, then what slabs of one head tell each other: a convolution over three
    neighbouring slabs at every pixel and attention over all of them, both zero at first. (B *
    depth, C, H, W) -> the same."""

    def __init__(self, block, channels, depth):
        super().__init__()
        self.block, self.depth, self.norm = block, depth, bs.norm(channels)
        self.mix = bs.zero_init(nn.Conv2d(3 * channels, channels, 1))
        self.attention = bs.Attention(channels)

    def forward(self, x, emb):
        x = self.block(x, emb)
        _, c, height, width = x.shape
        h = F.pad(F.silu(self.norm(x)).unflatten(0, (-1, self.depth)), (0, 0, 0, 0, 0, 0, 1, 1))
        # (B, D', 3C, H, W)
        h = torch.cat([h[:, i:i + self.depth] for i in range(3)], 2)
        x = (x + self.mix(h.flatten(0, 1))).unflatten(0, (-1, self.depth))
        # (B H W, C, D', 1)
        columns = x.permute(0, 3, 4, 2, 1).reshape(-1, c, self.depth, 1)
        out = self.attention(columns).view(-1, height, width, c, self.depth)
        return out.permute(0, 4, 3, 1, 2).flatten(0, 1)


class VolumeUNet(bs.UNet):
    """The U-Net, its last block of every level followed by AlongZ where depth is above 1."""

    def __init__(self, depth=1, **settings):
        super().__init__(**settings)
        widths = [settings["width"] * m for m in settings["mults"]]
        for level, channels in zip([*self.down, *self.up], [*widths, *widths[::-1]]):
            if depth > 1:
                level["blocks"][-1] = AlongZ(level["blocks"][-1], channels, depth)


class Slabs:
    """Voxels straight from the request, one of WAYS but blocks; see label_training."""

    def __init__(self, args, data, way):
        self.args, self.data, self.way, self.words = args, data, way, way
        self.slabs, self.k = data.fractions.shape[1], len(data.names)
        self.shape = requests.BLOCK * self.k, *data.heads.shape[2:]         # (BLOCK K, R, R)
        self.count = max(1, args.batch // 8)                                        # heads a step
        self.network = {"channels": self.shape[0], "scalars": 1 + len(requests.entries()),
                        "classes": self.shape[0] if way == "neighbour" else 0,
                        "depth": self.slabs if way == "along z" else 1}
        mean = sum(bs.one_hot(head.long(), self.k).mean(0) for head in data.heads) / len(data.heads)
        x = 2 * mean.repeat(requests.BLOCK, 1, 1) - 1       # the mean slice, for every slab
        self.prior = {"classes": torch.stack([x.mean((1, 2)), torch.ones(len(x))])[:, None],
                      "atlas": torch.stack([x, (1 - x ** 2).clamp(min=0.04).sqrt()])[:, :, None]}

    def case_names(self, step):
        """Nobody asks."""
        return []

    def scalars(self, wanted):
        """Requests (B, E) -> (B D', 1 + E): position of every slab, request."""
        position = (torch.arange(self.slabs) + 0.5) / self.slabs * 2 - 1
        return torch.cat([position.repeat(len(wanted))[:, None],
                          requests.scaled(wanted).repeat_interleave(self.slabs, 0)], 1)

    def expected(self, x):
        """The prior's mean and std for slabs x."""
        return bs.expected(self.prior, x[:, :0], torch.zeros(len(x), 2))

    def batch(self, step):
        """The batch of a training step, on the CPU."""
        args, data = self.args, self.data
        t, eps, keep, *_ = bs.training_noise(args.seed, step, (self.count, self.slabs, *self.shape),
                                             args.drop)
        rows = bs.endless(np.arange(len(data.heads)), (args.seed, "heads"), step * self.count,
                          self.count)
        asked = data.asked[rows]
        asked[keep == 0] = torch.nan
        x0 = torch.stack([2 * bs.one_hot(head.long(), self.k) - 1 for head in data.heads[rows]])
        x0 = x0.unflatten(1, (self.slabs, -1)).flatten(2, 3).flatten(0, 1)   # (B D', BLOCK K, R, R)
        below = ((x0 + 1) / 2).unflatten(0, (-1, self.slabs)).roll(1, 1)
        below[:, 0] = 0
        onehot = below.flatten(0, 1) if self.way == "neighbour" else x0[:, :0]
        t, scalars = t.repeat_interleave(self.slabs), self.scalars(asked)
        return (t, x0, eps.flatten(0, 1), onehot, scalars,
                *bs.signal_sigma(bs.cosine_alpha_bar(args.shift), t), *self.expected(x0))

    def sample_part(self, denoiser, scalars, below, key):
        """Slabs of one head, as many as scalars (N, S) -> scores (N, BLOCK K, R, R)."""
        visited = bs.timesteps(requests.SETTINGS["steps"])
        table = bs.sampler_table(denoiser.alpha_bar[visited], requests.SETTINGS["sampler"])

        def noise(step):
            return torch.randn(len(scalars), *self.shape, generator=bs.generator(*key, step))

        def predict_v(x, t):
            t = t.expand(len(x))
            onehot = below if self.way == "neighbour" else x[:, :0]
            with torch.no_grad(), bs.fast_math(denoiser.device):
                out = denoiser.net(x, t, onehot, scalars)
            return bs.precondition(out, x, *bs.signal_sigma(denoiser.alpha_bar, t),
                                   *self.expected(x))

        return bs.sample(predict_v, noise("start"), visited, table, noise)

    def sample(self, denoiser, wanted, number):
        """A label map for a request (E,) -> classes int64 (D, R, R)."""
        scalars, below, parts = self.scalars(wanted[None]), torch.zeros(1, *self.shape), []
        size = 1 if self.way == "neighbour" else self.slabs
        for first in range(0, self.slabs, size):
            scores = self.sample_part(denoiser, scalars[first:first + size], below,
                                      (0, number, first))
            parts.append(scores.unflatten(1, (requests.BLOCK, self.k)).argmax(2).flatten(0, 1))
            below = bs.one_hot(parts[-1][-requests.BLOCK:], self.k).flatten(0, 1)[None]
        return torch.cat(parts)

    def report(self, denoiser, run):
        """samples.png and closing.json."""
        data, out = self.data, Path(self.args.out)
        asked = data.measure(data.shown)
        sampled = torch.stack([self.sample(denoiser, wanted, i) for i, wanted in enumerate(asked)])
        pictures.plot_planes(out / "samples.png", list(zip(data.shown, sampled))[:4],
                             [data.shown_are, self.way], self.args.condition)
        error = (data.measure(sampled) - asked).abs()
        files.write_json(out / "closing.json", {
            "steps": run.step, "ED_error": error[:, 1].mean().item(),
            "ET_error": error[:, 2].mean().item(),
            **judging.judge_labels(sampled, data.shown, self.args.condition, data.step_mm)})


def train_way(way, args, out):
    """One run -> its closing figures."""
    words = ["--generate", "labels", "--minutes", str(args.minutes), "--sample-every", "0", "--out",
             str(out), *args.words.split()]
    if way == "blocks":
        train_ddpm.main(words)
        closing = [json.loads((out / part / "closing.json").read_text())
                   for part in train_ddpm.PARTS]
        return closing[-1] | {"steps": " + ".join(str(figures["steps"]) for figures in closing)}
    flags = train_ddpm.parse_arguments(["--width", "64", *words, "--shift", "0.2"])
    cases, split = checks.find_data(flags)
    cache = slices.build_cache(cases, out.parent / "cache", flags.resolution, flags.fov,
                               flags.condition, split)
    data, bs.UNet = label_training.LabelData(flags, cache), VolumeUNet
    facts = {"condition": flags.condition, "classes": list(data.names), "modalities": [],
             "resolution": flags.resolution, "fov": flags.fov, "data": "bench",
             "trained_on": data.hashes, "measured": data.asked.tolist(),
             "patients": len(data.cases)}
    out.mkdir(parents=True, exist_ok=True)
    train_ddpm.learn(flags, devices.pick_device(args.device), "labels", Slabs(flags, data, way),
                     facts)
    return json.loads((out / "closing.json").read_text())


def number(value):
    """A figure as text; None where there was nothing to measure."""
    return "none" if value is None else f"{value:.3g}"


def compare_ways(args):
    """Train each way for the same time, print what its run ended with."""
    rows = [(way, train_way(way, args, Path(args.out) / way.replace(" ", "_")))
            for way in args.ways]
    print("\n| way | steps | " + " | ".join(SHOWN.values()) + " | ET off by, mL | ED off by, mL | "
          "shape distance |")
    print("|" + "---|" * (len(SHOWN) + 5))
    real = [number(rows[0][1]["real_" + name]) for name in SHOWN]
    print("| held-out cases | | " + " | ".join(real) + " | | | |")
    for way, figures in rows:
        names = [*("made_" + name for name in SHOWN), "ET_error", "ED_error", "shape_distance"]
        print(f"| {way} | {figures['steps']} | "
              + " | ".join(number(figures[name]) for name in names) + " |")


def compare_guidance(args):
    """Ask for one thing at a time."""
    model = requests.load_label_generator(args.checkpoint, devices.pick_device(args.device))
    panels = []
    print("| asked for | guidance | mean error | correlation | slope | pieces | s a volume |\n|"
          + "---|" * 7)
    for label, (low, high) in RANGES.items():
        if label not in args.only or label == "ventricles" and model.condition != label:
            continue
        lines = {"as asked": ([low, high], [low, high])}
        for guidance in args.guidance:
            settings = {**bs.SAMPLING, "guidance": guidance, "steps": args.calls}
            wanted = torch.stack([requests.requested({label: (low, high)}, i, args.count, 0)
                                  for i in range(args.count)])
            started = time.time()
            sampled = [requests.sample_labels(model, request, (0, label, i), settings,
                                              args.candidates) for i, request in enumerate(wanted)]
            seconds, at = (time.time() - started) / args.count, requests.entries().index(label)
            got = torch.stack([requests.characteristics(classes, model.condition, model.step)
                               for classes in sampled])[:, at].numpy()
            there = ~np.isnan(got)              # without a tumour no sphericity
            got, asked = got[there], wanted[:, at].numpy()[there]
            pieces = np.nanmean([judging.label_figures(classes, model.condition)["pieces"]
                                 for classes in sampled])
            error, r, slope = math.nan, math.nan, math.nan
            if len(got) > 1:
                error, r = np.abs(got - asked).mean(), np.corrcoef(got, asked)[0, 1]
                slope = np.polyfit(asked, got, 1)[0]
            print(f"| {label} | {guidance:g} | {error:.2f} | {r:.3f} | {slope:.2f} | {pieces:.1f} "
                  f"| {seconds:.1f} |", flush=True)
            lines[f"guidance {guidance:g}"] = (asked, got, np.zeros(len(got)))
        panels.append((f"{label} that came", "points", lines))
    pictures.plot_lines(Path(args.out) / "asked.png", panels, "asked for")
    print(f"wrote: {Path(args.out) / 'asked.png'}")


def gap(a, b):
    """Largest distance of two cumulative distributions (Kolmogorov and Smirnov), 0..1: arrays (N,),
    (M,)."""
    at = np.concatenate([a, b])
    return float(np.abs([(a <= x).mean() - (b <= x).mean() for x in at]).max())


def volumes_of(args, model):
    """Label maps of the cases of --words as the generator's: uint8 (N, D, R, R), and bool (N,),
    whether it was trained on them. BadInput unless there are some of each kind, in its voxels."""
    flags = train_ddpm.parse_arguments(["--generate", "labels", "--condition", model.condition,
                                        "--phantoms", "120", "--out", str(Path(args.out) / "none"),
                                        *args.words.split()])
    cases, split = checks.find_data(flags)
    cache = slices.build_cache(cases, Path(args.out) / "cache", flags.resolution, flags.fov,
                               flags.condition, split)
    volumes = requests.label_volumes(cache, ("train", "val", "test"), flags.resolution * 3 // 4)
    seen = torch.tensor([not set(model.state["trained_on"]).isdisjoint(case["hashes"])
                         for case in cache.cases])
    step = flags.fov / flags.resolution
    if seen.all() or not seen.any() or step != model.step:
        raise bs.BadInput(f"--words: {int(seen.sum())} of these {len(seen)} cases trained the "
                          f"generator, voxels are {step:g} mm; needed are some that did, some that "
                          f"did not, and {model.step:g} mm")
    return volumes, seen


def print_spreads(measured):
    """The table of mean and spread of every entry; measured: {set: array (N, E)}, unseen
    cases first. Returns the panels of the plot."""
    print("| what | " + " | ".join(measured) + " | gap, training | gap, generated |")
    print("|" + "---|" * 6)
    panels = []
    for at, name in enumerate(requests.entries()):
        columns = {source: np.sort(values[:, at][~np.isnan(values[:, at])])
                   for source, values in measured.items()}
        if not all(map(len, columns.values())):
            continue
        base, *others = columns.values()
        spreads = [f"{column.mean():.3g} ± {column.std():.2g}" for column in columns.values()]
        gaps = [f"{gap(column, base):.2f}" for column in others]
        print(f"| {name} | " + " | ".join([*spreads, *gaps]) + " |")
        if name in PLOTTED:
            panels.append((name, "linear", {
                source: (column, (np.arange(len(column)) + 1) / len(column))
                for source, column in columns.items()}))
    return panels


def compare_shapes(args):
    """Heads generated with all left open beside those of cases."""
    model = requests.load_label_generator(args.checkpoint, devices.pick_device(args.device))
    volumes, seen = volumes_of(args, model)

    def characteristics(heads):
        return torch.stack([requests.characteristics(classes.long(), model.condition, model.step)
                            for classes in heads])

    count = min(args.count, int(seen.sum()), int((~seen).sum()))
    everything_open = torch.full((len(requests.entries()),), torch.nan)
    settings = {**bs.SAMPLING, "steps": args.calls}
    sampled = torch.stack([requests.sample_labels(model, everything_open, (0, "shapes", i),
                                                  settings) for i in range(count)])
    sets = {"unseen cases": volumes[~seen][:count], "training cases": volumes[seen][:count],
            "generated": sampled}
    print(f"{count} heads each: mean ± spread, and the largest gap of cumulative distributions to "
          "unseen cases")
    panels = print_spreads({source: characteristics(heads).numpy()
                            for source, heads in sets.items()})
    for source, other, others in (("training cases", "unseen", volumes[~seen]),
                                  ("generated", "training", volumes[seen])):
        near = requests.nearest_tumour(sets[source], others, model.condition)
        figures = judging.judge_labels(sets[source], sets["unseen cases"], model.condition,
                                       model.step)
        print(f"{source}: shape distance to unseen cases {figures['shape_distance']:.3f}; pieces "
              f"{figures['made_pieces']:.1f} ({figures['real_pieces']:.1f}), slice to slice Dice "
              f"{figures['made_slice_dice']:.2f} ({figures['real_slice_dice']:.2f}); nearest "
              f"tumour of {other} cases: Dice {near.nanmean():.2f}, at most "
              f"{np.nanmax(near.numpy(), initial=0):.2f}")
    relatives = requests.move_volumes(sets["training cases"], (0, "relatives"))
    near = requests.nearest_tumour(relatives, volumes[seen], model.condition)
    print("for scale, moved copies of training cases: nearest tumour of training cases: Dice "
          f"{near.nanmean():.2f}, at least {near[~torch.isnan(near)].min():.2f}")
    blocks = requests.block_fractions(volumes, len(bs.CONDITIONS[model.condition]))
    blocks = requests.block_characteristics(blocks, model.condition, model.step)
    both = torch.stack([blocks[:, requests.SPHERICITY],
                        characteristics(volumes)[:, requests.SPHERICITY]])
    guessed, exact = both[:, ~torch.isnan(both).any(0)].numpy()
    print("sphericity guessed from blocks: correlation with that of the voxels "
          f"{np.corrcoef(guessed, exact)[0, 1]:.2f} over {len(exact)} heads, "
          f"{np.abs(guessed - exact).mean():.2f} off")
    pictures.plot_lines(Path(args.out) / "shapes.png", panels, "mL, or 1; above it the fraction of "
                        "heads that have no more")
    print(f"wrote: {Path(args.out) / 'shapes.png'}")


def main():
    """Read flags and go."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ways", "asked", "shapes"))
    parser.add_argument("checkpoint", nargs="?", default="runs/labels", help="for asked and shapes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--minutes", type=float, default=4, help="training of each way")
    parser.add_argument("--words", default="", help="more words for train_ddpm.py")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 1.5, 2, 3])
    parser.add_argument("--only", nargs="+", choices=RANGES, default=list(RANGES),
                        help="what is asked for")
    parser.add_argument("--count", type=int, help="requests each (default 12), heads of each kind "
                        "(default 42)")
    parser.add_argument("--candidates", type=int, default=requests.CANDIDATES,
                        help="see sample_blocks")
    parser.add_argument("--calls", type=int, default=20, help="network calls a volume")
    parser.add_argument("--device", default="cpu", choices=devices.DEVICES)
    parser.add_argument("--out", default="runs/bench_labels")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args.count = args.count or (42 if args.what == "shapes" else 12)
    commands = {"ways": compare_ways, "asked": compare_guidance, "shapes": compare_shapes}
    files.run_script(lambda: commands[args.what](args))


if __name__ == "__main__":
    main()
