"""`Detokenizer`: incremental detokenization, with stop strings.

It never returns an incomplete UTF-8 character, and withholds text that may be the start of a stop string.
"""

from collections.abc import Collection
from typing import Any

REPLACEMENT = "\ufffd"
CONTEXT = 4  # tokens that the spelling of the next token may depend on
MAX_WINDOW = 64  # tokens; after so many without a complete character, U+FFFD is accepted as text


class Detokenizer:
    """Text of one completion.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompt_token_ids: the prompt; its last tokens decide whether the first word starts with a space.
        stop: stop strings.
        include_stop: whether the text includes the stop string.
        skip_special_tokens: whether the text omits special tokens.
        kept_token_ids: special tokens that it contains all the same.
        is_enabled: whether there is any text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: list[int],
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        kept_token_ids: Collection[int] = (),
        is_enabled: bool = True,
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._is_enabled = is_enabled
        self._stop = stop
        self._max_stop_length = max(map(len, stop), default=0)
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._kept_token_ids = frozenset(kept_token_ids if skip_special_tokens and is_enabled else ())
        self._window = self._end_of(prompt_token_ids)  # tokens that the spelling of the next ones may depend on
        self._window_text = self._decode(self._window)
        self._borders: list[int] = []  # lengths of the window that end at a character boundary
        self._num_returned = 0

    def append(self, token_id: int, *, can_stop: bool = True) -> str | None:
        """Add a token.

        Args:
            token_id: the next token.
            can_stop: whether stop strings apply yet (`min_tokens`).

        Returns:
            The stop string at which the text now ends, or None.
        """
        if token_id in self._kept_token_ids:  # the spelling of other tokens is as if it was skipped
            return self._extend(self._tokenizer.decode([token_id], skip_special_tokens=False), can_stop)
        self._window.append(token_id)
        candidate = self._decode(self._window)
        if candidate.endswith(REPLACEMENT) and len(self._window) < MAX_WINDOW:
            return None  # the last bytes may be the start of a character
        new_text = candidate[len(self._window_text) :]
        self._window_text = candidate
        self._borders.append(len(self._window))
        self._shorten_window()
        return self._extend(new_text, can_stop)

    def finish(self) -> None:
        """Add the pending bytes to the text; an incomplete character becomes U+FFFD."""
        self.text += self._decode(self._window)[len(self._window_text) :]
        self._window_text = self._decode(self._window)

    def take_new_text(self, *, is_finished: bool) -> str:
        """Return the text that is new since the last call and can no longer change."""
        end = len(self.text) if is_finished else len(self.text) - self._num_withheld()
        start, self._num_returned = self._num_returned, max(end, self._num_returned)
        return self.text[start : self._num_returned]

    def _end_of(self, token_ids: list[int]) -> list[int]:
        """Return the last `CONTEXT` tokens, or a few more if the first character began earlier."""
        for length in range(CONTEXT, CONTEXT + 4):
            end = token_ids[-length:]
            if not self._decode(end).startswith(REPLACEMENT):
                break
        return end

    def _shorten_window(self) -> None:
        """Cut the window at a character boundary, keeping at least `CONTEXT` tokens."""
        cut = max((border for border in self._borders if border <= len(self._window) - CONTEXT), default=0)
        if cut:
            self._window = self._window[cut:]
            self._borders = [border - cut for border in self._borders if border > cut]
            self._window_text = self._decode(self._window)

    def _decode(self, token_ids: list[int]) -> str:
        if not self._is_enabled:
            return ""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _extend(self, new_text: str, can_stop: bool) -> str | None:
        search_from = max(0, len(self.text) - self._max_stop_length + 1)
        self.text += new_text
        if not can_stop:
            return None
        found = [(self.text.find(stop, search_from), stop) for stop in self._stop]
        found = [(position, stop) for position, stop in found if position >= 0]
        if not found:
            return None
        position, stop = min(found)
        self.text = self.text[: position + len(stop) if self._include_stop else position]
        return stop

    def _num_withheld(self) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop string."""
        for length in range(min(self._max_stop_length - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
