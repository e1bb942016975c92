"""Label generators: how slices hang together, whether what comes is what was asked for, and how it
is distributed.

    python tests/bench_labels.py ways --minutes 6       four ways to draw a whole head, trained for
    equal time python tests/bench_labels.py asked runs/labels      requests against volumes,
    guidance 1 to 3, and a plot python tests/bench_labels.py shapes runs/labels     label maps as
    they come beside those of cases, and a plot

ways      blocks: a coarse head, then its voxels, as train_ddpm.py --generate labels does. The
          others draw the voxels of slabs of four slices at once, from the request: alone, every
          slab by itself; neighbour, from the feet up, each told the slab below it; along z, all
          slabs at once, seeing each other by convolution and attention
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
from types import SimpleNamespace

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
        return self.attention(columns).view(-1, height, width, c, self.depth).permute(0, 4, 3, 1,
                                                                                      2).flatten(0,
                                                                                                 1)


class VolumeUNet(bs.UNet):
    """The U-Net, its last block of every level followed by AlongZ where depth is above 1."""

    def __init__(self, depth=1, **settings):
        super().__init__(**settings)
        widths = [settings["width"] * m for m in settings["mults"]]
        for level, channels in zip([*self.down, *self.up], [*widths, *widths[::-1]]):
            if depth > 1:
                level["blocks"][-1] = AlongZ(level["blocks"][-1], channels, depth)


def learn_slabs(args, data, way):
    """Voxels straight from the request; see train_ddpm.learn_images."""
    slabs, k, heads = data.shares.shape[1], len(data.names), max(1, args.batch // 8)
    size, alpha_bar = data.heads.shape[-1], bs.cosine_alpha_bar(args.shift)
    # (K, R, R)
    share = torch.stack([bs.one_hot(its.long(), k).mean(0) for its in data.heads]).mean(0)
    # the mean slice, for every slab
    x = 2 * share.repeat(requests.BLOCK, 1, 1) - 1
    prior = {"classes": torch.stack([x.mean((1, 2)), torch.ones(len(x))])[:, None],
             "atlas": torch.stack([x, (1 - x ** 2).clamp(min=0.04).sqrt()])[:, None]}

    def scalars_of(asked):
        position = (torch.arange(slabs) + 0.5) / slabs * 2 - 1
        return torch.cat([position.repeat(len(asked))[:, None],
                          requests.scaled(asked).repeat_interleave(slabs, 0)], 1)

    def draw_batch(step):
        t, eps, keep, *_ = bs.training_noise(args.seed, step,
                                             (heads, slabs, requests.BLOCK * k, size, size),
                                             args.drop)
        which = bs.endless(np.arange(len(data.heads)), (args.seed, "heads"), step * heads, heads)
        asked = data.asked[which].clone()
        asked[keep == 0] = torch.nan
        x0 = requests.to_slabs(torch.stack([2 * bs.one_hot(its.long(), k) - 1
                                            for its in data.heads[which]]), requests.BLOCK)
        below = ((x0 + 1) / 2).unflatten(0, (-1, slabs)).roll(1, 1)
        below[:, 0] = 0
        onehot = below.flatten(0, 1) if way == "neighbour" else x0[:, :0]
        t, scalars = t.repeat_interleave(slabs), scalars_of(asked)
        return (t, x0, eps.flatten(0, 1), onehot, scalars, torch.ones(len(t), 1, 1, 1),
                *bs.signal_sigma(alpha_bar, t), *bs.expected(prior, x0[:, :0], scalars[:, 0] * 0))

    def volume(denoiser, asked, number):
        at = bs.timesteps(bs.SAMPLING["steps"])
        table = bs.sampler_table(denoiser.alpha_bar[at], bs.SAMPLING["sampler"], bs.SAMPLING["eta"])
        scalars, shape, made = scalars_of(asked[None]), (requests.BLOCK * k, size, size), []
        parts = [slice(i, i + 1) for i in range(slabs)] if way == "neighbour" else [slice(0, slabs)]
        below = torch.zeros(1, *shape)
        for part in parts:
            its, noise = scalars[part], lambda step: torch.randn(
                len(scalars[part]), *shape, generator=bs.generator(0, number, part.start, step))

            def predict_v(x, t):
                t = t.expand(len(x))
                signal, sigma = bs.signal_sigma(denoiser.alpha_bar, t)
                with torch.no_grad(), bs.fast_math(denoiser.device):
                    out = denoiser.net(x, t, below if way == "neighbour" else x[:, :0], its)
                return bs.precondition(out, x, signal, sigma,
                                       *bs.expected(prior, x[:, :0], its[:, 0] * 0))

            made.append(bs.sample(predict_v, noise("start"), at, table, noise))
            drawn = made[-1].unflatten(1, (requests.BLOCK, k)).argmax(2).flatten(0, 1)
            below = requests.to_slabs(bs.one_hot(drawn, k)[None], requests.BLOCK)[-1:]
        return torch.cat(made).unflatten(1, (requests.BLOCK, k)).flatten(0, 1).argmax(1)

    def close(denoiser, pace):
        asked = data.measure(data.shown)
        made = torch.stack([volume(denoiser, its, i) for i, its in enumerate(asked)])
        pictures.plot_planes(Path(args.out) / "samples.png", list(zip(data.shown, made))[:4],
                             [data.who, way], args.condition)
        error = (data.measure(made) - asked).abs()
        files.write_json(Path(args.out) / "closing.json",
                         {"steps": pace.step, "ED_error": error[:, 1].mean().item(),
                          "ET_error": error[:, 2].mean().item(),
                          **judging.judge_labels(made, data.shown, args.condition, data.step_mm)})

    return SimpleNamespace(network={"channels": requests.BLOCK * k, "classes": requests.BLOCK * k
                                    * (way == "neighbour"), "scalars": 1 + len(requests.ASKED),
                                    "depth": slabs if way == "along z" else 1}, prior=prior,
                           draw_batch=draw_batch, close=close, who=lambda step: [], words=way)


def train_way(way, args, out):
    """One run -> its closing figures."""
    words = ["--generate", "labels", "--minutes", str(args.minutes), "--sample-every", "0", "--out",
             str(out), *args.words.split()]
    if way == "blocks":
        train_ddpm.main(words)
        closing = [json.loads((out / part / "closing.json").read_text())
                   for part in train_ddpm.PARTS]
        return closing[-1] | {"steps": " + ".join(str(its["steps"]) for its in closing)}
    its = train_ddpm.parse_arguments(["--width", "64", *words, "--shift", "0.2"])
    cases, split = checks.find_data(its)
    cache = slices.build_cache(cases, out.parent / "cache", its.resolution, its.fov, its.condition,
                               split)
    data, bs.UNet = label_training.heads_to_learn(its, cache), VolumeUNet
    facts = {"condition": its.condition, "classes": list(data.names), "modalities": [],
             "resolution": its.resolution, "fov": its.fov, "data": "bench",
             "trained_on": data.hashes, "measured": data.asked.tolist(),
             "patients": len(data.cases)}
    out.mkdir(parents=True, exist_ok=True)
    train_ddpm.learn(its, devices.pick_device(args.device), "labels", learn_slabs(its, data, way),
                     facts)
    return json.loads((out / "closing.json").read_text())


def compare_ways(args):
    """Train each way for the same time, print what its run ended with."""
    rows = [(way, train_way(way, args, Path(args.out) / way.replace(" ", "_")))
            for way in args.ways]
    print("\n| way | steps | " + " | ".join(SHOWN.values()) + " | ET off by, mL | ED off by, mL | "
          "shape distance |")
    print("|" + "---|" * (len(SHOWN) + 5))
    # nothing came to measure
    number = lambda value: "none" if value is None else f"{value:.3g}"
    print("| held-out cases | | " + " | ".join(number(rows[0][1]["real_" + name]) for name in SHOWN)
          + " | | | |")
    for way, its in rows:
        figures = [*("made_" + name for name in SHOWN), "ET_error", "ED_error", "shape_distance"]
        print(f"| {way} | {its['steps']} | " + " | ".join(number(its[name]) for name in figures)
              + " |")


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
            settings, request = {**bs.SAMPLING, "guidance": guidance, "steps": args.calls}, {
                label: (low, high)}
            wanted = torch.stack([requests.requested(request, i, args.count, 0)
                                  for i in range(args.count)])
            started = time.time()
            made = [requests.sample_labels(model, its, (0, label, i), settings, args.candidates)
                    for i, its in enumerate(wanted)]
            seconds, at = (time.time() - started) / args.count, requests.ASKED.index(label)
            got = torch.stack([requests.characteristics(its, model.condition, model.step)
                               for its in made])[:, at].numpy()
            there = ~np.isnan(got)              # without a tumour no sphericity
            got, asked = got[there], wanted[:, at].numpy()[there]
            pieces = np.nanmean([judging.label_figures(its, model.condition)["pieces"]
                                 for its in made])
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


def compare_shapes(args):
    """Heads drawn with all left open beside those of cases."""
    model = requests.load_label_generator(args.checkpoint, devices.pick_device(args.device))
    its = train_ddpm.parse_arguments(["--generate", "labels", "--condition", model.condition,
                                      "--phantoms", "120", "--out", str(Path(args.out) / "none"),
                                      *args.words.split()])
    cases, split = checks.find_data(its)
    cache = slices.build_cache(cases, Path(args.out) / "cache", its.resolution, its.fov,
                               its.condition, split)
    volumes = requests.label_volumes(cache, ("train", "val", "test"), its.resolution * 3 // 4)
    seen = torch.tensor([not set(model.trained_on).isdisjoint(case["hashes"])
                         for case in cache.cases])
    count = min(args.count, int(seen.sum()), int((~seen).sum()))
    if not count or its.fov / its.resolution != model.step:
        raise bs.BadInput(f"--words: {int(seen.sum())} of these {len(seen)} cases trained the "
                          f"generator, voxels are {its.fov / its.resolution:g} mm; needed are some "
                          f"that did, some that did not, and {model.step:g} mm")
    settings = {**bs.SAMPLING, "steps": args.calls}
    made = torch.stack([requests.sample_labels(model, torch.full((len(requests.ASKED),), torch.nan),
                                               (0, "shapes", i), settings) for i in range(count)])
    sets = {"unseen cases": volumes[~seen][:count], "training cases": volumes[seen][:count],
            "generated": made}
    its = {who: torch.stack([requests.characteristics(one.long(), model.condition, model.step)
                             for one in heads]).numpy() for who, heads in sets.items()}
    print(f"{count} heads each: mean ± spread, and the largest gap of cumulative distributions to "
          "unseen cases")
    print("| what | " + " | ".join(its) + " | gap, training | gap, generated |\n|" + "---|" * 6)
    panels = []
    for at, name in enumerate(requests.ASKED):
        columns = {who: values[:, at][~np.isnan(values[:, at])] for who, values in its.items()}
        if all(map(len, columns.values())):
            base, *others = columns.values()
            print(f"| {name} | " + " | ".join(f"{v.mean():.3g} ± {v.std():.2g}"
                                              for v in columns.values()) + " | "
                  + " | ".join(f"{gap(v, base):.2f}" for v in others) + " |")
            if name in PLOTTED:
                panels.append((name, "linear", {who: (np.sort(v), (np.arange(len(v)) + 1) / len(v))
                                                for who, v in columns.items()}))
    for who in ("training cases", "generated"):
        near = requests.nearest_tumour(sets[who], volumes[~seen] if who == "training cases"
                                       else volumes[seen], model.condition)[0]
        figures = judging.judge_labels(sets[who], sets["unseen cases"], model.condition, model.step)
        print(f"{who}: shape distance to unseen cases {figures['shape_distance']:.3f}; pieces "
              f"{figures['made_pieces']:.1f} ({figures['real_pieces']:.1f}), slice to slice Dice "
              f"{figures['made_slice_dice']:.2f} ({figures['real_slice_dice']:.2f}); nearest "
              f"tumour of {'unseen' if who == 'training cases' else 'training'} cases: Dice "
              f"{near.nanmean():.2f}, at most {np.nanmax(near.numpy(), initial=0):.2f}")
    relatives = requests.move_volumes(sets["training cases"], (0, "relatives"))
    near = requests.nearest_tumour(relatives, volumes[seen], model.condition)[0]
    print("for scale, moved copies of training cases: nearest tumour of training cases: Dice "
          f"{near.nanmean():.2f}, at least {near[~torch.isnan(near)].min():.2f}")
    blocks = requests.block_shares(volumes, len(bs.CONDITIONS[model.condition]))
    guess = torch.stack([requests.measure_shares(blocks, model.condition, model.step)[:, 6],
                         torch.tensor([requests.characteristics(one.long(), model.condition,
                                                                model.step)[6]
                                       for one in volumes])])
    guess = guess[:, ~torch.isnan(guess).any(0)].numpy()
    print("sphericity guessed from blocks: correlation with that of the voxels "
          f"{np.corrcoef(guess)[0, 1]:.2f} over {guess.shape[1]} heads, "
          f"{np.abs(guess[0] - guess[1]).mean():.2f} off")
    pictures.plot_lines(Path(args.out) / "shapes.png", panels, "mL, or 1; above it the share of "
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
                        help="see sample_shares")
    parser.add_argument("--calls", type=int, default=20, help="network calls a volume")
    parser.add_argument("--device", default="cpu", choices=devices.DEVICES)
    parser.add_argument("--out", default="runs/bench_labels")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args.count = args.count or (42 if args.what == "shapes" else 12)
    files.run_script(lambda: {"ways": compare_ways, "asked": compare_guidance,
                              "shapes": compare_shapes}[args.what](args))


if __name__ == "__main__":
    main()
