"""What did a network learn, beyond its prior? Do samples look like scans, do they obey their masks?

Figures stand beside those of the prior alone, which brightens every label as it should be and
blackens air before any training: what it has too, a network need not have learned.

SOURCES
    [FID]     Frechet distance of features: Heusel et al. 2017, arXiv 1706.08500
              GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium
    [SWD]     sliced Wasserstein distance of patches: Karras et al. 2017, arXiv 1710.10196
              Progressive Growing of GANs for Improved Quality, Stability, and Variation
"""
import argparse
import dataclasses
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import checks, files, nifti, requests, runs, slices, writing

HEADS = 4                       # that a run of images draws at the end
SLICES_A_CASE = 40              # that are compared
DRAWS = 10                      # of equally many cases from each set
# Modalities and the label that is brighter there than healthy brain.
BRIGHT = ("t1ce", "ET"), ("flair", "ED")
PLANES = "axial", "coronal", "sagittal"
DISTANCES = *(f"texture distance, {plane}" for plane in PLANES), "Frechet distance"
SKILL_AT = 125, 375, 625, 875   # noise levels
PATCHES = 200_000               # of a set in a texture distance; few look further apart


# ------------------------------------------------------------------------------ the prior alone ---

class ZeroNet(torch.nn.Module):
    """In place of a network, with its numbers of channels and classes: outputs 0."""

    def __init__(self, net):
        super().__init__()
        self.channels, self.classes, self.around = net.channels, net.classes, net.around

    def forward(self, x_t, t, onehot, scalars):
        return x_t.new_zeros(len(x_t), self.channels, *x_t.shape[2:])


def prior_alone(denoiser):
    """The Denoiser as it was before any training: the same prior and schedule, and a ZeroNet."""
    return dataclasses.replace(denoiser, net=ZeroNet(denoiser.net))


def skill(denoiser, x0, classes, place, key):
    """By how much a network removes noise better than the prior alone: 1 - the mean squared error
    of x0_hat inside the brain / that of the prior alone, at each noise level of SKILL_AT -> list. 0
    is the prior alone, 1 is perfect. x0 (N, C, H, W), or slabs, classes (N, H, W), place (N, 2);
    key: of generator. NaN without brain."""
    found, onehot = [], bs.one_hot(classes, denoiser.net.classes)
    channels = denoiser.net.channels
    for level in SKILL_AT:
        t = torch.full((len(x0),), level)
        signal, sigma = bs.signal_sigma(denoiser.alpha_bar, t)
        x_t = bs.add_noise(x0, torch.randn(x0.shape, generator=bs.generator(*key, level)), signal,
                           sigma)
        errors = []
        for model in (denoiser, prior_alone(denoiser)):
            x0_hat, _ = bs.split_v(x_t[:, :channels], model(x_t, t, onehot, place), signal, sigma)
            error = (x0_hat - x0[:, :channels]) ** 2
            errors.append(error.movedim(1, -1)[classes > 0].mean().item())
        found.append(1 - errors[0] / errors[1])
    return found


def table(rows, columns=("samples", "prior alone", "real")):
    """Lines of a closing table. rows: (figure, then a number or a text for every column); NaN,
    where there is nothing to measure, is a dash."""
    def text(value):
        return value if isinstance(value, str) else "-" if np.isnan(value) else f"{value:.3f}"

    width = max(len(row[0]) for row in rows)
    return [f"{name:{width}}" + "".join(f"{text(value):>13}" for value in values)
            for name, *values in [("figure", *columns), *rows]]


# -------------------------------------------------------------------------------------- slices ---

def healthy_brain(classes, condition):
    """Bool, True where a class map shows brain without tumour."""
    return (classes > 0) & (bs.tumour_labels(classes, condition) == 0)


