"""Label maps on request, from no patient, as volumes of cubic voxels in two steps: blocks, then
voxels.
"""
from __future__ import annotations

import hashlib
import itertools
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import files, metrics, runs, slices


# What can be asked for: mL of each label; mm from the middle of the brain to that of the tumour, to
# the patient's right, front and top; sphericity of the whole tumour (1: a ball); number of its
# parts; mL of ventricles, under the condition that has them.
ASKED = ("NCR", "ED", "ET", "x", "y", "z", "sphericity", "lesions", "ventricles")
VOLUMES = (*bs.LABELS, "ventricles")
UNSEEN = ("sphericity", "lesions")      # what blocks hardly show or not at all
BLOCK = 4                               # voxels a side of a block, slices of a slab
# What a generated block has less of it has not, nor a label of which neither it nor a neighbour has
# SURE_SHARE: that is the sampler's own noise. A label of a millilitre or two, thinly spread, can go
# with it.
LEAST_SHARE, SURE_SHARE = 0.05, 0.2
CANDIDATES = 16                         # heads in blocks that are drawn for every one that is kept
# Label maps drawn at most for every one that is kept; drawing ends at one this near, see distance,
# for each entry asked for: about 10 or 14 mL for 12, 4 mm of place, no lesion too many.
DRAFTS, NEAR = 4, 0.002
BRATS_FRAME = (240.0, 240.0, 155.0)     # mm, the volumes of every release
# mm in it, the middle of the brain, within 4 mm in all 33 cases looked at
BRATS_MIDDLE = (119.5, 128.0, 72.0)


def sphericity(mask):
    """pi^(1/3) (6 V)^(2/3) / A of a bool mask (D, H, W), cubic voxels: 1 for a ball, less for all
    else; NaN if empty. The surface A is the sum of the mask's gradient lengths, which is some 7%
    too much for a ball (its sphericity comes out as 0.92 to 0.96 at any size); counting the faces
    of voxels would be half as much again."""
    if not mask.any():
        return float("nan")
    area = torch.stack(torch.gradient(F.pad(mask.float(), (1,) * 6))).norm(dim=0).sum()
    return float(math.pi ** (1 / 3) * (6 * mask.sum()) ** (2 / 3) / area)


def characteristics(classes, condition, step):
    """What can be asked for, measured: classes int tensor (D, H, W), see to_cubes, voxels of `step`
    mm -> float32 in the order of ASKED. Without a tumour place and sphericity are NaN. Parts under
    50 mm3 are not counted [LESION]."""
    labels, ml, names = bs.tumour_labels(classes, condition), step ** 3 / 1000, bs.CONDITIONS[
        condition]
    volumes, at = [float((labels == k).sum()) * ml for k in (1, 2, 3)], torch.stack(
        torch.where(labels > 0))
    fluid = float((classes == names.index("ventricles")).sum(
        )) * ml if "ventricles" in names else torch.nan
    if not at.shape[1]:
        return torch.tensor([*volumes, *[torch.nan] * 4, 0.0, fluid])
    up, back, left = ((at.float().mean(1) - torch.stack(torch.where(classes > 0)).float().mean(1))
                      * step).tolist()
    # its box
    ill = labels[tuple(slice(int(low), int(high) + 1) for low,
                       high in zip(at.amin(1), at.amax(1)))] > 0
    sizes = torch.bincount(metrics.components(ill).flatten())[1:]
    return torch.tensor([*volumes, -left, -back, up, sphericity(ill),
                         float((sizes * ml * 1000 >= 50).sum()), fluid])


def scaled(wanted):
    """Characteristics (..., len(ASKED)) -> about -1..1, as the network takes them; NaN stays
    NaN."""
    volume, place, sphere, lesions, fluid = wanted.split((3, 3, 1, 1, 1), -1)
    return torch.cat([volume.clamp(min=0) ** (1 / 3) / 2.5 - 1, place / 60, 2 * sphere - 1,
                      torch.log2(lesions + 1) - 1, fluid.clamp(min=0) ** (1 / 3) / 2 - 1.5], -1)


