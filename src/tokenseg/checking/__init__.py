"""Faults of a dataset: finding them, showing them, and a mended copy."""
