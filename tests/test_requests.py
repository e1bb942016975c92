"""Section 12: what is asked of a label map is measured right, may be left open, and whole volumes
hang together."""
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
from kit import files, judging, label_training, metrics, nifti, phantoms, requests, runs, slices, writing
import train_ddpm
from nursery import run_script

STEP = 3.0                                      # mm a voxel


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
    return dict(zip(requests.ASKED, requests.characteristics(classes, "tumour", STEP).tolist()))


def test_volumes_are_ml_of_each_label():
    """A ball of ET in a ball of ED, in a voxel of 0.027 mL."""
    classes = head((8, (24.0, 32.0, 32.0), 2), (5, (24.0, 32.0, 32.0), 3))
    got = measured(classes)
    assert got["NCR"] == 0
    assert got["ET"] == pytest.approx(4 / 3 * math.pi * 15 ** 3 / 1000, rel=0.08)
    assert got["ED"] + got["ET"] == pytest.approx(4 / 3 * math.pi * 24 ** 3 / 1000, rel=0.08)


def test_place_is_mm_to_the_right_the_front_and_the_top():
    """Columns run from the patient's right, rows from the front, slices from the feet."""
    got = measured(head((4, (28.0, 26.0, 22.0), 3)))
    assert [got[k] for k in "xyz"] == pytest.approx([30, 18, 12], abs=0.3)


@pytest.mark.parametrize("radius", [4, 6, 9, 12])
def test_a_ball_has_sphericity_one(radius):
    """Nearly, at any size; on the grid or between its points."""
    for centre in ((24.0, 32.0, 32.0), (24.3, 31.6, 32.5)):
        assert 0.91 < requests.sphericity(ball(radius, centre)) < 1


def test_what_is_no_ball_has_less_sphericity():
    """A cube 0.806, a rod less, two balls (1/2)^(1/3); nothing has none."""
    cube = torch.zeros(48, 64, 64, dtype=torch.bool)
    cube[12:36, 20:44, 20:44] = True
    rod = torch.zeros_like(cube)
    rod[4:44, 30:36, 30:36] = True
    two = ball(8, (24.0, 20.0, 32.0)) | ball(8, (24.0, 44.0, 32.0))
    assert requests.sphericity(cube) == pytest.approx(0.806, abs=0.03)
    assert requests.sphericity(rod) < 0.7
    assert requests.sphericity(two) == pytest.approx(0.5 ** (1 / 3), abs=0.06)
    assert math.isnan(requests.sphericity(torch.zeros(4, 4, 4, dtype=torch.bool)))


def test_lesions_are_parts_that_are_large_enough():
    """Two parts and a speck of one voxel, 27 mm3."""
    classes = head((4, (24.0, 22.0, 32.0), 2), (3, (24.0, 44.0, 32.0), 3))
    classes[24, 32, 32] = 2
    assert measured(classes)["lesions"] == 2


def test_ventricles_are_measured_where_they_are_a_class():
    """In mL, under the condition that has them; else they are open. They are no tumour."""
    classes = head((4, (24.0, 32.0, 20.0), 3))
    with_fluid = torch.where(classes > 1, classes + 1, classes)
    with_fluid[ball(6, (24.0, 32.0, 34.0))] = 2
    got, before = requests.characteristics(with_fluid, "ventricles",
                                           STEP), requests.characteristics(classes, "tumour", STEP)
    assert got[-1] == pytest.approx(4 / 3 * math.pi * 18 ** 3 / 1000, rel=0.08) and math.isnan(
        before[-1])
    assert torch.allclose(got[:-1], before[:-1], atol=1e-4)


def test_ventricles_of_phantoms_are_found():
    """Their volume follows the exact one from head to head, and most of their voxels are the
    same."""
    exact, found = [], []
    for seed in range(4):
        images, labels, share = phantoms.phantom(seed)
        truth, brain = (share["ventricles"] > 0.5) & (labels == 0), (images > 0).any(0)
        got = slices.deep_fluid(slices.tissue_clusters(images, brain & (labels == 0)), brain,
                                phantoms.PHANTOM_SPACING)
        exact, found = [*exact, truth.sum()], [*found, got.sum()]
        assert bs.dice(torch.from_numpy(got), torch.from_numpy(truth)) > 0.7
    assert np.corrcoef(exact, found)[0, 1] > 0.9 and 0.9 < np.mean(np.array(found) / exact) < 1.3


def test_without_tumour_there_is_no_place():
    """Volumes and lesions 0; place and shape are not defined."""
    got = measured(head())
    assert [got[k] for k in ("NCR", "ED", "ET", "lesions")] == [0, 0, 0, 0]
    assert all(math.isnan(got[k]) for k in ("x", "y", "z", "sphericity"))


def test_mirrored_labels_have_mirrored_x():
    """What training does to a request when it mirrors its volume."""
    classes = head((5, (20.0, 24.0, 26.0), 1))
    was, now = [requests.characteristics(its, "tumour", STEP)
                for its in (classes, classes.flip(-1))]
    was[requests.ASKED.index("x")] *= -1
    assert torch.allclose(was, now, atol=1e-3, equal_nan=True)


def test_scaled_requests_keep_what_is_open():
    """NaN stays NaN, the rest lies about -1..1."""
    wanted = torch.tensor([0, 120, float("nan"), -45, 30, 0, 0.7, 3, 40])
    got = requests.scaled(wanted)
    assert torch.equal(torch.isnan(got), torch.isnan(wanted)) and torch.nan_to_num(got).abs().max(
        ) < 1.2


def test_slices_become_cubes_of_the_same_volume():
    """Any thickness; the case in the middle; air above and below."""
    classes = np.zeros((56, 16, 16), np.uint8)
    classes[3:53, 4:12, 4:12], classes[20:40, 6:9, 6:9] = 1, 3
    for thickness in (1.0, 2.4, 5.0):
        cubes = requests.to_cubes(classes, thickness, 3.0, 120, 5)
        for k in (1, 3):
            assert (cubes == k).sum() * 3 == pytest.approx((classes == k).sum() * thickness,
                                                           rel=0.06)
        depth = np.where(cubes.any((1, 2)))[0]
        assert abs(depth[0] + depth[-1] - 119) <= 1


