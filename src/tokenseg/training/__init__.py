"""Training, in the order of the data: cache -> augment -> batches -> loop, with state and logs beside it."""
