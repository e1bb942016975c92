"""Are synthetic cases copies of training cases? Compared with real cases the generator never saw.

Four parts. A names pairs of a synthetic and a training case that are too alike. B counts how often
the nearest real case is a training case. C asks the generator whether it knows its training cases.
D plants copies (canaries) and counts how many of them A finds. Decoys are real cases that the
generator never saw.
"""
import argparse
import itertools

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import checks, files, judging, nifti, pictures, slices, writing


AUDIT_POSITIONS = np.linspace(-0.7, 0.7, 10).round(3)   # the slices of a case that are compared
# pixels a side they are compared at: 6 mm, where anatomy is and noise is not
AUDIT_SIZE = 32
CANARIES = ("copy", "noise", "shift", "flip", "gamma", "blend")
CANARIES_EACH = 8                       # training cases that are planted in each of these ways
LIMIT = 6.0                             # robust standard deviations beyond which a pair is named
CHANCE = 0.005                          # p below which a fraction or an AUC is more than chance
MARKED = "verdict", "words", "copies", "share", "canaries_found"    # what sidecars say
# The audit for the screen, sidecars and datasheet: no names.
WORDS = """{synthetic_cases} synthetic cases against {training_cases} training cases and {decoys} \
real cases never trained on: {copies} too near to a training case (if 0, their fraction is below \
{bound:.1%} with 95% confidence). Nearer to training cases than to others: {share:.1%} of slices \
(50% is chance, p {share_p:.3f}). AUC of how well training cases come back from their label maps: \
{reproduction_auc:.2f} (0.50 is chance, p {reproduction_p:.3f}). Planted copies found: {planted}. \
Missed are copies under heavy noise or blur, of a tumour alone, or of parts of a slice."""


def audit_rows(classes):
    """Which slices of a class map, array (D, H, W), lie at AUDIT_POSITIONS, -1 lowest and 1 highest
    with brain: int array (P,)."""
    low, high = np.where(classes.any((1, 2)))[0][[0, -1]]
    return np.rint(low + (AUDIT_POSITIONS + 1) / 2 * (high - low)).astype(int)


def audit_slices(prepared):
    """The slices of cases that are compared: images float (N, P, C, R, R) in [-1, 1], classes int64
    (N, P, R, R). prepared: what prepare_case returns, N times."""
    cases = [[got[name][audit_rows(got["classes"])] for name in ("images", "classes")]
             for got in prepared]
    images, classes = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*cases)]
    return bs.to_images(images), classes.long()


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
    def flat(x, mask):
        return [z.transpose(0, 1).flatten(2) for z in (x, (x ** 2).sum(2), mask)]   # (P, N, pixels)

    pair, (y, y_mask) = [((view - head) * mask, mask) for view, mask in (synthetic, real)]
    y, y_power, y_mask = flat(y, y_mask)
    best = torch.full((len(y), len(pair[0]), y.shape[1]), -1.0)
    # as it is and flipped, shifted by up to a pixel each way
    for axes, *shift in itertools.product(((), (-1,)), (-1, 0, 1), (-1, 0, 1)):
        x, x_power, x_mask = flat(*[torch.roll(z.flip(axes), shift, (-2, -1)) for z in pair])
        for along in (-1, 0, 1):
            here = slice(max(0, -along), len(x) - max(0, along))
            there = slice(max(0, along), len(x) + min(0, along))
            power = (x_power[here] @ y_mask[there].mT) * (x_mask[here] @ y_power[there].mT)
            product = x[here] @ y[there].mT / power.clamp(min=1e-9).sqrt()
            best[here] = torch.maximum(best[here], product)
    return best.transpose(0, 1)


def robust(values):
    """Median and robust standard deviation of a tensor's values, tensors (): 1.4826 times the
    median distance from the median, which is the standard deviation if they are Gaussian, plus
    1e-6. Medians as torch.median takes them."""
    middle = values.median()
    return middle, 1.4826 * (values - middle).abs().median() + 1e-6


