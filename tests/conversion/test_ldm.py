"""Latent diffusion's checkpoints against the forward passes of network and autoencoder, said again."""

import pytest
import torch
import yaml
from conversion.checkpoints.ldm import OPTIONS, UNET, autoencoder_state, container
from conversion.checkpoints.stable_diffusion_xl import open_clip_state, tokenizer_folder
from openai_layout import Forward, random_state
from torch.nn import functional as F

from gen_pipelines import AutoPipeline, convert
from gen_pipelines.conversion.ldm import path_of
from gen_pipelines.models.calling import ClassCondition, TextCondition, predict
from gen_pipelines.models.latent_space import decode_latents, encode_pictures
from gen_pipelines.processes import DiscreteVPPath


class Autoencoder:
    """Esser et al. 2021, table 7, over the keys of a state dict."""

    def __init__(self, state):
        self.s = state

    def conv(self, x, name, stride=1):
        weight = self.s[f"{name}.weight"]
        if stride == 2:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, self.s[f"{name}.bias"], stride=2)
        return F.conv2d(x, weight, self.s[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, x, name):
        return F.group_norm(x, 32, self.s[f"{name}.weight"], self.s[f"{name}.bias"], 1e-6)

    def residual(self, x, name):
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.s else x)

    def attention(self, x, name):
        q, k, v = (self.conv(self.norm(x, f"{name}.norm"), f"{name}.{part}").flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=-1)
        return x + self.conv((v @ weights.transpose(1, 2)).view(x.shape), f"{name}.proj_out")

    def level(self, x, name):
        for i in range(9):
            if f"{name}.block.{i}.conv1.weight" in self.s:
                x = self.residual(x, f"{name}.block.{i}")
            if f"{name}.attn.{i}.q.weight" in self.s:
                x = self.attention(x, f"{name}.attn.{i}")
        if f"{name}.downsample.conv.weight" in self.s:
            return self.conv(x, f"{name}.downsample.conv", stride=2)
        if f"{name}.upsample.conv.weight" in self.s:
            return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.upsample.conv")
        return x

    def middle(self, x, half):
        return self.residual(self.attention(self.residual(x, f"{half}.mid.block_1"), f"{half}.mid.attn_1"), f"{half}.mid.block_2")

    def encode(self, x):
        x = self.conv(x, "encoder.conv_in")
        for i in range(2):
            x = self.level(x, f"encoder.down.{i}")
        return self.conv(self.conv(F.silu(self.norm(self.middle(x, "encoder"), "encoder.norm_out")), "encoder.conv_out"), "quant_conv")

    def decode(self, z):
        if "quantize.embedding.weight" in self.s:
            table = self.s["quantize.embedding.weight"]
            z = table[(z[:, None] - table[None, :, :, None, None]).square().sum(2).argmin(1)].permute(0, 3, 1, 2)
        x = self.middle(self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in"), "decoder")
        for i in (1, 0):
            x = self.level(x, f"decoder.up.{i}")
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out")


def converted(folder, tree, **options):
    torch.save(tree, folder / "model.ckpt")
    plan = convert(folder / "model.ckpt", folder / "out", options=options)
    return plan, AutoPipeline.from_pretrained(folder / "out")


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([3, 900])


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_unconditional_with_a_quantised_autoencoder(tmp_path, weights):
    last, average, first = random_state(**UNET), random_state(**UNET, seed=1), autoencoder_state()
    plan, pipe = converted(tmp_path, container(last, first, average), **OPTIONS, weights=weights)
    with torch.no_grad():
        close(predict(pipe.unet, X, T), Forward(average if weights == "ema" else last, lambda w: w // 32, True, "conv", 1, 2)(X, T))
        close(decode_latents(pipe.vqvae, X), Autoencoder(first).decode(X))
        pictures = torch.randn(1, 3, 16, 16)
        close(encode_pictures(pipe.vqvae, pictures), Autoencoder(first).encode(pictures))
    assert pipe.parameterization.path == DiscreteVPPath(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    assert pipe(num_inference_steps=2).images[0].size == (16, 16)


def test_moments_a_scale_and_one_number_of_heads(tmp_path):
    """The churches' network: heads that widths share, residual resampling, latents scaled by their deviation."""
    unet = random_state(widths=(32, 64), attention=(True, True), resample="residual", in_channels=4, out_channels=4)
    first = autoencoder_state(channels=4, codes=0)
    tree = container(unet, first, scale_factor=torch.tensor(0.8), ends=(0.0015, 0.0155))
    _, pipe = converted(tmp_path, tree, image_size=8, num_heads=8)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        close(predict(pipe.unet, x, T), Forward(unet, lambda w: 8, True, "residual", 1, 2)(x, T))
        close(decode_latents(pipe.vae, x), Autoencoder(first).decode(x / 0.8))
        pictures = torch.randn(1, 3, 16, 16)
        close(encode_pictures(pipe.vae, pictures), 0.8 * Autoencoder(first).encode(pictures)[:, :4])
    assert type(pipe.unet).__name__ == "ADMUNet2DModel" and pipe.vae.config.scaling_factor == pytest.approx(0.8)


@pytest.mark.parametrize(("heads", "depth"), [({"num_heads": 1}, 1), ({"num_head_channels": 16}, 2)])
def test_classes_as_the_condition_of_transformers(tmp_path, heads, depth):
    unet = random_state(widths=(32, 64), attention=(True, True), scale_shift=False, context=24, depth=depth)
    table = torch.randn(7, 24)
    tree = container(unet, autoencoder_state(), **{"cond_stage_model.embedding.weight": table})
    _, pipe = converted(tmp_path, tree, image_size=8, scale_factor=1.0, null_class=6, **heads)
    labels = torch.tensor([0, 6])
    count = (lambda w: 1) if "num_heads" in heads else (lambda w: w // 16)
    with torch.no_grad():
        wanted = Forward(unet, count, True, "conv", 1, 2)(X, T, context=table[labels][:, None])
        close(predict(pipe.unet, X, T, ClassCondition(labels)), wanted)
        other = predict(pipe.unet, X, T, ClassCondition(torch.tensor([1, 6])))
    assert float((other - wanted)[0].abs().max()) > 1e-3 and torch.allclose(other[1], wanted[1], atol=1e-4)
    assert pipe.num_classes == 6 and pipe.null_class == 6
    assert pipe(class_labels=[0, 5], num_inference_steps=2, guidance_scale=3.0, output_type="np").images.shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="from 0 to 5"):
        pipe(class_labels=7)


def unprefixed(key):
    """Older transformers, which wrote these files, had everything under text_model."""
    return key.removeprefix("text_model.")


def test_stable_diffusion_1(tmp_path):
    from conftest import make_text_encoder

    encoder = make_text_encoder()
    width = encoder.config.hidden_size
    unet = random_state(widths=(32, 64), attention=(True, False), scale_shift=False, context=width, in_channels=4, out_channels=4)
    text = {f"cond_stage_model.transformer.text_model.{unprefixed(key)}": value for key, value in encoder.state_dict().items()}
    text["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    tree = container(unet, autoencoder_state(channels=4, codes=0), **text)
    options = {"preset": "stable-diffusion-1", "image_size": 8, "num_heads": 4}
    _, pipe = converted(tmp_path, tree, **options, tokenizer=str(tokenizer_folder(tmp_path / "tokenizer")))
    assert type(pipe).__name__ == "LatentTextToImagePipeline" and pipe.vae.config.scaling_factor == 0.18215
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, width)
    with torch.no_grad():
        wanted = Forward(unet, lambda w: 4, True, "conv", 1, 2)(x, T, context=context)
        close(predict(pipe.unet, x, T, TextCondition(context)), wanted)
    state = {unprefixed(key): value for key, value in pipe.text_encoder.state_dict().items()}
    for key, value in encoder.state_dict().items():
        assert torch.equal(state[unprefixed(key)], value)
    with pytest.raises(ValueError, match="tokenizer=FOLDER"):
        converted(tmp_path, tree, **options)


def test_stable_diffusion_2_looks_at_the_last_block_but_one(tmp_path):
    """The text tower said again over open_clip's keys: pre-norm blocks, causal, GELU, all but the last, then the last norm."""
    width, length, vocabulary = 64, 7, 30
    s = open_clip_state(width, length, vocabulary)
    unet = random_state(widths=(32, 64), attention=(True, True), scale_shift=False, context=width, in_channels=4, out_channels=4)
    for key in [key for key in unet if key.endswith(("proj_in.weight", "proj_out.weight"))]:
        unet[key] = unet[key].flatten(1)  # its transformers have linear layers there
    tree = container(unet, autoencoder_state(channels=4, codes=0), ends=(0.00085, 0.012),
                     **{f"cond_stage_model.model.{key}": value for key, value in s.items()})  # fmt: skip
    tree["state_dict"].pop("betas")  # pruned files may lack it: the preset knows
    options = {"preset": "stable-diffusion-2", "image_size": 8, "num_head_channels": 16}
    plan, pipe = converted(tmp_path, tree, **options, tokenizer=str(tokenizer_folder(tmp_path / "tokenizer")))
    ids = torch.tensor([[3, 9, 29, 4, 1, 0, 2]])
    x = s["token_embedding.weight"][ids] + s["positional_embedding"]
    for i in range(2):
        block = f"transformer.resblocks.{i}"
        h = F.layer_norm(x, (width,), s[f"{block}.ln_1.weight"], s[f"{block}.ln_1.bias"])
        q, k, v = (h @ s[f"{block}.attn.in_proj_weight"].T + s[f"{block}.attn.in_proj_bias"]).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        h = torch.softmax(scores, -1) @ v
        x = x + h @ s[f"{block}.attn.out_proj.weight"].T + s[f"{block}.attn.out_proj.bias"]
        h = F.layer_norm(x, (width,), s[f"{block}.ln_2.weight"], s[f"{block}.ln_2.bias"])
        h = F.gelu(h @ s[f"{block}.mlp.c_fc.weight"].T + s[f"{block}.mlp.c_fc.bias"])
        x = x + h @ s[f"{block}.mlp.c_proj.weight"].T + s[f"{block}.mlp.c_proj.bias"]
    wanted = F.layer_norm(x, (width,), s["ln_final.weight"], s["ln_final.bias"])
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        close(pipe.text_encoder(ids).last_hidden_state, wanted)
        forward = Forward(unet, lambda w: w // 16, True, "conv", 1, 2)
        both = wanted.expand(2, -1, -1)
        close(predict(pipe.unet, latents, T, TextCondition(both)), forward(latents, T, context=both))
    assert pipe.parameterization.prediction == "v_prediction" and pipe.unet.config.use_linear_projection
    assert sum("last block" in why for why in plan.dropped.values()) == 12


def bert_state(width=32, layers=2, length=77, vocabulary=30, seed=4):
    """x-transformers' encoder with 8 heads of 64, as latent diffusion uses it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"token_emb.weight": (vocabulary, width), "pos_emb.emb.weight": (length, width), "to_logits.weight": (vocabulary, width),
              "to_logits.bias": (vocabulary,), "norm.weight": (width,), "norm.bias": (width,)}  # fmt: skip
    for i in range(layers):
        attention, forward = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        shapes |= {f"{attention}.1.to_{part}.weight": (512, width) for part in "qkv"}
        shapes |= {f"{attention}.1.to_out.weight": (width, 512), f"{attention}.1.to_out.bias": (width,)}
        shapes |= {f"{forward}.1.net.0.0.weight": (4 * width, width), f"{forward}.1.net.0.0.bias": (4 * width,),
                   f"{forward}.1.net.2.weight": (width, 4 * width), f"{forward}.1.net.2.bias": (width,)}  # fmt: skip
        shapes |= {f"{name}.0.{part}": (width,) for name in (attention, forward) for part in ("weight", "bias")}
    return {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in shapes.items()}


def test_latent_diffusions_own_text_encoder(tmp_path):
    """Said again over the keys: pre-norm blocks that look both ways, without a mask, no bias before the attention."""
    s, width = bert_state(), 32
    unet = random_state(widths=(32, 64), attention=(True, True), scale_shift=False, context=width, in_channels=4, out_channels=4)
    tree = container(unet, autoencoder_state(channels=4, codes=0), ends=(0.00085, 0.012),
                     **{f"cond_stage_model.transformer.{key}": value for key, value in s.items()})  # fmt: skip
    options = {"preset": "txt2img-1p4B", "image_size": 8, "num_heads": 4}
    with pytest.raises(ValueError, match="bert-base-uncased"):
        converted(tmp_path, tree, **options)
    (tmp_path / "bert").mkdir()
    letters = [chr(ord("a") + i) for i in range(25)]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    plan, pipe = converted(tmp_path, tree, **options, tokenizer=str(tmp_path / "bert"))
    ids = torch.tensor([[2, 9, 29, 4, 3, 0, 0]])
    x = s["token_emb.weight"][ids] + s["pos_emb.emb.weight"][:7]
    for i in range(2):
        a, f = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        h = F.layer_norm(x, (width,), s[f"{a}.0.weight"], s[f"{a}.0.bias"])
        q, k, v = ((h @ s[f"{a}.1.to_{part}.weight"].T).view(1, 7, 8, 64).transpose(1, 2) for part in "qkv")
        h = (torch.softmax(q @ k.transpose(2, 3) / 8, -1) @ v).transpose(1, 2).reshape(1, 7, 512)
        x = x + h @ s[f"{a}.1.to_out.weight"].T + s[f"{a}.1.to_out.bias"]
        h = F.layer_norm(x, (width,), s[f"{f}.0.weight"], s[f"{f}.0.bias"])
        h = F.gelu(h @ s[f"{f}.1.net.0.0.weight"].T + s[f"{f}.1.net.0.0.bias"])
        x = x + h @ s[f"{f}.1.net.2.weight"].T + s[f"{f}.1.net.2.bias"]
    with torch.no_grad():
        close(pipe.text_encoder(ids).last_hidden_state, F.layer_norm(x, (width,), s["norm.weight"], s["norm.bias"]))
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a b c", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    assert pipe.config.max_text_tokens == 77 and pipe.vae.config.scaling_factor == 0.18215
    tree["state_dict"]["cond_stage_model.transformer.attn_layers.layers.3.2.surprise"] = torch.zeros(2)
    with pytest.raises(ValueError, match="no place in it"):
        converted(tmp_path, tree, **options, tokenizer=str(tmp_path / "bert"))


def test_the_yaml_file_says_what_the_checkpoint_does_not(tmp_path):
    params = {"image_size": 8, "unet_config": {"params": {"num_head_channels": 32, "num_heads": -1}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    tree = container(random_state(**UNET), autoencoder_state())
    plan, pipe = converted(tmp_path, tree, config=str(tmp_path / "c.yaml"))
    assert pipe.unet.config.attention_head_dim == 32 and pipe.vqvae.config.scaling_factor == 1.0
    plan, pipe = converted(tmp_path, tree, preset="celeba256", image_size=8)
    assert pipe.unet.config.sample_size == 8 and pipe.unet.config.attention_head_dim == 32


def test_other_betas_are_kept_one_by_one():
    betas = torch.linspace(0.0015, 0.0195, 1000)
    assert path_of(betas).trained_betas is not None
    even = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().float()
    assert path_of(even) == DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "image_size, scale_factor, num_heads"),
        ({**OPTIONS, "weights": "ema"}, "no averaged weights"),
        ({**OPTIONS, "prediction": "x"}, "none of epsilon, v_prediction"),
        ({**OPTIONS, "image_size": "big"}, "image_size = 'big'"),
        ({"preset": "nothing"}, "preset 'nothing'"),
        ({"config": {"model": 1}}, "unet_config"),
    ],
)
def test_what_is_missing_is_named(tmp_path, options, message):
    torch.save(container(random_state(**UNET), autoencoder_state()), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model.ckpt", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_an_unknown_text_encoder_is_refused(tmp_path):
    unet = random_state(widths=(32, 64), attention=(True, True), scale_shift=False, context=24)
    tree = container(unet, autoencoder_state(), **{"cond_stage_model.transformer.token_emb.weight": torch.zeros(4, 24)})
    torch.save(tree, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="neither one of CLIP's nor"):
        convert(tmp_path / "model.ckpt", tmp_path / "out", options={**OPTIONS, "prediction": "epsilon"})
