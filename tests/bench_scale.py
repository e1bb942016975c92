"""What whole volumes cost, and how cost grows with picture size, batch and width; the bill for more
than a laptop.

    python tests/bench_scale.py                 phantoms enlarged to 240x240x155; two cores: about
    ten minutes python tests/bench_scale.py --data DIR      a case as released in place of that one
    python tests/bench_scale.py --tiny          whether it runs at all

Volumes   one four-modality volume of 155 slices sampled with 20 network calls a slice, segmenting
          one case of 240x240x155, its way from files into the cache beside plain nibabel. Networks
          have their default sizes and random weights, which cost the same. Peak memory is what a
          process of its own adds to its imports
Growth    milliseconds of a training step over picture size, batch and width, and exponents fitted
          to them
Bill      on paper: GFLOP a slice as torch counts them, times the slices of BraTS 2021, over what a
          chip's data sheet promises, at a share of it that is assumed, not measured
"""
from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_check
import brainsyn as bs
from kit import devices, metrics, nifti, phantoms, slices, writing
import train_ddpm

CPU = torch.device("cpu")
# dense bfloat16 FLOP/s of the makers' data sheets; SHARE of them is what a well-run training
# reaches, an assumption
CHIPS = {"one H200": 989e12, "a v5e-8": 8 * 197e12}
SHARE = 0.25
BRATS_2021 = (1251, 440)                # training cases; slices with brain in each, of three planes
DEFAULT_RUN = (train_ddpm.STEPS * 16, 6119)     # slices seen, slices there are: 2.6 passes


