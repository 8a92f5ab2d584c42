"""What a model asks of the devices it is spread over, block by block.

Here        BlockShape, ModelShape; `measure_shape` of any BlockStack, `transformer_shape` of one that is described;
            `skeleton`, a model without its numbers.
Elsewhere   devices (cluster.py); what a step costs (predict.py).
Promise     measured, not guessed: floating-point operations, parameters, kept activations and passed states are counted
            while the model runs once, on a real batch, or on torch's meta device, where nothing is computed and a model
            of any size can be measured on a laptop.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dougong.engine.parallel.parcel import pack
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack
from dougong.nn.experts import Experts
from dougong.nn.split import splits_of


class BlockShape(NamedTuple):
    """One block, with one micro-batch. Bytes are of float32 unless the run's precision halves them."""

    flops: float
    """Of matrix products, forward."""

    touched: float
    """Bytes that are read and written between matrix products, forward."""

    scores: float
    """The same of attention scores, where they are written out."""

    cut: int
    """Parameters that tensor ranks share out."""

    experts: int
    """Parameters of routed experts, which tensor and expert ranks share out."""

    whole: int
    """Parameters that every rank of the tensor axis has."""

    kept: float
    """Bytes of activations that the backward needs and that tensor ranks share out."""

    kept_whole: float
    """The same that every rank of the tensor axis has, unless tokens are shared out."""

    exchanged: float
    """Bytes that tensor ranks add up, forward."""

    passed: float
    """Bytes of the state after it."""

    entered: float = 0.0
    """Bytes of activations that every rank of the tensor axis has, even where tokens are shared out: what layers that
    are cut by their outputs are given."""

    products: float = 0.0
    """Bytes of what comes of products, convolutions and attention, as far as tensor ranks share it out."""

    products_whole: float = 0.0
    """The same that every rank of the tensor axis has, unless tokens are shared out."""

    @property
    def parameters(self) -> int:
        return self.cut + self.experts + self.whole

    def times(self, ratio: float) -> BlockShape:
        """The same with so many times the records."""
        return self._replace(
            flops=self.flops * ratio,
            touched=self.touched * ratio,
            scores=self.scores * ratio,
            kept=self.kept * ratio,
            kept_whole=self.kept_whole * ratio,
            exchanged=self.exchanged * ratio,
            passed=self.passed * ratio,
            entered=self.entered * ratio,
            products=self.products * ratio,
            products_whole=self.products_whole * ratio,
        )


class ModelShape(NamedTuple):
    """A model, with one micro-batch of so many records."""

    embed: BlockShape
    blocks: tuple[BlockShape, ...]
    head: BlockShape
    num_records: float
    """On average: ranks may share out a batch unevenly."""

    num_heads: int
    """By what the tensor axis can be divided."""

    num_experts: int
    """By what the expert axis can be; 0: there are none."""

    tokens_shared: bool
    """Whether tensor ranks can share out the tokens between layers."""

    def of_records(self, count: float) -> ModelShape:
        """The same with a micro-batch of another size."""
        ratio = count / self.num_records
        return self._replace(
            embed=self.embed.times(ratio),
            blocks=tuple(block.times(ratio) for block in self.blocks),
            head=self.head.times(ratio),
            num_records=count,
        )

    @property
    def parts(self) -> tuple[BlockShape, ...]:
        """All of it, in order."""
        return (self.embed, *self.blocks, self.head)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)


