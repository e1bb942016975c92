r"""brainsyn: brain MRI to tumour labels and label maps to four-modality MRI, both from scratch.

This one file is the library. It reads top to bottom; each section uses only what stands above it:

     1 conventions     modalities, labels, conditions, small helpers
     2 phantoms        heads with tumours from an integer seed: the data you have when you have none
     3 reading         folders of BraTS cases -> slices in a memory-mapped cache, split by patient
     4 noise process   alpha_bar, add_noise, v_target, split_v, loss weights: pure functions
     5 networks        residual blocks, attention, the U-Net
     6 devices         the only place that names cpu, cuda, mps, xla; several of them
     7 sampling        DDPM, DDIM, DPM-Solver++(2M) as four numbers a step; guidance; noise along z
     8 segmenter       ResNet encoder with torchvision's parameter names, U-Net decoder
     9 segmentation    regions, losses, augmentation; Dice, HD95 and lesion-wise Dice per case
    10 training        batches from (seed, step), Muon, EMA, checkpoints, log
    11 editing         new label maps from old ones: moved, bent, pasted, balanced
    12 on request      label maps from no patient, with volumes and a place that are asked for
    13 writing         synthetic cases as NIfTI with a sidecar; pictures
    14 judging         figures that say whether a sample obeys its mask and looks like a scan
    15 audit           whether synthetic cases are copies of training cases

    python brainsyn.py       draws a phantom and its noise ladder, prints the layer-shape table (10 s)
    python brainsyn.py DIR   checks a folder of cases: what is rejected, what is doubtful, what is put right
    python brainsyn.py --publish runs/ddpm weights.npz       writes weights without pickle, prints their sha256

GLOSSARY (the same names everywhere)
    x0          clean images (B, C, H, W) in [-1, 1]; air is exactly -1
    eps         standard normal noise, same shape as x0
    t           integer noise level (B,), 0 = clean .. T = pure noise
    alpha_bar   share of signal power that is left at t, (T+1,);  signal = sqrt(alpha_bar)
    sigma       sqrt(1 - alpha_bar);   snr = alpha_bar / (1 - alpha_bar)
    x_t         signal * x0 + sigma * eps
    v           signal * eps - sigma * x0, what the network predicts; a prediction ends in _hat
    classes     label map (B, H, W) of integers, see CONDITIONS; onehot is the same as (B, K, H, W)
    regions     WT, TC, ET: unions of labels, see REGIONS; NCR, ED, ET are labels
    position    where along z a slice lies, -1 = lowest .. 1 = highest slice with brain
    axes        B batch, C modality, D slice (foot to head), H row (front to back), W column
                (the patient's right is on the left, as radiologists look at it)

SOURCES (the key in brackets is how comments below refer to them)
    [DDPM]    ancestral sampling: Ho et al. 2020, arXiv 2006.11239
              Denoising Diffusion Probabilistic Models
    [DDIM]    deterministic sampling, eta: Song et al. 2020, arXiv 2010.02502
              Denoising Diffusion Implicit Models
    [DPM++]   DPM-Solver++(2M): Lu et al. 2022, arXiv 2211.01095
              DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models
    [VPRED]   v-prediction: Salimans & Ho 2022, arXiv 2202.00512
              Progressive Distillation for Fast Sampling of Diffusion Models
    [ZSNR]    zero terminal SNR, guidance rescale: Lin et al. 2023, arXiv 2305.08891
              Common Diffusion Noise Schedules and Sample Steps are Flawed
    [SHIFT]   noise schedule shifted with resolution: Hoogeboom et al. 2023, arXiv 2301.11093
              simple diffusion: End-to-end diffusion for high resolution images
    [MINSNR]  min-SNR loss weight: Hang et al. 2023, arXiv 2303.09556
              Efficient Diffusion Training via Min-SNR Weighting Strategy
    [CFG]     classifier-free guidance: Ho & Salimans 2022, arXiv 2207.12598
              Classifier-Free Diffusion Guidance
    [RANGE]   guidance in a limited interval: Kynkaanniemi et al. 2024, arXiv 2404.07724
              Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models
    [ADM]     scale-shift norm in residual blocks: Dhariwal & Nichol 2021, arXiv 2105.05233
              Diffusion Models Beat GANs on Image Synthesis
    [UNET]    down, up and copies across: Ronneberger et al. 2015, arXiv 1505.04597
              U-Net: Convolutional Networks for Biomedical Image Segmentation
    [GN]      group normalisation: Wu & He 2018, arXiv 1803.08494
              Group Normalization
    [EDM]     preconditioning, loss in its units: Karras et al. 2022, arXiv 2206.00364
              Elucidating the Design Space of Diffusion-Based Generative Models
    [ADAMW]   Adam with weight decay of its own: Loshchilov & Hutter 2017, arXiv 1711.05101
              Decoupled Weight Decay Regularization
    [MUON]    orthogonalised momentum: Jordan et al. 2024, kellerjordan.github.io/posts/muon
              Muon: An optimizer for hidden layers in neural networks
    [BRATS]   labels, regions, file naming: Baid et al. 2021, arXiv 2107.02314
              The RSNA-ASNR-MICCAI BraTS 2021 Benchmark on Brain Tumor Segmentation and Radiogenomic Classification
    [GSPMD]   one program for several chips: Xu et al. 2021, arXiv 2105.04663
              GSPMD: General and Scalable Parallelization for ML Computation Graphs
    [BN]      batch normalisation: Ioffe & Szegedy 2015, arXiv 1502.03167
              Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift
    [RESNET]  residual networks: He et al. 2015, arXiv 1512.03385
              Deep Residual Learning for Image Recognition
    [VNET]    Dice as a loss: Milletari et al. 2016, arXiv 1606.04797
              V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation
    [LESION]  lesion-wise Dice: Saluja et al. 2023, github.com/rachitsaluja/BraTS-2023-Metrics
              BraTS 2023 Metrics
    [FID]     Frechet distance of features: Heusel et al. 2017, arXiv 1706.08500
              GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium
    [SWD]     sliced Wasserstein distance of patches: Karras et al. 2017, arXiv 1710.10196
              Progressive Growing of GANs for Improved Quality, Stability, and Variation
    [KID]     kernel distance of features: Binkowski et al. 2018, arXiv 1801.01401
              Demystifying MMD GANs
    [PRDC]    precision, recall, density, coverage: Naeem et al. 2020, arXiv 2002.09797
              Reliable Fidelity and Diversity Metrics for Generative Models
    [MSSSIM]  multi-scale structural similarity: Wang et al. 2003, Asilomar conference
              Multiscale structural similarity for image quality assessment
"""
from __future__ import annotations

import argparse
import copy
import csv
import gc
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import NormalDist

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

try:
    import fcntl                                # file locks; not on Windows
except ImportError:
    fcntl = None

__version__ = "0.1.0"

# ================================================================================================
# 1  CONVENTIONS
# What is called what, once; labels and file names are those of [BRATS]. Everything takes its names from here.
# ================================================================================================

MODALITIES = ("t1", "t1ce", "t2", "flair")      # BraTS names up to 2021, the order of axis C
NAMES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}      # names since BraTS 2023
LABELS = ("NCR", "ED", "ET")                    # values 1, 2, 3: necrotic core, oedema, enhancing
# What a network is conditioned on: every voxel belongs to exactly one class. "brain" is healthy
# brain; the brain outline comes free with skull-stripped data and fixes head shape and place.
CONDITIONS = {
    "tumour": ("air", "brain", *LABELS),
    "tissue": ("air", "CSF", "grey", "white", *LABELS),
    "ventricles": ("air", "brain", "ventricles", *LABELS),
}


class BadInput(Exception):
    """What the user gave cannot be used. The message is one sentence: which file, what is wrong,
    what to do. Scripts print it and exit with status 2."""


def run_script(main):
    """Call main(), then say what XLA did, if it was used; print a BadInput, or what the disk refused, as one
    sentence and leave with status 2."""
    try:
        main()
        report = xla_report()
        if report:
            print(report)
    except KeyboardInterrupt:
        sys.exit(130)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def require_positive(args, *names):
    """BadInput unless each of these arguments is above 0 (or None, where it was left out), the seed at
    least 0, and shares lie in 0..1."""
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed}: must not be negative")
    for name in ("tumour_share", "synthetic_share", "drop"):
        if not 0 <= getattr(args, name, 0) <= 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: goes from 0 to 1")
    for name in names:
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")


