"""From files to arrays on the network's grid, and back."""
