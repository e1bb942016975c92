"""Figures of a segmenter as BraTS counts them: per region and per case, over the whole volume.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import devices, nifti, slices


# mm, where exactly one of two masks is empty: as BraTS counts
HD95_MISSED = 373.13


def surface(mask):
    """Voxels of a bool mask (X, Y, Z) that touch, through a face, a voxel outside it; what lies
    beyond the array is outside."""
    padded, core = F.pad(mask, (1,) * 6), mask
    for axis in range(3):
        for start in (0, 2):
            at = [slice(1, -1)] * 3
            at[axis] = slice(start, start + mask.shape[axis])
            core = core & padded[tuple(at)]
    return mask & ~core


def hd95(predicted, truth, spacing):
    """95th percentile Hausdorff distance in mm between the surfaces of two bool masks (X, Y, Z).

    Each way the 95th percentile (linearly interpolated) of the distances from one surface's voxels
    to the other surface, and the larger of the two. spacing: mm a voxel (3,). Both empty: 0;
    exactly one: HD95_MISSED. Surfaces have thousands of voxels: distances of all pairs are taken in
    parts.
    """
    if not predicted.any() or not truth.any():
        return 0.0 if predicted.any() == truth.any() else HD95_MISSED
    mm = torch.tensor([float(s) for s in spacing], dtype=torch.float64)
    a, b = [surface(mask).nonzero() * mm for mask in (predicted, truth)]
    to_b, to_a = [], torch.full((len(b),), math.inf, dtype=torch.float64)
    for part in a.split(max(1, 2 ** 23 // len(b))):             # all pairs, 64 MB at a time
        distance = torch.cdist(part, b)
        to_b.append(distance.amin(1))
        to_a = torch.minimum(to_a, distance.amin(0))
    return max(torch.quantile(way, 0.95).item() for way in (torch.cat(to_b), to_a))


def components(mask):
    """Connected components (26 neighbours) of a bool mask (X, Y, Z): int64, 0 outside, 1, 2, ...
    inside, in any order, without gaps.

    Only the voxels of the mask are looked at. Every one starts as its own root. Of each pair of
    neighbours the larger root is hung on the smaller, then every voxel follows its chain to the
    end; until all pairs agree.
    """
    at = mask.nonzero()
    root = torch.arange(len(at))
    which = F.pad(torch.full(mask.shape, -1), (1,) * 6, value=-1)
    # the number of each voxel, -1 outside the mask
    which[1:-1, 1:-1, 1:-1][mask] = root
    pairs = []
    # 13 of the 26 neighbours: every pair once
    for step in range(14, 27):
        there = which[tuple((at + torch.tensor([step // 9, step // 3 % 3, step % 3])).T)]
        pairs.append(torch.stack([root, there])[:, there >= 0])
    a, b = torch.cat(pairs, 1)
    while not torch.equal(root[a], root[b]):
        low, high = torch.minimum(root[a], root[b]), torch.maximum(root[a], root[b])
        root = root.scatter_reduce(0, high, low, "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
    out = torch.zeros(mask.shape, dtype=torch.long)
    out[mask] = torch.unique(root, return_inverse=True)[1] + 1
    return out


def dilate(mask, times):
    """A bool mask (X, Y, Z) grown `times` by its 18 neighbours (those that share a face or an
    edge)."""
    for _ in range(times):
        grown = mask.float()[None, None]
        mask = sum(F.max_pool3d(grown, k, 1, tuple(n // 2 for n in k))
                   for k in ((1, 3, 3), (3, 1, 3), (3, 3, 1)))[0, 0] > 0
    return mask


def lesion_dice(predicted, truth, spacing, reach=3, smallest=50.0):
    """Lesion-wise Dice of two bool masks (X, Y, Z), as BraTS 2023 counts it [LESION].

    A lesion is what of `truth` lies in one component of its dilation by `reach` voxels. It is
    compared with the whole of all predicted components that share a voxel with its own dilation; a
    predicted one that does with no lesion's is a false positive, of whatever size. Lesions of at
    most `smallest` mm^3 are left out (what meets them is no false positive). Returns the sum of
    Dice over lesions, divided by lesions + false positives; 1 where there is neither.
    """
    both = (predicted | truth).nonzero()
    if not len(both):
        return 1.0
    low, high = (both.amin(0) - reach - 1).clamp(min=0), both.amax(0) + reach + 2
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high))
    predicted, truth = predicted[box], truth[box]
    found, lesions = components(predicted), components(dilate(truth, reach)) * truth
    scores, touched = [], set()
    for lesion in range(1, int(lesions.max()) + 1):
        its = lesions == lesion
        meets = set(found[dilate(its, reach)].unique().tolist()) - {0}
        touched |= meets
        if its.sum() * math.prod(spacing) > smallest:
            scores.append(bs.dice(torch.isin(found, torch.tensor(sorted(meets))) if meets else its
                                  & False, its))
    scores += [0.0] * (int(found.max()) - len(touched))
    return sum(scores) / len(scores) if scores else 1.0


def score_case(predicted, truth, spacing, full=True):
    """All figures of one case: {region: {figure: number}}. predicted, truth: labels int (X, Y, Z)
    in 0..3, spacing: mm a voxel (3,). full: HD95 and lesion-wise Dice too, which take most of the
    time."""
    ml = math.prod(float(s) for s in spacing) / 1000
    out = {}
    for region, a, b in zip(bs.REGIONS, bs.regions_of(torch.as_tensor(predicted)),
                            bs.regions_of(torch.as_tensor(truth))):
        volumes = int(a.sum()) * ml, int(b.sum()) * ml
        out[region] = {"dice": bs.dice(a, b), "sensitivity": bs.sensitivity(a, b),
                       "predicted_ml": volumes[0], "true_ml": volumes[1],
                       "volume_error_ml": abs(volumes[0] - volumes[1])}
        if full:
            out[region] |= {"hd95_mm": hd95(a, b, spacing),
                            "lesion_dice": lesion_dice(a, b, spacing)}
    return out


@dataclass
class Segmenter:
    """A trained ResUNet, the grid it was trained on, and the case_hashes of all it was trained or
    chosen by."""
    net: bs.ResUNet
    resolution: int
    fov: float
    device: torch.device
    seen: frozenset = frozenset()
    digest: str = ""                            # of its file

    @torch.no_grad()
    def ask(self, part, images, batch=64):
        """part: function of images on the device; images float (N, C, R, R) in [-1, 1] -> (N, ...)
        on the CPU."""
        def on_device(some):
            some, = devices.to_device(self.device, some)
            with bs.fast_math(self.device):
                return part(some).float()

        return bs.in_parts(self.device, on_device, batch, images)

    def probability(self, images):
        """images float (N, C, R, R) in [-1, 1] -> float32 (N, K, R, R)."""
        logits = self.ask(self.net, images)
        return logits.sigmoid() if self.net.predict == "regions" else logits.softmax(1)

    def features(self, images):
        """images float (N, C, R, R) in [-1, 1] -> the encoder's last output averaged over each
        slice, (N, F)."""
        return self.ask(lambda some: self.net.encoder(some)[-1].float().mean((2, 3)), images)

    def slice_labels(self, images):
        """Labels of slices on the model's grid: images float (D, C, R, R) in [-1, 1] -> uint8 (D,
        R, R) in 0..3."""
        return bs.labels_of(self.probability(images).movedim(1, 0), self.net.predict)

    def slice_dice(self, images, labels):
        """Dice of WT, TC, ET over all slices of one case on the model's grid: images float (D, C,
        R, R) in [-1, 1], labels int (D, R, R) -> list of three."""
        return [bs.dice(a, b) for a, b in zip(bs.regions_of(self.slice_labels(images)),
                                              bs.regions_of(labels))]

    def segment(self, got):
        """got: from prepare_case on this grid -> labels uint8 (X, Y, Z) in 0..3 on the grid of the
        scans: probabilities are brought back linearly, then decided; never outside the brain."""
        # (D, K, R, R)
        probability = self.probability(bs.to_images(got["images"]))
        # (K, D, H, W)
        grown = got["grid"].grow(probability.movedim(1, 0).numpy())
        labels = slices.from_slices(bs.labels_of(torch.from_numpy(grown), self.net.predict).numpy())
        return np.where(got["brain"], labels, 0).astype(np.uint8)

    def evaluate(self, prepared, see=None, full=True):
        """Segment and score cases on their own grid: [{"case": name, "region": "WT", "dice": ...,
        ...}], three rows a case. prepared: from prepare_blind; see: function (Case, got, predicted
        labels), called for each; full: as score_case."""
        rows = []
        for case, got, truth in prepared:
            predicted = self.segment(got)
            figures = score_case(predicted, truth, nifti.spacing_of(got["grid"].affine), full)
            rows += [{"case": case.case, "region": region, **its} for region,
                     its in figures.items()]
            if see is not None:
                see(case, got, predicted)
        return rows


def prepare_blind(cases, resolution, fov):
    """Cases as a segmenter is tested on them, one by one: (Case, what prepare_case returns when it
    cannot see the labels, true labels uint8 (X, Y, Z))."""
    for case in cases:
        files = {name: path for name, path in case.files.items() if name != "seg"}
        yield case, slices.prepare_case(nifti.Case(case.case, files, case.modern), resolution, fov,
                                        "tumour"), nifti.read_labels(case)[0]


def summarise(rows):
    """Rows of evaluate -> {region: {figure: mean over cases that have it}}; "missed": in how many
    cases exactly one of prediction and truth is empty."""
    out = {}
    for region in bs.REGIONS:
        its = [row for row in rows if row["region"] == region]
        mean = {k: float(np.nanmean([row[k] for row in its]))
                if any(row[k] == row[k] for row in its) else math.nan for k in its[0]
                if k not in ("case", "region")}
        out[region] = {**mean, "missed": sum((row["predicted_ml"] > 0) != (row["true_ml"] > 0)
                                             for row in its)}
    return out


def table_of(rows):
    """The closing table of a segmenter as lines of text; rows of evaluate."""
    lines = ["region    Dice  lesion-wise  HD95 mm  sensitivity  volume error mL  found or true "
             "only"]
    for region, mean in summarise(rows).items():
        lines.append(f"{region:<6} {mean['dice']:7.3f} {mean['lesion_dice']:12.3f} "
                     f"{mean['hd95_mm']:8.1f} {mean['sensitivity']:12.3f} "
                     f"{mean['volume_error_ml']:16.1f} {mean['missed']:10d} cases")
    return lines


def rank_correlation(a, b):
    """Spearman's rho of two lists of numbers: Pearson correlation of their ranks (ties share a
    rank)."""
    ranks = [[(np.asarray(x) < value).sum() + (np.asarray(x) == value).sum() / 2 for value in x]
             for x in (a, b)]
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(ranks[0]) and np.ptp(ranks[1]) else math.nan


def bootstrap_interval(differences, draws=10_000, seed=0):
    """95% interval of the mean of paired differences, one a patient: percentiles over resampled
    patients. -> (mean, low, high); NaN without data."""
    values = np.asarray([d for d in differences if d == d], float)
    if not len(values):
        return math.nan, math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)
