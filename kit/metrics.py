"""Figures of a segmenter as BraTS counts them: per region and per case, over the whole volume.

SOURCES
    [BRATS]   regions, figures, empty masks: Baid et al. 2021, arXiv 2107.02314
              The RSNA-ASNR-MICCAI BraTS 2021 Benchmark on Brain Tumor Segmentation and Radiogenomic
              Classification
    [LESION]  lesion-wise Dice: Saluja et al. 2023, github.com/rachitsaluja/BraTS-2023-Metrics
              BraTS 2023 Metrics
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import devices, nifti, slices


HD95_MISSED = 373.13            # mm, where exactly one of two masks is empty [BRATS]
# The planes of a voxel's 18 neighbours: size and padding of a pool over each.
PLANES = ((1, 3, 3), (0, 1, 1)), ((3, 1, 3), (1, 0, 1)), ((3, 3, 1), (1, 1, 0))


def surface(mask):
    """Voxels of a bool mask (X, Y, Z) that share a face with a voxel outside the mask. Everything
    beyond the array is outside."""
    core = padded = F.pad(mask, (1,) * 6)
    for axis in range(3):
        for step in (-1, 1):
            core = core & padded.roll(step, axis)
    return mask & ~core[1:-1, 1:-1, 1:-1]


def hd95(predicted, truth, spacing):
    """95th percentile Hausdorff distance in mm between the surfaces of two bool masks (X, Y, Z).

    Take the 95th percentile (linearly interpolated) of the distances from the voxels of one surface
    to the other surface, in both directions, and return the larger of the two. spacing: mm a voxel
    (3,). Both masks empty: 0. Exactly one empty: HD95_MISSED. Surfaces have thousands of voxels, so
    the distances of all pairs are computed in parts.
    """
    if not predicted.any() or not truth.any():
        return 0.0 if predicted.any() == truth.any() else HD95_MISSED
    mm = torch.as_tensor(spacing, dtype=torch.float64)
    a, b = [surface(mask).nonzero() * mm for mask in (predicted, truth)]
    to_b, to_a = [], torch.tensor(math.inf)
    for part in a.split(max(1, 2 ** 23 // len(b))):             # all pairs, 64 MB at a time
        distance = torch.cdist(part, b)
        to_b.append(distance.amin(1))
        to_a = torch.minimum(to_a, distance.amin(0))
    return max(torch.quantile(distances, 0.95).item() for distances in (torch.cat(to_b), to_a))


def dilate(mask, times):
    """A bool mask (X, Y, Z) grown `times` by its 18 neighbours (those that share a face or an
    edge): a voxel is set if one in its three 3 x 3 planes is."""
    for _ in range(times):
        grown = mask.float()[None, None]
        mask = sum(F.max_pool3d(grown, size, 1, pad) for size, pad in PLANES)[0, 0] > 0
    return mask


def lesion_dice(predicted, truth, spacing, reach=3, smallest=50.0):
    """Lesion-wise Dice of two bool masks (X, Y, Z), as BraTS 2023 counts it [LESION].

    A zone is one component of the dilation of `truth` by `reach` voxels. A lesion is the part of
    `truth` in one zone. It is compared with the union of all predicted components that have a voxel
    in its zone. A predicted component of any size that has no voxel in any zone is a false
    positive. Lesions of at most `smallest` mm^3 get no Dice, but the components in their zones are
    no false positives. spacing: mm a voxel (3,). Returns the sum of Dice over lesions, divided by
    lesions + false positives; 1 where there is neither.
    """
    either = predicted | truth
    if not either.any():
        return 1.0
    box = tuple(slice(max(0, int(at.min()) - reach), int(at.max()) + reach + 1)
                for at in either.nonzero().T)
    predicted, truth = predicted[box], truth[box]
    found, zones = slices.components(predicted), slices.components(dilate(truth, reach))
    scores, touched = [], found[predicted & (zones > 0)].unique()
    for number in range(1, int(zones.max()) + 1):
        zone = zones == number
        if (zone & truth).sum() * math.prod(spacing) > smallest:
            scores.append(bs.dice(torch.isin(found, found[zone & predicted]), zone & truth))
    scores += [0.0] * (int(found.max()) - len(touched))
    return sum(scores) / len(scores) if scores else 1.0


def sensitivity(predicted, truth):
    """Fraction of the true voxels that were found, a float; NaN where there are none."""
    return int((predicted & truth).sum()) / int(truth.sum()) if truth.any() else math.nan


def score_case(predicted, truth, spacing, full=True):
    """All figures of one case: {region: {figure: number}}. predicted, truth: labels int (X, Y, Z);
    spacing: mm a voxel (3,). full: with HD95 and lesion-wise Dice, which take most of the time."""
    figures, ml = {}, math.prod(float(mm) for mm in spacing) / 1000
    predicted, truth = [bs.regions_of(torch.as_tensor(labels)) for labels in (predicted, truth)]
    for region, a, b in zip(bs.REGIONS, predicted, truth):
        found, true = int(a.sum()) * ml, int(b.sum()) * ml
        row = {"dice": bs.dice(a, b), "sensitivity": sensitivity(a, b), "predicted_ml": found,
               "true_ml": true, "volume_error_ml": abs(found - true)}
        if full:
            row |= {"hd95_mm": hd95(a, b, spacing), "lesion_dice": lesion_dice(a, b, spacing)}
        figures[region] = row
    return figures


@dataclass
class Segmenter:
    """A trained ResUNet with its grid.

    resolution: pixels a side of a slice; fov: its width in mm; seen: case_hashes of the cases that
    it was trained on or chosen by, and sidecar_hash of synthetic ones; digest: sha256 of its file.
    """
    net: bs.ResUNet
    resolution: int
    fov: float
    device: torch.device
    seen: frozenset = frozenset()
    digest: str = ""

    @torch.no_grad()
    def predict(self, function, images):
        """Apply a function of images on the device to images float (N, C, R, R) in [-1, 1], 64 at a
        time -> float (N, ...) on the CPU."""
        def on_device(part):
            with bs.fast_math(self.device):
                result = function(*devices.to_device(self.device, part)).float()
                return devices.result_to_host(result)

        return bs.in_parts(self.device, on_device, 64, images)

    def probability(self, images):
        """images float (N, C, R, R) in [-1, 1] -> float32 (N, K, R, R)."""
        logits = self.predict(self.net, images)
        return logits.sigmoid() if self.net.predict == "regions" else logits.softmax(1)

    def features(self, images):
        """images float (N, C, R, R) in [-1, 1] -> (N, F): the encoder's last output, averaged over
        each slice."""
        return self.predict(lambda part: self.net.encoder(part)[-1].float().mean((2, 3)), images)

    def slice_labels(self, images):
        """Labels of slices on the model's grid: images float (D, C, R, R) in [-1, 1] -> uint8 (D,
        R, R) in 0..L."""
        return bs.labels_of(self.probability(images).movedim(1, 0), self.net.predict)

    def slice_dice(self, images, labels):
        """Dice of every region over all slices of one case on the model's grid: images float (D, C,
        R, R) in [-1, 1], labels int (D, R, R) -> list."""
        truth = bs.regions_of(torch.as_tensor(labels))
        return [bs.dice(a, b) for a, b in zip(bs.regions_of(self.slice_labels(images)), truth)]

    def segment(self, got):
        """got: from prepare_case on this grid -> labels uint8 (X, Y, Z) in 0..L on the grid of the
        scans. Probabilities are resampled linearly, then labels are decided; 0 outside the
        brain."""
        probability = self.probability(bs.to_images(got["images"]))             # (D, K, R, R)
        grown = got["grid"].grow(probability.movedim(1, 0).numpy())             # (K, D, H, W)
        labels = bs.labels_of(torch.from_numpy(grown), self.net.predict).numpy()
        return np.where(got["brain"], slices.from_slices(labels), 0).astype(np.uint8)

    def evaluate(self, prepared, see=None, full=True):
        """Segment and score cases on their own grid -> [{"case": name, "region": "WT", "dice": ...,
        ...}], a row for each region of each case. prepared: from prepare_blind; see: function
        (Case, got, predicted labels), called for each case; full: as for score_case."""
        rows = []
        for case, got, truth in prepared:
            predicted = self.segment(got)
            figures = score_case(predicted, truth, nifti.spacing_of(got["grid"].affine), full)
            rows += [{"case": case.case, "region": region, **figures[region]} for region in figures]
            if see:
                see(case, got, predicted)
        return rows


def prepare_blind(cases, resolution, fov):
    """Prepare cases for testing, one by one -> (Case, got, true labels uint8 (X, Y, Z)). got: what
    prepare_case returns when it cannot see the labels."""
    for case in cases:
        scans = {name: path for name, path in case.files.items() if name != "seg"}
        got = slices.prepare_case(case._replace(files=scans), resolution, fov, "tumour")
        yield case, got, nifti.read_labels(case)[0]


def summarise(rows):
    """Rows of evaluate -> {region: {figure: mean over the cases that have it, NaN without any}};
    "missed": in how many cases exactly one of prediction and truth is empty; "dice_of_nothing": the
    Dice of a segmenter that finds nothing, 1 in cases without the region."""
    summary = {}
    for region in bs.REGIONS:
        cases = [row for row in rows if row["region"] == region]
        mean = {}
        for figure in list(cases[0])[2:]:                       # without case and region
            values = [row[figure] for row in cases]
            mean[figure] = math.nan if np.isnan(values).all() else float(np.nanmean(values))
        mean["missed"] = sum((row["predicted_ml"] > 0) != (row["true_ml"] > 0) for row in cases)
        mean["dice_of_nothing"] = sum(row["true_ml"] == 0 for row in cases) / len(cases)
        summary[region] = mean
    return summary


def table_of(rows):
    """The closing table of a segmenter as lines of text; rows of evaluate. Column nothing: Dice of
    a segmenter that finds nothing."""
    row = ("{:<6} {dice:7.3f} {dice_of_nothing:9.3f} {lesion_dice:12.3f} {hd95_mm:8.1f} "
           "{sensitivity:12.3f} {volume_error_ml:16.1f} {missed:10d} cases")
    title = ("region    Dice  nothing  lesion-wise  HD95 mm  sensitivity  volume error mL  "
             "found or true only")
    return [title, *(row.format(region, **mean) for region, mean in summarise(rows).items())]


def rank_correlation(a, b):
    """Spearman's rho of two lists of numbers: the Pearson correlation of their ranks (equal numbers
    share a rank). NaN where one list is constant."""
    ranks = [np.searchsorted(np.sort(x), x) + np.searchsorted(np.sort(x), x, "right")
             for x in (a, b)]
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(a) and np.ptp(b) else math.nan


def bootstrap_interval(differences, draws=10_000, seed=0):
    """95% interval of the mean of paired differences, one a patient: percentiles over resampled
    patients. -> (mean, low, high); NaN without data."""
    values = np.asarray([d for d in differences if d == d], float)
    if not len(values):
        return math.nan, math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)
