"""deepinv imports torchvision, of which the package index has builds for CUDA: with torch for CPUs they import no further.

Two of torchvision's compiled operators are looked up while its Python files are imported. Where they cannot be loaded, the
tests of deepinv and the gallery declare them. The rest is imported then, and needs none of them.
"""

import importlib.util

import torch


def declare_missing_operators() -> None:
    """Declare them, if torchvision is installed and cannot load its own."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(declared)  # or they would be gone again


_KEPT: list[torch.library.Library] = []
