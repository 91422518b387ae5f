"""Guidance: every guider of diffusers works or is refused, each rule acts on what it is defined on, a classifier's gradient is exact."""

import inspect

import conftest
import pytest
import torch
from analytic import GAUSSIAN, NETWORKS
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from editing import quiet, seeded

from gen_pipelines import (
    BridgedScheduler,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiffusersGuidance,
    GuidanceInterval,
    LatentTextToImagePipeline,
)
from gen_pipelines.pipelines.guidance import Evaluation, as_guidance, evaluation, guided, needed_branches
from gen_pipelines.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, EulerScheduler, FlowMatchEulerScheduler

GUIDERS = {name: cls for name, cls in vars(guiders).items() if inspect.isclass(cls) and issubclass(cls, guiders.BaseGuidance)}

_SKIP = {"indices": [0], "fqn": "transformer_blocks", "skip_attention": False, "skip_ff": False, "skip_attention_scores": True}
# the guiders that change the network: each one's own description of the layers
HOOKED = {
    "AutoGuidance": lambda: {"auto_guidance_config": LayerSkipConfig(**_SKIP, dropout=1.0)},
    "PerturbedAttentionGuidance": lambda: {
        "perturbed_guidance_config": LayerSkipConfig(**_SKIP), "perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0
    },
    "SkipLayerGuidance": lambda: {
        "skip_layer_config": LayerSkipConfig(indices=[0], fqn="transformer_blocks"), "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    },
    "SmoothedEnergyGuidance": lambda: {
        "seg_guidance_config": SmoothedEnergyGuidanceConfig(indices=[0], fqn="transformer_blocks"), "seg_guidance_start": 0.0,
        "seg_guidance_stop": 1.0,
    },
}  # fmt: skip
REFUSED = {"BaseGuidance", "LTX2Guidance"}
NEEDS_KORNIA = {"FrequencyDecoupledGuidance"}  # its constructor says so itself where kornia is missing
PLAIN = sorted(set(GUIDERS) - set(HOOKED) - REFUSED - NEEDS_KORNIA)


def build(name, **options):
    if name in NEEDS_KORNIA:
        pytest.importorskip("kornia", reason="FrequencyDecoupledGuidance of diffusers needs kornia, which is no dependency of ours")
    return GUIDERS[name](**options, **(HOOKED[name]() if name in HOOKED else {}))


@pytest.fixture(scope="module")
def flow():
    return quiet(
        LatentTextToImagePipeline(
            conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), FlowMatchEulerScheduler(),
            transformer=conftest.make_transformer(),
        )
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- every guider of diffusers


@pytest.mark.parametrize("name", sorted(set(GUIDERS) - REFUSED))
def test_every_guider_guides_a_pipeline_and_leaves_the_network_as_it_was(flow, name):
    options = {"num_inference_steps": 4, "output_type": "latent"}
    none = flow("a red apple", guidance_scale=1.0, generator=seeded(), **options).images
    # guidance_scale=1: what a hooked guider does besides, with no unconditional pass, which its own count of the passes gets wrong
    for scale in (5.0, 1.0) if name in HOOKED and name != "AutoGuidance" else (5.0,):
        drawn = flow("a red apple", guidance_scale=build(name, guidance_scale=scale), generator=seeded(), **options).images
        assert torch.isfinite(drawn).all() and (drawn - none).abs().max() > 1e-4, scale
    torch.testing.assert_close(flow("a red apple", guidance_scale=1.0, generator=seeded(), **options).images, none, atol=0, rtol=0)


def test_guiders_that_cannot_work_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="LTX2Guidance.*video network"):
        as_guidance(guiders.LTX2Guidance())
    with pytest.raises(ValueError, match="on must be one of output, epsilon, sample, velocity"):
        DiffusersGuidance(guiders.ClassifierFreeGuidance(), on="x_0")


# ------------------------------------------------------------------------------------------------- the rules, by independent arithmetic


