"""The predict step of a build: from prompts and noise ids to rows."""

from __future__ import annotations

from typing import Any, final

from lightning.pytorch import LightningModule, Trainer

from redi.errors import InvalidInputError
from redi.pipelines import changeable
from redi.recipe import FineSolver, Item, Recipe
from redi.types import Rows


@final
class KnowledgeBaseBuilder(LightningModule):
    """Solves batches of (prompt, noise id) finely with a pipeline and keeps what the recipe says.

    Args:
        pipe: a diffusers pipeline, loaded by every rank for itself, on any device.
        recipe: `Recipe.of(pipe, …)`.
    """

    def __init__(self, pipe: Any, recipe: Recipe) -> None:
        super().__init__()
        # A pipeline is no module, so Lightning does not send rank 0's weights to ranks that have loaded them.
        self.pipe, self.recipe = pipe, recipe
        self.solve = FineSolver(pipe, recipe)

    @property
    def flops_per_batch(self) -> None:
        """Not known; Lightning's ThroughputMonitor asks."""
        return None

    def require(self, trainer: Trainer) -> None:
        """Refuse a Trainer that would change the model's precision under the recipe.

        Raises:
            InvalidInputError: it would.
        """
        if trainer.precision != "32-true":
            raise InvalidInputError(
                f"Trainer(precision={trainer.precision!r}) would make other rows than the recipe says; load the "
                "pipeline in the dtype it shall run in, and leave the Trainer's precision alone"
            )

    def on_predict_start(self) -> None:
        """Put the pipeline on this rank's device."""
        self.pipe.to(self.device)
        mark = self.recipe.config.fingerprint
        if (dtype := changeable(self.pipe)["dtype"]) != mark.dtype:
            raise InvalidInputError(f"the recipe was made with the pipeline in {mark.dtype}, now it is in {dtype}")

    def predict_step(self, batch: list[Item], batch_idx: int) -> list[Rows]:
        """Rows of these items, in their order, in as many pieces as the memory asks for."""
        return self.solve(batch)
