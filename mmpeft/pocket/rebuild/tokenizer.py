"""Fit the pocket base's tokenizer: CLIP's byte-pair encoding, with a vocabulary of its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32
"""tokens of a caption, both ends included"""
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""how CLIP cuts a text into words (Radford et al. 2021, arXiv:2103.00020): no merge crosses them"""


def learn_merges(texts: Sequence[str], vocabulary: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges, the most frequent first (Sennrich et al. 2016, arXiv:1508.07909).

    Args:
        texts: the captions to encode well.
        vocabulary: tokens that the tokenizer may have: 256 bytes inside and 256 at the end of a word, the two
            ends, and one for each merge.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    fitted = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, continuing_subword_prefix=""))
    fitted.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fitted.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len((START, END)),
        min_frequency=2,
        end_of_word_suffix=WORD_END,
        initial_alphabet=letters,
        # Named beforehand, or they are numbered in the order of a hash map, which decides ties between merges.
        special_tokens=[letter + WORD_END for letter in letters],
        show_progress=False,
    )
    fitted.train_from_iterator(texts, trainer)
    return _merges_of(fitted.to_str())


def _merges_of(tokenizer_json: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in json.loads(tokenizer_json)["model"]["merges"]]


def build_tokenizer(merges: Sequence[tuple[str, str]]) -> "CLIPTokenizer":
    """Build the tokenizer of a list of merges; every byte is in its vocabulary, so no text is unknown to it."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(merges),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )


def save_tokenizer(tokenizer: "CLIPTokenizer", merges: Sequence[tuple[str, str]], folder: Path) -> None:
    """Save in both layouts: tokenizer.json, and the vocab.json with merges.txt that other tools read."""
    tokenizer.save_pretrained(folder)
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1]))
    text = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
