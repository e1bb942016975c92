"""Samplers, guidance, noise along z.

Data N(mu, c^2) a voxel has its best v in closed form, so a sampler can be checked against the
distribution it must return, without any training.
"""
import dataclasses
import math
import types

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

    def noise(i):
        return torch.randn(x.shape, generator=bs.generator("noise", i)).to(dtype)

    def predict_v(x, level):
        return best_v(x, float(level))

    return bs.sample(predict_v, x.to(dtype), levels, table, noise, clip=False)


def spread(level):
    """Standard deviation of x_t at alpha_bar `level`."""
    return math.sqrt(C * C * level + 1 - level)


def exact(x, start, end):
    """Where the probability flow takes x from alpha_bar start to end: it keeps the z-score."""
    return MU * math.sqrt(end) + spread(end) / spread(start) * (x - MU * math.sqrt(start))


def returns_the_distribution(sampler, eta=0.0):
    """500 steps on Gaussian data: mean and spread must come back within 3%."""
    x = walk(ALPHA_BAR[bs.timesteps(500)], sampler, torch.randn(100_000), eta)
    mean, std = x.mean().item(), x.std().item()
    assert abs(mean - MU) < 0.005, (
        f"samples of data with mean {MU} have mean {mean:.3f}: look at the factors of x_t, x0_hat")
    assert abs(std / C - 1) < 0.03, (
        f"samples of data with spread {C} have spread {std:.3f}: look at the noise that is added, "
        "and at what is left of x_t")


@pytest.mark.a3("ddpm_step", "sample")
def test_ddpm_returns_the_distribution():
    """Noise drawn afresh in every step is just what the rest of the step takes away."""
    returns_the_distribution("ddpm")


@pytest.mark.a3("ddim_step")
@pytest.mark.parametrize("eta", [0, 0.5, 1])
def test_ddim_returns_the_distribution(eta):
    """Whatever eta is: less noise, more of x_t."""
    returns_the_distribution("ddim", eta)


@pytest.mark.a3("dpmpp_step")
def test_dpmpp_returns_the_distribution():
    """Without any noise."""
    returns_the_distribution("dpmpp")


@pytest.mark.a3("ddpm_step", "ddim_step")
def test_ancestral_sampling_is_ddim_with_eta_one():
    """Two derivations of the same step: their four numbers agree at every pair of levels."""
    for t, s in ((1000, 600), (950, 949), (400, 13), (20, 0)):
        levels = [float(level) for level in ALPHA_BAR[[t, s]]]
        ancestral, ddim = bs.ddpm_step(*levels), bs.ddim_step(*levels, eta=1.0)
        assert np.allclose(ancestral, ddim), (
            f"from t = {t} to {s}, (a, b, c, d) is {ancestral} for DDPM and {ddim} for DDIM with "
            "eta 1; they must be equal")


def ratios(errors):
    return [a / b for a, b in zip(errors, errors[1:])]


@pytest.mark.a3("ddim_step")
def test_ddim_is_first_order():
    """A first-order method's error halves when its steps double."""
    x = torch.linspace(-2, 2, 101)
    walks = [walk(ALPHA_BAR[bs.timesteps(n)], "ddim", x) for n in (50, 100, 200)]
    errors = [(end - exact(x, 0.0, 1.0)).abs().max().item() for end in walks]
    assert all(1.7 < ratio < 2.3 for ratio in ratios(errors)), (
        f"errors with 50, 100, 200 steps are {errors}; each should be half of the one before")


def finite_levels(n):
    """alpha_bar at n + 1 levels whose log-snr rises evenly from -3 (noisy) to 3 (clean)."""
    return torch.sigmoid(torch.linspace(-3, 3, n + 1, dtype=torch.float64))


@pytest.mark.a3("dpmpp_step", "sample")
def test_dpmpp_is_second_order_where_log_snr_is_finite():
    """Its error falls by four when steps double, on even steps of log-snr from -3 to 3."""
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    truth = exact(x, *map(float, finite_levels(1)))
    errors = [(walk(finite_levels(n), "dpmpp", x) - truth).abs().max().item() for n in (10, 20, 40)]
    orders = [math.log2(ratio) for ratio in ratios(errors)]
    assert all(1.7 < order < 2.3 for order in orders), (
        f"the error falls with the power {orders} of the number of steps; it should be 2: look at "
        "r, the signs of 1/(2r), and whether x0_earlier is the x0_hat of the step before")


@pytest.mark.a3("dpmpp_step")
def test_dpmpp_beats_ddim_at_twenty_steps():
    """From T to 0, first and last step first order: still closer than DDIM with as many calls."""
    x, levels = torch.linspace(-2, 2, 101), ALPHA_BAR[bs.timesteps(20)]
    error = {name: (walk(levels, name, x) - exact(x, 0.0, 1.0)).abs().max().item()
             for name in ("ddim", "dpmpp")}
    assert error["dpmpp"] < 0.5 * error["ddim"], (
        f"largest errors {error}: looking at the step before should at least halve that of DDIM")


