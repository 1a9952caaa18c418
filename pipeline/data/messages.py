"""Conversations as `[{"role": "system" | "user" | "assistant", "content": text}, ...]`.

Role names, message lists, ShareGPT turns and dialogues rendered as one text all become that here.
"""

import contextlib
import json
import re
from typing import Any

from pipeline.data.problems import BadRow, kind

Message = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Names that files give to roles -> ours."""

TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation", "ipython"}


THINKING = ("reasoning_content", "thinking")
"""Keys of a message that hold the thinking before its content; templates that know of thinking read it
from a block at the content's start, where it is put."""
THINKING_BLOCK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


def message(role: str, content: str) -> Message:
    """One message."""
    return {"role": role, "content": content}


def text_of(value: Any, name: str) -> str:
    """A cell that must be text; BadRow names the column and what is there instead."""
    if not isinstance(value, str):
        raise BadRow(f"`{name}` is {kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"`{name}` has a lone surrogate at character {error.start + 1}") from error
    return value


def optional_text(values: dict[str, Any], name: str) -> str:
    """A cell of text that may be absent or null, as ShareGPT's `system` often is."""
    value = values.get(name)
    return "" if value is None else text_of(value, name)


def content_of(value: Any, name: str) -> str:
    """Text, or a list of {"type": "text", "text": ...} parts joined; other parts are BadRow."""
    if not isinstance(value, list):
        return text_of(value, name)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise BadRow(f"`{name}` has a part that is not text; only text is supported")
        if "text" not in part:
            raise BadRow(f"`{name}` has a part without `text`; it has {', '.join(part)}")
        parts.append(text_of(part["text"], f"{name}.text"))
    return "".join(parts)


def one_message(value: Any, name: str) -> Message:
    """{role, content} or ShareGPT's {from, value}; BadRow on unknown roles and on tool use."""
    if not isinstance(value, dict):
        raise BadRow(f"`{name}` is {kind(value)}, expected a message with role and content")
    keys = ("from", "value") if value.get("from") is not None else ("role", "content")
    for key in keys:
        if value.get(key) is None and not value.get("tool_calls"):
            raise BadRow(f"`{name}` has no `{key}`")
    role = text_of(value[keys[0]], f"{name}.{keys[0]}").strip().lower()
    if role in TOOL_ROLES or value.get("tool_calls"):
        raise BadRow(f"`{name}` uses tools ({role}), which no stage trains on; remove such rows")
    if role not in ROLES:
        raise BadRow(f"`{name}` has the unknown role {role!r}; known are {', '.join(ROLES)}")
    content = content_of(value[keys[1]], f"{name}.{keys[1]}")
    for key in THINKING:
        if thought := optional_text(value, key).strip():
            content = f"<think>\n{thought}\n</think>\n\n{content}"
    return message(ROLES[role], content)


def list_of(value: Any, name: str) -> list[Any]:
    """A cell that must be a list; in a table it is one written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list | tuple):
        raise BadRow(f"`{name}` is {kind(value)}, expected a list (in a table, as JSON)")
    return list(value)


def message_list(value: Any, name: str) -> list[Message]:
    """A whole conversation; a system message stands first, and an empty one is left out."""
    value = list_of(value, name)
    if not value:
        raise BadRow(f"`{name}` is an empty list")
    messages = [one_message(item, f"{name}[{at}]") for at, item in enumerate(value)]
    if any(item["role"] == "system" for item in messages[1:]):
        raise BadRow(f"`{name}` has a system message that is not the first")
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    if not messages:
        raise BadRow(f"`{name}` has nothing but an empty system message")
    return messages


# --- dialogues rendered as one text ---------------------------------------------------------------

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GUANACO_TURN = re.compile(r"(?:^|\n)###\s?(Human|Assistant):")
_INSTRUCTION = re.compile(
    r"###\s?Instruction:(?P<instruction>.*?)(?:###\s?Input:(?P<input>.*?))?###\s?Response:(?P<response>.*)",
    re.DOTALL,
)


def is_transcript(text: str) -> bool:
    """Whether a text is an HH dialogue, "\\n\\nHuman: ... \\n\\nAssistant: ...", from its start."""
    start = text.lstrip()
    return start.startswith("Human:") and ("\n\nAssistant:" in text or text.startswith("\n\n"))


def transcript_messages(text: str) -> list[Message]:
    """All turns of an HH dialogue; a last "\\n\\nAssistant:" with nothing after it is no turn."""
    messages = _turns(_HH_TURN, text.lstrip())
    if messages[-1] == message("assistant", ""):
        messages = messages[:-1]
    return messages


def split_transcript(text: str) -> tuple[list[Message], str]:
    """HH form: the messages before the last "\\n\\nAssistant:" and the reply after it."""
    before, found, reply = text.rpartition("\n\nAssistant:")
    if not found:
        raise BadRow('no "\\n\\nAssistant:" in the transcript')
    return _turns(_HH_TURN, before.lstrip()), reply.strip()


def _turns(pattern: re.Pattern[str], text: str) -> list[Message]:
    _, *pieces = pattern.split(text)
    return [
        message(ROLES[who.lower()], said.strip())
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def rendered_messages(text: str) -> list[Message] | None:
    """Messages of a rendered text (alpaca, HH, "### Human:"), or None if it is plain text.

    alpaca's preamble ("Below is an instruction ...", in any language) is a template, not content.
    """
    if found := _INSTRUCTION.search(text):
        parts = {name: (part or "").strip() for name, part in found.groupdict().items()}
        user = user_turn(parts["instruction"], parts["input"])
        return [message("user", user), message("assistant", parts["response"])]
    if is_transcript(text):
        return transcript_messages(text)
    if text.lstrip().startswith(("### Human:", "###Human:")):
        return _turns(_GUANACO_TURN, text.lstrip())
    return None


def user_turn(instruction: str, extra: str) -> str:
    """alpaca's user turn: the instruction, and on a line of its own the input if there is one."""
    if not extra.strip():
        return instruction
    return f"{instruction}\n{extra}" if instruction.strip() else extra


def prompt_text(messages: list[Message]) -> str:
    """A prompt as callables and judges read it: the user's words, or a transcript of several turns."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


# --- replies --------------------------------------------------------------------------------------


def complete(before: list[Message], reply: Any, name: str) -> list[Message]:
    """The conversation `before` with its reply, the assistant's message last.

    The reply may be a text, a message, the messages that follow, an HH transcript or a whole
    conversation that begins with `before`. BadRow if it does not continue `before`.
    """
    context, answer = _answer(reply, name)
    if not context or not before:
        messages = before or context
    elif context[0]["role"] == "assistant":
        messages = before + context
    elif _same_start(before, context):
        messages = context if context[0]["role"] == "system" else system_of(before) + context
    else:
        raise BadRow(f"`{name}` is a conversation that does not begin with the prompt")
    return [*messages, message("assistant", answer)]


def _answer(reply: Any, name: str) -> tuple[list[Message], str]:
    """What stands before the answer (often nothing), and the answer."""
    if isinstance(reply, str):
        text = text_of(reply, name)
        return split_transcript(text) if is_transcript(text) else ([], text)
    if isinstance(reply, dict):
        messages = [one_message(reply, name)]
    elif isinstance(reply, list):
        messages = message_list(reply, name)
    else:
        raise BadRow(f"`{name}` is {kind(reply)}, expected text or messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow(f"`{name}` does not end in an assistant message")
    return messages[:-1], messages[-1]["content"]


def system_of(messages: list[Message]) -> list[Message]:
    """The system message, if there is one."""
    return [item for item in messages if item["role"] == "system"]


def _same_start(before: list[Message], context: list[Message]) -> bool:
    """Whether every user message of `before` is among those of `context` (spaces aside)."""
    said = {item["content"].strip() for item in context if item["role"] == "user"}
    return all(item["content"].strip() in said for item in before if item["role"] == "user")
