"""How fast a training step and inference are beside the networks people would pick instead, in one
run.

    pip install -r requirements-bench.txt               the peers; one that is missing is left out
    python tests/bench_peers.py                         two cores: about ten minutes
    python tests/bench_peers.py --rounds 1 --scale 4    tiny pictures: whether it runs at all

Rows      our default networks, by AdamW like all others and, "with Muon", as train_ddpm.py trains;
          a plain U-Net of the same architecture as our generator, written out below, so that a
          later change which slows ours shows in the ratio; MONAI, diffusers,
          denoising-diffusion-pytorch and segmentation_models_pytorch, each as it comes (float32)
          and tuned (channels last, bfloat16 where that is fast, for MONAI and diffusers 16 channels
          a norm group)
Columns   median milliseconds of a training step (forward, loss, backward, clipping, optimiser) and
          of inference, with quartiles; parameters; GFLOP a step as torch counts them, GFLOP/s, and
          which share of what one large 3x3 convolution reaches, in the same precision, measured in
          between; peak memory of a process that does nothing else, less that of a process that only
          imports
Then      the share of our training loop outside the network, and ratios with what they are meant to
          reach
Compare   figures of one run only: machines are shared. All candidates take turns, round by round
"""
from __future__ import annotations

import argparse
import os
import pkgutil
import platform
import re
import resource
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import brainsyn as bs
from kit import devices, files, pictures, runs
import train_ddpm

# how the names of candidates begin: what is used of that library
PEERS = {"MONAI": "monai.networks.nets:DiffusionModelUNet", "diffusers": "diffusers:UNet2DModel",
         "denoising-diffusion-pytorch": "denoising_diffusion_pytorch:Unet",
         "segmentation_models_pytorch": "segmentation_models_pytorch:Unet"}
CHANNELS, CLASSES = len(bs.MODALITIES), len(bs.CONDITIONS["tumour"])


