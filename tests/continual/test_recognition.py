"""What a record is by itself, and which task it is of."""

import math

import torch
from torch import Tensor

from dougong.continual.recognition import Features, Recognition, Traits, traits_of
from dougong.continual.surface import SURFACE, surface_of


def tone(hertz: float, length: int, padded: int) -> tuple[Tensor, Tensor]:
    time_T = torch.arange(padded) / 16_000
    mask_T = torch.arange(padded) < length
    return torch.sin(2 * math.pi * hertz * time_T) * mask_T, mask_T


def sounds(*given: tuple[float, int], padded: int) -> dict[str, Tensor]:
    samples, masks = zip(*(tone(hertz, length, padded) for hertz, length in given), strict=True)
    return {"samples_UT": torch.stack(samples), "mask_UT": torch.stack(masks)}


def test_a_sounds_surface_is_its_level_by_frequency_whatever_it_is_padded_to() -> None:
    found = surface_of(sounds((300.0, 4000), (3000.0, 4000), padded=4000))
    more = surface_of(sounds((300.0, 4000), (3000.0, 4000), padded=9000))

    assert found.shape == (2, SURFACE)
    torch.testing.assert_close(found, more, rtol=1e-4, atol=1e-4)
    low, high = found[:, :20].argmax(dim=1).tolist()  # of the bands' means
    assert low < high
    assert float(found[0].abs().sum()) > 0


def test_many_sounds_are_as_each_by_itself_and_a_short_one_has_a_surface() -> None:
    given = [(200.0 + 150 * number, 1000 + 37 * number) for number in range(20)]
    together = surface_of(sounds(*given, padded=2000))
    apart = torch.cat([surface_of(sounds(each, padded=2000)) for each in given])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    short = surface_of(sounds((440.0, 50), padded=50))
    assert bool(short.isfinite().all())
    assert float(short.abs().sum()) > 0


def test_a_signals_channels_count_together_and_silence_is_finite() -> None:
    mask_UT = torch.ones(3, 500, dtype=torch.bool)
    samples_UCT = torch.randn(3, 2, 500, generator=torch.Generator().manual_seed(0))
    samples_UCT[2] = 0.0
    found = surface_of({"samples_UCT": samples_UCT, "mask_UT": mask_UT})
    swapped = surface_of({"samples_UCT": samples_UCT.flip(1), "mask_UT": mask_UT})
    torch.testing.assert_close(found, swapped)
    assert bool(found.isfinite().all())


def test_a_picture_and_a_volume_are_known_by_where_they_are_bright_and_words_by_nothing() -> None:
    pixels_UCHW = torch.zeros(1, 3, 64, 64)
    pixels_UCHW[0, :, 8:16, 16:24] = 1.0
    assert surface_of({"pixels_UCHW": pixels_UCHW}).nonzero().tolist() == [[0, 8 * 1 + 2]]
    voxels_U1DHW = torch.zeros(1, 1, 8, 8, 8)
    voxels_U1DHW[0, 0, 2:4, 6:, :2] = 1.0
    assert surface_of({"voxels_U1DHW": voxels_U1DHW}).nonzero().tolist() == [[0, 16 * 1 + 4 * 3]]
    assert not bool(surface_of({"ids_UT": torch.ones(2, 5), "mask_UT": torch.ones(2, 5)}).any())


# Which task ----------------------------------------------------------------------------------------------------------


def features(where: dict[str, float], count: int, seed: int, there: tuple[str, ...], size: int = 6) -> Features:
    """Around a place on the first axis, for each modality that is there."""
    random = torch.Generator().manual_seed(seed)
    x, present = {}, {}
    for name in ("picture", "sound"):
        found = torch.randn(count, size, generator=random)
        found[:, 0] += where.get(name, 0.0)
        has = name in there
        x[name], present[name] = found * has, torch.full((count,), has)
    return Features(x, present)


def task(where: dict[str, float], seed: int, *there: str) -> Traits:
    labels = torch.zeros(200, dtype=torch.long)
    return traits_of(features(where, 200, seed, there), labels, 1, features(where, 40, seed + 1, there))


def found(recognition: Recognition, given: Features) -> float:
    """Share of records that are taken to be of the first task."""
    return float((recognition(given).score_BS.argmax(dim=1) == 0).float().mean())


def test_a_task_that_does_not_read_what_a_record_has_is_no_nearer_for_it() -> None:
    # The first two read pictures that look alike; only the first reads the sound, from which this record is far.
    both = task({"picture": 0.3, "sound": 0.0}, 0, "picture", "sound")
    one, other = task({"picture": 0.0}, 10, "picture"), task({"picture": 5.0}, 30, "picture")
    recognition = Recognition(("picture", "sound"), [both, one, other])

    given = features({"picture": 0.15, "sound": 10.0}, 200, 20, ("picture", "sound"))

    assert found(recognition, given) == 1.0


def test_what_hardly_varies_tells_tasks_apart_and_what_varies_anyway_does_not() -> None:
    """Of few records with many features: an eighth apart on an axis that is narrow, one beside forty others."""
    made = []
    for place, seed in ((0.0, 0), (0.12, 5)):
        some, held = (features({"picture": 0.0}, n, seed + n, ("picture",), 40) for n in (30, 60))
        for each in (some, held):
            each.x["picture"][:, 0] = 0.01 * each.x["picture"][:, 0] + place
            each.x["picture"][:, 1] *= 30.0
        made.append((some, held))
    labels = torch.zeros(30, dtype=torch.long)
    recognition = Recognition(("picture", "sound"), [traits_of(some, labels, 1, held) for some, held in made])

    assert found(recognition, made[0][1]) > 0.97
    assert found(recognition, made[1][1]) < 0.03


def test_a_record_far_from_all_is_of_none_and_one_a_little_off_is_not() -> None:
    recognition = Recognition(
        ("picture", "sound"), [task({"picture": 0.0}, 0, "picture"), task({"picture": 8.0}, 30, "picture")]
    )
    near = recognition(features({"picture": 0.2}, 100, 50, ("picture",)))
    far = recognition(features({"picture": -30.0}, 100, 60, ("picture",)))
    nothing = recognition(features({"sound": 0.0}, 3, 70, ("sound",)))

    assert float(near.known_BS[:, 0].float().mean()) > 0.95
    assert not bool(far.known_BS.any())
    assert not bool(nothing.known_BS.any())


def test_traits_that_were_kept_in_half_precision_can_still_be_compared() -> None:
    """Two features were nearly one: rounded, they vary less by themselves than together, which no features do."""
    made, given = [], []
    for place, seed in ((0.0, 0), (3.0, 40)):
        some, held, new = (features({"picture": place}, 60, seed + n, ("picture",)) for n in range(3))
        for each in (some, held, new):
            each.x["picture"][:, 1] = each.x["picture"][:, 0]
        traits = traits_of(some, torch.zeros(60, dtype=torch.long), 1, held)
        traits.scatter["picture"][[0, 1], [1, 0]] *= 1.02
        made.append(traits)
        given.append(new)
    recognition = Recognition(("picture", "sound"), made)

    assert found(recognition, given[0]) > 0.8
    assert found(recognition, given[1]) < 0.2
