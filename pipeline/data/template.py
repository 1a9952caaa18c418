"""The one place where messages become token ids; needs a tokenizer object and nothing else.

The ids of a prompt and those of a response to it are what SFT, the reward model and PPO all see. The
two parts are rendered and tokenised apart, because PPO's policy continues the tokens of the prompt as
they are: a tokenizer that merges across the boundary would show SFT tokens the policy never sees.
"""

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.literals import around, has_special, marked, special_ids, token_ids
from pipeline.data.messages import THINKING_BLOCK, Message, message
from pipeline.errors import UserError
from pipeline.process.progress import say

DEFAULT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '' if loop.first else '\n\n' }}"
    "{%- if message['role'] == 'assistant' %}{{- 'Assistant:\n' + message['content'] + eos_token }}"
    "{%- else %}{{- message['role'].capitalize() + ': ' + message['content'] }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\n\nAssistant:\n' }}{%- endif %}"
)
"""For tokenizers without a template: "User: ...", a blank line, "Assistant:", the reply and EOS.

The reply begins on a line of its own, for a line break is a token boundary in every common
tokenizer, whereas "Assistant: " would leave a space that belongs to the reply's first token.
"""

ENCODER_TEMPLATE = (
    "{%% for message in messages %%}"
    "{%% if message['role'] == 'assistant' and loop.last %%}{{ %(end)s + message['content'] + eos_token }}"
    "{%% else %%}{{ '' if loop.first else eos_token }}{{ message['content'] }}{%% endif %%}"
    "{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ %(end)s }}{%% endif %%}"
)
"""For encoder-decoders without a template: the words alone, turns parted by EOS, in what the tokenizer puts
around a text; then the reply."""

DATE = datetime.date(2024, 7, 26)
"""Today, to a template that asks: the day that Llama 3.2's own falls back to."""
_ASKS_TODAY = re.compile(r"strftime_now(?!\s+is\s+defined)")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")

_PROBE = "\u2042"  # an asterism: a reply that no template has reason to treat specially


def prepare_tokenizer(
    tokenizer: Any, chat_template: Path | None = None, encoder_decoder: bool = False
) -> None:
    """Give a tokenizer, in place, what the stages need: a pad token and a working chat template.

    A template that writes today's date gets a fixed one in its place, and is saved with it: the ids of a
    prompt would change with the day.
    `chat_template` is a jinja file that replaces the tokenizer's own template. UserError: no EOS
    token, an unreadable file, or a template that fails or does not put the reply after the prompt.
    """
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no eos_token, so no response could ever end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template))
    elif not tokenizer.chat_template and encoder_decoder:
        tokenizer.chat_template = _encoder_template(tokenizer)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = _bos(tokenizer) + DEFAULT_TEMPLATE
    tokenizer.chat_template = _dated(tokenizer)
    asked = [message("user", "a")]
    encode_responses(tokenizer, asked, ["b"])
    if _PROBE not in _reply(tokenizer, _render(tokenizer, asked, True), asked, _PROBE):
        raise UserError(
            "chat template: it leaves out the assistant's words: nothing could be learnt"
        )


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of a prompt, up to where the assistant's reply begins; never empty, never ending it."""
    return _prompt_ids(tokenizer, _render(tokenizer, messages, True))


