import math

import pytest
import torch
from conftest import make_vae
from diffusers import VQModel
from torch.testing import assert_close

from gen_pipelines.processes import Parameterization
from gen_pipelines.processes.paths import PATHS
from gen_pipelines.training.objectives.autoencoder import AutoencoderObjective, pyramid_distance
from gen_pipelines.training.objectives.denoising import DenoisingObjective
from gen_pipelines.training.objectives.time_densities import TIME_DENSITIES, LogitNormal, LogNormalSigma, Mode, Uniform
from gen_pipelines.training.objectives.weightings import WEIGHTINGS
from gen_pipelines.training.random import normal, uniform

NETWORKS = {
    "ddpm": Parameterization(PATHS["discrete_vp"](), "epsilon"),
    "x_0": Parameterization(PATHS["discrete_vp"](), "sample"),
    "v": Parameterization(PATHS["cosine"](), "v_prediction", lambda_range=(-6.0, 6.0)),
    "ve": Parameterization(PATHS["ve"](), "score"),
    "vp": Parameterization(PATHS["vp_sde"](), "score"),
    "sub_vp": Parameterization(PATHS["sub_vp"](), "score"),
    "flow": Parameterization(PATHS["linear"](), "flow_prediction", lambda_range=(-6.0, 6.0)),
    "edm": Parameterization(PATHS["edm"](), "edm"),
}


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


class Oracle:
    """The network that knows x_0: it returns the target, plus `error` times what an error of one in eps does to it."""

    def __init__(self, parameterization, x_0, error=0.0):
        self.p, self.x_0, self.error = parameterization, x_0, error

    def __call__(self, x, network_time, condition):
        t = self.p.path_time(network_time.double())
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (value.reshape(shape) for value in (self.p.path.alpha(t), self.p.path.sigma(t)))
        x_t = x.double() / self.p.scale_model_input(torch.ones_like(x).double(), t)
        eps = (x_t - alpha * self.x_0) / sigma + self.error
        return self.p.target((x_t - sigma * eps) / alpha, eps, t)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_that_knows_the_data_has_no_loss(name):
    x_0 = torch.randn(6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = DenoisingObjective(NETWORKS[name])(Oracle(NETWORKS[name], x_0), x_0, generator=generators(6)).per_sample
    assert loss.shape == (6,)
    assert loss.max() < 1e-4  # network times of float32 are inverted inside the oracle


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "target"])
def test_a_weighting_means_the_same_for_every_prediction(name, weighting):
    """An error of one in eps costs w(snr), whatever the network predicts."""
    p, w = NETWORKS[name], WEIGHTINGS[weighting]
    objective = DenoisingObjective(p, weighting=w)
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    t = Uniform()(u, p)
    error_of_target = p.target(-p.path.sigma(t) / p.path.alpha(t), torch.ones_like(t), t)
    snr = (p.path.alpha(t) / p.path.sigma(t)) ** 2
    assert_close(objective.weight(t) * error_of_target.square(), w(snr))
    # and directly, through the loss
    x_0 = torch.zeros(1, 1, dtype=torch.float64)
    out = objective(Oracle(p, x_0, error=1.0), x_0, generator=generators(1))
    drawn = Uniform()(uniform((1, 1), generators(1))[:, 0], p)
    assert_close(out.per_sample, w((p.path.alpha(drawn) / p.path.sigma(drawn)) ** 2).to(out.per_sample), rtol=1e-3, atol=1e-6)


