"""New label maps from old ones: tumours moved, turned, bent, mirrored, scaled."""
import math

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import nifti, phantoms


def measured_names():
    """The labels and regions whose volumes are measured."""
    return list(dict.fromkeys([*bs.LABELS, *bs.REGIONS]))


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
    numbers = [float(number) for number in text.split(",")]
    lengths = {"scale": 1, "rotate": 1, "elastic": 1, "shift": 3}
    if lengths.get(name) != len(numbers) or not np.isfinite(numbers).all() \
            or name == "scale" and numbers[0] <= 0:
        raise ValueError(f"no edit is {name}={text}")
    return numbers if name == "shift" else numbers[0]


def parse_edit(words):
    """Words of the command line -> an edit, see edit_labels: ["scale=1.2", "shift=10,0,0",
    "mirror"] -> {"scale": 1.2, "shift": [10.0, 0.0, 0.0], "mirror": True}. BadInput for any other
    word."""
    return parse_words("--edit", words, edit_value, "expected scale=1.2, shift=10,0,0 (mm), "
                       "rotate=15 (degrees), elastic=3 (mm), mirror, each once, or random alone")


def random_edit(rng):
    """A mild edit, for variety: rng a numpy Generator -> see edit_labels."""
    scale, rotate = np.exp(rng.normal(0, 0.15)), rng.uniform(-25, 25)
    return {"scale": round(float(scale), 3), "rotate": round(float(rotate), 1),
            "shift": rng.normal(0, 6, 3).round(1).tolist(), "mirror": bool(rng.uniform() < 0.5),
            "elastic": 1.5}


def to_mm(voxels, affine):
    """Voxel indices (..., 3) -> mm (..., 3)."""
    return np.asarray(voxels, float) @ affine[:3, :3].T + affine[:3, 3]


def edit_labels(labels, affine, brain, edit, rng):
    """A label map with its tumour changed: uint8 (X, Y, Z), canonical with affine -> the same.

    brain  bool (X, Y, Z); what of the tumour lies outside in the end is cut off
    edit   any of: scale (factor on lengths), rotate (degrees counter-clockwise, seen from the
           head), mirror (left for right, about the middle of the box around the brain), shift (mm
           to the right, front, head), elastic (mm, spread of a smooth random displacement). The
           tumour turns and grows about its centre of mass.
    rng    numpy Generator, for elastic

    Every voxel of the result looks up where it comes from: fractions of labels, linear between
    voxels; a tumour voxel where they sum to more than one half, with the largest label.
    """
    if not edit or not labels.any():
        return labels
    centre = to_mm(np.argwhere(labels > 0), affine).mean(0)
    outline = to_mm(np.argwhere(brain), affine)
    middle = (outline.min(0) + outline.max(0)) / 2
    flip = np.array([-1.0 if edit.get("mirror") else 1.0, 1, 1])
    target = middle + (centre - middle) * flip + np.array(edit.get("shift", (0, 0, 0)))
    point = to_mm(np.stack(np.indices(brain.shape), -1), affine) - target          # (X, Y, Z, 3)
    if edit.get("elastic"):
        spacing = nifti.spacing_of(affine)
        noise = [phantoms.smooth_noise(rng, 40, brain.shape, spacing) for _ in range(3)]
        point += edit["elastic"] * np.stack(noise, -1)
    angle = math.radians(edit.get("rotate", 0))
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    source = (point @ turn.T) * flip / edit.get("scale", 1.0) + centre
    voxel = (source - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    where = (2 * voxel[..., ::-1] + 1) / np.array(labels.shape[::-1]) - 1   # z, y, x in -1..1
    onehot = F.one_hot(torch.from_numpy(labels.astype(np.int64)), len(bs.LABELS) + 1)
    onehot = onehot.movedim(-1, 0)[1:].float()
    fraction = F.grid_sample(onehot[None], torch.from_numpy(where.astype(np.float32))[None],
                             align_corners=False)[0]                        # (3, X, Y, Z)
    moved = torch.where(fraction.sum(0) > 0.5, fraction.argmax(0) + 1, 0).numpy()
    return np.where(brain, moved, 0).astype(np.uint8)


def balanced_target(number, count, low, high):
    """The volume in mL asked of case `number` of `count`: evenly spread over low..high, in an order
    in which any first part is spread as well (golden-ratio steps)."""
    rank = np.argsort(np.argsort([(i * 0.6180339887) % 1 for i in range(count)]))[number]
    return low + (high - low) * (rank + 0.5) / count


def pick_for_volume(volumes, target, rng):
    """Which of these volumes (N,) in mL is scaled to `target` mL: an index, by lot of those that
    need a factor of 0.7 to 1.4 on lengths; if there are none, the one that needs least."""
    factors = (target / np.maximum(volumes, 1e-9)) ** (1 / 3)
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
