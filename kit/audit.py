"""Are synthetic cases copies of training cases? Compared with real cases the generator never saw.
"""
from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import checks, files, nifti, pictures, slices, writing


AUDIT_POSITIONS = np.linspace(-0.7, 0.7, 10).round(3)   # the slices of a case that are compared
# pixels a side they are compared at: 6 mm, where anatomy is and noise is not
AUDIT_SIZE = 32
AUDIT_LEVELS = (100, 300, 500, 700)     # t at which the denoising loss is asked for
CANARIES = ("copy", "noise", "shift", "flip", "gamma", "blend")
LIMIT = 6.0                             # robust standard deviations beyond which a pair is named
CHANCE = 0.005                          # p below which a share or an AUC counts as more than chance


def audit_slices(prepared):
    """The slices of cases at AUDIT_POSITIONS: images float (N, P, C, R, R) in [-1, 1], classes
    int64 (N, P, R, R), positions float (N, P). prepared: what prepare_case returns, N times."""
    rows = [[int(np.abs(got["position"] - at).argmin()) for at in AUDIT_POSITIONS]
            for got in prepared]
    pick = lambda name: torch.from_numpy(np.stack([got[name][its] for got,
                                                   its in zip(prepared, rows)]))
    return bs.to_images(pick("images")), pick("classes").long(), pick("position")


def audit_views(images, classes, condition):
    """What is compared of slices: images (N, P, C, R, R), classes (N, P, R, R) -> view float (N, P,
    C, S, S), its mask (N, P, 1, S, S), S <= AUDIT_SIZE. Only healthy brain counts (that two tumours
    are alike is the label map's doing), each modality of each slice to mean 0 and spread 1 in it:
    gain and offset do not hide a copy."""
    healthy = ((classes > 0) & (classes < bs.CONDITIONS[condition].index(bs.LABELS[0]))).float(
        ).unsqueeze(2)
    size = min(AUDIT_SIZE, images.shape[-1])
    pool = lambda x: F.adaptive_avg_pool2d(x.flatten(0, 1), size).unflatten(0, x.shape[:2])
    area = pool(healthy)
    mask = (area > 0.5).float()
    mean = lambda x: (x * mask).sum((-2, -1), keepdim=True) / mask.sum((-2, -1),
                                                                       keepdim=True).clamp(min=1)
    view = pool(images * healthy) / area.clamp(min=1e-3)
    view = view - mean(view)
    return view / (mean(view ** 2).sqrt() + 1e-3) * mask, mask


def mean_head(view, mask):
    """The mean view at each position, left and right alike: view (N, P, C, S, S), mask (N, P, 1, S,
    S) -> (P, C, S, S). The sum of all views inside their masks and of their mirror images (last
    axis), over how many of the 2 N masks cover a pixel, plus 1: one empty head, so that there is no
    division by 0. What all heads share is no copy."""
    total, count = (view * mask).sum(0), mask.sum(0)
    return (total + total.flip(-1)) / (count + count.flip(-1) + 1)