@pytest.mark.parametrize("text, words", [("et=big", "et=big"), ("core=3", "core=3"),
                                         ("et=5..3", "et=5..3"), ("ed=-4", "ed=-4"), ("et", "et"),
                                         ("et=nan", "et=nan")])
def test_requests_that_cannot_be_are_named(text, words):
    """One sentence, with what can be asked for."""
    with pytest.raises(bs.BadInput, match=f"--request {words}: cannot be asked for.*sphericity"):
        requests.parse_request(text)


def test_requests_are_read():
    """Numbers, ranges, any order, any case; nothing asks for nothing."""
    assert requests.parse_request("ET=12,ed=5..30,x=-20") == {"ET": (12, 12), "ED": (5, 30),
                                                              "x": (-20, -20)}
    assert requests.parse_request("") == {}


def test_ranges_are_flat_and_their_orders_differ():
    """Every value of a range comes once; ET and ED are not tied to each other; the seed decides the
    order."""
    request = requests.parse_request("et=0..40,ed=0..40,ncr=3")
    got = torch.stack([requests.requested(request, i, 20, 0) for i in range(20)])
    assert torch.allclose(got[:, 2].sort().values, torch.arange(20) * 2.0 + 1)
    assert (got[:, 0] == 3).all() and torch.isnan(got[:, 3:]).all()
    assert abs(np.corrcoef(got[:, 1], got[:, 2])[0, 1]) < 0.8
    assert not torch.equal(got[:, 2], torch.stack([requests.requested(request, i, 20, 1)
                                                   for i in range(20)])[:, 2])


def test_slabs_are_the_way_there_and_back():
    """Slices in order, a volume at a time."""
    x = torch.randn(2, 12, 5, 3, 3)
    slabs = requests.to_slabs(x, 4)
    assert slabs.shape == (6, 20, 3, 3) and torch.equal(requests.from_slabs(slabs, 4, 12), x)
    assert torch.equal(slabs[0, :5], x[0, 0]) and torch.equal(slabs[1, :5], x[0, 4])


def test_blocks_hold_shares_of_classes():
    """They sum to 1, and to the same volume as the voxels."""
    volumes = torch.stack([head((7, (22.0, 28.0, 40.0), 2), (4, (22.0, 28.0, 40.0), 3)),
                           head()]).to(torch.uint8)
    shares = requests.block_shares(volumes, 5)
    assert shares.shape == (2, 12, 5, 16, 16) and torch.allclose(shares.sum(2),
                                                                 torch.ones(2, 12, 16, 16))
    assert shares[0, :, 4].sum() * requests.BLOCK ** 3 == pytest.approx(
        (volumes[0] == 4).sum().item())
    assert shares[0, 5, 4, 7, 10] == (volumes[0, 20:24, 28:32, 40:44] == 4).float().mean() > 0


def test_a_slab_is_told_what_its_blocks_say():
    """The same as blocks of the whole head drawn smooth, at every slab, the lowest and highest
    among them."""
    shares = requests.block_shares(head((9, (22.0, 28.0, 40.0), 2))[None], 5)
    whole = torch.nn.functional.interpolate(shares.movedim(2, 1), scale_factor=requests.BLOCK,
                                            mode="trilinear")[0]
    told = requests.slab_shares(shares.expand(12, -1, -1, -1, -1), torch.arange(12))
    assert torch.allclose(requests.from_slabs(told, requests.BLOCK, 48)[0], whole.movedim(1, 0),
                          atol=1e-5)
    mean, std = bs.expected({"shares": torch.tensor(0.1)}, told, torch.zeros(12))
    assert torch.allclose(mean, 2 * told - 1) and std.min() >= 0.1 and torch.isclose(std.max(),
                                                                                     torch.tensor(
        1.0))


def test_the_prior_of_heads_is_their_mean():
    """Left and right alike; no spread under the floor; the same whatever is asked for."""
    shares = requests.block_shares(torch.stack([head((4, (24.0, 26.0, 24.0), 3)), head()]), 5)
    prior = requests.label_prior(shares)
    # (D', K, r, r)
    mean, std = [requests.from_slabs(its, 12, 12)[0] for its in prior["atlas"]]
    roots = shares.sqrt().mean(0)                                                   # (D', K, r, r)
    assert torch.allclose((mean + 1) / 2, (roots + roots.flip(-1)) / 2, atol=1e-5)
    assert torch.allclose(mean, mean.flip(-1), atol=1e-6) and std.min() == 0.1
    scalars = requests.head_scalars(torch.full((3, len(requests.ASKED)), torch.nan))
    got = bs.expected(prior, torch.zeros(3, 0, 16, 16), scalars[:, 0])
    assert all(torch.allclose(a, b.expand(3, -1, -1, -1), atol=1e-5) for a,
               b in zip(got, prior["atlas"]))


def test_blocks_measure_what_voxels_do():
    """Volumes and place, sphericity as far as its order goes; what blocks do not show is open; so
    is the place of no tumour."""
    # a sausage
    classes = torch.stack([head((7, (22.0, 28.0, 40.0), 2), (4, (22.0, 28.0, 40.0), 3)), head(),
                           head(*[(4.0, (22.0, 20.0 + 6 * i, 32.0), 2) for i in range(4)])])
    got = requests.measure_shares(requests.block_shares(classes, 5), "tumour", STEP)
    want = torch.stack([requests.characteristics(its, "tumour", STEP) for its in classes])
    assert torch.allclose(got[0, :6], want[0, :6], atol=1.0) and torch.isnan(got[:, 7:]).all()
    assert torch.allclose(got[1, :3], want[1, :3], atol=1e-3) and torch.isnan(got[1, 3:7]).all()
    assert got[0, 6] > got[2, 6] + 0.02 and want[0, 6] > want[2, 6] + 0.1 and (got - want)[[0, 2],
                                                                                           6].abs(
        ).max() < 0.3


