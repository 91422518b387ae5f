"""One evaluation: a model's pictures against a data set's, under a protocol that is written down with the numbers."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..hub.card import EVALUATION_NAME
from ..hub.measured import networks_of, weights_hash
from ..training.random import sample_generators
from .distances import frechet_distance, kernel_distance
from .extractors import Extractor, find_extractor
from .flows import is_flow, straightness
from .neighbours import manifolds, nearest
from .parts import Parts
from .reference import Measured, Reference, keep
from .sampling import Sampler
from .statistics import FeatureStatistics

logger = logging.getLogger(__name__)

FORMAT = 1  # of evaluation.json; raised when a number of the same name would mean something else
SHOWN = 64  # pictures in the grid
COPIES = 1000  # pictures whose nearest training picture is looked for, pixel by pixel
LIKELIHOOD_BATCH, FLOW_PICTURES, FLOW_STEPS = 16, 64, 50
KERNEL = {"subsets": 100, "subset_size": 1000}
NEIGHBOURS = {"k_precision": 3, "k_density": 5}


def evaluate(
    model: Any,
    dataset: str | Reference,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    split: str = "train",
    held_out_split: str | None = None,
    num: int = 5000,
    scheduler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    truncation: float | None = None,
    classes: Sequence[int] | None = None,
    ask_for_classes: bool = True,
    extractor: str | None = None,
    inception_weights: str | Path | None = None,
    seed: int = 0,
    likelihood: int = 256,
    batch_size: int = 100,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    device: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draws `num` pictures and measures them against a data set.

    With `out`, batches are kept beside it while the evaluation runs: called again after a kill it goes on, and gives the numbers that it
    would have given. Under torchrun every process draws its share, with the same result; the processes must see the same folder.

    Args:
        model: a pipeline, or what `AutoPipeline.from_pretrained` takes: `bundled:NAME`, a folder, an id on the Hub.
        dataset: a Hub data set, a folder, or an open `Reference`, which is then measured once for many evaluations.
        name: what the result calls the model; by default what was given, of a folder its last part.
        out: the JSON file; the pictures' grids go beside it. None: nothing is written.
        split: the pictures to measure against; the training set by default.
        held_out_split: other real pictures, which stand beside the drawn ones: see `Reference.open`.
        num: pictures to draw. Distances depend on it: only equal numbers are comparable.
        scheduler, steps, guidance, temperature, truncation: how the pipeline draws; None is its own way.
        classes: measure these classes alone: pictures are drawn of them, and compared with real ones of them.
        ask_for_classes: a model of classes is asked for them in the data's proportions; False leaves the choice to the pipeline.
        extractor: whose features; see `find_extractor`.
        inception_weights: torch-fidelity's file of Inception.
        seed: picture i depends on the seed and on i alone.
        likelihood: held-out pictures whose likelihood is taken, where the pipeline has one; 0 for none.
        batch_size: pictures drawn at once.
        image_column, label_column, text_column: of the data set.
        device: None leaves a pipeline where it is, and puts a loaded one on an accelerator if there is one.
        progress: show bars on stderr.
    Returns: what `out` holds: "metrics", "real" (the same numbers of held-out real pictures), "protocol", "sampling", "counts", "cost", ...
    Raises:
        ValueError, TypeError: settings that do not fit the model, the data or each other; before anything is drawn.
        ImportError, FileNotFoundError: the extractor, or the data, is not here.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    for option, value, least in (("num", num, 10), ("batch_size", batch_size, 1), ("likelihood", likelihood, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{option}: {value!r} is not allowed; give a whole number from {least} on.")
    if ranks > 1 and out is None:
        raise ValueError("out: several processes hand their shares in through files beside it; give one.")
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out: {out} is a folder; name a file, such as {Path(out) / EVALUATION_NAME}.")

    # 1. The model, the data and the features; everything is checked before anything is drawn
    called, pipe = load_pipeline(model, device)
    name = name or called
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_it_was(pipe))
        pipe.set_progress_bar_config(disable=True)
        sampler = Sampler(pipe, seed, scheduler, steps=steps, guidance=guidance, temperature=temperature, truncation=truncation)
        channels, height, width = sampler.probe()
        if height != width:
            raise ValueError(f"evaluate: {name} draws {height} x {width}; pictures of a data set are made square, so only such compare.")
        features = find_extractor(extractor, channels, (height, width), pipe.device, inception_weights)
        reference = dataset if isinstance(dataset, Reference) else Reference.open(
            dataset, split, held_out_split, resolution=height, channels=channels, image_column=image_column, label_column=label_column,
            text_column=text_column, classes=classes,
        )  # fmt: skip
        if (reference.reference.config.resolution, reference.reference.config.channels) != (height, channels):
            raise ValueError(f"dataset: this Reference is not of pictures as the model draws, {channels} x {height} x {width}.")
        for part, count in ((reference.split, len(reference.reference)), (reference.held_out_name, len(reference.held_out))):
            if count <= max(NEIGHBOURS.values()):
                raise ValueError(f"dataset: {count} pictures in {part!r}; more than {max(NEIGHBOURS.values())} are needed.")
        labels, captions = conditions(sampler, reference, num, ask_for_classes)
        held_out = reference.held_out_rows(likelihood, seed)
        labelled = sampler.num_classes is not None and reference.held_out.labels is not None

        settings = {
            "format": FORMAT, "weights": weights_hash(pipe), "sampling": sampler.describe(), "num": num, "seed": seed, "batch": batch_size,
            "labels": labels, "captions": captions, "extractor": features.hash, "data": [reference.name, reference.split, len(reference)],
            "classes": reference.classes, "held_out": held_out, "scheduler": scheduler_settings(pipe), "torch": torch.__version__,
            "version": __version__,
        }  # fmt: skip
        if out is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            home = Path(out).parent / f".{Path(out).name}.parts"
        parts = Parts(home, settings)
        parts.prepare()
        barrier = stack.enter_context(processes(ranks))

        # 2. Pictures, and likelihoods, of this process's share
        batches = [range(first, min(first + batch_size, num)) for first in range(0, num, batch_size)]
        groups = [held_out[first : first + LIKELIHOOD_BATCH] for first in range(0, len(held_out), LIKELIHOOD_BATCH)]
        shown = progress and rank == 0
        with bar(sum(map(len, batches[rank::ranks])), "drawing", shown) as done:
            for index in range(rank, len(batches), ranks):
                if not parts.has(part := f"pictures-{index:06}"):
                    draw_part(parts, part, sampler, batches[index], labels, captions, features)
                done.update(len(batches[index]))
        with bar(sum(map(len, groups[rank::ranks])), "likelihood", shown) as done:
            for index in range(rank, len(groups), ranks):
                if not parts.has(part := f"likelihood-{index:06}"):
                    likelihood_part(parts, part, pipe, reference, groups[index], labelled, seed)
                done.update(len(groups[index]))
        parts.write(f"memory-{rank:03}", {"mib": peak_memory(pipe.device)})
        barrier()

        # 3. All of it together, on one process
        if rank == 0:
            with bar(len(reference), "real pictures", shown) as done:
                real, other, digest = reference.measure(features, done.update)
            result = {"format": FORMAT, "model": name, "weights": settings["weights"], "dataset": reference.name, "split": reference.split}
            drawn, counts, cost = gather(parts, len(batches))
            cost["peak_memory_mib"] = max(parts.read(f"memory-{r:03}")[0]["mib"] for r in range(ranks))
            result["metrics"], result["real"] = measure(drawn, real, other, features, num, labels if labelled else None)
            if is_flow(pipe) and reference.classes is None:
                result["metrics"] |= bends(sampler, labels)
            result["likelihood"] = gather_likelihood(parts, len(groups), labelled)
            for key in ("bits_per_dim", "bits_per_dim_error", "nats"):
                if result["likelihood"] is not None and result["likelihood"].get(key) is not None:
                    result["metrics"][key] = result["likelihood"][key]
            result["protocol"] = protocol(features, reference, digest, num, seed, height, channels, len(held_out))
            result["sampling"] = sampler.describe() | {"classes_asked_for": labels is not None}
            result |= {"counts": counts, "cost": cost | machine(pipe, batch_size, ranks)}
            if counts["not_finite"]:
                logger.warning("%d of %d pictures are not finite; they are in none of the other numbers.", counts["not_finite"], num)
            if out is not None:
                write(Path(out), result, drawn["shown"], reference)
                parts.remove()
        barrier()
    if rank:
        return json.loads(Path(out).read_text(encoding="utf-8"))
    return json.loads(json.dumps(result))  # what a reader of the file sees, tuples and all


def is_current(file: str | Path, pipe: Any, reference: Reference, *, num: int, seed: int, likelihood: int) -> bool:
    """Whether a file is the evaluation that `evaluate` would make with these arguments, and its defaults for the others."""
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(result, dict) or result.get("format") != FORMAT or result.get("weights") != weights_hash(pipe):
        return False
    with as_it_was(pipe):
        pipe.set_progress_bar_config(disable=True)
        sampler = Sampler(pipe, seed)
        channels, height, width = sampler.probe()
        features = find_extractor(None, channels, (height, width), pipe.device)
        told = protocol(features, reference, "", num, seed, height, channels, len(reference.held_out_rows(likelihood, seed)))
        asks = sampler.num_classes is not None and reference.reference.labels is not None
        drawn = json.loads(json.dumps(sampler.describe() | {"classes_asked_for": asks}))
    theirs = result.get("protocol")
    # a data set may have another name elsewhere: its pixels decide, and they are read last
    same = isinstance(theirs, dict) and all(theirs.get(key) == told[key] for key in told if key not in ("dataset", "reference_hash"))
    return same and result.get("sampling") == drawn and theirs.get("reference_hash") == reference.measure(features)[2]


# ------------------------------------------------------------------------------------------------------------------------- the steps


def load_pipeline(model: Any, device: Any) -> tuple[str, Any]:
    """The pipeline and what it is called in results: never a path of this machine."""
    if not isinstance(model, str | Path):
        source = getattr(model, "name_or_path", "") or type(model).__name__
        return Path(source).name if Path(source).is_dir() else source, model if device is None else model.to(device)
    from ..pipelines.auto import AutoPipeline

    path = str(model)
    pipe = AutoPipeline.from_pretrained(path)
    if device is None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return Path(path).expanduser().resolve().name if Path(path).expanduser().is_dir() else path, pipe.to(device)


@contextlib.contextmanager
def as_it_was(pipe: Any) -> Any:
    """Gives a pipeline back with the scheduler and the progress bar that it came with."""
    scheduler, shown = getattr(pipe, "scheduler", None), getattr(pipe, "_progress_bar_config", None)
    try:
        yield
    finally:
        if scheduler is not None and pipe.scheduler is not scheduler:
            pipe.scheduler = scheduler
        pipe._progress_bar_config = shown or {}


def conditions(sampler: Sampler, reference: Reference, num: int, ask: bool) -> tuple[list[int] | None, list[str] | None]:
    """What the model is asked for, picture by picture: (labels, captions)."""
    if sampler.takes_prompts:
        captions = reference.captions(num)
        if captions is None:
            raise ValueError("text_column: this model draws from prompts; name the data set's column of captions (--text-column).")
        return None, captions
    if reference.classes is not None and (sampler.num_classes is None or not ask):
        raise ValueError("classes: this model is not asked for classes, so single ones cannot be measured; leave it out.")
    if sampler.num_classes is None or not ask:
        return None, None
    labels = reference.labels(num, sampler.seed)
    if labels is not None and max(labels) >= sampler.num_classes:
        raise ValueError(f"label_column: the data has a label {max(labels)}, the model knows 0 to {sampler.num_classes - 1}.")
    return labels, None


def draw_part(
    parts: Parts, part: str, sampler: Sampler, numbers: range, labels: Any, captions: Any, extractor: Extractor
) -> None:
    """Draws one batch and keeps what the metrics need of it."""
    own = lambda values: None if values is None else [values[i] for i in numbers]
    drawn = sampler.draw(numbers, own(labels), own(captions))
    finite = torch.isfinite(drawn.pictures).flatten(1).all(1)                                          # (B,)
    levels = (drawn.pictures[finite].clamp(0, 1) * 255).round().to(torch.uint8)                        # what a file would hold
    tensors = {"finite": finite, "shown": levels[: max(0, SHOWN - numbers.start)]}
    if len(levels):
        kept = keep(levels, extractor)
        tensors |= {"features": kept.features, "thumbnails": kept.thumbnails[: max(0, COPIES - numbers.start)]}
        tensors |= {} if kept.classes is None else {"classes": kept.classes}
    parts.write(part, {"count": len(numbers), "seconds": drawn.seconds, "evaluations": drawn.evaluations}, tensors)


def likelihood_part(parts: Parts, part: str, pipe: Any, reference: Reference, rows: list[int], labelled: bool, seed: int) -> None:
    """Log-likelihoods of a few held-out pictures; a picture whose number is not finite is kept as NaN, and counted later."""
    from ..likelihood.result import bits_per_dim

    def of(some: list[int]) -> dict[str, Any]:
        levels = torch.stack([reference.held_out.picture(row) for row in some])
        labels = [reference.held_out.labels[row] for row in some] if labelled else None
        result = pipe.log_likelihood(levels, labels=labels, generator=sample_generators(seed, "sampling", some, [2] * len(some)))
        bits = bits_per_dim(result.nats, levels[0].numel()) if result.bits_per_dim is not None else None
        return {
            "nats": result.nats.double().tolist(), "bits": None if bits is None else bits.double().tolist(),
            "kind": result.kind, "evaluations": result.num_function_evaluations, "dequantization": result.dequantization,
        }  # fmt: skip

    try:
        facts = of(rows)
    except (NotImplementedError, AttributeError) as error:
        facts = {"none": str(error)}
    except ValueError as error:
        if "not finite" not in str(error):
            facts = {"none": f"refused: {error}"}
        else:
            facts = {"nats": [], "bits": [], "kind": "", "evaluations": 0, "dequantization": ""}
            for row in rows:
                try:
                    one = of([row])
                except ValueError:
                    one = {"nats": [math.nan], "bits": [math.nan]}
                facts |= {key: value for key, value in one.items() if key not in ("nats", "bits")}
                facts["nats"] += one["nats"]
                facts["bits"] += one["bits"] or [math.nan]
    parts.write(part, facts)


def gather(parts: Parts, batches: int) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    """All batches in order: what was drawn, how many were not finite, and what it cost."""
    read = [parts.read(f"pictures-{index:06}") for index in range(batches)]
    together = lambda key: torch.cat(found) if (found := [tensors[key] for _, tensors in read if key in tensors]) else None
    finite = together("finite")
    drawn = {key: together(key) for key in ("features", "thumbnails", "classes", "shown")} | {"finite": finite}
    per_picture = [facts["seconds"] / facts["count"] for facts, _ in read]
    count = sum(facts["count"] for facts, _ in read)
    cost = {
        "seconds_per_picture": statistics.median(per_picture),  # of batches: the first one warms up, others may share the machine
        "evaluations_per_picture": sum(facts["evaluations"] * facts["count"] for facts, _ in read) / count,
    }
    return drawn, {"drawn": count, "not_finite": int((~finite).sum())}, cost


def gather_likelihood(parts: Parts, groups: int, labelled: bool) -> dict[str, Any] | None:
    """The mean over held-out pictures, with its standard error over them; or why there is none."""
    read = [parts.read(f"likelihood-{index:06}")[0] for index in range(groups)]
    if not read:
        return None
    if reasons := [facts["none"] for facts in read if "none" in facts]:
        return {"bits_per_dim": None, "reason": reasons[0]}
    nats = torch.tensor([value for facts in read for value in facts["nats"]], dtype=torch.float64)
    finite = torch.isfinite(nats)
    found = {key: next(facts[key] for facts in read if facts["kind"]) for key in ("kind", "evaluations", "dequantization")} if any(
        facts["kind"] for facts in read
    ) else {}
    found |= {"pictures": len(nats), "not_finite": int((~finite).sum()), "given_the_class": labelled}
    if not finite.all():  # a mean without them would flatter
        return {"bits_per_dim": None, "nats": None, "reason": f"{found['not_finite']} of {len(nats)} are not finite", **found}
    error = lambda x: (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else None
    found |= {"nats": nats.mean().item(), "nats_error": error(nats), "bits_per_dim": None, "bits_per_dim_error": None}
    if all(facts["bits"] is not None for facts in read):
        bits = torch.tensor([value for facts in read for value in facts["bits"]], dtype=torch.float64)
        found |= {"bits_per_dim": bits.mean().item(), "bits_per_dim_error": error(bits)}
    return found


def measure(
    drawn: dict[str, Any], real: Measured, other: Measured, extractor: Extractor, num: int, labels: list[int] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of drawn pictures against real ones, and the same of other real pictures at the same number as far as there are any."""
    whole = FeatureStatistics.empty(real.features.shape[1])
    for part in real.features.split(10_000):  # in float64 all of them at once may be too many
        whole = whole.update(part)
    scale = whole.std if extractor.normalised else torch.ones(len(whole.mean), dtype=torch.float64)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a feature that the data never moves
    generator = torch.Generator().manual_seed(0)  # the real pictures are the same ones for every seed of the model's
    some = real.features[torch.randperm(len(real.features), generator=generator)[:num]]
    order = torch.randperm(len(other.features), generator=generator)
    pick = order[:num]
    beside = Measured(other.features[pick], other.thumbnails[pick], None if other.classes is None else other.classes[pick])
    everyone = (whole.scaled(scale), some.double() / scale, scale)

    kept = drawn["features"]
    if kept is None or len(kept) <= max(NEIGHBOURS.values()):
        logger.warning("%d finite pictures: too few to measure.", 0 if kept is None else len(kept))
        return {}, compared(beside.features, *everyone) | {
            "frechet_distance": real_distance(other.features[order], num, whole.scaled(scale), scale)
        }
    metrics, natural = compared(kept, *everyone), compared(beside.features, *everyone)
    natural["frechet_distance"] = real_distance(other.features[order], num, whole.scaled(scale), scale)
    metrics["frechet_distance_over_real"] = metrics["frechet_distance"] / natural["frechet_distance"]
    if extractor.classes is not None:
        of_data = histogram(real.classes, extractor.classes)
        for found, seen in ((metrics, drawn["classes"]), (natural, beside.classes)):
            shares = histogram(seen, extractor.classes)
            found["class_shares"] = shares.tolist()
            found["class_entropy"] = entropy(shares)
            found["class_entropy_over_data"] = entropy(shares) / entropy(of_data) if entropy(of_data) > 0 else None
        if labels is not None:
            asked = torch.tensor(labels)[drawn["finite"]]
            metrics["class_accuracy"] = (drawn["classes"] == asked).double().mean().item()
    flat = lambda pictures: pictures[:COPIES].flatten(1).float() / 255
    training = real.thumbnails.flatten(1).float() / 255
    near, usual = nearest(flat(drawn["thumbnails"]), training), nearest(flat(beside.thumbnails), training)
    metrics["nearest_training_picture"] = near.median().item()
    natural["nearest_training_picture"] = usual.median().item()
    metrics["nearest_over_real"] = near.median().item() / usual.median().item() if usual.median() > 0 else None
    metrics["near_copies"] = (near < torch.quantile(usual, 0.01)).double().mean().item()  # 0.01 of real pictures are, by definition
    return metrics, natural