def in_child(function, *inputs):
    """function(*inputs) in a forked child -> (what it returns: a float, MiB it adds). Call it
    before this process has computed anything."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        before = peak()
        os.write(sender, f"{function(*inputs)} {peak() - before}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        return map(float, (pipe.read() or "nan nan").split())


def sample_one(size, n_slices, calls):
    """Seconds to sample one volume at this picture size."""
    torch.manual_seed(0)
    denoiser = bs.Denoiser(devices.place_network(bs.UNet(around=1).eval(), CPU),
                           {"classes": torch.rand(2, 6, 4) + 0.1,
                            "atlas": torch.rand(2, 4, 32, 32, 32) + 0.1},
                           bs.cosine_alpha_bar(2.0), CPU)
    started = time.perf_counter()
    bs.sample_volume(denoiser, torch.ones(n_slices, size, size, dtype=torch.int64), (0,),
                     {**bs.SAMPLING, "steps": calls})
    return time.perf_counter() - started


def large_case(folder, size, n_slices):
    """A phantom enlarged to the grid of BraTS -> its Case."""
    phantoms.write_phantom(Path(folder) / "small", 0)
    scans, labels, _ = nifti.read_case(nifti.find_cases(Path(folder) / "small")[0])
    pick = np.ix_(*[np.linspace(0, n - 1, m).astype(int) for n,
                    m in zip(labels.shape, (size, size, n_slices))])
    writing.write_case(Path(folder) / "large", "BraTS-SYN-00000-000",
                       np.stack([scan[pick] for scan in scans]).astype(np.int16), labels[pick],
                       np.diag([192 / size, 192 / size, 154 / n_slices, 1.0]),
                       {"SyntheticData": "YES"})
    return nifti.find_cases(Path(folder) / "large")[0]


def segment_one(case, size):
    """Seconds to segment a case that has been read, on slices of this size, whole volume on its own
    grid."""
    torch.manual_seed(0)
    segmenter = metrics.Segmenter(devices.place_network(bs.ResUNet().eval(), CPU), size, 240.0, CPU)
    got = slices.prepare_case(case, size, 240.0, "tumour")
    started = time.perf_counter()
    segmenter.segment(got)
    return time.perf_counter() - started


def seconds_of(function, times=3):
    """Median seconds a call takes."""
    out = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        out.append(time.perf_counter() - started)
    return median(out)


def step_time(size, batch, width, steps):
    """Median seconds of a training step of the generator, and its FLOP."""
    torch.manual_seed(0)
    net = devices.place_network(bs.UNet(width=width, around=1), CPU)
    batch_of = [torch.randn(batch, 12, size, size), torch.randint(1, bs.T, (batch,)),
                torch.zeros(batch, 5, size, size), torch.zeros(batch, 2)]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        inputs = [torch.empty_like(part, device="meta") for part in batch_of]
        bs.UNet(width=width, around=1)(*inputs).sum().backward()
    optimizer = bs.make_optimizer(net, 1e-4, CPU, hidden=net.hidden())

    def step():
        with bs.fast_math(CPU):
            out = net(*batch_of)
        (out.float() ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return seconds_of(step, steps), counter.get_total_flops()


def exponent(points):
    """The b of seconds ~ x^b through points [(x, seconds)], by least squares of logarithms."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def main():
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of BraTS cases; the first one is used")
    parser.add_argument("--tiny", action="store_true", help="small sizes: whether it runs")
    args = parser.parse_args()
    devices.pick_device("cpu")
    sizes, n_slices, calls, large = ((16, 32), 4, 2, 32) if args.tiny else ((64, 128, 240), 155, 20,
                                                                            240)
    with tempfile.TemporaryDirectory() as scratch:
        # first what is forked
        volumes = [(size, *in_child(sample_one, size, n_slices, calls)) for size in sizes]
        case = nifti.find_cases(args.data)[0] if args.data else large_case(scratch, large, n_slices)
        print(f"| one volume of {n_slices} slices, {torch.get_num_threads()} threads | seconds | "
              "MiB |\n|---|---|---|")
        for size, seconds, memory in volumes:
            print(f"| sampled, {size}x{size}, {calls} calls a slice | {seconds:.1f} | {memory:.0f} "
                  "|")
        print(f"| segmented, {large}x{large}, without reading | {segment_one(case, large):.1f} | |")
        plain, ready = [seconds_of(lambda: what(case)) for what in (
            bench_check.plain, lambda case: slices.prepare_case(case, large, 240.0, "tumour"))]
        print(f"| from files to slices for the cache, {large}x{large} | {ready:.2f} | |\n"
              f"| the same files through nibabel alone | {plain:.2f} | |\n| ratio | "
              f"{ready / plain:.2f} | |")
    steps, base = (1, (16, 4, 32)) if args.tiny else (5, (64, 16, 64))
    rows = {"pixels a side": [(k, (k, base[1], base[2]))
                              for k in ((16, 32) if args.tiny else (32, 64, 96, 128, 192, 240))],
            "batch": [(k, (base[0], k, base[2])) for k in ((2, 4) if args.tiny
                                                           else (4, 8, 16, 32))],
            "width": [(k, (base[0], base[1], k)) for k in ((16, 32) if args.tiny
                                                           else (48, 64, 96, 128, 192))]}
    print("\n| training step over | ms | exponent |\n|---|---|---|")
    flops = {}
    for name, points in rows.items():
        times = []
        for k, setting in points:
            seconds, flops[setting] = step_time(*setting, steps)
            times.append((k, seconds))
        print(f"| {name} | " + ", ".join(f"{k}: {1e3 * value:.0f}" for k, value in times)
              + f" | {exponent(times):.2f} |", flush=True)
    largest = rows["pixels a side"][-1][1]
    per_slice, (cases, with_brain) = flops[largest] / largest[1], BRATS_2021
    passes = DEFAULT_RUN[0] / DEFAULT_RUN[1]
    total = per_slice * cases * with_brain * passes
    print(f"\non paper: {per_slice / 1e9:.1f} GFLOP a slice of {largest[0]}x{largest[0]}; {cases} "
          f"cases of {with_brain} slices, {passes:.1f} passes as in the default run: "
          f"{total / 1e15:.1f} PFLOP")
    for chip, rate in CHIPS.items():
        print(f"{chip}: {rate / 1e12:.0f} TFLOP/s promised, {SHARE:.0%} of it assumed: "
              f"{total / (SHARE * rate) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
