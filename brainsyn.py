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

    python brainsyn.py       draws a phantom and its noise ladder, prints the layer-shape table (10
    s) python brainsyn.py DIR   checks a folder of cases: what is rejected, what is doubtful, what
    is put right python brainsyn.py --publish runs/ddpm weights.npz       writes weights without
    pickle, prints their sha256

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
              Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
              Diffusion Models
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
              The RSNA-ASNR-MICCAI BraTS 2021 Benchmark on Brain Tumor Segmentation and Radiogenomic
              Classification
    [GSPMD]   one program for several chips: Xu et al. 2021, arXiv 2105.04663
              GSPMD: General and Scalable Parallelization for ML Computation Graphs
    [BN]      batch normalisation: Ioffe & Szegedy 2015, arXiv 1502.03167
              Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
              Shift
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

import copy
import hashlib
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
# 1  CONVENTIONS
# What is called what, once; labels and file names are those of [BRATS]. Everything takes its names
# from here.
# ================================================================================================

MODALITIES = ("t1", "t1ce", "t2", "flair")      # BraTS names up to 2021, the order of axis C
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


def to_images(stored):
    """Bytes 0..255 as prepare_case and the cache keep them -> images float32 tensor in [-1, 1]."""
    return torch.as_tensor(stored).float() / 127.5 - 1


def tumour_labels(classes, condition="tumour"):
    """Classes of a condition, array or tensor of integers -> labels: 0, 1 NCR, 2 ED, 3 ET."""
    healthy = len(CONDITIONS[condition]) - len(LABELS) - 1
    return (classes > healthy) * (classes - healthy)


# ================================================================================================
# 4  NOISE PROCESS
# Pure functions of t. No module, no buffer: a schedule that lives in a state_dict gets averaged by
# the EMA or overwritten by a checkpoint, and the samples turn black. Tables are float64 on the CPU.
# ================================================================================================

T = 1000                                        # noise levels t = 0 (clean) .. T (pure noise)


def cosine_alpha_bar(shift=1.0, steps=T):
    """alpha_bar, float64 (steps + 1,): signal = cos(angle), sigma = sin(angle), angle = t/steps *
    pi/2.

    alpha_bar[0] = 1 and alpha_bar[steps] = 0 exactly: at T nothing of the image is left, so that a
    sampler may start from pure noise and air can come out black [ZSNR].
    shift: factor on sqrt(snr) at every t; where it is 1 the first line holds. Healthy brain spans
    about a third of the range of x0, so noise hides it early: 2 suits slices of 64 pixels. Large
    pictures survive noise better (their pixels repeat each other): keep shift = 128 / resolution
    [SHIFT]. DIFFERS: no small offset s near t = 0; v-prediction does not need it.
    """
    angle = torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (math.pi / 2)
    signal, sigma = shift * torch.cos(angle), torch.sin(angle)
    alpha_bar = signal ** 2 / (signal ** 2 + sigma ** 2)
    alpha_bar[0], alpha_bar[-1] = 1.0, 0.0      # cos(pi/2) is 6e-17 in floating point
    return alpha_bar


