"""One row encoded by itself."""

from typing import Any

from common.data.dataset import Example
from common.data.encode import Encoded, Encoder, MaskingOptions


def encode(example: Example, tokenizer: Any, masking: MaskingOptions | None = None) -> Encoded:
    return Encoder(tokenizer, masking or MaskingOptions())(example)
