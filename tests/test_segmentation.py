"""Regions, losses, augmentation and metrics, by hand and against SciPy and MONAI."""
import itertools
import math

import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import metrics, nifti, phantoms, slices


def blobs(seed, shape=(20, 24, 18), level=0.6):
    """A random mask of smooth blobs."""
    noise = phantoms.smooth_noise(np.random.default_rng(seed), 9, shape, (1, 1, 1))
    return torch.from_numpy(noise > level)


@pytest.mark.a4
def test_regions_are_unions_of_labels():
    """WT = NCR + ED + ET, TC = NCR + ET, ET = ET; labels are 1 NCR, 2 ED, 3 ET."""
    labels = torch.tensor([0, 1, 2, 3])
    assert bs.regions_of(labels).tolist() == [[False, True, True, True], [False, True, False, True],
                                              [False, False, False, True]]


@pytest.mark.a4
def test_labels_survive_the_way_through_regions():
    """Any label map -> regions as probabilities -> the same label map."""
    labels = torch.randint(0, 4, (5, 6, 7))
    assert torch.equal(bs.labels_of(bs.regions_of(labels).float(), "regions").long(), labels)
    onehot = torch.nn.functional.one_hot(labels, 4).movedim(-1, 0).float()
    assert torch.equal(bs.labels_of(onehot, "labels").long(), labels)


@pytest.mark.a4
def test_smaller_regions_overwrite_larger_ones():
    """The BraTS way: ET wins over TC wins over WT, each by its own probability."""
    probability = torch.tensor([[0.9, 0.9, 0.9, 0.2], [0.1, 0.8, 0.8, 0.1], [0.2, 0.3, 0.7, 0.9]])
    assert bs.labels_of(probability, "regions").tolist() == [2, 1, 3, 3]


@pytest.mark.a4
def test_dice_loss_by_hand():
    """Two pixels of four predicted with one half each, one of them true: (2*0.5+1)/(1+1+1) =
    2/3."""
    probability = torch.tensor([0.5, 0.5, 0.0, 0.0]).view(1, 1, 2, 2)
    target = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert abs(bs.dice_loss(probability, target).item() - 1 / 3) < 1e-6
    assert bs.dice_loss(target, target).item() == 0
    assert bs.dice_loss(target * 0, target * 0).item() == 0
    loss = bs.dice_loss(torch.cat([probability, probability * 0]), torch.cat([target, target * 0]))
    why = "sums go over the whole batch: an empty slice changes nothing"
    assert abs(loss.item() - 1 / 3) < 1e-6, why


@pytest.mark.a4("dice_loss")
@pytest.mark.parametrize("predict", ["regions", "labels"])
def test_the_right_answer_has_the_least_loss(predict):
    """Confident right logits cost almost nothing, confident wrong ones a lot."""
    labels = torch.randint(0, 4, (2, 16, 24))
    target = bs.one_hot(labels, 4)
    if predict == "regions":
        target = bs.regions_of(labels).movedim(0, 1).float()
    right = target * 40 - 20
    assert bs.segmentation_loss(right, labels, predict) < 1e-3
    assert bs.segmentation_loss(right, (labels + 1) % 4, predict) > 3


@pytest.mark.a4
def test_dice_by_hand_and_of_empty_masks():
    """3 and 2 voxels sharing 1: 2/5. Nothing to find and nothing found is 1, one of them is 0."""
    a, b = torch.zeros(2, 3, 4, dtype=torch.bool), torch.zeros(2, 3, 4, dtype=torch.bool)
    assert bs.dice(a, b) == 1.0
    a.view(-1)[:3] = True
    assert bs.dice(a, b) == 0.0 and bs.dice(b, a) == 0.0
    b.view(-1)[2:4] = True
    assert bs.dice(a, b) == pytest.approx(0.4)
    assert metrics.sensitivity(a, b) == 0.5 and math.isnan(metrics.sensitivity(a, a & False))


