import collections
import gc
import itertools

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gen_pipelines.training.config import DataConfig
from gen_pipelines.training.data import (
    BadRowError,
    CaptionNoise,
    EndlessBatches,
    PictureData,
    augment,
    caption_groups,
    captions_of,
    collate,
    known_words_holdout,
    load_rows,
    prepare_picture,
)
from gen_pipelines.training.random import normal, sample_generators
from tests.training.tiny import autoencoder_recipe, draw


def test_transparency_is_laid_on_the_background():
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert prepare_picture(picture, 4).unique().tolist() == [255]
    assert prepare_picture(picture, 4, background="black").unique().tolist() == [0]
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert prepare_picture(half, 4)[:, 0, 0].tolist() == [255, 127, 127]


def test_resize_keeps_the_aspect_and_crops_the_centre():
    picture = Image.new("RGB", (60, 20), "white")
    picture.paste("black", (20, 0, 40, 20))
    assert prepare_picture(picture, 10).shape == (3, 10, 10)
    assert prepare_picture(picture, 10)[:, :, 2:8].max() <= 1  # Lanczos rings a little
    assert prepare_picture(Image.new("L", (5, 9), 7), 3, channels=1).shape == (1, 3, 3)


def test_pictures_of_every_mode_keep_their_colours():
    """A palette with transparency, 16-bit grey (Pillow alone makes it white), a camera's rotation; what has no known white is refused."""
    colour = Image.new("RGBA", (8, 8), (0, 128, 0, 255))
    colour.paste((0, 0, 0, 0), (0, 0, 8, 4))
    palette = prepare_picture(colour.convert("P", palette=Image.Palette.ADAPTIVE), 8, background="blue")
    assert prepare_picture(colour, 8, background="blue")[:, 0, 0].tolist() == [0, 0, 255]
    assert palette[:, -1, 0].tolist() == [0, 128, 0]
    sixteen = Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
    assert sixteen.mode == "I;16" and prepare_picture(sixteen, 4, channels=1).unique().tolist() == [round(40000 / 257)]
    turned = Image.new("RGB", (4, 4), "white")
    turned.paste("black", (0, 0, 4, 2))
    turned.getexif()[0x0112] = 6  # the camera was turned by a quarter: the top row is the right column
    assert prepare_picture(turned, 4)[0].tolist() == [[255, 255, 0, 0]] * 4
    with pytest.raises(ValueError, match="mode F with values"):
        prepare_picture(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), 4)


def test_workers_keep_no_pictures_each(shapes):
    for workers, kept in ((0, 1), (2, 0)):
        config = DataConfig(name=str(shapes), resolution=16, workers=workers)
        data = PictureData(load_rows(config), config)
        assert data.picture(3).shape == (3, 16, 16) and len(data._kept) == kept


