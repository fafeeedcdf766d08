import numpy as np
import pytest
from PIL import Image

from .tiny_faces import arrays


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """The images of `tiny_faces` as a file for --data."""
    path = tmp_path_factory.mktemp("data") / "blocks.npz"
    train, test = arrays()
    np.savez(path, train=train, test=test)
    return path


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """The same images, in the same order, as files in a folder of the same name, and one that is broken."""
    folder = tmp_path_factory.mktemp("data") / "blocks"
    for part, images in zip(("train", "test"), arrays(), strict=True):
        (folder / part).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / part / f"{number:02}.png")
    (folder / "train" / "broken.png").write_bytes(b"")
    return folder