def test_the_candidate_nearest_to_the_request_is_kept():
    """A denoiser of pure chance: with more candidates what comes is nearer to what was asked; open
    entries do not matter; the key decides."""
    volumes = torch.stack([head((3 + i, (24.0, 32.0, 20.0 + 2 * i), 3)) for i in range(6)])
    prior = requests.label_prior(requests.block_shares(volumes, 5))
    denoiser = SimpleNamespace(prior=prior, alpha_bar=bs.cosine_alpha_bar(0.5))

    def by_chance(x_t, t, onehot, scalars):
        signal, sigma = bs.signal_sigma(denoiser.alpha_bar, t)
        return bs.precondition(torch.zeros_like(x_t), x_t, signal, sigma,
                               *bs.expected(prior, onehot, scalars[:, 0]))

    class Chance(SimpleNamespace):
        __call__ = staticmethod(by_chance)

    chance, errors = Chance(prior=prior, alpha_bar=denoiser.alpha_bar), {1: [], 8: []}
    wanted = torch.full((len(requests.ASKED),), torch.nan)
    wanted[2] = 30.0
    for n, i in itertools.product(errors, range(6)):
        its = requests.sample_shares(chance, "tumour", STEP, wanted, (0, i),
                                     {**bs.SAMPLING, "steps": 3}, n)
        assert torch.allclose(its.sum(1), torch.ones(12, 16, 16), atol=1e-4) and its.min() >= 0
        errors[n].append(float((requests.measure_shares(its[None], "tumour", STEP)[0, 2]
                                - 30).abs()))
    assert np.mean(errors[8]) < np.mean(errors[1])
    again = requests.sample_shares(chance, "tumour", STEP, wanted, (0, 5),
                                   {**bs.SAMPLING, "steps": 3}, 8)
    assert torch.equal(again, its)


def test_a_head_without_tumour_has_no_place(monkeypatch):
    """Asked for a place, one of two candidates that has a tumour, however far off, is nearer than
    one that has none."""
    shares = requests.block_shares(torch.stack([head(), head((6, (24.0, 32.0, 24.0), 3))]), 5)
    monkeypatch.setattr(bs, "sample", lambda *its: requests.head_pictures(shares))
    denoiser, wanted = SimpleNamespace(prior=requests.label_prior(shares),
                                       alpha_bar=bs.cosine_alpha_bar(0.5)), torch.full(
        (len(requests.ASKED),), torch.nan)
    wanted[3] = -40.0
    got = requests.sample_shares(denoiser, "tumour", STEP, wanted, (0,), candidates=2)
    assert torch.allclose(requests.measure_shares(got[None], "tumour", STEP)[0, 3],
                          torch.tensor(24.0), atol=2)


def test_what_is_a_little_everywhere_is_nothing(monkeypatch):
    """Of a label the blocks keep what they, or a neighbour, have plainly; what was asked to be
    nothing is nothing."""
    # ET, full in the middle
    shares = requests.block_shares(head((6, (24.0, 32.0, 24.0), 3))[None], 5)
    faint = shares.clone()
    # far from all other ET
    faint[0, 6, 4, 4, 11], faint[0, 6, 1, 4, 11] = 0.15, 0.85
    faint[0, 6, 3, 10, 4], faint[0, 6, 1, 10, 4] = 0.15, 0.85                       # ED, the same
    monkeypatch.setattr(bs, "sample", lambda *its: requests.head_pictures(faint))
    denoiser, wanted = SimpleNamespace(prior=requests.label_prior(shares),
                                       alpha_bar=bs.cosine_alpha_bar(0.5)), torch.full(
        (len(requests.ASKED),), torch.nan)
    got = requests.sample_shares(denoiser, "tumour", STEP, wanted, (0,))
    assert got[6, 4, 4, 11] == 0 and got[:, 3].sum() == 0 and torch.allclose(got.sum(1),
                                                                             torch.ones(12, 16, 16))
    assert got[:, 4].sum() == pytest.approx(float(shares[0, :, 4].sum()), rel=0.15)
    wanted[2] = 0.0
    assert requests.sample_shares(denoiser, "tumour", STEP, wanted, (0,))[:, 4].sum() == 0


def test_the_volume_asked_for_is_settled(monkeypatch):
    """Where blocks and request disagree about how much, the request counts; 0 mL are none at
    all."""
    # 7 mL of ET in 57 of tumour
    truth = head((8, (24.0, 32.0, 32.0), 2), (4, (24.0, 32.0, 32.0), 3))
    scores, far = bs.one_hot(truth, 5), torch.stack(torch.where(truth > -1)) - torch.tensor(
        [[24], [32], [32]])
    # ET the likelier the nearer
    et = (1 - far.float().norm(dim=0) / 8).clamp(min=0).view(truth.shape)
    scores[:, 4], scores[:, 3] = et * (truth > 1), (1 - et) * (truth > 1)
    shares = requests.block_shares(truth[None], 5)[0]
    monkeypatch.setattr(requests, "sample_shares", lambda *its: shares)
    monkeypatch.setattr(bs, "sample_guided", lambda *its: requests.to_slabs(2 * scores[None] - 1,
                                                                            requests.BLOCK))
    model = requests.LabelGenerator(None, None, "tumour", STEP,
                                    torch.full((1, len(requests.ASKED)), torch.nan))
    volumes = {}
    for ml in (math.nan, 0.0, 3.0, 15.0):
        wanted = torch.full((len(requests.ASKED),), torch.nan)
        wanted[1], wanted[2] = 57.0 - ml, ml
        got = measured(requests.sample_labels(model, wanted, (0,)))
        volumes[ml] = got["ET"]
        assert got["ET"] + got["ED"] == pytest.approx(57, abs=1)
    assert list(volumes.values()) == [pytest.approx(7, rel=0.1), 0, pytest.approx(3, rel=0.2),
                                      pytest.approx(15, rel=0.1)], volumes