def similarity(made, real, head):
    """How alike slices are: made, real (view, mask) of N and M cases, head from mean_head -> (N, P,
    M) in [-1, 1].

    The correlation of two views less the mean head, over pixels healthy in both and all modalities;
    the best over left-right flip, shifts of one pixel, and the real case's slices at this position
    and the two beside it.
    """
    (x, w), (y, u) = [((view - head) * mask, mask) for view, mask in (made, real)]
    flat = lambda its: its.transpose(0, 1).flatten(2)                           # (P, N, pixels)
    y, y2, u = flat(y), flat((y ** 2).sum(2)), flat(u)
    best = torch.full((x.shape[1], len(x), y.shape[1]), -1.0)
    for flip in (False, True):
        for shift in [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]:
            a, b = [torch.roll(its.flip(-1) if flip else its, shift, (-2, -1)) for its in (x, w)]
            a, a2, b = flat(a), flat((a ** 2).sum(2)), flat(b)
            for along in (-1, 0, 1):
                mine = slice(max(0, -along), len(a) - max(0, along))
                theirs = slice(max(0, along), len(a) + min(0, along))
                product = a[mine] @ y[theirs].mT
                power = (a2[mine] @ u[theirs].mT) * (b[mine] @ y2[theirs].mT)
                best[mine] = torch.maximum(best[mine], product / power.clamp(min=1e-9).sqrt())
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
    decoys; own (N, M) bool: whose label map or outline a synthetic case has: alike it must be, so
    it is left out here (part C looks at it). Three numbers, in robust standard deviations, LIMIT at
    most: how much nearer the nearest training case is than the nearest decoy, for single slices and
    for whole cases (mean over slices), among all cases, real ones being compared with all others;
    and how near it is, among real cases, which shows when most of the set are copies. With few
    cases a spread is uncertain: that of whole cases is taken to be no less than independent slices
    had.
    """

    def __init__(self, alike, among, training, own):
        self.training = training
        alike, everyone = alike.masked_fill(own[:, None], -1), torch.arange(len(among))
        among = among.clone()
        # nobody is his own neighbour
        among[everyone, :, everyone] = -1
        both = torch.cat([alike, among])
        self.by_slice = robust(self.nearer(both))
        least = self.by_slice[1] / alike.shape[1] ** 0.5
        self.by_case, self.near = [(middle, torch.maximum(spread, least)) for middle, spread in (
            robust(self.nearer(both.mean(1))), robust(among.mean(1)[:, training].amax(-1)))]
        self.found = self.scores(alike)

    def nearer(self, alike):
        """Similarity to the nearest training case less that to the nearest decoy: (...,) of (...,
        M)."""
        return alike[..., self.training].amax(-1) - alike[..., ~self.training].amax(-1)

    def scores(self, alike):
        """For each of N cases: score (the largest of the three numbers), slice (the most telling
        one), pair (which of the M real cases it is nearest to)."""
        z = lambda values, to: (values - to[0]) / to[1]
        slices = z(self.nearer(alike), self.by_slice)                           # (N, P)
        whole, columns = alike.mean(1), torch.where(self.training)[0]
        cases, near = z(self.nearer(whole), self.by_case), z(whole[:, self.training].amax(-1),
                                                             self.near)
        best = slices.argmax(1)
        of_slice = columns[alike[torch.arange(len(alike)), best][:, self.training].argmax(-1)]
        pair = torch.where(torch.maximum(cases, near) > slices.amax(1),
                           columns[whole[:, self.training].argmax(-1)], of_slice)
        return {"score": torch.stack([slices.amax(1), cases, near]).amax(0), "slice": best,
                "pair": pair}


def nearer_share(alike, training, draws=10, permutations=400, seed=0):
    """Part B: in which share of the N P synthetic slices the nearest real case is a training case
    and no decoy: 0.5 if nothing leaked -> (share, p). alike (N, P, M): from similarity; training
    bool (M,): which of the real cases were trained on. Of the larger group as many as the smaller
    one has are drawn, without replacement, `draws` times, and shares averaged; ties count half. p:
    (1 + k) / (1 + permutations), where k of so many shares are as high when `training` is shuffled.
    Chance: numpy's default_rng(seed)."""
    values, rng = alike.flatten(0, 1).numpy(), np.random.default_rng(seed)

    def share(labels):
        groups = [np.where(labels)[0], np.where(~labels)[0]]
        few, out = min(map(len, groups)), []
        for _ in range(draws):
            lot = rng.permutation(max(map(len, groups)))[:few]
            first, second = [values[:, group[lot] if len(group) > few else group].max(1)
                             for group in groups]
            out.append(((first > second) + 0.5 * (first == second)).mean())
        return float(np.mean(out))

    seen = share(training.numpy())
    by_lot = [share(rng.permutation(training.numpy())) for _ in range(permutations)]
    return seen, (1 + sum(its >= seen for its in by_lot)) / (1 + permutations)


def membership(members, others, permutations=4000, seed=0):
    """Part C: AUC, how often a training case scores above a held-out one, ties counting half, 0.5
    by chance -> (AUC, p). members, others: scores of cases, float arrays. p: (1 + k) / (1 +
    permutations), where k of so many AUCs are as high when it is drawn by lot who was trained on.
    Chance: numpy's default_rng(seed)."""
    scores, n = np.concatenate([members, others]), len(members)
    ranks = np.array([(scores < value).sum() + (scores == value).sum() / 2 + 0.5
                      for value in scores])
    area = lambda its: (its.sum() - n * (n + 1) / 2) / (n * len(others))
    rng, seen = np.random.default_rng(seed), area(ranks[:n])
    by_lot = [area(rng.permutation(ranks)[:n]) for _ in range(permutations)]
    return float(seen), (1 + sum(its >= seen - 1e-9 for its in by_lot)) / (1 + permutations)


