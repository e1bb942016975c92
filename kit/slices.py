"""From a case on disk to slices on the model's grid: brain mask, tissue, resampling, the split, the
cache.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import files, nifti


def case_hashes(labels, brain):
    """sha256 (hex) of a label map, uint8 (X, Y, Z) in canonical axes, values 0..3, and of a brain's
    outline, bool (X, Y, Z); shapes included.

    It is how a synthetic case says where its labels and outline came from without naming a patient,
    and how a checkpoint says which ones it was trained on. Maps without any tumour all look alike:
    there the outline's hash stands for both. Only the same files give the same hashes: a patient
    resampled to another grid, or scanned a second time, is not recognised.
    """
    labels, brain = [np.ascontiguousarray(volume, dtype=np.uint8) for volume in (labels, brain)]
    of_labels, of_brain = [hashlib.sha256(repr(volume.shape).encode()
                                          + volume.tobytes()).hexdigest()
                           for volume in (labels, brain)]
    return (of_labels if labels.any() else of_brain), of_brain


def air_value(scan):
    """The commonest value on the six faces of a scan (X, Y, Z); NaN where no value holds a fifth of
    them."""
    faces = np.concatenate([np.moveaxis(scan, axis, 0)[i].ravel() for axis in range(3)
                            for i in (0, -1)])
    values, counts = np.unique(faces, return_counts=True)
    return values[counts.argmax()] if counts.max() >= 0.2 * faces.size else math.nan


def brain_mask(scans, where="scans"):
    """Voxels inside the brain, bool (X, Y, Z), of skull-stripped scans (C, X, Y, Z): those that
    differ from the air value in any modality. The air value of a scan is the commonest one on the
    six faces of the volume (0 in BraTS, some negative number after z-scoring)."""
    brain = np.zeros(scans.shape[1:], bool)
    for scan in scans:
        air = air_value(scan)
        if math.isnan(air):
            raise bs.BadInput(f"{where}: the background is not one value, so the skull seems to be "
                              "still there; run a skull-stripping tool first")
        brain |= scan != air
    return brain


def fingerprint(cases, *settings):
    """12 hexadecimal digits that change when any file of these cases (by name, size and time) or a
    setting does."""
    paths = [path for case in cases for path in case.files.values()]
    stamp = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] if p.exists() else str(p)
             for p in paths]
    return hashlib.sha256(json.dumps([12, *settings, stamp]).encode()).hexdigest()[:12]


def hashes_of(case):
    """case_hashes of a Case on disk: (of its label map, of its outline)."""
    scans, labels, _ = nifti.read_case(case)
    return case_hashes(labels, brain_mask(scans, case.folder))


# Where the median of a brain goes in 0..255: about where it lay on average in 30 BraTS cases of
# 2018 to 2023 scaled by their 99.8th percentile alone. Any fixed value serves; these keep scans
# natural.
MEDIAN_LANDMARK = {"t1": 175, "t1ce": 140, "t2": 90, "flair": 135}


def scale_to_bytes(scan, brain, middle, top=99.8):
    """One scan -> float32 in 0..255: air's signal to 0, the median of the brain to `middle`, a high
    percentile of it to 255, straight lines between, clipped beyond.

    The second landmark takes away what one bright vessel or tumour does to the percentile: without
    it the same tissue differs in brightness from case to case, and a network spends itself on that.
    Air's signal is 0 where no voxel of the brain is negative; else (after z-scoring, say) the 0.5th
    percentile takes its place.
    """
    inside = scan[brain]
    low, median, high = np.percentile(inside[:: max(1, inside.size // 200_000)], (0.5, 50, top))
    low = 0.0 if inside.min() >= 0 else low
    median = max(median, low + 1e-6)
    return np.interp(scan, (low, median, max(high, median + 1e-6)), (0, middle, 255)).astype(
        np.float32)


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
    """The model's square pixel grid over a case: `resolution` pixels a side, `fov` mm wide, centred
    on the brain; slices along z as they are. start, step: (H, W) in source pixels."""
    shape: tuple                                # of the source, (X, Y, Z)
    affine: np.ndarray                          # of the source, canonical
    resolution: int
    start: tuple
    step: tuple

    @staticmethod
    def over(brain, affine, resolution, fov):
        """brain: bool (X, Y, Z); affine (4, 4) -> Grid."""
        rows, columns = [np.where(to_slices(brain).any(axis))[0] for axis in ((0, 2), (0, 1))]
        spacing = nifti.spacing_of(affine)
        step = tuple(float(fov / resolution / spacing[axis]) for axis in (1, 0))
        # whole source pixels: where one step is one pixel (or two), nothing is blurred
        start = tuple(float(round((at[0] + at[-1] + 1 - resolution * s) / 2))
                      for at, s in zip((rows, columns), step))
        return Grid(brain.shape, affine, resolution, start, step)

    def weights(self, matrix):
        """matrix: area_weights or linear_weights -> (for H, for W)."""
        return [matrix(self.shape[axis], self.resolution, start, step)
                for axis, start, step in zip((1, 0), self.start, self.step)]

    def shrink(self, volume):
        """(D, H, W) on the source grid -> (D, resolution, resolution), by area."""
        rows, columns = self.weights(area_weights)
        return rows @ volume.astype(np.float32) @ columns.T

    def grow(self, volume):
        """(..., D, R, R) on the model's grid -> (..., D, H, W) on the source grid, linear."""
        rows, columns = self.weights(linear_weights)
        return rows @ volume @ columns.T

    def model_affine(self):
        """Affine (4, 4) of from_slices(volume on the model's grid), canonical, voxel -> mm.

        Voxel x' of the model lies at source voxel x = n - start - step (R - x') + step/2 - 1/2:
        both arrays are reversed between canonical axes and slices.
        """
        change = np.eye(4)
        for axis, size, start, step in zip((1, 0), (self.shape[1], self.shape[0]), self.start,
                                           self.step):
            change[axis, axis] = step
            change[axis, 3] = size - start - step * self.resolution + step / 2 - 0.5
        return self.affine @ change


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


