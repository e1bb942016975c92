"""Section 4: the noise process."""
import math

import pytest
import torch

import brainsyn as bs

X0, EPS = torch.randn(2, 3, 16, 24, dtype=torch.float64), torch.randn(2, 3, 16, 24,
                                                                      dtype=torch.float64)


@pytest.mark.a1
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_schedule_begins_clean_and_ends_in_pure_noise(shift):
    """Zero terminal SNR, exactly: otherwise samplers start from noise that still knows the mean."""
    alpha_bar = bs.cosine_alpha_bar(shift)
    assert alpha_bar.shape == (bs.T + 1,) and alpha_bar.dtype == torch.float64
    assert alpha_bar[0] == 1 and alpha_bar[-1] == 0
    assert (alpha_bar[1:] < alpha_bar[:-1]).all(), "noise must grow with t"


@pytest.mark.a1
def test_cosine_means_equal_angles():
    """signal = cos(t/T pi/2): at half time the angle is 45 degrees."""
    alpha_bar = bs.cosine_alpha_bar()
    assert math.isclose(alpha_bar[bs.T // 2], 0.5, rel_tol=1e-12)
    assert math.isclose(alpha_bar[bs.T // 3].sqrt(), math.cos(333 / 1000 * math.pi / 2),
                        rel_tol=1e-12)


@pytest.mark.a1
def test_shift_multiplies_the_root_of_snr():
    """The resolution shift is one factor on sqrt(snr), the same at every t."""
    plain, shifted = bs.cosine_alpha_bar()[1:-1], bs.cosine_alpha_bar(0.5)[1:-1]
    ratio = (shifted / (1 - shifted)).sqrt() / (plain / (1 - plain)).sqrt()
    assert torch.allclose(ratio, torch.full_like(ratio, 0.5))


@pytest.mark.a1
def test_signal_and_sigma_share_the_power():
    """signal^2 + sigma^2 = 1 at every t, so that x_t keeps the variance of x0 = 1."""
    signal, sigma = bs.signal_sigma(bs.cosine_alpha_bar(), torch.arange(bs.T + 1))
    assert signal.shape == (bs.T + 1, 1, 1, 1) and signal.dtype == torch.float32
    assert torch.allclose(signal ** 2 + sigma ** 2, torch.ones(()), atol=1e-6)


@pytest.mark.a1
def test_v_is_the_derivative_of_x_t():
    """v = d x_t / d angle: that is why it stays well-behaved from clean to pure noise."""
    angle = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x_t = bs.add_noise(X0, EPS, angle.cos(), angle.sin())
    grad = torch.stack([torch.autograd.grad(x, angle, retain_graph=True)[0]
                        for x in x_t[0, 0, 0, :5]])
    v = bs.v_target(X0, EPS, angle.cos(), angle.sin())[0, 0, 0, :5]
    assert torch.allclose(grad, v.detach()), "check the signs in v_target"


@pytest.mark.a1
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, math.pi / 2])
def test_split_v_undoes_add_noise_and_v_target(angle):
    """(x_t, v) -> (x0, eps) is a rotation back: exact at every t, the two ends included."""
    signal, sigma = math.cos(angle), math.sin(angle)
    x0, eps = bs.split_v(bs.add_noise(X0, EPS, signal, sigma), bs.v_target(X0, EPS, signal, sigma),
                         signal, sigma)
    assert torch.allclose(x0, X0) and torch.allclose(eps, EPS)


@pytest.mark.a1
def test_at_T_x0_is_minus_v():
    """Where nothing of the image is left the network's v is the image's guess, sign turned."""
    signal, sigma = bs.signal_sigma(bs.cosine_alpha_bar(), torch.tensor([bs.T, bs.T]))
    v = torch.randn(2, 4, 16, 24)
    x0, _ = bs.split_v(torch.randn(2, 4, 16, 24), v, signal, sigma)
    assert torch.equal(x0, -v)


@pytest.mark.a1
def test_min_snr_weight_is_the_v_form_with_a_floor():
    """min(snr, 5) / (snr + 1), worked by hand; the floor keeps t = T in training."""
    alpha_bar = bs.cosine_alpha_bar()
    t = torch.tensor([1, 200, 500, 900, bs.T])
    snr = alpha_bar[t] / (1 - alpha_bar[t])
    expected = (snr.clamp(max=5) / (snr + 1)).clamp(min=0.05).float()
    weight = bs.min_snr_weight(alpha_bar, t, 5.0, 0.05)
    assert torch.allclose(weight.flatten(), expected) and weight[-1] > 0
    assert (bs.min_snr_weight(alpha_bar, t, 0) == 1).all()


def test_lesion_weight_touches_tumour_only():
    """Weight 1 + extra in tumour labels, 1 in air and healthy brain."""
    classes = torch.tensor([[[0, 1, 2], [3, 4, 1]]])
    assert bs.lesion_weight(classes, 2, 3.0).tolist() == [[[[1, 1, 4], [4, 4, 1]]]]


def test_no_schedule_in_any_state_dict():
    """A schedule in a state_dict is averaged by the EMA or replaced on loading: black samples."""
    net = bs.UNet(width=16, mults=(1, 2))
    assert not dict(net.named_buffers())
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    assert set(bs.EMA(net).weights) == {name for name, _ in net.named_parameters()}
