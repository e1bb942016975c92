"""The noise process."""
import math

import pytest
import torch

import brainsyn as bs

X0, EPS = torch.randn(2, 3, 16, 24, dtype=torch.float64), torch.randn(2, 3, 16, 24,
                                                                      dtype=torch.float64)


@pytest.mark.a1("cosine_alpha_bar")
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_schedule_begins_clean_and_ends_in_pure_noise(shift):
    """Zero terminal SNR, exactly: otherwise samplers start from noise that still knows the mean."""
    alpha_bar = bs.cosine_alpha_bar(shift)
    assert alpha_bar.shape == (bs.T + 1,) and alpha_bar.dtype == torch.float64, (
        "alpha_bar must be float64, with one entry for each of t = 0 .. T")
    assert alpha_bar[0] == 1 and alpha_bar[-1] == 0, (
        "the first entry must be exactly 1 and the last exactly 0; cos(pi/2) is not in floating "
        "point")
    assert (alpha_bar[1:] < alpha_bar[:-1]).all(), "noise must grow with t"


@pytest.mark.a1("cosine_alpha_bar")
def test_cosine_means_equal_angles():
    """signal = cos(t/T pi/2): at half time the angle is 45 degrees."""
    alpha_bar = bs.cosine_alpha_bar()
    assert math.isclose(alpha_bar[bs.T // 2], 0.5, rel_tol=1e-12), (
        "half-way, at 45 degrees, half of the power is left: does the angle end at pi/2?")
    assert math.isclose(alpha_bar[bs.T // 3].sqrt(), math.cos(333 / 1000 * math.pi / 2),
                        rel_tol=1e-12), "sqrt(alpha_bar) must be cos(t/T pi/2), in float64"


@pytest.mark.a1("cosine_alpha_bar")
def test_shift_multiplies_the_root_of_snr():
    """The resolution shift is one factor on sqrt(snr), the same at every t."""
    plain, shifted = bs.cosine_alpha_bar()[1:-1], bs.cosine_alpha_bar(0.5)[1:-1]
    ratio = (shifted / (1 - shifted)).sqrt() / (plain / (1 - plain)).sqrt()
    assert torch.allclose(ratio, torch.full_like(ratio, 0.5)), (
        "shift is a factor on sqrt(snr) = signal / sigma; is yours one on snr, or on signal alone?")


@pytest.mark.a1("signal_sigma")
def test_signal_and_sigma_share_the_power():
    """signal^2 + sigma^2 = 1 at every t, so that x_t keeps the variance of x0 = 1."""
    signal, sigma = bs.signal_sigma(bs.cosine_alpha_bar(), torch.arange(bs.T + 1))
    assert signal.shape == sigma.shape == (bs.T + 1, 1, 1, 1), (
        "(B, 1, 1, 1) multiplies images (B, C, H, W); another shape multiplies something else")
    assert signal.dtype == sigma.dtype == torch.float32, "images are float32, so must these be"
    assert torch.allclose(signal ** 2 + sigma ** 2, torch.ones(()), atol=1e-6), (
        "signal^2 + sigma^2 must be 1: which square root is missing or in the wrong place?")


@pytest.mark.a1("add_noise", "v_target")
def test_v_is_the_derivative_of_x_t():
    """v = d x_t / d angle: that is why it stays well-behaved from clean to pure noise."""
    angle = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x_t = bs.add_noise(X0, EPS, angle.cos(), angle.sin())
    grad = torch.stack([torch.autograd.grad(x, angle, retain_graph=True)[0]
                        for x in x_t[0, 0, 0, :5]])
    v = bs.v_target(X0, EPS, angle.cos(), angle.sin())[0, 0, 0, :5]
    assert torch.allclose(grad, v.detach()), (
        "v must be the derivative of x_t = signal x0 + sigma eps along the angle: look at the "
        "signs, and at which factor belongs to which")


@pytest.mark.a1("add_noise", "v_target", "split_v")
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, math.pi / 2])
def test_split_v_undoes_add_noise_and_v_target(angle):
    """(x_t, v) -> (x0, eps) is a rotation back: exact at every t, the two ends included."""
    signal, sigma = math.cos(angle), math.sin(angle)
    x0, eps = bs.split_v(bs.add_noise(X0, EPS, signal, sigma), bs.v_target(X0, EPS, signal, sigma),
                         signal, sigma)
    assert torch.allclose(x0, X0), "x0 = signal x_t - sigma v must give back the x0 that went in"
    assert torch.allclose(eps, EPS), (
        "eps = sigma x_t + signal v must give back the eps that went in")


@pytest.mark.a1("signal_sigma", "split_v")
def test_at_T_x0_is_minus_v():
    """Where nothing of the image is left the network's v is the image's guess, sign turned."""
    signal, sigma = bs.signal_sigma(bs.cosine_alpha_bar(), torch.tensor([bs.T, bs.T]))
    v = torch.randn(2, 4, 16, 24)
    x0, _ = bs.split_v(torch.randn(2, 4, 16, 24), v, signal, sigma)
    assert torch.equal(x0, -v), (
        "at T signal is 0 and sigma 1, so x0 must be -v: is t counted from 0, and is nothing "
        "divided by signal?")


def test_no_schedule_in_any_state_dict():
    """A schedule in a state_dict is averaged by the EMA or replaced on loading: black samples."""
    net = bs.UNet(width=16, mults=(1, 2))
    assert not dict(net.named_buffers())
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    assert set(bs.EMA(net).weights) == {name for name, _ in net.named_parameters()}
