"""Batches, EMA, checkpoints, log, and whether a network learns at all."""
import argparse
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import files, runs


def test_every_row_comes_once_an_epoch():
    """The endless shuffle visits each row once an epoch, in a new order every epoch, and any
    stretch of it can be asked for by number."""
    rows = np.arange(100, 117)
    whole = bs.endless(rows, (0, "a"), 0, 51)
    for epoch in range(3):
        assert sorted(whole[17 * epoch:17 * (epoch + 1)]) == rows.tolist()
    assert whole[:17].tolist() != whole[17:34].tolist()
    assert np.array_equal(whole[11:40], bs.endless(rows, (0, "a"), 11, 29))
    assert not np.array_equal(whole, bs.endless(rows, (1, "a"), 0, 51))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_tumour_share_is_what_was_asked(share):
    """The flag's share of all draws, and a batch is a function of seed and step alone."""
    tumour, other = np.arange(10), np.arange(10, 40)
    batches = [bs.batch_rows(tumour, other, share, 0, step, 8) for step in range(50)]
    assert abs(np.mean(np.concatenate(batches) < 10) - share) < 0.01
    assert np.array_equal(batches[33], bs.batch_rows(tumour, other, share, 0, 33, 8))
    joined = np.concatenate([bs.batch_rows(tumour, other, share, 0, step, 16)
                             for step in range(25)])
    assert sorted(joined) == sorted(np.concatenate(batches)), "batch size changes what is drawn"


def test_batches_need_only_one_kind_of_slice():
    """A data set without tumour (or with nothing else) still trains."""
    rows, none = np.arange(10), np.array([], int)
    assert set(bs.batch_rows(none, rows, 0.5, 0, 0, 10)) == set(range(10))
    assert set(bs.batch_rows(rows, none, 0.5, 0, 0, 10)) == set(range(10))