def measure_shape(
    model: BlockStack[Any, Any], batch: Batch, loss: Callable[[Any, Batch], Tensor] | None = None
) -> ModelShape:
    """Run the model once, forward, and count. Random states and buffers are changed."""
    cut, experts = _cut_parameters(model)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    shapes: list[BlockShape] = []
    state: Any = batch
    for part, modules in _parts(model):
        own = {p for module in modules for p in module.parameters()}
        if part == model.head:
            own |= set(model.parameters(recurse=False))
        with FlopCounterMode(display=False) as counter, _counting(modules, weights) as counted, _Products(counted):
            state = part(state)
            if part == model.head and loss is not None:
                loss(state, batch)
        kept = counted.kept.values()
        shapes.append(
            BlockShape(
                flops=float(counter.get_total_flops()),
                touched=2.0 * sum(size for size, _ in kept),
                scores=0.0,
                cut=sum(p.numel() for p in own & cut),
                experts=sum(p.numel() for p in own & experts),
                whole=sum(p.numel() for p in own - cut - experts),
                kept=sum(size for size, where in kept if where == "shared out"),
                kept_whole=sum(size for size, where in kept if where == "whole"),
                entered=sum(size for size, where in kept if where == "entering"),
                products=counted.products,
                products_whole=counted.products_whole,
                exchanged=counted.exchanged,
                passed=float(sum(t.nbytes for t in pack(state).tensors)) if part != model.head else 0.0,
            )
        )
    heads, num_experts = _divisors(model)
    return ModelShape(
        shapes[0], tuple(shapes[1:-1]), shapes[-1], batch.num_records, heads, num_experts, len(model.token_blocks) > 0
    )


def transformer_shape(
    *, width: int, num_layers: int, num_heads: int, vocabulary: int, tokens: int, records: int, bytes_each: int = 2
) -> ModelShape:
    """A plain transformer with feed-forwards of four times its width, as the published runs are of.

    Shapes and counts after Narayanan et al. 2021 (arXiv:2104.04473) and Korthikanti et al. 2022 (arXiv:2205.05198):
    a layer has 12 D^2 parameters and does 24 N D^2 + 4 N T D operations, N tokens in records of T; of its activations,
    34 N D bytes and 5 N T H of scores at 2 bytes a number, 10 N D of them on every tensor rank.
    """
    num = float(tokens * records)
    layer = BlockShape(
        flops=24 * num * width**2 + 4 * num * tokens * width,
        touched=num * width,
        scores=num * tokens * num_heads,
        cut=12 * width**2,
        experts=0,
        whole=13 * width,
        kept=(24 * num * width + 5 * num * tokens * num_heads) * bytes_each / 2,
        kept_whole=10 * num * width * bytes_each / 2,
        exchanged=2 * num * width * bytes_each,
        passed=num * width * bytes_each,
        products=8 * num * width * bytes_each,  # queries, keys, values, what attention gives, four times the width
        products_whole=2 * num * width * bytes_each,
    )
    nothing = BlockShape(0, 0, 0, 0, 0, 0, 0, 0, 0, num * width * bytes_each)
    embed = nothing._replace(cut=vocabulary * width)
    head = nothing._replace(flops=2 * num * width * vocabulary, kept=4 * num * vocabulary, passed=0)
    return ModelShape(embed, (layer,) * num_layers, head, records, num_heads, 0, True)


def llama_70b(*, tokens: int = 4096, records: int = 1) -> ModelShape:
    """A decoder of 70 B parameters (Touvron et al. 2023, arXiv:2307.09288: 80 layers of 8192, 64 heads on 8 of keys
    and values, feed-forwards of 28672), in 16-bit numbers, without scores, which a fused kernel keeps on the chip.

    Counted as above: of a layer's activations, those of two norms, queries, keys and values, what attention gives,
    and of a gated feed-forward its three inner vectors and what goes in, at 2 bytes.
    """
    width, hidden, keys = 8192, 28672, 1024
    num = float(tokens * records)
    cut = 2 * width * width + 2 * width * keys + 3 * width * hidden
    inner = width + 2 * keys + width + 3 * hidden
    layer = BlockShape(
        flops=2 * num * cut + 4 * num * tokens * width / 2,
        touched=num * (6 * width + inner),
        scores=0.0,
        cut=cut,
        experts=0,
        whole=2 * width,
        kept=2 * num * inner,
        kept_whole=2 * num * 4 * width,
        exchanged=2 * num * width * 2,
        passed=2 * num * width,
        products=2 * num * (inner - hidden),  # not the gate's product with the other half
        products_whole=2 * num * 2 * width,
    )
    nothing = BlockShape(0, 0, 0, 0, 0, 0, 0, 0, 0, 2 * num * width)
    head = nothing._replace(cut=32000 * width, flops=2 * num * width * 32000, kept=4 * num * 32000, passed=0)
    return ModelShape(nothing._replace(cut=32000 * width), (layer,) * 80, head, records, 8, 0, True)


