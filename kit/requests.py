"""Label maps on request, without a patient. Two networks generate a head one after the other.

A coarse network predicts the class fractions of every block of BLOCK x BLOCK x BLOCK voxels (12 mm
at 3 mm a voxel) of the whole head, conditioned on the request: volumes, place, sphericity, number
of lesions. A fine network predicts the voxels, BLOCK slices (a slab) at a time, conditioned on the
blocks. The blocks decide where the tumour lies and how large it is; the voxels give it its shape.

    request -> fill_volumes    volumes that the request leaves open come from a training head
            -> sample_blocks   CANDIDATES heads in blocks; the one closest to the request is kept
            -> sample_draft    voxels of all slabs; settle turns scores into labels of that volume
            -> sample_labels   up to DRAFTS such label maps; the closest to the request is kept

A request is a float tensor (E,), one number for each of entries(), NaN where it is left open.

SOURCES
    [LESION]  parts that count as lesions: Saluja et al. 2023,
              github.com/rachitsaluja/BraTS-2023-Metrics
              BraTS 2023 Metrics
"""
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import edits, files, runs, slices


SPHERICITY, LESIONS = -3, -2            # their places in a request, see entries
BLOCK = 4                               # voxels a side of a block; slices of a slab
# The sampler leaves a little of every class everywhere. A fraction below LEAST_FRACTION becomes 0,
# and so does a label where neither the block nor one of its 26 neighbours reaches SURE_FRACTION.
# A label of one or two mL that is spread thinly can get lost this way.
LEAST_FRACTION, SURE_FRACTION = 0.05, 0.2
CANDIDATES = 16                         # heads in blocks that are sampled for one that is kept
# At most this many label maps are sampled for one that is kept. Sampling ends at a distance below
# NEAR per entry asked for, plus NEAR: about 10 or 14 mL for 12, 4 mm of place, no lesion too many.
DRAFTS, NEAR = 4, 0.002
SETTINGS = {**bs.SAMPLING, "steps": 20}         # of both networks


def entries():
    """The names of the entries of a request: mL of each label; centre of the tumour in mm from the
    centre of the head, to the patient's right, front and top; sphericity of the tumour (1 is a
    ball); number of its connected parts; mL of the ventricles (only under the condition that has
    them)."""
    return *bs.LABELS, "x", "y", "z", "sphericity", "lesions", "ventricles"


def is_volume():
    """Which entries are volumes: bool (E,)."""
    return torch.tensor([name in (*bs.LABELS, "ventricles") for name in entries()])


def volume_entries(condition):
    """The entries that are volumes of classes: [index], in the order of these classes, which are
    the last ones of the condition."""
    return [entries().index(name) for name in bs.CONDITIONS[condition] if name in entries()]


# ------------------------------------------------------------------ what a label map measures ---

def sphericity(mask):
    """pi^(1/3) (6 V)^(2/3) / A of masks, bool or fractions in 0..1, (..., D, H, W), cubic voxels ->
    float (...): 1 for a ball, less for everything else, NaN where the mask is empty. The surface A
    is the sum of the lengths of the mask's gradient. That is about 7% too much for a ball, whose
    sphericity comes out as 0.92 to 0.96 at any size; counting voxel faces would give 50% too
    much."""
    axes = (-3, -2, -1)
    gradient = torch.gradient(F.pad(mask.float(), (1,) * 6), dim=axes)
    area = torch.stack(gradient).norm(dim=0).sum(axes)
    return math.pi ** (1 / 3) * (6 * mask.sum(axes)) ** (2 / 3) / area


