"""How to call a foreign evaluate or perplexity: its parameters by name, the form of its data by trying.

A `MetEvaluation` gives numbers for rows of token ids. Nothing here judges.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..meet.vocabulary import squash
from ..probes.filled import called, filled, roles_of
from ..subject import Companion, Subject
from .met_average import MetAverage, move
from .met_step import Criterion, Fields

NAMES = {
    "model": "model net network m gpt lm transformer module raw_model",
    "average": "ema averaged average ema_model shadow averager avg",
    "batches": "batches loader dataloader data_loader val_loader valid_loader eval_loader test_loader val_dataloader "
    "eval_dataloader test_dataloader valid_dataloader dataset val_dataset eval_dataset test_dataset data val_data "
    "eval_data valid_data test_data data_iter iterator examples val_batches eval_batches",
    "tokens": "ids tokens token_ids input_ids text x xb idx stream corpus sequence encodings inputs seq text_ids "
    "all_ids test_ids val_ids val_tokens test_tokens document",
    "targets": "targets target labels y yb",
    "stride": "stride hop",
    "size": "block_size context context_length window window_size max_length seq_len max_seq_len ctx_len length "
    "chunk_size ctx context_size max_len seq_length",
    "count": "eval_iters max_batches n_batches num_batches steps eval_steps iters max_steps max_iters num_iters limit",
    "rows": "batch_size bs",
    "loss": "loss_fn criterion loss_function loss_func crit",
    "device": "device",
    "vocabulary": "vocab_size n_vocab",
    "ignored": "ignore_index pad_id pad_token_id pad_idx",
}
STREAMS = ("one text [N]", "one text [1, N]", "a list of ids")
BATCHES = ("batches of (tokens, targets)", "batches of {input_ids, labels}", "batches of {tokens, targets}",
           "batches of tokens")  # fmt: skip
PAIR = "(tokens, targets)"


@dataclass(frozen=True)
class MetEvaluation:
    """A subject's evaluation and how to call it; `form` is that of its data."""

    subject: Subject
    companion: Companion
    roles: dict[str, str]
    form: str

    @property
    def is_stream(self) -> bool:
        """Whether it makes windows and targets itself, of one long text."""
        return self.form in STREAMS

    @property
    def strides(self) -> list[int | None]:
        """Between its windows, None for its own choice: if it can be told one, some that divide a window unevenly."""
        if "stride" not in self.roles.values():
            return [None]
        size = self.subject.sizes.block_size
        return list(dict.fromkeys((max(1, 2 * size // 3), max(1, size // 2), size)))

    def __call__(self, model: nn.Module, rows: Tensor, *, stride: int | None = None) -> dict[str, float]:
        """The numbers that it returns, by name, for rows [R, T + 1] of ids; a stream is one row. `{"": loss}`."""
        size = self.subject.sizes.block_size
        values = {
            "model": model,
            "loss": Criterion(),
            "device": rows.device,
            "vocabulary": self.subject.width,
            "ignored": -100,
            "count": len(rows),
            "rows": 1,
            "size": size,
            "stride": stride or max(1, size // 2),
            **data_in(self.form, rows),
        }
        parameters = inspect.signature(self.companion.value).parameters
        wanted = {role for name, role in self.roles.items() if parameters[name].default is inspect.Parameter.empty}
        wanted |= {"model", "tokens", "targets", "batches"} | ({"stride"} if stride else set())
        if "average" in self.roles.values() and (averages := self.subject.part("companions")):
            values["average"] = next((average_of(one, model) for one in averages if one.kind == "average"), None)
            wanted.add("average")
        values = {role: value for role, value in values.items() if role in wanted and value is not None}
        with warnings.catch_warnings(), self.subject.running():
            warnings.simplefilter("ignore")
            return numbers(called(self.companion.value, self.roles, values))


def average_of(companion: Companion, model: nn.Module) -> Any:
    """An average of the model's weights that differs from them; the model itself is left as it was."""
    weights = [p.detach().clone() for p in model.parameters()]
    average = MetAverage(companion, model)
    move(model, 1)
    average.update()
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights, strict=True):
            p.copy_(value)
    return average.made


def data_in(form: str, rows: Tensor) -> dict[str, Any]:
    """The data by role: rows [R, T + 1] as one stream of R · (T + 1) ids, or as batches of two rows."""
    flat = rows.flatten()
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    pairs = list(zip(torch.split(x, 2), torch.split(y, 2), strict=True))
    given: dict[str, Any] = {
        STREAMS[0]: flat,
        STREAMS[1]: flat[None],
        STREAMS[2]: flat.tolist(),
        PAIR: x,
        BATCHES[0]: pairs,
        BATCHES[1]: [Fields(input_ids=r, attention_mask=torch.ones_like(r), labels=r) for r in torch.split(rows, 2)],
        BATCHES[2]: [Fields(dict.fromkeys(("x", "inputs", "tokens", "input_ids", "input"), a)
                            | dict.fromkeys(("y", "targets", "labels", "target"), b)) for a, b in pairs],
        BATCHES[3]: list(torch.split(rows, 2)),
    }  # fmt: skip
    data = given[form]
    return {"tokens": data, "batches": data, **({"targets": y} if form == PAIR else {})}


def numbers(result: Any) -> dict[str, float]:
    """Every finite number in what an evaluation returned, by its key or place."""
    items = (
        result.items() if isinstance(result, dict) else enumerate(result) if isinstance(result, tuple | list) else ()
    )
    named = {str(key): value for key, value in items} or {"": result}
    found = {}
    for key, value in named.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = float(value)
    return found


def met_evaluation(subject: Subject, companion: Companion) -> MetEvaluation:
    """How it is called. Raises NotApplicable if no way was found."""
    return subject.once(_met, companion)


def _met(subject: Subject, companion: Companion) -> MetEvaluation:
    roles = roles_of(companion.value, NAMES)
    if "model" not in roles.values():
        raise NotApplicable("it takes no model")
    filled(companion.value, roles, dict.fromkeys(NAMES))  # what is required and not known
    if not {"tokens", "batches"} & set(roles.values()):
        raise NotApplicable("it takes no data")
    errors = []
    for form in _forms(roles):
        one = MetEvaluation(subject, companion, roles, form)
        try:
            if one(subject.build(), rows_for(subject, one)):
                return one
            errors.append(f"{form}: it returns no number")
        except NotApplicable:
            raise
        except Exception as error:
            errors.append(f"{form}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
    raise NotApplicable(f"no data was found that it takes ({errors[0] if errors else 'it takes none'})")


def _forms(roles: dict[str, str]) -> Iterator[str]:
    given = set(roles.values())
    if {"tokens", "targets"} <= given:
        yield PAIR
    elif "tokens" in given:
        yield from STREAMS
    elif "batches" in given:
        yield from BATCHES
        yield from STREAMS


def rows_for(subject: Subject, met: MetEvaluation, *, seed: int = 0) -> Tensor:
    """Ids: one row that takes two whole windows and a part of a third, or four rows that one window reads.

    They are drawn and then sorted, so that windows and batches differ in what they hold.
    """
    T, one = subject.sizes.block_size, met.is_stream
    rows = subject.tokens(1 if one else 4, 2 * T + T // 2 + 1 if one else min(T, 12) + (T > 1), seed=seed)
    return rows.flatten().sort().values.reshape(rows.shape)


def is_perplexity(name: str) -> bool:
    """Whether a function, or a number that it returns, is called a perplexity."""
    plain = squash(name)
    return "perplexity" in plain or "ppl" in plain
