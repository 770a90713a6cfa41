"""What a dense chat model writes itself: chats to requests of ours, to be calibrated on and taught by.

A stranger has no text that the model was trained on. The requests are every pair of a subject and a form, in
a fixed order; none of them is asked or measured in the demo.
"""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from gossamer.engine import OpenModel, SamplingParams
from gossamer.engine.request import Request
from gossamer.engine.scheduler import Scheduler
from gossamer.job.report import Event, Progress

TEMPERATURE, TOP_P = 0.8, 0.95  # at 1.0 names and facts of a small model are wild
MAX_BATCH = 64  # which write nearly twice as fast as 16
# The numbers of forms and subjects have no common divisor, so that all pairs come before one comes again.
FORMS = (
    "Tell me about {}.",
    "Explain {} to a child.",
    "What do you know about {}? Answer in one sentence.",
    "Write a short story about {}.",
    "Give me three facts about {}.",
    "Answer in a few words: what comes to your mind when you hear of {}?",
    "Why do people care about {}?",
    "Write a letter to a friend about {}.",
    "Tell me something surprising about {}, in one sentence.",
    "What should a beginner know about {}?",
    "How would you describe {} to someone who has never heard of it?",
    "Give me a short history of {}.",
    "Ask me a question about {}, and then answer it yourself.",
)
SUBJECTS = (
    "baking bread", "the water cycle", "chess", "bees", "paper", "vaccines", "banks", "lighthouses",
    "autumn leaves", "the moon", "gravity", "rivers", "the human heart", "trains", "clocks", "music", "salt",
    "volcanoes", "electricity", "libraries", "the number zero", "money", "sleep", "glass", "coffee", "dogs",
    "whales", "mountains", "maps", "bicycles", "poetry", "lists in Python", "the internet", "computers",
    "democracy", "the Roman Empire", "Shakespeare", "the Olympic Games", "Japan", "Egypt", "London",
    "deserts", "winter", "tea", "cooking rice", "gardens", "birds", "bridges", "ships", "photography",
    "telescopes", "dinosaurs", "atoms", "friendship", "learning a language", "hiking", "planning a week",
    "fractions", "triangles", "plastic", "earthquakes", "the history of writing", "good manners", "robots",
)  # fmt: skip


def requests() -> Iterator[str]:
    """Every pair of a subject and a form, again and again."""
    for n in count():
        yield FORMS[n % len(FORMS)].format(SUBJECTS[n % len(SUBJECTS)])


def write_text(
    model: OpenModel, file: Path, num_tokens: int, answer_tokens: int, seed: int, progress: Progress
) -> int:
    """Write chats of sampled answers, a JSON line each, until there are `num_tokens`; returns how many.

    The chats are without the BOS that the template begins with, since whoever reads them puts one before
    each. Each has a seed of its own. No more are begun than may be needed, so that none is thrown away.
    """
    scheduler, bos, asked = Scheduler(model.native, MAX_BATCH), model.tokenizer.required_bos(), requests()
    chats: list[Request] = []
    running: list[Request] = []
    written = expected = 0  # of the chats that have ended, and at most of those that run
    while written < num_tokens:
        progress(Event("write", "the dense model writes what it is taught by", written, num_tokens))
        while len(running) < MAX_BATCH and written + expected < num_tokens:
            prompt = model.tokenizer.chat([{"role": "user", "content": next(asked)}])
            params = SamplingParams(answer_tokens, TEMPERATURE, top_p=TOP_P, seed=seed + len(chats))
            running.append(model.request(prompt, params))
            scheduler.add(running[-1])
            chats.append(running[-1])
            expected += len(prompt) + answer_tokens
        scheduler.step()
        for chat in [chat for chat in running if chat.finish_reason is not None]:
            running.remove(chat)
            expected -= len(chat.prompt_ids) + answer_tokens
            written += len(chat.prompt_ids) + len(chat.token_ids)
    with file.open("w", encoding="utf-8") as stream:
        for chat in chats:
            ids = [*chat.prompt_ids, *chat.token_ids]
            text = model.tokenizer.decode(ids[ids[0] == bos :], skip_special_tokens=False)
            stream.write(json.dumps({"text": text}) + "\n")
    progress(Event("write", "", num_tokens, num_tokens))
    return written
