"""Quality after the same minutes: our generator, changes of it one at a time, and other libraries'
in their recipe.

    pip install -r requirements-bench.txt                           for the others
    python tests/bench_quality.py ours --minutes 2 5 15             one run for each (the rate falls
    with the length) python tests/bench_quality.py monai ddp --minutes 2 5 15        one run, looked
    at on the way; also monai-tuned,
                                                                    ddp-tuned; --lr for another
                                                                    learning rate
    python tests/bench_quality.py changes --minutes 2               every change of CHANGES, one run
    each python tests/bench_quality.py changes "width 96" "batch 8"      these alone python
    tests/bench_quality.py changes "batch 8" --words="--width 128"
                                                                    the same from another default
    python tests/bench_quality.py samplers --minutes 5              samplers and numbers of calls,
    with the generator
                                                                    that "ours" left
    python tests/bench_quality.py show                              tables and curves of all that
    lies in --out

Every run gets the same phantoms (or --data), slices, held-out slices and noise, on a machine that
does nothing else meanwhile; minutes are those in the training loop, looking not counted. Results
are added to results.jsonl in --out, pictures lie beside it.

Figures (192 slices with tumour of held-out test cases, 20 calls of DDIM each)
    x0 at .9 .5 .1 .01   mean squared error of x0_hat where that share of signal power is left, same
    noise for all
    Dice                 mean over WT, TC, ET of what a segmenter finds in the samples; on the scans
                         themselves it is printed once, beside them
    Frechet              distance in that segmenter's features, and the same between training and
                         held-out slices
    texture              sliced Wasserstein distance of small patches, and the same between training
                         and held-out slices
    fine, ET             fine_power of samples over that of scans; slices in which ET is brighter
    than brain on T1ce
The segmenter is trained once, by train_seg.py, into --out.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_peers
import brainsyn as bs
from kit import checks, devices, files, judging, pictures, runs, slices
import train_ddpm
import train_seg

LEVELS = (0.9, 0.5, 0.1, 0.01)
# what runs are compared by: 1 where less is better, -1 where more is
SIGNS = {"x0 at .9": 1, "x0 at .5": 1, "x0 at .1": 1, "x0 at .01": 1, "Dice": -1, "Frechet": 1,
         "texture": 1}


# ------------------------------------------------------------------------------------ looking ---


def some_slices(cache, part, count, condition):
    """`count` axial slices with tumour, spread evenly over a part of the cases: (x0, classes,
    place)."""
    first_lesion = bs.CONDITIONS[condition].index(bs.LABELS[0])
    return cache.batch(train_ddpm.pick_rows(cache, cache.part(part, [0]), first_lesion, count))


def x0_errors(denoiser, x0, classes, place):
    """{"x0 at .9": mean squared error, ...}. denoiser: function (x_t, t, onehot, scalars) -> v_hat
    with .alpha_bar and .net.classes."""
    onehot, out = bs.one_hot(classes, denoiser.net.classes), {}
    for level in LEVELS:
        t = (denoiser.alpha_bar - level).abs().argmin().expand(len(x0))
        signal, sigma = bs.signal_sigma(denoiser.alpha_bar, t)
        eps = torch.randn(x0.shape, generator=bs.generator(0, "quality", level))
        x_t = bs.add_noise(x0, eps, signal, sigma)
        x0_hat, _ = bs.split_v(x_t, denoiser(x_t, t, onehot, place), signal, sigma)
        out[f"x0 at {str(level)[1:]}"] = F.mse_loss(x0_hat, x0).item()
    return out


def look(denoiser, cache, args, condition="tumour", settings=None, picture=None):
    """All figures of a generator -> dict. Recorded rows are of 20 DDIM calls; settings: what to
    change in that."""
    x0, classes, place = some_slices(cache, "test", args.held, condition)
    figures = x0_errors(denoiser, x0, classes, place)
    settings = {**bs.SAMPLING, "sampler": "ddim", "steps": 20, **(settings or {})}
    made = bs.sample_guided(denoiser, bs.one_hot(classes, denoiser.net.classes), [place],
                            (0, "quality"), settings)
    segmenter = runs.load_segmenter(Path(args.out) / "seg", torch.device("cpu"))
    labels = bs.tumour_labels(classes, condition)
    real, ours = [segmenter.features(images) for images in (x0, made)]
    trained, trained_classes, _ = some_slices(cache, "train", args.held, condition)
    figures["Dice"] = float(np.mean(segmenter.slice_dice(made, labels)))
    figures["Dice on scans"] = float(np.mean(segmenter.slice_dice(x0, labels)))
    figures["Frechet"] = judging.frechet_distance(real, ours)
    figures["Frechet floor"] = judging.frechet_distance(real, segmenter.features(trained))
    scans = {"images": x0, "classes": classes}
    figures["texture"] = judging.texture_distance(scans, {"images": made, "classes": classes})
    figures["texture floor"] = judging.texture_distance(scans,
                                                        {"images": trained,
                                                         "classes": trained_classes})
    figures["fine"] = (judging.fine_power(made, classes) / judging.fine_power(x0, classes)).mean(
        ).item()
    figures["ET"], _ = judging.lesion_contrast(made, classes, condition, "t1ce", "ET")
    if picture:
        few = np.linspace(0, len(x0) - 1, 6).astype(int)
        pictures.plot_rows(picture, [[classes[i], *x0[i], None, *made[i]] for i in few],
                     ["labels", *(f"held-out\n{n}" for n in bs.MODALITIES), "",
                      *(f"SYNTHETIC\n{n}" for n in bs.MODALITIES)], condition, Path(picture).stem)
    return figures


def keep(args, name, minutes, steps, figures):
    """Add a row to results.jsonl and print it."""
    row = {"name": name, "minutes": round(minutes, 2), "steps": steps, "pixels": args.resolution,
           "data": "real" if args.data else "phantoms", "seed": args.seed, **figures}
    with open(Path(args.out) / "results.jsonl", "a") as handle:
        handle.write(json.dumps(row) + "\n")
    print(name, f"{minutes:.1f} minutes, {steps} steps:",
          " ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)


def common_words(args):
    """What all runs are called with."""
    data = ["--data", args.data] if args.data else ["--phantoms", str(args.phantoms)]
    return [*data, *(["--split", args.split] if args.split else []), "--resolution",
            str(args.resolution), "--device", "cpu", "--seed", str(args.seed)]


def prepare(args):
    """The data of all runs: cache, and the segmenter that judges, trained once."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    wanted = train_ddpm.parse_arguments([*common_words(args), "--out",
                                         str(Path(args.out) / "ours")])
    cases, split = checks.find_data(wanted)
    cache = slices.build_cache(cases, Path(args.out) / "cache", args.resolution, wanted.fov,
                               "tumour", split)
    if not (Path(args.out) / "seg" / "best.pt").exists():
        with mock.patch.object(train_seg, "finish_report", lambda *_: None):
            train_seg.main([*common_words(args), "--out", str(Path(args.out) / "seg"), "--steps",
                            str(args.seg_steps)])
    return cache


