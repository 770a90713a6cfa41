"""Texts of many requests in one step: each gets its turn, and what it would get alone."""

import numpy as np
import pytest

from encoders import save_encoder
from gossamer.engine import Encoder
from gossamer.engine.encoder_scheduler import EncoderRequest, EncoderScheduler

LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    path = tmp_path_factory.mktemp("encoder") / "model"
    save_encoder(path)
    return Encoder(path, 1)


def test_a_small_request_does_not_wait_for_a_large_one(encoder: Encoder) -> None:
    scheduler = EncoderScheduler(encoder)
    large = EncoderRequest(encoder.token_ids([LETTERS, "a"] * 200))  # 400 rows of 6200 tokens
    small = EncoderRequest(encoder.token_ids(["b c", "d"]))
    assert (large.num_tokens, small.num_tokens) == (200 * (28 + 3), 4 + 3)
    for request in (large, small):
        scheduler.add(request)
    scheduler.step()
    assert small.pieces and not large.pieces and 0 < len(large.vectors) < 400
    np.testing.assert_array_equal(small.result(), encoder.pooled(small.rows))
    scheduler.step()
    assert large.pieces and scheduler.idle
    np.testing.assert_array_equal(large.result(), encoder.pooled(large.rows))


def test_what_nobody_waits_for_is_not_computed(encoder: Encoder) -> None:
    scheduler = EncoderScheduler(encoder)
    large = EncoderRequest(encoder.token_ids([LETTERS] * 400))
    scheduler.add(large)
    scheduler.step()
    scheduler.drop(large)
    scheduler.drop(large)  # as when it ended meanwhile
    assert scheduler.idle and len(large.vectors) < 400
