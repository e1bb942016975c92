"""Heads with tumours from an integer seed, written as BraTS files and read back by the same reader
as real scans.

They model anatomy and no person: free to make, safe to publish, truth known.
"""
from pathlib import Path
from statistics import NormalDist

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

import brainsyn as bs
from kit import files, nifti


# tissue: (T1 ms, T2 ms, proton density relative to water), all at 1.5 T. Round textbook values.
TISSUES = {"CSF": (4000, 1500, 1.00), "grey": (1150, 97, 0.81), "white": (660, 78, 0.71),
           "deep": (900, 85, 0.77), "vessel": (1400, 120, 0.80),
           "NCR": (2100, 210, 0.90), "ED": (1300, 150, 0.86), "ET": (1250, 125, 0.84)}
# What gadolinium adds to the relaxation rate 1/T1, in 1/s: where the blood-brain barrier leaks.
GADOLINIUM = {"vessel": 4.5, "ET": 2.6, "NCR": 0.15, "grey": 0.06, "deep": 0.05, "white": 0.03}
# Two centres. field in T; sequence times in ms: spin echo (TR, TE) for t1 and t2, inversion
# recovery (TR, TE, TI) for flair; noise and shading (bias field) relative to the mean signal 1.
SCANNERS = {"A": {"field": 1.5, "t1": (550, 12), "t2": (4500, 95), "flair": (9000, 105, 2350),
                  "noise": 0.012, "shading": 0.05},
            "B": {"field": 3.0, "t1": (750, 9), "t2": (5500, 80), "flair": (10000, 125, 2600),
                  "noise": 0.024, "shading": 0.14}}
PHANTOM_SHAPE = (96, 96, 64)                    # voxels (X, Y, Z)
PHANTOM_SPACING = (2.0, 2.0, 2.4)               # mm
# tissue or label: strength of its texture relative to its signal, size of its grain in mm
TEXTURE = {"white": (.02, 12), "grey": (.03, 9), "NCR": (.10, 14), "ED": (.05, 16), "ET": (.09, 10)}


def voxel_mm(shape):
    """mm a voxel along (X, Y, Z) of a phantom of this shape: PHANTOM_SPACING at PHANTOM_SHAPE."""
    return [size * mm / n for size, mm, n in zip(PHANTOM_SHAPE, PHANTOM_SPACING, shape)]


def smooth_noise(rng, wavelength, shape, spacing=None):
    """A random field (X, Y, Z), float32, mean 0, std 1, whose bumps are about `wavelength` mm
    apart. spacing: mm a voxel, those of a phantom if not given.

    White noise filtered by k^2 exp(1 - k^2), k = wavelength * frequency: a band around k = 1.
    """
    spacing = voxel_mm(shape) if spacing is None else spacing
    freq = np.meshgrid(*[np.fft.fftfreq(n, s) for n, s in zip(shape[:2], spacing)],
                       np.fft.rfftfreq(shape[2], spacing[2]), indexing="ij", sparse=True)
    k2 = (wavelength ** 2 * sum(f * f for f in freq)).astype(np.float32)
    white = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    band = torch.from_numpy(k2 * np.exp(1 - k2))
    noise = torch.fft.irfftn(torch.fft.rfftn(white) * band, s=shape).numpy()
    return noise / noise.std()


def soft_inside(distance, softness=0.8):
    """Fraction of a voxel that lies inside a surface: distance in mm, positive inside -> 0..1."""
    return 1 / (1 + np.exp(np.clip(-distance / softness, -30, 30)))


def ellipsoid_level(point, centre, axes, power=2.0):
    """0 at the centre, 1 on the surface of an ellipsoid with half-axes in mm, more outside."""
    return sum(np.abs((q - c) / a) ** power for q, c, a in zip(point, centre, axes)) ** (1 / power)


def ellipsoid_depth(point, centre, axes, power=2.0):
    """Distance in mm to the surface of an ellipsoid along the ray from its centre, + inside."""
    radius = np.sqrt(sum((q - c) ** 2 for q, c in zip(point, centre)))
    return radius * (1 / np.maximum(ellipsoid_level(point, centre, axes, power), 1e-3) - 1)


