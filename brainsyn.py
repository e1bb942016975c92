r"""brainsyn: label maps to four-modality brain MRI, and brain MRI to tumour labels, from scratch.

This file is the book: what one has to read to understand, train and sample both models. Read it
from top to bottom: each section uses only what stands above it, and PyTorch and numpy. All else
(files, phantoms, checks, pictures, figures) is in kit/, one topic a module.

    1 names          modalities, labels, classes; images as tensors; random numbers
    2 noise          what diffusion is: alpha_bar, add_noise, v_target, split_v
    3 the start      the prior (mean and std of every class), and what it says before any training
    4 the network    residual blocks, attention, the U-Net
    5 devices        what this file must know about CPUs, GPUs and TPUs
    6 sampling       DDPM, DDIM, DPM-Solver++ as four numbers a step; guidance; whole volumes
    7 learning       batches and noise from (seed, step), learning rate, Muon, EMA
    8 the segmenter  ResNet encoder, U-Net decoder; regions, losses, augmentation, Dice

The training step itself is in train_ddpm.py (and train_seg.py), between two lines of dashes.

    python brainsyn.py         draws a phantom under more and more noise, lists all layers (10 s)
    python brainsyn.py DIR     checks a folder of cases and says what is wrong, file by file
    python brainsyn.py --publish runs/ddpm weights.npz    writes the weights to share them

GLOSSARY (the same names everywhere)
    modality    one kind of MRI scan: T1, T1ce (T1 with contrast agent), T2, FLAIR
    label       what a tumour voxel is, 1..L: NCR necrotic core, ED oedema, ET enhancing tumour
    region      a union of labels: WT whole tumour, TC tumour core, ET; see REGIONS
    class       a label, or a kind of healthy voxel (air, brain ...); see CONDITIONS
    label map   a class number for every pixel: `classes`, integers (B, H, W); as `onehot` it is
                (B, K, H, W) of 0 and 1, all 0 where no label map is given
    scalars     (B, S): further conditions, one number each; the first two are the slice's place
    place       (B, 2): position -1..1 of a slice across the field of view (feet to head, front to
                back, right to left), and its plane: 0 axial, 1 coronal, 2 sagittal
    slab        a slice, then its neighbours, `around` of them on either side, as further channels:
                (B, (2 around + 1) C, H, W), see slabs_of
    x0          clean images (B, C, H, W) in [-1, 1]; air is exactly -1
    eps         standard normal noise, same shape as x0
    t           noise level, integer (B,): 0 = clean .. T = pure noise
    alpha_bar   fraction of signal power that is left at every t, (T + 1,)
    signal      sqrt(alpha_bar);  sigma = sqrt(1 - alpha_bar);  snr = alpha_bar / (1 - alpha_bar)
    x_t         noisy images: signal * x0 + sigma * eps
    v           signal * eps - sigma * x0, what the network predicts
    _hat        ends the name of a prediction: v_hat, x0_hat
    axes        B batch (N: any number of slices), C modality, K class, D slice (foot to head),
                H row (front to back), W column (the patient's right is on the left, as
                radiologists look at it)

SOURCES (comments below refer to them by the key in brackets)
    [DDPM]    diffusion, sampling with new noise in every step: Ho et al. 2020, arXiv 2006.11239
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
    [CFG]     classifier-free guidance: Ho & Salimans 2022, arXiv 2207.12598
              Classifier-Free Diffusion Guidance
    [COSINE]  the cosine noise schedule: Nichol & Dhariwal 2021, arXiv 2102.09672
              Improved Denoising Diffusion Probabilistic Models
    [EDM]     preconditioning, loss in its units: Karras et al. 2022, arXiv 2206.00364
              Elucidating the Design Space of Diffusion-Based Generative Models
    [ADM]     scale-shift norm in residual blocks: Dhariwal & Nichol 2021, arXiv 2105.05233
              Diffusion Models Beat GANs on Image Synthesis
    [UNET]    down, up and copies across: Ronneberger et al. 2015, arXiv 1505.04597
              U-Net: Convolutional Networks for Biomedical Image Segmentation
    [GN]      group normalisation: Wu & He 2018, arXiv 1803.08494
              Group Normalization
    [ADAMW]   Adam with weight decay of its own: Loshchilov & Hutter 2017, arXiv 1711.05101
              Decoupled Weight Decay Regularization
    [MUON]    orthogonalised momentum: Jordan et al. 2024, kellerjordan.github.io/posts/muon
              Muon: An optimizer for hidden layers in neural networks
    [BRATS]   labels, regions, file naming: Baid et al. 2021, arXiv 2107.02314
              The RSNA-ASNR-MICCAI BraTS 2021 Benchmark on Brain Tumor Segmentation and Radiogenomic
              Classification
    [RESNET]  residual networks: He et al. 2015, arXiv 1512.03385
              Deep Residual Learning for Image Recognition
    [VNET]    Dice as a loss: Milletari et al. 2016, arXiv 1606.04797
              V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation
"""
import copy
import hashlib
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn as nn
import torch.nn.functional as F

__version__ = "0.1.0"

# ================================================================================================
# 1  NAMES
# Modalities and labels are those of [BRATS] unless a command or a checkpoint names others; names of
# files are in kit/nifti.py.
# ================================================================================================

BRATS = ("t1", "t1ce", "t2", "flair"), ("NCR", "ED", "ET")


def use_names(modalities=BRATS[0], labels=BRATS[1]):
    """Set what all scans and label maps of this process hold:

    MODALITIES  in the order of axis C
    LABELS      stored as 1, 2, ...; 0 is all else
    REGIONS     unions of labels that a segmenter is measured on: those of [BRATS], or each label.
                Their first entry is the label that no later region has
    CONDITIONS  A network is conditioned on a label map in which every voxel has exactly one of
                these classes. "brain" is healthy brain. Scans come without skull, so the brain's
                outline costs no annotation; it fixes the shape and place of the head.
    """
    global MODALITIES, LABELS, REGIONS, CONDITIONS
    MODALITIES, LABELS = tuple(modalities), tuple(labels)
    REGIONS = {"WT": (2, 1, 3), "TC": (1, 3), "ET": (3,)} if LABELS == BRATS[1] else {
        name: (k,) for k, name in enumerate(LABELS, 1)}
    CONDITIONS = {"tumour": ("air", "brain", *LABELS),
                  "tissue": ("air", "CSF", "grey", "white", *LABELS),
                  "ventricles": ("air", "brain", "ventricles", *LABELS)}


use_names()


class BadInput(Exception):
    """Input from the user that cannot be used. The message is one sentence: which file, what is
    wrong, what to do. Scripts print it and exit with status 2."""


def to_images(stored):
    """Scans stored as bytes 0..255 (array or tensor of any shape) -> float32 tensor in [-1, 1]."""
    return torch.as_tensor(stored).float() / 127.5 - 1


def tumour_labels(classes, condition="tumour"):
    """Class numbers of a condition (array or tensor) -> labels: 0, or 1, 2, ... as in LABELS."""
    healthy = len(CONDITIONS[condition]) - len(LABELS) - 1
    return (classes > healthy) * (classes - healthy)


def one_hot(classes, n_classes):
    """Class map int64 (B, H, W) -> float32 (B, n_classes, H, W). Every pixel has exactly one 1, so
    all zeros is a state no label map has: the null condition of guidance, see guided_v."""
    return F.one_hot(classes, n_classes).movedim(-1, 1).float()