def test_training_noise_covers_all_levels_evenly():
    """t lies in 1..T, one in each of B parts of the range; chance follows from seed and step."""
    t, eps, keep, mirror = bs.training_noise(0, 5, (8, 4, 16, 24), 0.1)
    assert sorted(((t - 1) * 8 // bs.T).tolist()) == list(range(8))
    again = bs.training_noise(0, 5, (8, 4, 16, 24), 0.1)
    assert torch.equal(t, again[0]) and torch.equal(eps, again[1])
    many = [bs.training_noise(0, step, (64, 1, 1, 1), 0.1) for step in range(200)]
    assert abs(torch.stack([m[2] for m in many]).mean() - 0.9) < 0.02
    assert abs(torch.stack([m[3] for m in many]).float().mean() - 0.5) < 0.02
    ts = torch.cat([m[0] for m in many])
    assert ts.min() == 1 and ts.max() == bs.T


def test_learning_rate_warms_up_and_ends_near_zero():
    """Linear warm-up, a cosine that follows progress, 1% of the peak at the end."""
    assert math.isclose(bs.learning_rate(1.0, 0.0, 0, warmup=100), 0.01)
    assert math.isclose(bs.learning_rate(1.0, 0.0, 99, warmup=100), 1.0)
    assert math.isclose(bs.learning_rate(1.0, 0.5, 500), 0.505)
    assert math.isclose(bs.learning_rate(1.0, 1.0, 500), 0.01)


@pytest.mark.a2("EMA.advanced")
@pytest.mark.parametrize("every", [1, 4, 10])
def test_ema_equals_its_closed_form(every):
    """EMA after n updates = sum of weights times (1 - keep_i) times the product of later keeps."""
    net = torch.nn.Linear(2, 2)
    ema = bs.EMA(net, decay=0.97, every=every)
    history, keeps = [net.weight.detach().clone().double()], [1.0]
    for step in range(1, 61):
        with torch.no_grad():
            net.weight += torch.randn(2, 2, generator=bs.generator(step))
        ema.update(net, step)
        if step % every == 0:
            history.append(net.weight.detach().clone().double())
            keeps.append(min(0.97, (1 + step) / (10 + step)) ** every)
    share = [(1 - k if i else 1.0) * math.prod(keeps[i + 1:]) for i, k in enumerate(keeps)]
    assert math.isclose(sum(share), 1.0)
    closed_form = sum(s * w for s, w in zip(share, history))
    assert torch.allclose(ema.weights["weight"].double(), closed_form, atol=1e-5), (
        "look at: decay to the power of count; the smaller decay of early steps; and which of both "
        "factors belongs to the average, which to the network")


@pytest.mark.a2("EMA.advanced")
def test_ema_forgets_the_random_start_of_a_short_run():
    """Too young an EMA gives noise: after 300 steps less than 1% of the start is left."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 100.0)
    ema = bs.EMA(net, decay=0.9999)
    torch.nn.init.constant_(net.weight, 0.0)
    for step in range(1, 301):
        ema.update(net, step)
    assert 0 <= ema.weights["weight"].item() < 1.0, (
        "after 300 steps more than 1% of the random start is left: the decay of a young average is "
        "min(decay, (1 + step) / (10 + step))")


def test_samples_of_a_run_of_any_length_use_all_of_it():
    """Pictures drawn between two updates count the steps since, and leave the average alone."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 1.0)
    ema = bs.EMA(net, every=10)
    torch.nn.init.constant_(net.weight, 0.0)
    ema.update(net, 4)
    assert ema.weights["weight"].item() == 1.0
    assert math.isclose(ema.copy_of(net, 4).weight.item(), (5 / 14) ** 4, rel_tol=1e-5)
    assert ema.weights["weight"].item() == 1.0 and ema.copy_of(net, 10).weight.item() == 1.0


def test_checkpoints_come_back_and_the_one_before_is_kept(tmp_path):
    """Newest first; when its bytes are damaged the previous one is used, and that is said."""
    for step in (1, 2):
        runs.save_checkpoint(tmp_path, {**dict.fromkeys(runs.HOLDS["ddpm"], 0), "kind": "ddpm",
                                        "step": step, "weights": {"a": torch.arange(5.0)}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert runs.load_checkpoint(tmp_path)["step"] == 2
    raw = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    at = raw.index(torch.arange(5.0).numpy().tobytes())
    raw[at + 7] ^= 16                            # one bit of one weight
    (tmp_path / "checkpoint.pt").write_bytes(raw)
    said = []
    assert runs.load_checkpoint(tmp_path,
                                say=said.append)["step"] == 1 and "cannot be used" in said[0]
    with pytest.raises(bs.BadInput, match="checksum"):
        runs.load_checkpoint(tmp_path / "checkpoint.pt")


def test_checkpoints_run_no_code(tmp_path):
    """A pickle can call anything on loading; ours refuses all but data."""
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it went off",)
    torch.save({"kind": "ddpm", "step": 1, "bomb": Bomb()}, tmp_path / "checkpoint.pt")
    with pytest.raises(bs.BadInput):
        runs.load_checkpoint(tmp_path)
    assert not (tmp_path / "it went off").exists()


def test_no_checkpoint_is_one_clear_sentence(tmp_path):
    """The message says what to run."""
    with pytest.raises(bs.BadInput, match="train_ddpm.py"):
        runs.load_checkpoint(tmp_path)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Function: kind of checkpoint -> the Run of a network of one number in tmp_path."""
    monkeypatch.setattr(files, "catch_signals", list)

    def begin(kind="ddpm"):
        net = torch.nn.Linear(1, 1)
        args = argparse.Namespace(out=str(tmp_path), steps=100, minutes=None, batch=4)
        facts = dict.fromkeys(runs.HOLDS[kind] - runs.TRAINING - {"kind", "version", "step", "args",
                                                                  "ema"}, 0)
        return runs.Run(args, kind, net, bs.EMA(net),
                        bs.make_optimizer(net, 1e-3, torch.device("cpu")), facts)

    return begin


def test_log_has_four_noise_bins_and_no_step_twice(begin, tmp_path, capsys):
    """Bins are quarters of t; rows after the step that a run resumes from are dropped."""
    run = begin()
    run.after_step(True, torch.tensor([1.0, 2.0, 3.0, 4.0]), None,
                   torch.tensor([250, 251, 750, 751]))
    run.write_line()
    row, = runs.read_log(tmp_path / "log.csv")
    assert [row[name] for name in runs.QUARTERS] == [1.0, 2.0, 3.0, 4.0] and row["loss"] == 2.5
    assert "step 00001/100 | loss 2.5000 | lr 1.0e-03" in capsys.readouterr().out
    run.save()
    step = (True, torch.ones(4), None, torch.tensor([1, 300, 600, 1000]))
    run.after_step(*step)
    run.write_line()
    resumed = begin()
    assert resumed.step == 1
    for _ in range(2):
        resumed.after_step(*step)
    resumed.write_line()
    assert [row["step"] for row in runs.read_log(tmp_path / "log.csv")] == [1, 3]


@pytest.mark.parametrize("kind, columns", [("ddpm", runs.QUARTERS), ("seg", ("val_dice",))])
def test_a_line_without_a_sound_step_has_no_loss(begin, tmp_path, kind, columns):
    """Where every step since the last line was left out there is nothing to average: NaN, in every
    loss column."""
    run = begin(kind)
    run.step = 7
    run.write_line(0.5)
    row, = runs.read_log(tmp_path / "log.csv")
    assert list(row) == ["step", "loss", *columns, "lr", "images_per_s", "seconds"]
    assert row["step"] == 7 and row.get("val_dice", 0.5) == 0.5
    assert all(math.isnan(row[name]) for name in ("loss", *columns) if name != "val_dice")


@pytest.mark.parametrize("flag, value", [("loss", "v"), ("min_snr", 5.0), ("lesion_weight", 2.0),
                                         ("optimizer", "adamw"), ("encoder", "its sha256")])
def test_a_run_with_a_dropped_flag_is_not_continued_in_silence(begin, flag, value):
    """A checkpoint of a former version whose loss or optimiser was another one: one sentence. With
    the one that is left it goes on, compiled or not."""
    former = begin()
    vars(former.args).update(runs.DROPPED, compile=True)
    former.save()
    assert begin().saved_step == 0
    setattr(former.args, flag, value)
    former.save()
    with pytest.raises(bs.BadInput, match=f"a run with {flag} {value} where .*another --out"):
        begin()


def two_slices():
    """Two axial slices, one modality: half brain (class 1, values 0 and 0.2), half ET (1.0)."""
    x0, classes = torch.ones(2, 1, 4, 6), torch.full((2, 4, 6), 4)
    x0[..., :3] = torch.tensor([0.0, 0.2]).view(2, 1, 1, 1)
    classes[..., :3] = 1
    return x0, classes, bs.places(2, 0)


def test_prior_by_hand():
    """Mean and spread of the pixels of each class; 0 and 0.5 for one that never occurs; the atlas
    knows the two heights apart, and both sides alike."""
    prior = bs.measure_prior([two_slices()], "tumour", size=2)
    mean, std = prior["classes"][:, :, 0]
    assert torch.allclose(mean, torch.tensor([0.0, 0.1, 0, 0, 1.0, 0.55])) and std[0] == 0.5
    assert torch.allclose(std[[1, 4]], torch.tensor([0.1, 0.01]), atol=1e-5)
    atlas = prior["atlas"][0, 0]
    assert (atlas[0] < 0.09).all() and (atlas[1] > 0.11).all() and torch.allclose(atlas,
                                                                                  atlas.flip(-1))
    assert "atlas" not in bs.measure_prior([two_slices()], "tissue")


def test_one_batch_can_be_learned(cache):
    """If the loss on a single batch does not fall below a tenth, something in the step is wrong."""
    x0, classes, place = cache.batch(cache.part("train")[10:14])
    prior = bs.measure_prior(cache.batches(cache.part("train", [0])), "tumour")
    alpha_bar = bs.cosine_alpha_bar()
    t, eps = torch.tensor([150, 400, 700, 950]), torch.randn(x0.shape)
    signal, sigma = bs.signal_sigma(alpha_bar, t)
    x_t, v = bs.add_noise(x0, eps, signal, sigma), bs.v_target(x0, eps, signal, sigma)
    onehot = bs.one_hot(classes, 5)
    mean, std = bs.expected(prior, onehot, place)
    net, losses = bs.UNet(width=16, mults=(1, 2), patch=2), []
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(80):
        out = net(x_t, t, onehot, place)
        loss = ((bs.precondition(out, x_t, signal, sigma, mean, std) - v) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], f"{losses[0]:.4f} -> {losses[-1]:.4f}"


def test_averaged_networks_keep_the_batch_norms_as_they_are():
    """Parameters are averaged; running statistics, which are no parameters, come from the network
    itself."""
    net = bs.ResUNet()
    ema = bs.EMA(net, decay=0.9, every=1)
    net(torch.randn(4, 4, 32, 32))                                  # moves the statistics
    with torch.no_grad():
        net.head.bias += 1
    twin = ema.copy_of(net, 1)
    assert torch.equal(twin.encoder.bn1.running_mean, net.encoder.bn1.running_mean)
    assert twin.encoder.bn1.running_mean.abs().max() > 0 and not twin.training
    ema.update(net, 1)
    assert not torch.equal(ema.copy_of(net, 1).head.bias, net.head.bias)


@pytest.mark.a2("orthogonal")
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_orthogonalised_matrices_keep_their_directions(shape):
    """U diag(s) V^T becomes U diag(about 1) V^T: no direction is left behind, none is mixed into
    another."""
    matrix, other = [torch.randn(shape, generator=bs.generator(i), dtype=torch.float64)
                     for i in (3, 4)]
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ bs.orthogonal(torch.stack([100 * other, matrix]))[1] @ vt.T
    assert (s > s.max() * 0.05).sum() > 20 and s.max() > 5
    assert torch.allclose(inside, inside.diagonal().diag(), atol=1e-9), (
        "singular vectors must stay what they are: look at the order of products, and whether a "
        "tall matrix comes back tall")
    assert (inside.diagonal()[s > 0.1 * s.max()] - 0.95).abs().max() < 0.28, (
        "singular values must come near 1: is every matrix divided by its own norm, and are there "
        "five steps with the right factors?")


def test_muon_by_hand():
    """Two steps on a convolution's weight, whose row is all that one output reads, against singular
    values: each goes through the polynomial five times, whatever its size. The bias learns by
    AdamW."""
    torch.manual_seed(0)
    conv, twin = torch.nn.Conv2d(2, 40, 3).double(), torch.nn.Conv2d(2, 40, 3).double()
    twin.load_state_dict(conv.state_dict())
    ours = bs.Muon([conv.bias], [conv.weight], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    plain = torch.optim.AdamW([twin.bias], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    weight, momentum = conv.weight.detach().clone(), 0.0
    for _ in range(2):
        gradient = torch.randn(40, 2, 3, 3, dtype=torch.float64)
        conv.weight.grad = gradient.clone()
        conv.bias.grad = twin.bias.grad = gradient[:, 0, 0, 0]
        momentum = 0.95 * momentum + 0.05 * gradient
        u, s, vt = torch.linalg.svd((0.95 * momentum + 0.05 * gradient).reshape(40, 18),
                                    full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
        weight = weight * (1 - 0.05 * 0.1) - 0.05 * (40 / 18) ** 0.5 * ((u * s) @ vt).view_as(
            weight)
        ours.step()
        plain.step()
    assert torch.allclose(conv.weight, weight, atol=1e-6) and torch.equal(conv.bias, twin.bias)


def test_muon_gets_what_lies_inside():
    """Matrices and convolutions, but for those that meet pixels, noise level or place; AdamW gets
    all the rest, and alone it is torch's."""
    net = bs.UNet(width=16, mults=(1, 2))
    inside = {id(p) for p in net.hidden()}
    names = {name for name, p in net.named_parameters() if id(p) in inside}
    assert {"middle1.to_scale_shift.weight", "attention.to_qkv.weight", "unfold.weight"} <= names
    assert all(p.ndim > 1 for p in net.hidden())
    assert not any(name.startswith(("conv_in", "conv_out", "fine_in", "time", "scalar"))
                   for name in names)
    first, second = bs.make_optimizer(net, 1e-3, torch.device("cpu"),
                                      hidden=net.hidden()).param_groups
    assert {id(p) for p in second["params"]} == inside
    assert {id(p) for p in first["params"]} | inside == {id(p) for p in net.parameters()}
    twin = copy.deepcopy(net)
    for network, optimizer in ((net, bs.make_optimizer(net, 1e-3, torch.device("cpu"))),
                           (twin, torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.99),
                                                    weight_decay=0.01, fused=True))):
        for step in range(3):
            for i, p in enumerate(network.parameters()):
                p.grad = torch.randn(p.shape, generator=bs.generator(step, i))
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))
