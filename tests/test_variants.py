"""The exercise that differs by student number, see blank.py; it needs --student and a hand-in."""
import math

import pytest
import torch

import brainsyn as bs
import blank

ANGLES = [0.0, 0.4, 1.1, math.pi / 2]


@pytest.fixture
def phi(request):
    """The angle of the student's own target."""
    student = request.config.getoption("--student")
    if not student:
        pytest.skip("no --student")
    return blank.variant_angle(student)


def images(seed):
    """x0 and eps in float64."""
    return [torch.randn(2, 3, 16, 24, generator=bs.generator(seed, name), dtype=torch.float64)
            for name in ("x0", "eps")]


@pytest.mark.a1("your_target")
@pytest.mark.parametrize("theta", ANGLES)
def test_your_target_is_turned_by_your_angle(phi, theta):
    """At every noise level it is the combination of eps and x0 that the exercise names, with your
    phi."""
    (x0, eps), zero = images(1), torch.zeros(2, 3, 16, 24, dtype=torch.float64)
    only_eps = bs.your_target(zero, eps, math.cos(theta), math.sin(theta))
    only_x0 = bs.your_target(x0, zero, math.cos(theta), math.sin(theta))
    assert torch.allclose(only_eps, math.cos(theta + phi) * eps), (
        "where x0 is 0, y must be cos(theta + phi) eps: look at the factor of eps, and at your phi")
    assert torch.allclose(only_x0, -math.sin(theta + phi) * x0), (
        "where eps is 0, y must be -sin(theta + phi) x0: look at the factor of x0, and its sign")


@pytest.mark.a1("split_your_target")
@pytest.mark.parametrize("theta", ANGLES)
def test_your_target_can_be_split(phi, theta):
    """x0 and eps come back from x_t and your target, at clean and at pure noise too."""
    x0, eps = images(2)
    signal, sigma = math.cos(theta), math.sin(theta)
    y = math.cos(theta + phi) * eps - math.sin(theta + phi) * x0
    x0_back, eps_back = bs.split_your_target(signal * x0 + sigma * eps, y, signal, sigma)
    assert torch.allclose(x0_back, x0), "x0 does not come back: solve the two equations for x0"
    assert torch.allclose(eps_back, eps), "eps does not come back: solve the two equations for eps"
