"""How fast a training step of the default generator is here, device by device and picture size by
picture size.

    python tests/bench_devices.py                                       the fastest device there is
    python tests/bench_devices.py --monai                               beside MONAI's
    DiffusionModelUNet, if monai
                                                                        and einops are installed
    python tests/bench_devices.py --resolutions 64 128 240 --compile    on a GPU
    PJRT_DEVICE=CPU python tests/bench_devices.py --device cpu xla      where torch_xla is installed

Prints    images and steps per second (median step), seconds the first step takes longer than that
          (compiling, choosing kernels), peak memory (on a GPU of this row; elsewhere of the process
          up to it), and which share of the device's own matrix product rate the step reaches
Compare   figures of one run only: machines are shared
"""
from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_peers
import brainsyn as bs
from kit import devices, files, pictures


def our_network():
    """(network, function of it and a batch that returns what it predicts); default sizes of
    train_ddpm.py."""
    return bs.UNet(around=1), lambda net, x_t, t, onehot, scalars: net(
        torch.cat([x_t] * 3, 1), t, onehot, scalars)


def monai_network():
    """MONAI's U-Net with as many channels a level and the same conditions, given as further input
    channels."""
    from monai.networks.nets import DiffusionModelUNet
    net = DiffusionModelUNet(2, 9, 4, num_res_blocks=(1, 1, 1), channels=(48, 96, 96),
                             num_head_channels=96, attention_levels=(False, False, True),
                             norm_num_groups=16)
    return net, lambda net, x_t, t, onehot, scalars: net(torch.cat([x_t, onehot], 1), t)


def product_rate(device, precision):
    """Multiplications and additions a second of a large matrix product, in the precision training
    uses."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if bs.uses_bf16(device, precision) else torch.float32
    a, b = devices.to_device(device, *torch.randn(2, size, size).to(dtype))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        product = a @ b
        devices.end_step(device, product)
        product[0, 0].cpu()
        times.append(time.perf_counter() - started)
    return 2 * size ** 3 / min(times)


def measure(name, make, device, args, resolution):
    """One row of the table for one network, device and picture size."""
    torch.manual_seed(0)
    net, call = make()
    onehot = bs.one_hot(torch.randint(0, 5, (args.batch, resolution, resolution)), 5)
    batch = [torch.randn(args.batch, 4, resolution, resolution),
             torch.randint(1, bs.T, (args.batch,)), onehot, torch.zeros(args.batch, 2)]
    # shapes alone: costs nothing
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        call(make()[0], *(torch.empty_like(part, device="meta") for part in batch)).sum().backward()
    net = devices.place_network(net, device)
    optimizer = bs.make_optimizer(net, 1e-4, device, net.hidden() if name == "ours" else ())
    trained, times = devices.prepare_training(net, optimizer, device), []
    if args.compile:
        trained = torch.compile(trained)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.steps + 1):
        started = time.perf_counter()
        inputs = devices.to_device(device, *batch)
        with bs.fast_math(device, args.precision):
            out = call(trained, *inputs)
        loss = ((out - inputs[0]) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        devices.end_step(device, loss)
        devices.to_host(loss)
        times.append(time.perf_counter() - started)
    step = statistics.median(times[1:])
    memory = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    rate, place = counter.get_total_flops() / step, devices.describe(device,
                                                                     args.precision).removeprefix(
        "device ")
    print(f"| {name} | {place} | {resolution} | " f"{pictures.count_parameters(net) / 1e6:.1f} | "
          f"{1 / step:.2f} | {args.batch / step:.1f} | {times[0] - step:.1f} | "
          f"{memory / 2 ** 30:.2f} | {rate / 1e9:.3g} | "
          f"{rate / product_rate(device, args.precision):.0%} |", flush=True)


def main():
    """The table, one row a network, device and picture size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", nargs="+", default=["auto"], choices=devices.DEVICES,
                        help="devices to time, in turn")
    parser.add_argument("--resolutions", nargs="+", type=int, default=[64], help="pixels a side")
    parser.add_argument("--batch", type=int, default=16, help="slices a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps after the first")
    parser.add_argument("--precision", default="auto", choices=devices.PRECISIONS,
                        help="of the layers' arithmetic")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--monai", action="store_true", help="also time MONAI's DiffusionModelUNet")
    args = parser.parse_args()
    print("| network | device | pixels | M parameters | steps/s | images/s | first step, more s | "
          "memory GiB | GFLOP/s | of a matrix product's |\n" + "|---" * 10 + "|")
    for device in [devices.pick_device(name) for name in args.device]:
        for resolution in args.resolutions:
            measure("ours", our_network, device, args, resolution)
            if args.monai and bench_peers.there("MONAI"):
                measure("MONAI", monai_network, device, args, resolution)


if __name__ == "__main__":
    files.run_script(main)
