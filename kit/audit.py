"""Are synthetic cases copies of training cases? Compared with real cases the generator never saw.

Four parts. A names pairs of a synthetic and a training case that are too alike. B counts how often
the nearest real case is a training case. C asks the generator whether it knows its training cases.
D plants copies (canaries) and counts how many of them A finds. Decoys are real cases that the
generator never saw.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import checks, files, judging, nifti, pictures, slices, writing


AUDIT_POSITIONS = np.linspace(-0.7, 0.7, 10).round(3)   # the slices of a case that are compared
# pixels a side they are compared at: 6 mm, where anatomy is and noise is not
AUDIT_SIZE = 32
AUDIT_LEVELS = (100, 300, 500, 700)     # t at which the denoising loss is measured
CANARIES = ("copy", "noise", "shift", "flip", "gamma", "blend")
LIMIT = 6.0                             # robust standard deviations beyond which a pair is named
CHANCE = 0.005                          # p below which a fraction or an AUC is more than chance


def audit_slices(prepared):
    """The slices of cases at AUDIT_POSITIONS: images float (N, P, C, R, R) in [-1, 1], classes
    int64 (N, P, R, R), positions float (N, P). prepared: what prepare_case returns, N times."""
    cases = []
    for got in prepared:
        rows = np.abs(got["position"][:, None] - AUDIT_POSITIONS).argmin(0)
        cases.append([got[name][rows] for name in ("images", "classes", "position")])
    images, classes, position = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*cases)]
    return bs.to_images(images), classes.long(), position


def audit_views(images, classes, condition):
    """What is compared of slices: images (N, P, C, R, R), classes (N, P, R, R) -> view float (N, P,
    C, S, S), its mask (N, P, 1, S, S), S <= AUDIT_SIZE. Only healthy brain counts, since the label
    map decides how alike two tumours are. Each modality of each slice is brought to mean 0 and
    standard deviation 1 inside the mask, so that gain and offset do not hide a copy."""
    size = min(AUDIT_SIZE, images.shape[-1])

    def pool(x):
        return F.adaptive_avg_pool2d(x.flatten(0, 1), size).unflatten(0, x.shape[:2])

    def mean(x):
        return (x * mask).sum((-2, -1), keepdim=True) / pixels

    healthy = judging.healthy_brain(classes, condition).float().unsqueeze(2)
    area = pool(healthy)
    mask = (area > 0.5).float()
    pixels = mask.sum((-2, -1), keepdim=True).clamp(min=1)
    view = pool(images * healthy) / area.clamp(min=1e-3)
    view = view - mean(view)
    return view / (mean(view ** 2).sqrt() + 1e-3) * mask, mask


def mean_head(view, mask):
    """The mean view at each position, left and right alike: view (N, P, C, S, S), mask (N, P, 1, S,
    S) -> (P, C, S, S). The sum of all views inside their masks and of their mirror images (last
    axis), divided by how many of the 2 N masks cover a pixel, plus 1: one empty head, so that there
    is no division by 0. What all heads share is no copy."""
    total, count = (view * mask).sum(0), mask.sum(0)
    return (total + total.flip(-1)) / (count + count.flip(-1) + 1)


def similarity(synthetic, real, head):
    """How alike slices are: synthetic, real (view, mask) of N and M cases, head from mean_head ->
    (N, P, M) in [-1, 1].

    The correlation of two views less the mean head, over all modalities and the pixels that are
    healthy in both; the best over left-right flip, shifts of one pixel, and the real case's slices
    at this position and the two beside it.
    """
    def flat(x):
        return x.transpose(0, 1).flatten(2)                                     # (P, N, pixels)

    (x, x_mask), (y, y_mask) = [((view - head) * mask, mask) for view, mask in (synthetic, real)]
    y, y_power, y_mask = flat(y), flat((y ** 2).sum(2)), flat(y_mask)
    best = torch.full((x.shape[1], len(x), y.shape[1]), -1.0)
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    for axes in ((), (-1,)):                                                    # as it is, flipped
        for shift in shifts:
            a, a_mask = [torch.roll(z.flip(axes), shift, (-2, -1)) for z in (x, x_mask)]
            a, a_power, a_mask = flat(a), flat((a ** 2).sum(2)), flat(a_mask)
            for along in (-1, 0, 1):
                here = slice(max(0, -along), len(a) - max(0, along))
                there = slice(max(0, along), len(a) + min(0, along))
                product = a[here] @ y[there].mT
                power = (a_power[here] @ y_mask[there].mT) * (a_mask[here] @ y_power[there].mT)
                best[here] = torch.maximum(best[here], product / power.clamp(min=1e-9).sqrt())
    return best.transpose(0, 1)


def robust(values):
    """Median and robust standard deviation of a tensor's values, tensors (): 1.4826 times the
    median distance from the median, which is the standard deviation if they are Gaussian, plus
    1e-6. Medians as torch.median takes them."""
    middle = values.median()
    return middle, 1.4826 * (values - middle).abs().median() + 1e-6


class CopyFinder:
    """Part A: names pairs of a synthetic and a training case that are too alike.

    alike (N, P, M): from similarity, of the synthetic cases; among (M, P, M): of the real cases to
    each other; training bool (M,): which of the M real cases were trained on, the others are
    decoys; own (N, M) bool: which real cases lent a synthetic case its label map or outline. Such a
    pair must be alike, so it is left out here (part C looks at it).

    The score of a synthetic case is the largest of three numbers, in robust standard deviations,
    LIMIT at most: how much nearer the nearest training case is than the nearest decoy, for single
    slices and for whole cases (mean over slices), where the spread is that of all cases, each real
    one compared with all others; and how near the nearest training case is, where the spread is
    that of real cases, which shows when most of the set are copies. With few cases a spread is
    uncertain: that of whole cases is taken to be no less than independent slices had.

    found: what scores says of the synthetic cases.
    """

    def __init__(self, alike, among, training, own):
        self.training = training
        alike = alike.masked_fill(own[:, None], -1)
        # no case is its own neighbour
        among = among.masked_fill(torch.eye(len(among), dtype=torch.bool)[:, None], -1)
        everyone = torch.cat([alike, among])
        self.by_slice = robust(self.nearer(everyone))
        least = self.by_slice[1] / alike.shape[1] ** 0.5
        whole, nearest = self.nearer(everyone.mean(1)), among.mean(1)[:, training].amax(-1)
        self.by_case, self.near = [(middle, torch.maximum(spread, least))
                                   for middle, spread in (robust(whole), robust(nearest))]
        self.found = self.scores(alike)

    def nearer(self, alike):
        """Similarity to the nearest training case less that to the nearest decoy: (..., M) ->
        (...,)."""
        return alike[..., self.training].amax(-1) - alike[..., ~self.training].amax(-1)

    def scores(self, alike):
        """For each of N cases: score (the largest of the three numbers), slice (the most telling
        one), pair (which of the M real cases it is nearest to)."""
        def deviations(values, middle, spread):
            return (values - middle) / spread

        members, whole = torch.where(self.training)[0], alike.mean(1)
        by_slice = deviations(self.nearer(alike), *self.by_slice)               # (N, P)
        by_case = deviations(self.nearer(whole), *self.by_case)
        near = deviations(whole[:, members].amax(-1), *self.near)
        best = by_slice.argmax(1)
        of_slice = alike[torch.arange(len(alike)), best][:, members].argmax(-1)
        of_case = whole[:, members].argmax(-1)
        by_slice, whole_score = by_slice.amax(1), torch.maximum(by_case, near)
        pair = members[torch.where(whole_score > by_slice, of_case, of_slice)]
        return {"score": torch.maximum(by_slice, whole_score), "slice": best, "pair": pair}


def nearer_share(alike, training, draws=10, permutations=400, seed=0):
    """Part B: in which fraction of the N P synthetic slices the nearest real case is a training
    case and no decoy: 0.5 if nothing leaked -> (fraction, p). alike (N, P, M): from similarity;
    training bool (M,): which of the real cases were trained on. Of the larger group as many as the
    smaller one has are drawn, without replacement, `draws` times, and fractions averaged; ties
    count half. p: (1 + k) / (1 + permutations), where k of so many fractions are as high when
    `training` is shuffled. Chance: numpy's default_rng(seed)."""
    values, rng = alike.flatten(0, 1).numpy(), np.random.default_rng(seed)

    def fraction(labels):
        groups, found = [np.where(labels)[0], np.where(~labels)[0]], []
        few = min(map(len, groups))
        for _ in range(draws):
            lot = rng.permutation(max(map(len, groups)))[:few]
            first, second = [values[:, group[lot] if len(group) > few else group].max(1)
                             for group in groups]
            found.append(((first > second) + 0.5 * (first == second)).mean())
        return float(np.mean(found))

    seen = fraction(training.numpy())
    by_lot = [fraction(rng.permutation(training.numpy())) for _ in range(permutations)]
    return seen, (1 + sum(value >= seen for value in by_lot)) / (1 + permutations)


