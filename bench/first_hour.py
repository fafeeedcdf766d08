"""The first hour on a GPU, which may end at any moment: ``python -m bench gpu``, in steps that a second start does not repeat.

What matters most comes first: every operation against the CPU's reference, then the tests that need a GPU, then the bench. A
stage runs in processes of its own, which begin nothing after eight minutes and are stopped after ten: a kernel that hangs, or
breaks the GPU's context, costs its own step. steps.jsonl has a line for each step as soon as it is done. What was under way
when the whole run ended is done again.

Beside a measurement stands the time that gpu_cost.py predicts, where it has that case: a tool that is not part of the
repository. The first run calibrates its model.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from programs.environment import environment
from programs.files import written_whole

from .cases import DTYPES, Case, Problem
from .implementations import IMPLEMENTATIONS, default_backend
from .journal import BAD, Journal
from .measure import describe
from .operations import OPERATIONS, difference, tolerance
from .presets import PRESETS, Sweep, plan
from .rows import Limits, measure_work

ROOT = Path(__file__).parents[1]
MODEL = "model.json"

# Seconds after which a stage's process is stopped, the share of them in which it begins steps, and too few to start one.
STAGE_SECONDS = 600.0
BEGINNING = 0.8
FEWEST_SECONDS = 30.0

# Of 1 to 3 axes, with sizes that nothing divides, in one block and in bands.
CHECKED = (
    Case("5", (37, 41), 3, 2),
    Case("7", (64, 64), 2),
    Case("3", (257, 301), 1),
    Case("3x3x3", (5, 9, 34), 2),
    Case("7", (131, 67), 1, dtype="bfloat16"),
    Case("5", (70, 45), 2, dtype="float64"),
)

TESTS = {
    "values and derivatives": ("tests/gmrf_kernels/test_operators.py",),
    "solves in bands": ("tests/gmrf_kernels/test_triton_gpu_wavefronts.py",),
    "sizes, streams and memory": ("tests/gmrf_kernels/test_triton_gpu.py",),
    "inference": ("tests/banded_gmrf/test_gpu.py",),
    "all others": ("tests/gmrf_kernels",),
}

# The cases of gpu_cost.py that are an operation of the bench.
_MODELLED = (
    Sweep(resolutions=("1024",), operations=("log_prob", "log_prob_grad", "sample")),
    Sweep(batches=(2048,), operations=("sample",)),
    Sweep(stencils=("7",), batches=(1,), operations=("sample",)),
    Sweep(resolutions=("1024",), batches=(1,), operations=("sample",)),
    Sweep(stencils=("7",), batches=(2048,), operations=("solve",)),
    Sweep(stencils=("7",), resolutions=("1024",), operations=("log_prob",), dtypes=("bfloat16",)),
    Sweep(stencils=("7",), batches=(2048,), operations=("sample",), dtypes=("bfloat16",)),
    Sweep(stencils=("3x3x3",), resolutions=("64x64x64",), batches=(8,), operations=("sample",)),
)


class Recorder:
    """Of one process of a stage: which steps it is to take, for how long it begins some, and what came of each."""

    def __init__(self, journal: Journal, stage: str, seconds: float):
        self.journal, self.stage, self.done = journal, stage, journal.done()
        self._end = time.monotonic() + seconds * BEGINNING

    def out_of_time(self) -> bool:
        return time.monotonic() >= self._end

    def begin(self, step: str) -> None:
        self.journal.write(begun=step, stage=self.stage)

    def finish(self, step: str, status: str, text: str = "", **result: Any) -> None:
        self.journal.write(done=step, stage=self.stage, status=status, text=text, **result)
        print(f"{self.stage}: {step}: {status}{text and '; '}{text}", flush=True)
        if status in BAD and _context_is_broken():
            raise SystemExit("the GPU's context is broken: every further call of this process would fail")


def _context_is_broken() -> bool:
    """As after an access out of bounds: CUDA then fails all that a process does."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


Step = tuple[str, Callable[[], dict[str, Any]]]


def take_steps(recorder: Recorder, steps: Iterable[Step]) -> bool:
    """Take those that are not done, one line each; whether all are done now."""
    for name, work in steps:
        if name in recorder.done:
            continue
        if recorder.out_of_time():
            return False
        recorder.begin(name)
        try:
            result = work()
        except Exception as error:
            result = {"status": "failed", "text": describe(error)}
        recorder.finish(name, **result)
    return True


# --- the stages ---


def checks(device: str = "cuda", cases: Iterable[Case] = CHECKED) -> Iterator[Step]:
    """Every operation on every case, on the device, against what the reference gives on the CPU."""
    for case in cases:
        for operation in ("product", "transposed product", *OPERATIONS):
            yield f"{operation} of {case}", lambda case=case, operation=operation: _check(case, operation, device)


