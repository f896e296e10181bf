"""Scores of masks against reference masks."""
