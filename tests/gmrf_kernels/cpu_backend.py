"""What the tests of the CPU backend share."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

# Seconds after which a process or thread that should be done in one is taken to hang.
HANGS = 30

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def in_forked_process(function, *args):
    """What the function returns in a forked child; a child that hangs fails the test."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*args)), daemon=True)
    child.start()
    sender.close()
    try:
        assert receiver.poll(HANGS), "the child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


def run_python(program: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """What a fresh Python process prints that runs the program with this environment beside ours."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-c", program, *options]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=4 * HANGS, check=False)