def test_what_is_asked_for_counts_more_than_what_is_wanted():
    """Open entries do not count, what is wanted and not there is far, and of what is wanted that
    which is asked for has ten times the say."""
    wanted, heads = torch.full((len(requests.ASKED),), torch.nan), torch.full(
        (3, len(requests.ASKED)), torch.nan)
    wanted[1:4] = torch.tensor([50.0, 20.0, 10.0])
    heads[:, 0] = torch.tensor([0.0, 90, 5])
    heads[:, 1:4] = torch.tensor([[50.0, 10.0, 10.0], [30.0, 20.0, 10.0], [50.0, 20.0, torch.nan]])
    plain, by_et = [requests.distance(heads, wanted, *its)
                    for its in ((), (torch.arange(len(requests.ASKED)) == 2,))]
    assert plain[0] < plain[1] + 0.05 and plain[2] == 4
    assert by_et[0] == plain[0] and torch.allclose(by_et[1:], plain[1:] / 10)


def test_open_volumes_are_those_of_training_heads_like_the_request():
    """All volumes together are those of one head; what is asked for stays, and so do open entries
    that are none."""
    known = torch.full((40, len(requests.ASKED)), torch.nan)
    # ED three times NCR, ET twice
    known[:, :4] = torch.arange(40.0)[:, None] * torch.tensor([1.0, 3, 2, 1])
    wanted, drawn = torch.full((len(requests.ASKED),), torch.nan), set()
    for i in range(60):
        got = requests.fill_volumes(wanted, known, (i,))
        assert got[1] == 3 * got[0] and got[2] == 2 * got[0] and torch.isnan(got[3:]).all()
        drawn.add(float(got[0]))
    assert len(drawn) > 20 and torch.equal(got[:3], requests.fill_volumes(wanted, known, (59,))[:3])
    wanted[2] = 40.0
    got = [requests.fill_volumes(wanted, known, (i,)) for i in range(20)]
    assert all(its[2] == 40 and torch.isnan(its[3:]).all() for its in got)
    assert {float(its[0]) for its in got} <= {19.0, 20, 21} and len(
        {float(its[0]) for its in got}) == 2


def test_a_label_asked_to_be_nothing_still_has_a_tumour():
    """et=0 is filled from heads with a tumour though others are as near; lesions=0 and no tumour at
    all are not."""
    known = torch.full((20, len(requests.ASKED)), torch.nan)
    known[:, :3], known[:, 7] = torch.tensor([0.0, 0, 0]), 0.0
    known[:4, :3], known[:4, 7] = torch.tensor([5.0, 30, 1]), 1.0
    wanted = torch.full((2, len(requests.ASKED)), torch.nan)
    wanted[0, 2] = wanted[1, 7] = 0.0
    for i in range(5):
        assert requests.fill_volumes(wanted[0], known, (i,))[:3].tolist() == [5, 30, 0]
        assert requests.fill_volumes(wanted[1], known, (i,))[:3].tolist() == [0, 0, 0]


def test_the_networks_get_the_request_filled_and_choose_by_what_was_asked(monkeypatch):
    """Open volumes reach both networks as those of a training head, and count less than what was
    asked for."""
    known, seen, middle = torch.full((1, len(requests.ASKED)), torch.nan), [], (24.0, 32.0, 24.0)
    known[0, :3] = torch.tensor([0.0, 15, 90])
    # 34 mL of ET and 15 of ED, or 24 and 8
    shares = requests.block_shares(torch.stack([head((et, middle, 3), (ed, (24.0, 32.0, 44.0), 2))
                                                for et, ed in ((6.7, 5.1), (5.95, 4.1))]), 5)
    monkeypatch.setattr(bs, "sample_guided", lambda denoiser, onehot, scalars,
                        *its: (seen.append((onehot, scalars)), requests.head_pictures(shares)
                               if not onehot.shape[1] else 2 * onehot - 1)[1])
    model = requests.LabelGenerator(SimpleNamespace(prior=requests.label_prior(shares)), None,
                                    "tumour", STEP, known)
    wanted = torch.full((len(requests.ASKED),), torch.nan)
    wanted[2] = 24.0
    got = requests.sample_labels(model, wanted, (0,), candidates=2)
    filled = requests.scaled(torch.tensor([0.0, 15, 24, *[torch.nan] * 6]))
    assert torch.allclose(seen[0][1][0, 1:].nan_to_num(), filled.nan_to_num())
    told = requests.from_slabs(seen[1][0], requests.BLOCK, 48)[0, :, 4].sum() * STEP ** 3 / 1000
    assert told < 29 and measured(got)["ET"] == pytest.approx(24, rel=0.1)


def test_what_goes_leaves_air_where_it_was():
    """A block, or a voxel, that held nothing but a label which is not to come is brain."""
    shares = torch.rand(3, 5, 4, 4) ** 4
    shares[0, :, 0, 0] = torch.tensor([0.0, 0, 0, 1, 0])
    shares[1, :, 0, 0] = torch.tensor([0.25, 1e-12, 0, 0.75, 0])
    shares = shares / shares.sum(1, keepdim=True)
    shares[0, 1, 0, 0] = 1e-12
    got = requests.without(shares, [3])
    assert got[:, 3].sum() == 0 and torch.equal(got[:, 0], shares[:, 0])
    assert torch.allclose(got.sum(1), torch.ones(3, 4, 4))
    truth = head((8, (24.0, 32.0, 32.0), 2))
    classes = requests.settle(2 * bs.one_hot(truth, 5) - 1, torch.zeros(5), 2)
    assert torch.equal(classes, (truth > 0).long())


