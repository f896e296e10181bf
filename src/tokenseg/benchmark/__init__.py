"""Comparisons of TokenSeg with other networks: speed and accuracy."""