def test_flow_matching_is_the_papers_formula():
    """E |u(x_t, t) - (eps - x_0)|^2, x_t = (1 - t) x_0 + t eps (Lipman et al. 2023, eq. 23 with time turned round)."""
    p = Parameterization(PATHS["linear"](), "flow_prediction")
    x_0 = torch.randn(4, 3, 2, 2)
    seen = {}

    def model(x, t, condition):
        seen.update(x=x, t=t, condition=condition)
        return 0.3 * x

    loss = DenoisingObjective(p)(model, x_0, condition="caption", generator=generators(4)).per_sample
    draws = generators(4)
    t = uniform((4, 1), draws)[:, 0]
    eps = normal(x_0.shape, draws)
    x_t = (1 - t.view(-1, 1, 1, 1)) * x_0 + t.view(-1, 1, 1, 1) * eps
    assert seen["condition"] == "caption"
    assert_close(seen["t"], 1000 * t)
    assert_close(seen["x"], x_t)
    assert_close(loss, (0.3 * x_t - (eps - x_0)).square().flatten(1).mean(1))


def test_the_loss_at_low_and_at_high_noise_are_the_loss():
    p = Parameterization(PATHS["linear"](), "flow_prediction")
    output = DenoisingObjective(p)(lambda x, t, condition: 0.3 * x, torch.randn(8, 3), generator=generators(8))
    low, high = output.metrics["loss_low_noise"], output.metrics["loss_high_noise"]
    noisy = uniform((8, 1), generators(8))[:, 0] > 0.5
    assert 0 < noisy.sum() < 8
    assert torch.equal(low.isnan(), noisy) and torch.equal(high.isnan(), ~noisy)
    assert_close(torch.where(noisy, high, low), output.per_sample)


def test_ddpm_draws_every_index_and_no_other():
    p = NETWORKS["ddpm"]
    t = Uniform()(torch.arange(1000, dtype=torch.float64) / 1000 + 5e-4, p)
    assert t.tolist() == list(range(1000))


def test_edm_is_the_papers_formula():
    """lambda(sigma) |D - y|^2 with lambda = 1 / c_out^2 (Karras et al. 2022, table 1) is weight one on the error of F."""
    p = NETWORKS["edm"]
    sigma = LogNormalSigma()(torch.tensor([0.1, 0.5, 0.9]), p)
    quantile = torch.tensor([-1.2815515655, 0.0, 1.2815515655], dtype=torch.float64)
    assert_close(sigma, torch.exp(-1.2 + 1.2 * quantile), rtol=1e-5, atol=0)
    weight_of_x_0 = DenoisingObjective(p, weighting=lambda snr: torch.ones_like(snr) / snr).weight(sigma)  # weight one on x_0, per F
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    assert_close(weight_of_x_0, c_out.square())


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "flow", "v"])
def test_likelihood_weighting_integrates_the_papers_weight(name):
    """E_t w_eps(t) = lambda range: the integral of -1/2 dlog(snr)/dt is half the fall of log snr (Kingma et al. 2021, eq. 17)."""
    p = NETWORKS[name]
    n = 200_000
    t = Uniform()((torch.arange(n, dtype=torch.float64) + 0.5) / n, p)
    factor = p.target(-p.path.sigma(t) / p.path.alpha(t), torch.ones_like(t), t)
    weight = DenoisingObjective(p, weighting="likelihood").weight(t) * factor.square()
    low, high = p.trained_t_range
    expected = float(p.path.lambda_(low) - p.path.lambda_(high))
    assert weight.mean().item() == pytest.approx(expected, rel=2e-3)


def test_densities_have_the_papers_quantiles():
    p = Parameterization(PATHS["linear"](), "flow_prediction")
    u = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    assert_close(LogitNormal(0.5, 2.0)(u, p), torch.sigmoid(0.5 + 2 * math.sqrt(2) * torch.erfinv(2 * u - 1)))
    assert_close(Mode(0.0)(u, p), 1 - u)
    assert_close(Mode(1.0)(u, p), 1 - u - (torch.cos(math.pi * u / 2) ** 2 - 1 + u))


