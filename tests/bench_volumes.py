"""Ways to draw whole volumes with one trained generator, in figures and in a picture.

    python tests/bench_volumes.py runs/ddpm                 three ways, as many calls as usual
    python tests/bench_volumes.py runs/ddpm --curve         in turn: calls, samplers, spacings
    python tests/bench_volumes.py runs/real --data DIR

Prints a row for each way: banding and folds over those of the held-out heads whose label maps are
used, along z, y, x; texture distance of axial, coronal and sagittal slices; fine detail; seconds a
volume. Without --curve it writes volumes.png beside the checkpoint: the first head in three planes,
a row each way.

axial     axial slices (of a run with --around 0: each by itself)
in turn   one plane a step, as sample_volume does it
mean      in every step the mean of what all three planes say: three times the calls
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import brainsyn as bs
import train_ddpm
from kit import checks, devices, files, judging, pictures, runs, slices

WAYS = "axial", "in turn", "mean"


def in_t(steps):
    """In place of bs.timesteps: levels spaced evenly in t."""
    return (torch.linspace(1, 0, steps + 1, dtype=torch.float64) * bs.T).round().long()


def draw(denoiser, classes, way, settings, key):
    """A volume (D, C, H, W) of the label map (D, H, W), drawn in one of WAYS."""
    if way == "in turn":
        return bs.sample_volume(denoiser, classes, key, settings)
    onehot = bs.one_hot(classes, denoiser.net.classes)

    def ask(x, t, plane):
        x, given = bs.turned(x, plane), bs.turned(onehot, plane)
        slabs = bs.slabs_of(x, denoiser.net.around)
        return bs.turned(denoiser(slabs, t.expand(len(x)), given, bs.places(len(x), plane)), plane)

    def predict_v(x, t):
        if way == "mean":
            return sum(ask(x, t, plane) for plane in range(3)) / 3
        return ask(x, t, 0)

    def noise(step):
        return torch.randn(shape, generator=bs.generator(*key, step))

    shape = len(classes), denoiser.net.channels, *classes.shape[1:]
    visited = bs.timesteps(settings["steps"])
    table = bs.sampler_table(denoiser.alpha_bar[visited], settings["sampler"])
    return bs.sample(predict_v, noise("start"), visited, table, noise)


def row(denoiser, real, classes, condition, way, **changes):
    """Print one row -> the first volume."""
    settings, started = {**bs.SAMPLING, **changes}, time.perf_counter()
    drawn = [draw(denoiser, head, way, settings, (0, "volumes", i))
             for i, head in enumerate(classes)]
    seconds = (time.perf_counter() - started) / len(drawn)
    found = judging.judge_volumes(real, drawn, classes, condition)
    pairs = zip(judging.slices_of(drawn, classes), judging.slices_of(real, classes))
    power = [judging.fine_power(*[part[name] for name in ("images", "classes")])
             for pair in pairs for part in pair]
    fine = np.mean([(a / b).mean().item() for a, b in zip(power[::2], power[1::2])])
    values = {"banding": ("zyx", 2), "folds": ("zyx", 2), "texture": (judging.PLANES, 3)}
    cells = [" ".join(f"{found[f'{name}_{part}']:.{digits}f}" for part in parts)
             for name, (parts, digits) in values.items()]
    words = way, settings["steps"], settings["sampler"], "t" if bs.timesteps is in_t else "noise"
    print(f"| {' | '.join(map(str, (*words, *cells)))} | {fine:.2f} | {seconds:.1f} |", flush=True)
    return drawn[0]


def main():
    """The table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="of a run of train_ddpm.py")
    parser.add_argument("--data", help="folder of BraTS cases; phantoms without it")
    parser.add_argument("--split", help="FILE.json that the run was trained with")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--calls", type=int, nargs="+", default=[bs.SAMPLING["steps"]])
    parser.add_argument("--curve", action="store_true")
    flags = parser.parse_args()
    runs.use_names_of(flags.folder, None)
    denoiser, state = runs.load_generator(flags.folder, devices.pick_device("auto"))
    args = argparse.Namespace(**{**state["args"], "out": flags.folder, "data": flags.data,
                                 "split": flags.split, "skip_bad": True})
    cases, split = checks.find_data(args)
    cache = slices.build_cache(cases, Path(flags.folder).parent / "cache", state["resolution"],
                               state["fov"], state["condition"], split)
    if set(cache.hashes("val", "test")) & set(state["trained_on"]):
        raise bs.BadInput(f"{flags.folder} was trained on cases held out here; give its --split")
    _, real, classes = train_ddpm.Images(args, cache).heads("held-out", flags.heads)
    print("| way | calls | sampler | spacing | banding z y x | folds z y x | texture axial coronal "
          "sagittal | fine detail | s a volume |\n" + "|---" * 9 + "|")
    volumes, condition = {"real": real[0]}, state["condition"]
    if flags.curve:
        for spacing in (bs.timesteps, in_t):
            bs.timesteps = spacing              # what sample_volume asks
            for sampler in ("dpmpp", "ddim", "ddpm"):
                for calls in (4, 6, 8, 10, 14, 20):
                    row(denoiser, real, classes, condition, "in turn", steps=calls, sampler=sampler)
        return
    for calls in flags.calls:
        for way in WAYS:
            volumes[f"{way}, {calls}"] = row(denoiser, real, classes, condition, way, steps=calls)
    views = {name: judging.planes_of(volume, classes[0]) for name, volume in volumes.items()}
    at = [pictures.fullest(bs.tumour_labels(seen, condition) > 0, seen > 0)
          for _, seen in views["real"]]
    shown = range(len(bs.MODALITIES))[:2]
    rows = [[pictures.upright(view[i, c], plane)
             for plane, ((view, _), i) in enumerate(zip(views[name], at)) for c in shown]
            for name in volumes]
    titles = [f"{plane} {bs.MODALITIES[c]}" for plane in judging.PLANES for c in shown]
    pictures.plot_rows(Path(flags.folder) / "volumes.png", rows, titles, condition,
                       " | ".join(volumes))


if __name__ == "__main__":
    files.run_script(main)