def moment(network="sd3_flow", lambda_=-0.4, step=5):
    """An evaluation at one lambda, and the outputs of a network that holds two given pictures for x_0: (at, [cond, uncond])."""
    p = NETWORKS[network][0]
    t = float(p.path.t_from_lambda(lambda_))
    level = p.path.level(t)
    x_0, cond, uncond, eps = torch.randn(4, 2, 3, 4, 4, generator=seeded(3), dtype=torch.float64)
    x = level.alpha * x_0 + level.sigma * eps
    at = Evaluation(x, torch.tensor(p.network_time(t)), step, 10, level, p.affine(t, level), p)
    outputs = [p.target(c, (x - level.alpha * c) / level.sigma, t) for c in (cond, uncond)]
    return at, outputs


def run(guidance, at, outputs):
    """The guided output, whatever order the branches come in."""
    guidance = as_guidance(guidance)
    branches = needed_branches(guidance, at)
    return guided(guidance, [outputs[("cond", "uncond").index(b)] for b in branches], branches, at)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_guided_x_0_is_the_same_whatever_the_network_outputs(name, network):
    """At one lambda and the same two estimates of x_0, networks of every convention are guided to one x_0."""
    reference, ours = moment(), moment(network)
    # guidance_rescale is 0 here: that rule is defined on the network's output
    options = {"guidance_scale": 4.0} | ({"alpha": 0.5} if name == "MagnitudeAwareGuidance" else {})  # at 8 these are not guided at all
    results = [at.read(run(GUIDERS[name](**options), at, outputs), "sample") for at, outputs in (reference, ours)]
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)
    cond = reference[0].read(reference[1][0], "sample")
    assert (results[0] - cond).abs().max() > 0.1


def dot(a, b):
    return (a * b).flatten(1).sum(1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("network", ["sd_eps", "zero_snr_v", "sd3_flow", "edm"])
def test_rules_against_independent_arithmetic(network):
    s = 4.0
    at, outputs = moment(network)
    as_x_0, as_u = ([at.read(o, quantity) for o in outputs] for quantity in ("sample", "velocity"))

    # classifier-free, and its rescaling: on the output
    cond, uncond = outputs
    plain = uncond + s * (cond - uncond)
    torch.testing.assert_close(run(guiders.ClassifierFreeGuidance(guidance_scale=s), at, outputs), plain)
    std = lambda v: (v - v.mean((1, 2, 3), keepdim=True)).square().flatten(1).sum(1).div(v[0].numel() - 1).sqrt().view(-1, 1, 1, 1)
    rescaled = 0.7 * plain * std(cond) / std(plain) + 0.3 * plain
    torch.testing.assert_close(run(guiders.ClassifierFreeGuidance(guidance_scale=s, guidance_rescale=0.7), at, outputs), rescaled)

    # adaptive projected: on x_0, with the difference no longer than 3, its part along x_0 halved
    cond, uncond = as_x_0
    d = cond - uncond
    d = d * (3.0 / dot(d, d).sqrt()).clamp(max=1.0)
    along = dot(d, cond) / dot(cond, cond) * cond
    guider = guiders.AdaptiveProjectedGuidance(guidance_scale=s, adaptive_projected_guidance_rescale=3.0, eta=0.5)
    torch.testing.assert_close(at.read(run(guider, at, outputs), "sample"), uncond + s * (d - 0.5 * along))

    # zero-star: on the velocity, zero in the first step, where x_0 = eps = x / (alpha + sigma)
    cond, uncond = as_u
    best = dot(cond, uncond) / dot(uncond, uncond) * uncond
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=s, zero_init_steps=1)
    torch.testing.assert_close(at.read(run(guider, at, outputs), "velocity"), best + s * (cond - best), atol=1e-6, rtol=1e-6)
    first = moment(network, step=0)[0]
    expected = first.x / (first.level.alpha + first.level.sigma)
    torch.testing.assert_close(first.read(run(guider, first, outputs), "sample"), expected)

    # magnitude-aware: on the velocity
    ratio = (dot(cond - uncond, cond - uncond) / dot(uncond, uncond)).sqrt()
    expected = uncond + (1 + (s - 1) * torch.exp(-0.5 * ratio)) * (cond - uncond)
    guider = guiders.MagnitudeAwareGuidance(guidance_scale=s, alpha=0.5)
    torch.testing.assert_close(at.read(run(guider, at, outputs), "velocity"), expected)

    # tangential: the unconditional epsilon loses what is not along the first singular direction of the two
    cond, uncond = (at.read(o, "epsilon") for o in outputs)
    pair = torch.stack([cond, uncond], 1).flatten(2)  # (B, 2, N)
    direction = torch.linalg.eigh(pair @ pair.mT)[1][:, :, -1:].mT @ pair  # (B, 1, N), that of the largest eigenvalue
    direction = direction / direction.norm(dim=-1, keepdim=True)
    kept = ((uncond.flatten(1)[:, None] * direction).sum(-1, keepdim=True) * direction).view_as(uncond)
    guider = guiders.TangentialClassifierFreeGuidance(guidance_scale=s)
    torch.testing.assert_close(at.read(run(guider, at, outputs), "epsilon"), kept + s * (cond - kept), atol=1e-4, rtol=1e-4)


