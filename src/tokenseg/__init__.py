"""TokenSeg."""
