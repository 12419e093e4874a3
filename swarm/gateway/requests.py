"""What may be asked of the API: OpenAI's requests as strict values with bounds. What is not done is refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from blocks.decoding.sampling import MAX_TOP_LOGPROBS

MAX_MESSAGES = 1024
MAX_PROMPTS = 8
MAX_CHOICES = 4
MAX_STOPS = 4
MAX_TOKENS = 1_000_000  # of a request, whatever the model takes; the model's own bound comes after it
_MAX_CHARS = 4_000_000  # the body's bound is smaller; this one stands in the description
_MAX_IDS = 1_000_000

Text = Annotated[str, StringConstraints(max_length=_MAX_CHARS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Word = Annotated[str, StringConstraints(max_length=512)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Ids = Annotated[list[Token], Field(min_length=1, max_length=_MAX_IDS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class TextPart(_Strict):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation. What an earlier answer brought along as null may come back as null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Word | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """What a stream carries besides the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(_Strict):
    """Only plain text."""

    type: Literal["text"]


class _Request(_Strict):
    """What both kinds of request have. `user` and its kin are taken and not used; the neutral value of what is not
    done is taken, any other is refused.
    """

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Word | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _options_are_of_a_stream(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        return self


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None
    metadata: Annotated[dict[Word, Word], Field(max_length=16)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Word | None = None
    prompt_cache_key: Word | None = None

    @property
    def most_tokens(self) -> int | None:
        """The bound that was given, by its new or its old name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def noted(self) -> int | None:
        """How many likely tokens are told at each place; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens; give one of them")
        return self


class CompletionRequest(_Request):
    """POST /v1/completions. Several prompts are answered as so many choices each."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, StringConstraints(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if isinstance(each, (str, list))]

    @model_validator(mode="after")
    def _best_is_all(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not done here; leave it out, or give the same number as n")
        return self