def replace_file(path, write):
    """Write a file so that it is either the old one or the whole new one, whatever happens.

    path: where it shall be; write: function of a temporary path in the same folder.
    A crash leaves at most a file ending in .tmp behind, never half a file under the real name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Make sure that names given in a folder survive a power cut."""
    if hasattr(os, "O_DIRECTORY"):              # not on Windows, which syncs folders by itself
        handle = os.open(folder, os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def file_hash(path):
    """sha256 (hex) of a file; of the word itself where it is "imagenet"."""
    return hashlib.sha256(b"imagenet" if path == "imagenet" else Path(path).read_bytes()).hexdigest()


def case_hashes(labels, brain):
    """sha256 (hex) of a label map, uint8 (X, Y, Z) in canonical axes, values 0..3, and of a brain's
    outline, bool (X, Y, Z); shapes included.

    It is how a synthetic case says where its labels and outline came from without naming a patient, and
    how a checkpoint says which ones it was trained on. Maps without any tumour all look alike: there the
    outline's hash stands for both. Only the same files give the same hashes: a patient resampled to
    another grid, or scanned a second time, is not recognised.
    """
    labels, brain = [np.ascontiguousarray(volume, dtype=np.uint8) for volume in (labels, brain)]
    of_labels, of_brain = [hashlib.sha256(repr(volume.shape).encode() + volume.tobytes()).hexdigest()
                           for volume in (labels, brain)]
    return (of_labels if labels.any() else of_brain), of_brain


# ================================================================================================
# 2  PHANTOMS
# Heads with tumours from an integer seed, written as BraTS files and read back by the same reader
# as real scans. They model anatomy and no person: free to make, safe to publish, truth known.
# ================================================================================================

# tissue: (T1 ms, T2 ms, proton density relative to water), all at 1.5 T. Round textbook values.
TISSUES = {
    "CSF": (4000, 1500, 1.00), "grey": (1150, 97, 0.81), "white": (660, 78, 0.71),
    "deep": (900, 85, 0.77), "vessel": (1400, 120, 0.80),
    "NCR": (2100, 210, 0.90), "ED": (1300, 150, 0.86), "ET": (1250, 125, 0.84),
}
# What gadolinium adds to the relaxation rate 1/T1, in 1/s: where the blood-brain barrier leaks.
GADOLINIUM = {"vessel": 4.5, "ET": 2.6, "NCR": 0.15, "grey": 0.06, "deep": 0.05, "white": 0.03}
# Two centres. field in T; sequence times in ms: spin echo (TR, TE) for t1 and t2, inversion
# recovery (TR, TE, TI) for flair; noise and shading (bias field) relative to the mean signal 1.
SCANNERS = {
    "A": {"field": 1.5, "t1": (550, 12), "t2": (4500, 95), "flair": (9000, 105, 2350),
          "noise": 0.012, "shading": 0.05},
    "B": {"field": 3.0, "t1": (750, 9), "t2": (5500, 80), "flair": (10000, 125, 2600),
          "noise": 0.024, "shading": 0.14},
}
PHANTOM_SHAPE = (96, 96, 64)                    # voxels (X, Y, Z)
PHANTOM_SPACING = (2.0, 2.0, 2.4)               # mm
# tissue or label: strength of its texture relative to its signal, size of its grain in mm
TEXTURE = {"white": (.02, 12), "grey": (.03, 9), "NCR": (.10, 14), "ED": (.05, 16), "ET": (.09, 10)}


def smooth_noise(rng, wavelength, shape=PHANTOM_SHAPE, spacing=PHANTOM_SPACING):
    """A random field (X, Y, Z), float32, mean 0, std 1, whose bumps are about `wavelength` mm apart.

    White noise filtered by k^2 exp(1 - k^2), k = wavelength * frequency: a band around k = 1.
    """
    freq = np.meshgrid(*[np.fft.fftfreq(n, s) for n, s in zip(shape[:2], spacing)],
                       np.fft.rfftfreq(shape[2], spacing[2]), indexing="ij", sparse=True)
    k2 = (wavelength ** 2 * sum(f * f for f in freq)).astype(np.float32)
    white = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    band = torch.from_numpy(k2 * np.exp(1 - k2))
    noise = torch.fft.irfftn(torch.fft.rfftn(white) * band, s=shape).numpy()
    return noise / noise.std()


def soft_inside(distance, softness=0.8):
    """Share of a voxel that lies inside a surface: distance in mm, positive inside -> 0..1."""
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
    field = torch.from_numpy(smooth_noise(rng, 37))[None, None]
    fold = F.grid_sample(field, torch.from_numpy(where)[None], align_corners=False,
                         padding_mode="reflection")[0, 0].numpy()
    slope = np.sqrt(sum(g * g for g in np.gradient(fold, *PHANTOM_SPACING))) + 0.02
    sheet = np.minimum(np.abs(fold) / slope, 20)            # first-order distance to fold = 0
    reach = 11 + 3.5 * smooth_noise(rng, 45)
    return np.hypot(sheet, np.maximum(hull - reach, 0))


def phantom_anatomy(rng, point):
    """A healthy brain: warped ellipsoids, folded cortex, deep nuclei, ventricles, CSF.

    point: x (left to right), y (back to front), z (foot to head) in mm, each (X, Y, Z), 0 near
    the middle. Returns {tissue: share of the voxel in 0..1}; depth below the brain surface in mm
    (+ inside); distance from the midline in mm (+ right), which bends with everything else;
    which voxels are ventricle or midline fissure, where no tumour grows; and the share of ventricles.
    """
    size = rng.uniform(0.93, 1.02, 3)                       # heads differ in size ...
    wide = 0.8 + 0.7 * rng.uniform()                        # ... and, with age, in CSF spaces
    x, y, z = [(q + 2.5 * smooth_noise(rng, 70) + 0.5 * smooth_noise(rng, 30)) / s
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
    folia = np.abs(((z + 40) * 0.9 + 0.35 * (y + 45) + 2 * smooth_noise(rng, 30)) % 7 - 3.5)
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
    nuclei = blobs(((13, -12, 4), (10, 15, 9)), ((27, 4, 0), (7, 18, 10)), ((15, 18, 10), (5, 11, 8)))
    wall = pial - 0.2 - 0.45 * wide                         # CSF is wider in older heads
    share = {"vessel": soft_inside(2.2 - np.hypot(x, 0.8 * np.minimum(hull - 2.5, 12)), 0.6)
             * (z > -25) * ((y < 20) | (z > 30))}           # the sagittal sinus
    left = 1 - share["vessel"]
    for tissue, part in (("CSF", np.maximum(soft_inside(-wall), soft_inside(ventricle))),
                         ("grey", soft_inside(3.6 - wall)), ("deep", soft_inside(nuclei)),
                         ("white", 1.0)):                   # each takes its part of what is left
        share[tissue] = part * left
        left = left - share[tissue]
    return share, hull, x, (ventricle > -1) | (fissure < 1.5), soft_inside(ventricle)


def phantom_plan(rng, seed):
    """What tumour to grow: mL of (NCR, ED, ET) and the centres of its foci in mm.

    Log-normal volumes near those of 368 expert label maps of BraTS 2020, whose medians are 10.5,
    49.5 and 14.8 mL. ET runs evenly through its distribution as the seed counts up (golden-ratio steps),
    so that a few dozen consecutive seeds already span 1 to 40 mL. One in ten has no ET (low
    grade), one in ten no NCR, one in fifteen no tumour at all.
    """
    u = (seed * 0.6180339887 + 0.3) % 1
    et = float(np.clip(20 * np.exp(1.45 * NormalDist().inv_cdf(min(max(u, 1e-3), 1 - 1e-3))), 0.8, 58))
    ncr = float(np.clip(rng.lognormal(np.log(10), 0.9), 0.5, 90))
    ed = float(np.clip(rng.lognormal(np.log(50), 0.6), 6, 150))
    grade = rng.choice(["full", "no ET", "no NCR", "none"], p=[0.73, 0.1, 0.1, 0.07])
    ncr, ed, et = {"full": (ncr, ed, et), "no ET": (ncr + et, ed, 0), "no NCR": (0, ed, et),
                   "none": (0, 0, 0)}[str(grade)]
    centre = np.array([rng.choice([-1, 1]) * rng.uniform(24, 44), rng.uniform(-52, 46),
                       rng.uniform(-8, 42)])
    more = [centre + rng.normal(0, (9, 14, 11)) for _ in range(rng.choice(3, p=[0.72, 0.2, 0.08]))]
    return (ncr, ed, et), [centre, *more]


def phantom_tumour(rng, point, volumes, foci, white, allowed):
    """Label map (X, Y, Z) uint8 with exactly the asked mL of NCR, ED and ET.

    The core fills the nearest voxels to the foci, in a noise-warped distance; its most central
    part is NCR, the rim ET; oedema fills what is nearest around it, white matter first.
    """
    voxel_ml = float(np.prod(PHANTOM_SPACING)) / 1000
    n_ncr, n_ed, n_et = [int(round(v / voxel_ml)) for v in volumes]
    distance = np.min([np.sqrt(sum((q - c) ** 2 for q, c in zip(point, focus))) + 7 * (k > 0)
                       for k, focus in enumerate(foci)], axis=0)
    lobed = np.exp(0.24 * smooth_noise(rng, 42) + 0.05 * smooth_noise(rng, 15))
    reach = np.where(allowed, (distance + 3) * lobed, np.inf).ravel()
    core = np.argpartition(reach, n_ncr + n_et)[:n_ncr + n_et]
    depth = reach[core] * np.exp(0.14 * smooth_noise(rng, 22).ravel()[core])
    core = core[np.argsort(depth)]
    labels = np.zeros(PHANTOM_SHAPE, np.uint8)
    labels.reshape(-1)[core[:n_ncr]] = 1
    labels.reshape(-1)[core[n_ncr:]] = 3
    swelling = distance * np.exp(0.2 * smooth_noise(rng, 45)) + 22 * (1 - white)
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


def phantom(seed, scanner="A"):
    """One head. seed: any integer >= 0, everything follows from it; scanner: a key of SCANNERS.

    Returns images float32 (4, X, Y, Z) >= 0 in arbitrary units, 0 outside the brain (as after
    skull stripping); labels uint8 (X, Y, Z) in 0..3; and the shares of tissue (a dict of
    (X, Y, Z) in 0..1; "ventricles" are a part of "CSF"). Axes are canonical (RAS+: x to the right, y to the front,
    z up).
    """
    rng = np.random.default_rng(seed)
    axes = [((np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
            for n, s in zip(PHANTOM_SHAPE, PHANTOM_SPACING)]
    point = np.meshgrid(*axes, indexing="ij")
    volumes, foci = phantom_plan(rng, seed)
    # mass effect: tissue is pushed away from the tumour, so anatomy is looked up nearer to it
    radius = (3000 * (volumes[0] + volumes[2] + volumes[1] / 4) / (4 * np.pi)) ** (1 / 3)
    distance = np.sqrt(sum((q - c) ** 2 for q, c in zip(point, foci[0])))
    push = 0.2 * radius * np.exp(-(distance / (1.5 * radius + 15)) ** 2) / (distance + radius + 1)
    share, hull, midline, barrier, ventricles = phantom_anatomy(
        rng, [q - (q - c) * push - (0, 0, 2)[k] for k, (q, c) in enumerate(zip(point, foci[0]))])
    brain = hull > 0
    labels = np.zeros(PHANTOM_SHAPE, np.uint8)
    if sum(volumes):
        # a tumour crosses the midline only now and then (through the corpus callosum)
        side = (midline * foci[0][0] > 0) | (rng.uniform() < 0.15)
        allowed = (hull > 2) & ~barrier & side
        labels = phantom_tumour(rng, point, volumes, foci, share["white"], allowed)
    # partial volume between tumour and tissue: labels blurred by about half a voxel
    lesions = {name: blur3(labels == k) for k, name in enumerate(LABELS, 1)}
    healthy = 1 - sum(lesions.values())
    share = {name: part * healthy for name, part in share.items()} | lesions

    centre = SCANNERS[scanner]
    texture = {name: 1 + strength * smooth_noise(rng, grain)
               for name, (strength, grain) in TEXTURE.items()}
    longer = (centre["field"] / 1.5) ** 0.33                # T1 grows with the field
    images = []
    for modality in MODALITIES:
        times = [t * rng.uniform(0.94, 1.06) for t in centre["t1" if modality == "t1ce" else modality]]
        image = sum(part * texture.get(name, 1) * mr_signal(
            modality, times, TISSUES[name][0] * longer, *TISSUES[name][1:], GADOLINIUM.get(name, 0))
            for name, part in share.items())
        image = image / image[brain].mean()
        image = image * (1 + centre["shading"] * rng.uniform(0.5, 1.5) * smooth_noise(rng, 160))
        noise = centre["noise"] * rng.uniform(0.7, 1.3) * rng.standard_normal((2, *PHANTOM_SHAPE))
        images.append(np.hypot(image + noise[0], noise[1]) * brain)     # Rician: a magnitude
    return np.stack(images).astype(np.float32), labels, share | {"ventricles": np.minimum(ventricles, share["CSF"])}


def blur3(volume):
    """A volume smoothed by (0.2, 0.6, 0.2) along each axis, float32."""
    volume = volume.astype(np.float32)
    for axis in range(3):
        volume = 0.6 * volume + 0.2 * (np.roll(volume, 1, axis) + np.roll(volume, -1, axis))
    return volume


def write_phantom(folder, seed, scanner="A"):
    """Write phantom `seed` as one BraTS case below `folder` and return the case's folder.

    On purpose as varied as the wild: even seeds have the 2023 names and ET = 3, odd seeds the old
    names and ET = 4; every second pair has an LPS header instead of RAS. Scans are int16 with a
    gain of their own, as scanners give them. The folder appears at once, whole.
    """
    images, labels, _ = phantom(seed, scanner)
    modern, lps = seed % 2 == 0, seed % 4 >= 2
    case = f"BraTS-PHA-{seed:05d}-000" if modern else f"BraTS20_Phantom_{seed:05d}"
    gain = np.random.default_rng([seed, 1]).uniform(300, 1500, len(MODALITIES))
    volumes = {"seg": np.where(labels == 3, 3 if modern else 4, labels).astype(np.uint8)}
    for modality, image, g in zip(MODALITIES, images, gain):
        counts = np.where(image > 0, np.clip(np.rint(image * g), 1, 32767), 0)
        volumes[NAMES_2023[modality] if modern else modality] = counts.astype(np.int16)
    affine = np.diag([*PHANTOM_SPACING, 1.0])
    affine[:3, 3] = -(np.array(PHANTOM_SHAPE) - 1) / 2 * PHANTOM_SPACING
    target = Path(folder) / case
    building = Path(folder) / f".{case}.{os.getpid()}.tmp"
    building.mkdir(parents=True, exist_ok=True)
    for name, volume in volumes.items():
        image = nib.Nifti1Image(volume, affine)
        if lps:                                             # same voxels in mm, other storage order
            image = image.as_reoriented([[0, -1], [1, -1], [2, 1]])
        image.header["descrip"] = f"brainsyn phantom {seed} scanner {scanner}".encode()
        nib.save(image, building / f"{case}{'-' if modern else '_'}{name}.nii.gz")
    os.replace(building, target)
    return target


def phantom_seed(name):
    """The seed in the name of a phantom case, None for any other name."""
    match = re.fullmatch(r"BraTS(-PHA-|20_Phantom_)(\d+)(-000)?", name)
    return int(match[2]) if match else None


def make_phantoms(folder, count, scanner="A"):
    """Make phantoms 0 .. count - 1 below `folder`; those already there are kept.

    Returns the number of cases newly made. About a second a case.
    """
    there = {phantom_seed(path.name) for path in Path(folder).glob("BraTS*")}
    seeds = [seed for seed in range(count) if seed not in there]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda seed: write_phantom(folder, seed, scanner), seeds))
    return len(seeds)


# ================================================================================================
# 3  READING
# Folders of cases in BraTS naming -> label maps and scaled slices on one grid, in a cache. Most
# bugs of medical image projects live here, and they are silent; so every doubt is a BadInput.
# ================================================================================================

MAX_BYTES = 2 ** 31                     # no volume of this field needs more; stops a gzip bomb
CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FILE_NAME = re.compile(r"^(?P<case>.+?)[-_](?P<what>t1|t1ce|t2|flair|t1n|t1c|t2w|t2f|seg)\.nii(\.gz)?$")
CLASSES_NAME = "{}-classes.nii.gz"      # beside a synthetic case: all classes of its condition, where those are more
MODERN = {modern: name for name, modern in NAMES_2023.items()}
# How a person's name gets into a header: DICOM writes DOE^JOHN.
PERSON = re.compile(rb"[A-Za-z]{2,}\^[A-Za-z]|patient|birth", re.IGNORECASE)


def spacing_of(affine):
    """Affine (4, 4) -> mm a voxel along each axis (3,)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


KINDS = ("rejected", "warned", "normalised")


@dataclass(frozen=True)
class Finding:
    """What a check has to say of a file or folder `where`. kind: "rejected" is not used, "warned" is used and
    worth a look, "normalised" was unusual and is read rightly. text: what it is, what to do."""
    kind: str
    where: str
    text: str


def unpack(path):
    """The bytes of a NIfTI file, unpacked and verified -> (bytes, whether it was packed). ValueError says what
    is wrong.

    The header is unpacked first: it says how long the rest may be, so that a small file cannot unfold without
    end. Then the whole stream is, and its checksums are verified, before a voxel is used: readers that stop at
    the last voxel return wrong values in silence when a bit has flipped.
    """
    raw = Path(path).read_bytes()
    if not raw:
        raise ValueError("it is empty")
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS, not the file; git lfs pull fetches it")
    if raw[:100].lstrip()[:1] == b"<":
        raise ValueError("it is a web page, not a scan")
    if raw[:2] != b"\x1f\x8b":
        return raw, False
    head, parts = zlib.decompressobj(31).decompress(raw, 540), []
    room = expected_bytes(head)
    while raw.rstrip(b"\0"):                    # a gzip file may have several members
        stream = zlib.decompressobj(31)
        parts.append(stream.decompress(raw, room + 1))
        if not stream.eof:
            raise ValueError("the gzip stream ends early" if len(parts[-1]) <= room else
                             "it unfolds to more than its header says")
        raw, room = stream.unused_data, room - len(parts[-1])
    return b"".join(parts), True


def nifti_header(raw):
    """The nibabel header class and header that these first bytes of a NIfTI-1 or -2 file hold, of either byte
    order. ValueError where they are neither."""
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        size = kind.header_class.template_dtype.itemsize
        if size in (int.from_bytes(raw[:4], order) for order in ("little", "big")) and len(raw) >= size:
            return kind, kind.header_class(raw[:size], check=False)
    raise ValueError("it does not begin like a NIfTI file")


def expected_bytes(raw):
    """How long the file must be of which `raw` is the beginning. ValueError where its header makes no sense."""
    header = nifti_header(raw)[1]
    if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise ValueError("it is one of a pair of header and image files, or no NIfTI")
    if not {int(header["sform_code"]), int(header["qform_code"])} <= set(range(6)):
        raise ValueError(f"its header has sform code {header['sform_code']}, qform code {header['qform_code']}")
    shape, dtype = [int(n) for n in header["dim"][1:1 + int(header["dim"][0])]], header.get_data_dtype()
    if int(header["bitpix"]) != 8 * dtype.itemsize or not 1 <= len(shape) <= 7 or min(shape) < 1:
        raise ValueError(f"its header claims {header['bitpix']} bits a voxel of {dtype} in shape {shape}")
    size = int(header["vox_offset"]) + math.prod(shape) * dtype.itemsize
    if not 348 <= int(header["vox_offset"]) == header["vox_offset"] <= size <= MAX_BYTES:
        raise ValueError(f"its header claims {size} bytes for shape {shape}, from byte {header['vox_offset']} on")
    return size


def read_nifti(path, notes=None):
    """One NIfTI volume in canonical axes (RAS+): array (X, Y, Z) and affine (4, 4), voxel -> mm.

    notes: list that takes a Finding for whatever was unusual. BadInput where the file is damaged, is not one
    volume of finite numbers, or does not say where it lies.
    """
    note = lambda kind, text: notes is not None and notes.append(Finding(kind, str(path), text))
    try:
        raw, packed = unpack(path)
        size = expected_bytes(raw)
        if len(raw) != size:
            raise ValueError(f"it holds {len(raw)} bytes where its header says {size}")
        kind, header = nifti_header(raw)
        image = kind.from_bytes(raw)
        turned = nib.as_closest_canonical(image)
        volume, affine = np.asanyarray(turned.dataobj), turned.affine
    except Exception as error:                  # nibabel raises what it likes on damaged headers
        raise BadInput(f"{path}: cannot be read as NIfTI ({error}); copy or download it again") from error
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        raise BadInput(f"{path}: its header does not say where it lies (no sform, no qform); export it again")
    if not np.isfinite(affine).all() or not 0.05 < spacing_of(affine).min() <= spacing_of(affine).max() < 50:
        raise BadInput(f"{path}: voxels of {spacing_of(affine).round(3).tolist()} mm; its header is damaged, export "
                       "it again")
    while volume.ndim > 3 and volume.shape[-1] == 1:
        volume = volume[..., 0]
        note("normalised", "one volume in more than three axes: the last one is dropped")
    if volume.ndim != 3 or volume.dtype.kind not in "biuf":
        raise BadInput(f"{path}: holds {volume.dtype} voxels in shape {volume.shape}, not one 3-D "
                       "volume of plain numbers; split it into one file per modality")
    if min(volume.shape) < 2:
        raise BadInput(f"{path}: is one slice (shape {volume.shape}), wanted is a volume")
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        raise BadInput(f"{path}: contains NaN or infinite voxels; export it again or repair it")
    if not packed and str(path).endswith(".gz"):
        note("normalised", "named .gz, but not packed: read as it is")
    if header.endianness != nib.volumeutils.native_code:
        note("normalised", "bytes stored the other way round: turned")
    if header.get_slope_inter() not in ((None, None), (1.0, 0.0)):
        note("normalised", "its header scales the voxels (scl_slope, scl_inter): applied")
    if nib.aff2axcodes(image.affine) != ("R", "A", "S"):
        note("normalised", f"axes stored as {''.join(nib.aff2axcodes(image.affine))}: turned to RAS")
    words = b" ".join(header[name].item() for name in ("descrip", "intent_name", "aux_file", "db_name")
                      if name in header.keys())
    if PERSON.search(words) or any(its.get_code() == 2 or PERSON.search(bytes(str(its.get_content()), "utf8"))
                                   for its in image.header.extensions):
        note("warned", "its header seems to name a person, or holds DICOM fields; it never travels into synthetic "
             "files, but clean it before you pass this one on")
    return volume, affine


@dataclass
class Case:
    """A case on disk: nothing is read yet. files: {"t1": path, ..., "seg": path}; seg may be missing."""
    case: str                                   # as in the file names
    files: dict
    modern: bool                                # 2023 names: 3 is ET, 4 would be a cavity

    @property
    def folder(self):
        """Where its files lie."""
        return self.files["t1"].parent

    @property
    def patient(self):
        """Time points of one patient share it: BraTS-GLI-00012-000 and -001; Brats18_X_1, _2."""
        if self.case.startswith("BraTS-"):
            return re.sub(r"-\d{3}$", "", self.case)
        return re.sub(r"_\d$", "", self.case) if re.match(r"(?i)brats1\d", self.case) else self.case


def find_cases(folder, labelled=True, findings=None):
    """All cases below `folder`, at any depth, sorted by name: [Case]. Both generations of BraTS
    names, .nii and .nii.gz. BadInput when there are none, a modality or (if labelled) the labels are
    missing, two folders hold the same case, or a link leads out of the folder.

    findings: list that takes these as Findings instead; cases they concern are left out.
    """
    def refuse(where, text):
        if findings is None:
            raise BadInput(f"{where}: {text}")
        findings.append(Finding("rejected", str(where), text))

    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; expected a folder of BraTS cases")
    found, bad, home = {}, set(), folder.resolve()
    paths = [Path(at) / name for at, folders, names in os.walk(folder) for name in [*folders, *names]]
    for path in sorted(paths):
        match = FILE_NAME.match(path.name)
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if (match or path.is_dir()) and path.is_symlink() and home not in path.resolve().parents:
            refuse(path, "is a link that leads out of the folder; copy the files, or name the folder they lie in")
            bad.add(match and match["case"])
        elif match:
            found.setdefault(match["case"], []).append((MODERN.get(match["what"], match["what"]), path))
        elif findings is not None and re.search(r"(?<!-classes)\.nii(\.gz)?$", path.name):
            findings.append(Finding("warned", str(path), "has no name of BraTS (CASE_t1ce.nii.gz, CASE-t1c.nii.gz): "
                                    "not used"))
    if not found and not bad:
        refuse(folder, "holds no BraTS case; expected files like CASE/CASE_t1ce.nii.gz or CASE/CASE-t1c.nii.gz")
    cases = []
    for case, files in sorted(found.items()):
        names, where = [name for name, _ in files], [path.parent for _, path in files]
        missing = [name for name in (*MODALITIES, *["seg"] * labelled) if name not in names]
        twice = [path for i, (name, path) in enumerate(files) if name in names[:i]]
        if case in bad:
            continue
        if not CASE_NAME.fullmatch(case):
            refuse(where[0], f"case {case!r} is no name to use; letters, digits, dot, _ and - only, 64 at most")
        elif len(set(where)) > 1:
            refuse(where[-1], f"case {case} is also in {where[0]}; keep one of them")
        elif twice:
            refuse(twice[0], f"this file of case {case} is there twice; keep one of them")
        elif missing:
            refuse(where[0], f"case {case} has " + ("labels but no scans" if names == ["seg"] else "no " +
                   " and no ".join(missing)) + "; add the files or move the case away")
        else:
            cases.append(Case(case, dict(files), any(FILE_NAME.match(p.name)["what"] in MODERN for _, p in files)))
    return cases


def standard_labels(labels, modern, path="labels"):
    """Any BraTS label map -> uint8 with 0, 1 NCR, 2 ED, 3 ET. ET is 4 up to BraTS 2021 and 3 since
    2023; since 2024, 4 is a resection cavity, which has no place here and is refused."""
    rounded = labels
    if labels.dtype.kind == "f":
        rounded = np.rint(labels)               # files written from floats read as 1.992
        if np.abs(labels - rounded).max() > 0.05:
            raise BadInput(f"{path}: labels are fractional; resample labels by nearest neighbour")
    values = {value for value in range(5) if (rounded == value).any()} | {int(rounded.min()), int(rounded.max())}
    if values == {0, 255}:
        raise BadInput(f"{path}: is a mask of 0 and 255, not labels; expected 0, 1 NCR, 2 ED and 3 or 4 ET")
    if not values <= {0, 1, 2, 3, 4}:
        raise BadInput(f"{path}: label values from {min(values)} to {max(values)}; expected 0, 1 NCR, 2 ED and "
                       "3 or 4 ET")
    if 4 in values and (modern or 3 in values):
        raise BadInput(f"{path}: label 4 is a resection cavity in this convention, which the model "
                       "does not know; move the case away or relabel it")
    return np.where(rounded == 4, 3, rounded).astype(np.uint8)


def read_labels(case, notes=None):
    """The label map of a Case: uint8 (X, Y, Z) in 0..3, canonical, and its affine. notes: as read_nifti."""
    labels, affine = read_nifti(case.files["seg"], notes)
    if notes is not None and 3.5 < labels.max() < 4.5:
        notes.append(Finding("normalised", str(case.files["seg"]), "ET is 4, as up to BraTS 2021: read as 3"))
    return standard_labels(labels, case.modern, case.files["seg"]), affine


def read_case(case, notes=None):
    """Read one Case: scans float32 (C, X, Y, Z) as stored, labels uint8 (X, Y, Z) in 0..3 (0 where the
    case has none), affine. All canonical (RAS+). notes: as read_nifti. BadInput where shapes or affines of the
    files differ, or a scan cannot be one.
    """
    labels, affine = read_labels(case, notes) if "seg" in case.files else (None, None)
    scans = None
    for c, name in enumerate(MODALITIES):
        path = case.files[name]
        scan, its_affine = read_nifti(path, notes)
        if scans is None:
            labels = np.zeros(scan.shape, np.uint8) if labels is None else labels
            affine = its_affine if affine is None else affine
            # x runs fastest in memory, as in the files: a third faster than the other way round
            scans = np.empty((len(MODALITIES), *labels.shape[::-1]), np.float32).transpose(0, 3, 2, 1)
        if scan.shape != labels.shape:
            raise BadInput(f"{path}: shape {scan.shape} differs from {labels.shape} of the case; register it to one "
                           "grid")
        if not np.allclose(its_affine, affine, atol=0.02):
            sizes = [spacing_of(a).round(2).tolist() for a in (its_affine, affine)]
            raise BadInput(f"{path}: lies elsewhere in space than the case's other files (affines differ"
                           + (f", voxels of {sizes[0]} and {sizes[1]} mm" if sizes[0] != sizes[1] else "")
                           + "); register the case to one grid")
        low, high = float(scan.min()), float(scan.max())
        if low == high:
            raise BadInput(f"{path}: every voxel has the same value; export it again")
        if not 1e-6 < max(-low, high) < 1e9:
            raise BadInput(f"{path}: voxels from {low:.3g} to {high:.3g}; the scale in its header is damaged")
        if scan.dtype.kind == "i" and scan.dtype.itemsize > 1 and min(-low, high) > 0.9 * np.iinfo(scan.dtype).max:
            raise BadInput(f"{path}: voxels from {low:.0f} to {high:.0f} have run over the end of {scan.dtype}; export "
                           "it as float or unsigned")
        scans[c] = scan
        for other in range(c):                  # any() stops at the first slice that differs
            if not any((a != b).any() for a, b in zip(scans[c].T, scans[other].T)):
                raise BadInput(f"{path}: is the same scan as {case.files[MODALITIES[other]].name}; put the right one "
                               "in its place")
    return scans, labels, affine


def air_value(scan):
    """The commonest value on the six faces of a scan (X, Y, Z); NaN where no value holds a fifth of them."""
    faces = np.concatenate([np.moveaxis(scan, axis, 0)[i].ravel() for axis in range(3) for i in (0, -1)])
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
            raise BadInput(f"{where}: the background is not one value, so the skull seems to be still "
                           "there; run a skull-stripping tool first")
        brain |= scan != air
    return brain


def is_synthetic(path):
    """Whether a NIfTI file, or the folder of a case, was made by sample.py. Any mark is enough: its name, its
    header, the sidecar beside it, dataset_description.json beside it or one folder up."""
    path = Path(path)
    folder, files = (path, sorted(path.glob("*.nii*"))[:1]) if path.is_dir() else (path.parent, [path])
    marks = [b"BraTS-SYN-" in bytes(path.name, "utf8")]
    for file in files:
        try:
            marks.append(b"SYNTHETIC" in nib.load(file).header["descrip"].item())
        except Exception:                       # unreadable: the reader will say so
            pass
    sidecars = folder.glob("*.json") if path.is_dir() else [folder / re.sub(r"-\w+\.nii(\.gz)?$", ".json", path.name)]
    for file in (*sidecars, folder / "dataset_description.json", folder.parent / "dataset_description.json"):
        try:
            facts = json.loads(file.read_text())
            made_by = [its["Name"] for its in facts.get("GeneratedBy", [])]
            marks.append(facts.get("SyntheticData") == "YES" or "brainsyn" in made_by)
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            pass
    return any(marks)


def refuse_synthetic(cases):
    """BadInput if any of these Cases was made by sample.py: it owes to patients who cannot be told from its own
    hash, and a figure on it says nothing about real scans."""
    made = [case for case in cases if is_synthetic(case.folder)]
    if made:
        raise BadInput(f"{made[0].folder}: is a synthetic case, as are {len(made)} of {len(cases)} here; wanted are "
                       "real ones (or phantoms), for validation above all; give synthetic cases to train_seg.py as "
                       "--synthetic, and label maps as they came from patients")


def fit_of_labels(scans, tumour, brain, spacing):
    """How well a tumour lies on what is bright on T2 and FLAIR: its mean brightness where it lies, divided by
    the best it could have anywhere else in the brain (1: it lies best where it is).

    scans float (C, X, Y, Z), tumour and brain bool (X, Y, Z), spacing mm (3,). Every shift is tried at once, as
    a product of Fourier transforms, on every second voxel or fewer. 1 where there is too little to tell.
    """
    thin = tuple(slice(None, None, max(1, round(6 / mm))) for mm in spacing)
    tumour, brain = [volume[thin].astype(np.float32) for volume in (tumour & brain, brain)]
    bright, inside = np.zeros(brain.shape, np.float32), brain > 0
    for name in ("t2", "flair"):
        scan = scans[MODALITIES.index(name)][thin]
        bright += np.where(inside, (scan - np.median(scan[inside])) / (scan[inside].std() + 1e-6), 0)
    if tumour.sum() < 5:
        return 1.0
    transform = np.fft.rfftn(tumour).conj()
    under, share = [np.fft.irfftn(np.fft.rfftn(volume) * transform, s=brain.shape, axes=(0, 1, 2)) / tumour.sum()
                    for volume in (bright, brain)]
    best = np.where(share > 0.95, under, 0).max()
    return float(under[0, 0, 0] / best) if best > 0.5 else 1.0


def touching(labels, value):
    """Share of the voxels of a label that touch healthy brain: labels (X, Y, Z), with -1 for air."""
    healthy, near = labels == 0, np.zeros(labels.shape, bool)
    for axis in range(3):
        near |= np.roll(healthy, 1, axis) | np.roll(healthy, -1, axis)
    its = labels == value
    return float((its & near).sum() / max(its.sum(), 1))


def signature(scans, brain):
    """What a head looks like, coarsely, whatever grid it lies on: mean signal of every modality in 16^3 equal
    parts of the box around the brain, each modality to mean 0 and spread 1; float32 (C, 16, 16, 16), 0 where a
    part is mostly air. scans float (C, X, Y, Z); brain bool (X, Y, Z)."""
    ends = [np.where(brain.any(tuple({0, 1, 2} - {axis})))[0][[0, -1]] for axis in range(3)]
    box = (..., *[slice(low, high + 1) for low, high in ends])
    brain, scans = brain[box], scans[box]

    def parts(volume):
        for axis in (-3, -2, -1):
            edge = np.linspace(0, volume.shape[axis], 17).astype(int)
            wide = np.maximum(np.diff(edge), 1).reshape([-1 if k == axis else 1 for k in (-3, -2, -1)])
            volume = np.add.reduceat(volume, edge[:-1].clip(max=volume.shape[axis] - 1), axis) / wide
        return volume

    share = parts(brain.astype(np.float32))
    mean = parts(scans * brain) / np.maximum(share, 0.05)
    inside = share > 0.3
    mean = (mean - mean[:, inside].mean(1).reshape(-1, 1, 1, 1)) / (mean[:, inside].std(1).reshape(-1, 1, 1, 1) + 1e-6)
    return np.where(inside, mean, 0).astype(np.float32)


def check_case(case):
    """Read a Case and look at what reading alone does not show -> ([Finding], signature or None where it is
    rejected). All thresholds were set on 60 real cases and 30 phantoms: see the numbers beside them."""
    notes, label_file = [], str(case.files.get("seg", ""))
    try:
        scans, labels, affine = read_case(case, notes)
        ill = labels.any()
        skip = np.maximum(1, np.rint(3 / spacing_of(affine))).astype(int)       # voxels of 3 mm are enough from here
        thin = (..., *[slice(None, None, int(k)) for k in skip])
        scans, labels, spacing = scans[thin].copy(order="K"), labels[thin], skip * spacing_of(affine)
        brain, tumour = brain_mask(scans, case.folder), labels > 0
        if brain.sum() < 500:                               # 14 mL; a head has a hundred times as much
            raise BadInput(f"{case.folder}: shows hardly any brain; export it again")
        for name, scan in zip(MODALITIES, scans):
            shown = 1 - (brain & (scan == air_value(scan))).sum() / brain.sum()
            if shown < 0.95:                                # 0.98 to 1 in 59 real cases, 0.67 in a cut one
                notes.append(Finding("warned", str(case.files[name]), f"shows {shown:.0%} of the brain the other "
                                     "scans show; cut or badly stripped"))
        if label_file and not ill:
            notes.append(Finding("warned", label_file, "has no tumour; trained on as healthy"))
        elif tumour.any():                                  # a few voxels may fall between those that are looked at
            outside, fit = (tumour & ~brain).sum() / tumour.sum(), fit_of_labels(scans, tumour, brain, spacing)
            inner, outer = [touching(np.where(brain | tumour, labels, -1).astype(np.int8), value) for value in (1, 2)]
            if outside > 0.05:                              # 0.000 in all
                notes.append(Finding("warned", label_file, f"{outside:.0%} of the tumour lies outside the brain"))
            inner = inner if (labels == 1).mean() > 1e-4 else 0.0
            if inner > outer and (labels == 2).any():       # NCR lies inside ED in all: 0 to .38 against .18 to .6
                notes.append(Finding("warned", label_file, "NCR touches healthy brain more than ED does; are labels "
                                     "1 and 2 swapped?"))
            if fit < 0.5:                                   # 0.82 to 1 in all; below 0.6 in all when shifted
                raise BadInput(f"{label_file}: the tumour does not lie on what is bright on T2 and FLAIR, but would "
                               "elsewhere; it is shifted or mirrored against the scans, or another case's")
            if fit < 0.75:
                notes.append(Finding("warned", label_file, "the tumour would lie better elsewhere; is it shifted or "
                                     "mirrored against the scans?"))
        return notes, signature(scans, brain)
    except BadInput as error:
        where, _, text = str(error).partition(": ")
        return [Finding("rejected", where, text)], None


ALIKE = 0.53                            # correlation of signatures; up to 0.47 between 60 real heads, 0.60 and
                                        # 0.67 between two pairs of scans of one patient each


def check_cases(cases):
    """Check Cases by reading every one -> ([Finding], [Case] that can be used).

    Across cases: the same scans under two names (the second is rejected), and heads that look like one patient
    (warned): signatures, less their mean over all cases, that correlate above ALIKE. That needs ten cases.
    """
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = list(pool.map(check_case, cases))
    findings, good = [note for notes, _ in results for note in notes], []
    for case, (_, its) in zip(cases, results):
        twin = next((other for other, theirs in good if its is not None and np.array_equal(its, theirs)), None)
        if twin:
            findings.append(Finding("rejected", str(case.folder), f"holds the same scans as case {twin.case}; keep one "
                                    "of them"))
        elif its is not None:
            good.append((case, its))
    if len(good) >= 10:
        heads = np.stack([its.ravel() for _, its in good])
        mean = heads.sum(0) / np.maximum((heads != 0).sum(0), 1)
        close = np.triu(np.corrcoef(np.where(heads != 0, heads - mean, 0)), 1)
        for i, j in np.argwhere(close > ALIKE):
            if good[i][0].patient != good[j][0].patient:
                findings.append(Finding("warned", str(good[j][0].folder), f"looks like the same patient as "
                                        f"{good[i][0].case} (correlation {close[i, j]:.2f}); keep both on one side of "
                                        "the split"))
    return findings, [case for case, _ in good]


def findings_text(findings, few=3):
    """Findings as lines of text: one each; what is not rejected and comes more than `few` times is one line."""
    lines, groups = [], {}
    for its in findings:
        groups.setdefault((its.kind, its.where if its.kind == "rejected" else "", its.text), []).append(its.where)
    for (kind, _, text), where in sorted(groups.items(), key=lambda item: KINDS.index(item[0][0])):
        lines += ([f"{kind}: {at}: {text}" for at in where] if len(where) <= few else
                  [f"{kind}: {len(where)} files ({where[0]} for one): {text}"])
    return lines


def usable_cases(folder, skip_bad=False, memory=None, say=print):
    """The cases below `folder`, all read and checked: [Case]. What was found is said. BadInput if any is
    rejected, unless skip_bad, which leaves those out. memory: folder that remembers the findings on files that
    have not changed since (by name, size and time)."""
    findings = []
    cases = find_cases(folder, True, findings)
    refuse_synthetic(cases)
    path = memory and Path(memory) / f"checked-{fingerprint(cases)}.json"
    try:
        had = json.loads(path.read_text())
        found, good = [Finding(*its) for its in had["findings"]], [c for c in cases if c.case in had["good"]]
    except (AttributeError, OSError, ValueError, TypeError, KeyError):      # not there, or damaged
        say(f"checking {len(cases)} cases", flush=True)
        found, good = check_cases(cases)
        if path:
            replace_file(path, lambda temporary: temporary.write_text(json.dumps(
                {"findings": [[f.kind, f.where, f.text] for f in found], "good": [case.case for case in good]})))
    findings += found
    for line in findings_text(findings):
        say(line)
    bad = sum(its.kind == "rejected" for its in findings)
    if bad and not skip_bad:
        raise BadInput(f"{folder}: {bad} rejected, see above; mend them, move them away, or leave them out with "
                       "--skip-bad")
    if bad:
        say(f"left out: {bad} rejected, {len(good)} cases are used")
    return good


def fingerprint(cases, *settings):
    """12 hexadecimal digits that change when any file of these cases (by name, size and time) or a setting does."""
    files = [path for case in cases for path in case.files.values()]
    stamp = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] if p.exists() else str(p) for p in files]
    return hashlib.sha256(json.dumps([12, *settings, stamp]).encode()).hexdigest()[:12]


def hashes_of(case):
    """case_hashes of a Case on disk: (of its label map, of its outline)."""
    scans, labels, _ = read_case(case)
    return case_hashes(labels, brain_mask(scans, case.folder))


# Where the median of a brain goes in 0..255: about where it lay on average in 30 BraTS cases of 2018
# to 2023 scaled by their 99.8th percentile alone. Any fixed value serves; these keep scans natural.
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
    return np.interp(scan, (low, median, max(high, median + 1e-6)), (0, middle, 255)).astype(np.float32)


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


def to_images(stored):
    """Bytes 0..255 as prepare_case and the cache keep them -> images float32 tensor in [-1, 1]."""
    return torch.as_tensor(stored).float() / 127.5 - 1


def tumour_labels(classes, condition="tumour"):
    """Classes of a condition, array or tensor of integers -> labels: 0, 1 NCR, 2 ED, 3 ET."""
    healthy = len(CONDITIONS[condition]) - len(LABELS) - 1
    return (classes > healthy) * (classes - healthy)


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
        spacing = spacing_of(affine)
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

        Voxel x' of the model lies at source voxel x = n - start - step (R - x') + step/2 - 1/2: both
        arrays are reversed between canonical axes and slices.
        """
        change = np.eye(4)
        for axis, size, start, step in zip((1, 0), (self.shape[1], self.shape[0]), self.start, self.step):
            change[axis, axis] = step
            change[axis, 3] = size - start - step * self.resolution + step / 2 - 0.5
        return self.affine @ change


def two_means(first, second, third):
    """k-means with two means over three scans of the same voxels, each (N,) -> bool (N,): True in the
    cluster where `first` is brighter than the other two.

    Outliers first: each scan is clipped to its 5th..95th percentile and scaled to 0..1 (bright eyes,
    dura and vessels otherwise become a cluster of their own). The features are the differences
    first - second and first - third, in which shading that all scans share cancels.
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
    t1, t2, flair = [scans[MODALITIES.index(name)][healthy] for name in ("t1", "t2", "flair")]
    fluid = two_means(t2, t1, flair)
    found = np.ones(fluid.shape, np.uint8)
    if not fluid.all():
        found[~fluid] = 2 + two_means(t1[~fluid], t2[~fluid], flair[~fluid])
    out[healthy] = found
    return out


def deep_fluid(tissue, brain, spacing, depth=15.0):
    """The ventricles, about: CSF of tissue_clusters further than `depth` mm from the outside of the brain along every
    axis, without what is at most two voxels thin (fissures, sulci). tissue uint8, brain bool, both (X, Y, Z); spacing
    mm (3,) -> bool (X, Y, Z). On phantoms Dice with the exact ventricles is about 0.8, volumes are 15% too large."""
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

    relabel: function (labels, brain, affine) -> other labels (X, Y, Z) in 0..3 that take the place of
    those read. Where they uncover brain, tissue is that of the mirrored side.
    Returns a dict: images uint8 (D, C, R, R), 0 = air; classes uint8 (D, R, R), values index
    CONDITIONS[condition]; position float32 (D,) in [-1, 1] along the brain, beyond it outside;
    labels uint8 and brain bool (X, Y, Z) on the grid of the files; hashes: from case_hashes, of the labels
    read; grid; cut: share of brain voxels outside the field of view.
    """
    scans, labels, affine = read_case(case)
    brain = brain_mask(scans, case.folder)
    hashes, ill = case_hashes(labels, brain), labels > 0
    brain |= ill
    if relabel is not None:
        labels = relabel(labels, brain, affine)
    names = CONDITIONS[condition]
    classes = np.where(labels > 0, labels + (len(names) - len(LABELS) - 1), brain).astype(np.uint8)
    if condition != "tumour":
        tissue = tissue_clusters(scans, brain & (labels == 0) & ~ill)
        if condition == "ventricles":
            tissue = np.where(brain, 1 + deep_fluid(tissue, brain, spacing_of(affine)), 0).astype(np.uint8)
        if relabel is not None:
            across = np.where(brain.any((1, 2)))[0]
            opposite = (across[0] + across[-1] - np.arange(len(brain))).clip(0, len(brain) - 1)
            tissue = np.where(ill, tissue[opposite], tissue)
        classes = np.where(labels > 0, classes, tissue)
        classes[brain & (classes == 0)] = names.index("grey" if condition == "tissue" else "brain")
    for c, name in enumerate(MODALITIES):
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
        raise BadInput(f"{case.folder}: no brain is found in the field of view; check the scans")
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
            raise BadInput(f"{split_file}: cannot be used as a split ({error}); expected JSON like "
                           '{"train": ["CASE"], "val": [], "test": []}') from error
        twice = [name for name, part in pairs if named[name] != part]
        if twice:
            raise BadInput(f"{split_file}: names {twice[0]} in two parts; keep it in one")
        for case in cases:
            part = named.get(case.case, named.get(case.patient))
            if part:
                split[part].append(case)
        unknown = set(named) - {c.case for c in cases} - {c.patient for c in cases}
        if unknown:
            raise BadInput(f"{split_file}: names {sorted(unknown)[0]}, which is not in the data; "
                           "correct the name")
    parts = {}
    for part, members in split.items():
        for case in members:
            if parts.setdefault(case.patient, part) != part:
                raise BadInput(f"patient {case.patient} is in {parts[case.patient]} and in {part}; "
                               "keep all time points of a patient on one side of the split")
    if not split["train"]:
        raise BadInput(f"{len(cases)} cases leave none for training; add cases or give a split file")
    return split


class Cache:
    """Slices of all cases on the model's grid, memory-mapped: 0.1 ms a slice, no workers needed.

    rows      uint8 (N, C + 1, R, R): C modalities, then the class map; slices without brain left out
    cases     list of dicts, one a case: case, patient, part (train/val/test), hashes (see case_hashes),
              first, count (its rows), position [count floats], thickness (mm between slices)
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
        rows = [np.arange(c["first"], c["first"] + c["count"]) for c in self.cases if c["part"] == part]
        return np.concatenate(rows) if rows else np.array([], int)

    def hashes(self, *parts):
        """case_hashes of all cases of these parts, sorted: what a checkpoint says it was trained on."""
        return sorted({digest for c in self.cases if c["part"] in parts for digest in c["hashes"]})

    def batch(self, rows, mirror=None):
        """rows: int (B,) -> x0 float32 (B, C, R, R) in [-1, 1], classes int64 (B, R, R),
        position float32 (B,), all torch tensors on the CPU. mirror: bool (B,), left and right are
        swapped where it is True."""
        block = torch.from_numpy(self.rows[np.asarray(rows)])
        if mirror is not None:
            block = torch.where(mirror.view(-1, 1, 1, 1), block.flip(-1), block)
        return (to_images(block[:, :-1]), block[:, -1].long(),
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
    except (OSError, ValueError, KeyError, EOFError) as error:      # not there, or damaged: built (again)
        if path.exists():
            say(f"note: {path} cannot be used ({error}); made anew")
    path.parent.mkdir(parents=True, exist_ok=True)
    started, entries, first, cut = time.time(), [], 0, []
    raw = path.with_suffix(f".{os.getpid()}.tmp")

    def prepare(case):
        got = prepare_case(case, resolution, fov, condition)
        keep = (got["classes"] > 0).mean((1, 2)) > 0.01
        block = np.concatenate([got["images"], got["classes"][:, None]], 1)[keep]
        return case, block, got["position"][keep], got["hashes"], got["cut"], spacing_of(got["grid"].affine)[2]

    try:
        with open(raw, "wb") as handle, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for at in range(0, len(cases), 8):          # a few at a time: memory stays small
                for case, block, position, hashes, lost, thickness in pool.map(prepare, cases[at:at + 8]):
                    handle.write(block.tobytes())
                    entries.append({"case": case.case, "patient": case.patient,
                                    "part": part_of[case.case], "hashes": hashes, "first": first,
                                    "count": len(block), "position": position.round(5).tolist(),
                                    "thickness": float(thickness)})
                    first += len(block)
                    cut += [case.case] * (lost > 0.002)
        if not first:
            raise BadInput(f"no slice shows enough brain in a field of view of {fov} mm; use a smaller --fov")
        shape = (first, len(MODALITIES) + 1, resolution, resolution)

        def write(temporary):                           # .npy = a header, then the bytes
            with open(temporary, "wb") as handle, open(raw, "rb") as source:
                np.lib.format.write_array_header_1_0(
                    handle, {"descr": "|u1", "fortran_order": False, "shape": shape})
                shutil.copyfileobj(source, handle, 2 ** 22)

        replace_file(path, write)
    finally:
        raw.unlink(missing_ok=True)
    meta = {"condition": condition, "classes": CONDITIONS[condition], "modalities": MODALITIES,
            "resolution": resolution, "fov": fov, "cases": entries, "checksum": checksum(path)}
    replace_file(path.with_suffix(".json"), lambda temporary: temporary.write_text(json.dumps(meta)))
    if cut:
        say(f"note: {len(cut)} cases are wider than the field of view of {fov} mm and lose their edge "
            f"({cut[0]} for one); a larger --fov keeps it")
    say(f"cache: {len(cases)} cases, {first} slices in {time.time() - started:.0f} s -> {path}")
    return Cache(path)


# ================================================================================================
# 4  NOISE PROCESS
# Pure functions of t. No module, no buffer: a schedule that lives in a state_dict gets averaged by
# the EMA or overwritten by a checkpoint, and the samples turn black. Tables are float64 on the CPU.
# ================================================================================================

T = 1000                                        # noise levels t = 0 (clean) .. T (pure noise)


def cosine_alpha_bar(shift=1.0, steps=T):
    """alpha_bar, float64 (steps + 1,): signal = cos(angle), sigma = sin(angle), angle = t/steps * pi/2.

    alpha_bar[0] = 1 and alpha_bar[steps] = 0 exactly: at T nothing of the image is left, so that a
    sampler may start from pure noise and air can come out black [ZSNR].
    shift: factor on sqrt(snr) at every t; where it is 1 the first line holds. Healthy brain spans about a third
    of the range of x0, so noise hides it early: 2 suits slices of 64 pixels. Large pictures survive
    noise better (their pixels repeat each other): keep shift = 128 / resolution [SHIFT].
    DIFFERS: no small offset s near t = 0; v-prediction does not need it.
    """
    angle = torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (math.pi / 2)
    signal, sigma = shift * torch.cos(angle), torch.sin(angle)
    alpha_bar = signal ** 2 / (signal ** 2 + sigma ** 2)
    alpha_bar[0], alpha_bar[-1] = 1.0, 0.0      # cos(pi/2) is 6e-17 in floating point
    return alpha_bar


def signal_sigma(alpha_bar, t):
    """Square roots of alpha_bar and 1 - alpha_bar at t, int64 (B,): signal and sigma, each float32 (B, 1, 1, 1), ready
    to multiply images. alpha_bar is float64: the roots are taken before anything is rounded."""
    level = alpha_bar[t]
    return level.sqrt().float().view(-1, 1, 1, 1), (1 - level).sqrt().float().view(-1, 1, 1, 1)


def add_noise(x0, eps, signal, sigma):
    """x_t = signal * x0 + sigma * eps. All (B, C, H, W) or broadcastable."""
    return signal * x0 + sigma * eps


def v_target(x0, eps, signal, sigma):
    """v = signal * eps - sigma * x0: the derivative of x_t along the angle [VPRED]."""
    return signal * eps - sigma * x0


def split_v(x_t, v, signal, sigma):
    """x_t and v are (x0, eps) turned by the angle; turn back -> (x0, eps) [VPRED].

    x0 = signal * x_t - sigma * v;  eps = sigma * x_t + signal * v. At T this is x0 = -v: no
    division, nothing blows up.
    """
    return signal * x_t - sigma * v, sigma * x_t + signal * v


def min_snr_weight(alpha_bar, t, gamma=5.0, floor=0.05):
    """Loss weight per sample, float32 (B, 1, 1, 1): min(snr, gamma) / (snr + 1), the v form of
    [MINSNR]; 1 everywhere where gamma is 0. t = 0, where snr is infinite, gets `floor`.

    DIFFERS: never below `floor`; at t = T the snr is 0, and a weight of 0 would leave the first
    sampling step untrained.
    """
    level = alpha_bar[t].view(-1, 1, 1, 1)      # snr = level / (1 - level), so snr + 1 = 1 / (1 - level)
    weight = torch.minimum(level, gamma * (1 - level)).clamp(min=floor) if gamma else torch.ones_like(level)
    return weight.float()


def lesion_weight(classes, first_lesion, extra):
    """Loss weight per pixel, float32 (B, 1, H, W): 1 + extra inside tumour labels, 1 elsewhere.

    classes: int (B, H, W); values from first_lesion on are tumour. Tumours cover a few percent of
    the picture and get as little of the gradient.
    """
    return 1 + extra * (classes >= first_lesion).float().unsqueeze(1)


# ================================================================================================
# 5  NETWORKS
# A residual U-Net that takes noisy images, a noise level, a label map and a few scalars, and
# returns v_hat. Widths and group sizes are what ran fastest on CPUs without losing quality.
# ================================================================================================

GROUP = 16      # channels a normalisation group: small groups fall off the fast CPU kernels


def one_hot(classes, n_classes):
    """Class map int64 (B, H, W) -> float32 (B, n_classes, H, W). Every pixel has exactly one 1, so
    all zeros is a state no label map has: the null condition of guidance, see guided_v."""
    return F.one_hot(classes, n_classes).movedim(-1, 1).float()


def sinusoid(value, dim, top=10_000.0):
    """Position code: value (B,), int or float -> float32 (B, dim), dim even: dim/2 sines, then as many cosines, of
    value / top^(2 i / dim), i = 0 .. dim/2 - 1."""
    wave = torch.exp(torch.arange(dim // 2, device=value.device) * (-math.log(top) / (dim // 2)))
    phase = value.float().unsqueeze(1) * wave
    return torch.cat([phase.sin(), phase.cos()], 1)


def zero_init(module):
    """Set weight and bias to zero: the part starts as if it were not there."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def norm(channels):
    """GroupNorm [GN] with GROUP channels a group (one group if channels are fewer or do not divide)."""
    return nn.GroupNorm(channels // GROUP if channels % GROUP == 0 else 1, channels)


def count_parameters(net):
    """How many numbers are learned."""
    return sum(p.numel() for p in net.parameters())


class ResBlock(nn.Module):
    """x (B, c_in, H, W), emb (B, E) -> (B, c_out, H, W).

    norm, SiLU, 3x3; norm * (1 + scale) + shift [ADM]; SiLU, 3x3 that starts at zero; plus the input (through a 1x1
    where the number of channels changes). scale and shift are the first and second half of a linear map of emb,
    which has been through its SiLU already, see UNet.embed.
    """

    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.to_scale_shift = nn.Linear(emb, 2 * c_out)
        self.norm2, self.conv2 = norm(c_out), zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.to_scale_shift(emb)[..., None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Self-attention over all pixels: (B, C, H, W) -> the same; heads of 64 channels (one head where
    that does not divide C). x + to_out(softmax(q k^T / sqrt(channels of a head)) v), where to_qkv(norm(x)) is all of
    q, then all of k, then all of v, each head by head. to_out starts at zero: the layer starts as the identity."""

    def __init__(self, channels):
        super().__init__()
        self.heads = channels // 64 if channels % 64 == 0 else 1
        self.norm = norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)               # (B, heads, H*W, C/heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        return x + self.to_out(y)


class UNet(nn.Module):
    """x_t (B, channels, H, W), t (B,), onehot (B, classes, H, W), scalars (B, S) -> an image like
    x_t (or with out_channels), from which precondition makes v_hat. Where a pixel lies, row and
    column in [-1, 1], joins as two more channels. Any H and W: padded inside, cropped after. [UNET]

    width, mults   channels of level i are width * mults[i]; every level halves height and width
    blocks         residual blocks a level
    patch          p x p pixels become channels in front (pixel-unshuffle) and pixels again behind:
                   the network then works on H/p x W/p, three to four times cheaper at p = 2
    fine           channels of the one block at full resolution that comes last
    scalars        conditions that are one number each, about -1..1; NaN means not given, a state
                   of its own. They enter the time embedding through a layer that starts at zero.
    """

    def __init__(self, channels=4, classes=5, width=64, mults=(1, 2, 2), blocks=1, patch=4,
                 fine=32, scalars=1, out_channels=None):
        super().__init__()
        self.channels, self.classes, self.out_channels = channels, classes, out_channels or channels
        self.patch, self.multiple = patch, patch * 2 ** (len(mults) - 1)
        widths = [width * m for m in mults]
        self.emb = emb = 4 * width
        self.time = nn.Sequential(nn.Linear(emb, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.scalar = nn.Sequential(nn.Linear(scalars * 33, emb), nn.SiLU(),
                                    zero_init(nn.Linear(emb, emb)))
        self.conv_in = nn.Conv2d((channels + classes + 2) * patch ** 2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, kept = width, []
        for i, w in enumerate(widths):
            level = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(blocks):
                level["blocks"].append(ResBlock(c, w, emb))
                c = w
                kept.append(c)
            if i + 1 < len(widths):
                level["shrink"] = nn.Conv2d(c, c, 3, stride=2, padding=1)
            self.down.append(level)
        self.middle1, self.attention, self.middle2 = ResBlock(c, c, emb), Attention(c), ResBlock(c, c, emb)
        for i, w in reversed(list(enumerate(widths))):
            level = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(blocks):
                level["blocks"].append(ResBlock(c + kept.pop(), w, emb))
                c = w
            if i > 0:
                level["grow"] = nn.ConvTranspose2d(c, widths[i - 1], 2, stride=2)
                c = widths[i - 1]
            self.up.append(level)
        # one block at full resolution has the last word: noise is fine-grained, and learning to
        # remove it through folded pixels takes several times as many steps
        self.norm_coarse, self.unfold = norm(c), nn.Conv2d(c, fine * patch ** 2, 1)
        self.fine_in, self.fine = nn.Conv2d(channels + classes + 2, fine, 3, padding=1), ResBlock(fine, fine, emb)
        self.norm_out, self.conv_out = norm(fine), zero_init(nn.Conv2d(fine, self.out_channels, 3, padding=1))

    def hidden(self):
        """The weights inside, as [MUON] wants them: all that have two axes or more, but for those of the first and
        last layers."""
        ends = ("conv_in", "fine_in", "time", "scalar", "conv_out")
        return [p for name, p in self.named_parameters() if p.ndim > 1 and not name.startswith(ends)]

    def embed(self, t, scalars):
        """t (B,), scalars (B, S) -> embedding (B, E)."""
        emb = self.time(sinusoid(t, self.emb))
        given = (~torch.isnan(scalars)).float()                             # (B, S)
        value = torch.nan_to_num(scalars)
        code = sinusoid(value.flatten() * 100, 32).view(*value.shape, 32)   # (B, S, 32)
        code = torch.cat([code, torch.ones_like(code[..., :1])], -1) * given.unsqueeze(-1)
        return F.silu(emb + self.scalar(code.flatten(1)))

    def forward(self, x_t, t, onehot, scalars):
        height, width = x_t.shape[-2:]
        place = [torch.linspace(-1, 1, n, device=x_t.device) for n in (height, width)]
        place = torch.stack(torch.meshgrid(place, indexing="ij")).expand(len(x_t), -1, -1, -1)
        x = torch.cat([x_t, onehot, place.to(x_t.dtype)], 1)                # (B, C + K + 2, H, W)
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))                  # (B, width, H/p, W/p)
        emb, kept = self.embed(t, scalars), []
        for level in self.down:
            for block in level["blocks"]:
                h = block(h, emb)
                kept.append(h)
            if "shrink" in level:
                h = level["shrink"](h)                                      # half the height, width
        h = self.middle2(self.attention(self.middle1(h, emb)), emb)
        for level in self.up:
            for block in level["blocks"]:
                h = block(torch.cat([h, kept.pop()], 1), emb)
            if "grow" in level:
                h = level["grow"](h)                                        # twice the height, width
        h = F.pixel_shuffle(self.unfold(F.silu(self.norm_coarse(h))), self.patch)     # (B, fine, H, W)
        h = self.fine(h + self.fine_in(x), emb)
        return self.conv_out(F.silu(self.norm_out(h)))[..., :height, :width]          # (B, C, H, W)


def expected(prior, onehot, position):
    """What the prior expects of every pixel before any network is asked: mean and std, (B, C, H, W).

    prior: from measure_prior; onehot (B, K, H, W), the last row of its tables is used where that is
    all zeros; position (B,), between whose two nearest slabs the atlas is interpolated. Where the
    position is NaN, and outside healthy brain, the tables alone speak. A prior of "shares" takes onehot at its word:
    it holds, for every channel of the picture, the share of the class there (see slab_shares).
    """
    if "shares" in prior:
        mean = 2 * onehot - 1
        return mean, (1 - mean ** 2).clamp(min=float(prior["shares"]) ** 2).sqrt()
    known = torch.cat([onehot, 1 - onehot.sum(1, keepdim=True)], 1)         # (B, K + 1, H, W)
    mean, std = [torch.einsum("bkhw,kc->bchw", known, table) for table in prior["classes"]]
    if "atlas" in prior:
        slabs = prior["atlas"].shape[1]
        at = ((torch.nan_to_num(position) + 1) / 2 * slabs - 0.5).clamp(0, slabs - 1)
        low = at.long()
        high, share = (low + 1).clamp(max=slabs - 1), (at - low).view(-1, 1, 1, 1)
        brain, its = (onehot[:, 1:2], 1) if onehot.shape[1] else (known, 0)     # without labels: everywhere
        there = brain * (~torch.isnan(position)).view(-1, 1, 1, 1)
        mean, std = [flat + there * (torch.lerp(atlas[low], atlas[high], share) - table[its].view(1, -1, 1, 1))
                     for flat, atlas, table in zip((mean, std), prior["atlas"], prior["classes"])]
    return mean, std


def prior_error(signal, sigma, std):
    """How far off the best guess of v is on average when a pixel comes from N(mean, std^2) and nothing else is
    known: std / sqrt(std^2 signal^2 + sigma^2). From 1 at clean (std > 0) to std at pure noise.

    It is the unit of what the network learns, see precondition, and of the loss, see train_ddpm.py.
    signal, sigma (B, 1, 1, 1); std (B, C, H, W), above 0 -> (B, C, H, W).
    """
    return std / ((std * signal) ** 2 + sigma ** 2).sqrt()


def precondition(out, x_t, signal, sigma, mean, std):
    """What the network says on top of what needs no network -> v_hat (B, C, H, W), float32.

    If every pixel were a number from N(mean, std^2), the best v were known in closed form:
    sigma (signal (1 - std^2) x_t - mean) / (std^2 signal^2 + sigma^2), and its error were prior_error.
    So v_hat = that + that error * out: the network learns how pixels hang together, starts right about
    air and the mean brain, and its task has about unit size at every t. This is the preconditioning of
    [EDM] with a Gaussian for each pixel instead of one for all.

    out: the network's output (B, C, H, W), maybe bfloat16; signal, sigma (B, 1, 1, 1); mean, std: from expected.
    """
    guess = sigma * (signal * (1 - std ** 2) * x_t - mean) / ((std * signal) ** 2 + sigma ** 2)
    return guess + prior_error(signal, sigma, std) * out.float()


# ================================================================================================
# 6  DEVICES
# The only section that names cpu, cuda, mps or xla, and that knows how many of them share a batch. There
# are two ways to use several. torchrun starts one process for each; every process takes its share of the
# global batch and DistributedDataParallel averages the gradients. XLA on a TPU needs one process for all
# its cores: arrays are marked as split along the batch, and the compiler puts the communication in [GSPMD].
# ================================================================================================

DEVICES = ("auto", "cpu", "cuda", "mps", "xla")
PRECISIONS = ("auto", "float32", "bfloat16")


def pick_device(name="auto", several=False):
    """"auto", "cpu", "cuda", "mps" or "xla" -> torch.device. auto takes the fastest of the first three; a
    device asked for by name that is not there is a BadInput, never a silent fall-back.

    several: whether the caller can share its work with other processes. Under torchrun they are joined
    here, each with a GPU of its own; only the first one prints from now on.
    """
    if name == "xla":
        return pick_xla()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there.get(name):
        raise BadInput(f"--device {name}: PyTorch {torch.__version__} finds no such device here; "
                       "use --device auto")
    if name == "cpu":
        torch.set_flush_denormal(True)          # tiny numbers cost time and mean nothing
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(name)
    number = int(os.environ["LOCAL_RANK"])
    if not several:
        raise BadInput("this command runs in one process; start it with python, not with torchrun")
    if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise BadInput("the processes of torchrun must be on one machine; start it there alone")
    if name == "mps":
        raise BadInput("--device mps drives one GPU; start it with python, or give --device cpu")
    if name == "cuda" and number >= torch.cuda.device_count():
        raise BadInput(f"--device cuda: no GPU here for process {number + 1}; start fewer, or give --device cpu")
    if name == "cuda":
        torch.cuda.set_device(number)
    # the others wait while the first one makes phantoms, a cache, pictures: however long that takes
    dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", timeout=timedelta(days=7))
    if not first_process():
        sys.stdout = open(os.devnull, "w")
    return torch.device(name, number) if name == "cuda" else torch.device(name)


def pick_xla():
    """The XLA device, standing for all devices of this machine together (SPMD). BadInput without torch_xla or
    without a TPU; PJRT_DEVICE=CPU in the environment asks for XLA on the CPU."""
    asked = os.environ.get("PJRT_DEVICE")       # torch_xla sets it itself where it is not set
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("--device xla drives all devices from one process; start it with python, not with torchrun")
    try:
        import torch_xla
        import torch_xla.runtime as xr
        xr.use_spmd()
        device, found = torch_xla.device(), xr.device_type()
        xla_devices()                           # asks for the devices, which are not looked for before
    except ImportError as error:
        raise BadInput(f"--device xla: torch_xla cannot be imported ({str(error).splitlines()[0]}); "
                       "pip install -r requirements-tpu.txt") from error
    except (RuntimeError, OSError) as error:
        raise BadInput(f"--device xla: XLA cannot use a {asked or 'TPU'} here ({str(error).splitlines()[0]}); on a TPU "
                       "machine pip install -r requirements-tpu.txt") from error
    if xr.process_count() > 1:
        raise BadInput("--device xla drives the devices of one machine; a pod of several is not supported")
    if found == "CPU" and asked != "CPU":
        raise BadInput("--device xla: there is no TPU here; PJRT_DEVICE=CPU in front of the command runs XLA on "
                       "the CPU")
    return device


def describe(device, precision="auto"):
    """The device really used, for the first line of a log: "device cpu x 2, float32". precision: of PRECISIONS."""
    name, count = device.type, processes()
    if name == "cuda":
        name = f"cuda ({torch.cuda.get_device_name(device)})"
    if name == "xla":
        import torch_xla.runtime as xr
        name, count = f"xla ({xr.device_type()})", xla_devices()
    return f"device {name}{f' x {count}' if count > 1 else ''}, " + (
        "bfloat16" if uses_bf16(device, precision) else "float32")


def processes():
    """How many processes share a batch: those torchrun started, else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Which of them this one is, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_process():
    """Whether this process is the one that prints, writes and draws."""
    return rank() == 0


def leave_processes():
    """Part from the others when training is over -> whether this was the first process, which goes on alone.

    Nobody may hold the network of prepare_training any more: DistributedDataParallel that outlives its group
    can crash on the way out."""
    first = first_process()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    return first


def share_of(batch):
    """Which samples of a global batch this process works on: a slice."""
    mine = batch // processes()
    return slice(rank() * mine, (rank() + 1) * mine)


def require_divisible(batch, device):
    """BadInput unless a global batch divides evenly: unequal parts would not count the same in a mean."""
    count = xla_devices() if device.type == "xla" else processes()
    if batch % count:
        raise BadInput(f"--batch {batch}: does not divide evenly over {count} devices; choose a multiple of {count}")


def in_turn(make):
    """make() in the first process alone and then in all others, who find on disk what it wrote."""
    if first_process():
        made = make()
    if processes() > 1:
        dist.barrier()
    return made if first_process() else make()


def agreed(value):
    """The first process's number, in all of them: clocks differ, and all must stop at the same step."""
    if processes() == 1:
        return value
    told = torch.tensor(float(value), dtype=torch.float64)
    dist.broadcast(told, 0)
    return told.item()


def gathered(tensor):
    """tensor (B / processes, ...) of every process -> (B, ...) in the order of the global batch."""
    if processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class SumOverProcesses(torch.autograd.Function):
    """Forward: the sum of a tensor over all processes. Every process's result depends on every process's tensor,
    so the gradient is the sum of theirs; DistributedDataParallel, which takes the mean of all processes' gradients,
    then makes it that of one loss."""

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient.contiguous())


@torch.compiler.disable
def summed(tensor):
    """Sum of a tensor over all processes, differentiable: what is no mean over samples needs it."""
    return SumOverProcesses.apply(tensor) if processes() > 1 else tensor


class BatchNorm(nn.BatchNorm2d):
    """x (B, C, H, W) -> (x - mean) / sqrt(variance + eps) * weight + bias for each channel [BN]. While training,
    mean and variance (sum / n) are those of all n values in the global batch, and running_mean and running_var
    move towards mean and variance n / (n - 1) by the share `momentum`; in evaluation those are used.

    Written out for several processes, since torch's own sees only the share of one, and for XLA, whose running
    variance lacks the factor n / (n - 1)."""

    def forward(self, x):
        if not self.training or processes() == 1 and x.device.type != "xla":
            return super().forward(x)
        n = x.numel() // x.shape[1] * processes()
        mean = summed(x.float().mean((0, 2, 3))) / processes()
        centred = x.float() - mean.view(-1, 1, 1)
        variance = summed((centred ** 2).mean((0, 2, 3))) / processes()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


def xla_devices():
    """How many devices XLA drives: the cores of a TPU, or virtual ones of the CPU."""
    import torch_xla.runtime as xr
    return xr.global_runtime_device_count()


def xla_sharding(axes, split):
    """How XLA shall lay out an array of so many axes: split along the first one, or whole on every device ->
    (mesh of all devices, the mesh's axis or None for each axis of the array)."""
    import torch_xla.distributed.spmd as xs
    mesh = xs.Mesh(np.arange(xla_devices()), (xla_devices(),), ("batch",))
    return mesh, ("batch", *[None] * (axes - 1)) if split else (None,) * axes


def to_device(device, *tensors):
    """The tensors (B, ...), on the device; on XLA split along the batch over all of them, or whole on each where
    their number does not divide B."""
    if device.type != "xla":
        return [tensor.to(device) for tensor in tensors]
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as xs
    return [xm.send_cpu_data_to_device([tensor], device, xs.ShardingSpec(
        *xla_sharding(tensor.ndim, len(tensor) % xla_devices() == 0)))[0] for tensor in tensors]


def to_host(tree):
    """A tensor, or a dict or list of them (nested, other values among them), with every tensor on the CPU and
    detached. From XLA all come in one transfer: one by one, each waits for the one before."""
    if "torch_xla" in sys.modules:              # else there is nothing of it to move
        import torch_xla.core.xla_model as xm
        at_once = getattr(xm, "_maybe_convert_to_cpu", None)        # not a public name: without it, one by one
        tree = at_once(tree) if at_once else tree
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: to_host(value) for key, value in tree.items()}
    return type(tree)(to_host(value) for value in tree) if isinstance(tree, (list, tuple)) else tree


def place_network(net, device):
    """net on the device, its weights laid out channels last, as convolutions like it; on XLA whole on every one."""
    if device.type != "xla":
        return net.to(device, memory_format=torch.channels_last)
    net = net.to(device)
    mark_whole([*net.parameters(), *net.buffers()])
    return net


def mark_whole(tensors):
    """Tell XLA that every device holds these tensors whole, before a graph is made that would guess it."""
    import torch_xla
    import torch_xla.distributed.spmd as xs
    for tensor in tensors:
        xs.mark_sharding(tensor, *xla_sharding(tensor.ndim, split=False))
    torch_xla.sync()


def optimizer_form(device):
    """The form of AdamW that is fastest on the device, as torch's words for it: one kernel for all weights; on XLA
    with the step count as a tensor: as a Python number it decides what the graph looks like (two numbers that are
    equal become one), and step 2 is compiled anew."""
    return {"fused": device.type in ("cpu", "cuda"), "capturable": device.type == "xla"}


def prepare_training(net, optimizer, device, compiled=False):
    """What a training loop calls in place of net, whose parameters it shares: with gradients averaged over
    processes, or through torch.compile. Call it once net and optimizer hold what they start from.

    BadInput for torch.compile on XLA.
    """
    if device.type == "xla":
        if compiled:
            raise BadInput("--compile: XLA compiles by itself; leave it out")
        mark_whole([its for state in optimizer.state.values() for its in state.values()])
    if processes() > 1:
        net = nn.parallel.DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)
    return torch.compile(net) if compiled else net


def step_if_finite(device, optimizer, losses, norm):
    """optimizer.step() where all losses (B,) and the norm of all gradients are finite -> whether they are: bool
    tensor (). Where they are not, weights and the optimiser's state stay as they are, in every process.

    On XLA both outcomes are computed and one is chosen, so that the graph is the same.
    """
    finite = losses.isfinite().all() & norm.isfinite()
    if processes() > 1:
        flag = finite.int()
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        finite = flag > 0
    if device.type != "xla":
        if finite:
            optimizer.step()
        return finite
    with torch.no_grad():
        kept = [p for group in optimizer.param_groups for p in group["params"]]
        kept += [its for state in optimizer.state.values() for its in state.values()]
        before = [tensor.clone() for tensor in kept]
        optimizer.step()
        for tensor, old in zip(kept, before):
            tensor.copy_(torch.where(finite, tensor, old))
    return finite


def end_step(device, *read):
    """On XLA everything since the last call becomes one graph and is run; elsewhere it has run already.
    read: tensors that will be looked at later, which the graph then gathers from all devices."""
    if device.type == "xla":
        mark_whole(read)


def in_parts(device, function, batch, *tensors):
    """function(*parts) for every `batch` rows of the tensors (N, ...), joined and on the CPU. On XLA the last
    part is filled up with copies of its last row, so that all parts are the same graph."""
    out = []
    for parts in zip(*(tensor.split(batch) for tensor in tensors)):
        n = len(parts[0])
        if n < batch and device.type == "xla":
            parts = [torch.cat([part, part[-1:].expand(batch - n, *part.shape[1:])]) for part in parts]
        got = function(*parts)
        end_step(device, got)
        out.append(got.cpu()[:n])
    return torch.cat(out)


def xla_report():
    """What XLA did so far, in words; "" where it was not used. Ops it cannot compile run on the CPU instead and cut
    a graph in two."""
    if "torch_xla" not in sys.modules:
        return ""
    import torch_xla.debug.metrics as met
    count, nanoseconds, *_ = met.metric_data("CompileTime") or (0, 0)
    fallen = sorted(name for name in met.counter_names() if name.startswith("aten::"))
    return (f"XLA compiled {count} graphs in {nanoseconds / 1e9:.1f} s; run on the CPU instead: "
            + (", ".join(fallen) or "nothing"))


def uses_bf16(device, precision="auto"):
    """Whether layers compute in bfloat16: as asked for, or, "auto", where that is faster than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cpu":
        can = getattr(torch.cpu, "get_capabilities", dict)()        # older torch cannot tell
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    if device.type == "xla":
        import torch_xla.runtime as xr
        return xr.device_type() == "TPU"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def fast_math(device, precision="auto"):
    """Context in which layers compute in bfloat16 where uses_bf16 says so; weights, the noise process and the
    loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


# ================================================================================================
# 7  SAMPLING
# Every sampler here is a straight line through what is known: x_s = a x_t + b x0_hat + c (x0_hat of
# the step before) + d noise. So a sampler is four numbers a step, made in float64 from alpha_bar at
# the levels really visited ("t minus T // n" is wrong as soon as steps are uneven).
# ================================================================================================


def timesteps(steps):
    """Noise levels a sampler visits: int64 tensor (steps + 1,), evenly spaced from T down to 0, rounded to the nearest;
    steps in 1..T."""
    return torch.linspace(T, 0, steps + 1, dtype=torch.float64).round().long()


def ddpm_step(before, after):
    """Ancestral sampling: x_s = a x_t + b x0_hat + d noise is drawn from q(x_s | x_t, x0) [DDPM]. before, after:
    floats, alpha_bar before (at t) and after (at s < t) the step -> (a, b, c, d), c = 0, d a standard deviation. With
    ratio = before / after, the share of power that one step back keeps:
        a = sqrt(ratio) (1 - after) / (1 - before),  b = sqrt(after) (1 - ratio) / (1 - before),
        d^2 = (1 - ratio) (1 - after) / (1 - before)
    """
    ratio = before / after
    a = math.sqrt(ratio) * (1 - after) / (1 - before)
    b = math.sqrt(after) * (1 - ratio) / (1 - before)
    return a, b, 0.0, math.sqrt((1 - ratio) * (1 - after) / (1 - before))


def ddim_step(before, after, eta=0.0):
    """x_s = signal_s x0 + sqrt(sigma_s^2 - d^2) eps + d noise, with eps = (x_t - signal_t x0)/sigma_t
    and d = eta sigma_s/sigma_t sqrt(1 - before/after) [DDIM]. eta 0: no noise, eta 1: DDPM. Returns (a, b, 0, d) as
    ddpm_step; sigma_s^2 - d^2 may come out a little below 0 by rounding and is 0 then."""
    d = eta * math.sqrt((1 - after) / (1 - before) * (1 - before / after))
    along_eps = math.sqrt(max(1 - after - d * d, 0.0)) / math.sqrt(1 - before)
    return along_eps, math.sqrt(after) - along_eps * math.sqrt(before), 0.0, d


def dpmpp_step(earlier, before, after):
    """DPM-Solver++(2M) [DPM++]. earlier: alpha_bar one step before `before`, None in step one.

    x_s = sigma_s/sigma_t x_t + k D,  k = signal_s - signal_t sigma_s/sigma_t,
    D = (1 + 1/(2r)) x0_hat - 1/(2r) x0_hat_earlier,  r = h_earlier / h,  h = step in log(signal/sigma).
    Where earlier is None or 0 (log-snr is -infinity there) or after is 1 (+infinity) r has no meaning: D = x0_hat.
    Returns (a, b, c, 0): shares of x_t, x0_hat, x0_hat_earlier and noise.
    """
    ratio = math.sqrt((1 - after) / (1 - before))
    k = math.sqrt(after) - math.sqrt(before) * ratio
    if earlier is None or earlier <= 0 or after >= 1:
        return ratio, k, 0.0, 0.0
    half_log_snr = [0.5 * math.log(level / (1 - level)) for level in (earlier, before, after)]
    r = (half_log_snr[1] - half_log_snr[0]) / (half_log_snr[2] - half_log_snr[1])
    return ratio, k * (1 + 0.5 / r), -k * 0.5 / r, 0.0


def sampler_table(levels, sampler="ddim", eta=0.0):
    """levels: alpha_bar at the S + 1 levels visited, increasing from 0 (noise) to 1 (clean).

    Returns float32 (S, 6): signal and sigma before the step, then a, b, c, d. sampler: "ddpm",
    "ddim" (eta in 0..1) or "dpmpp". Computed in float64.
    """
    levels, rows = [float(level) for level in levels], []
    for i, (before, after) in enumerate(zip(levels, levels[1:])):
        step = {"ddpm": lambda: ddpm_step(before, after),
                "ddim": lambda: ddim_step(before, after, eta),
                "dpmpp": lambda: dpmpp_step(levels[i - 1] if i else None, before, after)}[sampler]()
        rows.append([math.sqrt(before), math.sqrt(1 - before), *step])
    return torch.tensor(rows, dtype=torch.float64).float()


@torch.no_grad()
def sample(predict_v, x, visited, table, noise=None, clip=True):
    """Walk x from the first level visited to the last. x: (B, C, H, W), at T standard normal noise.

    predict_v  function (x_t, level) -> v_hat; gets the entries of `visited` in turn (S + 1 of them,
               the last is where the walk ends and is not asked for)
    table      from sampler_table at these levels
    noise      function of the step number, from 0 -> noise shaped like x; needed where a row's d is not 0
    clip       keep x0_hat in [-1, 1], where images live; "the x0_hat of the step before" is the clipped one
    """
    x0_earlier = torch.zeros_like(x)
    for i, (signal, sigma, a, b, c, d) in enumerate(table.to(x.device)):
        x0_hat, _ = split_v(x, predict_v(x, visited[i]), signal, sigma)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        x = a * x + b * x0_hat + c * x0_earlier
        if table[i, 5] > 0:                     # the table on the CPU: no wait for the device
            x = x + d * noise(i)
        x0_earlier = x0_hat
    return x


@dataclass
class Denoiser:
    """A trained network with all that is needed to ask it for v_hat."""
    net: UNet
    prior: dict                                 # from measure_prior
    alpha_bar: torch.Tensor                     # (T + 1,)
    device: torch.device
    batch: int = 32                             # slices a call of the network, for memory only

    @torch.no_grad()
    def __call__(self, x_t, t, onehot, scalars):
        """x_t (N, C, H, W), t int (N,), onehot (N, K, H, W), scalars (N, S), all on the CPU ->
        v_hat float32 (N, C, H, W) on the CPU."""
        return in_parts(self.device, self.ask, self.batch, x_t, t, onehot, scalars)

    def ask(self, x_t, t, onehot, scalars):
        """The same for one part of N, from the CPU, left on the device."""
        mean, std = expected(self.prior, onehot, scalars[:, 0])
        x_t, t, onehot, scalars, mean, std, signal, sigma = to_device(
            self.device, x_t, t, onehot, scalars, mean, std, *signal_sigma(self.alpha_bar, t))
        with fast_math(self.device):
            out = self.net(x_t, t, onehot, scalars)
        return precondition(out, x_t, signal, sigma, mean, std)


def guided_v(denoiser, x_t, t, onehot, scalars, scale=1.0, rescale=0.7):
    """Classifier-free guidance [CFG]: v_null + scale (v_cond - v_null); one call at scale 1.

    denoiser: function (x_t, t, onehot, scalars) -> v_hat. The null condition drops the label map
    (all zeros, which no label map is) and every scalar but the first, the slice's position.
    rescale: share by which the result is brought back to the spread of v_cond per sample, without
    which large scales blow contrast up and turn air grey [ZSNR]:
    v (1 - rescale + rescale std(v_cond) / std(v)), std over all axes but B. Two calls, one after the other.
    """
    v_cond = denoiser(x_t, t, onehot, scalars)
    if scale == 1.0:
        return v_cond
    position, wanted = scalars[:, :1], scalars[:, 1:]
    v = denoiser(x_t, t, torch.zeros_like(onehot), torch.cat([position, torch.full_like(wanted, torch.nan)], 1))
    v = v + scale * (v_cond - v)
    spread = v_cond.std((1, 2, 3), keepdim=True) / v.std((1, 2, 3), keepdim=True)
    return v * (1 - rescale + rescale * spread)


def generator(*key):
    """A CPU random generator that is a pure function of `key` (seed, what for, step, ...).

    Nothing is ever continued from a stored state: what is drawn at step 700 depends on 700 alone,
    so a killed run resumes bit for bit and a sample depends on its own number only.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def volume_noise(key, shape, coherence, thickness):
    """Standard normal noise (D, C, H, W), float32, whose neighbouring slices agree.

    The correlation of two slices dz mm apart is exp(-dz^2 / (2 coherence^2)); each voxel alone is
    N(0, 1). Away from the ends, that is, and where coherence is no less than thickness: slices of white noise, drawn
    from generator(*key), are mixed with weights exp(-dz^2 / coherence^2), whose squares sum to 1 for every slice.
    coherence 0: independent slices. thickness: mm between slices.
    """
    white = torch.randn(shape, generator=generator(*key))
    if coherence <= 0:
        return white
    z = torch.arange(shape[0], dtype=torch.float64) * thickness
    mix = torch.exp(-((z[:, None] - z[None]) / coherence) ** 2)
    mix = (mix / mix.norm(dim=1, keepdim=True)).float()
    return (mix @ white.flatten(1)).view(shape)


# How sample.py and the pictures of a training run sample unless told otherwise. interval: guidance
# acts while t / T lies in it [RANGE]; coherence: mm along z, see volume_noise.
SAMPLING = {"steps": 20, "sampler": "dpmpp", "eta": 0.0, "guidance": 1.0, "rescale": 0.7,
            "interval": (0.2, 0.8), "coherence": 4.0}


def sample_guided(denoiser, onehot, scalars, noise, settings=SAMPLING):
    """Sample with the number of calls, the sampler and the guidance of settings, see SAMPLING: onehot (N, K, H, W) and
    scalars (N, S), the condition; noise: function of "start" or of a step -> float (N, C, H, W), standard normal.
    Returns float32 (N, C, H, W) on the CPU."""
    visited = timesteps(settings["steps"])
    table = sampler_table(denoiser.alpha_bar[visited], settings["sampler"], settings["eta"])

    def predict_v(x, t):
        low, high = settings["interval"]
        scale = settings["guidance"] if low <= int(t) / T <= high else 1.0
        return guided_v(denoiser, x, t.expand(len(x)), onehot, scalars, scale, settings["rescale"])

    return sample(predict_v, noise("start"), visited, table, noise)


def sample_volume(denoiser, classes, position, thickness, key, settings=SAMPLING):
    """One whole volume: label map in, images out, slice by slice with noise shared along z.

    classes int (D, H, W); position float (D,); thickness: mm between slices; settings: see
    SAMPLING; key: (seed, case number), from which all noise follows; how many slices a network call
    takes changes the result by rounding only. Returns float32 (D, C, H, W) in [-1, 1] on the CPU.
    """
    shape = (len(classes), denoiser.net.channels, *classes.shape[1:])

    def noise(step):
        return volume_noise((*key, step), shape, settings["coherence"], thickness)

    return sample_guided(denoiser, one_hot(classes, denoiser.net.classes), position[:, None], noise, settings)


# ================================================================================================
# 8  SEGMENTER
# A U-Net whose encoder is a ResNet [RESNET], parameter for parameter the one of torchvision, so that
# its published weights fit. Scans in, one map of logits for each region or label out.
# ================================================================================================

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}      # depth: residual blocks a stage
WEIGHTS_URL = "https://download.pytorch.org/models/"
WEIGHTS = {18: "resnet18-f37072fd.pth", 34: "resnet34-b627a593.pth", 50: "resnet50-11ad3fa6.pth"}


class ResNetBlock(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H/stride, W/stride): relu(x + convolutions(x)) [RESNET].

    Two 3x3 convolutions, c_out = c; or, as bottleneck, 1x1, 3x3, 1x1 with c_out = 4c. A batch norm
    follows each; the stride is that of the first 3x3. Where size or channels change, the input passes
    a 1x1 convolution and a norm (downsample) before it is added.
    """

    def __init__(self, c_in, c, stride, bottleneck):
        super().__init__()
        c_out = 4 * c if bottleneck else c
        shapes = [(c_in, c, 1, 1), (c, c, 3, stride), (c, c_out, 1, 1)] if bottleneck else [
            (c_in, c, 3, stride), (c, c, 3, 1)]
        self.convolutions = len(shapes)
        for i, (a, b, kernel, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", BatchNorm(b))
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), BatchNorm(c_out))

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.convolutions == 3:
            h = self.bn3(self.conv3(F.relu(h)))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Encoder: x (B, channels, H, W) -> [features at 1/2, 1/4, 1/8, 1/16, 1/32 of H and W].

    Names and shapes of parameters and buffers are those of torchvision's resnet18, 34 and 50 without
    fc; only conv1 has `channels` inputs instead of 3. widths: channels of the five outputs.
    """

    def __init__(self, depth, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False), BatchNorm(64)
        self.widths = [64]
        for i, blocks in enumerate(STAGES[depth]):
            c, c_in, stage = 64 * 2 ** i, self.widths[-1], []
            for j in range(blocks):
                stage.append(ResNetBlock(c_in, c, 2 if i and not j else 1, depth == 50))
                c_in = 4 * c if depth == 50 else c
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            self.widths.append(c_in)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        kept = [F.relu(self.bn1(self.conv1(x)))]                # (B, 64, H/2, W/2)
        h = F.max_pool2d(kept[0], 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            h = stage(h)
            kept.append(h)
        return kept


class TwoConvolutions(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H, W): two times 3x3 convolution, norm, ReLU."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), norm(c_out)
        self.conv2, self.norm2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), norm(c_out)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResUNet(nn.Module):
    """images (B, channels, H, W) in [-1, 1] -> logits (B, outputs, H, W): WT, TC, ET to be squashed by
    a sigmoid each (predict "regions"), or background, NCR, ED, ET by one softmax ("labels").

    Any H and W: padded with air to multiples of 32 inside, cropped after. depth: 18, 34 or 50. Going up,
    each level is a transposed convolution to twice the size, the encoder's features of that size beside it,
    and two convolutions; for the last level, where the encoder has none, two convolutions look at the scan.

    The head's logits are multiplied by 8 and start at -3 for everything that is tumour: nearly all pixels
    are not, and Adam, which moves every weight by about the learning rate, would spend hundreds of steps
    on making small logits large.
    """
    GAIN = 8.0

    def __init__(self, depth=18, channels=4, predict="regions", width=(256, 128, 64, 32, 16)):
        super().__init__()
        self.channels, self.predict = channels, predict
        self.encoder, self.fine = ResNet(depth, channels), TwoConvolutions(channels, width[-1])
        self.grow, self.merge = nn.ModuleList(), nn.ModuleList()
        c, skips = self.encoder.widths[-1], [*self.encoder.widths[-2::-1], width[-1]]
        for c_skip, c_out in zip(skips, width):
            self.grow.append(nn.ConvTranspose2d(c, c_out, 2, stride=2))
            self.merge.append(TwoConvolutions(c_out + c_skip, c_out))
            c = c_out
        self.head = nn.Conv2d(c, 3 if predict == "regions" else 4, 1)
        nn.init.zeros_(self.head.bias)
        self.head.bias.data[-3:] = -3 / self.GAIN

    def forward(self, images):
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % 32, 0, -height % 32), value=-1.0)
        kept = self.encoder(x)
        h = kept[-1]                                            # (B, 512 or 2048, H/32, W/32)
        for grow, merge, skip in zip(self.grow, self.merge, [*kept[-2::-1], self.fine(x)]):
            h = merge(torch.cat([grow(h), skip], 1))            # twice the height and width
        return self.GAIN * self.head(h)[..., :height, :width]


def inflate(weight, channels):
    """First convolution (O, 3, h, w) of a network for colour pictures -> (O, channels, h, w): each
    channel gets the sum over colours / channels, so that a grey picture gives the same activation."""
    return weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels


def load_encoder(encoder, depth, source):
    """Put published ResNet weights into a ResNet of this depth. source: path of a state dict in
    torchvision's names, or "imagenet": torchvision's own file, downloaded once, its hash checked.

    Strict: every name and shape must fit (fc.* aside, conv1 is inflated). BadInput otherwise.
    """
    try:
        if source == "imagenet":
            state = torch.hub.load_state_dict_from_url(WEIGHTS_URL + WEIGHTS[depth], map_location="cpu",
                                                       check_hash=True, weights_only=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        state["conv1.weight"] = inflate(state["conv1.weight"], encoder.conv1.in_channels)
        encoder.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if source == "imagenet":
            raise BadInput(f"--weights imagenet: {WEIGHTS_URL}{WEIGHTS[depth]} cannot be had ({reason}); download "
                           "it where there is a network and give its path") from error
        raise BadInput(f"{source}: no weights of a ResNet-{depth} in torchvision's names ({reason}); give the file "
                       f"{WEIGHTS[depth]} or leave --weights out") from error


# ================================================================================================
# 9  SEGMENTATION
# Regions, losses, augmentation, and the figures BraTS counts: per region and per *case* (the whole
# volume). A mean over slices is another, kinder number; so is calling NCR, ED, ET "WT, TC, ET".
# ================================================================================================

REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}   # whole tumour, tumour core, enhancing [BRATS]
HD95_MISSED = 373.13                    # mm, where exactly one of two masks is empty: as BraTS counts


def regions_of(labels):
    """Labels int (...) in 0..3 -> bool (3, ...): WT, TC, ET, each a union of labels."""
    return torch.stack([sum(labels == k for k in members) > 0 for members in REGIONS.values()])


def labels_of(probability, predict):
    """Probabilities (K, ...) -> labels uint8 (...) in 0..3.

    predict "labels": the likeliest of background, NCR, ED, ET. "regions": channels WT, TC, ET; the BraTS way, each
    where it is above one half overwrites the one before: WT becomes ED, then TC becomes NCR, then ET becomes ET,
    whether or not the larger region is above one half there too.
    """
    if predict == "labels":
        return probability.argmax(0).to(torch.uint8)
    labels = torch.zeros(probability.shape[1:], dtype=torch.uint8)
    for region, label in zip(probability, (2, 1, 3)):
        labels[region > 0.5] = label
    return labels


def dice_loss(probability, target, smooth=1.0):
    """1 - mean over channels of soft Dice = (2 sum(p g) + smooth) / (sum p + sum g + smooth), sums over
    B, H and W, of the whole global batch (see summed): a slice without tumour then says "nothing here" instead of
    0/0 [VNET].

    probability, target: float (B, K, H, W) in [0, 1]. Returns a scalar.
    """
    over = (0, 2, 3)
    shared, total = summed(torch.stack([(probability * target).sum(over), (probability + target).sum(over)]))
    return 1 - ((2 * shared + smooth) / (total + smooth)).mean()


def segmentation_loss(logits, labels, predict):
    """Dice + cross-entropy, a scalar. logits (B, K, H, W); labels int (B, H, W) in 0..3.

    "regions": binary cross-entropy and Dice of each region; "labels": cross-entropy over four
    classes and Dice of the three that are tumour.
    """
    logits = logits.float()
    if predict == "regions":
        target = regions_of(labels).movedim(0, 1).float()                   # (B, 3, H, W)
        return F.binary_cross_entropy_with_logits(logits, target) + dice_loss(logits.sigmoid(), target)
    target = one_hot(labels, 4)
    return F.cross_entropy(logits, labels) + dice_loss(logits.softmax(1)[:, 1:], target[:, 1:])


# What augmentation draws from. rotate in degrees; scale, shift, bend (elastic) as shares of the
# picture; gamma, contrast (per modality) and noise as standard deviations on intensities 0..1.
AUGMENT = {
    "none": None,
    "standard": {"rotate": 10, "scale": 0.1, "shift": 0.03, "bend": 0.0, "gamma": 0.1, "contrast": 0.1, "noise": 0.01},
    "strong": {"rotate": 30, "scale": 0.3, "shift": 0.08, "bend": 0.04, "gamma": 0.3, "contrast": 0.3, "noise": 0.05},
}


def augment(images, labels, kind, key, share=None):
    """Randomly moved and recoloured slices: images (B, C, H, W) in [-1, 1], labels int (B, H, W) -> the
    same, on the CPU; a pure function of its arguments. kind: a key of AUGMENT; key: of generator; share: the
    (B, slice) that these images are of a global batch of B, for which chance is drawn.

    One smooth map of the plane for images (linear) and labels (nearest), half of them mirrored; then
    gamma, contrast and noise in each modality. Air stays -1.
    """
    how, batch, size = AUGMENT[kind], len(images), images.shape[-2:]
    if how is None:
        return images, labels
    g, (whole, mine) = generator(*key), share or (batch, slice(None))
    normal = lambda *shape: torch.randn(whole, *shape, generator=g)[mine]
    uniform = lambda: (torch.rand(whole, generator=g) * 2 - 1)[mine]
    angle, scale = uniform() * math.radians(how["rotate"]), torch.exp(uniform() * how["scale"])
    mirror = uniform().sign()
    rows = [torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), uniform() * how["shift"]], 1),
            torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), uniform() * how["shift"]], 1)]
    where = F.affine_grid(torch.stack(rows, 1), (batch, 1, *size), align_corners=False)     # (B, H, W, 2)
    bend = F.interpolate(how["bend"] * normal(2, 6, 6), size, mode="bicubic", align_corners=False)
    where = where + bend.movedim(1, -1)
    images = F.grid_sample((images + 1) / 2, where, align_corners=False)                     # air is 0 here
    labels = F.grid_sample(labels[:, None].float(), where, mode="nearest", align_corners=False)[:, 0].long()
    each = (images.shape[1], 1, 1)
    moved = images.clamp(1e-6, 1) ** torch.exp(how["gamma"] * normal(*each)) * (1 + how["contrast"] * normal(*each))
    moved = moved + how["noise"] * normal(*images.shape[1:])
    return torch.where(images > 0, moved, 0.0).clamp(0, 1) * 2 - 1, labels


def dice(predicted, truth):
    """Dice = 2 |A and B| / (|A| + |B|) of two bool masks of one case, a float; both empty: 1."""
    total = int(predicted.sum() + truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def sensitivity(predicted, truth):
    """Share of the true voxels that were found, a float; NaN where there are none."""
    return int((predicted & truth).sum()) / int(truth.sum()) if truth.any() else math.nan


def surface(mask):
    """Voxels of a bool mask (X, Y, Z) that touch, through a face, a voxel outside it; what lies beyond
    the array is outside."""
    padded, core = F.pad(mask, (1,) * 6), mask
    for axis in range(3):
        for start in (0, 2):
            at = [slice(1, -1)] * 3
            at[axis] = slice(start, start + mask.shape[axis])
            core = core & padded[tuple(at)]
    return mask & ~core


def hd95(predicted, truth, spacing):
    """95th percentile Hausdorff distance in mm between the surfaces of two bool masks (X, Y, Z).

    Each way the 95th percentile (linearly interpolated) of the distances from one surface's voxels to the other
    surface, and the larger of the two. spacing: mm a voxel (3,). Both empty: 0; exactly one: HD95_MISSED. Surfaces
    have thousands of voxels: distances of all pairs are taken in parts.
    """
    if not predicted.any() or not truth.any():
        return 0.0 if predicted.any() == truth.any() else HD95_MISSED
    mm = torch.tensor([float(s) for s in spacing], dtype=torch.float64)
    a, b = [surface(mask).nonzero() * mm for mask in (predicted, truth)]
    to_b, to_a = [], torch.full((len(b),), math.inf, dtype=torch.float64)
    for part in a.split(max(1, 2 ** 23 // len(b))):             # all pairs, 64 MB at a time
        distance = torch.cdist(part, b)
        to_b.append(distance.amin(1))
        to_a = torch.minimum(to_a, distance.amin(0))
    return max(torch.quantile(way, 0.95).item() for way in (torch.cat(to_b), to_a))


def components(mask):
    """Connected components (26 neighbours) of a bool mask (X, Y, Z): int64, 0 outside, 1, 2, ... inside, in any order,
    without gaps.

    Only the voxels of the mask are looked at. Every one starts as its own root. Of each pair of neighbours the larger
    root is hung on the smaller, then every voxel follows its chain to the end; until all pairs agree.
    """
    at = mask.nonzero()
    root = torch.arange(len(at))
    which = F.pad(torch.full(mask.shape, -1), (1,) * 6, value=-1)
    which[1:-1, 1:-1, 1:-1][mask] = root                        # the number of each voxel, -1 outside the mask
    pairs = []
    for step in range(14, 27):                                  # 13 of the 26 neighbours: every pair once
        there = which[tuple((at + torch.tensor([step // 9, step // 3 % 3, step % 3])).T)]
        pairs.append(torch.stack([root, there])[:, there >= 0])
    a, b = torch.cat(pairs, 1)
    while not torch.equal(root[a], root[b]):
        low, high = torch.minimum(root[a], root[b]), torch.maximum(root[a], root[b])
        root = root.scatter_reduce(0, high, low, "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
    out = torch.zeros(mask.shape, dtype=torch.long)
    out[mask] = torch.unique(root, return_inverse=True)[1] + 1
    return out


def dilate(mask, times):
    """A bool mask (X, Y, Z) grown `times` by its 18 neighbours (those that share a face or an edge)."""
    for _ in range(times):
        grown = mask.float()[None, None]
        mask = sum(F.max_pool3d(grown, k, 1, tuple(n // 2 for n in k))
                   for k in ((1, 3, 3), (3, 1, 3), (3, 3, 1)))[0, 0] > 0
    return mask


def lesion_dice(predicted, truth, spacing, reach=3, smallest=50.0):
    """Lesion-wise Dice of two bool masks (X, Y, Z), as BraTS 2023 counts it [LESION].

    A lesion is what of `truth` lies in one component of its dilation by `reach` voxels. It is compared with the whole
    of all predicted components that share a voxel with its own dilation; a predicted one that does with no lesion's
    is a false positive, of whatever size. Lesions of at most `smallest` mm^3 are left out (what meets them is no
    false positive). Returns the sum of Dice over lesions, divided by lesions + false positives; 1 where there is
    neither.
    """
    both = (predicted | truth).nonzero()
    if not len(both):
        return 1.0
    low, high = (both.amin(0) - reach - 1).clamp(min=0), both.amax(0) + reach + 2
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high))
    predicted, truth = predicted[box], truth[box]
    found, lesions = components(predicted), components(dilate(truth, reach)) * truth
    scores, touched = [], set()
    for lesion in range(1, int(lesions.max()) + 1):
        its = lesions == lesion
        meets = set(found[dilate(its, reach)].unique().tolist()) - {0}
        touched |= meets
        if its.sum() * math.prod(spacing) > smallest:
            scores.append(dice(torch.isin(found, torch.tensor(sorted(meets))) if meets else its & False, its))
    scores += [0.0] * (int(found.max()) - len(touched))
    return sum(scores) / len(scores) if scores else 1.0


def score_case(predicted, truth, spacing, full=True):
    """All figures of one case: {region: {figure: number}}. predicted, truth: labels int (X, Y, Z) in
    0..3, spacing: mm a voxel (3,). full: HD95 and lesion-wise Dice too, which take most of the time."""
    ml = math.prod(float(s) for s in spacing) / 1000
    out = {}
    for region, a, b in zip(REGIONS, regions_of(torch.as_tensor(predicted)), regions_of(torch.as_tensor(truth))):
        volumes = int(a.sum()) * ml, int(b.sum()) * ml
        out[region] = {"dice": dice(a, b), "sensitivity": sensitivity(a, b), "predicted_ml": volumes[0],
                       "true_ml": volumes[1], "volume_error_ml": abs(volumes[0] - volumes[1])}
        if full:
            out[region] |= {"hd95_mm": hd95(a, b, spacing), "lesion_dice": lesion_dice(a, b, spacing)}
    return out


@dataclass
class Segmenter:
    """A trained ResUNet, the grid it was trained on, and the case_hashes of all it was trained or chosen by."""
    net: ResUNet
    resolution: int
    fov: float
    device: torch.device
    seen: frozenset = frozenset()
    digest: str = ""                            # of its file

    @torch.no_grad()
    def ask(self, part, images, batch=64):
        """part: function of images on the device; images float (N, C, R, R) in [-1, 1] -> (N, ...) on the CPU."""
        def on_device(some):
            some, = to_device(self.device, some)
            with fast_math(self.device):
                return part(some).float()

        return in_parts(self.device, on_device, batch, images)

    def probability(self, images):
        """images float (N, C, R, R) in [-1, 1] -> float32 (N, K, R, R)."""
        logits = self.ask(self.net, images)
        return logits.sigmoid() if self.net.predict == "regions" else logits.softmax(1)

    def features(self, images):
        """images float (N, C, R, R) in [-1, 1] -> the encoder's last output averaged over each slice, (N, F)."""
        return self.ask(lambda some: self.net.encoder(some)[-1].float().mean((2, 3)), images)

    def slice_labels(self, images):
        """Labels of slices on the model's grid: images float (D, C, R, R) in [-1, 1] -> uint8 (D, R, R) in 0..3."""
        return labels_of(self.probability(images).movedim(1, 0), self.net.predict)

    def slice_dice(self, images, labels):
        """Dice of WT, TC, ET over all slices of one case on the model's grid: images float (D, C, R, R) in
        [-1, 1], labels int (D, R, R) -> list of three."""
        return [dice(a, b) for a, b in zip(regions_of(self.slice_labels(images)), regions_of(labels))]

    def segment(self, got):
        """got: from prepare_case on this grid -> labels uint8 (X, Y, Z) in 0..3 on the grid of the scans:
        probabilities are brought back linearly, then decided; never outside the brain."""
        probability = self.probability(to_images(got["images"]))                            # (D, K, R, R)
        grown = got["grid"].grow(probability.movedim(1, 0).numpy())                         # (K, D, H, W)
        labels = from_slices(labels_of(torch.from_numpy(grown), self.net.predict).numpy())
        return np.where(got["brain"], labels, 0).astype(np.uint8)

    def evaluate(self, prepared, see=None, full=True):
        """Segment and score cases on their own grid: [{"case": name, "region": "WT", "dice": ..., ...}], three
        rows a case. prepared: from prepare_blind; see: function (Case, got, predicted labels), called for each;
        full: as score_case."""
        rows = []
        for case, got, truth in prepared:
            predicted = self.segment(got)
            figures = score_case(predicted, truth, spacing_of(got["grid"].affine), full)
            rows += [{"case": case.case, "region": region, **its} for region, its in figures.items()]
            if see is not None:
                see(case, got, predicted)
        return rows


