"""Log probabilities as the API writes them: one way for chats, an older one for plain completions."""

from collections.abc import Sequence
from typing import Any

from gossamer.engine import TokenLogprob
from gossamer.tokens.tokenizer import Tokenizer

LEAST = -9999.0  # what the API has for tokens that are as good as impossible: JSON knows no infinity


def of_chat(found: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """{"content": an object for each token, "refusal": None}; every object has the likeliest in its place."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": _number(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    content = [
        entry(of.token_id, of.logprob) | {"top_logprobs": [entry(*top) for top in of.likeliest]}
        for of in found
    ]
    return {"content": content, "refusal": None}


def of_completion(found: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """Lists with a value for each token; of a prompt's first token there are no probabilities, but null.

    `top_logprobs` has the likeliest by their texts, and the token itself. Of several tokens with one text,
    the likeliest counts: so a token is the likeliest if, and only if, no number there is above its own.
    """

    def top(of: TokenLogprob) -> dict[str, float | None] | None:
        if of.logprob is None:
            return None
        by_text: dict[str, float | None] = {}
        for token, logprob in (*of.likeliest, (of.token_id, of.logprob)):
            by_text.setdefault(tokenizer.token_text(token), _number(logprob))
        return by_text

    return {
        "tokens": [tokenizer.token_text(of.token_id) for of in found],
        "token_logprobs": [_number(of.logprob) for of in found],
        "top_logprobs": [top(of) for of in found],
        "text_offset": [of.offset for of in found],
    }


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