def slabs_of(volume, around):
    """Slices of a volume (N, C, H, W) -> slabs (N, (2 around + 1) C, H, W): each slice, then its
    neighbours, near ones first. The first and the last slice are neighbours of themselves."""
    at = torch.arange(len(volume))
    return torch.cat([volume[(at + by).clamp(0, len(volume) - 1)]
                      for by in sorted(range(-around, around + 1), key=abs)], 1)


def generator(*key):
    """A random generator on the CPU that depends on `key` alone (seed, purpose, step ...).

    No generator state is ever stored or continued. What is drawn at step 700 depends on 700 alone,
    so a killed run resumes bit for bit, and a sample depends on its own number only.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ================================================================================================
# 2  NOISE
# Diffusion: noise is mixed into an image little by little until nothing else is left. A network
# learns to undo a little of it. Starting from pure noise, it then makes a new image.
#
#     x0: a scan                                                        x_T: pure noise
#     t = 0   ------------- add_noise: one formula, nothing is learned ------------->   t = T
#             <------------ sample: the network is called at every step -------------
#
# At level t the noisy image is x_t = signal * x0 + sigma * eps with signal^2 + sigma^2 = 1. So
# there is an angle with signal = cos(angle), sigma = sin(angle), and x_t moves on a quarter circle
# from x0 (0 degrees) to eps (90 degrees).
#
#                 eps
#       v          |         x_t         v = signal * eps - sigma * x0 is the velocity of x_t on
#         `-.      |      .-`            that circle: x_t turned by 90 degrees. If the network
#            `-.   |   .-`               predicted eps, x0 could not be computed at t = T, because
#               `-.|.-`  angle           there x_t equals eps. From x_t and v it can be computed at
#                  +------------- x0     every t (split_v). So the network predicts v.
#
# The schedule is a function, not a part of the network: there a checkpoint or an average of weights
# could change it, and samples would turn black. Tables are float64 on the CPU.
# ================================================================================================

T = 1000                                        # noise levels t = 0 (clean) .. T (pure noise)


def cosine_alpha_bar(shift=1.0, steps=T):
    """alpha_bar, float64 (steps + 1,) [COSINE]: signal / sigma = shift / tan(t/steps * pi/2).

    With shift 1, signal = cos and sigma = sin of t/steps * 90 degrees. alpha_bar[0] = 1 and
    alpha_bar[steps] = 0 exactly. At T nothing of the image is left, so a sampler may start from
    pure noise, and air can come out black [ZSNR].
    shift: factor on signal / sigma, that is sqrt(snr), at every t; larger means less noise at the
    same t. Grey and white matter differ little, so noise hides them early: 2 suits slices of 64
    pixels. In larger pictures neighbouring pixels repeat each other and survive more noise: use
    128 / resolution [SHIFT].
    DIFFERS from [COSINE]: no small offset near t = 0; v-prediction does not need it.
    """
    angle = torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (math.pi / 2)
    signal, sigma = shift * torch.cos(angle), torch.sin(angle)  # up to a factor, which cancels
    alpha_bar = signal ** 2 / (signal ** 2 + sigma ** 2)
    alpha_bar[0], alpha_bar[-1] = 1.0, 0.0      # cos(pi/2) is 6e-17 in floating point
    return alpha_bar


def signal_sigma(alpha_bar, t):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t, int64 (B,) -> signal and sigma, each float32
    (B, 1, 1, 1), ready to multiply images. alpha_bar is float64: the roots are taken before
    anything is rounded."""
    level = alpha_bar[t]
    return level.sqrt().float().view(-1, 1, 1, 1), (1 - level).sqrt().float().view(-1, 1, 1, 1)


def add_noise(x0, eps, signal, sigma):
    """x_t = signal * x0 + sigma * eps. All (B, C, H, W) or broadcastable."""
    return signal * x0 + sigma * eps


def v_target(x0, eps, signal, sigma):
    """v = signal * eps - sigma * x0: the derivative of x_t with respect to the angle [VPRED]."""
    return signal * eps - sigma * x0


def split_v(x_t, v, signal, sigma):
    """x_t and v are x0 and eps turned by the angle; turn them back -> (x0, eps) [VPRED].

    x0 = signal * x_t - sigma * v;  eps = sigma * x_t + signal * v. At T this is x0 = -v: no
    division, nothing blows up.
    """
    return signal * x_t - sigma * v, sigma * x_t + signal * v


# ================================================================================================
# 3  THE START
# What is known of a slice before any training. Its label map says which class every pixel has, and
# training slices say how bright that class is: a mean and a spread (the prior). If pixels were
# independent Gaussians, the best v would have a closed form. The network starts from that v and
# learns only what it misses: how pixels depend on each other. That makes air black and puts the
# ventricles in place after minutes on a CPU.
# ================================================================================================


def measure_prior(batches, condition, size=32):
    """Measure mean and std of training scans -> dict of float32 tensors, for `expected`.

    batches  iterable of axial slices, (x0 (B, C, H, W), classes (B, H, W), place (B, 2))
    classes  (2, K + 1, C): mean and std of every class in every modality; row K is over all pixels.
             0 and 0.5 for a class of fewer than 2 pixels; std is at least 0.01.
    atlas    (2, C, N, N, N), see make_atlas; only for a condition with the class "brain". N is
             `size`, or the size of a slice where that is less.
    """
    names = CONDITIONS[condition]
    has_brain = names[1] == "brain"
    total = sums = None                         # count, sum, sum of squares: of a class, of a place
    for x0, classes, place in batches:
        if total is None:
            n = min(size, *x0.shape[2:])
            total = torch.zeros(3, len(names) + 1, x0.shape[1])
            sums = torch.zeros(3, n, x0.shape[1], n, n)
        layer = ((place[:, 0] + 1) / 2 * n).long().clamp(0, n - 1)
        for k in range(len(names) + 1):
            here = (classes == k if k < len(names) else classes >= 0).unsqueeze(1).float()
            parts = torch.stack([here.expand_as(x0), x0 * here, x0 ** 2 * here])
            total[:, k] += parts.sum((1, 3, 4))
            if k == 1 and has_brain:
                sums.index_add_(1, layer, F.adaptive_avg_pool3d(parts, (None, n, n)))
    count, mean = total[0], torch.where(total[0] > 1, total[1] / total[0].clamp(min=1), 0.0)
    variance = (total[2] / count.clamp(min=1) - mean ** 2).clamp(min=1e-4)
    std = torch.where(count > 1, variance.sqrt(), 0.5)
    prior = {"classes": torch.stack([mean, std])}
    if has_brain:
        prior["atlas"] = make_atlas(sums.transpose(1, 2), mean[1], std[1])
    return prior


def make_atlas(sums, class_mean, class_std):
    """Mean and std of healthy brain at every place: sums (3, C, N, N, N) of count, value and square
    over training slices, in N equal parts of the field of view along every axis ->
    (2, C, N, N, N).

    The sums are made symmetric (left and right added). The class's own mean and std (C,) enter with
    the weight of one slice: they take over where few slices have brain (2 below, since a slice
    counts once more in its mirror image). A mean over few patients shows these patients: with a
    handful of them the atlas is no secret.
    """
    count, value, square = sums + sums.flip(-1)
    class_mean, class_std = [part.view(-1, 1, 1, 1) for part in (class_mean, class_std)]
    mean = (value + 2 * class_mean) / (count + 2)
    square = (square + 2 * (class_std ** 2 + class_mean ** 2)) / (count + 2)
    return torch.stack([mean, (square - mean ** 2).clamp(min=1e-4).sqrt()])


