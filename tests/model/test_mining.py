import torch

from dougong.model.mining import hard_negatives


def test_a_partner_is_never_drawn_and_the_nearest_is_drawn_most() -> None:
    torch.manual_seed(0)
    score_UV = torch.tensor([[9.0, 2.0, 1.0, -30.0]]).repeat(4000, 1)
    pair_UV = torch.tensor([[True, False, False, False]]).repeat(4000, 1)

    mined = hard_negatives(score_UV, pair_UV)

    shares = torch.bincount(mined.chosen_U, minlength=4) / 4000
    assert shares[0] == 0
    assert mined.known_U.all()
    want = torch.tensor([2.0, 1.0, -30.0]).softmax(dim=0)
    torch.testing.assert_close(shares[1:], want, atol=0.03, rtol=0)


def test_where_all_are_partners_it_is_said() -> None:
    mined = hard_negatives(torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]))
    assert mined.known_U.tolist() == [False, True]
    assert mined.chosen_U[1] == 1
