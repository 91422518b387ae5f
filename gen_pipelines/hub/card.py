"""Model cards: a minimal one is generated; one that exists is never overwritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LIBRARY_NAME = "gen-pipelines"


def model_card(
    name: str,
    class_name: str,
    components: Mapping[str, Sequence[str]],
    pipeline_tag: str | None = None,
    license: str | None = None,
    example: str = "",
    datasets: Sequence[str] = (),
    notes: str = "",
    library: str = "gen_pipelines",
) -> str:
    """The text of a README.md in the Hub's format.

    Args:
        name: what goes to `from_pretrained`: a Hub id or a folder's name.
        class_name: the pipeline's class, or that of a single network.
        components: name -> (library, class); empty for a single network.
        pipeline_tag: one of the Hub's task names, such as "text-to-image".
        license: an identifier of the Hub's list, such as "apache-2.0"; left out where it is not known.
        example: the call in the snippet's second line, for example `image = pipe("a red apple").images[0]`.
        datasets: Hub names of the training data.
        notes: more Markdown: training, metrics, limits.
        library: where a single network's class is imported from.
    """
    head = {"library_name": LIBRARY_NAME, "license": license, "pipeline_tag": pipeline_tag}
    lines = [f"{key}: {value}" for key, value in head.items() if value]
    if datasets:
        lines += ["datasets:", *(f"- {d}" for d in datasets)]
    lines += ["tags:", f"- {LIBRARY_NAME}", "- diffusers", f"- {class_name}"]
    table = [f"| `{part}` | `{origin}.{cls}` |" for part, (origin, cls) in sorted(components.items())]
    loader, variable = ("AutoPipeline", "pipe") if components else (class_name, "model")
    snippet = [f'{variable} = {loader}.from_pretrained("{name}")', *([example] if example else [])]
    return "\n".join(
        [
            "---", *lines, "---", "", f"# {name}", "", f"A `{class_name}` of {library}.", "",
            "```python", f"from {library} import {loader}", "", *snippet, "```", "",
            *(["## Components", "", "| name | class |", "|---|---|", *table, ""] if components else []),
            *([notes.rstrip(), ""] if notes else []),
        ]
    )  # fmt: skip
