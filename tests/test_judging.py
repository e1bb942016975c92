"""Section 10: the figures a run closes with must be able to say no."""
import numpy as np
import pytest
import torch

import brainsyn as bs


@pytest.fixture(scope="module")
def held_out(phantom_folder, tmp_path_factory):
    """32 slices with tumour at 64 pixels: images in [-1, 1] and class maps."""
    cache = bs.build_cache(bs.find_cases(phantom_folder), tmp_path_factory.mktemp("c"), 64, 192.0, "tumour")
    rows = np.where(bs.has_label(cache, np.arange(len(cache.rows)), 2))[0]
    return cache.batch(rows[:: len(rows) // 32][:32])[:2]


def test_phantoms_pass_their_own_judgement(held_out):
    """Held-out phantoms judged as if sampled: all ratios 1, tumours visible, air black."""
    images, classes = held_out
    figures = bs.judge_slices(images, images, classes, "tumour")
    assert figures["sampled_t1ce_ET_above_brain"] >= 0.95 and figures["sampled_flair_ED_above_brain"] >= 0.95
    assert figures["slices_with_ET"] > 5 and figures["slices_with_ED"] > 10
    assert figures["sampled_air_black"] == 1.0
    assert figures["fine_power_ratio"] == 1.0 and figures["grey_white_ratio"] == 1.0


def test_swapped_labels_are_noticed(held_out):
    """Images of other masks do not light up where these masks say."""
    images, classes = held_out
    share, _ = bs.lesion_contrast(images.roll(1, 0).flip(-1), classes, "tumour", "t1ce", "ET")
    assert share < 0.9


def test_small_regions_are_not_counted():
    """Slices with fewer than 10 voxels of the label say nothing either way."""
    images, classes = torch.zeros(2, 4, 16, 24), torch.ones(2, 16, 24, dtype=torch.long)
    classes[0, 0, :9], classes[1, 0, :10] = 4, 4
    assert bs.lesion_contrast(images, classes, "tumour", "t1ce", "ET") == (0.0, 1)


def test_grey_air_is_noticed(held_out):
    """Air must be black in 99 of 100 voxels: a veil of 0.06 fails."""
    images, classes = held_out
    assert bs.black_air(images + 0.06, classes) < 0.01


def test_blur_and_noise_are_noticed(held_out):
    """High-frequency power falls below 0.7 under a 3x3 blur and rises above 1.3 under noise."""
    images, classes = held_out
    real = bs.fine_power(images, classes)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert (bs.fine_power(blurred, classes) / real).mean() < 0.5
    assert (bs.fine_power(images + 0.1 * torch.randn(images.shape), classes) / real).mean() > 1.3


def test_lost_contrast_is_noticed(held_out):
    """Half the grey-white contrast gives half the figure."""
    images, classes = held_out
    real = bs.grey_white_contrast(images, classes, "tumour")
    assert real > 0.05
    brain = (classes > 0).unsqueeze(1)
    flat = torch.where(brain, images * 0.5 - 0.1, images)
    assert 0.4 < bs.grey_white_contrast(flat, classes, "tumour") / real < 0.6


def test_erosion_by_hand():
    """A 3x3 block loses its rim; the picture's edge counts as outside only where the mask ends."""
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[0, 2:5, 2:5] = True
    assert bs.erode(mask).sum() == 1 and bs.erode(mask)[0, 3, 3] and not bs.erode(mask, 2).any()


def test_roughness_rises_when_slices_disagree():
    """Equal slices have roughness 0; independent noise in each slice has the most."""
    classes, same = torch.ones(6, 16, 24, dtype=torch.long), torch.randn(1, 4, 16, 24).expand(6, 4, 16, 24)
    assert bs.roughness(same, classes) == 0
    assert bs.roughness(same + 0.1 * torch.randn(6, 4, 16, 24), classes) > 0.05
    assert abs(bs.roughness(torch.randn(60, 4, 32, 32), torch.ones(60, 32, 32, dtype=torch.long)) - 1.128) < 0.02
