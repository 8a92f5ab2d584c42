"""One causal decoder that writes words about pictures and pictures about words.

Here        WriterConfig, Writer (a BlockStack), its state and output, writing token by token; CompleteBlock.
Elsewhere   the encoders it reads with (encoders/, by way of sandwich.py's blocks); completing (completion.py); a
            picture's codes (vq.py); choosing among scores (sampling.py); the losses (objectives/generation.py,
            objectives/missing.py, objectives/contrastive.py).
Promise     a token depends on what it is about and on what was written before it, never on what comes after; writing
            with a cache scores within 1e-5 of reading the whole at once; a record whose condition was dropped, or is
            absent, is written as if there were none, and nothing is completed for it.

What a record is about comes from the modality's encoder, as tokens before the first one written. Words and codes share
one vocabulary, the layers and the head; scores are of the words where words are due, and of the codes where codes are.
With `completion`, what the other modality's encoder would say of the content is made from what is given, and stands,
marked, between the two: the decoder then writes the missing modality from what is given and from what was completed.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Generator, Tensor, nn

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, Signature, TextInput
from dougong.model.completion import CompletionConfig, parts
from dougong.model.dual import VectorBlock
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.heads import ContrastiveHead, LearntTemperature
from dougong.model.reading import ReadBlock, and_tokens, nothing_read, num_media
from dougong.model.sampling import SamplingConfig, choose, guided
from dougong.model.sandwich import EncoderBlock, FinishBlock, SandwichState
from dougong.model.vq import PictureTokenizer, TokenizerConfig
from dougong.nn.attention import check_heads
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.nn.causal import Cache, CausalLayer
from dougong.nn.modules_by_name import ModulesByName
from dougong.nn.start import keep_variance

Direction = Literal["caption", "draw"]
"""caption: a picture is given, words are written. draw: words are given, a picture is written."""

DIRECTIONS: Final[tuple[Direction, ...]] = ("caption", "draw")

# Beside words and codes: what begins each, and whether anything is given.
BEGIN_WORDS, BEGIN_PICTURE, GIVEN, NOTHING_GIVEN = range(4)


class WriterConfig(Config):
    """The decoder, and the encoders before it."""

    directions: tuple[Direction, ...] = DIRECTIONS
    """What is learnt. With both, the records of a training batch take turns, so a step costs no more."""

    width: int = Field(default=96, gt=0)
    """Channels of every token (D)."""

    num_layers: int = Field(default=3, gt=0)
    num_heads: int = Field(default=4, gt=0)
    feedforward_ratio: float = Field(default=4.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the decoder's activations and attention weights that training leaves out."""

    image_encoder: ImageEncoderConfig = ImageEncoderConfig(
        width=96, num_layers=1, num_heads=4, feedforward_ratio=2.0, stem="convolution", pool=2
    )
    text_encoder: TextEncoderConfig = TextEncoderConfig(width=96, num_layers=1, num_heads=4, feedforward_ratio=2.0)

    align: bool = False
    """Each modality gets a vector besides, for a contrastive loss to draw pictures and their words together."""

    temperature: float = Field(default=0.07, ge=0.01, le=1.0)
    """align: what divides the vectors' similarities, at the start."""

    learn_temperature: bool = True
    """align: else it stays as it is."""

    completion: CompletionConfig | None = None
    """What the encoder of the other modality would say of what is to be written is completed from what is given, and
    read beside it. None: what is given is all that is read."""

    condition_dropped: float = Field(default=0.1, ge=0, lt=1)
    """Share of training records that are written without being told about what; guidance needs some."""

    tokenizer: TokenizerConfig = TokenizerConfig()

    end_of_words: int = Field(default=3, ge=0)
    """The token id that ends a text; a recipe takes it from the tokenizer."""

    @field_validator("directions")
    @classmethod
    def _some_direction(cls, directions: tuple[Direction, ...]) -> tuple[Direction, ...]:
        if not directions or len(set(directions)) != len(directions):
            raise ValueError(f"{list(directions)} must name caption, draw or both, each once.")
        return directions

    @model_validator(mode="after")
    def _whole_heads(self) -> WriterConfig:
        check_heads("num_heads", self.num_heads, self.width)
        if self.completion is not None:
            check_heads("completion.num_heads", self.completion.num_heads, self.width)
        return self

    @model_validator(mode="after")
    def _both_encoders_taught(self) -> WriterConfig:
        if self.completion is not None and len(self.directions) < 2 and not self.align:
            raise ValueError(
                f"completion makes what the other encoder would say, and with directions={list(self.directions)} and "
                "align=false nothing teaches that encoder. Use both directions, align: true, or leave completion out."
            )
        return self

    @model_validator(mode="after")
    def _something_to_divide(self) -> WriterConfig:
        for name in ("temperature", "learn_temperature"):
            given = getattr(self, name)
            if not self.align and given != WriterConfig.model_fields[name].default:
                raise ValueError(
                    f"{name}={given} cannot take effect with align=false, which draws no vectors together. "
                    "Use align: true, or leave it out."
                )
        return self

    def build(self, signature: Signature, tokenizer: PictureTokenizer | None = None) -> Writer:
        """The model for these inputs; draws its weights from torch's generator. Without `tokenizer`, its is random.

        Raises:
            ConfigError: the inputs are not one picture and one text.
        """
        return Writer(self, signature, tokenizer)