def encode_responses(
    tokenizer: Any, messages: Sequence[Message], responses: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt's messages and of each reply to them as the template writes it, ending in
    exactly one EOS.

    What the template adds after EOS is cut. Where it ends the assistant's turn with another token than
    the tokenizer's EOS, or with another and then EOS, EOS stands in that token's place. The letters of an
    EOS inside a reply are text, as those of any special token in any message are.
    """
    before = _render(tokenizer, messages, True)
    prompt = _prompt_ids(tokenizer, before)
    return prompt, [_response_ids(tokenizer, before, messages, r) for r in responses]


def encode_demonstration(
    tokenizer: Any, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Ids of a conversation up to its last reply, and of that reply as in `encode_responses`."""
    *context, reply = messages
    prompt, (response,) = encode_responses(tokenizer, context, [reply["content"]])
    return prompt, response


def _prompt_ids(tokenizer: Any, before: str) -> list[int]:
    ids = token_ids(tokenizer, before)
    if not ids:
        raise UserError("chat template: a prompt becomes no token at all")
    return ids


def _response_ids(
    tokenizer: Any, before: str, messages: Sequence[Message], response: str
) -> list[int]:
    eos, name = tokenizer.eos_token_id, tokenizer.eos_token
    text, ended, _ = _reply(tokenizer, before, messages, response).partition(name)
    if not ended or has_special(tokenizer, text):
        # the way the template closes a turn, learnt from a reply that is easy to find
        closing = (
            _reply(tokenizer, before, messages, _PROBE).rpartition(_PROBE)[2].partition(name)[0]
        )
        if not ended or has_special(tokenizer, closing):
            text = text.removesuffix(closing)
    ids = token_ids(tokenizer, text, reply=True)
    return [*(ids[: ids.index(eos)] if eos in ids else ids), eos]


def scored_ids(tokenizer: Any, messages: Sequence[Message], response: Sequence[int]) -> list[int]:
    """A response to `messages` as reward models read it: closed by one EOS, also when it was cut off.

    They are trained on what was ranked, and people rank words without the thinking before them. So where a
    model may think its own ids give way to those of its words alone, written as rankings are.
    """
    begins = tokenizer.decode(response).lstrip().startswith("<think>")
    if begins or "<think>" in str(tokenizer.chat_template):
        return encode_responses(tokenizer, messages, [response_text(tokenizer, response)])[1][0]
    eos = tokenizer.eos_token_id
    return [*response, *([] if response[-1:] == [eos] else [eos])]


def response_text(tokenizer: Any, response: Sequence[int]) -> str:
    """What a response says to rewards, judges, labelers and people: its words after any thinking.

    Special tokens and a block of thinking at the start, `<think>...</think>`, are left out of the text and
    stay among the tokens, which is what policies are trained on. Where the template itself opens
    the block in the prompt, every response begins inside it. A block that is not closed says nothing.
    """
    gone = _controls(tokenizer)  # not the tags of thinking, which may be special tokens
    kept = [token for token in response if token not in gone]
    text = _decoded(tokenizer, kept, ended=response[-1:] == [tokenizer.eos_token_id])
    opens = "<think>" in str(tokenizer.chat_template) and _render(
        tokenizer, [message("user", _PROBE)], True
    ).rstrip().endswith("<think>")
    return without_thinking(text, inside=opens)


def _decoded(tokenizer: Any, ids: list[int], ended: bool) -> str:
    """Text as it is written (no blank before a comma is taken out), without the first bytes of a
    character that a response was cut off in: a character has at most four."""

    def decoded(count: int) -> str:
        return tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)

    text = decoded(len(ids))
    if ended or not text.endswith("\ufffd"):
        return text
    shorter = (decoded(len(ids) - cut) for cut in range(1, min(4, len(ids) + 1)))
    return next((found for found in shorter if not found.endswith("\ufffd")), text)


def _controls(tokenizer: Any) -> set[int]:
    """Ids of the special tokens, the tags of thinking aside."""
    tags = ("<think>", "</think>")
    return {number for name, number in special_ids(tokenizer).items() if name not in tags}


def without_thinking(text: str, inside: bool = False) -> str:
    """`response_text` of a response that is text already; `inside`: it begins in the block."""
    thought, _, said = text.partition("</think>")
    return said.lstrip() if inside or thought.lstrip().startswith("<think>") else text


def well_formed(tokenizer: Any, response: Sequence[int], markers: Sequence[str]) -> bool:
    """Whether a response's ids, its EOS included, are words and then EOS, and nothing else.

    Empty ones are not, nor those that hold another special token or one of the `role_markers`: a
    model that goes on with the user's next turn has not learnt where its own ends.
    """
    *inner, last = response
    text = tokenizer.decode(inner, skip_special_tokens=False)
    return (
        last == tokenizer.eos_token_id
        and bool(response_text(tokenizer, response).strip())
        and not set(inner) & _controls(tokenizer)
        and not any(marker in text for marker in markers)
    )