def lesion_contrast(images, classes, condition, modality, label):
    """In how many slices is a tumour label brighter than healthy brain? -> (fraction of the slices
    that count, their number).

    images (N, C, H, W), classes (N, H, W). Slices with at least 10 pixels of the label and some
    healthy brain count. Compared are the mean signals in `modality` inside the label and in all
    healthy classes. NaN where no slice counts.
    """
    image = images[:, bs.MODALITIES.index(modality)]
    lesion = classes == bs.CONDITIONS[condition].index(label)
    healthy = healthy_brain(classes, condition)
    counted = torch.where((lesion.sum((1, 2)) >= 10) & healthy.any(2).any(1))[0].tolist()
    brighter = [bool(image[i][lesion[i]].mean() > image[i][healthy[i]].mean()) for i in counted]
    return (sum(brighter) / len(brighter) if brighter else np.nan), len(brighter)


def black_air(images, classes):
    """Fraction of air pixels at or below -0.95, over all modalities and slices."""
    return (images.movedim(1, -1)[classes == 0] <= -0.95).float().mean().item()


def fine_power(images, classes):
    """Mean squared high-frequency signal of every modality, (C,): each picture minus its 3x3 mean,
    inside the brain, where no air is within two pixels along both axes. Too low is blur, too high
    is noise."""
    inside = F.max_pool2d((classes == 0).float(), 5, 1, 2).unsqueeze(1) == 0
    fine = images - F.avg_pool2d(images, 3, 1, 1)
    return (fine ** 2 * inside).sum((0, 2, 3)) / inside.sum().clamp(min=1)


def grey_white_contrast(images, classes, condition):
    """How far apart grey and white matter are on T1: mean over slices of (mean of the white cluster
    minus mean of the grey one). Clusters are found in each picture by tissue_clusters, since a
    sampled brain has its own folds. Slices with at least 300 healthy pixels count; NaN without
    any, and without T1, T2 or FLAIR."""
    contrast = []
    if not {"t1", "t2", "flair"} <= set(bs.MODALITIES):
        return np.nan
    for image, mask in zip(images, healthy_brain(classes, condition)):
        t1 = image[bs.MODALITIES.index("t1")].numpy()
        tissue = slices.tissue_clusters(((image + 1) * 127.5).numpy(), mask.numpy())
        if mask.sum() >= 300 and (tissue == 2).any() and (tissue == 3).any():
            contrast.append(t1[tissue == 3].mean() - t1[tissue == 2].mean())
    return float(np.mean(contrast)) if contrast else np.nan


def judge_slices(real, sampled, classes, condition):
    """Figures of slices, each by itself: {name: value}. real, sampled (N, C, H, W) in [-1, 1] on
    the same label maps classes (N, H, W). NaN where there is nothing to measure."""
    figures = {}
    for source, images in (("real", real), ("sampled", sampled)):
        for modality, label in BRIGHT:
            if modality not in bs.MODALITIES or label not in bs.LABELS:
                continue
            fraction, count = lesion_contrast(images, classes, condition, modality, label)
            figures[f"{source}_{modality}_{label}_above_brain"] = fraction
            figures[f"slices_with_{label}"] = count
        figures[f"{source}_air_black"] = black_air(images, classes)
        figures[f"{source}_grey_white"] = grey_white_contrast(images, classes, condition)
    power = fine_power(sampled, classes) / fine_power(real, classes)
    return {**figures, "fine_power_ratio": power.mean().item(),
            "grey_white_ratio": figures["sampled_grey_white"] / figures["real_grey_white"]}


def doubts(figures):
    """Sentences about figures of real slices that are too low to be true; figures: of
    judge_slices."""
    return [f"note: {label} is brighter than brain on {modality} in "
            f"{figures[f'real_{modality}_{label}_above_brain']:.0%} only of the real slices: were "
            "scans exchanged, or do labels mean something else? Run python brainsyn.py DIR"
            for modality, label in BRIGHT if figures.get(f"slices_with_{label}", 0) >= 5
            and figures[f"real_{modality}_{label}_above_brain"] < 0.8]


# ------------------------------------------------------------------------------------- volumes ---

def planes_of(images, classes):
    """A volume (D, C, H, W) and its class map (D, H, W) as axial, coronal and sagittal slices:
    three pairs."""
    return [(bs.turned(images, plane), classes.transpose(0, plane)) for plane in range(3)]


