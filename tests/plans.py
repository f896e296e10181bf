"""Small plans for tests."""

from __future__ import annotations

from tokenseg.config import ChannelNormalisation, Label, Plan, Stride3

ISOTROPIC: tuple[Stride3, Stride3, Stride3, Stride3] = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
THICK_SLICES: tuple[Stride3, Stride3, Stride3, Stride3] = ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2))


def make_plan(
    channels: int = 1,
    labels: int = 1,
    *,
    regions: bool = False,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    strides: tuple[Stride3, Stride3, Stride3, Stride3] = ISOTROPIC,
    grid: tuple[int, int, int] = (4, 5, 5),
    window_vox: tuple[int, int, int] = (32, 32, 32),
) -> Plan:
    """A plan of `channels` z-scored channels c0, c1... and `labels` labels l0, l1... with values 1, 2...

    As regions, label i is the union of the values i + 1 and above.
    """
    names = tuple(f"c{index}" for index in range(channels))
    return Plan(
        channels=names,
        source_channels=names,
        normalisation=(ChannelNormalisation(kind="zscore"),) * channels,
        labels=tuple(
            Label(
                name=f"l{index}",
                values=tuple(range(index + 1, labels + 1)) if regions else (index + 1,),
                output_value=index + 1,
            )
            for index in range(labels)
        ),
        regions=regions,
        spacing_mm=spacing_mm,
        window_vox=window_vox,
        whole_limit_vox=window_vox,
        strides=strides,
        grid=grid,
        batch_size=2,
        steps=100,
    )
