"""Pipelines of diffusers load as ours, and draw the same pictures: same weights, same seed, same scheduler."""

import copy
import inspect
import json
import shutil
from dataclasses import replace

import conftest
import diffusers
import diffusers.callbacks
import numpy as np
import pytest
import tiny_diffusers
import torch

from gen_pipelines import AutoPipeline, ClassifierFreeGuidance, LatentTextToImagePipeline
from gen_pipelines.models.calling import pack_latents, unpack_latents
from gen_pipelines.pipelines.from_diffusers import MAPPED, mapped

# diffusers' Euler and DPM-Solver under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

TINY = tiny_diffusers.TINY


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> (diffusers' pipeline, ours loaded from what it saved), each built once."""
    built = {}

    def pair(name):
        if name not in built:
            folder = tmp_path_factory.mktemp("tiny") / "pipe"
            theirs = quiet(TINY[name].build())
            theirs.save_pretrained(str(folder))
            if not hasattr(getattr(theirs, "text_encoder", None), "text_model"):
                # diffusers 0.42.1 looks for the last normalisation there when it skips layers; transformers 5 has no such level any more
                theirs.components.get("text_encoder", theirs).__dict__["text_model"] = theirs.components.get("text_encoder")
            built[name] = theirs, quiet(AutoPipeline.from_pretrained(folder)), folder
        return built[name]

    return pair


def difference(theirs, ours, tiny, **options):
    """Of the two pictures, at most, from one seed each."""
    options = {"num_inference_steps": 3, "output_type": "np", **options}
    expected = theirs(generator=tiny_diffusers.seeded(), **{**tiny.theirs, **options}).images
    drawn = ours(generator=tiny_diffusers.seeded(), **options).images
    assert drawn.shape == expected.shape
    return np.abs(drawn - expected).max()


def test_every_mapped_class_has_a_tiny_pipeline_here():
    """Those that load as other pipelines of ours are tested beside these."""
    text_to_image = {name for name, known in MAPPED.items() if known.pipeline == "LatentTextToImagePipeline"}
    assert text_to_image <= {name.split(",")[0] for name in TINY}


@pytest.mark.parametrize("name", [name if "," not in name else pytest.param(name, marks=pytest.mark.parity) for name in TINY])
def test_a_mapped_class_draws_what_diffusers_draws(pairs, name):
    theirs, ours, folder = pairs(name)
    assert type(ours) is LatentTextToImagePipeline
    call = next(iter(TINY[name].calls))
    assert difference(theirs, ours, TINY[name], **TINY[name].calls[call]) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize(("name", "call"), [(name, call) for name, tiny in TINY.items() for call in tiny.calls])
def test_every_argument_means_what_it_means_in_diffusers(pairs, name, call):
    theirs, ours, _ = pairs(name)
    assert difference(theirs, ours, TINY[name], **TINY[name].calls[call]) < 1e-4


# ------------------------------------------------------------------------------------------------------------------- tensors for captions


def given_embeds(theirs, tiny, prompt="a red apple", negative="blue"):
    """What diffusers' `encode_prompt` says, under the names of the call."""
    known = inspect.signature(theirs.encode_prompt).parameters
    options = {
        "prompt": prompt, "prompt_2": None, "prompt_3": None, "negative_prompt": negative, "device": "cpu", "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
    }  # fmt: skip
    with torch.no_grad():
        encoded = theirs.encode_prompt(**{name: value for name, value in options.items() if name in known})
    return {name: value for name, value in zip(tiny.embeds, encoded, strict=False) if name}


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.embeds])
def test_embeddings_take_the_place_of_captions(pairs, name):
    theirs, ours, _ = pairs(name)
    tiny, size = TINY[name], tiny_diffusers.SMALL
    embeds = given_embeds(theirs, tiny)
    if name.startswith("PixArt"):  # whose negative prompt is "" by default
        size = {**size, "use_resolution_binning": False}
        tiny = replace(tiny, theirs={**tiny.theirs, "negative_prompt": None})
    assert difference(theirs, ours, tiny, **embeds, **size) < 1e-4
    # two pictures each, said in embeddings: diffusers' Stable Diffusion 3 does not repeat given ones
    options = {"num_inference_steps": 3, "output_type": "np", **size}
    twice = {key: value.repeat_interleave(2, dim=0) for key, value in embeds.items()}
    expected = theirs(generator=tiny_diffusers.seeded(), **{**tiny.theirs, **twice, **options}).images
    drawn = ours(generator=tiny_diffusers.seeded(), num_images_per_prompt=2, **embeds, **options).images
    assert np.abs(drawn - expected).max() < 1e-4
    words = ours("a red apple", negative_prompt="blue", generator=tiny_diffusers.seeded(), **options)
    if "negative_prompt_embeds" in embeds:  # where the network is told its scale, words alone switch no second branch on
        drawn = ours(generator=tiny_diffusers.seeded(), **embeds, **options).images
        assert np.abs(drawn - words.images).max() < 1e-4
    if pooled := [key for key in embeds if "pooled" in key]:
        with pytest.raises(ValueError, match="need pooled_prompt_embeds beside them"):
            ours(**{key: value for key, value in embeds.items() if key not in pooled}, **size)


