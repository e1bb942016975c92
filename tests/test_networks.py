"""The U-Net and its preconditioning."""
import pytest
import torch

import brainsyn as bs
from kit import pictures


def small(**changes):
    """A small U-Net whose every part is awake: parts that start at zero would hide mistakes."""
    net = bs.UNet(**{"width": 16, "mults": (1, 2), "patch": 2, **changes})
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return net.eval()


def inputs(net, height=16, width=24, batch=2):
    """Random images, levels, label maps and places of slices."""
    classes = torch.randint(0, net.classes, (batch, height, width))
    return (torch.randn(batch, net.channels, height, width), torch.tensor([3, 700][:batch]),
            bs.one_hot(classes, net.classes), torch.tensor([0.3, 1.0]).expand(batch, 2))


@pytest.mark.a2("ResBlock.forward", "Attention.forward")
@pytest.mark.parametrize("size", [(16, 24), (17, 23), (30, 9)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_any_height_and_width(size, patch):
    """Scans come in every size: output is shaped like the input, odd sizes included."""
    net = small(patch=patch)
    assert net(*inputs(net, *size)).shape == (2, 4, *size), (
        "a block must give back the height and width it gets, whatever they are")


@pytest.mark.a2("one_hot", "ResBlock.forward")
def test_any_number_of_channels():
    """Modalities and classes come from the data."""
    net = small(channels=3, classes=7)
    assert net(*inputs(net)).shape == (2, 3, 16, 24), (
        "channels are axis 1; their number is that of the arguments, never a fixed one")


def test_a_new_network_says_zero():
    """The last layer starts at zero, so that training starts from the preconditioning's guess."""
    net = bs.UNet(width=16, mults=(1, 2))
    assert not net(*inputs(net)).any()


@pytest.mark.a2("one_hot", "sinusoid", "ResBlock.forward")
@pytest.mark.parametrize("what", ["labels", "t", "position", "plane", "image"])
def test_every_input_matters(what):
    """Users of other codes found samples that ignore the mask: change one input, the output
    changes."""
    net = small()
    x, t, onehot, place = inputs(net)
    before = net(x, t, onehot, place)
    moved, turned = [place + torch.tensor(by) for by in ([-0.5, 0.0], [0.0, 1.0])]
    changed = {"labels": (x, t, onehot.flip(1), place), "t": (x, t + 100, onehot, place),
               "position": (x, t, onehot, moved), "plane": (x, t, onehot, turned),
               "image": (x + 0.1, t, onehot, place)}[what]
    assert (net(*changed) - before).abs().max() > 1e-3, f"{what} does not reach the output"


@pytest.mark.a2("one_hot")
def test_labels_are_not_ordered():
    """One channel k/255 makes ED a weaker ET; one-hot swaps of two classes must be told apart."""
    net = small()
    x, t, onehot, place = inputs(net)
    swapped = onehot[:, [0, 1, 2, 4, 3]]
    difference = (net(x, t, swapped, place) - net(x, t, onehot, place)).abs().max()
    assert difference > 1e-3, "two classes were exchanged and the network did not notice"


@pytest.mark.a2("one_hot")
def test_null_condition_is_not_the_empty_mask():
    """No label map is all zeros: an empty mask has air everywhere, which says a great deal."""
    net = small()
    x, t, onehot, place = inputs(net)
    empty = bs.one_hot(torch.zeros(2, 16, 24, dtype=torch.long), net.classes)
    null = torch.zeros_like(onehot)
    assert (empty.sum(1) == 1).all(), "every pixel must have exactly one 1, those of air too"
    difference = (net(x, t, null, place) - net(x, t, empty, place)).abs().max()
    assert difference > 1e-3, "a label map of air looks the same as no label map"


@pytest.mark.a2("sinusoid")
def test_each_scalar_has_a_null_of_its_own():
    """NaN means not given: different from 0, and one scalar's null leaves the others alive."""
    net = small(scalars=3)
    x, t, onehot, _ = inputs(net)
    outs = [net(x, t, onehot, torch.tensor([row, row])) for row in
            ([0., 0., 0.], [torch.nan, 0., 0.], [0., torch.nan, 0.], [torch.nan, 0.5, 0.])]
    assert all(torch.isfinite(out).all() for out in outs), "NaN means not given and must not spread"
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
    lines = pictures.layer_table(net, 32)
    rows = [int(line.split()[-1].replace(",", "")) for line in lines[1:]]
    assert rows[-1] == sum(rows[:-1]) == pictures.count_parameters(net) == sum(p.numel()
                                                                         for p in net.parameters())


@pytest.mark.a2("one_hot")
def test_one_hot_by_hand():
    """Class k of a pixel is a 1 in channel k, and channels come before height and width."""
    onehot = bs.one_hot(torch.tensor([[[0, 2, 1], [1, 0, 3]]]), 5)
    assert onehot.shape == (1, 5, 2, 3), "channels come second: (B, n_classes, H, W)"
    assert onehot.dtype == torch.float32 and (onehot.sum(1) == 1).all(), (
        "float32, and exactly one 1 a pixel")
    assert onehot[0, :, 0].T.tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]], (
        "class k must be a 1 in channel k")


