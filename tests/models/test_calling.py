"""`predict` and `encode_text`: every known network is called with what it was trained to take."""

import logging

import conftest
import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.models.calling import ClassCondition, TextCondition, caller_of, encode_text, predict, unwrap


@pytest.fixture
def captions(tokenizer, text_encoder):
    with torch.no_grad():
        return encode_text(tokenizer, text_encoder, ["a red apple", "hi"])


@pytest.fixture
def x():
    return torch.randn(2, conftest.LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))


def test_encode_text_follows_clips_convention(tokenizer, text_encoder, captions):
    assert captions.embeds.shape == (2, conftest.MAX_TOKENS, conftest.TEXT_WIDTH)
    assert captions.mask.dtype == torch.bool and captions.mask.sum(1).tolist() == [11, 4]  # letters, begin and end; no merges
    ids = tokenizer(["a red apple", "hi"], padding="max_length", return_tensors="pt").input_ids
    assert_close(captions.embeds, text_encoder(ids).last_hidden_state)
    assert_close(captions.pooled, text_encoder(ids).pooler_output)


def test_encode_text_names_what_it_cuts(tokenizer, text_encoder, caplog):
    with caplog.at_level(logging.WARNING), torch.no_grad():
        cut = encode_text(tokenizer, text_encoder, ["abcdefghijklmnopqrst", "short"])
    assert "'opqrst'" in caplog.text and "abcdefghijklmnopqrst" in caplog.text and caplog.text.count("was cut") == 1
    same = encode_text(tokenizer, text_encoder, ["abcdefghijklmn"])
    assert_close(cut.embeds[:1, :14], same.embeds[:, :14])  # the 15th is n there and n at a word's end here


def test_a_caption_that_just_fits_is_not_reported(tokenizer, text_encoder, caplog):
    encode_text(tokenizer, text_encoder, ["abcdefghijklmn"])
    assert not caplog.records


def test_gradients_reach_the_text_encoder(tokenizer):
    encoder = conftest.make_text_encoder()
    encode_text(tokenizer, encoder, ["a"]).embeds.sum().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if "layers" in name)


def test_predict_is_the_networks_own_forward(unet, transformer, captions, x):
    with torch.no_grad():
        assert_close(predict(unet, x, 3.5, captions), unet(x, 3.5, captions.embeds).sample)
        own = transformer(
            x,
            encoder_hidden_states=captions.embeds,
            encoder_attention_mask=captions.mask,
            timestep=torch.full((2,), 3.5),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        assert_close(predict(transformer, x, 3.5, captions), own)
        for t in (torch.tensor(3.5), torch.full((2,), 3.5)):
            assert_close(predict(transformer, x, t, captions), own)


def test_the_mask_counts_where_it_is_passed(transformer, unet, captions, x):
    blind = TextCondition(captions.embeds, torch.ones_like(captions.mask))
    with torch.no_grad():
        assert not torch.equal(predict(transformer, x, 5.0, captions), predict(transformer, x, 5.0, blind))
        assert torch.equal(predict(unet, x, 5.0, captions), predict(unet, x, 5.0, blind))


def test_class_conditional_and_unconditional_networks(x):
    from diffusers import DiTTransformer2DModel, UNet2DModel

    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=8, num_class_embeds=3,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1).eval()  # fmt: skip
    dit = DiTTransformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4, num_embeds_ada_norm=10
    ).eval()
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        assert_close(predict(unet, x, 4, ClassCondition(labels)), unet(x, 4, class_labels=labels).sample)
        assert predict(dit, x, 4, ClassCondition(labels)).shape == x.shape
    with pytest.raises(ValueError, match="num_embeds_ada_norm"):
        predict(dit, x, 4)


def test_pooled_text_goes_to_mmdit(x):
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                                    joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12,
                                    pos_embed_max_size=8).eval()  # fmt: skip
    text = TextCondition(torch.randn(2, 5, 16), pooled=torch.randn(2, 12))
    with torch.no_grad():
        assert predict(network, x, 0.5, text).shape == x.shape
    with pytest.raises(ValueError, match="pooled"):
        predict(network, x, 0.5, TextCondition(text.embeds))


def test_picture_sizes_go_to_networks_trained_with_them(captions, x):
    network = conftest.make_transformer(use_additional_conditions=True, num_attention_heads=3, attention_head_dim=8, cross_attention_dim=24)
    sized = TextCondition(captions.embeds, captions.mask, size=torch.tensor([[16.0, 32.0]]).expand(2, 2))
    with torch.no_grad():
        assert predict(network, x, 5, sized).shape == x.shape
    with pytest.raises(ValueError, match="size"):
        predict(network, x, 5, captions)


def test_wrapped_networks_and_their_dtype(unet, captions, x):
    class Wrapper(torch.nn.Module):  # as DDP and accelerate keep a network
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    with torch.no_grad():
        assert unwrap(Wrapper(unet)) is unet
        assert_close(predict(Wrapper(unet), x, 3, captions), predict(unet, x, 3, captions))
        assert predict(conftest.make_unet().to(torch.bfloat16), x, 3, captions).dtype == torch.bfloat16


def test_unknown_networks_and_wrong_conditions_are_named(text_encoder, unet, captions, x):
    with pytest.raises(TypeError, match="CLIPTextModel.*UNet2DConditionModel.*PixArtTransformer2DModel"):
        caller_of(text_encoder)
    with pytest.raises(ValueError, match="NoneType"):
        predict(unet, x, 1, None)


def test_conditions_join_repeat_and_select(captions):
    both = TextCondition.cat([captions, captions[:1]])
    assert len(both) == 3 and both.pooled.shape[0] == 3
    assert torch.equal(captions.repeat(2).embeds[1], captions.embeds[0])
    assert torch.equal(captions[[1, 0]].mask, captions.mask.flip(0))
    assert captions.to(dtype=torch.float64).mask.dtype == torch.bool
    with pytest.raises(ValueError, match="mask"):
        TextCondition.cat([captions, TextCondition(captions.embeds, pooled=captions.pooled)])
    with pytest.raises(ValueError, match="embeds"):
        TextCondition.cat([TextCondition(captions.embeds), TextCondition(captions.embeds[:, :3])])
