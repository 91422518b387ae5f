"""Comparisons: protocols are kept apart, seeds become one row, the best is marked, and the page needs nothing beside it."""

import base64
import copy
import csv
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from gen_pipelines import VAEModel, VAEPipeline
from gen_pipelines.cli.main import main
from gen_pipelines.evaluation.compare import COMPARABLE, compare, markdown, sampling_of, written
from gen_pipelines.evaluation.plots import Axis, Series, labels, scatter

RESULT = {
    "format": 1, "model": "VAE", "weights": "sha256:1", "dataset": "digits", "split": "train",
    "metrics": {"frechet_distance": 4.0, "frechet_distance_over_real": 20.0, "kernel_distance": 0.1, "precision": 0.5, "recall": 0.6,
                "density": 0.4, "coverage": 0.5, "class_entropy_over_data": 0.98, "near_copies": 0.01, "bits_per_dim": 1.2},
    "real": {"frechet_distance": 0.2, "kernel_distance": 0.0, "precision": 0.9, "recall": 0.9, "density": 1.0, "coverage": 0.95,
             "class_entropy_over_data": 0.999},
    "likelihood": {"kind": "elbo", "bits_per_dim": 1.2, "bits_per_dim_error": 0.01},
    "protocol": {"extractor": "mnist-classifier", "extractor_hash": "sha256:abc", "resizer": "none", "features": "divided",
                 "dataset": "digits", "split": "train", "reference_pictures": 300, "reference_hash": "sha256:def", "classes": "all",
                 "held_out": "test", "resolution": 28, "channels": 1, "num": 60, "kernel": "100", "neighbours": "3", "seed": 0},
    "sampling": {"pipeline": "VAEPipeline", "temperature": 1.0}, "counts": {"drawn": 60, "not_finite": 0},
    "cost": {"seconds_per_picture": 0.002, "evaluations_per_picture": 1.0, "parameters": 500_000},
    "pictures": {"drawn": "drawn.png", "data": "data.png"},
}  # fmt: skip


def result(model: str = "VAE", **changes) -> dict:
    """An evaluation with changes such as metrics__coverage=0.7; None takes an entry away."""
    made = copy.deepcopy(RESULT) | {"model": model}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if value is None:
            made[group].pop(name, None)
        else:
            made[group][name] = value
    return made


def ddim(steps: int, distance: float) -> dict:
    return result(
        "DDPM", sampling__scheduler="ddim", sampling__steps=steps, sampling__guidance=1.0, metrics__frechet_distance=distance,
        metrics__frechet_distance_over_real=distance / 0.2, cost__evaluations_per_picture=steps, metrics__bits_per_dim=None,
    )  # fmt: skip


PARTS = ["extractor_hash", "resizer", "features", "reference_hash", "classes", "resolution", "channels", "num", "kernel", "neighbours",
         "held_out_pictures", "held_out_sets"]  # fmt: skip


def test_what_a_protocol_is():
    assert sorted(COMPARABLE) == sorted(PARTS)  # a part less, and numbers are ranked that must not be


@pytest.mark.parametrize("part", PARTS)
def test_different_protocols_are_never_ranked_together(part):
    groups = compare([result("a"), result("b", **{f"protocol__{part}": 99 if part == "num" else "another"}), result("c")])
    assert [[row.name for row in group.rows] for group in groups] == [["a", "c"], ["b"]]
    text = markdown(groups)
    assert f"2 protocols, which differ in {part}: their numbers are not comparable" in text
    assert text.count("| model | sampler |") == 2 and groups[1].best == {}  # one row is not the best of anything


def test_seeds_are_one_row_and_share_a_protocol(tmp_path):
    for seed, distance in enumerate((3.0, 4.0, 5.0)):
        (tmp_path / f"{seed}.json").write_text(json.dumps(result(protocol__seed=seed, metrics__frechet_distance=distance)))
    groups = compare([f"GAN={tmp_path / f'{seed}.json'}" for seed in range(3)])
    assert len(groups) == 1 and len(groups[0].rows) == 1
    assert "| GAN |  | 4 ± 1 |" in markdown(groups)


def test_one_seed_of_several_may_have_a_likelihood():
    without = result(protocol__seed=1, metrics__bits_per_dim=None) | {"likelihood": None}
    measured = result(protocol__seed=2, metrics__bits_per_dim=1.2) | {"likelihood": {"kind": "elbo", "bits_per_dim_error": 0.01}}
    for order in ([without, measured], [measured, without]):
        assert "1.200 ± 0.010 (elbo)" in markdown(compare(order))


