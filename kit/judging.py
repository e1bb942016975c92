"""Does a sample obey its mask, is air black, is the picture as sharp and as contrasted as a scan?
"""
from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import checks, files, metrics, nifti, pictures, requests, runs, slices, writing


def erode(mask, times=1):
    """Bool (N, H, W) without its outermost `times` pixels."""
    mask = mask.float().unsqueeze(1)
    for _ in range(times):
        mask = 1 - F.max_pool2d(1 - mask, 3, 1, 1)
    return mask[:, 0] > 0.5


def lesion_contrast(images, classes, condition, modality, label, voxels=10):
    """In how many slices is a tumour label brighter than healthy brain? -> (share, slices counted).

    images (N, C, H, W), classes (N, H, W); counted are slices with at least `voxels` of the label;
    compared are mean signals in `modality` inside the label and in all healthy classes.
    """
    names = bs.CONDITIONS[condition]
    image = images[:, bs.MODALITIES.index(modality)]
    inside = classes == names.index(label)
    healthy = (classes > 0) & (classes < names.index(bs.LABELS[0]))
    wins = [bool(picture[a].mean() > picture[b].mean()) for picture, a,
            b in zip(image, inside, healthy) if a.sum() >= voxels and b.any()]
    return (sum(wins) / len(wins) if wins else math.nan), len(wins)


def black_air(images, classes, level=-0.95):
    """Share of air pixels at or below `level` in every modality's picture, over all slices."""
    air = (classes == 0).unsqueeze(1).expand_as(images)
    return (images[air] <= level).float().mean().item()


def fine_power(images, classes):
    """Mean squared high-frequency signal per modality (C,): each picture minus its 3x3 mean, inside
    the brain, two pixels from its edge. Too low is blur, too high is noise."""
    inside = erode(classes > 0, 2).unsqueeze(1)
    fine = images - F.avg_pool2d(images, 3, 1, 1)
    return (fine ** 2 * inside).sum((0, 2, 3)) / inside.sum().clamp(min=1)


def grey_white_contrast(images, classes, condition):
    """How far apart grey and white matter are on T1: mean over slices of (mean of the white cluster
    minus mean of the grey one), clusters found in each picture by tissue_clusters, since a sampled
    brain has its own folds. Slices with at least 300 healthy pixels."""
    healthy = (classes > 0) & (classes < bs.CONDITIONS[condition].index(bs.LABELS[0]))
    contrast = []
    for image, mask in zip(images, healthy):
        if mask.sum() < 300:
            continue
        scans = ((image + 1) * 127.5).numpy()
        tissue, t1 = slices.tissue_clusters(scans, mask.numpy()), image[
            bs.MODALITIES.index("t1")].numpy()
        if (tissue == 2).any() and (tissue == 3).any():
            contrast.append(t1[tissue == 3].mean() - t1[tissue == 2].mean())
    return float(np.mean(contrast)) if contrast else math.nan


def roughness(volume, classes):
    """Slice-to-slice roughness: mean |difference| of neighbouring slices (D, C, H, W) over voxels
    that are the same healthy or tumour class in both, divided by the spread of brain voxels."""
    same = ((classes[1:] == classes[:-1]) & (classes[1:] > 0)).unsqueeze(1)
    step = (volume[1:] - volume[:-1]).abs() * same
    brain = volume.movedim(1, 0)[:, classes > 0]
    return (step.sum() / (same.sum() * volume.shape[1]).clamp(min=1) / brain.std(1).mean()).item()


def mean_roughness(prepared):
    """Mean roughness over cases. prepared: list of (Case, what prepare_case returns)."""
    return float(np.mean([roughness(bs.to_images(got["images"]), torch.from_numpy(got["classes"]))
                          for _, got in prepared]))


def judge_slices(real, sampled, classes, condition):
    """The closing figures of a run: {name: value}. real, sampled (N, C, H, W) in [-1, 1] on the
    same label maps classes (N, H, W). NaN where there is nothing to measure."""
    figures = {}
    for who, images in (("real", real), ("sampled", sampled)):
        for modality, label in (("t1ce", "ET"), ("flair", "ED")):
            share, n = lesion_contrast(images, classes, condition, modality, label)
            figures[f"{who}_{modality}_{label}_above_brain"] = share
            figures[f"slices_with_{label}"] = n
        figures[f"{who}_air_black"] = black_air(images, classes)
        figures[f"{who}_grey_white"] = grey_white_contrast(images, classes, condition)
    figures["fine_power_ratio"] = (fine_power(sampled, classes) / fine_power(real, classes)).mean(
        ).item()
    figures["grey_white_ratio"] = figures["sampled_grey_white"] / figures["real_grey_white"]
    return figures


