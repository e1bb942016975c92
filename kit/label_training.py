"""Learning to draw label maps on request: what the two networks of --generate labels learn from.
"""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import brainsyn as bs
from kit import judging, metrics, pictures, requests, runs


def label_maps(args, outlines, held, step_mm, hashes):
    """The maps of --label-maps in outlines (M, D, R, R) of training cases, without those that show
    a tumour of the cases held out (N, D, R, R) -> (volumes, names, hashes of the maps and of the
    outlines' cases)."""
    volumes, names, its, lost = requests.read_label_maps(args.label_maps, outlines, step_mm,
                                                         args.seed)
    near, _ = requests.nearest_tumour(volumes, held, args.condition)
    keep = ~(near > 0.9)
    print(f"label maps: {len(names)} in outlines of {len(outlines)} training cases, {lost:.1%} of "
          f"the tumours cut off; {int((~keep).sum())} show the tumour of a validation or test case "
          "(Dice above 0.9): left out", flush=True)
    kept = [i for i in range(len(names)) if keep[i]]
    return volumes[keep], [names[i] for i in kept], sorted({*hashes, *(its[i] for i in kept)})


def heads_to_learn(args, cache):
    """What both networks of labels learn from: relatives of the training volumes, made once, what
    they could be asked for, their blocks; and who they are."""
    names, depth, step_mm = bs.CONDITIONS[args.condition], args.resolution * 3 // 4, args.fov / args.resolution
    train, held = [requests.label_volumes(cache, parts, depth)
                   for parts in (("train",), ("val", "test"))]
    cases, hashes = [its["case"] for its in cache.cases if its["part"] == "train"], cache.hashes(
        "train")
    tall = [its["case"] for its in cache.cases if its["count"] * its["thickness"] > depth * step_mm]
    if tall:
        print(f"note: {len(tall)} heads ({tall[0]} for one) are taller than {depth * step_mm:.0f} "
              "mm, three quarters of --fov; their ends are cut off")
    if args.label_maps:
        train, cases, hashes = label_maps(args, train, held, step_mm, hashes)
    if not len(train):
        raise bs.BadInput(f"{args.label_maps}: every map shows the tumour of a validation or test "
                          "case; none is left")
    times = max(1, args.relatives // len(train))
    heads = torch.cat([requests.move_volumes(train, (args.seed, "moves", i)) if i else train
                       for i in range(times)])
    shown, who = (held[:12], "held-out") if len(held) else (train[:12], "training")
    measure = lambda volumes: torch.stack([requests.characteristics(its.long(), args.condition,
                                                                    step_mm) for its in volumes])
    return SimpleNamespace(names=names, step_mm=step_mm, train=train, cases=cases, hashes=hashes,
                           heads=heads, asked=measure(heads),
                           shares=requests.block_shares(heads, len(names)), shown=shown, who=who,
                           measure=measure)


def learn_heads(args, data):
    """The coarse network: blocks of a whole head from what is asked of it, as the loop sees them;
    see learn_images."""
    alpha_bar = bs.cosine_alpha_bar(args.shift)
    # (N, D' K, r, r)
    x_all = requests.head_pictures(data.shares)
    shown_asked = data.measure(data.shown)

    def draw_heads(step):
        return bs.endless(np.arange(len(data.heads)), (args.seed, "heads"), step * args.batch,
                          args.batch)

    def draw_batch(step):
        t, eps, keep, _, mirror = bs.training_noise(args.seed, step, (args.batch, *x_all.shape[1:]),
                                                    args.drop)
        open_ = torch.rand(args.batch, 2 + len(requests.ASKED),
                           generator=bs.generator(args.seed, "open", step))
        heads = draw_heads(step)
        x0 = torch.where(mirror.view(-1, 1, 1, 1), x_all[heads].flip(-1), x_all[heads])
        asked = data.asked[heads]                                           # (B, len(ASKED))
        # x points the other way
        asked[:, 3] *= torch.where(mirror, -1.0, 1.0)
        asked[requests.open_entries(open_) | (keep == 0).unsqueeze(1)] = torch.nan
        scalars = requests.head_scalars(asked)
        return (t, x0, eps, x0[:, :0], scalars, bs.min_snr_weight(alpha_bar, t, args.min_snr),
                *bs.signal_sigma(alpha_bar, t), *bs.expected(its.prior, x0[:, :0], scalars[:, 0]))

    def sample(denoiser, count):
        settings = {**bs.SAMPLING, "guidance": args.guidance}
        return torch.stack([requests.sample_shares(denoiser, args.condition, data.step_mm, asked,
                                                   (args.seed, "shown", i), settings) for i,
                            asked in enumerate(shown_asked[:count])])

    def draw(denoiser, step):
        pictures.draw_planes(Path(args.out) / f"sample_{step:06d}.png",
                             [[its.argmax(1)] for its in sample(denoiser, 3)],
                             [f"SYNTHETIC blocks, step {step}"], args.condition)

    def close(denoiser, pace):
        made, real = sample(denoiser, len(data.shown)), requests.block_shares(data.shown,
                                                                              len(data.names))
        pictures.draw_planes(Path(args.out) / "samples.png",
                             [[a.argmax(1), b.argmax(1)] for a, b in zip(real, made)][:6],
                             [f"{data.who}, blocks", "SYNTHETIC blocks"], args.condition)
        figures, ml = {}, (requests.BLOCK * data.step_mm) ** 3 / 1000
        for name in bs.LABELS:
            a, b = [its[:, :, data.names.index(name)].sum((1, 2, 3)) * ml for its in (real, made)]
            figures |= {f"{name}_error": (a - b).abs().mean().item(),
                        f"{name}_rank_correlation": metrics.rank_correlation(a.tolist(),
                                                                             b.tolist())}
        print(f"--- blocks as asked for by what {data.who} cases have")
        runs.report(args, {"steps": pace.step, "minutes": round(pace.seconds / 60, 2),
                      "heads": f"{len(made)} {data.who}", "sampler_calls": bs.SAMPLING["steps"],
                      **figures})

    its = SimpleNamespace(network={"channels": x_all.shape[1], "classes": 0, "scalars": 1
                                   + len(requests.ASKED), "patch": 1, "fine": 48},
                          prior=requests.label_prior(data.shares), draw_batch=draw_batch, draw=draw,
                          close=close, who=lambda step: [data.cases[i % len(data.cases)]
                                                         for i in draw_heads(step)],
                          words=f"blocks of {len(data.train)} training heads and of "
                          f"{len(data.heads) - len(data.train)} relatives")
    return its


def learn_voxels(args, data):
    """The fine network: voxels of a slab from what the blocks say, as the loop sees them; see
    learn_images."""
    count, slabs, k = *data.shares.shape[:2], len(data.names)
    alpha_bar, out = bs.cosine_alpha_bar(args.shift), Path(args.out)
    # head * D' + slab, those with brain
    rows = np.where((data.shares[:, :, 0].mean((2, 3)) < 0.99).flatten())[0]
    ill = (data.shares[:, :, data.names.index(bs.LABELS[0]):].sum((2, 3, 4)) > 0).flatten().numpy()[
        rows]

    def draw_slabs(step):
        return bs.batch_rows(rows[ill], rows[~ill], args.tumour_share, args.seed, step, args.batch)

    def draw_batch(step):
        size = data.heads.shape[-1]
        t, eps, _, _, mirror = bs.training_noise(args.seed, step,
                                                 (args.batch, requests.BLOCK * k, size, size), 0.0)
        heads, which = [torch.from_numpy(its) for its in np.divmod(draw_slabs(step), slabs)]
        # (B, BLOCK, R, R)
        voxels = data.heads.unflatten(1, (slabs, requests.BLOCK))[heads, which].long()
        x0 = 2 * bs.one_hot(voxels.flatten(0, 1), k).unflatten(0, (-1, requests.BLOCK)).flatten(1, 2) - 1
        # (B, BLOCK K, R, R)
        onehot = requests.slab_shares(data.shares[heads], which)
        x0, onehot = [torch.where(mirror.view(-1, 1, 1, 1), part.flip(-1), part)
                      for part in (x0, onehot)]
        open_ = torch.rand(args.batch, len(requests.ASKED),
                           generator=bs.generator(args.seed, "open", step)) < 0.3
        scalars = requests.slab_scalars(which, slabs, torch.where(open_, torch.nan,
                                                                  data.asked[heads]))
        return (t, x0, eps, onehot, scalars, bs.min_snr_weight(alpha_bar, t, args.min_snr),
                *bs.signal_sigma(alpha_bar, t), *bs.expected(its.prior, onehot, scalars[:, 0]))

    def sample(denoiser, count):
        coarse, _ = runs.load_generator(out.parent / "coarse", denoiser.device, kind="labels")
        model = requests.LabelGenerator(coarse, denoiser, args.condition, data.step_mm, data.asked)
        settings = {**bs.SAMPLING, "guidance": args.guidance}
        return torch.stack([requests.sample_labels(model, asked, (args.seed, "shown", i), settings,
                                                   drafts=1) for i,
                            asked in enumerate(data.measure(data.shown[:count]))])

    def draw(denoiser, step):
        pictures.draw_planes(out / f"sample_{step:06d}.png",
                             [[volume] for volume in sample(denoiser, 3)],
                             [f"SYNTHETIC, step {step}"], args.condition)

    def close(denoiser, pace):
        made, asked = sample(denoiser, len(data.shown)), data.measure(data.shown)
        pictures.draw_planes(out / "samples.png", list(zip(data.shown, made))[:6],
                             [data.who, "SYNTHETIC"], args.condition)
        figures = {"steps": pace.step, "minutes": round(pace.seconds / 60, 2),
                   "volumes": f"{len(made)} {data.who}", "sampler_calls": bs.SAMPLING["steps"]}
        for name, a, b in zip(requests.ASKED, asked.T, data.measure(made).T):
            both = ~torch.isnan(a + b)
            if both.any():
                figures |= {f"{name}_error": (a - b)[both].abs().mean().item(),
                            f"{name}_rank_correlation": metrics.rank_correlation(a[both].tolist(),
                                                                                 b[both].tolist())}
        near, own = [requests.nearest_tumour(its, data.heads, args.condition)[0]
                     for its in (made, data.shown)]
        print(f"--- label maps as asked for by what {data.who} cases have")
        runs.report(args, {**figures, **judging.judge_labels(made, data.shown, args.condition,
                                                        data.step_mm),
                      "nearest_training_tumour_dice": near.nanmean().item(),
                      "the_same_of_held_out_cases": own.nanmean().item() if data.who == "held-out"
                      else float("nan"), "copies": int((near > 0.9).sum())})

    its = SimpleNamespace(network={"channels": requests.BLOCK * k, "classes": requests.BLOCK * k,
                                   "scalars": 1 + len(requests.UNSEEN)},
                          prior={"shares": torch.tensor(0.1)}, draw_batch=draw_batch, draw=draw,
                          close=close, who=lambda step: [data.cases[i % len(data.cases)]
                                                         for i in draw_slabs(step) // slabs],
                          words=f"{len(rows)} slabs of {count} heads")
    return its
