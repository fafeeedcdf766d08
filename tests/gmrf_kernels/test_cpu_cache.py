"""The CPU backend's cache of compiled kernels on disk."""

import os
import stat
import tempfile
import warnings
from pathlib import Path

import numba
import pytest

from gmrf_kernels import cpu_compile, cpu_plan
from tests.gmrf_kernels.cpu_backend import assert_same_bits, run_python
from tests.gmrf_kernels.operators import OFFSETS, arguments, call

ONE_CALL = """
import sys, warnings
warnings.simplefilter("error")
import torch, gmrf_kernels
if sys.argv[1] == "no compiler":
    from numba.core.compiler import CompilerBase
    def compile_extra(self, function):
        raise AssertionError(f"{function} is compiled again")
    CompilerBase.compile_extra = compile_extra
ones = torch.ones(1, 5, dtype=torch.float64)
print(gmrf_kernels.matvec(ones, ones[:, None] / 3, ones / 7, ((1,),), 1).tolist())
"""


def test_a_second_process_does_not_compile_again(tmp_path):
    def run(*options):
        done = run_python(ONE_CALL, *options, BANDED_GMRF_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        files = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "cache").rglob("*") if p.is_file()}
        return done.stdout, files

    first, second = run("compiler"), run("no compiler")
    assert first == second
    assert {".py", ".nbi", ".nbc"} <= {path.suffix for path in first[1]}
    assert not any(path.suffix == ".tmp" for path in first[1])


def test_an_unusable_cache_only_costs_the_compile(tmp_path, monkeypatch, nothing_compiled):
    args = arguments("matvec", OFFSETS["far line"], (7,))
    expected = call("matvec", args)
    regular_file = tmp_path / "file"
    regular_file.write_text("")
    monkeypatch.setenv("BANDED_GMRF_CACHE", str(regular_file / "cache"))
    cpu_compile._compiled.cache_clear()
    cpu_plan.forget_plans()
    with pytest.warns(UserWarning, match="compiled kernels are not kept"):
        actual = call("matvec", args)
    assert_same_bits(actual, expected)
    # Once is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(call("matvec", args), expected)


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("BANDED_GMRF_CACHE", str(tmp_path / "a"))
    assert cpu_compile._cache_directory() == tmp_path / "a"
    monkeypatch.delenv("BANDED_GMRF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu_compile._cache_directory() == tmp_path / "banded_gmrf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cpu_compile._cache_directory() == Path.home() / ".cache" / "banded_gmrf"


def test_the_cache_is_the_users_own(tmp_path, monkeypatch, nothing_compiled):
    """It holds pickles: whoever can write them runs code."""
    monkeypatch.setenv("BANDED_GMRF_CACHE", str(tmp_path / "a" / "cache"))
    call("matvec", arguments("matvec", OFFSETS["far line"], (7,)))
    assert stat.S_IMODE((tmp_path / "a" / "cache").stat().st_mode) == 0o700


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, None], ids=["empty", "zeros", "truncated"])
@pytest.mark.parametrize("suffix", [".nbi", ".nbc", ".py"])
def test_damaged_files_are_replaced(suffix, content, tmp_path, monkeypatch, nothing_compiled):
    """As a loss of power or a full disk leave them."""
    monkeypatch.setenv("BANDED_GMRF_CACHE", str(tmp_path))
    args = arguments("matvec", OFFSETS["far line"], (7,))
    expected = call("matvec", args)
    (file,) = tmp_path.rglob(f"*{suffix}")
    intact = file.stat().st_size
    file.write_bytes(file.read_bytes()[: intact // 2] if content is None else content)
    cpu_compile._compiled.cache_clear()
    cpu_plan.forget_plans()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(call("matvec", args), expected)
    (file,) = tmp_path.rglob(f"*{suffix}")
    assert abs(file.stat().st_size - intact) < 16  # the index has the time of the source file
    # The next process finds everything in order.
    cpu_compile._compiled.cache_clear()
    cpu_plan.forget_plans()
    monkeypatch.setattr(numba.core.compiler.CompilerBase, "compile_extra", None)
    assert_same_bits(call("matvec", args), expected)


def test_files_of_processes_of_one_number_do_not_meet(tmp_path, monkeypatch):
    """Containers that share a cache share process numbers, too."""
    temporary = []
    replace = os.replace

    def record(source, target):
        temporary.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    for text in ("first", "the second"):
        cpu_compile._write_once(tmp_path / "file.py", text)
    assert len(set(temporary)) == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the second"]


def test_a_full_disk_only_costs_the_compile(tmp_path, monkeypatch, nothing_compiled):
    monkeypatch.setenv("BANDED_GMRF_CACHE", str(tmp_path))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    args = arguments("matvec", OFFSETS["far line"], (7,))
    with pytest.warns(UserWarning, match="not kept on disk: .*No space left"):
        call("matvec", args)


def test_no_home(monkeypatch, nothing_compiled):
    """Neither a variable nor an entry in the system's table of users, as in many containers."""
    for name in ("BANDED_GMRF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    args = arguments("matvec", OFFSETS["far line"], (7,))
    with pytest.warns(UserWarning, match="compiled kernels are not kept on disk: Could not determine home directory"):
        call("matvec", args)


def test_without_a_compiler():
    done = run_python(ONE_CALL, "compiler", NUMBA_DISABLE_JIT="1")
    assert done.returncode == 1
    assert "RuntimeError: NUMBA_DISABLE_JIT is set, and the CPU backend's kernels only run compiled: unset it" in done.stderr