def phantom_folds(rng, point, hull):
    """Distance in mm of every voxel to the nearest sulcus wall of the cerebrum, (X, Y, Z) >= 0.

    Sulci are the zero sheets of a noise field that hardly changes along the line from the surface
    to the middle of the hemisphere, so that they run inwards as real folds do, and end at a
    varying depth. point: x, y, z in mm; hull: depth below the surface in mm.
    """
    x, y, z = point
    inward = [np.abs(x) - 24, y + 2, z - 4]     # from the middle of each hemisphere
    stretch = (58 / (np.sqrt(sum(a * a for a in inward)) + 1e-3)) ** 0.75
    # read at the signed x: left and right folds differ, as they do in people
    where = [np.sign(x) * (inward[0] * stretch + 24), inward[1] * stretch, inward[2] * stretch]
    half = [n * s / 2 for n, s in zip(PHANTOM_SHAPE, PHANTOM_SPACING)]
    where = np.stack([w / h for w, h in zip(where, half)][::-1], -1).astype(np.float32)
    field = torch.from_numpy(smooth_noise(rng, 37, hull.shape))[None, None]
    fold = F.grid_sample(field, torch.from_numpy(where)[None], align_corners=False,
                         padding_mode="reflection")[0, 0].numpy()
    slope = np.sqrt(sum(g * g for g in np.gradient(fold, *voxel_mm(hull.shape)))) + 0.02
    sheet = np.minimum(np.abs(fold) / slope, 20)            # first-order distance to fold = 0
    reach = 11 + 3.5 * smooth_noise(rng, 45, hull.shape)
    return np.hypot(sheet, np.maximum(hull - reach, 0))


def phantom_anatomy(rng, point):
    """A healthy brain: warped ellipsoids, folded cortex, deep nuclei, ventricles, CSF.

    point: x (left to right), y (back to front), z (foot to head) in mm, each (X, Y, Z), 0 near
    the middle. Returns {tissue: fraction of the voxel in 0..1}; depth below the brain surface in mm
    (+ inside); distance from the midline in mm (+ right), which bends with everything else;
    which voxels are ventricle or midline fissure, where no tumour grows; and the fraction of
    ventricles.
    """
    shape = point[0].shape
    size = rng.uniform(0.93, 1.02, 3)                       # heads differ in size ...
    wide = 0.8 + 0.7 * rng.uniform()                        # ... and, with age, in CSF spaces
    x, y, z = [(q + 2.5 * smooth_noise(rng, 70, shape) + 0.5 * smooth_noise(rng, 30, shape)) / s
               for q, s in zip(point, size)]
    x = x * (1 + 0.0012 * (y + 10))                         # narrower in front
    half = (np.abs(x), y, z)                                # both hemispheres at once
    # --- the hull: cerebrum (flat below), temporal lobes, cerebellum, brain stem
    cerebrum = np.where(z > 2, ellipsoid_depth(half, (0, 0, 2), (70, 87, 66), 2.12),
                        ellipsoid_depth(half, (0, 0, 2), (68, 85, 30), 2.2))
    cerebrum = np.maximum(cerebrum, ellipsoid_depth(half, (40, 4, -22), (24, 44, 27), 2.2))
    cerebellum = ellipsoid_depth(half, (22, -46, -40), (30, 30, 24))
    stem = np.minimum(13 - np.hypot(x, y + 16 - 0.25 * (z + 30)), np.minimum(-5 - z, z + 68))
    hull = np.maximum(np.maximum(cerebrum, cerebellum), stem)
    # --- the pial surface: outside, sulci, the fissure between the hemispheres, cerebellar folia
    fissure = np.hypot(x, np.maximum(cerebrum - 36 - 0.1 * np.abs(y), 0))
    pial = np.minimum(np.minimum(cerebrum, phantom_folds(rng, (x, y, z), cerebrum)), fissure)
    folia = np.abs(((z + 40) * 0.9 + 0.35 * (y + 45) + 2 * smooth_noise(rng, 30, shape)) % 7 - 3.5)
    folia = np.minimum(cerebellum, folia + 0.3 * np.maximum(cerebellum - 8, 0))
    pial = np.where(cerebellum > np.maximum(cerebrum, 0), folia, pial)
    pial = np.where(stem > np.maximum(cerebrum, cerebellum), stem + 3, pial)

    def blobs(*centres_and_axes):                           # distance in mm, + inside any of them
        return np.maximum.reduce([(1 - ellipsoid_level(half, centre, axes)) * min(axes)
                                  for centre, axes in centres_and_axes])

    ventricle = blobs(((9 + 3 * wide, -2, 20), (6.5 * wide, 34, 8 * wide)),     # lateral: body,
                      ((17, -34, 8), (7 * wide, 16, 9 * wide)),                 # hind horn,
                      ((11, 26, 12), (5 * wide, 12, 9 * wide)),                 # front horn,
                      ((31, -12, -16), (4 * wide, 18, 4 * wide)),               # temporal horn
                      ((0, -6, 0), (2.2 * wide, 14, 12)), ((0, -32, -36), (6, 6, 8)))  # 3rd, 4th
    nuclei = blobs(((13, -12, 4), (10, 15, 9)), ((27, 4, 0), (7, 18, 10)),
                   ((15, 18, 10), (5, 11, 8)))
    wall = pial - 0.2 - 0.45 * wide                         # CSF is wider in older heads
    sinus = soft_inside(2.2 - np.hypot(x, 0.8 * np.minimum(hull - 2.5, 12)), 0.6)
    parts = {"vessel": sinus * (z > -25) * ((y < 20) | (z > 30)),           # the sagittal sinus
             "CSF": np.maximum(soft_inside(-wall), soft_inside(ventricle)),
             "grey": soft_inside(3.6 - wall), "deep": soft_inside(nuclei), "white": 1.0}
    fractions, left = {}, 1
    for tissue, part in parts.items():                      # each takes its part of what is left
        fractions[tissue] = part * left
        left = left - fractions[tissue]
    return fractions, hull, x, (ventricle > -1) | (fissure < 1.5), soft_inside(ventricle)


