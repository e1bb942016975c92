"""Label maps on request, without a patient: the same network, noise and sampler as for scans.

A voxel of a label map is a picture element with a channel for each class, 1 where it is that class
and -1 elsewhere. A network learns slices of such volumes along three axes, is told the request
(volumes, place, sphericity, number of lesions) as scalars, and draws volumes as bs.sample_guided
does: one plane a step, in turn.

    request -> fill_volumes    volumes that the request leaves open come from a training head
            -> sample_draft    scores of all voxels; settle turns them into labels of that volume
            -> sample_labels   up to DRAFTS such label maps; the closest to the request is kept

A request is a float tensor (E,), one number for each of entries(), NaN where it is left open.

SOURCES
    [LESION]  parts that count as lesions: Saluja et al. 2023,
              github.com/rachitsaluja/BraTS-2023-Metrics
              BraTS 2023 Metrics
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import edits, files, runs, slices


SPHERICITY, LESIONS = -3, -2            # their places in a request, see entries
# At most this many label maps are sampled for one that is kept. Sampling ends at a distance below
# NEAR per entry asked for, plus NEAR: about 10 or 14 mL for 12, 4 mm of place, no lesion too many.
DRAFTS, NEAR = 4, 0.002


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


def characteristics(classes, condition, step):
    """What a request can ask for, measured on a label map: classes int tensor (D, H, W), slices as
    to_slices has them, cubic voxels of `step` mm -> float32 (E,). The place is the centre of mass
    of the tumour minus that of the head. Parts of the tumour below 50 mm3 do not count as lesions
    [LESION]. Without a tumour place and sphericity are NaN; ventricles are NaN where the condition
    does not have them."""
    out = torch.full((len(entries()),), torch.nan)
    volumes = volume_entries(condition)
    counts = torch.bincount(classes.flatten(), minlength=len(bs.CONDITIONS[condition]))
    out[volumes] = (counts[-len(volumes):].double() * step ** 3 / 1000).float()
    tumour = bs.tumour_labels(classes, condition) > 0
    sizes = torch.bincount(slices.components(tumour).flatten())[1:]
    out[LESIONS] = (sizes * step ** 3 >= 50).sum()
    if tumour.any():
        up, back, left = [(at.double().mean() - head.double().mean()) * step
                          for at, head in zip(torch.where(tumour), torch.where(classes > 0))]
        out[SPHERICITY - 3:SPHERICITY] = torch.stack([-left, -back, up])
        box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in torch.where(tumour))
        out[SPHERICITY] = sphericity(tumour[box])
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
    uint8. Each class is resampled as a fraction and
    the largest wins. What lies outside the input is class 0."""
    fractions = np.stack([classes == k for k in range(n_classes)]).astype(np.float32)
    for axis, matrix in enumerate(matrices, 1):
        fractions = np.moveaxis(np.tensordot(matrix, fractions, (1, axis)), 0, axis)
    return slices.majority(fractions)


def label_volumes(cache, parts):
    """The label maps of these parts of a cache: uint8 (N, R, R, R)."""
    size = cache.meta["resolution"]
    chosen = [cube[:, -1] for cube, case in zip(cache.cubes, cache.cases) if case["part"] in parts]
    return torch.from_numpy(np.array(chosen, np.uint8).reshape(-1, size, size, size))


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


# ------------------------------------------------------------ what the network takes and gives ---

def label_prior(heads, n_classes):
    """What is known of label maps before any training, see bs.expected: heads uint8 (N, R, R, R) ->
    mean and std of every class at every place, over the heads and their mirror images, as a dict:
    "atlas" (2, K, N, N, N), N = R / 2 rounded up, "classes" (2, 1, K), their means. A voxel that is
    +1 with probability p and else -1 has mean 2 p - 1 and variance 1 - mean^2; std is at least 0.1:
    a tumour may come where none was seen."""
    size = (heads.shape[1] + 1) // 2
    share = sum(F.adaptive_avg_pool3d(bs.one_hot(head.long(), n_classes).movedim(1, 0), size)
                for head in heads)
    mean = (share + share.flip(-1)) / len(heads) - 1
    atlas = torch.stack([mean, (1 - mean ** 2).clamp(min=0.01).sqrt()])
    return {"classes": atlas.mean((2, 3, 4))[:, None], "atlas": atlas}


