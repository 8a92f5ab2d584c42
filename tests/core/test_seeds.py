from dougong.core.seeds import derive_seed


def test_a_seed_is_the_same_everywhere_and_differs_by_purpose() -> None:
    assert derive_seed(0, "order", 1) == derive_seed(0, "order", 1)
    purposes = [(0, "order", 1), (0, "order", 11), (1, "order", 1), (0, "order1"), (0, "model")]
    assert len({derive_seed(root, *names) for root, *names in purposes}) == len(purposes)
    assert 0 <= derive_seed(3, "x") < 2**63
