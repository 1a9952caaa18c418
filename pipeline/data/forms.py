"""Rows of the forms people have -> messages: demonstrations, prompts and plain texts.

A row has a prompt under one of `PROMPTS` and, for a demonstration, a reply under one of `REPLIES`:

    messages / conversations      a whole conversation; role+content or from+value
    instruction (+ input)         alpaca, with `output`
    prompt, query, input          text, a "\\n\\nHuman: ..." dialogue or messages
    text                          a rendered alpaca or dialogue text alone; otherwise plain text
    chosen (+ rejected)           a pair's better answer; alone, HH's whole transcripts
    message_id, parent_id         messages of a tree: see `pipeline.data.trees`
    system, history               beside any of them: text; a list of [user, assistant]

Where several are there, the first in this order counts. A null cell counts as absent. Columns that
change what a row means are used rightly or refused: see `pipeline.data.meaning`.
"""

import functools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.config.schema import Data, Source
from pipeline.data import trees
from pipeline.data.kept import OnDisk, is_large, like, pick
from pipeline.data.meaning import (
    check_whole,
    is_context,
    label_of,
    missing,
    two_answers,
)
from pipeline.data.messages import (
    Message,
    complete,
    is_transcript,
    list_of,
    message,
    message_list,
    one_message,
    optional_text,
    rendered_messages,
    system_of,
    text_of,
    transcript_messages,
    user_turn,
)
from pipeline.data.problems import BadRow, Report
from pipeline.data.readers import Row
from pipeline.data.sources import drawn, report_for, scan, source_name, sources_of

Item = TypeVar("Item")

_BEST = functools.partial(trees.grown, trees.best_path)


@dataclass(slots=True)
class Demonstration:
    """A conversation that ends in the assistant message to learn."""

    messages: list[Message]
    where: str
    context: frozenset[int] = frozenset()
    """Earlier assistant messages, by index, that are read and not learnt."""
    source: str = ""
    """Of several that are mixed."""

    def __post_init__(self) -> None:
        self.context = frozenset(self.context)  # a list, where it comes from the disk


@dataclass(slots=True)
class Prompt:
    """A conversation that ends before the assistant's turn, and its row for reward functions."""

    messages: list[Message]
    row: dict[str, Any]
    where: str
    source: str = ""


def load_demonstrations(
    source: Any, notes: list[str] | None = None, seed: int = 0
) -> Sequence[Demonstration]:
    """Demonstrations of a schema.Data or an in-memory dataset.

    UserError: the first 20 rows without a prompt or a reply, with `file:line: reason`. What was
    dropped or merged is appended to `notes`, or printed if that is None. The seed draws from sources whose
    weight is no whole number.
    """
    return load(source, notes, seed, _demonstration, _BEST)


def load_prompts(source: Any, notes: list[str] | None = None, seed: int = 0) -> Sequence[Prompt]:
    """Prompts of any form; replies in the file are ignored. Errors as in load_demonstrations."""

    def asked(row: Row, _: Report) -> Prompt:
        return Prompt(prompt(row.values), row.values, row.where)

    return load(source, notes, seed, asked, functools.partial(trees.grown, trees.prompts))


def load_texts(source: Any, notes: list[str] | None = None, seed: int = 0) -> Sequence[str]:
    """Plain texts for the pretraining mix: `text` as it is, demonstrations as plain dialogues."""
    return load(source, notes, seed, _plain_text, _BEST)