def test_the_best_is_first_and_bold_and_what_is_not_finite_is_neither():
    broken = result("broken", metrics__frechet_distance=0.1, counts__not_finite=7)
    lost = result("lost", counts__not_finite=60) | {"metrics": {}}
    groups = compare([result("VAE"), broken, ddim(20, 1.0), lost])
    assert [row.name for row in groups[0].rows] == ["DDPM", "VAE", "broken", "lost"]
    lines = markdown(groups).splitlines()
    assert next(line for line in lines if "DDPM" in line).startswith("| DDPM | ddim, 20 steps | **1** | **5** |")
    assert "**" not in next(line for line in lines if "| broken (not ranked: 7 pictures not finite)" in line)
    assert any(line.startswith("| lost (not ranked: 60") for line in lines)
    assert "1.200 ± 0.010 (elbo)" in markdown(groups)


def test_a_column_of_equals_has_no_best():
    group = compare([result("a"), result("b"), result("c")])[0]
    assert group.best == {} and "**" not in markdown([group])
    group = compare([result("a"), result("b"), result("c", metrics__frechet_distance=0.5)])[0]
    assert group.best == {"frechet_distance": {0.5}} and markdown([group]).count("**") == 2


def test_the_table_cannot_be_broken_by_a_name(tmp_path):
    text = markdown(compare([result("a|b\n<script>alert(1)</script>")]))
    assert "a\\|b &lt;script>" in text
    compare([result("</title><script>alert(1)</script>"), ddim(10, 1.0)], tmp_path, title="<b>")
    assert "<script" not in (tmp_path / "compare.html").read_text() and "&lt;b&gt;" in (tmp_path / "compare.html").read_text()


