"""Labels on request: what a request asks for is measured right and may be left open, and generated
volumes hang together."""
import itertools
import json
import math
import shutil
import signal
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import (files, judging, label_training, metrics, nifti, phantoms, recipes, requests, runs,
                 slices, writing)
import train_ddpm
from nursery import run_script

STEP = 3.0                                      # mm a voxel
X, SPHERICITY, LESIONS = [requests.entries().index(name) for name in ("x", "sphericity", "lesions")]


def ball(radius, centre, shape=(48, 64, 64)):
    """bool (D, H, W): a ball in voxels."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"), -1)
    return (grid - torch.tensor(centre)).norm(dim=-1) < radius


def head(*lesions):
    """Classes of the condition "tumour": a ball of a brain and lesions in it, (radius, centre,
    label) each."""
    classes = ball(21, (24.0, 32.0, 32.0)).long()
    for radius, centre, label in lesions:
        classes[ball(radius, centre)] = label + 1
    return classes


def measured(classes):
    """{name: value} of characteristics."""
    return dict(zip(requests.entries(), requests.characteristics(classes, "tumour", STEP).tolist()))


def request(**entries):
    """A request with these entries, the rest open: request(ET=12)."""
    wanted = torch.full((len(requests.entries()),), torch.nan)
    for name, value in entries.items():
        wanted[requests.entries().index(name)] = value
    return wanted


def as_scores(classes):
    """Classes (D, R, R) -> scores (D, K, R, R) of a network that is sure: 1 or -1."""
    return 2 * bs.one_hot(classes, 5) - 1


def coarse_denoiser(fractions):
    """What sample_blocks needs of a denoiser beside its predictions."""
    x0 = requests.head_pictures(fractions)
    return SimpleNamespace(prior=requests.label_prior(x0), alpha_bar=bs.cosine_alpha_bar(0.5),
                           net=SimpleNamespace(channels=x0.shape[1], around=0))


def generator(coarse, known=None):
    """A LabelGenerator with this coarse network, trained on heads with these characteristics."""
    return requests.LabelGenerator(coarse, None, "tumour", STEP, known)


def test_volumes_are_ml_of_each_label():
    """A ball of ET in a ball of ED, in a voxel of 0.027 mL."""
    got = measured(head((8, (24.0, 32.0, 32.0), 2), (5, (24.0, 32.0, 32.0), 3)))
    assert got["NCR"] == 0
    assert got["ET"] == pytest.approx(4 / 3 * math.pi * 15 ** 3 / 1000, rel=0.08)
    assert got["ED"] + got["ET"] == pytest.approx(4 / 3 * math.pi * 24 ** 3 / 1000, rel=0.08)


def test_place_is_mm_to_the_right_the_front_and_the_top():
    """Columns run from the patient's right, rows from the front, slices from the feet."""
    got = measured(head((4, (28.0, 26.0, 22.0), 3)))
    assert [got[name] for name in "xyz"] == pytest.approx([30, 18, 12], abs=0.3)


@pytest.mark.parametrize("radius", [4, 6, 9, 12])
def test_a_ball_has_sphericity_one(radius):
    """Nearly, at any size; on the grid or between its points."""
    for centre in ((24.0, 32.0, 32.0), (24.3, 31.6, 32.5)):
        assert 0.91 < requests.sphericity(ball(radius, centre)) < 1


def test_other_shapes_have_less_sphericity():
    """A cube 0.806, a rod less, two balls (1/2)^(1/3); an empty mask has none."""
    cube = torch.zeros(48, 64, 64, dtype=torch.bool)
    cube[12:36, 20:44, 20:44] = True
    rod = torch.zeros_like(cube)
    rod[4:44, 30:36, 30:36] = True
    two_balls = ball(8, (24.0, 20.0, 32.0)) | ball(8, (24.0, 44.0, 32.0))
    masks = torch.stack([cube, rod, two_balls, torch.zeros_like(cube)])
    of_cube, of_rod, of_two, of_none = requests.sphericity(masks).tolist()
    assert of_cube == pytest.approx(0.806, abs=0.03) and of_rod < 0.7
    assert of_two == pytest.approx(0.5 ** (1 / 3), abs=0.06) and math.isnan(of_none)


def test_lesions_are_parts_that_are_large_enough():
    """Two parts and a speck of one voxel, 27 mm3."""
    classes = head((4, (24.0, 22.0, 32.0), 2), (3, (24.0, 44.0, 32.0), 3))
    classes[24, 32, 32] = 2
    assert measured(classes)["lesions"] == 2


def test_ventricles_are_measured_where_they_are_a_class():
    """In mL, under the condition that has them; else the entry is NaN. They are no tumour."""
    classes = head((4, (24.0, 32.0, 20.0), 3))
    with_ventricles = torch.where(classes > 1, classes + 1, classes)
    with_ventricles[ball(6, (24.0, 32.0, 34.0))] = 2
    got = requests.characteristics(with_ventricles, "ventricles", STEP)
    without = requests.characteristics(classes, "tumour", STEP)
    assert got[-1] == pytest.approx(4 / 3 * math.pi * 18 ** 3 / 1000, rel=0.08)
    assert math.isnan(without[-1]) and torch.allclose(got[:-1], without[:-1], atol=1e-4)


@pytest.mark.slow
def test_ventricles_of_phantoms_are_found():
    """Their volume follows the exact one from head to head, and most of their voxels are the
    same."""
    exact, found = [], []
    for seed in range(3):
        images, labels, fractions = phantoms.phantom(seed)
        truth = (fractions["ventricles"] > 0.5) & (labels == 0)
        brain = (images > 0).any(0)
        tissue = slices.tissue_clusters(images, brain & (labels == 0))
        got = slices.deep_fluid(tissue, brain, phantoms.PHANTOM_SPACING)
        exact.append(truth.sum())
        found.append(got.sum())
        assert bs.dice(torch.from_numpy(got), torch.from_numpy(truth)) > 0.7
    assert np.corrcoef(exact, found)[0, 1] > 0.9
    assert 0.9 < np.mean(np.array(found) / exact) < 1.3


def test_without_tumour_there_is_no_place():
    """Volumes and lesions are 0; place and shape are not defined."""
    got = measured(head())
    assert [got[name] for name in ("NCR", "ED", "ET", "lesions")] == [0, 0, 0, 0]
    assert all(math.isnan(got[name]) for name in ("x", "y", "z", "sphericity"))


def test_mirrored_labels_have_mirrored_x():
    """What training does to a request when it mirrors a volume."""
    classes = head((5, (20.0, 24.0, 26.0), 1))
    expected = requests.characteristics(classes, "tumour", STEP)
    expected[X] *= -1
    mirrored = requests.characteristics(classes.flip(-1), "tumour", STEP)
    assert torch.allclose(mirrored, expected, atol=1e-3, equal_nan=True)


def test_scaled_requests_keep_open_entries():
    """NaN stays NaN, the rest lies about -1..1."""
    wanted = torch.tensor([0, 120, float("nan"), -45, 30, 0, 0.7, 3, 40])
    got = requests.scaled(wanted)
    assert torch.equal(torch.isnan(got), torch.isnan(wanted))
    assert torch.nan_to_num(got).abs().max() < 1.2


