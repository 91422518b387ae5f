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
) -> str:
    """The text of a README.md in the Hub's format.

    Args:
        name: what goes to `AutoPipeline.from_pretrained`: a Hub id or a folder's name.
        class_name: the pipeline's class.
        components: name -> (library, class).
        pipeline_tag: one of the Hub's task names, such as "text-to-image".
        license: an identifier of the Hub's list, such as "apache-2.0"; left out where it is not known.
        example: the call in the snippet's second line, for example `image = pipe("a red apple").images[0]`.
        datasets: Hub names of the training data.
        notes: more Markdown: training, metrics, limits.
    """
    head = {"library_name": LIBRARY_NAME, "license": license, "pipeline_tag": pipeline_tag}
    lines = [f"{key}: {value}" for key, value in head.items() if value]
    if datasets:
        lines += ["datasets:", *(f"- {d}" for d in datasets)]
    lines += ["tags:", f"- {LIBRARY_NAME}", "- diffusers", f"- {class_name}"]
    table = [f"| `{part}` | `{library}.{cls}` |" for part, (library, cls) in sorted(components.items())]
    snippet = [f'pipe = AutoPipeline.from_pretrained("{name}")', *([example] if example else [])]
    return "\n".join(
        [
            "---", *lines, "---", "", f"# {name}", "", f"A `{class_name}` of gen_pipelines.", "",
            "```python", "from gen_pipelines import AutoPipeline", "", *snippet, "```", "",
            "## Components", "", "| name | class |", "|---|---|", *table, "",
            *([notes.rstrip(), ""] if notes else []),
        ]
    )  # fmt: skip