@pytest.mark.a4
def test_surface_by_hand():
    """Of a cube of 4 voxels a side all but the inner 2 x 2 x 2; where it meets the array's end that
    is surface too."""
    mask = torch.zeros(7, 8, 9, dtype=torch.bool)
    mask[1:5, 2:6, 3:7] = True
    inner = mask.clone() & False
    inner[2:4, 3:5, 4:6] = True
    assert torch.equal(metrics.surface(mask), mask & ~inner)
    assert metrics.surface(torch.ones(3, 4, 5, dtype=torch.bool)).sum() == 60 - 6
    assert torch.equal(metrics.surface(mask & False), mask & False)


@pytest.mark.a4
def test_hd95_by_hand():
    """Two voxels three apart along an axis of 2.5 mm lie 7.5 mm apart, whichever comes first."""
    a, b = torch.zeros(8, 9, 10, dtype=torch.bool), torch.zeros(8, 9, 10, dtype=torch.bool)
    assert metrics.hd95(a, b, (1, 1, 1)) == 0.0
    a[2, 3, 4] = True
    assert metrics.hd95(a, b, (1, 1, 1)) == metrics.hd95(b, a, (1, 1, 1)) == 373.13
    assert metrics.HD95_MISSED == pytest.approx(math.sqrt(240 ** 2 + 240 ** 2 + 155 ** 2), abs=0.01)
    b[2, 3, 7] = True
    assert metrics.hd95(a, b, (1, 1, 2.5)) == 7.5 and metrics.hd95(a, a, (1, 1, 2.5)) == 0


@pytest.mark.a4
def test_hd95_is_the_larger_of_the_two_directions():
    """A prediction with a far extra part misses nothing of the truth, yet has a large distance."""
    truth = torch.zeros(40, 6, 6, dtype=torch.bool)
    truth[2:5, 2:4, 2:4] = True
    predicted = truth.clone()
    predicted[30:33, 2:4, 2:4] = True
    distance = metrics.hd95(predicted, truth, (1, 1, 1))
    assert distance == metrics.hd95(truth, predicted, (1, 1, 1)) > 20


@pytest.mark.a4
def test_hd95_agrees_with_scipy():
    """Against distance transforms of the surfaces, for odd shapes and spacings."""
    ndimage = pytest.importorskip("scipy.ndimage")
    for seed in range(4):
        a, b, spacing = blobs(seed), blobs(seed + 10, level=0.3), (1.0, 2.0, 2.4)
        edge_a, edge_b = [m.numpy() & ~ndimage.binary_erosion(m.numpy()) for m in (a, b)]
        assert np.array_equal(metrics.surface(a).numpy(), edge_a)
        to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]
        to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)[edge_b]
        expected = max(np.percentile(to_a, 95), np.percentile(to_b, 95))
        assert metrics.hd95(a, b, spacing) == pytest.approx(expected, rel=1e-6)


@pytest.mark.a4
def test_dice_and_hd95_agree_with_monai():
    """The library most of the field uses gives the same figures."""
    monai = pytest.importorskip("monai.metrics")
    a, b, spacing = blobs(3), blobs(5), [1.0, 1.5, 2.0]
    batches = [mask[None, None].float() for mask in (a, b)]
    assert bs.dice(a, b) == pytest.approx(monai.compute_dice(*batches).item(), abs=1e-6)
    expected = monai.compute_hausdorff_distance(*batches, percentile=95, include_background=True,
                                                spacing=spacing)
    assert metrics.hd95(a, b, spacing) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.a4