def banding(images, classes, condition):
    """By how much all of a slice is brighter than its neighbour, along z, y and x: list of three.

    The difference of neighbours, where both are healthy brain, is averaged over 9x9 pixels, where
    80% of these count. Given is the root mean square of that, over the standard deviation of brain
    voxels; mean over modalities. Compare with a scan on the same label map: a volume of slices that
    were drawn alone has more along their axis. images (D, C, H, W), classes (D, H, W).
    """
    spread, found = images.movedim(1, 0)[:, classes > 0].std(1), []
    for view, seen in planes_of(images, classes):
        healthy = healthy_brain(seen, condition)
        pairs = (healthy[1:] & healthy[:-1]).unsqueeze(1).float()
        share = F.avg_pool2d(pairs, 9, 1, 4)
        smooth = F.avg_pool2d((view[1:] - view[:-1]) * pairs, 9, 1, 4) / share.clamp(min=1e-6)
        counted = (pairs > 0) & (share >= 0.8)
        power = (smooth ** 2 * counted).sum((0, 2, 3)) / counted.sum().clamp(min=1)
        found.append((power.sqrt() / spread).mean().item())
    return found


def fold_dice(images, classes, condition):
    """Do folds run through? Dice of the CSF (tissue_clusters) of neighbouring slices, where both
    are healthy brain, along z, y and x: list of three. Arguments as in banding; NaN without T1, T2
    or FLAIR."""
    if not {"t1", "t2", "flair"} <= set(bs.MODALITIES):
        return [np.nan] * 3
    healthy = healthy_brain(classes, condition)
    scans = ((images.movedim(1, 0) + 1) * 127.5).numpy()
    fluid = torch.from_numpy(slices.tissue_clusters(scans, healthy.numpy()) == 1)
    found = []
    for axis in range(3):
        at, here = fluid.transpose(0, axis), healthy.transpose(0, axis)
        pairs = here[1:] & here[:-1]
        found.append(bs.dice(at[1:] & pairs, at[:-1] & pairs))
    return found


def evenly_with_brain(classes, count):
    """Numbers of `count` slices of a class map (D, H, W), evenly spread over those with brain on 5%
    of the picture, or on half as much as any where none has that; some twice where there are
    fewer."""
    share = (classes > 0).float().mean((1, 2))
    shown = torch.where(share > min(0.05, float(share.max()) / 2))[0]
    return shown[torch.linspace(0, len(shown) - 1, count).long()]


def slices_of(volumes, classes):
    """Ten slices along every axis of each volume: for axial, coronal and sagittal ones a dict of
    images and classes."""
    sets = []
    for views in zip(*map(planes_of, volumes, classes)):
        # not the first and the last, which show little
        rows = [evenly_with_brain(seen, 12)[1:-1] for _, seen in views]
        sets.append({"images": torch.cat([view[at] for (view, _), at in zip(views, rows)]),
                     "classes": torch.cat([seen[at] for (_, seen), at in zip(views, rows)])})
    return sets


def judge_volumes(real, sampled, classes, condition):
    """How volumes hang together and look from three sides, beside scans on the same label maps:
    lists with an entry a head, real and sampled (D, C, H, W), classes (D, H, W) -> {name: value}.
    banding_z to folds_x are over those of the scans; texture_axial to texture_sagittal are
    distances."""
    figures = {}
    for name, measure in (("banding", banding), ("folds", fold_dice)):
        drawn, wanted = [np.mean([measure(*pair, condition) for pair in zip(volumes, classes)], 0)
                         for volumes in (sampled, real)]
        figures |= dict(zip((f"{name}_{axis}" for axis in "zyx"), (drawn / wanted).tolist()))
    sets = zip(PLANES, slices_of(real, classes), slices_of(sampled, classes))
    return figures | {f"texture_{plane}": texture_distance(*pair) for plane, *pair in sets}