def signal_sigma(alpha_bar, t):
    """Square roots of alpha_bar and 1 - alpha_bar at t, int64 (B,): signal and sigma, each float32
    (B, 1, 1, 1), ready to multiply images. alpha_bar is float64: the roots are taken before
    anything is rounded."""
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
    # snr = level / (1 - level), so snr + 1 = 1 / (1 - level)
    level = alpha_bar[t].view(-1, 1, 1, 1)
    weight = torch.minimum(level, gamma * (1 - level)).clamp(
        min=floor) if gamma else torch.ones_like(level)
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
    """Position code: value (B,), int or float -> float32 (B, dim), dim even: dim/2 sines, then as
    many cosines, of value / top^(2 i / dim), i = 0 .. dim/2 - 1."""
    wave = torch.exp(torch.arange(dim // 2, device=value.device) * (-math.log(top) / (dim // 2)))
    phase = value.float().unsqueeze(1) * wave
    return torch.cat([phase.sin(), phase.cos()], 1)


def zero_init(module):
    """Set weight and bias to zero: the part starts as if it were not there."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def norm(channels):
    """GroupNorm [GN] with GROUP channels a group (one group if channels are fewer or do not
    divide)."""
    return nn.GroupNorm(channels // GROUP if channels % GROUP == 0 else 1, channels)


def count_parameters(net):
    """How many numbers are learned."""
    return sum(p.numel() for p in net.parameters())


class ResBlock(nn.Module):
    """x (B, c_in, H, W), emb (B, E) -> (B, c_out, H, W).

    norm, SiLU, 3x3; norm * (1 + scale) + shift [ADM]; SiLU, 3x3 that starts at zero; plus the input
    (through a 1x1 where the number of channels changes). scale and shift are the first and second
    half of a linear map of emb, which has been through its SiLU already, see UNet.embed.
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
    """Self-attention over all pixels: (B, C, H, W) -> the same; heads of 64 channels (one head
    where that does not divide C). x + to_out(softmax(q k^T / sqrt(channels of a head)) v), where
    to_qkv(norm(x)) is all of q, then all of k, then all of v, each head by head. to_out starts at
    zero: the layer starts as the identity."""

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
        self.fine_in, self.fine = nn.Conv2d(channels + classes + 2, fine, 3, padding=1), ResBlock(
            fine, fine, emb)
        self.norm_out, self.conv_out = norm(fine), zero_init(
            nn.Conv2d(fine, self.out_channels, 3, padding=1))

    def hidden(self):
        """The weights inside, as [MUON] wants them: all that have two axes or more, but for those
        of the first and last layers."""
        ends = ("conv_in", "fine_in", "time", "scalar", "conv_out")
        return [p for name, p in self.named_parameters() if p.ndim > 1
                and not name.startswith(ends)]

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
                # twice the height, width
                h = level["grow"](h)
        # (B, fine, H, W)
        h = F.pixel_shuffle(self.unfold(F.silu(self.norm_coarse(h))), self.patch)
        h = self.fine(h + self.fine_in(x), emb)
        return self.conv_out(F.silu(self.norm_out(h)))[..., :height, :width]          # (B, C, H, W)


def expected(prior, onehot, position):
    """What the prior expects of every pixel before any network is asked: mean and std, (B, C, H,
    W).

    prior: from measure_prior; onehot (B, K, H, W), the last row of its tables is used where that is
    all zeros; position (B,), between whose two nearest slabs the atlas is interpolated. Where the
    position is NaN, and outside healthy brain, the tables alone speak. A prior of "shares" takes
    onehot at its word: it holds, for every channel of the picture, the share of the class there
    (see slab_shares).
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
        # without labels: everywhere
        brain, its = (onehot[:, 1:2], 1) if onehot.shape[1] else (known, 0)
        there = brain * (~torch.isnan(position)).view(-1, 1, 1, 1)
        mean, std = [flat + there * (torch.lerp(atlas[low], atlas[high], share)
                                     - table[its].view(1, -1, 1, 1)) for flat, atlas,
                     table in zip((mean, std), prior["atlas"], prior["classes"])]
    return mean, std


def prior_error(signal, sigma, std):
    """How far off the best guess of v is on average when a pixel comes from N(mean, std^2) and
    nothing else is known: std / sqrt(std^2 signal^2 + sigma^2). From 1 at clean (std > 0) to std at
    pure noise.

    It is the unit of what the network learns, see precondition, and of the loss, see train_ddpm.py.
    signal, sigma (B, 1, 1, 1); std (B, C, H, W), above 0 -> (B, C, H, W).
    """
    return std / ((std * signal) ** 2 + sigma ** 2).sqrt()


def precondition(out, x_t, signal, sigma, mean, std):
    """What the network says on top of what needs no network -> v_hat (B, C, H, W), float32.

    If every pixel were a number from N(mean, std^2), the best v were known in closed form:
    sigma (signal (1 - std^2) x_t - mean) / (std^2 signal^2 + sigma^2), and its error were
    prior_error. So v_hat = that + that error * out: the network learns how pixels hang together,
    starts right about air and the mean brain, and its task has about unit size at every t. This is
    the preconditioning of [EDM] with a Gaussian for each pixel instead of one for all.

    out: the network's output (B, C, H, W), maybe bfloat16; signal, sigma (B, 1, 1, 1); mean, std:
    from expected.
    """
    guess = sigma * (signal * (1 - std ** 2) * x_t - mean) / ((std * signal) ** 2 + sigma ** 2)
    return guess + prior_error(signal, sigma, std) * out.float()


def processes():
    """How many processes share a batch: those torchrun started, else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(tensor):
    """Sum of a tensor over all processes, differentiable: what is no mean over samples needs it.
    Every process's result depends on every process's tensor, so its gradient is the sum of theirs;
    DistributedDataParallel, which takes the mean of all gradients, then makes it that of one
    loss."""
    return torch.distributed.nn.functional.all_reduce(tensor) if processes() > 1 else tensor


def copy_to(device, *tensors):
    """The tensors, on the device."""
    return [tensor.to(device) for tensor in tensors]


def optimizer_form(device):
    """The form of AdamW that is fastest on the device, as torch's words for it: one kernel for all
    weights; on XLA with the step count as a tensor: as a Python number it decides what the graph
    looks like (two numbers that are equal become one), and step 2 is compiled anew."""
    return {"fused": device.type in ("cpu", "cuda"), "capturable": device.type == "xla"}


def in_parts(device, function, batch, *tensors):
    """function(*parts) for every `batch` rows of the tensors (N, ...), joined and on the CPU. On
    XLA the last part is filled up with copies of its last row, so that all parts are the same
    graph."""
    out = []
    for parts in zip(*(tensor.split(batch) for tensor in tensors)):
        n = len(parts[0])
        if n < batch and device.type == "xla":
            parts = [torch.cat([part, part[-1:].expand(batch - n, *part.shape[1:])])
                     for part in parts]
        out.append(function(*parts).cpu()[:n])
    return torch.cat(out)


def uses_bf16(device, precision="auto"):
    """Whether layers compute in bfloat16: as asked for, or, "auto", where that is faster than
    float32."""
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
    """Context in which layers compute in bfloat16 where uses_bf16 says so; weights, the noise
    process and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


# ================================================================================================
# 7  SAMPLING
# Every sampler here is a straight line through what is known: x_s = a x_t + b x0_hat + c (x0_hat of
# the step before) + d noise. So a sampler is four numbers a step, made in float64 from alpha_bar at
# the levels really visited ("t minus T // n" is wrong as soon as steps are uneven).
# ================================================================================================


def timesteps(steps):
    """Noise levels a sampler visits: int64 tensor (steps + 1,), evenly spaced from T down to 0,
    rounded to the nearest; steps in 1..T."""
    return torch.linspace(T, 0, steps + 1, dtype=torch.float64).round().long()


def ddpm_step(before, after):
    """Ancestral sampling: x_s = a x_t + b x0_hat + d noise is drawn from q(x_s | x_t, x0) [DDPM].
    before, after: floats, alpha_bar before (at t) and after (at s < t) the step -> (a, b, c, d), c
    = 0, d a standard deviation. With ratio = before / after, the share of power that one step back
    keeps:
        a = sqrt(ratio) (1 - after) / (1 - before),  b = sqrt(after) (1 - ratio) / (1 - before),
        d^2 = (1 - ratio) (1 - after) / (1 - before)
    """
    ratio = before / after
    a = math.sqrt(ratio) * (1 - after) / (1 - before)
    b = math.sqrt(after) * (1 - ratio) / (1 - before)
    return a, b, 0.0, math.sqrt((1 - ratio) * (1 - after) / (1 - before))


def ddim_step(before, after, eta=0.0):
    """x_s = signal_s x0 + sqrt(sigma_s^2 - d^2) eps + d noise, with eps = (x_t - signal_t
    x0)/sigma_t and d = eta sigma_s/sigma_t sqrt(1 - before/after) [DDIM]. eta 0: no noise, eta 1:
    DDPM. Returns (a, b, 0, d) as ddpm_step; sigma_s^2 - d^2 may come out a little below 0 by
    rounding and is 0 then."""
    d = eta * math.sqrt((1 - after) / (1 - before) * (1 - before / after))
    along_eps = math.sqrt(max(1 - after - d * d, 0.0)) / math.sqrt(1 - before)
    return along_eps, math.sqrt(after) - along_eps * math.sqrt(before), 0.0, d


def dpmpp_step(earlier, before, after):
    """DPM-Solver++(2M) [DPM++]. earlier: alpha_bar one step before `before`, None in step one.

    x_s = sigma_s/sigma_t x_t + k D,  k = signal_s - signal_t sigma_s/sigma_t,
    D = (1 + 1/(2r)) x0_hat - 1/(2r) x0_hat_earlier,  r = h_earlier / h,  h = step in
    log(signal/sigma). Where earlier is None or 0 (log-snr is -infinity there) or after is 1
    (+infinity) r has no meaning: D = x0_hat. Returns (a, b, c, 0): shares of x_t, x0_hat,
    x0_hat_earlier and noise.
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
    noise      function of the step number, from 0 -> noise shaped like x; needed where a row's d is
               not 0
    clip       keep x0_hat in [-1, 1], where images live; "the x0_hat of the step before" is the
               clipped one
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
    # how its input gets there: device and tensors -> tensors
    to_device: callable = copy_to

    @torch.no_grad()
    def __call__(self, x_t, t, onehot, scalars):
        """x_t (N, C, H, W), t int (N,), onehot (N, K, H, W), scalars (N, S), all on the CPU ->
        v_hat float32 (N, C, H, W) on the CPU."""
        return in_parts(self.device, self.ask, self.batch, x_t, t, onehot, scalars)

    def ask(self, x_t, t, onehot, scalars):
        """The same for one part of N, from the CPU, left on the device."""
        mean, std = expected(self.prior, onehot, scalars[:, 0])
        x_t, t, onehot, scalars, mean, std, signal, sigma = self.to_device(
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
    v (1 - rescale + rescale std(v_cond) / std(v)), std over all axes but B. Two calls, one after
    the other.
    """
    v_cond = denoiser(x_t, t, onehot, scalars)
    if scale == 1.0:
        return v_cond
    position, wanted = scalars[:, :1], scalars[:, 1:]
    v = denoiser(x_t, t, torch.zeros_like(onehot), torch.cat(
        [position, torch.full_like(wanted, torch.nan)], 1))
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
    N(0, 1). Away from the ends, that is, and where coherence is no less than thickness: slices of
    white noise, drawn from generator(*key), are mixed with weights exp(-dz^2 / coherence^2), whose
    squares sum to 1 for every slice. coherence 0: independent slices. thickness: mm between slices.
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
    """Sample with the number of calls, the sampler and the guidance of settings, see SAMPLING:
    onehot (N, K, H, W) and scalars (N, S), the condition; noise: function of "start" or of a step
    -> float (N, C, H, W), standard normal. Returns float32 (N, C, H, W) on the CPU."""
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

    return sample_guided(denoiser, one_hot(classes, denoiser.net.classes), position[:, None], noise,
                         settings)


# ================================================================================================
# 8  SEGMENTER
# A U-Net whose encoder is a ResNet [RESNET], parameter for parameter the one of torchvision, so
# that its published weights fit. Scans in, one map of logits for each region or label out.
# ================================================================================================

# depth: residual blocks a stage
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResNetBlock(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H/stride, W/stride): relu(x + convolutions(x)) [RESNET].

    Two 3x3 convolutions, c_out = c; or, as bottleneck, 1x1, 3x3, 1x1 with c_out = 4c. A batch norm
    follows each; the stride is that of the first 3x3. Where size or channels change, the input
    passes a 1x1 convolution and a norm (downsample) before it is added.
    """

    def __init__(self, c_in, c, stride, bottleneck):
        super().__init__()
        c_out = 4 * c if bottleneck else c
        shapes = [(c_in, c, 1, 1), (c, c, 3, stride), (c, c_out, 1, 1)] if bottleneck else [
            (c_in, c, 3, stride), (c, c, 3, 1)]
        self.convolutions = len(shapes)
        for i, (a, b, kernel, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False),
                                            nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.convolutions == 3:
            h = self.bn3(self.conv3(F.relu(h)))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Encoder: x (B, channels, H, W) -> [features at 1/2, 1/4, 1/8, 1/16, 1/32 of H and W].

    Names and shapes of parameters and buffers are those of torchvision's resnet18, 34 and 50
    without fc; only conv1 has `channels` inputs instead of 3. widths: channels of the five outputs.
    """

    def __init__(self, depth, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
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
    """images (B, channels, H, W) in [-1, 1] -> logits (B, outputs, H, W): WT, TC, ET to be squashed
    by a sigmoid each (predict "regions"), or background, NCR, ED, ET by one softmax ("labels").

    Any H and W: padded with air to multiples of 32 inside, cropped after. depth: 18, 34 or 50.
    Going up, each level is a transposed convolution to twice the size, the encoder's features of
    that size beside it, and two convolutions; for the last level, where the encoder has none, two
    convolutions look at the scan.

    The head's logits are multiplied by 8 and start at -3 for everything that is tumour: nearly all
    pixels are not, and Adam, which moves every weight by about the learning rate, would spend
    hundreds of steps on making small logits large.
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


# ================================================================================================
# 9  SEGMENTATION
# Regions, losses, augmentation, and the figures BraTS counts: per region and per *case* (the whole
# volume). A mean over slices is another, kinder number; so is calling NCR, ED, ET "WT, TC, ET".
# ================================================================================================

# whole tumour, tumour core, enhancing [BRATS]
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


def regions_of(labels):
    """Labels int (...) in 0..3 -> bool (3, ...): WT, TC, ET, each a union of labels."""
    return torch.stack([sum(labels == k for k in members) > 0 for members in REGIONS.values()])


def labels_of(probability, predict):
    """Probabilities (K, ...) -> labels uint8 (...) in 0..3.

    predict "labels": the likeliest of background, NCR, ED, ET. "regions": channels WT, TC, ET; the
    BraTS way, each where it is above one half overwrites the one before: WT becomes ED, then TC
    becomes NCR, then ET becomes ET, whether or not the larger region is above one half there too.
    """
    if predict == "labels":
        return probability.argmax(0).to(torch.uint8)
    labels = torch.zeros(probability.shape[1:], dtype=torch.uint8)
    for region, label in zip(probability, (2, 1, 3)):
        labels[region > 0.5] = label
    return labels


def dice_loss(probability, target, smooth=1.0):
    """1 - mean over channels of soft Dice = (2 sum(p g) + smooth) / (sum p + sum g + smooth), sums
    over B, H and W, of the whole global batch (see all_sum): a slice without tumour then says
    "nothing here" instead of 0/0 [VNET].

    probability, target: float (B, K, H, W) in [0, 1]. Returns a scalar.
    """
    over = (0, 2, 3)
    shared, total = all_sum(torch.stack([(probability * target).sum(over),
                                         (probability + target).sum(over)]))
    return 1 - ((2 * shared + smooth) / (total + smooth)).mean()


def segmentation_loss(logits, labels, predict):
    """Dice + cross-entropy, a scalar. logits (B, K, H, W); labels int (B, H, W) in 0..3.

    "regions": binary cross-entropy and Dice of each region; "labels": cross-entropy over four
    classes and Dice of the three that are tumour.
    """
    logits = logits.float()
    if predict == "regions":
        target = regions_of(labels).movedim(0, 1).float()                   # (B, 3, H, W)
        return F.binary_cross_entropy_with_logits(logits, target) + dice_loss(logits.sigmoid(),
                                                                              target)
    target = one_hot(labels, 4)
    return F.cross_entropy(logits, labels) + dice_loss(logits.softmax(1)[:, 1:], target[:, 1:])


# What augmentation draws from. rotate in degrees; scale, shift, bend (elastic) as shares of the
# picture; gamma, contrast (per modality) and noise as standard deviations on intensities 0..1.
AUGMENT = {"none": None, "standard": {"rotate": 10, "scale": 0.1, "shift": 0.03, "bend": 0.0,
                                      "gamma": 0.1, "contrast": 0.1, "noise": 0.01},
           "strong": {"rotate": 30, "scale": 0.3, "shift": 0.08, "bend": 0.04, "gamma": 0.3,
                      "contrast": 0.3, "noise": 0.05},}


def augment(images, labels, kind, key, share=None):
    """Randomly moved and recoloured slices: images (B, C, H, W) in [-1, 1], labels int (B, H, W) ->
    the same, on the CPU; a pure function of its arguments. kind: a key of AUGMENT; key: of
    generator; share: the (B, slice) that these images are of a global batch of B, for which chance
    is drawn.

    One smooth map of the plane for images (linear) and labels (nearest), half of them mirrored;
    then gamma, contrast and noise in each modality. Air stays -1.
    """
    how, batch, size = AUGMENT[kind], len(images), images.shape[-2:]
    if how is None:
        return images, labels
    g, (whole, mine) = generator(*key), share or (batch, slice(None))
    normal = lambda *shape: torch.randn(whole, *shape, generator=g)[mine]
    uniform = lambda: (torch.rand(whole, generator=g) * 2 - 1)[mine]
    angle, scale = uniform() * math.radians(how["rotate"]), torch.exp(uniform() * how["scale"])
    mirror = uniform().sign()
    rows = [torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), uniform()
                         * how["shift"]], 1), torch.stack([mirror * scale * angle.sin(), scale
                                                           * angle.cos(), uniform() * how["shift"]],
                                                          1)]
    # (B, H, W, 2)
    where = F.affine_grid(torch.stack(rows, 1), (batch, 1, *size), align_corners=False)
    bend = F.interpolate(how["bend"] * normal(2, 6, 6), size, mode="bicubic", align_corners=False)
    where = where + bend.movedim(1, -1)
    # air is 0 here
    images = F.grid_sample((images + 1) / 2, where, align_corners=False)
    labels = F.grid_sample(labels[:, None].float(), where, mode="nearest", align_corners=False)[:, 0].long()
    each = (images.shape[1], 1, 1)
    moved = images.clamp(1e-6, 1) ** torch.exp(how["gamma"] * normal(*each)) * (1 + how["contrast"]
                                                                                * normal(*each))
    moved = moved + how["noise"] * normal(*images.shape[1:])
    return torch.where(images > 0, moved, 0.0).clamp(0, 1) * 2 - 1, labels