def to_cubes(classes, thickness, step, depth, n_classes):
    """Slices (D, R, R) of a case, `thickness` mm apart -> uint8 (depth, R, R), `step` mm apart, by
    majority of what a new slice covers, the case in the middle; air above and below."""
    ratio = step / thickness
    weights = slices.area_weights(len(classes), depth, (len(classes) - depth * ratio) / 2, ratio)
    share = np.stack([np.tensordot(weights, (classes == k).astype(np.float32), 1)
                      for k in range(n_classes)])
    share[0] += 1 - share.sum(0)
    return share.argmax(0).astype(np.uint8)


def label_volumes(cache, parts, depth):
    """The label maps of these parts of a cache as volumes of cubic voxels: uint8 (N, depth, R,
    R)."""
    size, classes = cache.meta["resolution"], len(cache.meta["classes"])
    volumes = [to_cubes(cache.rows[its["first"]:its["first"] + its["count"], -1], its["thickness"],
                        cache.meta["fov"] / size, depth, classes) for its in cache.cases
               if its["part"] in parts]
    return torch.from_numpy(np.stack(volumes) if volumes
                            else np.zeros((0, depth, size, size), np.uint8))


def read_label_maps(path, outlines, step, seed=0):
    """Label maps alone: an .npz with seg (N, X, Y, Z) of labels 0, 1, 2 and 3 or 4, the whole frame
    of 240 x 240 x 155 mm in which BraTS releases its cases, voxels in the order of its files up to
    2021 (x to the left, y to the back), and ids (N,). They have no brain: each gets the outline of
    one of `outlines`, uint8 (M, D, R, R) cubes of `step` mm, by lot. -> (uint8 (N, D, R, R), ids,
    their hashes as case_hashes has them, share of tumour voxels that lay outside the outline and
    were taken away). BadInput where the file holds something else."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            maps, ids = archive["seg"], [str(its) for its in archive["ids"]]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise bs.BadInput(f"{path}: cannot be read ({error}); expected an .npz with seg (N, X, Y, "
                          "Z) and ids (N,)") from error
    if maps.ndim != 4 or not len(maps) or len(maps) != len(ids) or not np.isin(maps,
                                                                               (0, 1, 2, 3,
                                                                                4)).all():
        raise bs.BadInput(f"{path}: seg is {maps.dtype} {maps.shape} beside {len(ids)} ids; "
                          "expected (N, X, Y, Z) with labels 0, 1, 2 and 3 or 4")
    shape, total, lost, out, hashes = outlines.shape[1:], 0, 0, [], []
    spacing = np.array(BRATS_FRAME) / maps.shape[1:]
    weights = [slices.area_weights(n, size, (middle - size * step / 2) / mm, step / mm) for n, size,
               middle, mm in zip(maps.shape[1:], shape[::-1], BRATS_MIDDLE, spacing)]
    order = torch.randint(len(outlines), (len(maps),), generator=bs.generator(seed, "outlines"))
    for labels, brain in zip(maps, outlines[order] > 0):
        labels = np.where(labels == 4, 3, labels).astype(np.uint8)
        # canonical: to the right, to the front
        hashes.append(slices.case_hashes(labels[::-1, ::-1], brain.numpy())[0])
        at = np.argwhere(labels) if labels.any() else np.zeros((1, 3), int)
        # the rest is empty
        box = tuple(slice(low, high + 1) for low, high in zip(at.min(0), at.max(0)))
        share = np.stack([labels[box] == k for k in (1, 2, 3)]).astype(np.float32)
        for its, part in zip(weights, box):     # x, y, z in turn, each put behind the others
            share = np.tensordot(share, its[:, part], (1, 1))
        share = share.transpose(0, 3, 2, 1)     # (3, D, R, R)
        # (D, R, R)
        labels = torch.from_numpy(np.concatenate([1 - share.sum(0, keepdims=True), share]).argmax(
            0))
        total, lost = total + int((labels > 0).sum()), lost + int(((labels > 0) & ~brain).sum())
        out.append(torch.where(brain, torch.where(labels > 0, labels + 1, 1), 0).to(torch.uint8))
    return torch.stack(out), ids, hashes, lost / max(total, 1)


def nearest_tumour(volumes, others, condition):
    """Of every label map the tumour of `others` that is most like its own: int (N, D, R, R), (M, D,
    R, R) -> Dice (N,), NaN without a tumour or others, and which (N,). Laid upon each other by
    their middles, as they are and mirrored; the best five also by up to a voxel more each way."""
    def laid(volume):
        ill = bs.tumour_labels(volume, condition) > 0
        middle = [int(round(at.float().mean().item())) if len(at) else 0 for at in torch.where(ill)]
        return ill.roll([n // 2 - m for n, m in zip(ill.shape, middle)], (0, 1, 2))

    best, which = torch.full((len(volumes),), torch.nan), torch.zeros(len(volumes),
                                                                      dtype=torch.long)
    if not len(others):
        return best, which
    known = torch.stack([its for other in others for its in (laid(other), laid(other.flip(-1)))])
    flat, sizes = known.flatten(1).to(torch.uint8), known.sum((1, 2, 3))
    for i, one in enumerate(map(laid, volumes)):
        if not one.any():
            continue
        shared = flat[:, one.flatten()].sum(1)
        for j in (2 * shared / (sizes + one.sum())).topk(min(5, len(known))).indices.tolist():
            near = max(bs.dice(one.roll(by, (0, 1, 2)), known[j])
                       for by in itertools.product((-1, 0, 1), repeat=3))
            if not near <= best[i]:
                best[i], which[i] = near, j // 2
    return best, which


# How heads are moved in training: degrees; scale, shift and bend (elastic) as shares of the volume.
MOVES = {"rotate": 10, "scale": 0.12, "shift": 0.04, "bend": 0.03}


def move_volumes(volumes, key):
    """Relatives of label volumes: uint8 (B, D, H, W) -> the same, each mirrored or not, turned,
    stretched, shifted and bent by chance, tumour and head as one (nearest neighbour). A few dozen
    heads become as many as there are steps. key: of generator."""
    (batch, *size), g = volumes.shape, bs.generator(*key)
    uniform = lambda *shape: torch.rand(batch, *shape, generator=g) * 2 - 1
    angles = uniform(3) * math.radians(MOVES["rotate"])
    skew = torch.zeros(batch, 3, 3)
    for i, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
        skew[:, a, b], skew[:, b, a] = -angles[:, i], angles[:, i]
    stretch = torch.exp(uniform(3) * MOVES["scale"])
    stretch[:, 0] *= uniform().sign()                                       # left for right
    # affine_grid counts x, y, z in half volumes
    voxels = torch.tensor(size[::-1], dtype=torch.float32)
    turn = torch.matrix_exp(skew) * stretch[:, None] * voxels / voxels[:, None]
    where = F.affine_grid(torch.cat([turn, 2 * MOVES["shift"] * uniform(3)[:, :, None]], 2),
                          (batch, 1, *size), align_corners=False)
    bend = torch.randn(batch, 3, 4, 5, 5, generator=g) * 2 * MOVES["bend"]
    where = where + F.interpolate(bend, size, mode="trilinear", align_corners=True).movedim(1, -1)
    return F.grid_sample(volumes[:, None].float(), where, mode="nearest", align_corners=False)[:, 0].to(torch.uint8)


def to_slabs(x, size):
    """Volumes of channels (B, D, K, H, W) -> `size` slices as one picture, (B * D / size, size * K,
    H, W)."""
    return x.unflatten(1, (-1, size)).flatten(2, 3).flatten(0, 1)


def from_slabs(x, size, depth):
    """The way back: depth is that of a volume, D."""
    return x.unflatten(0, (-1, depth // size)).unflatten(2, (size, -1)).flatten(1, 2)


def block_shares(volumes, n_classes):
    """Share of every class in each block: int (B, D, R, R) -> float (B, D / BLOCK, K, R / BLOCK, R
    / BLOCK) in 0..1."""
    return torch.stack([F.avg_pool3d(bs.one_hot(volume.long(), n_classes).movedim(1, 0),
                                     BLOCK).movedim(0, 1) for volume in volumes])


def slab_shares(shares, which):
    """What the blocks of a head say of the voxels of one slab: shares (N, D', K, r, r), which int
    (N,) in 0..D' - 1 -> (N, BLOCK * K, R, R) in 0..1, linear between the middles of blocks."""
    rows = torch.arange(len(shares))
    near = torch.stack([shares[rows, (which + by).clamp(0, shares.shape[1] - 1)]
                        for by in (-1, 0, 1)], 2)
    # (N, K, 3 BLOCK, R, R)
    near = F.interpolate(near, scale_factor=BLOCK, mode="trilinear", align_corners=False)
    return near[:, :, BLOCK:2 * BLOCK].movedim(1, 2).flatten(1, 2)


def head_pictures(shares):
    """Shares (N, D', K, r, r) in 0..1 -> what the coarse network draws, 2 sqrt(share) - 1, (N, D'
    K, r, r): under the root a little of a class weighs more than the sampler's noise, and noise
    where there is nothing weighs little."""
    return to_slabs(2 * shares.sqrt() - 1, shares.shape[1])


def label_prior(shares, floor=0.1):
    """What `expected` gives the coarse network to go by: shares (N, D', K, r, r) -> mean and spread
    of head_pictures for every class of every block, left and right alike. A spread is never under
    `floor`: a tumour may come where none was seen."""
    x = head_pictures(shares)
    x = torch.cat([x, x.flip(-1)])
    atlas = torch.stack([x.mean(0), x.std(0).clamp(min=floor)])[:, None]
    # (2, 1, C), (2, 1, C, r, r)
    return {"classes": atlas.mean((3, 4)), "atlas": atlas}


def open_entries(chance):
    """Which entries of a request training leaves open: chance (B, 2 + len(ASKED)), uniform in 0..1
    -> bool (B, len(ASKED)). In one half of all requests any, from none to all; in the other all but
    volumes, and of those half, since that is what people ask for."""
    few, share, each = chance[:, :1] < 0.5, chance[:, 1:2], chance[:, 2:]
    volume = torch.tensor([name in VOLUMES for name in ASKED])
    return torch.where(few, ~volume | (each > 0.5), each > share)


def head_scalars(wanted):
    """Wanted characteristics (B, len(ASKED)), NaN where open -> scalars of the coarse network (B, 1
    + len(ASKED)): 0 for the slice position, which a head has not, then the request."""
    return torch.cat([torch.zeros(len(wanted), 1), scaled(wanted)], 1)


def slab_scalars(which, slabs, wanted):
    """Scalars of the fine network (B, 3): position of slab which (B,) of `slabs` in -1..1, then of
    what is wanted (B, len(ASKED)) what blocks hardly show or not at all, sphericity and lesions."""
    position = (which + 0.5) / slabs * 2 - 1
    return torch.cat([position[:, None], scaled(wanted)[:, [ASKED.index(name) for name in UNSEEN]]],
                     1)


def parse_request(text):
    """"et=12,ed=5..30,x=20" -> {"ET": (12.0, 12.0), "ED": (5.0, 30.0), "x": (20.0, 20.0)}. BadInput
    names what is wrong."""
    known, out = {name.lower(): name for name in ASKED}, {}
    for word in filter(None, text.split(",")):
        name, _, value = word.partition("=")
        low, dots, high = value.partition("..")
        try:
            low, high = float(low), float(high if dots else low)
        except ValueError:
            low = high = math.nan
        if name.strip().lower() not in known or not low <= high or low < 0 and name.strip().lower(
            ) not in "xyz":
            raise bs.BadInput(f"--request {word}: cannot be asked for; write {', '.join(known)} "
                              "with a number or a range, like et=12,ed=20..60")
        out[known[name.strip().lower()]] = (low, high)
    return out


def requested(request, number, count, seed):
    """What case `number` of `count` is asked to be: request from parse_request -> float32
    (len(ASKED),), NaN where open. Ranges are spread evenly over the cases, each in an order of its
    own."""
    out = torch.full((len(ASKED),), torch.nan)
    for name, (low, high) in request.items():
        order = torch.randperm(count, generator=bs.generator(seed, "request", name))
        out[ASKED.index(name)] = low + (high - low) * (int(order[number]) + 0.5) / count
    return out


def require_condition(condition, wanted):
    """BadInput unless label maps of `condition` can be had as those of `wanted`."""
    if wanted not in (condition, "tumour"):
        raise bs.BadInput(f"the image generator wants the condition {wanted}, the label generator "
                          f"makes {condition}; train it with --generate labels --condition "
                          f"{wanted}")


def prepare_labels(classes, condition, step, resolution, fov, wanted):
    """A generated label map as prepare_case returns one, without images: classes int64 (D, R, R) of
    `condition`, voxels of `step` mm -> cubic voxels of fov / resolution mm, classes of the
    condition `wanted`. BadInput where that asks for tissue and there is none."""
    require_condition(condition, wanted)
    if wanted != condition:
        labels = bs.tumour_labels(classes, condition)
        classes = torch.where(labels > 0, labels + 1, (classes > 0).long())
    ratio = fov / resolution / step
    depth, n = round(len(classes) / ratio), len(bs.CONDITIONS[wanted])
    share = bs.one_hot(classes, n).movedim(1, 0).numpy()                       # (K, D, R, R)
    for axis, size in ((1, depth), (2, resolution), (3, resolution)):
        have = share.shape[axis]
        start = (have - size * ratio) / 2
        weights = (slices.area_weights(have, size, start, ratio) if ratio >= 1 else
                   slices.linear_weights(size, have, -start / ratio, 1 / ratio))
        share = np.moveaxis(np.tensordot(weights, share, (1, axis)), 0, axis)
    share[0] += 1 - share.sum(0)
    classes = share.argmax(0).astype(np.uint8)
    with_brain = np.where((classes > 0).any((1, 2)))[0]
    if not len(with_brain):
        raise bs.BadInput("the label generator drew no brain; train it longer")
    low, high = with_brain[0], with_brain[-1]
    position = 2 * (np.arange(depth) - low) / max(high - low, 1) - 1
    affine = np.diag([fov / resolution] * 3 + [1.0])
    affine[:3, 3] = -np.array([resolution - 1, resolution - 1, depth - 1]) / 2 * fov / resolution
    labels = slices.from_slices(bs.tumour_labels(classes, wanted)).astype(np.uint8)
    brain = slices.from_slices(classes > 0)
    return {"images": None, "classes": classes, "position": position.astype(np.float32),
            "labels": labels, "brain": brain, "hashes": slices.case_hashes(labels, brain),
            "cut": 0.0, "grid": slices.Grid(brain.shape, affine, resolution, (0.0, 0.0),
                                            (1.0, 1.0))}


@dataclass
class LabelGenerator:
    """Both networks of a run of train_ddpm.py --generate labels, what they draw (a condition,
    voxels of `step` mm), what the heads they learned from measure (N, len(ASKED)), the hashes of
    those, whether they were phantoms or patients and how many, and a digest of the networks'
    files."""
    coarse: bs.Denoiser
    fine: bs.Denoiser
    condition: str
    step: float
    measured: torch.Tensor
    trained_on: list = ()
    data: str = "phantoms"                      # or "patients"
    patients: int = 0
    digest: str = ""


def load_label_generator(folder, device):
    """The LabelGenerator of a run's folder, which holds "coarse" and "fine", or of a folder of
    published weights. BadInput where a part is missing or the two are of different runs: other
    cases, condition, resolution or fov."""
    parts = [Path(folder) / part for part in ("coarse", "fine")]
    published = not parts[0].exists() and parts[0].with_suffix(".npz").exists()
    (coarse, one), (fine, other) = [runs.load_generator(path.with_suffix(".npz" if published
                                                                         else ""), device,
                                                        kind="labels") for path in parts]
    if any(one[name] != other[name] for name in ("trained_on", "condition", "resolution", "fov")):
        raise bs.BadInput(f"{folder}: its coarse and its fine network are of different runs; train "
                          "it anew")
    both = "".join(files.file_hash(its["file"]) for its in (one, other))
    digest = hashlib.sha256(both.encode()).hexdigest()
    return LabelGenerator(coarse, fine, one["condition"], one["fov"] / one["resolution"],
                          torch.tensor(one["measured"]), one["trained_on"], one["data"],
                          one["patients"], digest)


def measure_shares(shares, condition, step):
    """What characteristics would say of heads in blocks: shares (N, D', K, r, r), voxels of `step`
    mm -> (N, len(ASKED)), NaN for lesions, which blocks do not show, and where there is nothing to
    measure. Sphericity is a guess: measured as of voxels with shares for the mask, for which rough
    surfaces are smooth, then 0.8 of it less 0.2. tests/bench_labels.py shapes says how it follows
    that of the voxels."""
    names, ml = bs.CONDITIONS[condition], (BLOCK * step) ** 3 / 1000
    volumes = shares.sum((1, 3, 4)) * ml                                                    # (N, K)
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in (shares.shape[1], *shares.shape[3:])],
                          indexing="ij")

    def middle(part):                           # slice, row and column of its centre, in blocks
        return [(part * axis).sum((1, 2, 3)) / part.sum((1, 2, 3)) for axis in axes]

    ill, head = shares[:, :, names.index(bs.LABELS[0]):].sum(2), 1 - shares[:, :, 0]
    up, back, left = [(a - b) * BLOCK * step for a, b in zip(middle(ill), middle(head))]
    area = torch.stack(torch.gradient(F.pad(ill, (1,) * 6), dim=(1, 2, 3))).norm(dim=0).sum(
        (1, 2, 3))
    sphere, unknown = math.pi ** (1 / 3) * (6 * ill.sum((1, 2, 3))) ** (2 / 3) / area, torch.full_like(up, torch.nan)
    fluid = volumes[:, names.index("ventricles")] if "ventricles" in names else unknown
    return torch.stack([*volumes[:, -3:].T, -left, -back, up, 0.8 * sphere - 0.2, unknown, fluid],
                       1)


