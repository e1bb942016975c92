"""From a case on disk to slices on the model's grid: brain mask, tissue, resampling, the split, the
cache.
"""
import hashlib
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import files, nifti


PARTS = ("train", "val", "test")


def case_hashes(labels, brain):
    """sha256 (hex) of a label map, uint8 (X, Y, Z) in canonical axes, values 0..L, and of a brain's
    outline, bool (X, Y, Z): of the text of the shape, then the voxels as uint8.

    A synthetic case says by them where its labels and outline come from without naming a patient,
    and a checkpoint says which cases it was trained on. Maps without any tumour all look alike:
    there the outline's hash stands for both. Only the same files give the same hashes: a patient
    resampled to another grid, or scanned a second time, is not recognised.
    """
    contents = [repr(v.shape).encode() + v.astype(np.uint8).tobytes() for v in (labels, brain)]
    of_labels, of_brain = [hashlib.sha256(content).hexdigest() for content in contents]
    return (of_labels if np.any(labels) else of_brain), of_brain


def not_air(scan, where="scans"):
    """Where a skull-stripped scan (X, Y, Z) shows brain: bool (X, Y, Z).

    Air is the commonest value on the six faces, such as 0 in BraTS or some negative number after
    z-scoring. Where no value holds a fifth of them, as after resampling, air is all that differs
    from their median by at most 2% of what separates it from the brightest voxels. BadInput where
    less than half of the faces is air then.
    """
    faces = np.concatenate([scan.take((0, -1), axis).ravel() for axis in range(3)])
    values, counts = np.unique(faces, return_counts=True)
    if counts.max() >= 0.2 * faces.size:
        return scan != values[counts.argmax()]
    air = np.median(faces)
    near = 0.02 * (np.percentile(scan[::3, ::3, ::3], 99.5) - air)
    if (np.abs(faces - air) <= near).mean() < 0.5:
        raise bs.BadInput(f"{where}: air is not one dark value at the border; is the skull still "
                          "there? Strip it first")
    return np.abs(scan - air) > near


def brain_mask(scans, where="scans"):
    """Voxels inside the brain, bool (X, Y, Z), of skull-stripped scans (C, X, Y, Z): those that any
    modality shows, see not_air."""
    return np.any([not_air(scan, where) for scan in scans], axis=0)


def fingerprint(case, *settings):
    """12 hexadecimal digits that change when a file of this Case (by name, size and time) or a
    setting does, or the number 15: raise it with every change of what prepare_case makes."""
    stats = [(name, path, path.stat()) for name, path in case.files.items() if path.exists()]
    stamp = [[name, str(path), stat.st_size, stat.st_mtime_ns] for name, path, stat in stats]
    stamp += [case.channels, case.values, nifti.LABEL_VALUES, bs.LABELS]
    return hashlib.sha256(json.dumps([15, *settings, stamp]).encode()).hexdigest()[:12]


def hashes_of(case):
    """case_hashes of a Case on disk: (of its label map, of its outline)."""
    scans, labels, _ = nifti.read_case(case)
    return case_hashes(labels, brain_mask(scans, case.folder))


# Where the median of a brain goes in 0..255: about where it lay on average in 30 BraTS cases of
# 2018 to 2023 scaled by their 99.8th percentile alone. Any fixed value serves; these keep scans
# natural.
MEDIAN_LANDMARK = {"t1": 175, "t1ce": 140, "t2": 90, "flair": 135}