def dice(predicted, truth):
    """Dice = 2 |A and B| / (|A| + |B|) of two bool masks of one case, a float; both empty: 1."""
    total = int(predicted.sum() + truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def sensitivity(predicted, truth):
    """Share of the true voxels that were found, a float; NaN where there are none."""
    return int((predicted & truth).sum()) / int(truth.sum()) if truth.any() else math.nan


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
        rows[~from_tumour] = endless(other, (seed, "other"), step * batch - int(taken[0]), batch
                                     - n)
    return rows


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
    # count, sum, sum of squares
    total = torch.zeros(3, len(names) + 1, cache.rows.shape[1] - 1)
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
        std = ((place[2] + 2 * (s ** 2 + m ** 2)) / (place[0] + 2) - mean ** 2).clamp(
            min=1e-4).sqrt()
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
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5
                                                   * (1 + math.cos(math.pi * min(progress, 1.0))))


def orthogonal(matrices, steps=5):
    """(G, M, N) -> (G, M, N), roughly each one's nearest matrix with orthonormal rows (columns
    where M > N): singular vectors stay, singular values become about 1 (0.7 to 1.2 where they were
    above a hundredth of the root of the sum of squares). By Newton-Schulz iteration, which needs
    products of matrices alone [MUON]:
        x = matrix / (|matrix| + 1e-7), the root of the sum of squares; then `steps` times
        x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x      (x^T in place of x where M > N:
        the same, cheaper)
    """
    if matrices.shape[1] > matrices.shape[2]:   # x x^T is the smaller one then
        return orthogonal(matrices.mT, steps).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT                                                   # (G, M, M)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x,
                          beta=3.4445)
    return x


