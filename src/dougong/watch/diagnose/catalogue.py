"""The faults that are known: how each shows, why it comes about, and what mends it.

Here        Fault, CATALOGUE (by its cause's short name), `fault`.
Elsewhere   telling them by what was measured (rules.py); putting them in on purpose (benchmarks/diagnose.py).
Promise     every finding's cause stands here; a remedy that is a setting of ours can be tried by `--try-fix`.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Fault(NamedTuple):
    """One kind of fault."""

    cause: str
    title: str
    symptom: str
    remedy: str
    settings: tuple[str, ...] = ()
    """Of a recipe, that may mend it."""

    multimodal: bool = False


def _faults() -> tuple[Fault, ...]:
    return (
        # The optimizer, and what it is given.
        Fault(
            "learning rate too high",
            "The learning rate is too high",
            "the loss rises or jumps, and each step moves weights by a large part of themselves",
            "Divide the learning rate by 10, or warm it up for longer.",
            ("train.optimizer.learning_rate=0.1x", "train.optimizer.warmup_ratio=0.2"),
        ),
        Fault(
            "learning rate too low",
            "The learning rate is too low",
            "weights hardly move, and the loss falls hardly at all",
            "Multiply the learning rate by 10 to 100.",
            ("train.optimizer.learning_rate=30x",),
        ),
        Fault(
            "schedule",
            "The learning rate has gone before anything was learnt",
            "the learning rate is a small part of what it was, early in the run",
            "Let the schedule last as many steps as the run has; step it once a step, not once a record.",
            ("train.optimizer.schedule=constant",),
        ),
        Fault(
            "gradients not cleared",
            "Gradients of earlier steps are still there",
            "what the optimizer is given is not the gradient of this step's loss",
            "Call optimizer.zero_grad() once before each backward.",
        ),
        Fault(
            "goes uphill",
            "The optimizer climbs",
            "each step goes along the gradient, not against it",
            "Leave out maximize=True, and do not turn the gradient's sign.",
        ),
        Fault(
            "weight decay too high",
            "Weight decay is stronger than learning",
            "weights shrink step by step, whatever the gradient",
            "Use a weight decay of 0.1 or less.",
            ("train.optimizer.weight_decay=0.01",),
        ),
        Fault(
            "optimizer memory",
            "The optimizer remembers too long, or divides by too much",
            "momentum near 1, or an epsilon far above the gradients",
            "Use beta1 0.9, beta2 0.999 and eps 1e-8.",
            ("train.optimizer.betas=[0.9, 0.999]",),
        ),
        Fault(
            "frozen",
            "Weights are frozen",
            "some modules have requires_grad=False while those around them are trained",
            "Set requires_grad to True there, or say that it is meant.",
        ),
        Fault(
            "not in the optimizer",
            "The optimizer does not hold all trained weights",
            "weights get gradients that nobody applies",
            "Build the optimizer from model.parameters() after the model is whole.",
        ),
        Fault(
            "adapter not in the optimizer",
            "The adapter is not in the optimizer",
            "the base is frozen, and the adapter's weights get gradients that nobody applies",
            "Build the optimizer after adding the adapter.",
        ),
        Fault(
            "gradient cut",
            "No gradient comes through",
            "modules take part in the forward, and no gradient reaches them",
            "Look for detach(), no_grad(), .data or .item() between them and the loss.",
        ),
        # Initialisation, activations, norms.
        Fault(
            "initialisation constant",
            "Weights begin all alike",
            "all weights of a matrix have one value, so all units learn the same",
            "Draw them at random: nn.init.xavier_uniform_.",
        ),
        Fault(
            "initialisation too large",
            "Weights begin too large",
            "outputs are many times larger than inputs from the first step",
            "Draw weights with a deviation of 1/sqrt(inputs).",
        ),
        Fault(
            "initialisation too small",
            "Weights begin too small",
            "outputs are a small part of inputs from the first step, and so are gradients",
            "Draw weights with a deviation of 1/sqrt(inputs).",
        ),
        Fault(
            "dead units",
            "Units are dead",
            "after an activation, nearly all units are 0 for every record, and no gradient passes",
            "Lower the learning rate, begin biases at 0, or use GELU.",
            ("train.optimizer.learning_rate=0.1x",),
        ),
        Fault(
            "saturated units",
            "Units are saturated",
            "sigmoids or tanhs stand at their ends, where no gradient passes",
            "Put a norm before them, or use ReLU or GELU.",
        ),
        Fault(
            "exploding",
            "Numbers grow from block to block",
            "activations or gradients grow by orders of magnitude along the network",
            "Add norms or residual scales; clip gradients.",
            ("train.max_grad_norm=1.0",),
        ),
        Fault(
            "vanishing",
            "Gradients vanish on their way",
            "gradients shrink by orders of magnitude from the loss to the first modules",
            "Add residual connections and norms.",
        ),
        Fault(
            "norm",
            "A norm does not normalise",
            "what a norm makes is far from a spread of 1",
            "Use eps 1e-5, and begin its gain at 1.",
        ),
        Fault(
            "norm statistics",
            "A norm's running statistics are not those of the data",
            "in evaluation mode a batch norm's outputs differ from those in training",
            "Use a momentum of 0.1, and larger batches or another norm.",
        ),
        Fault(
            "dropout too high",
            "Dropout leaves too little",
            "most of what is made is dropped",
            "Use 0.1 to 0.3.",
        ),
        # Attention, masks, positions.
        Fault(
            "attention scale",
            "Attention scores have a wrong scale",
            "scores are not divided by the square root of the head's width",
            "Divide them by sqrt(width of a head), once.",
        ),
        Fault(
            "attention axis",
            "Attention is normalised over the wrong axis",
            "the softmax of scores is not over the keys",
            "Take the softmax over the last axis.",
        ),
        Fault(
            "causal mask",
            "Tokens see what comes after them",
            "a model that is to tell the next token looks at it",
            "Give attention a causal mask.",
        ),
        Fault(
            "positions",
            "The order of tokens is lost",
            "the answer is the same whatever the order of tokens",
            "Add position embeddings, or turn queries and keys by their place.",
        ),
        Fault(
            "padding leak",
            "Padding is attended to",
            "inputs are padded, and attention over them has no mask",
            "Pass the mask to every attention and pooling.",
            multimodal=True,
        ),
        Fault(
            "mask hides",
            "A mask hides what is there",
            "all, or the real part, of an input is masked",
            "The mask should be True (1) where there is a token.",
            multimodal=True,
        ),
        # Loss, labels, data.
        Fault(
            "softmax twice",
            "The loss is given probabilities",
            "cross entropy's input is already a softmax",
            "Give cross_entropy the scores themselves.",
        ),
        Fault(
            "loss sign",
            "The loss has the wrong sign",
            "the loss is below 0 where it cannot be, and falls without end",
            "Minimise the loss itself, not its negative.",
        ),
        Fault(
            "loss terms",
            "The loss leaves out what is to be learnt",
            "classes have no weight, targets are ignored, or smoothing says nothing is sure",
            "Weigh every class, ignore padding alone, and smooth by 0.1 at most.",
        ),
        Fault(
            "labels",
            "Labels do not belong to the records",
            "the loss stays at chance though the answer does depend on the inputs",
            "Look at some records with their targets; check the join and the shuffling.",
        ),
        Fault(
            "target leak",
            "The target is among the inputs",
            "the loss falls to nothing at once, and judging does not agree",
            "Leave the target, and what is made from it, out of the inputs.",
        ),
        Fault(
            "not shuffled",
            "Records come sorted by class",
            "a batch has records of one class alone",
            "Shuffle the records.",
        ),
        Fault(
            "duplicates",
            "The same records come again and again",
            "one batch's records are those of the batch before",
            "Look at the loader's sampling, and for duplicates.",
        ),
        Fault(
            "judging differs",
            "Training and judging do not see the same",
            "what is learnt in training does not hold where it is judged, far more than overfitting explains",
            "Use the same preparation and the same labels for both.",
        ),
        Fault(
            "judged in training mode",
            "The model is judged in training mode",
            "dropout and batch norms are on while judging",
            "Call model.eval() before judging, model.train() afterwards.",
        ),
        # Precision.
        Fault(
            "16-bit weights",
            "Weights of 16 bits swallow the steps",
            "weights have too few bits for steps as small as these, and stay as they are",
            "Keep weights in fp32, or use train.weights=bf16-masters.",
            ("train.weights=fp32",),
        ),
        Fault(
            "overflow",
            "Numbers leave their format's range",
            "a module makes numbers that are not finite from numbers that are, or gradients are not finite",
            "Lower the loss scale or the learning rate, or compute that module in fp32.",
            ("train.precision=fp32",),
        ),
        # Of several modalities.
        Fault(
            "dead modality",
            "A modality counts for nothing",
            "the answer does not change, whatever this input holds",
            "Look at how it is joined to the others; it may be multiplied by 0 or never read.",
            multimodal=True,
        ),
        Fault(
            "constant input",
            "An input is the same for every record",
            "all rows of it are alike",
            "Look at how it is read: a decoder may fail silently.",
            multimodal=True,
        ),
        Fault(
            "swapped pairs",
            "A modality belongs to other records",
            "the answer depends on it, and the loss does not: exchanged among records it is as good",
            "Check the key by which it is joined, and that it is shuffled with the others.",
            multimodal=True,
        ),
        Fault(
            "gate",
            "The gate has collapsed",
            "one modality has all the weight for every record",
            "Begin its bias at 0, or use a higher temperature or modality dropout.",
            ("model.gate_temperature=2.0", "data.withhold=0.3"),
            multimodal=True,
        ),
        Fault(
            "cross-attention",
            "A modality asks itself in place of the others",
            "cross-attention's keys are its own tokens",
            "Give it the other modalities' tokens.",
            multimodal=True,
        ),
        Fault(
            "normalisation",
            "An input is not normalised",
            "its numbers are far from a mean of 0 and a spread of 1",
            "Subtract the mean and divide by the spread, of training records.",
            multimodal=True,
        ),
        Fault(
            "input mismatch",
            "An input looks different in training and in judging",
            "its mean, spread, channels or pitch differ: another normalisation, channel order or sample rate",
            "Use one preparation for both; check sample rate and channel order.",
            multimodal=True,
        ),
        Fault(
            "imbalance",
            "A modality learns far more slowly than the others",
            "its encoder is moved by a small part of what the others are",
            "Give it the same learning rate, or a multiplier; withhold the strong ones at times.",
            ("data.withhold=0.3",),
            multimodal=True,
        ),
        Fault(
            "not finite in records",
            "An input holds numbers that are not finite",
            "values of some records are NaN or infinite",
            "Mend or leave out these records: dougong check finds them.",
            multimodal=True,
        ),
        Fault(
            "missing modality",
            "A record that lacks a modality is not answered",
            "the forward fails where a modality is absent",
            "Mask what is absent; do not index, pool or stack it.",
            multimodal=True,
        ),
        Fault(
            "never present",
            "A modality is never there",
            "no record has this input",
            "Look at its column's name and at its files' paths.",
            multimodal=True,
        ),
        Fault(
            "crash",
            "The forward fails",
            "an error ends the training",
            "Read the error; its place is named.",
        ),
        Fault(
            "does not learn",
            "Nothing is learnt",
            "the loss has not fallen by a fiftieth after a third of the run",
            "Try to learn 16 records by heart first; then look at labels, learning rate and gradients.",
        ),
    )


CATALOGUE: Final[dict[str, Fault]] = {each.cause: each for each in _faults()}
