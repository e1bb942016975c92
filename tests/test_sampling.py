"""Section 7: samplers, guidance, noise along z.

Data N(mu, c^2) a voxel has its best v in closed form, so a sampler can be checked against the
distribution it must return, without any training.
"""
import dataclasses
import math

import numpy as np
import pytest
import torch

import brainsyn as bs

MU, C = 0.3, 0.25
ALPHA_BAR = bs.cosine_alpha_bar()


def best_v(x_t, alpha_bar, mu=MU, c=C):
    """v_hat for data N(mu, c^2): (signal x_t - E[x0 | x_t]) / sigma, written without the
    division."""
    signal, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    return sigma * (signal * (1 - c * c) * x_t - mu) / (c * c * signal ** 2 + sigma ** 2)


def walk(levels, sampler, x, eta=0.0, dtype=torch.float32):
    """Sample with the best v along alpha_bar `levels`, in float32 or float64."""
    table = bs.sampler_table(levels, sampler, eta).to(dtype)
    noise = lambda i: torch.randn(x.shape, generator=bs.generator("noise", i)).to(dtype)
    return bs.sample(lambda x, level: best_v(x, float(level)), x.to(dtype), levels, table, noise,
                     clip=False)


def exact(x, start, end):
    """Where the probability flow takes x from alpha_bar start to end: it keeps the z-score."""
    spread = lambda level: math.sqrt(C * C * level + 1 - level)
    return MU * math.sqrt(end) + spread(end) / spread(start) * (x - MU * math.sqrt(start))


@pytest.mark.a3
@pytest.mark.parametrize("sampler, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 0.5), ("ddim", 1),
                                          ("dpmpp", 0)])
def test_samplers_return_the_distribution(sampler, eta):
    """500 steps on Gaussian data: mean and spread come back within 3%."""
    x = walk(ALPHA_BAR[bs.timesteps(500)], sampler, torch.randn(100_000), eta)
    assert abs(x.mean().item() - MU) < 0.005 and abs(x.std().item() / C - 1) < 0.03


@pytest.mark.a3
def test_ancestral_sampling_is_ddim_with_eta_one():
    """Two derivations of the same step: their four numbers agree at every pair of levels."""
    for t, s in ((1000, 600), (950, 949), (400, 13), (20, 0)):
        levels = [float(level) for level in ALPHA_BAR[[t, s]]]
        assert np.allclose(bs.ddpm_step(*levels), bs.ddim_step(*levels, eta=1.0))


def ratios(errors):
    return [a / b for a, b in zip(errors, errors[1:])]


@pytest.mark.a3
def test_ddim_is_first_order():
    """A first-order method's error halves when its steps double."""
    x = torch.linspace(-2, 2, 101)
    walks = [walk(ALPHA_BAR[bs.timesteps(n)], "ddim", x) for n in (50, 100, 200)]
    errors = [(end - exact(x, 0.0, 1.0)).abs().max().item() for end in walks]
    assert all(1.7 < r < 2.3 for r in ratios(errors)), f"errors {errors}"


def finite_levels(n):
    """alpha_bar at n + 1 levels whose log-snr rises evenly from -3 (noisy) to 3 (clean)."""
    return torch.sigmoid(torch.linspace(-3, 3, n + 1, dtype=torch.float64))


@pytest.mark.a3
def test_dpmpp_is_second_order_where_log_snr_is_finite():
    """Its error falls by four when steps double, on even steps of log-snr from -3 to 3."""
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    truth = exact(x, *map(float, finite_levels(1)))
    errors = [(walk(finite_levels(n), "dpmpp", x) - truth).abs().max().item() for n in (10, 20, 40)]
    orders = [math.log2(r) for r in ratios(errors)]
    assert all(1.7 < order < 2.3 for order in orders), f"orders {orders}"


@pytest.mark.a3
def test_dpmpp_beats_ddim_at_twenty_steps():
    """From T to 0, first and last step first order: still closer than DDIM with as many calls."""
    x, levels = torch.linspace(-2, 2, 101), ALPHA_BAR[bs.timesteps(20)]
    error = {s: (walk(levels, s, x) - exact(x, 0.0, 1.0)).abs().max().item()
             for s in ("ddim", "dpmpp")}
    assert error["dpmpp"] < 0.5 * error["ddim"], error


