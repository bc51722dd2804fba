"""Twelve words at a time: models, pairs and what is measured for the recipe adpa."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from steelyard.lab.data import newsgroups, sentiment_lexicon
from steelyard.lab.preferences import Pairs, draw_pairs
from steelyard.lab.tiny_lm import completion_logprobs, sample
from steelyard.lab.words import LexiconReward, WordText, word_model, word_text
from steelyard.preference import f_dpo_loss
from steelyard.recipes._adpa_testbed import Look

PROMPT, RESPONSE = 4, 8  # words
BATCH = 32
TEXT_LOOKS = 5  # times at which a training is measured

TextLoss = Callable[[Any, Tensor], Tensor]
"""Of a model and the numbers of the pairs."""


class Scene(NamedTuple):
    """Models and data."""

    text: WordText
    held_out: Tensor
    """``[N, 13]``: the first token and twelve words, from other posts."""
    reward: LexiconReward
    judge: LexiconReward
    sft: Any
    before: Any
    aligned: Any
    pairs: Pairs
    own: tuple[Tensor, Tensor]
    """The student's responses to the pairs' prompts, and their mask."""


def lexicon(text: WordText, name: Any) -> LexiconReward:
    """Ratings without the single letters, which are emoticons in a lexicon."""
    ratings = sentiment_lexicon(name)
    return LexiconReward(text, {word: value for word, value in ratings.items() if len(word) > 1})


def make_scene(*, words: int, base_steps: int, pairs: int, updates: int, seed: int) -> Scene:
    """Train both models on text, draw pairs from the teacher and align it by DPO.

    A fifth of the pairs tells when to stop the alignment. Raters see a difference of 1 in the sum
    of the ratings with odds of e to 1.
    """
    posts = (body for _, body in newsgroups("train"))
    whole = word_text(posts, words=words, window=PROMPT + RESPONSE)
    kept = 4 * len(whole.windows) // 5
    text = WordText(whole.tokenizer, whole.words, whole.windows[:kept])
    first = torch.full((len(whole.windows) - kept, 1), text.tokenizer.bos_token_id)
    held_out = torch.cat([first, whole.windows[kept:]], dim=1)
    teacher = word_model(text, seed=seed, steps=base_steps)
    student = word_model(text, seed=seed + 1, steps=base_steps, hidden_size=16)
    generator = torch.Generator().manual_seed(seed)
    reward = lexicon(text, "vader")
    prompts = text.prompts(pairs, generator, length=PROMPT)
    both = draw_pairs(teacher, *prompts, reward.total, max_new_tokens=RESPONSE, generator=generator)
    drawn, others = both[slice(len(both) // 5, None)], both[slice(len(both) // 5)]
    aligned = align(teacher, drawn, others, updates, seed)
    own = answer(student, drawn.prompt_ids, generator)
    models = student.eval(), teacher.eval(), aligned.eval()
    return Scene(text, held_out, reward, lexicon(text, "afinn"), *models, drawn, own)


def align(teacher: Any, pairs: Pairs, others: Pairs, updates: int, seed: int) -> Any:
    """DPO; the time to stop is that of the lowest loss on other pairs."""
    model = copy.deepcopy(teacher)
    loss, other_loss = (dpo_on_text(teacher, given, 0.1) for given in (pairs, others))
    best, lowest = model, torch.inf
    for _ in train_text(model, loss, len(pairs), updates, seed, TEXT_LOOKS):
        with torch.no_grad():
            found = other_loss(model, torch.arange(len(others))).item()
        if found < lowest:
            best, lowest = copy.deepcopy(model), found
    return best


def answer(model: Any, prompts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One response to each prompt, always ``RESPONSE`` wide, and its mask."""
    shown = torch.ones_like(prompts).bool()
    drawn = sample(model, prompts, shown, max_new_tokens=RESPONSE, generator=generator)
    missing = (0, RESPONSE - drawn.tokens.shape[1])
    return functional.pad(drawn.tokens, missing), functional.pad(drawn.mask, missing)


def next_tokens(model: Any, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Logits that predict each token of the responses, ``[N, T, V]``."""
    ids = torch.cat([prompts, tokens[:, :-1]], dim=1)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=tokens.shape[1]).logits
    return logits


def train_text(
    model: Any, loss: TextLoss, count: int, updates: int, seed: int, looks: int
) -> Iterator[int]:
    """Train in place with Adam on 32 pairs an update; stop for each look."""
    generator, when = torch.Generator().manual_seed(seed), look_steps(updates, looks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(1, updates + 1):
        index = torch.randperm(count, generator=generator)[:BATCH]
        optimizer.zero_grad()
        loss(model, index).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in when:
            yield step


def look_steps(steps: int, looks: int) -> set[int]:
    """Steps after which is measured: early ones lie closer, since KL grows fast at first."""
    return {max(look, -(-steps * look**2 // looks**2)) for look in range(1, looks + 1)}


def dpo_on_text(reference: Any, pairs: Pairs, beta: float) -> TextLoss:
    """DPO with the log-probabilities of the reference computed on the way."""

    def loss(model: Any, index: Tensor) -> Tensor:
        part = pairs[index]
        with torch.no_grad():
            fixed = completion_logprobs(reference, *part.together())
        ratio = completion_logprobs(model, *part.together()) - fixed
        chosen, rejected = ratio.sum(-1).chunk(2)
        return f_dpo_loss(chosen, rejected, beta=beta)

    return loss


@torch.no_grad()
def look_at_text(scene: Scene, model: Any, count: int, seed: int) -> Look:
    """Answer held-out prompts: one half of them is for choosing, the other is reported."""
    prompts = scene.held_out[: 2 * count, : 1 + PROMPT]
    tokens, mask = answer(model, prompts, torch.Generator().manual_seed(seed))
    p, q = (next_tokens(m, prompts, tokens).log_softmax(-1) for m in (model, scene.sft))
    kl = ((p.exp() * (p - q)).sum(-1) * mask).sum(-1)  # exact in each state that was visited
    reward, judge = (lexicon.total(tokens, mask) for lexicon in (scene.reward, scene.judge))
    half = len(prompts) // 2
    means = (kl[:half], reward[:half], reward[half:], judge[half:])
    return Look(*(values.mean().item() for values in means))


@torch.no_grad()
def perplexity(scene: Scene, model: Any, count: int) -> float:
    """Of the last eight words of held-out windows, given the first four."""
    prompts, tokens = scene.held_out[:count].tensor_split([1 + PROMPT], dim=1)
    logits = next_tokens(model, prompts, tokens).flatten(0, 1)
    return functional.cross_entropy(logits, tokens.flatten()).exp().item()
