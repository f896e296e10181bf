"""The commands: a dataclass for each, whose fields are its options. Nothing heavy is imported at the top."""
