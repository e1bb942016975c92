"""Section 5: the U-Net and its preconditioning."""
import pytest
import torch

import brainsyn as bs


def small(**changes):
    """A small U-Net whose every part is awake: parts that start at zero would hide mistakes."""
    net = bs.UNet(**{"width": 16, "mults": (1, 2), "patch": 2, **changes})
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return net.eval()


def inputs(net, height=16, width=24, batch=2):
    """Random images, levels, label maps and slice positions."""
    classes = torch.randint(0, net.classes, (batch, height, width))
    return (torch.randn(batch, net.channels, height, width), torch.tensor([3, 700][:batch]),
            bs.one_hot(classes, net.classes), torch.full((batch, 1), 0.3))


@pytest.mark.parametrize("size", [(16, 24), (17, 23), (30, 9)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_any_height_and_width(size, patch):
    """Scans come in every size: output is shaped like the input, odd sizes included."""
    net = small(patch=patch)
    assert net(*inputs(net, *size)).shape == (2, 4, *size)


def test_any_number_of_channels():
    """Modalities and classes come from the data; output channels may differ from input channels."""
    net = small(channels=3, classes=7, out_channels=5)
    assert net(*inputs(net)).shape == (2, 5, 16, 24)


def test_a_new_network_says_zero():
    """The last layer starts at zero, so that training starts from the preconditioning's guess."""
    net = bs.UNet(width=16, mults=(1, 2))
    assert not net(*inputs(net)).any()


@pytest.mark.parametrize("what", ["labels", "t", "position", "image"])
def test_every_input_matters(what):
    """Users of other codes found samples that ignore the mask: change one input, the output changes."""
    net = small()
    x, t, onehot, position = inputs(net)
    before = net(x, t, onehot, position)
    changed = {"labels": (x, t, onehot.flip(1), position), "t": (x, t + 100, onehot, position),
               "position": (x, t, onehot, position - 0.5), "image": (x + 0.1, t, onehot, position)}[what]
    assert (net(*changed) - before).abs().max() > 1e-3, f"{what} does not reach the output"


def test_labels_are_not_ordered():
    """One channel k/255 makes ED a weaker ET; one-hot swaps of two classes must be told apart."""
    net = small()
    x, t, onehot, position = inputs(net)
    swapped = onehot[:, [0, 1, 2, 4, 3]]
    assert (net(x, t, swapped, position) - net(x, t, onehot, position)).abs().max() > 1e-3


def test_null_condition_is_not_the_empty_mask():
    """No label map is all zeros: an empty mask has air everywhere, which says a great deal."""
    net = small()
    x, t, onehot, position = inputs(net)
    empty = bs.one_hot(torch.zeros(2, 16, 24, dtype=torch.long), net.classes)
    null = torch.zeros_like(onehot)
    assert (empty.sum(1) == 1).all() and (null.sum(1) == 0).all()
    assert (net(x, t, null, position) - net(x, t, empty, position)).abs().max() > 1e-3


def test_each_scalar_has_a_null_of_its_own():
    """NaN means not given: different from 0, and one scalar's null leaves the others alive."""
    net = small(scalars=3)
    x, t, onehot, _ = inputs(net)
    outs = [net(x, t, onehot, torch.tensor([row, row])) for row in
            ([0., 0., 0.], [torch.nan, 0., 0.], [0., torch.nan, 0.], [torch.nan, 0.5, 0.])]
    assert all(torch.isfinite(out).all() for out in outs)
    for i in range(len(outs)):
        for j in range(i):
            assert (outs[i] - outs[j]).abs().max() > 1e-4, f"scalar rows {i} and {j} look the same"


def test_scalars_start_without_a_say():
    """Zero-initialised into the time embedding: a new condition can join a trained network."""
    net = bs.UNet(width=16, mults=(1, 2), scalars=2)
    t = torch.tensor([5, 900])
    a = net.embed(t, torch.tensor([[0.1, 0.9], [-1.0, torch.nan]]))
    assert torch.equal(a, net.embed(t, torch.full((2, 2), torch.nan)))


def test_parameters_reported_are_parameters_counted():
    """The layer table adds up: total line, sum of its rows, and the network itself."""
    net = bs.UNet(width=16, mults=(1, 2))
    lines = bs.layer_table(net, 32)
    rows = [int(line.split()[-1].replace(",", "")) for line in lines[1:]]
    assert rows[-1] == sum(rows[:-1]) == bs.count_parameters(net) == sum(p.numel() for p in net.parameters())


def test_precondition_is_the_best_v_for_gaussian_pixels():
    """With out = 0, v_hat must be the posterior mean of v where pixels are N(mean, std^2): checked by
    drawing, its error is prior_error and has no mean, at every level."""
    mean, std = torch.tensor([-0.4, 0.5]).view(1, 2, 1, 1), torch.tensor([0.3, 0.1]).view(1, 2, 1, 1)
    eps = torch.randn(4, 2, 128, 128)
    x0 = mean + std * torch.randn(4, 2, 128, 128)
    for t in (1, 100, 500, 900, bs.T):
        signal, sigma = bs.signal_sigma(bs.cosine_alpha_bar(), torch.full((4,), t))
        x_t, v = bs.add_noise(x0, eps, signal, sigma), bs.v_target(x0, eps, signal, sigma)
        error = bs.precondition(torch.zeros_like(x_t), x_t, signal, sigma, mean, std) - v
        expected = bs.prior_error(signal, sigma, std)[0].flatten()
        assert ((error.std((0, 2, 3)) / expected) - 1).abs().max() < 0.03, f"t {t}"
        assert (error.mean((0, 2, 3)).abs() < 0.05 * expected + 1e-3).all(), f"t {t}"
        more = bs.precondition(torch.ones_like(x_t), x_t, signal, sigma, mean, std) - v - error
        assert torch.allclose(more.mean((0, 2, 3)), expected, rtol=1e-3), "out enters with that size"


PRIOR = {"classes": torch.tensor([[[-1.0], [0.2], [0.6], [0.1]], [[0.01], [0.3], [0.2], [0.5]]]),
         "atlas": torch.stack([torch.full((4, 1, 16, 24), 0.4), torch.full((4, 1, 16, 24), 0.15)])
         * torch.arange(1, 5).view(1, 4, 1, 1, 1)}


def test_expected_takes_classes_atlas_and_null_apart():
    """Air and tumour from the class table, healthy brain from the atlas at this height, the table's
    last row without labels, the class table where the height is not given."""
    classes = torch.tensor([0, 1, 2]).view(1, 1, 3).expand(2, 16, 3).repeat(1, 1, 8)
    onehot = bs.one_hot(classes, 3)
    mean, std = bs.expected(PRIOR, onehot, torch.tensor([-1.0, torch.nan]))
    assert torch.allclose(mean[0, 0, 0, :3], torch.tensor([-1.0, 0.4, 0.6]))
    assert torch.allclose(std[0, 0, 0, :3], torch.tensor([0.01, 0.15, 0.2]))
    assert torch.allclose(mean[1, 0, 0, :3], torch.tensor([-1.0, 0.2, 0.6]))
    mean, _ = bs.expected(PRIOR, onehot, torch.tensor([0.0, 1.0]))
    assert torch.allclose(mean[:, 0, 0, 1], torch.tensor([0.4 * 2.5, 0.4 * 4])), "between slabs, and at the end"
    mean, std = bs.expected(PRIOR, 0 * onehot, torch.tensor([0.0, 1.0]))
    assert (mean == 0.1).all() and (std == 0.5).all()