def test_components_touch_through_corners():
    """Diagonal neighbours are one component, a gap of one voxel makes two, a snake is one."""
    mask = torch.zeros(6, 6, 12, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    mask[5] = True
    mask[5, 1::2, 1:] = False                               # rows joined at their first voxel
    found = slices.components(mask)
    assert found[0, 0, 0] == found[1, 1, 1] != found[3, 3, 3] and found.max() == 3
    assert len(found[5][mask[5]].unique()) == 1 and (found[~mask] == 0).all()
    assert slices.components(mask & False).max() == 0


@pytest.mark.a4
@pytest.mark.parametrize("fraction", [0.05, 0.12, 0.2])
def test_components_agree_with_a_flood(fraction):
    """Voxel by voxel from each to the next, on noise: pieces that wind through all of it."""
    mask = torch.rand(14, 12, 10) < fraction
    left = {tuple(voxel) for voxel in mask.nonzero().tolist()}
    found, pieces = slices.components(mask), 0
    while left:
        pieces, edge, numbers = pieces + 1, [left.pop()], set()
        while edge:
            x, y, z = edge.pop()
            numbers.add(found[x, y, z].item())
            around = itertools.product((x - 1, x, x + 1), (y - 1, y, y + 1), (z - 1, z, z + 1))
            near = set(around) & left
            left -= near
            edge += near
        assert len(numbers) == 1 and numbers != {0}
    assert pieces == found.max()


@pytest.mark.a4
def test_components_and_dilation_agree_with_scipy():
    """26-connectivity for components, 18-connectivity for dilation, on random blobs."""
    ndimage = pytest.importorskip("scipy.ndimage")
    for seed in range(3):
        mask = blobs(seed, level=1.0)
        expected, count = ndimage.label(mask.numpy(), np.ones((3, 3, 3)))
        found = slices.components(mask).numpy()
        pairs = set(zip(found[mask].tolist(), expected[mask].tolist()))
        assert found.max() == count == len(pairs) > 1
        structure = ndimage.generate_binary_structure(3, 2)
        grown = ndimage.binary_dilation(mask.numpy(), structure, 2)
        assert np.array_equal(metrics.dilate(mask, 2).numpy(), grown)


def cube(*boxes, shape=(40, 20, 20)):
    """Mask of boxes ((from, to) along x; 5 x 5 in the other axes)."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for low, high in boxes:
        mask[low:high, 5:10, 5:10] = True
    return mask


@pytest.mark.a4
def test_lesion_dice_by_hand():
    """Two lesions, one found exactly: (1 + 0) / 2. A false positive is one more 0. Lesions closer
    than the dilations reach are one. At most 50 mm^3 is not counted as a lesion."""
    single, two = cube((2, 6)), cube((2, 6), (30, 34))
    assert metrics.lesion_dice(single, two, (1, 1, 1)) == 0.5
    assert metrics.lesion_dice(two, single, (1, 1, 1)) == 0.5
    assert metrics.lesion_dice(two, two, (1, 1, 1)) == 1.0
    assert metrics.lesion_dice(single & False, single & False, (1, 1, 1)) == 1.0
    # a gap of 3 voxels: dilations by 3 touch
    near = cube((2, 6), (9, 13))
    assert metrics.lesion_dice(cube((2, 6)), near, (1, 1, 1)) == pytest.approx(2 / 3)
    small = cube((2, 4))                                    # 50 voxels
    assert metrics.lesion_dice(small & False, small, (1, 1, 1)) == 1.0
    assert metrics.lesion_dice(small & False, small, (1, 1, 1.1)) == 0.0


def test_score_case_uses_spacing_and_regions():
    """Volumes in mL, distances in mm, each region under its own name."""
    truth = torch.zeros(20, 20, 20, dtype=torch.uint8)
    truth[4:14, 4:14, 4:14], truth[6:10, 6:10, 6:10] = 2, 3
    predicted = truth.clone()
    predicted[predicted == 3] = 1                           # called necrosis instead of enhancing
    got = metrics.score_case(predicted, truth, (1, 2, 2.5))
    assert got["WT"]["dice"] == got["TC"]["dice"] == 1 and got["ET"]["dice"] == 0
    assert got["ET"]["hd95_mm"] == 373.13 and got["WT"]["true_ml"] == 5.0
    assert got["TC"]["true_ml"] == pytest.approx(0.32)
    assert got["ET"]["volume_error_ml"] == pytest.approx(0.32) and got["ET"]["sensitivity"] == 0


def test_tables_leave_out_what_does_not_exist():
    """Sensitivity has no meaning where there is nothing to find: such cases are not in its mean,
    and one-sided empties are counted."""
    empty = torch.zeros(4, 4, 4, dtype=torch.uint8)
    full, rows = empty + 3, []
    for case, truth in (("a", full), ("b", empty)):
        for region, row in metrics.score_case(full, truth, (1, 1, 1)).items():
            rows.append({"case": case, "region": region, **row})
    mean = metrics.summarise(rows)["ET"]
    assert mean["sensitivity"] == 1 and mean["dice"] == 0.5 and mean["missed"] == 1
    assert "1 cases" in metrics.table_of(rows)[-1]
    # a segmenter that finds nothing is right in the case without tumour
    assert mean["dice_of_nothing"] == 0.5 and metrics.table_of(rows)[0].split()[2] == "nothing"
    assert metrics.table_of([*rows, *rows[:3]])[-1].split()[2] == "0.333"


@pytest.mark.parametrize("kind", ["standard", "strong"])
def test_labels_move_with_the_image(kind):
    """A bright square is labelled; after augmentation the labels still lie on what is bright."""
    images, labels = torch.full((8, 4, 48, 64), -1.0), torch.zeros(8, 48, 64, dtype=torch.long)
    images[..., 8:40, 8:56] = -0.4
    images[..., 14:24, 34:50], labels[:, 14:24, 34:50] = 0.6, 3
    moved, moved_labels = bs.augment(images, labels, kind, (0, "a"))
    assert moved.shape == images.shape and set(moved_labels.unique().tolist()) == {0, 3}
    assert not torch.equal(moved_labels, labels)
    for picture, mask in zip(moved, moved_labels):
        inside, brain = picture[:, mask == 3], (picture > -1).all(0) & (mask == 0)
        assert inside.mean() > picture[:, brain].mean() + 0.3
    sums = {int(mask.nonzero().sum()) for mask in moved_labels}
    assert len(sums) > 4, "every slice must move its own way"


def test_augmentation_is_a_pure_function_and_keeps_air():
    """The same key gives the same slices, another key others; air stays exactly -1; none changes
    nothing."""
    images, labels = torch.rand(4, 4, 32, 32) * 2 - 1, torch.randint(0, 4, (4, 32, 32))
    images[..., :12], images[..., 20:] = -1, -1
    state = torch.get_rng_state()
    first, again, other = [bs.augment(images, labels, "strong", key)
                           for key in ((0, 1), (0, 1), (0, 2))]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].min() == -1 and first[0].max() <= 1 and (first[0] == -1).float().mean() > 0.3
    assert torch.equal(bs.augment(images, labels, "none", (0, 1))[0], images)


class Oracle(torch.nn.Module):
    """A network that answers from the brightness of the first modality: dark 0, then 1, 2, 3."""
    predict = "labels"

    def forward(self, images):
        return bs.one_hot(torch.bucketize(images[:, 0], torch.tensor([-0.5, 0.0, 0.5])), 4) * 20.0


def test_predictions_come_back_on_the_grid_of_the_scans(phantom_folder):
    """Labels painted into a modality on the model's grid come back, through the segmenter, on the
    scans' own grid where the label map has them."""
    case = nifti.find_cases(phantom_folder)[0]
    (_, blind, truth), = metrics.prepare_blind([case], 96, 192.0)
    assert not blind["labels"].any() and blind["classes"].max() == 1 and truth.max() == 3
    seen = slices.prepare_case(case, 96, 192.0, "tumour")
    paint = np.array([0, 0, 96, 160, 255], np.uint8)[seen["classes"]]
    blind["images"] = np.repeat(paint[:, None], 4, 1)
    segmenter, shown = metrics.Segmenter(Oracle(), 96, 192.0, torch.device("cpu")), []
    rows = segmenter.evaluate([(case, blind, truth)], lambda *what: shown.append(what))
    assert [row["region"] for row in rows] == list(bs.REGIONS)
    assert {row["case"] for row in rows} == {case.case}
    assert all(row["dice"] > 0.97 and row["hd95_mm"] < 3 for row in rows), rows
    assert shown[0][2].shape == truth.shape and shown[0][2].dtype == np.uint8
    labels = torch.from_numpy(bs.tumour_labels(seen["classes"]))
    assert segmenter.slice_dice(bs.to_images(blind["images"]), labels) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("condition", list(bs.CONDITIONS))
def test_labels_of_classes(condition):
    """Whatever the condition and the type, healthy classes are 0 and tumour classes 1, 2, 3."""
    count = len(bs.CONDITIONS[condition])
    expected = [0] * (count - 3) + [1, 2, 3]
    assert bs.tumour_labels(np.arange(count, dtype=np.uint8), condition).tolist() == expected
    assert bs.tumour_labels(torch.arange(count), condition).tolist() == expected