def test_label_volumes_are_the_middle_of_cubes(cache):
    """Of the parts asked for, in the order of cases."""
    cube, part = cache.cubes[0], cache.cases[0]["part"]
    volumes = requests.label_volumes(cache, (part,), 18)
    assert np.array_equal(volumes[0], cube[3:21, -1])
    assert len(volumes) == sum(case["part"] == part for case in cache.cases)
    assert requests.label_volumes(cache, (), 18).shape == (0, 18, 24, 24)


@pytest.mark.parametrize("word", ["et=big", "core=3", "et=5..3", "ed=-4", "et", "et=nan", "et=inf",
                                  "x=-inf"])
def test_words_that_are_no_request_are_named(word):
    """One sentence, with what can be asked for."""
    with pytest.raises(bs.BadInput, match=f"--request {word}: cannot be asked for.*sphericity"):
        requests.parse_request(word)


def test_requests_are_read():
    """Numbers, ranges, any order, any case; no word asks for nothing."""
    assert requests.parse_request("ET=12,ed=5..30,x=-20") == {"ET": (12, 12), "ED": (5, 30),
                                                              "x": (-20, -20)}
    assert requests.parse_request("") == {}


def test_ranges_are_flat_and_their_orders_differ():
    """Every value of a range comes once; ET and ED are not tied to each other; the seed decides the
    order."""
    words = requests.parse_request("et=0..40,ed=0..40,ncr=3")

    def wanted(seed):
        return torch.stack([requests.requested(words, i, 20, seed) for i in range(20)])

    got = wanted(0)
    assert torch.allclose(got[:, 2].sort().values, torch.arange(20) * 2.0 + 1)
    assert (got[:, 0] == 3).all() and torch.isnan(got[:, 3:]).all()
    assert abs(np.corrcoef(got[:, 1], got[:, 2])[0, 1]) < 0.8
    assert not torch.equal(got[:, 2], wanted(1)[:, 2])


def test_blocks_hold_fractions_of_classes():
    """They sum to 1, and to the same volume as the voxels."""
    volumes = torch.stack([head((7, (22.0, 28.0, 40.0), 2), (4, (22.0, 28.0, 40.0), 3)), head()])
    fractions = requests.block_fractions(volumes.to(torch.uint8), 5)
    assert fractions.shape == (2, 12, 5, 16, 16)
    assert torch.allclose(fractions.sum(2), torch.ones(2, 12, 16, 16))
    voxels = fractions[0, :, 4].sum() * requests.BLOCK ** 3
    assert voxels == pytest.approx((volumes[0] == 4).sum().item())
    block = volumes[0, 20:24, 28:32, 40:44]
    assert fractions[0, 5, 4, 7, 10] == (block == 4).float().mean() > 0


def test_a_slab_is_conditioned_on_its_blocks():
    """The same as the blocks of the whole head interpolated at once, at every slab, the lowest and
    highest among them."""
    fractions = requests.block_fractions(head((9, (22.0, 28.0, 40.0), 2))[None], 5)
    whole = torch.nn.functional.interpolate(fractions.movedim(2, 1), scale_factor=requests.BLOCK,
                                            mode="trilinear")[0]
    got = requests.slab_fractions(fractions.expand(12, -1, -1, -1, -1), torch.arange(12))
    slices_of_head = got.unflatten(1, (requests.BLOCK, 5)).flatten(0, 1)
    assert torch.allclose(slices_of_head, whole.movedim(1, 0), atol=1e-5)
    mean, std = bs.expected({"shares": torch.tensor(0.1)}, got, torch.zeros(12, 2))
    assert torch.allclose(mean, 2 * got - 1)
    assert std.min() >= 0.1 and torch.isclose(std.max(), torch.tensor(1.0))


def test_the_prior_of_heads_is_their_mean():
    """Left and right alike; no spread under the floor; the same whatever is asked for."""
    fractions = requests.block_fractions(torch.stack([head((4, (24.0, 26.0, 24.0), 3)), head()]), 5)
    prior = requests.label_prior(requests.head_pictures(fractions))
    mean, std = prior["atlas"][:, :, 0].unflatten(1, (12, 5))
    roots = fractions.sqrt().mean(0)                                        # (D', K, r, r)
    assert torch.allclose((mean + 1) / 2, (roots + roots.flip(-1)) / 2, atol=1e-5)
    assert torch.allclose(mean, mean.flip(-1), atol=1e-6) and std.min() == 0.1
    scalars = requests.head_scalars(request().expand(3, -1))
    got = bs.expected(prior, torch.zeros(3, 0, 16, 16), scalars)
    for part, atlas in zip(got, prior["atlas"]):
        assert torch.allclose(part, atlas.movedim(1, 0).expand(3, -1, -1, -1), atol=1e-5)


def test_blocks_measure_what_voxels_do():
    """Volumes and place, sphericity as far as its order goes; entries that blocks do not show are
    NaN; so is the place without a tumour."""
    sausage = [(4.0, (22.0, 20.0 + 6 * i, 32.0), 2) for i in range(4)]
    heads = torch.stack([head((7, (22.0, 28.0, 40.0), 2), (4, (22.0, 28.0, 40.0), 3)), head(),
                         head(*sausage)])
    got = requests.block_characteristics(requests.block_fractions(heads, 5), "tumour", STEP)
    exact = torch.stack([requests.characteristics(classes, "tumour", STEP) for classes in heads])
    assert torch.allclose(got[0, :6], exact[0, :6], atol=1.0) and torch.isnan(got[:, 7:]).all()
    assert torch.allclose(got[1, :3], exact[1, :3], atol=1e-3) and torch.isnan(got[1, 3:7]).all()
    got, exact = got[[0, 2], SPHERICITY], exact[[0, 2], SPHERICITY]
    assert got[0] > got[1] + 0.02 and exact[0] > exact[1] + 0.1 and (got - exact).abs().max() < 0.3


def test_the_candidate_nearest_to_the_request_is_kept():
    """A network that predicts the prior: with more candidates the head is nearer to the request;
    open entries do not matter; the key decides."""
    volumes = torch.stack([head((3 + i, (24.0, 32.0, 20.0 + 2 * i), 3)) for i in range(6)])
    x0 = requests.head_pictures(requests.block_fractions(volumes, 5))
    prior, alpha_bar = requests.label_prior(x0), bs.cosine_alpha_bar(0.5)

    class PriorAlone:
        def __init__(self):
            self.prior, self.alpha_bar = prior, alpha_bar
            self.net = SimpleNamespace(channels=x0.shape[1], around=0)

        def __call__(self, x_t, t, onehot, scalars):
            signal, sigma = bs.signal_sigma(alpha_bar, t)
            return bs.precondition(torch.zeros_like(x_t), x_t, signal, sigma,
                                   *bs.expected(prior, onehot, scalars))

    def blocks(number, candidates):
        return requests.sample_blocks(generator(PriorAlone()), request(ET=30), (0, number),
                                      {**bs.SAMPLING, "steps": 3}, candidates)

    errors = {1: [], 8: []}
    for candidates, number in itertools.product(errors, range(6)):
        fractions = blocks(number, candidates)
        assert torch.allclose(fractions.sum(1), torch.ones(12, 16, 16), atol=1e-4)
        assert fractions.min() >= 0
        et = requests.block_characteristics(fractions[None], "tumour", STEP)[0, 2]
        errors[candidates].append(float((et - 30).abs()))
    assert np.mean(errors[8]) < np.mean(errors[1])
    assert torch.equal(blocks(5, 8), fractions)


