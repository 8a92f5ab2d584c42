"""Parts of sequences: what each rank has of them, what it keeps for the way back, and what is refused."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dougong.core.errors import ConfigError
from dougong.core.signature import Signature, Target, TextInput
from dougong.engine.parallel.context import Form, SharedContext, check_context
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.prepare import prepare_model
from dougong.engine.step import Moved
from dougong.model.decoder import Decoder, DecoderConfig, DecoderOutput
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.objectives.generation import words_loss

WORDS = 31
FORMS: tuple[Form, ...] = ("gather", "swap")


def signature() -> Signature:
    target = Target(name="named", task="single_label", labels=("a", "b"))
    return Signature(inputs={"words": TextInput(vocabulary_size=WORDS, max_tokens=16)}, target=target)


def decoder(num_further: int = 1) -> Decoder:
    torch.manual_seed(0)
    return DecoderConfig(num_layers=2, num_heads=4, num_further=num_further).build(signature())


def batch(lengths: list[int]) -> Batch:
    """Records of so many words; the shorter ones are filled up."""
    id_BN = torch.randint(WORDS, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask_BN = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    every_B = torch.arange(len(lengths))
    media = MediaBatch({"ids_UT": id_BN, "mask_UT": mask_BN}, every_B, torch.ones_like(every_B).bool())
    return Batch({"words": media}, None)


def held(blocks: int, num: int) -> list[int]:
    group = dist.group.WORLD
    assert group is not None
    context = SharedContext(group, "gather", blocks)
    return [place for run in context.here(context.padded(num)) for place in run]


@pytest.mark.slow
def test_ranks_share_all_tokens_out_and_each_has_as_much_to_look_at() -> None:
    for blocks in (1, 3):
        found = run_ranks(held, blocks, 50, world=4)
        whole = sorted(place for each in found for place in each)
        assert whole == list(range(len(whole)))
        assert 50 <= len(whole) < 50 + 8 * blocks
        assert len({sum(each) for each in found}) == 1


def answered(form: Form, lengths: list[int], training: bool) -> tuple[DecoderOutput, float]:
    model = decoder().train(training)
    layout = prepare_model(model, PlanConfig(context=4, context_form=form), Ranks(dist.group.WORLD))
    output = model(batch(lengths))
    loss = words_loss(output)
    loss.backward()  # type: ignore[no-untyped-call]
    reduced = layout.reduce(loss.detach(), [Moved(buffer, buffer.clone()) for buffer in model.buffers()])
    return _detached(output), reduced.grad_norm.item()


def _detached(output: DecoderOutput) -> DecoderOutput:
    further = tuple((loss_BN.detach(), due_BN) for loss_BN, due_BN in output.further)
    return DecoderOutput(output.score_BNV.detach(), output.loss_BN.detach(), output.due_BN, further)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [[13, 9, 4], [16], [1], [1, 2]])
def test_every_rank_gets_the_whole_answer_whatever_the_length(form: Form, lengths: list[int]) -> None:
    for training in (False, True):
        model = decoder().train(training)
        expected = model(batch(lengths))
        words_loss(expected).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        real_BN = batch(lengths).media["words"].values["mask_UT"]
        for found, found_norm in run_ranks(answered, form, lengths, training, world=4):
            pairs = [(found.loss_BN, expected.loss_BN, expected.due_BN)]
            pairs += [(f, e, due) for (f, _), (e, due) in zip(found.further, expected.further, strict=True)]
            if not training:
                pairs.append((found.score_BNV, expected.score_BNV, real_BN))
            for got, want, counts in pairs:
                assert got.shape == want.shape
                torch.testing.assert_close(got[counts], want[counts], atol=1e-5, rtol=0)
            assert found_norm == pytest.approx(norm.item(), rel=1e-4, abs=1e-6)


def kept_bytes(form: Form | None, num_words: int) -> int:
    """What a rank keeps of activations for the way back, each tensor once."""
    model = decoder(num_further=0)
    if form is not None:
        prepare_model(model, PlanConfig(context=4, context_form=form), Ranks(dist.group.WORLD))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        words_loss(model(batch([num_words] * 2)))
    return sum(kept.values())


def test_a_rank_keeps_its_part_of_the_activations() -> None:
    alone = kept_bytes(None, 256)
    for form in FORMS:
        # Latents and embeddings of all tokens, beside a quarter of all else.
        assert max(run_ranks(kept_bytes, form, 256, world=4)) < 0.35 * alone


def test_what_cannot_be_shared_out_is_refused() -> None:
    sandwich: Any = SandwichConfig(width=32).build(signature())
    with pytest.raises(ConfigError, match="context=2: Sandwich does not say where its tokens can be shared out. Use c"):
        check_context(sandwich, 2, "gather")
    check_context(sandwich, 1, "gather")
    with pytest.raises(ConfigError, match="context=4, tensor=2 with context_form=swap cannot share out 4 heads"):
        check_context(decoder(), 4, "swap", 2)
    check_context(decoder(), 2, "swap", 2)
    check_context(decoder(), 4, "gather", 2)