def reference_ddim(x, visited):
    """An independent float64 DDIM in angles: one rotation a step, nothing of the library's
    table."""
    for t, s in zip(visited, visited[1:]):
        a, b = math.pi / 2 * t / bs.T, math.pi / 2 * s / bs.T
        level = math.cos(a) ** 2 if t < bs.T else 0.0
        v = best_v(x, level)
        x = math.cos(a - b) * x - math.sin(a - b) * v
    return x


@pytest.mark.a3("ddim_step", "sample")
def test_uneven_steps_agree_with_an_independent_computation():
    """`t - T // n` as the previous step is wrong as soon as steps are uneven; ours read the
    list."""
    visited = [1000, 990, 700, 640, 130, 17, 2, 0]
    x = torch.linspace(-2, 2, 11, dtype=torch.float64)
    ours = walk(ALPHA_BAR[visited], "ddim", x, dtype=torch.float64)
    assert torch.allclose(ours, reference_ddim(x, visited), atol=2e-6), (
        "on uneven steps the walk ends elsewhere: are the levels of every step read from the list?")


@pytest.mark.a3("ddpm_step")
def test_uneven_ancestral_steps_have_the_right_posterior():
    """Mean and variance of q(x_s | x_t, x0) by Bayes in float64, from the two Gaussians alone."""
    before, after = float(ALPHA_BAR[700]), float(ALPHA_BAR[130])
    prior_mean, prior_var = math.sqrt(after), 1 - after                 # of x_s given x0 = 1
    # x_t = slope x_s + N(0, extra)
    slope, extra = math.sqrt(before / after), 1 - before / after
    var = 1 / (1 / prior_var + slope ** 2 / extra)
    a, b, c, d = bs.ddpm_step(before, after)
    assert math.isclose(a, var * slope / extra), "a, the factor of x_t, is not that of q's mean"
    assert math.isclose(b, var * prior_mean / prior_var), (
        "b, the factor of x0_hat, is not that of q's mean")
    assert c == 0, "DDPM does not look at the step before"
    assert math.isclose(d, math.sqrt(var)), "d is a standard deviation: the root of q's variance"


@pytest.mark.a3("timesteps")
@pytest.mark.parametrize("steps", [1, 2, 7, 20, bs.MOST_STEPS])
def test_every_walk_starts_at_T_and_ends_at_zero(steps):
    """Starting at t < T starts from an image; "leading" spacing with a cosine schedule is known
    bad."""
    visited = bs.timesteps(steps)
    assert len(visited) == steps + 1, f"{steps} steps visit {steps + 1} levels, both ends included"
    assert visited[0] == bs.T and visited[-1] == 0, "levels run from T down to 0, both included"
    assert (visited[1:] < visited[:-1]).all(), "every level must be lower than the one before"


@pytest.mark.a3("timesteps")
def test_levels_are_the_nearest_to_even_ones():
    """Four steps visit the levels at which sigma / (signal + sigma) is 3/4, 1/2, 1/4: t = 1000 2/pi
    atan(3, 1, 1/3), 795.2, 500 and 204.8."""
    visited = bs.timesteps(4)
    assert visited.dtype == torch.int64, "levels are integers, int64"
    assert visited.tolist() == [1000, 795, 500, 205, 0], (
        f"four steps visit {visited.tolist()}: noise / (signal + noise) falls evenly from 1 to 0, "
        "and levels are rounded to the nearest, not cut off")


@pytest.mark.a3("ddpm_step", "ddim_step", "dpmpp_step")
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_tables_are_finite_and_end_without_noise(steps):
    """At T there is no signal and at 0 no noise: no step divides by either."""
    for sampler in ("ddpm", "ddim", "dpmpp"):
        table = bs.sampler_table(ALPHA_BAR[bs.timesteps(steps)], sampler)
        assert table.shape == (steps, 6) and torch.isfinite(table).all(), (
            f"{sampler}: a number of the table is not finite; look at before = 0 and after = 1")
        assert table[-1, 5] == 0, f"{sampler}: the last step must add no noise"


@pytest.mark.a3("sample")
def test_clip_keeps_samples_in_range():
    """x0_hat is kept in [-1, 1] when asked, so air cannot drift below black."""
    levels = ALPHA_BAR[bs.timesteps(10)]
    x = bs.sample(lambda x, t: torch.full_like(x, 3.0), torch.randn(50), levels,
                  bs.sampler_table(levels))
    assert x.min() >= -1 and x.max() <= 1, "samples leave [-1, 1]: is x0_hat clipped in every step?"
    first = bs.sample(lambda x, t: torch.tensor([5.0, 0.5, -5.0]), torch.zeros(3), levels[:2],
                      bs.sampler_table([0.0, 1.0]))
    assert first.tolist() == [-1, -0.5, 1], (
        "one step from T must give x0_hat = -v, clipped to [-1, 1]")