@pytest.mark.parity
def test_given_embeddings_of_xl_have_zeros_for_the_negative_prompt(pairs):
    theirs, ours, _ = pairs("StableDiffusionXLPipeline")
    tiny = TINY["StableDiffusionXLPipeline"]
    embeds = {key: value for key, value in given_embeds(theirs, tiny).items() if "negative" not in key}
    assert difference(theirs, ours, tiny, **embeds) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_given_latents_and_one_generator_per_picture(pairs, name):
    """diffusers keeps Flux's latents packed, (B, tokens, 4 C); ours take them in both forms."""
    theirs, ours, _ = pairs(name)
    size = tiny_diffusers.SMALL
    latents = torch.randn(1, 4, 8, 8, generator=tiny_diffusers.seeded(3))
    packed = pack_latents(latents) if name == "FluxPipeline" else latents
    assert difference(theirs, ours, TINY[name], prompt="apple", latents=packed, **size) < 1e-4
    options = {"num_inference_steps": 2, "output_type": "np", **size}
    assert np.array_equal(ours("apple", latents=latents, **options).images, ours("apple", latents=packed, **options).images)
    generators = lambda: [tiny_diffusers.seeded(i) for i in (1, 2)]
    expected = theirs(["apple", "pear"], generator=generators(), **options).images
    assert np.abs(ours(["apple", "pear"], generator=generators(), **options).images - expected).max() < 1e-4


@pytest.mark.parametrize("size", [(2, 4), (6, 2), (8, 8)])
def test_packing_is_diffusers_and_is_undone(size):
    x = torch.randn(3, 5, *size, generator=tiny_diffusers.seeded())
    packed = pack_latents(x)
    assert torch.equal(packed, diffusers.FluxPipeline._pack_latents(x, 3, 5, *size))
    assert torch.equal(unpack_latents(packed, *size), x)


# ----------------------------------------------------------------------------------------------------------------------- what is not said