class Links(HTMLParser):
    """Everything that a browser would fetch, and the tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path):
    for name, colour in (("drawn.png", 90), ("data.png", 200)):
        Image.new("L", (8, 8), colour).save(tmp_path / name)
    for index, one in enumerate([result(), ddim(10, 2.0), ddim(20, 1.0), ddim(50, 0.7)]):
        (tmp_path / f"evaluation-{index}.json").write_text(json.dumps(one))
    groups = compare([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "compare.html").read_text()
    page = Links()
    page.feed(text)
    assert not page.open and page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|<script|<link", text) and 'name="viewport"' in text
    assert len(page.links) == 5 and base64.b64decode(page.links[0].partition(",")[2]) == (tmp_path / "data.png").read_bytes()
    plots = re.findall(r"<svg viewBox=\"0 0 480 340\".*?</svg>", text)
    assert len(plots) == 4
    drawn = ElementTree.fromstring(plots[0])  # well-formed
    line = next(drawn.iter("polyline")).attrib["points"].split()
    assert len(line) == 3  # the three step counts of one sampler, in their order
    xs, ys = zip(*[map(float, point.split(",")) for point in line], strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys)  # more steps to the right, better is lower on the screen
    assert text.count("<h3>") == 4 and "ddim, 20 steps" in text
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == [row.name for row in groups[0].rows] and rows[0]["metrics.coverage"] == "0.5"
    assert (tmp_path / "out" / "compare.md").read_text() == markdown(groups)


def test_a_picture_outside_the_folder_is_not_taken(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.png").write_text("not a picture")
    for index, name in enumerate(("../secret.png", str(tmp_path / "secret.png"), "text.png")):
        hostile = result(f"m{index}", pictures__drawn=name, pictures__data=name)
        (tmp_path / "in" / f"evaluation-{index}.json").write_text(json.dumps(hostile))
    compare([tmp_path / "in"], tmp_path / "out")
    assert "base64" not in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ('{"elbo": 1}', "no evaluation of this"), ('{"format": 99}', "no evaluation of this"), ("[]", "no evaluation")],
)
def test_what_is_no_evaluation(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        compare([tmp_path / "a.json"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        compare([tmp_path / "b.json"])
    with pytest.raises(FileNotFoundError, match=r"no evaluation\*.json in this folder"):
        compare([tmp_path])
    with pytest.raises(ValueError, match="no evaluations"):
        compare([])


def test_ticks_are_round_and_inside():
    for low, high in ((1, 1000), (0.8, 1.3), (4.2, 4.6), (1e-4, 5e3), (7, 90), (0.31, 0.32)):
        for axis in (Axis("x"), Axis("x", log=True)):
            span = axis.span([low, high])
            ticks = axis.ticks(span)
            assert 2 <= len(ticks) <= 9 and all(span[0] <= tick <= span[1] for tick in ticks), (low, high, axis.log, ticks)
            assert ticks == sorted(ticks) and len(set(labels(ticks))) == len(ticks)
    one = Axis("x", log=True)
    assert one.span([3.0])[0] < 3 < one.span([3.0])[1]


def test_ticks_are_told_apart():
    assert labels([1.225, 1.23, 1.235, 1.24]) == ["1.225", "1.23", "1.235", "1.24"]
    assert labels([0.0, 0.2, 0.6000000000000001]) == ["0", "0.2", "0.6"] and labels([1.0, 100.0, 20000.0]) == ["1", "100", "20k"]


def test_only_steps_are_joined(tmp_path):
    compare([result(), result(sampling__temperature=0.7, metrics__frechet_distance=5.0)], tmp_path)
    assert "polyline" not in (tmp_path / "compare.html").read_text() and "None" not in (tmp_path / "compare.html").read_text()


def test_a_point_without_a_place_is_refused():
    for value in (math.nan, 0.0, -1.0):
        with pytest.raises(ValueError, match="has no place"):
            scatter([Series("a", [(value, 1.0, "")], 0)], Axis("x", log=True), Axis("y"))


def test_words_and_numbers():
    assert sampling_of(ddim(20, 1.0)) == "ddim, 20 steps" and sampling_of(result()) == ""
    assert sampling_of(result(sampling__guidance=2.5, sampling__temperature=0.7)) == "guidance 2.5, temperature 0.7"
    assert [written(value) for value in (0.01234, 4.5678, 789.4, 1234.0, 123456.0)] == ["0.0123", "4.57", "789", "1,230", "123,000"]


def test_the_command(tmp_path, capsys):
    (tmp_path / "vae.json").write_text(json.dumps(result()))
    assert main(["compare", f"A={tmp_path / 'vae.json'}", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "out" / f"compare.{end}") for end in ("md", "csv", "html")] and "| A |" in said.err
    assert main(["compare", str(tmp_path / "nothing")]) == 2


def made_again(words: list[str], file) -> bool:
    """Whether a comparison writes this evaluation anew."""
    before = file.stat().st_mtime_ns if file.is_file() else None
    assert main(words) == 0
    return file.is_file() and file.stat().st_mtime_ns != before


def test_the_command_evaluates_what_is_not_evaluated(digits, tmp_path, capsys):
    words = ["compare", "mine=bundled:mnist-vae", "--dataset", str(digits), "--num", "20", "--likelihood", "0", "--out", str(tmp_path)]
    file = tmp_path / "evaluation-mnist-vae.json"
    assert made_again(words, file)
    assert not made_again(words, file)  # once is enough
    assert "| mine |" in (tmp_path / "compare.md").read_text() and "data:image/png" in (tmp_path / "compare.html").read_text()
    capsys.readouterr()
    for number, changed in enumerate((["--num", "21"], ["--seed", "1"], ["--likelihood", "2"])):
        assert made_again([*words, *changed], file), changed
        assert capsys.readouterr().err.count("of other weights or another protocol; evaluating again") == 1, number
    assert main(words) == 0
    other = tmp_path / "elsewhere" / digits.name  # a data set of the same name, with other pictures
    other.mkdir(parents=True)
    for split, source in (("train", "test"), ("test", "train")):
        (other / f"{split}-00000-of-00001.parquet").write_bytes((digits / f"{source}-00000-of-00001.parquet").read_bytes())
    assert made_again([*words, "--dataset", str(other)], file)


def test_the_command_keeps_models_of_one_name_apart(digits, tmp_path, capsys):
    ends = [tmp_path / run / "final" for run in ("a", "b")]
    for seed, folder in enumerate(ends):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            VAEPipeline(VAEModel(sample_size=28, latent_dim=4, block_out_channels=(8, 8), layers_per_block=1)).save_pretrained(folder)
    words = ["--dataset", str(digits), "--num", "20", "--likelihood", "0"]
    assert main(["compare", *map(str, ends), "--out", str(tmp_path / "out"), *words]) == 0
    files = sorted((tmp_path / "out").glob("evaluation-*.json"))
    assert len({json.loads(file.read_text())["weights"] for file in files}) == len(files) == 2
    text = (tmp_path / "out" / "compare.md").read_text()
    assert all(f"| {folder} |" in text for folder in ends)  # two rows, not one with a deviation
    # another of that name in a later call: what lies there is not its
    for folder in ends:
        assert made_again(["compare", str(folder), "--out", str(tmp_path / "later"), *words], tmp_path / "later" / "evaluation-final.json")


def test_the_command_takes_a_models_own_evaluation_of_this_protocol(digits, tmp_path, capsys):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        VAEPipeline(VAEModel(sample_size=28, latent_dim=4, block_out_channels=(8, 8), layers_per_block=1)).save_pretrained(tmp_path / "vae")
    words = ["--dataset", str(digits), "--num", "20", "--likelihood", "0"]
    assert main(["evaluate", str(tmp_path / "vae"), *words, "--out", str(tmp_path / "vae" / "evaluation.json")]) == 0
    target = tmp_path / "out" / "evaluation-vae.json"
    assert not made_again(["compare", str(tmp_path / "vae"), "--out", str(tmp_path / "out"), *words], target)
    assert "| vae |" in (tmp_path / "out" / "compare.md").read_text()
    assert made_again(["compare", str(tmp_path / "vae"), "--out", str(tmp_path / "out"), *words, "--seed", "1"], target)