@pytest.mark.a3("sample")
def test_every_step_asks_at_its_own_level_for_its_own_noise():
    """The network is told the level a step starts from. Noise goes by the number of the step, from
    0; the last step adds none and asks for none."""
    levels = ALPHA_BAR[bs.timesteps(4)]
    asked, drawn = [], []

    def predict_v(x, level):
        asked.append(float(level))
        return torch.zeros_like(x)

    def noise(step):
        drawn.append(int(step))
        return torch.zeros(3)

    bs.sample(predict_v, torch.zeros(3), levels, bs.sampler_table(levels, "ddpm"), noise)
    assert asked == levels[:4].tolist(), (
        "predict_v gets the entries of `visited` in turn, from the first; the last is where the "
        "walk ends, and is not asked for")
    assert drawn == [0, 1, 2], (
        f"noise was asked for with the numbers {drawn}; steps are counted from 0, and where d is 0 "
        "there is none")


class Counting:
    """A denoiser of two known answers that counts its calls and keeps the scalars it gets."""

    def __init__(self):
        self.calls, self.scalars = 0, []

    def __call__(self, x_t, t, onehot, scalars):
        self.calls += 1
        self.scalars.append(scalars)
        return x_t * 0.5 + onehot.sum((1, 2, 3), keepdim=True) / onehot[0].numel()


@pytest.mark.a3("guided_v")
def test_guidance_scale_one_costs_one_call():
    """At scale 1 the null call would be multiplied by zero: it is not made."""
    x, onehot, denoiser = torch.randn(2, 4, 16, 24), torch.ones(2, 5, 16, 24), Counting()
    v = bs.guided_v(denoiser, x, None, onehot, torch.zeros(2, 2), 1.0)
    assert denoiser.calls == 1, (
        f"at scale 1 the denoiser was called {denoiser.calls} times, not once")
    assert torch.equal(v, x * 0.5 + 1), "at scale 1 the answer is the conditional one, unchanged"
    bs.guided_v(denoiser, x, None, onehot, torch.zeros(2, 2), 2.0)
    assert denoiser.calls == 3, "at any other scale there are two calls, with and without condition"


@pytest.mark.a3("guided_v")
def test_guidance_extrapolates_from_null_to_condition():
    """v_null + scale (v_cond - v_null), by hand: null gives x/2, condition x/2 + 1, scale 3 x/2 +
    3."""
    x, onehot = torch.randn(2, 4, 16, 24), torch.ones(2, 5, 16, 24)
    v = bs.guided_v(Counting(), x, None, onehot, torch.zeros(2, 2), 3.0, rescale=0.0)
    assert torch.allclose(v, x * 0.5 + 3, atol=1e-5), (
        "v_null + scale (v_cond - v_null): does it start from v_null, and is the label map of the "
        "null call all zeros?")


@pytest.mark.a3("guided_v")
def test_the_null_condition_keeps_the_place_alone():
    """NaN is "not given": 0 would be a request for 0, and the place says which slice it is."""
    scalars, denoiser = torch.tensor([[0.3, 1, 0.7, 0.0], [-0.6, 2, 0.1, 0.9]]), Counting()
    before = scalars.clone()
    bs.guided_v(denoiser, torch.randn(2, 4, 16, 24), None, torch.ones(2, 5, 16, 24), scalars, 2.0)
    null = [seen for seen in denoiser.scalars if not torch.equal(seen, before)]
    assert len(null) == 1 and null[0].shape == (2, 4), (
        "of the two calls one gets the scalars as they are; the other drops all but the place")
    assert torch.equal(null[0][:, :2], before[:, :2]), (
        "the null condition keeps the first two scalars, the slice's place")
    assert null[0][:, 2:].isnan().all(), (
        "in the null condition every scalar but the place is NaN, which means not given; 0 is a "
        "value like others")
    assert torch.equal(scalars, before), "the caller's scalars were changed"


@pytest.mark.a3("guided_v")
def test_rescale_brings_back_the_spread_of_each_sample():
    """Full rescale: each sample's v has the spread it has without guidance, whatever the spread of
    the other samples of the batch."""
    x = torch.randn(2, 4, 16, 24) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    onehot = torch.ones(2, 5, 16, 24) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)

    def strong(x, t, onehot, scalars):
        return x * (1 + onehot.mean((1, 2, 3), keepdim=True))

    v = bs.guided_v(strong, x, None, onehot, torch.zeros(2, 2), 4.0, rescale=1.0)
    expected = strong(x, None, onehot, None).std((1, 2, 3))
    assert torch.allclose(v.std((1, 2, 3)), expected, rtol=1e-4), (
        f"spreads of the two samples are {v.std((1, 2, 3)).tolist()}, and should be "
        f"{expected.tolist()}: std is taken over all axes but that of the batch")