def canary(kind, images, classes, other, seed):
    """A training case as a copying generator might give it: images (P, C, R, R) in [-1, 1], classes
    (P, R, R) -> the same, changed as `kind` of CANARIES says: copy (not at all), noise (std 0.15),
    shift (down and right by 1/32 of the picture), flip (left for right), gamma (1.6 on 0..1), blend
    (40% of `other`, images of a synthetic case)."""
    if kind == "shift":
        pixels = max(1, images.shape[-1] // 32)
        return [torch.roll(its, (pixels, pixels), (-2, -1)) for its in (images, classes)]
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
    out, shape = [], images.shape[1:]
    onehot = bs.one_hot(classes.flatten(0, 1), denoiser.net.classes)
    for level in AUDIT_LEVELS:
        eps = torch.randn(shape, generator=bs.generator(level, "audit")).expand(
            images.shape).flatten(0, 1)
        x0, t = images.flatten(0, 1), torch.full((len(eps),), level)
        signal, sigma = bs.signal_sigma(denoiser.alpha_bar, t)
        v_hat = denoiser(bs.add_noise(x0, eps, signal, sigma), t, onehot, position.reshape(-1, 1))
        out.append(((v_hat - bs.v_target(x0, eps, signal, sigma)) ** 2).mean((1, 2, 3)).view(
            images.shape[:2]).mean(1))
    return torch.stack(out).mean(0)


def reproduction(denoiser, images, classes, position, condition, head, settings):
    """How alike a sample is to the scan its label map came from, case by case: arguments as
    denoising_loss, head from mean_head, settings of sample_volume -> (N,) in [-1, 1], mean of
    similarity over slices. High for any good generator; higher for training cases only if it
    remembers them."""
    out = []
    for number in range(len(images)):
        drawn = bs.sample_volume(denoiser, classes[number], position[number], 1.0,
                                 (0, "audit", number), settings)
        pair = [audit_views(its[None], classes[number][None], condition)
                for its in (drawn, images[number])]
        out.append(similarity(*pair, head)[0, :, 0].mean())
    return torch.stack(out)


def audit(made, own, real, training, condition, canaries=8, denoiser=None, settings=None, few=12):
    """The whole audit -> (report, pairs: [(synthetic, slice, real)] to look at, nearest first, as
    indices; the first report["copies"] of them are named).

    report: a dict of numbers: cases of each kind; copies (scores above LIMIT) and scores of all N;
    share and its p; AUC and p of loss and of reproduction; canaries_found, a share for each kind;
    nearest, similarities; and "verdict":
    leak        a copy is named, or share or an AUC is above chance with p < CHANCE
    underpowered  else, where under 90% of the canaries are found, or there are fewer than 8 cases
                  on a side, or no
                denoiser
    none found  else

    made, real: from audit_slices (images, classes, positions), N synthetic and M real cases, one a
    patient; own bool (N, M), training bool (M,): see CopyFinder; canaries: how many training cases
    are planted, in each of the ways of CANARIES, to see whether they are found; denoiser: the
    generator, for part C, which is left out without it; settings: of sample_volume; few: part C
    samples so many cases of each kind, and asks for the loss of twice as many.
    """
    views = [audit_views(images, classes, condition) for images, classes, _ in (made, real)]
    head = mean_head(*views[1])
    alike = similarity(views[0], views[1], head)
    among = similarity(views[1], views[1], head)
    finder = CopyFinder(alike, among, training, own)
    found, members, others = finder.found, torch.where(training)[0], torch.where(~training)[0]
    share, p_share = nearer_share(alike.masked_fill(own[:, None], -1), training)
    report = {"synthetic_cases": len(alike), "training_cases": len(members), "decoys": len(others),
              "share": share, "share_p": p_share, "limit": LIMIT}
    # --- D: is a copy found when there is one?
    planted = {}
    some = lambda group, n: group[np.linspace(0, len(group) - 1, min(n, len(group))).astype(int)]
    victims = some(members, canaries)
    for kind in CANARIES if canaries else ():
        copies = [canary(kind, real[0][i], real[1][i], made[0][n % len(alike)], n) for n,
                  i in enumerate(victims)]
        views_of = audit_views(*(torch.stack(its) for its in zip(*copies)), condition)
        its = finder.scores(similarity(views_of, views[1], head))
        planted[kind] = float(((its["score"] > LIMIT) & (its["pair"] == victims)).float().mean())
    report["canaries_found"] = planted
    # --- C: does the generator know its training cases?
    if denoiser is not None:
        losses = [-denoising_loss(denoiser, *(its[some(group, 2 * few)] for its in real))
                  for group in (members, others)]
        report["loss_auc"], report["loss_p"] = membership(*(its.numpy() for its in losses))
        alike_own = [reproduction(denoiser, *(its[some(group, few)] for its in real), condition,
                                  head, settings) for group in (members, others)]
        report["reproduction_auc"], report["reproduction_p"] = membership(
            *(its.numpy() for its in alike_own))
        report["reproduction"] = [its.mean().item() for its in alike_own]
        # a synthetic case beside the training case it has its label map from, against decoys and
        # theirs
        middle, spread = robust(alike_own[1])
        mine = torch.where(own & training, alike.mean(1), -math.inf)
        score = (mine.amax(1) - middle) / spread
        more = score > found["score"]
        found = {"score": torch.where(more, score, found["score"]), "slice": found["slice"],
                 "pair": torch.where(more, mine.argmax(1), found["pair"])}
    order = found["score"].argsort(descending=True)
    report["copies"] = int((found["score"] > LIMIT).sum())
    report["scores"] = found["score"].tolist()
    ps = [report[name] for name in ("share_p", "loss_p", "reproduction_p") if name in report]
    power = np.mean(list(planted.values())) if planted else 0.0
    report["verdict"] = ("leak" if report["copies"] or min(ps) < CHANCE else "underpowered" if power
                         < 0.9 or min(len(members), len(others)) < 8 or denoiser is None
                         else "none found")
    report["nearest"] = {"training": alike.mean(1)[:, training].amax(-1).tolist(),
                         "decoy": alike.mean(1)[:, ~training].amax(-1).tolist()}
    return report, [(int(n), int(found["slice"][n]), int(found["pair"][n])) for n in order]


def audit_words(report):
    """The audit in words, for the screen, sidecars and datasheet: no names."""
    n, clean = report["synthetic_cases"], report["copies"] == 0
    found = report["canaries_found"]
    words = [f"{n} synthetic cases against {report['training_cases']} training cases and "
             f"{report['decoys']} real cases never trained on: {report['copies']} too near to a "
             "training case" + (f" (the share of such copies is below {min(1, 3 / n):.1%} with 95% "
                                "confidence)" if clean else "") + ".", "Nearer to training cases "
             f"than to the others: {report['share']:.1%} of slices (50% if nothing leaked, p "
             f"{report['share_p']:.3f})."]
    if "loss_auc" in report:
        words.append("Training cases told from others by the denoising loss: AUC "
                     f"{report['loss_auc']:.2f} (p {report['loss_p']:.3f}); by how well they are "
                     f"reproduced from their own label maps: AUC {report['reproduction_auc']:.2f} "
                     f"(p {report['reproduction_p']:.3f}); 0.50 is chance.")
    words.append("Planted copies found: " + (", ".join(f"{kind} {share:.0%}" for kind,
                                                       share in found.items()) if found
                                             else "none were planted") + ".")
    return " ".join(words + ["Missed are copies under heavy noise or blur, of a tumour alone, or "
                             "of parts of a slice."])


def audit_cases(args, state, seen):
    """The real cases of an audit: ([Case], which of them were trained on: bool array), one a
    patient. seen: first 16 digits of the hashes that the synthetic cases owe to; a case that a
    generator of labels alone has seen is neither trained on nor a decoy. BadInput where there are
    no training cases of the checkpoint or no others among them."""
    cases, _ = checks.find_data(SimpleNamespace(data=args.data, out=args.checkpoint,
                                                phantoms=args.phantoms, split=None,
                                                scanner=state["args"]["scanner"],
                                                skip_bad=args.skip_bad))
    # of several time points the first
    first = {case.patient: case for case in reversed(cases)}
    cases, known = [first[patient] for patient in sorted(first)], set(state["trained_on"])
    hashes = [set(slices.hashes_of(case)) for case in cases]
    part = [len(its & known) for its in hashes]
    sure = [i for i, n in enumerate(part) if n == len(hashes[i])
            or n == 0 and not seen & {digest[:16] for digest in hashes[i]}]
    trained = np.array([part[i] > 0 for i in sure])
    if not trained.any() or trained.all():
        raise bs.BadInput(f"{args.data or 'the phantoms'}: {trained.sum()} cases that "
                          f"{args.checkpoint} was trained on and {(~trained).sum()} others; an "
                          "audit needs both, so give the --data it was trained with")
    return [cases[i] for i in sure], trained, [hashes[i] for i in sure]


def audit_folder(args, denoiser, state, settings):
    """Search a folder of synthetic cases for copies of training cases: table, audit.json,
    audit.png, pairs.png."""
    made = nifti.find_cases(args.audit)
    facts = [writing.synthetic_facts(case) for case in made]
    foreign = [case.case for case, its in zip(made, facts)
               if its["CheckpointSHA256"] != files.file_hash(state["file"])]
    if len(foreign) == len(made):
        print(f"note: none of the cases was made with {args.checkpoint}; part C speaks of that, "
              "not of their generator")
    cases, trained, hashes = audit_cases(args, state, {digest for its in facts
                                                       for digest in its["GeneratorTrainedOn"]})
    prepare = lambda its: slices.prepare_case(its, state["resolution"], state["fov"],
                                              state["condition"])
    of_made, of_real = [audit_slices([prepare(case) for case in its])
                        for its in (made, cases)]
    own = torch.tensor([[bool({its["LabelMapSHA256"], its["BrainSHA256"]} & owner)
                         for owner in hashes] for its in facts])
    # anatomy is there by then
    settings = {**settings, "coherence": 0.0, "steps": min(args.steps, 10)}
    report, pairs = audit(of_made, own, of_real, torch.from_numpy(trained),
                                state["condition"], args.canaries, denoiser, settings)
    words, out = audit_words(report), Path(args.out)
    report = {"verdict": report["verdict"], "words": words, "condition": state["condition"],
              **report, "pairs": [{"synthetic": made[i].case, "slice": AUDIT_POSITIONS[p],
                                   "training": cases[j].case, "score": report["scores"][i],
                                   "named": k < report["copies"]} for k,
                                  (i, p, j) in enumerate(pairs)]}
    files.write_json(out / "audit.json", report)
    draw_audit(out / "audit.png", report)
    shown = pairs[:max(3, min(12, report["copies"]))]
    pictures.draw_rows(out / "pairs.png", [[*of_made[0][i, p], None, *of_real[0][j, p]] for i, p,
                                           j in shown],
                       [*(f"SYNTHETIC\n{name}" for name in bs.MODALITIES), "",
                        *(f"training case\n{name}" for name in bs.MODALITIES)], state["condition"],
                       "nearest pairs; the right half shows "
                       f"{'phantoms' if state['data'] == 'phantoms' else 'real scans'}")
    for its in report["pairs"][:report["copies"]]:
        print(f"copy: {its['synthetic']} at {its['slice']:+.1f} of the brain's height is too near "
              f"to {its['training']} ({its['score']:.1f} robust standard deviations; "
              f"{LIMIT:.0f} at most)")
    print(words.replace(". ", ".\n"))
    print(f"verdict: {report['verdict']}")
    if args.mark:
        kept = {name: report[name] for name in ("verdict", "words", "copies", "share",
                                                "canaries_found")}
        for case, its in zip(made, facts):
            files.write_json(case.folder / f"{case.case}.json", {**its, "Audit": kept})
        writing.write_datasheet(args.audit)
        print(f"wrote: the audit into {len(made)} sidecars and {Path(args.audit) / 'DATASHEET.md'}")
    for name in ("audit.json", "audit.png", "pairs.png"):
        print(f"wrote: {out / name}")
    if report["verdict"] == "leak":
        sys.exit(1)


def draw_audit(path, report):
    """A page-wide figure: nearest training case against nearest decoy, scores, canaries, the
    shares."""
    near, scores = report["nearest"], sorted(report["scores"])
    diagonal = [min(near["training"] + near["decoy"]), max(near["training"] + near["decoy"])]
    chance = {name: report[key] for name, key in (("nearer to training", "share"),
                                                  ("loss", "loss_auc"),
                                                  ("reproduction", "reproduction_auc"))
              if key in report}
    planted = report["canaries_found"]
    panels = [("nearest decoy (up) and training case (right)", "points",
               {"synthetic cases": (near["training"], near["decoy"], None),
                "equally near": (diagonal, diagonal)}),
              ("score of every synthetic case, sorted", "points",
               {"cases": (range(len(scores)), scores, None),
                "limit": ([0, len(scores) - 1], [LIMIT] * 2)}),
              ("share of planted copies " "found", "bars",
               {report["verdict"]: (list(planted), list(planted.values()))}),
              ("share or AUC, 0.5 if nothing leaked", "bars",
               {report["verdict"]: (list(chance), list(chance.values()))})]
    pictures.draw_lines(path, panels, "")