def test_captions_are_text_or_missing():
    import datasets

    config = DataConfig(name="x", text_column="text")
    assert captions_of(datasets.Dataset.from_dict({"text": ["a", None]}), config) == ["a", ""]
    with pytest.raises(ValueError, match="data.text_column: the column 'text' of x holds a list"):
        captions_of(datasets.Dataset.from_dict({"text": [["a", "b"]]}), config)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_batches_of_one_process(ranks):
    one = list(itertools.islice(EndlessBatches(40, 8, seed=3), 12))
    shares = [list(itertools.islice(EndlessBatches(40, 8 // ranks, 3, rank, ranks), 12)) for rank in range(ranks)]
    for whole, *parts in zip(one, *shares, strict=True):
        assert sorted(whole) == sorted(itertools.chain(*parts))
    epoch = collections.Counter(item for batch in one[:5] for item, _ in batch)
    assert sorted(epoch) == list(range(40)) and set(epoch.values()) == {1}  # every row once per epoch


def test_batches_continue_from_any_place():
    whole = list(itertools.islice(EndlessBatches(20, 4, seed=1), 15))
    for place in (1, 4, 5, 11):
        assert list(itertools.islice(EndlessBatches(20, 4, seed=1, start=place), 15 - place)) == whole[place:]
    with pytest.raises(ValueError, match="a batch of 8 samples from a data set of 5"):
        EndlessBatches(5, 8, seed=0)


def test_an_epoch_has_one_row_of_each_group_of_captions():
    captions = ["cook dark skin tone", "apple", "cook light skin tone", "cook", "dark clouds", "pilot light skin tone"]
    groups = caption_groups(captions, "(light|dark) skin tone")
    assert groups == [[0, 2, 3], [1], [4], [5]]
    batches = EndlessBatches(len(captions), 2, seed=0, groups=groups)
    assert batches.per_epoch == 2
    epochs = [[item for batch in pair for item, _ in batch] for pair in zip(*[itertools.islice(batches, 60)] * 2, strict=True)]
    assert all(sorted(min(group) for group in groups for item in epoch if item in group) == [0, 1, 4, 5] for epoch in epochs)
    assert {item for epoch in epochs for item in epoch} == set(range(6))  # every member has its turn
    assert list(itertools.islice(EndlessBatches(6, 2, seed=0, start=7, groups=groups), 5)) == list(itertools.islice(batches, 12))[7:]
    with pytest.raises(ValueError, match="group_captions"):
        EndlessBatches(len(captions), 5, seed=0, groups=groups)


def test_group_captions_is_a_regular_expression_over_captions():
    with pytest.raises(ValueError, match="no regular expression"):
        DataConfig(name="x", text_column="text", group_captions="(light")
    with pytest.raises(ValueError, match="text_column"):
        DataConfig(name="x", group_captions="light")


def test_an_article_comes_before_the_caption():
    noise = CaptionNoise(["apple"], drop=0.0, article=0.5)
    found = collections.Counter(noise("apple", seed) for seed in range(400))
    assert set(found) == {"apple", "an apple", "the apple"} and 150 < found["apple"] < 250
    assert {noise("red apple", seed) for seed in range(40)} == {"red apple", "a red apple", "the red apple"}


def test_a_sample_draws_the_same_noise_in_any_batch():
    generators = lambda rows: sample_generators(0, "objective", rows, [2] * len(rows))
    together = normal((3, 2, 2), generators([5, 6, 7]))
    alone = normal((1, 2, 2), generators([6]))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, normal((1, 2, 2), sample_generators(0, "augmentation", [6], [2])))
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        normal((3, 2), generators([1, 2]))


def test_augmentation_is_mirroring_and_whole_pixel_shifts():
    picture = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    seen = set()
    for seed in range(40):
        out = augment(picture, 0.5, 0, torch.Generator().manual_seed(seed))
        seen.add(torch.equal(out, picture))
        assert torch.equal(out, picture) or torch.equal(out, picture.flip(-1))
    assert seen == {True, False}  # both happen: the chance that 40 fair coins agree is 2e-12
    shifted = augment(picture, 0.0, 1, torch.Generator().manual_seed(0))
    assert shifted.shape == picture.shape and set(shifted.flatten().tolist()) <= set(picture.flatten().tolist())


def test_holdout_leaves_every_held_out_word_in_training():
    captions = [f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("ball", "cube", "cone")] + ["unicorn"]
    train, held = known_words_holdout(captions, len(captions), 4, seed=0)
    assert sorted(train + held) == list(range(10)) and len(held) == 4
    left = {word for row in train for word in captions[row].split()}
    assert all(set(captions[row].split()) <= left for row in held)
    with pytest.raises(ValueError, match="data.holdout: only"):
        known_words_holdout(captions, len(captions), 9, seed=0)


def test_caption_noise_rates():
    captions = ["woman firefighter medium skin tone", "green apple", "clown face"]
    noise = CaptionNoise(captions, drop=0.2, word_dropout=0.3, pseudo_word=0.25)
    drawn = [noise(captions[0], seed) for seed in range(4000)]
    assert drawn == [noise(captions[0], seed) for seed in range(4000)]
    words = set(" ".join(captions).split())
    empty = sum(text == "" for text in drawn)
    shorter = sum(0 < len(text.split()) < 5 for text in drawn)
    invented = sum(any(word not in words for word in text.split()) for text in drawn)
    # 5 standard deviations of a binomial of 4000: each of the three fails once in 1.7 million
    for count, p in ((empty, 0.2), (shorter, 0.8 * 0.3), (invented, 0.8 * 0.25)):
        assert abs(count - 4000 * p) < 5 * (4000 * p * (1 - p)) ** 0.5
    assert {len(text.split()) for text in drawn} == {0, 1, 2, 3, 4, 5}
    in_order = captions[0].split()
    assert all(sorted(kept, key=in_order.index) == kept for kept in (text.split() for text in drawn) if set(kept) <= set(in_order))
    with pytest.raises(ValueError, match="between 0 and 1"):
        CaptionNoise(captions, drop=1.5)


def test_rows_become_batches(shapes):
    config = DataConfig(name=str(shapes), text_column="text", resolution=16)
    data = PictureData(load_rows(config), config)
    batch = collate([data[(0, 0)], data[(5, 0)]])
    assert batch["picture"].shape == (2, 3, 16, 16) and batch["picture"].dtype == torch.float32
    assert batch["picture"].min() >= -1 and batch["picture"].max() == 1
    assert batch["text"][0] == "big red circle" and len(data) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": "caption"}, "data.text_column: .* no column 'caption'; its columns: image, text"),
        ({"image_column": "picture"}, "data.image_column: .* no column 'picture'"),
        ({"image_column": "text"}, "data.image_column: the column 'text' of .* holds .*string.*, not pictures"),
        ({"split": "validation"}, "cannot read the split 'validation'"),
        ({"name": "./no/such/folder"}, "the folder ./no/such/folder does not exist"),
    ],
)
def test_a_data_set_that_does_not_fit_is_named(shapes, change, message):
    with pytest.raises(ValueError, match=message):
        load_rows(DataConfig(**({"name": str(shapes), "text_column": "text"} | change)))


def test_the_same_captions_always_give_the_same_tokenizer():
    """Pairs of one frequency are merged in an order that no hash table decides: a resumed run and every rank learn the same tokens."""
    from gen_pipelines.training.tokenizer import train_clip_tokenizer

    captions = [f"{a}{b} {c}{a}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvw"]
    first, *others = [train_clip_tokenizer(captions, 600, 8) for _ in range(6)]
    assert all(other.get_vocab() == first.get_vocab() for other in others)
    assert len(first) == 600 and first.tokenize("aiqa zebra") and first.unk_token not in first.tokenize("日本 ☃")


def test_a_holdout_that_leaves_nothing_is_named():
    with pytest.raises(ValueError, match=r"data\.holdout: 1000 of 300 rows would leave none to train on"):
        known_words_holdout(None, 300, 1000, seed=0)
    assert [len(rows) for rows in known_words_holdout(None, 3, 2, seed=0)] == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves a file open that it cannot decode
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_by_its_row_and_file(tmp_path, workers):
    from gen_pipelines.training.run import train

    for number in range(6):
        draw("red", "circle").save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:90])
    settings = autoencoder_recipe(tmp_path, steps=3, batch_size=6, log_every=0)
    settings["data"] |= {"text_column": None, "workers": workers}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(BadRowError, match=r"^row 4 of .*4\.png\): image file is truncated.*take the row out\.$") as told:
        train(tmp_path / "recipe.yaml", output_dir=tmp_path / "run")
    assert str(told.value).count("\n") == 0
    del told
    gc.collect()  # the open file goes now, and not in another test


