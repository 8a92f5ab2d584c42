import numpy as np
import pytest

from dougong.core.errors import ConfigError
from dougong.data.likeness import Likeness


def test_texts_are_as_alike_as_the_share_of_words_that_they_have_in_common() -> None:
    # Numbers 0 to 4: the second "Red fox" is the first one again, and nothing is like nothing.
    alike = Likeness(["Red fox", "a red, RED cat", "Red fox", None, None, "dog"], "tags")

    found = alike(np.array([0, 1, 2, 3, 4]))

    np.testing.assert_allclose(found[0], [1.0, 0.25, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(found, found.T)
    np.testing.assert_allclose(np.diagonal(found), 1.0)
    assert found[2, 3] == 0.0
    np.testing.assert_array_equal(alike(np.array([1, 0])), found[[1, 0]][:, [1, 0]])
    assert alike(np.zeros(0, np.int64)).shape == (0, 0)


def test_lists_of_numbers_are_as_alike_as_their_cosine() -> None:
    alike = Likeness([[3.0, 4.0], [6.0, 8.0], [4.0, 3.0], [-3.0, -4.0], None], "vector")
    np.testing.assert_allclose(alike(np.arange(5))[0], [1.0, 1.0, 0.96, 0.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([1.0, 2.0], "column 'what' holds neither texts nor lists of numbers, so that two of its values are equal or"),
        ([None, None], "holds neither texts nor lists of numbers"),
        ([[1.0], [1.0, 2.0]], "column 'what' holds lists that are not of one length, or not of numbers alone"),
        ([["a", "b"], ["c", "d"]], "holds lists that are not of one length, or not of numbers alone"),
        ([[1.0, float("nan")]], "holds lists that are not of one length, or not of numbers alone"),
    ],
)
def test_what_cannot_be_compared_is_refused(cells: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Likeness(cells, "what")