class PlainBlock(nn.Module):
    """A residual block as in brainsyn.py, without its ways of being fast."""

    def __init__(self, c_in, c_out, emb, groups):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(c_in // groups, c_in), nn.SiLU(),
                                   nn.Conv2d(c_in, c_out, 3, padding=1))
        self.affine, self.norm = nn.Linear(emb, 2 * c_out), nn.GroupNorm(c_out // groups, c_out)
        self.last = nn.Sequential(nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.affine(emb)[..., None, None].chunk(2, dim=1)
        return self.skip(x) + self.last(self.norm(self.first(x)) * (1 + scale) + shift)


class PlainAttention(nn.Module):
    """One round of self-attention over all pixels."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm, self.inner = nn.GroupNorm(channels // groups, channels), nn.Conv2d(channels, 3
                                                                                      * channels, 1)
        self.outer, self.heads = nn.Conv2d(channels, channels, 1), max(1, channels // 64)

    def forward(self, x):
        q, k, v = self.inner(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(
            -1, -2).unbind(1)
        return x + self.outer(F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(
            x.shape))


class PlainUNet(nn.Module):
    """The reference. patch, fine, one block a level and `peers` False: what bs.UNet computes, layer
    for layer. peers True: what MONAI and diffusers build, with attention around the lowest level's
    blocks, nearest neighbour and a convolution to go up, one skip more a level, nothing folded."""

    def __init__(self, width, mults, blocks, patch=1, fine=0, peers=False, groups=16):
        super().__init__()
        c, widths, emb = width, [width * m for m in mults], 4 * width
        self.patch, self.peers, self.inputs = patch, peers, CHANNELS + CLASSES + 2
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.enter, kept = nn.Conv2d(self.inputs * patch ** 2, width, 3, padding=1), [width] * peers
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, w in enumerate(widths):
            for _ in range(blocks):
                self.down.append(PlainBlock(c, w, emb, groups))
                if peers and i + 1 == len(widths):
                    self.down.append(PlainAttention(w, groups))
                self.down.append(nn.Identity())                             # "keep this one"
                kept.append(c := w)
            if i + 1 < len(widths):
                self.down.append(nn.Conv2d(c, c, 3, 2, 1))
                if peers:
                    self.down.append(nn.Identity())
                    kept.append(c)
        self.middle = nn.ModuleList([PlainBlock(c, c, emb, groups), PlainAttention(c, groups),
                                     PlainBlock(c, c, emb, groups)])
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(blocks + peers):
                self.up.append(PlainBlock(c + kept.pop(), w, emb, groups))
                c = w
                if peers and i + 1 == len(widths):
                    self.up.append(PlainAttention(w, groups))
            if i and peers:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2),
                                             nn.Conv2d(c, c, 3, padding=1)))
            elif i:
                self.up.append(nn.ConvTranspose2d(c, widths[i - 1], 2, 2))
                c = widths[i - 1]
        self.fine = None
        if fine:
            self.unfold = nn.Sequential(nn.GroupNorm(c // groups, c), nn.SiLU(),
                                        nn.Conv2d(c, fine * patch ** 2, 1))
            self.fine_in, self.fine = nn.Conv2d(self.inputs, fine, 3, padding=1), PlainBlock(fine,
                                                                                             fine,
                                                                                             emb,
                                                                                             groups)
            c = fine
        self.leave = nn.Sequential(nn.GroupNorm(c // groups, c), nn.SiLU(),
                                   nn.Conv2d(c, CHANNELS, 3, padding=1))

    def forward(self, x, t):
        emb = F.silu(self.time(bs.sinusoid(t, self.time[0].in_features)))
        h, kept = self.enter(F.pixel_unshuffle(x, self.patch)), []
        kept += [h] * self.peers
        for layer in self.down:
            if isinstance(layer, nn.Identity):
                kept.append(h)
            else:
                h = layer(h, emb) if isinstance(layer, PlainBlock) else layer(h)
        for layer in self.middle:
            h = layer(h, emb) if isinstance(layer, PlainBlock) else layer(h)
        for layer in self.up:
            h = layer(torch.cat([h, kept.pop()], 1), emb) if isinstance(layer,
                                                                        PlainBlock) else layer(h)
        if self.fine:
            h = self.fine(F.pixel_shuffle(self.unfold(h), self.patch) + self.fine_in(x), emb)
        return self.leave(h)


def monai(groups=32, channels=(32, 64, 128), inputs=CHANNELS + CLASSES):
    """MONAI's DiffusionModelUNet, conditioned by further input channels."""
    from monai.networks.nets import DiffusionModelUNet
    return DiffusionModelUNet(2, inputs, CHANNELS, num_res_blocks=2, channels=channels,
                              norm_num_groups=groups, attention_levels=(False, False, True),
                              num_head_channels=64)


def diffusers(groups=32, channels=(32, 64, 128), inputs=CHANNELS + CLASSES):
    """The UNet2DModel of diffusers."""
    from diffusers import UNet2DModel
    net = UNet2DModel(None, inputs, CHANNELS, block_out_channels=channels, layers_per_block=2,
                      norm_num_groups=groups, down_block_types=("DownBlock2D", "DownBlock2D",
                                                                "AttnDownBlock2D"),
                      attention_head_dim=64, up_block_types=("AttnUpBlock2D", "UpBlock2D",
                                                             "UpBlock2D"))
    return Answer(net, lambda out: out.sample)


def denoising_diffusion_pytorch(dim=32, inputs=CHANNELS + CLASSES):
    """lucidrains' Unet."""
    from denoising_diffusion_pytorch import Unet
    return Unet(dim, dim_mults=(1, 2, 4), channels=inputs, out_dim=CHANNELS)


class Answer(nn.Module):
    """A network of which a part of the answer is wanted."""

    def __init__(self, net, pick):
        super().__init__()
        self.net, self.pick = net, pick

    def forward(self, *inputs):
        return self.pick(self.net(*inputs))


def segmentation_models():
    """segmentation_models_pytorch's U-Net on a ResNet-34."""
    import segmentation_models_pytorch as smp
    return smp.Unet("resnet34", encoder_weights=None, in_channels=CHANNELS, classes=3)


# name: (function that makes it, what it is called with, whether tuned). "ours" gets (x_t, t,
# onehot, scalars), "concat" gets (channels joined, t), "scan" gets pictures alone.
CANDIDATES = {"ours": (bs.UNet, "ours", True), "ours, with Muon": (bs.UNet, "ours", True),
              "plain, same architecture": (lambda: PlainUNet(48, (1, 2, 2), 1, 4, 32), "place",
                                           True), "ours, patch 2": (lambda: bs.UNet(patch=2),
                                                                    "ours", True),
              "ours, nothing folded": (lambda: bs.UNet(width=32, mults=(1, 2, 4), blocks=2,
                                                       patch=1), "ours", True),
              "plain, MONAI's architecture": (lambda: PlainUNet(32, (1, 2, 4), 2, peers=True),
                                              "place", True), "MONAI": (monai, "concat", False),
              "MONAI tuned, 32 groups": (monai, "concat", True),
              "MONAI tuned": (lambda: monai(2), "concat", True),
              "diffusers": (diffusers, "concat", False),
              "diffusers tuned, 32 groups": (diffusers, "concat", True),
              "diffusers tuned": (lambda: diffusers(2), "concat", True),
              "denoising-diffusion-pytorch": (denoising_diffusion_pytorch, "concat", False),
              "denoising-diffusion-pytorch tuned": (denoising_diffusion_pytorch, "concat", True),}
SEGMENTERS = {
    "our segmenter": (bs.ResUNet, "scan", True),
    "our segmenter, ResNet-34": (lambda: bs.ResUNet(34), "scan", True),
    "segmentation_models_pytorch": (segmentation_models, "scan", False),
    "segmentation_models_pytorch tuned": (segmentation_models, "scan", True),
}


class Runner:
    """One candidate, ready to be timed: .train() and .infer() take one step and return seconds."""

    def __init__(self, name, size, batch):
        make, self.calls, self.tuned = {**CANDIDATES, **SEGMENTERS}[name]
        torch.manual_seed(0)
        self.net, device = make(), torch.device("cpu")
        self.bf16 = self.tuned and bs.uses_bf16(device)
        x, t = torch.randn(batch, CHANNELS, size, size), torch.randint(1, bs.T, (batch,))
        onehot = bs.one_hot(torch.randint(0, CLASSES, (batch, size, size)), CLASSES)
        self.inputs = {"ours": (x, t, onehot, torch.zeros(batch, 2)), "scan": (x,),
                       "concat": (torch.cat([x, onehot], 1), t),
                       "place": (torch.cat([x, onehot, torch.zeros(batch, 2, size, size)], 1), t)}[
            self.calls]
        if self.tuned:
            self.net = devices.place_network(self.net, device)
            self.inputs = [part.contiguous(memory_format=torch.channels_last) if part.ndim == 4
                           else part for part in self.inputs]
            self.optimizer = bs.make_optimizer(self.net, 1e-4, device, hidden=self.net.hidden()
                                               if name.endswith("with Muon") else ())
        else:
            # as their examples do
            self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.parameters, self.target = pictures.count_parameters(self.net), torch.randn_like(
            self.net(*self.inputs).detach())
        with FlopCounterMode(display=False) as counter:
            self.train()
        self.flops = counter.get_total_flops()

    def fast(self):
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()

    def train(self):
        started = time.perf_counter()
        with self.fast():
            out = self.net(*self.inputs)
        ((out.float() - self.target) ** 2).mean().backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def infer(self):
        self.net.eval()
        started = time.perf_counter()
        with torch.no_grad(), self.fast():
            self.net(*self.inputs)
        seconds = time.perf_counter() - started
        self.net.train()
        return seconds


class Convolution:
    """What the machine can do: forward and backward of one 3x3 convolution, 128 to 128 channels,
    channels last."""

    def __init__(self, bf16, size, batch):
        self.bf16 = bf16
        self.x = torch.randn(batch, 128, size, size).contiguous(
            memory_format=torch.channels_last).requires_grad_()
        self.conv = nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
        self.flops = 3 * 2 * 9 * 128 * 128 * batch * size ** 2

    def train(self):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            out = self.conv(self.x)
        out.backward(out.detach())
        return time.perf_counter() - started


def take_turns(runners, what, rounds, least=0.15):
    """{name: [median seconds of a step, one for each round]}: in a round every runner takes its
    turn, a step that is not counted and then as many as fill `least` seconds."""
    times = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            row = []
            # not counted: the network before has left its data in caches
            getattr(runner, what)()
            while sum(row) < least:
                row.append(getattr(runner, what)())
            times[name].append(median(row))
    return times


def spread(values):
    """median (quartile to quartile), in ms."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{1e3 * median(values):.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"


def there(name):
    """Whether the library of a candidate can be used; says so if not."""
    for start, place in PEERS.items():
        if name.startswith(start):
            try:
                pkgutil.resolve_name(place)
            except Exception as error:          # a library that does not fit raises what it likes
                print(f"left out: {name} ({type(error).__name__}: {error})")
                return False
    return True


def peak_memory(name, size, batch):
    """MiB that three training steps add to a process that has only imported: a forked child, before
    this process has computed anything."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        before, runner = peak(), Runner(name, size, batch)
        for _ in range(3):
            runner.train()
        os.write(writing, str(peak() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return float(pipe.read() or "nan")


def table(names, size, batch, args, memory):
    """Time all candidates at one picture size and print their rows -> {name: {"train": s, "infer":
    s}}."""
    runners = {name: Runner(name, size, batch) for name in names}
    limits = {f"{'bfloat16' if bf16 else 'float32'} convolution": Convolution(bf16, size, batch)
              for bf16 in {False, bs.uses_bf16(torch.device("cpu"))}}
    train = take_turns({**runners, **limits}, "train", args.rounds)
    infer = take_turns(runners, "infer", args.rounds)
    rate = {limit.bf16: limit.flops / median(train[name]) for name, limit in limits.items()}
    print(f"\n{size}x{size} pixels, {batch} a batch; one 3x3 convolution reaches "
          + ", ".join(f"{flops / 1e9:.0f} GFLOP/s in {'bfloat16' if bf16 else 'float32'}"
                      for bf16, flops in rate.items()))
    print("\n| network | M parameters | training step, ms | inference, ms | GFLOP a step | GFLOP/s "
          "| of the convolution | memory, MiB |\n" + "|---" * 8 + "|")
    shares = {}
    for name, runner in runners.items():
        speed = runner.flops / median(train[name])
        shares[name] = speed / rate[runner.bf16]
        print(f"| {name} | {runner.parameters / 1e6:.2f} | {spread(train[name])} | "
              f"{spread(infer[name])} | {runner.flops / 1e9:.0f} | {speed / 1e9:.0f} | "
              f"{shares[name]:.2f} | {memory[name, size]:.0f} |", flush=True)
    return {name: {"train": train[name], "infer": infer[name], "share": shares[name]}
            for name in names}


def outside_the_network(steps):
    """Which share of a run of train_ddpm.py is not forward, backward, clipping or optimiser: data,
    noise, EMA, log. Without checkpoints, of which a run writes one a minute."""
    inside = [0.0]

    def timed(function):
        def wrapped(*inputs, **more):
            started = time.perf_counter()
            out = function(*inputs, **more)
            inside[0] += time.perf_counter() - started
            return out
        return wrapped

    def keep_seconds(task, denoiser, run):
        seconds.append(run.seconds)

    prepare, seconds, folder = devices.prepare_training, [], Path.cwd()
    places = {(devices, "prepare_training"): lambda *inputs: timed(prepare(*inputs)),
              (devices, "step_if_finite"): timed(devices.step_if_finite),
              (runs, "save_checkpoint"): lambda *_: None,
              (torch.Tensor, "backward"): timed(torch.Tensor.backward),
              (nn.utils, "clip_grad_norm_"): timed(nn.utils.clip_grad_norm_),
              (train_ddpm.Images, "report"): keep_seconds}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as changed:
        for (where, name), new in places.items():
            changed.enter_context(mock.patch.object(where, name, new))
        os.chdir(scratch)
        try:
            train_ddpm.main(["--phantoms", "8", "--steps", str(steps), "--sample-every", "0",
                             "--device", "cpu"])
        finally:
            os.chdir(folder)
    return 1 - inside[0] / seconds[0]


# what is compared: (words, slower, faster, what, picture size, at least)
GOALS = [("MONAI, equal architecture", "MONAI", "plain, MONAI's architecture", "train", 64, 1.7),
         ("MONAI tuned with its own groups, equal architecture", "MONAI tuned, 32 groups",
          "plain, MONAI's architecture", "train", 64, 1.35),
         ("diffusers tuned with its own " "groups, equal architecture", "diffusers tuned, 32 "
          "groups", "plain, MONAI's architecture", "train", 64, 1.4),
         ("MONAI tuned, ours at about " "its parameters", "MONAI tuned", "ours, nothing folded",
          "train", 64, 1.3), ("MONAI, ours with nothing folded", "MONAI", "ours, nothing folded",
                              "train", 64, 2.1), ("MONAI, ours with nothing folded", "MONAI",
                                                  "ours, nothing folded", "train", 128, 2.5),
         ("MONAI, ours with nothing folded", "MONAI", "ours, nothing folded", "infer", 64, 2.3),
         ("MONAI, ours with nothing folded", "MONAI", "ours, nothing folded", "infer", 128, 2.6),
         ("MONAI, ours at patch 2 and its parameters", "MONAI", "ours, patch 2", "train", 64, 6),
         ("MONAI, ours at patch 2 and its parameters", "MONAI", "ours, patch 2", "train", 128, 8.5),
         ("denoising-diffusion-pytorch, ours with nothing folded", "denoising-diffusion-pytorch",
          "ours, nothing folded", "train", 64, 5), ("denoising-diffusion-pytorch, ours with "
                                                    "nothing folded", "denoising-diffusion-pytorch",
                                                    "ours, nothing folded", "infer", 64, 5.5),
         ("segmentation_models_pytorch, our ResNet-34", "segmentation_models_pytorch",
          "our segmenter, ResNet-34", "train", 128, 1.6),
         ("segmentation_models_pytorch, our " "ResNet-34", "segmentation_models_pytorch",
          "our segmenter, ResNet-34", "train", 256, 1.9),
         ("segmentation_models_pytorch, our " "ResNet-34", "segmentation_models_pytorch",
          "our segmenter, ResNet-34", "infer", 128, 2.1),
         ("segmentation_models_pytorch, our " "ResNet-34", "segmentation_models_pytorch",
          "our segmenter, ResNet-34", "infer", 256, 2.3),
         ("plain U-Net of our architecture, ours", "plain, same architecture", "ours", "train", 64,
          0.95), ("plain U-Net of our architecture, ours", "plain, same architecture", "ours",
                  "train", 128, 0.95), ("MONAI, our default (with Muon)", "MONAI",
                                        "ours, with Muon", "train", 64, None),
         ("MONAI tuned, our default (with Muon)", "MONAI tuned", "ours, with Muon", "train", 64,
          None),]


def ratios(measured, scale):
    """Print the table of ratios: median over rounds of slower / faster, round by round, and whether
    it is enough."""
    print("\n| how many times as fast as | what | pixels | ratio (quartiles) | meant to reach | |\n"
          + "|---" * 6 + "|")
    for words, slower, faster, what, size, least in GOALS:
        times = measured.get(size // scale, {})
        if slower in times and faster in times:
            ratio = [a / b for a, b in zip(times[slower][what], times[faster][what])]
            low, middle, high = quantiles(ratio, n=4) if len(ratio) > 1 else ratio * 3
            print(f"| {words} | {'training' if what == 'train' else 'inference'} | {size // scale} "
                  f"| {middle:.2f} ({low:.2f}-{high:.2f}) | {least or ''} | "
                  f"{'' if least is None else 'reached' if middle >= least else 'not reached'} |")


def main():
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="how often each takes its turn")
    parser.add_argument("--scale", type=int, default=1, help="pictures smaller by this factor")
    parser.add_argument("--steps", type=int, default=40, help="of the loop whose outside is "
                        "measured")
    parser.add_argument("--only", nargs="+", metavar="NETWORK", help="these alone, by their names "
                        "in the tables")
    args = parser.parse_args()
    devices.pick_device("cpu")
    versions = {}
    for name in ("torch", *(re.split("[.:]", place)[0] for place in PEERS.values())):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                  if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else ""
    fast = bs.uses_bf16(torch.device("cpu"))
    print(f"{platform.machine()} {model}, {torch.get_num_threads()} threads, "
          f"{'bfloat16 is fast' if fast else 'bfloat16 is not fast: tuned is float32'}; "
          + ", ".join(f"{name} {number}" for name, number in versions.items()))
    unknown = set(args.only or ()) - {*CANDIDATES, *SEGMENTERS}
    if unknown:
        raise bs.BadInput(f"no network {sorted(unknown)[0]!r}; there are "
                          f"{', '.join((*CANDIDATES, *SEGMENTERS))}")
    generators, segmenters = [[name for name in group if (not args.only or name in args.only)
                               and there(name)] for group in (CANDIDATES, SEGMENTERS)]
    rows = [(names, size // args.scale, batch) for names, size, batch in (
        (generators, 64, 16), (generators, 128, 8), (segmenters, 128, 8), (segmenters, 256, 8))]
    memory = {(name, size): peak_memory(name, size, batch) for names, size, batch in rows
              for name in names}
    measured = {}
    for names, size, batch in rows:
        measured.setdefault(size, {}).update(table(names, size, batch, args, memory))
    print("\nshare of our training loop outside the network: "
          f"{outside_the_network(args.steps):.1%} (meant: under 2%)")
    ratios(measured, args.scale)
    for name, size, least in (("ours, nothing folded", 64, 0.5),
                              ("our segmenter, ResNet-34", 256, 0.65)):
        if name in measured.get(size // args.scale, {}):
            its = measured[size // args.scale][name]["share"]
            print(f"of the convolution limit, {name} at {size // args.scale}: {its:.2f} (meant: "
                  f"{least}; {'reached' if its >= least else 'not reached'})")


if __name__ == "__main__":
    files.run_script(main)