# --------------------------------------------------------------------------------------- ours ---


class AttendingBlock(bs.ResBlock):
    """A residual block with attention behind it, but for the one at full resolution."""

    def __init__(self, c_in, c_out, emb):
        super().__init__(c_in, c_out, emb)
        self.more = bs.Attention(c_out) if c_out >= 64 else nn.Identity()

    def forward(self, x, emb):
        return self.more(super().forward(x, emb))


def middle_levels(t):
    """Noise levels drawn with density 6 u (1 - u) of u = t / T, from evenly drawn ones: its
    quantile."""
    u = t.double() / bs.T
    return ((0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)) * bs.T).round().long().clamp(1, bs.T)


def chance(**fixed):
    """training_noise with some of its results replaced: name -> function of it."""
    original = bs.training_noise

    def changed(*inputs):
        got = dict(zip(("t", "eps", "keep", "mirror"), original(*inputs)))
        return tuple({**got, **{name: change(got[name]) for name,
                                change in fixed.items()}}.values())
    return {"training_noise": changed}


def plain_prior(*inputs, original=bs.measure_prior):
    """The prior without the mean brain."""
    return {"classes": original(*inputs)["classes"]}


def without_outline(classes, n, original=bs.one_hot):
    """Label maps that show tumours and nothing else; where there is none the prior knows nothing
    either."""
    onehot = original(classes, n)
    onehot[:, :2] = 0
    return onehot


