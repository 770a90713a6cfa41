"""The bodies that an encoder's routes take: OpenAI's, Cohere's and Jina's, and text-embeddings-inference's.

Read as strictly as those of completions (see wire.py); fields that change nothing are accepted.
"""

from typing import Any, Literal

from msgspec import Struct

from gossamer.server.wire import RequestError

MOST_INPUTS = 2048  # texts in one call, as OpenAI's API has it

Inputs = str | list[Any]


class OpenAIFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """`truncate_prompt_tokens` = -1 is vLLM's word for cutting what is too long, which else is refused."""

    model: str
    input: Inputs
    truncate_prompt_tokens: Literal[-1] | None = None
    user: Any = None


class EmbeddingsRequest(OpenAIFields, forbid_unknown_fields=True, kw_only=True):
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class ClassifyRequest(OpenAIFields, forbid_unknown_fields=True, kw_only=True):
    pass


class ScoreRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """vLLM's: one text beside each of several, or as many beside as many."""

    model: str
    text_1: str | list[str]
    text_2: str | list[str]
    truncate_prompt_tokens: Literal[-1] | None = None
    user: Any = None

    def texts(self) -> tuple[list[str], list[str]]:
        """RequestError where they make no pairs."""
        first, second = ([it] if isinstance(it, str) else it for it in (self.text_1, self.text_2))
        if len(first) not in (1, len(second)):
            raise RequestError(
                f"text_1 has {len(first)} texts and text_2 {len(second)}; expected one text_1, or as many.",
                param="text_1",
            )
        return first, second


class Document(Struct, forbid_unknown_fields=True):
    text: str


class RerankRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    query: str
    documents: list[str | Document]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool = False
    user: Any = None

    def texts(self) -> list[str]:
        return [it if isinstance(it, str) else it.text for it in self.documents]


class TeiFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Texts that are too long are refused unless `truncate`; they lose their ends only."""

    truncate: bool = False
    truncation_direction: Literal["right", "Right"] = "right"


class TeiEmbedRequest(TeiFields, forbid_unknown_fields=True, kw_only=True):
    inputs: Inputs
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: int | None = None


class TeiRerankRequest(TeiFields, forbid_unknown_fields=True, kw_only=True):
    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False


class TeiPredictRequest(TeiFields, forbid_unknown_fields=True, kw_only=True):
    parameters: dict[str, None] = {}  # as huggingface_hub's client sends them, none of which may be set
    inputs: Inputs
    raw_scores: bool = False


def texts_or_ids(given: Inputs, field: str) -> list[str] | list[list[int]]:
    """Every text of a body, or every list of token ids; RequestError for anything else."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(it, str) for it in given):
        return given
    if _is_ids(given):
        return [given]
    if given and all(_is_ids(it) for it in given):
        return given
    raise RequestError(
        f"{field} must be a text, a list of texts, a list of token ids, or a list of such lists; none empty.",
        param=field,
    )


def texts_or_pairs(given: Inputs, field: str) -> tuple[list[str | tuple[str, str]], bool]:
    """text-embeddings-inference's texts, and whether several were asked for.

    A text, [text] or [text, text], which is a pair; or a list of such lists.
    """
    one = [given] if isinstance(given, str) else given
    many = one if one and all(isinstance(it, list) for it in one) else [one]
    if not all(len(it) in (1, 2) and all(isinstance(part, str) for part in it) for it in many):
        raise RequestError(
            f"{field} must be a text, [text], [text, text] for a pair, or a list of such lists.", param=field
        )
    return [it[0] if len(it) == 1 else (it[0], it[1]) for it in many], many is one


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(it) is int for it in given)
