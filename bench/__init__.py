"""Speed of the library, as ratios measured side by side in one process."""