def nearness(alike, training):
    """How near cases are to training cases, larger is nearer: alike (N, P, M), from similarity,
    training bool (M,) -> three tensors. Of single slices (N, P) and of whole cases (N,), which are
    means over slices: similarity to the nearest training case less that to the nearest decoy. Of
    whole cases (N,): similarity to the nearest training case."""
    def nearest(among):
        return alike[..., among].amax(-1), alike.mean(1)[:, among].amax(-1)

    (by_slice, by_case), (slice_decoy, case_decoy) = nearest(training), nearest(~training)
    return by_slice - slice_decoy, by_case - case_decoy, by_case


def usual_nearness(alike, among, training):
    """Median and robust standard deviation of the three numbers of nearness: [(median, spread)].

    alike (N, P, M): of synthetic cases; among (M, P, M): of the real cases to each other. The
    differences are those of all cases, each real one compared with all others; the nearness is that
    of real cases, which shows when most of the synthetic set are copies. With few cases a spread is
    uncertain: that of whole cases is taken to be no less than independent slices had.
    """
    # no case is its own neighbour
    among = among.masked_fill(torch.eye(len(among), dtype=torch.bool)[:, None], -1)
    by_slice, by_case, _ = nearness(torch.cat([alike, among]), training)
    usual = [robust(values) for values in (by_slice, by_case, nearness(among, training)[2])]
    least = usual[0][1] / alike.shape[1] ** 0.5
    return usual[:1] + [(middle, torch.maximum(spread, least)) for middle, spread in usual[1:]]


def find_copies(alike, training, usual):
    """Part A: how near synthetic cases are to training cases -> for each of N cases its score, the
    most telling slice, and which of the M real cases it is nearest to, tensors (N,).

    alike (N, P, M): from similarity, -1 where a real case lent a synthetic one its label map or
    outline: such a pair must be alike (part C looks at it); training bool (M,): which real cases
    were trained on, the others are decoys; usual: from usual_nearness. The score is the largest of
    the three numbers of nearness, in robust standard deviations from the median; LIMIT at most.
    """
    deviations = [(values - middle) / spread
                  for values, (middle, spread) in zip(nearness(alike, training), usual)]
    by_slice, whole = deviations[0], torch.maximum(*deviations[1:])
    members, best = torch.where(training)[0], by_slice.argmax(1)
    of_slice = alike[torch.arange(len(alike)), best][:, training].argmax(-1)
    of_case = alike.mean(1)[:, training].argmax(-1)
    pair = members[torch.where(whole > by_slice.amax(1), of_case, of_slice)]
    return torch.maximum(by_slice.amax(1), whole), best, pair


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

    def auc(scores):
        first, second = scores[:n, None], scores[n:]
        return float(((first > second) + 0.5 * (first == second)).mean())

    rng, seen = np.random.default_rng(seed), auc(scores)
    by_lot = [auc(rng.permutation(scores)) for _ in range(permutations)]
    return seen, (1 + sum(value >= seen - 1e-9 for value in by_lot)) / (1 + permutations)


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
    noise = torch.randn(images.shape, generator=bs.generator(seed, "canary"))
    changed = {"copy": images, "noise": images + 0.15 * noise, "blend": 0.6 * images + 0.4 * other,
               "gamma": 2 * ((images + 1) / 2).clamp(min=0) ** 1.6 - 1}
    return [changed[kind], classes]


def reproduction(redraw, real, group, few, condition, head):
    """How alike a sample is to the scan its label map came from, case by case: redraw: see audit;
    real from audit_slices; group int (M,): which of these cases, of which `few` are taken; head
    from mean_head -> array (few,) in [-1, 1], mean of similarity over slices. High for any good
    generator; higher for training cases only if it remembers them."""
    alike = []
    for i in group[slices.evenly(len(group), few)].tolist():
        pair = [audit_views(x[None], real[1][i:i + 1], condition) for x in (redraw(i), real[0][i])]
        alike.append(similarity(*pair, head)[0, :, 0].mean().item())
    return np.float32(alike)


