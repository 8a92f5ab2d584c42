import pytest

from dougong.core.errors import ConfigError
from dougong.core.sizes import bytes_as_text, read_bytes, read_seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GiB", 80 * 2**30), ("16GB", 16e9), ("512 MiB", 2**29), ("1.5KiB", 1536), ("7B", 7), ("2kB", 2000)],
)
def test_sizes_are_read_as_people_write_them(text: str, count: float) -> None:
    assert read_bytes(text) == count


@pytest.mark.parametrize("text", ["80", "GiB", "80 gigs", "-1GiB", "1e9B", ""])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no number of bytes\. Write for example 80GiB"):
        read_bytes(text)


def test_the_largest_unit_is_shown() -> None:
    assert [bytes_as_text(n) for n in (512, 1536, 3 * 2**20, 1.5 * 2**30, 2**41)] == [
        "512 B",
        "1.5 KiB",
        "3 MiB",
        "1.5 GiB",
        "2 TiB",
    ]


@pytest.mark.parametrize(("text", "seconds"), [("5ms", 0.005), ("250 us", 0.00025), ("1.5s", 1.5), ("10min", 600.0)])
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert read_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", "ms", "-5ms", "0ms", "5 minutes", ""])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="Write for example 5ms"):
        read_seconds(text)
