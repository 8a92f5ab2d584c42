import torch

from dougong.core.signature import Signature, Target, TextInput
from dougong.engine.planner.shape import ModelShape, measure_shape, transformer_shape
from dougong.model.decoder import Decoder, DecoderConfig, ExpertsConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.objectives.generation import words_loss

WORDS = 96


def signature() -> Signature:
    return Signature(
        inputs={"words": TextInput(vocabulary_size=WORDS, max_tokens=32)},
        target=Target(name="named", task="single_label", labels=("a", "b")),
    )


def batch(num_records: int, num_words: int, device: str = "cpu") -> Batch:
    index_B = torch.arange(num_records, device=device)
    id_BN = torch.zeros(num_records, num_words, dtype=torch.long, device=device)
    values = {"ids_UT": id_BN, "mask_UT": torch.ones_like(id_BN, dtype=torch.bool)}
    words = MediaBatch(values, index_B, torch.ones_like(index_B, dtype=torch.bool))
    return Batch({"words": words}, torch.zeros_like(index_B))


def decoder(device: str = "cpu") -> Decoder:
    config = DecoderConfig(num_layers=3, experts=ExpertsConfig(num=4, num_chosen=2))
    with torch.device(device):
        return config.build(signature())


def shape_of(device: str, num_records: int = 4) -> ModelShape:
    model = decoder(device)
    return measure_shape(model, batch(num_records, 16, device), lambda output, _: words_loss(output))


def test_every_parameter_is_counted_once() -> None:
    model = decoder()
    shape = measure_shape(model, batch(4, 16))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert sum(part.experts for part in shape.parts) == 2 * 4 * 3 * 64 * 64
    assert shape.num_heads == 4
    assert shape.num_experts == 4
    assert shape.tokens_shared


def test_work_is_that_of_the_matrices() -> None:
    shape = shape_of("cpu")
    tokens = 4 * 16
    assert shape.head.flops == 2 * tokens * 64 * WORDS
    dense, routed = shape.blocks[0], shape.blocks[1]
    widths = 16 + 8  # of a head's query and key
    attention = 2 * tokens * (64 * 4 * widths + 64 * (32 + 8) + 32 * 4 * 32 + 4 * 16 * 64)
    scores = 2 * 4 * 4 * 16 * 16 * (widths + 16)
    assert dense.flops == attention + scores + 2 * tokens * 3 * 64 * 256
    assert routed.flops == attention + scores + 2 * tokens * (64 * 4 + 3 * 64 * 64 * (1 + 2))


def test_a_model_without_numbers_is_measured_as_one_with_them() -> None:
    real, unreal = shape_of("cpu"), shape_of("meta")
    for ours, theirs in zip(real.parts, unreal.parts, strict=True):
        assert theirs.flops == ours.flops
        assert theirs._replace(flops=0, kept=0, kept_whole=0, entered=0, touched=0) == ours._replace(
            flops=0, kept=0, kept_whole=0, entered=0, touched=0
        )


def test_activations_grow_with_the_records_and_are_those_that_autograd_keeps() -> None:
    small, large = shape_of("cpu", 4), shape_of("cpu", 8)
    for ours, theirs in zip(small.blocks, large.blocks, strict=True):
        assert 1.8 < (theirs.kept + theirs.kept_whole) / (ours.kept + ours.kept_whole) < 2.2
        assert ours.kept > 0
        assert ours.kept_whole > 0
        # What the attention's and the feed-forward's first layers are given, once each: 4 x 16 tokens of 64 numbers.
        assert ours.entered >= 4 * 16 * 64 * 4


def test_a_sandwich_is_measured_too() -> None:
    model = SandwichConfig(width=32).build(signature())
    shape = measure_shape(model, batch(4, 16))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert not shape.tokens_shared
    assert shape.num_experts == 0


def test_a_described_transformer_has_the_published_number_of_parameters() -> None:
    shape = transformer_shape(width=12288, num_layers=96, num_heads=96, vocabulary=51200, tokens=2048, records=1)
    assert 174e9 < shape.parameters < 177e9  # GPT-3's 175 billion, with two matrices of words