def judge_run(real, sampled, prior, classes, condition, others=None):
    """The closing figures of a run: judge_slices and judge_volumes of samples, and of those of the
    prior alone, drawn with the same noise, as "prior_...". Arguments as there; others: scans and
    label maps of other heads, for the floor of texture distances, "real_..."."""
    joined = [{name: torch.cat([part[name] for part in slices_of(volumes, classes)])
               for name in ("images", "classes")} for volumes in (real, sampled, prior)]
    maps = joined[0]["classes"]
    figures, alone = [judge_slices(joined[0]["images"], part["images"], maps, condition)
                      | judge_volumes(real, volumes, classes, condition)
                      for part, volumes in zip(joined[1:], (sampled, prior))]
    pairs = zip(slices_of(real, classes), slices_of(*others)) if others else ()
    figures |= dict.fromkeys((f"real_texture_{plane}" for plane in PLANES), np.nan)
    for plane, pair in zip(PLANES, pairs):
        figures[f"real_texture_{plane}"] = texture_distance(*pair)
    return figures | {f"prior_{name.removeprefix('sampled_')}": value
                      for name, value in alone.items() if not name.startswith(("real_", "slices_"))}


def head_table(figures):
    """The closing table of a run of images, lines of text, what shows the network first. figures:
    of judge_run, with "skill"."""
    rows = [(f"skill at t = {t}", value, 0.0, 1.0) for t, value in zip(SKILL_AT, figures["skill"])]
    rows += [(f"texture distance, {plane}", *(figures[f"{source}texture_{plane}"]
                                              for source in ("", "prior_", "real_")))
             for plane in PLANES]
    for words, name in (*((f"{word} along {axis} / real", f"{name}_{axis}")
                          for word, name in (("banding", "banding"), ("folds that run", "folds"))
                          for axis in "zyx"),
                        ("fine detail / real", "fine_power_ratio"),
                        ("grey-white contrast / real", "grey_white_ratio")):
        same = np.nan if np.isnan(figures[name]) else 1.0
        rows.append((words, figures[name], figures[f"prior_{name}"], same))
    names = {f"{modality}_{label}_above_brain": f"{label} above brain on {modality}, of "
             f"{figures[f'slices_with_{label}']} slices"
             for modality, label in BRIGHT if f"slices_with_{label}" in figures}
    for name, words in (names | {"air_black": "air at or below -0.95"}).items():
        rows.append((words, *(figures[f"{source}_{name}"]
                              for source in ("sampled", "prior", "real"))))
    return table(rows)


# ---------------------------------------------------------------------------------- label maps ---

def label_figures(classes, condition):
    """How a label map hangs together, classes int (D, H, W) -> {name: value}, NaN where there is no
    tumour (apart: no ET):

    pieces      connected pieces of the tumour, however small
    slice_dice  Dice of the tumour in neighbouring slices, mean over those where either shows some
    outside     fraction of the tumour outside the largest connected piece of the head
    apart       fraction of the last label (ET) in pieces of tumour that are this label alone
    """
    labels = bs.tumour_labels(classes, condition)
    tumour, et = labels > 0, labels == len(bs.LABELS)
    if not tumour.any():
        return dict.fromkeys(("pieces", "slice_dice", "outside", "apart"), np.nan)
    head, pieces = slices.components(classes > 0), slices.components(tumour)
    largest = torch.bincount(head[head > 0]).argmax()
    slice_dice = [bs.dice(a, b) for a, b in zip(tumour, tumour[1:]) if (a | b).any()]
    # voxels of the other labels in each piece
    other = torch.bincount(pieces[tumour & ~et], minlength=int(pieces.max()) + 1)
    return {"pieces": int(pieces.max()), "slice_dice": float(np.mean(slice_dice)),
            "outside": float((head[tumour] != largest).float().mean()),
            "apart": float((other[pieces[et]] == 0).float().mean()) if et.any() else np.nan}


def judge_labels(sampled, real, condition, step):
    """Figures of sampled label volumes beside real ones, int (N, D, R, R) and (M, D, R, R),
    voxels of `step` mm -> {name: value}: the means of label_figures over the volumes of each set,
    as "made_..." and "real_...", and "shape_distance"."""
    figures = {}
    for source, volumes in (("real", real), ("made", sampled)):
        rows = [label_figures(volume.long(), condition) for volume in volumes]
        for name in rows[0]:
            values = [row[name] for row in rows] + [np.nan]
            figures[f"{source}_{name}"] = float(np.nanmean(values))
    return figures | {"shape_distance": shape_distance(sampled, real, condition, step)}