def phantom_plan(rng, seed):
    """What tumour to grow: mL of (NCR, ED, ET) and the centres of its foci in mm.

    Log-normal volumes near those of 368 expert label maps of BraTS 2020, whose medians are 10.5,
    49.5 and 14.8 mL. ET runs evenly through its distribution as the seed counts up (golden-ratio
    steps), so that a few dozen consecutive seeds already span 1 to 40 mL. One in ten has no ET (low
    grade), one in ten no NCR, one in fifteen no tumour at all.
    """
    u = (seed * 0.6180339887 + 0.3) % 1
    et = float(np.clip(20 * np.exp(1.45 * NormalDist().inv_cdf(u)), 0.8, 58))
    ncr = float(np.clip(rng.lognormal(np.log(10), 0.9), 0.5, 90))
    ed = float(np.clip(rng.lognormal(np.log(50), 0.6), 6, 150))
    grade = rng.choice(["full", "no ET", "no NCR", "none"], p=[0.73, 0.1, 0.1, 0.07])
    ncr, ed, et = {"full": (ncr, ed, et), "no ET": (ncr + et, ed, 0), "no NCR": (0, ed, et),
                   "none": (0, 0, 0)}[str(grade)]
    centre = [rng.choice([-1, 1]), 1, 1] * rng.uniform((24, -52, -8), (44, 46, 42))
    more = [centre + rng.normal(0, (9, 14, 11)) for _ in range(rng.choice(3, p=[0.72, 0.2, 0.08]))]
    return (ncr, ed, et), [centre, *more]


