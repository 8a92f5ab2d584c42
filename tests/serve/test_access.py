import hashlib

import pytest

from dougong.serve import fetching
from dougong.serve.access import Access, key_of
from dougong.serve.columns import BadRequest
from dougong.serve.settings import KeyConfig


def access(**settings: float) -> Access:
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two")}
    return Access([KeyConfig(name=name, sha256=digest, **settings) for name, digest in sums.items()])  # type: ignore[arg-type]


def test_a_key_is_its_caller_and_nothing_else_is() -> None:
    known = access()

    caller = known.caller(b"two", "10.0.0.1")
    assert caller is not None
    assert (caller.name, caller.admin) == ("two", False)
    for key in (None, b"", b"three", hashlib.sha256(b"two").hexdigest().encode()):
        assert known.caller(key, "10.0.0.1") is None


def test_a_caller_has_its_rate_and_another_its_own() -> None:
    known = access(per_second=10.0, burst=2)
    one, two = known.caller(b"one", ""), known.caller(b"two", "")
    assert one is not None
    assert two is not None

    assert [known.wait_seconds(one, 100.0) for _ in range(2)] == [0.0, 0.0]
    assert known.wait_seconds(one, 100.0) == pytest.approx(0.1)
    assert known.wait_seconds(two, 100.0) == 0.0
    assert known.wait_seconds(one, 100.11) == 0.0
    assert known.wait_seconds(one, 100.12) > 0


def test_where_a_key_stands() -> None:
    assert key_of(b"Bearer  abc", None) == b"abc"
    assert key_of(b"Basic abc", None) is None
    assert key_of(b"Bearer abc", b"xyz") == b"xyz"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png",
        "file:///etc/passwd",
        "http://user@good.example/a",
        "http://good.example:x/a",
        "gopher://good.example/",
    ],
)
def test_only_named_hosts_are_fetched_from(url: str) -> None:
    with pytest.raises(BadRequest, match="host|port"):
        fetching._fetch(url, frozenset({"good.example"}), 100)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "0.0.0.0", "fd00::1"])
def test_a_name_that_leads_home_is_not_fetched(address: str) -> None:
    with pytest.raises(BadRequest, match="no public address"):
        fetching.public_address(address, 80)