def points_of(place, height, width):
    """Where in the field of view every pixel of slices lies: place (B, 2) -> (B, H, W, 3), x to the
    left, y to the back and z up, each -1..1."""
    row, column = [(torch.arange(n) * 2 + 1) / n - 1 for n in (height, width)]
    axes = torch.broadcast_tensors(place[:, :1, None], row[:, None], column)    # each (B, H, W)
    axes = torch.stack(axes, -1)
    order = torch.tensor([[2, 1, 0], [2, 0, 1], [0, 1, 2]])[place[:, 1].long()]
    return axes.gather(-1, order[:, None, None].expand_as(axes))


def expected(prior, onehot, scalars):
    """What the prior expects of every pixel -> mean and std, each (B, C, H, W).

    prior: from measure_prior; onehot (B, K, H, W); scalars (B, S), of which the place is used. Mean
    and std are those of the pixel's class; where onehot is all zeros (no label map), those over all
    pixels. In healthy brain they come from the atlas, linear between its middles.
    Networks that draw label maps use two other priors. K = 0: the atlas applies everywhere.
    {"shares": floor}: onehot holds, for every channel of x0, the expected fraction of a class. A
    pixel that is +1 with that probability and else -1 has mean 2 fraction - 1 and variance
    1 - mean^2; std is at least floor.
    """
    if "shares" in prior:
        mean = 2 * onehot - 1
        return mean, (1 - mean ** 2).clamp(min=float(prior["shares"]) ** 2).sqrt()
    class_or_all = torch.cat([onehot, 1 - onehot.sum(1, keepdim=True)], 1)  # (B, K + 1, H, W)
    found = torch.einsum("bkhw,nkc->nbchw", class_or_all, prior["classes"])  # n: mean, std
    if "atlas" in prior:
        row = 1 if onehot.shape[1] else 0       # of healthy brain
        points = points_of(scalars[:, :2], *onehot.shape[2:]).expand(2, -1, -1, -1, -1)
        atlas = F.grid_sample(prior["atlas"], points, align_corners=False, padding_mode="border")
        usual = prior["classes"][:, None, row, :, None, None]
        found = found + class_or_all[:, row:row + 1] * (atlas.transpose(1, 2) - usual)
    return found[0], found[1]


def prior_error(signal, sigma, std):
    """Suppose a pixel is drawn from N(mean, std^2), and v is guessed from x_t as well as possible.
    The root mean squared error of that guess is std / sqrt(std^2 signal^2 + sigma^2).

    It is 1 at t = 0 (for std > 0) and std at t = T. The network's output is multiplied by it
    (precondition), and errors are divided by it in the training loss (train_ddpm.py). signal, sigma
    (B, 1, 1, 1); std (B, C, H, W), above 0 -> (B, C, H, W).
    """
    return std / ((std * signal) ** 2 + sigma ** 2).sqrt()


def precondition(out, x_t, signal, sigma, mean, std):
    """v_hat = the best guess without a network + prior_error * the network's output.

    If every pixel were drawn from N(mean, std^2), the best v would be
    sigma (signal (1 - std^2) x_t - mean) / (std^2 signal^2 + sigma^2), with error prior_error. So
    an untrained network (out = 0) already gives black air and the mean brain, and what is left to
    learn has about unit size at every t. [EDM] does this (preconditioning: fixed factors around a
    network) with one Gaussian for all pixels; here each pixel has its own.

    out: the network's output (B, C, H, W), maybe bfloat16; x_t: as large, or slabs; signal, sigma
    (B, 1, 1, 1); mean, std: from expected. Returns v_hat (B, C, H, W), float32.
    """
    x_t = x_t[:, :out.shape[1]]                 # of slabs the slices themselves
    guess = sigma * (signal * (1 - std ** 2) * x_t - mean) / ((std * signal) ** 2 + sigma ** 2)
    return guess + prior_error(signal, sigma, std) * out.float()


# ================================================================================================
# 4  THE NETWORK
# A residual U-Net. It takes noisy images, a noise level, a label map and a few numbers, and returns
# an image from which precondition makes v_hat. Widths and group sizes are what ran fastest on CPUs
# without loss of quality.
# ================================================================================================

GROUP = 16      # channels in a normalisation group; smaller groups miss the fast CPU kernels


