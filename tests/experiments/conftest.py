import numpy as np
import pytest

from .tiny_faces import arrays


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """The images of `tiny_faces` as a file for --data."""
    path = tmp_path_factory.mktemp("data") / "blocks.npz"
    train, test = arrays()
    np.savez(path, train=train, test=test)
    return path
