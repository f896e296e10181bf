"""Files in, mask files out: one scan or a cohort, here or on a cluster, with status and provenance."""
