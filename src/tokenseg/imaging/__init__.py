"""Image files and the space that they lie in: scans, masks and their grids, read strictly and written exactly."""