def first_volume(condition):
    """The first class of a condition whose volume can be asked for; all after it can too."""
    return min(at for at, name in enumerate(bs.CONDITIONS[condition]) if name in ASKED)


def volumes_wanted(wanted, condition):
    """The classes whose volume wanted (len(ASKED),) names: [(index in CONDITIONS[condition],
    mL)]."""
    names = bs.CONDITIONS[condition]
    return [(names.index(name), float(ml)) for name, ml in zip(ASKED, wanted) if name in names
            and ml == ml]


def distance(measured, wanted, asked=None):
    """How far heads are from a request: measured (N, len(ASKED)), wanted (len(ASKED),), NaN where
    open -> (N,). What is wanted and not there, as the place of no tumour, is far. asked: bool
    (len(ASKED),); all else counts a tenth."""
    off = torch.nan_to_num((scaled(measured) - scaled(wanted)) ** 2, nan=4.0) * ~torch.isnan(wanted)
    return (off if asked is None else torch.where(asked, off, off / 10)).sum(1)


def fill_volumes(wanted, known, key, near=0.05):
    """A request (len(ASKED),) whose open volumes are those of a training head: known (N,
    len(ASKED)), what these heads measure; one of them by lot, of the share `near` that are most
    like what is asked, or of all if nothing is. So a set of heads has volumes as patients have
    them; by itself the coarse network draws tumours too small. Heads without tumour count only if
    nothing is asked of the tumour, or lesions=0: et=0 is a tumour without ET."""
    open_ = torch.isnan(wanted)
    ill = known[:, :len(bs.LABELS)].sum(1) > 0
    if not open_[:ASKED.index("ventricles")].all() and wanted[
        ASKED.index("lesions")] != 0 and ill.any():
        known = known[ill]
    count = len(known) if open_.all() else max(1, round(near * len(known)))
    lot = int(torch.randint(count, (1,), generator=bs.generator(*key, "lot")))
    one = known[distance(known, wanted).argsort(stable=True)[lot]]
    return torch.where(open_ & torch.tensor([name in VOLUMES for name in ASKED]), one, wanted)


