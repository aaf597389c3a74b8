"""What an engine says in an error message -> the node and the reason, without what only its authors can read."""

from __future__ import annotations

import re

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_NODE = re.compile(r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ")
_SOURCE = re.compile(r"(?:Exception during initialization: )?(?:/\S*/)?\w+\.(?:cc|h|cpp):\d+:? ")
_SIGNATURE = re.compile(r"[\w:<>~*&, ]*::[~\w]+(?:<[^()]*>)?\(|[A-Z]\w+ (?=[A-Z])")
_ASSERTION = re.compile(r"^[^.]*(?:\.\w[^.]*)* was false\. (?=\S)")


def reason(message: str) -> str:
    """A message of one line without colors, ONNX Runtime's error code, and the file, line, function and assertion of
    C++ sources; the node that failed is named in front: Reshape (turn): the input cannot be reshaped."""
    message = _NODE.sub(r"\1 (\2): ", _CODE.sub("", _COLOR.sub("", message)))
    while found := _SOURCE.search(message):
        message = message[: found.start()] + _without_signature(message[found.end() :])
    return message


def _without_signature(text: str) -> str:
    """A text without the C++ function, with its template arguments, and the assertion that it may begin with."""
    found = _SIGNATURE.match(text)
    if found is None:
        return text
    rest = text[found.end() :]
    if found[0].endswith("("):
        rest = _after_bracket(rest, "()").removeprefix(" const").lstrip()
        if rest.startswith("[with "):
            rest = _after_bracket(rest[1:], "[]").lstrip()
    return _ASSERTION.sub("", rest)


def _after_bracket(text: str, brackets: str) -> str:
    """What follows the end of a bracket that is open at the start of a text."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == brackets[0]) - (character == brackets[1])
        if depth == 0:
            return text[index + 1 :]
    return ""