def sinusoid(value, dim, top=10_000.0):
    """Code a number as waves: value (B,), int or float -> float32 (B, dim), dim even. dim/2 sines,
    then as many cosines, of value / top^(2 i / dim), i = 0 .. dim/2 - 1."""
    wave = torch.exp(torch.arange(dim // 2, device=value.device) * (-math.log(top) / (dim // 2)))
    phase = value.float().unsqueeze(1) * wave
    return torch.cat([phase.sin(), phase.cos()], 1)


def zero_init(module):
    """Set weight and bias to zero -> the module. It starts as if it were not there."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def norm(channels):
    """GroupNorm [GN] with GROUP channels a group; one group where GROUP does not divide them."""
    return nn.GroupNorm(channels // GROUP if channels % GROUP == 0 else 1, channels)


class ResBlock(nn.Module):
    """x (B, c_in, H, W), emb (B, E) -> (B, c_out, H, W).

    norm, SiLU, 3x3; norm * (1 + scale) + shift [ADM]; SiLU, 3x3 that starts at zero; plus the input
    (through a 1x1 where the number of channels changes). scale and shift are the first and second
    half of a linear map of emb, to which SiLU has been applied already (UNet.embed).
    """

    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.to_scale_shift = nn.Linear(emb, 2 * c_out)
        self.norm2 = norm(c_out)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.to_scale_shift(emb)[..., None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Self-attention over all places of a feature map: (B, C, H, W) -> the same, in heads of 64
    channels (one head where 64 does not divide C).

    x + to_out(softmax(q k^T / sqrt(channels of a head)) v), where to_qkv(norm(x)) is all of q, then
    all of k, then all of v, each head by head. to_out starts at zero: the layer starts as the
    identity.
    """

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
    """x_t (B, channels, H, W), t (B,), onehot (B, classes, H, W), scalars (B, S) -> the output that
    precondition turns into v_hat, (B, channels, H, W) [UNET]. With `around` above 0 x_t are slabs:
    the network sees neighbours of the slice that it denoises, as noisy as it is.

    input    x_t, onehot, and row and column of every pixel (in [-1, 1]), padded with zeros at the
             right and below until all levels divide; patch x patch pixels are folded into channels
             (pixel-unshuffle: H/patch x W/patch pixels; 2 x 2 is 3 to 4 times
             cheaper than none), then 3x3
    down     a level i has width * mults[i] channels and `blocks` residual blocks, each of whose
             outputs is kept; between two levels a 3x3 convolution of stride 2 halves H and W
    middle   block, attention, block
    up       the same levels backwards; each block also gets the output kept at its place; between
             two levels a 2x2 transposed convolution doubles H and W
    output   norm, SiLU and 1x1 to fine * patch^2 channels, unfolded to full resolution; plus a 3x3
             convolution of the input; one block of `fine` channels; norm, SiLU, 3x3 that starts at
             zero; cropped to H x W
    scalars  S, how many conditions are one number each, about -1..1; NaN means "not given", a state
             of its own
    """

    def __init__(self, channels=4, classes=5, width=48, mults=(1, 2, 2), blocks=1, patch=4,
                 fine=32, scalars=2, around=0):
        super().__init__()
        self.channels, self.classes, self.around = channels, classes, around
        self.patch, self.multiple = patch, patch * 2 ** (len(mults) - 1)
        self.emb = emb = 4 * width
        c_in = channels * (2 * around + 1) + classes + 2        # noisy slab, labels, row, column
        widths = [width * m for m in mults]
        self.time = nn.Sequential(nn.Linear(emb, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.scalar = nn.Sequential(nn.Linear(scalars * 33, emb), nn.SiLU(),
                                    zero_init(nn.Linear(emb, emb)))
        self.conv_in = nn.Conv2d(c_in * patch ** 2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c = width                                               # channels at this point
        for i, w in enumerate(widths):
            stack = nn.ModuleList(ResBlock(w if j else c, w, emb) for j in range(blocks))
            level, c = nn.ModuleDict({"blocks": stack}), w
            if i + 1 < len(widths):
                level["shrink"] = nn.Conv2d(w, w, 3, stride=2, padding=1)
            self.down.append(level)
        self.middle1 = ResBlock(c, c, emb)
        self.attention = Attention(c)
        self.middle2 = ResBlock(c, c, emb)
        for i, w in reversed(list(enumerate(widths))):
            stack = nn.ModuleList(ResBlock(2 * w, w, emb) for _ in range(blocks))
            level = nn.ModuleDict({"blocks": stack})            # w channels come up, w were kept
            if i > 0:
                level["grow"] = nn.ConvTranspose2d(w, widths[i - 1], 2, stride=2)
            self.up.append(level)
        # The last block works at full resolution: noise is fine-grained, and learning to remove it
        # through folded pixels takes several times as many steps.
        self.norm_coarse = norm(widths[0])
        self.unfold = nn.Conv2d(widths[0], fine * patch ** 2, 1)
        self.fine_in = nn.Conv2d(c_in, fine, 3, padding=1)
        self.fine = ResBlock(fine, fine, emb)
        self.norm_out = norm(fine)
        self.conv_out = zero_init(nn.Conv2d(fine, channels, 3, padding=1))

    def hidden(self):
        """The weights that [MUON] is for: all with two axes or more, except those of the input, the
        output, time and scalars."""
        ends = ("conv_in", "fine_in", "time", "scalar", "conv_out")
        return [p for name, p in self.named_parameters()
                if p.ndim > 1 and not name.startswith(ends)]

    def embed(self, t, scalars):
        """t (B,), scalars (B, S) -> embedding (B, E), E = 4 width: SiLU(time(waves of t) +
        scalar(codes)). The code of a scalar is 32 waves of 100 times its value (waves are made for
        t in 0..1000) and a 1; 33 zeros where it is not given. `scalar` starts at zero."""
        emb = self.time(sinusoid(t, self.emb))
        given = (~torch.isnan(scalars)).float()                             # (B, S)
        value = torch.nan_to_num(scalars)
        code = sinusoid(value.flatten() * 100, 32).view(*value.shape, 32)   # (B, S, 32)
        code = torch.cat([code, torch.ones_like(code[..., :1])], -1) * given.unsqueeze(-1)
        return F.silu(emb + self.scalar(code.flatten(1)))

    def forward(self, x_t, t, onehot, scalars):
        height, width = x_t.shape[-2:]
        axes = [torch.linspace(-1, 1, n, device=x_t.device) for n in (height, width)]
        pixels = torch.stack(torch.meshgrid(axes, indexing="ij")).expand(len(x_t), -1, -1, -1)
        x = torch.cat([x_t, onehot, pixels.to(x_t.dtype)], 1)                # (B, c_in, H, W)
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))                  # (B, width, H/p, W/p)
        emb, kept = self.embed(t, scalars), []
        for level in self.down:
            for block in level["blocks"]:
                h = block(h, emb)
                kept.append(h)
            if "shrink" in level:
                h = level["shrink"](h)                                      # half the size
        h = self.middle2(self.attention(self.middle1(h, emb)), emb)
        for level in self.up:
            for block in level["blocks"]:
                h = block(torch.cat([h, kept.pop()], 1), emb)
            if "grow" in level:
                h = level["grow"](h)                                        # twice the size
        h = self.unfold(F.silu(self.norm_coarse(h)))
        h = F.pixel_shuffle(h, self.patch)                                  # (B, fine, H, W)
        h = self.fine(h + self.fine_in(x), emb)
        return self.conv_out(F.silu(self.norm_out(h)))[..., :height, :width]    # (B, C, H, W)


# ================================================================================================
# 5  DEVICES
# What this file must know about devices. Scripts choose one. Where several share a batch (processes
# with a GPU each, or the cores of a TPU, which PyTorch drives through the compiler XLA), scripts
# also bring their own functions that move tensors.
# ================================================================================================


def copy_to(device, *tensors):
    """The tensors, on the device."""
    return [tensor.to(device) for tensor in tensors]


def copy_to_cpu(tensors):
    """{name: tensor} -> the same on the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def in_parts(device, function, batch, *tensors):
    """function(*parts) for every `batch` rows of the tensors (N, ...) -> results joined, on the
    CPU. XLA compiles a program for each shape, so there the last part is filled up with copies of
    its last row."""
    out = []
    for parts in zip(*(tensor.split(batch) for tensor in tensors)):
        n = len(parts[0])
        if n < batch and device.type == "xla":
            parts = [part[torch.arange(batch).clamp(max=n - 1)] for part in parts]
        out.append(function(*parts).cpu()[:n])
    return torch.cat(out)


def processes():
    """How many processes share a batch (those that torchrun started), else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(tensor):
    """Add a tensor over all processes; differentiable. A loss that is not a mean over samples needs
    it (Dice). Backward adds over processes too; DistributedDataParallel then divides by their
    number: the result is the gradient of one common loss."""
    return torch.distributed.nn.functional.all_reduce(tensor) if processes() > 1 else tensor


def uses_bf16(device, precision="auto"):
    """True if layers compute in bfloat16: as asked for ("float32", "bfloat16"), or, with "auto",
    where the device does that faster than float32."""
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
    """Context in which layers compute in bfloat16 where uses_bf16 says so. Weights, the noise
    process and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


def optimizer_form(device):
    """The fastest form of AdamW on the device, as arguments of torch: fused, one kernel for all
    weights; on XLA capturable, the step count a tensor (a Python number would be compiled anew)."""
    return {"fused": device.type in ("cpu", "cuda"), "capturable": device.type == "xla"}


# ================================================================================================
# 6  SAMPLING
# From pure noise to an image (DDPM: [DDPM] algorithm 2; DDIM: [DDIM] equation 12):
#
#     x = standard normal noise                                       # at t = T
#     for every t visited, s the next lower one:
#         v_hat  = denoiser(x, t, label map, scalars)                 # guided_v: maybe twice
#         x0_hat = signal_t * x - sigma_t * v_hat                     # split_v; kept in [-1, 1]
#         x      = a * x + b * x0_hat + c * x0_hat_earlier + d * new noise
#         x0_hat_earlier = x0_hat
#     return x                                                        # at t = 0
#
# A sampler is a choice of four numbers a step: what stays of x, how much of the predicted image is
# added, how much of the prediction one step before, how much new noise. They follow from alpha_bar
# at the t and s really visited. (Do not compute s as t - T // n: steps are uneven by rounding.)
# ================================================================================================


MOST_STEPS = 672                                # more would visit a level twice


def timesteps(steps):
    """Noise levels a sampler visits: int64 tensor (steps + 1,), from T down to 0, rounded to the
    nearest; steps in 1..MOST_STEPS. t = T 2/pi atan(noise / (1 - noise)), where noise falls evenly
    from 1 to 0: denser at both ends than even steps of t. (Under shift 1 noise is sigma / (signal +
    sigma).)"""
    noise = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (T * 2 / math.pi * torch.atan2(noise, 1 - noise)).round().long()


def ddpm_step(before, after):
    """Sampling with new noise in every step [DDPM]: x_s = a x_t + b x0_hat + d noise has the
    distribution that x_s has when x_t and x0 are known.

    before, after: floats, alpha_bar before (at t) and after (at s < t) the step. Returns
    (a, b, c, d) with c = 0 and d a standard deviation. With ratio = before / after:
        a = sqrt(ratio) (1 - after) / (1 - before)
        b = sqrt(after) (1 - ratio) / (1 - before)
        d^2 = (1 - ratio) (1 - after) / (1 - before)
    """
    ratio = before / after
    a = math.sqrt(ratio) * (1 - after) / (1 - before)
    b = math.sqrt(after) * (1 - ratio) / (1 - before)
    return a, b, 0.0, math.sqrt((1 - ratio) * (1 - after) / (1 - before))


def ddim_step(before, after, eta=0.0):
    """x_s = signal_s x0 + sqrt(sigma_s^2 - d^2) eps + d noise, with eps = (x_t - signal_t x0) /
    sigma_t and d = eta sigma_s/sigma_t sqrt(1 - before/after) [DDIM].

    before, after: as in ddpm_step. eta 0: no noise; eta 1: DDPM. Returns (a, b, 0, d) as ddpm_step.
    Rounding may bring sigma_s^2 - d^2 a little below 0: it is 0 then.
    """
    d = eta * math.sqrt((1 - after) / (1 - before) * (1 - before / after))
    along_eps = math.sqrt(max(1 - after - d * d, 0.0)) / math.sqrt(1 - before)
    return along_eps, math.sqrt(after) - along_eps * math.sqrt(before), 0.0, d


def dpmpp_step(earlier, before, after):
    """DPM-Solver++(2M) [DPM++]: x0_hat is extrapolated from the last two predictions, on a straight
    line over log(signal/sigma).

    x_s = sigma_s/sigma_t x_t + k X,  k = signal_s - signal_t sigma_s/sigma_t,
    X = (1 + 1/(2r)) x0_hat - 1/(2r) x0_hat_earlier,
    r = h_earlier / h,  h = length of a step in log(signal/sigma).
    before, after: as in ddpm_step; earlier: alpha_bar one step before `before`, None in the first
    step. Where earlier is None or 0 (its log is -infinity) or after is 1 (+infinity), r has no
    meaning: X = x0_hat. Returns (a, b, c, 0): factors of x_t, x0_hat, x0_hat_earlier and noise.
    """
    ratio = math.sqrt((1 - after) / (1 - before))
    k = math.sqrt(after) - math.sqrt(before) * ratio
    if earlier is None or earlier <= 0 or after >= 1:
        return ratio, k, 0.0, 0.0
    half_log_snr = [0.5 * math.log(level / (1 - level)) for level in (earlier, before, after)]
    r = (half_log_snr[1] - half_log_snr[0]) / (half_log_snr[2] - half_log_snr[1])
    return ratio, k * (1 + 0.5 / r), -k * 0.5 / r, 0.0


def sampler_table(levels, sampler="ddim", eta=0.0):
    """The four numbers of every step. levels: alpha_bar at the t visited, one more than steps,
    increasing from 0 (noise) to 1 (clean); sampler: "ddpm", "ddim" (eta in 0..1) or "dpmpp".

    Returns float32 (steps, 6): signal and sigma before the step, then a, b, c, d. Computed in
    float64. ValueError for any other sampler.
    """
    levels, rows = [float(level) for level in levels], []
    for i, (before, after) in enumerate(zip(levels, levels[1:])):
        if sampler == "ddpm":
            step = ddpm_step(before, after)
        elif sampler == "ddim":
            step = ddim_step(before, after, eta)
        elif sampler == "dpmpp":
            step = dpmpp_step(levels[i - 1] if i else None, before, after)
        else:
            raise ValueError(f"no sampler {sampler!r}")
        rows.append([math.sqrt(before), math.sqrt(1 - before), *step])
    return torch.tensor(rows, dtype=torch.float64).float()


@torch.no_grad()
def sample(predict_v, x, visited, table, noise=None, clip=True):
    """Walk from noise to image: x (B, C, H, W) at t = visited[0] -> x at visited[-1]. At T, x is
    standard normal noise.

    predict_v  function (x, t) -> v_hat; called for all of visited but the last
    visited    from timesteps, decreasing: where the walk stops on the way
    table      from sampler_table at alpha_bar[visited]
    noise      function of the step number, counted from 0 -> noise shaped like x; called only where
               a row's d is not 0
    clip       keep x0_hat in [-1, 1], where images live; x0_hat_earlier is the clipped one
    """
    x0_earlier = torch.zeros_like(x)
    for i, (signal, sigma, a, b, c, d) in enumerate(table.to(x.device)):
        x0_hat, _ = split_v(x, predict_v(x, visited[i]), signal, sigma)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        x = a * x + b * x0_hat + c * x0_earlier
        if table[i, 5] > 0:
            x = x + d * noise(i)
        x0_earlier = x0_hat
    return x


@dataclass
class Denoiser:
    """A trained network with everything needed to predict v."""
    net: UNet
    prior: dict                                 # from measure_prior
    alpha_bar: torch.Tensor                     # (T + 1,), that of training
    device: torch.device
    batch: int = 32                             # slices a network call, for memory only
    to_device: callable = copy_to               # function (device, *tensors) -> tensors there
    to_host: callable = torch.Tensor.cpu        # function of a tensor there -> on the CPU

    @torch.no_grad()
    def __call__(self, x_t, t, onehot, scalars):
        """x_t (N, C, H, W), or slabs, t int (N,), onehot (N, K, H, W), scalars (N, S), all on the
        CPU -> v_hat float32 (N, C, H, W) on the CPU."""
        return in_parts(self.device, self.predict, self.batch, x_t, t, onehot, scalars)

    def predict(self, x_t, t, onehot, scalars):
        """The same for a part that fits in memory."""
        mean, std = expected(self.prior, onehot, scalars)
        x_t, t, onehot, scalars, mean, std, signal, sigma = self.to_device(
            self.device, x_t, t, onehot, scalars, mean, std, *signal_sigma(self.alpha_bar, t))
        with fast_math(self.device):
            out = self.net(x_t, t, onehot, scalars)
        return self.to_host(precondition(out, x_t, signal, sigma, mean, std))


def guided_v(denoiser, x_t, t, onehot, scalars, scale=1.0, rescale=0.7):
    """Guidance [CFG]: v_null + scale (v_cond - v_null), from one network asked with and without the
    condition. It moves samples towards their condition, away from what is drawn without one.

    denoiser: function (x_t, t, onehot, scalars) -> v_hat. The null condition: the label map all
    zeros (which no label map is), and NaN (not given) for every scalar but the slice's place, which
    stays: guidance should strengthen what was asked for, not where the slice lies.
    rescale: fraction by which the spread of v is brought back to that of v_cond, sample by sample:
    v (1 - rescale + rescale std(v_cond) / std(v)), std over all axes but B. Without it large scales
    exaggerate contrast and turn air grey [ZSNR].
    One call of the denoiser at scale 1; else two: first with the condition, then without.
    """
    v_cond = denoiser(x_t, t, onehot, scalars)
    if scale == 1.0:
        return v_cond
    null_scalars = torch.cat([scalars[:, :2], torch.full_like(scalars[:, 2:], torch.nan)], 1)
    v_null = denoiser(x_t, t, torch.zeros_like(onehot), null_scalars)
    v = v_null + scale * (v_cond - v_null)
    spread = v_cond.std((1, 2, 3), keepdim=True) / v.std((1, 2, 3), keepdim=True)
    return v * (1 - rescale + rescale * spread)


def turned(volume, plane):
    """A volume (D, C, H, W) as slices of a plane: (D, C, H, W) axial, (H, C, D, W) coronal,
    (W, C, H, D) sagittal; and back, since it is its own inverse."""
    return volume.transpose(0, (0, 2, 3)[plane])


def places(count, plane):
    """The places of all `count` slices of a plane, float (count, 2)."""
    position = (torch.arange(count) * 2 + 1) / count - 1
    return torch.stack([position, torch.full_like(position, plane)], 1)


# The usual settings; steps: network calls a slice.
SAMPLING = {"steps": 14, "sampler": "dpmpp", "eta": 0.0, "guidance": 1.0, "rescale": 0.7}


def sample_guided(denoiser, onehot, scalars, key, settings=SAMPLING):
    """Sample pictures, or a volume, from their condition: onehot (N, K, H, W) -> float32
    (N, C, H, W) in [-1, 1] on the CPU.

    scalars: a list with one entry, (N, S), for pictures, which must be neighbours if the network
    sees any; with three, (N, S), (H, S) and (W, S), for the axial, coronal and sagittal slices of a
    volume. Then every step asks another plane, in turn: what one plane draws, the next sees from
    the side, so that they must agree.
    key: what all noise follows from, see generator; settings: see SAMPLING. How many slices go into
    a network call changes the result by rounding only.
    """
    visited, calls = timesteps(settings["steps"]), itertools.count()
    table = sampler_table(denoiser.alpha_bar[visited], settings["sampler"], settings["eta"])
    shape = len(onehot), denoiser.net.channels, *onehot.shape[2:]

    def predict_v(x, t):
        plane = next(calls) % len(scalars)
        x, given = slabs_of(turned(x, plane), denoiser.net.around), turned(onehot, plane)
        v = guided_v(denoiser, x, t.expand(len(x)), given, scalars[plane], settings["guidance"],
                     settings["rescale"])
        return turned(v, plane)

    def noise(step):
        return torch.randn(shape, generator=generator(*key, step))

    return sample(predict_v, noise("start"), visited, table, noise)


def sample_volume(denoiser, classes, key, settings=SAMPLING):
    """Sample a whole volume from its label map, one plane a step in turn: classes int (D, H, W),
    cubic voxels; key: (seed, case number); settings: see SAMPLING -> float32 (D, C, H, W)."""
    planes = [places(size, plane) for plane, size in enumerate(classes.shape)]
    return sample_guided(denoiser, one_hot(classes, denoiser.net.classes), planes, key, settings)


# ================================================================================================
# 7  LEARNING
# What a training step draws and how it changes the weights; the step itself stands in the training
# scripts. All random numbers are functions of (seed, step): see generator.
# ================================================================================================


def endless(rows, key, start, count):
    """Entries start .. start + count - 1 of an endless sequence that runs through `rows` in a new
    random order every epoch, torch.randperm with generator(*key, epoch): int array (count,)."""
    n = max(1, len(rows))
    orders = [torch.randperm(len(rows), generator=generator(*key, epoch)).numpy()
              for epoch in range(start // n, (start + count) // n + 1)]
    return rows[np.concatenate(orders)[start % n:][:count]]


def batch_rows(tumour, other, fraction, seed, step, batch):
    """Which slices the batch of this step shows: int array (batch,). tumour, other: numbers of the
    training slices with and without tumour; `fraction` of all draws show tumour.

    Of all draws of a run, number n = step * batch + i (steps count from 0) comes from `tumour` if
    floor((n + 1) * fraction) > floor(n * fraction), else from `other`. Both are run through in
    shuffled order, again and again (endless). If one of them is empty, all come from the other.
    """
    if not len(tumour) or not len(other):
        fraction = float(len(tumour) > 0)
    taken = np.floor(np.arange(step * batch, (step + 1) * batch + 1) * fraction + 1e-9).astype(int)
    from_tumour = np.diff(taken) > 0
    before = int(taken[0])                      # draws from tumour in earlier steps
    n = int(from_tumour.sum())
    rows = np.empty(batch, int)
    rows[from_tumour] = endless(tumour, (seed, "tumour"), before, n)
    rows[~from_tumour] = endless(other, (seed, "other"), step * batch - before, batch - n)
    return rows


def training_noise(seed, step, shape, drop):
    """All random numbers of one training step, on the CPU, for a batch of shape (B, C, H, W). They
    are drawn in the order t; keep and mirror; eps ->

    t       int64 (B,) in 1..T, one in each of B equal parts of the range, in random order
    eps     float32 (B, C, H, W)
    keep    float32 (B,): 0 where the label map is replaced by the null condition (fraction `drop`)
    mirror  bool (B,): True where left and right are swapped (one half)
    """
    g, batch = generator(seed, "noise", step), shape[0]
    part = (torch.randperm(batch, generator=g) + torch.rand(batch, generator=g)) / batch
    t = (part * T).long().clamp(max=T - 1) + 1
    u = torch.rand(2, batch, generator=g)
    eps = torch.randn(shape, generator=g)
    return t, eps, (u[0] >= drop).float(), u[1] < 0.5


def learning_rate(peak, progress, step, warmup=50):
    """Learning rate: half a cosine from peak to peak / 100 as progress goes from 0 to 1, times a
    linear rise over the first `warmup` steps (step counts from 0). progress: fraction of the run
    that is over, of steps or of minutes."""
    rise = min(1.0, (step + 1) / warmup)
    cosine = 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * rise * (0.01 + cosine)


def orthogonal(matrices, steps=5):
    """Matrices (G, M, N) -> for each, roughly the nearest matrix with orthonormal rows (columns
    where M > N) [MUON]. Singular vectors stay; singular values become about 1 (0.7 to 1.2), those
    below 1% of |matrix| maybe less. |matrix| is the root of the sum of squares.

    Newton-Schulz iteration, which needs nothing but matrix products:
        x = matrix / (|matrix| + 1e-7), then `steps` times
        factor = 3.4445 - 4.7750 (x x^T) + 2.0315 (x x^T)^2,  x <- factor x
    (on the transpose where M > N: the same result from smaller products). Each factor follows from
    the one before, since x x^T becomes factor (x x^T) factor: the long x is multiplied once, by the
    product of all factors. That needs float32: in bfloat16 small singular values would be lost.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT, steps).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    square = x @ x.mT                                                       # (G, M, M)
    factor = product = identity = torch.eye(len(square[0]), dtype=x.dtype, device=x.device)
    for step in range(steps):
        square = factor @ square @ factor if step else square
        factor = 3.4445 * identity - 4.7750 * square + 2.0315 * square @ square
        product = factor @ product if step else factor
    return product @ x


class Muon(torch.optim.AdamW):
    """Muon [MUON] for the matrices inside a network (`hidden`), AdamW [ADAMW] for all other
    parameters.

    The gradient of a layer is a matrix that points mostly in a few directions; the rest is learned
    too slowly. Muon gives all directions of the matrix (M outputs, N = all inputs of one) the same
    length. With rate = 5 lr:
        momentum += (gradient - momentum) / 20
        weight   *= 1 - rate * decay
        weight   -= rate * sqrt(max(1, M / N)) * orthogonal(0.95 momentum + 0.05 gradient)
    State is made at the start, not in the first step: XLA would compile the second step again.
    """

    def __init__(self, weights, hidden, **settings):
        kinds = [weights, hidden] if hidden else [weights]
        super().__init__([{"params": list(kind)} for kind in kinds], **settings)
        for group, names in zip(self.param_groups, (("exp_avg", "exp_avg_sq"), ("momentum",))):
            for p in group["params"]:
                self.state[p] = {name: torch.zeros_like(p) for name in names}
                self.state[p]["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self):
        """One step of all parameters, see above."""
        for group in self.param_groups[1:]:
            same_size, rate = {}, 5 * group["lr"]
            for p in group["params"]:
                self.state[p]["step"] += 1
                self.state[p]["momentum"].lerp_(p.grad, 0.05)
                same_size.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), weights in same_size.items():      # a few large products
                wanted = [torch.lerp(self.state[p]["momentum"], p.grad, 0.05).flatten(1)
                          for p in weights]
                for p, change in zip(weights, orthogonal(torch.stack(wanted))):
                    p.mul_(1 - rate * group["weight_decay"])
                    p.sub_(change.view_as(p), alpha=rate * max(1, rows / columns) ** 0.5)
                    p.grad = None                           # so that AdamW below skips it
        super().step()


def make_optimizer(net, lr, device, hidden=()):
    """The optimiser of both training scripts: Muon for the parameters in `hidden` (a segmenter's
    are none), AdamW for all others."""
    inside = {id(p) for p in hidden}
    return Muon([p for p in net.parameters() if id(p) not in inside], list(hidden), lr=lr,
                betas=(0.9, 0.99), weight_decay=0.01, **optimizer_form(device))


class EMA:
    """Exponential moving average of a network's parameters, float32 on the CPU. Averaged weights
    sample better than the last ones.

    At a step the average becomes d * average + (1 - d) * weights, with d = min(decay, (1 + step) /
    (10 + step)): a short run averages its last tenth instead of remembering its random start;
    decay 0.999 takes over after 9000 steps, 0.99 after 900. To save time that is done every
    `every` steps only, with d^every instead of d. Averaged are parameters, nothing else; the
    statistics of a batch norm are taken from the network as they are.
    It lives on the CPU to free the device's memory; the price is one transfer every `every` steps.
    """

    def __init__(self, net, decay=0.999, every=10, to_host=copy_to_cpu):
        self.decay, self.every, self.to_host = decay, every, to_host
        self.weights = {name: p.float().clone() for name, p in self.of(net).items()}

    def of(self, net):
        """The network's parameters, on the CPU: {name: tensor}."""
        return self.to_host({name: p.detach() for name, p in net.named_parameters()})

    def update(self, net, step):
        """Call after optimiser step number `step` (1, 2, ...); acts on every `every`-th."""
        if step % self.every == 0:
            self.weights = self.advanced(net, step, self.every)

    def advanced(self, net, step, count):
        """The average after `count` more steps that ended at `net`: {name: new tensor},
        d^count * average + (1 - d^count) * weights of net, with d at `step` as above."""
        keep = min(self.decay, (1 + step) / (10 + step)) ** count
        return {name: torch.lerp(p.float(), self.weights[name], keep)
                for name, p in self.of(net).items()}

    def copy_of(self, net, step):
        """A copy of `net`, on its device, with the averaged weights. Steps since the last update
        are counted in; the average itself does not change."""
        twin = copy.deepcopy(net)
        twin.load_state_dict({**net.state_dict(), **self.advanced(net, step, step % self.every)})
        return twin.eval()


# ================================================================================================
# 8  THE SEGMENTER
# Scans in, tumour labels out: a U-Net whose encoder is a ResNet [RESNET], with the names that its
# parameters have in torchvision. Then regions, losses, augmentation, and Dice.
# ================================================================================================

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}   # depth: blocks in each stage


class ResNetBlock(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H/stride, W/stride): relu(x + convolutions(x)) [RESNET].

    Two 3x3 convolutions, the first with the stride; a batch norm follows each, and a ReLU the
    first. Where channels change, the stride is 2, and the input passes a 1x1 convolution and a norm
    (downsample) before it is added; elsewhere it is 1.
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        stride = 1 if c_in == c_out else 2
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = nn.Identity()
        if stride == 2:
            shrink = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shrink, nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.downsample(x))