class Completed(NamedTuple):
    """What was completed of the content of some records.

    Shapes: R records, U distinct media of the content, K tokens, D channels.
    """

    made_RKD: Tensor
    """Unmarked; zero where nothing was made."""

    made_R: Tensor
    """For which records it was made: those that are told what they are about."""

    truth_UKD: Tensor | None
    """What it should have been, of each medium; without a gradient. None: the batch has no medium of it."""


class Stream(NamedTuple):
    """What is written about some of the batch's records. Shapes: R records, T tokens, N of them written, D channels."""

    x_RTD: Tensor
    """What stands before each token to be written; after the join, what is given comes first."""

    mask_RT: Tensor
    target_RN: Tensor
    """Ids of words, or codes."""

    due_RN: Tensor
    """Which of them count."""

    medium_R: Tensor
    """Which of the encoded media each record is about."""

    given_R: Tensor
    """Whether it is told."""

    row_R: Tensor
    """Which of the batch's records these are."""

    completed: Completed | None = None
    """None: the model completes nothing, or nothing is given to any record."""


class WriterState(NamedTuple):
    """What walks through the blocks."""

    read: SandwichState
    """What is given, on its way through the encoders."""

    streams: dict[Direction, Stream]
    """By direction."""


class Written(NamedTuple):
    """Shapes: R records, N tokens, V words or codes."""

    score_RNV: Tensor
    target_RN: Tensor
    due_RN: Tensor
    row_R: Tensor
    completed: Completed | None = None


class WriterOutput(NamedTuple):
    """What a loss needs."""

    written: dict[Direction, Written]
    """By direction."""

    aligned: dict[str, Tensor]
    """(U, D) by modality: with `align`, vectors of length 1 of the batch's distinct media."""

    temperature: Tensor | float
    """What divides their similarities."""