def optimiser(original=bs.make_optimizer, **settings):
    """make_optimizer with other settings, as AdamW names them."""
    def make(*inputs):
        optimizer = original(*inputs)
        for group in optimizer.param_groups:
            group.update(settings)
        return optimizer
    return {"make_optimizer": make}


def adamw(net, lr, device, hidden=(), original=bs.make_optimizer):
    """make_optimizer with AdamW for the weights inside too."""
    return original(net, lr, device)


def faster(factor, original=bs.orthogonal):
    """The weights inside learn `factor` times as fast, the others as before."""
    return {"orthogonal": lambda matrices, steps=5: original(matrices, steps) * factor}


class AskedTwice(bs.UNet):
    """Also gets its own first answer at the same x_t: half of all training batches, and every call
    in sampling, ask twice. Near to self-conditioning (Chen et al. 2022, arXiv 2208.04202), which
    takes the answer of the step before."""

    def __init__(self, channels=4, **words):
        super().__init__(channels=2 * channels, **words)
        self.conv_out = bs.zero_init(nn.Conv2d(self.conv_out.in_channels, channels, 3, padding=1))
        self.channels, self.calls = channels, 0

    def forward(self, x_t, t, onehot, scalars):
        first, self.calls = torch.zeros_like(x_t), self.calls + 1
        if not self.training or self.calls % 2:
            with torch.no_grad():
                first = super().forward(torch.cat([x_t, first], 1), t, onehot, scalars).to(
                    x_t.dtype)
        return super().forward(torch.cat([x_t, first], 1), t, onehot, scalars)


