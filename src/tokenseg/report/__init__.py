"""Self-contained HTML reports: one file that opens from disk, without network, in any current browser."""
