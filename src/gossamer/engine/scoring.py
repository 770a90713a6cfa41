"""Log probabilities of given tokens after given ones: what evaluations ask of a packed model."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from gossamer import _native

CALL_TARGETS = 256  # whose logits are in native memory at once
BATCH_TOKENS = 4096  # that are in the cache together

Ids = Sequence[int]
Score = tuple[list[float], list[bool]]


def score(model: _native.Model, requests: Sequence[tuple[Ids, Ids]]) -> Iterator[Score]:
    """For each (context, continuation), in order: log p of every token of the continuation, and whether each
    is the likeliest.

    Both have at least one token. A context that follows itself, as with the choices of a question, is
    computed once. The results do not depend on what else is asked.
    """
    batch: list[tuple[Ids, list[Ids]]] = []
    num_tokens = 0
    for context, members in groupby(requests, lambda request: request[0]):
        continuations = [continuation for _, continuation in members]
        assert len(context) and all(map(len, continuations))
        wanted = len(context) + max(map(len, continuations))
        if batch and num_tokens + wanted > BATCH_TOKENS:
            yield from _score_batch(model, batch)
            batch, num_tokens = [], 0
        batch.append((context, continuations))
        num_tokens += wanted
    if batch:
        yield from _score_batch(model, batch)


def _score_batch(model: _native.Model, batch: Sequence[tuple[Ids, list[Ids]]]) -> Iterator[Score]:
    """Contexts but for their last tokens first; then a continuation of each at a time."""
    sequences = [
        model.new_sequence(len(context) - 1 + max(map(len, continuations)))
        for context, continuations in batch
    ]
    begun = [index for index, (context, _) in enumerate(batch) if len(context) > 1]
    if begun:
        ids = [_array(batch[index][0][:-1]) for index in begun]
        model.score([sequences[index] for index in begun], ids, [_array([])] * len(begun))
    found: list[list[Score]] = [[] for _ in batch]
    for turn in range(max(len(continuations) for _, continuations in batch)):
        asked = [index for index, (_, continuations) in enumerate(batch) if turn < len(continuations)]
        targets = [_array(batch[index][1][turn]) for index in asked]
        ids = [np.append(_array(batch[i][0][-1:]), of[:-1]) for i, of in zip(asked, targets, strict=True)]
        scores = _in_calls(model, [sequences[index] for index in asked], ids, targets)
        for index, scored in zip(asked, scores, strict=True):
            found[index].append(scored)
            sequences[index].truncate(len(batch[index][0]) - 1)
    for scores in found:
        yield from scores


def _in_calls(
    model: _native.Model,
    sequences: Sequence[_native.Sequence],
    ids: Sequence[NDArray[np.int32]],
    targets: Sequence[NDArray[np.int32]],
) -> list[Score]:
    """Feed all ids, each with its target, by calls of at most `CALL_TARGETS`."""
    found: list[Score] = [([], []) for _ in sequences]
    call: list[tuple[int, slice]] = []
    room = CALL_TARGETS

    def run() -> None:
        scores = model.score(
            [sequences[index] for index, _ in call],
            [ids[index][part] for index, part in call],
            [targets[index][part] for index, part in call],
        )
        asked = [(found[index], target) for index, part in call for target in targets[index][part]]
        for (of_row, target), (log_prob, [(likeliest, _)]) in zip(asked, scores, strict=True):
            of_row[0].append(log_prob)
            of_row[1].append(likeliest == target)

    for index, row in enumerate(ids):
        done = 0
        while done < len(row):
            taken = min(len(row) - done, room)
            call.append((index, slice(done, done + taken)))
            done, room = done + taken, room - taken
            if not room:
                run()
                call, room = [], CALL_TARGETS
    if call:
        run()
    return found


def _array(ids: Ids) -> NDArray[np.int32]:
    return np.ascontiguousarray(ids, dtype=np.int32)
