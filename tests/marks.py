"""Marks that tests of several packages have."""

import shutil

import pytest

needs_inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
