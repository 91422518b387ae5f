"""Where weights go while a pipeline loads and runs: offload, device maps, shards and variants, as on diffusers' pipelines."""

import conftest
import numpy as np
import pytest
import torch

from gen_pipelines import AutoPipeline, FlowMatchEulerScheduler, LatentTextToImagePipeline
from gen_pipelines.hub import loading


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


@pytest.mark.parametrize(("shards", "dtype"), [(None, torch.float32), ("40KB", torch.bfloat16)])
@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "two towers"])
def test_what_is_filled_from_the_file_is_what_the_libraries_load(part, shards, dtype, tmp_path, monkeypatch):
    """Networks that need nothing but their stored tensors are not built twice: the result is the library's own, config and buffers too."""
    from transformers import CLIPTextModelWithProjection

    if part == "two towers":
        network = CLIPTextModelWithProjection(conftest.make_text_encoder().config).eval()
    else:
        network = getattr(conftest, f"make_{part}")()
    options = {"max_shard_size": shards} if shards else {}
    network.save_pretrained(str(tmp_path / "n"), **options)
    library = type(network).__module__.split(".")[0]
    filled, fill = [], loading._filled
    monkeypatch.setattr(loading, "_filled", lambda *given: filled.append(1) or fill(*given))
    ours = loading.load_module(tmp_path / "n", library, type(network), dtype)
    theirs = type(network).from_pretrained(str(tmp_path / "n"), dtype=dtype)
    assert filled and not ours.training and ours.dtype == theirs.dtype == dtype
    for kind in ("named_parameters", "named_buffers"):
        a, b = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
        assert all(a[n].requires_grad == b[n].requires_grad and a[n].device == b[n].device for n in a)
    bookkeeping = {"_use_kernels", "_weight_conversions", "_is_hf_initialized"}  # what transformers' loader notes about its own work
    kept = [{key for m in network.modules() for key in vars(m)} - bookkeeping for network in (ours, theirs)]
    assert kept[0] == kept[1]
    for network, name in ((ours, "ours"), (theirs, "theirs")):
        network.save_pretrained(str(tmp_path / name))
    for file in (tmp_path / "theirs").iterdir():
        assert file.read_bytes().replace(b"theirs", b"ours") == (tmp_path / "ours" / file.name).read_bytes(), file.name


def test_a_network_that_computes_its_tables_is_built_by_its_library(tmp_path, monkeypatch):
    network = conftest.make_transformer()  # its position table is not stored
    network.save_pretrained(str(tmp_path))
    monkeypatch.setattr(loading, "_filled", None)
    again = loading.load_module(tmp_path, "diffusers", type(network), torch.float32)
    assert torch.equal(dict(again.named_buffers())["pos_embed.pos_embed"], dict(network.named_buffers())["pos_embed.pos_embed"])
