"""A label generator: whether what comes is what was asked for, and how it is distributed.

    python tests/bench_labels.py asked runs/labels
        requests against volumes, guidance 1 to 3, and a plot
    python tests/bench_labels.py shapes runs/labels
        generated label maps beside those of cases, and a plot

asked     one thing at a time (--only ET for one), the rest left open, spread evenly over RANGES
shapes    all left open: what would be asked for (volumes, place, sphericity, lesions), of heads as
          the generator draws them, of its training cases and of cases it has not seen, as many of
          each (phantoms, or --words "--data DIR")
"""
from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import brainsyn as bs
from kit import checks, devices, files, judging, pictures, requests, slices
import train_ddpm

RANGES = {"NCR": (2, 30), "ED": (15, 90), "ET": (2, 40), "ventricles": (25, 70),        # mL
          "sphericity": (0.45, 0.7), "lesions": (1, 5)}
PLOTTED = ("ED", "ET", "sphericity", "lesions")


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
            sampled = [requests.sample_labels(model, request, (0, label, i), settings)
                       for i, request in enumerate(wanted)]
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
    volumes = requests.label_volumes(cache, slices.PARTS)
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
    pictures.plot_lines(Path(args.out) / "shapes.png", panels, "mL, or 1; above it the fraction of "
                        "heads that have no more")
    print(f"wrote: {Path(args.out) / 'shapes.png'}")


def main():
    """Read flags and go."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("asked", "shapes"))
    parser.add_argument("checkpoint", nargs="?", default="runs/labels")
    parser.add_argument("--words", default="", help="more words for train_ddpm.py")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 1.5, 2, 3])
    parser.add_argument("--only", nargs="+", choices=RANGES, default=list(RANGES),
                        help="what is asked for")
    parser.add_argument("--count", type=int, help="requests each (default 12), heads of each kind "
                        "(default 42)")
    parser.add_argument("--calls", type=int, default=10, help="network calls a volume")
    parser.add_argument("--device", default="cpu", choices=devices.DEVICES)
    parser.add_argument("--out", default="runs/bench_labels")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args.count = args.count or (42 if args.what == "shapes" else 12)
    commands = {"asked": compare_guidance, "shapes": compare_shapes}
    files.run_script(lambda: commands[args.what](args))


if __name__ == "__main__":
    main()
