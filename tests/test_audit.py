"""kit/audit.py: an audit that cannot fail is worth nothing, so most of these plant a leak and want
it named."""
import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import audit, nifti, slices

TUMOUR = "tumour"


@pytest.fixture(scope="module")
def pool(many_phantoms):
    """Slices of 44 phantoms, as the audit compares them: (images, classes, places)."""
    cases = [slices.prepare_case(case, 32, 192.0, TUMOUR)
             for case in nifti.find_cases(many_phantoms)]
    places = [bs.places(32, 0)[audit.audit_rows(got["classes"])] for got in cases]
    return *audit.audit_slices(cases), torch.stack(places)


@pytest.fixture(scope="module")
def alike(pool):
    """Similarity of all phantoms to each other, (44, 10, 44)."""
    views = audit.audit_views(*pool[:2], TUMOUR)
    return audit.similarity(views, views, audit.mean_head(*views))


def deal(seed, sizes=(12, 12, 20)):
    """Numbers of training cases, decoys and synthetic cases, drawn from the pool without
    overlap."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(44)[:sum(sizes)])
    return order.split(sizes)


def found_among(synthetic, real, known):
    """What find_copies says of synthetic cases. synthetic: their similarity to real cases; real: of
    real cases to each other; known: which of these were trained on."""
    usual = audit.usual_nearness(synthetic, real, known)
    score, best, pair = audit.find_copies(synthetic, known, usual)
    return {"score": score, "slice": best, "pair": pair}


def find_in_pool(alike, training, decoys, synthetic, related=()):
    """found_among for cases of the pool in these parts; real cases in the order training, decoys.
    related: pairs (synthetic, real) that share a label map, numbers within their parts."""
    real = torch.cat([training, decoys])
    rows = alike[synthetic][:, :, real]
    for case, number in related:
        rows[case, :, number] = -1
    return found_among(rows, alike[real][:, :, real], torch.arange(len(real)) < len(training))


def take(pool, rows):
    """These cases of the pool."""
    return [part[rows] for part in pool]


@pytest.mark.a5("robust")
def test_fresh_heads_raise_no_alarm(alike):
    """Sixty times other phantoms are dealt as training cases, decoys and synthetic cases: none is
    ever named."""
    for seed in range(60):
        scores = find_in_pool(alike, *deal(seed))["score"]
        assert scores.max() < audit.LIMIT, f"deal {seed}: {scores.max():.1f}"


@pytest.mark.a5
def test_fractions_of_fresh_heads_are_chance(alike):
    """Nearer to training than to decoys in half of the slices, and p spread evenly over 0..1."""
    fractions, ps = [], []
    for seed in range(12):
        training, decoys, made = deal(seed)
        real, known = torch.cat([training, decoys]), torch.arange(24) < 12
        fraction, p = audit.nearer_share(alike[made][:, :, real], known, permutations=100)
        fractions.append(fraction)
        ps.append(p)
    assert abs(np.mean(fractions) - 0.5) < 0.05, fractions
    assert 0.3 < np.mean(ps) < 0.7 and min(ps) > audit.CHANCE, ps


def planted(pool, seed, kind, where, sizes=(12, 12, 20)):
    """One deal with training cases copied, as `kind`, into the synthetic ones. where: [(synthetic
    case, slices, training case)], numbers within their parts -> what found_among says of all
    synthetic cases."""
    training, decoys, made = deal(seed, sizes)
    real, synthetic = take(pool, torch.cat([training, decoys])), take(pool, made)
    for case, rows, number in where:
        copy = audit.canary(kind, real[0][number], real[1][number], synthetic[0][case].clone(),
                            seed)
        for part, changed in zip(synthetic, copy):
            part[case, rows] = changed[rows]
    views = audit.audit_views(*real[:2], TUMOUR)
    head = audit.mean_head(*views)
    alike = audit.similarity(audit.audit_views(*synthetic[:2], TUMOUR), views, head)
    known = torch.arange(sum(sizes[:2])) < sizes[0]
    return found_among(alike, audit.similarity(views, views, head), known)


@pytest.mark.a5("mean_head", "robust")
@pytest.mark.parametrize("seed", range(5))
def test_one_copied_slice_in_two_hundred_is_named(pool, seed):
    """A single slice, copied exactly, among 200: the case, the slice and the training case are
    named, nothing else."""
    found = planted(pool, seed, "copy", [(7, [4], 3)])
    assert found["score"][7] > audit.LIMIT and found["slice"][7] == 4 and found["pair"][7] == 3
    assert (torch.cat([found["score"][:7], found["score"][8:]]) < audit.LIMIT).all()


@pytest.mark.parametrize("kind", audit.CANARIES)
@pytest.mark.parametrize("seed", range(2))
def test_copies_are_found_under_what_hides_them(pool, kind, seed):
    """5% of the set are copies with noise, shifted by a pixel, mirrored, with another gamma,
    blended with another case: named, and named right."""
    found = planted(pool, seed, kind, [(11, slice(None), 5)])
    assert found["score"][11] > audit.LIMIT and found["pair"][11] == 5
    assert (found["score"] > audit.LIMIT).sum() == 1


def test_canaries_are_what_they_are_called(pool):
    """Nothing, noise of 0.15, a shift of a 32nd of the picture (a pixel at least), a mirror, a
    gamma, a blend."""
    images, classes, other = pool[0][0], pool[1][0], pool[0][1]
    made = {kind: audit.canary(kind, images, classes, other, 0) for kind in audit.CANARIES}
    for kind in ("copy", "noise", "gamma", "blend"):
        assert torch.equal(made[kind][1], classes)
    assert torch.equal(made["copy"][0], images)
    assert abs((made["noise"][0] - images).std() - 0.15) < 0.01
    for shifted, original in zip(made["shift"], (images, classes)):
        assert torch.equal(shifted[..., 1:, 1:], original[..., :-1, :-1])
        assert not torch.equal(shifted, original)
    half = images[..., ::2, ::2]
    shifted, _ = audit.canary("shift", half, classes[..., ::2, ::2], None, 0)
    assert torch.equal(shifted[..., 1:, 1:], half[..., :-1, :-1])
    for flipped, original in zip(made["flip"], (images, classes)):
        assert torch.equal(flipped, original.flip(-1))
    assert torch.allclose(made["gamma"][0][images == 0], torch.tensor(2 * 0.5 ** 1.6 - 1))
    assert torch.allclose(made["blend"][0], images * 0.6 + other * 0.4)


def test_a_set_that_is_mostly_copies_is_named(pool):
    """Where the median case, real ones counted, is a copy, nothing stands out of the set: what does
    is how near it is beside the distances among real cases."""
    found = planted(pool, 0, "noise", [(i, slice(None), i % 8) for i in range(28)], (8, 8, 28))
    assert (found["score"] > audit.LIMIT).all() and (found["pair"] == torch.arange(28) % 8).all()


@pytest.mark.a5
def test_swapping_who_was_trained_on_mirrors_the_fraction(alike):
    """The fraction and that of decoys add up to 1, but for which cases were drawn: nothing prefers
    a group but the data."""
    training, decoys, made = deal(1, (16, 8, 20))
    values, known = alike[made][:, :, torch.cat([training, decoys])], torch.arange(24) < 16
    # half of them are copies of training case 3
    values[:10, :, 3] = 0.9
    first, second = [audit.nearer_share(values, labels, permutations=1)[0]
                     for labels in (known, ~known)]
    assert abs(first + second - 1) < 0.03 and first > 0.55


def test_gain_and_offset_do_not_hide_a_copy(pool):
    """Any brightness and contrast of a modality give the same view."""
    images, classes, _ = take(pool, torch.arange(3))
    gain = torch.tensor([0.5, 1, 2, 0.7]).view(4, 1, 1)
    offset = torch.tensor([0.3, -0.2, 0.1, 0.0]).view(4, 1, 1)
    view, mask = audit.audit_views(images, classes, TUMOUR)
    other, same = audit.audit_views(images * gain + offset, classes, TUMOUR)
    assert torch.equal(mask, same) and (view - other).abs().max() < 0.05 and view.abs().max() > 1


def test_what_a_label_map_demands_is_no_copy(pool, alike):
    """A synthetic case is not compared with the case that lent its outline: that one must be
    alike."""
    training, decoys, made = deal(2)
    made = torch.cat([made[:-1], training[4:5]])                # its own training case, exactly
    found = find_in_pool(alike, training, decoys, made)
    assert found["score"][-1] > audit.LIMIT and found["pair"][-1] == 4
    found = find_in_pool(alike, training, decoys, made, related=[(-1, 4)])
    assert found["score"][-1] < audit.LIMIT


@pytest.mark.a5
def test_the_larger_group_does_not_win_by_its_size():
    """20 training cases and 8 decoys, likenesses drawn by lot: half, and not 20 in 28."""
    alike, known = torch.rand(20, 10, 28, generator=bs.generator("lot")), torch.arange(28) < 20
    for training in (known, ~known):
        assert abs(audit.nearer_share(alike, training, permutations=1)[0] - 0.5) < 0.06


def test_the_same_cases_are_drawn_whoever_was_trained_on():
    """The library's draws do not depend on which group is which: both fractions add up to 1
    exactly. Other right answers may draw otherwise, so this is no test of a5."""
    alike, known = torch.rand(20, 10, 28, generator=bs.generator("lot")), torch.arange(28) < 20
    first, second = [audit.nearer_share(alike, training, permutations=1)[0]
                     for training in (known, ~known)]
    assert abs(first + second - 1) < 1e-9


@pytest.mark.a5
def test_the_mean_head_by_hand():
    """Two heads of two pixels, left and right: the left one covered by both, the right one by one
    of them."""
    view = torch.tensor([[1.0, 3], [5, 7]]).view(2, 1, 1, 1, 2)
    mask = torch.tensor([[1.0, 0], [1, 1]]).view(2, 1, 1, 1, 2)
    expected = torch.full((1, 1, 1, 2), (1 + 5 + 7) / (2 + 1 + 1))
    assert torch.equal(audit.mean_head(view, mask), expected)


@pytest.mark.a5
def test_one_wild_value_moves_neither_middle_nor_spread():
    """Median 2, and distances from it 2, 1, 0, 1 and 98."""
    middle, spread = audit.robust(torch.tensor([0.0, 1, 2, 3, 100]))
    assert middle == 2 and abs(spread - 1.4826) < 1e-4


@pytest.mark.a5
def test_auc_by_hand():
    """Two above two is 1, mixed evenly 0.5, ties count half; p of the best of three against three
    is 1 in 20."""
    assert audit.membership(np.array([3.0, 4]), np.array([1.0, 2]))[0] == 1
    assert audit.membership(np.array([1.0, 4]), np.array([2.0, 3]))[0] == 0.5
    assert audit.membership(np.array([1.0, 2]), np.array([1.0, 2]))[0] == 0.5
    assert abs(audit.membership(np.array([4.0, 5, 6]), np.array([1.0, 2, 3]))[1] - 1 / 20) < 0.015


def learn(pool, rows, steps, every):
    """A generator of a few hundred thousand weights, trained on every so many slices of these cases
    of the pool."""
    x0, classes, place = [part[rows][:, ::every].flatten(0, 1) for part in pool]

    prior = bs.measure_prior([(x0, classes, place)], TUMOUR)
    alpha_bar = bs.cosine_alpha_bar(2.0)
    torch.manual_seed(0)
    net = bs.UNet(width=32, mults=(1, 2), patch=4)
    optimizer = bs.make_optimizer(net, 2e-3, torch.device("cpu"))
    ema = bs.EMA(net, 0.99)
    for step in range(steps):
        at = torch.from_numpy(bs.endless(np.arange(len(x0)), (0, "audit"), 16 * step, 16))
        t, eps, keep, _ = bs.training_noise(0, step, (16, 4, 32, 32), 0.1)
        onehot = bs.one_hot(classes[at], 5)
        signal, sigma = bs.signal_sigma(alpha_bar, t)
        mean, std = bs.expected(prior, onehot, place[at])
        for group in optimizer.param_groups:
            group["lr"] = bs.learning_rate(2e-3, step / steps, step)
        x_t = bs.add_noise(x0[at], eps, signal, sigma)
        v_hat = bs.precondition(net(x_t, t, onehot, place[at]), x_t, signal, sigma, mean, std)
        ((v_hat - bs.v_target(x0[at], eps, signal, sigma)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(net, step + 1)
    return bs.Denoiser(ema.copy_of(net, steps), prior, alpha_bar, torch.device("cpu"))


def untrained():
    """A generator that has learned nothing."""
    torch.manual_seed(0)
    prior = {"classes": torch.stack([torch.zeros(6, 4), torch.full((6, 4), 0.5)])}
    return bs.Denoiser(bs.UNet(width=16, mults=(1,), patch=4).eval(), prior, bs.cosine_alpha_bar(),
                       torch.device("cpu"))


def redrawn(denoiser, pool, seed):
    """What audit calls redraw, of these cases and a generator of slices."""
    return lambda i: bs.sample_guided(denoiser, bs.one_hot(pool[1][i], 5), [pool[2][i]],
                                      (seed, int(i)), {**bs.SAMPLING, "steps": 10})


def audited(pool, training, masks, denoiser, few=12):
    """The audit of a set sampled from the label maps of these cases of the pool."""
    synthetic = torch.stack([redrawn(denoiser, pool, 5)(i) for i in masks]), pool[1][masks]
    related = torch.zeros(len(masks), 44, dtype=torch.bool)
    related[torch.arange(len(masks)), masks] = True
    known = torch.zeros(44, dtype=torch.bool)
    known[training] = True
    return audit.audit(synthetic, related, pool[:2], known, TUMOUR, redrawn(denoiser, pool, 0), few)


@pytest.mark.slow
def test_where_planted_copies_are_missed_nothing_is_cleared(pool, monkeypatch):
    """An untrained generator leaks nothing; but only if planted copies were found is that called
    so; and a share above chance is a leak though no case is named."""
    training, decoys, _ = deal(3, (24, 20, 0))
    denoiser = untrained()
    report, pairs = audited(pool, training, decoys[:8], denoiser, few=3)
    assert report["verdict"] == "none found" and len(pairs) == 8, report
    assert "below 37.5%" in report["words"] and "private" not in report["words"]
    assert set(report["canaries_found"]) == set(audit.CANARIES)
    monkeypatch.setattr(audit, "plant_canaries", lambda *_: {"copy": 1.0, "noise": 0.75})
    report, _ = audited(pool, training, decoys[:8], denoiser, few=3)
    assert report["verdict"] == "underpowered" and "copy 100%, noise 75%." in report["words"]
    monkeypatch.setattr(audit, "nearer_share", lambda *_: (0.7, audit.CHANCE / 2))
    report, _ = audited(pool, training, decoys[:8], denoiser, few=3)
    assert report["verdict"] == "leak" and report["copies"] == 0


@pytest.mark.slow
def test_a_case_that_repeats_the_scan_of_its_label_map_is_named(pool):
    """Parts A and B leave that pair out, part C does not: its similarity is compared with that of
    decoys to samples from their label maps."""
    training, decoys, made = deal(3, (12, 12, 8))
    synthetic = take(pool[:2], made)
    for part, source in zip(synthetic, pool):
        part[5] = source[training[2]]
    related = torch.zeros(8, 24, dtype=torch.bool)
    related[5, 2] = True
    real = take(pool, torch.cat([training, decoys]))
    report, pairs = audit.audit(synthetic, related, real[:2], torch.arange(24) < 12, TUMOUR,
                                redrawn(untrained(), real, 0), 6)
    assert report["copies"] == 1 and report["verdict"] == "leak"
    assert pairs[0][0] == 5 and pairs[0][2] == 2


@pytest.mark.slow
def test_a_network_that_memorised_is_caught(pool):
    """12 phantoms, two slices of each, 300 steps: their scans come back from their label maps, and
    the set is called a leak. (That the default generator is not is in test_learning.py.)"""
    training, decoys, _ = deal(4, (12, 20, 0))
    report, _ = audited(pool, training, torch.cat([decoys[:8], training[:8]]),
                        learn(pool, training, 300, every=5))
    print(report["words"])
    assert report["verdict"] == "leak" and report["copies"] >= 1, report
    assert report["reproduction_auc"] > 0.95, report
