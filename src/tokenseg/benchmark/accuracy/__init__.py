"""Accuracy of several networks in one pipeline under one budget."""
