"""New label maps from old ones: tumours moved, turned, bent, mirrored, scaled, put into another
brain.
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


def parse_words(flag, words, value_of, advice):
    """Words "name=text" of the command line -> {name: value_of(name, text)}; text is "" in a word
    without "=". value_of raises ValueError where it does not know the name or the text means
    nothing. BadInput "flag word: advice" then, and where a name comes twice."""
    values = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            if name in values:
                raise ValueError(f"{name} comes twice")
            values[name] = value_of(name, text)
        except ValueError as error:
            raise bs.BadInput(f"{flag} {word}: {advice}") from error
    return values


def edit_value(name, text):
    """The value of one entry of an edit, see edit_labels. ValueError for anything else."""
    if name == "mirror" and not text:
        return True
    if name in ("drop", "add") and text in bs.LABELS:
        return text
    numbers = [float(number) for number in text.split(",")]
    lengths = {"scale": 1, "rotate": 1, "elastic": 1, "shift": 3}
    if lengths.get(name) != len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"no edit is {name}={text}")
    if name == "scale" and numbers[0] <= 0:
        raise ValueError("scale must be above 0")
    return numbers if name == "shift" else numbers[0]


def parse_edit(words):
    """Words of the command line -> an edit, see edit_labels: ["scale=1.2", "shift=10,0,0",
    "mirror"] -> {"scale": 1.2, "shift": [10.0, 0.0, 0.0], "mirror": True}. BadInput for any other
    word."""
    return parse_words("--edit", words, edit_value, "expected scale=1.2, shift=10,0,0 (mm), "
                       "rotate=15 (degrees), elastic=3 (mm), mirror, drop=NCR, add=ED, each once, "
                       "or random alone")


def random_edit(rng):
    """A mild edit, for variety: rng a numpy Generator -> see edit_labels."""
    return {"scale": round(float(np.exp(rng.normal(0, 0.15))), 3),
            "rotate": round(float(rng.uniform(-25, 25)), 1),
            "shift": rng.normal(0, 6, 3).round(1).tolist(), "mirror": bool(rng.uniform() < 0.5),
            "elastic": 1.5}


def to_mm(voxels, affine):
    """Voxel indices (..., 3) -> mm (..., 3)."""
    return np.asarray(voxels, float) @ affine[:3, :3].T + affine[:3, 3]


def centre_of(labels, affine):
    """Centre of mass of a tumour, labels (X, Y, Z) -> mm (3,)."""
    return to_mm(np.argwhere(labels > 0), affine).mean(0)


def box_of(mask, affine):
    """Middle and half the size, mm (3,) each, of the box around a bool mask (X, Y, Z)."""
    points = to_mm(np.argwhere(mask), affine)
    return (points.min(0) + points.max(0)) / 2, (points.max(0) - points.min(0)) / 2


def move_tumour(labels, affine, brain, home, edit, rng):
    """The part of edit_labels that moves: every voxel of the result looks up, linearly, where it
    comes from. Arguments as there -> labels uint8 shaped like `brain`, not yet cut off by it."""
    centre = centre_of(labels, affine)
    middle, _ = box_of(brain, home)
    flip = np.array([-1.0 if edit.get("mirror") else 1.0, 1, 1])
    target = middle + (np.array(edit.get("place", centre)) - middle) * flip
    target = target + np.array(edit.get("shift", (0, 0, 0)))
    point = to_mm(np.stack(np.indices(brain.shape), -1), home) - target            # (X, Y, Z, 3)
    if edit.get("elastic"):
        noise = [phantoms.smooth_noise(rng, 40, brain.shape, nifti.spacing_of(home))
                 for _ in range(3)]
        point += edit["elastic"] * np.stack(noise, -1)
    angle = math.radians(edit.get("rotate", 0))
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    source = (point @ turn.T) * flip / edit.get("scale", 1.0) + centre
    voxel = (source - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    # grid_sample wants z, y, x in -1..1
    where = (2 * voxel[..., ::-1] + 1) / np.array(labels.shape[::-1]) - 1
    onehot = F.one_hot(torch.from_numpy(labels.astype(np.int64)), 4).movedim(-1, 0)[1:].float()
    fraction = F.grid_sample(onehot[None], torch.from_numpy(where.astype(np.float32))[None],
                             align_corners=False)[0]                                # (3, X, Y, Z)
    moved = torch.where(fraction.sum(0) > 0.5, fraction.argmax(0) + 1, 0)
    return moved.numpy().astype(np.uint8)


def grow(mask, mm, affine):
    """A bool mask (X, Y, Z) dilated by about so many mm, at least one voxel."""
    voxels = max(1, round(mm / nifti.spacing_of(affine).mean()))
    return metrics.dilate(torch.from_numpy(mask), voxels).numpy()


def edit_labels(labels, affine, brain, edit, rng, home=None):
    """A label map with its tumour changed: uint8 (X, Y, Z) -> uint8 shaped like `brain`.

    labels, affine   the tumour and where its voxels lie, canonical
    brain            bool: the outline the tumour shall lie in; `home`: its affine where it is that
                     of another brain (pasting)
    edit             any of: scale (factor on lengths), rotate (degrees counter-clockwise, seen from
                     the head), shift (mm to the right, front, head), mirror (left for right, about
                     the middle of the brain), elastic (mm, spread of a smooth random displacement),
                     place (mm, where the tumour's centre goes before mirror and shift; without it
                     the centre stays), drop and add (a label)
    rng              numpy Generator, for elastic

    Dropped NCR turns into ET, dropped ET into NCR, dropped ED into brain. Added: ED as a rim of
    about 6 mm around the tumour, ET as about the outer 3 mm of the tumour core, NCR as what lies
    deeper (counted in voxels of mean size). In the end what lies outside the brain is cut off.
    """
    home = affine if home is None else home
    if not labels.any():
        return np.zeros(brain.shape, np.uint8)
    out = move_tumour(labels, affine, brain, home, edit, rng)
    if "drop" in edit:
        out[out == bs.LABELS.index(edit["drop"]) + 1] = DROPPED[edit["drop"]]
    core = np.isin(out, (1, 3))
    if edit.get("add") == "NCR":
        out[~grow(~core, 3, home)] = 1
    elif edit.get("add") == "ED":
        out[grow(out > 0, 6, home) & (out == 0)] = 2
    elif edit.get("add") == "ET":
        out[core & grow(~core, 3, home)] = 3
    return np.where(brain, out, 0).astype(np.uint8)


def relative_place(labels, affine, brain, other, other_affine):
    """Where the centre of a tumour (labels, affine, in the outline `brain`) lies in another
    outline, mm (3,): the same fraction of the way from the middle of the outline to its edge, along
    each axis."""
    middle, half = box_of(brain, affine)
    other_middle, other_half = box_of(other, other_affine)
    return other_middle + (centre_of(labels, affine) - middle) / half * other_half


def balanced_target(number, count, low, high):
    """The volume in mL asked of case `number` of `count`: evenly spread over low..high, in an order
    in which any first part is spread as well (golden-ratio steps)."""
    rank = np.argsort(np.argsort([(i * 0.6180339887) % 1 for i in range(count)]))[number]
    return low + (high - low) * (rank + 0.5) / count


def pick_for_volume(volumes, target, rng):
    """Which of these volumes (N,) in mL is scaled to `target` mL: an index, by lot of those that
    need a factor of 0.7 to 1.4 on lengths; if there are none, the one that needs least."""
    factors = (target / np.asarray(volumes)) ** (1 / 3)
    near = np.flatnonzero((factors > 0.7) & (factors < 1.4))
    return int(near[rng.integers(len(near))] if len(near) else np.abs(np.log(factors)).argmin())


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
