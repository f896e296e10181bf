from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plans import make_plan
from tokenseg.config import Label
from tokenseg.training.augment import Augmentation, Window, build_augmentation

SIZE = 24
Triple = tuple[int, int, int]


def augmentation(
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    window: Triple = (SIZE, SIZE, SIZE),
    *,
    labels: int = 1,
    regions: bool = False,
) -> Augmentation:
    return build_augmentation(make_plan(1, labels, regions=regions, spacing_mm=spacing_mm, window_vox=window))


def half(axis: int, size: Triple = (SIZE, SIZE, SIZE)) -> Window:
    """Label 1, bright, in the lower half along an axis."""
    labels = torch.zeros(1, *size, dtype=torch.uint8)
    labels.narrow(axis + 1, 0, size[axis] // 2).fill_(1)
    return {"image": labels * 10.0, "labels": labels}


def side(labels: Tensor, axis: int) -> float:
    """Mean place of the label along an axis, from -1 to 1."""
    places = torch.nonzero(labels)[:, axis + 1].float()
    return float(places.mean() * 2 / (labels.shape[axis + 1] - 1) - 1)


def dice(one: Tensor, other: Tensor) -> float:
    return 2 * int((one & other).sum()) / (int(one.sum()) + int(other.sum()))


def test_the_seed_decides_everything() -> None:
    augment, again, window = augmentation(), augmentation(), half(0)
    first = [augment(window, seed) for seed in range(10)]
    torch.manual_seed(5)
    second = [again(window, seed) for seed in reversed(range(10))][::-1]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["labels"], other["labels"])
    assert len({one["image"].sum().item() for one in first}) > 5


def test_the_window_itself_is_not_touched_and_types_are_plain() -> None:
    window = half(1)
    before = {key: value.clone() for key, value in window.items()}
    for seed in range(10):
        result = augmentation()(window, seed)
        assert {type(value) for value in result.values()} == {Tensor}
        assert (result["image"].dtype, result["labels"].dtype) == (torch.float32, torch.uint8)
        assert result["image"].shape == result["labels"].shape == (1, SIZE, SIZE, SIZE)
    assert all(torch.equal(window[key], value) for key, value in before.items())


def test_image_and_labels_move_together() -> None:
    """A bright box off the centre is its own label: still so after augmentation, wherever it went."""
    labels = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.uint8)
    labels[:, 4:14, 8:18, 6:20] = 1
    augment = augmentation()
    scores, moved = [], 0
    for seed in range(40):
        result = augment({"image": labels * 10.0, "labels": labels}, seed)
        scores.append(dice(result["image"] > 5, result["labels"] > 0))
        moved += not torch.equal(result["labels"], labels)
    assert min(scores) > 0.8
    assert sum(scores) / len(scores) > 0.95
    assert moved > 20


def test_labels_keep_their_values() -> None:
    labels = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.uint8)
    labels[:, 4:20, 4:20, 4:20], labels[:, 8:16, 8:16, 8:16] = 3, 1
    augment = augmentation(labels=4)
    found = {
        tuple(augment({"image": labels.float(), "labels": labels}, seed)["labels"].unique().tolist())
        for seed in range(40)
    }
    assert found == {(0, 1, 3)}


