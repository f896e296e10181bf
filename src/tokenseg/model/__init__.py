"""The network: one file a part of the paper. Start at `network.py`."""
