"""Stable Diffusion 3 in one file: against diffusers' own reading of the same keys, and its pipeline."""

import diffusers
import pytest
import torch
from conversion.checkpoints import stable_diffusion_3 as sd3
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from gen_pipelines import AutoPipeline, convert


def loaded(folder, state=None):
    plan = convert(sd3.write(folder, state), folder / "out", options=sd3.OPTIONS)
    pipe = AutoPipeline.from_pretrained(str(folder / "out"))
    pipe.set_progress_bar_config(disable=True)
    return plan, pipe


def test_it_draws_what_diffusers_draws_from_the_same_keys(tmp_path):
    _, pipe = loaded(tmp_path)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(sd3.transformer_state())
    ours = pipe.transformer.state_dict()
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    other = diffusers.StableDiffusion3Pipeline(
        pipe.transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), pipe.vae, pipe.text_encoder, pipe.tokenizer,
        pipe.text_encoder_2, pipe.tokenizer_2, pipe.text_encoder_3, pipe.tokenizer_3,
    )  # fmt: skip
    other.set_progress_bar_config(disable=True)
    # diffusers shifts both ends of its own grid twice (#13243); on a given grid nothing is left to differ
    call = {"sigmas": [1.0, 0.6, 0.3], "guidance_scale": 5.0, "height": 16, "width": 16, "output_type": "np"}
    pictures = [p("a red apple", generator=torch.Generator().manual_seed(1), **call).images for p in (other, pipe)]
    assert abs(pictures[0] - pictures[1]).max() < 1e-4
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor, pipe.vae.config.use_quant_conv) == (1.5305, 0.0609, False)
    state, tower = pipe.text_encoder.state_dict(), sd3.clip_state(1)[1]
    assert all(torch.equal(state[key], value) for key, value in tower.items())
    assert torch.equal(state["text_projection.weight"], torch.eye(sd3.FIRST))  # what the file leaves out is the identity
    t5 = pipe.text_encoder_3
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    assert all(torch.equal(value, sd3.encoders()[f"text_encoders.t5xxl.transformer.{key}"]) for key, value in t5.state_dict().items())


def test_without_norms_second_attention_and_encoders(tmp_path):
    plan, pipe = loaded(tmp_path, sd3.parts(with_text=False, norms=False, dual=()))
    assert pipe.text_encoder is None and "embeddings" in plan.notes[0]
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(sd3.transformer_state(norms=False, dual=()))
    assert all(torch.equal(pipe.transformer.state_dict()[key], value) for key, value in theirs.items())
    text = torch.randn(1, 5, sd3.JOINT, generator=torch.Generator().manual_seed(2)), torch.ones(1, sd3.FIRST + sd3.SECOND)
    pictures = pipe(prompt_embeds=text[0], pooled_prompt_embeds=text[1], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 16, 16, 3)


def test_what_is_missing_is_named(tmp_path):
    path = sd3.write(tmp_path)
    for option, message in (("tokenizer", "tokenizer=FOLDER"), ("tokenizer_3", "tokenizer_3=FOLDER")):
        with pytest.raises(ValueError, match=message):
            convert(path, dry_run=True, options={key: value for key, value in sd3.OPTIONS.items() if key != option})
    with pytest.raises(ValueError, match="image_size = 'big'"):
        convert(path, dry_run=True, options={**sd3.OPTIONS, "image_size": "big"})
    for lost, message in (("first_stage_model.", "no autoencoder"), ("model.diffusion_model.joint_blocks.1.x_block.mlp.", "nothing fills")):
        left = {key: value for key, value in sd3.parts().items() if not key.startswith(lost)}
        with pytest.raises(ValueError, match=message):
            convert(sd3.write(tmp_path, left), dry_run=True, options=sd3.OPTIONS)
    other = {**sd3.parts(), "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight": torch.zeros(40, sd3.JOINT)}
    with pytest.raises(ValueError, match=r"differs from shared.weight"):
        convert(sd3.write(tmp_path, other), dry_run=True, options=sd3.OPTIONS)
    with pytest.raises(ValueError, match="no place in it"):
        convert(sd3.write(tmp_path, {**sd3.parts(), "surprise": torch.zeros(2)}), dry_run=True, options=sd3.OPTIONS)
