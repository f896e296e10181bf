"""A dataset in numbers, the plan that follows from them, and whether a scan is like its training cases."""