def test_drafts_are_drawn_until_one_is_as_asked(monkeypatch):
    """With keys of their own, four at most, of which the nearest is kept; one, where nothing is
    asked."""
    lesions, drawn = [(4, (24.0, 32.0, 20.0 + 12 * i), 2) for i in range(3)], []
    monkeypatch.setattr(requests, "draw_labels", lambda model, wanted, key, *its: (
        drawn.append(key), head(*lesions[:min(len(drawn), 3)]))[1])
    wanted = torch.full((len(requests.ASKED),), torch.nan)
    model = requests.LabelGenerator(None, None, "tumour", STEP, wanted[None])
    assert measured(requests.sample_labels(model, wanted, (5,)))["lesions"] == 1 and drawn == [(5,)]
    for count, keys in ((1, [(5,)]), (2, [(5,), (5, 1)]), (9, [(5,), (5, 1), (5, 2), (5, 3)])):
        drawn.clear()
        wanted = wanted.clone()
        wanted[7] = count
        assert measured(requests.sample_labels(model, wanted, (5,)))["lesions"] == min(count, 3) and drawn == keys


def test_the_fine_network_is_told_what_blocks_do_not_show():
    """Slice position, then sphericity and lesions as scaled, open where they are open."""
    wanted = torch.full((2, len(requests.ASKED)), torch.nan)
    wanted[0, 6], wanted[1, 7] = 0.75, 3.0
    got = requests.slab_scalars(torch.tensor([0, 11]), 12, wanted)
    assert torch.allclose(got.nan_to_num(nan=9.0), torch.tensor(
        [[-11 / 12, 0.5, 9], [11 / 12, 9, 1]]))


def test_scores_settle_as_a_label_map():
    """Specks go; a class gets about the voxels it should have, at places where it is nearly the
    largest, and nowhere where it is not; what nobody expects does not come."""
    # (D, K, R, R)
    truth = bs.one_hot(head((8, (24.0, 32.0, 32.0), 2)), 5)
    scores = 2 * truth - 1
    # a speck of ET, likely
    scores[10, :, 40, 20] = torch.tensor([-1.0, -0.4, -1, -1, 0.4])
    core = ball(5, (24.0, 32.0, 32.0))
    # ET nearly as likely as ED
    scores[:, 4] = torch.where(core, 0.9, scores[:, 4])
    volumes = torch.tensor([0.0, 0, 0, 1700, 400])
    classes = requests.settle(scores, volumes, 2)
    assert classes[10, 40, 20] == 1 and 350 < (classes == 4).sum() < 450
    assert not ((classes == 4) & ~metrics.dilate(core, 1)).any()
    assert (requests.settle(scores, torch.tensor([0.0, 0, 500, 2100, 0]), 2) == 4).sum() == 0
    assert torch.equal(classes[0], classes[0] * 0) and (classes == 2).sum() == 0


def test_a_voxel_that_stands_alone_is_brain():
    """However sure its score is; two that touch, if only by a corner, stay."""
    # (D, K, R, R)
    scores = 2 * bs.one_hot(head((8, (24.0, 32.0, 32.0), 2)), 5) - 1
    for z, y, x in ((10, 40, 20), (14, 40, 20), (15, 41, 21)):
        scores[z, :, y, x] = torch.tensor([-1.0, -1, -1, -1, 1])
    classes = requests.settle(scores, torch.tensor([0.0, 0, 0, 2100, 3]), 2)
    assert (classes == 4).nonzero().tolist() == [[14, 40, 20], [15, 41, 21]]


def test_what_training_leaves_open():
    """Half of all requests are a volume or two alone; in the others anything from none to all is
    open."""
    chance = torch.rand(4000, 2 + len(requests.ASKED))
    open_ = requests.open_entries(chance)
    volumes = torch.tensor([name in (*bs.LABELS, "ventricles") for name in requests.ASKED])
    few = chance[:, 0] < 0.5
    assert open_[few][:, ~volumes].all() and 0.45 < open_[few][:, volumes].float().mean() < 0.55
    given = (~open_[~few]).sum(1)
    assert {int(n) for n in given.unique()} == set(range(len(requests.ASKED) + 1))


def small_net():
    """A network of heads whose layers that start at zero have learned something."""
    torch.manual_seed(0)
    net = bs.UNet(channels=15, classes=0, width=16, mults=(1, 2), patch=1, scalars=1
                  + len(requests.ASKED))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.abs().max() == 0 else None
    return net.eval()


def test_open_entries_are_a_state_of_their_own():
    """Left open is not 0, for each of them, and what an open entry would have been does not
    matter."""
    net, x, t = small_net(), torch.randn(1, 15, 16, 16), torch.full((1,), 500)
    wanted = torch.zeros(1, len(requests.ASKED))
    with torch.no_grad():
        a = net(x, t, x[:, :0], requests.head_scalars(wanted))
        for i in range(len(requests.ASKED)):
            some = wanted.clone()
            some[0, i] = torch.nan
            b = net(x, t, x[:, :0], requests.head_scalars(some))
            assert (a - b).abs().max() > 1e-4 and not torch.isnan(b).any(), requests.ASKED[i]


def test_guidance_leaves_the_request_open():
    """The null condition drops every scalar but the slice's position."""
    seen = []

    def denoiser(x_t, t, onehot, scalars):
        seen.append(scalars)
        return x_t

    scalars = requests.head_scalars(torch.ones(2, len(requests.ASKED)))
    bs.guided_v(denoiser, torch.randn(2, 5, 8, 8), torch.full((2,), 500), torch.zeros(2, 0, 8, 8),
                scalars, 2.0)
    assert torch.equal(seen[0], scalars) and torch.equal(seen[1][:, 0], scalars[:, 0])
    assert torch.isnan(seen[1][:, 1:]).all()


def test_moved_volumes_are_relatives():
    """Half of them mirrored, volumes within what stretching allows, classes as before; the key
    decides."""
    volumes = torch.stack([head((7, (22.0, 28.0, 40.0), 2), (4, (22.0, 28.0, 40.0), 3))] * 24).to(
        torch.uint8)
    moved = requests.move_volumes(volumes, (0, "moves"))
    got = torch.stack([requests.characteristics(its.long(), "tumour", STEP) for its in moved])
    was = requests.characteristics(volumes[0].long(), "tumour", STEP)
    assert 4 <= (got[:, 3] < 0).sum() <= 20                     # to the left
    assert (torch.log(got[:, 1:3] / was[1:3]).abs() < 0.6).all() and got[:, 2].std() > 0.05 * was[2]
    assert (got[:, 3].abs() - was[3].abs()).abs().max() < 18 and set(moved.unique().tolist()) == {0,
                                                                                                  1,
                                                                                                  3,
                                                                                                  4}
    assert torch.equal(moved, requests.move_volumes(volumes, (0, "moves")))
    assert not torch.equal(moved, requests.move_volumes(volumes, (1, "moves")))


