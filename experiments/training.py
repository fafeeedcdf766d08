"""Seeds and the training loop that the experiments share."""

import math
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

_SECONDS_BETWEEN_STATES = 30


def derived_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that no stage of an experiment depends on what another one drew."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator on the CPU with `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose))


class ShuffledEpochs:
    """The rows of each batch, every row once in an epoch, in an order that depends on the seed and the epoch alone.

    A batch that an epoch does not fill is left out, other rows in each epoch: batch normalisation wants batches of one size.

    Args:
        count: number of rows of the training data.
        batch_size: rows per batch, at most ``count``.
        seed: the seed.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        if not 1 <= batch_size <= count:
            raise ValueError(f"batch_size is {batch_size}, expected 1 to {count}, the number of training examples")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = count // batch_size
        self._epoch = -1

    def __call__(self, step: int) -> Tensor:
        """(batch_size,) indices for a step, counted from 0 over all epochs."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.count, generator=seeded_generator(self.seed, f"epoch {epoch}"))
        return self._order[number * self.batch_size : (number + 1) * self.batch_size]


def with_replacement(count: int, batch_size: int, generator: torch.Generator) -> Callable[[int], Tensor]:
    """The rows of each batch, drawn one batch after the other, whatever the step."""
    return lambda step: torch.randint(count, (batch_size,), generator=generator)


def warmup_cosine(peak: float, steps: int) -> Callable[[int], float]:
    """The learning rate of each step: a linear rise over the first tenth, then a cosine to 0."""
    return lambda step: peak * min((step + 1) / math.ceil(steps / 10), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    *,
    steps: int,
    rows: Callable[[int], Tensor],
    learning_rate: Callable[[int], float],
    title: str,
    console: Console,
    state: Path | None = None,
) -> list[float]:
    """Minimise ``loss(*batch)`` over the parameters of ``model`` by Adam; return the loss of every step.

    Args:
        model: what is trained, in place.
        loss: the batches of all ``tensors`` to a scalar.
        tensors: training data with one common leading size.
        steps: number of batches.
        rows: the rows of the batch of each step.
        learning_rate: that of each step.
        title: shown beside the progress bar.
        console: where the progress bar is shown.
        state: a file that always holds a recent state of this training, replaced in one step. If it exists, training goes on
            from there and ends with the same numbers as without the interruption, provided that ``rows`` depends on the step
            alone.

    Raises:
        RuntimeError: the gradient is no longer finite.
    """
    optimizer = torch.optim.Adam(model.parameters())
    losses: list[float] = []
    if state is not None and state.exists():
        losses = _restore(state, model, optimizer)
    model.train()
    saved = time.monotonic()
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:9.4f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, completed=len(losses), loss=float("nan"))
        for step in range(len(losses), steps):
            batch = rows(step).to(tensors[0].device)
            value = loss(*(tensor[batch] for tensor in tensors))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0, error_if_nonfinite=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            optimizer.step()
            losses.append(value.item())
            recent = losses[-20:]
            progress.update(task, advance=1, loss=sum(recent) / len(recent))
            if state is not None and (step + 1 == steps or time.monotonic() - saved > _SECONDS_BETWEEN_STATES):
                _save(state, model, optimizer, losses)
                saved = time.monotonic()
    model.eval()
    return losses


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    contents: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "random": torch.get_rng_state(),
    }
    partial = path.with_name(path.name + ".partial")
    torch.save(contents, partial)
    os.replace(partial, path)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    contents = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(contents["model"])
    optimizer.load_state_dict(contents["optimizer"])
    torch.set_rng_state(contents["random"])
    return contents["losses"].tolist()
