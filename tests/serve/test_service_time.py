import random

import pytest

from dougong.serve.service_time import ServiceTime, Shape, length_step

PLAIN = Shape()


def test_the_line_is_found_from_batches_of_mixed_sizes() -> None:
    dice, service = random.Random(0), ServiceTime()
    for _ in range(100):
        number = dice.randint(1, 32)
        service.observe({PLAIN: number}, (0.004 + 0.0001 * number) * dice.lognormvariate(0, 0.03))

    for number in (1, 8, 32):
        assert service.seconds({PLAIN: number}) == pytest.approx(0.004 + 0.0001 * number, rel=0.05)
    assert service.fixed_seconds == pytest.approx(0.004, rel=0.1)
    assert service.deviation < 0.06


@pytest.mark.parametrize("seed", range(3))
def test_batches_of_one_that_tell_little_lead_nowhere_else(seed: int) -> None:
    """A light load of eight shapes, two of them rare: nearly all batches are of one record, some were held up."""
    dice, service = random.Random(seed), ServiceTime()
    shapes = [Shape((f"column {place}",)) for place in range(8)]
    foretold: list[float] = []
    for place in range(4000):
        counts: dict[Shape, int] = {}
        for _ in range(1 if dice.random() < 0.95 else 2):
            (shape,) = dice.choices(shapes, [1.0] * 6 + [0.2] * 2)
            counts[shape] = counts.get(shape, 0) + 1
        held_up = 8.0 if dice.random() < 0.01 else 1.0
        if place > 500:
            foretold.append(service.seconds({dice.choice(shapes): 1}) / 0.004)
        service.observe(counts, (0.003 + 0.001 * sum(counts.values())) * dice.lognormvariate(0, 0.3) * held_up)

    foretold.sort()
    assert foretold[len(foretold) // 2] == pytest.approx(1.0, abs=0.1)
    assert foretold[int(0.99 * len(foretold))] < 2.0
    assert foretold[-1] < 12.0  # just after one that was held up


def test_another_service_is_learnt_within_a_hundred_batches() -> None:
    dice, service = random.Random(0), ServiceTime()
    for fixed, item in ((0.004, 0.0001), (0.012, 0.001)):
        for _ in range(100):
            number = dice.randint(1, 32)
            service.observe({PLAIN: number}, fixed + item * number)

    assert service.seconds({PLAIN: 16}) == pytest.approx(0.028, rel=0.1)


def test_bends_of_the_line_are_learnt() -> None:
    dice, service = random.Random(0), ServiceTime()

    def true(number: int) -> float:
        return 0.002 if number < 8 else 0.010

    for _ in range(400):
        number = dice.randint(1, 31)
        service.observe({PLAIN: number}, true(number))

    assert service.seconds({PLAIN: 4}) < 0.004
    assert service.seconds({PLAIN: 20}) == pytest.approx(0.010, rel=0.25)


def test_each_shape_has_its_cost_and_short_ones_are_padded_beside_long_ones() -> None:
    dice, service = random.Random(0), ServiceTime()
    short, long, blind = Shape(("image", "text"), 4), Shape(("image", "text"), 8), Shape(("image",), 0)
    cost = {short: 0.001, long: 0.004, blind: 0.0005}
    for _ in range(300):
        shape, number = dice.choice([short, long, blind]), dice.randint(1, 16)
        service.observe({shape: number}, 0.003 + cost[shape] * number)

    for shape, item in cost.items():
        assert service.item_seconds(shape) == pytest.approx(item, rel=0.1)
    assert service.seconds({short: 4, long: 4}) == pytest.approx(0.003 + 8 * 0.004, rel=0.15)
    assert service.seconds({blind: 4, long: 4}) == pytest.approx(0.003 + 4 * 0.004 + 4 * 0.0005, rel=0.15)


def test_a_pause_of_the_machine_does_not_change_the_line_much() -> None:
    service = ServiceTime()
    for number in (1, 2, 4, 8, 16, 32) * 10:
        service.observe({PLAIN: number}, 0.004 + 0.0001 * number)

    service.observe({PLAIN: 8}, 2.0)

    assert service.seconds({PLAIN: 8}) < 0.03


def test_what_is_not_met_for_long_is_still_known() -> None:
    service, rare, common = ServiceTime(), Shape(("audio",)), Shape(("text",))
    for number in (1, 2, 4, 8) * 10:
        service.observe({rare: number}, 0.002 + 0.01 * number)
        service.observe({common: number}, 0.002 + 0.001 * number)
    for number in (1, 2, 4, 8) * 500:
        service.observe({common: number}, 0.002 + 0.001 * number)

    assert service.seconds({rare: 4}) == pytest.approx(0.042, rel=0.2)


def test_lengths_are_told_apart_by_half_octaves() -> None:
    steps = [length_step(length) for length in (0, 1, 1.5, 2, 100, 140, 200)]

    assert steps == sorted(steps)
    assert length_step(0) == 0
    assert length_step(100) < length_step(200)
    assert length_step(100) == length_step(105)
