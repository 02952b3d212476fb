"""The tokenizer, trained on the train captions, and the text encoder's shape.

Both are the classes Stable Diffusion uses, so that what is exported needs no code of its own.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 24  # the longest prompt of the data has 22 tokens with its two marks
HIDDEN = 160
START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"


def train_tokenizer(texts: list[str], folder: Path, merges: int = 1500) -> CLIPTokenizer:
    """Learn `merges` byte-pair merges from `texts` and save a CLIP tokenizer to `folder`.

    All 256 bytes, alone and at the end of a word, are in the vocabulary whether the texts use
    them or not, so every character of every language has tokens.
    """
    blank = CLIPTokenizer().backend_tokenizer  # lends CLIP's normalizer and word splitting
    learner = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]][:merges]
    pieces = [*alphabet, *(a + SUFFIX for a in alphabet), *("".join(m) for m in learned)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    # The two files that versions of transformers before 5 read.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in learned)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text transformer over the tokenizer's vocabulary, with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids as the pipeline makes them: cut and padded to LENGTH. Shape: (b, LENGTH)."""
    batch = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True)
    return torch.tensor(batch["input_ids"])