def scale_to_bytes(scan, brain, middle):
    """One scan -> float32 in 0..255: air's signal to 0, the median of the brain to `middle`, its
    99.8th percentile to 255, straight lines between, clipped beyond.

    The second landmark takes away what one bright vessel or tumour does to the percentile: without
    it the same tissue differs in brightness from case to case, and a network spends itself on that.
    Air's signal is 0 where no voxel of the brain is negative; else (after z-scoring, say) the 0.5th
    percentile takes its place.
    """
    inside = scan[brain]
    low, median, high = np.percentile(inside[:: max(1, inside.size // 200_000)], (0.5, 50, 99.8))
    low = 0.0 if inside.min() >= 0 else low
    median = max(median, low + 1e-6)
    landmarks = low, median, max(high, median + 1e-6)
    return np.interp(scan, landmarks, (0, middle, 255)).astype(np.float32)


def area_weights(n_in, n_out, start, step):
    """Resampling by area as a matrix (n_out, n_in): output pixel i covers the input interval
    [start + i * step, start + (i+1) * step), in input pixels; its row holds the overlap with
    every input pixel, divided by step. What lies outside the input counts as zero."""
    left = start + step * np.arange(n_out)[:, None]
    pixel = np.arange(n_in)[None]
    overlap = np.minimum(left + step, pixel + 1) - np.maximum(left, pixel)
    return (np.clip(overlap, 0, None) / step).astype(np.float32)


def linear_weights(n_in, n_out, start, step):
    """The way back, as a matrix (n_in, n_out): value at every input pixel, linear between the
    centres of the two nearest output pixels of area_weights with the same arguments."""
    at = np.clip((np.arange(n_in)[:, None] + 0.5 - start) / step - 0.5, 0, n_out - 1)
    return np.clip(1 - np.abs(at - np.arange(n_out)[None]), 0, None).astype(np.float32)


def to_slices(volume):
    """(..., X, Y, Z) canonical -> (..., D, H, W): feet first, front up, patient's right at left."""
    return np.moveaxis(volume[..., ::-1, ::-1, :], (-1, -2), (-3, -2))


def from_slices(volume):
    """The inverse of to_slices."""
    return np.moveaxis(volume, (-3, -2), (-1, -2))[..., ::-1, ::-1, :]


@dataclass
class Grid:
    """The model's grid over a case: `resolution` cubes a side, `fov` mm wide, centred on the brain.
    start, step: (D, H, W) in source voxels."""
    shape: tuple                                # of the source, (X, Y, Z)
    affine: np.ndarray                          # of the source, canonical
    resolution: int
    start: tuple
    step: tuple

    def resample(self, volume, weights):
        """A volume (..., D, H, W), resampled by area_weights or linear_weights."""
        depth, rows, columns = [
            weights(self.shape[axis], self.resolution, start, step)
            for axis, start, step in zip((2, 1, 0), self.start, self.step)]
        volume = np.moveaxis(np.tensordot(depth, volume, (1, -3)), 0, -3)
        return rows @ volume @ columns.T

    def shrink(self, volume):
        """(D, H, W) on the source grid -> (R, R, R) on the model's, by area."""
        return self.resample(volume.astype(np.float32), area_weights)

    def grow(self, volume):
        """(..., R, R, R) on the model's grid -> (..., D, H, W) on the source grid, linear."""
        return self.resample(volume, linear_weights)

    def model_affine(self):
        """Affine (4, 4) of from_slices(volume on the model's grid), canonical, voxel -> mm.

        Voxel z' of the model lies at source voxel start + step z' + step/2 - 1/2. x and y are
        reversed between canonical axes and slices: x = n - start - step (R - x') + step/2 - 1/2.
        """
        change = np.diag([*self.step[::-1], 1.0])
        for axis, start, step in zip((2, 1, 0), self.start, self.step):
            first = start if axis == 2 else self.shape[axis] - start - step * self.resolution
            change[axis, 3] = first + step / 2 - 0.5
        return self.affine @ change


def grid_over(brain, affine, resolution, fov):
    """The Grid over a brain, bool (X, Y, Z), with affine (4, 4); fov in mm."""
    # slices, rows and columns that show brain
    shown = [np.where(to_slices(brain).any(axis))[0] for axis in ((1, 2), (0, 2), (0, 1))]
    step = fov / resolution / nifti.spacing_of(affine)[[2, 1, 0]]
    # whole source voxels: where one step is one voxel (or two), nothing is blurred
    start = np.round(([at[0] + at[-1] + 1 for at in shown] - resolution * step) / 2)
    return Grid(brain.shape, affine, resolution, tuple(start), tuple(step))


def two_means(first, second, third):
    """k-means with two means over three scans of the same voxels, each (N,) -> bool (N,): True in
    the cluster where `first` is brighter than the other two.

    Outliers first: each scan is clipped to its 5th..95th percentile and scaled to 0..1 (bright
    eyes, dura and vessels otherwise become a cluster of their own). The features are the
    differences first - second and first - third, in which shading that all scans share cancels.
    """
    scaled = []
    for scan in (first, second, third):
        low, high = np.percentile(scan[:: max(1, scan.size // 50_000)], (5, 95))
        scaled.append((np.clip(scan, low, high) - low) / max(high - low, 1e-6))
    features = np.stack([scaled[0] - scaled[1], scaled[0] - scaled[2]])
    score = features.sum(0)
    upper = score > (np.percentile(score, 2) + np.percentile(score, 98)) / 2
    for _ in range(10):
        if upper.all() or not upper.any():
            break
        means = [features[:, upper == side].mean(1, keepdims=True) for side in (False, True)]
        upper = ((features - means[1]) ** 2).sum(0) < ((features - means[0]) ** 2).sum(0)
    return upper


def tissue_clusters(scans, healthy):
    """CSF, grey and white matter without training: k-means over the modalities of one case.

    scans: float (C, ...) in any units, modalities as in MODALITIES; healthy: bool (...), brain
    without tumour. Returns uint8 (...): 1 CSF, 2 grey, 3 white, 0 elsewhere.
    Fluid against tissue first (T2 against T1 and FLAIR), then white against grey within tissue (T1
    against T2 and FLAIR): three means at once spend one of them on the half-full voxels around CSF.
    Which cluster is which follows from anatomy, not from their sizes.
    """
    out = np.zeros(healthy.shape, np.uint8)
    if healthy.sum() < 30:
        return out
    t1, t2, flair = [scans[bs.MODALITIES.index(name)][healthy] for name in ("t1", "t2", "flair")]
    fluid = two_means(t2, t1, flair)
    found = np.ones(fluid.shape, np.uint8)
    if not fluid.all():
        found[~fluid] = 2 + two_means(t1[~fluid], t2[~fluid], flair[~fluid])
    out[healthy] = found
    return out


def deep_fluid(tissue, brain, spacing):
    """The ventricles, about: CSF of tissue_clusters further than 15 mm from the outside of the
    brain along every axis, without what is at most two voxels thin (fissures, sulci). tissue uint8,
    brain bool, both (X, Y, Z); spacing mm (3,) -> bool (X, Y, Z). On phantoms Dice with the exact
    ventricles is about 0.8, volumes are 15% too large."""
    outside = F.pad(torch.from_numpy(~brain)[None, None].float(), (1,) * 6, value=1.0)
    reach = [max(1, round(15.0 / mm)) for mm in spacing]                    # in voxels
    for pad in np.diag(reach).tolist():                                     # one axis at a time
        outside = F.max_pool3d(outside, [2 * n + 1 for n in pad], 1, pad)
    fluid = torch.from_numpy(tissue == 1)
    deep = (fluid & (outside[0, 0, 1:-1, 1:-1, 1:-1] == 0))[None, None]
    core = F.max_pool3d((~deep).float(), 3, 1, 1) == 0
    return (F.max_pool3d(core.float(), 5, 1, 2)[0, 0] > 0).numpy() & fluid.numpy()


def classes_of(scans, labels, brain, spacing, condition, replaced):
    """The class map of a case on the grid of its files: uint8 (X, Y, Z), values index
    CONDITIONS[condition].

    scans float (C, X, Y, Z), labels uint8 in 0..L, brain bool, spacing mm (3,). replaced: bool,
    where the scans show a tumour. Where `labels` have none there, tissue is that of the mirrored
    side of the brain.
    """
    names = bs.CONDITIONS[condition]
    tissue = brain
    if condition != "tumour":
        tissue = tissue_clusters(scans, brain & (labels == 0) & ~replaced)
        if condition == "ventricles":
            tissue = np.where(brain, 1 + deep_fluid(tissue, brain, spacing), 0)
        across = np.where(brain.any((1, 2)))[0]
        opposite = (across[0] + across[-1] - np.arange(len(brain))).clip(0, len(brain) - 1)
        tissue = np.where(replaced, tissue[opposite], tissue)
        rest = names.index("grey" if condition == "tissue" else "brain")
        tissue = np.where(brain & (tissue == 0), rest, tissue)
    return np.where(labels > 0, labels + names.index(bs.LABELS[0]) - 1, tissue).astype(np.uint8)


def components(mask):
    """Connected components (26 neighbours) of a bool mask (X, Y, Z): int64 (X, Y, Z), 0 outside the
    mask, 1, 2, ... inside, in any order, without gaps.

    Only the voxels of the mask are visited. Every voxel starts as its own root. For each pair of
    neighbours the larger root is attached to the smaller one, then every voxel takes the root of
    its root. Repeat until the roots of all pairs are equal.
    """
    voxels = mask.nonzero()
    root = torch.arange(len(voxels))
    # the number of each voxel, -1 outside the mask
    number = torch.full([size + 2 for size in mask.shape], -1)
    number[1:-1, 1:-1, 1:-1][mask] = root
    pairs = []
    for step in range(14, 27):                  # 13 of the 26 neighbours: every pair once
        offset = torch.tensor([step // 9, step // 3 % 3, step % 3])
        neighbour = number[tuple((voxels + offset).T)]
        pairs.append(torch.stack([root, neighbour])[:, neighbour >= 0])
    a, b = torch.cat(pairs, 1)
    while not torch.equal(root[a], root[b]):
        low, high = torch.minimum(root[a], root[b]), torch.maximum(root[a], root[b])
        root = root.scatter_reduce(0, high, low, "amin")
        root = root[root]
    out = torch.zeros(mask.shape, dtype=torch.long)
    out[mask] = torch.unique(root, return_inverse=True)[1] + 1
    return out


def majority(fractions):
    """Class fractions float (K, ...) -> class map uint8 (...): the class with the largest one.
    Class 0 is air; what is missing from a sum of 1 is added to it, in place."""
    fractions[0] += 1 - fractions.sum(0)
    return fractions.argmax(0).astype(np.uint8)


def prepare_case(case, resolution, fov, condition, relabel=None):
    """Read a Case and bring it on the model's grid; what the cache and sample.py are made of.

    relabel: function (labels, brain, affine) -> other labels (X, Y, Z) in 0..L that take the place
    of those read; see classes_of. Returns a dict: images uint8 (R, C, R, R), 0 = air; classes uint8
    (R, R, R), values index CONDITIONS[condition]; labels uint8 and brain bool (X, Y, Z) on the grid
    of the files; hashes: from case_hashes, of the labels read; grid; cut: fraction of brain voxels
    outside the field of view; lost: mL and number of lesions of which the grid keeps nothing.
    """
    scans, labels, affine = nifti.read_case(case)
    brain = brain_mask(scans, case.folder)
    hashes = case_hashes(labels, brain)
    tumour = labels > 0
    brain |= tumour
    if relabel is not None:
        labels = relabel(labels, brain, affine)
    full = to_slices(classes_of(scans, labels, brain, nifti.spacing_of(affine), condition, tumour))
    grid = grid_over(brain, affine, resolution, fov)
    # labels by majority of area; images as the mean over the brain part of each pixel, so that
    # the edge of the brain is not darkened by air
    n_classes = len(bs.CONDITIONS[condition])
    classes = majority(np.stack([grid.shrink(full == k) for k in range(n_classes)]))
    if not classes.any():
        raise bs.BadInput(f"{case.folder}: no brain in the field of view; check scans")
    inside = to_slices(brain)
    area = np.maximum(grid.shrink(inside), 1e-6)
    images = np.zeros((len(classes), len(scans), resolution, resolution), np.uint8)
    for c, name in enumerate(bs.MODALITIES):
        scan = to_slices(scale_to_bytes(scans[c], brain, MEDIAN_LANDMARK.get(name, 128)))
        mean = np.where(classes > 0, grid.shrink(scan * inside) / area, 0)
        images[:, c] = np.rint(mean).clip(0, 255)
    cut = 1 - area.sum() * np.prod(grid.step) / inside.sum()
    return {"images": images, "classes": classes, "labels": labels, "brain": brain,
            "hashes": hashes, "grid": grid, "cut": float(cut),
            "lost": lost_lesions(labels > 0, bs.tumour_labels(classes, condition) > 0, grid)}


def lost_lesions(tumour, kept, grid):
    """Lesions, connected parts of a tumour, of which a grid keeps nothing: (mL, their number).
    tumour: bool (X, Y, Z) on the grid of the files; kept: bool (R, R, R), what is left of it."""
    there = np.argwhere(to_slices(tumour))                                      # (N, 3)
    if not len(there):
        return 0.0, 0
    cubes = np.floor((there + 0.5 - grid.start) / grid.step).astype(int)
    inside = ((cubes >= 0) & (cubes < grid.resolution)).all(1)
    shown = np.zeros(len(there), bool)
    shown[inside] = kept[tuple(cubes[inside].T)]
    lesion = components(torch.from_numpy(to_slices(tumour).copy()))[tuple(there.T)].numpy()
    voxels, found = np.bincount(lesion), np.bincount(lesion, shown)
    lost = (voxels > 0) & (found == 0)
    mm3 = voxels[lost].sum() * np.prod(nifti.spacing_of(grid.affine))
    return float(mm3 / 1000), int(lost.sum())


def read_split(path):
    """What a split file holds, see split_patients: {part: names, a set}. BadInput where it is
    something else."""
    try:
        content = json.loads(Path(path).read_bytes())       # bytes: UTF-8 or 16, as editors save it
    except (OSError, ValueError) as error:
        raise bs.BadInput(f"{path}: is no split of cases ({error})") from error
    if not isinstance(content, dict):
        raise bs.BadInput(f'{path}: is no split of cases; write {{"train": [names], ...}}')
    wrong = sorted(set(content) - set(PARTS))
    if wrong:
        raise bs.BadInput(f"{path}: {', '.join(wrong)} is no part; use {', '.join(PARTS)}")
    for part, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise bs.BadInput(f'{path}: {part} is no list of names; write ["name", ...]')
    return {part: set(names) for part, names in content.items()}


def split_patients(cases, split_file=None):
    """Which cases train, validate, test: {"train": [Case], "val": [...], "test": [...]}.

    By patient, never by slice. Of the sorted patients every fifth (0, 5, 10, ...) is for test and
    number 2 of every ten for validation, whatever the seed, so that a generator and a segmenter
    trained apart still hold out the same people. split_file overrides, a JSON file
    {"train": [case or patient names], "val": [...], "test": [...]}; cases it does not name are left
    out. BadInput where it is something else or has a name that is not in the data, a patient is in
    two parts, or nothing is left for training.
    """
    patients = sorted({case.patient for case in cases})
    names = {"val": set(patients[2::10]), "test": set(patients[::5])}
    names["train"] = set(patients) - names["val"] - names["test"]
    if split_file is not None:
        names = {part: set() for part in PARTS} | read_split(split_file)
    unknown = set().union(*names.values()) - set(patients) - {case.case for case in cases}
    if unknown:
        raise bs.BadInput(f"{split_file}: {min(unknown)} is not in the data; correct the name")
    split, part_of = {}, {}
    for part in PARTS:
        split[part] = [case for case in cases if names[part] & {case.case, case.patient}]
        for case in split[part]:
            if part_of.setdefault(case.patient, part) != part:
                raise bs.BadInput(f"patient {case.patient} is in two parts; keep them in one")
    if not split["train"]:
        raise bs.BadInput(f"of {len(cases)} cases none is for training; add cases, or use --split")
    return split


def remember(folder, what, make, case, *settings):
    """The dict make(case, *settings), of numbers, texts, lists and tensors, kept in a file of
    `folder` whose name has the case, a word (what) and the fingerprint: made where there is no such
    file or a damaged one. What is returned is read from the file, its tensors memory-mapped; first
    every byte of an old file is compared with the checksums in it, a zip archive."""
    path = Path(folder) / f"{case.case}-{what}-{fingerprint(case, *settings)}"
    if path.exists():
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a bit has flipped")
            return torch.load(path, mmap=True, weights_only=True)
        except Exception as error:              # a damaged archive raises all kinds of errors
            print(f"note: {path} cannot be used ({error}); made anew")
    files.replace_file(path, lambda temporary: files.save_tensors(temporary, make(case, *settings)))
    return torch.load(path, mmap=True, weights_only=True)


class Cache:
    """Slices of all cases on the model's grid along three axes, memory-mapped: no workers needed.

    cubes     list of arrays uint8 (R, C + 1, R, R), one a case: C modalities, then the class map
    at        list of N pairs: a cube turned so that one of its planes comes first, and the number
              of a slice. Axial slices of a case, then coronal, then sagittal ones; those without
              brain left out
    rows      list of N arrays uint8 (C + 1, R, R): these slices, views into cubes
    place     float32 (N, 2), a tensor: see the glossary
    cases     list of dicts, one a case: case, patient, part (train/val/test), hashes (see
              case_hashes), first, count and axial (its rows, and how many of them are axial), cut
              (fraction of the brain outside the field of view), lost (mL and number of lesions of
              which the grid keeps nothing), finest (resolution at which a voxel of the model is
              one of the scans)
    meta      classes (their names), modalities, resolution, fov
    """

    def __init__(self, blocks, cases, meta):
        self.cubes = [block["cube"].numpy() for block in blocks]
        self.at = [(bs.turned(block["cube"], plane).numpy(), i) for block in blocks
                   for plane, shown in enumerate(block["shown"]) for i in shown.tolist()]
        self.rows = [view[i] for view, i in self.at]
        self.place = torch.cat([bs.places(meta["resolution"], plane)[shown] for block in blocks
                                for plane, shown in enumerate(block["shown"])])
        self.cases = cases
        self.meta = meta

    def of_rows(self, key):
        """What stands under a key of `cases`, for every row: array (N,)."""
        return np.repeat([case[key] for case in self.cases], [case["count"] for case in self.cases])

    def names(self, rows):
        """Names of the cases that these rows show, sorted."""
        return sorted(set(self.of_rows("case")[rows].tolist()))

    def part(self, part, planes=(0, 1, 2)):
        """Row numbers of one part of the split, of slices along these planes: int array."""
        here = np.isin(self.place[:, 1].numpy(), planes)
        return np.where((self.of_rows("part") == part) & here)[0]

    def hashes(self, *parts):
        """case_hashes of all cases of these parts, sorted: what a checkpoint says it was trained
        on."""
        return sorted({digest for c in self.cases if c["part"] in parts for digest in c["hashes"]})

    def batch(self, rows, mirror=None, around=0):
        """rows: int (B,) -> x0 float32 (B, (2 around + 1) C, R, R) in [-1, 1], slabs, see
        bs.slabs_of; classes int64 (B, R, R), place float32 (B, 2), all torch tensors on the CPU.
        mirror: bool (B,), left and right are swapped where it is True: columns, or, of a sagittal
        slice, the side that it lies on."""
        place = self.place[rows]
        mirror = torch.zeros(len(rows), dtype=torch.bool) if mirror is None else mirror
        sagittal = mirror & (place[:, 1] == 2)
        place[sagittal, 0] *= -1
        slabs, n = [], self.meta["resolution"]
        near = bs.slabs_of(torch.arange(n).view(-1, 1, 1, 1), around).flatten(1).numpy()
        for row, turn in zip(rows, sagittal.tolist()):
            view, i = self.at[row]
            slabs.append(view[n - 1 - near[n - 1 - i] if turn else near[i]])
        shape = -1, 2 * around + 1, *self.rows[0].shape
        slabs = torch.from_numpy(np.array(slabs, np.uint8).reshape(shape))
        columns = (mirror & ~sagittal).view(-1, 1, 1, 1, 1)
        slabs = torch.where(columns, slabs.flip(-1), slabs)
        return bs.to_images(slabs[:, :, :-1]).flatten(1, 2), slabs[:, 0, -1].long(), place

    def batches(self, rows, size=128):
        """These rows in turn, as batches of `size` or fewer."""
        for i in range(0, len(rows), size):
            yield self.batch(rows[i:i + size])


def cached_case(case, resolution, fov, condition):
    """What the cache keeps of a Case, a dict: cube uint8 (R, C + 1, R, R), scans and classes;
    shown, the numbers of its axial, coronal and sagittal slices with brain, three int tensors;
    facts: hashes, cut, lost and finest, see Cache."""
    got = prepare_case(case, resolution, fov, condition)
    cube = np.concatenate([got["images"], got["classes"][:, None]], 1)
    brain = got["classes"] > 0
    shown = [np.where(brain.mean(across) > 0.01)[0] for across in ((1, 2), (0, 2), (0, 1))]
    return {"cube": torch.from_numpy(cube), "shown": list(map(torch.from_numpy, shown)),
            "facts": {"hashes": got["hashes"], "cut": got["cut"], "lost": got["lost"],
                      "finest": math.ceil(resolution * max(got["grid"].step))}}


def build_cache(cases, folder, resolution, fov, condition, split=None):
    """The Cache of `cases`: one file a case below `folder`, see remember. Its name holds a
    fingerprint of the case's files and of the settings: it is made once, by whichever command comes
    first, and again when any of these changes. split: from split_patients, its default split if
    not given; cases that are in no part are left out. BadInput where no slice shows enough brain.
    """
    split = split or split_patients(cases)
    part_of = {case.case: part for part in split for case in split[part]}
    cases = [case for case in cases if case.case in part_of]

    def load(case):
        return remember(folder, condition, cached_case, case, resolution, fov, condition)

    files.remove_litter(folder)
    blocks = nifti.in_threads(load, cases)
    entries, first = [], 0
    for case, block in zip(cases, blocks):
        entries.append({"case": case.case, "patient": case.patient, "part": part_of[case.case],
                        "first": first, "axial": len(block["shown"][0]),
                        "count": sum(map(len, block["shown"])), **block["facts"]})
        first += entries[-1]["count"]
    if not first:
        raise bs.BadInput(f"no slice shows enough brain at --fov {fov}; use a smaller one")
    wide = sum(entry["cut"] > 0.002 for entry in entries)
    print(f"cache: {len(cases)} cases ({wide} wider than --fov), {first} slices -> {folder}")
    lost = [entry for entry in entries if entry["lost"][1]]
    ml, number = map(sum, zip(*[entry["lost"] for entry in entries]))
    if lost:
        finest = max(-(-entry["finest"] // 16) * 16 for entry in lost)
        print(f"note: {number} lesions ({ml:.2f} mL) in {len(lost)} cases, {lost[0]['case']} for "
              f"one, are too small for {fov / resolution:.1f} mm a pixel: lost; --resolution "
              f"{finest} keeps them")
    return Cache(blocks, entries, {"classes": bs.CONDITIONS[condition], "fov": fov,
                                   "modalities": bs.MODALITIES, "resolution": resolution})


def evenly(length, count):
    """At most `count` of the numbers 0 .. length - 1, evenly spread: int array."""
    return np.linspace(0, length - 1, min(count, length)).astype(int)


def has_label(cache, rows, first_label):
    """Which of these cache rows show a class value >= first_label: bool (len(rows),)."""
    return np.array([(cache.rows[row][-1] >= first_label).any() for row in rows], bool)