def early(share, what):
    """Names of brainsyn.py and the kit replaced so that the first `share` of a run sees halved
    pictures, or a quarter of every batch, as `what` says."""
    so_far, rows, rate, move = [0.0], [], bs.learning_rate, devices.to_device

    def noted(peak, progress, step):
        if so_far[0] < share <= progress:
            rows.extend(range(len(rows), 4 * len(rows)))
        so_far[0] = progress
        return rate(peak, progress, step)

    def halved(device, *tensors):
        # means, but for noise (the third): that keeps its spread
        if so_far[0] < share:
            tensors = [part if part.ndim < 4 or part.shape[-1] == 1
                       else part[..., ::2, ::2] if i == 2 else F.avg_pool2d(part, 2)
                       for i, part in enumerate(tensors)]
        return move(device, *tensors)

    def quarter(batch):
        so_far[0], rows[:] = 0.0, range(batch // 4)
        return rows                             # indexes every batch; grows later
    names = {"halved pictures": {"to_device": halved}, "quarter batch": {"slice_of_batch": quarter}}
    return {"learning_rate": noted, **names[what]}


class MovedCache(slices.Cache):
    """Training slices are turned, scaled and shifted at random, as the segmenter's are."""

    def batch(self, rows, mirror=None, around=0):
        x0, classes, place = super().batch(rows, mirror)
        if mirror is not None:
            bs.AUGMENT["moved"] = {**bs.AUGMENT["standard"], "gamma": 0, "contrast": 0, "noise": 0}
            x0, classes = bs.augment(x0, classes, "moved", ("moved", *map(int, rows)))
            x0 = torch.where(classes[:, None] > 0, x0, -1.0)        # interpolated edges
        return x0, classes, place


# A change of the default: (words added to the command line, names of brainsyn.py and the kit
# replaced).
CHANGES = {"default": ("", {}), "AdamW": ("", {"make_optimizer": adamw}),
           "AdamW, betas 0.9 0.95": ("", optimiser(adamw, betas=(0.9, 0.95))),
           "width 128, AdamW": ("--width 128", {"make_optimizer": adamw}),
           "width 96, AdamW": ("--width 96", {"make_optimizer": adamw}),
           "width 64": ("--width 64", {}),
           "width 96": ("--width 96", {}), "width 128": ("--width 128", {}),
           "one level more (1 2 2 2)": ("--mults 1 2 2 2", {}),
           "one level less (1 2)": ("--mults 1 2", {}), "two blocks a level": ("--blocks 2", {}),
           "nothing folded, width 32 64 128": ("--patch 1 --width 32 --mults 1 2 4", {}),
           "patch 2, width 48 96 192 192": ("--patch 2 --width 48 --mults 1 2 4 4", {}),
           "patch 2, width 32 64 128 128": ("--patch 2 --width 32 --mults 1 2 4 4", {}),
           "patch 2, width 64 128 256": ("--patch 2 --width 64 --mults 1 2 4", {}),
           "no attention": ("", {"Attention": nn.Identity}),
           "attention after every block": ("", {"ResBlock": AttendingBlock}),
           "lr 1e-3": ("--lr 1e-3", {}), "lr 4e-3": ("--lr 4e-3", {}),
           "lr constant": ("", {"learning_rate": lambda peak, progress, step, warmup=50: peak
                                * min(1, (step + 1) / warmup)}),
           "Muon half as fast": ("", faster(0.5)), "Muon twice as fast": ("", faster(2)),
           "batch 8": ("--batch 8", {}), "batch 32": ("--batch 32", {}),
           "shift 1": ("--shift 1", {}), "shift 4": ("--shift 4", {}),
           "levels in the middle": ("", chance(t=middle_levels)),
           "EMA 0.99": ("--ema 0.99", {}), "EMA 0.9999": ("--ema 0.9999", {}),
           "no mirroring": ("", chance(mirror=lambda it: it & False)),
           "nothing dropped": ("--drop 0", {}), "no outline": ("", {"one_hot": without_outline}),
           "no mean brain": ("", {"measure_prior": plain_prior}),
           "all slices alike (tumour share 0.37)": ("--tumour-share 0.37", {}),
           "asked twice": ("", {"UNet": AskedTwice}), "first 0.4 of the time at half size": ("",
                                                                                             early(
    0.4, "halved pictures")), "first 0.25 of the time with batches of 4": ("",
                                                                           early(0.25,
                                                                                 "quarter batch")),
           "slices moved": ("", {"Cache": MovedCache}),
           "tissue labels": ("--condition tissue", {}),}


def run_ours(args, name, minutes, words="", names=None, loud=True):
    """Train by train_ddpm.py with these words, these names of brainsyn.py or the kit replaced;
    look; keep. Only loud runs leave checkpoints."""
    condition = "tissue" if "--condition tissue" in f"{args.words} {words}" else "tumour"
    name = f"{name} {args.words}".strip()
    seed = f"-seed{args.seed}" if args.seed else ""
    words_of_name = name.replace(" ", "_").replace(",", "")
    out = Path(args.out) / f"{'run' if loud else 'change'}-{words_of_name}-{minutes:g}{seed}"
    # a run of before would be resumed, that is, not run at all
    shutil.rmtree(out, ignore_errors=True)

    def report(task, denoiser, run):
        picture = Path(args.out) / f"{name.replace(' ', '_')}_{minutes:g}.png"
        keep(args, name, run.seconds / 60, run.step,
             look(denoiser, task.cache, args, condition, picture=picture))

    names = {**(names or {}), "report": report}
    if not loud:
        names["save_checkpoint"] = lambda *_: None
    with ExitStack() as replaced:
        for word, value in names.items():
            home = next(place for place in (train_ddpm.Images, bs, devices, slices, runs)
                        if hasattr(place, word))
            replaced.enter_context(mock.patch.object(home, word, value))
        # slices alone, as other libraries' networks see them
        train_ddpm.main([*common_words(args), "--out", str(out), "--sample-every", "0", "--around",
                         "0", "--minutes", str(minutes), *args.words.split(), *words.split()])


# -------------------------------------------------------------------------------------- peers ---


class PeerDenoiser:
    """Another library's network as our samplers want one. alpha_bar (T + 1,): theirs, with 1 in
    front. predicts: "v" or "eps"."""

    def __init__(self, net, alpha_bar, predicts, fast):
        self.net, self.alpha_bar, self.predicts, self.fast = net, alpha_bar, predicts, fast
        net.classes, net.channels, net.around = bench_peers.CLASSES, bench_peers.CHANNELS, 0

    @torch.no_grad()
    def __call__(self, x_t, t, onehot, scalars, batch=32):
        out = []
        for x, part_t, part_onehot, part_scalars in zip(
                *(tensor.split(batch) for tensor in (x_t, t, onehot, scalars))):
            with self.fast():
                out.append(self.net(conditioned(x, part_onehot, part_scalars[:, 0]),
                                    (part_t - 1).clamp(min=0)).float())
        out = torch.cat(out)
        if self.predicts == "v":
            return out
        signal, sigma = bs.signal_sigma(self.alpha_bar, t)
        return (out - sigma * x_t) / signal


def conditioned(x_t, onehot, position):
    """All that a network gets, as channels: noisy pictures, label map, position."""
    return torch.cat([x_t, onehot, position.view(-1, 1, 1, 1).expand(-1, 1, *x_t.shape[2:])], 1)


def monai_recipe(args, tuned):
    """MONAI's network of 3.9 M parameters. As its 2-D tutorials train it: DDPMScheduler, noise
    predicted, Adam (1e-4 where they have 2.5e-5, which learns next to nothing in minutes), float32.
    Tuned: v predicted, 16 channels a norm group, channels last, bfloat16, AdamW with warm-up and
    half a cosine, EMA."""
    from monai.networks.schedulers import DDPMScheduler
    scheduler = DDPMScheduler(bs.T, prediction_type="v_prediction" if tuned else "epsilon")
    net = bench_peers.monai(2 if tuned else 32, inputs=bench_peers.CHANNELS + bench_peers.CLASSES
                            + 1)
    alpha_bar = torch.cat([torch.ones(1), scheduler.alphas_cumprod]).double()

    def loss(net, x0, onehot, position, fast):
        t, eps = torch.randint(0, bs.T, (len(x0),)), torch.randn_like(x0)
        x_t = scheduler.add_noise(x0, eps, t)
        with fast():
            out = net(conditioned(x_t, onehot, position), t)
        return F.mse_loss(out.float(), scheduler.get_velocity(x0, eps, t) if tuned else eps)

    return net, alpha_bar, "v" if tuned else "eps", loss, None


def ddp_recipe(args, tuned):
    """denoising-diffusion-pytorch: its GaussianDiffusion and the settings of its Trainer (v
    predicted, sigmoid schedule, Adam 1e-4, batch 16, its EMA). Tuned: every noise level weighs the
    same (its own weight is the share of signal power, which hardly trains noisy levels), channels
    last, bfloat16, AdamW with warm-up and half a cosine."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA
    net = bench_peers.denoising_diffusion_pytorch(inputs=bench_peers.CHANNELS + bench_peers.CLASSES
                                                  + 1)

    class Conditioned(nn.Module):               # GaussianDiffusion knows pictures only
        channels = out_dim = bench_peers.CHANNELS
        self_condition, given = False, None

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, x_self_cond=None):
            with self.fast():
                return self.net(conditioned(x, *self.given), t).float()

    model = Conditioned()
    diffusion = GaussianDiffusion(model, image_size=args.resolution)
    if tuned:
        diffusion.loss_weight.fill_(1)
    alpha_bar = torch.cat([torch.ones(1), diffusion.alphas_cumprod.cpu()]).double()

    def loss(_, x0, onehot, position, fast):
        model.given, model.fast = (onehot, position), fast
        return diffusion.p_losses(x0, torch.randint(0, bs.T, (len(x0),)))

    return net, alpha_bar, "v", loss, EMA(net, beta=0.995, update_every=10)


# name: (recipe, whether tuned, learning rate: tuned the best after two minutes of 1e-3 and 3e-3)
RECIPES = {"monai": (monai_recipe, False, 1e-4), "monai-tuned": (monai_recipe, True, 3e-3),
           "ddp": (ddp_recipe, False, 1e-4), "ddp-tuned": (ddp_recipe, True, 3e-3)}
LIBRARIES = {"monai": "MONAI", "ddp": "denoising-diffusion-pytorch"}


def run_peer(args, name, cache):
    """Train another library's network for the longest of the minutes, looking at the others on the
    way. Tuned runs have a rate that falls: one run for each of the minutes."""
    recipe, tuned, lr = RECIPES[name]
    lr = args.lr or lr
    for minutes in [[m] for m in args.minutes] if tuned else [sorted(args.minutes)]:
        torch.manual_seed(args.seed)
        device = torch.device("cpu")
        net, alpha_bar, predicts, loss, average = recipe(args, tuned)
        fast = (lambda: bs.fast_math(device)) if tuned else nullcontext
        if tuned:
            net = devices.place_network(net, device)
            optimizer, ours = bs.make_optimizer(net, lr, device), bs.EMA(net)
        else:
            optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99) if average
                                         else (0.9, 0.999))
        rows, seconds, step, left = cache.part("train", [0]), 0.0, 0, list(minutes)
        with_tumour = slices.has_label(cache, rows, 2)
        size = pictures.count_parameters(net) / 1e6
        print(f"{name}: {size:.1f} M parameters, lr {lr:g}", flush=True)
        while left:
            started = time.time()
            drawn = bs.batch_rows(rows[with_tumour], rows[~with_tumour], 0.5, args.seed, step, 16)
            x0, classes, place = cache.batch(drawn, torch.rand(16) < 0.5)
            position = place[:, 0]
            for group in optimizer.param_groups:
                group["lr"] = bs.learning_rate(lr, seconds / (60 * left[-1]), step) if tuned else lr
            loss(net, x0, bs.one_hot(classes, bench_peers.CLASSES), position, fast).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if tuned:
                ours.update(net, step)
            elif average:
                average.update()
            seconds += time.time() - started
            if seconds >= 60 * left[0]:
                best = ours.copy_of(net, step) if tuned else average.ema_model if average else net
                best.eval()
                label = name + (f" lr {lr:g}" if args.lr else "")
                keep(args, label, seconds / 60, step, look(
                    PeerDenoiser(best, alpha_bar, predicts, fast), cache, args,
                    picture=Path(args.out) / f"{label.replace(' ', '_')}_{left[0]:g}.png"))
                net.train()
                left.pop(0)


# ------------------------------------------------------------------------------------ showing ---


def samplers(args, cache):
    """Quality of the generator that "ours" trained for --minutes, over samplers, calls and
    guidance."""
    denoiser, state = runs.load_generator(Path(args.out) / f"run-ours-{args.minutes[0]:g}",
                                          torch.device("cpu"))
    grid = [{"sampler": sampler, "steps": steps, "eta": 0.0} for steps in (5, 10, 20, 50, 250)
            for sampler in ("ddim", "dpmpp", "ddpm")]
    grid += [{"guidance": scale} for scale in (1.5, 2.0, 3.0)]
    for settings in grid:
        name = "sampler " + " ".join(str(value) for value in settings.values() if value != 0.0)
        keep(args, name, state["seconds"] / 60, state["step"],
             look(denoiser, cache, args, settings=settings, picture=Path(args.out)
                  / f"{name.replace(' ', '_')}.png"))


def show(args):
    """Tables and curves.png of results.jsonl; x0 errors in units of 1e-4."""
    rows = [json.loads(line) for line in open(Path(args.out) / "results.jsonl")]
    for row in rows:
        row["name"] += f", seed {row['seed']}" if row["seed"] else ""
    print("| what | minutes | steps | x0 error x 10^4 at "
          f"{' / '.join(str(level)[1:] for level in LEVELS)} | Dice | Frechet | texture | fine | "
          "ET |\n" + "|---" * 9 + "|")
    for row in sorted(rows, key=lambda row: (row["name"].startswith("sampler"),
                                             round(row["minutes"]), row["x0 at .1"])):
        errors = " / ".join(f"{1e4 * row[f'x0 at {str(level)[1:]}']:.1f}" for level in LEVELS)
        print(f"| {row['name']} | {row['minutes']:.0f} | {row['steps']} | {errors} | "
              + " | ".join(f"{row[name]:.3f}" for name in ("Dice", "Frechet", "texture", "fine",
                                                           "ET")) + " |")
    print(f"on the scans themselves: Dice {rows[0]['Dice on scans']:.3f}; training against "
          f"held-out slices: Frechet {rows[0]['Frechet floor']:.3f}, texture "
          f"{rows[0]['texture floor']:.3f}")
    curves = {}
    for row in sorted(rows, key=lambda row: row["minutes"]):
        if row["name"] in ("ours", *RECIPES):
            curves.setdefault(row["name"], []).append(row)
    mine = curves.get("ours", [])
    for run, line in curves.items():
        if run == "ours" or not mine:
            continue
        best, reached = line[-1], []
        for name, sign in SIGNS.items():
            minutes = [row["minutes"] for row in mine if sign * row[name] <= sign * best[name]]
            reached.append(f"{name}: {minutes[0]:.0f} minutes" if minutes else f"{name}: none")
        print(f"{run} after {best['minutes']:.0f} minutes; the first run of ours that is no worse: "
              + ", ".join(reached))
    curves = {run: line for run, line in curves.items() if len(line) > 1}
    panels = [(name, "log" if SIGNS[name] > 0 else "linear",
               {run: ([row["minutes"] for row in line], [row[name] for row in line])
                for run, line in curves.items()}) for name in ("x0 at .5", "x0 at .1", "Dice",
                                                               "Frechet")]
    if curves:
        pictures.plot_lines(Path(args.out) / "curves.png", panels, "minutes")
        print(f"wrote: {Path(args.out) / 'curves.png'}")


def main():
    """What is asked for, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", nargs="+", help="ours, " + ", ".join(RECIPES)
                        + ", samplers, show; or changes, and names " "of changes")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0], help="of training")
    parser.add_argument("--out", default="runs/quality", help="output folder")
    parser.add_argument("--data", help="folder of BraTS cases in place of phantoms")
    parser.add_argument("--split", help="as train_ddpm.py")
    parser.add_argument("--phantoms", type=int, default=60, help="how many phantoms")
    parser.add_argument("--resolution", type=int, default=64, help="pixels a side")
    parser.add_argument("--lr", type=float, help="learning rate of the other libraries' networks")
    parser.add_argument("--words", default="", help="for train_ddpm.py in every run of ours, one "
                        "string")
    parser.add_argument("--held", type=int, default=192, help="held-out slices looked at")
    parser.add_argument("--seg-steps", type=int, default=1200, help="of the segmenter that judges")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == ["show"]:
        return show(args)
    devices.pick_device("cpu")
    cache, first = prepare(args), args.what[0]
    if first == "changes":
        unknown = set(args.what[1:]) - set(CHANGES)
        if unknown:
            raise bs.BadInput(f"no such change: {sorted(unknown)[0]}; there are "
                              f"{', '.join(CHANGES)}")
        for name in args.what[1:] or CHANGES:
            for minutes in args.minutes:
                run_ours(args, name, minutes, *CHANGES[name], loud=False)
        return None
    for what in args.what:
        if what == "ours":
            for minutes in args.minutes:
                run_ours(args, "ours", minutes)
        elif what == "samplers":
            samplers(args, cache)
        elif what in RECIPES:
            if bench_peers.there(LIBRARIES[what.removesuffix("-tuned")]):
                run_peer(args, what, cache)
        else:
            raise bs.BadInput(f"no such thing: {what}; see --help")


if __name__ == "__main__":
    files.run_script(main)