@pytest.mark.parametrize("label", ["cat", None, 0.5, float("nan"), [1]])
def test_a_label_that_is_no_whole_number_is_named(label):
    import datasets

    picture = draw("red", "circle")
    rows = datasets.Dataset.from_dict({"image": [picture] * 3, "kind": [None, label, label]}).cast_column("image", datasets.Image())
    config = DataConfig(name="x", label_column="kind", resolution=8)
    with pytest.raises(BadRowError, match=r"data\.label_column: the column 'kind' of x \(train\) has .* in row 1; labels are whole"):
        PictureData(rows, config, [1, 2])
    whole = datasets.Dataset.from_dict({"image": [picture] * 2, "kind": [3.0, 1.0]})
    assert PictureData(whole, config).labels == [3, 1]


def test_grey_values_that_may_be_of_8_or_of_16_bits_are_refused():
    values = np.arange(64, dtype=np.int32).reshape(8, 8)
    with pytest.raises(ValueError, match=r"mode I with values 0 to 63, whose white is not known"):
        prepare_picture(Image.fromarray(values), 8, 1)
    assert prepare_picture(Image.fromarray(values * 1000), 8, 1).max() == round(63000 / 257)
    assert prepare_picture(Image.fromarray(values.astype(np.uint16)), 8, 1).max() == 0  # said to be of 16 bits
    assert prepare_picture(Image.fromarray(values * 0), 8, 1).max() == 0  # black either way
