"""What a lossy codec keeps back comes in later rounds."""

from __future__ import annotations

import pytest
import torch

from averaging.codecs import make_codec
from averaging.errors import BadTensors
from averaging.parts import Debts, Stretch
from tests.unit.averaging.test_codecs import each_codec, gaussian


def encode_with_feedback(codec, vector, owed):
    debts = Debts(codec, vector, owed, None)
    data = codec.encode(debts.vector)
    debts.note_sent(Stretch(0, vector.numel()), data)
    return data, torch.zeros_like(vector) if debts.sent is None else debts.sent


def relative_drift(codec, num_rounds: int, *, has_feedback: bool) -> float:
    """How far the sum of what was decoded is from the sum of what was meant, over the latter's norm."""
    direction, owed = gaussian(2000, seed=99), None
    meant, decoded = torch.zeros(2000), torch.zeros(2000)
    for number in range(num_rounds):
        vector = direction + 0.1 * gaussian(2000, seed=number)
        data, now_owed = encode_with_feedback(codec, vector, owed)
        owed = now_owed if has_feedback else None
        meant += vector
        decoded += codec.decode(data, 2000)
    return float((meant - decoded).norm() / meant.norm())


@pytest.mark.parametrize(("name", "most", "least_without"), [("int4", 0.004, 0.02), ("topk", 0.25, 0.8)])
def test_with_feedback_the_sums_meet_and_without_they_do_not(name, most, least_without):
    codec = make_codec(name)
    with_feedback = relative_drift(codec, 50, has_feedback=True)
    assert with_feedback < most
    assert with_feedback < 0.7 * relative_drift(codec, 25, has_feedback=True)  # and it goes on falling
    assert relative_drift(codec, 50, has_feedback=False) > least_without


@each_codec
def test_what_is_owed_is_what_was_not_decoded(codec):
    vector, owed = gaussian(500), gaussian(500, seed=1)
    data, now_owed = encode_with_feedback(codec, vector, owed)
    assert data == codec.encode(vector + owed)
    assert torch.equal(now_owed, vector + owed - codec.decode(data, 500))
    assert codec.is_lossy or not now_owed.any()
    assert encode_with_feedback(codec, vector, None)[0] == codec.encode(vector)


def test_a_debt_of_another_length_or_that_overflows_is_refused():
    codec = make_codec("int8")
    with pytest.raises(ValueError, match="1 values are owed to a vector of 3"):
        encode_with_feedback(codec, torch.ones(3), torch.ones(1))
    with pytest.raises(BadTensors, match="not finite"):
        encode_with_feedback(codec, torch.full((3,), 3e38), torch.full((3,), 3e38))