def volumes_and_place(fractions, condition, spacing):
    """Class fractions of cubic cells (N, D, K, H, W), `spacing` mm a side -> requests (N,
    E) that hold the volumes and the place of the tumour, the rest NaN. The place is the
    centre of mass of the tumour minus that of the head; NaN without a tumour."""
    tumour, head = fractions[:, :, -len(bs.LABELS):].sum(2), 1 - fractions[:, :, 0]
    # the place of every cell, (3, D, H, W)
    at = torch.stack(torch.meshgrid(*map(torch.arange, head.shape[1:]), indexing="ij")).float()

    def centre(mass):                           # (N, D, H, W) -> slice, row and column, (3, N)
        return torch.einsum("ndhw,adhw->an", mass, at) / mass.sum((1, 2, 3))

    up, back, left = (centre(tumour) - centre(head)) * spacing
    out = torch.full((len(fractions), len(entries())), torch.nan)
    out[:, -6:-3] = torch.stack([-left, -back, up], 1)
    volumes = volume_entries(condition)
    cells = fractions[:, :, -len(volumes):].sum((1, 3, 4)).double()
    out[:, volumes] = (cells * spacing ** 3 / 1000).float()
    return out


def characteristics(classes, condition, step):
    """What a request can ask for, measured on a label map: classes int tensor (D, H, W), slices as
    to_slices has them, cubic voxels of `step` mm -> float32 (E,). Parts of the tumour
    below 50 mm3 do not count as lesions [LESION]. Without a tumour place and sphericity are NaN;
    ventricles are NaN where the condition does not have them."""
    onehot = bs.one_hot(classes, len(bs.CONDITIONS[condition]))                 # (D, K, H, W)
    out = volumes_and_place(onehot[None], condition, step)[0]
    tumour = bs.tumour_labels(classes, condition) > 0
    sizes = torch.bincount(slices.components(tumour).flatten())[1:]
    out[LESIONS] = (sizes * step ** 3 >= 50).sum()
    if tumour.any():
        box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in torch.where(tumour))
        out[SPHERICITY] = sphericity(tumour[box])
    return out


def block_characteristics(fractions, condition, step):
    """The same, estimated from blocks: class fractions (N, D', K, r, r), voxels of `step` mm ->
    (N, E). Lesions are NaN: blocks do not show them. The sphericity s of the fractions is
    too high, since blocks smooth the surface; 0.8 s - 0.2 is the estimate (python
    tests/bench_labels.py shapes prints how good it is)."""
    out = volumes_and_place(fractions, condition, BLOCK * step)
    out[:, SPHERICITY] = 0.8 * sphericity(fractions[:, :, -len(bs.LABELS):].sum(2)) - 0.2
    return out


def scaled(wanted):
    """Requests or characteristics (..., E) -> about -1..1, as the networks take them:
    cube roots of volumes, v^(1/3) / 2.5 - 1 (ventricles v^(1/3) / 2 - 1.5); place / 60;
    2 sphericity - 1; log2(lesions + 1) - 1. NaN stays NaN."""
    volume, place, sphere, lesions, fluid = wanted.split((len(bs.LABELS), 3, 1, 1, 1), -1)
    return torch.cat([volume.clamp(min=0) ** (1 / 3) / 2.5 - 1, place / 60, 2 * sphere - 1,
                      torch.log2(lesions + 1) - 1, fluid.clamp(min=0) ** (1 / 3) / 2 - 1.5], -1)


def distance(measured, wanted, weight=1.0):
    """Squared distance of characteristics (..., E) from a request (E,), summed
    over its entries after `scaled` -> (...). Entries left open do not count; a wanted entry that
    was not measured, as the place without a tumour, counts 4. weight: of the entries, a number or
    (E,)."""
    off = torch.nan_to_num((scaled(measured) - scaled(wanted)) ** 2, nan=4.0)
    return (off * ~torch.isnan(wanted) * weight).sum(-1)


