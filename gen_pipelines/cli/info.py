"""`gen-pipelines info MODEL`: what a model is made of, without loading it; or the settings that drew a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import reprlib
from pathlib import Path
from typing import Any

from gen_pipelines.cli import pictures
from gen_pipelines.cli.main import Parser
from gen_pipelines.cli.repository import Folder, Repository, count_parameters
from gen_pipelines.hub.card import measured
from gen_pipelines.hub.loading import check_safetensors, components_of, read_index, shards_of
from gen_pipelines.hub.measured import for_card, is_evaluation, is_of_weights


def build_parser() -> Parser:
    parser = Parser(
        prog="gen-pipelines info",
        description="Say what a model is made of, without loading its weights; or which settings drew a picture.",
        epilog="examples:\n  gen-pipelines info bundled:emoji\n  gen-pipelines info a-red-apple-0.png",
    )
    parser.add_argument("model", metavar="MODEL", help="bundled:NAME, a folder, an id on the Hub, or a picture drawn by generate")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    if Path(args.model).is_file() or args.model.lower().endswith(".png"):
        facts = pictures.read_settings(args.model)
    else:
        facts = describe_model(args.model, args.revision)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else "\n".join(layout(facts)))
    return 0


def describe_model(model: str, revision: str | None = None) -> dict[str, Any]:
    """What a pipeline's folder says of itself.

    Args:
        model: `bundled:NAME`, a folder, or an id on the Hub.
        revision: branch, tag or commit of a model on the Hub.
    Returns: a table of plain values: model, pipeline, revision, licence, components (class, number of parameters), parameters,
        scheduler, parameterization, metrics. What the folder does not say is None or empty.
    Raises:
        ValueError: the folder holds no pipeline, or a file in it is damaged.
        OSError: there is no such folder or repository.
    """
    repository = Repository.open(model, revision)
    index = repository.index()
    if isinstance(repository, Folder):
        _check_paths(repository.path)
    files = repository.files()
    components: dict[str, Any] = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and not name.startswith("_") and entry[1] is not None:
            weights = [file for file in files if file.startswith(f"{name}/") and file.endswith(".safetensors")]
            components[name] = {"class": entry[1], "parameters": _count(repository, weights) if weights else None}
    card = card_metadata(repository.text("README.md"))
    scheduler = repository.json("scheduler/scheduler_config.json")
    evaluation = repository.json("evaluation.json")
    # on the Hub the weights would have to be fetched to be compared
    is_current = evaluation is None or not isinstance(repository, Folder) or is_of_weights(evaluation, repository.path)
    return {
        "model": model,
        "pipeline": index.get("_class_name"),
        "revision": repository.fingerprint(),
        "licence": card.get("license_name") or card.get("license"),
        "components": components,
        "parameters": sum(part["parameters"] or 0 for part in components.values()),
        "scheduler": scheduler.get("_class_name") if scheduler else None,
        "parameterization": describe_parameterization(scheduler) if scheduler else None,
        "metrics": read_metrics(card, evaluation, is_current),
    }


def _check_paths(folder: Path) -> None:
    """Refuses what loading refuses: a component, or a shard of one, that lies outside the folder, or is not there."""
    for name in components_of(read_index(folder)):
        for index in sorted((folder / name).glob("*.safetensors.index*.json")):
            for shard in shards_of(index):
                check_safetensors(shard)


def _count(repository: Repository, weights: list[str]) -> int:
    """Parameters of one component: each tensor once, though a folder may hold variants (`.fp16.`) of the same weights."""
    shapes: dict[str, list[int]] = {}
    for file in weights:
        shapes |= repository.shapes(file)
    return count_parameters(shapes)


def card_metadata(card: str | None) -> dict[str, Any]:
    """The YAML table at the top of a model card, empty if there is none."""
    if card is None or not card.startswith("---"):
        return {}
    import yaml

    head = card.removeprefix("---").split("\n---", 1)[0]
    try:
        table = yaml.safe_load(head)
    except yaml.YAMLError as error:
        raise ValueError(f"README.md: the metadata between the --- lines is not YAML ({' '.join(str(error).split())})") from error
    return table if isinstance(table, dict) else {}


def describe_parameterization(scheduler_config: dict[str, Any]) -> dict[str, Any] | str:
    """What the network was trained to do (fields at their default are left out), or why that cannot be told."""
    from gen_pipelines.processes import Parameterization

    try:
        parameterization = Parameterization.from_config(scheduler_config)
    except ValueError as error:
        return f"not known: {' '.join(str(error).split())}"
    facts = {}
    for field in dataclasses.fields(parameterization):
        value = getattr(parameterization, field.name)
        if field.name in ("path", "prediction", "time_input") or value != field.default:
            facts[field.name] = _plain(value)
    return facts


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        told = [f for f in dataclasses.fields(value) if f.init and f.repr and getattr(value, f.name) != f.default]
        return f"{type(value).__name__}({', '.join(f'{f.name}={reprlib.repr(getattr(value, f.name))}' for f in told)})"
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def read_metrics(card: dict[str, Any], evaluation: dict[str, Any] | None, is_current: bool = True) -> dict[str, Any]:
    """Measured numbers: those of the card's `model-index`, then those of `evaluation.json` if it is of the weights beside it."""
    metrics: dict[str, Any] = {}
    for model in card.get("model-index") or []:
        for result in model.get("results") or []:
            for metric in result.get("metrics") or []:
                metrics[metric.get("name") or metric.get("type")] = metric.get("value")
    if evaluation is not None and is_evaluation(evaluation):
        found = for_card(evaluation)["metrics"]
    else:
        found = {name: value for name, value in (evaluation or {}).items() if isinstance(value, int | float | str)}
    if is_current:
        return metrics | found
    stale = measured(evaluation or {})[0]
    kept = {name: value for name, value in metrics.items() if name not in stale}  # the card has them from there
    return kept | {"evaluation.json": "of other weights than those here; run gen-pipelines evaluate again"}


def layout(facts: dict[str, Any], indent: str = "") -> list[str]:
    """A nested table as aligned lines; what is None or empty is left out."""
    shown = {name: value for name, value in facts.items() if value is not None and value != {}}
    width = max((len(str(name)) for name in shown), default=0)
    lines = []
    for name, value in shown.items():
        if isinstance(value, dict) and set(value) == {"class", "parameters"}:
            count = "" if value["parameters"] is None else f"  {value['parameters']:,} parameters"
            lines.append(f"{indent}{name:{width}}  {value['class']}{count}")
        elif isinstance(value, dict):
            lines += [f"{indent}{name}", *layout(value, indent + "  ")]
        else:
            text = f"{value:,}" if isinstance(value, int) and name == "parameters" else str(value)
            lines.append(f"{indent}{name:{width}}  {text}")
    return lines