def test_a_head_without_tumour_has_no_place(monkeypatch):
    """Asked for a place, of two candidates the one that has a tumour, however far off, is nearer
    than the one that has none."""
    heads = torch.stack([head(), head((6, (24.0, 32.0, 24.0), 3))])
    fractions = requests.block_fractions(heads, 5)
    monkeypatch.setattr(bs, "sample", lambda *args: requests.head_pictures(fractions))
    model = generator(coarse_denoiser(fractions))
    got = requests.sample_blocks(model, request(x=-40), (0,), candidates=2)
    x = requests.block_characteristics(got[None], "tumour", STEP)[0, X]
    assert torch.allclose(x, torch.tensor(24.0), atol=2)


def test_a_little_of_a_label_is_none(monkeypatch):
    """Blocks keep a label that they, or a neighbour, plainly have; a label of which 0 mL are
    asked for goes altogether."""
    full = requests.block_fractions(head((6, (24.0, 32.0, 24.0), 3))[None], 5)
    faint = full.clone()
    faint[0, 6, [1, 4], 4, 11] = torch.tensor([0.85, 0.15])                 # ET far from all other
    faint[0, 6, [1, 3], 10, 4] = torch.tensor([0.85, 0.15])                 # ED, the same
    monkeypatch.setattr(bs, "sample", lambda *args: requests.head_pictures(faint))
    model = generator(coarse_denoiser(full))
    got = requests.sample_blocks(model, request(), (0,), candidates=1)
    assert got[6, 4, 4, 11] == 0 and got[:, 3].sum() == 0
    assert torch.allclose(got.sum(1), torch.ones(12, 16, 16))
    assert got[:, 4].sum() == pytest.approx(float(full[0, :, 4].sum()), rel=0.15)
    got = requests.sample_blocks(model, request(ET=0), (0,), candidates=1)
    assert got[:, 4].sum() == 0


def test_the_volume_asked_for_is_settled(monkeypatch):
    """Where blocks and request disagree about how much, the request counts; 0 mL are none at
    all."""
    truth = head((8, (24.0, 32.0, 32.0), 2), (4, (24.0, 32.0, 32.0), 3))    # 7 of 57 mL are ET
    scores = bs.one_hot(truth, 5)
    far = torch.stack(torch.where(truth > -1)) - torch.tensor([[24], [32], [32]])
    et = (1 - far.float().norm(dim=0) / 8).clamp(min=0).view(truth.shape)   # likelier inside
    scores[:, 4] = et * (truth > 1)
    scores[:, 3] = (1 - et) * (truth > 1)
    fractions = requests.block_fractions(truth[None], 5)[0]
    slabs = (2 * scores - 1).unflatten(0, (-1, requests.BLOCK)).flatten(1, 2)
    monkeypatch.setattr(requests, "sample_blocks", lambda *args: fractions)
    monkeypatch.setattr(bs, "sample_guided", lambda *args: slabs)
    model = generator(None, request(NCR=0, ED=50, ET=7)[None])
    volumes = {}
    for ml in (0.0, 3.0, 15.0):
        got = measured(requests.sample_labels(model, request(ED=57.0 - ml, ET=ml), (0,)))
        volumes[ml] = got["ET"]
        assert got["ET"] + got["ED"] == pytest.approx(57, abs=1)
    assert list(volumes.values()) == [0, pytest.approx(3, rel=0.2),
                                      pytest.approx(15, rel=0.1)], volumes


def test_entries_asked_for_count_more_than_filled_ones():
    """Open entries do not count, a wanted entry that is not there counts 4, and weights scale what
    entries count."""
    wanted = request(ED=50, ET=20, x=10)
    heads = torch.stack([request(NCR=0, ED=50, ET=10, x=10), request(NCR=90, ED=30, ET=20, x=10),
                         request(NCR=5, ED=50, ET=20)])
    plain = requests.distance(heads, wanted)
    weight = torch.full((len(requests.entries()),), 0.1)
    weight[2] = 1.0
    by_et = requests.distance(heads, wanted, weight)
    assert plain[0] < plain[1] + 0.05 and plain[2] == 4
    assert by_et[0] == plain[0] and torch.allclose(by_et[1:], plain[1:] / 10)


def test_open_volumes_are_those_of_training_heads_like_the_request():
    """All volumes together are those of one head; entries asked for stay, and so do open entries
    that are no volumes."""
    known = request().repeat(40, 1)
    known[:, :4] = torch.arange(40.0)[:, None] * torch.tensor([1.0, 3, 2, 1])
    filled = torch.stack([requests.fill_volumes(request(), known, (i,)) for i in range(60)])
    assert torch.equal(filled[:, 1], 3 * filled[:, 0])
    assert torch.equal(filled[:, 2], 2 * filled[:, 0])
    assert torch.isnan(filled[:, 3:]).all() and len(set(filled[:, 0].tolist())) > 20
    again = requests.fill_volumes(request(), known, (59,))
    assert torch.equal(again[:3], filled[59, :3])
    filled = torch.stack([requests.fill_volumes(request(ET=40), known, (i,)) for i in range(20)])
    assert (filled[:, 2] == 40).all() and torch.isnan(filled[:, 3:]).all()
    necrosis = set(filled[:, 0].tolist())
    assert necrosis <= {19, 20, 21} and len(necrosis) == 2


def test_a_label_asked_to_be_nothing_still_has_a_tumour():
    """et=0 is filled from heads with a tumour though others are as near; lesions=0 and a request
    that asks for nothing are not."""
    known = torch.stack([request(NCR=5, ED=30, ET=1, lesions=1)] * 4
                        + [request(NCR=0, ED=0, ET=0, lesions=0)] * 16)
    for i in range(5):
        assert requests.fill_volumes(request(ET=0), known, (i,))[:3].tolist() == [5, 30, 0]
        assert requests.fill_volumes(request(lesions=0), known, (i,))[:3].tolist() == [0, 0, 0]


