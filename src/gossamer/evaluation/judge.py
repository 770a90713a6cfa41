"""An outside judge of answers: an OpenAI-compatible chat endpoint that is shown two of them."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Literal

from gossamer.errors import ConfigError

TIMEOUT_S = 300.0
WAITS_S = (1.0, 4.0)  # before each further try, where the endpoint does not answer or is busy
BUSY = (408, 429)
REFUSED = (400, 413, 422)  # this prompt, as one that is too long; others may be answered
Preferred = Literal["A", "B", "C", ""]
ASKED = """\
Two assistants answered the user's question below. Judge as an impartial reader which answer serves the user \
better: whether it does what was asked, is correct, helpful, to the point and clear. The order in which the \
answers stand, their length and the assistants' names must not matter. Give your reasons in a few sentences, \
and then your verdict on a line of its own: [[A]] if assistant A's answer is better, [[B]] if assistant B's \
is, [[C]] for a tie.

[Question]
{question}

[Assistant A's answer]
{first}
[End of assistant A's answer]

[Assistant B's answer]
{second}
[End of assistant B's answer]"""


class RefusedPrompt(Exception):
    """What the endpoint says of a prompt that it does not take."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect an error: the next host would be sent the key."""

    def redirect_request(self, *request: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class Judge:
    """A model at `url`, such as http://localhost:8000/v1; its key is OPENAI_API_KEY, where that is set."""

    def __init__(self, url: str, model: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--judge is {url!r}; expected the URL of an endpoint: http://HOST:PORT/v1")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model = model

    def prefers(self, question: str, first: str, second: str) -> tuple[Preferred, str]:
        """A, B, or C for a tie, and all that the judge said; "" where it came to no verdict.

        A prompt that the endpoint refuses has none. Raises OSError where the endpoint does not answer,
        ConfigError where it takes no request of ours (a wrong key, model or URL) or redirects it.
        """
        asked = ASKED.format(question=question, first=first, second=second)
        try:
            said = self._complete([{"role": "user", "content": asked}])
        except RefusedPrompt as refused:
            return "", str(refused)
        verdicts = re.findall(r"\[\[([ABC])\]\]", said)
        return (verdicts[-1] if verdicts else ""), said

    def _complete(self, messages: list[dict[str, str]]) -> str:
        content = {"model": self.model, "messages": messages, "temperature": 0}
        for wait in WAITS_S:
            try:
                return self._post(content)
            except OSError:
                time.sleep(wait)
        return self._post(content)

    def _post(self, content: dict[str, object]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(content).encode(), headers)
        try:
            with _OPENER.open(request, timeout=TIMEOUT_S) as response:
                answer = json.loads(response.read())
            text = answer["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            body = error.read(400).decode("utf-8", "replace")
            said = error.reason if body.lstrip().startswith("<") else " ".join(body.split())
            if error.code in REFUSED:
                raise RefusedPrompt(f"refused: {error.code} {said}") from error
            if error.code < 400:
                raise ConfigError(
                    f"the judge at {self.url} redirects to {error.headers['Location']}, which is not "
                    "followed; give --judge the URL that answers"
                ) from error
            if error.code < 500 and error.code not in BUSY:
                raise ConfigError(
                    f"the judge at {self.url} refuses the request: {error.code} {said}"
                ) from error
            raise OSError(f"{error.code} {said}") from error
        except (http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise OSError(f"no answer of a chat endpoint: {type(error).__name__} {error}") from error
        return text if isinstance(text, str) else ""
