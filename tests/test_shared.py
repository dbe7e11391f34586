"""What tests share is what each would have made for itself."""

from __future__ import annotations

import torch

from ditfastattn.export.capture_call import RecordedCall, capture_call
from tests import shared
from tests.helpers import tiny_dit


def test_a_capture_whose_model_was_written_to_is_made_again() -> None:
    capture = shared.captured_once(capture_call)
    first, second = tiny_dit(layers=1), tiny_dit(layers=1)
    calls = [RecordedCall(tiny.call(0, 2)) for tiny in (first, second)]
    made = capture(first.model, calls[0])
    assert capture(second.model, calls[1]) is made
    with torch.no_grad():
        next(first.model.parameters()).add_(1.0)
    again = capture(second.model, calls[1])
    own = {parameter.data_ptr() for parameter in second.model.parameters()}
    assert own & {tensor.data_ptr() for tensor in again.tensors}
