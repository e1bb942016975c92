"""kit/judging.py: the figures a run closes with must be able to say no."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import judging, metrics, nifti, slices
import train_ddpm


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


class Oracle(torch.nn.Module):
    """A network that knows x0 (N, C, H, W) where `known`, and goes `share` of the way from what the
    prior guesses to it; elsewhere it goes far off."""

    def __init__(self, denoiser, x0, known, share):
        super().__init__()
        self.channels, self.classes, self.around = 4, 5, 0
        self.denoiser, self.x0, self.known, self.share = denoiser, x0, known, share

    def forward(self, x_t, t, onehot, scalars):
        signal, sigma = bs.signal_sigma(self.denoiser.alpha_bar, t)
        mean, std = bs.expected(self.denoiser.prior, onehot, scalars)
        guess = bs.precondition(torch.zeros_like(x_t), x_t, signal, sigma, mean, std)
        v = (signal * x_t - self.x0) / sigma
        out = self.share * (v - guess) / bs.prior_error(signal, sigma, std)
        return torch.where(self.known, out, 9.0)


@pytest.fixture(scope="module")
def untrained(held_out):
    """A small network as it is before training, with the prior of the held-out slices."""
    images, classes = held_out
    prior = bs.measure_prior([(images, classes, torch.zeros(len(images), 2))], "tumour")
    return bs.Denoiser(bs.UNet(width=16, mults=(1,)).eval(), prior, bs.cosine_alpha_bar(2.0),
                       torch.device("cpu"), 64)


def test_skill_is_0_for_the_prior_alone_and_1_if_perfect(held_out, untrained):
    """Half way from the prior to the truth is 3/4, at every noise level; what is drawn in air does
    not count. No brain, no figure."""
    images, classes = held_out
    place, brain = torch.zeros(len(images), 2), (classes > 0).unsqueeze(1)

    def skill(net):
        denoiser = bs.Denoiser(net, untrained.prior, untrained.alpha_bar, untrained.device, 64)
        return judging.skill(denoiser, images, classes, place, (0,))

    assert skill(untrained.net) == [0.0] * len(judging.SKILL_AT)
    for share, figure in ((1.0, 1.0), (0.5, 0.75), (-1.0, -3.0)):
        found = skill(Oracle(untrained, images, brain, share))
        assert found == pytest.approx([figure] * len(judging.SKILL_AT), abs=1e-3)
    nothing = judging.skill(untrained, images, classes * 0, place, (0,))
    assert np.isnan(nothing).all()


def test_the_prior_alone_draws_what_an_untrained_network_draws(held_out, untrained):
    """Bit for bit, whatever the network in its place has learned."""
    classes = held_out[1][:3]
    trained = bs.UNet(width=16, mults=(1,)).eval()
    torch.nn.init.normal_(trained.conv_out.weight, std=0.1)
    trained = bs.Denoiser(trained, untrained.prior, untrained.alpha_bar, untrained.device)
    drawn, alone, learned = [
        bs.sample_guided(model, bs.one_hot(classes, 5), [torch.zeros(3, 2)], (0, 0))
        for model in (untrained, judging.prior_alone(trained), trained)]
    assert torch.equal(drawn, alone) and not torch.equal(alone, learned)


@pytest.fixture(scope="module")
def held_out_heads(phantom_folder):
    """Two heads of 48 voxels a side: scans and label maps."""
    got = [slices.prepare_case(case, 48, 192.0, "tumour")
           for case in nifti.find_cases(phantom_folder)[:2]]
    return ([bs.to_images(head["images"]) for head in got],
            [torch.from_numpy(head["classes"]).long() for head in got])


def test_every_figure_stands_beside_that_of_the_prior_alone(held_out_heads):
    """Of samples that are the scans themselves, and of a prior alone that blurs and greys them."""
    images, classes = held_out_heads
    prior = [torch.nn.functional.avg_pool2d(head, 3, 1, 1) + 0.06 for head in images]
    figures = judging.judge_run(images, images, prior, classes, "tumour", (images, classes))
    for plane in judging.PLANES:
        assert figures[f"texture_{plane}"] == 0 == figures[f"real_texture_{plane}"]
        assert figures[f"prior_texture_{plane}"] > 0.05
    for axis in "zyx":
        assert figures[f"banding_{axis}"] == figures[f"folds_{axis}"] == 1
        assert figures[f"prior_banding_{axis}"] != 1
    assert figures["fine_power_ratio"] == 1 and figures["prior_fine_power_ratio"] < 0.5
    assert figures["sampled_air_black"] == 1 and figures["prior_air_black"] < 0.01
    names = {name for name in figures if name.startswith("sampled_")}
    assert {name.replace("sampled_", "prior_") for name in names} <= set(figures)
    assert len(names) == 4 and "prior_grey_white_ratio" in figures
    assert not [name for name in figures if name.startswith(("prior_real", "prior_slices"))]


def test_the_table_begins_with_what_the_network_learned(held_out_heads):
    """Skill, texture, banding, folds, fine detail and grey-white contrast; then what the prior has
    too. Each number in its column, a dash where there is none."""
    images, classes = held_out_heads
    figures = judging.judge_run(images, [head * 0.97 for head in images],
                                [head * 0 for head in images], classes, "tumour")
    figures |= {"skill": [0.1, 0.2, 0.3, np.nan], "real_texture_axial": 0.026}
    lines = judging.head_table(figures)
    cells = [line.split("  ")[0] for line in lines]
    assert cells[:5] == ["figure", *(f"skill at t = {t}" for t in judging.SKILL_AT)]
    assert [line.split()[-3:] for line in lines[1:5]] == [
        ["0.100", "0.000", "1.000"], ["0.200", "0.000", "1.000"], ["0.300", "0.000", "1.000"],
        ["-", "0.000", "1.000"]]
    wanted = [f"{figures[name]:.3f}" for name in ("texture_axial", "prior_texture_axial",
                                                  "real_texture_axial")]
    assert cells[5] == "texture distance, axial" and lines[5].split()[-3:] == wanted
    assert lines[6].split()[-1] == "-"          # no other heads, no floor
    assert cells[8:14] == [f"{word} along {axis} / real" for word in ("banding", "folds that run")
                           for axis in "zyx"]
    assert cells[14] == "fine detail / real" and lines[14].split()[-3:] == ["0.941", "0.000",
                                                                            "1.000"]
    assert "grey-white" in cells[15] and "ET above brain on t1ce" in cells[16]
    assert "ED above brain on flair" in cells[17] and cells[18].startswith("air")
    air = [f"{figures[f'{source}_air_black']:.3f}" for source in ("sampled", "prior", "real")]
    assert lines[18].split()[-3:] == air == ["1.000", "0.000", "1.000"]
    assert len(lines) == 19 and len(set(map(len, lines))) == 1


def test_real_figures_too_low_to_be_true_are_doubted(held_out):
    """T1ce exchanged with a scan that is dark in ET: a sentence that says what to suspect. Not for
    scans that are right, nor from four slices or at 80%."""
    images, classes = held_out
    figures = judging.judge_slices(images, images, classes, "tumour")
    assert judging.doubts(figures) == []
    wrong = images.clone()
    wrong[:, bs.MODALITIES.index("t1ce")] *= -1
    note, = judging.doubts(judging.judge_slices(wrong, images, classes, "tumour"))
    assert "ET" in note and "t1ce" in note and "exchanged" in note and "brainsyn.py DIR" in note
    low = figures | {"real_flair_ED_above_brain": 0.79, "slices_with_ED": 5}
    assert len(judging.doubts(low)) == 1
    assert not judging.doubts(low | {"slices_with_ED": 4})
    assert not judging.doubts(low | {"real_flair_ED_above_brain": 0.8})


def test_a_run_reports_on_its_network_and_doubts_its_data(phantom_folder, tmp_path, monkeypatch):
    """An untrained network closes with skill 0 and the figures of the prior alone; of exchanged
    scans that is said."""
    args = train_ddpm.parse_arguments(["--resolution", "32", "--width", "16", "--mults", "1",
                                       "--out", str(tmp_path)])
    cache = slices.build_cache(nifti.find_cases(phantom_folder), tmp_path / "cache", 32, 192.0,
                               "tumour")
    cache.cubes = [cube.copy() for cube in cache.cubes]
    for cube in cache.cubes:
        cube[:, 1] = np.where(cube[:, -1] > 0, 255 - cube[:, 1], 0)         # T1ce
    images = train_ddpm.Images(args, cache)
    denoiser = bs.Denoiser(bs.UNet(width=16, mults=(1,), around=1).eval(), images.prior,
                           bs.cosine_alpha_bar(2.0), torch.device("cpu"))
    kept = {}
    monkeypatch.setattr(judging, "HEADS", 2)
    monkeypatch.setattr(train_ddpm.runs, "report",
                        lambda args, run, settings, figures, lines: kept.update(
                            figures, lines=lines))
    images.report(denoiser, SimpleNamespace(step=0, seconds=0))
    assert kept["skill"] == [0.0] * 4 and kept["heads"].endswith("held-out")
    for name in ("texture_axial", "banding_z", "folds_x", "fine_power_ratio"):
        assert kept[name] == kept[f"prior_{name}"]
    assert kept["real_texture_axial"] > 0
    assert kept["slices_with_ET"] >= 5 and "exchanged" in kept["lines"][-1]
    torch.nn.init.normal_(denoiser.net.conv_out.weight, std=0.1)
    before = kept["prior_texture_axial"]
    images.report(denoiser, SimpleNamespace(step=0, seconds=0))
    assert before == kept["prior_texture_axial"] != kept["texture_axial"]
    assert max(kept["skill"]) < 0


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


@pytest.mark.parametrize("axis", range(3))
def test_banding_sees_along_which_axis_slices_disagree(axis):
    """Every other slice brighter than its neighbours: steps of twice the spread of voxels along
    that axis, next to nothing along the others; a gap between healthy parts does not count."""
    classes, images = torch.ones(20, 20, 20, dtype=torch.long), torch.zeros(20, 4, 20, 20)
    images += torch.randn(1, 4, 1, 1)
    stripes = 0.2 * (torch.arange(20) % 2).float()
    shape = [20 if i == axis else 1 for i in range(3)]
    banded = images + stripes.view(shape).unsqueeze(1)
    banded = banded / banded.movedim(1, 0).flatten(1).std(1).view(4, 1, 1) * 0.5
    found = judging.banding(banded, classes, "tumour")
    assert found[axis] == pytest.approx(0.2 / (0.2 / 2), rel=0.05)
    assert max(value for i, value in enumerate(found) if i != axis) < 1e-3
    classes[:, 9:11] = 3
    assert judging.banding(banded, classes, "tumour")[axis] > 0


def test_folds_that_run_through_are_told_from_folds_that_do_not(held_out_heads):
    """Heads whose slices are shuffled along an axis keep the CSF in each slice and lose its run."""
    images, classes = held_out_heads
    found = judging.fold_dice(images[0], classes[0], "tumour")
    noise = images[0] + 0.5 * torch.randn(images[0].shape)
    assert min(found) > 0.5 and max(judging.fold_dice(noise, classes[0], "tumour")) < min(found)


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


def test_texture_sees_what_is_small_wherever_it_is(slice_sets, monkeypatch):
    """Nothing between equal pictures in whatever order; other heads are near; blur, noise and
    another contrast are far, and the further the stronger."""
    monkeypatch.setattr(judging, "PATCHES", 200_000)            # all there are
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


def test_some_patches_are_as_good_as_all(slice_sets, monkeypatch):
    """Half of them, evenly spread: the distance differs by a tenth at most, also where only the
    last slices differ. A few would not do."""
    real, other = slice_sets["real"], slice_sets["training"]
    late = real["images"].clone()
    late[36:] = torch.nn.functional.avg_pool2d(late[36:], 3, 1, 1)
    count = int((real["classes"][:, 3:-3, 3:-3] > 0).sum())
    for group in (other, {**real, "images": late}):
        found = []
        for number in (count, count // 2, 1000):
            monkeypatch.setattr(judging, "PATCHES", number)
            found.append(judging.texture_distance(real, group))
        assert found[1] != found[0] and found[1] == pytest.approx(found[0], rel=0.1)
    assert judging.texture_distance(real, other) > 0.05         # of 1000: 0.04 of all


def test_three_planes_show_the_same_head():
    """A voxel is where it was, whichever way the head is cut."""
    images, classes = torch.randn(6, 4, 8, 10), torch.randint(0, 5, (6, 8, 10))
    (axial, of_axial), (front, of_front), (side, of_side) = judging.planes_of(images, classes)
    assert torch.equal(axial, images) and torch.equal(of_axial, classes)
    assert front.shape == (8, 4, 6, 10) and of_front.shape == (8, 6, 10)
    assert torch.equal(front[3, :, 2, 7], images[2, :, 3, 7]) and of_front[3, 2, 7] == classes[2, 3,
                                                                                                7]
    assert torch.equal(side[7, :, 3, 2], images[2, :, 3, 7]) and of_side[7, 3, 2] == classes[2, 3,
                                                                                             7]


def test_every_case_gives_equally_many_slices(slice_sets):
    """Figures that depend on the number of slices are computed on equal numbers, all heights
    included."""
    for group in slice_sets.values():
        assert {len(values) for values in group.values()} == {72}
        assert torch.bincount(group["case"]).tolist() == [12] * 6
        assert group["images"].min() == -1


@pytest.mark.slow
def test_a_set_of_copies_is_found_far(slice_sets, monkeypatch):
    """One head six times over is further from the held-out heads than other heads are."""
    monkeypatch.setattr(judging, "DRAWS", 3)
    mean, sd, cases = judging.compare_draws(slice_sets)
    synthetic, real = mean["synthetic"], mean["real"]
    assert cases == 6 and set(sd["real"]) == set(real)
    assert synthetic["Frechet distance"] > 1.3 * real["Frechet distance"]


@pytest.mark.slow
def test_the_prior_alone_is_judged_on_the_same_heads(slice_sets, monkeypatch):
    """Drawn in the same order as the synthetic cases: the same pictures have the same distances
    though only two of the heads count; blurred from the side, they differ in that plane alone."""
    monkeypatch.setattr(judging, "DRAWS", 3)
    few = {name: values[slice_sets["training"]["case"] < 2]
           for name, values in slice_sets["training"].items()}
    sets = {**slice_sets, "synthetic": slice_sets["real"], "training": few}
    same = judging.compare_draws({**sets, "prior": sets["synthetic"]})[0]
    assert same["prior"] == same["synthetic"] and list(same["real"]) == list(judging.DISTANCES)
    smooth = torch.nn.functional.avg_pool2d(sets["synthetic"]["coronal images"].float(), 3, 1, 1)
    other = {**sets["synthetic"], "coronal images": smooth.to(torch.uint8)}
    mean, sd, cases = judging.compare_draws({**sets, "prior": other})
    assert cases == 2 and set(sd) == set(mean) == {"synthetic", "prior", "real"}
    differ = {name for name, value in mean["prior"].items() if value != mean["synthetic"][name]}
    assert differ == {"texture distance, coronal"}
    assert mean["prior"][differ.pop()] > 1.5 * mean["synthetic"]["texture distance, coronal"]


def test_distances_are_between_equal_numbers_of_cases(slice_sets, monkeypatch):
    """A larger set is drawn down to the size of the smallest: otherwise more cases alone would look
    nearer."""
    monkeypatch.setattr(judging, "DRAWS", 1)
    real = slice_sets["real"]
    two = {name: values[real["case"] < 2] for name, values in real.items()}
    assert judging.compare_draws({**slice_sets, "real": two})[2] == 2
