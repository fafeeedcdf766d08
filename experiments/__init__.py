"""Experiments with structured uncertainty: ``python -m experiments --help``."""