@pytest.mark.parametrize("density", TIME_DENSITIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_times_stay_in_the_trained_range(density, name):
    p = NETWORKS[name]
    t = TIME_DENSITIES[density]()(torch.linspace(0, 1 - 2**-24, 101), p)
    low, high = p.trained_t_range
    assert torch.isfinite(t).all() and t.min() >= low - 1e-9 and t.max() <= high + 1e-9


def test_what_denoising_cannot_train_is_refused():
    with pytest.raises(ValueError, match="consistency"):
        DenoisingObjective(Parameterization(PATHS["edm"](), "consistency"))
    with pytest.raises(ValueError, match="trains no variance"):
        DenoisingObjective(Parameterization(PATHS["discrete_vp"](), "epsilon", variance="learned_range"))
    with pytest.raises(ValueError, match="continuous path"):
        DenoisingObjective(NETWORKS["ddpm"], weighting="likelihood")


def test_autoencoder_terms_are_the_formula():
    vae, x = make_vae(), torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
        noise = normal(posterior.mean.shape, generators(3))
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        terms = {
            "l1": (y - x).abs().flatten(1).mean(1),
            "l2": (y - x).square().flatten(1).mean(1),
            "kl": posterior.kl() / x[0].numel(),  # diffusers' own analytic KL, nats per picture
            "perceptual_weight": pyramid_distance(x, y),
        }
        for name, expected in terms.items():
            weights = {"l1": 0.0, "l2": 0.0, "kl": 0.0, "perceptual_weight": 0.0} | {name: 2.0}
            out = AutoencoderObjective(**weights, perceptual=pyramid_distance)(vae, x, generator=generators(3))
            assert_close(out.per_sample, 2 * expected)
        assert_close(out.metrics["psnr"], 10 * torch.log10(4 / terms["l2"]))


def test_autoencoder_objective_takes_a_quantised_latent():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VQModel(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4, num_vq_embeddings=16, norm_num_groups=4,
        )  # fmt: skip
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    out = AutoencoderObjective(vq=1.0)(network, x, generator=generators(2))
    without = AutoencoderObjective(vq=0.0)(network, x, generator=generators(2))
    assert_close(out.per_sample - without.per_sample, out.metrics["commit"], rtol=1e-4, atol=1e-6)
    out.per_sample.mean().backward()
    assert network.quantize.embedding.weight.grad.abs().sum() > 0


def test_weights_have_their_limits_at_both_ends():
    """At snr 0 (t = 1) and infinity (t = 0) the weight of an error of v is the limit of w(snr) alpha^2, not inf / inf."""
    p = Parameterization(PATHS["linear"](), "flow_prediction")  # an error of one in eps is one of 1 / alpha in v
    limits = {"epsilon": (1, 0), "sample": (0, 1), "truncated_snr": (1, 1), "min_snr": (0, 0), "soft_min_snr": (0, 0)}
    limits |= {"p2": (0, 0), "sigmoid": (0, 0)}
    assert set(limits) == set(WEIGHTINGS) - {"target"}
    for name, expected in limits.items():
        weight = DenoisingObjective(p, weighting=WEIGHTINGS[name]).weight(torch.tensor([0.0, 1.0]))
        assert_close(weight, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_latents_are_normalised_as_the_pipeline_undoes_it():
    from types import SimpleNamespace

    from gen_pipelines.pipelines.latent_text_to_image import LatentTextToImagePipeline
    from gen_pipelines.training.tasks.latent_text_to_image import LatentTextToImageTask

    class Config(dict):
        __getattr__ = dict.__getitem__

    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for config in (
        {"scaling_factor": 0.5, "shift_factor": 0.2},
        {"scaling_factor": 1.5, "shift_factor": None, "latents_mean": [0.1, -0.3, 2.0], "latents_std": [1.0, 2.0, 0.5]},
    ):
        vae = SimpleNamespace(config=Config(config), dtype=torch.float32, decode=lambda latents, return_dict: (latents,))
        task = SimpleNamespace(vae=vae, denoiser=torch.nn.Identity())
        assert_close(LatentTextToImagePipeline.decode_latents(task, LatentTextToImageTask.normalise(task, z)), z)
