"""Seeds and the training loop that the experiments share."""

import math
import zlib
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose, so that no stage of an experiment depends on what another one drew."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    title: str,
    console: Console,
) -> list[float]:
    """Minimise ``loss(*batch)`` over the parameters of ``model`` by Adam; return the loss of every step.

    Args:
        model: what is trained, in place.
        loss: the batches of all ``tensors`` to a scalar.
        tensors: training data with one common leading size; batches are drawn from it with replacement.
        steps: number of batches; the learning rate rises over the first tenth and then falls to 0 (a cosine).
        batch_size: rows per batch.
        learning_rate: the highest one.
        generator: draws the batches.
        title: shown beside the progress bar.
        console: where the progress bar is shown.

    Raises:
        RuntimeError: the gradient is no longer finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / math.ceil(steps / 10), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    losses: list[float] = []
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:9.4f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"))
        for _ in range(steps):
            rows = torch.randint(len(tensors[0]), (batch_size,), generator=generator)
            value = loss(*(tensor[rows] for tensor in tensors))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            recent = losses[-20:]
            progress.update(task, advance=1, loss=sum(recent) / len(recent))
    model.eval()
    return losses