def prepare_blind(cases, resolution, fov):
    """Cases as a segmenter is tested on them, one by one: (Case, what prepare_case returns when it cannot see
    the labels, true labels uint8 (X, Y, Z))."""
    for case in cases:
        files = {name: path for name, path in case.files.items() if name != "seg"}
        yield case, prepare_case(Case(case.case, files, case.modern), resolution, fov, "tumour"), read_labels(case)[0]


def summarise(rows):
    """Rows of evaluate -> {region: {figure: mean over cases that have it}}; "missed": in how many cases
    exactly one of prediction and truth is empty."""
    out = {}
    for region in REGIONS:
        its = [row for row in rows if row["region"] == region]
        mean = {k: float(np.nanmean([row[k] for row in its])) if any(row[k] == row[k] for row in its) else math.nan
                for k in its[0] if k not in ("case", "region")}
        out[region] = {**mean, "missed": sum((row["predicted_ml"] > 0) != (row["true_ml"] > 0) for row in its)}
    return out


def table_of(rows):
    """The closing table of a segmenter as lines of text; rows of evaluate."""
    lines = ["region    Dice  lesion-wise  HD95 mm  sensitivity  volume error mL  found or true only"]
    for region, mean in summarise(rows).items():
        lines.append(f"{region:<6} {mean['dice']:7.3f} {mean['lesion_dice']:12.3f} {mean['hd95_mm']:8.1f} "
                     f"{mean['sensitivity']:12.3f} {mean['volume_error_ml']:16.1f} {mean['missed']:10d} cases")
    return lines