def plant_canaries(synthetic, real, training, usual, views, head, condition):
    """Part D: CANARIES_EACH training cases planted among the synthetic ones in each of the ways of
    CANARIES -> {kind: fraction that find_copies names with the right training case}. synthetic,
    real: from audit_slices; training, usual: of find_copies; views: from audit_views, of the real
    cases."""
    members, fractions = torch.where(training)[0], {}
    victims = members[slices.evenly(len(members), CANARIES_EACH)]
    for kind in CANARIES:
        others = synthetic[0][np.arange(len(victims)) % len(synthetic[0])]
        copies = [canary(kind, real[0][i], real[1][i], others[n], n) for n, i in enumerate(victims)]
        images, classes = [torch.stack(part) for part in zip(*copies)]
        alike = similarity(audit_views(images, classes, condition), views, head)
        score, _, pair = find_copies(alike, training, usual)
        fractions[kind] = float(((score > LIMIT) & (pair == victims)).float().mean())
    return fractions


def audit(synthetic, related, real, training, condition, redraw, few=12):
    """The whole audit -> (report, pairs: [(synthetic, slice, real)] to look at, nearest first, as
    indices; the first report["copies"] of them are named).

    report: a dict of numbers: cases of each kind; copies (scores above LIMIT) and scores of all N;
    share (from nearer_share) and its p; AUC and p of reproduction; canaries_found, a fraction for
    each kind; "words", WORDS with these numbers; and "verdict":
    leak        a copy is named, or share or the AUC is above chance with p < CHANCE
    underpowered  else, where under 90% of the canaries are found, or there are fewer than 8
                  training cases or decoys
    none found  else

    synthetic, real: from audit_slices (images, classes), N synthetic and M real cases, one a
    patient; related bool (N, M): which real cases lent a synthetic case its label map or outline;
    training bool (M,): which real cases were trained on; redraw: function of the number of a real
    case -> slices (P, C, R, R) that the generator draws from its label map, for part C, which asks
    for `few` cases of each kind.
    """
    views = audit_views(*real, condition)
    head = mean_head(*views)
    alike = similarity(audit_views(*synthetic, condition), views, head)
    unrelated = alike.masked_fill(related[:, None], -1)
    usual = usual_nearness(unrelated, similarity(views, views, head), training)
    score, best, pair = find_copies(unrelated, training, usual)
    share, share_p = nearer_share(unrelated, training)
    planted = plant_canaries(synthetic, real, training, usual, views, head, condition)
    members, decoys = torch.where(training)[0], torch.where(~training)[0]
    samples = [reproduction(redraw, real, group, few, condition, head)
               for group in (members, decoys)]
    auc, p = membership(*samples)
    # a synthetic case and the training case that lent its label map: as alike as decoys are to
    # samples from their own label maps, or more?
    middle, spread = robust(torch.from_numpy(samples[1]))
    lent = torch.where(related & training, (alike.mean(1) - middle) / spread, -np.inf).max(1)
    pair = torch.where(lent.values > score, lent.indices, pair)
    score = torch.maximum(lent.values, score)
    copies = int((score > LIMIT).sum())
    weak = np.mean(list(planted.values())) < 0.9 or min(len(members), len(decoys)) < 8
    verdict = "underpowered" if weak else "none found"
    report = {"verdict": "leak" if copies or min(share_p, p) < CHANCE else verdict,
              "synthetic_cases": len(alike), "training_cases": len(members), "decoys": len(decoys),
              "share": share, "share_p": share_p, "reproduction_auc": auc, "reproduction_p": p,
              "canaries_found": planted, "copies": copies, "scores": score.tolist()}
    found = ", ".join(f"{kind} {fraction:.0%}" for kind, fraction in planted.items())
    report["words"] = WORDS.format(**report, bound=min(1, 3 / len(alike)), planted=found)
    order = score.argsort(descending=True)
    return report, torch.stack([order, best[order], pair[order]], 1).tolist()