def label_figures(classes, condition):
    """How a label map hangs together, classes int (D, H, W) -> {name: value}, NaN where there is no
    tumour (no ET):

    pieces      connected pieces of the tumour, however small
    slice_dice  Dice of the tumour in neighbouring slices, mean over those where either shows some
    outside     share of the tumour that hangs on no brain: off the largest piece of the head
    apart       share of ET in pieces of tumour that are ET alone
    """
    labels = bs.tumour_labels(classes, condition)
    ill, et = labels > 0, labels == 3
    if not ill.any():
        return dict.fromkeys(("pieces", "slice_dice", "outside", "apart"), math.nan)
    head, parts = metrics.components(classes > 0), metrics.components(ill)
    main = torch.bincount(head[head > 0]).argmax()
    # NCR and ED, by piece
    other = torch.bincount(parts[ill & ~et], minlength=int(parts.max()) + 1)
    return {"pieces": int(parts.max()), "slice_dice": float(np.mean(
        [bs.dice(a, b) for a, b in zip(ill, ill[1:]) if (a | b).any()])),
            "outside": float((head[ill] != main).float().mean()),
            "apart": float((other[parts[et]] == 0).float().mean()) if et.any() else math.nan}


def judge_labels(made, real, condition, step):
    """Figures of generated label volumes beside real ones, int (N, D, R, R) and (M, D, R, R),
    voxels of `step` mm: means of label_figures of both, and the Frechet distance of their
    characteristics as the network takes them, over those that have a tumour. NaN where fewer than
    two have."""
    figures, spread = {}, []
    for who, volumes in (("real", real), ("made", made)):
        each = [label_figures(its.long(), condition) for its in volumes]
        figures |= {f"{who}_{name}": float(np.nanmean([its[name] for its in each] + [math.nan]))
                    for name in each[0]}
        its = requests.scaled(torch.stack([requests.characteristics(its.long(), condition, step)
                                           for its in volumes]))
        its = its if "ventricles" in bs.CONDITIONS[condition] else its[:, :-1]
        spread.append(its[~torch.isnan(its).any(1)])
    enough = min(map(len, spread)) > 1
    return figures | {"shape_distance": frechet_distance(*spread) if enough else math.nan}


