"""From text to batches: a character tokenizer, padded batches, the sentence task, and the order of training.

A sequence of n tokens gives n - 1 pairs of a token and its target, the token that follows. That shift happens here,
in `pad_batch`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .loss import loss_mask


class CharacterTokenizer:
    """One token per character, in code point order from 1; token 0 begins a text and has no character."""

    begin = 0

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.ids = {character: i for i, character in enumerate(self.characters, start=1)}

    @property
    def vocab_size(self) -> int:
        return 1 + len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of the characters, without the begin token. Raises ValueError for an unknown character."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            unknown = error.args[0]
            raise ValueError(
                f"unknown character {unknown!r} at position {text.index(unknown)} of {text!r}: "
                f"the tokenizer knows {self.characters!r}"
            ) from None

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The characters of the ids; begin tokens have none. Raises ValueError for an unknown id."""
        return "".join(self.character(int(i)) for i in ids)

    def character(self, i: int) -> str:
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"unknown token id {i}: the tokenizer knows 0 to {self.vocab_size - 1}")
        return "" if i == self.begin else self.characters[i - 1]

    def to_dict(self) -> dict[str, str]:
        return {"kind": "character", "characters": self.characters}

    @classmethod
    def from_dict(cls, state: dict[str, str]) -> CharacterTokenizer:
        if state.get("kind") != "character":
            raise ValueError(f"expected a tokenizer of kind 'character', got {state.get('kind')!r}")
        return cls(state["characters"])


@dataclass(frozen=True)
class Batch:
    """Sequences of unequal lengths side by side, every field [B, T].

    targets[b, t] is the token after tokens[b, t]. `mask` is True for real tokens, `loss_mask` for targets that count.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    loss_mask: Tensor
    padded: bool = True  # False: all rows are equally long, and a model need not be given the mask

    def to(self, device: torch.device | str) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(move(self.tokens), move(self.targets), move(self.mask), move(self.loss_mask), self.padded)


def pad_batch(
    sequences: Sequence[Sequence[int]], skip: int = 0, *, pad: int = 0, side: Literal["right", "left"] = "right"
) -> Batch:
    """Whole sequences, begin token (and end token, where there is one) included, as one batch.

    A sequence of n ids fills n - 1 places; the first `skip` targets of each carry no loss. The pad id may be that of a
    real token, because only the masks decide what counts. Raises ValueError for a sequence without a target.
    """
    if not sequences:
        raise ValueError("a batch needs at least one sequence, got none")
    shortest, longest = min(map(len, sequences)), max(map(len, sequences))
    if shortest < 2:
        raise ValueError(f"a sequence needs at least 2 tokens, one to read and one to predict, got {shortest}")
    T = longest - 1
    tokens = torch.tensor([pad_sequence(sequence[:-1], T, pad, side) for sequence in sequences])
    targets = torch.tensor([pad_sequence(sequence[1:], T, pad, side) for sequence in sequences])
    mask = torch.tensor([pad_sequence([True] * (len(sequence) - 1), T, False, side) for sequence in sequences])
    return Batch(tokens, targets, mask, loss_mask(mask, skip), padded=shortest < longest)


def pad_sequence(sequence: Sequence[int], length: int, pad: int, side: str) -> list[int]:
    padding = [pad] * (length - len(sequence))
    return [*sequence, *padding] if side == "right" else [*padding, *sequence]


class SentenceTask:
    """One sentence to learn by heart: 100 copies to train on, 10 to validate, 10 to test.

    The first `skip` targets carry no loss: with skip=3 nothing teaches "I", " " and "l", and "I l" is the prompt.
    """

    def __init__(self, sentence: str = "I love machine learning", skip: int = 0) -> None:
        if not 0 <= skip < len(sentence):
            raise ValueError(f"skip must leave a target of the {len(sentence)} in {sentence!r}, got {skip}")
        self.sentence, self.skip = sentence, skip
        self.tokenizer = CharacterTokenizer(sentence)
        self.train, self.validation, self.test = [sentence] * 100, [sentence] * 10, [sentence] * 10

    @property
    def block_size(self) -> int:
        """Tokens read to predict the whole sentence: the begin token and every character but the last."""
        return len(self.sentence)

    def batch(self, texts: Sequence[str]) -> Batch:
        return pad_batch([self.sequence(text) for text in texts], self.skip)

    def sequence(self, text: str) -> list[int]:
        return [self.tokenizer.begin, *self.tokenizer.encode(text)]


class DataOrder:
    """Which examples come next: each epoch visits all of them once, in an order drawn from a generator of its own.

    Nothing else uses that generator, so neither dropout nor sampling changes the order.
    """

    def __init__(self, examples: int, seed: int) -> None:
        if examples < 1:
            raise ValueError("there are no examples to train on")
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = torch.arange(examples)
        self.position = examples  # the first window begins an epoch

    def window(self, size: int) -> list[int]:
        """The next `size` examples, or what is left of the epoch: the odd rest is a window of its own."""
        if self.position >= len(self.epoch):
            self.epoch, self.position = self.shuffled(), 0
        window = self.epoch[self.position : self.position + size].tolist()
        self.position += len(window)
        return window

    def shuffled(self) -> Tensor:
        return torch.randperm(len(self.epoch), generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "epoch": self.epoch.clone(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["epoch"]) != len(self.epoch):
            before, now = len(state["epoch"]), len(self.epoch)
            raise ValueError(f"the checkpoint was trained on {before} examples, the data has {now}")
        self.generator.set_state(state["generator"])
        self.epoch, self.position = state["epoch"], state["position"]
