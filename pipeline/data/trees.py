"""Conversations written as trees (OpenAssistant's) -> rows of the forms that everything else reads.

    flat      a message a row: message_id, parent_id (null at the root), text, role, rank (0 the best)
    nested    a tree a row: prompt {text, role, replies [{text, role, rank, replies}]}

What moderators took out (`deleted`, `review_result` false, trees halted or aborted) goes with all that
answers it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.meaning import number_of
from pipeline.data.messages import ROLES, Message, message
from pipeline.data.problems import BadRow, Report
from pipeline.data.readers import Row

MOST = 9
"""Answers to one message that are ranked, the best; more cannot be."""
_STRUCTURE = {"message_id", "parent_id", "text", "role", "rank", "replies"}
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_ENDED = ("aborted_low_grade", "halted_by_moderator")


@dataclass(slots=True)
class Node:
    """A message and what answers it."""

    values: dict[str, Any]
    where: str
    replies: list["Node"] = field(default_factory=list)

    @property
    def role(self) -> str | None:
        """user or assistant."""
        return ROLES.get(str(self.values.get("role")).lower())

    def message(self) -> Message:
        """Itself; what is no text is told by whoever reads the row."""
        return message(self.values["role"], self.values["text"])

    def rank(self) -> float | None:
        """Its rank among its siblings, if it has one; BadRow for what is no number."""
        rank = self.values.get("rank")
        return None if rank == "" else number_of(rank, "rank")

    def place(self) -> float:
        """Where its rank puts it; unranked ones come last, as they stand in the file."""
        return float("inf") if (rank := self.rank()) is None else rank

    def gone(self) -> bool:
        """Whether moderators took it out."""
        values = self.values
        return (
            _word(values.get("deleted")) in _TRUE
            or _word(values.get("review_result")) in _FALSE
            or values.get("tree_state") in _ENDED
        )


def _word(value: Any) -> str:
    """Of a table's `True` the same as of a boolean."""
    return str(value).strip().lower()


Branches = Callable[[Node], Iterable[Row]]
"""Rows of a tree, from its root."""


def is_message(values: dict[str, Any]) -> bool:
    """Whether a row is one message of a tree."""
    return {"parent_id", "role"} <= values.keys()


def grown(branches: Branches, rows: Iterable[Row], report: Report) -> Iterator[Row]:
    """Rows as they are and, in the place of messages and trees, what `branches` makes of each tree."""
    nodes: dict[str, Node] = {}
    for row in rows:
        try:
            if is_message(row.values):
                name = row.values.get("message_id")
                if not isinstance(name, str) or "text" not in row.values:
                    raise BadRow("a message of a tree (`parent_id`) needs `message_id` and `text`")
                node = Node(row.values, row.where)
                node.rank()
                if nodes.setdefault(name, node) is not node:
                    raise BadRow(f"`message_id` {name} is also {nodes[name].where}")
            elif isinstance(prompt := row.values.get("prompt"), dict) and "replies" in prompt:
                kept = {"tree_state": row.values.get("tree_state")}
                yield from _told(_nested(prompt | kept, row.where, report), branches)
            else:
                yield row
        except BadRow as error:
            report.problem(row.where, error)
    for root in _roots(nodes, report):
        yield from _told(root, branches)


def _told(root: Node | None, branches: Branches) -> Iterable[Row]:
    return branches(root) if root is not None else ()


def _roots(nodes: dict[str, Node], report: Report) -> Iterator[Node]:
    """Join messages to what they answer, wherever in the file that stands."""
    roots = []
    for node in nodes.values():
        parent = node.values["parent_id"]
        above = nodes.get(parent) if isinstance(parent, str) else None
        if node.gone():
            report.count("messages that moderators took out, with what answers them")
        elif not parent:
            roots.append(node)
        elif above is None:
            report.count("messages left out: what they answer is not among the rows")
        else:
            above.replies.append(node)
    yield from roots


def _nested(values: dict[str, Any], where: str, report: Report) -> Node | None:
    root = Node(values, where)
    pending = [root]
    while pending:
        node = pending.pop()
        node.rank()
        replies = node.values.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise BadRow("`replies` is not a list of messages")
        if not {"text", "role"} <= node.values.keys():
            raise BadRow("a message of the tree has no `text` or no `role`")
        found = [Node(reply, where) for reply in replies]
        node.replies = [reply for reply in found if not reply.gone()]
        report.count(
            "messages that moderators took out, with what answers them",
            len(found) - len(node.replies),
        )
        pending += node.replies
    if root.gone():
        report.count("messages that moderators took out, with what answers them")
        return None
    return root


# --- what is made of a tree -----------------------------------------------------------------------


def best_path(root: Node) -> Iterator[Row]:
    """One conversation: at each turn what was ranked best, up to the last answer."""
    path, node = [root], root
    while node.replies:
        node = min(node.replies, key=Node.place)
        path.append(node)
    while len(path) > 1 and path[-1].role == "user":
        path.pop()
    yield _row(path[-1], [node.message() for node in path])


def prompts(root: Node) -> Iterator[Row]:
    """Every message of a user, with what leads to it."""
    return (_row(node, path) for node, path in _asked(root))


def rankings(root: Node) -> Iterator[Row]:
    """Every message of a user that was answered, with the answers and their ranks."""
    for node, path in _asked(root):
        answers = sorted((n for n in node.replies if n.role == "assistant"), key=Node.place)[:MOST]
        if answers:
            row = _row(node, path)
            row.values["responses"] = [answer.values["text"] for answer in answers]
            row.values["ranks"] = [answer.rank() for answer in answers]
            yield row


def _asked(root: Node) -> Iterator[tuple[Node, list[Message]]]:
    pending = [(root, [root.message()])]
    while pending:
        node, path = pending.pop()
        if node.role == "user":
            yield node, path
        pending += [(reply, [*path, reply.message()]) for reply in reversed(node.replies)]


def _row(node: Node, messages: list[Message]) -> Row:
    rest = {key: value for key, value in node.values.items() if key not in _STRUCTURE}
    return Row({**rest, "messages": messages}, node.where)
