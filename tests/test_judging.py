"""kit/judging.py: the figures a run closes with must be able to say no."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kit import judging, metrics, nifti, slices


@pytest.fixture(scope="module")
def held_out(phantom_folder, tmp_path_factory):
    """32 slices with tumour at 64 pixels: images in [-1, 1] and class maps."""
    cache = slices.build_cache(nifti.find_cases(phantom_folder), tmp_path_factory.mktemp("c"), 64,
                               192.0, "tumour")
    rows = np.where(slices.has_label(cache, np.arange(len(cache.rows)), 2))[0]
    return cache.batch(rows[:: len(rows) // 32][:32])[:2]


def test_phantoms_pass_their_own_judgement(held_out):
    """Held-out phantoms judged as if sampled: all ratios 1, tumours visible, air black."""
    images, classes = held_out
    figures = judging.judge_slices(images, images, classes, "tumour")
    assert figures["sampled_t1ce_ET_above_brain"] >= 0.95
    assert figures["sampled_flair_ED_above_brain"] >= 0.95
    assert figures["slices_with_ET"] > 5 and figures["slices_with_ED"] > 10
    assert figures["sampled_air_black"] == 1.0
    assert figures["fine_power_ratio"] == 1.0 and figures["grey_white_ratio"] == 1.0


def test_swapped_labels_are_noticed(held_out):
    """Images of other masks do not light up where these masks say."""
    images, classes = held_out
    other = images.roll(1, 0).flip(-1)
    fraction, _ = judging.lesion_contrast(other, classes, "tumour", "t1ce", "ET")
    assert fraction < 0.9


def test_small_regions_are_not_counted():
    """Slices with fewer than 10 voxels of the label say nothing either way."""
    images, classes = torch.zeros(2, 4, 16, 24), torch.ones(2, 16, 24, dtype=torch.long)
    classes[0, 0, :9], classes[1, 0, :10] = 4, 4
    assert judging.lesion_contrast(images, classes, "tumour", "t1ce", "ET") == (0.0, 1)


def test_grey_air_is_noticed(held_out):
    """Air must be black in 99 of 100 voxels: a veil of 0.06 fails."""
    images, classes = held_out
    assert judging.black_air(images + 0.06, classes) < 0.01


def test_blur_and_noise_are_noticed(held_out):
    """High-frequency power falls below 0.7 under a 3x3 blur and rises above 1.3 under noise."""
    images, classes = held_out
    real = judging.fine_power(images, classes)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert (judging.fine_power(blurred, classes) / real).mean() < 0.5
    noisy = images + 0.1 * torch.randn(images.shape)
    assert (judging.fine_power(noisy, classes) / real).mean() > 1.3


def test_lost_contrast_is_noticed(held_out):
    """Half the grey-white contrast gives half the figure."""
    images, classes = held_out
    real = judging.grey_white_contrast(images, classes, "tumour")
    assert real > 0.05
    brain = (classes > 0).unsqueeze(1)
    flat = torch.where(brain, images * 0.5 - 0.1, images)
    assert 0.4 < judging.grey_white_contrast(flat, classes, "tumour") / real < 0.6


def test_the_edge_of_the_brain_is_no_fine_detail():
    """Signal counts from two pixels inside the outline on: of a block of five pixels a side in the
    middle one alone. The picture's edge counts as outside only where the brain ends."""
    classes = torch.zeros(1, 9, 11, dtype=torch.long)
    classes[0, 2:7, 3:8] = 1
    images = torch.randn(1, 4, 9, 11)
    fine = images - torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert torch.allclose(judging.fine_power(images, classes), fine[0, :, 4, 5] ** 2)
    assert not judging.fine_power(images, classes * (torch.arange(11) != 5)).any()
    whole = judging.fine_power(images, classes * 0 + 1)
    assert torch.allclose(whole, (fine ** 2).mean((0, 2, 3)))


def test_roughness_rises_when_slices_disagree():
    """Equal slices have roughness 0; independent noise in each slice has the most."""
    classes = torch.ones(6, 16, 24, dtype=torch.long)
    same = torch.randn(1, 4, 16, 24).expand(6, 4, 16, 24)
    assert judging.roughness(same, classes) == 0
    assert judging.roughness(same + 0.1 * torch.randn(6, 4, 16, 24), classes) > 0.05
    independent = torch.randn(60, 4, 32, 32)
    classes = torch.ones(60, 32, 32, dtype=torch.long)
    assert abs(judging.roughness(independent, classes) - 1.128) < 0.02