def frechet_distance(a, b):
    """Frechet distance of two sets of features (N, F), (M, F), each taken as a Gaussian [FID]:
    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). It shrinks with more images: compare
    equal numbers only, and beside the distance of two real sets."""
    a, b = a.double(), b.double()
    cov = [torch.cov(x.T) for x in (a, b)]
    values, vectors = torch.linalg.eigh(cov[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov[1] @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum().item() + (cov[0].trace() + cov[1].trace() - 2
                                                          * cross).item()


def kernel_distance(a, b):
    """KID [KID]: squared maximum mean discrepancy of features (N, F), (M, F), kernel (x.y / F +
    1)^3, unbiased: its expectation is 0 for two samples of one distribution, whatever N; it may be
    negative."""
    a, b = a.double(), b.double()
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return (within[0] + within[1] - 2 * kernel(a, b).mean()).item()


def precision_recall(real, made, k=5):
    """Precision, recall, density, coverage of features (N, F), (M, F) [PRDC]; a dict.

    Each point has a ball that reaches to its k-th nearest neighbour in its own set. precision:
    share of made points inside some real ball; recall: the other way round; density: real balls a
    made point lies in, / k; coverage: share of real balls that hold a made point.
    """
    if min(len(real), len(made)) <= k:          # no k-th neighbour
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    real, made = real.double(), made.double()
    # the point itself is first
    reach = [torch.cdist(x, x).kthvalue(k + 1).values for x in (real, made)]
    distance = torch.cdist(real, made)                                           # (N, M)
    inside = distance < reach[0][:, None]
    return {"precision": inside.any(0).double().mean().item(),
            "recall": (distance < reach[1][None]).any(1).double().mean().item(),
            "density": inside.double().sum(0).mean().item() / k,
            "coverage": inside.any(1).double().mean().item()}


def ms_ssim(a, b):
    """Multi-scale structural similarity [MSSSIM] of pictures (N, C, H, W) in [-1, 1], pair by pair:
    (N,).

    As many of the five scales as leave 11 pixels a side, weights renormalised (three at 64 pixels);
    a Gaussian window of 11 pixels, sigma 1.5; each scale is averaged over pixels and channels
    before the scales are multiplied, and counts as 0 where negative.
    """
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    weights = weights[: max(1, min(5, int(math.log2(min(a.shape[-2:]) / 11)) + 1))]
    weights, channels = weights / weights.sum(), a.shape[1]
    line = torch.exp(-((torch.arange(11.0) - 5) / 1.5) ** 2 / 2)
    window = (line[:, None] * line / line.sum() ** 2).expand(channels, 1, 11, 11)
    mean = lambda x: F.conv2d(x, window, groups=channels)
    a, b, c1, c2, out = (a + 1) / 2, (b + 1) / 2, 0.01 ** 2, 0.03 ** 2, 1.0
    for i, weight in enumerate(weights):
        ma, mb = mean(a), mean(b)
        va, vb, shared = mean(a * a) - ma ** 2, mean(b * b) - mb ** 2, mean(a * b) - ma * mb
        value = (2 * shared + c2) / (va + vb + c2)
        # brightness counts at the coarsest scale
        if i + 1 == len(weights):
            value = value * (2 * ma * mb + c1) / (ma ** 2 + mb ** 2 + c1)
        out = out * value.mean((1, 2, 3)).clamp(min=0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return out


def texture_distance(a, b, size=7, directions=64, points=2000):
    """What pictures look like close up, wherever that is: the sliced Wasserstein distance of their
    patches [SWD].

    a, b: dicts with images (N, C, H, W) and classes (N, H, W). Taken are all patches of size x size
    pixels and all channels whose middle lies in the brain, once of fine detail (picture minus its
    3x3 mean), once of the picture halved; in units of a's standard deviation per channel. Each of
    `directions` random unit vectors turns patches into numbers; compared are `points` evenly spaced
    order statistics of both sets; the mean |difference| is averaged over directions and both
    scales. 0 for equal sets; unlike features of a segmenter it sees folds. NaN where a set has no
    such patch. DIFFERS: both sets in a's units (there each in its own), two scales, quantiles of
    all patches in place of a draw.
    """
    channels, edge, out = a["images"].shape[1], size // 2, []
    way = torch.randn(directions, channels, size, size, generator=bs.generator(0, "texture"))
    way = F.normalize(way.flatten(1)).view_as(way)
    for view in (lambda x: x - F.avg_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 2)):
        (x, y), unit = [view(its["images"]) for its in (a, b)], None
        quantiles = []
        for picture, its in ((x, a), (y, b)):
            brain = F.interpolate((its["classes"] > 0).float()[:, None], picture.shape[-2:])[:,
                                                                                             0] > 0
            if unit is None:
                unit = picture.movedim(1, 0)[:, brain].std(1).view(1, -1, 1, 1).clamp(min=1e-6)
            numbers = F.conv2d(picture / unit, way).movedim(1, 0)[:,
                                                                  brain[:, edge:-edge, edge:-edge]]
            if not numbers.shape[1]:
                return math.nan
            ranks = torch.linspace(0, numbers.shape[1] - 1, points).long()
            # (directions, points)
            quantiles.append(numbers.sort(dim=1).values[:, ranks])
        out.append((quantiles[0] - quantiles[1]).abs().mean().item())
    return sum(out) / 2


def modality_correlation(images, classes, n_classes, voxels=200):
    """How modalities go together inside each class: Pearson correlation of every pair of modalities
    over all its voxels, (n_classes - 1, pairs) without air; NaN where a class has fewer than
    `voxels`. images (N, C, H, W), classes (N, H, W)."""
    first, second = torch.triu_indices(images.shape[1], images.shape[1], 1)
    out = torch.full((n_classes - 1, len(first)), math.nan)
    for k in range(1, n_classes):
        inside = images.movedim(1, 0)[:, classes == k]                           # (C, voxels)
        if inside.shape[1] >= voxels:
            out[k - 1] = torch.corrcoef(inside)[first, second]
    return out


def slice_set(prepared, per_case=40):
    """Slices of cases as one dict of tensors: images (N, C, R, R) in [-1, 1], classes (N, R, R),
    position (N,), case (N,): `per_case` slices of each, evenly spread over those with brain on 5%
    of the picture (some twice where a case has fewer), so that equal numbers of cases are equal
    numbers of slices. prepared: list of (Case, what prepare_case returns)."""
    parts = {"images": [], "classes": [], "position": [], "case": []}
    for number, (_, got) in enumerate(prepared):
        shown = np.where((got["classes"] > 0).mean((1, 2)) > 0.05)[0]
        pick = shown[np.linspace(0, len(shown) - 1, per_case).astype(int)]
        parts["case"].append(np.full(per_case, number))
        for name in ("images", "classes", "position"):
            parts[name].append(got[name][pick])
    its = {name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items()}
    return {**its, "images": bs.to_images(its["images"])}


def compare_sets(real, other):
    """How far apart two sets of slices are: {figure: number}. real, other: from slice_set, with
    "features" (N, F) of each slice added. Frechet and kernel distance and the rest in feature
    space; how far apart they are close up; and how much the correlation of modalities inside each
    label differs."""
    a, b = real["features"], other["features"]
    between = [modality_correlation(its["images"], its["classes"], 5) for its in (real, other)]
    return {"Frechet distance": frechet_distance(a, b), "kernel distance": kernel_distance(a, b),
            **precision_recall(a, b), "texture distance": texture_distance(real, other),
            "modality correlation, mean error": (between[0] - between[1]).abs().nanmean().item()}


def compare_draws(sets, draws=10):
    """compare_sets of synthetic against held-out real slices, and of training against held-out real
    slices: the floor. sets: {"synthetic", "real", "training"} from slice_set with features.

    A set of more cases is nearer to anything: so every draw takes the same number of cases from
    each, at random, and what is returned is the mean over draws: ({"synthetic": {figure: ..},
    "real": {..}}, the same with standard deviations, number of cases). With them pair_similarity of
    synthetic and held-out slices.
    """
    cases = min(len(its["case"].unique()) for its in sets.values())
    rng, found = np.random.default_rng(0), {"synthetic": [], "real": []}
    for _ in range(draws):
        drawn = {}
        for who, its in sets.items():
            chosen = torch.from_numpy(rng.permutation(int(its["case"].max()) + 1)[:cases])
            rows = torch.isin(its["case"], chosen)
            drawn[who] = {name: values[rows] for name, values in its.items()}
        for who, other in (("synthetic", "synthetic"), ("real", "training")):
            found[who].append({**compare_sets(drawn["real"], drawn[other]),
                               "MS-SSIM of pairs (less: more varied)": pair_similarity(drawn[who])})
    over = lambda f: {who: {name: float(f([draw[name] for draw in its])) for name in its[0]}
                      for who, its in found.items()}
    return over(np.mean), over(np.std), cases


def pair_similarity(its, pairs=100):
    """Mean MS-SSIM of pairs of slices from different cases at about the same height in the brain:
    the lower, the more varied a set is. its: from slice_set; NaN for a set of one case."""
    if len(its["case"].unique()) < 2:
        return math.nan
    picks = np.random.default_rng(0).integers(0, len(its["case"]), pairs)
    partner = [int(((its["position"] - its["position"][i]).abs() + 9
                    * (its["case"] == its["case"][i])).argmin()) for i in picks]
    return ms_ssim(its["images"][picks], its["images"][partner]).mean().item()


def mean_dice(segmenter, prepared):
    """{region: mean Dice over cases} on the model's grid, where synthetic cases live: on a finer
    one real cases would lose to resampling what synthetic ones cannot. prepared: [(Case, what
    prepare_case returns)]."""
    scores = [segmenter.slice_dice(bs.to_images(got["images"]),
                                   torch.from_numpy(bs.tumour_labels(got["classes"]))) for _,
              got in prepared]
    return dict(zip(bs.REGIONS, np.mean(scores, 0).tolist()))


def known_truth(segmenters, sets):
    """Synthetic cases as known truth: does a segmenter's Dice on them say what it will be on real
    ones? A dict: mean Dice of every segmenter on both, Spearman's rho (from five segmenters on),
    mean difference. sets: (synthetic, real) Cases."""
    pairs = []
    for one in segmenters:
        prepared = [[(c, slices.prepare_case(c, one.resolution, one.fov, "tumour")) for c in cases]
                    for cases in sets]
        pairs.append([float(np.mean(list(mean_dice(one, its).values()))) for its in prepared])
    on_made, on_real = zip(*sorted(pairs))
    return {"dice_on_synthetic": on_made, "dice_on_real": on_real,
            "spearman": metrics.rank_correlation(on_made, on_real) if len(pairs) >= 5
            else float("nan"), "mean_error": float(np.mean(np.abs(np.subtract(on_made, on_real))))}


def judged_by(args, segmenters, made):
    """The real cases --judge compares with: the split, and the hashes of its test cases. BadInput
    where a segmenter was trained or chosen by one of those, or trained on the set it shall
    judge."""
    _, split = checks.find_data(SimpleNamespace(data=args.data, out=args.segmenter[0],
                                                phantoms=args.phantoms, scanner=args.scanner,
                                                split=args.split, skip_bad=args.skip_bad))
    hashes = {digest for case in split["test"] for digest in slices.hashes_of(case)}
    for path, segmenter in zip(args.segmenter, segmenters):
        if not hashes or segmenter.seen & hashes:
            raise bs.BadInput(f"no real case is held out from {path}; judge with the --data, "
                              "--split or --phantoms it was trained with")
        if segmenter.seen & {writing.sidecar_hash(case) for case in made}:
            raise bs.BadInput(f"{path} was trained on {args.judge}; judge with a segmenter trained "
                              "on real cases alone")
    return split, hashes


def judge(args, device):
    """How good a folder of synthetic cases is, beside real held-out cases: table, judge.json,
    judge.png."""
    segmenters = [runs.load_segmenter(path, device) for path in args.segmenter]
    first, made = segmenters[0], nifti.find_cases(args.judge)
    for case in made:
        writing.synthetic_facts(case)                # says at once which case has no sidecar
    split, hashes = judged_by(args, segmenters, made)
    held, owing = split["test"], sum(writing.contaminated(case, hashes) for case in made)
    spread = np.linspace(0, len(split["train"]) - 1, min(5 * len(held),
                                                         len(split["train"]))).astype(int)
    prepared = {who: [(c, slices.prepare_case(c, first.resolution, first.fov, "tumour"))
                      for c in cases] for who, cases in (("synthetic", made), ("real", held),
                                                         ("training",
                                                          [split["train"][i] for i in spread]))}
    sets = {who: slice_set(its) for who, its in prepared.items()}
    for its in sets.values():
        its["features"] = first.features(its["images"])
    far, spreads, cases = compare_draws(sets)
    dices = {who: mean_dice(first, prepared[who]) for who in ("synthetic", "real")}
    rough = {who: {"slice-to-slice roughness": mean_roughness(prepared[who])}
             for who in ("synthetic", "real")}
    count = cases * len(sets["real"]["case"]) // len(held)
    print(f"{len(made)} synthetic cases against {len(held)} held-out real ones; distances: ten "
          f"draws of {cases} cases, {count} slices, of each, mean ± spread;\nfeatures: last stage "
          f"of the encoder of {args.segmenter[0]}, averaged over a slice")
    print(f"{'':38}{'synthetic':>10}{'real':>20}  real is")
    report = {"synthetic_cases": len(made), "held_out_cases": len(held), "cases_a_draw": cases,
              "slices_a_draw": count, "synthetic_cases_that_owe_to_held_out": owing,
              "synthetic": {}, "real": {}, "sd_over_draws": spreads}
    for figures, what in ((dices, "the same segmenter on held-out cases, which is the ceiling"),
                          (far, "training cases against held-out ones, which is the floor"),
                          (rough, "held-out cases")):
        for name in figures["real"]:
            label, words = f"Dice {name}" if figures is dices else name, what
            if name.startswith("MS-SSIM"):
                words = "held-out cases"
            sd = [f" ± {spreads[who][name]:.3f}" if figures is far else ""
                  for who in ("synthetic", "real")]
            print(f"{label:38}{figures['synthetic'][name]:10.4f}{sd[0]}{figures['real'][name]:10.4f}{sd[1]}  {words}")
            for who in ("synthetic", "real"):
                report[who][label] = figures[who][name]
    if owing:
        print(f"note: {owing} synthetic cases come from a generator or label maps that used "
              "held-out cases")
    shares = ["precision", "recall", "density", "coverage"]
    panels = [("Dice against the labels", "linear",
               {who: (list(its), list(its.values()), None) for who, its in dices.items()}),
              ("against held-out cases, in feature space", "linear",
               {who: (shares, [its[name] for name in shares], None) for who, its in far.items()})]
    if len(segmenters) > 1:
        report["known_truth"] = known = known_truth(segmenters, (made, held))
        on_made, on_real = known["dice_on_synthetic"], known["dice_on_real"]
        panels.append(("segmenters: Dice on real over Dice on synthetic", "linear",
                       {f"{len(on_made)} segmenters": (on_made, on_real, None),
                        "equal": (on_made, on_made)}))
        print("segmenters, mean Dice on synthetic / real: "
              + ", ".join(f"{a:.3f} / {b:.3f}" for a, b in zip(on_made, on_real)))
        print(f"as known truth: Spearman {known['spearman']:.2f} (needs five segmenters), "
              f"mean error {known['mean_error']:.3f}")
    files.write_json(Path(args.judge) / "judge.json", report)
    pictures.draw_lines(Path(args.judge) / "judge.png", panels, "")
    print(f"wrote: {Path(args.judge) / 'judge.json'}\nwrote: {Path(args.judge) / 'judge.png'}")