WRONG = {
    "a second prompt for one encoder": ("StableDiffusionPipeline", {"prompt": "a", "prompt_2": "b"}, "prompt_2 has nowhere to go"),
    "a third for two": ("StableDiffusionXLPipeline", {"prompt": "a", "negative_prompt_3": "b"}, "negative_prompt_3 has nowhere to go"),
    "sizes": ("StableDiffusion3Pipeline", {"prompt": "a", "target_size": (8, 8)}, "target_size has no effect"),
    "all layers skipped": ("StableDiffusionPipeline", {"prompt": "a", "clip_skip": 3}, "less than the 3 layers"),
    "layers of T5": ("PixArtSigmaPipeline", {"prompt": "a", "clip_skip": 1}, "no CLIP encoder"),
    "length of CLIP": ("StableDiffusionPipeline", {"prompt": "a", "max_sequence_length": 5}, "no T5 encoder"),
    "true guidance": ("StableDiffusionPipeline", {"prompt": "a", "true_cfg_scale": 3.0}, "for networks that were distilled"),
    "pooled for none": ("StableDiffusionPipeline", {"prompt": "a", "pooled_prompt_embeds": torch.zeros(1, 3)}, "takes no pooled vector"),
    "second prompts of another count": ("FluxPipeline", {"prompt": "a", "prompt_2": ["b", "c"]}, "prompt_2 must be one caption or 1"),
    "odd latents": ("FluxPipeline", {"prompt": "a", "height": 18, "width": 16}, "height must be a multiple of 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_has_no_effect_is_refused(pairs, case):
    name, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pairs(name)[1](**{**tiny_diffusers.SMALL, **options})


def test_guidance_objects_are_not_told_to_a_network(pairs):
    with pytest.raises(TypeError, match="give another guidance as true_cfg_scale"):
        pairs("FluxPipeline")[1]("a", guidance_scale=ClassifierFreeGuidance(2.0))


def test_captions_for_encoders_that_were_left_out(pairs):
    ours = pairs("FluxPipeline")[1]
    bare = LatentTextToImagePipeline.from_pipe(ours, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    with pytest.raises(ValueError, match="text_encoder, text_encoder_2, which this pipeline was loaded without"):
        bare("a", **tiny_diffusers.SMALL)
    embeds = given_embeds(pairs("FluxPipeline")[0], TINY["FluxPipeline"], "apple")
    options = {"num_inference_steps": 2, "output_type": "np", **tiny_diffusers.SMALL}
    drawn = quiet(bare)(**embeds, generator=tiny_diffusers.seeded(), **options).images
    assert np.abs(drawn - ours("apple", generator=tiny_diffusers.seeded(), **options).images).max() < 1e-4


# -------------------------------------------------------------------------------------------------------------- from and to diffusers


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in TINY if "," not in name])
def test_from_pipe_in_both_directions(pairs, name):
    """Components are shared; so an image stays what it was on both sides."""
    theirs, ours, _ = pairs(name)
    tiny = TINY[name]
    call = tiny.calls["plain"]
    mine = quiet(LatentTextToImagePipeline.from_pipe(theirs))
    assert mine.denoiser is theirs.components["unet" if "unet" in theirs.components else "transformer"]
    assert {k: v for k, v in mine.config.items() if k.startswith(("default_", "force_", "lower_", "max_", "resol"))} == {
        k: v for k, v in ours.config.items() if k.startswith(("default_", "force_", "lower_", "max_", "resol"))
    }
    assert difference(theirs, mine, tiny, **call) < 1e-4
    # diffusers asks for what ours does not have, or has under another name
    shared = {"vqvae": ours.vae, "bert": ours.text_encoder} if name == "LDMTextToImagePipeline" else {}
    if "safety_checker" in theirs.components:
        shared = {"safety_checker": None, "feature_extractor": None}
    back = quiet(type(theirs).from_pipe(ours, **shared))
    assert back.scheduler is ours.scheduler
    assert difference(back, ours, tiny, **call) < 1e-4


def test_from_pipe_says_what_is_missing_and_what_is_unknown(pairs):
    theirs = pairs("StableDiffusionPipeline")[0]
    with pytest.raises(TypeError, match="unknown arguments vea"):
        LatentTextToImagePipeline.from_pipe(theirs, vea=None)
    with pytest.raises(ValueError, match="has no vae; pass it"):
        LatentTextToImagePipeline.from_pipe(theirs, vae=None)


def test_the_class_itself_loads_what_auto_pipeline_loads(pairs):
    for name in ("PixArtSigmaPipeline", "LDMTextToImagePipeline"):
        _, ours, folder = pairs(name)
        again = LatentTextToImagePipeline.from_pretrained(folder)
        assert again.config == ours.config
        for key, value in ours.denoiser.state_dict().items():
            assert torch.equal(again.denoiser.state_dict()[key], value)
    assert LatentTextToImagePipeline.from_pretrained(folder, default_guidance_scale=2.0).config.default_guidance_scale == 2.0


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in TINY if "," not in name])
def test_what_ours_saves_draws_the_same_and_loads_in_diffusers(pairs, name, tmp_path):
    theirs, ours, _ = pairs(name)
    ours.save_pretrained(tmp_path / "p")
    again = quiet(AutoPipeline.from_pretrained(tmp_path / "p"))
    assert type(again) is LatentTextToImagePipeline
    call = {"num_inference_steps": 2, "output_type": "np", **TINY[name].calls["plain"]}
    expected = ours(generator=tiny_diffusers.seeded(), **call).images
    assert np.array_equal(again(generator=tiny_diffusers.seeded(), **call).images, expected)
    if name != "LDMTextToImagePipeline":  # whose components diffusers calls otherwise
        twin = quiet(type(theirs).from_pretrained(tmp_path / "p"))
        assert difference(twin, ours, TINY[name], **TINY[name].calls["plain"]) < 1e-4


def test_repositories_with_the_old_name_of_pixart(pairs, tmp_path):
    """The published ones call their network Transformer2DModel; diffusers knows by its config what it is."""
    _, ours, folder = pairs("PixArtSigmaPipeline")
    old = shutil.copytree(folder, tmp_path / "old")
    for file, change in ((old / "model_index.json", None), (old / "transformer" / "config.json", "_class_name")):
        content = json.loads(file.read_text())
        if change is None:
            content["transformer"] = ["diffusers", "Transformer2DModel"]
        else:
            content |= {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}
        file.write_text(json.dumps(content))
    again = quiet(AutoPipeline.from_pretrained(old))
    assert type(again) is LatentTextToImagePipeline and type(again.transformer).__name__ == "PixArtTransformer2DModel"
    call = {"num_inference_steps": 2, "output_type": "latent", "prompt": "apple"}
    drawn = again(generator=tiny_diffusers.seeded(), **call).images
    assert torch.equal(drawn, ours(generator=tiny_diffusers.seeded(), **call).images)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "PixArtSigmaPipeline"])
