"""RealNVP and Glow: density and samples, saving, labels, reversible training, mixed precision, compilation, and what is refused."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.models.flows.base import standard_normal_log_prob
from gen_pipelines.models.flows.glow import GlowModel
from gen_pipelines.models.flows.realnvp import RealNVPModel
from gen_pipelines.training.objectives.likelihood import LikelihoodObjective

SMALL, VARIATIONAL = {"in_channels": 1, "sample_size": 8, "hidden_channels": 6}, {"dequantization": "variational"}
FLOWS = {
    "glow": lambda **k: GlowModel(**SMALL | {"num_levels": 2, "num_steps": 2} | k),
    "glow_additive": lambda **k: FLOWS["glow"](coupling="additive", place_bias=True, pre_transform="marginal", **k),
    "glow_labels": lambda **k: FLOWS["glow"](num_class_labels=3, pre_transform="logit", num_blocks=1, **k),
    "glow_three_levels": lambda **k: GlowModel(
        **SMALL | {"num_levels": 3, "num_steps": (1, 2, 1), "hidden_channels": (4, 5, 6), "edge_value": 1.0} | k
    ),
    "glow_variational": lambda **k: FLOWS["glow"](**VARIATIONAL | {"split": False} | k),
    "realnvp": lambda **k: RealNVPModel(**SMALL | {"num_couplings": 1, "num_blocks": 1} | k),
    "realnvp_actnorm": lambda **k: FLOWS["realnvp"](split=False, normalization="actnorm", place_bias=True, pre_transform="marginal", **k),
}


def make(name, dtype=torch.float64, **changes):
    """A flow with weights that are nowhere zero, initialised from pictures; the pictures and their labels."""
    torch.manual_seed(0)
    flow = FLOWS[name](**changes).to(dtype)
    x = torch.rand(5, flow.config.in_channels, *flow.size, dtype=dtype) * 1.8 - 0.9
    labels = torch.tensor([0, 2, 1, 1, 0]) if flow.config.num_class_labels else None
    flow.initialize_from_batch(x, labels)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval(), x, labels


@pytest.mark.parametrize("name", FLOWS)
def test_encode_and_decode_are_inverse_and_the_log_det_is_the_jacobian(name):
    flow, x, labels = make(name)
    latents, log_det = flow.encode(x, labels)
    assert [tuple(latent.shape[1:]) for latent in latents] == flow.latent_shapes
    assert sum(latent[0].numel() for latent in latents) == x[0].numel()
    back, log_det_back = flow.decode(latents, labels)
    assert_close(back, x, rtol=1e-9, atol=1e-9)
    assert_close(log_det_back, -log_det, rtol=1e-9, atol=1e-9)

    def row(z):
        return torch.cat([latent.flatten() for latent in flow.encode(z.view(1, *x.shape[1:]), None if labels is None else labels[:1])[0]])

    jacobian = torch.autograd.functional.jacobian(row, x[0].flatten())
    assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FLOWS)
def test_the_density_of_a_sample_is_the_density_of_the_picture(name):
    """x, log p = sample(); log_prob(x) = log p, at any temperature: the model's own density."""
    flow, _, labels = make(name)
    given = None if labels is None else labels[:3]
    for temperature in (1.0, 0.5):
        x, log_p = flow.sample(3, given, temperature, torch.Generator().manual_seed(1))
        assert_close(flow.log_prob(x, given), log_p, rtol=1e-6, atol=1e-6)
    mean, log_p = flow.sample(1, None if labels is None else labels[:1], 0.0)
    assert_close(flow(mean, None if labels is None else labels[:1]).latents[0].abs().max().item(), 0.0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_save_and_load_after_initialisation(name, tmp_path):
    flow, x, labels = make(name, torch.float32)
    flow.save_pretrained(tmp_path)
    loaded = type(flow).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.log_prob(x, labels), flow.log_prob(x, labels))
    before = copy.deepcopy(loaded.state_dict())
    loaded.train().initialize_from_batch(torch.rand_like(x) * 0.1, labels)  # a second time, after loading: nothing happens
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", FLOWS)
def test_training_reaches_every_parameter_and_keeps_densities_in_float32_under_bf16(name):
    flow, x, labels = make(name, torch.float32)
    flow.train()
    pictures = (x * 127.5 + 127.5).round() / 127.5 - 1
    objective = LikelihoodObjective()
    generators = lambda: [torch.Generator().manual_seed(n) for n in range(5)]
    full = objective(flow, pictures, labels, generator=generators())
    full.per_sample.mean().backward()
    for key, parameter in flow.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, key
    flow.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = objective(flow, pictures, labels, generator=generators())
        latents, log_det = flow.encode(x, labels)
    assert half.per_sample.dtype == log_det.dtype == torch.float32 and {latent.dtype for latent in latents} == {torch.float32}
    half.per_sample.mean().backward()
    assert_close(half.per_sample, full.per_sample, rtol=0.02, atol=0.02)
    assert not torch.equal(half.per_sample, full.per_sample)  # the networks did run in bf16


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_compiles_without_graph_breaks(name):
    flow, x, labels = make(name, torch.float32)
    torch._dynamo.reset()
    for mode in (True, False):
        flow.train(mode)
        compiled = torch.compile(lambda z, l: flow(z, l).log_prob, backend="eager", fullgraph=True)
        assert_close(compiled(x, labels), flow.log_prob(x, labels), rtol=1e-4, atol=1e-3)
    latents, _ = flow.encode(x, labels)
    compiled = torch.compile(lambda z, l: flow.decode(z, l)[0], backend="eager", fullgraph=True)
    assert_close(compiled(latents, labels), flow.decode(latents, labels)[0], rtol=1e-4, atol=1e-4)