def load(
    source: Any,
    notes: list[str] | None,
    seed: int,
    convert: Callable[[Row, Report], Item | None],
    gather: Callable[[Iterable[Row], Report], Iterator[Row]],
    merge: Callable[[Sequence[Item], Report], list[Item]] | None = None,
) -> Sequence[Item]:
    """What `convert` makes of each row; of some it makes nothing, and counts them in the report.

    `gather` joins rows that say something together, `merge` what several people said of the same. Of
    several sources that are mixed each is read by itself.
    """
    if parts := sources_of(source):
        return _mixed([(p, load(p, notes, seed, convert, gather, merge)) for p in parts], seed)
    report = report_for(source)
    items: Any = OnDisk() if is_large(source) else []
    for row in gather(scan(source, report), report):
        try:
            check_whole(row.values)
            item = convert(row, report)
        except BadRow as error:
            report.problem(row.where, error)
            continue
        if item is not None:
            if isinstance(source, Source) and hasattr(
                item, "source"
            ):  # plain texts have no such place
                item.source = source.path
            items.append(item)
    if merge and isinstance(source, Data) and source.votes == "majority":
        items = merge(items, report)
    report.close(source_name(source), len(items), notes)
    return items


def _mixed(parts: list[tuple[Source, Sequence[Item]]], seed: int) -> Sequence[Item]:
    large = next((items for _, items in parts if not isinstance(items, list)), [])
    mixed, places = like(large), array("q")
    for part, items in parts:
        places.extend(len(mixed) + at for at in drawn(len(items), part.weight, seed, part.path))
        for item in items:
            mixed.append(item)
    return pick(mixed, places)


# --- one row --------------------------------------------------------------------------------------


def _demonstration(row: Row, report: Report) -> Demonstration | None:
    if label_of(row.values) is False:
        report.count("rows labelled false left out: their answers are not to be learnt")
        return None
    if row.values.get("label") is not None and label_of(row.values) is None:
        report.count("rows with a `label` that is neither true nor false: it is not heeded")
    messages, context = demonstration(row.values), _context(row.values)
    if len(messages) - 1 in context:  # what follows the last turn to be learnt is of no use
        learnt = [
            at
            for at, item in enumerate(messages)
            if item["role"] == "assistant" and at not in context
        ]
        if not learnt:
            report.count("conversations left out: none of their turns is to be learnt")
            return None
        messages = messages[: learnt[-1] + 1]
        check_prompt(messages[:-1])
    return Demonstration(messages, row.where, context)


def _context(values: dict[str, Any]) -> frozenset[int]:
    """Which messages of a row are only read, as marks on a conversation's own turns say."""
    name = first_of(values, PROMPTS)
    turns = list_of(values[name], name) if name in ("messages", "conversations") else ()
    marked = [at for at, turn in enumerate(turns) if is_context(turn)]
    before = len(find_prompt(values) or []) - len(turns) if marked else 0
    return frozenset(before + at for at in marked)


def demonstration(values: dict[str, Any]) -> list[Message]:
    """Messages of a row, the assistant's last; BadRow if it has no reply or an empty one."""
    found = find_prompt(values)
    messages = found or []
    answered = first_of(values, PROMPTS) in WHOLE and messages != without_reply(messages)
    reply = first_of(values, REPLIES)
    if reply is not None and not answered:
        messages = complete(messages, values[reply], reply)
    if found is None and len(messages) < 2:  # not even a transcript in `chosen`
        raise BadRow(_no_prompt(values))
    if messages[-1]["role"] != "assistant":
        raise BadRow(_no_reply(values))
    if not messages[-1]["content"].strip():
        raise BadRow("the reply is empty")
    check_prompt(messages[:-1])
    return messages


def prompt(values: dict[str, Any]) -> list[Message]:
    """Messages of a row up to the user's last; BadRow if there are none."""
    messages = find_prompt(values)
    if messages is None and values.get("chosen") is not None:
        messages = complete([], values["chosen"], "chosen")
    if messages is None and values.get("text") is not None:
        messages = [message("user", text_of(values["text"], "text"))]
    if messages is None:
        raise BadRow(_no_prompt(values))
    messages = without_reply(messages)
    check_prompt(messages)
    return messages