def membership(members, others, permutations=4000, seed=0):
    """Part C: AUC, how often a training case scores above a held-out one, ties counting half, 0.5
    by chance -> (AUC, p). members, others: scores of cases, float arrays. p: (1 + k) / (1 +
    permutations), where k of so many AUCs are as high when it is drawn by lot who was trained on.
    Chance: numpy's default_rng(seed)."""
    scores, n = np.concatenate([members, others]), len(members)
    ranks = np.array([(scores < value).sum() + (scores == value).sum() / 2 + 0.5
                      for value in scores])

    def auc(ranks):
        return (ranks[:n].sum() - n * (n + 1) / 2) / (n * len(others))

    rng, seen = np.random.default_rng(seed), auc(ranks)
    by_lot = [auc(rng.permutation(ranks)) for _ in range(permutations)]
    return float(seen), (1 + sum(value >= seen - 1e-9 for value in by_lot)) / (1 + permutations)


def canary(kind, images, classes, other, seed):
    """A training case as a copying generator might return it: images (P, C, R, R) in [-1, 1],
    classes (P, R, R) -> the same, changed as `kind` of CANARIES says: copy (not at all), noise (std
    0.15), shift (down and right by 1/32 of the picture), flip (left for right), gamma (1.6 on
    0..1), blend (40% of `other`, images of a synthetic case)."""
    if kind == "shift":
        pixels = max(1, images.shape[-1] // 32)
        return [torch.roll(x, (pixels, pixels), (-2, -1)) for x in (images, classes)]
    if kind == "flip":
        return [images.flip(-1), classes.flip(-1)]
    if kind == "noise":
        images = images + 0.15 * torch.randn(images.shape, generator=bs.generator(seed, "canary"))
    if kind == "gamma":
        images = 2 * ((images + 1) / 2).clamp(min=0) ** 1.6 - 1
    if kind == "blend":
        images = 0.6 * images + 0.4 * other
    return [images, classes]


def denoising_loss(denoiser, images, classes, position):
    """Mean squared error of v at AUDIT_LEVELS, case by case: images (N, P, C, R, R), classes (N, P,
    R, R), position (N, P) -> (N,). The same noise for all cases: only the pictures differ."""
    losses, x0 = [], images.flatten(0, 1)
    onehot = bs.one_hot(classes.flatten(0, 1), denoiser.net.classes)
    for level in AUDIT_LEVELS:
        eps = torch.randn(images.shape[1:], generator=bs.generator(level, "audit"))
        eps = eps.expand(images.shape).flatten(0, 1)
        t = torch.full((len(x0),), level)
        signal, sigma = bs.signal_sigma(denoiser.alpha_bar, t)
        v_hat = denoiser(bs.add_noise(x0, eps, signal, sigma), t, onehot, position.reshape(-1, 1))
        error = (v_hat - bs.v_target(x0, eps, signal, sigma)) ** 2
        losses.append(error.mean((1, 2, 3)).view(images.shape[:2]).mean(1))
    return torch.stack(losses).mean(0)


def reproduction(denoiser, images, classes, position, condition, head, settings):
    """How alike a sample is to the scan its label map came from, case by case: arguments as
    denoising_loss, head from mean_head, settings of sample_volume -> (N,) in [-1, 1], mean of
    similarity over slices. High for any good generator; higher for training cases only if it
    remembers them."""
    alike = []
    for number in range(len(images)):
        sampled = bs.sample_volume(denoiser, classes[number], position[number], 1.0,
                                   (0, "audit", number), settings)
        pair = [audit_views(x[None], classes[number][None], condition)
                for x in (sampled, images[number])]
        alike.append(similarity(*pair, head)[0, :, 0].mean())
    return torch.stack(alike)


def plant_canaries(finder, made, real, views, head, condition, count):
    """Part D: `count` training cases planted among the synthetic ones in each of the ways of
    CANARIES -> {kind: fraction that the CopyFinder names with the right training case}; {} without
    any. made, real: from audit_slices; views: from audit_views, of the real cases."""
    members = torch.where(finder.training)[0]
    victims, fractions = members[judging.evenly(len(members), count)], {}
    for kind in CANARIES if count else ():
        copies = [canary(kind, real[0][i], real[1][i], made[0][n % len(made[0])], n)
                  for n, i in enumerate(victims)]
        images, classes = [torch.stack(part) for part in zip(*copies)]
        found = finder.scores(similarity(audit_views(images, classes, condition), views, head))
        named = (found["score"] > LIMIT) & (found["pair"] == victims)
        fractions[kind] = float(named.float().mean())
    return fractions


def audit_generator(denoiser, real, groups, condition, head, settings, few):
    """Part C: does the generator know its training cases? -> (figures for the report, similarity of
    decoys to samples from their own label maps (few,)). groups: numbers of training cases and of
    decoys among `real`; for the rest see audit."""
    losses, alike = [], []
    for group in groups:
        some = [part[group[judging.evenly(len(group), 2 * few)]] for part in real]
        losses.append(-denoising_loss(denoiser, *some).numpy())
        some = [part[group[judging.evenly(len(group), few)]] for part in real]
        alike.append(reproduction(denoiser, *some, condition, head, settings))
    loss_auc, loss_p = membership(*losses)
    auc, p = membership(alike[0].numpy(), alike[1].numpy())
    return {"loss_auc": loss_auc, "loss_p": loss_p, "reproduction_auc": auc, "reproduction_p": p,
            "reproduction": [values.mean().item() for values in alike]}, alike[1]


def audit(made, own, real, training, condition, canaries, denoiser, settings, few=12):
    """The whole audit -> (report, pairs: [(synthetic, slice, real)] to look at, nearest first, as
    indices; the first report["copies"] of them are named).

    report: a dict of numbers: cases of each kind; copies (scores above LIMIT) and scores of all N;
    share (from nearer_share) and its p; AUC and p of loss and of reproduction; canaries_found, a
    fraction for each kind; nearest, similarities; and "verdict":
    leak        a copy is named, or share or an AUC is above chance with p < CHANCE
    underpowered  else, where under 90% of the canaries are found, or there are fewer than 8
                  training cases or decoys
    none found  else

    made, real: from audit_slices (images, classes, positions), N synthetic and M real cases, one a
    patient; own bool (N, M), training bool (M,): see CopyFinder; canaries: how many training cases
    are planted in each of the ways of CANARIES; denoiser: the generator; settings: of
    sample_volume; few: part C samples so many cases of each kind, and takes the loss of twice as
    many.
    """
    views = audit_views(*real[:2], condition)
    head = mean_head(*views)
    alike = similarity(audit_views(*made[:2], condition), views, head)
    finder = CopyFinder(alike, similarity(views, views, head), training, own)
    groups = torch.where(training)[0], torch.where(~training)[0]
    share, share_p = nearer_share(alike.masked_fill(own[:, None], -1), training)
    planted = plant_canaries(finder, made, real, views, head, condition, canaries)
    figures, decoys = audit_generator(denoiser, real, groups, condition, head, settings, few)
    # a synthetic case and the training case that lent its label map: as alike as decoys are to
    # samples from their own label maps, or more?
    whole, (middle, spread) = alike.mean(1), robust(decoys)
    score, pair = torch.where(own & training, (whole - middle) / spread, -math.inf).max(1)
    pair = torch.where(score > finder.found["score"], pair, finder.found["pair"])
    score = torch.maximum(score, finder.found["score"])
    report = {"synthetic_cases": len(alike), "training_cases": len(groups[0]),
              "decoys": len(groups[1]), "share": share, "share_p": share_p, "limit": LIMIT,
              "canaries_found": planted, **figures, "copies": int((score > LIMIT).sum()),
              "scores": score.tolist()}
    leak = report["copies"] or min(share_p, report["loss_p"], report["reproduction_p"]) < CHANCE
    found = np.mean(list(planted.values())) if planted else 0.0
    weak = found < 0.9 or min(map(len, groups)) < 8
    report["verdict"] = "leak" if leak else "underpowered" if weak else "none found"
    report["nearest"] = {"training": whole[:, training].amax(-1).tolist(),
                         "decoy": whole[:, ~training].amax(-1).tolist()}
    order = score.argsort(descending=True)
    return report, [(int(n), int(finder.found["slice"][n]), int(pair[n])) for n in order]


def audit_words(report):
    """The audit in words, for the screen, sidecars and datasheet: no names."""
    bound = "" if report["copies"] else (" (the fraction of such copies is below "
                                         f"{min(1, 3 / report['synthetic_cases']):.1%} with 95% "
                                         "confidence)")
    found = [f"{kind} {fraction:.0%}" for kind, fraction in report["canaries_found"].items()]
    return (f"{report['synthetic_cases']} synthetic cases against {report['training_cases']} "
            f"training cases and {report['decoys']} real cases never trained on: "
            f"{report['copies']} too near to a training case{bound}. Nearer to training cases than "
            f"to the others: {report['share']:.1%} of slices (50% if nothing leaked, p "
            f"{report['share_p']:.3f}). Training cases told from others by the denoising loss: AUC "
            f"{report['loss_auc']:.2f} (p {report['loss_p']:.3f}); by how well they are reproduced "
            f"from their own label maps: AUC {report['reproduction_auc']:.2f} (p "
            f"{report['reproduction_p']:.3f}); 0.50 is chance. Planted copies found: "
            f"{', '.join(found) or 'none were planted'}. Missed are copies under heavy noise or "
            "blur, of a tumour alone, or of parts of a slice.")


def audit_cases(args, state, seen):
    """The real cases of an audit, one a patient (of several time points the first): [(Case, whether
    it was trained on, its case_hashes as a set)]. seen: first 16 digits of the hashes that the
    generators of the synthetic cases were trained on. Left out is a case that was trained on in
    part, or only by a generator of labels. BadInput where there are no training cases of the
    checkpoint or no others."""
    wanted = {"out": args.checkpoint, "split": None, "scanner": state["args"]["scanner"]}
    cases, _ = checks.find_data(argparse.Namespace(**{**vars(args), **wanted}))
    first = {case.patient: case for case in reversed(cases)}
    known, real = set(state["trained_on"]), []
    for patient in sorted(first):
        hashes = set(slices.hashes_of(first[patient]))
        touched = hashes & known or seen & {digest[:16] for digest in hashes}
        if hashes <= known or not touched:
            real.append((first[patient], hashes <= known, hashes))
    trained = sum(known_case for _, known_case, _ in real)
    if not 0 < trained < len(real):
        raise bs.BadInput(f"{args.data or 'the phantoms'}: {trained} cases that {args.checkpoint} "
                          f"was trained on and {len(real) - trained} others; an audit needs both, "
                          "so give the --data it was trained with")
    return real


def audit_folder(args, denoiser, state, settings):
    """Search a folder of synthetic cases for copies of training cases: table, audit.json,
    audit.png, pairs.png; with --mark the figures go into the sidecars and DATASHEET.md. Exit 1
    where the verdict is a leak."""
    def prepare(cases):
        return audit_slices([slices.prepare_case(case, state["resolution"], state["fov"],
                                                 state["condition"]) for case in cases])

    synthetic = nifti.find_cases(args.audit)
    facts = [writing.synthetic_facts(case) for case in synthetic]
    checkpoint = files.file_hash(state["file"])
    if all(row["CheckpointSHA256"] != checkpoint for row in facts):
        print(f"note: none of the cases was made with {args.checkpoint}; part C speaks of that, "
              "not of their generator")
    seen = {digest for row in facts for digest in row["GeneratorTrainedOn"]}
    real, training, hashes = zip(*audit_cases(args, state, seen))
    own = torch.zeros(len(synthetic), len(real), dtype=torch.bool)
    for i, row in enumerate(facts):
        for j, digests in enumerate(hashes):
            own[i, j] = row["LabelMapSHA256"] in digests or row["BrainSHA256"] in digests
    # coarse anatomy is there after ten calls
    settings = {**settings, "coherence": 0.0, "steps": min(settings["steps"], 10)}
    made, pool = prepare(synthetic), prepare(real)
    report, pairs = audit(made, own, pool, torch.tensor(training), state["condition"],
                          args.canaries, denoiser, settings)
    rows = [{"synthetic": synthetic[i].case, "slice": AUDIT_POSITIONS[p], "training": real[j].case,
             "score": report["scores"][i], "named": number < report["copies"]}
            for number, (i, p, j) in enumerate(pairs)]
    report = {"verdict": report["verdict"], "words": audit_words(report),
              "condition": state["condition"], **report, "pairs": rows}
    out = Path(args.out)
    files.write_json(out / "audit.json", report)
    draw_audit(out / "audit.png", report)
    shown = pairs[:max(3, min(12, report["copies"]))]
    draw_pairs(out / "pairs.png", [(made[0][i, p], pool[0][j, p]) for i, p, j in shown], state)
    print_audit(report)
    if args.mark:
        mark_set(args.audit, report)
        print(f"wrote: the audit into {len(synthetic)} sidecars and {args.audit}/DATASHEET.md")
    for name in ("audit.json", "audit.png", "pairs.png"):
        print(f"wrote: {out / name}")
    if report["verdict"] == "leak":
        sys.exit(1)


def print_audit(report):
    """The named pairs, the words, the verdict."""
    for row in report["pairs"][:report["copies"]]:
        print(f"copy: {row['synthetic']} at {row['slice']:+.1f} of the brain's height is too near "
              f"to {row['training']} ({row['score']:.1f} robust standard deviations; "
              f"{LIMIT:.0f} at most)")
    print(report["words"].replace(". ", ".\n"))
    print(f"verdict: {report['verdict']}")


def mark_set(folder, report):
    """The audit, without names of training cases, into the sidecars and the datasheet of a set."""
    kept = ("verdict", "words", "copies", "share", "canaries_found")
    for case in nifti.find_cases(folder):
        facts = {**writing.synthetic_facts(case), "Audit": {name: report[name] for name in kept}}
        files.write_json(case.folder / f"{case.case}.json", facts)
    writing.write_datasheet(folder)


def draw_pairs(path, pairs, state):
    """Synthetic slices beside the real ones they are nearest to: pairs of images (C, R, R)."""
    titles = [f"SYNTHETIC\n{name}" for name in bs.MODALITIES] + [""]
    titles += [f"training case\n{name}" for name in bs.MODALITIES]
    shown = "phantoms" if state["data"] == "phantoms" else "real scans"
    pictures.plot_rows(path, [[*synthetic, None, *real] for synthetic, real in pairs], titles,
                       state["condition"], f"nearest pairs; the right half shows {shown}")


def draw_audit(path, report):
    """A page-wide figure: nearest training case against nearest decoy, scores, canaries found,
    fractions and AUCs."""
    near, scores = report["nearest"], sorted(report["scores"])
    ends = [min(near["training"] + near["decoy"]), max(near["training"] + near["decoy"])]
    chance = [report[name] for name in ("share", "loss_auc", "reproduction_auc")]
    planted = report["canaries_found"]
    pictures.plot_lines(path, [
        ("nearest decoy (up) and training case (right)", "points",
         {"synthetic cases": (near["training"], near["decoy"], None),
          "equally near": (ends, ends)}),
        ("score of every synthetic case, sorted", "points",
         {"cases": (range(len(scores)), scores, None),
          "limit": ([0, len(scores) - 1], [LIMIT] * 2)}),
        ("fraction of planted copies found", "bars",
         {report["verdict"]: (list(planted), list(planted.values()))}),
        ("fraction or AUC, 0.5 if nothing leaked", "bars",
         {report["verdict"]: (["nearer to training", "loss", "reproduction"], chance)})], "")