def shape_distance(volumes, others, condition, step):
    """Frechet distance of the characteristics of label volumes with a tumour, scaled as for the
    network. Arguments as in judge_labels; NaN where fewer than two have a tumour."""
    shapes = []
    for group in (volumes, others):
        rows = [requests.characteristics(volume.long(), condition, step) for volume in group]
        shape = requests.scaled(torch.stack(rows))
        if "ventricles" not in bs.CONDITIONS[condition]:
            shape = shape[:, :-1]
        shapes.append(shape[~shape.isnan().any(1)])
    return frechet_distance(*shapes) if min(map(len, shapes)) > 1 else np.nan


# ------------------------------------------------------------------------------- sets of cases ---

def frechet_distance(a, b):
    """Frechet distance of two sets of features (N, F), (M, F), each taken as a Gaussian [FID]:
    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). It shrinks with more images: compare
    equal numbers only, and beside the distance of two real sets."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    spread = cov_a.trace() + cov_b.trace() - 2 * cross
    return ((a.mean(0) - b.mean(0)) ** 2).sum().item() + spread.item()


def texture_distance(a, b):
    """What pictures look like close up, anywhere in the brain: the sliced Wasserstein distance of
    their patches [SWD].

    a, b: dicts with images (N, C, H, W) and classes (N, H, W). Taken are patches of 7 x 7 pixels
    and all channels whose middle lies in the brain, all or PATCHES of them evenly spread, once of
    fine detail (picture minus its 3x3 mean), once of the picture at half size; in units of a's
    standard deviation per channel.
    Each of 64 random unit vectors turns every patch into a number. Compared are 2000 evenly spaced
    order statistics of both sets; the mean |difference| is averaged over vectors and both scales.
    0 for equal sets. Unlike features of a segmenter it sees folds. NaN where a set has no such
    patch. DIFFERS: both sets in a's units (there each in its own), two scales, quantiles of evenly
    spread patches in place of a random selection.
    """
    vectors = torch.randn(64, 49 * a["images"].shape[1], generator=bs.generator(0, "texture"))
    vectors, distances = F.normalize(vectors), []
    for scale in ("fine", "half"):
        quantiles = []
        for group in (a, b):
            fine = group["images"] - F.avg_pool2d(group["images"], 3, 1, 1)
            view = fine if scale == "fine" else F.avg_pool2d(group["images"], 2)
            brain = F.interpolate((group["classes"] > 0).float()[None], view.shape[-2:])[0] > 0
            if group is a:
                unit = view.movedim(1, 0)[:, brain].std(1).view(1, -1, 1, 1).clamp(min=1e-6)
            middles = brain[:, 3:-3, 3:-3].nonzero()
            if not len(middles):
                return np.nan
            n, y, x = middles[slices.evenly(len(middles), PATCHES)].T
            patches = (view / unit).unfold(2, 7, 1).unfold(3, 7, 1)[n, :, y, x]     # (P, C, 7, 7)
            numbers = vectors @ patches.flatten(1).T                                # (64, P)
            ranks = torch.linspace(0, numbers.shape[1] - 1, 2000).long()
            quantiles.append(numbers.sort(dim=1).values[:, ranks])          # (64, 2000)
        distances.append((quantiles[0] - quantiles[1]).abs().mean().item())
    return sum(distances) / 2


def slice_set(segmenter, prepared):
    """Slices of cases as one dict of tensors: images (N, C, R, R) in [-1, 1], classes (N, R, R),
    case (N,), features (N, F) of the segmenter; "coronal images", as bytes, "coronal
    classes" and the same of sagittal slices. Of each case SLICES_A_CASE slices along every axis,
    evenly spread over those with brain on 5% of the picture (some twice where there are fewer), so
    that equal numbers of cases are equal numbers of slices. prepared: list of what prepare_case
    returns."""
    parts = {plane: [] for plane in PLANES}
    for got in prepared:
        cubes = [torch.from_numpy(got[name]) for name in ("images", "classes")]
        for plane, (images, classes) in zip(PLANES, planes_of(*cubes)):
            rows = evenly_with_brain(classes, SLICES_A_CASE)
            parts[plane].append((images[rows], classes[rows]))
    joined = {plane: [torch.cat(part) for part in zip(*parts[plane])] for plane in PLANES}
    images, classes = joined["axial"]
    images, case = bs.to_images(images), torch.arange(len(prepared))
    group = {"images": images, "classes": classes,
             "case": case.repeat_interleave(SLICES_A_CASE), "features": segmenter.features(images)}
    for plane in PLANES[1:]:
        group[f"{plane} images"], group[f"{plane} classes"] = joined[plane]
    return group


def distances_of(a, b):
    """DISTANCES of two sets of slices from slice_set: list of numbers."""
    pairs = [(a, b)] + [[{"images": bs.to_images(group[f"{plane} images"]),
                          "classes": group[f"{plane} classes"]} for group in (a, b)]
                        for plane in PLANES[1:]]
    return [*(texture_distance(*pair) for pair in pairs),
            frechet_distance(a["features"], b["features"])]


def compare_draws(sets):
    """Distances of synthetic from held-out real slices, and of training from held-out real slices:
    the floor. sets: {"synthetic", "real", "training", perhaps "prior"} from slice_set; "prior": the
    synthetic cases in the same order, drawn by the prior alone.

    A set of more cases is nearer to anything. Therefore every one of DRAWS draws takes the same
    number of cases from each set, at random. Returns ({"synthetic": {name of DISTANCES: mean over
    draws}, "prior": {..}, "real": {..}}, the same with standard deviations, number of cases).
    """
    cases = min(len(group["case"].unique()) for group in sets.values())
    other = {"synthetic": "synthetic", "prior": "prior", "real": "training"}
    rng, found = np.random.default_rng(0), {name: [] for name in other if name in sets}
    for _ in range(DRAWS):
        chosen, drawn = {}, {}
        for name in ("synthetic", "real", "training"):
            chosen[name] = rng.permutation(int(sets[name]["case"].max()) + 1)[:cases]
        chosen["prior"] = chosen["synthetic"]
        for name, group in sets.items():
            rows = torch.isin(group["case"], torch.from_numpy(chosen[name]))
            drawn[name] = {key: values[rows] for key, values in group.items()}
        for name, rows in found.items():
            rows.append(distances_of(drawn["real"], drawn[other[name]]))
    found = {name: np.array(rows).T.copy() for name, rows in found.items()}     # (4, DRAWS)
    mean = {name: dict(zip(DISTANCES, rows.mean(1).tolist())) for name, rows in found.items()}
    sd = {name: dict(zip(DISTANCES, rows.std(1).tolist())) for name, rows in found.items()}
    return mean, sd, cases


def held_out_split(args, segmenter, synthetic):
    """The split of the real cases that --judge compares with, and the case_hashes of its test
    cases. BadInput where the segmenter was trained or chosen by one of the test cases, or trained
    on one of the `synthetic` Cases, or where one of these has no sidecar."""
    sidecars = {writing.sidecar_hash(case) for case in synthetic}
    trained = runs.load_checkpoint(args.segmenter, "segmenter", names=("best.pt",))["args"]
    wanted = {"out": args.segmenter, "phantoms": trained["phantoms"]}
    _, split = checks.find_data(argparse.Namespace(**vars(args) | wanted))
    hashes = {digest for case in split["test"] for digest in slices.hashes_of(case)}
    if not hashes or segmenter.seen & hashes:
        raise bs.BadInput(f"no case is held out from {args.segmenter}; give --data and --split")
    if segmenter.seen & sidecars:
        raise bs.BadInput(f"{args.segmenter} was trained on {args.judge}; choose another segmenter")
    return split, hashes


def means_over_cases(segmenter, prepared):
    """Mean Dice of every region and mean banding, over cases, as a dict. prepared: what
    prepare_case returns of each. Dice is measured on the model's grid, where synthetic cases live:
    on a finer grid only real cases would lose by resampling."""
    dices, bands = [], []
    for got in prepared:
        images, classes = bs.to_images(got["images"]), torch.from_numpy(got["classes"])
        dices.append(segmenter.slice_dice(images, bs.tumour_labels(classes)))
        bands.append(banding(images, classes, "tumour"))
    names = [f"Dice {region}" for region in bs.REGIONS], [f"banding along {axis}" for axis in "zyx"]
    return {name: value for words, rows in zip(names, (dices, bands))
            for name, value in zip(words, np.mean(rows, 0).tolist())}


def draw_prior_alone(cases, path, device, folder):
    """Synthetic Cases once more, as the prior of their generator draws them alone: the same label
    maps, outlines, noise and settings, written into `folder` -> list of Cases. An empty list, and
    a line that says why, where the checkpoint at `path` did not make all of them."""
    facts = [writing.synthetic_facts(case) for case in cases]
    try:
        denoiser, state = runs.load_generator(path, device)
        if {row["CheckpointSHA256"] for row in facts} != {files.file_hash(state["file"])}:
            raise bs.BadInput(f"{path} is not the generator of all cases; name it by --checkpoint")
    except bs.BadInput as error:
        print(f"no column prior alone: {error}")
        return []
    for case, row in zip(cases, facts):
        scans, labels, affine = nifti.read_case(case)
        classes = np.where(labels > 0, labels + 1, (scans > 0).any(0))
        if state["condition"] != "tumour":
            classes, _ = nifti.read_nifti(case.folder / writing.CLASSES_NAME.format(case.case))
        classes = slices.to_slices(classes).astype(np.uint8)
        settings = {name: row[name.capitalize()] for name in bs.SAMPLING}
        key = row["Seed"], int(row["Case"].split("-")[2])
        images = bs.sample_volume(prior_alone(denoiser), torch.from_numpy(classes).long(), key,
                                  settings)
        counts = np.moveaxis(writing.image_counts(images, classes), 1, 0)
        writing.write_case(folder, case.case, slices.from_slices(counts), labels, affine, row)
    return nifti.find_cases(folder)


def judge(args, device):
    """How good a folder of synthetic cases is, beside real held-out cases and, where --checkpoint
    made it, beside what the prior alone draws: table, judge.json."""
    segmenter = runs.load_segmenter(args.segmenter, device)
    synthetic = nifti.find_cases(args.judge)
    split, hashes = held_out_split(args, segmenter, synthetic)
    real, training = split["test"], split["train"]
    some = [training[i] for i in slices.evenly(len(training), 5 * len(real))]
    grid, groups = (segmenter.resolution, segmenter.fov, "tumour"), {"synthetic": synthetic}
    prepared, sets = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        alone = draw_prior_alone(synthetic, args.checkpoint, device, scratch)
        groups |= {"prior": alone} if alone else {}
        for name, cases in (groups | {"real": real, "training": some}).items():
            prepared[name] = [slices.prepare_case(case, *grid) for case in cases]
            sets[name] = slice_set(segmenter, prepared[name])
    figures, sd, drawn = compare_draws(sets)
    for name, row in figures.items():
        figures[name] = {**row, **means_over_cases(segmenter, prepared[name])}
    overlap = sum(writing.contaminated(case, hashes) for case in synthetic)
    report = {"synthetic_cases": len(synthetic), "held_out_cases": len(real), "cases_a_draw": drawn,
              "slices_a_draw": drawn * SLICES_A_CASE,
              "synthetic_cases_that_owe_to_held_out": overlap, **figures, "sd_over_draws": sd}
    files.write_json(f"{args.judge}/judge.json", report)
    print(f"{len(synthetic)} synthetic cases ({overlap} owe to held-out ones), {len(real)} real")
    print(f"ones held out; distances: ten draws of {drawn} cases, {drawn * SLICES_A_CASE} slices")
    print("real: of distances the floor, training against held-out cases; of Dice the ceiling")
    names = [name.replace("prior", "prior alone") for name in figures]
    rows = [(figure, *(row[figure] for row in figures.values()),
             "  ± " + ", ".join(f"{row[figure]:.3f}" for row in sd.values())
             if figure in DISTANCES else "") for figure in figures["real"]]
    print("\n".join(table(rows, (*names, ""))))
    print(f"wrote: {args.judge}/judge.json")
