"""Tokenizers of both usual kinds that know single letters: every id and every split is plain to see."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gossamer.tokens.tokenizer import Tokenizer


def sentencepiece(letters: str) -> Tokenizer:
    """SentencePiece's kind of tokenizer: a piece for each of `letters`, bytes for everything else."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocabulary = {name: index for index, name in enumerate(names)}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(made.to_str().encode(), {"bos_token": "<s>", "eos_token": "</s>"})


def byte_level(_: str) -> Tokenizer:
    """GPT-2's kind: every byte is a letter of an alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({name: index for index, name in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(made.to_str().encode(), {"bos_token": "<s>", "eos_token": "</s>"})