# ================================================================================================
# 10  TRAINING
# What the training scripts share. The step itself is in the script, where it can be seen.
# ================================================================================================


def find_data(args):
    """The cases a run works on and their split -> (cases, {"train": [Case], "val": [...], "test": [...]}).

    args: with data, out, phantoms, scanner, split, skip_bad. The cases of --data are checked first, see
    usable_cases; findings are remembered beside the cache. Without --data phantoms are made beside the output
    folder; those already there are used again.
    """
    if args.data:
        say = print if first_process() else lambda *_, **__: None
        cases = in_turn(lambda: usable_cases(args.data, args.skip_bad, Path(args.out).parent / "cache", say))
        return cases, split_patients(cases, args.split)
    folder, started = Path(args.out).parent / "phantoms" / args.scanner, time.time()
    made = in_turn(lambda: make_phantoms(folder, args.phantoms, scanner=args.scanner))
    if made:
        print(f"phantoms: {made} cases made in {time.time() - started:.0f} s -> {folder}")
    cases = find_cases(folder)                  # a folder may hold more than this run asks for
    cases = [case for case in cases if phantom_seed(case.case) in range(args.phantoms)]
    refuse_synthetic(cases)
    return cases, split_patients(cases, args.split)


# Arguments that are paths stay out of checkpoints; hashes and digests say what lay there.
PATHS = ("data", "label_maps", "split", "out", "synthetic", "weights")
# What may differ when a run is resumed.
NEW_ARGUMENTS = {"generate": "images", "relatives": 512, "label_steps": 0, "arms": None}      # of runs from before
FREE_TO_CHANGE = {*PATHS, "device", "precision", "compile", "steps", "minutes", "guidance", "sample_every", "skip_bad"}


