"""A small CLIP tokenizer learned from a data set's own captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def train_clip_tokenizer(captions: Sequence[str], vocab_size: int, max_length: int) -> Any:
    """Byte-pair encoding in CLIP's form (lower case, `</w>` at the end of words), learned from captions.

    Every byte is in the vocabulary, so any text in any script has tokens: unknown words become pieces of known ones. The same captions
    always give the same tokenizer.

    Args:
        captions: the text to learn from.
        vocab_size: tokens in all, at least 514 (256 bytes, each also as the end of a word, start and end of text).
        max_length: tokens per caption, start and end included.
    Returns: a `transformers.CLIPTokenizer`.
    References: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; Radford et al. 2021, section 2.4, https://arxiv.org/abs/2103.00020
    """
    import json

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if vocab_size < 514:
        raise ValueError(f"vocab_size {vocab_size}: at least 514, or some text would have no tokens.")
    if max_length < 3:
        raise ValueError(f"max_length {max_length}: at least 3, for the start, one token and the end.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "isolated"),  # CLIP's words
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Equally frequent pairs are merged in the order of their symbols' numbers. Symbols that the learner meets in the captions are numbered
    # in the random order of a hash table, so all of them are given to it: two runs, or two processes of one, learn the same tokenizer.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=[byte + "</w>" for byte in alphabet],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned]
    words = [*alphabet, *[byte + "</w>" for byte in alphabet]]
    seen = set(words)
    words += [word for word in dict.fromkeys(a + b for a, b in merges) if word not in seen]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
