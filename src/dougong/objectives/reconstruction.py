"""How far a picture is from what it was made of.

Here        `reconstruction_loss`.
Elsewhere   making it (model/vq.py); dividing by the number of records, which only the trainer knows.
Promise     a sum over records, whether or not they share pictures.
"""

from __future__ import annotations

from torch import Tensor


def reconstruction_loss(
    made_UCHW: Tensor, true_UCHW: Tensor, strayed_U: Tensor, index_B: Tensor, *, commitment: float
) -> Tensor:
    """The sum of the records' losses, in float32. Shapes: U pictures; `index_B`: which of them each record has.

    Mean squared error of normalised pixels, and `commitment` times how far the encoder strayed from its codes (van den
    Oord et al. 2017, arXiv:1711.00937). An absolute error would spend most codes on shades of a plain ground.
    """
    off_UCHW = made_UCHW.float() - true_UCHW.float()
    loss_U = off_UCHW.square().mean(dim=(1, 2, 3))
    return (loss_U + commitment * strayed_U.float())[index_B].sum()