def test_on_output_is_what_diffusers_does_and_is_not_the_same_for_every_network():
    """The default is the paper's quantity; diffusers applies every rule to the output."""
    at, outputs = moment("sd_eps")
    make = lambda: guiders.AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_rescale=3.0, eta=0.0)
    theirs = make()
    theirs.set_state(step=5, num_inference_steps=10, timestep=at.timestep)
    expected = theirs.forward(*outputs).pred
    torch.testing.assert_close(run(DiffusersGuidance(make(), on="output"), at, outputs), expected)
    assert (run(make(), at, outputs) - expected).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' Euler under numpy 2
@pytest.mark.parametrize("network", ["sd_eps", "sd3_flow"])
def test_the_position_of_every_scheduler_says_what_the_output_means(network):
    """`evaluation` takes level and coefficients from the scheduler: x_0 there is that of `Parameterization.denoise`."""
    import diffusers

    p, grid = NETWORKS[network]
    hosted = diffusers.UniPCMultistepScheduler(), diffusers.HeunDiscreteScheduler(), diffusers.EulerDiscreteScheduler()
    ours = (DDIMScheduler, EulerScheduler, DPMSolverMultistepScheduler)
    schedulers = [s(parameterization=p, **grid) for s in ours] + [BridgedScheduler(s, p) for s in hosted]
    x, output = torch.randn(2, 2, 3, 4, 4, generator=seeded(1))
    for scheduler in schedulers:
        scheduler.set_timesteps(6)
        for i in (1, len(scheduler.timesteps) - 1):
            at = evaluation(scheduler, x, scheduler.timesteps[i], i, 6)
            t = p.path_time(scheduler.timesteps[i].double())
            x_0, eps = p.denoise(output, x, t)
            torch.testing.assert_close(at.read(output, "sample"), x_0, atol=2e-3, rtol=2e-3)  # classes that round or interpolate times
            torch.testing.assert_close(at.write(at.read(output, "velocity"), "velocity"), output, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- the gradient of a classifier


def gaussian_log_prob(p, y, noise):
    """log p(y | x_t) up to a constant for y = x_0 + noise N(0, 1), x_0 ~ GAUSSIAN: x_0 given x_t is Gaussian."""

    def log_prob(x, t):
        alpha, sigma = p.path.level(float(p.path_time(float(t[0]))))
        mean = GAUSSIAN.x_0(x, alpha, sigma)
        variance = GAUSSIAN.std**2 * sigma**2 / ((alpha * GAUSSIAN.std) ** 2 + sigma**2)
        return -((y - mean) ** 2 / (2 * (variance + noise**2))).flatten(1).sum(1)

    return log_prob


def sample_guided(name, guidance, steps=100):
    p, grid = NETWORKS[name]
    scheduler, network = DDIMScheduler(parameterization=p, **grid), GAUSSIAN.network(p)
    scheduler.set_timesteps(steps)
    x = torch.randn(2048, 1, 1, 1, generator=seeded(), dtype=torch.float64) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        at = evaluation(scheduler, x, t, i, steps)
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(guided(guidance, [output], needed_branches(guidance, at), at), t, x).prev_sample
    return x


@pytest.mark.parametrize("network", NETWORKS)
def test_a_classifier_s_gradient_gives_the_posterior(network):
    """With the exact log p(y | x_t), samples have the mean and spread of p(x_0 | y), on every path and for every prediction."""
    y, noise = 1.0, 0.3
    precision = GAUSSIAN.std**-2 + noise**-2
    mean = (GAUSSIAN.mean * GAUSSIAN.std**-2 + y * noise**-2) / precision
    guidance = ClassifierGuidance(gaussian_log_prob(NETWORKS[network][0], y, noise))
    x = sample_guided(network, guidance)
    assert abs(float(x.mean()) - mean) < 0.02 and abs(float(x.std()) - precision**-0.5) < 0.035


def test_a_classifier_trained_on_another_path():
    """The classifier is given its own x_t and t at the same lambda."""
    theirs = NETWORKS["ddpm_eps"][0]
    y, noise = 1.0, 0.3
    own = ClassifierGuidance(gaussian_log_prob(NETWORKS["sd3_flow"][0], y, noise))
    other = ClassifierGuidance(gaussian_log_prob(theirs, y, noise), parameterization=theirs)
    torch.testing.assert_close(sample_guided("sd3_flow", other, 20), sample_guided("sd3_flow", own, 20), atol=2e-2, rtol=0)


def test_a_classifier_guides_a_pipeline_besides_classifier_free_guidance(flow):
    target = torch.ones(4, 8, 8)
    log_prob = lambda x, t: -(x - target).square().flatten(1).sum(1)
    options = {"num_inference_steps": 4, "output_type": "latent"}
    plain = flow("a", guidance_scale=3.0, generator=seeded(), **options).images
    none = flow("a", guidance_scale=ClassifierGuidance(log_prob, 0.0, guidance=3.0), generator=seeded(), **options).images
    near = flow("a", guidance_scale=ClassifierGuidance(log_prob, 0.1, guidance=3.0), generator=seeded(), **options).images
    torch.testing.assert_close(none, plain)
    assert (near - target).abs().mean() < 0.9 * (plain - target).abs().mean()


def test_what_a_classifier_may_not_return(flow):
    for log_prob, says in (
        (lambda x, t: x.sum(), r"must return \(1,\).*got shape \(\)"),
        (lambda x, t: torch.zeros(len(x)), "without a gradient"),
        (lambda x, t: 1.0, "got a float"),
    ):
        with pytest.raises(ValueError, match=says):
            flow("a", guidance_scale=ClassifierGuidance(log_prob), num_inference_steps=3, output_type="latent")
    with pytest.raises(TypeError, match=r"function of \(x_t, t\)"):
        ClassifierGuidance("cat")


# ------------------------------------------------------------------------------------------------------------------ intervals, variances


def test_an_interval_is_of_noise_levels_and_the_same_under_every_scheduler(flow):
    """Guided exactly where low < sigma / alpha <= high; elsewhere only the prompt is evaluated."""
    with pytest.raises(ValueError, match="low < high"):
        GuidanceInterval(7.5, 2.0, 1.0)
    seen = {}

    class Spy(ClassifierFreeGuidance):
        def combine(self, outputs):
            seen[name].append(True)
            return super().combine(outputs)

    for name, scheduler in (("euler", FlowMatchEulerScheduler()), ("dpm", DPMSolverMultistepScheduler())):
        seen[name] = []
        flow.scheduler = scheduler
        flow("a", guidance_scale=GuidanceInterval(Spy(3.0), 0.3, 2.0), num_inference_steps=8, output_type="latent", generator=seeded())
        t = flow.scheduler.timesteps / 1000
        assert len(seen[name]) == int(((t / (1 - t) > 0.3) & (t / (1 - t) <= 2.0)).sum()) > 0
    flow.scheduler = FlowMatchEulerScheduler()


def test_the_memory_of_a_guider_begins_with_each_call_s_interval(flow):
    options = {"num_inference_steps": 6, "output_type": "latent"}
    adaptive = lambda momentum: guiders.AdaptiveProjectedGuidance(guidance_scale=6.0, adaptive_projected_guidance_momentum=momentum)
    with_memory = GuidanceInterval(adaptive(-0.75), high=2.0)
    first = flow("a", guidance_scale=with_memory, generator=seeded(), **options).images
    without = flow("a", guidance_scale=GuidanceInterval(adaptive(None), high=2.0), generator=seeded(), **options).images
    assert (first - without).abs().max() > 1e-4
    flow(["b", "c"], guidance_scale=with_memory, generator=seeded(), **options)  # another batch, another picture
    assert torch.equal(flow("a", guidance_scale=with_memory, generator=seeded(), **options).images, first)


def test_a_hooked_guider_inside_an_interval(flow):
    options = {"num_inference_steps": 4, "output_type": "latent"}
    none = flow("a", guidance_scale=1.0, generator=seeded(), **options).images
    inside = GuidanceInterval(build("SkipLayerGuidance", guidance_scale=5.0), 0.0, 1.5)
    assert (flow("a", guidance_scale=inside, generator=seeded(), **options).images - none).abs().max() > 1e-4
    outside = GuidanceInterval(build("SkipLayerGuidance", guidance_scale=5.0), 1e6, 1e7)
    torch.testing.assert_close(flow("a", guidance_scale=outside, generator=seeded(), **options).images, none)


def test_a_learned_variance_is_not_guided():
    at, outputs = moment("sd_eps")
    variances = torch.randn(2, *at.x.shape, generator=seeded(), dtype=torch.float64)
    both = [torch.cat([o, v], 1) for o, v in zip(outputs, variances, strict=True)]
    result = guided(ClassifierFreeGuidance(3.0), both[::-1], ("uncond", "cond"), at)
    torch.testing.assert_close(result[:, 3:], variances[0])
    torch.testing.assert_close(result[:, :3], outputs[1] + 3.0 * (outputs[0] - outputs[1]))


def test_guidance_of_the_first_channels():
    """DiT's published samples: three of four channels, of the mean; the rest is the conditional prediction's, for any scale."""
    at, _ = moment("sd_eps")
    x = torch.randn(2, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    at = Evaluation(x, at.timestep, at.step, at.num_steps, at.level, at.affine, at.parameterization)
    uncond, cond = torch.randn(2, 2, 8, 8, 8, generator=seeded(), dtype=torch.float64)  # means and variances
    for scale in (0.0, 0.7, 4.0):
        guidance = ClassifierFreeGuidance(scale, channels=3)
        branches = needed_branches(guidance, at)
        assert branches == ("uncond", "cond")
        result = guided(guidance, [uncond, cond], branches, at)
        torch.testing.assert_close(result[:, :3], uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3]))
        torch.testing.assert_close(result[:, 3:], cond[:, 3:])
    assert needed_branches(ClassifierFreeGuidance(1.0, channels=3), at) == ("cond",)
    for channels in (0, -1, 2.0):
        with pytest.raises(ValueError, match="how many channels"):
            ClassifierFreeGuidance(2.0, channels=channels)


def test_a_pipeline_guides_the_first_channels_only(flow):
    """One Euler step from noise is linear in the output: the guided channels are those of full guidance, the others those without."""
    draw = lambda scale: flow("a", num_inference_steps=1, guidance_scale=scale, generator=seeded(), output_type="latent").images
    full, none, some = draw(3.0), draw(1.0), draw(ClassifierFreeGuidance(3.0, channels=2))
    torch.testing.assert_close(some[:, :2], full[:, :2])
    torch.testing.assert_close(some[:, 2:], none[:, 2:])
    assert not torch.allclose(full, none, atol=1e-4)
