"""Time and memory of passes and training steps of several networks."""
