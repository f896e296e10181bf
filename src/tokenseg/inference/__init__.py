"""One scan through networks: windows, steering, engines, memory, and how sure the answer is."""
