"""Synthetic breast DCE-MRI: anatomy, lesions, contrast kinetics and a scanner, all seeded."""