def test_the_nearest_tumour_is_found_wherever_it_lies():
    """Moved, mirrored; another shape is not the same; nothing has no nearest."""
    two = (5, (22.0, 24.0, 40.0), 3), (4, (26.0, 30.0, 44.0), 2)
    others = torch.stack([head((9, (24.0, 32.0, 32.0), 2)), head(*two)])
    moved = head(*[(r, (z + 3, y + 5, x - 7), k) for r, (z, y, x), k in two])
    near, which = requests.nearest_tumour(torch.stack([moved, others[1].flip(-1),
                                                       head((6, (24.0, 32.0, 32.0), 3)), head()]),
                                          others, "tumour")
    assert near[:2] == pytest.approx([1, 1]) and which[:2].tolist() == [1, 1]
    assert 0.3 < near[2] < 0.9 and math.isnan(near[3])
    assert torch.isnan(requests.nearest_tumour(others, others[:0], "tumour")[0]).all()


def test_what_does_not_hang_together_is_counted():
    """Pieces, slices that do not fit, tumour in the air, ET alone."""
    whole = judging.label_figures(head((8, (24.0, 32.0, 32.0), 2), (4, (24.0, 32.0, 32.0), 3)),
                                  "tumour")
    assert whole["pieces"] == 1 and whole["outside"] == whole["apart"] == 0 and whole[
        "slice_dice"] > 0.75
    classes = head((8, (24.0, 32.0, 32.0), 2), (2, (24.0, 18.0, 32.0), 3))
    classes[4, 4, 4] = 4
    got = judging.label_figures(classes, "tumour")
    ill = (classes > 1).sum().item()
    assert got["pieces"] == 3 and got["outside"] == pytest.approx(1 / ill) and got["apart"] == 1
    torn = classes.clone()
    torn[::2] = torn[::2].roll(12, 1)
    assert judging.label_figures(torn, "tumour")["slice_dice"] < 0.6
    assert all(math.isnan(value) for value in judging.label_figures(head(), "tumour").values())


def test_shapes_like_the_real_are_nearer():
    """Frechet distance of characteristics: the same set 0, larger tumours more."""
    g = torch.Generator().manual_seed(0)
    def some(size):
        return torch.stack([head((size + float(torch.rand(1, generator=g)),
                                  (22.0, 28.0 + i % 5, 30.0 + i), 2),
                                 (3, (22.0, 28.0 + i % 5, 30.0 + i), 3)) for i in range(8)])
    real, alike, larger = some(5), some(5), some(9)
    distance = [judging.judge_labels(made, real, "tumour", STEP)["shape_distance"]
                for made in (real, alike, larger)]
    assert abs(distance[0]) < 1e-5 < distance[1] < distance[2]


def label_maps(path, **changes):
    """An .npz of two maps of 24 x 24 x 31 voxels in the frame of BraTS; the tumour of one is right,
    front and high."""
    seg = np.zeros((2, 24, 24, 31), np.uint8)
    seg[0, 8:11, 9:12, 18:23], seg[0, 9:11, 10:12, 19:22], seg[1, 13:16, 13:16, 10:16] = 2, 4, 1
    np.savez(path, **{"seg": seg, "ids": np.array(["one", "two"]), **changes})
    return path


def test_label_maps_alone_get_an_outline(tmp_path):
    """Each tumour at its place in one of the outlines, what lies outside cut off; volumes kept;
    hashes of their own."""
    outlines = torch.stack([head(), head()]).to(torch.uint8)
    volumes, ids, hashes, lost = requests.read_label_maps(label_maps(tmp_path / "maps.npz"),
                                                          outlines, STEP)
    assert ids == ["one", "two"] and len(set(hashes)) == 2 and lost < 0.05
    assert torch.equal(volumes > 0, outlines > 0)
    got = [requests.characteristics(its.long(), "tumour", STEP) for its in volumes]
    assert (got[0][3:6] > 10).all() and (got[1][3:6] < 10).all()            # right, front and top
    assert got[0][2] == pytest.approx(12 * 0.5, rel=0.3) and got[1][0] == pytest.approx(54 * 0.5,
                                                                                        rel=0.3)


@pytest.mark.parametrize("changes", [{"seg": np.zeros((2, 4, 4), np.uint8)},
                                     {"seg": np.full((2, 4, 4, 4), 7, np.uint8)},
                                     {"ids": np.array(["one"])},
                                     {"ids": np.array(["a", None], object)}])
def test_label_maps_that_are_none_are_refused(tmp_path, changes):
    """Shape, labels, names; what cannot be read without running code."""
    outlines = torch.stack([head(), head()]).to(torch.uint8)
    with pytest.raises(bs.BadInput, match="maps.npz.*expected"):
        requests.read_label_maps(label_maps(tmp_path / "maps.npz", **changes), outlines, STEP)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(bs.BadInput, match="text.npz"):
        requests.read_label_maps(tmp_path / "text.npz", outlines, STEP)


@pytest.mark.parametrize("resolution, fov", [(64, 192.0), (32, 192.0), (96, 192.0), (64, 240.0)])
def test_labels_are_brought_to_the_grid_of_images(resolution, fov):
    """Volumes stay; coarser, finer, wider."""
    classes = head((9, (24.0, 28.0, 36.0), 2), (6, (24.0, 28.0, 36.0), 3))
    got = requests.prepare_labels(classes, "tumour", STEP, resolution, fov, "tumour")
    ml = abs(np.linalg.det(got["grid"].affine[:3, :3])) / 1000
    for k in (2, 3):
        assert (got["labels"] == k).sum() * ml == pytest.approx((classes == k + 1).sum().item()
                                                                * 0.027, rel=0.15)
    assert got["classes"].shape[1:] == (resolution, resolution)
    at = np.where((got["classes"] > 0).any((1, 2)))[0]
    assert got["position"][at[0]] == -1 and got["position"][at[-1]] == 1