class Writer(BlockStack[WriterState, WriterOutput]):
    """Shapes: B records, R of them in a stream, U distinct media, T tokens, P cells, D channels, V words or codes."""

    state_types = (WriterState, SandwichState, Stream, Completed)

    def __init__(self, config: WriterConfig, signature: Signature, tokenizer: PictureTokenizer | None) -> None:
        super().__init__()
        self.picture, image = _only(signature, ImageInput)
        self.words, text = _only(signature, TextInput)
        self.given: dict[Direction, str] = {"caption": self.picture, "draw": self.words}
        """What each direction is told."""
        self.content: dict[Direction, str] = {"caption": self.words, "draw": self.picture}
        """What each direction writes."""
        if config.end_of_words >= text.vocabulary_size:
            raise ConfigError(
                f"model.end_of_words={config.end_of_words} is no word: there are {text.vocabulary_size}. "
                "Give the id of the token that ends a text."
            )
        if tokenizer is None:
            tokenizer = config.tokenizer.build(image)
        self.tokenizer = tokenizer.requires_grad_(False).eval()

        self.reads_both = config.align or config.completion is not None
        """Whether what is to be written is encoded too, beside what is given."""
        embedders: dict[str, nn.Module] = {}
        blocks: list[nn.Module] = []
        resolved: dict[str, Config] = {}
        for kind, name, shape, encoder_config in (
            ("image_encoder", self.picture, image, config.image_encoder),
            ("text_encoder", self.words, text, config.text_encoder),
        ):
            if not self.reads_both and name not in [self.given[direction] for direction in config.directions]:
                continue
            encoder = encoder_config.build(shape)
            resolved[kind] = encoder.resolved()
            embedders[name] = encoder.stem
            blocks += [ReadBlock(EncoderBlock(name, layer)) for layer in encoder.layers]
            blocks.append(ReadBlock(FinishBlock(name, encoder.tail, encoder.width, config.width)))
            if config.align:
                blocks.append(ReadBlock(VectorBlock(name, ContrastiveHead(config.width))))
        self.embedders = ModulesByName(embedders)
        self.temperature: LearntTemperature | None = None
        if config.align and config.learn_temperature:
            self.temperature = LearntTemperature(config.temperature)

        width = config.width
        self.num_words, num_codes = text.vocabulary_size, config.tokenizer.num_codes
        self.num_cells = self.tokenizer.grid[0] * self.tokenizer.grid[1]
        self.most_words = text.max_tokens - 1
        """Of a caption, the end included: a text begins with a token that is never written."""
        self.vocabulary = nn.Embedding(self.num_words + num_codes, width)
        self.marks = nn.Embedding(4, width)
        self.word_place = nn.Embedding(self.most_words, width)
        self.cell_row = nn.Embedding(self.tokenizer.grid[0], width)
        self.cell_column = nn.Embedding(self.tokenizer.grid[1], width)
        # What stands above the cell to be written, and right of that: with the code before it, all that touches it.
        self.above = nn.Embedding(num_codes, width)
        self.above_right = nn.Embedding(num_codes, width)
        embeddings = (self.vocabulary, self.marks, self.word_place, self.cell_row, self.cell_column)
        for embedding in (*embeddings, self.above, self.above_right):
            nn.init.normal_(embedding.weight, std=0.3)
        if config.completion is not None:
            blocks.append(CompleteBlock(config.completion, config.directions, self.given, self.content, width))
        blocks.append(JoinStreams(self.marks, self.given))
        self.layers = [
            CausalLayer(
                width=width,
                num_heads=config.num_heads,
                feedforward_ratio=config.feedforward_ratio,
                dropout=config.dropout,
            )
            for _ in range(config.num_layers)
        ]
        blocks += [WriteBlock(layer) for layer in self.layers]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.out = keep_variance(nn.Linear(width, self.num_words + num_codes))
        self.config = config.model_copy(update=resolved)
        """What rebuilds this model without any pretrained folder."""

    def train(self, mode: bool = True) -> Writer:
        """The picture tokenizer stays as it was trained."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Each encoder, with its way to the shared width, by its modality's name."""
        found: dict[str, list[nn.Parameter]] = {}
        for block in self.blocks:
            if isinstance(block, ReadBlock) and isinstance(block.block, EncoderBlock | FinishBlock):
                name = block.block.name
                found.setdefault(name, list(self.embedders[name].parameters())).extend(block.parameters())
        return found

    # All at once ---------------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> WriterState:
        read = nothing_read(batch)
        streams: dict[Direction, Stream] = {}
        for place, direction in enumerate(self.config.directions):
            row_R = torch.arange(batch.num_records, device=self.out.weight.device)
            if self.training:  # records take turns
                row_R = row_R[place :: len(self.config.directions)]
            read, medium_R = self._read(read, batch, direction, row_R)
            given_R = batch.media[self.given[direction]].present_B[row_R]
            if self.training:
                given_R = given_R & (torch.rand(len(row_R), device=given_R.device) >= self.config.condition_dropped)
            target_RN, due_RN = self._targets(batch, direction, row_R)
            x_RND = self._before(direction, target_RN)
            streams[direction] = Stream(x_RND, due_RN, target_RN, due_RN, medium_R, given_R, row_R)
        if self.reads_both:
            for name in (self.picture, self.words):
                read = self._read_all(read, batch.media[name], name)
        return WriterState(read, streams)

    def head(self, state: WriterState) -> WriterOutput:
        written: dict[Direction, Written] = {}
        for direction, stream in state.streams.items():
            num_written = stream.target_RN.shape[1]
            score_RNV = self._score(direction, stream.x_RTD[:, stream.x_RTD.shape[1] - num_written :])
            written[direction] = Written(score_RNV, stream.target_RN, stream.due_RN, stream.row_R, stream.completed)
        temperature = self.config.temperature if self.temperature is None else self.temperature()
        return WriterOutput(written, state.read.aligned, temperature)

    def vectors(self, media: MediaBatch, name: str) -> Tensor:
        """(U, D): of each medium of one modality, what the contrastive loss sees of it.

        The model has `align`, and there is some medium.
        """
        assert self.config.align, "without align there are no vectors"
        read = SandwichState.begin({}, {}, {}, media.present_B[:, None])
        state = WriterState(self._read_all(read, media, name), {})
        for block in self.blocks:
            if not isinstance(block, ReadBlock):
                break
            state = block(state)
        return state.read.aligned[name]

    def _read(
        self, read: SandwichState, batch: Batch, direction: Direction, row_R: Tensor
    ) -> tuple[SandwichState, Tensor]:
        """Begin to encode what these records are about, each medium once; and which of them each record has."""
        name = self.given[direction]
        media = batch.media[name]
        medium_R = media.index_B[row_R]
        if num_media(media) == 0 or len(row_R) == 0:
            return read, medium_R
        if self.reads_both:  # all are encoded anyway
            return self._read_all(read, media, name), medium_R
        used_W, medium_R = _distinct(medium_R)
        values = {key: value.index_select(0, used_W) for key, value in media.values.items()}
        tokens = self.embedders[name](values)
        return and_tokens(read, name, tokens.x_UTD, tokens.mask_UT), medium_R

    def _read_all(self, read: SandwichState, media: MediaBatch, name: str) -> SandwichState:
        if name in read.tokens or num_media(media) == 0:
            return read
        tokens = self.embedders[name](media.values)
        return and_tokens(read, name, tokens.x_UTD, tokens.mask_UT)

    def _targets(self, batch: Batch, direction: Direction, row_R: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be written, and where it counts."""
        media = batch.media[self.content[direction]]
        there_R = media.present_B[row_R]
        if num_media(media) == 0:
            target_RN = row_R.new_zeros(len(row_R), self.num_cells if direction == "draw" else 1)
            return target_RN, torch.zeros_like(target_RN, dtype=torch.bool)
        if direction == "caption":
            ids_RT = media.values["ids_UT"].index_select(0, media.index_B[row_R])
            mask_RT = media.values["mask_UT"].index_select(0, media.index_B[row_R])
            return ids_RT[:, 1:], mask_RT[:, 1:] & there_R[:, None]
        used_W, medium_R = _distinct(media.index_B[row_R])
        code_WP = self.tokenizer.encode(media.values["pixels_UCHW"].index_select(0, used_W))
        return code_WP[medium_R], there_R[:, None].expand(-1, self.num_cells)

    def _before(self, direction: Direction, target_RN: Tensor) -> Tensor:
        """What stands before each token, and the place of the one to come."""
        token_RND = self.vocabulary(target_RN[:, :-1] + self._first(direction))
        begin_R1D = self._begin(direction).expand(len(target_RN), 1, -1)
        x_RND = torch.cat([begin_R1D, token_RND], dim=1) + self._places(direction)[: target_RN.shape[1]]
        if direction == "draw":
            columns = self.tokenizer.grid[1]
            above_RND = self.above(target_RN[:, :-columns])
            right_RND = self.above_right(target_RN[:, 1 : target_RN.shape[1] - columns + 1])
            # A row's last cell has nothing to its upper right but the next row's first cell, which is to come.
            last_N = torch.arange(right_RND.shape[1], device=x_RND.device) % columns == columns - 1
            seen_RND = above_RND + right_RND.masked_fill(last_N[:, None], 0.0)
            x_RND = x_RND + nn.functional.pad(seen_RND, (0, 0, columns, 0))
        return x_RND

    def _first(self, direction: Direction) -> int:
        """Where the direction's tokens begin in the vocabulary."""
        return 0 if direction == "caption" else self.num_words

    def _begin(self, direction: Direction) -> Tensor:
        return self.marks.weight[BEGIN_WORDS if direction == "caption" else BEGIN_PICTURE]

    def _places(self, direction: Direction) -> Tensor:
        if direction == "caption":
            return self.word_place.weight
        return (self.cell_row.weight[:, None] + self.cell_column.weight[None]).flatten(0, 1)

    def _score(self, direction: Direction, x_RND: Tensor) -> Tensor:
        """Of words where words are due, of codes where codes are."""
        first = self._first(direction)
        last = self.num_words if direction == "caption" else len(self.out.weight)
        return nn.functional.linear(self.norm(x_RND), self.out.weight[first:last], self.out.bias[first:last])

    # Token by token ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, batch: Batch, direction: Direction, sampling: SamplingConfig, generator: Generator) -> Tensor:
        """Write about every record of the batch: ids of words (B, N), filled up with `end_of_words`; or codes (B, P).

        Call it in evaluation mode.

        Raises:
            ConfigError: the model has not learnt this direction, or guidance was not learnt.
        """
        if direction not in self.config.directions:
            learnt = " and ".join(self.config.directions)
            raise ConfigError(f"this model has learnt to {learnt}, not to {direction}. Train one with that direction.")
        if sampling.guidance != 1 and not self.config.condition_dropped:
            raise ConfigError(
                f"guidance={sampling.guidance} needs to know what comes without a condition, and the model was trained "
                "with condition_dropped=0. Use guidance 1."
            )
        x_BTD, mask_BT = self._given(batch, direction)
        num_records, guide = len(x_BTD), sampling.guidance != 1
        if guide:
            x_BTD, mask_BT = _doubled(x_BTD, mask_BT, self.marks.weight[NOTHING_GIVEN])
        places = self._places(direction)
        most = self.num_cells if direction == "draw" else self.most_words
        next_BD = self._begin(direction).expand(len(x_BTD), -1)
        caches: list[Cache | None] = [None] * len(self.layers)
        ended_B = torch.zeros(num_records, dtype=torch.bool, device=x_BTD.device)
        chosen: list[Tensor] = []
        for place in range(most):
            new_BTD = (next_BD + places[place])[:, None]
            x_BTD = torch.cat([x_BTD, new_BTD], dim=1) if place == 0 else new_BTD
            mask_BT = nn.functional.pad(mask_BT, (0, 1), value=True)
            x_BTD = self._through(x_BTD, mask_BT, caches)
            score_BV = self._score(direction, x_BTD[:, -1]).float()
            if guide:
                with_BV, without_BV = score_BV.chunk(2)
                score_BV = guided(with_BV, without_BV, sampling.guidance)
            token_B = choose(score_BV, sampling, generator)
            if direction == "caption":
                token_B = token_B.masked_fill(ended_B, self.config.end_of_words)
                ended_B = ended_B | (token_B == self.config.end_of_words)
            chosen.append(token_B)
            if direction == "caption" and bool(ended_B.all()):
                break
            next_BD = self._next(direction, chosen).repeat(2 if guide else 1, 1)
        return torch.stack(chosen, dim=1)

    def _next(self, direction: Direction, chosen: list[Tensor]) -> Tensor:
        """What stands before the next token, but for its place; as `_before` has it."""
        next_BD: Tensor = self.vocabulary(chosen[-1] + self._first(direction))
        columns = self.tokenizer.grid[1]
        if direction == "draw" and len(chosen) >= columns:
            next_BD = next_BD + self.above(chosen[-columns])
            if len(chosen) % columns != columns - 1:
                next_BD = next_BD + self.above_right(chosen[1 - columns])
        return next_BD

    def _through(self, x_BTD: Tensor, mask_BT: Tensor, caches: list[Cache | None]) -> Tensor:
        """The decoder's layers, which see the cached tokens too; the caches grow."""
        for place, layer in enumerate(self.layers):
            x_BTD, caches[place] = layer(x_BTD, mask_BT, caches[place])
        return x_BTD

    def _given(self, batch: Batch, direction: Direction) -> tuple[Tensor, Tensor]:
        """The tokens of what each record is about, as every layer sees them before what is written."""
        row_B = torch.arange(batch.num_records, device=self.out.weight.device)
        read, medium_B = self._read(nothing_read(batch), batch, direction, row_B)
        given_B = batch.media[self.given[direction]].present_B
        none_B1 = row_B[:, None]
        stream = Stream(
            self.marks.weight.new_zeros(len(row_B), 0, self.marks.embedding_dim),
            none_B1[:, :0].bool(),
            none_B1[:, :0],
            none_B1[:, :0].bool(),
            medium_B,
            given_B,
            row_B,
        )
        state = WriterState(read, {direction: stream})
        for block in self.blocks:
            state = block(state)
            if isinstance(block, JoinStreams):
                break
        return state.streams[direction].x_RTD, state.streams[direction].mask_RT

    @torch.no_grad()
    def pictures(self, code_BP: Tensor) -> Tensor:
        """Normalised pixels of codes that were written, (B, C, height, width)."""
        return self.tokenizer.decode(code_BP)


class CompleteBlock(nn.Module):
    """Puts what the content's encoder would say, made from what is given, before what is written, marked; and takes
    note of what it should have been."""

    def __init__(
        self,
        config: CompletionConfig,
        directions: tuple[Direction, ...],
        given: dict[Direction, str],
        content: dict[Direction, str],
        width: int,
    ) -> None:
        super().__init__()
        self.num_tokens = config.num_tokens
        self.given, self.content = given, content
        self.completions = ModulesByName(
            {direction: config.build((given[direction],), width) for direction in directions}
        )

    def forward(self, state: WriterState) -> WriterState:
        streams = {}
        for direction, stream in state.streams.items():
            there = self.given[direction] in state.read.tokens and len(stream.row_R) > 0
            streams[direction] = self._completed(direction, stream, state.read) if there else stream
        return state._replace(streams=streams)

    def _completed(self, direction: Direction, stream: Stream, read: SandwichState) -> Stream:
        given, content = self.given[direction], self.content[direction]
        completion = self.completions[direction]
        made_RKD = completion(
            {given: read.tokens[given].index_select(0, stream.medium_R)},
            {given: read.masks[given].index_select(0, stream.medium_R) & stream.given_R[:, None]},
        )
        untold_R11 = ~stream.given_R[:, None, None]
        marked_RKD = (made_RKD + completion.mark_D).masked_fill(untold_R11, 0.0)
        truth_UKD = None
        if content in read.tokens:
            # Detached: were the truth to follow, all of it would soon be alike and easy to complete.
            truth_UKD = parts(read.tokens[content], read.masks[content], self.num_tokens).detach()
        told_RK = stream.given_R[:, None].expand(-1, self.num_tokens)
        return stream._replace(
            x_RTD=torch.cat([marked_RKD, stream.x_RTD], dim=1),
            mask_RT=torch.cat([told_RK, stream.mask_RT], dim=1),
            completed=Completed(made_RKD.masked_fill(untold_R11, 0.0), stream.given_R, truth_UKD),
        )


class JoinStreams(nn.Module):
    """Puts what is given before what is written: a mark that says whether anything is, then its tokens."""

    def __init__(self, marks: nn.Embedding, given: dict[Direction, str]) -> None:
        super().__init__()
        self.marks = marks
        self.given = given

    def forward(self, state: WriterState) -> WriterState:
        streams = {}
        for direction, stream in state.streams.items():
            mark_RD = self.marks.weight[torch.where(stream.given_R, GIVEN, NOTHING_GIVEN)]
            x, mask = [mark_RD[:, None]], [torch.ones_like(stream.given_R)[:, None]]
            name = self.given[direction]
            if name in state.read.tokens:
                x_RTD = state.read.tokens[name].index_select(0, stream.medium_R)
                x.append(x_RTD.masked_fill(~stream.given_R[:, None, None], 0.0))
                mask.append(state.read.masks[name].index_select(0, stream.medium_R) & stream.given_R[:, None])
            x.append(stream.x_RTD)
            mask.append(stream.mask_RT)
            streams[direction] = stream._replace(x_RTD=torch.cat(x, dim=1), mask_RT=torch.cat(mask, dim=1))
        return state._replace(streams=streams)


class WriteBlock(nn.Module):
    """One layer of the decoder, on each stream."""

    def __init__(self, layer: CausalLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: WriterState) -> WriterState:
        streams = {
            direction: stream._replace(x_RTD=self.layer(stream.x_RTD, stream.mask_RT)[0])
            for direction, stream in state.streams.items()
        }
        return state._replace(streams=streams)


def _doubled(x_BTD: Tensor, mask_BT: Tensor, nothing_D: Tensor) -> tuple[Tensor, Tensor]:
    """The same records, then the same without what they are about."""
    untold_BTD = torch.zeros_like(x_BTD)
    untold_BTD[:, 0] = nothing_D
    unmasked_BT = torch.zeros_like(mask_BT)
    unmasked_BT[:, 0] = True
    return torch.cat([x_BTD, untold_BTD]), torch.cat([mask_BT, unmasked_BT])


ShapeT = TypeVar("ShapeT", ImageInput, TextInput)


def _only(signature: Signature, kind: type[ShapeT]) -> tuple[str, ShapeT]:
    found = [(name, shape) for name, shape in signature.inputs.items() if isinstance(shape, kind)]
    if len(found) != 1:
        wanted = "picture" if kind is ImageInput else "text"
        raise ConfigError(
            f"a writer needs one {wanted}, and the records have {len(found)}. Name the two columns in data.modalities."
        )
    return found[0]


def _distinct(index_R: Tensor) -> tuple[Tensor, Tensor]:
    """The media that some record has, and each record's place among them."""
    used_W, place_R = torch.unique(index_R, return_inverse=True)
    return used_W, place_R
