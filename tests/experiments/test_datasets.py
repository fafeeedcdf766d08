"""Every data set from a small folder in its original layout, and what is said about files and folders that do not fit."""

import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

from experiments import photographs
from experiments.datasets import DataError, builtin, load_images, stack
from experiments.datasets.images import gray
from experiments.datasets.pixels import read_gray
from tests.experiments.celeba import make_celeba


@pytest.fixture(autouse=True)
def no_data_in_the_environment(monkeypatch):
    monkeypatch.delenv("BANDED_GMRF_DATA", raising=False)


def noise(*shape: int) -> np.ndarray:
    return torch.randint(256, shape, dtype=torch.uint8).numpy()


def as_float(gray_levels: np.ndarray) -> torch.Tensor:
    """(..., size, size) of uint8 as what a data set gives for it."""
    return torch.from_numpy(gray_levels).float()[..., None, :, :] / 127.5 - 1


# CelebA


def test_celeba(tmp_path):
    make_celeba(tmp_path, "02011")
    data = load_images(tmp_path, 64)
    assert data.name == "CelebA"
    assert data.left_out == ()
    assert (len(data.train), len(data.test)) == (4, 1)
    assert data.train.names == ["000001.jpg", "000003.jpg", "000004.jpg", "000005.jpg"]
    images = stack(data.train)
    assert images.shape == (4, 1, 64, 64)
    assert images.dtype == torch.float32
    # Pixel centres of the 64 columns in the file's; a ramp keeps its values under averaging, except at the two ends. JPEG at
    # quality 100 and two roundings err by up to 2 levels of 256.
    columns = 15 + (torch.arange(64) + 0.5) * 148 / 64 - 0.5
    for image, start in zip(images, (0, 2, 3, 4), strict=True):
        levels = (image[0] + 1) * 127.5
        assert ((levels - columns - start).abs() < 2)[:, 2:-2].all()


@pytest.mark.parametrize("given", ["", "celeba", "celeba/Img/img_align_celeba", "celeba/Img"])
def test_celeba_as_it_is_downloaded(tmp_path, given):
    make_celeba(tmp_path / "celeba", images="Img/img_align_celeba", partition="Eval/list_eval_partition.txt")
    assert len(load_images(tmp_path / given, 32).train) == 3


def test_celeba_given_by_its_images(tmp_path, monkeypatch):
    images = make_celeba(tmp_path)
    assert load_images(images, 148).train[0].shape == (1, 148, 148)
    monkeypatch.chdir(images)
    assert load_images(".", 64).name == "CelebA"


