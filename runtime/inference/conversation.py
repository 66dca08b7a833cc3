"""A chat in turns: what was said, and the ids that ask for the next answer."""

from __future__ import annotations

import json
from dataclasses import dataclass

from runtime.data.chat import prompt_ids, render
from runtime.data.tokenizer import Tokenizer


@dataclass
class Turn:
    """A message of the user and its answer."""

    user: str
    answer: str
    # Of both, as they were read and drawn, <|end|> included.
    ids: list[int]


class Conversation:
    """A system message and turns.

    With chat ids, an answer's ids are kept as they were drawn, so that a decoder's cache holds
    them. A published model's template is rendered again for each answer.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int):
        self.tokenizer, self.context_length = tokenizer, context_length
        self.system = ""
        self.turns: list[Turn] = []

    def ids_for(self, user: str, room: int) -> tuple[list[int], int]:
        """Return the ids that ask for an answer, and how many of the oldest turns they leave out.

        Turns are left out until `room` tokens are left in the context.
        """
        for first in range(len(self.turns) + 1):
            ids = self._ids(self.turns[first:], user)
            if len(ids) + room <= self.context_length:
                break
        return ids, first

    def add(self, user: str, answer: str, answer_ids: list[int]) -> None:
        """Append a turn. answer_ids: as drawn, with or without a stop id at the end."""
        ids = []
        if (chat := self.tokenizer.chat) is not None:
            ended = answer_ids[-1:] in ([chat.end], [self.tokenizer.end_of_text_id])
            ids = [*self._asked(user), *(answer_ids[:-1] if ended else answer_ids), chat.end]
        self.turns.append(Turn(user, answer, ids))

    def messages(self, turns: list[Turn] | None = None) -> list[dict]:
        """Return the messages of all or of some turns, after the system's."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns if turns is None else turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def as_json(self) -> str:
        """Return the chat as a line that scripts.sft reads; "" if nothing was said."""
        if not self.turns:
            return ""
        return json.dumps({"messages": self.messages()}, ensure_ascii=False)

    def _ids(self, turns: list[Turn], user: str) -> list[int]:
        if self.tokenizer.chat is None:
            messages = [*self.messages(turns), {"role": "user", "content": user}]
            return prompt_ids(messages, self.tokenizer)
        system = self.messages([])
        ids = render(system, self.tokenizer).ids if system else self._start()
        return [*ids, *(i for turn in turns for i in turn.ids), *self._asked(user)]

    def _asked(self, user: str) -> list[int]:
        """Return the ids of a user's message and of the header of its answer."""
        ids = prompt_ids([{"role": "user", "content": user}], self.tokenizer)
        return ids[len(self._start()) :]

    def _start(self) -> list[int]:
        return [] if self.tokenizer.start_id is None else [self.tokenizer.start_id]
