"""Generated text as it comes, through transformers' streamer that waits for whole words."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase, TextStreamer


class ScreenStreamer(TextStreamer):  # type: ignore[misc]
    """Hands each finished piece to `show`; the prompt is left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers for each piece."""
        self._show(text)
