import json
import random

import numpy as np
import torch

from dougong.engine.random_state import random_state, random_state_kept, restore_random_state, seed_all


def draw() -> list[float]:
    """From every source; one normal number of each generator that keeps the second of a pair."""
    return [
        *torch.rand(3).tolist(),
        torch.randn(1).item(),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
    ]


def test_a_state_that_went_through_json_draws_the_same_numbers() -> None:
    seed_all(3)
    draw()
    state = json.loads(json.dumps(random_state()))
    want = draw()
    draw()

    restore_random_state(state)

    assert draw() == want


def test_one_seed_gives_one_sequence_and_another_seed_another() -> None:
    seed_all(2**62 + 1)  # more than NumPy's generator takes
    first = draw()
    seed_all(2**62 + 1)
    again = draw()
    seed_all(2**62 + 2)
    other = draw()

    assert first == again
    assert not set(first) & set(other)


def test_what_is_drawn_inside_leaves_no_trace() -> None:
    seed_all(3)
    want = draw()
    seed_all(3)

    with random_state_kept():
        draw()
        seed_all(99)

    assert draw() == want