def without(shares, classes):
    """Shares of classes (..., K, r, r) without these: what is left but air (class 0) fills the
    rest."""
    # (K, ..., r, r)
    rest = shares.clone().movedim(-3, 0)
    rest[classes] = 0
    rest[1:] *= (1 - rest[0]) / rest[1:].sum(0).clamp(min=1e-30)
    return rest.movedim(0, -3)


def sample_shares(denoiser, condition, step, wanted, key, settings=bs.SAMPLING,
                  candidates=CANDIDATES, asked=None):
    """A head in blocks: wanted float (len(ASKED),), NaN where open -> shares (D', K, r, r) in 0..1,
    1 in sum. `candidates` heads are drawn; the one that measures most like what is wanted is it.
    step: mm a voxel; asked: see distance."""
    if not any(value == value and name != "lesions" for name, value in zip(ASKED, wanted)):
        candidates = 1                          # nothing to choose by
    # (N, D' K, r, r)
    shape = candidates, *denoiser.prior["atlas"].shape[2:]
    scalars, no_labels = head_scalars(wanted.expand(candidates, -1)), torch.zeros(candidates, 0,
                                                                                  *shape[2:])

    def noise(step):
        return torch.randn(shape, generator=bs.generator(*key, "blocks", step))

    x, depth = bs.sample_guided(denoiser, no_labels, scalars, noise, settings), shape[-1] * 3 // 4
    shares = ((from_slabs(x, depth, depth) + 1) / 2).clamp(1e-6, 1) ** 2
    shares, first = shares / shares.sum(2, keepdim=True), first_volume(condition)
    shares[:, :, first:] *= F.max_pool3d(shares[:, :, first:].movedim(2, 1), 3, 1, 1).movedim(1, 2) >= SURE_SHARE
    shares = without(shares, [])
    shares = torch.where((shares < LEAST_SHARE) & (shares < shares.amax(2, keepdim=True)), 0.0,
                         shares)
    shares = shares / shares.sum(2, keepdim=True)
    best = shares[distance(measure_shares(shares, condition, step), wanted, asked).argmin()]
    return without(best, [at for at, ml in volumes_wanted(wanted, condition) if ml == 0])


