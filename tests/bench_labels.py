"""Label generators: how slices hang together, and whether what comes is what was asked for.

    python tests/bench_labels.py ways --minutes 4       three ways for slabs to know of each other, equal time each
    python tests/bench_labels.py asked runs/labels      requests against volumes, guidance 1 to 3, and a plot

ways      alone: every slab by itself; neighbour: drawn from the feet up, each told the slab below it; along z: all at
          once, seeing each other, which is what train_ddpm.py --generate labels does
asked     volumes of one label at a time, the rest left open, spread evenly over RANGES
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import brainsyn as bs
import train_ddpm

RANGES = {"NCR": (2, 30), "ED": (15, 90), "ET": (2, 40)}       # mL
SHOWN = {"pieces": "pieces", "slice_dice": "slice to slice Dice", "outside": "outside the brain", "apart": "ET apart"}


def alone(its):
    """Slabs that know nothing of each other."""
    its.network["depth"] = 1
    return its


def neighbour(its):
    """Slabs that are told the one below: its labels come as a label map would; of the lowest, none."""
    slabs, draw_batch = its.network["depth"], its.draw_batch
    its.network |= {"depth": 1, "classes": its.network["channels"]}

    def draw(step):
        t, x0, eps, _, *rest = draw_batch(step)
        below = ((x0 + 1) / 2).unflatten(0, (-1, slabs)).roll(1, 1)
        below[:, 0] = 0
        return t, x0, eps, below.flatten(0, 1), *rest

    its.draw_batch = draw
    return its


def sample_upwards(denoiser, wanted, key, settings):
    """sample_labels for `neighbour`, slab by slab."""
    slabs, *shape = denoiser.prior["atlas"].shape[1:]
    visited, scalars = bs.timesteps(settings["steps"]), bs.slab_scalars(wanted[None], slabs)
    table = bs.sampler_table(denoiser.alpha_bar[visited], settings["sampler"], settings["eta"])
    made, below = [], torch.zeros(1, *shape)
    for i in range(slabs):
        def predict_v(x, t):
            t = t.expand(1)
            signal, sigma = bs.signal_sigma(denoiser.alpha_bar, t)
            with torch.no_grad():
                out = denoiser.net(x, t, below, scalars[i:i + 1])
            return bs.precondition(out, x, signal, sigma, *bs.expected(denoiser.prior, x[:, :0], scalars[i:i + 1, 0]))

        def noise(step):
            return torch.randn(1, *shape, generator=bs.generator(*key, i, step))

        drawn = bs.from_slabs(bs.sample(predict_v, noise("start"), visited, table, noise), bs.SLAB)[0].argmax(1)
        below = bs.to_slabs(bs.one_hot(drawn, shape[0] // bs.SLAB)[None])
        made.append(drawn)
    return torch.cat(made)


WAYS = {"alone": (alone, bs.sample_labels), "neighbour": (neighbour, sample_upwards),
        "along z": (lambda its: its, bs.sample_labels)}


def compare_ways(args):
    """Train each way for the same time, print what its run ended with."""
    learn, rows = train_ddpm.learn_labels, []
    for way in args.ways:
        change, bs.sample_labels = WAYS[way]
        train_ddpm.learn_labels = lambda *its: change(learn(*its))
        out = Path(args.out) / way.replace(" ", "_")
        train_ddpm.main(["--generate", "labels", "--minutes", str(args.minutes), "--sample-every", "0", "--out",
                         str(out), *args.words.split()])
        rows.append((way, json.loads((out / "closing.json").read_text())))
    print("\n| way | steps | " + " | ".join(SHOWN.values()) + " | ET off by, mL | ED off by, mL | shape distance |")
    print("|" + "---|" * (len(SHOWN) + 5))
    last = rows[-1][1]
    print("| held-out cases | | " + " | ".join(f"{last['real_' + name]:.3g}" for name in SHOWN) + " | | | |")
    for way, its in rows:
        print(f"| {way} | {its['steps']} | " + " | ".join(f"{its['made_' + name]:.3g}" for name in SHOWN)
              + f" | {its['ET_error']:.1f} | {its['ED_error']:.1f} | {its['shape_distance']:.3g} |")


def compare_guidance(args):
    """Ask for volumes of one label at a time."""
    denoiser, state = bs.load_generator(args.checkpoint, bs.pick_device(args.device), kind="labels")
    step, panels = state["fov"] / state["resolution"], []
    print("| label | guidance | mean error, mL | correlation | slope | pieces | s a volume |\n|" + "---|" * 7)
    for label, (low, high) in RANGES.items():
        lines = {"as asked": ([low, high], [low, high])}
        for guidance in args.guidance:
            settings, request = {**bs.SAMPLING, "guidance": guidance, "steps": args.calls}, {label: (low, high)}
            wanted = torch.stack([bs.requested(request, i, args.count, 0) for i in range(args.count)])
            started = time.time()
            made = [bs.sample_labels(denoiser, its, (0, label, i), settings) for i, its in enumerate(wanted)]
            seconds, at = (time.time() - started) / args.count, bs.ASKED.index(label)
            got = torch.stack([bs.characteristics(its, state["condition"], step) for its in made])[:, at].numpy()
            asked = wanted[:, at].numpy()
            pieces = np.nanmean([bs.label_figures(its, state["condition"])["pieces"] for its in made])
            print(f"| {label} | {guidance:g} | {np.abs(got - asked).mean():.2f} | {np.corrcoef(got, asked)[0, 1]:.3f} "
                  f"| {np.polyfit(asked, got, 1)[0]:.2f} | {pieces:.1f} | {seconds:.1f} |", flush=True)
            lines[f"guidance {guidance:g}"] = (asked, got, np.zeros(args.count))
        panels.append((f"{label}: mL that came", "points", lines))
    bs.draw_lines(Path(args.out) / "asked.png", panels, "mL asked for")
    print(f"wrote: {Path(args.out) / 'asked.png'}")


def main():
    """Read flags and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ways", "asked"))
    parser.add_argument("checkpoint", nargs="?", default="runs/labels", help="for asked")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--minutes", type=float, default=4, help="training of each way")
    parser.add_argument("--words", default="", help="more words for train_ddpm.py")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 1.5, 2, 3])
    parser.add_argument("--count", type=int, default=12, help="requests a label")
    parser.add_argument("--calls", type=int, default=20, help="network calls a volume")
    parser.add_argument("--device", default="cpu", choices=bs.DEVICES)
    parser.add_argument("--out", default="runs/bench_labels")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    bs.run_script(lambda: (compare_ways if args.what == "ways" else compare_guidance)(args))


if __name__ == "__main__":
    main()