def phantom_tumour(rng, point, volumes, foci, white, allowed):
    """Label map (X, Y, Z) uint8 with exactly the asked mL of NCR, ED and ET.

    The core fills the nearest voxels to the foci, in a noise-warped distance; its most central
    part is NCR, the rim ET; oedema fills what is nearest around it, white matter first.
    """
    shape = allowed.shape
    voxel_ml = float(np.prod(voxel_mm(shape))) / 1000
    n_ncr, n_ed, n_et = [int(round(v / voxel_ml)) for v in volumes]
    distance = np.min([np.sqrt(sum((q - c) ** 2 for q, c in zip(point, focus))) + 7 * (k > 0)
                       for k, focus in enumerate(foci)], axis=0)
    lobed = np.exp(0.24 * smooth_noise(rng, 42, shape) + 0.05 * smooth_noise(rng, 15, shape))
    reach = np.where(allowed, (distance + 3) * lobed, np.inf).ravel()
    core = np.argpartition(reach, n_ncr + n_et)[:n_ncr + n_et]
    depth = reach[core] * np.exp(0.14 * smooth_noise(rng, 22, shape).ravel()[core])
    core = core[np.argsort(depth)]
    labels = np.zeros(shape, np.uint8)
    labels.reshape(-1)[core[:n_ncr]] = 1
    labels.reshape(-1)[core[n_ncr:]] = 3
    swelling = distance * np.exp(0.2 * smooth_noise(rng, 45, shape)) + 22 * (1 - white)
    swelling = np.where(allowed & (labels == 0), swelling, np.inf).ravel()
    labels.reshape(-1)[np.argpartition(swelling, n_ed)[:n_ed]] = 2
    return labels


def mr_signal(modality, times, t1, t2, density, leak=0.0):
    """MR signal of one tissue, relative to fully relaxed water. Times in ms, leak in 1/s.

    spin echo (t1, t1ce, t2):      PD (1 - exp(-TR/T1)) exp(-TE/T2)
    inversion recovery (flair):    PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2)
    Gadolinium (t1ce only) shortens T1: 1/T1 grows by `leak`.
    """
    if modality == "t1ce":
        t1 = 1000 / (1000 / t1 + leak)
    recovery = 1 - np.exp(-times[0] / t1)
    if modality == "flair":
        recovery = abs(1 - 2 * np.exp(-times[2] / t1) + np.exp(-times[0] / t1))
    return density * recovery * np.exp(-times[1] / t2)


def phantom_scans(rng, fractions, brain, scanner):
    """What a scanner, a value of SCANNERS, makes of {tissue or label: fraction (X, Y, Z)}: images
    float32 (4, X, Y, Z) >= 0 in arbitrary units, 0 outside the brain, bool (X, Y, Z)."""
    texture = {name: 1 + strength * smooth_noise(rng, grain, brain.shape)
               for name, (strength, grain) in TEXTURE.items()}
    longer = (scanner["field"] / 1.5) ** 0.33               # T1 grows with the field
    images = []
    for modality in bs.BRATS[0]:
        times = [t * rng.uniform(0.94, 1.06) for t in scanner[modality.removesuffix("ce")]]
        image = 0
        for name, fraction in fractions.items():
            t1, t2, density = TISSUES[name]
            signal = mr_signal(modality, times, t1 * longer, t2, density, GADOLINIUM.get(name, 0))
            image = image + fraction * texture.get(name, 1) * signal
        shading = scanner["shading"] * rng.uniform(0.5, 1.5) * smooth_noise(rng, 160, brain.shape)
        image = image / image[brain].mean() * (1 + shading)
        noise = scanner["noise"] * rng.uniform(0.7, 1.3) * rng.standard_normal((2, *brain.shape))
        images.append(np.hypot(image + noise[0], noise[1]) * brain)     # Rician: a magnitude
    return np.stack(images).astype(np.float32)


