"""How commands end: done, interrupted, or with an error that is the user's."""

import os

import pytest
import typer
from typer.testing import CliRunner

from programs.commands import INTERRUPTED, InterruptedRunError, errors_of, finish, interruptible


def run(body):
    """The outcome of a program whose command is ``body``."""
    app = typer.Typer()

    @app.command()
    @interruptible
    def command(count: int = 1) -> None:
        """Its options are those of the function that is decorated."""
        body()

    return CliRunner().invoke(app, ["--count", "2"])


def raises(error):
    def body():
        raise error

    return body


def test_ctrl_c_ends_a_command_with_its_status():
    outcome = run(raises(KeyboardInterrupt))
    assert (outcome.exit_code, outcome.output) == (INTERRUPTED, "")
    outcome = run(raises(InterruptedRunError("half of it is kept")))
    assert (outcome.exit_code, outcome.stderr) == (INTERRUPTED, "Interrupted: half of it is kept\n")


def test_other_errors_pass():
    assert isinstance(run(raises(ValueError("a mistake of ours"))).exception, ValueError)


def test_the_end_names_the_folder(tmp_path):
    outcome = run(lambda: finish(tmp_path))
    assert (outcome.exit_code, outcome.output) == (0, f"Results: {tmp_path}\n")
    assert run(lambda: finish(tmp_path, interrupted=True)).exit_code == INTERRUPTED


def test_names_that_are_not_utf8_are_said(tmp_path):
    place = tmp_path / os.fsdecode(b"caf\xe9")
    assert r"caf\xe9" in run(lambda: finish(place)).output
    assert r"caf\xe9" in run(raises(InterruptedRunError(f"{place} is kept"))).stderr

    def body():
        with errors_of("--out"):
            raise ValueError(f"{place.name} is a file")

    assert r"caf\xe9 is a file" in run(body).output


@pytest.mark.parametrize("option", [None, "--size"])
def test_errors_of_an_option_are_the_users(option):
    def body():
        with errors_of(option):
            raise ValueError("size is 0, expected 1 or more")

    outcome = run(body)
    assert outcome.exit_code == 2
    assert "size is 0, expected 1 or more" in outcome.output
    assert ("Invalid value for --size:" in outcome.output) == (option is not None)


def test_only_the_errors_meant_are_the_users():
    with pytest.raises(KeyError), errors_of("--size", ImportError):
        raise KeyError
