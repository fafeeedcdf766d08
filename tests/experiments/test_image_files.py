"""Image files that other software reads otherwise than one expects: their range, their frames, and their names."""

import json
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from experiments.__main__ import app
from experiments.datasets import DataError, Levels, load_images, stack
from experiments.datasets.pixels import read_gray
from experiments.faces import figures
from experiments.faces.presets import PRESETS
from tests.experiments.tiny_faces import PRESET

SIZE = 8


def ramp(most: int, dtype=np.uint16) -> np.ndarray:
    """(SIZE, SIZE) values from 0 to ``most``."""
    return np.linspace(0, most, SIZE * SIZE).round().astype(dtype).reshape(SIZE, SIZE)


def flat(value: int, dtype=np.uint8) -> np.ndarray:
    return np.full((SIZE, SIZE), value, dtype)


def save(path, *frames: np.ndarray, **options):
    """One file of one or several frames."""
    first, *others = map(Image.fromarray, frames)
    first.save(path, **({"save_all": True, "append_images": others} if others else {}), **options)


def colour_png_of_16_bits(path, values: np.ndarray):
    """Which Pillow reads but does not write; (height, width, 3)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def gray_levels(images) -> np.ndarray:
    """(count, SIZE, SIZE) from 0 to 255."""
    return ((stack(images)[:, 0] + 1) * 127.5).round().numpy()


# Ranges


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_12_bits_in_16_are_dark_with_a_warning_and_right_with_a_range(tmp_path, suffix):
    for number in range(3):
        save(tmp_path / f"{number}{suffix}", ramp(4095 - number))
    (warning,) = load_images(tmp_path, SIZE).warnings
    assert "the largest value seen in files of 16 bits is 4095, white is 65535: all images are dark" in warning
    assert "--range 0,4095 spreads these values" in warning
    data = load_images(tmp_path, SIZE, levels=Levels(0, 4095))
    assert data.warnings == ()
    assert "values from 0 (black) to 4095 (white)" in data.note
    for images, names in ((gray_levels(part), part.names) for part in (data.train, data.test)):
        for image, name in zip(images, names, strict=True):
            np.testing.assert_array_equal(image, (ramp(4095 - int(name[0])) * (255 / 4095)).round())


def test_all_16_bits_are_no_reason_for_a_warning(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png", ramp(65535 - 20000 * number))
    data = load_images(tmp_path, SIZE)
    assert data.warnings == ()
    assert gray_levels(data.train).max() == 255


def test_masks_of_zeros_and_ones_are_dark_with_a_warning(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png", ramp(1, np.uint8))
    (warning,) = load_images(tmp_path, SIZE).warnings
    assert "the largest value seen in files of 8 bits is 1, white is 255" in warning
    assert "--range 0,1 " in warning
    assert set(gray_levels(load_images(tmp_path, SIZE, levels=Levels(0, 1)).train).flatten()) == {0, 255}


def test_32_bits_need_a_range(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.tif", np.linspace(-2, 3, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE))
    with pytest.raises(DataError, match=r"whose range is not known; --range LOW,HIGH gives it"):
        load_images(tmp_path, SIZE)
    image = gray_levels(load_images(tmp_path, SIZE, levels=Levels(-2, 3)).train)[0]
    assert (image.flatten()[0], image.flatten()[-1]) == (0, 255)
    (warning,) = load_images(tmp_path, SIZE, levels=Levels(-1, 3)).warnings
    assert "values seen in files of 32 bits go from -2 to 3: those beyond --range -1,3 are clipped" in warning


def test_nan_is_not_a_gray_level(tmp_path):
    save(tmp_path / "nan.tif", flat(np.nan, np.float32))
    with pytest.raises(ValueError, match="some values are NaN"):
        read_gray(tmp_path / "nan.tif", size=SIZE, levels=Levels(0, 1))


def test_colours_of_16_bits_lose_the_lower_ones_and_say_so(tmp_path):
    for number in range(3):
        colour_png_of_16_bits(tmp_path / f"{number}.png", np.full((SIZE, SIZE, 3), 4095))
    (warning,) = load_images(tmp_path, SIZE).warnings
    assert "in the upper 8 of the 16 bits of colours is 15, white is 255: all images are dark; convert them" in warning
    with pytest.raises(DataError, match="of which Pillow reads the upper 8: --range cannot be applied"):
        load_images(tmp_path, SIZE, levels=Levels(0, 4095))


def test_arrays_of_other_types_need_a_range(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, train=np.stack([ramp(4095)] * 2), test=ramp(2000)[None])
    with pytest.raises(DataError, match=r"train has type uint16, expected uint8; --range LOW,HIGH takes other numbers"):
        load_images(path, SIZE)
    data = load_images(path, SIZE, levels=Levels(0, 4095))
    np.testing.assert_array_equal(gray_levels(data.test)[0], (ramp(2000) * (255 / 4095)).round())
    assert data.warnings == ()
    np.savez(path, train=ramp(40, np.uint8)[None], test=ramp(20, np.uint8)[None])
    (warning,) = load_images(path, SIZE).warnings
    assert "the largest value seen in the arrays is 40, white is 255" in warning
    np.savez(path, train=np.full((1, SIZE, SIZE), np.nan), test=np.zeros((1, SIZE, SIZE)))
    with pytest.raises(DataError, match=r"x\.npz: some values are NaN"):
        load_images(path, SIZE, levels=Levels(0, 1))


@pytest.mark.parametrize("text", ["5", "5,5", "9,1", "0,inf", "nan,1", "a,b", "1,2,3"])
def test_bad_ranges(text):
    with pytest.raises(ValueError, match="expected two numbers LOW,HIGH as in 0,4095, the first one smaller"):
        Levels.parse(text)


def test_no_range_for_images_of_8_bits_by_definition():
    with pytest.raises(DataError, match="builtin has 8 bits, 0 is black and 255 white"):
        load_images("builtin", SIZE, levels=Levels(0, 4095))


# Frames

STACKS = [("TIFF", ".tif", {}), ("GIF", ".gif", {}), ("PNG", ".png", {}), ("WEBP", ".webp", {"lossless": True})]


@pytest.mark.parametrize(("kind", "suffix", "options"), STACKS)
def test_all_frames_of_a_stack_are_images(tmp_path, kind, suffix, options):
    values = [[10, 200, 90], [250, 30, 60], [70, 130]]
    for number, of_file in enumerate(values):
        save(tmp_path / f"{number}{suffix}", *map(flat, of_file), format=kind, **options)
    save(tmp_path / "single.bmp", flat(5))
    data = load_images(tmp_path, SIZE)
    assert "8 of the images are frames of 3 files with several" in data.note
    found = {}
    for part in (data.train, data.test):
        found |= dict(zip(part.names, gray_levels(part)[:, 0, 0], strict=True))
        # Frames of one file are alike: none is for testing while another is for training.
        assert len({name[0] for name in data.train.names} & {name[0] for name in data.test.names}) == 0
    expected = {f"{i}{suffix}, frame {j + 1}": value for i, row in enumerate(values) for j, value in enumerate(row)}
    assert found == pytest.approx(expected | {"single.bmp": 5}, abs=1)


def test_a_single_stack_is_split_by_its_frames(tmp_path):
    save(tmp_path / "movie.tif", *(flat(10 * number) for number in range(21)))
    data = load_images(tmp_path, SIZE)
    assert (gray_levels(data.train)[:, 0, 0] == [10 * number for number in range(19)]).all()
    assert (gray_levels(data.test)[:, 0, 0] == [190, 200]).all()


def test_frames_that_cannot_be_used_are_named(tmp_path):
    first, small, last = map(Image.fromarray, (flat(50), flat(0)[:5, :5], flat(150)))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[small, last])
    save(tmp_path / "other.tif", flat(1))
    data = load_images(tmp_path, SIZE)
    assert data.left_out == ("pages.tif, frame 2: 5 x 5 pixels, too small for 8 x 8",)
    assert {*data.train.names, *data.test.names} == {"pages.tif, frame 1", "pages.tif, frame 3", "other.tif"}


def test_reduced_copies_of_pages_are_left_out(tmp_path):
    full, reduced = Image.fromarray(ramp(255, np.uint8).repeat(2, 0).repeat(2, 1)), Image.fromarray(ramp(255, np.uint8))
    reduced.encoderinfo = {"tiffinfo": {254: 1}}
    full.save(tmp_path / "pyramid.tif", save_all=True, append_images=[reduced])
    save(tmp_path / "other.tif", flat(1))
    assert load_images(tmp_path, SIZE).left_out == ("pyramid.tif, frame 2: a reduced copy of another page",)


def test_further_pictures_in_a_jpeg_are_not_images_of_the_data(tmp_path):
    for number in range(2):
        save(tmp_path / f"{number}.jpg", flat(90), flat(200), format="MPO")
    data = load_images(tmp_path, SIZE)
    assert (len(data.train), len(data.test)) == (1, 1)
    assert gray_levels(data.train).max() < 100


# Names


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    """The whole experiment: such names are those of the folder, of images, and of a file that is left out."""
    monkeypatch.setitem(PRESETS["faces"], "quick", PRESET)
    monkeypatch.setattr(figures, "draw", lambda *args: None)
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for number in range(30):
        save(folder / os.fsdecode(b"%d-\xfc.png" % number), ramp(4095))
    (folder / os.fsdecode(b"broken-\xe4.png")).write_bytes(b"")
    (folder / os.fsdecode(b"notes-\xe4.txt")).write_text("mine")
    out = tmp_path / os.fsdecode(b"new-\xe9")
    options = ["--models", "AE", "--test", "2", "--range", "0,4000"]
    outcome = CliRunner().invoke(app, ["faces", "--data", str(folder), "--out", str(out), *options])
    assert outcome.exit_code == 0, outcome.output
    assert r"new-\xe9" in outcome.output
    clipped = "values seen in files of 16 bits go from 0 to 4095: those beyond --range 0,4000 are clipped"
    assert f"Warning: {clipped}" in outcome.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["data"] == r"caf\xe9"
    assert results["config"]["levels"] == [0, 4000]
    assert results["warnings"] == [clipped]
    assert [reason.split(": ")[0] for reason in results["left_out"]] == [r"notes-\xe4.txt", r"broken-\xe4.png"]
    report = (out / "results.md").read_text(encoding="utf-8")
    assert "Left out 2 files" in report
    assert f"Warning: {clipped}." in report


def test_networks_of_another_range_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS["faces"], "quick", PRESET)
    monkeypatch.setattr(figures, "draw", lambda *args: None)
    folder, out = tmp_path / "images", tmp_path / "new"
    folder.mkdir()
    for number in range(30):
        save(folder / f"{number}.png", ramp(4095))
    command = ["faces", "--data", str(folder), "--models", "VAE", "--test", "2", "--range", "0,4095"]
    outcome = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    factors = ["factors", str(out), str(tmp_path / "f.npz"), "--data", str(folder)]
    refused = CliRunner().invoke(app, factors)
    assert refused.exit_code == 2
    message = " ".join(refused.output.replace("│", " ").split())
    assert "trained on images with values from 0 (black) to 4095 (white), the data has no --range" in message
    assert CliRunner().invoke(app, [*factors, "--range", "0,4095"]).exit_code == 0
    bad = CliRunner().invoke(app, [*factors, "--range", "4095"])
    assert "--range" in bad.output
    assert "expected two numbers LOW,HIGH" in " ".join(bad.output.replace("│", " ").split())