def without_reply(messages: list[Message]) -> list[Message]:
    """A conversation up to the user's last message: `messages` may hold the reply as well."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def _plain_text(row: Row, report: Report) -> str | None:
    """`text`, or a demonstration as "User: ...", a blank line, "Assistant: ..."."""
    if row.values.get("text") is None:
        item = _demonstration(row, report)
        said = [(m["role"].capitalize(), m["content"]) for m in item.messages] if item else []
        return "\n\n".join(f"{who}: {words}" for who, words in said) or None
    text = text_of(row.values["text"], "text")
    if not text.strip():
        raise BadRow("`text` is empty")
    return text


def check_prompt(messages: list[Message]) -> None:
    """BadRow unless the user both begins and ends the conversation, the end not without words."""
    if not messages or messages[-1]["role"] != "user":
        raise BadRow("no user message before the reply")
    if messages[len(system_of(messages))]["role"] != "user":
        raise BadRow("the conversation begins with the assistant")
    if not messages[-1]["content"].strip():
        raise BadRow("the prompt is empty")


# --- prompts --------------------------------------------------------------------------------------


def _conversation(values: dict[str, Any], name: str) -> list[Message]:
    return message_list(values[name], name)


def _alpaca(values: dict[str, Any], name: str) -> list[Message]:
    user = user_turn(text_of(values[name], name), optional_text(values, "input"))
    return [message("user", user)]


def _text_or_messages(values: dict[str, Any], name: str) -> list[Message]:
    value = values[name]
    if isinstance(value, list | tuple):
        return message_list(value, name)
    if isinstance(value, dict):
        return [one_message(value, name)]
    text = text_of(value, name)
    if is_transcript(text):  # Nectar's prompts: "\n\nHuman: ... \n\nAssistant:"
        return transcript_messages(text)
    return [message("user", text)]


def _rendered(values: dict[str, Any], name: str) -> list[Message] | None:
    return rendered_messages(text_of(values[name], name))


PROMPTS: dict[str, Callable[[dict[str, Any], str], list[Message] | None]] = {
    "messages": _conversation,
    "conversations": _conversation,
    "instruction": _alpaca,
    "prompt": _text_or_messages,
    "query": _text_or_messages,
    "input": _text_or_messages,
    "text": _rendered,
}
"""Column of the prompt -> its reader, in order of preference."""

WHOLE = ("messages", "conversations", "text")
"""Prompt columns that may hold the reply as well."""

REPLIES = ("output", "completion", "response", "chosen")
"""Columns that hold the reply to a prompt."""


def first_of(values: dict[str, Any], names: Any) -> str | None:
    """The first of some columns that a row fills."""
    return next((name for name in names if values.get(name) is not None), None)


def find_prompt(values: dict[str, Any]) -> list[Message] | None:
    """What a row's prompt column says, after its `system` and `history`; None without a prompt."""
    name = first_of(values, PROMPTS)
    messages = PROMPTS[name](values, name) if name else None
    if messages is None:
        return None
    before = _history(values)
    system = optional_text(values, "system")
    if system.strip() and messages[0]["role"] != "system":
        before = [message("system", system), *before]
    return before + messages


def _history(values: dict[str, Any]) -> list[Message]:
    turns = values.get("history")
    messages = []
    for at, turn in enumerate([] if turns is None else list_of(turns, "history")):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRow(f"`history[{at}]` is not a pair [user, assistant]")
        for role, said in zip(("user", "assistant"), turn, strict=True):
            messages.append(message(role, text_of(said, f"history[{at}]")))
    return messages


# --- reasons --------------------------------------------------------------------------------------


def _no_prompt(values: dict[str, Any]) -> str:
    if values.get("text") is not None:
        return "plain text is no demonstration: no `### Response:` in it, and no other column"
    wanted = [name for name in PROMPTS if name != "text"]
    return f"no prompt: {missing(values, wanted)}"


def _no_reply(values: dict[str, Any]) -> str:
    name = first_of(values, PROMPTS)
    if name in ("messages", "conversations"):
        return f"`{name}` does not end in an assistant message"
    if pair := two_answers(values):
        learn = f"to learn one's answers: columns: {{completion: {pair[0]}}}"
        return f"`{pair[0]}` and `{pair[1]}` are a comparison, for the reward model; {learn}"
    return f"no reply to `{name}`: {missing(values, REPLIES)}"