def test_temperature_scales_every_level_and_pictures_belong_to_their_generator():
    flow, _, _ = make("glow")
    seeds = lambda numbers: [torch.Generator().manual_seed(n) for n in numbers]
    cold, warm = flow.draw_latents(2, 0.5, seeds([1, 2])), flow.draw_latents(2, 1.0, seeds([1, 2]))
    for one, two in zip(cold, warm, strict=True):
        assert_close(one, 0.5 * two)
    alone, together = flow.sample(1, generator=seeds([2])), flow.sample(2, generator=seeds([1, 2]))
    assert_close(alone[0][0], together[0][1])
    with pytest.raises(ValueError, match="temperature"):
        flow.draw_latents(1, -1.0)


def test_the_split_prior_depends_on_what_goes_on():
    """Glow's prior of a split is conditional: the same fine latents give other fine values beside other coarse ones."""
    flow, _, _ = make("glow")
    fine = torch.zeros(1, *flow.latent_shapes[0], dtype=torch.float64)
    means = []
    for coarse in (0.0, 1.0):
        h = torch.full((1, *flow.latent_shapes[0]), coarse, dtype=torch.float64)
        means.append(flow.priors[0].inverse(fine, h)[0])
    assert (means[0] - means[1]).abs().max() > 1e-3


def test_labels_change_the_density_and_are_asked_for():
    flow, x, labels = make("glow_labels")
    assert not torch.isclose(flow.log_prob(x, labels), flow.log_prob(x, (labels + 1) % 3)).any()
    with pytest.raises(ValueError, match=r"labels \(from 0 to 2\) are needed"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="without classes"):
        make("glow")[0].log_prob(x, labels)
    with pytest.raises(ValueError, match="one per picture"):
        flow.log_prob(x, labels[:2])


@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reversible_gradients_are_those_of_autograd(coupling, dtype):
    flow, x, _ = make("glow", dtype, num_steps=4, coupling=coupling, place_bias=True)
    gradients = []
    for reversible in (False, True):
        for level in flow.levels:
            level.reversible = reversible
        flow.zero_grad()
        z = x.clone().requires_grad_()
        loss = -flow.log_prob(z).mean()
        loss.backward()
        gradients.append({"x": z.grad, "loss": loss.detach()} | {key: p.grad.clone() for key, p in flow.named_parameters()})
    for key, expected in gradients[0].items():
        scale = expected.abs().max().item()
        assert_close(gradients[1][key], expected, rtol=0, atol=(1e-5 if dtype == torch.float32 else 1e-12) * max(scale, 1e-2), msg=key)