@pytest.mark.a2("sinusoid")
def test_sinusoid_by_hand():
    """Sines, then cosines, of the value over wavelengths in even ratios: 1 and 1/100 of it for dim
    4."""
    value = torch.tensor([0.0, 1.5, 700.0])
    expected = torch.stack([value.sin(), (value / 100).sin(), value.cos(), (value / 100).cos()], 1)
    assert torch.allclose(bs.sinusoid(value, 4), expected, atol=1e-4), (
        "for dim 4: sin(value), sin(value / 100), cos(value), cos(value / 100), in this order")
    assert bs.sinusoid(torch.arange(5), 12).shape == (5, 12), "integers (B,) in, (B, dim) out"


def plain_norm(x, norm, size=16):
    """GroupNorm written out: mean 0 and variance 1 over each group of `size` channels and all
    pixels."""
    groups = x.unflatten(1, (-1, size))
    centred = groups - groups.mean((2, 3, 4), keepdim=True)
    scaled = centred / (centred.square().mean((2, 3, 4), keepdim=True) + norm.eps).sqrt()
    return scaled.flatten(1, 2) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def awake(module):
    """The module with every parameter drawn at random."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


@pytest.mark.a2("ResBlock.forward")
@pytest.mark.parametrize("c_out", [32, 48])
def test_a_residual_block_by_hand(c_out):
    """Both norms, both SiLUs, scale and shift from the embedding, and the input added at the
    end."""
    block, x, emb = awake(bs.ResBlock(32, c_out, 24)), torch.randn(2, 32, 6, 9), torch.randn(2, 24)
    conv = torch.nn.functional.conv2d

    def silu(h):
        return h * h.sigmoid()

    h = conv(silu(plain_norm(x, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
    scale_and_shift = emb @ block.to_scale_shift.weight.T + block.to_scale_shift.bias
    scale, shift = scale_and_shift.view(2, 2, c_out, 1, 1).unbind(1)
    h = plain_norm(h, block.norm2) * (1 + scale) + shift
    h = conv(silu(h), block.conv2.weight, block.conv2.bias, padding=1)
    assert torch.allclose(block(x, emb), h + block.skip(x), atol=1e-3), (
        "compare step by step: norm1, SiLU, conv1; norm2 times (1 + scale), plus shift; SiLU, "
        "conv2; plus skip(x)")


@pytest.mark.a2("Attention.forward")
@pytest.mark.parametrize("channels", [64, 128])
def test_attention_by_hand(channels):
    """Every pixel is asked about all pixels, head by head: softmax(q k^T / sqrt(64)) v, and the
    input added."""
    layer, x = awake(bs.Attention(channels)), torch.randn(2, channels, 3, 5)
    qkv = torch.einsum("oc,bchw->bohw", layer.to_qkv.weight[..., 0, 0], plain_norm(x, layer.norm))
    q, k, v = (qkv + layer.to_qkv.bias.view(-1, 1, 1)).flatten(2).view(2, 3, channels, 15).unbind(1)
    out = torch.empty_like(q)
    for head in range(0, channels, 64):
        channels_of_head = slice(head, head + 64)
        # (B, asking pixel, pixel)
        weight = (q[:, channels_of_head].mT @ k[:, channels_of_head] / 8).softmax(-1)
        out[:, channels_of_head] = v[:, channels_of_head] @ weight.mT
    out = torch.einsum("oc,bcn->bon", layer.to_out.weight[..., 0, 0], out) + layer.to_out.bias.view(
        -1, 1)
    assert torch.allclose(layer(x), x + out.view_as(x), atol=1e-2, rtol=1e-3), (
        "look at: norm first; q, k, v in this order, each head by head; 1/sqrt(channels of a "
        "head); softmax over the pixels that are looked at; axes back in place; plus x")


@pytest.mark.a1("prior_error", "precondition")
def test_precondition_is_the_best_v_for_gaussian_pixels():
    """With out = 0, v_hat must be the posterior mean of v where pixels are N(mean, std^2): checked
    by drawing, its error is prior_error and has no mean, at every level."""
    mean = torch.tensor([-0.4, 0.5]).view(1, 2, 1, 1)
    std = torch.tensor([0.3, 0.1]).view(1, 2, 1, 1)
    eps = torch.randn(4, 2, 128, 128)
    x0 = mean + std * torch.randn(4, 2, 128, 128)
    for t in (1, 100, 500, 900, bs.T):
        signal, sigma = bs.signal_sigma(bs.cosine_alpha_bar(), torch.full((4,), t))
        x_t = bs.add_noise(x0, eps, signal, sigma)
        v = bs.v_target(x0, eps, signal, sigma)
        error = bs.precondition(torch.zeros_like(x_t), x_t, signal, sigma, mean, std) - v
        expected = bs.prior_error(signal, sigma, std)[0].flatten()
        assert ((error.std((0, 2, 3)) / expected) - 1).abs().max() < 0.03, (
            f"at t = {t} the guess is off by another amount than prior_error says")
        assert (error.mean((0, 2, 3)).abs() < 0.05 * expected + 1e-3).all(), (
            f"at t = {t} the guess is too high or too low on average: look at how mean enters")
        more = bs.precondition(torch.ones_like(x_t), x_t, signal, sigma, mean, std) - v - error
        assert torch.allclose(more.mean((0, 2, 3)), expected, rtol=1e-3), (
            "out, the network's part, must be multiplied by prior_error")


def ramp(axis, n=4):
    """An atlas (2, 1, n, n, n) whose mean is 0.4 (1, 2 ...) along an axis, std 0.15 of these."""
    steps = torch.arange(1.0, n + 1).view([-1 if i == axis else 1 for i in range(3)])
    steps = steps.expand(n, n, n)
    return torch.stack([0.4 * steps, 0.15 * steps])[:, None]


TABLE = torch.tensor([[[-1.0], [0.2], [0.6], [0.1]], [[0.01], [0.3], [0.2], [0.5]]])


def test_expected_takes_classes_atlas_and_null_apart():
    """Air and tumour from the class table, healthy brain from the atlas at this place, the table's
    last row without labels."""
    prior = {"classes": TABLE, "atlas": ramp(0)}
    classes = torch.tensor([0, 1, 2]).view(1, 1, 3).expand(2, 16, 3).repeat(1, 1, 8)
    onehot, place = bs.one_hot(classes, 3), torch.tensor([[-0.75, 0.0], [0.0, 0.0]])
    mean, std = bs.expected(prior, onehot, place)
    assert torch.allclose(mean[0, 0, 0, :3], torch.tensor([-1.0, 0.4, 0.6]))
    assert torch.allclose(std[0, 0, 0, :3], torch.tensor([0.01, 0.15, 0.2]))
    assert torch.allclose(mean[1, 0, :, 1], torch.tensor(0.4 * 2.5)), "between two middles"
    mean, _ = bs.expected(prior, onehot, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert torch.allclose(mean[:, 0, 0, 1], torch.tensor([1.6, 0.4])), "beyond the outer middles"
    mean, std = bs.expected(prior, 0 * onehot, place)
    assert (mean == 0.1).all() and (std == 0.5).all()


@pytest.mark.parametrize("axis", range(3))
def test_the_atlas_is_cut_as_the_head_is(axis):
    """A volume that rises along one axis, cut in three planes: what is expected of the slices is
    that volume, cut by `turned`."""
    brain = torch.ones(4, 4, 4, dtype=torch.long)
    for plane in range(3):
        mean, std = bs.expected({"classes": TABLE, "atlas": ramp(axis)}, bs.one_hot(brain, 3),
                                bs.places(4, plane))
        for part, atlas in zip((mean, std), ramp(axis)):
            assert torch.allclose(bs.turned(part, plane), atlas.movedim(0, 1), atol=1e-6)