def test_frechet_distance_of_gaussians_is_known():
    """Means 3 apart, standard deviations 1 and 2 in 4 features: 9 + 4 (1 - 2)^2; 0 from itself."""
    a, b, c = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 200_000, 4)))
    b = b * 2 + torch.tensor([3.0, 0, 0, 0])
    assert judging.frechet_distance(a, b) == pytest.approx(13, abs=0.2)
    assert abs(judging.frechet_distance(a, a)) < 1e-6
    assert judging.frechet_distance(a, c) < 1e-3


def test_rank_correlation_agrees_with_scipy():
    """Spearman's rho, ties included; NaN when one list is constant."""
    stats = pytest.importorskip("scipy.stats")
    a, b = [0.2, 0.5, 0.5, 0.9, 0.7, 0.1], [1, 3, 2, 2, 5, 0]
    assert metrics.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(metrics.rank_correlation([1, 1, 1], [1, 2, 3]))


def test_bootstrap_interval_covers_as_often_as_it_says():
    """Of 200 experiments with 30 patients and a true difference of 0, about 95% of intervals hold
    0; NaN differences (nothing to find) are left out."""
    draws = np.random.default_rng(0).standard_normal((200, 30))
    intervals = [metrics.bootstrap_interval(differences, 1000) for differences in draws]
    assert 0.87 < np.mean([low <= 0 <= high for _, low, high in intervals]) < 0.99
    assert metrics.bootstrap_interval([1.0, 1.0, float("nan")]) == (1.0, 1.0, 1.0)
    assert all(np.isnan(metrics.bootstrap_interval([])))


@pytest.fixture(scope="module")
def slice_sets(coarse_folder):
    """Slices of six phantoms, of six others, and of one six times over, with blurred pictures as
    features."""
    prepared = [slices.prepare_case(case, 32, 192.0, "tumour")
                for case in nifti.find_cases(coarse_folder)]
    sets = {"real": prepared[:6], "training": prepared[6:], "synthetic": prepared[:1] * 6}
    segmenter = SimpleNamespace(features=blurred)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "SLICES_A_CASE", 12)
        return {name: judging.slice_set(segmenter, group) for name, group in sets.items()}


def blurred(images):
    """Pictures in blocks of 8 x 8 pixels, as features."""
    return torch.nn.functional.avg_pool2d(images, 8).flatten(1)


def test_texture_sees_what_is_small_wherever_it_is(slice_sets):
    """Nothing between equal pictures in whatever order; other heads are near; blur, noise and
    another contrast are far, and the further the stronger."""
    real, other = slice_sets["real"], slice_sets["training"]
    images = real["images"]

    def blur(x):
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1)

    def changed(images):
        return judging.texture_distance(real, {**real, "images": images})

    floor = judging.texture_distance(real, other)
    order = torch.randperm(len(images))
    shuffled = {name: values[order] for name, values in real.items()}
    assert judging.texture_distance(real, shuffled) < 1e-6 < floor
    noisy, noisier = [changed(images + sd * torch.randn_like(images)) for sd in (0.12, 0.2)]
    blurred, smeared = changed(blur(images)), changed(blur(blur(images)))
    assert min(noisy, blurred, changed(0.7 * images)) > 1.5 * floor
    assert noisier > 1.3 * noisy and smeared > 1.1 * blurred
    # white noise of equal power in place of what is fine: only the shape of details differs
    fine = (images - blur(images)).flatten()
    noise = fine[torch.randperm(len(fine))].view_as(images)
    assert changed(blur(images) + noise) > 1.5 * floor
    nothing = {**real, "classes": torch.zeros_like(real["classes"])}
    assert np.isnan(judging.texture_distance(real, nothing))


def test_every_case_gives_equally_many_slices(slice_sets):
    """Figures that depend on the number of slices are computed on equal numbers, all heights
    included."""
    for group in slice_sets.values():
        assert {len(values) for values in group.values()} == {72}
        assert torch.bincount(group["case"]).tolist() == [12] * 6
        assert group["images"].min() == -1
        assert group["position"].min() < -0.6 and group["position"].max() > 0.6


def test_a_set_of_copies_is_found_far(slice_sets, monkeypatch):
    """One head six times over is further from the held-out heads than other heads are."""
    monkeypatch.setattr(judging, "DRAWS", 3)
    mean, sd, cases = judging.compare_draws(slice_sets)
    synthetic, real = mean["synthetic"], mean["real"]
    assert cases == 6 and set(sd["real"]) == set(real)
    assert synthetic["Frechet distance"] > 1.3 * real["Frechet distance"]


def test_distances_are_between_equal_numbers_of_cases(slice_sets, monkeypatch):
    """A larger set is drawn down to the size of the smallest: otherwise more cases alone would look
    nearer."""
    monkeypatch.setattr(judging, "DRAWS", 1)
    real = slice_sets["real"]
    two = {name: values[real["case"] < 2] for name, values in real.items()}
    assert judging.compare_draws({**slice_sets, "real": two})[2] == 2
