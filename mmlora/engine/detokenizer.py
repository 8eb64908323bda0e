"""`Detokenizer`: token ids to text, one token at a time.

It never gives out half a UTF-8 character, and holds back text that may turn out to be the start of a stop string.
"""

from typing import Any

REPLACEMENT = "\ufffd"
CONTEXT = 4
MAX_WINDOW = 64  # tokens; more of them without a whole character are no text


class Detokenizer:
    """The growing text of one answer.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompt_token_ids: the prompt; its last tokens decide whether the first word starts with a space.
        stop: strings that end the answer.
        include_stop: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: list[int],
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._window = self._end_of(prompt_token_ids)  # tokens that may still change how the next ones are spelled
        self._window_text = self._decode(self._window)
        self._borders: list[int] = []  # lengths of the window after which no character was open
        self._num_returned = 0

    def append(self, token_id: int, *, can_stop: bool = True) -> str | None:
        """Add a token.

        Args:
            token_id: the next token.
            can_stop: whether a stop string counts yet (`min_tokens`).

        Returns:
            The stop string that the text now ends at, or None.
        """
        self._window.append(token_id)
        candidate = self._decode(self._window)
        if candidate.endswith(REPLACEMENT) and len(self._window) < MAX_WINDOW:
            return None  # the bytes so far may be the start of a character
        new_text = candidate[len(self._window_text) :]
        self._window_text = candidate
        self._borders.append(len(self._window))
        self._shorten_window()
        return self._extend(new_text, can_stop)

    def finish(self) -> None:
        """Add what was held back; bytes that never became a character appear as U+FFFD."""
        self.text += self._decode(self._window)[len(self._window_text) :]
        self._window_text = self._decode(self._window)

    def take_new_text(self, *, is_finished: bool) -> str:
        """Text since the last call that can no longer change."""
        end = len(self.text) if is_finished else len(self.text) - self._num_held_back()
        start, self._num_returned = self._num_returned, max(end, self._num_returned)
        return self.text[start : self._num_returned]

    def _end_of(self, token_ids: list[int]) -> list[int]:
        """The last `CONTEXT` tokens, and those before them that their first character began with."""
        for length in range(CONTEXT, CONTEXT + 4):
            end = token_ids[-length:]
            if not self._decode(end).startswith(REPLACEMENT):
                break
        return end

    def _shorten_window(self) -> None:
        """Cut the window where no character was open, and leave at least `CONTEXT` tokens."""
        cut = max((border for border in self._borders if border <= len(self._window) - CONTEXT), default=0)
        if cut:
            self._window = self._window[cut:]
            self._borders = [border - cut for border in self._borders if border > cut]
            self._window_text = self._decode(self._window)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _extend(self, new_text: str, can_stop: bool) -> str | None:
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, len(self.text) - longest + 1)
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

    def _num_held_back(self) -> int:
        """Length of the longest end of the text that starts a stop string."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