class ResNet(nn.Module):
    """Encoder: x (B, channels, H, W) -> [features at 1/2, 1/4, 1/8, 1/16, 1/32 of H and W].

    7x7 of stride 2, norm, ReLU (the first output), 3x3 max-pooling of stride 2, then four stages of
    STAGES[depth] blocks, all but the first with stride 2 in the first block. Names and shapes are
    those of torchvision's resnet18 and 34 without fc; only conv1 has `channels` inputs instead of
    3. WIDTHS: channels of the five outputs. Kaiming initialisation.
    """
    WIDTHS = (64, 64, 128, 256, 512)

    def __init__(self, depth, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, blocks in enumerate(STAGES[depth]):
            c_in, c = self.WIDTHS[i:i + 2]
            stage = [ResNetBlock(c if j else c_in, c) for j in range(blocks)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        kept = [F.relu(self.bn1(self.conv1(x)))]                            # (B, 64, H/2, W/2)
        h = F.max_pool2d(kept[0], 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            h = stage(h)
            kept.append(h)
        return kept


class TwoConvolutions(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H, W): twice 3x3 convolution, norm, ReLU."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), norm(c_out)
        self.conv2, self.norm2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), norm(c_out)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResUNet(nn.Module):
    """images (B, channels, H, W) in [-1, 1] -> logits (B, outputs, H, W): of REGIONS, each for a
    sigmoid (predict "regions"); or of background and LABELS for one softmax ("labels").

    Any H and W: padded with air to multiples of 32 inside, cropped after. depth: 18 or 34.
    Going up, every level is a transposed convolution to twice the size, the encoder's features of
    that size beside it, and two convolutions. At full size the encoder has no features; there two
    convolutions look at the scan itself.

    The logits of the last layer are multiplied by 8 and start at -3 for tumour. Nearly all pixels
    are not tumour; Adam moves every weight by about the learning rate, and would spend hundreds of
    steps on making small logits large.
    """
    GAIN = 8.0

    def __init__(self, depth=18, channels=4, predict="regions", width=(256, 128, 64, 32, 16)):
        super().__init__()
        self.channels, self.predict = channels, predict
        self.encoder = ResNet(depth, channels)
        self.fine = TwoConvolutions(channels, width[-1])
        self.grow, self.merge = nn.ModuleList(), nn.ModuleList()
        c, *skips = *ResNet.WIDTHS[::-1], width[-1]
        for c_skip, c_out in zip(skips, width):
            self.grow.append(nn.ConvTranspose2d(c, c_out, 2, stride=2))
            self.merge.append(TwoConvolutions(c_out + c_skip, c_out))
            c = c_out
        self.head = nn.Conv2d(c, len(REGIONS) if predict == "regions" else 1 + len(LABELS), 1)
        nn.init.zeros_(self.head.bias)
        self.head.bias.data[predict == "labels":] = -3 / self.GAIN      # forward multiplies by GAIN

    def forward(self, images):
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % 32, 0, -height % 32), value=-1.0)
        kept = self.encoder(x)
        h = kept[-1]                                            # (B, 512, H/32, W/32)
        for grow, merge, skip in zip(self.grow, self.merge, [*kept[-2::-1], self.fine(x)]):
            h = merge(torch.cat([grow(h), skip], 1))            # twice the height and width
        return self.GAIN * self.head(h)[..., :height, :width]


