"""`encode_prompt`: what the text encoders say of a caption draws the picture of the caption."""

import inspect

import pytest
import torch

from gen_pipelines import AutoPipeline

OPTIONS = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


def seeded(count=1):
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.fixture(scope="module")
def emoji():
    pipe = AutoPipeline.from_pretrained("bundled:emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("negative", [None, "blue"])
def test_embeddings_of_a_caption_draw_its_picture(emoji, negative):
    wanted = emoji("red apple", negative_prompt=negative, generator=seeded(), **OPTIONS).images
    encoded = dict(zip(MASKED, emoji.encode_prompt("red apple", negative_prompt=negative), strict=True))
    torch.testing.assert_close(emoji(**encoded, generator=seeded(), **OPTIONS).images, wanted, atol=1e-6, rtol=0)
    other = dict(zip(MASKED, emoji.encode_prompt("blue fish", negative_prompt=negative), strict=True))
    assert (emoji(**other, generator=seeded(), **OPTIONS).images - wanted).abs().max() > 0.05


def test_captions_are_repeated_and_the_negative_half_may_be_left_out(emoji):
    embeds, mask, negative, negative_mask = emoji.encode_prompt(["red apple", "cat"], num_images_per_prompt=2)
    assert len(embeds) == len(negative) == 4 and mask.shape == negative_mask.shape == embeds.shape[:2]
    assert torch.equal(embeds[0], embeds[1]) and not torch.equal(embeds[1], embeds[2]) and torch.equal(negative[0], negative[3])
    embeds, _, *nothing = emoji.encode_prompt("red apple", None, 1, False, "blue")
    assert nothing == [None, None] and len(embeds) == 1
    with pytest.raises(ValueError, match="prompt_2 has nowhere to go"):
        emoji.encode_prompt("red apple", prompt_2="cat")


def test_the_arguments_stand_where_stable_diffusion_s_do(emoji):
    """diffusers: (prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, prompt_embeds, ...)."""
    diffusers = pytest.importorskip("diffusers")
    theirs = [name for name in inspect.signature(diffusers.StableDiffusionPipeline.encode_prompt).parameters if name != "lora_scale"]
    assert list(inspect.signature(type(emoji).encode_prompt).parameters)[: len(theirs)] == theirs
