"""The model folder: weights, facts and card, and the models that come with the package."""