def test_the_networks_get_the_request_filled_and_candidates_are_chosen_by_it(monkeypatch):
    """Open volumes reach both networks as those of a training head, and count less than entries
    that were asked for."""
    seen, sizes = [], ((6.7, 5.1), (5.95, 4.1))         # 34 mL of ET and 15 of ED, or 24 and 8
    heads = torch.stack([head((et, (24.0, 32.0, 24.0), 3), (ed, (24.0, 32.0, 44.0), 2))
                         for et, ed in sizes])
    fractions = requests.block_fractions(heads, 5)

    def sampled(denoiser, onehot, scalars, *settings):
        seen.append((onehot, scalars))
        return 2 * onehot - 1 if onehot.shape[1] else requests.head_pictures(fractions)

    monkeypatch.setattr(bs, "sample_guided", sampled)
    model = generator(coarse_denoiser(fractions), request(NCR=0, ED=15, ET=90)[None])
    got = requests.sample_labels(model, request(ET=24), (0,), candidates=2)
    (_, of_coarse), (of_fine, _) = seen[:2]
    filled = requests.scaled(request(NCR=0, ED=15, ET=24))
    assert torch.allclose(of_coarse[0][0, 2:].nan_to_num(), filled.nan_to_num())
    et = of_fine.unflatten(1, (requests.BLOCK, 5))[:, :, 4].sum() * STEP ** 3 / 1000
    assert et < 29 and measured(got)["ET"] == pytest.approx(24, rel=0.1)


def test_what_goes_leaves_air_where_it_was():
    """A block, or a voxel, that held nothing but a label which is not to come is brain."""
    fractions = torch.rand(3, 5, 4, 4) ** 4
    fractions[0, :, 0, 0] = torch.tensor([0.0, 0, 0, 1, 0])
    fractions[1, :, 0, 0] = torch.tensor([0.25, 0, 0, 0.75, 0])
    fractions = fractions / fractions.sum(1, keepdim=True)
    air = fractions[:, 0].clone()
    fractions[:, 3] = 0
    got = requests.refill(fractions)
    assert got[:, 3].sum() == 0 and torch.equal(got[:, 0], air)
    assert torch.allclose(got.sum(1), torch.ones(3, 4, 4))
    assert got[:2, 1, 0, 0].tolist() == [1, 0.75]
    truth = head((8, (24.0, 32.0, 32.0), 2))
    classes = requests.settle(as_scores(truth), torch.zeros(3))
    assert torch.equal(classes, (truth > 0).long())


def test_drafts_are_sampled_until_one_is_as_asked(monkeypatch):
    """With keys of their own, four at most, of which the nearest is kept; one, where nothing is
    asked."""
    lesions = [(4, (24.0, 32.0, 20.0 + 12 * i), 2) for i in range(3)]
    keys = []

    def draft(model, wanted, key, *settings):
        keys.append(key)
        return head(*lesions[:min(len(keys), 3)])

    monkeypatch.setattr(requests, "sample_draft", draft)
    model = generator(None, request()[None])
    assert measured(requests.sample_labels(model, request(), (5,)))["lesions"] == 1
    assert keys == [(5,)]
    for count, drafts in ((1, 1), (2, 2), (9, 4)):
        keys.clear()
        got = measured(requests.sample_labels(model, request(lesions=count), (5,)))
        assert got["lesions"] == min(count, 3)
        assert keys == [(5,), (5, 1), (5, 2), (5, 3)][:drafts]


def test_the_fine_network_gets_the_entries_that_blocks_do_not_show():
    """The place of a slab, then sphericity and lesions as scaled, open where they are open."""
    wanted = torch.stack([request(sphericity=0.75), request(lesions=3)])
    got = requests.slab_scalars(torch.tensor([0, 11]), 12, wanted)
    assert torch.allclose(got.nan_to_num(nan=9.0), torch.tensor(
        [[-11 / 12, 0, 0.5, 9], [11 / 12, 0, 9, 1]]))


def test_scores_settle_as_a_label_map():
    """Specks go; a class gets the voxels it should have, at places where it is nearly the largest,
    and nowhere where it is not; a label with 0 voxels does not come."""
    scores = as_scores(head((8, (24.0, 32.0, 32.0), 2)))
    scores[10, :, 40, 20] = torch.tensor([-1.0, -0.4, -1, -1, 0.4])         # a likely speck of ET
    core = ball(5, (24.0, 32.0, 32.0))
    scores[:, 4] = torch.where(core, 0.9, scores[:, 4])                     # nearly as likely as ED
    classes = requests.settle(scores, torch.tensor([0.0, 1700, 400]))
    assert classes[10, 40, 20] == 1 and 395 < (classes == 4).sum() < 405
    assert 1690 < (classes == 3).sum() < 1705
    assert not ((classes == 4) & ~metrics.dilate(core, 1)).any()
    assert (requests.settle(scores, torch.tensor([500.0, 2100, 0])) == 4).sum() == 0
    assert (classes[0] == 0).all() and (classes == 2).sum() == 0


def test_a_label_with_no_lead_anywhere_does_not_come():
    """However many voxels are wanted: the lead of the tumour is at least a tenth."""
    truth = head()
    assert torch.equal(requests.settle(as_scores(truth), torch.tensor([0.0, 500, 100])), truth)


def test_ventricles_settle_beside_the_tumour():
    """They get the voxels they should have, and none of the tumour's."""
    truth = torch.where(head((6, (24.0, 32.0, 24.0), 3)) > 1, 5, head())
    truth[ball(5, (24.0, 32.0, 36.0))] = 2
    scores = 2 * bs.one_hot(truth, 6) - 1
    tumour = int((truth == 5).sum())
    for wanted in (400, 600):
        classes = requests.settle(scores, torch.tensor([wanted, 0.0, 0.0, tumour]))
        assert abs(int((classes == 2).sum()) - wanted) < 5
        assert abs(int((classes == 5).sum()) - tumour) < 5


def test_a_voxel_that_stands_alone_is_brain():
    """However sure its score is; two that touch, if only by a corner, stay."""
    truth = head((8, (24.0, 32.0, 32.0), 2))
    scores = as_scores(truth)
    for z, y, x in ((10, 40, 20), (14, 40, 20), (15, 41, 21)):
        scores[z, :, y, x] = torch.tensor([-1.0, -1, -1, -1, 1])
    every = (truth == 3).sum() + 100.0
    classes = requests.settle(scores, torch.tensor([0.0, every, 2]))
    assert (classes == 4).nonzero().tolist() == [[14, 40, 20], [15, 41, 21]]


def test_what_training_leaves_open():
    """Half of all requests are a volume or two alone; in the others anything from none to all is
    open."""
    is_open = requests.open_entries(4000, 0, 1)
    volumes = torch.tensor([name in (*bs.LABELS, "ventricles") for name in requests.entries()])
    chance = torch.rand(4000, 2 + len(requests.entries()), generator=bs.generator(0, "open", 1))
    few = chance[:, 0] < 0.5
    assert is_open[few][:, ~volumes].all()
    assert 0.45 < is_open[few][:, volumes].float().mean() < 0.55
    given = (~is_open[~few]).sum(1)
    assert set(given.tolist()) == set(range(len(requests.entries()) + 1))