def deep_fluid(tissue, brain, spacing, depth=15.0):
    """The ventricles, about: CSF of tissue_clusters further than `depth` mm from the outside of the
    brain along every axis, without what is at most two voxels thin (fissures, sulci). tissue uint8,
    brain bool, both (X, Y, Z); spacing mm (3,) -> bool (X, Y, Z). On phantoms Dice with the exact
    ventricles is about 0.8, volumes are 15% too large."""
    outside = F.pad(torch.from_numpy(~brain)[None, None].float(), (1,) * 6, value=1.0)
    for axis, mm in enumerate(spacing):
        size = [1, 1, 1]
        size[axis] = 2 * max(1, round(depth / mm)) + 1
        outside = F.max_pool3d(outside, size, 1, [n // 2 for n in size])
    fluid = torch.from_numpy(tissue == 1)
    deep = (fluid & (outside[0, 0, 1:-1, 1:-1, 1:-1] == 0))[None, None]
    core = F.max_pool3d((~deep).float(), 3, 1, 1) == 0
    return (F.max_pool3d(core.float(), 5, 1, 2)[0, 0] > 0).numpy() & fluid.numpy()


def prepare_case(case, resolution, fov, condition, relabel=None):
    """Read a Case and bring it on the model's grid; what the cache and sample.py are made of.

    relabel: function (labels, brain, affine) -> other labels (X, Y, Z) in 0..3 that take the place
    of those read. Where they uncover brain, tissue is that of the mirrored side. Returns a dict:
    images uint8 (D, C, R, R), 0 = air; classes uint8 (D, R, R), values index CONDITIONS[condition];
    position float32 (D,) in [-1, 1] along the brain, beyond it outside; labels uint8 and brain bool
    (X, Y, Z) on the grid of the files; hashes: from case_hashes, of the labels read; grid; cut:
    share of brain voxels outside the field of view.
    """
    scans, labels, affine = nifti.read_case(case)
    brain = brain_mask(scans, case.folder)
    hashes, ill = case_hashes(labels, brain), labels > 0
    brain |= ill
    if relabel is not None:
        labels = relabel(labels, brain, affine)
    names = bs.CONDITIONS[condition]
    classes = np.where(labels > 0, labels + (len(names) - len(bs.LABELS) - 1), brain).astype(
        np.uint8)
    if condition != "tumour":
        tissue = tissue_clusters(scans, brain & (labels == 0) & ~ill)
        if condition == "ventricles":
            tissue = np.where(brain, 1 + deep_fluid(tissue, brain, nifti.spacing_of(affine)),
                              0).astype(np.uint8)
        if relabel is not None:
            across = np.where(brain.any((1, 2)))[0]
            opposite = (across[0] + across[-1] - np.arange(len(brain))).clip(0, len(brain) - 1)
            tissue = np.where(ill, tissue[opposite], tissue)
        classes = np.where(labels > 0, classes, tissue)
        classes[brain & (classes == 0)] = names.index("grey" if condition == "tissue" else "brain")
    for c, name in enumerate(bs.MODALITIES):
        scans[c] = scale_to_bytes(scans[c], brain, MEDIAN_LANDMARK[name])
    grid = Grid.over(brain, affine, resolution, fov)
    scans, classes, outline, brain = to_slices(scans), to_slices(classes), brain, to_slices(brain)
    # labels by majority of area; images as the mean over the brain part of each pixel, so that
    # the edge of the brain is not darkened by air
    share = np.stack([grid.shrink(classes == k) for k in range(len(names))])
    share[0] += 1 - share.sum(0)                # outside the volume is air
    classes = share.argmax(0).astype(np.uint8)
    area = np.maximum(grid.shrink(brain), 1e-6)
    images = np.stack([grid.shrink(scan * brain) / area for scan in scans], 1)
    images = np.rint(np.where(classes[:, None] > 0, images, 0)).clip(0, 255).astype(np.uint8)
    with_brain = np.where((classes > 0).any((1, 2)))[0]
    if not len(with_brain):
        raise bs.BadInput(f"{case.folder}: no brain is found in the field of view; check the scans")
    low, high = with_brain[0], with_brain[-1]
    position = 2 * (np.arange(len(classes)) - low) / max(high - low, 1) - 1
    cut = 1 - area.sum() * np.prod(grid.step) / brain.sum()
    return {"images": images, "classes": classes, "position": position.astype(np.float32),
            "labels": labels, "brain": outline, "hashes": hashes, "grid": grid, "cut": float(cut)}


def split_patients(cases, split_file=None):
    """Which cases train, validate, test: {"train": [Case], "val": [...], "test": [...]}.

    By patient, never by slice. Of the sorted patients every fifth (0, 5, 10, ...) is for test and
    number 2 of every ten for validation, whatever the seed, so that a generator and a segmenter
    trained apart still hold out the same people. split_file: JSON {"train": [...], "val": [...],
    "test": [...]} of case or patient names overrides; cases it does not name are left out.
    """
    split = {"train": [], "val": [], "test": []}
    if split_file is None:
        patients = sorted({case.patient for case in cases})
        for case in cases:
            at = patients.index(case.patient)
            split["test" if at % 5 == 0 else "val" if at % 10 == 2 else "train"].append(case)
    else:
        try:
            wanted = json.loads(Path(split_file).read_text())
            pairs = [(name, part) for part in split for name in wanted.get(part, [])]
            named = dict(pairs)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise bs.BadInput(f"{split_file}: cannot be used as a split ({error}); expected JSON "
                              "like " '{"train": ["CASE"], "val": [], "test": []}') from error
        twice = [name for name, part in pairs if named[name] != part]
        if twice:
            raise bs.BadInput(f"{split_file}: names {twice[0]} in two parts; keep it in one")
        for case in cases:
            part = named.get(case.case, named.get(case.patient))
            if part:
                split[part].append(case)
        unknown = set(named) - {c.case for c in cases} - {c.patient for c in cases}
        if unknown:
            raise bs.BadInput(f"{split_file}: names {sorted(unknown)[0]}, which is not in the "
                              "data; correct the name")
    parts = {}
    for part, members in split.items():
        for case in members:
            if parts.setdefault(case.patient, part) != part:
                raise bs.BadInput(f"patient {case.patient} is in {parts[case.patient]} and in "
                                  f"{part}; keep all time points of a patient on one side of the "
                                  "split")
    if not split["train"]:
        raise bs.BadInput(f"{len(cases)} cases leave none for training; add cases or give a split "
                          "file")
    return split


class Cache:
    """Slices of all cases on the model's grid, memory-mapped: 0.1 ms a slice, no workers needed.

    rows      uint8 (N, C + 1, R, R): C modalities, then the class map; slices without brain left
              out
    cases     list of dicts, one a case: case, patient, part (train/val/test), hashes (see
              case_hashes), first, count (its rows), position [count floats], thickness (mm between
              slices)
    """

    def __init__(self, path):
        self.path = Path(path)
        self.meta = json.loads(self.path.with_suffix(".json").read_text())
        self.rows = np.load(self.path, mmap_mode="r")
        self.cases = self.meta["cases"]
        if self.meta["checksum"] != checksum(self.path):
            raise ValueError("a bit has flipped")
        self.position = np.concatenate([np.array(c["position"], np.float32) for c in self.cases])

    def names(self, rows):
        """Names of the cases that these rows show, sorted."""
        first = np.array([case["first"] for case in self.cases])
        return sorted({self.cases[i]["case"] for i in np.searchsorted(first, rows, "right") - 1})

    def part(self, part):
        """Row numbers of one part of the split: int array."""
        rows = [np.arange(c["first"], c["first"] + c["count"]) for c in self.cases if c["part"]
                == part]
        return np.concatenate(rows) if rows else np.array([], int)

    def hashes(self, *parts):
        """case_hashes of all cases of these parts, sorted: what a checkpoint says it was trained
        on."""
        return sorted({digest for c in self.cases if c["part"] in parts for digest in c["hashes"]})

    def batch(self, rows, mirror=None):
        """rows: int (B,) -> x0 float32 (B, C, R, R) in [-1, 1], classes int64 (B, R, R),
        position float32 (B,), all torch tensors on the CPU. mirror: bool (B,), left and right are
        swapped where it is True."""
        block = torch.from_numpy(self.rows[np.asarray(rows)])
        if mirror is not None:
            block = torch.where(mirror.view(-1, 1, 1, 1), block.flip(-1), block)
        return (bs.to_images(block[:, :-1]), block[:, -1].long(),
                torch.from_numpy(self.position[np.asarray(rows)]))


def checksum(path):
    """CRC-32 of a file, read in parts."""
    crc = 0
    with open(path, "rb") as handle:
        while part := handle.read(2 ** 22):
            crc = zlib.crc32(part, crc)
    return crc


def build_cache(cases, folder, resolution, fov, condition, split=None, say=print):
    """The Cache of `cases` below `folder`, built once: its name is a fingerprint of every file's
    name, size and time, of the settings and of the split, so a change of any makes a new one.
    split: from split_patients, its default split if not given.
    """
    split = split or split_patients(cases)
    part_of = {case.case: part for part, members in split.items() for case in members}
    cases = [case for case in cases if case.case in part_of]
    key = fingerprint(cases, resolution, fov, condition, sorted(part_of.items()), "thickness")
    path = Path(folder) / f"{condition}-{resolution}-{key}.npy"
    try:
        return Cache(path)
    # not there, or damaged: built (again)
    except (OSError, ValueError, KeyError, EOFError) as error:
        if path.exists():
            say(f"note: {path} cannot be used ({error}); made anew")
    path.parent.mkdir(parents=True, exist_ok=True)
    started, entries, first, cut = time.time(), [], 0, []
    raw = path.with_suffix(f".{os.getpid()}.tmp")

    def prepare(case):
        got = prepare_case(case, resolution, fov, condition)
        keep = (got["classes"] > 0).mean((1, 2)) > 0.01
        block = np.concatenate([got["images"], got["classes"][:, None]], 1)[keep]
        return case, block, got["position"][keep], got["hashes"], got["cut"], nifti.spacing_of(
            got["grid"].affine)[2]

    try:
        with open(raw, "wb") as handle, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for at in range(0, len(cases), 8):          # a few at a time: memory stays small
                for case, block, position, hashes, lost, thickness in pool.map(prepare,
                                                                               cases[at:at + 8]):
                    handle.write(block.tobytes())
                    entries.append({"case": case.case, "patient": case.patient,
                                    "part": part_of[case.case], "hashes": hashes, "first": first,
                                    "count": len(block), "position": position.round(5).tolist(),
                                    "thickness": float(thickness)})
                    first += len(block)
                    cut += [case.case] * (lost > 0.002)
        if not first:
            raise bs.BadInput(f"no slice shows enough brain in a field of view of {fov} mm; use a "
                              "smaller --fov")
        shape = (first, len(bs.MODALITIES) + 1, resolution, resolution)

        def write(temporary):                           # .npy = a header, then the bytes
            with open(temporary, "wb") as handle, open(raw, "rb") as source:
                np.lib.format.write_array_header_1_0(
                    handle, {"descr": "|u1", "fortran_order": False, "shape": shape})
                shutil.copyfileobj(source, handle, 2 ** 22)

        files.replace_file(path, write)
    finally:
        raw.unlink(missing_ok=True)
    meta = {"condition": condition, "classes": bs.CONDITIONS[condition],
            "modalities": bs.MODALITIES, "resolution": resolution, "fov": fov, "cases": entries,
            "checksum": checksum(path)}
    files.replace_file(path.with_suffix(".json"), lambda temporary: temporary.write_text(
        json.dumps(meta)))
    if cut:
        say(f"note: {len(cut)} cases are wider than the field of view of {fov} mm and lose their "
            f"edge ({cut[0]} for one); a larger --fov keeps it")
    say(f"cache: {len(cases)} cases, {first} slices in {time.time() - started:.0f} s -> {path}")
    return Cache(path)


def has_label(cache, rows, first_label):
    """Which of these cache rows show a class value >= first_label: bool (len(rows),)."""
    return np.array([(cache.rows[r, -1] >= first_label).any() for r in rows], bool)
