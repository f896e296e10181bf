"""What the command line can do: a dataclass a command, whose fields are the options. Nothing heavy at the top."""
