"""`gen-pipelines train`: a recipe in, a folder in the Hub's layout out."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from ..hub.card import CARD_NAME, read_text
from ..hub.loading import INDEX_NAME
from ..hub.saving import check_writable
from .card import complete_card, drop_outdated_card
from .config import load_recipe, to_dict
from .state import checkpoints

logger = logging.getLogger(__name__)

_MODEL_FILES = (INDEX_NAME, "config.json", "scheduler_config.json")  # a pipeline's, a network's, a scheduler's folder


def train(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    output_dir: str | Path = "runs/run",
    resume: bool = False,
    inexact_resume: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    push_checkpoints: bool = False,
) -> Path:
    """Run a recipe.

    Args:
        config_path: the recipe, a YAML file.
        overrides: `key=value` changes to it.
        output_dir: receives the trained pipeline, and `checkpoints/`, `samples/`, `log.jsonl` and `recipe.yaml` beside it; with `ema.also`
            also `averages/DECAY/`, the pipeline of each of those averages.
        resume: continue from the newest checkpoint in `output_dir`; bit for bit where the data set is not a stream.
        inexact_resume: continue even where that cannot be exact.
        push_to_hub: a repository of the Hub that receives the finished model; whether it can be written is found out before the training.
        private: make that repository private, if it is made now.
        push_checkpoints: push every checkpoint while the training runs, to the branch `checkpoints`.
    Returns: `output_dir`.
    Raises:
        FileNotFoundError, ValueError: the recipe, the data or the output folder are not usable; raised before any training.
        OSError: the Hub cannot be reached, or refuses.
        NonFiniteLoss: the loss became NaN or infinite.
    """
    recipe = load_recipe(config_path, overrides)
    output_dir = Path(output_dir)
    _check_writable(output_dir)
    if not checkpoints(output_dir / "checkpoints"):
        if found := next((name for name in _MODEL_FILES if (output_dir / name).is_file()), None):
            raise ValueError(
                f"output folder {output_dir}: it holds a finished model ({found}) and no checkpoints to go on from; two would be mixed. "
                "Give another --output-dir, or remove the folder."
            )
    elif not (resume or inexact_resume):
        raise ValueError(f"{output_dir} holds the checkpoints of an earlier run: pass --resume to continue it, or another --output-dir.")
    if (output_dir / CARD_NAME).is_file():
        read_text(output_dir / CARD_NAME)  # at the end it is too late to find that it cannot be read

    if push_checkpoints and push_to_hub is None:
        raise ValueError("push_checkpoints (--push-checkpoints) needs push_to_hub (--push-to-hub), the repository that they go to.")
    hub = None
    if push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        from .push import HubRun

        hub = HubRun(push_to_hub, private)

    from .tasks import make_task
    from .trainer import Trainer

    task = make_task(recipe)
    hooks = {name: getattr(task, name, None) for name in ("initialize", "after_update")}
    trainer = Trainer(recipe, task.networks, task.losses, task.phases, task.data, output_dir, task.draw_samples, **hooks)
    if hub is not None and push_checkpoints:
        trainer.on_checkpoint = hub.push_checkpoint
    if resume or inexact_resume:
        step = trainer.resume(inexact=inexact_resume)
        if step:
            logger.info("continuing from step %d", step)
        else:
            logger.info("no checkpoint in %s: starting at the first step", output_dir)
    if trainer.accelerator.is_main_process:
        import yaml

        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True))
    trainer.train()
    if trainer.accelerator.is_main_process:
        facts = {"steps": trainer.step, "seconds": round(trainer.seconds), "hardware": _hardware(trainer.accelerator.num_processes)}
        folders = {None: output_dir} | {decay: output_dir / "averages" / str(decay) for decay in trainer.other_averages}
        for decay, folder in folders.items():
            drop_outdated_card(folder)
            with trainer.averaged_weights(decay) as networks:
                task.save(networks, folder, facts)
        complete_card(output_dir, recipe)
        if hub is not None:
            logger.info("pushed: %s", hub.push_result(output_dir))
    trainer.accelerator.wait_for_everyone()
    return output_dir


def _check_writable(folder: Path) -> None:
    try:
        check_writable(folder)
    except OSError as error:
        raise ValueError(f"output folder {folder}: cannot be written ({error.strerror or error}); choose another --output-dir.") from None


def _hardware(processes: int) -> str:
    import torch

    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{processes} x CPU ({threads} thread{'s' * (threads > 1)}, {platform.machine()}, {os.cpu_count()} cores)"