def regions_of(labels):
    """Labels int (...) in 0..L -> bool (len(REGIONS), ...): WT, TC, ET, each a union of labels."""
    return torch.stack([sum(labels == k for k in members) > 0 for members in REGIONS.values()])


def labels_of(probability, predict):
    """Probabilities (K, ...) -> labels uint8 (...) in 0..L.

    predict "labels": the likeliest of background, NCR, ED, ET. "regions": channels WT, TC, ET, as
    BraTS does it: where WT is above one half the label is ED; then, where TC is, NCR; then, where
    ET is, ET. Each overwrites the one before, whether or not the larger region is above one half
    there too.
    """
    if predict == "labels":
        return probability.argmax(0).to(torch.uint8)
    labels = torch.zeros(probability.shape[1:], dtype=torch.uint8)
    for region, members in zip(probability, REGIONS.values()):  # WT -> ED, TC -> NCR, ET -> ET
        labels[region > 0.5] = members[0]
    return labels


def dice_loss(probability, target, smooth=1.0):
    """1 - mean over channels of D, soft Dice [VNET]:
    D = (2 sum(p g) + smooth) / (sum p + sum g + smooth), p probability, g target.

    Sums run over B, H and W of the whole batch, over all processes that share it (all_sum), so that
    a slice without tumour counts as "nothing here" instead of 0/0. probability, target: float
    (B, K, H, W) in [0, 1]. Returns a scalar.
    """
    over = (0, 2, 3)
    shared, total = all_sum(torch.stack([(probability * target).sum(over),
                                         (probability + target).sum(over)]))
    return 1 - ((2 * shared + smooth) / (total + smooth)).mean()