def test_pixart_draws_at_trained_sizes_and_cuts(name):
    """200 x 120 is drawn at 320 x 192, the nearest in shape that networks of 32 latent pixels were trained on, scaled and cut."""
    theirs = TINY[name].build()
    transformer = conftest.make_transformer(out_channels=8, sample_size=32)
    theirs = quiet(type(theirs)(theirs.tokenizer, theirs.text_encoder, tiny_diffusers.make_deep_vae(), transformer, theirs.scheduler))
    ours = quiet(LatentTextToImagePipeline.from_pipe(theirs))
    tiny = replace(TINY[name], theirs={"clean_caption": False})
    assert difference(theirs, ours, tiny, prompt="apple", height=200, width=120, num_inference_steps=2) < 1e-4
    tiny = replace(tiny, theirs={"clean_caption": False, "use_resolution_binning": False})
    options = {"prompt": "apple", "height": 48, "width": 32, "output_type": "np", "num_inference_steps": 2}
    expected = theirs(generator=tiny_diffusers.seeded(), **tiny.theirs, **options).images
    drawn = ours(generator=tiny_diffusers.seeded(), use_resolution_binning=False, **options).images
    assert np.abs(drawn - expected).max() < 1e-4
    with pytest.raises(ValueError, match="trained sizes for networks of 32, 64, 128, 256"):
        make_pixart = LatentTextToImagePipeline.from_pipe(ours, transformer=conftest.make_transformer())
        make_pixart("a", use_resolution_binning=True)


def test_a_network_that_ours_cannot_run_comes_back_in_diffusers_own_pipeline(pairs, tmp_path):
    folder = shutil.copytree(pairs("StableDiffusionPipeline")[2], tmp_path / "p")
    config = folder / "unet" / "config.json"
    unet = tiny_diffusers.make_unet(class_embed_type="timestep")
    unet.save_pretrained(str(config.parent))
    assert type(AutoPipeline.from_pretrained(folder)) is diffusers.StableDiffusionPipeline
    with pytest.raises(ValueError, match="class_embed_type='timestep'"):
        LatentTextToImagePipeline.from_pretrained(folder)


def test_other_pipelines_come_back_as_diffusers_own(pairs, tmp_path):
    theirs, _, _ = pairs("StableDiffusionPipeline")
    diffusers.StableDiffusionSAGPipeline.from_pipe(theirs).save_pretrained(str(tmp_path / "sag"))
    assert type(AutoPipeline.from_pretrained(tmp_path / "sag")) is diffusers.StableDiffusionSAGPipeline
    index = tmp_path / "sag" / "model_index.json"
    content = json.loads(index.read_text()) | {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DModel"]}
    assert mapped(content) is None and mapped(content | {"unet": ["diffusers", "UNet2DConditionModel"]}) is not None
    with_image_encoder = {"unet": ["diffusers", "UNet2DConditionModel"], "image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    assert mapped(content | with_image_encoder) is None


# --------------------------------------------------------------------------------------------------------- adapters, memory, callbacks


def save_lora(theirs, folder, rank=2):
    """A random adapter of the denoiser's attention and, where diffusers' loader takes one, of the first text encoder."""
    from peft import LoraConfig, get_peft_model_state_dict

    denoiser = "unet" if hasattr(theirs, "unet") else "transformer"
    layers = {}
    for name, targets in ((denoiser, ["to_q", "to_k", "to_v"]), ("text_encoder", ["q_proj", "v_proj"])):
        if name == "text_encoder" and name not in theirs._lora_loadable_modules:
            continue
        network = copy.deepcopy(getattr(theirs, name))
        network.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=targets))
        layers[name] = get_peft_model_state_dict(network)
        generator = tiny_diffusers.seeded(9)
        layers[name] = {key: 0.3 * torch.randn(v.shape, generator=generator) for key, v in layers[name].items()}
    type(theirs).save_lora_weights(folder, **{f"{name}_lora_layers": value for name, value in layers.items()})


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:Already unmerged")  # peft, where diffusers' Flux asks twice
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_an_adapter_changes_the_picture_as_in_diffusers(pairs, name, tmp_path):
    _, ours, folder = pairs(name)
    theirs = quiet(type(pairs(name)[0]).from_pretrained(str(folder)))
    mine = quiet(LatentTextToImagePipeline.from_pretrained(folder))
    tiny = TINY[name]
    call = {"num_inference_steps": 2, "output_type": "np", **tiny.calls["plain"]}
    before = mine(generator=tiny_diffusers.seeded(), **call).images
    save_lora(theirs, tmp_path)
    for pipe in (theirs, mine):
        pipe.load_lora_weights(str(tmp_path), adapter_name="a")
    assert mine.get_list_adapters() == theirs.get_list_adapters() and mine.get_active_adapters() == ["a"]
    after = mine(generator=tiny_diffusers.seeded(), **call).images
    assert np.abs(after - before).max() > 1e-2
    assert difference(theirs, mine, tiny, **tiny.calls["plain"]) < 1e-4
    for pipe in (theirs, mine):
        pipe.set_adapters("a", 0.3)
    assert difference(theirs, mine, tiny, **tiny.calls["plain"]) < 1e-4
    mine.disable_lora()
    assert np.abs(mine(generator=tiny_diffusers.seeded(), **call).images - before).max() < 1e-5
    mine.enable_lora()
    mine.set_adapters("a", 1.0)
    mine.fuse_lora()
    assert np.abs(mine(generator=tiny_diffusers.seeded(), **call).images - after).max() < 1e-4
    mine.unfuse_lora()
    mine.unload_lora_weights()
    assert np.abs(mine(generator=tiny_diffusers.seeded(), **call).images - before).max() < 1e-4


