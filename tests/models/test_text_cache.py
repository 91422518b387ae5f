"""Text keys and values computed once are the same bits, and the network is left as it was."""

import conftest
import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.models.calling import TextCondition, encode_text, predict
from gen_pipelines.models.text_cache import CachedAttnProcessor, cached_text

NETWORKS = {
    "unet": conftest.make_unet,
    "transformer": conftest.make_transformer,
    "no projection": lambda: conftest.make_transformer(caption_channels=None),
}


@pytest.fixture(scope="module")
def captions():
    with torch.no_grad():
        return encode_text(conftest.make_tokenizer(), conftest.make_text_encoder(), ["a red apple", "", "hi"])


def draws(network, condition, x):
    return [predict(network, x, t, condition) for t in (900.0, 500.0, 10.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_cached_equals_uncached_bit_for_bit(name, dtype, captions):
    network = NETWORKS[name]().to(dtype)
    x = torch.randn(3, conftest.LATENT_CHANNELS, 8, 8)
    plain = draws(network, captions, x)
    with cached_text(network, trim=False) as cache:
        cached = draws(network, cache.prepare(captions), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))


@torch.no_grad()
def test_leaving_out_padding_changes_nothing_but_rounding(transformer, captions):
    x = torch.randn(3, conftest.LATENT_CHANNELS, 8, 8)
    plain = draws(transformer, captions, x)
    with cached_text(transformer) as cache:
        ready = cache.prepare(captions)
        assert ready.embeds.shape[1] == 11 and ready.mask.shape == (3, 1, 11)
        assert_close(draws(transformer, ready, x), plain, atol=2e-6, rtol=0)


@torch.no_grad()
def test_text_is_projected_once_per_layer_and_condition(transformer, captions):
    counts = []
    layers = [block.attn2.to_k for block in transformer.transformer_blocks] + [transformer.caption_projection]
    hooks = [layer.register_forward_hook(lambda *_: counts.append(1)) for layer in layers]
    x = torch.randn(3, conftest.LATENT_CHANNELS, 8, 8)
    try:
        with cached_text(transformer) as cache:
            both, one = cache.prepare(captions), cache.prepare(captions[:1])
            for _ in range(4):
                predict(transformer, x, 5.0, both)
                predict(transformer, x[:1], 5.0, one)
        assert len(counts) == 2 * len(layers)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_another_text_in_the_same_memory_is_not_confused(unet):
    """Conditions that come and go: the memory of a dead one may be reused, so those seen are kept alive."""
    x = torch.randn(1, conftest.LATENT_CHANNELS, 8, 8)
    texts = [torch.randn(1, 16, conftest.TEXT_WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    plain = [predict(unet, x, 5.0, TextCondition(text)) for text in texts]
    with cached_text(unet) as cache:
        for text, wanted in zip(texts, plain, strict=True):
            assert torch.equal(predict(unet, x, 5.0, cache.prepare(TextCondition(text.clone()))), wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_restored_even_after_an_error(name):
    network = NETWORKS[name]()
    before, projection = dict(network.attn_processors), getattr(network, "caption_projection", None)
    keys = list(network.state_dict())
    with pytest.raises(RuntimeError, match="boom"), cached_text(network):
        assert any(isinstance(p, CachedAttnProcessor) for p in network.attn_processors.values())
        raise RuntimeError("boom")
    assert network.attn_processors == before and getattr(network, "caption_projection", None) is projection
    assert list(network.state_dict()) == keys


@torch.no_grad()
def test_other_processors_are_left_alone(captions):
    from diffusers.models.attention_processor import AttnProcessor

    network = conftest.make_unet()
    network.set_attn_processor(AttnProcessor())
    with cached_text(network):
        assert {type(p) for p in network.attn_processors.values()} == {AttnProcessor}


def test_networks_that_it_does_not_know_pass_through(vae):
    condition = TextCondition(torch.zeros(1, 2, 3))
    with cached_text(vae) as cache:
        assert torch.equal(cache.prepare(condition).embeds, condition.embeds) and cache.prepare(None) is None
