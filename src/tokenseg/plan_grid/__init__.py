"""The way of a scan to the plan grid and of answers back: intensities, resampling, rows."""