def kept_arguments(args):
    """What of the arguments goes into a checkpoint: all but paths."""
    return {k: v for k, v in vars(args).items() if k not in PATHS}


def resume(args, kind, trained_on, net, ema, optimizer):
    """Continue the run in args.out if there is one -> its checkpoint, weights already loaded, else None.
    BadInput where that run had other settings or other training cases."""
    if not list(Path(args.out).glob("checkpoint*.pt")):
        return None
    state = load_checkpoint(args.out, kind)
    asked, had = vars(args), state["args"]
    had = {**NEW_ARGUMENTS, **had}
    differ = [k for k in asked if k not in FREE_TO_CHANGE and asked[k] != had.get(k)]
    if differ:
        raise BadInput(f"{args.out} holds a run with " + ", ".join(f"{k} {had.get(k)}" for k in differ)
                       + ", you ask for " + ", ".join(f"{k} {asked[k]}" for k in differ)
                       + "; choose another --out, or delete the folder")
    if state["trained_on"] != trained_on:
        raise BadInput(f"{args.out} holds a run on other training cases; choose another --out, or delete the folder")
    try:
        net.load_state_dict(state["weights"])
        # its state alone: whether it is fused is the device's affair
        fresh, kept = optimizer.state_dict(), state["optimizer"]["state"]
        optimizer.load_state_dict({**fresh, "state": kept})
        whole = {i: its.keys() for i, its in fresh["state"].items()}
        if state["ema"].keys() != ema.weights.keys() or {i: its.keys() for i, its in kept.items()} != whole:
            raise ValueError("averaged weights or moments are missing")
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise BadInput(f"{state['file']}: does not fit the network ({str(error).splitlines()[0]}); delete the folder "
                       "to begin anew") from error
    ema.weights = state["ema"]
    for p, its in optimizer.state.items():
        for name in its.keys() - {"step"}:      # laid out like p: fused kernels pair numbers by place in memory
            its[name] = torch.empty_like(p).copy_(its[name])
    print(f"resumed: {args.out} at step {state['step']}")
    return state


class Pace:
    """How far a run is, whether steps, minutes in the loop, or both bound it, and when what is due."""

    def __init__(self, args, step=0, seconds=0.0):
        self.steps, self.minutes, self.step, self.seconds = args.steps, args.minutes, step, seconds
        self.start, self.clock, self.last = time.time(), time.time() - seconds, {}

    def progress(self):
        """Share of the run that is over, 0..1 and beyond."""
        return max(self.step / self.steps if self.steps else 0.0,
                   self.seconds / (60 * self.minutes) if self.minutes else 0.0)

    def tick(self):
        """One step is done."""
        self.step, self.seconds = self.step + 1, agreed(time.time() - self.clock)

    def due(self, what, every):
        """True once in `every` seconds, for each `what`."""
        if time.time() - self.last.get(what, self.start) <= every:
            return False
        self.last[what] = time.time()
        return True

    def say(self, text):
        """Print a line: the step, `text`, the time left."""
        left = max(0.0, self.seconds / max(self.progress(), 1e-6) - self.seconds)
        print(f"step {self.step:05d}{f'/{self.steps}' if self.steps else ''} | {text} | "
              f"{f'{left / 60:.0f}m' if left > 90 else f'{left:.0f}s'} left", flush=True)


class Guard:
    """What happens after a step whose loss or gradient was not finite, and which was therefore left out: it is
    named; three in a row go back to the last checkpoint; where that does not lead further, the run ends."""

    def __init__(self):
        self.row, self.reached = 0, -1          # bad steps in a row; where the last ones were

    def sound(self, finite, step, names):
        """Whether step number `step` was sound; if not it is said which cases were in it (names: function)."""
        if finite:
            self.row = 0
            return True
        self.row += 1
        print(f"step {step:05d} | loss or gradient not finite, nothing learned | cases {', '.join(names())}",
              flush=True)
        return False

    def go_back(self, step):
        """Whether to go back to the last checkpoint. BadInput where the run came no further since the last time."""
        if self.row < 3:
            return False
        if step <= self.reached:
            raise BadInput(f"step {step}: loss or gradient not finite in three steps in a row, again after going back "
                           "to the last checkpoint; lower --lr, try --precision float32, look at the cases named above")
        self.row, self.reached = 0, step
        return True


def endless(rows, key, start, count):
    """Entries start .. start + count - 1 of an endless sequence that runs through `rows` in a new
    random order every epoch. int array (count,); a pure function of its arguments."""
    out, end = [], start + count
    while start < end:
        epoch, at = divmod(start, len(rows))
        order = torch.randperm(len(rows), generator=generator(*key, epoch)).numpy()
        out.append(rows[order[at:at + end - start]])
        start += len(out[-1])
    return np.concatenate(out) if out else np.array([], int)


def batch_rows(tumour, other, share, seed, step, batch):
    """Cache rows of the batch of this step, int (batch,): `share` of all draws show tumour.

    Global sample number n = step * batch + i comes from `tumour` where floor(n * share) steps up,
    else from `other`; each is run through in its own shuffled order.
    """
    if not len(tumour) or not len(other):
        share = float(len(tumour) > 0)
    taken = np.floor(np.arange(step * batch, (step + 1) * batch + 1) * share + 1e-9).astype(int)
    from_tumour = np.diff(taken) > 0
    rows = np.empty(batch, int)
    n = int(from_tumour.sum())
    if n:
        rows[from_tumour] = endless(tumour, (seed, "tumour"), int(taken[0]), n)
    if n < batch:
        rows[~from_tumour] = endless(other, (seed, "other"), step * batch - int(taken[0]), batch - n)
    return rows


def has_label(cache, rows, first_label):
    """Which of these cache rows show a class value >= first_label: bool (len(rows),)."""
    return np.array([(cache.rows[r, -1] >= first_label).any() for r in rows], bool)


def measure_prior(cache, rows, condition, slabs=16):
    """What training slices look like on average, for `expected`: a dict of float32 tensors.

    classes  (2, K + 1, C): mean and std of every class in every modality; row K is over all pixels.
             Mean 0 and std 0.5 where a class does not occur; std at least 0.01.
    atlas    (2, slabs, C, R, R): mean and std of healthy brain at every place, in `slabs` parts of
             position -1..1, left and right alike, smoothed by 3x3 and leaning on the class's own
             where few brains reach. Only where "brain" is a class: tissue labels say it better.
             A mean over few brains shows them: with a handful of cases the atlas is no secret.
    """
    names = CONDITIONS[condition]
    total = torch.zeros(3, len(names) + 1, cache.rows.shape[1] - 1)         # count, sum, sum of squares
    place = torch.zeros(3, slabs, total.shape[2], *cache.rows.shape[2:])
    for i in range(0, len(rows), 128):
        x0, classes, position = cache.batch(rows[i:i + 128])
        slab = ((position + 1) / 2 * slabs).long().clamp(0, slabs - 1)
        for k in range(len(names) + 1):
            here = (classes == k if k < len(names) else classes >= 0).unsqueeze(1).float()
            parts = [here.expand_as(x0), x0 * here, x0 ** 2 * here]
            total[:, k] += torch.stack([p.sum((0, 2, 3)) for p in parts])
            if k == 1 and names[k] == "brain":
                place.index_add_(1, slab, torch.stack(parts))
    n, mean = total[0], torch.where(total[0] > 1, total[1] / total[0].clamp(min=1), 0.0)
    std = torch.where(n > 1, (total[2] / n.clamp(min=1) - mean ** 2).clamp(min=1e-4).sqrt(), 0.5)
    prior = {"classes": torch.stack([mean, std])}
    if names[1] == "brain":
        place = F.avg_pool2d((place + place.flip(-1)).flatten(0, 2), 3, 1, 1).view_as(place)
        m, s = mean[1].view(-1, 1, 1), std[1].view(-1, 1, 1)
        mean = (place[1] + 2 * m) / (place[0] + 2)
        std = ((place[2] + 2 * (s ** 2 + m ** 2)) / (place[0] + 2) - mean ** 2).clamp(min=1e-4).sqrt()
        prior["atlas"] = torch.stack([mean, std])
    return prior


def training_noise(seed, step, shape, drop):
    """All chance of one training step, on the CPU, from (seed, step): shape (B, C, H, W) ->

    t       int64 (B,) in 1..T, one in each of B equal parts of the range, in random order
    eps     float32 (B, C, H, W)
    keep    float32 (B,): 0 where the label map is replaced by the null condition (share `drop`)
    given   bool (B,): False where the slice position is withheld (share `drop`, independent)
    mirror  bool (B,): True where left and right are swapped (one half)
    """
    g, batch = generator(seed, "noise", step), shape[0]
    place = (torch.randperm(batch, generator=g) + torch.rand(batch, generator=g)) / batch
    t = (place * T).long().clamp(max=T - 1) + 1
    keep, given, mirror = torch.rand(3, batch, generator=g)
    return t, torch.randn(shape, generator=g), (keep >= drop).float(), given >= drop, mirror < 0.5


def learning_rate(peak, progress, step, warmup=50):
    """Linear warm-up over `warmup` steps, then half a cosine down to peak / 100.

    progress: share of the run that is over, 0..1, whichever of steps and minutes ends it.
    """
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def orthogonal(matrices, steps=5):
    """(G, M, N) -> (G, M, N), roughly each one's nearest matrix with orthonormal rows (columns where M > N): singular
    vectors stay, singular values become about 1 (0.7 to 1.2 where they were above a hundredth of the root of the sum
    of squares). By Newton-Schulz iteration, which needs products of matrices alone [MUON]:
        x = matrix / (|matrix| + 1e-7), the root of the sum of squares; then `steps` times
        x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x      (x^T in place of x where M > N: the same, cheaper)
    """
    if matrices.shape[1] > matrices.shape[2]:   # x x^T is the smaller one then
        return orthogonal(matrices.mT, steps).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT                                                   # (G, M, M)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class Muon(torch.optim.AdamW):
    """AdamW [ADAMW], but for weights inside a network (`hidden`, each with two axes or more), which learn by Muon
    [MUON]: a gradient of a layer is dominated by few directions, and the rest is learned too slowly; Muon gives all
    directions of a matrix (M outputs, N = all inputs of one) the same step.

        momentum += (gradient - momentum) / 20
        weight   *= 1 - rate * decay
        weight   -= rate * sqrt(max(1, M / N)) * orthogonal(0.95 momentum + 0.05 gradient)      rate = 5 lr

    dtype: of orthogonal's arithmetic. State is made here, not in the first step: on XLA the second one would be
    another graph, compiled anew.
    """

    def __init__(self, weights, hidden, dtype, **settings):
        super().__init__([{"params": list(weights)}, *([{"params": list(hidden)}] if hidden else [])], **settings)
        self.dtype = dtype
        for group, names in zip(self.param_groups, (("exp_avg", "exp_avg_sq"), ("momentum",))):
            for p in group["params"]:
                self.state[p] = {name: torch.zeros_like(p) for name in names}
                self.state[p]["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups[1:]:
            alike, rate = {}, 5 * group["lr"]
            for p in group["params"]:
                self.state[p]["step"] += 1
                self.state[p]["momentum"].lerp_(p.grad, 0.05)
                alike.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), its in alike.items():      # matrices of one size at once: few large products
                wanted = [torch.lerp(self.state[p]["momentum"], p.grad, 0.05).flatten(1) for p in its]
                for p, change in zip(its, orthogonal(torch.stack(wanted).to(self.dtype))):
                    p.mul_(1 - rate * group["weight_decay"])
                    p.sub_(change.view_as(p), alpha=rate * max(1, rows / columns) ** 0.5)
                    p.grad = None                           # AdamW leaves it alone
        super().step()


def make_optimizer(net, lr, device, precision="auto", hidden=()):
    """The optimiser of both training scripts: AdamW, and Muon for those of net's parameters that are in `hidden`."""
    inside = {id(p) for p in hidden}
    return Muon([p for p in net.parameters() if id(p) not in inside], list(hidden),
                torch.bfloat16 if uses_bf16(device, precision) else torch.float32,
                lr=lr, betas=(0.9, 0.99), weight_decay=0.01, **optimizer_form(device))


class EMA:
    """Running mean of a network's parameters, float32 on the CPU, whatever the network runs on.

    Parameters only: no schedule, and no buffer (a batch norm's statistics are taken from the network as it is).
    Every k-th step counts the newest copy k times, with
    decay^k: where weights move slowly the same as every step, at 1/k of the cost. The decay at a
    step is min(decay, (1 + step) / (10 + step)): a short run averages its last tenth instead of
    remembering its random start.
    On the host since a bfloat16 copy would lose (1 - decay) * w to rounding, and to free the
    device's memory; the price is one transfer every k steps.
    """

    def __init__(self, net, decay=0.999, every=10):
        self.decay, self.every = decay, every
        self.weights = {k: p.float().clone() for k, p in self.of(net).items()}

    def of(self, net):
        """The parameters as they are now, on the CPU."""
        return to_host({name: p.detach() for name, p in net.named_parameters()})

    def update(self, net, step):
        """Call after optimiser step number `step` (1, 2, ...); acts on every `every`-th."""
        if step % self.every == 0:
            self.weights = self.advanced(net, step, self.every)

    def advanced(self, net, step, count):
        """The averaged weights after `count` more steps that ended at `net`: {name: tensor}, new ones: d^count
        weights + (1 - d^count) net, with d the decay at `step`, see above."""
        keep = min(self.decay, (1 + step) / (10 + step)) ** count
        return {name: torch.lerp(p.float(), self.weights[name], keep) for name, p in self.of(net).items()}

    def copy_of(self, net, step):
        """A copy of `net`, on its device, that carries the averaged weights: what samples best. Steps
        since the last update are counted in; the average itself is left as it is."""
        twin = copy.deepcopy(net)
        twin.load_state_dict({**net.state_dict(), **self.advanced(net, step, step % self.every)})
        return twin.eval()


@contextmanager
def sole_writer(folder):
    """While the body runs no other process may write into the folder: BadInput if one does. It is the operating
    system's lock, which ends with the process however that ends. What writers that were killed left behind is
    removed. Of several processes of one run the first one holds it."""
    folder, there = Path(folder), Path(folder).exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl and first_process() else None
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInput(f"{folder}: another process writes there; wait for it, or choose another "
                               "--out") from error
            except OSError:                     # a file system without locks
                pass
            for litter in folder.glob(".*.tmp"):
                shutil.rmtree(litter) if litter.is_dir() else litter.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)
            if not there and not any(folder.iterdir()):
                folder.rmdir()                  # nothing came of it


def attempt(what, write):
    """write(); where the disk refuses, say so and go on. For what a run can do without."""
    try:
        write()
    except OSError as error:
        print(f"note: {what} could not be written ({error.strerror or error}); training goes on", flush=True)


def save_state(path, state):
    """torch.save of a state, on the CPU, so that it loads anywhere. A full disk arrives as an OSError."""
    with open(path, "wb") as handle:
        try:
            torch.save(to_host(state), handle)
        except RuntimeError as error:           # what torch makes of the OSError of a write
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error


def save_checkpoint(folder, state):
    """Write state to folder/checkpoint.pt, whole or not at all; the one before it is kept as
    checkpoint.previous.pt. Plain tensors, numbers, strings, lists and dicts only."""
    newest, previous = Path(folder) / "checkpoint.pt", Path(folder) / "checkpoint.previous.pt"

    def write(temporary):
        save_state(temporary, state)
        if newest.exists():
            second = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
            try:
                os.link(newest, second)         # a second name: never a moment without two checkpoints
            except OSError:                     # a file system without hard links
                shutil.copy2(newest, second)
            os.replace(second, previous)

    replace_file(newest, write)


# kind of checkpoint: who writes it. "segmenter" is best.pt, "seg" what a run continues from.
SCRIPT = {"ddpm": "train_ddpm.py", "labels": "train_ddpm.py --generate labels", "seg": "train_seg.py",
          "segmenter": "train_seg.py"}
# What each kind holds. PUBLISHED is the part that goes into an .npz: all that sampling or segmenting needs, and
# what it owes to whom; a run also needs RESUMED to go on.
PUBLISHED = {"ddpm": {"kind", "version", "step", "args", "network", "ema", "prior", "condition", "classes",
                      "modalities", "shift", "resolution", "fov", "trained_on", "patients", "data"},
             "segmenter": {"kind", "version", "step", "args", "network", "weights", "resolution", "fov", "seen",
                           "dice"}}
PUBLISHED["labels"] = PUBLISHED["ddpm"] | {"measured"}
RESUMED = {"seconds", "weights", "ema", "optimizer", "trained_on"}
HOLDS = {"ddpm": PUBLISHED["ddpm"] | RESUMED, "labels": PUBLISHED["labels"] | RESUMED,
         "segmenter": PUBLISHED["segmenter"],
         "seg": {"kind", "version", "step", "args", "network", "best"} | RESUMED}


def load_checkpoint(path, kind="ddpm", say=print, names=("checkpoint.pt", "checkpoint.previous.pt")):
    """The state in a checkpoint file, or in the first sound one of `names` in a run's folder; its entry
    "file" says which was read. kind: what script it must come from, see SCRIPT.

    Every byte is checked (torch.load alone reads flipped bits in silence) and nothing but data is
    unpickled. BadInput when there is none or none is sound.
    """
    path = Path(path)
    candidates = [path / name for name in names] if path.is_dir() else [path]
    candidates, faults = [p for p in candidates if p.exists()], []
    for candidate in candidates:
        try:
            with zipfile.ZipFile(candidate) as archive:         # .pt and .npz are both zip archives
                if archive.testzip():
                    raise ValueError("a checksum does not match")
            state = (read_published(candidate) if candidate.suffix == ".npz" else
                     torch.load(candidate, map_location="cpu", weights_only=True))
            if not isinstance(state, dict) or state.get("kind") != kind:
                raise ValueError(f"it is no checkpoint of kind {kind}")
            missing = (PUBLISHED if candidate.suffix == ".npz" else HOLDS)[kind] - set(state)
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            if faults:
                say(f"note: {faults[0]}; continuing from {candidate.name}, step {state['step']}")
            return {**state, "file": str(candidate)}
        except Exception as error:
            faults.append(f"{candidate} cannot be used ({str(error).splitlines()[0]})")
    raise BadInput("; ".join(faults) + "; train again or use another checkpoint" if faults else
                   f"{path}: no checkpoint there; train one first with python {SCRIPT[kind]}")


def publish(run, path):
    """Write the weights of a run's folder (or of its checkpoint) as .npz: arrays and one JSON text, no pickle ->
    its sha256. sample.py takes it as --checkpoint or --segmenter, two of them in a folder, "coarse.npz" and "fine.npz",
    as --label-checkpoint."""
    kinds, names = ("labels", "ddpm"), ("checkpoint.pt", "checkpoint.previous.pt")
    if (Path(run) / "best.pt").exists() or Path(run).name == "best.pt":
        kinds, names = ("segmenter",), ("best.pt",)
    for kind in kinds:
        try:
            state = load_checkpoint(run, kind, names=names)
            break
        except BadInput:
            if kind == kinds[-1]:
                raise
    arrays, facts = {}, {}
    for name in sorted(PUBLISHED[kind]):
        its = state[name]
        if name in ("ema", "weights", "prior"):
            arrays.update({f"{name}/{key}": tensor.numpy() for key, tensor in its.items()})
        else:
            facts[name] = its

    def write(temporary):
        with open(temporary, "wb") as handle:
            np.savez(handle, about=np.array(json.dumps(facts)), **arrays)

    replace_file(path, write)
    return file_hash(path)


def read_published(path):
    """What publish wrote -> the state, as load_checkpoint returns it. Any pickle in the file is refused."""
    with np.load(path, allow_pickle=False) as archive:
        state = json.loads(archive["about"].item())
        for name in archive.files:
            group, _, key = name.partition("/")
            if name != "about":
                state.setdefault(group, {})[key] = torch.from_numpy(archive[name])
    return state


def load_generator(path, device, batch=32, kind="ddpm"):
    """The generator of a run's folder or of a file of weights -> (Denoiser with the averaged weights, checkpoint).
    batch: slices a call of the network; kind "labels": a generator of labels. BadInput where there is none."""
    state = load_checkpoint(path, kind)
    net = UNet(**state["network"])
    net.load_state_dict(state["ema"])
    net = place_network(net.eval(), device)
    return Denoiser(net, state["prior"], cosine_alpha_bar(state["shift"]), device, batch), state


def load_segmenter(path, device):
    """The Segmenter in a run's folder or in its best.pt. BadInput where there is none."""
    state = load_checkpoint(path, "segmenter", names=("best.pt",))
    net = ResUNet(**state["network"])
    net.load_state_dict(state["weights"])
    net = place_network(net.eval(), device)
    return Segmenter(net, state["resolution"], state["fov"], device, frozenset(state["seen"]), file_hash(state["file"]))


