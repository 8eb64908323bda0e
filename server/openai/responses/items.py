"""`OutputItems`: the output of a response as reasoning, messages and function calls, built from output deltas."""

import uuid

from mmlora.outputs import RequestOutput
from mmlora.server.openai.model_format import OutputFormat
from mmlora.server.openai.output import Json
from mmlora.server.openai.reasoning import OutputParser
from mmlora.server.openai.tools.parser import Piece, ReasoningDelta

Event = tuple[str, Json]  # type and content


class MessageItem:
    """An assistant message with one text part.

    Args:
        output_index: index in the response's output.
    """

    def __init__(self, output_index: int) -> None:
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
        self._place = {"output_index": output_index}
        self._part_place = {"item_id": self._head["id"], **self._place, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def open(self) -> list[Event]:
        """Return the events that start the message and its part."""
        item = {**self._head, "status": "in_progress", "content": []}
        return [
            ("response.output_item.added", {**self._place, "item": item}),
            ("response.content_part.added", {**self._part_place, "part": self._part()}),
        ]

    def add(self, text: str, logprobs: list[Json]) -> list[Event]:
        """Add text with the log probabilities of its tokens, and return the event."""
        if not (text or logprobs):
            return []
        self._texts.append(text)
        self._logprobs += logprobs
        return [("response.output_text.delta", {**self._part_place, "delta": text, "logprobs": logprobs})]

    def close(self, status: str) -> list[Event]:
        """Return the events that end the text, the part and the message."""
        part = self._part()
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            ("response.output_text.done", {**self._part_place, **done}),
            ("response.content_part.done", {**self._part_place, "part": part}),
            ("response.output_item.done", {**self._place, "item": self.content(status)}),
        ]

    def content(self, status: str) -> Json:
        """Return the item so far."""
        return {**self._head, "status": status, "content": [self._part()]}

    def _part(self) -> Json:
        return {"type": "output_text", "text": "".join(self._texts), "annotations": [], "logprobs": self._logprobs[:]}


class ReasoningItem:
    """Reasoning with one text part.

    Args:
        output_index: index in the response's output.
    """

    def __init__(self, output_index: int) -> None:
        self._head = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": []}
        self._place = {"output_index": output_index}
        self._part_place = {"item_id": self._head["id"], **self._place, "content_index": 0}
        self._texts: list[str] = []

    def open(self) -> list[Event]:
        """Return the events that start the item and its part."""
        item = {**self._head, "status": "in_progress", "content": []}
        return [
            ("response.output_item.added", {**self._place, "item": item}),
            ("response.content_part.added", {**self._part_place, "part": self._part()}),
        ]

    def add(self, text: str, logprobs: list[Json]) -> list[Event]:
        """Add text, and return the event; reasoning has no log probabilities."""
        self._texts.append(text)
        return [("response.reasoning_text.delta", {**self._part_place, "delta": text})]

    def close(self, status: str) -> list[Event]:
        """Return the events that end the text, the part and the item."""
        part = self._part()
        return [
            ("response.reasoning_text.done", {**self._part_place, "text": part["text"]}),
            ("response.content_part.done", {**self._part_place, "part": part}),
            ("response.output_item.done", {**self._place, "item": self.content(status)}),
        ]

    def content(self, status: str) -> Json:
        """Return the item so far."""
        return {**self._head, "status": status, "content": [self._part()]}

    def _part(self) -> Json:
        return {"type": "reasoning_text", "text": "".join(self._texts)}


class FunctionCallItem:
    """A function call.

    Args:
        output_index: index in the response's output.
        name: the function's name.
        call_id: id with which the client sends back the function's output.
    """

    def __init__(self, output_index: int, name: str, call_id: str) -> None:
        self._head = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call_id, "name": name}
        self._place = {"output_index": output_index}
        self._arguments_place = {"item_id": self._head["id"], **self._place}
        self._arguments: list[str] = []

    def open(self) -> list[Event]:
        """Return the event that starts the call."""
        return [("response.output_item.added", {**self._place, "item": self.content("in_progress")})]

    def add(self, arguments: str, logprobs: list[Json]) -> list[Event]:
        """Add text to the arguments, and return the event; a function call has no log probabilities."""
        if not arguments:
            return []
        self._arguments.append(arguments)
        return [("response.function_call_arguments.delta", {**self._arguments_place, "delta": arguments})]

    def close(self, status: str) -> list[Event]:
        """Return the events that end the arguments and the call."""
        item = self.content(status)
        done = {"name": item["name"], "arguments": item["arguments"]}
        return [
            ("response.function_call_arguments.done", {**self._arguments_place, **done}),
            ("response.output_item.done", {**self._place, "item": item}),
        ]

    def content(self, status: str) -> Json:
        """Return the item so far."""
        return {**self._head, "arguments": "".join(self._arguments), "status": status}


