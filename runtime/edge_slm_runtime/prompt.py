"""Prompt forms: how a request becomes the prompt of a model, and which tokens end its answer.

    command   this project's own grammar (see `command`)
    chat      one turn of a conversation: marks of the roles around the request
    plain     the text that the model continues

A form is data of the bundle: literal text to put before and after a request. There is no
template language. Control tokens are read in that text, never in a request.

Only the command form tells the model what is asked of it. The length promise (`length`) is
the decoder's own, so `words` is honoured under every form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edge_slm_runtime.command import (
    END,
    Checked,
    Command,
    CommandSchema,
    is_count,
)
from edge_slm_runtime.errors import (
    BadSetting,
    ManifestInvalid,
    NoCommandGrammar,
    shown,
)
from edge_slm_runtime.request_text import clean_request, valid_request

Kind = Literal["command", "chat", "plain"]


@dataclass(frozen=True, slots=True)
class PromptForm:
    """What stands around a request.

    ends: the control tokens that end an answer, the usual one first. before, after: literal
    text around the request, control tokens included. schema: the grammar of a command form,
    which then says what stands around.
    """

    kind: Kind
    ends: tuple[str, ...]
    before: str = ""
    after: str = ""
    schema: CommandSchema | None = None

    @classmethod
    def commanded(cls, schema: CommandSchema) -> PromptForm:
        """The form of a model that reads commands of this schema."""
        return cls("command", (END,), schema=schema)

    @property
    def grammar(self) -> CommandSchema:
        """The command grammar. Raises NoCommandGrammar where there is none."""
        if self.schema is None:
            raise NoCommandGrammar(
                f"the model has no command grammar: its prompts are of the form {self.kind}",
                "it takes a request, and words for its length",
            )
        return self.schema

    @property
    def tokens(self) -> tuple[str, ...]:
        """Tokens that the tokenizer must have, as control tokens."""
        return tuple(self.schema.special_tokens()) if self.schema else self.ends

    def check(self, command: Command) -> Checked:
        """Validates a command; without a grammar the model gets none.

        Raises as `CommandSchema.check`, NoCommandGrammar for a task or a relevance.
        """
        if self.schema:
            return self.schema.check(command)
        asked = [name for name in ("task", "relevance") if getattr(command, name) is not None]
        if asked:
            raise NoCommandGrammar(
                f"{' and '.join(asked)} cannot be asked of this model: "
                f"its prompts are of the form {self.kind}",
                "it takes a request, and words for its length",
            )
        if command.words is not None and not (is_count(command.words) and command.words):
            raise BadSetting(f"words is {shown(command.words)}", "allowed: 1 or more, whole")
        return Checked(command, Command())

    def around(self, command: Command) -> tuple[str, str]:
        """The text before and after a request. Raises as `Axis.value_of`."""
        return self.schema.around(command) if self.schema else (self.before, self.after)

    def clean(self, request: str, command: Command | None = None) -> str:
        """A request as the model sees it: its ends stripped; white space within is folded
        under a command, in the case of its task, and is the caller's under the other forms.

        Raises RequestNotText, EmptyRequest, ControlTokenInRequest.
        """
        if self.schema is None:
            return valid_request(request)
        return self.schema.recased(clean_request(request), command.task if command else None)

    def to_json(self) -> dict[str, Any]:
        """Keys of the manifest: `command` holds a grammar, `prompt` another form."""
        if self.schema:
            return {"command": self.schema.to_json()}
        facts = {"kind": self.kind, "before": self.before, "after": self.after}
        return {"prompt": {**facts, "ends": list(self.ends)}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PromptForm:
        """The form of a manifest. Raises ManifestInvalid."""
        if ("command" in data) == ("prompt" in data):
            raise ManifestInvalid("a manifest must have either a command schema or a prompt form")
        if "command" in data:
            return cls.commanded(CommandSchema.from_json(data["command"]))
        facts = data["prompt"]
        if not isinstance(facts, Mapping) or set(facts) != {"kind", "before", "after", "ends"}:
            raise ManifestInvalid("a prompt form must have kind, before, after and ends")
        ends = facts["ends"]
        if (
            not isinstance(ends, list)
            or not ends
            or not all(isinstance(e, str) and e for e in ends)
        ):
            raise ManifestInvalid("a prompt form must name the tokens that end an answer")
        if facts["kind"] not in ("chat", "plain"):
            raise ManifestInvalid(f"unknown prompt form {shown(facts['kind'])}")
        if not isinstance(facts["before"], str) or not isinstance(facts["after"], str):
            raise ManifestInvalid("before and after of a prompt form must be text")
        return cls(facts["kind"], tuple(ends), facts["before"], facts["after"])