def real_distance(features: Tensor, num: int, whole: FeatureStatistics, scale: Tensor) -> float:
    """The mean Fréchet distance of as many disjoint sets of `num` real pictures as there are: one set alone varies by a quarter."""
    sets = [features[first : first + num] for first in range(0, real_sets(num, len(features)) * num, num)]
    return statistics.fmean(frechet_distance(whole, FeatureStatistics.of(one.double() / scale)) for one in sets)


def real_sets(num: int, held_out: int) -> int:
    """How many disjoint sets of `num` pictures there are; 1 where there are fewer pictures, which are then the set."""
    return max(1, held_out // num)


def compared(features: Tensor, whole: FeatureStatistics, some: Tensor, scale: Tensor) -> dict[str, float]:
    """Distances and manifolds of features (N, D) against the statistics and a sample of the real ones, all in units of `scale`."""
    x = features.double() / scale
    mean, spread = kernel_distance(some, x, **KERNEL)
    found = manifolds(some, x, **NEIGHBOURS)
    return {
        "frechet_distance": frechet_distance(whole, FeatureStatistics.of(x)),
        "kernel_distance": mean,
        "kernel_distance_spread": spread,
        **{name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")},
    }


def histogram(classes: Tensor, count: int) -> Tensor:
    """Shares of classes, (K,)."""
    return torch.bincount(classes, minlength=count).double() / len(classes)


def entropy(shares: Tensor) -> float:
    """Of a distribution (K,), in nats."""
    return -torch.xlogy(shares, shares).sum().item() + 0.0


def bends(sampler: Sampler, labels: list[int] | None) -> dict[str, float]:
    """Straightness and transport cost of a flow, means over a few pictures."""
    numbers = list(range(FLOW_PICTURES))
    own = None if labels is None else [labels[i % len(labels)] for i in numbers]
    bent, far = straightness(sampler, numbers, own, FLOW_STEPS)
    return {"straightness": bent.mean().item(), "transport_cost": far.mean().item()}


# ------------------------------------------------------------------------------------------------------------ what is written down


def protocol(
    extractor: Extractor, reference: Reference, digest: str, num: int, seed: int, resolution: int, channels: int, pictures: int
) -> dict[str, Any]:
    """What two evaluations must share for their numbers to be compared, and the seed, which they need not."""
    return {
        "extractor": extractor.name, "extractor_hash": extractor.hash, "resizer": extractor.resizer,
        "features": "divided by their deviation on the reference" if extractor.normalised else "as they are",
        "dataset": reference.name, "split": reference.split, "reference_pictures": len(reference.reference), "reference_hash": digest,
        "classes": "all" if reference.classes is None else ",".join(map(str, reference.classes)),
        "held_out": reference.held_out_name, "held_out_pictures": min(num, len(reference.held_out)),
        "held_out_sets": real_sets(num, len(reference.held_out)),
        "resolution": resolution, "channels": channels, "num": num,
        "kernel": "{subsets} subsets of {subset_size}".format(**KERNEL),
        "neighbours": "{k_precision} for precision and recall, {k_density} for density and coverage".format(**NEIGHBOURS),
        "likelihood_pictures": pictures, "seed": seed,
    }  # fmt: skip


def machine(pipe: Any, batch_size: int, ranks: int) -> dict[str, Any]:
    """What the costs were measured on, and the parameters."""
    device = pipe.device
    parts = {name: sum(value.numel() for value in network.parameters()) for name, network in networks_of(pipe).items()}
    return {
        "parameters": sum(count for name, count in parts.items() if name != "discriminator"),  # it draws nothing
        "parameters_of": parts,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}",
        "threads": torch.get_num_threads(), "batch_size": batch_size, "processes": ranks, "dtype": str(pipe.dtype).removeprefix("torch."),
        "torch": torch.__version__, "gen_pipelines": __version__,
    }  # fmt: skip


def scheduler_settings(pipe: Any) -> Any:
    """The scheduler's config in plain values."""
    scheduler = getattr(pipe, "scheduler", None)
    return None if scheduler is None else {key: str(value) for key, value in sorted(scheduler.config.items())}


def peak_memory(device: torch.device) -> float:
    """Most memory that was in use, in MiB: of the accelerator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if (status := Path("/proc/self/status")).is_file():  # on Linux ru_maxrss begins at the peak of the process that started this one
        if peak := [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")]:
            return peak[0] / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write(out: Path, result: dict[str, Any], shown: Tensor, reference: Reference) -> None:
    """The JSON and the grids of pictures, each written at once."""
    names = {"drawn": f"{out.stem}.png", "data": f"{out.stem}-data.png"}
    real = torch.stack([reference.reference.picture(item) for item in range(min(SHOWN, len(reference.reference)))])
    for key, pictures in (("drawn", shown[:SHOWN]), ("data", real)):
        if len(pictures):
            unfinished = out.with_name(f".{names[key]}.tmp")
            picture_grid(pictures).save(unfinished, format="PNG")
            os.replace(unfinished, out.with_name(names[key]))
    result["pictures"] = names
    unfinished = out.with_name(f".{out.name}.tmp")
    unfinished.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, out)


def picture_grid(pictures: Tensor, columns: int = 8) -> Any:
    """uint8 pictures (B, C, H, W) as one PIL picture, row by row."""
    from PIL import Image

    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    canvas[:count] = pictures
    whole = canvas.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    return Image.fromarray(whole.squeeze(-1).numpy())


@contextlib.contextmanager
def processes(ranks: int) -> Any:
    """A function that waits for all processes."""
    if ranks == 1:
        yield lambda: None
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:  # one process may be hours behind another
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield dist.barrier
    finally:
        if ours:
            dist.destroy_process_group()


def bar(total: int, what: str, shown: bool) -> Any:
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=not shown, leave=False, file=sys.stderr, unit="picture")