def small_net():
    """A network of heads whose layers that start at zero have learned something."""
    torch.manual_seed(0)
    net = bs.UNet(channels=15, classes=0, width=16, mults=(1, 2), patch=1,
                  scalars=2 + len(requests.entries()))
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def test_open_entries_are_a_state_of_their_own():
    """Left open is not 0, for each of them, and open entries give numbers."""
    net, x, t = small_net(), torch.randn(1, 15, 16, 16), torch.full((1,), 500)
    wanted = torch.zeros(1, len(requests.entries()))
    with torch.no_grad():
        given = net(x, t, x[:, :0], requests.head_scalars(wanted))
        for i, name in enumerate(requests.entries()):
            with_open = wanted.clone()
            with_open[0, i] = torch.nan
            got = net(x, t, x[:, :0], requests.head_scalars(with_open))
            assert (given - got).abs().max() > 1e-4 and not torch.isnan(got).any(), name


def test_guidance_leaves_the_request_open():
    """The null condition drops every scalar but the slice's place."""
    seen = []

    def denoiser(x_t, t, onehot, scalars):
        seen.append(scalars)
        return x_t

    scalars = requests.head_scalars(torch.ones(2, len(requests.entries())))
    bs.guided_v(denoiser, torch.randn(2, 5, 8, 8), torch.full((2,), 500), torch.zeros(2, 0, 8, 8),
                scalars, 2.0)
    assert torch.equal(seen[0], scalars) and torch.equal(seen[1][:, :2], scalars[:, :2])
    assert torch.isnan(seen[1][:, 2:]).all()


def test_moved_volumes_are_relatives():
    """Half of them mirrored, volumes within what stretching allows, classes as before; the key
    decides."""
    classes = head((7, (22.0, 28.0, 40.0), 2), (4, (22.0, 28.0, 40.0), 3))
    volumes = torch.stack([classes] * 24).to(torch.uint8)
    moved = requests.move_volumes(volumes, (0, "moves"))
    got = torch.stack([requests.characteristics(volume.long(), "tumour", STEP)
                       for volume in moved])
    before = requests.characteristics(classes, "tumour", STEP)
    assert 4 <= (got[:, X] < 0).sum() <= 20                     # to the left
    assert (got[:, X].abs() - before[X].abs()).abs().max() < 18
    assert (torch.log(got[:, 1:3] / before[1:3]).abs() < 0.6).all()
    assert got[:, 2].std() > 0.05 * before[2]
    assert set(moved.unique().tolist()) == {0, 1, 3, 4}
    assert torch.equal(moved, requests.move_volumes(volumes, (0, "moves")))
    assert not torch.equal(moved, requests.move_volumes(volumes, (1, "moves")))


def test_the_nearest_tumour_is_found_wherever_it_lies():
    """Moved, mirrored; another shape is not the same; a head without a tumour has no nearest."""
    lesions = (5, (22.0, 24.0, 40.0), 3), (4, (26.0, 30.0, 44.0), 2)
    others = torch.stack([head((9, (24.0, 32.0, 32.0), 2)), head(*lesions)])
    moved = head(*[(r, (z + 3, y + 5, x - 7), k) for r, (z, y, x), k in lesions])
    volumes = torch.stack([moved, others[1].flip(-1), head((6, (24.0, 32.0, 32.0), 3)), head()])
    dice = requests.nearest_tumour(volumes, others, "tumour")
    assert dice[:2] == pytest.approx([1, 1])
    assert 0.3 < dice[2] < 0.9 and math.isnan(dice[3])
    assert torch.isnan(requests.nearest_tumour(others, others[:0], "tumour")).all()


def test_what_does_not_hang_together_is_counted():
    """Pieces, slices that do not fit, tumour in the air, ET alone."""
    whole = judging.label_figures(head((8, (24.0, 32.0, 32.0), 2), (4, (24.0, 32.0, 32.0), 3)),
                                  "tumour")
    assert whole["pieces"] == 1 and whole["outside"] == whole["apart"] == 0
    assert whole["slice_dice"] > 0.75
    classes = head((8, (24.0, 32.0, 32.0), 2), (2, (24.0, 18.0, 32.0), 3))
    classes[4, 4, 4] = 4
    got = judging.label_figures(classes, "tumour")
    assert got["pieces"] == 3 and got["apart"] == 1
    assert got["outside"] == pytest.approx(1 / (classes > 1).sum().item())
    torn = classes.clone()
    torn[::2] = torn[::2].roll(12, 1)
    assert judging.label_figures(torn, "tumour")["slice_dice"] < 0.6
    assert all(math.isnan(value) for value in judging.label_figures(head(), "tumour").values())


def test_shapes_like_the_real_are_nearer():
    """Frechet distance of characteristics: the same set 0, larger tumours more."""
    g = torch.Generator().manual_seed(0)

    def heads(size):
        return torch.stack([head((size + float(torch.rand(1, generator=g)),
                                  (22.0, 28.0 + i % 5, 30.0 + i), 2),
                                 (3, (22.0, 28.0 + i % 5, 30.0 + i), 3)) for i in range(4)])

    real, alike, larger = heads(5), heads(5), heads(9)
    distance = [judging.judge_labels(volumes, real, "tumour", STEP)["shape_distance"]
                for volumes in (real, alike, larger)]
    assert abs(distance[0]) < 1e-5 < distance[1] < distance[2]


