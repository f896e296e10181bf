"""DICOM studies: series, grids, phases and intensities of scans, and segmentation objects."""