def test_celeba_names_files_that_cannot_be_used(tmp_path):
    images = make_celeba(tmp_path, "000022")
    Image.fromarray(noise(218, 178)).save(images / "000001.jpg")  # gray: no reason to leave it out
    whole = (images / "000002.jpg").read_bytes()
    (images / "000002.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "000003.jpg").write_bytes(b"")
    Image.new("RGB", (178, 217)).save(images / "000006.jpg")
    data = load_images(tmp_path, 64, Console(quiet=True))
    assert data.train.names == ["000001.jpg", "000004.jpg"]
    assert data.test.names == ["000005.jpg"]
    assert [reason.split(":")[0] for reason in data.left_out] == ["000002.jpg", "000003.jpg", "000006.jpg"]
    assert "truncated" in data.left_out[0]
    assert "178 x 217 pixels, expected 178 x 218" in data.left_out[2]
    summary = data.summary(most=2)
    assert "left out, 3 files" in summary
    assert "000002.jpg: image file is truncated" in summary
    assert "and 1 more" in summary


def test_celeba_partition_must_match_the_folder(tmp_path):
    images = make_celeba(tmp_path, "00022")
    (images / "000003.jpg").unlink()
    (images / "000004.jpg").rename(images / "mine.jpg")
    words = (
        r"lists 5 images.* holds 4 files\. Only listed: 2 \(000003\.jpg, 000004\.jpg\)\. Only in the folder: 1 \(mine\.jpg\)"
    )
    with pytest.raises(DataError, match=words):
        load_images(tmp_path, 64)


def test_celeba_needs_its_partition(tmp_path):
    make_celeba(tmp_path)
    (tmp_path / "list_eval_partition.txt").unlink()
    with pytest.raises(DataError, match=r"holds img_align_celeba but no list_eval_partition\.txt"):
        load_images(tmp_path, 64)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("000001.jpg 0\n000002.jpg 3\n", r"line 2: '000002\.jpg 3', expected a file name and 0, 1 or 2"),
        ("000001.jpg,0\n", "line 1"),
        ("000001.jpg 0\n000001.jpg 2\n", r"more than once: 1 \(000001\.jpg\)"),
    ],
)
def test_celeba_partition_must_be_readable(tmp_path, text, words):
    make_celeba(tmp_path)
    (tmp_path / "list_eval_partition.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        load_images(tmp_path, 64)


def test_celeba_needs_test_images_and_a_fitting_size(tmp_path):
    make_celeba(tmp_path, "0001")
    with pytest.raises(DataError, match="4 training and 0 test images"):
        load_images(tmp_path, 64)
    with pytest.raises(DataError, match="148 x 148 pixels, fewer than 149 x 149"):
        load_images(tmp_path, 149)


# CIFAR10

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def python2_pickle(pixels: np.ndarray, module: bytes = b"numpy.core.multiarray") -> bytes:
    """A batch as Python 2 wrote the original ones: strings of bytes, and an array of uint8."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    shape = b"".join(b"M" + struct.pack("<H", n) for n in pixels.shape) + b"\x86"
    array = b"c" + module + b"\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    dtype = (
        b"cnumpy\ndtype\n"
        + string(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    state = b"(K\x01" + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    return b"\x80\x02}(" + string(b"data") + array + state + string(b"batch_label") + string(b"testing") + b"u."


def make_cifar10(folder, kind: str) -> np.ndarray:
    """Six batches of 2 images; returns the colours (6, 2, 32, 32, 3)."""
    folder.mkdir(parents=True, exist_ok=True)
    images = noise(6, 2, 32, 32, 3)
    for batch, name in zip(images, BATCHES, strict=True):
        pixels = np.ascontiguousarray(batch.transpose(0, 3, 1, 2)).reshape(2, 3072)
        if kind == "bin":
            labelled = np.concatenate([np.full((2, 1), 7, np.uint8), pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(labelled.tobytes())
        else:
            (folder / name).write_bytes(python2_pickle(pixels))
    return images


@pytest.mark.parametrize("kind", ["bin", "py"])
@pytest.mark.parametrize("inside", ["", "cifar-10-batches"])
def test_cifar10(tmp_path, kind, inside):
    images = make_cifar10(tmp_path / (inside and f"{inside}-{kind}"), kind)
    data = load_images(tmp_path, 32)
    assert data.name == "CIFAR10"
    assert torch.equal(stack(data.train), as_float(gray(images[:5].reshape(-1, 32, 32, 3))))
    assert torch.equal(stack(data.test), as_float(gray(images[5])))


def test_gray_is_that_of_pillow():
    colours = noise(40, 50, 3)
    assert np.array_equal(gray(colours), np.asarray(Image.fromarray(colours).convert("L")))


def test_cifar10_that_does_not_fit(tmp_path):
    make_cifar10(tmp_path / "bin", "bin")
    make_cifar10(tmp_path / "py", "py")
    with pytest.raises(DataError, match="CIFAR10 has 32 x 32 pixels, not 64 x 64"):
        load_images(tmp_path / "bin", 64)
    with pytest.raises(DataError, match="several data sets"):
        load_images(tmp_path, 32)
    batch = tmp_path / "bin" / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin has 6,145 bytes, expected a multiple of 3,073"):
        load_images(tmp_path / "bin", 32)
    batch.unlink()
    (tmp_path / "bin" / "data_batch_1.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_1\.bin, data_batch_3\.bin of"):
        load_images(tmp_path / "bin", 32)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (python2_pickle(noise(2, 3072), module=b"os"), "it names os._reconstruct"),
        (python2_pickle(noise(2, 3072))[:-500], "not a batch"),
        (pickle.dumps({b"images": 1}), "KeyError: b'data'"),
        (pickle.dumps({b"data": [1, 2]}), "not an array"),
        (python2_pickle(noise(2, 100)), r"not an array \(count, 3,072\)"),
    ],
)
def test_cifar10_takes_no_other_pickle(tmp_path, content, words):
    make_cifar10(tmp_path, "py")
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_images(tmp_path, 32)


# Arrays


def test_arrays_with_a_flag(tmp_path):
    images, is_test = noise(7, 9, 9), np.arange(7) % 3 == 0
    np.savez(tmp_path / "cells.npz", images=images, is_test=is_test, note="went through JPEG", identity=np.arange(7))
    data = load_images(tmp_path / "cells.npz", 9)
    assert (data.name, data.note) == ("cells", "went through JPEG")
    assert torch.equal(stack(data.train), as_float(images[~is_test]))
    assert torch.equal(stack(data.test), as_float(images[is_test]))


@pytest.mark.parametrize("colours", [(), (1,), (3,)])
def test_arrays_in_two_parts(tmp_path, colours):
    train, test = noise(4, 6, 6, *colours), noise(2, 6, 6, *colours)
    np.savez_compressed(tmp_path / "x.npz", train=train, test=test)
    data = load_images(tmp_path, 6)
    assert "x.npz does not say" in data.note
    for part, images in ((data.train, train), (data.test, test)):
        levels = {(): lambda x: x, (1,): lambda x: x[..., 0], (3,): gray}[colours](images)
        assert torch.equal(stack(part), as_float(levels))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "holds nothing; expected"),
        ({"images": noise(2, 4, 4)}, "holds images; expected images and is_test, or train and test"),
        ({"train": noise(2, 4, 4), "test": noise(1, 5, 4)}, r"test has shape \(1, 5, 4\)"),
        ({"train": noise(2, 4, 4, 4), "test": noise(1, 4, 4, 4)}, r"train has shape \(2, 4, 4, 4\)"),
        ({"train": noise(2, 4, 4) / 255, "test": noise(1, 4, 4)}, "train has type float64, expected uint8"),
        ({"train": noise(2, 4, 4).astype(np.uint16), "test": noise(1, 4, 4)}, "train has type uint16"),
        ({"train": noise(2, 4, 4), "test": np.array([None])}, "test has type object"),
        ({"train": noise(2, 4, 4), "test": noise(0, 4, 4)}, "2 training and 0 test images"),
        ({"images": noise(2, 4, 4), "is_test": np.array([True])}, r"is_test has shape \(1,\), expected \(2,\)"),
        ({"images": noise(2, 4, 4), "is_test": np.array([0, 1])}, "is_test has type int64, expected bool"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_images(tmp_path / "x.npz", 4)


def test_broken_arrays(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, train=noise(900, 8, 8), test=noise(9, 8, 8))
    whole = path.read_bytes()
    for content in (b"", whole[:-100], b"\x93NUMPY" + whole):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npz"):
            load_images(path, 8)
    damaged = bytearray(whole)
    damaged[40_000:40_010] = bytes(10)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read"):
        load_images(path, 8)


# Folders of images


def save(path, pixels: np.ndarray, mode: str | None = None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)


def test_kinds_of_pixels(tmp_path):
    """Colour, alpha, palettes, 1 bit, 16 bits and CMYK, against gray levels computed here."""
    levels, colours, alpha = noise(8, 8), noise(8, 8, 3), noise(8, 8)
    over_white = gray(colours) * (alpha / 255) + 255 * (1 - alpha / 255)
    files = {
        "gray.png": (levels, None, levels),
        "colour.png": (colours, None, gray(colours)),
        "alpha.png": (np.dstack([colours, alpha]), None, over_white),
        "gray and alpha.png": (np.dstack([levels, alpha]), None, levels * (alpha / 255) + 255 * (1 - alpha / 255)),
        "bits.png": (np.where(levels > 99, 255, 0).astype(np.uint8), "1", np.where(levels > 99, 255, 0)),
        "palette.gif": (levels // 64 * 64, "P", levels // 64 * 64),
        "16 bits.png": (levels.astype(np.uint16) * 257 + 100, None, levels),
        "16 bits.tif": (levels.astype(np.uint16) * 257 - 100 * (levels > 0).astype(np.uint16), None, levels),
        "cmyk.tiff": (colours, "CMYK", gray(colours)),
    }
    for name, (pixels, mode, expected) in files.items():
        save(tmp_path / name, pixels, mode)
        read = read_gray(tmp_path / name, size=8)
        assert read.dtype == np.uint8
        # Pillow rounds once for the blending and once for the luma.
        assert np.abs(read - expected.astype(float)).max() <= 1.5, name


def test_shapes_of_images(tmp_path):
    wide = np.tile(np.repeat(np.array([0, 90, 255], np.uint8), [3, 16, 2]), (16, 1))
    save(tmp_path / "wide.png", wide)
    # The central 16 of 21 columns are 2 to 18.
    assert np.array_equal(read_gray(tmp_path / "wide.png", size=16), wide[:, 2:18])
    save(tmp_path / "turned.png", wide, exif=bytes_of_orientation(6))
    assert np.array_equal(read_gray(tmp_path / "turned.png", size=16), np.rot90(wide, -1)[2:18])
    assert np.array_equal(read_gray(tmp_path / "wide.png", size=5)[:, 2], [90] * 5)


def bytes_of_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def make_folder(folder, count=23):
    for number in range(count):
        save(folder / f"{number % 3}" / f"{number}.png", noise(9 + number % 2, 12))
    return folder


def test_folder_of_images(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "16 x 5.png", noise(5, 16))
    save(tmp_path / "float.tif", noise(20, 20).astype(np.float32))
    (tmp_path / "broken.jpeg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden.png").write_text("a thumbnail of some desktop")
    data = load_images(tmp_path, 8)
    assert data.name == tmp_path.name
    assert len(data.train) + len(data.test) == 23
    assert not set(data.train.names) & set(data.test.names)
    assert "1 .jpeg, 24 .png, 1 .tif" in data.note
    reasons = dict(reason.split(": ", 1) for reason in data.left_out)
    assert set(reasons) == {"16 x 5.png", "float.tif", "broken.jpeg", "notes.txt"}
    assert "too small for 8 x 8" in reasons["16 x 5.png"]
    assert "mode F" in reasons["float.tif"]
    assert load_images(tmp_path, 8).test.names == data.test.names
    assert stack(data.test).shape == (len(data.test), 1, 8, 8)


def test_folder_with_a_split(tmp_path):
    make_folder(tmp_path / "train", 4)
    make_folder(tmp_path / "test", 2)
    save(tmp_path / "neither.png", noise(9, 9))
    data = load_images(tmp_path, 8)
    assert sorted(data.train.names) == ["train/0/0.png", "train/0/3.png", "train/1/1.png", "train/2/2.png"]
    assert data.test.names == ["test/0/0.png", "test/1/1.png"]
    assert data.left_out == ("neither.png: in neither train/ nor test/",)


def test_folder_without_usable_images(tmp_path):
    with pytest.raises(DataError, match=r"holds no images \(\.bmp, .*\); other files: none"):
        load_images(tmp_path, 8)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"other files: 1 \(notes\.txt: no image by its name\)"):
        load_images(tmp_path, 8)
    save(tmp_path / "small.png", noise(3, 3))
    with pytest.raises(DataError, match=r"no image in .* can be used: 1 \(small\.png: 3 x 3 pixels, too small"):
        load_images(tmp_path, 8)
    save(tmp_path / "only.png", noise(9, 9))
    with pytest.raises(DataError, match="expected at least one of each"):
        load_images(tmp_path, 8)


def test_workers_read_the_same(tmp_path):
    data = load_images(make_folder(tmp_path), 8).dequantised(seed=4)
    alone = stack(data.train)
    assert torch.equal(stack(data.train, num_workers=2), alone)
    shuffled = DataLoader(data.train, batch_size=5, shuffle=True, num_workers=1)
    together = torch.cat(list(shuffled))
    assert torch.equal(together.flatten(1).sum(1).sort().values, alone.flatten(1).sum(1).sort().values)


def test_a_file_that_breaks_later_is_named(tmp_path):
    data = load_images(make_folder(tmp_path), 8)
    path = tmp_path / data.train.names[3]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"{path.name}: "):
        data.train[3]
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}.*No such file"):
        data.train[3]


# All data sets


def test_dequantisation(tmp_path):
    images = np.full((40, 16, 16), 200, np.uint8)
    np.savez(tmp_path / "x.npz", train=images, test=images)
    data = load_images(tmp_path, 16)
    first, again, other = (data.dequantised(seed) for seed in (1, 1, 2))
    train = stack(first.train)
    assert train.dtype == torch.float32
    assert torch.equal(first.train[7], again.train[7])
    assert torch.equal(first.train[7], train[7])
    assert not torch.equal(first.train[7], first.train[8])
    assert not torch.equal(first.train[7], first.test[7])
    assert not torch.equal(first.train[7], other.train[7])
    # In gray levels: uniform over ±½ about 200. The standard error of the mean is 0.0029, that of the variance 0.0007.
    levels = (train.double() + 1) * 127.5 - 200
    assert levels.abs().max() <= 0.5 + 1e-4
    assert levels.mean().abs() < 0.015
    assert (levels.var() - 1 / 12).abs() < 0.004


def test_without_data_it_says_what_to_get(monkeypatch, tmp_path):
    for data in (None, "", str(tmp_path / "nothing")):
        with pytest.raises(DataError) as raised:
            load_images(data, 64)
        for words in ("--data", "BANDED_GMRF_DATA", "img_align_celeba/", "list_eval_partition.txt", "cifar", ".npz", "builtin"):
            assert words in str(raised.value)
    with pytest.raises(DataError, match=r"is a file but no \.npz"):
        load_images(__file__, 64)
    np.savez(tmp_path / "x.npz", train=noise(2, 4, 4), test=noise(1, 4, 4))
    monkeypatch.setenv("BANDED_GMRF_DATA", str(tmp_path))
    assert load_images(None, 4).name == "x"
    with pytest.raises(DataError, match="elsewhere does not exist"):
        load_images(tmp_path / "elsewhere", 4)


def test_one_data_set_of_the_size_is_taken_from_many(tmp_path):
    make_celeba(tmp_path / "faces")
    make_cifar10(tmp_path / "cifar-10-batches-py", "py")
    np.savez(tmp_path / "large.npz", train=noise(2, 200, 200), test=noise(1, 200, 200))
    assert load_images(tmp_path, 64).name == "CelebA"
    assert load_images(tmp_path, 200).name == "large"
    with pytest.raises(DataError, match=r"several data sets of 32 x 32 pixels: .*faces, .*batches-py; give one"):
        load_images(tmp_path, 32)
    with pytest.raises(DataError, match=r"nothing that can be used:\n.*CelebA's crop(.|\n)*not 150 x 150(.|\n)*large\.npz"):
        load_images(tmp_path, 150)


def test_builtin_photographs(monkeypatch):
    monkeypatch.setattr(builtin, "_TRAIN_PATCHES", 50)
    data = load_images("builtin", 128)
    again = load_images("builtin", 128)
    assert torch.equal(data.train[5], again.train[5])
    assert data.train[0].shape == data.test[0].shape == (1, 128, 128)
    assert len(data.train) >= 50
    # 512 x 512 and 300 x 451 pixels.
    assert len(data.test) == 16 + 6
    assert all(name in data.note for name in photographs.TRAIN + photographs.TEST)
    with pytest.raises(DataError, match="0 training"):
        load_images("builtin", 2000)