def _check(case: Case, operation: str, device: str) -> dict[str, Any]:
    on_cpu, problem = Problem(case), Problem(Case(**(case.__dict__ | {"device": device})))
    if operation in OPERATIONS:
        expected = OPERATIONS[operation].expected(on_cpu)
        result = IMPLEMENTATIONS[default_backend(device)].prepare(problem, operation).run()
    else:
        transpose = operation.startswith("transposed")
        expected = (on_cpu.reference_matvec(on_cpu.x, transpose),)
        result = (problem.factor.matvec(problem.x, transpose),)
    off, allowed = difference([r.cpu() for r in result], expected), tolerance(DTYPES[case.dtype])
    status = "right" if off <= allowed else "wrong"
    return {"status": status, "off": off, "allowed": allowed, "text": f"off by {off:.1e} of {allowed:.1e} allowed"}


class TestSteps:
    """A plugin of pytest: each test is a step."""

    __test__ = False

    def __init__(self, recorder: Recorder):
        self.recorder, self.stopped = recorder, False

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid not in self.recorder.done]

    def pytest_collectreport(self, report):
        if report.failed and report.nodeid not in self.recorder.done:
            self.recorder.finish(report.nodeid, "failed", report.longreprtext[-2000:])

    def pytest_runtest_protocol(self, item):
        if self.recorder.out_of_time():
            self.stopped = True
            item.session.shouldstop = "no time is left"
            return True
        self.recorder.begin(item.nodeid)
        return None

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longreprtext
            self.recorder.finish(report.nodeid, report.outcome, why[-2000:], seconds=report.duration)


def run_tests(recorder: Recorder, files: Iterable[Path]) -> bool:
    """Run those that need a GPU and are not done; whether all are done now."""
    import pytest

    steps = TestSteps(recorder)
    # Without the terminal's plugin, whose option -ra pyproject.toml gives: each test has its line from `Recorder`.
    options = ["-c", ROOT / "pyproject.toml", "-o", "addopts=--import-mode=importlib --strict-markers", "-m", "gpu"]
    options += ["-p", "no:terminal", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    code = pytest.main([*map(str, options), *map(str, files)], plugins=[steps])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED) and not steps.stopped:
        raise RuntimeError(f"pytest ended with {code!r}")
    return not steps.stopped


def measurements(
    sweeps: Iterable[Sweep], predictions: dict[str, float], limits: Limits, device: str = "cuda"
) -> Iterator[Step]:
    """Each operation on each case: the rows of `measure_work`."""
    for work in plan(sweeps, device):
        yield (
            f"{work.operation} of {work.case}: " + ", ".join(work.implementations),
            lambda work=work: _measure(work, limits, predicted_seconds(work.case, work.operation, predictions)),
        )


def _measure(work, limits: Limits, predicted: float | None) -> dict[str, Any]:
    rows = measure_work(work, limits, lambda text: None)
    texts = []
    for row in rows:
        if row["status"] != "measured":
            texts.append(f"{row['title']}: {row['reason']}")
        elif row["operation"] == work.operation:
            texts.append(f"{row['title']}: {row['seconds'] * 1e6:.1f} us, {row['fraction_of_copy']:.2f} of a copy")
            if predicted is not None and not row["peer"]:
                row["predicted_seconds"] = predicted
                texts[-1] += f"; the model says {predicted * 1e6:.1f} us"
    failed = any(row["status"] == "failed" and not row["peer"] for row in rows)
    return {"status": "failed" if failed else "measured", "rows": rows, "text": "; ".join(texts)}


def predicted_seconds(case: Case, operation: str, predictions: dict[str, float]) -> float | None:
    """What gpu_cost.py says of the kernels of the operation, by its names for them; None if it lacks one."""
    kernels = {"log_prob": ("nll",), "log_prob_grad": ("nll", "gradient"), "sample": ("solve T",), "solve": ("solve",)}
    if operation not in kernels or case.samples > 1 or len(set(case.grid)) > 1:
        return None
    stencil = f"f={case.stencil}" if case.stencil.isdecimal() else case.stencil
    dtype = "" if case.dtype == "float32" else f" {case.dtype}"
    names = [f"{kernel} {stencil} {case.batch}x{case.grid[0]}^{len(case.grid)}{dtype}" for kernel in kernels[operation]]
    return sum(predictions[name] for name in names) if predictions.keys() >= set(names) else None