def test_tissue_is_not_made_from_tumour_labels():
    """An image generator that wants tissue cannot have it from labels without; the other way round
    works."""
    classes = head((5, (24.0, 28.0, 36.0), 3))
    with pytest.raises(bs.BadInput, match="--condition tissue"):
        requests.prepare_labels(classes, "tumour", STEP, 64, 192.0, "tissue")
    tissue = torch.where(classes > 1, classes + 2, classes * 3)
    got = requests.prepare_labels(tissue, "tissue", STEP, 64, 192.0, "tumour")["classes"]
    assert np.array_equal(got, classes)


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
            "shape_distance", "nearest_training_tumour_dice", "copies"} <= set(
        figures) and "ventricles_error" not in figures
    shutil.copytree(folder / "runs/labels", folder / "runs/again")
    status, said = run_script(folder, "train_ddpm.py", "--generate", "labels", *TINY, "--batch", 4,
                              "--out", "runs/again")
    assert status == 0 and said.count("resumed: ") == 2, said
    for part in ("coarse", "fine"):             # sidecars name generators by their hash
        assert len({files.file_hash(folder / "runs" / run / part / "checkpoint.pt")
                    for run in ("labels", "again")}) == 1


def test_labels_resume_bit_for_bit(work, tmp_path, monkeypatch):
    """A power cut while the coarse network learns, another while the fine one does: then the
    weights of the run that went through."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/phantoms").symlink_to(work[0] / "runs/phantoms")
    command, calls = ["--generate", "labels", *map(str, TINY), "--batch", "4"], itertools.count(1)
    handlers = [signal.getsignal(its) for its in (signal.SIGINT, signal.SIGTERM)]

    class PowerCut(Exception):
        pass

    def cut(real, when):
        def instead(*its):
            if when(its):
                raise PowerCut
            return real(*its)
        return instead

    try:
        for where, name, when in ((requests, "open_entries", lambda its: next(calls) == 3),
                                  (bs, "batch_rows", lambda its: its[4] == 1)):
            with monkeypatch.context() as patch, pytest.raises(PowerCut):
                patch.setattr(where, name, cut(getattr(where, name), when))
                train_ddpm.main(command)
        train_ddpm.main(command)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)
    for part in ("coarse", "fine"):
        straight, resumed = [runs.load_checkpoint(its / "runs/labels" / part, "labels")
                             for its in (work[0], tmp_path)]
        for weights in ("weights", "ema"):
            assert all(torch.equal(straight[weights][name], resumed[weights][name])
                       for name in straight[weights]), part


def test_a_request_becomes_a_labelled_set(work):
    """Each case says what was asked, what came, and what its label generator was trained on."""
    folder, said = work
    sidecars = sorted((folder / "synthetic").glob("*/*.json"))
    asked = []
    for path in sidecars:
        its = json.loads(path.read_text())
        assert its["LabelMaps"] == "generated" and set(its["Requested"]) == {"ET", "x"} and its[
            "Requested"]["x"] == 20
        assert its["UsedInTraining"] is False and len(its["GeneratorTrainedOn"]) > 0
        assert len(its["LabelCheckpointSHA256"]) == 64
        asked.append(its["Requested"]["ET"])
    assert sorted(asked) == [11.25, 23.75] and "ET: asked 11.2 to 23.8 mL" in said, said
    status, said = run_script(folder, "sample.py", "--request", "et=5..30,x=20", "--count", 2,
                              "--steps", 2)
    assert status == 0 and "made 0 cases, 2 were there already" in said


def test_published_weights_draw_the_same_labels(work, tmp_path):
    """Both networks of a generator of labels, without pickle."""
    status, said = run_script(work[0], "brainsyn.py", "--publish", "runs/labels", tmp_path
                              / "weights")
    assert status == 0 and said.count("sha256 ") == 2, said
    run, published = [requests.load_label_generator(its, torch.device("cpu"))
                      for its in (work[0] / "runs/labels", tmp_path / "weights")]
    wanted = requests.requested({"ET": (5.0, 5.0)}, 0, 1, 0)
    settings = {**bs.SAMPLING, "steps": 2}
    assert torch.equal(run.measured.nan_to_num(), published.measured.nan_to_num()) and len(
        run.measured) == 12
    assert torch.equal(*[requests.sample_labels(its, wanted, (0,), settings)
                         for its in (run, published)])
    status, said = run_script(work[0], "brainsyn.py", "--publish", "runs/labels", tmp_path
                              / "weights.npz")
    assert status == 2 and "name a folder" in said, said
    # one network, by its file
    assert runs.publish(work[0] / "runs/labels/fine/checkpoint.pt", tmp_path / "a.npz")


@pytest.mark.parametrize("words, sentence", [(["--request", "et=12", "--labels", "runs/phantoms/A"],
                                              "--request makes label maps of its own"),
                                             (["--request", "ventricles=12"],
                                              "runs/labels was not trained with --condition "
                                              "ventricles"),
                                             (["--request", "volume=12"], "--request volume=12: "
                                              "cannot be asked for"),
                                             (["--request", "et=12", "--label-checkpoint",
                                               "nowhere"], "nowhere"),
                                             (["--request", "et=12", "--label-checkpoint",
                                               "runs/ddpm"], "runs/ddpm")])
def test_requests_that_fail_say_why(work, words, sentence):
    """One sentence, nothing written."""
    status, said = run_script(work[0], "sample.py", *words, "--out", "failed")
    assert status == 2 and sentence in said and "Traceback" not in said, said
    assert not (work[0] / "failed").exists() or not list((work[0] / "failed").glob("BraTS*"))


@pytest.mark.parametrize("words, sentence", [(["--resolution", 40], "--resolution 40: labels need "
                                              "a multiple of 16"),
                                             (["--label-maps", "none.npz"],
                                              "none.npz: cannot be read"),
                                             (["--lesion-weight", 2], "--lesion-weight is for "
                                              "images"),
                                             (["--label-maps", "maps.npz", "--condition", "tissue"],
                                              "--label-maps is for --generate labels")])
def test_label_training_that_fails_says_why(work, words, sentence):
    """One sentence."""
    status, said = run_script(work[0], "train_ddpm.py", "--generate", "labels", *TINY, *words,
                              "--out", "runs/failed")
    assert status == 2 and sentence in said and "Traceback" not in said, said


def test_heads_that_do_not_fit_are_named(phantom_folder, tmp_path, capsys):
    """Volumes are three quarters of the field of view high; nobody is cut in silence."""
    cases = nifti.find_cases(phantom_folder)[:3]
    for fov, tall in ((192, False), (96, True)):
        args = train_ddpm.parse_arguments(f"--generate labels --resolution 32 --fov {fov} "
                                          "--relatives 2".split())
        label_training.heads_to_learn(args, slices.build_cache(cases, tmp_path, 32, args.fov, "tumour"))
        assert ("heads (" in capsys.readouterr().out) == tall


def test_label_maps_alone_are_learned(work):
    """How many were left out is said; the checkpoint knows them by their hashes and its data as
    patients'."""
    folder, _ = work
    label_maps(folder / "maps.npz")
    status, said = run_script(folder, "train_ddpm.py", "--generate", "labels", *TINY,
                              "--label-maps", "maps.npz", "--out", "runs/maps", "--batch", 4)
    assert status == 0 and "label maps: 2 in outlines of" in said and "0 show the tumour of a validation" in said, said
    state = runs.load_checkpoint(folder / "runs/maps/fine", "labels")
    plain = runs.load_checkpoint(folder / "runs/labels/fine", "labels")
    assert state["patients"] == plain["patients"] + 2 and state["data"] == "patients" and plain[
        "data"] == "phantoms"
    assert len(set(state["trained_on"]) - set(plain["trained_on"])) == 2


