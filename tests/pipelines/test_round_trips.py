"""What a pipeline returns is what every pipeline takes: PIL pictures, arrays and tensors of one call are the same pictures."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from gen_pipelines import AutoPipeline, DDIMScheduler, DiffusionImagePipeline, LatentImageToImagePipeline
from gen_pipelines.bundled import bundled_names
from gen_pipelines.pipelines.pictures import as_8_bit, as_mask, as_pictures


def seeded(count=2):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def bundled(name):
    pipe = AutoPipeline.from_pretrained(f"bundled:{name}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def all_forms(draw):
    """Two pictures in every form that `output_type` has, and uint8."""
    pil, array, tensor = (draw(output_type=kind).images for kind in ("pil", "np", "pt"))
    assert isinstance(pil[0], Image.Image) and array.shape[0] == tensor.shape[0] == 2
    levels = (tensor * 255).round().to(torch.uint8)
    return {"pil": pil, "np": array, "pt": tensor, "list": list(tensor), "uint8": levels, "uint8 np": levels.permute(0, 2, 3, 1).numpy()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist-vae", "mnist-vqvae", "mnist-glow"])
def test_what_a_model_of_levels_returns_is_reconstructed(name):
    """These round to 8 bits, so every form is the same picture."""
    pipe = bundled(name)
    labels = {} if name != "mnist-glow" or pipe.num_classes is None else {"class_labels": [3, 5]}
    forms = all_forms(lambda **options: pipe(batch_size=2, generator=seeded(), **options))
    found = {form: pipe.reconstruct(pictures, output_type="pt", **labels) for form, pictures in forms.items()}
    for form, pictures in found.items():
        assert torch.equal(pictures, found["pil"]), form
    assert (found["pil"] - forms["pt"]).abs().mean() < 0.1  # a reconstruction, not black


def small():
    """A diffusion pipeline of coloured pictures, 8 x 8, with a frame around 6 x 6."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 2, "layers_per_block": 1}
    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), **blocks).eval()
    pipe = DiffusionImagePipeline(DDIMScheduler(clip_sample=False), unet=unet, image_size=6)
    pipe.set_progress_bar_config(disable=True)
    return pipe


DIFFUSION = [pytest.param(name, marks=pytest.mark.slow) for name in ("mnist-ddpm", "mnist-flow") if name in bundled_names()]


@pytest.mark.parametrize("name", ["small", *DIFFUSION])
def test_what_a_diffusion_pipeline_returns_is_inverted(name):
    pipe = small() if name == "small" else bundled(name)
    forms = all_forms(lambda **options: pipe(batch_size=2, num_inference_steps=2, generator=seeded(), **options))
    found = {form: pipe.encode(pictures, num_inference_steps=2) for form, pictures in forms.items()}
    for form in ("uint8", "uint8 np"):
        torch.testing.assert_close(found[form], found["pil"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["np"], found["pt"], atol=1e-5, rtol=0)
    spread = found["pil"].std().item()
    assert (found["pt"] - found["pil"]).abs().mean() < 0.05 * spread  # half a level apart


@pytest.mark.slow
def test_what_a_caption_drew_is_redrawn():
    pipe = bundled("emoji")
    redraw = LatentImageToImagePipeline.from_pipe(pipe)
    redraw.set_progress_bar_config(disable=True)
    forms = all_forms(lambda **options: pipe("red apple", num_images_per_prompt=2, num_inference_steps=2, generator=seeded(), **options))
    options = {"strength": 0.5, "num_inference_steps": 2, "output_type": "pt"}
    found = {form: redraw(["red apple"] * 2, image=pictures, generator=seeded(), **options).images for form, pictures in forms.items()}
    for form, pictures in found.items():
        torch.testing.assert_close(pictures, found["pil"], atol=5 / 255, rtol=0, msg=lambda text, form=form: f"{form}: {text}")


@pytest.mark.parametrize("take", [lambda x: as_pictures(x, 3), as_8_bit], ids=["pixels", "levels"])
def test_floats_beyond_the_range_are_refused_with_what_to_do(take):
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\].*\(x \+ 1\) / 2 makes it of \[-1, 1\]"):
        take(2 * x - 1)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\].*must be uint8"):
        take(255 * x)
    with pytest.raises(ValueError, match=r"\(B, H, W, C\)"):
        take(np.zeros((1, 1, 4, 4, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="is empty"):
        take(x[:0])


def test_a_mask_may_be_an_array():
    mask = np.zeros((4, 5), dtype=np.uint8)
    mask[:, 2:] = 255
    wanted = as_mask(Image.fromarray(mask), (4, 5))
    for form in (mask, mask / 255, mask > 0, mask[None, ..., None]):
        assert torch.equal(as_mask(form, (4, 5)), wanted)