def catch_signals():
    """From now on SIGINT (Ctrl-C) and SIGTERM are noted in the returned list instead of ending the
    process, so that a step can be finished and saved; a second one ends it at once."""
    caught = []

    def note(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


class LogBook:
    """Losses since the last line, one line a time on the screen, the same fields in log.csv.

    more: names of further columns. With QUARTERS the loss is also kept in four bins of t (quarters of
    the range, clean to noisy): the mean alone hides which noise levels still learn. Nothing is read
    from the device until a line is due. Of several processes all add, and the first one alone writes.
    """

    def __init__(self, folder, step, more=QUARTERS):
        self.path, self.losses, self.since = Path(folder) / "log.csv", [], (step, time.time())
        self.fields = ("step", "loss", *more, "lr", "images_per_s", "seconds")
        if not first_process():
            return
        old = [r for r in read_log(self.path) if r["step"] <= step]     # after a kill: none twice
        with open(self.path, "w", newline="") as handle:
            writer = csv.DictWriter(handle, self.fields)
            writer.writeheader()
            writer.writerows(old)

    def add(self, losses, t=None):
        """losses float (B,) or (1,), and with QUARTERS t int (B,), on any device; every process calls it."""
        everyones = [gathered(its) for its in (losses.detach(), t) if its is not None]
        if first_process():
            self.losses.append(everyones)

    def line(self, step, lr, batch, seconds, more=()):
        """Write one row and return (its fields, the text `loss 0.0312 | lr 2.0e-04 | 41 img/s`). more: the
        values of the further columns, unless they are QUARTERS."""
        losses, *t = [torch.cat(its) for its in zip(*to_host(self.losses))] or [torch.tensor([math.nan])]
        if not t and self.fields[2:6] == QUARTERS:              # no step was sound: no loss, no noise level
            t = [torch.ones(1)]
        if t:
            quarter = (t[0] - 1) * 4 // T
            more = [losses[quarter == q].mean().item() if (quarter == q).any() else math.nan for q in range(4)]
        speed = (step - self.since[0]) * batch / max(time.time() - self.since[1], 1e-6)
        self.losses, self.since = [], (step, time.time())
        row = dict(zip(self.fields, (step, losses.mean().item(), *more, lr, speed, seconds)))
        def write():
            with open(self.path, "a", newline="") as handle:
                csv.DictWriter(handle, self.fields).writerow(
                    {k: v if k == "step" else f"{v:.6g}" for k, v in row.items()})

        attempt(self.path, write)
        return row, f"loss {row['loss']:.4f} | lr {lr:.1e} | {speed:.0f} img/s"


def read_log(path):
    """log.csv -> list of dicts of numbers, empty when there is no file yet."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as handle:
        return [{k: int(v) if k == "step" else float(v) for k, v in row.items()}
                for row in csv.DictReader(handle)]


# ================================================================================================
# 11  EDITING
# New label maps from old ones: moved, bent, mirrored, grown, pasted into another brain; and the
# choice of edits that spreads a volume evenly over a set. Rare cases are rare in the masks too.
# ================================================================================================

DROPPED = {"NCR": 3, "ED": 0, "ET": 1}          # what a label's voxels become when it is dropped


def volume_ml(labels, affine, name):
    """Volume in mL of a label (NCR, ED, ET) or region (WT, TC, ET) of labels (X, Y, Z)."""
    members = REGIONS.get(name) or (LABELS.index(name) + 1,)
    return float(np.isin(labels, members).sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def parse_edit(words):
    """Words of the command line -> an edit, see edit_labels: ["scale=1.2", "shift=10,0,0", "mirror"]
    -> {"scale": 1.2, "shift": [10.0, 0.0, 0.0], "mirror": True}. BadInput for any other word."""
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
            elif name in ("drop", "add") and value in LABELS:
                edit[name] = value
            else:
                raise ValueError
            if [w.partition("=")[0] for w in words].count(name) > 1:
                raise ValueError
            numbers = np.atleast_1d(edit[name]) if name not in ("drop", "add") else np.zeros(1)
            if not np.isfinite(numbers).all() or len(edit.get("shift", (1, 2, 3))) != 3 or edit.get("scale", 1) <= 0:
                raise ValueError
        except ValueError as error:
            raise BadInput(f"--edit {word}: expected scale=1.2, shift=10,0,0 (mm), rotate=15 (degrees), elastic=3 "
                           "(mm), mirror, drop=NCR, add=ED, each once, or random alone") from error
    return edit


def random_edit(rng):
    """A mild edit, for variety: rng a numpy Generator -> see edit_labels."""
    return {"scale": round(float(np.exp(rng.normal(0, 0.15))), 3), "rotate": round(float(rng.uniform(-25, 25)), 1),
            "shift": rng.normal(0, 6, 3).round(1).tolist(), "mirror": bool(rng.uniform() < 0.5), "elastic": 1.5}


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
    brain            bool: the outline the tumour shall lie in; `home`: its affine where it is another
                     brain (pasting): the tumour keeps its place relative to the outline's middle and size
    edit             any of: scale (factor on lengths), rotate (degrees counter-clockwise, seen from the
                     head), shift (mm to the right, front, head), mirror (left for right), elastic (mm,
                     spread of a smooth random displacement), drop and add (a label)
    rng              numpy Generator, for elastic

    Dropped NCR turns into ET and ET into NCR, dropped ED into brain. Added: ED as a rim of
    about 6 mm around the tumour, ET as about the outer 3 mm of the tumour core, NCR as what lies deeper
    (counted in voxels of mean size). In the end what lies outside the brain is cut off.
    """
    home = affine if home is None else home
    if not labels.any():
        return np.zeros(brain.shape, np.uint8)
    here, (middle, _) = to_mm(np.argwhere(labels > 0), affine).mean(0), box_of(brain, home)
    there = np.array(edit.get("place", here))                           # where the centre goes to
    flip = np.array([-1.0 if edit.get("mirror") else 1.0, 1, 1])
    there = middle + (there - middle) * flip + np.array(edit.get("shift", (0, 0, 0)))
    angle = math.radians(edit.get("rotate", 0))
    turn = np.array([[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    # every voxel of the result looks up where it comes from
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in brain.shape], indexing="ij"), -1)
    point = to_mm(grid, home) - there
    if edit.get("elastic"):
        noise = [smooth_noise(rng, 40, brain.shape, spacing_of(home)) for _ in range(3)]
        point += edit["elastic"] * np.stack(noise, -1)
    source = (point @ turn.T) * flip / edit.get("scale", 1.0) + here
    voxel = (source - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    where = (2 * voxel[..., ::-1] + 1) / np.array(labels.shape[::-1]) - 1       # grid_sample wants z, y, x
    onehot = F.one_hot(torch.from_numpy(labels.astype(np.int64)), 4).movedim(-1, 0)[1:].float()
    share = F.grid_sample(onehot[None], torch.from_numpy(where.astype(np.float32))[None], align_corners=False)[0]
    out = torch.where(share.sum(0) > 0.5, share.argmax(0) + 1, 0).numpy().astype(np.uint8)
    steps = lambda mm: max(1, round(mm / spacing_of(home).mean()))
    if "drop" in edit:
        out[out == LABELS.index(edit["drop"]) + 1] = DROPPED[edit["drop"]]
    if "add" in edit:
        core = np.isin(out, (1, 3))
        deep = ~dilate(torch.from_numpy(~core), steps(3)).numpy()
        if edit["add"] == "ED":
            out[dilate(torch.from_numpy(out > 0), steps(6)).numpy() & (out == 0)] = 2
        else:
            out[deep if edit["add"] == "NCR" else core & ~deep] = 1 if edit["add"] == "NCR" else 3
    return np.where(brain, out, 0).astype(np.uint8)


def relative_place(labels, affine, brain, other, other_affine):
    """Where the centre of a tumour (labels, affine, in the outline `brain`) lies in another outline, mm
    (3,): the same share of the way from the middle of the outline to its edge, along each axis."""
    (middle, half), (its_middle, its_half) = box_of(brain, affine), box_of(other, other_affine)
    return its_middle + (to_mm(np.argwhere(labels > 0), affine).mean(0) - middle) / half * its_half


def balanced_target(number, count, low, high):
    """The volume in mL asked of case `number` of `count`: evenly spread over low..high, in an order in
    which any first part is spread as well (golden-ratio steps)."""
    rank = np.argsort(np.argsort([(i * 0.6180339887) % 1 for i in range(count)]))[number]
    return low + (high - low) * (rank + 0.5) / count


def edit_to_volume(labels, affine, brain, name, target, edit, seed):
    """edit_labels with the scale that makes `name` (a label or region) measure `target` mL -> (labels, the
    edit with that scale).

    After each try the scale is multiplied by the cube root of what is missing, five tries in all, within
    0.4 to 2.5; so what the brain's edge cuts off is made up for. The result may still miss: measure it.
    """
    scale = edit.get("scale", 1.0)
    for _ in range(5):
        edit = {**edit, "scale": round(float(np.clip(scale, 0.4, 2.5)), 4)}
        out = edit_labels(labels, affine, brain, edit, np.random.default_rng(seed))
        scale = edit["scale"] * (target / max(volume_ml(out, affine, name), 1e-2)) ** (1 / 3)
    return out, edit


# ================================================================================================
# 12  LABELS ON REQUEST
# Label maps that come from no patient, as volumes of cubic voxels in two steps. First a coarse network draws a whole
# head at once, blocks of BLOCK voxels a side, in each the share of every class; what is asked for are characteristics
# of the head, each of which may be left open. Then a fine network draws the voxels, BLOCK slices at a time, from what
# the blocks say. Both are the U-Net and the noise process of images: a picture whose channels are classes and slices.
# ================================================================================================

# What can be asked for: mL of each label; mm from the middle of the brain to that of the tumour, to the patient's
# right, front and top; sphericity of the whole tumour (1: a ball); number of its parts; mL of ventricles, under the
# condition that has them.
ASKED = ("NCR", "ED", "ET", "x", "y", "z", "sphericity", "lesions", "ventricles")
VOLUMES = (*LABELS, "ventricles")
UNSEEN = ("sphericity", "lesions")      # what blocks hardly show or not at all
BLOCK = 4                               # voxels a side of a block, slices of a slab
# What a generated block has less of it has not, nor a label of which neither it nor a neighbour has SURE_SHARE: that is
# the sampler's own noise. A label of a millilitre or two, thinly spread, can go with it.
LEAST_SHARE, SURE_SHARE = 0.05, 0.2
CANDIDATES = 16                         # heads in blocks that are drawn for every one that is kept
# Label maps drawn at most for every one that is kept; drawing ends at one this near, see distance, for each entry asked
# for: about 10 or 14 mL for 12, 4 mm of place, no lesion too many.
DRAFTS, NEAR = 4, 0.002
BRATS_FRAME = (240.0, 240.0, 155.0)     # mm, the volumes of every release
BRATS_MIDDLE = (119.5, 128.0, 72.0)     # mm in it, the middle of the brain, within 4 mm in all 33 cases looked at


def sphericity(mask):
    """pi^(1/3) (6 V)^(2/3) / A of a bool mask (D, H, W), cubic voxels: 1 for a ball, less for all else; NaN if empty.
    The surface A is the sum of the mask's gradient lengths, which is some 7% too much for a ball (its sphericity comes
    out as 0.92 to 0.96 at any size); counting the faces of voxels would be half as much again."""
    if not mask.any():
        return float("nan")
    area = torch.stack(torch.gradient(F.pad(mask.float(), (1,) * 6))).norm(dim=0).sum()
    return float(math.pi ** (1 / 3) * (6 * mask.sum()) ** (2 / 3) / area)


def characteristics(classes, condition, step):
    """What can be asked for, measured: classes int tensor (D, H, W), see to_cubes, voxels of `step` mm -> float32 in
    the order of ASKED. Without a tumour place and sphericity are NaN. Parts under 50 mm3 are not counted [LESION]."""
    labels, ml, names = tumour_labels(classes, condition), step ** 3 / 1000, CONDITIONS[condition]
    volumes, at = [float((labels == k).sum()) * ml for k in (1, 2, 3)], torch.stack(torch.where(labels > 0))
    fluid = float((classes == names.index("ventricles")).sum()) * ml if "ventricles" in names else torch.nan
    if not at.shape[1]:
        return torch.tensor([*volumes, *[torch.nan] * 4, 0.0, fluid])
    up, back, left = ((at.float().mean(1) - torch.stack(torch.where(classes > 0)).float().mean(1)) * step).tolist()
    ill = labels[tuple(slice(int(low), int(high) + 1) for low, high in zip(at.amin(1), at.amax(1)))] > 0    # its box
    sizes = torch.bincount(components(ill).flatten())[1:]
    return torch.tensor([*volumes, -left, -back, up, sphericity(ill), float((sizes * ml * 1000 >= 50).sum()),
                         fluid])


def scaled(wanted):
    """Characteristics (..., len(ASKED)) -> about -1..1, as the network takes them; NaN stays NaN."""
    volume, place, sphere, lesions, fluid = wanted.split((3, 3, 1, 1, 1), -1)
    return torch.cat([volume.clamp(min=0) ** (1 / 3) / 2.5 - 1, place / 60, 2 * sphere - 1,
                      torch.log2(lesions + 1) - 1, fluid.clamp(min=0) ** (1 / 3) / 2 - 1.5], -1)


def to_cubes(classes, thickness, step, depth, n_classes):
    """Slices (D, R, R) of a case, `thickness` mm apart -> uint8 (depth, R, R), `step` mm apart, by majority of what a
    new slice covers, the case in the middle; air above and below."""
    ratio = step / thickness
    weights = area_weights(len(classes), depth, (len(classes) - depth * ratio) / 2, ratio)
    share = np.stack([np.tensordot(weights, (classes == k).astype(np.float32), 1) for k in range(n_classes)])
    share[0] += 1 - share.sum(0)
    return share.argmax(0).astype(np.uint8)


def label_volumes(cache, parts, depth):
    """The label maps of these parts of a cache as volumes of cubic voxels: uint8 (N, depth, R, R)."""
    size, classes = cache.meta["resolution"], len(cache.meta["classes"])
    volumes = [to_cubes(cache.rows[its["first"]:its["first"] + its["count"], -1], its["thickness"],
                        cache.meta["fov"] / size, depth, classes) for its in cache.cases if its["part"] in parts]
    return torch.from_numpy(np.stack(volumes) if volumes else np.zeros((0, depth, size, size), np.uint8))


def read_label_maps(path, outlines, step, seed=0):
    """Label maps alone: an .npz with seg (N, X, Y, Z) of labels 0, 1, 2 and 3 or 4, the whole frame of 240 x 240 x
    155 mm in which BraTS releases its cases, voxels in the order of its files up to 2021 (x to the left, y to the
    back), and ids (N,). They have no brain: each gets the outline of one of `outlines`, uint8 (M, D, R, R) cubes of
    `step` mm, by lot. -> (uint8 (N, D, R, R), ids, their hashes as case_hashes has them, share of tumour voxels that
    lay outside the outline and were taken away). BadInput where the file holds something else."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            maps, ids = archive["seg"], [str(its) for its in archive["ids"]]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: cannot be read ({error}); expected an .npz with seg (N, X, Y, Z) and ids (N,)") \
            from error
    if maps.ndim != 4 or not len(maps) or len(maps) != len(ids) or not np.isin(maps, (0, 1, 2, 3, 4)).all():
        raise BadInput(f"{path}: seg is {maps.dtype} {maps.shape} beside {len(ids)} ids; expected (N, X, Y, Z) with "
                       "labels 0, 1, 2 and 3 or 4")
    shape, total, lost, out, hashes = outlines.shape[1:], 0, 0, [], []
    spacing = np.array(BRATS_FRAME) / maps.shape[1:]
    weights = [area_weights(n, size, (middle - size * step / 2) / mm, step / mm) for n, size, middle, mm in
               zip(maps.shape[1:], shape[::-1], BRATS_MIDDLE, spacing)]
    order = torch.randint(len(outlines), (len(maps),), generator=generator(seed, "outlines"))
    for labels, brain in zip(maps, outlines[order] > 0):
        labels = np.where(labels == 4, 3, labels).astype(np.uint8)
        hashes.append(case_hashes(labels[::-1, ::-1], brain.numpy())[0])         # canonical: to the right, to the front
        at = np.argwhere(labels) if labels.any() else np.zeros((1, 3), int)
        box = tuple(slice(low, high + 1) for low, high in zip(at.min(0), at.max(0)))         # the rest is empty
        share = np.stack([labels[box] == k for k in (1, 2, 3)]).astype(np.float32)
        for its, part in zip(weights, box):     # x, y, z in turn, each put behind the others
            share = np.tensordot(share, its[:, part], (1, 1))
        share = share.transpose(0, 3, 2, 1)     # (3, D, R, R)
        labels = torch.from_numpy(np.concatenate([1 - share.sum(0, keepdims=True), share]).argmax(0))   # (D, R, R)
        total, lost = total + int((labels > 0).sum()), lost + int(((labels > 0) & ~brain).sum())
        out.append(torch.where(brain, torch.where(labels > 0, labels + 1, 1), 0).to(torch.uint8))
    return torch.stack(out), ids, hashes, lost / max(total, 1)


def nearest_tumour(volumes, others, condition):
    """Of every label map the tumour of `others` that is most like its own: int (N, D, R, R), (M, D, R, R) -> Dice (N,),
    NaN without a tumour or others, and which (N,). Laid upon each other by their middles, as they are and mirrored; the
    best five also by up to a voxel more each way."""
    def laid(volume):
        ill = tumour_labels(volume, condition) > 0
        middle = [int(round(at.float().mean().item())) if len(at) else 0 for at in torch.where(ill)]
        return ill.roll([n // 2 - m for n, m in zip(ill.shape, middle)], (0, 1, 2))

    best, which = torch.full((len(volumes),), torch.nan), torch.zeros(len(volumes), dtype=torch.long)
    if not len(others):
        return best, which
    known = torch.stack([its for other in others for its in (laid(other), laid(other.flip(-1)))])
    flat, sizes = known.flatten(1).to(torch.uint8), known.sum((1, 2, 3))
    for i, one in enumerate(map(laid, volumes)):
        if not one.any():
            continue
        shared = flat[:, one.flatten()].sum(1)
        for j in (2 * shared / (sizes + one.sum())).topk(min(5, len(known))).indices.tolist():
            near = max(dice(one.roll(by, (0, 1, 2)), known[j]) for by in itertools.product((-1, 0, 1), repeat=3))
            if not near <= best[i]:
                best[i], which[i] = near, j // 2
    return best, which


# How heads are moved in training: degrees; scale, shift and bend (elastic) as shares of the volume.
MOVES = {"rotate": 10, "scale": 0.12, "shift": 0.04, "bend": 0.03}


def move_volumes(volumes, key):
    """Relatives of label volumes: uint8 (B, D, H, W) -> the same, each mirrored or not, turned, stretched, shifted and
    bent by chance, tumour and head as one (nearest neighbour). A few dozen heads become as many as there are steps.
    key: of generator."""
    (batch, *size), g = volumes.shape, generator(*key)
    uniform = lambda *shape: torch.rand(batch, *shape, generator=g) * 2 - 1
    angles = uniform(3) * math.radians(MOVES["rotate"])
    skew = torch.zeros(batch, 3, 3)
    for i, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
        skew[:, a, b], skew[:, b, a] = -angles[:, i], angles[:, i]
    stretch = torch.exp(uniform(3) * MOVES["scale"])
    stretch[:, 0] *= uniform().sign()                                       # left for right
    voxels = torch.tensor(size[::-1], dtype=torch.float32)                  # affine_grid counts x, y, z in half volumes
    turn = torch.matrix_exp(skew) * stretch[:, None] * voxels / voxels[:, None]
    where = F.affine_grid(torch.cat([turn, 2 * MOVES["shift"] * uniform(3)[:, :, None]], 2), (batch, 1, *size),
                          align_corners=False)
    bend = torch.randn(batch, 3, 4, 5, 5, generator=g) * 2 * MOVES["bend"]
    where = where + F.interpolate(bend, size, mode="trilinear", align_corners=True).movedim(1, -1)
    return F.grid_sample(volumes[:, None].float(), where, mode="nearest", align_corners=False)[:, 0].to(torch.uint8)


def to_slabs(x, size):
    """Volumes of channels (B, D, K, H, W) -> `size` slices as one picture, (B * D / size, size * K, H, W)."""
    return x.unflatten(1, (-1, size)).flatten(2, 3).flatten(0, 1)


def from_slabs(x, size, depth):
    """The way back: depth is that of a volume, D."""
    return x.unflatten(0, (-1, depth // size)).unflatten(2, (size, -1)).flatten(1, 2)


def block_shares(volumes, n_classes):
    """Share of every class in each block: int (B, D, R, R) -> float (B, D / BLOCK, K, R / BLOCK, R / BLOCK) in 0..1."""
    return torch.stack([F.avg_pool3d(one_hot(volume.long(), n_classes).movedim(1, 0), BLOCK).movedim(0, 1)
                        for volume in volumes])


def slab_shares(shares, which):
    """What the blocks of a head say of the voxels of one slab: shares (N, D', K, r, r), which int (N,) in 0..D' - 1 ->
    (N, BLOCK * K, R, R) in 0..1, linear between the middles of blocks."""
    rows = torch.arange(len(shares))
    near = torch.stack([shares[rows, (which + by).clamp(0, shares.shape[1] - 1)] for by in (-1, 0, 1)], 2)
    near = F.interpolate(near, scale_factor=BLOCK, mode="trilinear", align_corners=False)   # (N, K, 3 BLOCK, R, R)
    return near[:, :, BLOCK:2 * BLOCK].movedim(1, 2).flatten(1, 2)


def head_pictures(shares):
    """Shares (N, D', K, r, r) in 0..1 -> what the coarse network draws, 2 sqrt(share) - 1, (N, D' K, r, r): under the
    root a little of a class weighs more than the sampler's noise, and noise where there is nothing weighs little."""
    return to_slabs(2 * shares.sqrt() - 1, shares.shape[1])


def label_prior(shares, floor=0.1):
    """What `expected` gives the coarse network to go by: shares (N, D', K, r, r) -> mean and spread of head_pictures
    for every class of every block, left and right alike. A spread is never under `floor`: a tumour may come where
    none was seen."""
    x = head_pictures(shares)
    x = torch.cat([x, x.flip(-1)])
    atlas = torch.stack([x.mean(0), x.std(0).clamp(min=floor)])[:, None]
    return {"classes": atlas.mean((3, 4)), "atlas": atlas}                                  # (2, 1, C), (2, 1, C, r, r)


def open_entries(chance):
    """Which entries of a request training leaves open: chance (B, 2 + len(ASKED)), uniform in 0..1 -> bool
    (B, len(ASKED)). In one half of all requests any, from none to all; in the other all but volumes, and of those half,
    since that is what people ask for."""
    few, share, each = chance[:, :1] < 0.5, chance[:, 1:2], chance[:, 2:]
    volume = torch.tensor([name in VOLUMES for name in ASKED])
    return torch.where(few, ~volume | (each > 0.5), each > share)


def head_scalars(wanted):
    """Wanted characteristics (B, len(ASKED)), NaN where open -> scalars of the coarse network (B, 1 + len(ASKED)): 0
    for the slice position, which a head has not, then the request."""
    return torch.cat([torch.zeros(len(wanted), 1), scaled(wanted)], 1)


def slab_scalars(which, slabs, wanted):
    """Scalars of the fine network (B, 3): position of slab which (B,) of `slabs` in -1..1, then of what is wanted
    (B, len(ASKED)) what blocks hardly show or not at all, sphericity and lesions."""
    position = (which + 0.5) / slabs * 2 - 1
    return torch.cat([position[:, None], scaled(wanted)[:, [ASKED.index(name) for name in UNSEEN]]], 1)


def parse_request(text):
    """"et=12,ed=5..30,x=20" -> {"ET": (12.0, 12.0), "ED": (5.0, 30.0), "x": (20.0, 20.0)}. BadInput names what is
    wrong."""
    known, out = {name.lower(): name for name in ASKED}, {}
    for word in filter(None, text.split(",")):
        name, _, value = word.partition("=")
        low, dots, high = value.partition("..")
        try:
            low, high = float(low), float(high if dots else low)
        except ValueError:
            low = high = math.nan
        if name.strip().lower() not in known or not low <= high or low < 0 and name.strip().lower() not in "xyz":
            raise BadInput(f"--request {word}: cannot be asked for; write {', '.join(known)} with a number or a range, "
                           "like et=12,ed=20..60")
        out[known[name.strip().lower()]] = (low, high)
    return out


def requested(request, number, count, seed):
    """What case `number` of `count` is asked to be: request from parse_request -> float32 (len(ASKED),), NaN where
    open. Ranges are spread evenly over the cases, each in an order of its own."""
    out = torch.full((len(ASKED),), torch.nan)
    for name, (low, high) in request.items():
        order = torch.randperm(count, generator=generator(seed, "request", name))
        out[ASKED.index(name)] = low + (high - low) * (int(order[number]) + 0.5) / count
    return out


def require_condition(condition, wanted):
    """BadInput unless label maps of `condition` can be had as those of `wanted`."""
    if wanted not in (condition, "tumour"):
        raise BadInput(f"the image generator wants the condition {wanted}, the label generator makes {condition}; "
                       f"train it with --generate labels --condition {wanted}")


def prepare_labels(classes, condition, step, resolution, fov, wanted):
    """A generated label map as prepare_case returns one, without images: classes int64 (D, R, R) of `condition`, voxels
    of `step` mm -> cubic voxels of fov / resolution mm, classes of the condition `wanted`. BadInput where that asks for
    tissue and there is none."""
    require_condition(condition, wanted)
    if wanted != condition:
        labels = tumour_labels(classes, condition)
        classes = torch.where(labels > 0, labels + 1, (classes > 0).long())
    ratio = fov / resolution / step
    depth, n = round(len(classes) / ratio), len(CONDITIONS[wanted])
    share = one_hot(classes, n).movedim(1, 0).numpy()                       # (K, D, R, R)
    for axis, size in ((1, depth), (2, resolution), (3, resolution)):
        have = share.shape[axis]
        start = (have - size * ratio) / 2
        weights = (area_weights(have, size, start, ratio) if ratio >= 1 else
                   linear_weights(size, have, -start / ratio, 1 / ratio))
        share = np.moveaxis(np.tensordot(weights, share, (1, axis)), 0, axis)
    share[0] += 1 - share.sum(0)
    classes = share.argmax(0).astype(np.uint8)
    with_brain = np.where((classes > 0).any((1, 2)))[0]
    if not len(with_brain):
        raise BadInput("the label generator drew no brain; train it longer")
    low, high = with_brain[0], with_brain[-1]
    position = 2 * (np.arange(depth) - low) / max(high - low, 1) - 1
    affine = np.diag([fov / resolution] * 3 + [1.0])
    affine[:3, 3] = -np.array([resolution - 1, resolution - 1, depth - 1]) / 2 * fov / resolution
    labels = from_slices(tumour_labels(classes, wanted)).astype(np.uint8)
    brain = from_slices(classes > 0)
    return {"images": None, "classes": classes, "position": position.astype(np.float32), "labels": labels,
            "brain": brain, "hashes": case_hashes(labels, brain), "cut": 0.0,
            "grid": Grid(brain.shape, affine, resolution, (0.0, 0.0), (1.0, 1.0))}


@dataclass
class LabelGenerator:
    """Both networks of a run of train_ddpm.py --generate labels, what they draw (a condition, voxels of `step` mm),
    what the heads they learned from measure (N, len(ASKED)), the hashes of those, whether they were phantoms or
    patients and how many, and a digest of the networks' files."""
    coarse: Denoiser
    fine: Denoiser
    condition: str
    step: float
    measured: torch.Tensor
    trained_on: list = ()
    data: str = "phantoms"                      # or "patients"
    patients: int = 0
    digest: str = ""


def load_label_generator(folder, device):
    """The LabelGenerator of a run's folder, which holds "coarse" and "fine", or of a folder of published weights.
    BadInput where a part is missing or the two are of different runs: other cases, condition, resolution or fov."""
    parts = [Path(folder) / part for part in ("coarse", "fine")]
    published = not parts[0].exists() and parts[0].with_suffix(".npz").exists()
    (coarse, one), (fine, other) = [load_generator(path.with_suffix(".npz" if published else ""), device, kind="labels")
                                    for path in parts]
    if any(one[name] != other[name] for name in ("trained_on", "condition", "resolution", "fov")):
        raise BadInput(f"{folder}: its coarse and its fine network are of different runs; train it anew")
    both = "".join(file_hash(its["file"]) for its in (one, other))
    digest = hashlib.sha256(both.encode()).hexdigest()
    return LabelGenerator(coarse, fine, one["condition"], one["fov"] / one["resolution"], torch.tensor(one["measured"]),
                          one["trained_on"], one["data"], one["patients"], digest)


def measure_shares(shares, condition, step):
    """What characteristics would say of heads in blocks: shares (N, D', K, r, r), voxels of `step` mm ->
    (N, len(ASKED)), NaN for lesions, which blocks do not show, and where there is nothing to measure. Sphericity is a
    guess: measured as of voxels with shares for the mask, for which rough surfaces are smooth, then 0.8 of it less 0.2.
    tests/bench_labels.py shapes says how it follows that of the voxels."""
    names, ml = CONDITIONS[condition], (BLOCK * step) ** 3 / 1000
    volumes = shares.sum((1, 3, 4)) * ml                                                    # (N, K)
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in (shares.shape[1], *shares.shape[3:])], indexing="ij")

    def middle(part):                           # slice, row and column of its centre, in blocks
        return [(part * axis).sum((1, 2, 3)) / part.sum((1, 2, 3)) for axis in axes]

    ill, head = shares[:, :, names.index(LABELS[0]):].sum(2), 1 - shares[:, :, 0]
    up, back, left = [(a - b) * BLOCK * step for a, b in zip(middle(ill), middle(head))]
    area = torch.stack(torch.gradient(F.pad(ill, (1,) * 6), dim=(1, 2, 3))).norm(dim=0).sum((1, 2, 3))
    sphere, unknown = math.pi ** (1 / 3) * (6 * ill.sum((1, 2, 3))) ** (2 / 3) / area, torch.full_like(up, torch.nan)
    fluid = volumes[:, names.index("ventricles")] if "ventricles" in names else unknown
    return torch.stack([*volumes[:, -3:].T, -left, -back, up, 0.8 * sphere - 0.2, unknown, fluid], 1)


def first_volume(condition):
    """The first class of a condition whose volume can be asked for; all after it can too."""
    return min(at for at, name in enumerate(CONDITIONS[condition]) if name in ASKED)


def volumes_wanted(wanted, condition):
    """The classes whose volume wanted (len(ASKED),) names: [(index in CONDITIONS[condition], mL)]."""
    names = CONDITIONS[condition]
    return [(names.index(name), float(ml)) for name, ml in zip(ASKED, wanted) if name in names and ml == ml]


def distance(measured, wanted, asked=None):
    """How far heads are from a request: measured (N, len(ASKED)), wanted (len(ASKED),), NaN where open -> (N,). What is
    wanted and not there, as the place of no tumour, is far. asked: bool (len(ASKED),); all else counts a tenth."""
    off = torch.nan_to_num((scaled(measured) - scaled(wanted)) ** 2, nan=4.0) * ~torch.isnan(wanted)
    return (off if asked is None else torch.where(asked, off, off / 10)).sum(1)


def fill_volumes(wanted, known, key, near=0.05):
    """A request (len(ASKED),) whose open volumes are those of a training head: known (N, len(ASKED)), what these heads
    measure; one of them by lot, of the share `near` that are most like what is asked, or of all if nothing is. So a set
    of heads has volumes as patients have them; by itself the coarse network draws tumours too small. Heads
    without tumour count only if nothing is asked of the tumour, or lesions=0: et=0 is a tumour without ET."""
    open_ = torch.isnan(wanted)
    ill = known[:, :len(LABELS)].sum(1) > 0
    if not open_[:ASKED.index("ventricles")].all() and wanted[ASKED.index("lesions")] != 0 and ill.any():
        known = known[ill]
    count = len(known) if open_.all() else max(1, round(near * len(known)))
    lot = int(torch.randint(count, (1,), generator=generator(*key, "lot")))
    one = known[distance(known, wanted).argsort(stable=True)[lot]]
    return torch.where(open_ & torch.tensor([name in VOLUMES for name in ASKED]), one, wanted)


def without(shares, classes):
    """Shares of classes (..., K, r, r) without these: what is left but air (class 0) fills the rest."""
    rest = shares.clone().movedim(-3, 0)                                                    # (K, ..., r, r)
    rest[classes] = 0
    rest[1:] *= (1 - rest[0]) / rest[1:].sum(0).clamp(min=1e-30)
    return rest.movedim(0, -3)


def sample_shares(denoiser, condition, step, wanted, key, settings=SAMPLING, candidates=CANDIDATES, asked=None):
    """A head in blocks: wanted float (len(ASKED),), NaN where open -> shares (D', K, r, r) in 0..1, 1 in sum.
    `candidates` heads are drawn; the one that measures most like what is wanted is it. step: mm a voxel; asked: see
    distance."""
    if not any(value == value and name != "lesions" for name, value in zip(ASKED, wanted)):
        candidates = 1                          # nothing to choose by
    shape = candidates, *denoiser.prior["atlas"].shape[2:]                                  # (N, D' K, r, r)
    scalars, no_labels = head_scalars(wanted.expand(candidates, -1)), torch.zeros(candidates, 0, *shape[2:])

    def noise(step):
        return torch.randn(shape, generator=generator(*key, "blocks", step))

    x, depth = sample_guided(denoiser, no_labels, scalars, noise, settings), shape[-1] * 3 // 4
    shares = ((from_slabs(x, depth, depth) + 1) / 2).clamp(1e-6, 1) ** 2
    shares, first = shares / shares.sum(2, keepdim=True), first_volume(condition)
    shares[:, :, first:] *= F.max_pool3d(shares[:, :, first:].movedim(2, 1), 3, 1, 1).movedim(1, 2) >= SURE_SHARE
    shares = without(shares, [])
    shares = torch.where((shares < LEAST_SHARE) & (shares < shares.amax(2, keepdim=True)), 0.0, shares)
    shares = shares / shares.sum(2, keepdim=True)
    best = shares[distance(measure_shares(shares, condition, step), wanted, asked).argmin()]
    return without(best, [at for at, ml in volumes_wanted(wanted, condition) if ml == 0])


def voxels_due(shares, condition, step, wanted):
    """How many voxels of each class a head should have: as wanted (len(ASKED),) says, else as the blocks do,
    (D', K, r, r) -> float (K,)."""
    voxels = shares.sum((0, 2, 3)) * BLOCK ** 3
    for at, ml in volumes_wanted(wanted, condition):
        voxels[at] = ml * 1000 / step ** 3
    return voxels


def settle(scores, voxels, first):
    """Scores of classes in -1..1 become a label map: float (D, K, R, R) -> int64 (D, R, R).

    They are smoothed over neighbours, (1, 6, 1) / 8 along each axis, which takes away single voxels that are not sure
    and lets slabs meet; more of it, (1, 2, 1) / 4, would make tumours rounder than they are. Air gets that, twice:
    heads are smooth. Of the scores as shares, (score + 1) / 2, the largest wins, after each class from `first` on is
    multiplied by a number of its own, the same everywhere, 1/10 to 10: such that it gets about as many voxels as
    `voxels` (K,) says, none if that is 0. Request and blocks say how much, see voxels_due, the scores where. What
    nothing else claims is class 1, brain, and so is a voxel of these classes that touches no other.
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
        classes[(chosen * F.avg_pool3d(chosen, 3, 1, 1) * 27).round()[0] == 1] = 1      # itself alone, of 27
        there = torch.bincount(classes.flatten(), minlength=len(voxels))
        gain[first:] = ((gain * ((voxels + 5) / (there + 5)) ** 0.3).clamp(1 / most, most) * (voxels > 0))[first:]
    return classes


def draw_labels(model, wanted, key, settings, candidates, asked):
    """One label map as the networks draw it: see sample_labels; asked: see distance."""
    shares = sample_shares(model.coarse, model.condition, model.step, wanted, key, settings, candidates, asked)
    slabs = len(shares)
    onehot = slab_shares(shares.expand(slabs, *shares.shape), torch.arange(slabs))         # (D', BLOCK K, R, R)
    scalars = slab_scalars(torch.arange(slabs), slabs, wanted.expand(slabs, -1))

    def noise(step):
        return torch.randn(onehot.shape, generator=generator(*key, "voxels", step))

    x = sample_guided(model.fine, onehot, scalars, noise, {**settings, "guidance": 1.0})
    return settle(from_slabs(x, BLOCK, BLOCK * slabs)[0], voxels_due(shares, model.condition, model.step, wanted),
                  first_volume(model.condition))


def sample_labels(model, wanted, key, settings=SAMPLING, candidates=CANDIDATES, drafts=DRAFTS):
    """One label map: a LabelGenerator, wanted float (len(ASKED),), NaN where open -> classes int64 (D, R, R).
    key: as in sample_volume; settings: see SAMPLING, of which guidance is for the coarse network and coherence does not
    matter; candidates: see sample_shares; drafts: so many label maps are drawn at most, until one is NEAR what was
    asked; the nearest is kept. Volumes left open: see fill_volumes."""
    asked, best = ~torch.isnan(wanted), (math.inf, None)
    for i in range(drafts):
        its = (*key, i) if i else key
        whole = fill_volumes(wanted, model.measured, its)
        classes = draw_labels(model, whole, its, settings, candidates, asked)
        off = float(distance(characteristics(classes, model.condition, model.step)[None], whole, asked))
        if best[1] is None or off < best[0]:
            best = off, classes
        if not asked.any() or off < NEAR * (1 + asked.sum()):
            break
    return best[1]


# ================================================================================================
# 13  WRITING
# Synthetic cases as BraTS-2023 folders that say what they are, and pictures.
# ================================================================================================

LABEL_COLOURS = {"air": "#000000", "brain": "#555555", "CSF": "#303a60", "grey": "#606060",
                 "white": "#a0a0a0", "ventricles": "#303a60", "NCR": "#3b7dd8", "ED": "#58b368", "ET": "#f2c14e"}


def colour_labels(classes, condition):
    """Class map int (H, W) -> colour picture float (H, W, 3)."""
    rgb = [[int(LABEL_COLOURS[name][i:i + 2], 16) / 255 for i in (1, 3, 5)] for name in CONDITIONS[condition]]
    return np.array(rgb)[np.asarray(classes)]


def show(*its):
    """Print the source of functions or classes, as notebooks do."""
    print("\n\n".join(inspect.getsource(one).rstrip() for one in its))


def new_figure(path, width, height):
    """A figure of so many inches; where no file is asked for (path None) one of pyplot's, which notebooks show."""
    if path is None:
        import matplotlib.pyplot as plt
        return plt.figure(figsize=(width, height))
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=110)