def write_label_map(path, labels, axes="RAS", mm=(3.0, 3.0, 3.0), origin=(70.0, -30.0, 5.0)):
    """A label map, array (X, Y, Z) in RAS, as NIfTI stored in these axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*mm, 1.0])
    affine[:3, 3] = origin
    image = nib.Nifti1Image(labels, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine),
                                           nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), path)
    return path


def brats_map():
    """Labels of 48 x 48 x 31 voxels of 5 mm, the frame of BraTS: a tumour right, front and high of
    the middle of the brain, 6 mL of ED around 1 mL of ET."""
    labels = np.zeros((48, 48, 31), np.uint8)
    labels[27:31, 26:30, 17:20] = 2
    labels[28:30, 27:29, 17:19] = 4
    return labels


def test_label_maps_get_an_outline(tmp_path):
    """Whatever the axes, origin and grid of a file: the tumour lies at its place in the frame, in
    one of the outlines, with its volume; the same labels have the same hash."""
    outlines = torch.stack([head(), head()]).to(torch.uint8)
    for axes in ("RAS", "LPS"):
        write_label_map(tmp_path / f"maps/{axes}/{axes}-seg.nii.gz", brats_map(), axes, (5, 5, 5))
    other = np.zeros((40, 50, 60), np.int16)            # of another frame: its middle counts
    other[8:12, 23:27, 28:32] = 1
    write_label_map(tmp_path / "maps/other.nii", other)
    (tmp_path / "maps/.other.nii").write_text("of the file system, not looked at")
    (tmp_path / "maps/notes.txt").write_text("not looked at")
    volumes, names, hashes, lost = recipes.read_label_maps(tmp_path / "maps", outlines, STEP)
    assert names == ["LPS-seg", "RAS-seg", "other"] and lost < 0.05
    assert len(set(hashes)) == 2 and hashes[0] == hashes[1]
    assert torch.equal(volumes[0], volumes[1]) and torch.equal(volumes > 0, outlines[[0] * 3] > 0)
    brats, _, other = [measured(volume.long()) for volume in volumes]
    assert [brats[name] for name in "xyz"] == pytest.approx([24.5, 28, 20.5], abs=3)
    assert brats["ET"] == pytest.approx(8 * 0.125, rel=0.3)
    assert brats["ED"] == pytest.approx(40 * 0.125, rel=0.3)
    assert [other[name] for name in "xyz"] == pytest.approx([-30, 0, 0], abs=1.5)
    assert other["NCR"] == pytest.approx(64 * 0.027, rel=0.05)


def test_tumour_outside_the_outline_is_cut_off(tmp_path):
    """And how much of it is said."""
    labels = np.zeros((64, 64, 48), np.uint8)
    labels[2:13, 30:34, 22:26] = 3                      # the brain begins at 12
    write_label_map(tmp_path / "edge.nii.gz", labels)
    outlines = torch.where(ball(20.5, (23.5, 31.5, 31.5)), 1, 0)[None]
    volumes, *_, lost = recipes.read_label_maps(tmp_path, outlines, STEP)
    assert lost == pytest.approx(1 - int((volumes > 1).sum()) / 176) and 0.8 < lost < 1


@pytest.mark.parametrize("change, words", [
    ("damaged", "cannot be read"), ("scan", "labels 0 to 900"),
    ("cavity", "cavity"), ("none", "holds no label map")])
def test_label_maps_that_are_none_are_refused(tmp_path, change, words):
    """By name: a file cut short, a scan, a cavity beside ET; and a folder without maps."""
    path = tmp_path / "one-seg.nii.gz"
    if change != "none":
        labels = brats_map().astype(np.int16)
        labels[0, 0, 0] = {"scan": 900, "cavity": 3}.get(change, 0)
        write_label_map(path, labels)
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:-20])
    name = tmp_path if change == "none" else path
    with pytest.raises(bs.BadInput, match=f"^{name}: .*{words}"):
        recipes.read_label_maps(tmp_path, head()[None], STEP)


@pytest.mark.parametrize("resolution, fov", [(64, 192.0), (32, 192.0), (96, 192.0), (64, 240.0)])
def test_labels_are_brought_to_the_grid_of_images(resolution, fov):
    """Volumes stay; coarser, finer, wider."""
    classes = head((9, (24.0, 28.0, 36.0), 2), (6, (24.0, 28.0, 36.0), 3))
    got = requests.prepare_labels(classes, "tumour", STEP, resolution, fov, "tumour")
    ml = abs(np.linalg.det(got["grid"].affine[:3, :3])) / 1000
    for label in (2, 3):
        assert (got["classes"] == label + 1).sum() * ml == pytest.approx(
            (classes == label + 1).sum().item() * 0.027, rel=0.15)
    assert got["classes"].shape == (resolution,) * 3


def test_tissue_is_not_made_from_tumour_labels():
    """An image generator that wants tissue cannot have it from labels without; the other way round
    works."""
    classes = head((5, (24.0, 28.0, 36.0), 3))
    with pytest.raises(bs.BadInput, match="--condition tissue"):
        requests.prepare_labels(classes, "tumour", STEP, 64, 192.0, "tissue")
    tissue = torch.where(classes > 1, classes + 2, classes * 3)
    got = requests.prepare_labels(tissue, "tissue", STEP, 64, 192.0, "tumour")["classes"]
    assert np.array_equal(got[8:56], classes)


TINY = ("--phantoms", 6, "--resolution", 32, "--width", 16, "--steps", 10, "--sample-every", 2,
        "--relatives", 12)


@pytest.fixture(scope="module")
def work(tmp_path_factory, lay_phantoms):
    """A folder with a run of images and one of labels, both hardly trained, and a set made of them
    on request."""
    folder = lay_phantoms(tmp_path_factory.mktemp("request"), 7)
    for words in (["train_ddpm.py", *TINY], ["train_ddpm.py", "--generate", "labels", *TINY,
                                             "--batch", 4],
                  ["sample.py", "--request", "et=5..30,x=20", "--count", 2, "--steps", 2]):
        status, said = run_script(folder, *words)
        assert status == 0, said
    return folder, said


def test_training_labels_makes_both_networks(work):
    """Pictures, figures, checkpoints; the same command again goes on where it was, which is at the
    end."""
    folder, _ = work
    for part in ("coarse", "fine"):
        for name in ("checkpoint.pt", "samples.png", "sample_000002.png", "curves.png", "log.csv",
                     "closing.json"):
            assert (folder / "runs/labels" / part / name).stat().st_size > 0, name
    figures = json.loads((folder / "runs/labels/fine/closing.json").read_text())
    assert {"ET_error", "x_error", "real_pieces", "made_pieces", "made_outside", "made_apart",
            "shape_distance", "nearest_training_tumour_dice", "copies", "prior_x_error",
            "prior_sphericity_error", "prior_pieces", "prior_slice_dice", "prior_outside",
            "prior_apart", "prior_shape_distance", "real_shape_distance"} <= set(figures)
    assert "ventricles_error" not in figures
    figures = json.loads((folder / "runs/labels/coarse/closing.json").read_text())
    assert {"ET_error", "prior_ET_error"} <= set(figures) and "x_error" not in figures
    shutil.copytree(folder / "runs/labels", folder / "runs/again")
    status, said = run_script(folder, "train_ddpm.py", "--generate", "labels", *TINY, "--batch", 4,
                              "--out", "runs/again")
    assert status == 0 and said.count("resumed: ") == 2, said
    lines = said[said.index("volumes are off by NCR "):].splitlines()
    assert lines[1].split() == ["figure", "samples", "prior", "alone", "real"]
    assert [line.split("  ")[0] for line in lines[2:5]] == [f"{name} error, mm" for name in "xyz"]
    assert not [line for line in lines[2:] if line.startswith(bs.LABELS)]
    for part in ("coarse", "fine"):             # sidecars name generators by their hash
        assert len({files.file_hash(folder / "runs" / run / part / "checkpoint.pt")
                    for run in ("labels", "again")}) == 1


def test_labels_of_the_prior_alone_come_from_no_network(work):
    """What both parts draw untrained is what networks fresh from their class draw; after training
    they draw something else."""
    args = train_ddpm.parse_arguments(["--generate", "labels", *map(str, TINY), "--batch", "4",
                                       "--out", str(work[0] / "runs/labels")])
    cache = slices.build_cache(nifti.find_cases(work[0] / "runs/phantoms/A")[:6],
                               work[0] / "runs/cache", 32, 192.0, "tumour")
    data = label_training.LabelData(args, cache)
    model = requests.load_label_generator(work[0] / "runs/labels", torch.device("cpu"))
    for denoiser in (model.coarse, model.fine):
        torch.nn.init.normal_(denoiser.net.conv_out.weight, std=0.1)
    fresh = [bs.Denoiser(bs.UNet(**state["network"]).eval(), denoiser.prior, denoiser.alpha_bar,
                         denoiser.device) for denoiser, state in (
        (model.coarse, model.state),
        (model.fine, runs.load_checkpoint(work[0] / "runs/labels/fine", "labels")))]
    for function, last in ((requests.sample_blocks, None), (requests.sample_labels, 1)):
        trained, alone, without = [
            data.draw(function, args, 1, *networks, untrained=word)
            for networks, word in (((model.coarse, last and model.fine), False),
                                   ((model.coarse, last and model.fine), True),
                                   ((fresh[0], last and fresh[1]), False))]
        assert torch.equal(alone, without) and not torch.equal(trained, alone)


def test_the_table_of_labels_shows_what_networks_decide():
    """Volumes are one sentence; every number stands in its column, a dash where there is none."""
    names = [*(f"{name}_error" for name in (*bs.LABELS, "x", "y", "z", "sphericity", "lesions")),
             "pieces", "slice_dice", "outside", "apart", "shape_distance"]
    figures = {f"prior_{name}": 20.0 + at for at, name in enumerate(names)}
    for at, name in enumerate(names):
        hangs = name in label_training.HANGS_TOGETHER
        figures[f"made_{name}" if hangs else name] = 1.0 + at
        if hangs or name == "shape_distance":
            figures[f"real_{name}"] = 40.0 + at
    figures |= {"nearest_training_tumour_dice": 0.5, "the_same_of_held_out_cases": 0.25,
                "copies": 3}
    del figures["z_error"], figures["prior_z_error"]            # no head has a tumour, say
    first, title, *rows, last = label_training.label_lines(figures)
    assert first.startswith("volumes are off by NCR 1.00 mL, ED 2.00 mL, ET 3.00 mL: ")
    assert title.split()[1:] == ["samples", "prior", "alone", "real"] and last.endswith(": 3")
    got = [[word if word == "-" else float(word) for word in row.split()[-3:]] for row in rows]
    assert got == [[4, 23, 0], [5, 24, 0], ["-", "-", 0], [7, 26, 0], [8, 27, 0],
                   *([1.0 + at, 20.0 + at, 40.0 + at] for at in range(8, 13)), [0.5, "-", 0.25]]


@pytest.mark.slow
def test_labels_resume_bit_for_bit(work, tmp_path, monkeypatch):
    """A power cut while the coarse network learns, another while the fine one does: then the
    weights of the run that went through."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/phantoms").symlink_to(work[0] / "runs/phantoms")
    command, calls = ["--generate", "labels", *map(str, TINY), "--batch", "4"], itertools.count(1)
    command += ["--sample-every", "0"]
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]

    class PowerCut(Exception):
        pass

    def cut(function, when):
        def instead(*args):
            if when(args):
                raise PowerCut
            return function(*args)
        return instead

    try:
        for module, name, when in ((requests, "open_entries", lambda args: next(calls) == 3),
                                   (bs, "batch_rows", lambda args: args[4] == 1)):
            with monkeypatch.context() as patch, pytest.raises(PowerCut):
                patch.setattr(module, name, cut(getattr(module, name), when))
                train_ddpm.main(command)
        train_ddpm.main(command)
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
    for part in ("coarse", "fine"):
        straight, resumed = [runs.load_checkpoint(folder / "runs/labels" / part, "labels")
                             for folder in (work[0], tmp_path)]
        for weights in ("weights", "ema"):
            assert all(torch.equal(straight[weights][name], resumed[weights][name])
                       for name in straight[weights]), part