def voxels_due(shares, condition, step, wanted):
    """How many voxels of each class a head should have: as wanted (len(ASKED),) says, else as the
    blocks do, (D', K, r, r) -> float (K,)."""
    voxels = shares.sum((0, 2, 3)) * BLOCK ** 3
    for at, ml in volumes_wanted(wanted, condition):
        voxels[at] = ml * 1000 / step ** 3
    return voxels


def settle(scores, voxels, first):
    """Scores of classes in -1..1 become a label map: float (D, K, R, R) -> int64 (D, R, R).

    They are smoothed over neighbours, (1, 6, 1) / 8 along each axis, which takes away single voxels
    that are not sure and lets slabs meet; more of it, (1, 2, 1) / 4, would make tumours rounder
    than they are. Air gets that, twice: heads are smooth. Of the scores as shares, (score + 1) / 2,
    the largest wins, after each class from `first` on is multiplied by a number of its own, the
    same everywhere, 1/10 to 10: such that it gets about as many voxels as `voxels` (K,) says, none
    if that is 0. Request and blocks say how much, see voxels_due, the scores where. What nothing
    else claims is class 1, brain, and so is a voxel of these classes that touches no other.
    """
    def smooth(its, middle):
        kernel = torch.tensor([1.0, middle, 1.0]) / (middle + 2)
        kernel = kernel[:, None, None] * kernel[:, None] * kernel
        padded = F.pad(its.movedim(1, 0)[:, None], (1,) * 6, mode="replicate")
        return F.conv3d(padded, kernel[None, None])[:, 0].movedim(0, 1)

    shares, gain, most = ((scores + 1) / 2).clamp(0, 1), torch.ones(len(voxels)), 10
    air, rest = smooth(smooth(shares[:, :1], 2), 2), smooth(shares[:, 1:], 6)
    rest[:, 0] += 1e-6
    shares = torch.cat([air, rest * (1 - air) / rest.sum(1, keepdim=True)], 1)
    base, other = shares[:, :first].max(1)
    contested = most * shares[:, first:].amax(1) > base     # elsewhere no number changes anything
    some = shares.movedim(1, -1)[contested]                                         # (M, K)
    for _ in range(41):
        classes = other.masked_scatter(contested, (some * gain).argmax(1))
        chosen = (classes >= first).float()[None]
        # itself alone, of 27
        classes[(chosen * F.avg_pool3d(chosen, 3, 1, 1) * 27).round()[0] == 1] = 1
        there = torch.bincount(classes.flatten(), minlength=len(voxels))
        gain[first:] = ((gain * ((voxels + 5) / (there + 5)) ** 0.3).clamp(1 / most, most)
                        * (voxels > 0))[first:]
    return classes