def test_label_benchmarks_run(work):
    """All four ways and the requests, hardly trained."""
    folder, _ = work
    status, said = run_script(folder, "tests/bench_labels.py", "ways", "--minutes", 0.01, "--words",
                              "--phantoms 6 --resolution 16 --width 16 --batch 8 --relatives 12")
    assert status == 0 and all(f"| {way} | " in said for way in ("blocks", "alone", "neighbour",
                                                                 "along z")), said
    status, said = run_script(folder, "tests/bench_labels.py", "asked", "runs/labels", "--count", 3,
                              "--calls", 2, "--guidance", 1, 2, "--candidates", 2, "--only", "ET",
                              "sphericity", "ventricles")
    assert status == 0 and "| ET | 2 |" in said and "| sphericity | 1 |" in said and "ventricles" not in said, said
    assert (folder / "runs/bench_labels/asked.png").exists()
    status, said = run_script(folder, "tests/bench_labels.py", "shapes", "runs/labels", "--calls",
                              2, "--words", "--phantoms 7 --resolution 32")
    assert status == 0 and "3 heads each" in said and "| ED | " in said and "generated: shape distance" in said, said
    assert "guessed from blocks" in said, said
    assert (folder / "runs/bench_labels/shapes.png").exists()


def test_ventricles_go_all_the_way(work):
    """Labels with ventricles, and scans from them; they can be asked for and are measured; an image
    generator that wants them is not served by labels without."""
    folder, more = work[0], [*TINY, "--resolution", 16, "--condition", "ventricles"]
    for words in (["train_ddpm.py", *more, "--out", "runs/fluid"],
                  ["train_ddpm.py", "--generate", "labels", *more, "--out", "runs/labels_fluid"],
                  ["sample.py", "--checkpoint", "runs/fluid", "--label-checkpoint",
                   "runs/labels_fluid", "--request", "et=5,ventricles=30", "--count", 1, "--steps",
                   2, "--out", "fluid"]):
        status, said = run_script(folder, *words)
        assert status == 0, said
    facts = json.loads(next((folder / "fluid").glob("*/*.json")).read_text())
    volumes, case = facts["VolumesML"], nifti.find_cases(folder / "fluid",
                                                         findings=(findings := []))[0]
    assert "ventricles" in volumes and "ventricles: asked 30.0 to 30.0 mL" in said, said
    image = nib.load(case.folder / writing.CLASSES_NAME.format(case.case))
    classes, voxel = np.asanyarray(image.dataobj), np.prod(image.header.get_zooms()) / 1000
    for name in ("ventricles", "ET"):
        at = facts["Classes"].index(name)
        assert (classes == at).sum() * voxel == pytest.approx(volumes[name], abs=0.01), name
    assert np.array_equal(bs.tumour_labels(classes, "ventricles"),
                          nifti.read_case(case)[1]) and not findings
    status, said = run_script(folder, "sample.py", "--checkpoint", "runs/fluid", "--request",
                              "et=5", "--out", "no")
    assert status == 2 and "train it with --generate labels --condition ventricles" in said, said


def test_the_worth_of_chosen_ventricles_is_measured(tmp_path, lay_phantoms):
    """The study, hardly trained: every arm has its row."""
    folder = lay_phantoms(tmp_path, 6, "runs/ventricles")
    status, said = run_script(folder, "tests/bench_ventricles.py", "--phantoms", 6, "--resolution",
                              32, "--count", 1, "--image-steps", 4, "--label-steps", 8, "--words",
                              "--width 16 --relatives 12 --batch 4", "--calls", 2, "--seg-steps", 3,
                              "--seeds", 1)
    assert status == 0 and "ventricles asked for" in said, said
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["real, exact", "real", "generated",
                                                "generated, flat", "real + generated",
                                                "real + generated, flat"], said
    assert all(math.isfinite(float(row[3])) for row in rows), said