def segmentation_loss(logits, labels, predict):
    """Cross-entropy + Dice loss, a scalar. logits (B, outputs, H, W); labels int64 (B, H, W) in
    0..L.

    "regions": binary cross-entropy and Dice of each region. "labels": cross-entropy over
    background and labels, and Dice of the labels.
    """
    logits = logits.float()
    if predict == "regions":
        target = regions_of(labels).movedim(0, 1).float()                   # (B, 3, H, W)
        entropy = F.binary_cross_entropy_with_logits(logits, target)
        return entropy + dice_loss(logits.sigmoid(), target)
    target = one_hot(labels, logits.shape[1])
    return F.cross_entropy(logits, labels) + dice_loss(logits.softmax(1)[:, 1:], target[:, 1:])


# How far augmentation goes. Limits of a uniform draw: rotate in degrees, scale as the log of a
# factor, shift in half pictures. Standard deviations: bend (elastic) in half pictures; per modality
# gamma as the log of an exponent, and contrast; per pixel noise, on intensities 0..1.
AUGMENT = {"none": None,
           "standard": {"rotate": 10, "scale": 0.1, "shift": 0.03, "bend": 0.0,
                        "gamma": 0.1, "contrast": 0.1, "noise": 0.01},
           "strong": {"rotate": 30, "scale": 0.3, "shift": 0.08, "bend": 0.04,
                      "gamma": 0.3, "contrast": 0.3, "noise": 0.05}}