def test_moved_labels_have_no_jagged_edges() -> None:
    """A turned ball keeps its surface: of nearest neighbours, many boundary voxels would have a single neighbour."""
    places = torch.stack(torch.meshgrid(*[torch.arange(float(SIZE))] * 3, indexing="ij"))
    ball = ((places - 11.5).square().sum(dim=0) < 8.2**2).to(torch.uint8)[None]
    augment = augmentation()
    moved = [augment({"image": ball.float(), "labels": ball}, seed) for seed in range(40)]
    overlaps = [dice(result["image"] > 0.5, result["labels"] > 0) for result in moved]
    assert sorted(overlaps)[len(overlaps) // 4] > 0.99


def test_overlapping_regions_stay_nested() -> None:
    regions = torch.zeros(2, SIZE, SIZE, SIZE, dtype=torch.uint8)
    regions[0, 4:20, 4:20, 4:20], regions[1, 8:16, 8:16, 8:16] = 1, 1
    augment = augmentation(labels=2, regions=True)
    for seed in range(20):
        outer, inner = augment({"image": regions[:1].float(), "labels": regions}, seed)["labels"]
        assert int(inner.sum()) > 0
        assert not ((inner > 0) & (outer == 0)).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_left_right_is_the_only_flip(axis: int) -> None:
    augment, window = augmentation(), half(axis)
    sides = [side(augment(window, seed)["labels"], axis) for seed in range(60)]
    flipped = sum(place > 0 for place in sides)
    assert all(abs(place) > 0.2 for place in sides)
    assert 15 < flipped < 45 if axis == 0 else flipped == 0


def out_of_plane_tilt(augment: Augmentation, size: Triple = (SIZE, SIZE, SIZE)) -> int:
    """In how many of 30 windows a label that fills half the slices is uneven within a slice, away from the border."""
    window = half(2, size)
    inner = [augment(window, seed)["labels"][0, 9:15, 9:15] for seed in range(30)]
    return sum(bool((slices.amax(dim=(0, 1)) != slices.amin(dim=(0, 1))).any()) for slices in inner)


def test_thick_slices_are_not_rotated_out_of_plane() -> None:
    assert out_of_plane_tilt(augmentation()) > 5
    assert out_of_plane_tilt(augmentation((1.0, 1.0, 2.9))) > 5
    assert out_of_plane_tilt(augmentation((1.0, 1.0, 3.0))) == 0


def test_few_slices_are_not_rotated_out_of_the_image() -> None:
    assert out_of_plane_tilt(augmentation(window=(SIZE, SIZE, 6)), (SIZE, SIZE, 6)) == 0
    window = {"image": torch.ones(1, 32, 32, 1), "labels": torch.ones(1, 32, 32, 1, dtype=torch.uint8)}
    augment = augmentation(window=(32, 32, 1))
    # What is left after scaling by 0.9 and turning within the slice.
    assert min(float(augment(window, seed)["labels"].float().mean()) for seed in range(60)) > 0.6


def test_thick_slices_are_still_rotated_within_the_plane() -> None:
    augment, window = augmentation((1.0, 1.0, 5.0)), half(1)
    inner = [augment(window, seed)["labels"][0, 4:20, :, 12] for seed in range(60)]
    assert sum(bool((columns.amax(dim=0) != columns.amin(dim=0)).any()) for columns in inner) > 10


@pytest.mark.parametrize("value", [0.0, 4.0])
def test_a_constant_image_stays_finite(value: float) -> None:
    augment = augmentation()
    window = {"image": torch.full((2, SIZE, SIZE, SIZE), value), "labels": half(0)["labels"]}
    assert all(bool(augment(window, seed)["image"].isfinite().all()) for seed in range(30))


def test_intensities_change_in_the_image_only() -> None:
    """Seeds that leave the labels alone still change the image in more ways than one."""
    labels = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.uint8)
    labels[:, 6:-6, 4:-4, 4:-4] = 1
    image = labels * 10.0
    augment = augmentation()
    still = [
        result
        for seed in range(60)
        if torch.equal((result := augment({"image": image, "labels": labels}, seed))["labels"], labels)
    ]
    changes = {round(float((result["image"] - image).abs().max()), 3) for result in still}
    assert 0.0 in changes
    assert len(changes) > 10


@pytest.mark.parametrize(
    ("names", "sided"),
    [
        (("left", "right"), True),
        (("Left kidney", "right_kidney"), True),
        (("left atrium", "wall"), False),
        (("bright", "leftover"), False),
    ],
)
def test_nothing_is_flipped_where_labels_tell_left_from_right(names: tuple[str, str], sided: bool) -> None:
    labels = tuple(Label(name=name, values=(value,), output_value=value) for value, name in enumerate(names, 1))
    plan = make_plan(1, 2, window_vox=(8, 8, 8)).model_copy(update={"labels": labels})
    augment = build_augmentation(plan)
    ramp = torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 8, 8)
    window = {"image": ramp.clone(), "labels": torch.zeros(1, 8, 8, 8, dtype=torch.uint8)}
    slopes = []
    for seed in range(24):
        image = augment({name: values.clone() for name, values in window.items()}, seed)["image"][0]
        slopes.append(float(image[4:].mean() - image[:4].mean()))
    assert (min(slopes) < 0) != sided