def make_denoiser():
    net = bs.UNet(width=16, mults=(1, 2))
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    prior = {"classes": torch.stack([torch.full((6, 4), -0.2), torch.full((6, 4), 0.4)])}
    return bs.Denoiser(net.eval(), prior, ALPHA_BAR, torch.device("cpu"))


@pytest.mark.a3("sample")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_batch_size_changes_rounding_only(sampler, monkeypatch):
    """Noise belongs to the case, not to the batch: batch 1 and 4 give one volume (fp32, 1e-4)."""
    monkeypatch.setattr(bs, "uses_bf16", lambda device, precision="auto": False)
    classes = torch.randint(0, 5, (6, 16, 24))
    settings = {**bs.SAMPLING, "steps": 4, "sampler": sampler, "guidance": 1.5}
    denoiser = make_denoiser()

    def volume(key, batch):
        return bs.sample_volume(dataclasses.replace(denoiser, batch=batch), classes, key, settings)

    alone, together, another = volume((0, 7), 1), volume((0, 7), 4), volume((0, 8), 4)
    assert alone.shape == (6, 4, 16, 24) and (alone - together).abs().max() < 1e-4, (
        "a slice changes with the slices that share its batch")
    assert (together - another).abs().max() > 0.1, "another case must have other noise"


@pytest.mark.a3("guided_v")
def test_guidance_changes_a_volume():
    """A scale of 3 does; a scale of 1 is none."""
    denoiser, classes = make_denoiser(), torch.randint(0, 5, (2, 16, 24))
    torch.nn.init.normal_(denoiser.net.conv_in.weight, std=0.2)

    def volume(**changes):
        return bs.sample_volume(denoiser, classes, (0, 0), {**bs.SAMPLING, "steps": 4, **changes})

    assert torch.equal(volume(), volume(guidance=1.0)), "a scale of 1 must change nothing"
    assert not torch.equal(volume(), volume(guidance=3.0)), "a scale of 3 changes nothing"


def test_planes_are_asked_in_turn_and_put_back():
    """Axial, coronal, sagittal, axial ...: each slice comes between its neighbours, with the label
    map and the place of the same cut, and v lands where the slice was. A denoiser that answers with
    label maps shows it."""
    asked = []

    def denoiser(x, t, onehot, scalars):
        asked.append((x.shape, scalars[:, 1].unique().tolist(), scalars[0, 0].item()))
        assert onehot.shape == (len(x), 5, *x.shape[2:])
        assert torch.equal(x[1:, 4:8], x[:-1, :4]) and torch.equal(x[:-1, 8:], x[1:, :4])
        assert torch.equal(x[0, 4:8], x[0, :4]) and torch.equal(x[-1, 8:], x[-1, :4])
        return onehot[:, :4] * 1.0

    denoiser.alpha_bar, denoiser.net = ALPHA_BAR, types.SimpleNamespace(channels=4, classes=5,
                                                                      around=1)
    classes = torch.randint(0, 5, (6, 8, 10))
    volume = bs.sample_volume(denoiser, classes, (0, 1), {**bs.SAMPLING, "steps": 4})
    assert asked == [((6, 12, 8, 10), [0.0], pytest.approx(1 / 6 - 1)),
                     ((8, 12, 6, 10), [1.0], pytest.approx(1 / 8 - 1)),
                     ((10, 12, 8, 6), [2.0], pytest.approx(1 / 10 - 1)),
                     ((6, 12, 8, 10), [0.0], pytest.approx(1 / 6 - 1))]
    # v = onehot at every step: a walk of its own for each voxel and channel
    start = torch.randn(volume.shape, generator=bs.generator(0, 1, "start"))
    visited = bs.timesteps(4)
    wanted = bs.sample(lambda x, t: bs.one_hot(classes, 5)[:, :4], start, visited,
                       bs.sampler_table(ALPHA_BAR[visited], "dpmpp"))
    assert torch.allclose(volume, wanted, atol=1e-6)


def test_generators_depend_on_their_key_alone():
    """The same key gives the same numbers whatever was drawn before; any other key others."""
    def draw(*key):
        return torch.randn(8, generator=bs.generator(*key))

    first = draw(0, "noise", 12)
    torch.randn(100)
    assert torch.equal(first, draw(0, "noise", 12))
    for other in ((1, "noise", 12), (0, "noise", 13), (0, "tumour", 12), (0, "noise", 1, 2)):
        assert not torch.equal(first, draw(*other))
