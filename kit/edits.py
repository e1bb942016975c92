"""New label maps from old ones: moved, bent, mirrored, grown, pasted into another brain, spread
evenly over volumes.
"""
from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import metrics, nifti, phantoms


DROPPED = {"NCR": 3, "ED": 0, "ET": 1}          # what a label's voxels become when it is dropped


def volume_ml(labels, affine, name):
    """Volume in mL of a label (NCR, ED, ET) or region (WT, TC, ET) of labels (X, Y, Z)."""
    members = bs.REGIONS.get(name) or (bs.LABELS.index(name) + 1,)
    return float(np.isin(labels, members).sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def parse_edit(words):
    """Words of the command line -> an edit, see edit_labels: ["scale=1.2", "shift=10,0,0",
    "mirror"] -> {"scale": 1.2, "shift": [10.0, 0.0, 0.0], "mirror": True}. BadInput for any other
    word."""
    edit = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            if name in ("scale", "rotate", "elastic"):
                edit[name] = float(value)
            elif name == "shift":
                edit[name] = [float(mm) for mm in value.split(",")]
            elif name == "mirror" and not value:
                edit[name] = True
            elif name in ("drop", "add") and value in bs.LABELS:
                edit[name] = value
            else:
                raise ValueError
            if [w.partition("=")[0] for w in words].count(name) > 1:
                raise ValueError
            numbers = np.atleast_1d(edit[name]) if name not in ("drop", "add") else np.zeros(1)
            if not np.isfinite(numbers).all() or len(edit.get("shift", (1, 2, 3))) != 3 or edit.get(
                "scale", 1) <= 0:
                raise ValueError
        except ValueError as error:
            raise bs.BadInput(f"--edit {word}: expected scale=1.2, shift=10,0,0 (mm), rotate=15 "
                              "(degrees), elastic=3 (mm), mirror, drop=NCR, add=ED, each once, or "
                              "random alone") from error
    return edit


def random_edit(rng):
    """A mild edit, for variety: rng a numpy Generator -> see edit_labels."""
    return {"scale": round(float(np.exp(rng.normal(0, 0.15))), 3),
            "rotate": round(float(rng.uniform(-25, 25)), 1),
            "shift": rng.normal(0, 6, 3).round(1).tolist(), "mirror": bool(rng.uniform() < 0.5),
            "elastic": 1.5}


def to_mm(voxels, affine):
    """Voxel indices (..., 3) -> mm (..., 3)."""
    return np.asarray(voxels, float) @ affine[:3, :3].T + affine[:3, 3]


def box_of(mask, affine):
    """Middle and half the size, mm (3,) each, of the box around a bool mask (X, Y, Z)."""
    at = to_mm(np.argwhere(mask), affine)
    return (at.min(0) + at.max(0)) / 2, (at.max(0) - at.min(0)) / 2


def edit_labels(labels, affine, brain, edit, rng, home=None):
    """A label map with its tumour changed: uint8 (X, Y, Z) -> uint8 shaped like `brain`.

    labels, affine   the tumour and where its voxels lie, canonical
    brain            bool: the outline the tumour shall lie in; `home`: its affine where it is
                     another brain (pasting): the tumour keeps its place relative to the outline's
                     middle and size
    edit             any of: scale (factor on lengths), rotate (degrees counter-clockwise, seen from
                     the head), shift (mm to the right, front, head), mirror (left for right),
                     elastic (mm, spread of a smooth random displacement), drop and add (a label)
    rng              numpy Generator, for elastic

    Dropped NCR turns into ET and ET into NCR, dropped ED into brain. Added: ED as a rim of
    about 6 mm around the tumour, ET as about the outer 3 mm of the tumour core, NCR as what lies
    deeper (counted in voxels of mean size). In the end what lies outside the brain is cut off.
    """
    home = affine if home is None else home
    if not labels.any():
        return np.zeros(brain.shape, np.uint8)
    here, (middle, _) = to_mm(np.argwhere(labels > 0), affine).mean(0), box_of(brain, home)
    there = np.array(edit.get("place", here))                           # where the centre goes to
    flip = np.array([-1.0 if edit.get("mirror") else 1.0, 1, 1])
    there = middle + (there - middle) * flip + np.array(edit.get("shift", (0, 0, 0)))
    angle = math.radians(edit.get("rotate", 0))
    turn = np.array([[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0],
                     [0, 0, 1]])
    # every voxel of the result looks up where it comes from
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in brain.shape], indexing="ij"), -1)
    point = to_mm(grid, home) - there
    if edit.get("elastic"):
        noise = [phantoms.smooth_noise(rng, 40, brain.shape, nifti.spacing_of(home))
                 for _ in range(3)]
        point += edit["elastic"] * np.stack(noise, -1)
    source = (point @ turn.T) * flip / edit.get("scale", 1.0) + here
    voxel = (source - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    # grid_sample wants z, y, x
    where = (2 * voxel[..., ::-1] + 1) / np.array(labels.shape[::-1]) - 1
    onehot = F.one_hot(torch.from_numpy(labels.astype(np.int64)), 4).movedim(-1, 0)[1:].float()
    share = F.grid_sample(onehot[None], torch.from_numpy(where.astype(np.float32))[None],
                          align_corners=False)[0]
    out = torch.where(share.sum(0) > 0.5, share.argmax(0) + 1, 0).numpy().astype(np.uint8)
    steps = lambda mm: max(1, round(mm / nifti.spacing_of(home).mean()))
    if "drop" in edit:
        out[out == bs.LABELS.index(edit["drop"]) + 1] = DROPPED[edit["drop"]]
    if "add" in edit:
        core = np.isin(out, (1, 3))
        deep = ~metrics.dilate(torch.from_numpy(~core), steps(3)).numpy()
        if edit["add"] == "ED":
            out[metrics.dilate(torch.from_numpy(out > 0), steps(6)).numpy() & (out == 0)] = 2
        else:
            out[deep if edit["add"] == "NCR" else core & ~deep] = 1 if edit["add"] == "NCR" else 3
    return np.where(brain, out, 0).astype(np.uint8)


def relative_place(labels, affine, brain, other, other_affine):
    """Where the centre of a tumour (labels, affine, in the outline `brain`) lies in another
    outline, mm (3,): the same share of the way from the middle of the outline to its edge, along
    each axis."""
    (middle, half), (its_middle, its_half) = box_of(brain, affine), box_of(other, other_affine)
    return its_middle + (to_mm(np.argwhere(labels > 0), affine).mean(0) - middle) / half * its_half


def balanced_target(number, count, low, high):
    """The volume in mL asked of case `number` of `count`: evenly spread over low..high, in an order
    in which any first part is spread as well (golden-ratio steps)."""
    rank = np.argsort(np.argsort([(i * 0.6180339887) % 1 for i in range(count)]))[number]
    return low + (high - low) * (rank + 0.5) / count


def edit_to_volume(labels, affine, brain, name, target, edit, seed):
    """edit_labels with the scale that makes `name` (a label or region) measure `target` mL ->
    (labels, the edit with that scale).

    After each try the scale is multiplied by the cube root of what is missing, five tries in all,
    within 0.4 to 2.5; so what the brain's edge cuts off is made up for. The result may still miss:
    measure it.
    """
    scale = edit.get("scale", 1.0)
    for _ in range(5):
        edit = {**edit, "scale": round(float(np.clip(scale, 0.4, 2.5)), 4)}
        out = edit_labels(labels, affine, brain, edit, np.random.default_rng(seed))
        scale = edit["scale"] * (target / max(volume_ml(out, affine, name), 1e-2)) ** (1 / 3)
    return out, edit