def phantom(seed, scanner="A", scale=1):
    """One head. seed: any integer >= 0, everything follows from it; scanner: a key of SCANNERS;
    scale: voxels are this many times as wide, for a head that is made fast and looks coarse.

    Returns images float32 (4, X, Y, Z) >= 0 in arbitrary units, 0 outside the brain (as after
    skull stripping); labels uint8 (X, Y, Z) in 0..3; and the fractions of tissue (a dict of
    (X, Y, Z) in 0..1; "ventricles" are a part of "CSF"). Axes are canonical (RAS+: x to the right,
    y to the front, z up).
    """
    rng = np.random.default_rng(seed)
    shape = [n // scale for n in PHANTOM_SHAPE]
    axes = [((np.arange(n) - (n - 1) / 2) * mm).astype(np.float32)
            for n, mm in zip(shape, voxel_mm(shape))]
    point = np.meshgrid(*axes, indexing="ij")
    volumes, foci = phantom_plan(rng, seed)
    # mass effect: tissue is pushed away from the tumour, so anatomy is looked up nearer to it
    radius = (3000 * (volumes[0] + volumes[2] + volumes[1] / 4) / (4 * np.pi)) ** (1 / 3)
    distance = np.sqrt(sum((q - c) ** 2 for q, c in zip(point, foci[0])))
    push = 0.2 * radius * np.exp(-(distance / (1.5 * radius + 15)) ** 2) / (distance + radius + 1)
    pushed = [q - (q - c) * push - up for q, c, up in zip(point, foci[0], (0, 0, 2))]
    fractions, hull, midline, barrier, ventricles = phantom_anatomy(rng, pushed)
    labels = np.zeros(shape, np.uint8)
    if sum(volumes):
        # a tumour crosses the midline only now and then (through the corpus callosum)
        side = (midline * foci[0][0] > 0) | (rng.uniform() < 0.15)
        allowed = (hull > 2) & ~barrier & side
        labels = phantom_tumour(rng, point, volumes, foci, fractions["white"], allowed)
    # partial volume between tumour and tissue: labels blurred by about half a voxel
    lesions = {name: blur3(labels == k) for k, name in enumerate(bs.BRATS[1], 1)}
    healthy = 1 - sum(lesions.values())
    fractions = {name: part * healthy for name, part in fractions.items()} | lesions
    images = phantom_scans(rng, fractions, hull > 0, SCANNERS[scanner])
    return images, labels, fractions | {"ventricles": np.minimum(ventricles, fractions["CSF"])}


def blur3(volume):
    """A volume smoothed by (0.2, 0.6, 0.2) along each axis, float32."""
    volume = volume.astype(np.float32)
    for axis in range(3):
        volume = 0.6 * volume + 0.2 * (np.roll(volume, 1, axis) + np.roll(volume, -1, axis))
    return volume


def write_phantom(folder, seed, scanner="A", scale=1):
    """Write phantom `seed` as one BraTS case below `folder` and return the case's folder.

    On purpose as varied as the wild: even seeds have the 2023 names and ET = 3, odd seeds the old
    names and ET = 4; every second pair has an LPS header instead of RAS. Scans are int16 with a
    gain of their own, as scanners give them. The folder appears at once, whole.
    """
    images, labels, _ = phantom(seed, scanner, scale)
    modern = seed % 2 == 0
    case = f"BraTS-PHA-{seed:05d}-000" if modern else f"BraTS20_Phantom_{seed:05d}"
    gains = np.random.default_rng([seed, 1]).uniform(300, 1500, len(bs.BRATS[0]))
    volumes = {"seg": np.where(labels == 3, 3 if modern else 4, labels).astype(np.uint8)}
    for modality, image, gain in zip(bs.BRATS[0], images, gains):
        counts = np.where(image > 0, np.clip(np.rint(image * gain), 1, 32767), 0)
        volumes[nifti.NAMES_2023[modality] if modern else modality] = counts.astype(np.int16)
    spacing = voxel_mm(labels.shape)
    affine = nib.affines.from_matvec(np.diag(spacing), -(np.array(labels.shape) - 1) / 2 * spacing)

    def write(building):
        building.mkdir()
        for name, volume in volumes.items():
            image = nib.Nifti1Image(volume, affine)
            if seed % 4 >= 2:                               # same voxels in mm, other storage order
                image = image.as_reoriented([[0, -1], [1, -1], [2, 1]])
            image.header["descrip"] = f"brainsyn phantom {seed} scanner {scanner}".encode()
            nib.save(image, building / f"{case}{'-' if modern else '_'}{name}.nii.gz")

    files.replace_file(Path(folder) / case, write)
    return Path(folder) / case


def phantom_seed(name):
    """The seed in the name of a phantom case, None for any other name."""
    match = nifti.PHANTOM.fullmatch(name)
    return int(match[2]) if match else None


def make_phantoms(folder, count, scanner="A", scale=1):
    """Make phantoms 0 .. count - 1 below `folder`; those already there are kept. scale: see
    phantom.

    Returns the number of cases newly made. About a second a case.
    """
    files.remove_litter(folder)
    there = {phantom_seed(path.name) for path in Path(folder).glob("BraTS*")}
    seeds = [seed for seed in range(count) if seed not in there]
    nifti.in_threads(lambda seed: write_phantom(folder, seed, scanner, scale), seeds)
    return len(seeds)
