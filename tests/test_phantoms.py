"""Phantoms must look and measure like heads with gliomas."""
import numpy as np
import pytest

import brainsyn as bs
from kit import checks, nifti, phantoms

# Median mL of NCR, ED, ET over the 368 expert label maps of the BraTS 2020 training set
REAL_MEDIAN_ML = {"NCR": 10.5, "ED": 49.5, "ET": 14.8}
VOXEL_ML = float(np.prod(phantoms.PHANTOM_SPACING)) / 1000
COARSE_ML = 8 * VOXEL_ML                        # a voxel of heads made with scale=2


@pytest.fixture(scope="module")
def heads():
    """Three heads: images, labels, tissue fractions."""
    return [phantoms.phantom(seed) for seed in range(100, 103)]


@pytest.fixture(scope="module")
def coarse_heads():
    """24 on the coarse grid."""
    return [phantoms.phantom(seed, scale=2) for seed in range(100, 124)]


def volumes(coarse_heads, label):
    return np.array([(labels == label).sum() * COARSE_ML for _, labels, _ in coarse_heads])


def test_a_phantom_follows_from_its_seed():
    """Same seed, same head, bit for bit; another seed or scanner another."""
    first, again, next_one = [phantoms.phantom(seed, scale=2) for seed in (7, 7, 8)]
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], next_one[1])
    other = phantoms.phantom(7, "B", scale=2)
    assert np.array_equal(first[1], other[1]), "the scanner must not change the anatomy"
    assert not np.allclose(first[0], other[0])


@pytest.mark.parametrize("label, name", list(enumerate(bs.LABELS, 1)))
def test_median_volumes_are_those_of_real_tumours(coarse_heads, label, name):
    """Within a factor of two of the real label maps, or segmenters learn another disease."""
    median = np.median(volumes(coarse_heads, label))
    assert REAL_MEDIAN_ML[name] / 2 < median < REAL_MEDIAN_ML[name] * 2, f"{name}: {median:.1f} mL"


def test_enhancing_volumes_span_1_to_40_ml(coarse_heads):
    """Small and large enhancing tumours both occur: in the label maps of two dozen heads nearly so,
    in sixty plans (which are grown exactly, see below) from below 1.5 to above 40 mL."""
    et = volumes(coarse_heads, 3)
    least = et[et > 0].min()
    assert 0 < least <= 3 and et.max() >= 35, f"{least:.1f} .. {et.max():.1f} mL"
    for first in (0, 100, 5000):
        et = [phantoms.phantom_plan(np.random.default_rng(seed), seed)[0][2]
              for seed in range(first, first + 60)]
        assert 0 < min(ml for ml in et if ml) <= 1.5 and max(et) >= 40


def test_planned_volumes_are_grown_exactly():
    """The label map holds the mL that were planned, to half a voxel a label, however coarse."""
    for seed, scale in ((3, 1), (3, 2), (11, 2), (20, 4)):
        plan, _ = phantoms.phantom_plan(np.random.default_rng(seed), seed)
        labels, voxel_ml = phantoms.phantom(seed, scale=scale)[1], scale ** 3 * VOXEL_ML
        for label, ml in enumerate(plan, 1):
            assert abs((labels == label).sum() * voxel_ml - ml) <= voxel_ml


def test_grades_vary():
    """Among 200 plans: no tumour, no ET, no NCR, and several foci all occur, none too often."""
    plans = [phantoms.phantom_plan(np.random.default_rng(seed), seed) for seed in range(200)]
    none = sum(sum(v) == 0 for v, _ in plans)
    no_et = sum(sum(v) > 0 and v[2] == 0 for v, _ in plans)
    no_ncr = sum(sum(v) > 0 and v[0] == 0 for v, _ in plans)
    several = sum(len(foci) > 1 for _, foci in plans)
    assert all(4 <= n <= 40 for n in (none, no_et, no_ncr)) and 30 <= several <= 90
    centres = np.array([foci[0] for _, foci in plans])
    assert (centres[:, 0] < 0).mean() > 0.3 and (centres[:, 0] > 0).mean() > 0.3
    assert (centres.std(0) > 10).all(), "tumours must not all sit in one place"


def test_tissue_brightness_is_in_the_order_of_life(heads):
    """T1: white > grey > CSF. T2: CSF > grey > white. FLAIR: ED > grey > CSF. T1ce: ET > white."""
    for images, _, fractions in [*heads, phantoms.phantom(0, "B")]:
        pure = {k: (part > 0.75) & (images[0] > 0) for k, part in fractions.items()}
        mean = {m: {k: images[c][mask].mean() for k, mask in pure.items() if mask.sum() > 50}
                for c, m in enumerate(bs.MODALITIES)}
        assert mean["t1"]["white"] > mean["t1"]["grey"] > mean["t1"]["CSF"]
        assert mean["t2"]["CSF"] > mean["t2"]["grey"] > mean["t2"]["white"]
        assert mean["flair"]["grey"] > mean["flair"]["CSF"]
        if "ED" in mean["flair"]:
            assert mean["flair"]["ED"] > mean["flair"]["grey"]
        if "ET" in mean["t1ce"]:
            assert mean["t1ce"]["ET"] > 1.2 * mean["t1ce"]["white"]


