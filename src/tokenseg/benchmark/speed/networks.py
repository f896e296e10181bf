"""The networks whose speed is compared, by name, each in a plan of one channel and two labels."""

from __future__ import annotations

from torch import nn

from tokenseg.benchmark.peers import PEERS, Peer
from tokenseg.config import PRESETS, ChannelNormalisation, Label, NetworkConfig, Plan, PresetName
from tokenseg.errors import ConfigError
from tokenseg.model.network import TokenSeg

CHANNELS, OUTPUTS = 1, 3
_CUSTOMARY_WINDOW_VOX = 128
_PRESETS: tuple[PresetName, ...] = ("small", "paper")
_PARTS_LEFT_OUT: dict[str, dict[str, object]] = {
    "": {},
    "-no-tokens": {"tokens": False},
    "-no-refinement": {"refine_fraction": 0.0},
    "-plain": {"tokens": False, "refine_fraction": 0.0},
}

TOKENSEG: dict[str, NetworkConfig] = {
    f"tokenseg-{preset}{ending}": PRESETS[preset].model_copy(update=parts)
    for preset in _PRESETS
    for ending, parts in _PARTS_LEFT_OUT.items()
}
"""TokenSeg's presets, whole and with a part left out; `plain` is without both."""
NETWORKS = (*TOKENSEG, *PEERS)
"""Names of all networks."""


def check_names(names: tuple[str, ...]) -> None:
    """Refuse names of no network.

    Raises:
        ConfigError: With the names that there are.
    """
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        raise ConfigError(f"no network is called {', '.join(unknown)}; choose from {', '.join(NETWORKS)}")


def build_network(name: str, size_vox: tuple[int, int, int]) -> nn.Module:
    """Make a network for images of a size, in evaluation mode; it returns a `TokenSegOutput`.

    nnU-Net's networks and DynUNet get the stages that are planned for a window of this size, or of 128 voxels where it
    is larger: the customary window, whose network then runs over a larger image as it is. UNETR is of one size only.

    Raises:
        ConfigError: There is no such network, or its package is not installed.
    """
    check_names((name,))
    if name in TOKENSEG:
        return TokenSeg(TOKENSEG[name], make_plan(size_vox)).eval()
    x, y, z = size_vox if name == "monai-unetr" else _window_vox(size_vox)
    return Peer(PEERS[name](CHANNELS, OUTPUTS, (x, y, z)), size_vox).eval()


def make_plan(size_vox: tuple[int, int, int]) -> Plan:
    """An isotropic plan of one channel and two labels, by which an image of this size runs whole."""
    labels = tuple(Label(name=str(value), values=(value,), output_value=value) for value in (1, 2))
    return Plan(
        channels=("MRI",),
        source_channels=("MRI",),
        normalisation=(ChannelNormalisation(kind="zscore"),),
        labels=labels,
        spacing_mm=(1, 1, 1),
        window_vox=_window_vox(size_vox),
        whole_limit_vox=size_vox,
        strides=((2, 2, 2),) * 4,
        grid=(4, 5, 5),
        batch_size=2,
        steps=1000,
    )


def _window_vox(size_vox: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, z = (min(length, _CUSTOMARY_WINDOW_VOX) for length in size_vox)
    return x, y, z