def test_pickled_adapters_and_families_without_a_loader_are_refused(pairs, tmp_path):
    torch.save({"unet.lora": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError):
        pairs("StableDiffusionPipeline")[1].load_lora_weights(str(tmp_path))
    with pytest.raises(ValueError, match="convert pickled weights first"):
        pairs("StableDiffusionPipeline")[1].load_lora_weights(str(tmp_path), use_safetensors=False)
    with pytest.raises(ValueError, match=r"pipe.denoiser.load_lora_adapter"):
        pairs("PixArtSigmaPipeline")[1].load_lora_weights(str(tmp_path))


@pytest.mark.parity
def test_tiling_and_slicing_of_the_autoencoder(pairs):
    theirs, ours, _ = pairs("StableDiffusionPipeline")
    call = {"prompt": "apple", "height": 32, "width": 48, "num_images_per_prompt": 2}
    for pipe in (theirs, ours):
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size = 8
    try:
        assert difference(theirs, ours, TINY["StableDiffusionPipeline"], **call) < 1e-4
    finally:
        for pipe in (theirs, ours):
            pipe.vae.disable_slicing()
            pipe.vae.disable_tiling()


@pytest.mark.parity
@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_offloading_and_device_maps_change_nothing(pairs, name):
    _, ours, folder = pairs(name)
    call = {"num_inference_steps": 2, "output_type": "np", **TINY[name].calls["plain"]}
    expected = ours(generator=tiny_diffusers.seeded(), **call).images
    offloaded = quiet(LatentTextToImagePipeline.from_pipe(ours))
    offloaded.enable_model_cpu_offload(device="cpu")
    assert np.abs(offloaded(generator=tiny_diffusers.seeded(), **call).images - expected).max() < 1e-5
    offloaded.remove_all_hooks()
    networks = {k for k, v in ours.components.items() if isinstance(v, torch.nn.Module)}
    assert networks <= set(ours.model_cpu_offload_seq.split("->"))
    placed = quiet(AutoPipeline.from_pretrained(folder, device_map="cpu"))
    assert np.abs(placed(generator=tiny_diffusers.seeded(), **call).images - expected).max() < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "callback"),
    [
        ("StableDiffusionPipeline", "SDCFGCutoffCallback"),
        ("StableDiffusionXLPipeline", "SDXLCFGCutoffCallback"),
        ("StableDiffusion3Pipeline", "SD3CFGCutoffCallback"),
    ],
)
def test_callbacks_of_diffusers_run(pairs, name, callback):
    theirs, ours, _ = pairs(name)
    make = lambda: getattr(diffusers.callbacks, callback)(cutoff_step_ratio=0.5)
    call = {"prompt": "apple", "num_inference_steps": 4, "output_type": "np"}
    expected = theirs(generator=tiny_diffusers.seeded(), callback_on_step_end=make(), **call).images
    assert np.abs(ours(generator=tiny_diffusers.seeded(), callback_on_step_end=make(), **call).images - expected).max() < 1e-4