def draw_rows(path, rows, titles, condition, headline=""):
    """A PNG of pictures; path None: drawn for a notebook. rows: list of lists of (H, W) tensors or arrays; integer
    ones are class maps, float ones images in [-1, 1], (H, W, 3) colours, None leaves a gap. titles: one per column."""
    height = 1.25 * len(rows) + 0.6
    figure = new_figure(path, 1.25 * len(titles), height)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=7)
    for line, row in zip(axes, rows):
        for axis, image in zip(line, row):
            if image is None:
                continue
            image = np.asarray(image)
            if image.ndim == 3:
                axis.imshow(image, interpolation="nearest")
            elif image.dtype.kind in "iu":
                axis.imshow(colour_labels(image, condition), interpolation="nearest")
            else:
                axis.imshow(image, cmap="gray", vmin=-1, vmax=1)
    figure.suptitle(headline, fontsize=9, y=1 - 0.06 / height, va="top")
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.5 / height, 0.02, 0.02)
    if path is not None:
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def overlay(image, labels, strength=0.55):
    """A picture (H, W) in [-1, 1] under its labels int (H, W) in 0..3 -> colours (H, W, 3) in 0..1."""
    grey = np.repeat((np.asarray(image)[..., None] + 1) / 2, 3, -1).clip(0, 1)
    labels = np.asarray(labels).astype(int)
    colour = colour_labels(np.where(labels > 0, labels + 1, 0), "tumour")
    return np.where(labels[..., None] > 0, (1 - strength) * grey + strength * colour, grey)


def draw_planes(path, rows, titles, condition):
    """Label volumes cut in three planes through the middle of their tumour: rows of volumes int (D, H, W), each becomes
    a slice from below, from the front and from the right."""
    lines = []
    for volumes in rows:
        line = []
        for volume in volumes:
            ill = torch.stack(torch.where(tumour_labels(volume, condition) > 0)).float()
            z, y, x = ill.mean(1).round().int().tolist() if ill.shape[1] else [n // 2 for n in volume.shape]
            line += [volume[z].long(), volume[:, y].flip(0).long(), volume[:, :, x].flip(0).long(), None]
        lines.append(line[:-1])
    draw_rows(path, lines, [t for title in titles for t in (title, "", "", "")][:-1], condition)


def draw_lines(path, panels, xlabel="step", xscale="linear"):
    """A PNG of plots side by side; path None: drawn for a notebook. panels: list of (title, style, {label: (x, y) or
    (x, y, error)}); style: the scale of y, "linear" or "log", for lines; "points" for points and, where there is no
    error, a line; "bars"."""
    figure = new_figure(path, 4.6 * len(panels) + 1, 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, style, lines) in zip(axes[0], panels):
        for label, (x, y, *error) in lines.items():
            if style == "bars":
                axis.bar(x, y, label=label, width=0.5)
            else:
                axis.errorbar(x, y, *error, label=label, lw=1, capsize=2, marker="o" if error else None, ms=3,
                              ls="" if error and style == "points" else "-")
        axis.set(xlabel=xlabel, title=title, yscale="log" if style == "log" else "linear")
        if xscale != "linear":                  # setting it takes the names off an axis of words
            axis.set_xscale(xscale)
        axis.title.set_fontsize(9)
        if lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    if path is not None:
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def image_counts(images, classes):
    """Images float (D, C, R, R) in [-1, 1] -> int16 counts 0..1000: 0 in air, at least 1 in the brain.

    The outline is part of the condition, so what lies outside is written as the air it is.
    """
    counts = np.clip(np.rint((np.asarray(images) + 1) * 500), 1, 1000)
    return np.where(np.asarray(classes)[:, None] > 0, counts, 0).astype(np.int16)


def write_csv(path, rows):
    """Rows, dicts with the same keys, as a CSV file; floats with six digits."""
    def write(temporary):
        with open(temporary, "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)

    replace_file(path, write)


def write_json(path, facts):
    """A dict as a JSON file; NaN and infinity, which JSON has not, become null."""
    plain = lambda x: ({k: plain(v) for k, v in x.items()} if isinstance(x, dict) else
                       [plain(v) for v in x] if isinstance(x, (list, tuple)) else
                       None if isinstance(x, float) and not math.isfinite(x) else x)
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(plain(facts), indent=1) + "\n"))


def write_nifti(path, volume, affine, words, code):
    """Write a volume (X, Y, Z) as .nii.gz and read it back: OSError where other bytes come back than were sent.

    The header is fresh: nothing of a source file (names, comments, extensions) can travel along. words: what it
    says of itself, 79 letters at most; code: NIfTI's code for what the affine refers to (1 scanner, 2 another file).
    """
    image = nib.Nifti1Image(np.ascontiguousarray(volume), affine)
    image.header["descrip"] = words.encode()
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nib.save(image, path)
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    try:
        back = nib.Nifti1Image.from_bytes(unpack(path)[0])
        whole = np.array_equal(np.asanyarray(back.dataobj), volume) and np.allclose(back.affine, affine, atol=1e-4)
    except Exception as error:
        raise OSError(f"{path} cannot be read back ({error})") from error
    if not whole:
        raise OSError(f"{path} does not read back as it was written")


def write_case(folder, case, images, labels, affine, facts, classes=None):
    """Write one synthetic case as a BraTS-2023 folder, whole or not at all; returns the folder.

    images: counts int16 (C, X, Y, Z); labels: uint8 (X, Y, Z) in 0..3; both canonical, with affine
    (4, 4). facts: what goes into the JSON sidecar beside the volumes. classes: uint8 (X, Y, Z), values
    index the condition; written as CLASSES_NAME. Every file says SYNTHETIC.
    """
    target, building = Path(folder) / case, Path(folder) / f".{case}.{os.getpid()}.tmp"
    building.mkdir(parents=True, exist_ok=True)
    try:
        for name, volume in (*zip((NAMES_2023[name] for name in MODALITIES), images), ("seg", labels)):
            write_nifti(building / f"{case}-{name}.nii.gz", volume, affine, f"SYNTHETIC brainsyn {__version__}", 2)
        if classes is not None:
            write_nifti(building / CLASSES_NAME.format(case), classes, affine, f"SYNTHETIC brainsyn {__version__}", 2)
        write_json(building / f"{case}.json", facts)
        os.replace(building, target)
        sync_folder(folder)
    finally:
        if building.exists():
            shutil.rmtree(building)
    return target


def write_description(folder):
    """dataset_description.json of a set of synthetic cases, as BIDS wants it for data that was made: the mark that
    stands above all its cases."""
    write_json(Path(folder) / "dataset_description.json", {
        "Name": "SYNTHETIC brain MRI with tumour labels, made by brainsyn", "BIDSVersion": "1.9.0",
        "DatasetType": "derivative", "SyntheticData": "YES",
        "GeneratedBy": [{"Name": "brainsyn", "Version": __version__,
                         "Description": "diffusion model, label map -> T1, T1ce, T2, FLAIR; see DATASHEET.md"}]})


def write_dataset_json(folder):
    """dataset.json of all cases in a folder, for nnU-Net (`dataset`; training on regions) and MONAI (`training`)."""
    folder, entries = Path(folder), {}
    for case in find_cases(folder):
        paths = {name: path.relative_to(folder).as_posix() for name, path in case.files.items()}
        entries[case.case] = {"images": [paths[name] for name in MODALITIES], "label": paths["seg"]}
    write_json(folder / "dataset.json", {
        "name": "SYNTHETIC brain MRI made by brainsyn",
        "channel_names": dict(zip("0123", ("T1", "T1ce", "T2", "FLAIR"))),
        "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [1, 3], "enhancing_tumor": [3]},
        "regions_class_order": [2, 1, 3],       # what is WT and nothing more is ED, and so on
        "numTraining": len(entries), "file_ending": ".nii.gz", "dataset": entries,
        "training": [{"image": its["images"], "label": its["label"]} for its in entries.values()]})


def write_datasheet(folder):
    """DATASHEET.md of a set of synthetic cases, from their sidecars and, where they are there, judge.json and the
    audit in the sidecars: what they are, how they were made, what they are not for."""
    folder = Path(folder)
    cases = [(case, synthetic_facts(case)) for case in find_cases(folder)]
    several = lambda name: ", ".join(sorted({str(facts[name]) for _, facts in cases if name in facts}))
    volumes = {name: [facts["VolumesML"][name] for _, facts in cases] for name in (*LABELS, "WT")}
    lines = [
        "# Datasheet", "",
        f"**SYNTHETIC.** {len(cases)} cases, made by brainsyn {several('GeneratorVersion')}. No patient was scanned "
        "for any of these pictures.", "",
        "## What they are", "",
        "Four modalities (T1, T1ce, T2, FLAIR) and a tumour label map (1 NCR, 2 ED, 3 ET) of each case, "
        "skull-stripped, aligned, as NIfTI in BraTS-2023 folders; `dataset.json` lists them for nnU-Net and MONAI. "
        "Signal is in arbitrary counts, 0 in air, up to 1000.", "",
        "| volume in mL | least | median | most |", "|---|---|---|---|",
        *(f"| {name} | {min(its):.1f} | {np.median(its):.1f} | {max(its):.1f} |" for name, its in volumes.items()), "",
        "## How they were made", "",
        f"A v-prediction diffusion model drew each slice from a label map (condition: {several('Condition')}; "
        f"{several('Steps')} network calls, sampler {several('Sampler')}, guidance {several('Guidance')}, noise "
        f"shared along z over {several('Coherence')} mm). Label maps: {several('LabelMaps')}, edits: "
        f"{several('Edits')}. Every case has a JSON sidecar with checkpoint, seed, settings and hashes; the same "
        "command makes the same voxels.", "",
        "## From what data", "",
        f"The generator was trained on {several('GeneratorPatients')} cases ({several('GeneratorData')})"
        + (f", that of the label maps on {several('LabelGeneratorPatients')}" if "generated" in several("LabelMaps")
           else "") + ". Their "
        f"hashes are in every sidecar. {sum(facts['UsedInTraining'] for _, facts in cases)} of {len(cases)} cases "
        "carry a label map or brain outline of its training cases"
        + ("; phantoms are no persons." if several("GeneratorData") == "phantoms" else
           "; such outlines are patient data."), "", "## Figures", ""]
    try:
        report = json.loads((folder / "judge.json").read_text())
        lines += [f"Judged against {report['held_out_cases']} held-out cases:", "", "| figure | synthetic | real |",
                  "|---|---|---|", *(f"| {name} | {report['synthetic'][name]} | {value} |"
                                     for name, value in report["real"].items()), ""]
    except (OSError, ValueError, KeyError):
        lines += ["Not judged: `python sample.py --judge` compares them with held-out cases.", ""]
    audits = {json.dumps(facts["Audit"], sort_keys=True) for _, facts in cases if "Audit" in facts}
    if len(audits) == 1 and all("Audit" in facts for _, facts in cases):
        audit = json.loads(audits.pop())
        lines += [f"Audited for copies of training cases: **{audit['verdict']}**. " + audit["words"], ""]
    else:
        lines += ["Not audited for copies of training cases: `python sample.py --audit` does that.", ""]
    lines += [
        "## What they must not be used for", "",
        "- Nothing clinical: no diagnosis, no treatment, no teaching of what a disease looks like.",
        "- No validation of a clinical claim, and no test set for a segmenter that people rely on: validate on real "
        "scans.",
        "- No claim of privacy: an audit that finds nothing bounds the share of copies, no more.", "",
        "## Known limits", "",
        "- Slices are drawn one by one; they agree along z by shared noise only, and folds may not run through.",
        "- Anatomy outside the tumour is plausible at best; disease other than the labels is not modelled.",
        "- What the generator's training data lacked, these lack: other scanners, ages, diseases, artefacts.", ""]
    replace_file(folder / "DATASHEET.md", lambda temporary: temporary.write_text("\n".join(lines)))


def synthetic_facts(case):
    """The sidecar of a synthetic Case as a dict. BadInput where there is none: its source is unknown."""
    path = case.folder / f"{case.case}.json"
    try:
        facts = json.loads(path.read_text())
        if facts["SyntheticData"] != "YES" or not {"LabelMapSHA256", "BrainSHA256", "GeneratorTrainedOn"} <= set(facts):
            raise ValueError("it does not say SyntheticData YES and where it comes from")
        return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: no sidecar of a synthetic case ({error}); make the set with sample.py") from error


def sidecar_hash(case):
    """sha256 of what the sidecar of a synthetic Case says of how it was made; an audit added later is no change."""
    facts = {k: v for k, v in synthetic_facts(case).items() if k != "Audit"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def contaminated(case, hashes):
    """Whether a synthetic Case owes anything to label maps with these hashes: its own map, the outline, or
    one its generator was trained on."""
    facts, known = synthetic_facts(case), {digest[:16] for digest in hashes}
    return any(digest[:16] in known for digest in
               (facts["LabelMapSHA256"], facts["BrainSHA256"], *facts["GeneratorTrainedOn"]))


def write_labels(path, labels, case, affine):
    """Write predicted labels uint8 (X, Y, Z), canonical with `affine`, as NIfTI voxel for voxel on the grid
    of the case's own files, in their storage order: 1 NCR, 2 ED, 3 ET."""
    there = nib.load(case.files["t1"]).affine
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(there))
    stored = nib.apply_orientation(labels, turn).astype(np.uint8)

    def write(temporary):                       # nibabel goes by the ending of a name
        whole = temporary.with_suffix(".nii.gz")
        write_nifti(whole, stored, there, f"brainsyn {__version__} prediction 1 NCR 2 ED 3 ET", 1)
        os.replace(whole, temporary)

    replace_file(path, write)


# ================================================================================================
# 14  JUDGING
# Does a sample obey its mask, is air black, is the picture as sharp and as contrasted as a scan?
# Each figure is computed in the same way on real and on sampled slices.
# ================================================================================================


def erode(mask, times=1):
    """Bool (N, H, W) without its outermost `times` pixels."""
    mask = mask.float().unsqueeze(1)
    for _ in range(times):
        mask = 1 - F.max_pool2d(1 - mask, 3, 1, 1)
    return mask[:, 0] > 0.5


def lesion_contrast(images, classes, condition, modality, label, voxels=10):
    """In how many slices is a tumour label brighter than healthy brain? -> (share, slices counted).

    images (N, C, H, W), classes (N, H, W); counted are slices with at least `voxels` of the label;
    compared are mean signals in `modality` inside the label and in all healthy classes.
    """
    names = CONDITIONS[condition]
    image = images[:, MODALITIES.index(modality)]
    inside = classes == names.index(label)
    healthy = (classes > 0) & (classes < names.index(LABELS[0]))
    wins = [bool(picture[a].mean() > picture[b].mean()) for picture, a, b in zip(image, inside, healthy)
            if a.sum() >= voxels and b.any()]
    return (sum(wins) / len(wins) if wins else math.nan), len(wins)


def black_air(images, classes, level=-0.95):
    """Share of air pixels at or below `level` in every modality's picture, over all slices."""
    air = (classes == 0).unsqueeze(1).expand_as(images)
    return (images[air] <= level).float().mean().item()


def fine_power(images, classes):
    """Mean squared high-frequency signal per modality (C,): each picture minus its 3x3 mean, inside
    the brain, two pixels from its edge. Too low is blur, too high is noise."""
    inside = erode(classes > 0, 2).unsqueeze(1)
    fine = images - F.avg_pool2d(images, 3, 1, 1)
    return (fine ** 2 * inside).sum((0, 2, 3)) / inside.sum().clamp(min=1)


def grey_white_contrast(images, classes, condition):
    """How far apart grey and white matter are on T1: mean over slices of (mean of the white cluster
    minus mean of the grey one), clusters found in each picture by tissue_clusters, since a sampled
    brain has its own folds. Slices with at least 300 healthy pixels."""
    healthy = (classes > 0) & (classes < CONDITIONS[condition].index(LABELS[0]))
    contrast = []
    for image, mask in zip(images, healthy):
        if mask.sum() < 300:
            continue
        scans = ((image + 1) * 127.5).numpy()
        tissue, t1 = tissue_clusters(scans, mask.numpy()), image[MODALITIES.index("t1")].numpy()
        if (tissue == 2).any() and (tissue == 3).any():
            contrast.append(t1[tissue == 3].mean() - t1[tissue == 2].mean())
    return float(np.mean(contrast)) if contrast else math.nan


def roughness(volume, classes):
    """Slice-to-slice roughness: mean |difference| of neighbouring slices (D, C, H, W) over voxels
    that are the same healthy or tumour class in both, divided by the spread of brain voxels."""
    same = ((classes[1:] == classes[:-1]) & (classes[1:] > 0)).unsqueeze(1)
    step = (volume[1:] - volume[:-1]).abs() * same
    brain = volume.movedim(1, 0)[:, classes > 0]
    return (step.sum() / (same.sum() * volume.shape[1]).clamp(min=1) / brain.std(1).mean()).item()


def mean_roughness(prepared):
    """Mean roughness over cases. prepared: list of (Case, what prepare_case returns)."""
    return float(np.mean([roughness(to_images(got["images"]), torch.from_numpy(got["classes"]))
                          for _, got in prepared]))


def judge_slices(real, sampled, classes, condition):
    """The closing figures of a run: {name: value}. real, sampled (N, C, H, W) in [-1, 1] on the
    same label maps classes (N, H, W). NaN where there is nothing to measure."""
    figures = {}
    for who, images in (("real", real), ("sampled", sampled)):
        for modality, label in (("t1ce", "ET"), ("flair", "ED")):
            share, n = lesion_contrast(images, classes, condition, modality, label)
            figures[f"{who}_{modality}_{label}_above_brain"] = share
            figures[f"slices_with_{label}"] = n
        figures[f"{who}_air_black"] = black_air(images, classes)
        figures[f"{who}_grey_white"] = grey_white_contrast(images, classes, condition)
    figures["fine_power_ratio"] = (fine_power(sampled, classes) / fine_power(real, classes)).mean().item()
    figures["grey_white_ratio"] = figures["sampled_grey_white"] / figures["real_grey_white"]
    return figures


def label_figures(classes, condition):
    """How a label map hangs together, classes int (D, H, W) -> {name: value}, NaN where there is no tumour (no ET):

    pieces      connected pieces of the tumour, however small
    slice_dice  Dice of the tumour in neighbouring slices, mean over those where either shows some
    outside     share of the tumour that hangs on no brain: off the largest piece of the head
    apart       share of ET in pieces of tumour that are ET alone
    """
    labels = tumour_labels(classes, condition)
    ill, et = labels > 0, labels == 3
    if not ill.any():
        return dict.fromkeys(("pieces", "slice_dice", "outside", "apart"), math.nan)
    head, parts = components(classes > 0), components(ill)
    main = torch.bincount(head[head > 0]).argmax()
    other = torch.bincount(parts[ill & ~et], minlength=int(parts.max()) + 1)            # NCR and ED, by piece
    return {"pieces": int(parts.max()),
            "slice_dice": float(np.mean([dice(a, b) for a, b in zip(ill, ill[1:]) if (a | b).any()])),
            "outside": float((head[ill] != main).float().mean()),
            "apart": float((other[parts[et]] == 0).float().mean()) if et.any() else math.nan}


def judge_labels(made, real, condition, step):
    """Figures of generated label volumes beside real ones, int (N, D, R, R) and (M, D, R, R), voxels of `step` mm:
    means of label_figures of both, and the Frechet distance of their characteristics as the network takes them, over
    those that have a tumour. NaN where fewer than two have."""
    figures, spread = {}, []
    for who, volumes in (("real", real), ("made", made)):
        each = [label_figures(its.long(), condition) for its in volumes]
        figures |= {f"{who}_{name}": float(np.nanmean([its[name] for its in each] + [math.nan])) for name in each[0]}
        its = scaled(torch.stack([characteristics(its.long(), condition, step) for its in volumes]))
        its = its if "ventricles" in CONDITIONS[condition] else its[:, :-1]
        spread.append(its[~torch.isnan(its).any(1)])
    enough = min(map(len, spread)) > 1
    return figures | {"shape_distance": frechet_distance(*spread) if enough else math.nan}