def test_a_request_becomes_a_labelled_set(work):
    """Each case says what was asked, what came, and what its label generator was trained on."""
    folder, said = work
    asked, off = [], []
    for path in sorted((folder / "synthetic").glob("*/*.json")):
        facts = json.loads(path.read_text())
        assert facts["LabelMaps"] == "generated"
        assert set(facts["Requested"]) == {"ET", "x"} and facts["Requested"]["x"] == 20
        assert facts["UsedInTraining"] is False and len(facts["GeneratorTrainedOn"]) > 0
        assert len(facts["LabelCheckpointSHA256"]) == 64
        asked.append(facts["Requested"]["ET"])
        off.append(abs(facts["Measured"]["x"] - 20))
    assert sorted(asked) == [11.25, 23.75] and "ET: asked 11.2 to 23.8 mL" in said, said
    assert f"x: asked 20.0 to 20.0 mm, mean error {np.mean(off):.2f} mm" in said, said
    status, said = run_script(folder, "sample.py", "--request", "et=5..30,x=20", "--count", 2,
                              "--steps", 2)
    assert status == 0 and "made 0 cases, 2 were there already" in said


def test_published_weights_draw_the_same_labels(work, tmp_path):
    """Both networks of a generator of labels, without pickle."""
    (tmp_path / "weights").mkdir()
    for part in ("coarse", "fine"):
        status, said = run_script(work[0], "brainsyn.py", "--publish", f"runs/labels/{part}",
                                  tmp_path / f"weights/{part}.npz")
        assert status == 0 and said.count("sha256 ") == 1, said
    run, published = [requests.load_label_generator(folder, torch.device("cpu"))
                      for folder in (work[0] / "runs/labels", tmp_path / "weights")]
    wanted = requests.requested({"ET": (5.0, 5.0)}, 0, 1, 0)
    settings = {**bs.SAMPLING, "steps": 2}
    assert torch.equal(run.measured.nan_to_num(), published.measured.nan_to_num())
    assert len(run.measured) == 12
    assert torch.equal(*[requests.sample_labels(model, wanted, (0,), settings)
                         for model in (run, published)])
    # one network, by its file
    assert runs.publish(work[0] / "runs/labels/fine/checkpoint.pt", tmp_path / "a.npz")


def test_networks_of_different_runs_are_refused(work, tmp_path):
    """And what differs is named."""
    shutil.copytree(work[0] / "runs/labels", tmp_path / "mixed")
    path = tmp_path / "mixed/fine/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "fov": 240.0}, path)
    with pytest.raises(bs.BadInput, match="mixed: both networks must be of one run .fov differs"):
        requests.load_label_generator(tmp_path / "mixed", torch.device("cpu"))


@pytest.mark.parametrize("words, sentence", [
    (["--request", "et=12", "--labels", "runs/phantoms/A"],
     "only one of --request, --scan, --labels (or --edit)"),
    (["--request", "ventricles=12"],
     "train both networks with --condition ventricles"),
    (["--request", "volume=12"], "--request volume=12: cannot be asked for"),
    (["--request", "et=12", "--label-checkpoint", "nowhere"], "nowhere"),
    (["--request", "et=12", "--label-checkpoint", "runs/ddpm"], "runs/ddpm")])
def test_requests_that_fail_say_why(work, words, sentence):
    """One sentence, nothing written."""
    status, said = run_script(work[0], "sample.py", *words, "--out", "failed")
    assert status == 2 and sentence in said and "Traceback" not in said, said
    assert not (work[0] / "failed").exists() or not list((work[0] / "failed").glob("BraTS*"))


@pytest.mark.parametrize("words, sentence", [
    (["--resolution", 40], "--resolution: labels need a multiple of 16"),
    (["--label-maps", "nowhere"], "nowhere: holds no label map"),
    (["--label-maps", "maps", "--condition", "tissue"],
     "--label-maps needs --generate labels"),
    (["--around", "2"], "--around is for --generate images")])
