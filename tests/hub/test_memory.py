"""Where weights go while a pipeline loads and runs: offload, device maps, shards and variants, as on diffusers' pipelines."""

import conftest
import numpy as np
import pytest
import torch

from gen_pipelines import AutoPipeline, FlowMatchEulerScheduler, LatentTextToImagePipeline


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.fixture(scope="module")
def pipe():
    return LatentTextToImagePipeline(
        conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), FlowMatchEulerScheduler(),
        transformer=conftest.make_transformer(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "pipe"
    pipe.save_pretrained(path)
    return path


def test_model_offload_moves_each_network_in_its_turn(pipe, folder):
    offloaded = AutoPipeline.from_pretrained(folder)
    offloaded.enable_model_cpu_offload(device="cpu")
    order = []
    for name in ("text_encoder", "transformer", "vae"):
        hook = getattr(offloaded, name)._hf_hook
        forward = hook.pre_forward
        hook.pre_forward = lambda *args, name=name, forward=forward, **kwargs: order.append(name) or forward(*args, **kwargs)
    assert np.array_equal(draw(offloaded), draw(pipe))
    assert list(dict.fromkeys(order)) == ["text_encoder", "transformer", "vae"]
    assert np.array_equal(draw(offloaded), draw(pipe))  # and again, after the hooks were freed


def test_a_device_map(pipe, folder):
    mapped = AutoPipeline.from_pretrained(folder, device_map="cpu")
    assert type(mapped) is LatentTextToImagePipeline and mapped.vae.dtype == torch.float32
    assert np.array_equal(draw(mapped), draw(pipe))
    with pytest.raises(NotImplementedError, match="everywhere"):
        AutoPipeline.from_pretrained(folder, device_map="everywhere")


@pytest.mark.parametrize("shards", [None, "40KB"])
def test_a_variant_whole_and_in_shards(pipe, tmp_path, shards):
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size=shards)
    names = [p.name for p in (tmp_path / "transformer").glob("*.safetensors")]
    assert all("fp16" in name for name in names) and (len(names) > 1) == (shards is not None)
    for options in ({}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}):
        assert np.array_equal(draw(AutoPipeline.from_pretrained(tmp_path, variant="fp16", **options)), draw(pipe)), options
    with pytest.raises(ValueError, match="model.safetensors is missing; pass variant='fp16"):
        AutoPipeline.from_pretrained(tmp_path)