def open_entries(count, seed, step):
    """Entries that training leaves open in `count` requests: bool (count, E). In one half
    of the requests a random number of entries, from none to all. In the other half everything but
    the volumes, and each volume with probability 1/2: people ask for one or two volumes most of the
    time. Seed and training step decide."""
    chance = torch.rand(count, 2 + len(entries()), generator=bs.generator(seed, "open", step))
    volumes_only, level, each = chance.split((1, 1, len(entries())), 1)
    return torch.where(volumes_only < 0.5, ~is_volume() | (each > 0.5), each > level)


def label_scalars(place, wanted):
    """Places of slices (B, 2) and requests (B, E) -> scalars of the network (B, 2 + E)."""
    return torch.cat([place, scaled(wanted).expand(len(place), -1)], 1)


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
    """The network of a run of train_ddpm.py --generate labels and what is known of the run."""
    denoiser: bs.Denoiser
    condition: str
    step: float                                 # mm a voxel
    resolution: int                             # voxels a side
    measured: torch.Tensor                      # (N, E), of the heads trained on
    state: dict | None = None                   # the checkpoint, and "digest", its hash


def load_label_generator(folder, device):
    """The LabelGenerator of a run's folder, or of a file of published weights."""
    denoiser, state = runs.load_generator(folder, device, kind="labels")
    state["digest"] = files.file_hash(state["file"])
    return LabelGenerator(denoiser, state["condition"], state["fov"] / state["resolution"],
                          state["resolution"], torch.tensor(state["measured"]), state)


def fill_volumes(wanted, known, key):
    """A request (E,) with its open volumes filled by those of one training head: known
    (N, E), the characteristics of training heads. The head is drawn from the 5% of them
    that are most like the request, or from all if nothing is asked for. So the volumes of many
    generated heads are spread like those of patients; the network alone makes tumours too small.
    Heads without a tumour are drawn only if nothing is asked of the tumour, or lesions=0; et=0 asks
    for a tumour without ET."""
    is_open, has_tumour = torch.isnan(wanted), known[:, :-6].sum(1) > 0
    if not is_open[:-1].all() and wanted[LESIONS] != 0 and has_tumour.any():
        known = known[has_tumour]
    count = len(known) if is_open.all() else max(1, round(0.05 * len(known)))
    lot = int(torch.randint(count, (1,), generator=bs.generator(*key, "lot")))
    head = known[distance(known, wanted).argsort(stable=True)[lot]]
    return torch.where(is_open & is_volume(), head, wanted)


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
       by (1, 2, 1) / 4: single unsure voxels go. Stronger smoothing would make
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


def sample_draft(model, wanted, key, settings):
    """One label map: scores from the network, settled; see sample_labels. wanted: request with its
    volumes filled."""
    size = model.resolution
    scalars = [label_scalars(bs.places(size, plane), wanted) for plane in range(3)]
    nothing = torch.zeros(size, 0, size, size)
    x = bs.sample_guided(model.denoiser, nothing, scalars, (*key, "labels"), settings)
    voxels = wanted[volume_entries(model.condition)].double() * 1000 / model.step ** 3
    return settle(x, voxels.float())


def sample_labels(model, wanted, key, settings=bs.SAMPLING, drafts=DRAFTS):
    """One label map on request: a LabelGenerator, request float (E,), NaN where open ->
    classes int64 (D, R, R). At most `drafts` label maps are sampled, until one is NEAR the request;
    the nearest is kept, the first one if nothing is asked for.

    key: see generator; settings: see SAMPLING. Open volumes: see fill_volumes.
    """
    asked = ~torch.isnan(wanted)
    weight = torch.where(asked, 1.0, 0.1)       # volumes that fill_volumes adds count a tenth
    found = []
    for i in range(drafts):
        draft_key = (*key, i) if i else key
        filled = fill_volumes(wanted, model.measured, draft_key)
        classes = sample_draft(model, filled, draft_key, settings)
        off = float(distance(characteristics(classes, model.condition, model.step), filled, weight))
        found.append((off, i, classes))
        if not asked.any() or off < NEAR * (1 + asked.sum()):
            break
    return min(found)[2]