SHAPES: Final[dict[str, Callable[[], ModelShape]]] = {"llama-70b": llama_70b}
"""Models that are known by their sizes alone, too large to be built for being measured."""


def skeleton(model: nn.Module) -> nn.Module:
    """The same modules with tensors that have shapes and types and take no memory; what is tied stays tied."""
    memo: dict[int, Any] = {}
    for each in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(each, device="meta", requires_grad=False)
        memo[id(each)] = nn.Parameter(empty, each.requires_grad) if isinstance(each, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _parts(model: BlockStack[Any, Any]) -> Iterator[tuple[Callable[[Any], Any], list[nn.Module]]]:
    children = dict(model.named_children())
    embedding = model.embed_names or ()
    yield model.embed, [children[name] for name in embedding if name in children]
    for block in model.blocks:
        yield block, [block]
    yield model.head, [child for name, child in children.items() if name not in (*embedding, "blocks")]


def _cut_parameters(model: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    cut: set[nn.Parameter] = set()
    for _, module, split in splits_of(model):
        for name in (*split.columns, *split.vocabulary):
            cut |= set(module.get_submodule(name).parameters())
        cut |= {module.get_parameter(f"{name}.weight") for name in split.rows}
        cut |= {module.get_parameter(name) for name, _ in split.pieces}
    experts = {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    return cut - experts, experts


def _divisors(model: nn.Module) -> tuple[int, int]:
    """By what heads, and experts, can be shared out."""
    heads: list[int] = []
    for _, module, split in splits_of(model):
        for name in split.counts:
            *path, last = name.split(".")
            heads.append(getattr(module.get_submodule(".".join(path)), last))
    experts = [module.num_experts for module in model.modules() if isinstance(module, Experts)]
    return math.gcd(*heads) if heads else 1, math.gcd(*experts) if experts else 0


class _Counted:
    """What was counted while a part of a model ran."""

    def __init__(self) -> None:
        self.exchanged = 0.0
        self.products = 0.0
        self.products_whole = 0.0
        self.kept: dict[int, tuple[float, str]] = {}
        """By storage: bytes, and where the model was when they were kept."""

        self.adding_up = False
        """In a layer of rows, what comes of which every rank has."""

        self.where = "whole"
        """shared out: between columns and rows, where each rank of the tensor axis has its part."""

    def entering(self, *_: Any) -> None:
        self.where = "entering"

    def enter(self, *_: Any) -> None:
        self.where = "shared out"

    def leaving(self, *_: Any) -> None:
        self.adding_up = True

    def multiplied(self, num_bytes: float) -> None:
        """A product has given so much."""
        if self.where == "whole" or self.adding_up:
            self.products_whole += num_bytes
        else:
            self.products += num_bytes

    def leave(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.where, self.adding_up = "whole", False
        self.exchanged += output.nbytes

    def keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.kept.setdefault(storage._cdata, (float(storage.nbytes()), self.where))


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what products, convolutions and attention give."""

    def __init__(self, counted: _Counted) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self._counted.multiplied(sum(each.nbytes for each in tree_leaves(made) if isinstance(each, Tensor)))
        return made


@contextlib.contextmanager
def _counting(modules: list[nn.Module], weights: set[int]) -> Iterator[_Counted]:
    """Count what autograd keeps for the backward, each storage once, weights left out; and what tensor ranks add up."""
    counted = _Counted()
    handles = []
    for module in modules:
        for _, owner, split in splits_of(module):
            for name in split.columns:
                handles.append(owner.get_submodule(name).register_forward_pre_hook(counted.entering))
            for name in (*split.columns, *split.shared, *split.vocabulary):
                handles.append(owner.get_submodule(name).register_forward_hook(counted.enter))
            for name in split.rows:
                handles.append(owner.get_submodule(name).register_forward_pre_hook(counted.leaving))
            for name in (*split.rows, *split.summed):
                handles.append(owner.get_submodule(name).register_forward_hook(counted.leave))

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            counted.keep(tensor)
        return tensor

    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield counted
    finally:
        for handle in handles:
            handle.remove()
