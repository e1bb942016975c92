"""What a card does with this project, in under ten minutes.

    python tests/bench_gpu.py                               phantoms
    python tests/bench_gpu.py --data DIR                    real cases
    python tests/bench_gpu.py --sizes 16 --minutes 0.1 --phantoms 6     a CPU, to see that it runs

1   bench_devices.py: speed and memory of a training step, and its share of a matrix product's rate,
    at --sizes voxels a side
2   train_ddpm.py for --minutes at the first of these sizes, into --out: figures and pictures
3   one volume of each size drawn by an untrained network: seconds and memory
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import brainsyn as bs
from kit import devices, files


def draw(size, device):
    """Print seconds and memory of one volume of size^3 voxels."""
    net = devices.place_network(bs.UNet(around=1), device).eval()
    prior = {"classes": torch.rand(2, 6, 4) + 0.1, "atlas": torch.rand(2, 4, 32, 32, 32) + 0.1}
    denoiser = bs.Denoiser(net, prior, bs.cosine_alpha_bar(), device, 32, devices.to_device,
                           devices.result_to_host)
    classes = torch.ones(size, size, size, dtype=torch.long)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    bs.sample_volume(denoiser, classes, (0, "bench"))
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else float("nan")
    print(f"{size}^3 voxels: a volume in {seconds:.1f} s, {memory:.2f} GiB", flush=True)


def main():
    """The three parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of BraTS cases; phantoms without it")
    parser.add_argument("--sizes", nargs="+", default=["64", "96", "128"])
    parser.add_argument("--minutes", default="6", help="of training")
    parser.add_argument("--phantoms", default="60")
    parser.add_argument("--out", default="runs/gpu")
    args = parser.parse_args()
    data = ["--data", args.data] if args.data else ["--phantoms", args.phantoms]
    for script, *words in (("tests/bench_devices.py", "--resolutions", *args.sizes),
                           ("train_ddpm.py", *data, "--resolution", args.sizes[0], "--shift",
                            str(128 / int(args.sizes[0])), "--minutes", args.minutes, "--out",
                            args.out)):
        print("python", script, *words, flush=True)
        subprocess.run([sys.executable, ROOT / script, *words], check=True)
    device = devices.pick_device("auto")
    for size in map(int, args.sizes):
        draw(size, device)


if __name__ == "__main__":
    files.run_script(main)
