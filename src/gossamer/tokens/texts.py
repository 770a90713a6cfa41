"""Whole texts, and pairs of them, as an encoder reads them: special tokens around them, cut at a length."""

from collections.abc import Sequence
from functools import cached_property

import tokenizers

from gossamer.errors import ConfigError
from gossamer.tokens.encoder import Encoder, valid_text

Text = str | tuple[str, str]


class Texts:
    """Encodes texts of at most `max_length` tokens, special ones included; longer ones lose their ends.

    Of a pair the longer text is cut first, as transformers' "longest_first" does. `num_cut` counts the texts,
    or pairs, that were cut.
    """

    def __init__(self, tokenizer: Encoder, max_length: int) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        if max_length <= (num_added := self._tokenizer.num_special_tokens_to_add(is_pair=True)):
            raise ConfigError(
                f"at most {max_length} tokens a text; expected more than {num_added}, its marks"
            )
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        self.max_length, self.num_cut = max_length, 0

    def encode(self, texts: Sequence[Text]) -> list[tokenizers.Encoding]:
        """Of each text its `ids`, `type_ids`, `offsets` and `word_ids`, as the library has them."""
        given = [valid_text(it) if isinstance(it, str) else (*map(valid_text, it),) for it in texts]
        return self._counted(self._tokenizer.encode_batch(given))

    def encode_words(self, words: Sequence[str]) -> tokenizers.Encoding:
        """Of a text that is cut into words already; `word_ids` say which of them a token is of.

        Byte-level tokenizers and SentencePiece's read a space before every word, also before the first.
        """
        [encoded] = self._counted([self._of_words.encode([*map(valid_text, words)], is_pretokenized=True)])
        return encoded

    def encode_windows(self, question: str, context: str, stride: int) -> list[tokenizers.Encoding]:
        """A question with each window of its context, two of which share `stride` tokens.

        They share half a window at most. ConfigError for a question that leaves no room.
        """
        first, second = (
            self._whole.encode(valid_text(it), add_special_tokens=False) for it in (question, context)
        )
        room = self.max_length - self._whole.num_special_tokens_to_add(is_pair=True) - len(first)
        if room < 1:
            raise ConfigError(
                f"the question has {len(first)} tokens; expected at most {len(first) + room - 1}, so that "
                f"one of {self.max_length} is left for the text that it asks of: {question!r:.60}"
            )
        second.truncate(room, stride=min(stride, room // 2))
        return [self._whole.post_process(first, it) for it in (second, *second.overflowing)]

    def _counted(self, encoded: list[tokenizers.Encoding]) -> list[tokenizers.Encoding]:
        self.num_cut += sum(bool(it.overflowing) for it in encoded)
        return encoded

    @cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        """The tokenizer without a limit."""
        built = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        built.no_truncation()
        return built

    @cached_property
    def _of_words(self) -> tokenizers.Tokenizer:
        """The tokenizer with the options by which transformers reads lists of words."""
        document = self._tokenizer.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"always"')
        document = document.replace('"add_prefix_space":false', '"add_prefix_space":true')
        return tokenizers.Tokenizer.from_str(document)


def marks(tokenizer: Encoder) -> list[int]:
    """What begins and what ends a text, such as [CLS] and [SEP]; ConfigError where it is anything else."""
    if len(found := tokenizer.encode("")) != 2:
        raise ConfigError(
            f"tokenizer.json puts {len(found)} tokens around a text; expected two, one before and one behind "
            "it (its post_processor says which)"
        )
    return found