def test_signal_equations_by_hand():
    """Spin echo and inversion recovery, and what gadolinium does, against numbers worked by
    hand."""
    spin_echo = phantoms.mr_signal("t1", (500, 10), 500, 100, 1.0)
    assert np.isclose(spin_echo, (1 - np.exp(-1)) * np.exp(-0.1))
    nulled = phantoms.mr_signal("flair", (1e9, 0, 1000 * np.log(2)), 1000, 100, 1.0)
    assert np.isclose(nulled, 0, atol=1e-9), "at TI = T1 ln 2 the signal is nulled"
    enhanced = phantoms.mr_signal("t1ce", (500, 0), 1000, 100, 1.0, leak=1.0)
    assert np.isclose(enhanced, 1 - np.exp(-1))


def test_heads_have_the_size_of_heads(heads, coarse_heads):
    """Brain 1.2 to 1.8 litres, longer than wide, grey and white matter each a third of it or so."""
    for images, _, _ in [*heads, *coarse_heads]:
        brain = images[0] > 0
        voxel = phantoms.voxel_mm(brain.shape)
        assert 1200 < brain.sum() * np.prod(voxel) / 1000 < 1800
        extent = [np.ptp(np.where(brain.any(axis))[0]) * mm
                  for axis, mm in zip(((1, 2), (0, 2), (0, 1)), voxel)]
        assert 120 < extent[0] < 155 and 145 < extent[1] < 190 and 110 < extent[2] < 155
    for images, _, fractions in heads:
        brain = images[0] > 0
        part = {k: fractions[k][brain].sum() / brain.sum() for k in ("CSF", "grey", "white")}
        assert 0.08 < part["CSF"] < 0.32 and 0.25 < part["grey"] < 0.55, part
        assert 0.2 < part["white"] < 0.5, part


def test_cortex_is_folded(heads):
    """Sulci: CSF well below the brain's surface, away from ventricles, in every head."""
    for images, _, fractions in heads:
        brain = images[0] > 0
        inner = brain.copy()
        for _ in range(4):                      # 8 mm below the surface
            for axis in range(3):
                inner &= np.roll(inner, 1, axis) & np.roll(inner, -1, axis)
        lateral = np.abs(np.arange(96) - 47.5)[:, None, None] * 2 > 40      # mm from the midline
        assert ((fractions["CSF"] > 0.4) & inner & lateral).sum() * VOXEL_ML > 1.0


def test_tissue_has_texture(heads):
    """White matter is not one number: its spread exceeds noise and is spatially correlated."""
    images, _, fractions = heads[0]
    white = (fractions["white"] > 0.97)
    t1 = images[0] / images[0][white].mean()
    pairs = white[1:] & white[:-1]
    a, b = t1[1:][pairs] - 1, t1[:-1][pairs] - 1
    assert t1[white].std() > 0.015 and np.corrcoef(a, b)[0, 1] > 0.3


def test_tumour_structure():
    """NCR lies deeper inside the tumour than ET, ET than ED: mean distance from the centre of the
    whole tumour grows in that order in most single tumours."""
    right = counted = 0
    for seed in range(30):
        (ncr, ed, et), foci = phantoms.phantom_plan(np.random.default_rng(seed), seed)
        if min(ncr, ed, et) < 2 or len(foci) > 1 or counted == 8:
            continue
        labels, counted = phantoms.phantom(seed, scale=2)[1], counted + 1
        where = [np.argwhere(labels == k) * phantoms.PHANTOM_SPACING for k in (1, 2, 3)]
        core = np.concatenate([where[0], where[2]]).mean(0)
        ncr_d, ed_d, et_d = [np.linalg.norm(w - core, axis=1).mean() for w in where]
        right += ncr_d < et_d < ed_d
    assert counted == 8 and right >= 6, f"{right} of {counted}"


def test_a_coarse_head_is_a_head(tmp_path):
    """scale=2: voxels of 4 x 4 x 4.8 mm, and a case that the check has nothing against."""
    phantoms.make_phantoms(tmp_path, 4, scale=2)
    cases = nifti.find_cases(tmp_path)
    for case in cases:
        _, labels, affine = nifti.read_case(case)
        assert labels.shape == (48, 48, 32)
        assert np.allclose(nifti.spacing_of(affine), (4, 4, 4.8))
    findings = []
    good = checks.check_cases(cases, findings)
    assert len(good) == 4 and {finding.kind for finding in findings} <= {"normalised"}, findings


def test_air_is_exactly_zero_and_scans_differ(heads):
    """Outside the brain nothing, as after skull stripping; gains and noise differ from scan to
    scan."""
    images = heads[0][0]
    brain = images[0] > 0
    assert all(not image[~brain].any() for image in images) and images.min() == 0
    means = [im[0][im[0] > 0].std() for im, _, _ in heads]
    assert np.std(means) > 0.005
