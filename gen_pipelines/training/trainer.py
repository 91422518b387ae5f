"""One training loop for every family: accelerate, moving averages, exact resume, sample grids, logs, a progress bar.

The loop knows no mathematics. A task hands it the networks and a function from a batch to losses; everything random in that function is
drawn from generators that belong to the samples (see `random.py`), so ranks, accumulation and resuming do not change the numbers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .averages import Average
from .config import OptimizerConfig, Recipe, to_dict
from .data import BadRowError, EndlessBatches, caption_groups, collate, stream_batches
from .objectives.base import ObjectiveOutput, Phase
from .random import Generators, sample_generators
from .seen import Seen, add_row
from .state import checkpoints, environment, load_checkpoint, random_state, save_checkpoint, set_random_state

Losses = Callable[[dict[str, nn.Module], dict[str, Any], str, Generators], ObjectiveOutput]


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message says where and which checkpoint is the last good one."""


class _Step(nn.Module):
    """The networks and their losses as one module, so that DDP sees one forward, whatever the losses call inside."""

    def __init__(self, networks: dict[str, nn.Module], losses: Losses) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self._losses = losses

    def forward(self, batch: dict[str, Any], phase: str, generator: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        output = self._losses(dict(self.networks.items()), batch, phase, generator)
        return output.per_sample, output.metrics


class Trainer:
    """Trains the networks of one task.

    A batch also holds `step`, the number of updates before it. A part of a network that has a method `after_update` is told so after each
    update of the network's optimiser (a codebook that moves by averages).

    Args:
        recipe: the run's settings.
        networks: the trained networks by name; those of a phase are updated by its optimiser.
        losses: (networks, batch, phase name, generators) -> ObjectiveOutput.
        phases: one per optimiser.
        data: a map-style data set asked by (item, draw), or an `IterableDataset` of rows when `recipe.data.streaming`. If it has a method
            `prepare`, that is called before the first batch.
        output_dir: where checkpoints, logs and pictures go.
        draw_samples: networks -> a PIL picture, or `Seen`; called every `recipe.loop.sample_every` steps with the averaged weights.
        initialize: networks -> None; what a network learns from data before the first step (a codebook, an actnorm), the same on every
            rank. It is not called in a run that is resumed.
        after_update: (networks, phase name); called on every rank after an update (weight clipping, an augmentation's strength).
    Raises:
        ValueError: the batch does not divide over ranks and accumulation; the data set is smaller than a batch; a tracker is not
            installed; the launcher asks for weights that are split over ranks (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        recipe: Recipe,
        networks: dict[str, nn.Module],
        losses: Losses,
        phases: tuple[Phase, ...],
        data: Any,
        output_dir: str | Path,
        draw_samples: Callable[[dict[str, nn.Module]], Any] | None = None,
        initialize: Callable[[dict[str, nn.Module]], None] | None = None,
        after_update: Callable[[dict[str, nn.Module], str], None] | None = None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed

        self.recipe, self.loop, self.phases, self.data = recipe, recipe.loop, phases, data
        self.output_dir, self.draw_samples = Path(output_dir), draw_samples
        self.initialize, self.after_update = initialize, after_update
        self.on_checkpoint: Callable[[Path], None] | None = None  # called on the main process with the folder of each checkpoint
        AcceleratorState._reset_state()  # an earlier training of this process may have had another precision
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
            mixed_precision=self.loop.mixed_precision,
            log_with=self.loop.log_with,
            project_config=ProjectConfiguration(project_dir=str(self.output_dir), logging_dir=str(self.output_dir / "logs")),
            # buffers are equal on all ranks by what is reduced into them; a broadcast between two forward passes would change them
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=self.loop.find_unused_parameters)
            ],
        )
        _check_launch(self.accelerator, self.loop.log_with)
        set_seed(recipe.seed, device_specific=True)  # dropout inside networks; everything else has generators of its own
        if self.loop.attention not in ("auto", "math"):
            raise ValueError(f"loop.attention: {self.loop.attention!r} is none of auto, math.")
        parts = self.loop.gradient_accumulation_steps * self.accelerator.num_processes
        if self.loop.batch_size % parts or self.loop.batch_size < parts:
            raise ValueError(
                f"loop.batch_size {self.loop.batch_size} does not divide over {self.accelerator.num_processes} processes and "
                f"{self.loop.gradient_accumulation_steps} accumulation steps; make it a multiple of {parts}."
            )
        self.micro_batch = self.loop.batch_size // parts
        self._groups: list[list[int]] | None = None
        if recipe.data.group_captions is not None:
            self._groups = caption_groups(data.captions(), recipe.data.group_captions)
        if not recipe.data.streaming:  # the size is checked before any compute
            EndlessBatches(len(data), self.micro_batch, recipe.seed, ranks=self.accelerator.num_processes, groups=self._groups)

        memory_format = torch.channels_last if self.loop.channels_last else torch.preserve_format
        device = self.accelerator.device
        self.networks = {name: network.to(device=device, memory_format=memory_format).train() for name, network in networks.items()}
        self.averages = {name: Average(network, recipe.ema) for name, network in self.networks.items()} if recipe.ema else {}
        self.other_averages = {  # by decay, then by network: the length of the average is chosen when the run is over
            decay: {name: Average(network, replace(recipe.ema, decay=decay, also=())) for name, network in self.networks.items()}
            for decay in (recipe.ema.also if recipe.ema else ())
        }
        # what a task has frozen inside a network stays frozen; the rest is switched on and off by the phases
        self._trainable = {name: [p for p in network.parameters() if p.requires_grad] for name, network in self.networks.items()}
        self._told = {name: [m for m in network.modules() if hasattr(m, "after_update")] for name, network in self.networks.items()}
        self.modules, self.optimizers, self.schedules = {}, {}, {}
        for phase in phases:
            self._switch(phase)  # DDP looks at it when it wraps
            if phase.optimizer is not None:  # one wrapper for one set of parameters: two would hook into each other's backward pass
                self.modules[phase.name] = self.modules[phase.optimizer]
                continue
            self.modules[phase.name] = self.accelerator.prepare(_Step(self.networks, losses))
            settings = replace(recipe.optimizer, **phase.settings)
            optimizer = _optimizer([p for name in phase.networks for p in self._trainable[name]], settings)
            self.optimizers[phase.name] = self.accelerator.prepare(optimizer)
            self.schedules[phase.name] = _schedule(optimizer, settings, recipe.loop.steps)
        if recipe.loop.gradient_checkpointing:
            for network in self.networks.values():
                _checkpoint_gradients(network)
        self.step = 0
        self.micro_steps = 0
        self.seconds = 0.0
        self._log: list[dict[str, float]] = []

    @functools.cached_property
    def _known_data(self) -> dict[str, Any] | None:
        """What a checkpoint records of the data set; None of a stream, which is not read twice alike anyway."""
        if self.recipe.data.streaming:
            return None
        fingerprint = getattr(self.data, "fingerprint", None)
        return {"rows": len(self.data), "fingerprint": fingerprint() if fingerprint is not None else None}

    # -- the loop -------------------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run from the present step to `recipe.loop.steps`.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite; the weights of the last whole checkpoint are good.
        """
        from tqdm.auto import tqdm

        main = self.accelerator.is_main_process
        if self.loop.log_with:
            self.accelerator.init_trackers("gen_pipelines", config={"task": self.recipe.task, "seed": self.recipe.seed})
        if hasattr(self.data, "prepare"):
            self.data.prepare()
        if self.step == 0 and self.initialize is not None:
            self.initialize(self.networks)
            for name, average in self._every_average():  # they start from what the network starts from
                average.load(dict(self.networks[name].named_parameters()), 0)
        batches = self._batches()
        bar = tqdm(total=self.loop.steps, initial=self.step, disable=not main, unit="step", dynamic_ncols=True, smoothing=0.05)
        begun = time.monotonic() - self.seconds
        try:
            self._run(batches, bar, begun)
        except NonFiniteLoss:
            if main:
                self._write_log()  # the numbers before it are what one wants to look at
            raise
        finally:
            bar.close()
        self.accelerator.wait_for_everyone()
        if self.loop.log_with:
            self.accelerator.end_training()

    def _run(self, batches: Iterator[dict[str, Any]], bar: Any, begun: float) -> None:
        main = self.accelerator.is_main_process
        metrics: dict[str, float] = {}  # the newest of every phase: one that runs seldom is seen in between too
        while self.step < self.loop.steps:
            for phase in self.phases:
                if self.step % phase.interval == 0:
                    for _ in range(phase.repeats):
                        metrics.update(self._update(phase, batches))
            for schedule in self.schedules.values():  # by the step, not the update: a critic takes several of these in a step
                schedule.step()
            self.step += 1
            self.seconds = time.monotonic() - begun
            bar.update()
            if main and self.loop.log_every and self.step % self.loop.log_every == 0:
                bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
                self._record({"step": self.step, "seconds": round(self.seconds, 1), **metrics})
            if self.loop.log_with:
                self.accelerator.log(metrics, step=self.step)
            if self.loop.sample_every and self.step % self.loop.sample_every == 0:
                self._draw()
            if self.loop.checkpoint_every and self.step % self.loop.checkpoint_every == 0 or self.step == self.loop.steps:
                self.save()

    def _switch(self, phase: Phase) -> None:
        """Gradients for the networks of a phase, and for no others."""
        for name, parameters in self._trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(name in phase.networks)

    def _update(self, phase: Phase, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        owner = phase.optimizer or phase.name
        module, optimizer = self.modules[phase.name], self.optimizers[owner]
        accumulate = self.loop.gradient_accumulation_steps
        sums: dict[str, Tensor] = {}  # per number to watch: (its sum, over how many samples)
        self._switch(phase)
        for micro in range(accumulate):
            batch = next(batches)
            generators = sample_generators(self.recipe.seed, "objective", batch["row"], batch["draw"])
            batch = {key: value.to(self.accelerator.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            batch["step"] = self.step
            last = micro == accumulate - 1
            # the kernel is chosen for the backward pass too: gradient checkpointing runs the forward pass again in it
            with contextlib.nullcontext() if last else self.accelerator.no_sync(module), self._attention():
                per_sample, metrics = module(batch, phase.name, generators)
                loss = per_sample.mean()
                self._check_finite(per_sample, batch, phase)
                self.accelerator.backward(loss / accumulate)
            self.micro_steps += 1
            for name, value in {"loss": per_sample, **metrics}.items():
                sums[name] = sums.get(name, 0) + _sum_and_count(value.detach().float())
        if self.loop.max_grad_norm:
            parameters = [p for name in phase.networks for p in self._trainable[name]]
            norm = torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, self.loop.max_grad_norm))
            sums["grad_norm"] = _sum_and_count(norm)
            # fp16's scaler meets overflows by design and skips those updates itself
            if self.accelerator.scaler is None and not math.isfinite(norm.item()):
                self._stop(f"step {self.step + 1}, phase {phase.name!r}: the losses are finite and their gradient is not")
        optimizer.step()
        optimizer.zero_grad()
        for name in phase.networks:
            for part in self._told[name]:
                part.after_update()
        if self.after_update is not None:
            self.after_update(self.networks, phase.name)
        if phase.optimizer is None:
            for name, average in self._every_average():
                if name in phase.networks:
                    average.update()
        prefix = "" if len(self.phases) == 1 else f"{phase.name}/"
        looked_at = self.loop.log_with or self.loop.log_every and (self.step + 1) % self.loop.log_every == 0
        if not looked_at and phase.interval == 1:
            return {}
        names = sorted(sums)
        table = self.accelerator.reduce(torch.stack([sums[name].to(self.accelerator.device) for name in names]), reduction="sum")
        return {prefix + name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True) if count}

    def _attention(self) -> contextlib.AbstractContextManager:
        if self.loop.attention == "auto":
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)

    def _check_finite(self, per_sample: Tensor, batch: dict[str, Any], phase: Phase) -> None:
        bad = self.accelerator.reduce((~torch.isfinite(per_sample.detach())).sum().float(), reduction="sum")
        if bad.item():
            rows = [row for row, finite in zip(batch["row"], torch.isfinite(per_sample).tolist(), strict=True) if not finite]
            self._stop(
                f"step {self.step + 1}, phase {phase.name!r}: {int(bad.item())} of {self.loop.batch_size} losses are not finite "
                f"(rows {rows[:8]} of the data set on this rank)"
            )

    def _stop(self, reason: str, state: str = "the weights were not updated") -> NoReturn:
        good = checkpoints(self.output_dir / "checkpoints")
        where = f"resume from {good[-1]}" if good else "there is no checkpoint yet: start again"
        raise NonFiniteLoss(f"{reason}; {state}; {where}, with a lower learning rate.")

    def _batches(self) -> Iterator[dict[str, Any]]:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if self.recipe.data.streaming:
            stream = stream_batches(self.data, self.recipe.data, self.micro_batch, self.recipe.seed + self.micro_steps, rank, ranks)
            yield from (collate(examples) for examples in stream)
            return
        sampler = EndlessBatches(
            len(self.data), self.micro_batch, self.recipe.seed, rank, ranks, start=self.micro_steps, groups=self._groups
        )
        workers = self.recipe.data.workers
        # a generator of its own: a loader would draw from the global one when it starts, and a resumed run starts one more
        own = torch.Generator().manual_seed(self.recipe.seed)
        try:
            yield from torch.utils.data.DataLoader(self.data, batch_sampler=sampler, collate_fn=collate, num_workers=workers, generator=own)
        except BadRowError as error:  # from a worker, its message is a whole traceback
            raise BadRowError(str(error).rsplit("BadRowError: ", 1)[-1].strip()) from None

    # -- weights and state ------------------------------------------------------------------------------------------------------------

    def _every_average(self) -> Iterator[tuple[str, Average]]:
        """(network's name, average) of every length."""
        for averages in (self.averages, *self.other_averages.values()):
            yield from averages.items()

    @contextlib.contextmanager
    def averaged_weights(self, decay: float | None = None) -> Iterator[dict[str, nn.Module]]:
        """The networks with their moving averages in place, in evaluation mode; the trained weights come back afterwards.

        Args:
            decay: one of `ema.also` instead of `ema.decay`.
        """
        modes = {name: network.training for name, network in self.networks.items()}
        averages = self.averages if decay is None else self.other_averages[decay]
        for average in averages.values():
            average.put()
        try:
            yield {name: network.eval() for name, network in self.networks.items()}
        finally:
            for average in averages.values():
                average.take_back()
            for name, network in self.networks.items():
                network.train(modes[name])

    def save(self) -> None:
        """Write a checkpoint; a kill at any moment leaves either the whole of it or nothing.

        Raises:
            NonFiniteLoss: a weight is NaN or infinite, so that this would be no checkpoint to go back to; nothing is written.
        """
        for name, network in self.networks.items():
            if bad := [key for key, value in network.named_parameters() if not torch.isfinite(value).all()]:
                self._stop(f"step {self.step}: weights of {name} are not finite ({', '.join(bad[:3])})", "no checkpoint was written")
        ranks: list[Any] = [random_state()]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            ranks = gather_object(ranks)
        if self.accelerator.is_main_process:
            networks = {f"{name}.{key}": value for name, network in self.networks.items() for key, value in network.state_dict().items()}
            averages = {f"{name}.{key}": value for name, average in self.averages.items() for key, value in average.shadow.items()}
            for decay, others in self.other_averages.items():
                averages |= {f"{name}@{decay}.{key}": value for name, one in others.items() for key, value in one.shadow.items()}
            states: dict[str, Any] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            states["schedules"] = {name: {"last_epoch": schedule.last_epoch} for name, schedule in self.schedules.items()}
            if self.accelerator.scaler is not None:
                states["scaler"] = self.accelerator.scaler.state_dict()
            about = {
                "micro_steps": self.micro_steps,
                "seconds": self.seconds,
                "averaged_steps": {name: average.updates for name, average in self.averages.items()},
                "environment": environment(self.accelerator.num_processes),
                "recipe": to_dict(self.recipe),
                "data": self._known_data,
            }
            folder = self.output_dir / "checkpoints"
            saved = save_checkpoint(folder, self.step, networks, averages, states, about, self.loop.keep_checkpoints, ranks)
            self._write_log()
            if self.on_checkpoint is not None:
                self.on_checkpoint(saved)
        self.accelerator.wait_for_everyone()

    def resume(self, inexact: bool = False) -> int:
        """Continue from the newest whole checkpoint in the output folder.

        Args:
            inexact: allow what cannot be exact (a streamed data set starts over with a new order).
        Returns: the step that the run continues from; 0 when there is no checkpoint.
        Raises:
            ValueError: the checkpoint is of another recipe, of other data or damaged, or the data set is a stream and `inexact` is False.
        """
        found = checkpoints(self.output_dir / "checkpoints")
        if not found:
            return 0
        if self.recipe.data.streaming and not inexact:
            raise ValueError("--resume: the place in a stream cannot be restored exactly; pass --inexact-resume to start it over.")
        networks, averages, states, ranks, about = load_checkpoint(found[-1])
        self._compare(about, found[-1])
        for name, network in self.networks.items():
            network.load_state_dict(_part(networks, name))
        for name, average in self.averages.items():
            average.load(_part(averages, name), about["averaged_steps"][name])
        for decay, others in self.other_averages.items():
            for name, average in others.items():
                average.load(_part(averages, f"{name}@{decay}"), about["averaged_steps"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(states[name])
            schedule = self.schedules[name]
            schedule.last_epoch = states["schedules"][name]["last_epoch"]
            schedule._step_count = schedule.last_epoch + 1
            schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
        if self.accelerator.scaler is not None and "scaler" in states:
            self.accelerator.scaler.load_state_dict(states["scaler"])
        if len(ranks) == self.accelerator.num_processes:
            set_random_state(ranks[self.accelerator.process_index])
        self.step, self.micro_steps, self.seconds = about["step"], about["micro_steps"], about["seconds"]
        log = self.output_dir / "log.jsonl"
        if log.is_file():
            self._log = [entry for entry in _log_entries(log) if entry["step"] <= self.step]
        return self.step

    def _compare(self, about: dict[str, Any], path: Path) -> None:
        free = ("steps", "checkpoint_every", "keep_checkpoints", "sample_every", "log_every", "log_with", "find_unused_parameters")
        free = {f"loop.{key}" for key in free}
        mine, theirs = _flat(json.loads(json.dumps(to_dict(self.recipe)))), _flat(about["recipe"])
        different = sorted(
            key
            for key in mine.keys() | theirs.keys()
            if mine.get(key) != theirs.get(key) and key not in free and not key.startswith(("card.", "sample."))
        )
        if different:
            raise ValueError(f"--resume: {path} was made by another recipe; these settings differ: {', '.join(different)}.")
        if about["step"] > self.loop.steps:
            raise ValueError(
                f"--resume: {path} has done {about['step']} steps, more than loop.steps={self.loop.steps}; give at least as many, or train "
                "into another --output-dir."
            )
        data, known = about.get("data"), self._known_data
        if data is not None and known is not None and data != known:
            was = f"{data['rows']} rows, now {known['rows']}" if data["rows"] != known["rows"] else f"{data['rows']} rows, others than now"
            raise ValueError(
                f"--resume: {path} was made with other data: {self.recipe.data.name} had {was}. Put the data set back, or train into "
                "another --output-dir."
            )
        now = environment(self.accelerator.num_processes)
        before = about["environment"]
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
        if changed:
            warnings.warn(f"resuming {path.name} in another environment ({'; '.join(changed)}): equal up to rounding only.", stacklevel=3)

    # -- what a person sees -------------------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        if self.draw_samples is None:
            return
        if self.accelerator.is_main_process:
            state = random_state()
            with self.averaged_weights() as networks, torch.no_grad():
                picture = self.draw_samples(networks)
            set_random_state(state)  # looking does not change the run
            folder = self.output_dir / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            seen = picture if isinstance(picture, Seen) else Seen(picture)
            seen.picture.save(folder / f"step-{self.step:08d}.png")
            if seen.row is not None:
                add_row(folder / "strip.png", seen.row, self.step // self.loop.sample_every - 1)
            if seen.metrics and self._log and self._log[-1]["step"] == self.step:
                self._log[-1].update(_finite(seen.metrics))
            elif seen.metrics:
                self._record({"step": self.step, "seconds": round(self.seconds, 1), **seen.metrics})
            if self.loop.log_with:
                self.accelerator.log(seen.metrics, step=self.step)
        self.accelerator.wait_for_everyone()

    def _record(self, entry: dict[str, float]) -> None:
        self._log.append(_finite(entry))
        if len(self._log) % 10 == 0:
            self._write_log()

    def _write_log(self) -> None:
        path = self.output_dir / "log.jsonl"
        side = path.with_name(".log.jsonl")
        side.write_text("".join(json.dumps(entry) + "\n" for entry in self._log))
        os.replace(side, path)


def _log_entries(log: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole: a full disk or a hand may have cut some, and the run does not depend on them."""
    entries = []
    for number, line in enumerate(log.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
        except (ValueError, TypeError, KeyError):
            warnings.warn(f"{log}: line {number} is cut off or damaged; it is dropped.", stacklevel=3)
    return entries


def _finite(entry: dict[str, float]) -> dict[str, Any]:
    """Numbers as JSON takes them: what is not finite is written out."""
    return {key: value if math.isfinite(value) else str(value) for key, value in entry.items()}


def _sum_and_count(value: Tensor) -> Tensor:
    """(sum, number) of the values that are not NaN, shape (2,)."""
    return torch.stack([value.nansum(), (~value.isnan()).sum().to(value.dtype)])


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one network, without its name."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table with dotted keys."""
    table: dict[str, Any] = {}
    for key, value in settings.items():
        table.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return table


def _check_launch(accelerator: Any, log_with: str | None) -> None:
    """Refuses what accelerate would go along with and get wrong: split weights, a tracker that is not there."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ValueError(
            f"Trainer: {kind} splits the weights over ranks, and averages and checkpoints here take every rank to have all of them; "
            "launch with several processes of whole weights (accelerate launch --multi_gpu, or torchrun)."
        )
    if log_with and not accelerator.log_with:
        raise ValueError(f"loop.log_with: the tracker {log_with!r} is not installed; pip install it, or set loop.log_with=null.")


def _checkpoint_gradients(network: nn.Module) -> None:
    # as diffusers calls it, transformers, and transformers before it renamed it
    for name in ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(network, name):
            getattr(network, name)()
            return


def _optimizer(parameters: list[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; no weight decay on parameters of one dimension (biases and gains)."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # fused: one pass over memory instead of a dozen, which on a CPU halves the step of a small network
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def _schedule(optimizer: torch.optim.Optimizer, settings: OptimizerConfig, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    shapes = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    }
    if settings.schedule not in shapes:
        raise ValueError(f"optimizer.schedule: {settings.schedule!r} is none of {', '.join(shapes)}.")

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        return shapes[settings.schedule](min((step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1), 1.0))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

