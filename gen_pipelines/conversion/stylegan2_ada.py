"""NVIDIA's StyleGAN2-ADA pickles, and the StyleGAN2 networks among StyleGAN3's: our StyleGAN2 has the same key names.

References: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", https://arxiv.org/abs/2006.06676
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.gans.stylegan2 import StyleGAN2Generator
from . import nvidia
from .pickles import Record
from .reader import Checkpoint, tensors


class StyleGAN2Ada(nvidia.NvidiaFormat):
    """G_ema (or G) becomes the generator of a `StyleGANPipeline`; D comes along when it is asked for."""

    name = "stylegan2_ada"
    title = "NVIDIA's stylegan2-ada-pytorch"
    paper = "https://arxiv.org/abs/2006.06676"
    generator_class = StyleGAN2Generator

    def matches(self, checkpoint: Checkpoint) -> float:
        found = nvidia.records(checkpoint)
        generator = found.get("G_ema", found.get("G"))
        if generator is None:
            return 0.0
        keys = tensors(generator)
        return 1.0 if "synthesis.b4.const" in keys and any(key.startswith("mapping.fc0.") for key in keys) else 0.0

    def generator_config(self, record: Record, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return generator_config(record, state)


def generator_config(record: Record, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of our generator, from the arguments that theirs was built with.

    Raises:
        ValueError: an argument that our network has no counterpart for.
    """
    given, config = nvidia.generator_arguments(record)
    config["resample_taps"] = nvidia.taps_of(state, ("conv0", "skip"))
    mapping, synthesis = given.inner("mapping_kwargs"), given.inner("synthesis_kwargs")
    synthesis.merge(given)  # StyleGAN3's version hands on what it does not take itself
    config["num_mapping_layers"] = mapping.take("num_layers", 8)
    mapping.drop("w_avg_beta")
    config["w_avg_beta"] = nvidia.attribute(record, "mapping", "w_avg_beta", 0.998)
    nvidia.only_usual_mapping(mapping)
    config["channel_base"] = synthesis.take("channel_base", 32768)
    config["channel_max"] = synthesis.take("channel_max", 512)
    synthesis.drop("num_fp16_res", "fp16_channels_last", "resample_filter", "conv_clamp", "fused_modconv_default")
    config["conv_clamp"] = nvidia.attribute(record, "synthesis.b4.conv1", "conv_clamp", None)
    config["architecture"] = synthesis.take("architecture", "skip")
    synthesis.only("use_noise", True)
    synthesis.only("activation", "lrelu")
    synthesis.only("kernel_size", 3)
    for part in (mapping, synthesis):
        part.done()
    return config