def augment(images, labels, kind, key, part=None):
    """Move and recolour slices at random: images (B, C, H, W) in [-1, 1], labels int (B, H, W) ->
    the same, on the CPU. It depends on its arguments alone.

    Every slice is turned, scaled, shifted and bent (a field of 6x6 random vectors, bicubic between
    them), the same for images (linear) and labels (nearest); half of them are mirrored; outside the
    picture is air. Then, on intensities 0..1: power, contrast, noise, clipping. Air stays -1.
    kind: a key of AUGMENT; key: of generator; part: (B, slice) if these images are that slice of a
    batch of B shared by several processes: random numbers are drawn for all of it.
    """
    if AUGMENT[kind] is None:
        return images, labels
    limits, g = AUGMENT[kind], generator(*key)
    batch, rows = part or (len(images), slice(None))

    def normal(*shape):
        return torch.randn(batch, *shape, generator=g)[rows]

    def uniform():
        return (torch.rand(batch, generator=g) * 2 - 1)[rows]

    angle = uniform() * math.radians(limits["rotate"])
    scale = torch.exp(uniform() * limits["scale"])
    mirror = uniform().sign()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    to_x = torch.stack([mirror * cos, -sin, uniform() * limits["shift"]], 1)
    to_y = torch.stack([mirror * sin, cos, uniform() * limits["shift"]], 1)
    shape = (len(images), 1, *images.shape[-2:])
    where = F.affine_grid(torch.stack([to_x, to_y], 1), shape, align_corners=False)  # (B, H, W, 2)
    bend = F.interpolate(limits["bend"] * normal(2, 6, 6), shape[2:], mode="bicubic")
    where = where + bend.movedim(1, -1)
    images = F.grid_sample((images + 1) / 2, where, align_corners=False)    # air is 0 from here on
    labels = F.grid_sample(labels[:, None].float(), where, mode="nearest", align_corners=False)
    channels = images.shape[1]
    recoloured = images.clamp(1e-6, 1) ** torch.exp(limits["gamma"] * normal(channels, 1, 1))
    recoloured = recoloured * (1 + limits["contrast"] * normal(channels, 1, 1))
    recoloured = recoloured + limits["noise"] * normal(*images.shape[1:])
    return torch.where(images > 0, recoloured, 0.0).clamp(0, 1) * 2 - 1, labels[:, 0].long()


def dice(predicted, truth):
    """Dice = 2 |A and B| / (|A| + |B|) of two bool masks, a float. Both empty: 1.

    BraTS counts it per region and per case, over the whole volume. A mean over slices is another,
    kinder number. The Dice of the labels NCR, ED, ET is another number again.
    """
    total = int(predicted.sum() + truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


if __name__ == "__main__":
    from kit import desk, files
    files.run_script(desk.main)
