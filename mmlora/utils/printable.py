"""Text from files for a terminal: nothing in it may move the cursor, forge a line or fail to be encoded."""


def printable(text: str) -> str:
    """Escape control characters, line breaks and lone surrogates."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(text: str) -> str:
    """Join the lines of a message into one, and escape it."""
    return printable(" ".join(line.strip() for line in text.splitlines()))


def as_utf8(text: str) -> str:
    """A text that can be encoded; a name from a path that is no UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
