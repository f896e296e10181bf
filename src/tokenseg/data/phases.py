"""How the phases of a DCE exam are called, wherever they come from."""


def phase_name(number: int) -> str:
    """Name the channel of a phase: 0 gives `phase0`, the one before contrast."""
    return f"phase{number}"
