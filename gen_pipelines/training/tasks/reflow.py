"""Trains a flow on the pairs that a finished model drew: rectified flow, round after round, and its distillation to one step."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...models.calling import predict
from ...processes import Parameterization
from ...processes.linear import LinearPath
from ..config import coerce
from ..objectives.base import ObjectiveOutput
from ..objectives.reflow import ReflowObjective
from ..objectives.time_densities import TIME_DENSITIES
from ..pairs import PairData
from ..random import Generators
from .denoising import choose
from .diffusion_image import MODEL, SAMPLE, DiffusionImageTask
from .teacher import load_teacher

OBJECTIVE = {"time_density": "uniform", "one_step": False, "huber": None, "drop_label": 0.1}


class ReflowTask(DiffusionImageTask):
    """`data.name` is a folder of pairs (`gen-pipelines pairs`), `model.start` the pipeline that drew them, which the training starts from.

    Its network is continued, and its autoencoder, frame and classes are kept; what a round gives draws the pairs of the next. From a start
    that is no flow on the linear path (a DDPM, say) the weights are taken over and learn velocities at its times. `model.denoiser` gives
    another network. `objective.one_step` distils: what is saved then draws in one step.
    """

    known_model = {**MODEL, "start": None, "scheduler": None, "default_num_inference_steps": 2}
    known_objective, known_sample = OBJECTIVE, {**SAMPLE, "steps": 2}

    def prepare(self) -> None:
        """Loads the start."""
        if self.model["start"] is None:
            raise ValueError("model.start is missing: give the folder or repository of the model that drew the pairs.")
        if self.model["vae"] is not None:
            raise ValueError("model.vae: the autoencoder is that of model.start; leave it out.")
        self.start = load_teacher(self.model["start"], "model.start")
        if self.recipe.objective.get("one_step"):
            self.model["default_num_inference_steps"] = self.recipe.model.get("default_num_inference_steps", 1)
            self.sample["steps"] = self.recipe.sample.get("steps", 1)

    def build_scheduler(self) -> Any:
        """`model.scheduler`, or a `RectifiedFlowScheduler` for the start's network, as a flow."""
        from ...schedulers.rectified_flow import RectifiedFlowScheduler

        if self.model["scheduler"] is not None:
            return super().build_scheduler()
        known = self.start.parameterization
        if known.prediction == "flow_prediction" and known.path.name == "linear":
            return RectifiedFlowScheduler().bind(known.with_(jumps=False))  # straight again, whatever it was
        return RectifiedFlowScheduler().bind(Parameterization(LinearPath(), "flow_prediction"))

    def build_objective(self, settings: dict[str, Any]) -> Any:
        """Straight paths between the pairs."""
        huber = settings["huber"]
        return ReflowObjective(
            self.scheduler.parameterization,
            choose(TIME_DENSITIES, settings["time_density"], "objective.time_density"),
            settings["one_step"],
            None if huber is None else coerce(float, huber, "objective.huber"),
        )

    def open_data(self) -> Any:
        """The pairs; classes are those that they were drawn of.

        Raises:
            ValueError: pairs of another shape or of other classes than the start's.
        """
        pairs = PairData(self.recipe.data.name)
        self.pictures, self.held_out = None, None
        self.classes = pairs.settings["num_classes"]
        self.names = {i: name for name, i in self.start.labels.items()} or None
        mine = {"shape": list(self.start.latents_shape(1)[1:]), "num_classes": self.start.num_classes}
        for name, value in mine.items():
            if pairs.settings[name] != value:
                raise ValueError(f"data.name: the pairs have {name} {pairs.settings[name]}, and model.start {value}.")
        return pairs

    def build_vae(self) -> nn.Module | None:
        """The start's."""
        return self.start.autoencoder

    def build_denoiser(self) -> nn.Module:
        """The start's network, or the recipe's."""
        if self.model["denoiser"] is not None:
            return super().build_denoiser()
        if self.start.parameterization.learned_variance:
            raise ValueError("model.denoiser is missing: the start learned a variance; give a network with as many channels out as in.")
        return copy.deepcopy(self.start.denoiser).requires_grad_(True)

    def _null_class(self) -> int | None:
        if self.model["denoiser"] is not None:
            return super()._null_class()
        if self.drop_label and self.classes is not None and self.start.null_class is None:
            raise ValueError("objective.drop_label: model.start has no null class; set it to 0.")
        return self.start.null_class

    def _check_sizes(self) -> int | None:
        network, wanted = self.denoiser.config, self.data.settings["shape"]
        if network.in_channels != wanted[0] or network.sample_size not in (wanted[1], list(wanted[1:]), tuple(wanted[1:])):
            raise ValueError(f"model.denoiser: made for {network.in_channels} x {network.sample_size}, and the pairs are {wanted}.")
        self._check_outputs(network)
        return self.start.config.image_size

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """Velocities of a batch of pairs (B, C, h, w)."""
        x_0: Tensor = batch["sample"]
        network = partial(predict, networks["denoiser"])
        return self.objective(network, x_0, batch["noise"], condition=self._condition(batch, x_0), generator=generator)
