"""Reading diffusers' own scheduler configs, in memory and from files."""

import inspect

import pytest
from diffusers import schedulers as D

from gen_pipelines.processes import DiscreteVPPath, EDMPath, LinearPath, Parameterization, VEPath, VPSDEPath
from gen_pipelines.processes.config import _UNREADABLE, DIFFUSERS_KEYS

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = {n: getattr(D, n) for n in dir(D) if n.endswith("Scheduler")}  # lazily imported, so listed by name


def read(config, **overrides):
    return Parameterization.from_config(config, **overrides)


def test_the_list_of_diffusers_keys_is_complete():
    assert len(CLASSES) > 40
    keys = {k for c in CLASSES.values() for k in inspect.signature(c.__init__).parameters} - {"self", "kwargs"}
    assert sorted(keys - DIFFUSERS_KEYS) == []


def _defaults(name):
    """The config of an untouched scheduler, as its constructor's signature has it (some need extras to be built)."""
    return {k: p.default for k, p in inspect.signature(CLASSES[name].__init__).parameters.items() if k not in ("self", "kwargs")}


READABLE = sorted(n for n in CLASSES if n not in _UNREADABLE and not n.startswith("CogVideoX"))


@pytest.mark.parametrize("name", READABLE)
def test_every_diffusers_class_reads_the_same_in_memory_and_from_a_file(name):
    p = read({**_defaults(name), "_class_name": name})  # a file names its class
    assert p.path.name in ("discrete_vp", "linear", "edm", "ve")
    if name != "LTXEulerAncestralRFScheduler":  # in memory it has no key of its family
        assert read(_defaults(name)) == p


@pytest.mark.parametrize("name", sorted(_UNREADABLE))
def test_classes_without_a_gaussian_path_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        read({"_class_name": name})


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (D.PNDMScheduler(**SD, steps_offset=1), Parameterization(DiscreteVPPath(**SD))),
        (
            D.DDPMScheduler(clip_sample=True, variance_type="learned_range"),
            Parameterization(DiscreteVPPath(), clip_sample=True, variance="learned_range"),
        ),
        (
            D.DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False),
            Parameterization(DiscreteVPPath(**SD, rescale_betas_zero_snr=True), "v_prediction"),
        ),
        (D.FlowMatchEulerDiscreteScheduler(shift=3.0), Parameterization(LinearPath(), "flow_prediction")),
        (
            D.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            Parameterization(LinearPath(), "flow_prediction", time_input="1000 (1 - t)", sign=-1),
        ),
        (
            D.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            Parameterization(LinearPath(), "flow_prediction"),
        ),
        (D.EDMEulerScheduler(), Parameterization(EDMPath(), "edm", sigma_data=0.5)),
        (
            D.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0),
            Parameterization(EDMPath(0.002, 700.0), "edm", sigma_data=1.0, sign=-1),
        ),
        (D.CMStochasticIterativeScheduler(), Parameterization(EDMPath(), "consistency", sigma_data=0.5, clip_sample=True)),
        (D.ScoreSdeVeScheduler(), Parameterization(VEPath(0.01, 1348.0), "score")),
        (
            D.DDPMScheduler(trained_betas=[0.1, 0.2, 0.3], clip_sample=False),
            Parameterization(DiscreteVPPath(trained_betas=(0.1, 0.2, 0.3))),
        ),
    ],
    ids=lambda v: type(v).__name__,
)
def test_known_networks(scheduler, expected):
    found = read(scheduler.config)
    assert found.with_(variance=expected.variance) == expected


def test_absent_keys_have_the_defaults_of_the_class_that_wrote_the_file():
    assert read({"_class_name": "LCMScheduler"}).path == DiscreteVPPath(**SD)
    assert read({"_class_name": "DDPMScheduler"}).clip_sample
    assert not read({"_class_name": "PNDMScheduler"}).clip_sample
    assert read({"_class_name": "DDPMScheduler", "predict_epsilon": False, "beta_start": 1e-4}).prediction == "sample"


def test_overrides_win():
    config = D.DDIMScheduler(**SD).config
    assert read(config, prediction_type="v_prediction").prediction == "v_prediction"
    assert read(config, path=VPSDEPath()).path == VPSDEPath()
    assert read(config, time_input="index_scaled").time_input == "index_scaled"
    stored = Parameterization(VPSDEPath(), "v_prediction").to_config()
    assert read(stored, prediction_type="epsilon") == Parameterization(VPSDEPath(), "epsilon")


def test_our_key_completes_diffusers():
    config = {**D.FlowMatchEulerDiscreteScheduler().config, "parameterization": {"time_input": "t"}}
    assert read(config) == Parameterization(LinearPath(), "flow_prediction", time_input="t")
    sub_vp = {"prediction_type": "score", "parameterization": {"path": {"type": "sub_vp"}}}
    assert read(sub_vp).path.name == "sub_vp"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_start": 1e-4, "shift": 1.0, "base_shift": 0.5}, "fits flow and vp"),
        ({}, "does not say what the network was trained to do"),
        ({"num_train_timesteps": 1000}, "does not say"),
        ({"beta_start": 1e-4, "beta_strat": 1e-4}, "unknown config key 'beta_strat'"),
        ({"beta_start": 1e-4, "prediction_type": "noise"}, "prediction_type 'noise'"),
        ({"_class_name": "VQDiffusionScheduler"}, "does not describe a Gaussian path"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0.1, "sigma_max": 1.0}, "needs 'sigma_data'"),
        ({"_class_name": "CogVideoXDDIMScheduler", "beta_start": 1e-4, "snr_shift_scale": 3.0}, "snr_shift_scale"),
        ({"beta_start": 1e-4, "parameterization": {"colour": 1}}, "parameterization key has colour"),
        ({"beta_start": 1e-4, "prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "zero SNR"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        read(config)


def test_an_unknown_override_is_named():
    with pytest.raises(ValueError, match="predicton_type"):
        read(D.DDIMScheduler().config, predicton_type="sample")