def reference_ddim(x, visited):
    """An independent float64 DDIM in angles: one rotation a step, nothing of the library's
    table."""
    for t, s in zip(visited, visited[1:]):
        a, b = math.pi / 2 * t / bs.T, math.pi / 2 * s / bs.T
        level = math.cos(a) ** 2 if t < bs.T else 0.0
        v = best_v(x, level)
        x = math.cos(a - b) * x - math.sin(a - b) * v
    return x


@pytest.mark.a3
def test_uneven_steps_agree_with_an_independent_computation():
    """`t - T // n` as the previous step is wrong as soon as steps are uneven; ours read the
    list."""
    visited, x = [1000, 990, 700, 640, 130, 17, 2, 0], torch.linspace(-2, 2, 11,
                                                                      dtype=torch.float64)
    ours = walk(ALPHA_BAR[visited], "ddim", x, dtype=torch.float64)
    assert torch.allclose(ours, reference_ddim(x, visited), atol=2e-6)


@pytest.mark.a3
def test_uneven_ancestral_steps_have_the_right_posterior():
    """Mean and variance of q(x_s | x_t, x0) by Bayes in float64, from the two Gaussians alone."""
    before, after = float(ALPHA_BAR[700]), float(ALPHA_BAR[130])
    prior_mean, prior_var = math.sqrt(after), 1 - after                 # of x_s given x0 = 1
    # x_t = slope x_s + N(0, extra)
    slope, extra = math.sqrt(before / after), 1 - before / after
    var = 1 / (1 / prior_var + slope ** 2 / extra)
    a, b, c, d = bs.ddpm_step(before, after)
    assert math.isclose(a, var * slope / extra) and math.isclose(b, var * prior_mean / prior_var)
    assert c == 0 and math.isclose(d, math.sqrt(var))


@pytest.mark.a3
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 1000])
def test_every_walk_starts_at_T_and_ends_at_zero(steps):
    """Starting at t < T starts from an image; "leading" spacing with a cosine schedule is known
    bad."""
    visited = bs.timesteps(steps)
    assert visited[0] == bs.T and visited[-1] == 0 and len(visited) == steps + 1
    assert (visited[1:] < visited[:-1]).all()
    for sampler in ("ddpm", "ddim", "dpmpp"):
        table = bs.sampler_table(ALPHA_BAR[visited], sampler)
        assert table.shape == (steps, 6) and torch.isfinite(table).all()
        assert table[-1, 5] == 0, "the last step adds no noise"


@pytest.mark.a3
def test_clip_keeps_samples_in_range():
    """x0_hat is kept in [-1, 1] when asked, so air cannot drift below black."""
    levels = ALPHA_BAR[bs.timesteps(10)]
    x = bs.sample(lambda x, t: torch.full_like(x, 3.0), torch.randn(50), levels,
                  bs.sampler_table(levels))
    assert x.min() >= -1 and x.max() <= 1
    first = bs.sample(lambda x, t: torch.tensor([5.0, 0.5, -5.0]), torch.zeros(3), levels[:2],
                      bs.sampler_table([0.0, 1.0]))
    assert first.tolist() == [-1, -0.5, 1], "x0_hat is -v at T"


class Counting:
    """A denoiser of two known answers that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x_t, t, onehot, scalars):
        self.calls += 1
        return x_t * 0.5 + onehot.sum((1, 2, 3), keepdim=True) / onehot[0].numel()


@pytest.mark.a3
def test_guidance_scale_one_costs_one_call():
    """At scale 1 the null call would be multiplied by zero: it is not made."""
    x, onehot, d = torch.randn(2, 4, 16, 24), torch.ones(2, 5, 16, 24), Counting()
    v = bs.guided_v(d, x, None, onehot, torch.zeros(2, 1), 1.0)
    assert d.calls == 1 and torch.equal(v, x * 0.5 + 1)
    bs.guided_v(d, x, None, onehot, torch.zeros(2, 1), 2.0)
    assert d.calls == 3


@pytest.mark.a3
def test_guidance_extrapolates_from_null_to_condition():
    """v_null + scale (v_cond - v_null), by hand: null gives x/2, condition x/2 + 1, scale 3 x/2 +
    3."""
    x, onehot = torch.randn(2, 4, 16, 24), torch.ones(2, 5, 16, 24)
    v = bs.guided_v(Counting(), x, None, onehot, torch.zeros(2, 1), 3.0, rescale=0.0)
    assert torch.allclose(v, x * 0.5 + 3, atol=1e-5)


@pytest.mark.a3
def test_rescale_brings_back_the_spread():
    """Full rescale: each sample's v has the spread it has without guidance."""
    x, onehot = torch.randn(2, 4, 16, 24), torch.ones(2, 5, 16, 24)
    strong = lambda x, t, onehot, s: x * (1 + onehot.mean((1, 2, 3), keepdim=True))
    v = bs.guided_v(strong, x, None, onehot, torch.zeros(2, 1), 4.0, rescale=1.0)
    assert torch.allclose(v.std((1, 2, 3)), (2 * x).std((1, 2, 3)), rtol=1e-4)


