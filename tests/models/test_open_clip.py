"""open_clip's text towers and tokenizer, beside open_clip itself."""

import json
import subprocess
import sys

import conftest
import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("open_clip", reason="the extra open-clip is not installed", exc_type=ImportError)

import open_clip
from safetensors.torch import save_file

from gen_pipelines import AutoPipeline, LatentTextToImagePipeline, OpenCLIPTextEncoder, OpenCLIPTokenizer
from gen_pipelines.models.calling import clip_layers, encode_text
from gen_pipelines.schedulers import DDIMScheduler

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}

# the same network under open_clip's many settings
TOWERS = {
    "plain": ({**TEXT}, False, False),
    "quick gelu": ({**TEXT}, True, False),
    "own text class": ({**TEXT}, False, True),
    "CoCa's class token": ({**TEXT, "embed_cls": True, "context_length": 76}, False, True),
    "SigLIP's": ({**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}, False, True),
    "layer scale": ({**TEXT, "ls_init_value": 0.5, "pool_type": "eos", "eos_id": 49407}, False, True),
}
# open_clip's name of a part of a block -> transformers'
SAME_WEIGHTS = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
CAPTIONS = ["", "a red apple", "Hello, World!", "!!", "caf\u00e9 &amp; th\u00e9 &lt;3", "\u201ccurly\u201d \u2018quotes\u2019 \ufb01ne",
            "\U0001f600 \u4f60\u597d 42", "  many   spaces\n", "it's the dog's, we'll see",
            "\u00c3\u00a9t\u00c3\u00a9", "word " * 100]  # fmt: skip


def make_model(name="plain"):
    text, quick, custom = TOWERS[name]
    build = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(24, VISION, text, quick_gelu=quick).eval()
        for parameter in model.parameters():  # open_clip starts some at zero or one, where a swapped weight would not show
            parameter.data.normal_(std=0.05)
    return model


def encoder_of(name):
    text, quick, _ = TOWERS[name]
    return OpenCLIPTextEncoder.from_open_clip(make_model(name), text_config=text, quick_gelu=quick)


def write_layout(folder, model, name):
    """open_clip's own layout on the Hub, weights of the picture's tower included."""
    text, quick, custom = TOWERS[name]
    folder.mkdir(exist_ok=True)
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text, "quick_gelu": quick, "custom_text": custom}
    pictures = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pictures}))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return OpenCLIPTokenizer.from_open_clip()


