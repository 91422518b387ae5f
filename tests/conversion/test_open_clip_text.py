"""open_clip's text towers as transformers' CLIPTextModelWithProjection: the same vectors of tokens and captions."""

import json

import pytest
import torch
from conversion.checkpoints import open_clip_text as theirs
from torch.testing import assert_close
from transformers import CLIPTextModelWithProjection

from gen_pipelines import convert

IDS = torch.randint(1, 28, (3, theirs.LENGTH), generator=torch.Generator().manual_seed(0))
for row, end in enumerate((3, 5, 7)):
    IDS[row, end], IDS[row, end + 1 :] = theirs.WORDS - 1, 0
TEXT = {"context_length": theirs.LENGTH, "vocab_size": theirs.WORDS, "width": theirs.WIDTH, "heads": 4, "layers": theirs.LAYERS}


@pytest.mark.parametrize("quick_gelu", [False, True])
@torch.no_grad()
def test_a_folder_of_the_hub_gives_their_vectors(quick_gelu, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    theirs.write(source)
    torch.save(theirs.state(), source / "open_clip_pytorch_model.bin")
    (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 12, "text_cfg": TEXT, "quick_gelu": quick_gelu}}))
    plan = convert(source, tmp_path / "text")
    assert "open_clip_pytorch_model.bin.*" in plan.dropped
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text").eval()
    output, (last, vectors) = model(IDS), theirs.encode(theirs.state(), IDS, quick_gelu, heads=4)
    assert_close(output.last_hidden_state, last, atol=1e-5, rtol=1e-4)
    assert_close(output.text_embeds, vectors, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_checkpoint_of_its_training_with_a_tower_of_its_own_gives_the_same_weights(tmp_path):
    inner = {f"module.{key}" if key.startswith(("visual", "logit")) else f"module.text.{key}": v for key, v in theirs.state().items()}
    inner["module.text.text_projection.weight"] = inner.pop("module.text.text_projection").t().contiguous()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}}
    torch.save({"epoch": 3, "name": "run", "state_dict": inner, "optimizer": optimizer}, tmp_path / "e.pt")
    convert(tmp_path / "e.pt", tmp_path / "a", options=theirs.OPTIONS)
    convert(theirs.write(tmp_path), tmp_path / "b", options=theirs.OPTIONS)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--set quick_gelu=true"),
        ({"config": {"text_cfg": TEXT | {"width": 32}}}, "another model's: width 32 for 64"),
        ({"config": {"text_cfg": TEXT | {"no_causal_mask": True}}}, "no_causal_mask True, which CLIPTextModelWithProjection has not"),
        ({"config": {"model": 1}}, "it has no text_cfg"),
    ],
)
def test_what_is_not_said_or_not_clips_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(theirs.write(tmp_path), dry_run=True, options=options)
