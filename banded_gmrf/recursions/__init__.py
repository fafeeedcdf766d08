"""Recursions over rows of the grid, on dense blocks: what construction, analysis and inference have in common."""
