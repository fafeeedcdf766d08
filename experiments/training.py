"""Seeds and the training loop that the experiments share."""

import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import TextColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from programs.files import written_whole

from . import distributed
from .progress import batches_bar
from .stopping import EarlyStopping

_SECONDS_BETWEEN_STATES = 30
_STEPS_BETWEEN_LOGS = 20


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


def summary_writer() -> type:
    """The class of TensorBoard's writers.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("logs for TensorBoard need it: pip install tensorboard") from error
    return SummaryWriter


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: tuple[Tensor, ...] | Dataset[Tensor],
    *,
    steps: int,
    rows: Callable[[int], Tensor],
    learning_rate: Callable[[int], float],
    title: str,
    console: Console,
    state: Path | None = None,
    prepare: Callable[..., tuple[Tensor, ...]] | None = None,
    bfloat16: bool = False,
    compiled: bool = False,
    workers: int = 0,
    log: Path | None = None,
    on_state: Callable[[], None] | None = None,
    stopping: EarlyStopping | None = None,
) -> list[float]:
    """Minimise ``loss(*batch)`` over the parameters of ``model`` by Adam; return the loss of every step.

    In the processes of torchrun (`distributed`) each takes its part of every batch, and the losses are means over all parts.

    Args:
        model: what is trained, in place.
        loss: the batches of all ``data`` to a scalar, a mean over examples.
        data: tensors with one common leading size, on the device of the model; or a data set of tensors, which need not fit in
            memory.
        steps: number of batches; with ``stopping`` the most.
        rows: the rows of the batch of each step.
        learning_rate: that of each step.
        title: shown beside the progress bar.
        console: where the progress bar is shown.
        state: a file that always holds a recent state of this training, replaced in one step. If it exists, training goes on
            from there and ends with the same numbers as without the interruption (on a GPU, or with another number of threads,
            up to the order in which it adds), provided that ``rows`` depends on the step alone and that no other generator than
            torch's on the CPU draws anything.
        prepare: the batches of all ``data`` to what ``loss`` takes, without gradients and always in full precision: what comes
            from networks that are not trained, or random numbers.
        bfloat16: compute ``loss`` under autocast to bfloat16. What must not be rounded so, a likelihood, takes care of itself.
        compiled: compile ``loss`` with `torch.compile`.
        workers: processes that read a data set ahead; 0 reads it in this process.
        log: a folder for TensorBoard: loss, learning rate and examples per second.
        on_state: called after each writing of ``state``.
        stopping: scores the model after each pass and ends the training; ``model`` then has the parameters of the best score.

    Raises:
        RuntimeError: the gradient is no longer finite.
        ValueError: the number of processes does not divide a batch.
        ImportError: ``log`` without TensorBoard.
    """
    device = next(model.parameters()).device
    distributed.synchronise_batch_norm(model)
    optimizer = torch.optim.Adam(model.parameters())
    losses: list[float] = []
    if state is not None and state.exists():
        losses = _restore(state, model, optimizer, stopping)
    # No process may write a state before every process has looked for one.
    distributed.barrier()
    if compiled:
        loss = torch.compile(loss)
    model.train()
    saved = time.monotonic()
    logs = nullcontext()
    if log is not None and distributed.rank() == 0:
        # Forgets what an interrupted run had logged after its last state.
        logs = summary_writer()(log, purge_step=len(losses))
    last = len(losses) if stopping is not None and stopping.finished else steps
    with batches_bar(console, TextColumn("loss {task.fields[loss]:9.4f}")) as progress, logs as writer:
        task = progress.add_task(title, total=steps, completed=len(losses), loss=_recent_mean(losses), batch=0)
        for step, batch in enumerate(_batches(data, rows, range(len(losses), last), device, workers), start=len(losses)):
            examples = len(batch[0]) * distributed.world_size()
            if prepare is not None:
                with torch.no_grad():
                    batch = prepare(*batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                value = loss(*batch)
            optimizer.zero_grad()
            value.backward()
            distributed.average_gradients(model.parameters())
            nn.utils.clip_grad_norm_(model.parameters(), 10.0, error_if_nonfinite=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            optimizer.step()
            losses.append((distributed.sum_over_processes(value.detach()) / distributed.world_size()).item())
            progress.update(task, advance=1, loss=_recent_mean(losses), batch=examples)
            if writer is not None and (step + 1) % _STEPS_BETWEEN_LOGS == 0:
                writer.add_scalar("loss", losses[-1], step + 1)
                writer.add_scalar("learning rate", learning_rate(step), step + 1)
                writer.add_scalar("examples per second", examples * (progress.tasks[task].speed or 0), step + 1)
            if stopping is not None and stopping.after(step, model) and writer is not None:
                writer.add_scalar("validation", stopping.scores[-1], step + 1)
            ended = step + 1 == steps or (stopping is not None and stopping.finished)
            due = ended or time.monotonic() - saved > _SECONDS_BETWEEN_STATES
            if state is not None and due and distributed.rank() == 0:
                _save(state, model, optimizer, losses, stopping)
                if on_state is not None:
                    on_state()
                saved = time.monotonic()
            if ended:
                break
    if stopping is not None:
        stopping.restore_best(model)
    model.eval()
    return losses


def _batches(
    data: tuple[Tensor, ...] | Dataset[Tensor],
    rows: Callable[[int], Tensor],
    steps: range,
    device: torch.device,
    workers: int,
) -> Iterator[tuple[Tensor, ...]]:
    """This process's part of the batch of each step, on the device."""
    parts = (distributed.own_part(rows(step)) for step in steps)
    if isinstance(data, tuple):
        for part in parts:
            part = part.to(device)
            yield tuple(tensor[part] for tensor in data)
        return
    # A generator of its own: the loader seeds its workers, and must not disturb what the training draws.
    loader = DataLoader(
        data,
        batch_sampler=(part.tolist() for part in parts),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    for batch in loader:
        yield (batch.to(device, non_blocking=True),)


def _recent_mean(losses: list[float]) -> float:
    recent = losses[-20:]
    return sum(recent) / len(recent) if recent else math.nan


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float], stopping: EarlyStopping | None
) -> None:
    contents: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "random": torch.get_rng_state(),
        "stopping": None if stopping is None else stopping.state_dict(),
    }
    with written_whole(path) as partial:
        torch.save(contents, partial)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, stopping: EarlyStopping | None) -> list[float]:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not the state of a training; without this file it begins anew") from error
    model.load_state_dict(contents["model"])
    optimizer.load_state_dict(contents["optimizer"])
    torch.set_rng_state(contents["random"])
    if stopping is not None:
        stopping.load_state_dict(contents["stopping"])
    return contents["losses"].tolist()