def predict(folder: Path, tool: Path | None) -> None:
    """Let gpu_cost.py write its predictions into the folder, once; say so where it is not there or fails."""
    if (folder / MODEL).exists():
        return
    if tool is None or not tool.exists():
        print(f"the model's predictions: skipped, no gpu_cost.py at {tool}", flush=True)
        return
    options = dict(cwd=ROOT, env=_environment(), check=True, capture_output=True, text=True, timeout=STAGE_SECONDS)
    try:
        with written_whole(folder.resolve() / MODEL) as path:
            subprocess.run([sys.executable, "-B", str(tool.resolve()), "--json", str(path)], **options)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"the model's predictions: none, {error}; {(getattr(error, 'stderr', None) or '')[-500:]}", flush=True)


def predictions_in(folder: Path) -> dict[str, float]:
    """The seconds of each case of gpu_cost.py, by its name there; empty without the tool."""
    path = folder / MODEL
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: row["model, us"] / 1e6 for name, row in rows.items()}


@dataclass(frozen=True)
class Stage:
    """A part of the run; ``take(recorder, folder)`` takes its steps, and says whether all are done."""

    name: str
    take: Callable[[Recorder, Path], bool]


def _bench(sweeps: Iterable[Sweep]) -> Callable[[Recorder, Path], bool]:
    limits = Limits(PRESETS["gpu"].seconds)
    return lambda recorder, folder: take_steps(recorder, measurements(sweeps, predictions_in(folder), limits))


STAGES = (
    Stage("check", lambda recorder, folder: take_steps(recorder, checks())),
    *(
        Stage(f"test {name}", lambda recorder, folder, files=files: run_tests(recorder, [ROOT / file for file in files]))
        for name, files in TESTS.items()
    ),
    Stage("bench of what the model has", _bench(_MODELLED)),
    Stage("bench gpu", _bench(PRESETS["gpu"].sweeps)),
)


# --- the run ---


def require_gpu() -> None:
    """Raises ValueError where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU that it can use (torch.cuda.is_available() is False): nothing was run")


def run_process(stage: str, folder: Path, seconds: float) -> str | None:
    """Run the stage in a process of its own; None if it ended well, else how it ended."""
    command = [sys.executable, "-m", "bench.first_hour", stage, str(folder.resolve()), str(seconds)]
    try:
        code = subprocess.run(command, cwd=ROOT, env=_environment(), timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"stopped when its stage had run for {seconds:.0f} s"
    return f"its process ended with status {code}" if code else None


def run_stages(
    folder: Path,
    about: dict[str, Any],
    seconds: float | None = None,
    start: Callable[[str, Path, float], str | None] = run_process,
    stages: Iterable[str] = tuple(stage.name for stage in STAGES),
) -> bool:
    """Every stage that is not complete; whether all are now.

    Args:
        folder: with the steps of earlier starts, or empty.
        about: machine, versions and commit.
        seconds: after which this start ends; None for no such limit.
        start: runs a stage for some seconds at most, and says how it ended if not well.
        stages: their names, in the order in which they run.

    Raises:
        ValueError: the folder has steps of another commit or another GPU.
    """
    journal, end = Journal(folder), None if seconds is None else time.monotonic() + seconds
    journal.go_on(about, ("commit", "gpu"))
    all_ended = True
    for stage in stages:
        while stage not in journal.complete():
            left = STAGE_SECONDS if end is None else end - time.monotonic()
            if left < FEWEST_SECONDS:
                print(f"{stage}: no time is left; the same command goes on from here", flush=True)
                return False
            done = len(journal.done())
            how = start(stage, folder, min(left, STAGE_SECONDS))
            if how is None:
                continue
            step = journal.under_way()
            if step is not None and left < STAGE_SECONDS and how.startswith("stopped"):
                return False  # this start's end, not the step's fault
            if step is not None:
                Recorder(journal, stage, 0.0).finish(step, "failed", how)
            elif len(journal.done()) == done:
                print(f"{stage}: failed before its first step: {how}", flush=True)
                all_ended = False
                break
    return all_ended


def about_this_run() -> dict[str, Any]:
    found = environment("bench", ("torch", "triton", "numpy", "numba"), "cuda")
    return found | {"gpu": found["machine"]["gpu"]}


def _environment() -> dict[str, str]:
    """Of the processes: the checkout's packages, installed or not, and no emulator."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PTXEMU", "TRITON_INTERPRET")}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [variables.get("PYTHONPATH")])]
    return variables | {"PYTHONPATH": os.pathsep.join(paths)}


def take_stage(name: str, folder: Path, seconds: float) -> None:
    """What a stage's process does."""
    journal = Journal(folder)
    stage = next(stage for stage in STAGES if stage.name == name)
    if stage.take(Recorder(journal, name, seconds), folder):
        journal.write(complete=name)


if __name__ == "__main__":
    take_stage(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