class OutputItems:
    """The items of one response; at most the last of them is open.

    Args:
        form: form of the output.
    """

    def __init__(self, form: OutputFormat) -> None:
        self._form = form
        self._parser: OutputParser | None = None
        self._num_items = 0
        self._closed: list[Json] = []
        self._open: MessageItem | FunctionCallItem | ReasoningItem | None = None
        self._logprobs: list[Json] = []  # of tokens whose text is still in the parser
        self._num_new_logprobs = 0  # of the last delta

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of tokens of the reasoning."""
        return self._parser.num_reasoning_tokens if self._parser is not None else 0

    def feed(self, output: RequestOutput, logprobs: list[Json]) -> list[Event]:
        """Add the text of an output delta with the log probabilities of its tokens, and return the events."""
        delta = output.outputs[0]
        self._logprobs += logprobs
        self._num_new_logprobs = len(logprobs)
        if self._parser is None:
            self._parser = self._form.new_parser(output.prompt)
        pieces = self._parser.feed(delta.text, len(delta.token_ids))
        return [event for piece in pieces for event in self._add_piece(piece)]

    def finish(self, status: str, *, is_stopped: bool = False) -> list[Event]:
        """End the output and return the events; an output without text is one empty message.

        Args:
            status: status of the last item, unless it has been completed.
            is_stopped: a stop string or stop token ended the output, which leaves a call incomplete.
        """
        pieces = self._parser.finish() if self._parser is not None else []
        events = [event for piece in pieces for event in self._add_piece(piece)]
        if self._num_items == 0 or (self._logprobs and isinstance(self._open, MessageItem)):
            events += self._add_piece("")
        is_cut = is_stopped and isinstance(self._open, FunctionCallItem)
        return events + self._close_item("incomplete" if is_cut else status)

    def content(self, status: str) -> list[Json]:
        """Return the items so far.

        Args:
            status: status of the open item.
        """
        return [*self._closed, *([self._open.content(status)] if self._open is not None else [])]

    def _add_piece(self, piece: Piece) -> list[Event]:
        logprobs, self._logprobs = self._logprobs, []
        events: list[Event] = []
        if isinstance(piece, str):
            text, is_last = piece, False
            if not isinstance(self._open, MessageItem):
                logprobs = _logprobs_of_text(piece, logprobs) if self._num_items else logprobs
                events = self._open_item(MessageItem(self._num_items))
        elif isinstance(piece, ReasoningDelta):
            text, is_last = piece.text, False
            self._logprobs = logprobs[-self._num_new_logprobs :]  # the same delta may have content, too
            if self._open is None:
                events = self._open_item(ReasoningItem(self._num_items))
        else:
            text, is_last = piece.arguments, piece.is_last
            if piece.name is not None:
                events = self._open_item(FunctionCallItem(self._num_items, piece.name, self._form.new_call_id()))
        assert self._open is not None
        events += self._open.add(text, logprobs)
        return events + (self._close_item("completed") if is_last else [])

    def _open_item(self, item: MessageItem | FunctionCallItem | ReasoningItem) -> list[Event]:
        events = self._close_item("completed")
        self._open = item
        self._num_items += 1
        return events + item.open()

    def _close_item(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        item, self._open = self._open, None
        self._closed.append(item.content(status))
        return item.close(status)


def _logprobs_of_text(text: str, logprobs: list[Json]) -> list[Json]:
    """Return the entries of a text that follows a call, without those of the tokens that end the call."""
    rest = text
    for index in reversed(range(len(logprobs))):
        token = logprobs[index]["token"]
        if token.endswith(rest):
            return logprobs[index:]
        if token and rest.endswith(token):  # others are special tokens, or still in the parser
            rest = rest[: -len(token)]
    return logprobs
