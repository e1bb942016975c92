"""The exercise that differs by student number, see blank.py; it needs --student and a hand-in."""
import math

import pytest
import torch

import brainsyn as bs
from blank import variant_angle

ANGLES = [0.0, 0.4, 1.1, math.pi / 2]


@pytest.fixture
def phi(request):
    """The angle of the student's own target."""
    student = request.config.getoption("--student")
    if not student:
        pytest.skip("no --student")
    return variant_angle(student)


def images(seed):
    """x0 and eps in float64."""
    return [torch.randn(2, 3, 16, 24, generator=bs.generator(seed, name), dtype=torch.float64)
            for name in ("x0", "eps")]


@pytest.mark.a1
@pytest.mark.parametrize("theta", ANGLES)
def test_your_target_is_turned_by_your_angle(phi, theta):
    """At every noise level it is the combination of eps and x0 that the exercise names, with your
    phi."""
    (x0, eps), zero = images(1), torch.zeros(2, 3, 16, 24, dtype=torch.float64)
    ours = lambda x0, eps: bs.your_target(x0, eps, math.cos(theta), math.sin(theta))
    assert torch.allclose(ours(zero, eps), math.cos(theta + phi) * eps), "share of eps"
    assert torch.allclose(ours(x0, zero), -math.sin(theta + phi) * x0), "share of x0"


@pytest.mark.a1
@pytest.mark.parametrize("theta", ANGLES)
def test_your_target_can_be_split(phi, theta):
    """x0 and eps come back from x_t and your target, at clean and at pure noise too."""
    x0, eps = images(2)
    signal, sigma = math.cos(theta), math.sin(theta)
    y = math.cos(theta + phi) * eps - math.sin(theta + phi) * x0
    got = bs.split_your_target(signal * x0 + sigma * eps, y, signal, sigma)
    assert torch.allclose(got[0], x0) and torch.allclose(got[1], eps)
