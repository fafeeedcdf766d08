"""How a run ends, and what is kept beside its numbers."""

import shutil

import pytest
import torch
from rich.console import Console

from experiments import results
from programs.files import new_folder


class Config:
    def as_dict(self):
        return {"experiment": "tiny"}


def test_a_run_killed_as_it_ends_can_be_resumed_or_is_finished(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    results.begin_run(Config(), tmp_path, cpu)
    (tmp_path / results.STATES).mkdir()

    class KilledError(Exception):
        pass

    def killed(*args):
        raise KilledError

    def end():
        results.write_results(tmp_path, {"rows": {}}, "", Console(quiet=True))

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_json", killed)
        with pytest.raises(KilledError):
            end()
    # No results: all that was trained is there still.
    assert (tmp_path / results.STATES).is_dir()
    results.check_resumable(Config(), tmp_path, cpu)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            end()
    # Results, with states that nobody needs.
    with pytest.raises(ValueError, match="is finished"):
        results.check_resumable(Config(), tmp_path, cpu)
    with pytest.raises(ValueError, match="not an empty folder"):
        new_folder("tiny", tmp_path)
    end()
    assert not (tmp_path / results.STATES).exists()


def test_seconds_add_up_over_interruptions(tmp_path, monkeypatch):
    (tmp_path / results.STATES).mkdir()
    clock = iter([100, 103, 104, 500, 502, 507, 507.04])
    monkeypatch.setattr(results.time, "perf_counter", lambda: next(clock))
    first = results.Stopwatch(tmp_path)
    first.save_time("training")
    first.add_time("training")
    assert first.seconds() == {"training": 4}
    resumed = results.Stopwatch(tmp_path)
    resumed.save_time("training")
    resumed.add_time("scores")
    resumed.add_time("scores")
    # The second between 103 and 104 was not kept.
    assert resumed.seconds() == {"training": 5, "scores": 5}


@pytest.mark.parametrize(
    ("left_out", "text"),
    [([], ""), (["a: broken"], " Left out 1 file that"), (1200 * ["a: broken"], " Left out 1,200 files that")],
)
def test_files_left_out_are_counted(left_out, text):
    found = results.data_text({"left_out": left_out})
    assert found.startswith(text)
    assert bool(found) == bool(left_out)


def test_warnings_stand_in_the_report():
    assert results.data_text({"warnings": ["all images are dark", "others are clipped"]}) == (
        " Warning: all images are dark. Warning: others are clipped."
    )