def centred_tumour(classes, condition):
    """Mask of the tumour, bool (D, H, W), rolled so that its centre is the middle of the volume."""
    tumour = bs.tumour_labels(classes, condition) > 0
    centre = torch.stack(torch.where(tumour)).float().mean(1).nan_to_num().round().int().tolist()
    return tumour.roll([n // 2 - at for n, at in zip(tumour.shape, centre)], (0, 1, 2))


def nearest_tumour(volumes, others, condition):
    """Dice with the most similar tumour among other label maps: classes int (N, D, R, R) and
    (M, D, R, R) -> float (N,). Tumours are laid over each other by their centres, as they are and
    mirrored; the best five also moved by up to one voxel along every axis. NaN for a head without a
    tumour, and where no other has one."""
    best = torch.full((len(volumes),), torch.nan)
    if not len(others):
        return best
    both_ways = torch.stack([others, others.flip(-1)], 1).flatten(0, 1)
    known = torch.stack([centred_tumour(other, condition) for other in both_ways])
    sizes = known.sum((1, 2, 3))                                                # (2 M,)
    for i, classes in enumerate(volumes):
        tumour = centred_tumour(classes, condition)
        if tumour.any():
            dice = 2 * known[:, tumour].sum(1) / (sizes + tumour.sum())
            close = dice.topk(min(5, len(known))).indices
            padded = F.pad(known[close].float(), (1,) * 6, mode="circular")
            overlap = F.conv3d(padded[:, None], tumour.float()[None, None])     # (5, 1, 3, 3, 3)
            best[i] = (2 * overlap.amax((1, 2, 3, 4)) / (sizes[close] + tumour.sum())).max()
    return best


# ----------------------------------------------------------------------- volumes to learn from ---

def resample(classes, n_classes, matrices):
    """Majority resampling of a class map, int array: along axis i by matrices[i], (n_out, n_in) ->
    uint8. Each class is resampled as a fraction and the largest wins. What lies outside the input
    is class 0."""
    fractions = np.stack([classes == k for k in range(n_classes)]).astype(np.float32)
    for axis, matrix in enumerate(matrices, 1):
        fractions = np.moveaxis(np.tensordot(matrix, fractions, (1, axis)), 0, axis)
    return slices.majority(fractions)


def label_volumes(cache, parts, depth):
    """The label maps of these parts of a cache: uint8 (N, depth, R, R), the middle of their cubes.
    """
    size = cache.meta["resolution"]
    first = (size - depth) // 2
    chosen = [cube[first:first + depth, -1] for cube, case in zip(cache.cubes, cache.cases)
              if case["part"] in parts]
    return torch.from_numpy(np.array(chosen, np.uint8).reshape(-1, depth, size, size))


# How heads are moved in training: degrees; scale, shift and bend (elastic) as fractions of the
# volume.
MOVES = {"rotate": 10, "scale": 0.12, "shift": 0.04, "bend": 0.03}


def move_volumes(volumes, key):
    """Relatives of label volumes: uint8 (B, D, H, W) -> the same shape. Each is mirrored or not,
    rotated, stretched, shifted and bent at random, tumour and head together (nearest neighbour). So
    a few dozen heads become several hundred. key: of generator."""
    (batch, *size), g = volumes.shape, bs.generator(*key)

    def uniform(*shape):                        # -1..1, (B, *shape)
        return torch.rand(batch, *shape, generator=g) * 2 - 1

    skew = torch.zeros(batch, 3, 3)                                             # about z, y, x
    skew[:, [2, 2, 1], [1, 0, 0]] = uniform(3) * math.radians(MOVES["rotate"])
    stretch = torch.exp(uniform(3) * MOVES["scale"])
    stretch[:, 0] *= uniform().sign()                                           # left for right
    # affine_grid counts x, y, z in half volumes
    voxels = torch.tensor(size[::-1], dtype=torch.float32)
    turn = torch.matrix_exp(skew - skew.mT) * stretch[:, None] * voxels / voxels[:, None]
    shift = 2 * MOVES["shift"] * uniform(3)[:, :, None]
    grid = F.affine_grid(torch.cat([turn, shift], 2), (batch, 1, *size), align_corners=False)
    bend = torch.randn(batch, 3, 4, 5, 5, generator=g) * 2 * MOVES["bend"]
    bend = F.interpolate(bend, size, mode="trilinear", align_corners=True).movedim(1, -1)
    moved = F.grid_sample(volumes[:, None].float(), grid + bend, "nearest", align_corners=False)
    return moved[:, 0].to(torch.uint8)


# -------------------------------------------------------------- what the networks take and give ---

def block_fractions(volumes, n_classes):
    """Fraction of every class in each block: int (B, D, R, R) -> float (B, D / BLOCK, K, R / BLOCK,
    R / BLOCK) in 0..1."""
    onehots = (bs.one_hot(volume.long(), n_classes).movedim(1, 0) for volume in volumes)
    return torch.stack([F.avg_pool3d(onehot, BLOCK).movedim(0, 1) for onehot in onehots])


def slab_fractions(fractions, index):
    """The blocks of a head as a picture that conditions the fine network on one slab: class
    fractions (N, D', K, r, r), index int (N,) in 0..D' - 1 -> (N, BLOCK * K, R, R) in 0..1, linear
    between the centres of blocks."""
    rows, last = torch.arange(len(fractions)), fractions.shape[1] - 1
    near = torch.stack([fractions[rows, (index + by).clamp(0, last)] for by in (-1, 0, 1)], 2)
    # (N, K, 3 BLOCK, R, R)
    near = F.interpolate(near, scale_factor=BLOCK, mode="trilinear", align_corners=False)
    return near[:, :, BLOCK:2 * BLOCK].movedim(1, 2).flatten(1, 2)


def head_pictures(fractions):
    """Class fractions (N, D', K, r, r) in 0..1 -> x0 of the coarse network, 2 sqrt(fraction) - 1,
    (N, D' K, r, r). The root lets a small fraction stand out from the sampler's noise, and turns
    noise around 0 into next to nothing."""
    return (2 * fractions.sqrt() - 1).flatten(1, 2)


def label_prior(x0):
    """The prior of the coarse network, see `expected`: x0 (N, D' K, r, r) from head_pictures ->
    mean and std for every class and block over the heads and their mirror images, as a dict:
    "atlas" (2, D' K, 1, r, r), "classes" (2, 1, D' K), its mean over a picture. std is at least
    0.1: a tumour may come where none was seen."""
    x = torch.cat([x0, x0.flip(-1)])
    atlas = torch.stack([x.mean(0), x.std(0).clamp(min=0.1)])
    return {"classes": atlas.mean((2, 3))[:, None], "atlas": atlas[:, :, None]}


def open_entries(count, seed, step):
    """Entries that training leaves open in `count` requests: bool (count, E). In one half
    of the requests a random number of entries, from none to all. In the other half everything but
    the volumes, and each volume with probability 1/2: people ask for one or two volumes most of the
    time. Seed and training step decide."""
    chance = torch.rand(count, 2 + len(entries()), generator=bs.generator(seed, "open", step))
    volumes_only, level, each = chance.split((1, 1, len(entries())), 1)
    return torch.where(volumes_only < 0.5, ~is_volume() | (each > 0.5), each > level)


def head_scalars(wanted):
    """Requests (B, E) -> scalars of the coarse network (B, 2 + E): two zeros, since a head has no
    slice's place, then the request."""
    return F.pad(scaled(wanted), (2, 0))


def slab_scalars(index, slabs, wanted):
    """Scalars of the fine network (B, 4): place of slab number index (B,) of `slabs`, then
    sphericity and lesions of the request (B, E), which blocks show badly or not at all."""
    return torch.cat([bs.places(slabs, 0)[index], scaled(wanted)[:, [SPHERICITY, LESIONS]]], 1)


# ------------------------------------------------------------------------------------- requests ---

def range_of(name, text):
    """An entry of a request in lower case and "12" or "5..30" -> (low, high). ValueError where it
    is no entry, no range, or below 0 and no place."""
    low, dots, high = text.partition("..")
    low, high = float(low), float(high if dots else low)
    least = -1e6 if name in ("x", "y", "z") else 0
    if name not in [entry.lower() for entry in entries()] or not least <= low <= high <= 1e6:
        raise ValueError
    return low, high


def parse_request(text):
    """"et=12,ed=5..30,x=20" -> {"ET": (12.0, 12.0), "ED": (5.0, 30.0), "x": (20.0, 20.0)}. BadInput
    names what is wrong."""
    words = filter(None, text.replace(" ", "").lower().split(","))
    ranges = edits.parse_words("--request", words, range_of, "cannot be asked for; write et=12 or "
                               f"et=20..60, of {', '.join(entries()).lower()}, each once")
    return {name: ranges[name.lower()] for name in entries() if name.lower() in ranges}


def requested(request, number, count, seed):
    """The request for case `number` of `count`: request from parse_request -> float32
    (E,), NaN where open. The values of a range are spread evenly over the cases, in an
    order of its own for every entry."""
    out = torch.full((len(entries()),), torch.nan)
    for name, (low, high) in request.items():
        order = torch.randperm(count, generator=bs.generator(seed, "request", name))
        out[entries().index(name)] = low + (high - low) * (int(order[number]) + 0.5) / count
    return out


def require_condition(condition, wanted):
    """BadInput unless label maps of `condition` can be turned into those of `wanted`."""
    if wanted not in (condition, "tumour"):
        raise bs.BadInput(f"labels lack {wanted}; retrain: --generate labels --condition {wanted}")


def prepare_labels(classes, condition, step, resolution, fov, wanted):
    """A generated label map in the form that prepare_case returns, without what is made from scans:
    classes int64 (D, R, R) of `condition`, cubic voxels of `step` mm -> cubic voxels of
    fov / resolution mm, classes of the condition `wanted`. BadInput where it asks for tissue and
    there is none."""
    require_condition(condition, wanted)
    if wanted != condition:
        classes = classes.clamp(max=1) + bs.tumour_labels(classes, condition)
    spacing = fov / resolution
    ratio = spacing / step
    matrices = []
    for have in classes.shape:
        start = (have - resolution * ratio) / 2
        matrices.append(slices.area_weights(have, resolution, start, ratio) if ratio >= 1 else
                        slices.linear_weights(resolution, have, -start / ratio, 1 / ratio))
    classes = resample(classes.numpy(), len(bs.CONDITIONS[wanted]), matrices)
    if not classes.any():
        raise bs.BadInput("generated labels show no brain; train them longer")
    labels = slices.from_slices(bs.tumour_labels(classes, wanted))
    brain = slices.from_slices(classes > 0)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = (1 - np.array(brain.shape)) / 2 * spacing
    return {"classes": classes, "hashes": slices.case_hashes(labels, brain),
            "grid": slices.Grid(brain.shape, affine, resolution, (0.0,) * 3, (1.0,) * 3)}


# ------------------------------------------------------------------------------------- sampling ---

@dataclass
class LabelGenerator:
    """Both networks of a run of train_ddpm.py --generate labels and what is known of the run."""
    coarse: bs.Denoiser
    fine: bs.Denoiser
    condition: str
    step: float                                 # mm a voxel
    measured: torch.Tensor                      # (N, E), of the heads trained on
    state: dict | None = None                   # see load_label_generator


def load_label_generator(folder, device):
    """The LabelGenerator of a run's folder, which holds "coarse" and "fine", or of a folder of
    published weights, "coarse.npz" and "fine.npz". Its state is the coarse network's checkpoint and
    "digest", a hash of both files. BadInput where one is missing, or the two come from different
    runs: other cases, condition, resolution or fov."""
    suffix = "" if Path(folder, "coarse").exists() else ".npz"
    (coarse, state), (fine, other) = [runs.load_generator(Path(folder, part), device, kind="labels")
                                      for part in ("coarse" + suffix, "fine" + suffix)]
    for name in ("trained_on", "condition", "resolution", "fov"):
        if state[name] != other[name]:
            raise bs.BadInput(f"{folder}: both networks must be of one run ({name} differs)")
    digests = files.file_hash(state["file"]) + files.file_hash(other["file"])
    state["digest"] = hashlib.sha256(digests.encode()).hexdigest()
    return LabelGenerator(coarse, fine, state["condition"], state["fov"] / state["resolution"],
                          torch.tensor(state["measured"]), state)


def fill_volumes(wanted, known, key):
    """A request (E,) with its open volumes filled by those of one training head: known
    (N, E), the characteristics of training heads. The head is drawn from the 5% of them
    that are most like the request, or from all if nothing is asked for. So the volumes of many
    generated heads are spread like those of patients; the coarse network alone makes tumours too
    small. Heads without a tumour are drawn only if nothing is asked of the tumour, or lesions=0;
    et=0 asks for a tumour without ET."""
    is_open, has_tumour = torch.isnan(wanted), known[:, :-6].sum(1) > 0
    if not is_open[:-1].all() and wanted[LESIONS] != 0 and has_tumour.any():
        known = known[has_tumour]
    count = len(known) if is_open.all() else max(1, round(0.05 * len(known)))
    lot = int(torch.randint(count, (1,), generator=bs.generator(*key, "lot")))
    head = known[distance(known, wanted).argsort(stable=True)[lot]]
    return torch.where(is_open & is_volume(), head, wanted)


def refill(fractions):
    """Class fractions (..., K, r, r) of which some were set to 0: all classes but air (class 0) are
    scaled so that the sum is 1. A block where nothing is left beside air gets class 1, brain."""
    air, rest = fractions[..., :1, :, :], fractions[..., 1:, :, :].clone()
    rest[..., 0, :, :] += 1e-30
    return torch.cat([air, rest * ((1 - air) / rest.sum(-3, keepdim=True))], -3)


def sample_blocks(model, wanted, key, settings=SETTINGS, candidates=CANDIDATES, weight=1.0):
    """One head in blocks: a LabelGenerator, of which the coarse network is used, request float
    (E,) -> class fractions (D', K, r, r), sum 1. `candidates` heads are sampled and
    cleaned, see LEAST_FRACTION; the one with the least distance to the request is kept. A class of
    which 0 mL are wanted is removed. key, settings: see sample_labels; weight: see distance."""
    blocks = model.coarse.prior["atlas"].shape[-1]
    scalars = head_scalars(wanted.expand(candidates, -1))
    nothing = torch.zeros(candidates, 0, blocks, blocks)
    x = bs.sample_guided(model.coarse, nothing, [scalars], (*key, "blocks"), settings)
    x = x.unflatten(1, (-1, len(bs.CONDITIONS[model.condition])))               # (N, D', K, r, r)
    fractions = ((x + 1) / 2).clamp(1e-6, 1) ** 2
    fractions = fractions / fractions.sum(2, keepdim=True)
    volumes = volume_entries(model.condition)
    labels = fractions[:, :, -len(volumes):]
    # the largest fraction of a block and its neighbours
    labels *= F.max_pool3d(labels.movedim(2, 1), 3, 1, 1).movedim(1, 2) >= SURE_FRACTION
    fractions = refill(fractions)
    fractions[fractions < LEAST_FRACTION] = 0
    fractions = fractions / fractions.sum(2, keepdim=True)
    measured = block_characteristics(fractions, model.condition, model.step)
    best = fractions[distance(measured, wanted, weight).argmin()]
    best[:, -len(volumes):][:, wanted[volumes] == 0] = 0
    return refill(best)


def smooth(scores, middle):
    """Scores (D, K, R, R) averaged over neighbours with weights (1, middle, 1) / (middle + 2) along
    D and both R; the border is repeated outwards."""
    kernel = torch.tensor([1.0, middle, 1.0]) / (middle + 2)
    kernel = kernel[:, None, None] * kernel[:, None] * kernel
    padded = F.pad(scores.movedim(1, 0)[:, None], (1,) * 6, mode="replicate")
    return F.conv3d(padded, kernel[None, None])[:, 0].movedim(0, 1)


def largest(score, count):
    """The `count` voxels (D, R, R) of the largest score above 0, or all above 0 if they are fewer:
    bool."""
    count = min(round(float(count)), int((score > 0).sum()))
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.view(-1)[score.flatten().topk(count).indices] = True
    return mask


def settle(scores, voxels):
    """Scores of classes become a label map of given volumes: scores float (D, K, R, R) in -1..1,
    voxels float (V,), how many of them the last V classes should get -> int64 (D, R, R).

    1. Fractions are (score + 1) / 2. They are smoothed by (1, 6, 1) / 8 along each axis, air twice
       by (1, 2, 1) / 4: single unsure voxels go and slabs meet. Stronger smoothing would make
       tumours rounder than they are. The classes but air are scaled so that the sum is 1; where
       they are all 0 the voxel is class 1, brain. Classes with 0 voxels are left out.
    2. The tumour as a whole: the lead of a voxel is the sum of its label fractions / its largest
       other fraction. The voxels of the largest lead, at least 0.1, are tumour, as many as all
       labels together should get. Of these a voxel that touches no other (of 26) is dropped.
    3. The parts of the tumour: the label with the fewest voxels takes those in which its fraction
       is largest, then the next one from the rest.
    4. Ventricles, where they are a class, are taken as in 2 from the voxels outside the tumour.
       Every other voxel is the largest class for which no number is given.
    """
    n_labels, first = len(bs.LABELS), scores.shape[1] - len(voxels)
    fractions = ((scores + 1) / 2).clamp(0, 1)
    air, rest = smooth(smooth(fractions[:, :1], 2), 2), smooth(fractions[:, 1:], 6)
    rest[:, 0] += 1e-6
    rest[:, first - 1:] *= (voxels > 0).view(-1, 1, 1)
    fractions = torch.cat([air, rest * (1 - air) / rest.sum(1, keepdim=True)], 1)
    base, classes = fractions[:, :first].max(1)
    labels, others = fractions.tensor_split([-n_labels], 1)[::-1]
    tumour = largest(labels.sum(1) / others.amax(1) - 0.1, voxels[-n_labels:].sum())
    tumour &= F.avg_pool3d(tumour.float()[None], 3, 1, 1)[0] * 27 > 1.5
    for k in range(first, first + len(voxels) - n_labels):
        ventricles = (fractions[:, k] / base - 0.1) * ~tumour
        classes[largest(ventricles, voxels[k - first])] = k
    for k in voxels[-n_labels:].argsort().tolist():
        part = largest((labels[:, k] + 1e-9) * tumour, voxels[k - n_labels])
        classes[part] = others.shape[1] + k
        tumour = tumour & ~part
    return classes


def sample_draft(model, wanted, key, settings, candidates, weight):
    """One label map from both networks: blocks, voxels, settle; see sample_labels. wanted: request
    with its volumes filled; weight: see distance."""
    fractions = sample_blocks(model, wanted, key, settings, candidates, weight)
    slabs, index = len(fractions), torch.arange(len(fractions))
    # (D', BLOCK K, R, R)
    onehot = slab_fractions(fractions.expand(slabs, *fractions.shape), index)
    scalars = slab_scalars(index, slabs, wanted.expand(slabs, -1))
    settings = {**settings, "guidance": 1.0}
    x = bs.sample_guided(model.fine, onehot, [scalars], (*key, "voxels"), settings)
    voxels = wanted[volume_entries(model.condition)].double() * 1000 / model.step ** 3
    return settle(x.unflatten(1, (BLOCK, -1)).flatten(0, 1), voxels.float())


def sample_labels(model, wanted, key, settings=SETTINGS, candidates=CANDIDATES, drafts=DRAFTS):
    """One label map on request: a LabelGenerator, request float (E,), NaN where open ->
    classes int64 (D, R, R). At most `drafts` label maps are sampled, until one is NEAR the request;
    the nearest is kept, the first one if nothing is asked for.

    key: see generator; settings: see SAMPLING, of which guidance is for the coarse network only;
    candidates: see sample_blocks. Open volumes: see fill_volumes.
    """
    asked = ~torch.isnan(wanted)
    weight = torch.where(asked, 1.0, 0.1)       # volumes that fill_volumes adds count a tenth
    found = []
    for i in range(drafts):
        draft_key = (*key, i) if i else key
        filled = fill_volumes(wanted, model.measured, draft_key)
        classes = sample_draft(model, filled, draft_key, settings, candidates, weight)
        off = float(distance(characteristics(classes, model.condition, model.step), filled, weight))
        found.append((off, i, classes))
        if not asked.any() or off < NEAR * (1 + asked.sum()):
            break
    return min(found)[2]
