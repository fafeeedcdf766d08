"""What stands beside numbers: the machine and the versions, tables, and the device."""

import json
import os
import re

import pytest
import torch

from programs.devices import usable_device
from programs.environment import environment, machine_text
from programs.tables import markdown_table


def test_environment_is_that_of_this_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--preset", "quick"])
    about = environment("bench", ["torch", "numpy"], "cpu")
    assert json.loads(json.dumps(about)) == about
    assert about["command"] == "python -m bench --preset quick"
    assert about["versions"].keys() == {"torch", "numpy"}
    assert about["versions"]["torch"] == torch.__version__
    machine = about["machine"]
    assert (machine["cpus"], machine["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert machine_text(about) == f"{machine['processor']}, {machine['cpus']} cores, {machine['threads']} threads"


def test_machines_of_earlier_results_have_a_text():
    machine = {"platform": "Linux-6", "cpus": 2, "torch_threads": 1}
    assert machine_text({"machine": machine}) == "Linux-6, 2 cores, 1 threads"
    machine = {"processor": "P", "gpu": "G", "cpus": 16, "threads": 8, "platform": "Linux-6"}
    assert machine_text({"machine": machine}) == "G; P, 16 cores, 8 threads"


def test_table():
    table = markdown_table(["a", "b", "c"], [["1", "2", "3"]], text_columns=2)
    assert table == "| a | b | c |\n| --- | --- | ---: |\n| 1 | 2 | 3 |\n"


def test_devices():
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    absent = f"cuda:{torch.cuda.device_count()}"
    for name, reason in (("abacus", ""), (absent, ""), ("meta", "meta is not a CPU or CUDA device")):
        with pytest.raises(ValueError, match=re.escape(f"device {name!r} cannot be used: {reason}")):
            usable_device(name)