def saved_bytes(reversible: bool, num_steps: int) -> int:
    """Bytes that autograd keeps for the backward pass and that are no parameters."""
    flow, _, _ = make("glow", torch.float32, num_steps=num_steps, num_levels=1, reversible=reversible)
    flow.train()
    own, kept = {p.untyped_storage().data_ptr() for p in flow.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.rand(16, 1, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flow.log_prob(x).mean()
    loss.backward()
    return sum(kept.values())


def test_reversible_memory_does_not_grow_with_depth():
    """What is kept grows with the parameters (small matrices), not with the activations."""
    shallow, deep = saved_bytes(True, 2), saved_bytes(True, 8)
    plain_shallow, plain_deep = saved_bytes(False, 2), saved_bytes(False, 8)
    assert plain_deep > 2.5 * plain_shallow  # the test can tell
    assert deep < 1.5 * shallow and deep < 0.2 * plain_deep


def test_loss_is_the_hand_computation_of_the_identity_flow():
    """Without steps that do anything, log p(x) is that of independent normals, in the coordinates of pictures."""
    flow = GlowModel(in_channels=1, sample_size=2, num_levels=1, num_steps=1, hidden_channels=4).double()
    with torch.no_grad():  # sigmoid(r + 2) s = 1: undo the coupling's first scale by the actnorm of what it changes
        step = flow.levels[0].steps[0]
        weight = torch.eye(4).double()
        step.conv.lower.zero_()
        step.conv.upper.zero_()
        step.conv.log_diagonal.zero_()
        step.conv.permutation.copy_(weight)
        step.conv.sign.fill_(1)
        step.actnorm.log_scale[2:] = -math.log(torch.sigmoid(torch.tensor(2.0, dtype=torch.float64)))
    x = torch.tensor([[[[-0.5, 0.25], [0.75, -1.0]]]], dtype=torch.float64)
    expected = -0.5 * x.square().sum() - 2 * math.log(2 * math.pi)
    assert_close(flow.log_prob(x), expected[None])
    assert_close(flow.log_prob(x), standard_normal_log_prob([x]))


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("glow", {"sample_size": 10}, "multiple of 4; got 10"),
        ("glow", {"num_steps": (2, 2, 2)}, "num_steps: give one number, or 2"),
        ("glow", {"hidden_channels": 0}, "at least 1"),
        ("glow", {"coupling": "spline"}, "affine, additive"),
        ("glow", {"pre_transform": "square"}, "none, logit, marginal"),
        ("glow", {"dequantization": "none"}, "uniform, variational"),
        ("glow", {"num_bits": 9}, "from 1 to 8"),
        ("glow", {"num_class_labels": 0}, "at least 1"),
        ("realnvp", {"normalization": "layer"}, "batch_norm, actnorm"),
        ("realnvp", {"num_class_labels": 2}, "knows no classes"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, changes, match):
    with pytest.raises(ValueError, match=match):
        FLOWS[name](**changes)


def test_inputs_that_do_not_fit_are_refused():
    flow, x, _ = make("glow")
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\) are needed, got \(5, 1, 8, 4\)"):
        flow.log_prob(x[..., :4])
    latents, _ = flow.encode(x)
    with pytest.raises(ValueError, match="by level are needed"):
        flow.decode(latents[:1])


def test_batch_norm_samples_in_evaluation_mode_only():
    flow, x, _ = make("realnvp")
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        flow.train().sample(2)


def test_batch_statistics_are_those_of_the_batch_in_training_and_running_ones_in_evaluation():
    flow, x, _ = make("realnvp")
    alone, together = flow.log_prob(x[:1]), flow.log_prob(x)
    assert_close(alone[0], together[0])
    flow.train()
    assert not torch.isclose(flow.log_prob(x[:2])[0], flow.log_prob(x)[0])