def frechet_distance(a, b):
    """Frechet distance of two sets of features (N, F), (M, F), each taken as a Gaussian [FID]:
    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). It shrinks with more images: compare
    equal numbers only, and beside the distance of two real sets."""
    a, b = a.double(), b.double()
    cov = [torch.cov(x.T) for x in (a, b)]
    values, vectors = torch.linalg.eigh(cov[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov[1] @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum().item() + (cov[0].trace() + cov[1].trace() - 2 * cross).item()


def kernel_distance(a, b):
    """KID [KID]: squared maximum mean discrepancy of features (N, F), (M, F), kernel (x.y / F + 1)^3,
    unbiased: its expectation is 0 for two samples of one distribution, whatever N; it may be negative."""
    a, b = a.double(), b.double()
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return (within[0] + within[1] - 2 * kernel(a, b).mean()).item()


def precision_recall(real, made, k=5):
    """Precision, recall, density, coverage of features (N, F), (M, F) [PRDC]; a dict.

    Each point has a ball that reaches to its k-th nearest neighbour in its own set. precision: share of
    made points inside some real ball; recall: the other way round; density: real balls a made point lies
    in, / k; coverage: share of real balls that hold a made point.
    """
    if min(len(real), len(made)) <= k:          # no k-th neighbour
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    real, made = real.double(), made.double()
    reach = [torch.cdist(x, x).kthvalue(k + 1).values for x in (real, made)]     # the point itself is first
    distance = torch.cdist(real, made)                                           # (N, M)
    inside = distance < reach[0][:, None]
    return {"precision": inside.any(0).double().mean().item(),
            "recall": (distance < reach[1][None]).any(1).double().mean().item(),
            "density": inside.double().sum(0).mean().item() / k,
            "coverage": inside.any(1).double().mean().item()}


def ms_ssim(a, b):
    """Multi-scale structural similarity [MSSSIM] of pictures (N, C, H, W) in [-1, 1], pair by pair: (N,).

    As many of the five scales as leave 11 pixels a side, weights renormalised (three at 64 pixels); a
    Gaussian window of 11 pixels, sigma 1.5; each scale is averaged over pixels and channels before the
    scales are multiplied, and counts as 0 where negative.
    """
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    weights = weights[: max(1, min(5, int(math.log2(min(a.shape[-2:]) / 11)) + 1))]
    weights, channels = weights / weights.sum(), a.shape[1]
    line = torch.exp(-((torch.arange(11.0) - 5) / 1.5) ** 2 / 2)
    window = (line[:, None] * line / line.sum() ** 2).expand(channels, 1, 11, 11)
    mean = lambda x: F.conv2d(x, window, groups=channels)
    a, b, c1, c2, out = (a + 1) / 2, (b + 1) / 2, 0.01 ** 2, 0.03 ** 2, 1.0
    for i, weight in enumerate(weights):
        ma, mb = mean(a), mean(b)
        va, vb, shared = mean(a * a) - ma ** 2, mean(b * b) - mb ** 2, mean(a * b) - ma * mb
        value = (2 * shared + c2) / (va + vb + c2)
        if i + 1 == len(weights):                               # brightness counts at the coarsest scale
            value = value * (2 * ma * mb + c1) / (ma ** 2 + mb ** 2 + c1)
        out = out * value.mean((1, 2, 3)).clamp(min=0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return out


def texture_distance(a, b, size=7, directions=64, points=2000):
    """What pictures look like close up, wherever that is: the sliced Wasserstein distance of their patches [SWD].

    a, b: dicts with images (N, C, H, W) and classes (N, H, W). Taken are all patches of size x size pixels and all
    channels whose middle lies in the brain, once of fine detail (picture minus its 3x3 mean), once of the picture
    halved; in units of a's standard deviation per channel. Each of `directions` random unit vectors turns patches
    into numbers; compared are `points` evenly spaced order statistics of both sets; the mean |difference| is
    averaged over directions and both scales. 0 for equal sets; unlike features of a segmenter it sees folds. NaN
    where a set has no such patch.
    DIFFERS: both sets in a's units (there each in its own), two scales, quantiles of all patches in place of a draw.
    """
    channels, edge, out = a["images"].shape[1], size // 2, []
    way = torch.randn(directions, channels, size, size, generator=generator(0, "texture"))
    way = F.normalize(way.flatten(1)).view_as(way)
    for view in (lambda x: x - F.avg_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 2)):
        (x, y), unit = [view(its["images"]) for its in (a, b)], None
        quantiles = []
        for picture, its in ((x, a), (y, b)):
            brain = F.interpolate((its["classes"] > 0).float()[:, None], picture.shape[-2:])[:, 0] > 0
            if unit is None:
                unit = picture.movedim(1, 0)[:, brain].std(1).view(1, -1, 1, 1).clamp(min=1e-6)
            numbers = F.conv2d(picture / unit, way).movedim(1, 0)[:, brain[:, edge:-edge, edge:-edge]]
            if not numbers.shape[1]:
                return math.nan
            ranks = torch.linspace(0, numbers.shape[1] - 1, points).long()
            quantiles.append(numbers.sort(dim=1).values[:, ranks])               # (directions, points)
        out.append((quantiles[0] - quantiles[1]).abs().mean().item())
    return sum(out) / 2


def modality_correlation(images, classes, n_classes, voxels=200):
    """How modalities go together inside each class: Pearson correlation of every pair of modalities over
    all its voxels, (n_classes - 1, pairs) without air; NaN where a class has fewer than `voxels`.
    images (N, C, H, W), classes (N, H, W)."""
    first, second = torch.triu_indices(images.shape[1], images.shape[1], 1)
    out = torch.full((n_classes - 1, len(first)), math.nan)
    for k in range(1, n_classes):
        inside = images.movedim(1, 0)[:, classes == k]                           # (C, voxels)
        if inside.shape[1] >= voxels:
            out[k - 1] = torch.corrcoef(inside)[first, second]
    return out


def slice_set(prepared, per_case=40):
    """Slices of cases as one dict of tensors: images (N, C, R, R) in [-1, 1], classes (N, R, R), position (N,),
    case (N,): `per_case` slices of each, evenly spread over those with brain on 5% of the picture (some twice
    where a case has fewer), so that equal numbers of cases are equal numbers of slices.
    prepared: list of (Case, what prepare_case returns)."""
    parts = {"images": [], "classes": [], "position": [], "case": []}
    for number, (_, got) in enumerate(prepared):
        shown = np.where((got["classes"] > 0).mean((1, 2)) > 0.05)[0]
        pick = shown[np.linspace(0, len(shown) - 1, per_case).astype(int)]
        parts["case"].append(np.full(per_case, number))
        for name in ("images", "classes", "position"):
            parts[name].append(got[name][pick])
    its = {name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items()}
    return {**its, "images": to_images(its["images"])}


def compare_sets(real, other):
    """How far apart two sets of slices are: {figure: number}. real, other: from slice_set, with "features"
    (N, F) of each slice added. Frechet and kernel distance and the rest in feature space; how far apart they are
    close up; and how much the correlation of modalities inside each label differs."""
    a, b = real["features"], other["features"]
    between = [modality_correlation(its["images"], its["classes"], 5) for its in (real, other)]
    return {"Frechet distance": frechet_distance(a, b), "kernel distance": kernel_distance(a, b),
            **precision_recall(a, b), "texture distance": texture_distance(real, other),
            "modality correlation, mean error": (between[0] - between[1]).abs().nanmean().item()}


def compare_draws(sets, draws=10):
    """compare_sets of synthetic against held-out real slices, and of training against held-out real slices: the
    floor. sets: {"synthetic", "real", "training"} from slice_set with features.

    A set of more cases is nearer to anything: so every draw takes the same number of cases from each, at
    random, and what is returned is the mean over draws: ({"synthetic": {figure: ..}, "real": {..}}, the same
    with standard deviations, number of cases). With them pair_similarity of synthetic and held-out slices.
    """
    cases = min(len(its["case"].unique()) for its in sets.values())
    rng, found = np.random.default_rng(0), {"synthetic": [], "real": []}
    for _ in range(draws):
        drawn = {}
        for who, its in sets.items():
            chosen = torch.from_numpy(rng.permutation(int(its["case"].max()) + 1)[:cases])
            rows = torch.isin(its["case"], chosen)
            drawn[who] = {name: values[rows] for name, values in its.items()}
        for who, other in (("synthetic", "synthetic"), ("real", "training")):
            found[who].append({**compare_sets(drawn["real"], drawn[other]),
                               "MS-SSIM of pairs (less: more varied)": pair_similarity(drawn[who])})
    over = lambda f: {who: {name: float(f([draw[name] for draw in its])) for name in its[0]}
                      for who, its in found.items()}
    return over(np.mean), over(np.std), cases


def pair_similarity(its, pairs=100):
    """Mean MS-SSIM of pairs of slices from different cases at about the same height in the brain: the lower,
    the more varied a set is. its: from slice_set; NaN for a set of one case."""
    if len(its["case"].unique()) < 2:
        return math.nan
    picks = np.random.default_rng(0).integers(0, len(its["case"]), pairs)
    partner = [int(((its["position"] - its["position"][i]).abs() + 9 * (its["case"] == its["case"][i])).argmin())
               for i in picks]
    return ms_ssim(its["images"][picks], its["images"][partner]).mean().item()


def rank_correlation(a, b):
    """Spearman's rho of two lists of numbers: Pearson correlation of their ranks (ties share a rank)."""
    ranks = [[(np.asarray(x) < value).sum() + (np.asarray(x) == value).sum() / 2 for value in x] for x in (a, b)]
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(ranks[0]) and np.ptp(ranks[1]) else math.nan


def bootstrap_interval(differences, draws=10_000, seed=0):
    """95% interval of the mean of paired differences, one a patient: percentiles over resampled patients.
    -> (mean, low, high); NaN without data."""
    values = np.asarray([d for d in differences if d == d], float)
    if not len(values):
        return math.nan, math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


# ================================================================================================
# 15  AUDIT
# Are synthetic cases copies of training cases? Compared with real cases the generator never saw (decoys), so that
# what all heads share does not count. An audit can miss; whether it would have found copies is part of it.
# ================================================================================================

AUDIT_POSITIONS = np.linspace(-0.7, 0.7, 10).round(3)   # the slices of a case that are compared
AUDIT_SIZE = 32                         # pixels a side they are compared at: 6 mm, where anatomy is and noise is not
AUDIT_LEVELS = (100, 300, 500, 700)     # t at which the denoising loss is asked for
CANARIES = ("copy", "noise", "shift", "flip", "gamma", "blend")
LIMIT = 6.0                             # robust standard deviations beyond which a pair is named
CHANCE = 0.005                          # p below which a share or an AUC counts as more than chance


def audit_slices(prepared):
    """The slices of cases at AUDIT_POSITIONS: images float (N, P, C, R, R) in [-1, 1], classes int64 (N, P, R, R),
    positions float (N, P). prepared: what prepare_case returns, N times."""
    rows = [[int(np.abs(got["position"] - at).argmin()) for at in AUDIT_POSITIONS] for got in prepared]
    pick = lambda name: torch.from_numpy(np.stack([got[name][its] for got, its in zip(prepared, rows)]))
    return to_images(pick("images")), pick("classes").long(), pick("position")


def audit_views(images, classes, condition):
    """What is compared of slices: images (N, P, C, R, R), classes (N, P, R, R) -> view float (N, P, C, S, S), its
    mask (N, P, 1, S, S), S <= AUDIT_SIZE. Only healthy brain counts (that two tumours are alike is the label map's
    doing), each modality of each slice to mean 0 and spread 1 in it: gain and offset do not hide a copy."""
    healthy = ((classes > 0) & (classes < CONDITIONS[condition].index(LABELS[0]))).float().unsqueeze(2)
    size = min(AUDIT_SIZE, images.shape[-1])
    pool = lambda x: F.adaptive_avg_pool2d(x.flatten(0, 1), size).unflatten(0, x.shape[:2])
    area = pool(healthy)
    mask = (area > 0.5).float()
    mean = lambda x: (x * mask).sum((-2, -1), keepdim=True) / mask.sum((-2, -1), keepdim=True).clamp(min=1)
    view = pool(images * healthy) / area.clamp(min=1e-3)
    view = view - mean(view)
    return view / (mean(view ** 2).sqrt() + 1e-3) * mask, mask


def mean_head(view, mask):
    """The mean view at each position, left and right alike: view (N, P, C, S, S), mask (N, P, 1, S, S) -> (P, C, S, S).
    The sum of all views inside their masks and of their mirror images (last axis), over how many of the 2 N masks
    cover a pixel, plus 1: one empty head, so that there is no division by 0. What all heads share is no copy."""
    total, count = (view * mask).sum(0), mask.sum(0)
    return (total + total.flip(-1)) / (count + count.flip(-1) + 1)


def similarity(made, real, head):
    """How alike slices are: made, real (view, mask) of N and M cases, head from mean_head -> (N, P, M) in [-1, 1].

    The correlation of two views less the mean head, over pixels healthy in both and all modalities; the best over
    left-right flip, shifts of one pixel, and the real case's slices at this position and the two beside it.
    """
    (x, w), (y, u) = [((view - head) * mask, mask) for view, mask in (made, real)]
    flat = lambda its: its.transpose(0, 1).flatten(2)                           # (P, N, pixels)
    y, y2, u = flat(y), flat((y ** 2).sum(2)), flat(u)
    best = torch.full((x.shape[1], len(x), y.shape[1]), -1.0)
    for flip in (False, True):
        for shift in [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]:
            a, b = [torch.roll(its.flip(-1) if flip else its, shift, (-2, -1)) for its in (x, w)]
            a, a2, b = flat(a), flat((a ** 2).sum(2)), flat(b)
            for along in (-1, 0, 1):
                mine = slice(max(0, -along), len(a) - max(0, along))
                theirs = slice(max(0, along), len(a) + min(0, along))
                product = a[mine] @ y[theirs].mT
                power = (a2[mine] @ u[theirs].mT) * (b[mine] @ y2[theirs].mT)
                best[mine] = torch.maximum(best[mine], product / power.clamp(min=1e-9).sqrt())
    return best.transpose(0, 1)


def robust(values):
    """Median and robust standard deviation of a tensor's values, tensors (): 1.4826 times the median distance from the
    median, which is the standard deviation if they are Gaussian, plus 1e-6. Medians as torch.median takes them."""
    middle = values.median()
    return middle, 1.4826 * (values - middle).abs().median() + 1e-6


class CopyFinder:
    """Part A: names pairs of a synthetic and a training case that are too alike.

    alike (N, P, M): from similarity, of the synthetic cases; among (M, P, M): of the real cases to each other;
    training bool (M,): which of the M real cases were trained on, the others are decoys; own (N, M) bool: whose label
    map or outline a synthetic case has: alike it must be, so it is left out here (part C looks at it).
    Three numbers, in robust standard deviations, LIMIT at most: how much nearer the nearest training case is than
    the nearest decoy, for single slices and for whole cases (mean over slices), among all cases, real ones being
    compared with all others; and how near it is, among real cases, which shows when most of the set are copies.
    With few cases a spread is uncertain: that of whole cases is taken to be no less than independent slices had.
    """

    def __init__(self, alike, among, training, own):
        self.training = training
        alike, everyone = alike.masked_fill(own[:, None], -1), torch.arange(len(among))
        among = among.clone()
        among[everyone, :, everyone] = -1                                       # nobody is his own neighbour
        both = torch.cat([alike, among])
        self.by_slice = robust(self.nearer(both))
        least = self.by_slice[1] / alike.shape[1] ** 0.5
        self.by_case, self.near = [(middle, torch.maximum(spread, least)) for middle, spread in (
            robust(self.nearer(both.mean(1))), robust(among.mean(1)[:, training].amax(-1)))]
        self.found = self.scores(alike)

    def nearer(self, alike):
        """Similarity to the nearest training case less that to the nearest decoy: (...,) of (..., M)."""
        return alike[..., self.training].amax(-1) - alike[..., ~self.training].amax(-1)

    def scores(self, alike):
        """For each of N cases: score (the largest of the three numbers), slice (the most telling one), pair (which
        of the M real cases it is nearest to)."""
        z = lambda values, to: (values - to[0]) / to[1]
        slices = z(self.nearer(alike), self.by_slice)                           # (N, P)
        whole, columns = alike.mean(1), torch.where(self.training)[0]
        cases, near = z(self.nearer(whole), self.by_case), z(whole[:, self.training].amax(-1), self.near)
        best = slices.argmax(1)
        of_slice = columns[alike[torch.arange(len(alike)), best][:, self.training].argmax(-1)]
        pair = torch.where(torch.maximum(cases, near) > slices.amax(1),
                           columns[whole[:, self.training].argmax(-1)], of_slice)
        return {"score": torch.stack([slices.amax(1), cases, near]).amax(0), "slice": best, "pair": pair}


def nearer_share(alike, training, draws=10, permutations=400, seed=0):
    """Part B: in which share of the N P synthetic slices the nearest real case is a training case and no decoy: 0.5 if
    nothing leaked -> (share, p). alike (N, P, M): from similarity; training bool (M,): which of the real cases were
    trained on. Of the larger group as many as the smaller one has are drawn, without replacement, `draws` times, and
    shares averaged; ties count half. p: (1 + k) / (1 + permutations), where k of so many shares are as high when
    `training` is shuffled. Chance: numpy's default_rng(seed)."""
    values, rng = alike.flatten(0, 1).numpy(), np.random.default_rng(seed)

    def share(labels):
        groups = [np.where(labels)[0], np.where(~labels)[0]]
        few, out = min(map(len, groups)), []
        for _ in range(draws):
            lot = rng.permutation(max(map(len, groups)))[:few]
            first, second = [values[:, group[lot] if len(group) > few else group].max(1) for group in groups]
            out.append(((first > second) + 0.5 * (first == second)).mean())
        return float(np.mean(out))

    seen = share(training.numpy())
    by_lot = [share(rng.permutation(training.numpy())) for _ in range(permutations)]
    return seen, (1 + sum(its >= seen for its in by_lot)) / (1 + permutations)


def membership(members, others, permutations=4000, seed=0):
    """Part C: AUC, how often a training case scores above a held-out one, ties counting half, 0.5 by chance ->
    (AUC, p). members, others: scores of cases, float arrays. p: (1 + k) / (1 + permutations), where k of so many AUCs
    are as high when it is drawn by lot who was trained on. Chance: numpy's default_rng(seed)."""
    scores, n = np.concatenate([members, others]), len(members)
    ranks = np.array([(scores < value).sum() + (scores == value).sum() / 2 + 0.5 for value in scores])
    area = lambda its: (its.sum() - n * (n + 1) / 2) / (n * len(others))
    rng, seen = np.random.default_rng(seed), area(ranks[:n])
    by_lot = [area(rng.permutation(ranks)[:n]) for _ in range(permutations)]
    return float(seen), (1 + sum(its >= seen - 1e-9 for its in by_lot)) / (1 + permutations)


def canary(kind, images, classes, other, seed):
    """A training case as a copying generator might give it: images (P, C, R, R) in [-1, 1], classes (P, R, R) -> the
    same, changed as `kind` of CANARIES says: copy (not at all), noise (std 0.15), shift (down and right by 1/32 of the
    picture), flip (left for right), gamma (1.6 on 0..1), blend (40% of `other`, images of a synthetic case)."""
    if kind == "shift":
        pixels = max(1, images.shape[-1] // 32)
        return [torch.roll(its, (pixels, pixels), (-2, -1)) for its in (images, classes)]
    if kind == "flip":
        return [images.flip(-1), classes.flip(-1)]
    if kind == "noise":
        images = images + 0.15 * torch.randn(images.shape, generator=generator(seed, "canary"))
    if kind == "gamma":
        images = 2 * ((images + 1) / 2).clamp(min=0) ** 1.6 - 1
    if kind == "blend":
        images = 0.6 * images + 0.4 * other
    return [images, classes]


def denoising_loss(denoiser, images, classes, position):
    """Mean squared error of v at AUDIT_LEVELS, case by case: images (N, P, C, R, R), classes (N, P, R, R), position
    (N, P) -> (N,). The same noise for all cases: only the pictures differ."""
    out, shape = [], images.shape[1:]
    onehot = one_hot(classes.flatten(0, 1), denoiser.net.classes)
    for level in AUDIT_LEVELS:
        eps = torch.randn(shape, generator=generator(level, "audit")).expand(images.shape).flatten(0, 1)
        x0, t = images.flatten(0, 1), torch.full((len(eps),), level)
        signal, sigma = signal_sigma(denoiser.alpha_bar, t)
        v_hat = denoiser(add_noise(x0, eps, signal, sigma), t, onehot, position.reshape(-1, 1))
        out.append(((v_hat - v_target(x0, eps, signal, sigma)) ** 2).mean((1, 2, 3)).view(images.shape[:2]).mean(1))
    return torch.stack(out).mean(0)


def reproduction(denoiser, images, classes, position, condition, head, settings):
    """How alike a sample is to the scan its label map came from, case by case: arguments as denoising_loss, head
    from mean_head, settings of sample_volume -> (N,) in [-1, 1], mean of similarity over slices. High for any good
    generator; higher for training cases only if it remembers them."""
    out = []
    for number in range(len(images)):
        drawn = sample_volume(denoiser, classes[number], position[number], 1.0, (0, "audit", number), settings)
        pair = [audit_views(its[None], classes[number][None], condition) for its in (drawn, images[number])]
        out.append(similarity(*pair, head)[0, :, 0].mean())
    return torch.stack(out)


def audit(made, own, real, training, condition, canaries=8, denoiser=None, settings=None, few=12):
    """The whole audit -> (report, pairs: [(synthetic, slice, real)] to look at, nearest first, as indices; the first
    report["copies"] of them are named).

    report: a dict of numbers: cases of each kind; copies (scores above LIMIT) and scores of all N; share and its p; AUC
    and p of loss and of reproduction; canaries_found, a share for each kind; nearest, similarities; and "verdict":
    leak        a copy is named, or share or an AUC is above chance with p < CHANCE
    underpowered  else, where under 90% of the canaries are found, or there are fewer than 8 cases on a side, or no
                denoiser
    none found  else

    made, real: from audit_slices (images, classes, positions), N synthetic and M real cases, one a patient;
    own bool (N, M), training bool (M,): see CopyFinder; canaries: how many training cases are planted, in each of
    the ways of CANARIES, to see whether they are found; denoiser: the generator, for part C, which is left out
    without it; settings: of sample_volume; few: part C samples so many cases of each kind, and asks for the loss of
    twice as many.
    """
    views = [audit_views(images, classes, condition) for images, classes, _ in (made, real)]
    head = mean_head(*views[1])
    alike = similarity(views[0], views[1], head)
    among = similarity(views[1], views[1], head)
    finder = CopyFinder(alike, among, training, own)
    found, members, others = finder.found, torch.where(training)[0], torch.where(~training)[0]
    share, p_share = nearer_share(alike.masked_fill(own[:, None], -1), training)
    report = {"synthetic_cases": len(alike), "training_cases": len(members), "decoys": len(others),
              "share": share, "share_p": p_share, "limit": LIMIT}
    # --- D: is a copy found when there is one?
    planted = {}
    some = lambda group, n: group[np.linspace(0, len(group) - 1, min(n, len(group))).astype(int)]
    victims = some(members, canaries)
    for kind in CANARIES if canaries else ():
        copies = [canary(kind, real[0][i], real[1][i], made[0][n % len(alike)], n) for n, i in enumerate(victims)]
        views_of = audit_views(*(torch.stack(its) for its in zip(*copies)), condition)
        its = finder.scores(similarity(views_of, views[1], head))
        planted[kind] = float(((its["score"] > LIMIT) & (its["pair"] == victims)).float().mean())
    report["canaries_found"] = planted
    # --- C: does the generator know its training cases?
    if denoiser is not None:
        losses = [-denoising_loss(denoiser, *(its[some(group, 2 * few)] for its in real))
                  for group in (members, others)]
        report["loss_auc"], report["loss_p"] = membership(*(its.numpy() for its in losses))
        alike_own = [reproduction(denoiser, *(its[some(group, few)] for its in real), condition, head, settings)
                     for group in (members, others)]
        report["reproduction_auc"], report["reproduction_p"] = membership(*(its.numpy() for its in alike_own))
        report["reproduction"] = [its.mean().item() for its in alike_own]
        # a synthetic case beside the training case it has its label map from, against decoys and theirs
        middle, spread = robust(alike_own[1])
        mine = torch.where(own & training, alike.mean(1), -math.inf)
        score = (mine.amax(1) - middle) / spread
        more = score > found["score"]
        found = {"score": torch.where(more, score, found["score"]), "slice": found["slice"],
                 "pair": torch.where(more, mine.argmax(1), found["pair"])}
    order = found["score"].argsort(descending=True)
    report["copies"] = int((found["score"] > LIMIT).sum())
    report["scores"] = found["score"].tolist()
    ps = [report[name] for name in ("share_p", "loss_p", "reproduction_p") if name in report]
    power = np.mean(list(planted.values())) if planted else 0.0
    report["verdict"] = ("leak" if report["copies"] or min(ps) < CHANCE else
                         "underpowered" if power < 0.9 or min(len(members), len(others)) < 8 or denoiser is None
                         else "none found")
    report["nearest"] = {"training": alike.mean(1)[:, training].amax(-1).tolist(),
                         "decoy": alike.mean(1)[:, ~training].amax(-1).tolist()}
    return report, [(int(n), int(found["slice"][n]), int(found["pair"][n])) for n in order]


def audit_words(report):
    """The audit in words, for the screen, sidecars and datasheet: no names."""
    n, clean = report["synthetic_cases"], report["copies"] == 0
    found = report["canaries_found"]
    words = [f"{n} synthetic cases against {report['training_cases']} training cases and {report['decoys']} real cases "
             f"never trained on: {report['copies']} too near to a training case"
             + (f" (the share of such copies is below {min(1, 3 / n):.1%} with 95% confidence)" if clean else "") + ".",
             f"Nearer to training cases than to the others: {report['share']:.1%} of slices (50% if nothing leaked, "
             f"p {report['share_p']:.3f})."]
    if "loss_auc" in report:
        words.append(f"Training cases told from others by the denoising loss: AUC {report['loss_auc']:.2f} (p "
                     f"{report['loss_p']:.3f}); by how well they are reproduced from their own label maps: AUC "
                     f"{report['reproduction_auc']:.2f} (p {report['reproduction_p']:.3f}); 0.50 is chance.")
    words.append("Planted copies found: " + (", ".join(f"{kind} {share:.0%}" for kind, share in found.items())
                                             if found else "none were planted") + ".")
    return " ".join(words + ["Missed are copies under heavy noise or blur, of a tumour alone, or of parts of a slice."])


# ================================================================================================
# python brainsyn.py: a first look
# ================================================================================================


def layer_table(net, size):
    """Lines of text: every layer that holds parameters with its output shape for one slice of
    size x size, and how many parameters it has."""
    lines, total = [f"{'layer':<28} {'output (C, H, W)':<18} parameters"], 0
    shapes, hooks = {}, []

    def note(name):
        def hook(module, inputs, output):
            shapes.setdefault(name, tuple(output.shape[1:]))
        return hook

    for name, module in net.named_modules():
        if not list(module.children()) and list(module.parameters()):
            hooks.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        net(torch.zeros(1, net.channels, size, size), torch.ones(1), torch.zeros(1, net.classes, size, size),
            torch.zeros(1, 1))
    for hook in hooks:
        hook.remove()
    for name, shape in shapes.items():
        count = count_parameters(net.get_submodule(name))
        total += count
        lines.append(f"{name:<28} {str(shape):<18} {count:>10,}")
    return lines + [f"{'total':<28} {'':<18} {total:>10,}"]


def first_look():
    """Draw phantom 0 and its noise ladder into runs/first_look.png, print the layer-shape table."""
    with tempfile.TemporaryDirectory() as folder:
        write_phantom(folder, 0)
        got = prepare_case(find_cases(folder)[0], 96, 192.0, "tumour")
    best = int((got["classes"] > 1).sum((1, 2)).argmax())
    x0 = to_images(got["images"][best])[None]
    alpha_bar, eps = cosine_alpha_bar(), torch.randn(x0.shape, generator=generator(0, "ladder"))
    rows = [[got["classes"][best], *x0[0]]]
    for t in (100, 300, 500, 700, 900, T):
        x_t = add_noise(x0, eps, *signal_sigma(alpha_bar, torch.tensor([t])))
        rows.append([None, *x_t[0]])
    draw_rows("runs/first_look.png", rows, ["labels", *MODALITIES], "tumour",
              "phantom 0; below it t = 100, 300, 500, 700, 900, 1000")
    print("\n".join(layer_table(UNet(), 64)))
    print("a phantom and its noise ladder -> runs/first_look.png")


def check_folder(folder, labelled=True):
    """Print what is to be said of a folder of cases, one line a finding, and a count; exit 1 if any is rejected."""
    findings = []
    cases = find_cases(folder, labelled, findings)
    for case in cases:
        if not labelled:
            case.files.pop("seg", None)
    found, good = check_cases(cases)
    print("\n".join(findings_text(findings + found)))
    count = {kind: sum(its.kind == kind for its in findings + found) for kind in KINDS}
    print(f"{len(good)} cases can be used; findings: " + ", ".join(f"{n} {kind}" for kind, n in count.items()))
    if count["rejected"]:
        sys.exit(1)


def main(argv=None):
    """A first look, or the check of a folder."""
    parser = argparse.ArgumentParser(description="Draw a first look at what this file makes; or check a folder of "
                                     "BraTS cases before anything is trained on it.")
    parser.add_argument("folder", nargs="?", help="cases to check; without it, the first look")
    parser.add_argument("--no-labels", action="store_true", help="check scans alone")
    parser.add_argument("--publish", nargs=2, metavar=("RUN", "FILE"), help="write the weights of a run as .npz "
                        "(of a generator of labels into a folder), without pickle, and print the sha256")
    args = parser.parse_args(argv)
    if args.publish:
        run, path = args.publish
        pairs = [(run, path)]
        if (Path(run) / "coarse").is_dir():     # a generator of labels: two networks, into a folder
            if path.endswith(".npz"):
                raise BadInput(f"--publish {path}: a generator of labels is two files; name a folder")
            Path(path).mkdir(parents=True, exist_ok=True)
            pairs = [(Path(run) / part, Path(path) / f"{part}.npz") for part in ("coarse", "fine")]
        elif not path.endswith(".npz"):
            raise BadInput(f"--publish {path}: the file must end in .npz")
        for its in pairs:
            print(f"sha256 {publish(*its)}\nwrote: {its[1]}")
    elif args.folder:
        check_folder(args.folder, not args.no_labels)
    else:
        first_look()


if __name__ == "__main__":
    run_script(main)
