"""Cases on disk: dataset layouts, folders, tables and single inputs, read into scans with named channels."""