class Muon(torch.optim.AdamW):
    """AdamW [ADAMW], but for weights inside a network (`hidden`, each with two axes or more), which
    learn by Muon [MUON]: a gradient of a layer is dominated by few directions, and the rest is
    learned too slowly; Muon gives all directions of a matrix (M outputs, N = all inputs of one) the
    same step.

        momentum += (gradient - momentum) / 20
        weight   *= 1 - rate * decay
        weight   -= rate * sqrt(max(1, M / N)) * orthogonal(0.95 momentum + 0.05 gradient)      rate
                 = 5 lr

    dtype: of orthogonal's arithmetic. State is made here, not in the first step: on XLA the second
    one would be another graph, compiled anew.
    """

    def __init__(self, weights, hidden, dtype, **settings):
        super().__init__([{"params": list(weights)}, *([{"params": list(hidden)}] if hidden
                                                       else [])], **settings)
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
            # matrices of one size at once: few large products
            for (rows, columns), its in alike.items():
                wanted = [torch.lerp(self.state[p]["momentum"], p.grad, 0.05).flatten(1)
                          for p in its]
                for p, change in zip(its, orthogonal(torch.stack(wanted).to(self.dtype))):
                    p.mul_(1 - rate * group["weight_decay"])
                    p.sub_(change.view_as(p), alpha=rate * max(1, rows / columns) ** 0.5)
                    p.grad = None                           # AdamW leaves it alone
        super().step()