def role_markers(tokenizer: Any) -> list[str]:
    """What the template writes before a user's and before the assistant's words, as text."""
    user = [message("user", _PROBE)]
    said = _render(tokenizer, user, False)
    markers = [said.partition(_PROBE)[0], _render(tokenizer, user, True).removeprefix(said)]
    plain = [marker.replace(tokenizer.bos_token or "", "").strip() for marker in markers]
    return [marker for marker in plain if marker]


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what turns text into ids: vocabulary, rules, special tokens; not the template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # settings of the last call
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    return _sha256([rules, special])


def template_hash(tokenizer: Any) -> str:
    """SHA-256 of the chat template."""
    return _sha256(tokenizer.chat_template)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- rendering ------------------------------------------------------------------------------------


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: cannot read {path}: {error}") from error
    if not text.strip():
        raise UserError(f"chat_template: {path} is empty")
    return text


def _dated(tokenizer: Any) -> str:
    """A tokenizer's template with `DATE` where it would write today's."""
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:  # several by name, and none that is called default
        raise UserError(f"chat template: {error}") from error
    if not _ASKS_TODAY.search(template):
        return template
    say(f"chat template: it writes today's date; {DATE:%d %b %Y} stands there from now on")
    dated = _TODAY.sub(lambda found: repr(DATE.strftime(found[2])), template)
    if _ASKS_TODAY.search(dated):
        raise UserError(
            "chat template: write the date in the place of strftime_now (chat_template)"
        )
    return dated


def _encoder_template(tokenizer: Any) -> str:
    before, after = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in around(tokenizer))
    start = f"{{{{ {json.dumps(before)} }}}}" if before else ""
    return start + ENCODER_TEMPLATE % {"end": json.dumps(after or tokenizer.eos_token)}


def _bos(tokenizer: Any) -> str:
    """The default template's beginning: BOS if the tokenizer begins every text with one."""
    first = tokenizer("a")["input_ids"][:1]
    return "{{- bos_token }}" if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""


def _render(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    messages = _folded(tokenizer, messages)
    try:
        return tokenizer.apply_chat_template(
            marked(tokenizer, messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # a template is a program of somebody else and may fail in any way
        raise UserError(f"chat template: cannot render {_outline(messages)}: {error}") from error


def _folded(tokenizer: Any, messages: Sequence[Message]) -> Sequence[Message]:
    """Messages whose system message, if the template has no place for it, begins the user's first.

    As Llama 2's and Gemma 3's own templates write it: the system's words, a blank line, the user's.
    """
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    if _has_system(tokenizer, str(tokenizer.chat_template)):
        return messages
    system, first, *rest = messages
    return [message(first["role"], f"{system['content']}\n\n{first['content']}"), *rest]


@functools.lru_cache(maxsize=8)
def _has_system(tokenizer: Any, template: str) -> bool:
    """Whether a template writes a system message, rather than refuse it or leave it out."""
    asked = [message("system", _PROBE), message("user", "a")]
    try:
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except Exception:  # as in `_render`
        text = ""
    if _PROBE not in text:
        say("chat template: no system role; system messages begin the user's first message")
    return _PROBE in text


def _reply(tokenizer: Any, before: str, messages: Sequence[Message], response: str) -> str:
    """What the template writes after the prompt's rendering when the reply follows.

    Some open a block of thinking in the prompt and leave thinking out of replies (DeepSeek-R1): there
    the reply is its thinking or none, the end of the block and what the template writes.
    """
    whole = _render(tokenizer, [*messages, message("assistant", response)], False)
    if not whole.startswith(before) and before.rstrip().endswith("<think>"):
        block = THINKING_BLOCK.match(response)
        said = response[block.end() :].lstrip("\n") if block else response
        [thought] = marked(tokenizer, [message("assistant", block[1] if block else "")])
        reply = _reply(tokenizer, before[: before.rindex("<think>")], messages, said)
        return f"{thought['content'].strip()}\n</think>\n\n{reply}"
    if not whole.startswith(before):
        raise UserError(
            f"chat template: {_outline(messages)} rendered with a reply does not begin as it does "
            f"without one: {_difference(before, whole)}"
        )
    return whole[len(before) :]


def _difference(before: str, whole: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole)
    )
    return f"at character {at + 1}, {before[at : at + 30]!r} is not {whole[at : at + 30]!r}"


def _outline(messages: Sequence[Message]) -> str:
    return "[" + ", ".join(item["role"] for item in messages) + "]"
