"""Edits move tumours in mm, on any grid, and keep them in the brain."""
import numpy as np
import pytest

import brainsyn as bs
import sample
from kit import edits, nifti, recipes, slices

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
AFFINE[:3, 3] = [-40, -30, -20]


def head():
    """A box of a brain, 40 x 30 x 24 voxels of 2 x 2 x 3 mm, with a tumour right of its middle."""
    brain = np.zeros((44, 34, 26), bool)
    brain[2:42, 2:32, 1:25] = True
    labels = np.zeros(brain.shape, np.uint8)
    labels[24:36, 8:20, 6:18] = 2
    labels[25:31, 11:17, 8:16] = 3
    labels[27:29, 13:15, 10:14] = 1
    return labels, brain


def centre(labels, affine=AFFINE):
    """Centre of the tumour in mm."""
    return np.argwhere(labels > 0).mean(0) @ affine[:3, :3].T + affine[:3, 3]


def edited(words, labels=None, brain=None):
    """edit_labels as the command line asks for it."""
    if labels is None:
        labels = head()[0]
    if brain is None:
        brain = head()[1]
    return edits.edit_labels(labels, AFFINE, brain, edits.parse_edit(words),
                             np.random.default_rng(0))


def test_no_edit_changes_nothing():
    """The way through coordinates is exact."""
    assert np.array_equal(edited(["scale=1"]), head()[0])


def test_shift_is_in_mm_along_the_axes_of_the_body():
    """4 mm to the right, 6 mm to the back, 3 mm up: two, minus three and one voxel here."""
    assert np.array_equal(edited(["shift=4,-6,3"]), np.roll(head()[0], (2, -3, 1), (0, 1, 2)))


@pytest.mark.parametrize("factor", [0.7, 1.2])
def test_scale_is_a_factor_on_lengths(factor):
    """Volume goes with its cube, the centre stays, ET stays inside."""
    labels, out = head()[0], edited([f"scale={factor}"])
    for name in ("WT", "TC"):
        ratio = edits.volume_ml(out, AFFINE, name) / edits.volume_ml(labels, AFFINE, name)
        assert ratio == pytest.approx(factor ** 3, rel=0.15), name
    assert np.abs(centre(out) - centre(labels)).max() < 0.5


def test_mirror_swaps_left_and_right_about_the_middle_of_the_brain():
    """Twice is nothing; once it lies as far left as it lay right."""
    labels, brain = head()
    once = edited(["mirror"])
    across = np.where(brain.any((1, 2)))[0]
    middle = (across[0] + across[-1]) / 2
    before, after = [np.argwhere(volume > 0)[:, 0].mean() for volume in (labels, once)]
    assert after - middle == pytest.approx(middle - before) and after < middle
    assert np.array_equal(once[across[0]:across[-1] + 1], labels[across[0]:across[-1] + 1][::-1])
    assert np.array_equal(edits.edit_labels(once, AFFINE, brain, {"mirror": True},
                                            np.random.default_rng(0)), labels)


def test_rotation_turns_right_to_front():
    """Seen from the head, counter-clockwise: what lay to the right lies in front after 90
    degrees."""
    labels, brain = np.zeros((44, 34, 26), np.uint8), np.ones((44, 34, 26), bool)
    labels[20:30, 15:17, 10:14] = 2                         # a bar along left-right ...
    labels[29, 15:17, 10:14] = 3                            # ... whose right end is marked
    out = edited(["rotate=90"], labels, brain)
    bar, end = np.argwhere(out > 0), np.argwhere(out == 3)
    assert np.ptp(bar[:, 1]) == 9 and np.ptp(bar[:, 0]) <= 2
    assert end[:, 1].mean() > bar[:, 1].mean() + 3


def test_elastic_bends_and_follows_its_seed():
    """Smooth displacements of a few mm: another shape of about the same volume, the same for the
    same seed."""
    labels, brain = head()
    a, b, c = [edits.edit_labels(labels, AFFINE, brain, {"elastic": 3.0}, np.random.default_rng(s))
               for s in (1, 1, 2)]
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    overlap = 2 * ((a > 0) & (labels > 0)).sum() / ((a > 0).sum() + (labels > 0).sum())
    assert 0.6 < overlap < 0.99