def make_optimizer(net, lr, device, precision="auto", hidden=()):
    """The optimiser of both training scripts: AdamW, and Muon for those of net's parameters that
    are in `hidden`."""
    inside = {id(p) for p in hidden}
    return Muon([p for p in net.parameters() if id(p) not in inside], list(hidden),
                torch.bfloat16 if uses_bf16(device, precision) else torch.float32,
                lr=lr, betas=(0.9, 0.99), weight_decay=0.01, **optimizer_form(device))


def copy_to_cpu(tensors):
    """{name: tensor} -> the same on the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


class EMA:
    """Running mean of a network's parameters, float32 on the CPU, whatever the network runs on.

    Parameters only: no schedule, and no buffer (a batch norm's statistics are taken from the
    network as it is). Every k-th step counts the newest copy k times, with decay^k: where weights
    move slowly the same as every step, at 1/k of the cost. The decay at a step is min(decay, (1 +
    step) / (10 + step)): a short run averages its last tenth instead of remembering its random
    start. On the host since a bfloat16 copy would lose (1 - decay) * w to rounding, and to free the
    device's memory; the price is one transfer every k steps.
    """

    def __init__(self, net, decay=0.999, every=10, to_host=copy_to_cpu):
        self.decay, self.every, self.to_host = decay, every, to_host
        self.weights = {k: p.float().clone() for k, p in self.of(net).items()}

    def of(self, net):
        """The parameters as they are now, on the CPU."""
        return self.to_host({name: p.detach() for name, p in net.named_parameters()})

    def update(self, net, step):
        """Call after optimiser step number `step` (1, 2, ...); acts on every `every`-th."""
        if step % self.every == 0:
            self.weights = self.advanced(net, step, self.every)

    def advanced(self, net, step, count):
        """The averaged weights after `count` more steps that ended at `net`: {name: tensor}, new
        ones: d^count weights + (1 - d^count) net, with d the decay at `step`, see above."""
        keep = min(self.decay, (1 + step) / (10 + step)) ** count
        return {name: torch.lerp(p.float(), self.weights[name], keep) for name,
                p in self.of(net).items()}

    def copy_of(self, net, step):
        """A copy of `net`, on its device, that carries the averaged weights: what samples best.
        Steps since the last update are counted in; the average itself is left as it is."""
        twin = copy.deepcopy(net)
        twin.load_state_dict({**net.state_dict(), **self.advanced(net, step, step % self.every)})
        return twin.eval()


if __name__ == "__main__":
    from kit import desk, files
    files.run_script(desk.main)
