"""NVIDIA's StyleGAN3 pickles, T and R: our StyleGAN3 has the same key names.

References: Karras et al. 2021, "Alias-Free Generative Adversarial Networks", https://arxiv.org/abs/2106.12423
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.gans.stylegan3 import StyleGAN3Generator
from . import nvidia
from .pickles import Record
from .reader import Checkpoint, tensors


class StyleGAN3(nvidia.NvidiaFormat):
    """G_ema (or G) becomes the generator of a `StyleGANPipeline`; D comes along when it is asked for."""

    name = "stylegan3"
    title = "NVIDIA's stylegan3"
    paper = "https://arxiv.org/abs/2106.12423"
    generator_class = StyleGAN3Generator

    def matches(self, checkpoint: Checkpoint) -> float:
        found = nvidia.records(checkpoint)
        generator = found.get("G_ema", found.get("G"))
        keys = {} if generator is None else tensors(generator)
        return 1.0 if {"synthesis.input.freqs", "synthesis.input.phases", "mapping.fc0.weight"} <= set(keys) else 0.0

    def generator_config(self, record: Record, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return generator_config(record)


def generator_config(record: Record) -> dict[str, Any]:
    """The configuration of our generator, from the arguments that theirs was built with.

    Raises:
        ValueError: an argument that our network has no counterpart for.
    """
    given, config = nvidia.generator_arguments(record)
    mapping = given.inner("mapping_kwargs")
    config["num_mapping_layers"] = mapping.take("num_layers", 2)
    mapping.drop("w_avg_beta")
    config["w_avg_beta"] = nvidia.attribute(record, "mapping", "w_avg_beta", 0.998)
    nvidia.only_usual_mapping(mapping)
    kernel, radial = given.take("conv_kernel", 3), given.take("use_radial_filters", False)
    if (kernel, radial) not in ((3, False), (1, True)):
        raise ValueError(
            f"G: conv_kernel = {kernel} with use_radial_filters = {radial} is neither T (3, False) nor R (1, True); it is not covered."
        )
    config["variant"] = "r" if radial else "t"
    for ours, default in (("channel_base", 32768), ("channel_max", 512)):  # ours are doubled for R, theirs are as they are used
        value = given.take(ours, default)
        if radial and value % 2:
            raise ValueError(f"G: {ours} = {value} is odd, which our R cannot have.")
        config[ours] = value // 2 if radial else value
    config["num_layers"] = given.take("num_layers", 14)
    config["num_critical"] = given.take("num_critical", 2)
    config["first_cutoff"] = given.take("first_cutoff", 2)
    config["first_stopband"] = given.take("first_stopband", 2**2.1)
    config["last_stopband_rel"] = given.take("last_stopband_rel", 2**0.3)
    config["margin_size"] = given.take("margin_size", 10)
    config["output_scale"] = given.take("output_scale", 0.25)
    config["filter_size"] = given.take("filter_size", 6)
    config["lrelu_upsampling"] = given.take("lrelu_upsampling", 2)
    config["conv_clamp"] = given.take("conv_clamp", 256)
    given.drop("num_fp16_res", "magnitude_ema_beta")
    for part in (mapping, given):
        part.done()
    return config