def audit_cases(args, state, facts):
    """The real cases of an audit, one a patient (of several time points the first): [(Case, whether
    it was trained on, its case_hashes as a set)]. facts: sidecars of the synthetic cases. Left out
    is a case that was trained on in part, or only by a generator of labels. BadInput where there
    are no training cases of the checkpoint or no others."""
    wanted = {"out": args.checkpoint, "split": None, "scanner": state["args"]["scanner"],
              "phantoms": state["args"]["phantoms"]}
    cases, _ = checks.find_data(argparse.Namespace(**vars(args) | wanted))
    first = {case.patient: case for case in reversed(cases)}
    known, real = set(state["trained_on"]), []
    # the first 16 digits of what any of the generators has seen
    seen = {digest[:16] for digest in known}.union(*[row["GeneratorTrainedOn"] for row in facts])
    for patient in sorted(first):
        hashes = set(slices.hashes_of(first[patient]))
        if hashes <= known or seen.isdisjoint(digest[:16] for digest in hashes):
            real.append((first[patient], hashes <= known, hashes))
    trained = sum(is_known for _, is_known, _ in real)
    if not 0 < trained < len(real):
        raise bs.BadInput(f"{trained} cases that {args.checkpoint} was trained on and "
                          f"{len(real) - trained} others; give the --data it was trained with")
    return real


def audit_folder(args, denoiser, state, settings):
    """Search a folder of synthetic cases for copies of training cases: the named pairs, words and
    verdict on the screen, audit.json, pairs.png; the figures, without names of training cases, go
    into the sidecars and DATASHEET.md. Exit 1 where the verdict is a leak."""
    cases = nifti.find_cases(args.audit)
    facts = [writing.synthetic_facts(case) for case in cases]
    if files.file_hash(state["file"]) not in {row["CheckpointSHA256"] for row in facts}:
        print(f"note: part C is about {args.checkpoint}, with which no case was made")
    real, training, hashes = zip(*audit_cases(args, state, facts))
    origins = [{row["LabelMapSHA256"], row["BrainSHA256"]} for row in facts]
    related = [bool(origin & digests) for origin, digests in itertools.product(origins, hashes)]
    related = torch.tensor(related).view(len(cases), len(real))
    grid = state["resolution"], state["fov"], state["condition"]
    synthetic = audit_slices(slices.prepare_case(case, *grid) for case in cases)
    pool = audit_slices(slices.prepare_case(case, *grid) for case in real)

    def redraw(i):
        classes = slices.prepare_case(real[i], *grid)["classes"]
        drawn = bs.sample_volume(denoiser, torch.from_numpy(classes).long(), (0, "audit", i),
                                 settings)
        return drawn[audit_rows(classes)]

    report, pairs = audit(synthetic, related, pool, torch.tensor(training), state["condition"],
                          redraw)
    scores = report["scores"]
    rows = [{"synthetic": cases[i].case, "slice": AUDIT_POSITIONS[p], "training": real[j].case,
             "score": scores[i], "named": scores[i] > LIMIT} for i, p, j in pairs]
    for row in rows[:report["copies"]]:
        print("copy: {synthetic} at {slice:+.1f} of the brain's height is too near to {training} "
              "({score:.1f} robust standard deviations)".format(**row))
    report |= {"condition": state["condition"], "pairs": rows}
    files.write_json(f"{args.out}/audit.json", report)
    titles, few = [*bs.MODALITIES, "", *bs.MODALITIES], max(3, min(12, report["copies"]))
    shown = [[*synthetic[0][i, p], None, *pool[0][j, p]] for i, p, j in pairs[:few]]
    pictures.plot_rows(f"{args.out}/pairs.png", shown, titles, state["condition"],
                       f"SYNTHETIC on the left, nearest training cases ({state['data']}) right")
    print(report["words"].replace(". ", ".\n") + f"\nverdict: {report['verdict']}")
    for case, row in zip(cases, facts):
        row["Audit"] = {name: report[name] for name in MARKED}
        files.write_json(case.folder / f"{case.case}.json", row)
    writing.write_datasheet(args.audit)
    print(f"wrote: {args.out}/audit.json, {args.out}/pairs.png, the audit in {args.audit}")
    if report["verdict"] == "leak":
        raise SystemExit(1)