def test_the_tokenizer_gives_open_clips_ids(tokenizer, tmp_path):
    theirs = open_clip.tokenize(CAPTIONS)
    tokenizer.save_pretrained(tmp_path)
    for ours in (tokenizer, OpenCLIPTokenizer.from_pretrained(tmp_path)):
        tokens = ours(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        assert_close(tokens.input_ids, theirs)
        # the mask ends with the caption: open_clip's padding is id 0, and so is "!" inside a word
        assert tokens.attention_mask.sum(1).tolist() == [len(row) for row in ours(CAPTIONS, truncation=True, max_length=77)["input_ids"]]
    assert tokenizer("a", padding="max_length", max_length=5)["input_ids"][-1] == 0
    assert tokenizer(["a"], padding="max_length", max_length=5, return_tensors="np")["input_ids"][0, -1] == 0


@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_is_open_clips(name, tokenizer, tmp_path):
    model, text = make_model(name), TOWERS[name][0]
    ids = open_clip.tokenize(CAPTIONS, context_length=text["context_length"])
    with torch.no_grad():
        expected = model.encode_text(ids)
        inner = getattr(model, "text", None)
        encoder = encoder_of(name)
        output = encoder(ids, output_hidden_states=True)
        assert_close(output.text_embeds, expected, atol=1e-5, rtol=0)
        if inner is not None:
            inner.output_tokens = True
            if not text.get("embed_cls"):
                assert_close(output.last_hidden_state, inner(ids)[1], atol=1e-5, rtol=0)
        assert expected.std() > 1e-3 and len(output.hidden_states) == 3
        loaded = OpenCLIPTextEncoder.from_pretrained(write_layout(tmp_path / "hub", model, name))
        encoder.save_pretrained(tmp_path / "ours")
        again = OpenCLIPTextEncoder.from_pretrained(tmp_path / "ours")
        for other in (loaded, again):
            assert_close(other(ids).text_embeds, expected, atol=1e-5, rtol=0)
            assert_close(other.state_dict(), encoder.state_dict(), atol=0, rtol=0)
    assert again.config.text_config == encoder.config.text_config and again.config.quick_gelu == encoder.config.quick_gelu
    assert json.loads((tmp_path / "ours/config.json").read_text())["architecture"] == "custom"
    assert {p.name for p in (tmp_path / "ours").iterdir()} >= {"config.json", "diffusion_pytorch_model.safetensors"}


def test_the_penultimate_layer_is_what_transformers_reads_with_one_layer_less():
    """Stable Diffusion 2's encoder in transformers' form has the last layer cut off; ours keeps it, for the pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = OpenCLIPTextEncoder.from_open_clip(make_model(), text_config=TEXT, skip_layers=1)
    config = CLIPTextConfig(vocab_size=49408, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                            max_position_embeddings=77, hidden_act="gelu")  # fmt: skip
    theirs = CLIPTextModel(config).eval()
    source, target = encoder.tower.state_dict(), {}
    for i in range(2):
        a, b = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for end in ("weight", "bias"):
            for part, tensor in zip("qkv", source[f"{a}attn.in_proj_{end}"].chunk(3), strict=True):
                target[f"{b}self_attn.{part}_proj.{end}"] = tensor
            for x, y in SAME_WEIGHTS.items():
                target[f"{b}{y}.{end}"] = source[f"{a}{x}.{end}"]
    target |= {"final_layer_norm.weight": source["ln_final.weight"], "final_layer_norm.bias": source["ln_final.bias"]}
    target["embeddings.token_embedding.weight"] = source["token_embedding.weight"]
    target["embeddings.position_embedding.weight"] = source["positional_embedding"]
    result = theirs.load_state_dict(target, strict=False)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "position_ids" not in key]
    ids = open_clip.tokenize(CAPTIONS)
    with torch.no_grad():
        output = encoder(ids, output_hidden_states=True)
        assert_close(output.last_hidden_state, theirs(ids).last_hidden_state, atol=1e-5, rtol=0)
        assert_close(encoder.final_layer_norm(output.hidden_states[-2]), output.last_hidden_state, atol=0, rtol=0)
        assert_close(output.text_embeds, make_model().encode_text(ids), atol=1e-5, rtol=0)


def test_skipped_layers_are_counted_from_the_one_that_is_read(tokenizer):
    """A call's clip_skip and the encoder's own skip_layers add up, as for a CLIP of transformers that was stored without its last layer."""
    whole, short = (OpenCLIPTextEncoder.from_open_clip(make_model(), text_config=TEXT, skip_layers=skip) for skip in (0, 1))
    assert (clip_layers(whole), clip_layers(short)) == (3, 2)
    with torch.no_grad():
        once, twice = (encode_text(tokenizer, whole, ["a red apple"], clip_skip=skip).embeds for skip in (1, 2))
        assert_close(encode_text(tokenizer, short, ["a red apple"]).embeds, once)
        assert_close(encode_text(tokenizer, short, ["a red apple"], clip_skip=1).embeds, twice)
    assert not torch.equal(once, twice)


def test_it_is_the_text_encoder_of_a_pipeline(tokenizer, tmp_path):
    encoder = OpenCLIPTextEncoder.from_open_clip(make_model(), text_config=TEXT, skip_layers=1)
    condition = encode_text(tokenizer, encoder, ["a red apple", "!"])
    with torch.no_grad():
        expected = encoder(open_clip.tokenize(["a red apple", "!"]))
    assert condition.embeds.shape == (2, 77, conftest.TEXT_WIDTH) and condition.mask.sum(1).tolist() == [5, 3]
    assert_close(condition.embeds, expected.last_hidden_state)
    assert_close(condition.pooled, expected.text_embeds)

    pipe = LatentTextToImagePipeline(conftest.make_vae(), encoder, tokenizer, DDIMScheduler(), unet=conftest.make_unet())
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe/model_index.json").read_text())
    assert index["text_encoder"] == ["gen_pipelines", "OpenCLIPTextEncoder"]
    assert index["tokenizer"] == ["gen_pipelines", "OpenCLIPTokenizer"]
    again = AutoPipeline.from_pretrained(tmp_path / "pipe")
    pictures = []
    for p in (pipe, again):
        p.set_progress_bar_config(disable=True)
        pictures.append(p("a red apple!", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images)
    assert np.array_equal(*pictures)


def test_half_precision_and_gradient_checkpointing(tokenizer):
    encoder = OpenCLIPTextEncoder.from_open_clip(make_model(), text_config=TEXT)
    ids = open_clip.tokenize(CAPTIONS[:3])
    with torch.no_grad():
        exact = encoder(ids).text_embeds
    encoder.enable_gradient_checkpointing()
    encoder.train()(ids).text_embeds.sum().backward()
    assert encoder.tower.token_embedding.weight.grad.abs().sum() > 0
    with torch.no_grad():
        half = encoder.eval().to(torch.bfloat16)(ids).text_embeds
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), exact, atol=0.05, rtol=0.05)


def test_bad_layouts_are_refused(tmp_path):
    folder = write_layout(tmp_path / "hub", make_model(), "plain")
    weights = folder / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    config = json.loads((folder / "open_clip_config.json").read_text())

    def refused(match, **changes):
        changed = {"model_cfg": {**config["model_cfg"], **changes}}
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            OpenCLIPTextEncoder.from_pretrained(folder)
        (folder / "open_clip_config.json").write_text(json.dumps(config))

    refused("shape", embed_dim=25)
    refused("no weights for", text_cfg={**TEXT, "layers": 4})
    refused("lacks", text_cfg={**TEXT, "layers": 2})
    refused("unknown settings colour", text_cfg={**TEXT, "colour": 1})
    refused("heads", text_cfg={**TEXT, "heads": 5})
    refused("whole number", text_cfg={**TEXT, "width": "wide"})
    refused("network of transformers", text_cfg={**TEXT, "hf_model_name": "roberta-base"})
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut short"):
        OpenCLIPTextEncoder.from_pretrained(folder)
    weights.rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="only pickled weights.*python -c"):
        OpenCLIPTextEncoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="no architecture 'ViT-Z'"):
        OpenCLIPTextEncoder("ViT-Z")
    with pytest.raises(ValueError, match="skip_layers must be from 0 to 2"):
        OpenCLIPTextEncoder("x", TEXT, 24, skip_layers=3)


@pytest.mark.slow  # builds a published size
def test_a_published_architecture_follows_from_its_name():
    encoder = OpenCLIPTextEncoder("ViT-B-32-quickgelu")
    assert encoder.config.embed_dim == 512 and encoder.config.quick_gelu is True and encoder.config.text_config["layers"] == 12


@pytest.mark.slow  # starts a process
def test_nothing_is_imported_before_it_is_used():
    code = (
        "import sys, gen_pipelines; gen_pipelines.LatentTextToImagePipeline; gen_pipelines.OpenCLIPTextEncoder;"
        "assert 'open_clip' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
