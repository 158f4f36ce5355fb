"""The prompt router: choose adapters by how near their captions, or examples, are to a prompt.

A text's embedding is the mean over tokens of the text encoder's last hidden states, less that of the empty text. An
adapter's is the mean over its captions, which training writes into the card, or over examples that are given. Before
two are compared, the mean of all adapters is taken off: what they share would outweigh what tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmpeft.errors import BankError, ConfigError
from mmpeft.mix import Mix

Weighting = Literal["softmax", "proportional"]

# Cosines are divided by this before softmax: 0.35 more is four times the weight.
_TEMPERATURE = 0.25


def route(
    prompt: str,
    embeddings: Mapping[str, Sequence[float] | None],
    tokenizer: Any,
    text_encoder: Any,
    *,
    examples: Mapping[str, Sequence[str]] | None = None,
    top_k: int = 2,
    weighting: Weighting = "softmax",
) -> Mix:
    """Choose the adapters that are nearest to a prompt; their weights sum to 1.

    Similarity is the cosine between embeddings. "softmax": weights go with exp(similarity / 0.25); "proportional": with
    the similarity, and adapters that point away from the prompt get nothing.

    Args:
        prompt: what is to be drawn.
        embeddings: of all adapters by name, each the mean over its captions, (D,), or None where the card has none.
        tokenizer: the pipeline's own.
        text_encoder: the pipeline's own, without adapters: what they change in it would tell for or against them.
        examples: a few prompts for adapters whose cards have no embedding, or whose cards should not count.
        top_k: how many adapters count at most.

    Raises:
        BankError: there is no tokenizer or text encoder, no adapter with an embedding, or one that does not fit.
        ConfigError: `top_k` is no positive number, `weighting` is unknown, or an adapter has no example.
    """
    if top_k < 1:
        raise ConfigError(f"top_k: at least one adapter must count; got {top_k}")
    if weighting not in ("softmax", "proportional"):
        raise ConfigError(f"weighting: must be 'softmax' or 'proportional'; got {weighting!r}")
    examples = examples or {}
    for name, prompts in examples.items():
        check_examples(name, prompts)
    names = [name for name, embedding in embeddings.items() if name in examples or embedding]
    if not names:
        raise BankError(
            "no adapter here can be routed to: their cards carry no embedding of their captions; describe them with a "
            "few prompts: bank.describe(name, prompts=[...])"
        )
    here = embed([prompt], tokenizer, text_encoder)[0]
    vectors = {
        name: embed(examples[name], tokenizer, text_encoder).mean(0)
        if name in examples
        else _of_card(name, embeddings[name], here)
        for name in names
    }
    shared = torch.stack(list(vectors.values())).mean(0) * (len(names) > 1)
    similarities = {
        name: float(torch.cosine_similarity(vector - shared, here - shared, 0))
        for name, vector in vectors.items()
    }
    chosen = sorted(names, key=lambda name: -similarities[name])[:top_k]
    shares = _shares(torch.tensor([similarities[name] for name in chosen]), weighting)
    return Mix.of({name: share for name, share in zip(chosen, shares.tolist(), strict=True) if share})


def check_examples(name: str, prompts: Sequence[str]) -> None:
    """Refuse what is no list of example prompts.

    Raises:
        ConfigError: so.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"{name!r} is described by a list of prompts, at least one; got {prompts!r}")


@torch.no_grad()
def embed(texts: Sequence[str], tokenizer: Any, text_encoder: Any) -> Tensor:
    """Embed texts with a text encoder as it is at the moment; what is longer than it reads is cut off.

    Returns:
        (B, D), float32, on the CPU; zero for the empty text.

    Raises:
        BankError: there is no tokenizer or text encoder.
    """
    if tokenizer is None or text_encoder is None:
        raise BankError("routing by prompt needs a bank on a pipeline with a tokenizer and a text encoder")
    length = min(tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", 512))
    tokens = tokenizer(
        ["", *texts], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return embedding_of(text_encoder(tokens.to(text_encoder.device)).last_hidden_state)


def embedding_of(states: Tensor) -> Tensor:
    """Make embeddings of a text encoder's last hidden states.

    Args:
        states: of the empty text, then of others, (1 + B, T, D).

    Returns:
        (B, D), float32, on the CPU.
    """
    means = states.float().mean(1).cpu()
    return means[1:] - means[:1]


def _of_card(name: str, values: Sequence[float] | None, here: Tensor) -> Tensor:
    try:
        vector = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise BankError(f"the embedding in the card of {name!r} is no list of numbers: {error}") from error
    if vector.shape != here.shape:
        raise BankError(
            f"the card of {name!r} has an embedding of {vector.numel()} numbers, this text encoder makes {len(here)}; "
            f"describe the adapter with a few prompts: bank.describe({name!r}, prompts=[...])"
        )
    return vector


def _shares(similarities: Tensor, weighting: Weighting) -> Tensor:
    if weighting == "softmax":
        return (similarities / _TEMPERATURE).softmax(0)
    positive = similarities.clamp(min=0)
    return positive / positive.sum().clamp(min=1e-12)