def test_label_training_that_fails_says_why(work, words, sentence):
    """One sentence."""
    status, said = run_script(work[0], "train_ddpm.py", "--generate", "labels", *TINY, *words,
                              "--out", "runs/failed")
    assert status == 2 and sentence in said and "Traceback" not in said, said


def test_heads_that_do_not_fit_are_named(phantom_folder, tmp_path, capsys):
    """Volumes are three quarters of the field of view high; no head is cut in silence."""
    cases = nifti.find_cases(phantom_folder)[:3]
    for fov, tall in ((192, False), (96, True)):
        args = train_ddpm.parse_arguments(f"--generate labels --resolution 32 --fov {fov} "
                                          "--relatives 2".split())
        cache = slices.build_cache(cases, tmp_path, 32, args.fov, "tumour")
        label_training.LabelData(args, cache)
        assert ("heads (" in capsys.readouterr().out) == tall


def test_label_maps_are_learned(work):
    """How many were left out is said; the checkpoint knows them by their hashes and its data as
    patients'."""
    folder, _ = work
    write_label_map(folder / "maps/a-seg.nii.gz", brats_map(), "LPS", (5, 5, 5))
    write_label_map(folder / "maps/b-seg.nii.gz", brats_map()[::-1], "RAS", (5, 5, 5))
    status, said = run_script(folder, "train_ddpm.py", "--generate", "labels", *TINY,
                              "--label-maps", "maps", "--out", "runs/maps", "--batch", 4,
                              "--steps", 2)
    assert status == 0 and "label maps: 2 in outlines of" in said, said
    assert "0 show the tumour of a held-out case" in said, said
    state = runs.load_checkpoint(folder / "runs/maps/fine", "labels")
    plain = runs.load_checkpoint(folder / "runs/labels/fine", "labels")
    assert state["patients"] == plain["patients"] + 2
    assert state["data"] == "patients" and plain["data"] == "phantoms"
    assert len(set(state["trained_on"]) - set(plain["trained_on"])) == 2


def test_label_maps_of_held_out_cases_are_left_out(phantom_folder, tmp_path, capsys):
    """Their tumour would be learned; where no other is left, training ends."""
    cases = nifti.find_cases(phantom_folder)[:6]
    args = train_ddpm.parse_arguments("--generate labels --relatives 2".split())
    args.label_maps = tmp_path / "maps"
    cache = slices.build_cache(cases, tmp_path, 64, args.fov, "tumour")
    held_out = next(case for case in cases if case.case in
                    {entry["case"] for entry in cache.cases if entry["part"] == "test"})
    labels, affine = nifti.read_labels(held_out)
    (tmp_path / "maps").mkdir()
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "maps/held-out.nii.gz")
    with pytest.raises(bs.BadInput, match="maps: no map is left"):
        label_training.LabelData(args, cache)
    write_label_map(tmp_path / "maps/new.nii.gz", brats_map(), mm=(5, 5, 5))
    data = label_training.LabelData(args, cache)
    assert data.cases == ["new"] and "1 show the tumour" in capsys.readouterr().out


@pytest.mark.programs
def test_label_benchmarks_run(work, lay_phantoms):
    """All four ways and the requests, hardly trained."""
    folder = lay_phantoms(work[0], 7, "runs/bench_labels")      # those that the labels learned from
    status, said = run_script(folder, "tests/bench_labels.py", "ways", "--minutes", 0.01, "--words",
                              "--phantoms 6 --resolution 16 --width 16 --batch 8 --relatives 12")
    assert status == 0, said
    for way in ("blocks", "alone", "neighbour", "along z"):
        assert f"| {way} | " in said, said
    status, said = run_script(folder, "tests/bench_labels.py", "asked", "runs/labels", "--count", 3,
                              "--calls", 2, "--guidance", 1, 2, "--candidates", 2, "--only", "ET",
                              "sphericity", "ventricles")
    assert status == 0 and "| ET | 2 |" in said and "| sphericity | 1 |" in said, said
    assert "ventricles" not in said and (folder / "runs/bench_labels/asked.png").exists(), said
    status, said = run_script(folder, "tests/bench_labels.py", "shapes", "runs/labels", "--calls",
                              2, "--words", "--phantoms 7 --resolution 32")
    assert status == 0 and "3 heads each" in said and "| ED | " in said, said
    assert "generated: shape distance" in said and "guessed from blocks" in said, said
    assert (folder / "runs/bench_labels/shapes.png").exists()


@pytest.mark.slow
def test_ventricles_go_all_the_way(work):
    """Labels with ventricles, and scans from them; they can be asked for and are measured; an image
    generator that wants them is not served by labels without."""
    folder, more = work[0], [*TINY, "--resolution", 16, "--steps", 2, "--condition", "ventricles"]
    for words in (["train_ddpm.py", *more, "--out", "runs/fluid"],
                  ["train_ddpm.py", "--generate", "labels", *more, "--out", "runs/labels_fluid"],
                  ["sample.py", "--checkpoint", "runs/fluid", "--label-checkpoint",
                   "runs/labels_fluid", "--request", "et=5,ventricles=30", "--count", 1, "--steps",
                   2, "--out", "fluid"]):
        status, said = run_script(folder, *words)
        assert status == 0, said
    facts = json.loads(next((folder / "fluid").glob("*/*.json")).read_text())
    findings = []
    case = nifti.find_cases(folder / "fluid", findings=findings)[0]
    assert "ventricles" in facts["VolumesML"], said
    assert "ventricles: asked 30.0 to 30.0 mL" in said, said
    image = nib.load(case.folder / writing.CLASSES_NAME.format(case.case))
    classes, voxel = np.asanyarray(image.dataobj), np.prod(image.header.get_zooms()) / 1000
    for name in ("ventricles", "ET"):
        voxels = (classes == facts["Classes"].index(name)).sum()
        assert voxels * voxel == pytest.approx(facts["VolumesML"][name], abs=0.01), name
    labels = nifti.read_case(case)[1]
    assert np.array_equal(bs.tumour_labels(classes, "ventricles"), labels) and not findings
    status, said = run_script(folder, "sample.py", "--checkpoint", "runs/fluid", "--request",
                              "et=5", "--out", "no")
    assert status == 2 and "retrain: --generate labels --condition ventricles" in said, said


@pytest.mark.programs
def test_the_worth_of_chosen_ventricles_is_measured(tmp_path):
    """The study, hardly trained: every arm has its row."""
    status, said = run_script(
        tmp_path, "tests/bench_ventricles.py", "--phantoms", 6, "--resolution", 32, "--count", 1,
        "--image-steps", 4, "--label-steps", 8, "--words", "--width 16 --relatives 12 --batch 4",
        "--calls", 2, "--seg-steps", 3, "--seeds", 1)
    assert status == 0 and "ventricles requested" in said, said
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["real, exact", "real", "generated",
                                                "generated, flat", "real + generated",
                                                "real + generated, flat"], said
    assert all(math.isfinite(float(row[3])) for row in rows), said