def test_tumours_stay_inside_the_brain():
    """What an edit pushes over the edge is cut off."""
    labels, brain = head()
    out = edited(["shift=40,0,0", "scale=1.5"])
    assert out.any() and not out[~brain].any()
    assert not edits.edit_labels(labels * 0, AFFINE, brain, {"scale": 2.0},
                                 np.random.default_rng(0)).any()


def test_balanced_targets_are_even_and_every_first_part_is():
    """Sorted they are equally spaced over the range; the first five of twenty already reach both
    thirds."""
    targets = [edits.balanced_target(i, 20, 2.0, 42.0) for i in range(20)]
    assert np.allclose(sorted(targets), np.arange(3.0, 42.0, 2.0))
    assert min(targets[:5]) < 15 and max(targets[:5]) > 29


def test_a_tumour_is_scaled_to_the_volume_asked_for(phantom_folder):
    """Within 5 percent although the brain's edge cuts some of it off; the edit that did it is given
    back."""
    case = nifti.find_cases(phantom_folder)[0]
    scans, labels, affine = nifti.read_case(case)
    brain = slices.brain_mask(scans)
    away = np.sign(edits.to_mm(np.argwhere(labels > 0).mean(0), affine)[0])
    for target in (5.0, 25.0):
        out, edit = edits.edit_to_volume(labels, affine, brain, "ET", target,
                                         {"shift": [12 * away, 0, 0]}, 0)
        assert edits.volume_ml(out, affine, "ET") == pytest.approx(target, rel=0.05)
        assert np.array_equal(out, edits.edit_labels(labels, affine, brain, edit,
                                                     np.random.default_rng(0)))


def test_brains_for_a_volume_are_those_that_need_a_mild_change():
    """Of volumes that a factor of 0.7 to 1.4 on lengths brings to the target, any may be drawn; if
    there are none, the nearest is taken."""
    volumes = [1.0, 8.0, 10.0, 64.0]
    picks = {edits.pick_for_volume(volumes, 9.0, np.random.default_rng(seed)) for seed in range(20)}
    assert picks == {1, 2}
    assert edits.pick_for_volume(volumes, 500.0, np.random.default_rng(0)) == 3


@pytest.mark.parametrize("word", ["scale=0", "scale=x", "scale=1,2", "scale", "shift=1,2",
                                  "mirror=1", "wave=2", "rotate=nan", "scale=1 scale=2"])
def test_unknown_edits_are_one_sentence(word):
    """What an edit may be is said where it is refused."""
    with pytest.raises(bs.BadInput, match="expected scale=1.2"):
        edits.parse_edit(word.split())


def test_uncovered_tissue_is_that_of_the_other_side(phantom_folder):
    """Where an edit takes a tumour away, the tissue condition shows the mirrored tissue, not
    fluid."""
    case = next(case for case in nifti.find_cases(phantom_folder)
                if (nifti.read_labels(case)[0] > 0).sum() > 3000)
    before = slices.prepare_case(case, 48, 192.0, "tissue")
    after = slices.prepare_case(case, 48, 192.0, "tissue", lambda labels, brain, affine: labels * 0)
    uncovered = before["classes"] >= 4
    fractions = np.bincount(after["classes"][uncovered], minlength=7) / uncovered.sum()
    air, fluid, grey, white, *tumour = fractions
    assert not any(tumour) and air < 0.05 and fluid < 0.35, fractions
    assert grey + white > 0.6 and white > 0.15, fractions
    assert before["hashes"] == after["hashes"] and not after["labels"].any()


def test_phantoms_are_balanced_too(tmp_path):
    """Without --labels the label maps are phantoms', each made once."""
    args = sample.parse_arguments("--balance ET --count 3".split())
    made = list(recipes.edited_cases(args, "A", tmp_path))
    assert [recipe.target[0] for recipe in made] == ["ET"] * 3
    assert len(list(tmp_path.iterdir())) == 3
