"""When a training has done its work: a score of other images that falls no more."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Patience:
    """How long to wait for a better score.

    Args:
        epochs: passes without a better score after which the learning rate falls, and at last the training ends.
        least_epochs: passes before which neither happens.
        drops: how often the learning rate falls.
        factor: by which.

    Raises:
        ValueError: a number out of range.
    """

    epochs: int = 6
    least_epochs: int = 30
    drops: int = 2
    factor: float = 0.3

    def __post_init__(self):
        for name, least in (("epochs", 1), ("least_epochs", 0), ("drops", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
        if not 0 < self.factor < 1:
            raise ValueError(f"factor is {self.factor}, expected more than 0 and less than 1")


class EarlyStopping:
    """Scores a network after each pass, keeps its best parameters, lowers the learning rate, and says when it is enough.

    Everything follows from the scores, which a state of the training holds with the best parameters: an interrupted training
    goes on as it would have.

    Args:
        score: that of the network in evaluation mode on images it is not trained on, lower is better; alike in all processes,
            and drawing nothing from torch's own generator.
        steps_per_epoch: steps of a pass.
        patience: how long to wait.

    Attributes:
        scores: after each pass.
    """

    def __init__(self, score: Callable[[], float], steps_per_epoch: int, patience: Patience):
        self._score, self._steps, self._patience = score, steps_per_epoch, patience
        self.scores: list[float] = []
        self._best: dict[str, Tensor] = {}

    @property
    def best_epoch(self) -> int:
        """The number of the pass after which the score was the lowest, from 1; 0 before the first one."""
        return 1 + min(range(len(self.scores)), key=self.scores.__getitem__) if self.scores else 0

    @property
    def finished(self) -> bool:
        """Whether the score has stopped falling, at the lowest learning rate too."""
        return self._waits() > self._patience.drops

    def rate(self, step: int, peak: float) -> float:
        """The learning rate of a step, counted from 0: rising over the first pass, falling when a wait ends."""
        return peak * min((step + 1) / self._steps, 1.0) * self._patience.factor ** self._waits()

    def after(self, step: int, network: nn.Module) -> bool:
        """Score ``network`` if a pass has just ended with this step; whether it has."""
        if (step + 1) % self._steps:
            return False
        network.eval()
        score = self._score()
        network.train()
        if not math.isfinite(score):
            raise RuntimeError(f"the score of validation images is {score} after pass {len(self.scores) + 1}")
        self.scores.append(score)
        if self.best_epoch == len(self.scores):
            self._best = copy.deepcopy(network.state_dict())
        return True

    def restore_best(self, network: nn.Module) -> None:
        """Give ``network`` the parameters with the lowest score, if there has been one."""
        if self._best:
            network.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        """Scores and best parameters."""
        return {"scores": list(self.scores), "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As after the scores of `state_dict`."""
        self.scores, self._best = list(state["scores"]), state["best"]

    def _waits(self) -> int:
        """How many waits have ended without a better score."""
        waits, since, best = 0, 0, math.inf
        for number, score in enumerate(self.scores, start=1):
            if score < best:
                best, since = score, 0
            else:
                since += 1
            if since >= self._patience.epochs and number >= self._patience.least_epochs:
                waits, since = waits + 1, 0
        return waits
