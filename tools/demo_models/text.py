"""The two tokenizers, trained on the demo's own names, and the table of encoded prompts."""

import string
from collections.abc import Iterable

import numpy as np

from tools.demo_models.data import prompts_for

CLIP_LENGTH = 77
CLIP_VOCAB = 2000
T5_VOCAB = 1755
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def corpus(names: Iterable[str], aliases: Iterable[str]) -> list[str]:
    """Every prompt of every name, once as it is and once with capitals."""
    lines = [line for name in [*names, *aliases] for line in prompts_for(name)]
    return lines + [line.title() for line in lines[:: len(prompts_for(""))]]


def train_clip_tokenizer(lines: list[str]):
    """A byte-level BPE of CLIP's kind: no byte is unknown; the end marker pads and has the highest id."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # Trained through the very pre-tokenizer that CLIPTokenizer installs when it is loaded again.
    split = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=EOS))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # A letter may also end a word, and a word may end in a letter the corpus never ends one with.
    lines = [*lines, " ".join(alphabet), " ".join(string.ascii_letters + string.digits + string.punctuation)]
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCAB - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(lines, trainer)
    import json

    state = json.loads(bpe.to_str())["model"]
    vocab = dict(sorted(state["vocab"].items(), key=lambda item: item[1]))
    vocab |= {BOS: len(vocab), EOS: len(vocab) + 1}
    merges = [tuple(pair) for pair in state["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def train_t5_tokenizer(lines: list[str]):
    """A Unigram tokenizer of T5's kind; every printable ASCII character is a piece, so none is unknown."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    printable = [c for c in string.printable if not c.isspace()]
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_VOCAB,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=printable,
        show_progress=False,
    )
    unigram.train_from_iterator(lines, trainer)
    pieces = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    known = {piece for piece, _ in pieces}
    floor = min(score for _, score in pieces) - 1.0
    pieces += [(char, floor) for char in ["▁", *printable] if char not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def encode(tokenizer, lines: list[str], length: int) -> np.ndarray:
    """Padded as the host pads, (prompts, length) int64."""
    encoded = tokenizer(lines, padding="max_length", max_length=length, truncation=True)
    tokenizer.backend_tokenizer.no_truncation()  # or the length would be saved with the tokenizer
    tokenizer.backend_tokenizer.no_padding()
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def prompt_tables(
    names: Iterable[str], aliases: Iterable[str], clip, t5, clip_length: int, t5_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all prompts, two arrays (names, prompts a name, length)."""
    lines = [
        line
        for name, alias in zip(names, aliases, strict=True)
        for line in prompts_for(name) + prompts_for(alias)
    ]
    count = len(list(names))
    shape = (count, len(lines) // count, -1)
    return (
        encode(clip, lines, clip_length).reshape(shape),
        encode(t5, lines, t5_length).reshape(shape),
    )
