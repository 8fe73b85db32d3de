"""The two sanity checks: a one-layer model memorizes a sentence, then only those of its targets that are not masked.

Each trains a fresh model; the learning curve, the generated text and the weights are kept for the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..transformer.data import CharacterTokenizer, SentenceTask
from ..transformer.generation import generate
from .expect import READ_ALONE, READABLE, NotApplicable, advise, fail, needs
from .generation.met_generate import Decoder, decoder
from .loss.returned import cross_entropy_line, gives
from .subject import Subject, torch_seeded
from .training.runs import refuse_chance
from .training.sentence import LEARNED, Generate, Learned, learn, loss_of

SKIP = 3  # the second check masks the first three targets: "I", " " and "l"
NOT_LEARNED = 1.0  # nats per target; a target that was never trained stays above
TEMPERATURE, REPEATS = 0.1, 10


def sanity(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
    check.sanity = True  # type: ignore[attr-defined]
    return check


@sanity
@needs(*READABLE, *READ_ALONE)
def check_memorizes_the_sentence(subject: Subject) -> None:
    """A one-layer model must memorize the sentence (training loss at most 1e-5) and complete its prefixes exactly."""
    learned = learn(subject, SentenceTask())
    expect_learned(subject, learned)
    expect_every_completion(subject, learned)


@sanity
@needs(*READABLE, *READ_ALONE)
def check_learns_only_unmasked_targets(subject: Subject) -> None:
    """With the first three targets masked, the model must learn the other targets (loss at most 1e-5) and must not
    learn the masked ones.
    """
    learned = learn(subject, SentenceTask(skip=SKIP))
    expect_learned(subject, learned)
    expect_masked_targets_untaught(subject, learned)
    sentence = learned.task.sentence
    expect_completion(subject, learned, sentence[:SKIP])
    for prompt in ("", sentence[:1]):
        learned.samples.append(("greedy (not judged)", prompt, complete(subject, learned, prompt)))


# The loss


def expect_learned(subject: Subject, learned: Learned) -> None:
    if learned.loss <= LEARNED:
        return
    refuse_chance(subject, learned.trainer.model.train())
    start = learned.before["train"]
    losses = f"the training loss went from {start:.3g} to {learned.loss:.3g}, expected at most {LEARNED:g}"
    if gives(subject) == "probabilities":
        fail(
            f"the model does not learn the sentence: {losses}. The model returns probabilities, and cross entropy "
            "applies a softmax to them again",
            where=cross_entropy_line(subject),
            likely=("softmax-twice",),
            advice="Return the outputs of the head (logits) without a softmax: cross_entropy applies it.",
        )
    slowly = learned.loss < 0.1 * start
    verdict = "learns the sentence, but too slowly" if slowly else "does not learn the sentence"
    fail(
        f"the model {verdict}: {losses} ({'; '.join(learned.tried)})",
        advice="Run the checks that explain it: -k 'check_initialization or check_parts or check_gradients'."
        if slowly
        else "Run -k check_gradients: a model that does not learn has usually lost a gradient or its inputs.",
        loss_before=start,
        loss_after=learned.loss,
        tried=learned.tried,
    )


def expect_masked_targets_untaught(subject: Subject, learned: Learned) -> None:
    """Their cross entropy stays high, and the logits that predict them get a gradient of exactly zero."""
    targets = ", ".join(repr(c) for c in learned.task.sentence[: learned.task.skip])
    if not learned.masked > NOT_LEARNED:
        fail(
            f"the masked targets {targets} were learned: their mean cross entropy is {learned.masked:.3g}, expected "
            f"above {NOT_LEARNED:g}, because nothing in the loss should train them",
            likely=("loss-mask-ignored", "masked-numerator-unmasked", "loss-mask-shifted-by-one"),
            advice="Print the targets that your loss keeps: the mask must line up with the targets, not the inputs.",
            masked_loss=learned.masked,
        )
    batch = learned.task.batch([learned.task.sentence]).to(subject.device)
    model = learned.trainer.model
    with torch.no_grad():
        logits = subject.logits(model, batch.tokens)
    logits = logits.detach().requires_grad_()
    loss = loss_of(subject)
    (gradient,) = torch.autograd.grad(loss(logits, batch.targets, batch.loss_mask), logits)
    wrong = [t for t in range(learned.task.skip) if bool(gradient[0, t].any())]
    if wrong:
        fail(
            f"the loss has a gradient at masked positions {wrong} (the masked targets are {targets}): the largest is "
            f"{float(gradient[0, : learned.task.skip].abs().max()):.3g}, expected exactly 0",
            likely=("loss-mask-shifted-by-one", "loss-mask-ignored"),
            advice="Mask the per-target losses before taking the mean, and divide by the number of unmasked targets.",
            positions=wrong,
        )


# The generated text


def expect_every_completion(subject: Subject, learned: Learned) -> None:
    """Greedy decoding from every proper prefix, and ten samples at a low temperature from the begin token."""
    sentence = learned.task.sentence
    for length in range(len(sentence)):
        expect_completion(subject, learned, sentence[:length])
    for repeat, completion in enumerate(completions(subject, learned, "", REPEATS, TEMPERATURE)):
        learned.samples.append((f"temperature {TEMPERATURE}", "", completion))
        how = f"sample {repeat + 1} of {REPEATS} at temperature {TEMPERATURE}"
        judge_completion(sentence, "", completion, how)


def expect_completion(subject: Subject, learned: Learned, prompt: str) -> None:
    completion = complete(subject, learned, prompt)
    learned.samples.append(("greedy", prompt, completion))
    judge_completion(learned.task.sentence, prompt, completion, "greedy decoding")


def judge_completion(sentence: str, prompt: str, got: str, how: str) -> None:
    want = sentence[len(prompt) :]
    if got == want:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    after = f"after {prompt!r}" if prompt else "from the begin token alone"
    fail(
        f"{how} {after} gives {got!r}, expected {want!r}: the first wrong character is number {at + 1}, although the "
        f"training loss is at most {LEARNED:g}",
        likely=("no-causal-mask", "causal-sees-one-future", "generate-first-position-logits"),
        advice="Look at the causal mask: with a loss this low, wrong text means that training saw later tokens, which "
        "decoding does not have.",
        prompt=prompt,
        said=got,
        expected=want,
    )


def complete(subject: Subject, learned: Learned, prompt: str) -> str:
    return completions(subject, learned, prompt, 1, 0.0)[0]


def completions(subject: Subject, learned: Learned, prompt: str, copies: int, temperature: float) -> list[str]:
    """What is generated after the begin token and the prompt, up to the length of the sentence."""
    tokenizer = learned.task.tokenizer
    tokens = [tokenizer.begin, *tokenizer.encode(prompt)]
    start = torch.tensor([tokens] * copies, device=subject.device)
    rest = len(learned.task.sentence) - len(prompt)
    if learned.generate is None:
        learned.generate = generate_of(subject, learned)
    return ["".join(readable(tokenizer, i) for i in row) for row in learned.generate(start, rest, temperature)]


def generate_of(subject: Subject, learned: Learned) -> Generate:
    """The subject's own generate if it runs and takes a temperature, else ours over its logits."""
    model = learned.trainer.model.eval()
    ours = functools.partial(from_logits, subject, model)
    try:
        own = replace(decoder(subject, model, learned.task.tokenizer.vocab_size), block_size=learned.task.block_size)
        own.wants("temperature")
        theirs = functools.partial(from_own_generate, own, model, subject.seed)
        longest = len(learned.task.sentence)
        (completion,) = theirs(torch.full((1, 1), learned.task.tokenizer.begin, device=subject.device), longest, 0.0)
    except NotApplicable:
        return ours
    except Exception as error:  # needs what only its own script sets up, or a bug: for the generation checks
        advise(f"generate raises {type(error).__name__}: {error}; the text was decoded from the logits instead")
        return ours
    if len(completion) != longest:  # also for the generation checks; the training is not to blame
        advise(f"generate returns {len(completion)} of {longest} tokens; the text was decoded from the logits instead")
        return ours
    return theirs


def from_own_generate(
    own: Decoder, model: nn.Module, seed: int, start: Tensor, n: int, temperature: float
) -> list[list[int]]:
    """Few functions accept a temperature of 0; at a loss of 1e-5, a temperature of 0.1 is as good as greedy."""
    with torch_seeded(seed):
        return own(model, start, n, temperature=temperature or TEMPERATURE)


def from_logits(subject: Subject, model: nn.Module, start: Tensor, n: int, temperature: float) -> list[list[int]]:
    generator = torch.Generator().manual_seed(subject.seed) if temperature else None
    text = generate(
        lambda read: subject.logits(model, read), start, n,
        temperature=temperature, generator=generator, use_cache=False,
    )  # fmt: skip
    rows: list[list[int]] = text[:, start.shape[1] :].tolist()
    return rows


def readable(tokenizer: CharacterTokenizer, i: int) -> str:
    """The character of a token; a begin token is shown as <begin>, an unknown id as <id>."""
    return tokenizer.decode([i]) or "<begin>" if 0 <= i < tokenizer.vocab_size else f"<{i}>"