def make_denoiser():
    net = bs.UNet(width=16, mults=(1, 2))
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    prior = {"classes": torch.stack([torch.full((6, 4), -0.2), torch.full((6, 4), 0.4)])}
    return bs.Denoiser(net.eval(), prior, ALPHA_BAR, torch.device("cpu"))


@pytest.mark.a3
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_batch_size_changes_rounding_only(sampler, monkeypatch):
    """Noise belongs to the case, not to the batch: batch 1 and 4 give one volume (fp32, 1e-4)."""
    monkeypatch.setattr(bs, "uses_bf16", lambda device, precision="auto": False)
    denoiser, classes, position = make_denoiser(), torch.randint(0, 5, (6, 16, 24)), torch.linspace(
        -1, 1, 6)
    settings = {**bs.SAMPLING, "steps": 4, "sampler": sampler, "guidance": 1.5}
    one, four, other = [bs.sample_volume(dataclasses.replace(denoiser, batch=batch), classes,
                                         position, 2.4, key, settings) for key,
                        batch in (((0, 7), 1), ((0, 7), 4), ((0, 8), 4))]
    assert one.shape == (6, 4, 16, 24) and (one - four).abs().max() < 1e-4
    assert (four - other).abs().max() > 0.1, "another case must have other noise"


@pytest.mark.a3
def test_guidance_acts_in_its_interval_only():
    """An interval no level lies in leaves the unguided sample; the whole range does not."""
    denoiser, classes, position = make_denoiser(), torch.randint(0, 5, (2, 16, 24)), torch.zeros(2)
    torch.nn.init.normal_(denoiser.net.conv_in.weight, std=0.2)
    run = lambda **s: bs.sample_volume(denoiser, classes, position, 1.0, (0, 0),
                                       {**bs.SAMPLING, "steps": 4, **s})
    plain = run()
    assert torch.equal(plain, run(guidance=3.0, interval=(0.9, 0.91)))
    assert not torch.equal(plain, run(guidance=3.0, interval=(0.0, 1.0)))


@pytest.mark.a3
@pytest.mark.parametrize("coherence", [0.0, 3.0])
def test_volume_noise_is_standard_and_correlated_as_promised(coherence):
    """Each voxel N(0, 1); slices dz mm apart correlate exp(-dz^2 / (2 coherence^2))."""
    noise = bs.volume_noise((0, 1), (24, 2, 60, 80), coherence, thickness=2.0).flatten(1)
    assert noise.std(1).sub(1).abs().max() < 0.05 and noise.mean(1).abs().max() < 0.05
    for apart in (1, 2, 4):
        seen = torch.stack([(noise[i] * noise[i + apart]).mean() for i in range(6, 14)]).mean(
            ).item()
        expected = math.exp(-((2.0 * apart) ** 2) / (2 * coherence ** 2)) if coherence else 0.0
        assert abs(seen
                   - expected) < 0.03, f"slices {apart} apart: {seen:.3f}, expected {expected:.3f}"


def test_generators_depend_on_their_key_alone():
    """The same key gives the same numbers whatever was drawn before; any other key others."""
    draw = lambda *key: torch.randn(8, generator=bs.generator(*key))
    first = draw(0, "noise", 12)
    torch.randn(100)
    assert torch.equal(first, draw(0, "noise", 12))
    for other in ((1, "noise", 12), (0, "noise", 13), (0, "tumour", 12), (0, "noise", 1, 2)):
        assert not torch.equal(first, draw(*other))