def draw_labels(model, wanted, key, settings, candidates, asked):
    """One label map as the networks draw it: see sample_labels; asked: see distance."""
    shares = sample_shares(model.coarse, model.condition, model.step, wanted, key, settings,
                           candidates, asked)
    slabs = len(shares)
    # (D', BLOCK K, R, R)
    onehot = slab_shares(shares.expand(slabs, *shares.shape), torch.arange(slabs))
    scalars = slab_scalars(torch.arange(slabs), slabs, wanted.expand(slabs, -1))

    def noise(step):
        return torch.randn(onehot.shape, generator=bs.generator(*key, "voxels", step))

    x = bs.sample_guided(model.fine, onehot, scalars, noise, {**settings, "guidance": 1.0})
    return settle(from_slabs(x, BLOCK, BLOCK * slabs)[0],
                  voxels_due(shares, model.condition, model.step, wanted),
                  first_volume(model.condition))


def sample_labels(model, wanted, key, settings=bs.SAMPLING, candidates=CANDIDATES, drafts=DRAFTS):
    """One label map: a LabelGenerator, wanted float (len(ASKED),), NaN where open -> classes int64
    (D, R, R). key: as in sample_volume; settings: see SAMPLING, of which guidance is for the coarse
    network and coherence does not matter; candidates: see sample_shares; drafts: so many label maps
    are drawn at most, until one is NEAR what was asked; the nearest is kept. Volumes left open: see
    fill_volumes."""
    asked, best = ~torch.isnan(wanted), (math.inf, None)
    for i in range(drafts):
        its = (*key, i) if i else key
        whole = fill_volumes(wanted, model.measured, its)
        classes = draw_labels(model, whole, its, settings, candidates, asked)
        off = float(distance(characteristics(classes, model.condition, model.step)[None], whole,
                             asked))
        if best[1] is None or off < best[0]:
            best = off, classes
        if not asked.any() or off < NEAR * (1 + asked.sum()):
            break
    return best[1]
