"""What requests may hold: OpenAI's fields with their ranges, and a few more that other servers know as well.

Fields that are unknown are ignored, as OpenAI's own clients of later versions expect; those that ask for
something that is not done here are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MOST_TEXTS = 128
MOST_STOPS = 16
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=1 << 22)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


def refuse(value: Any, name: str, why: str, allowed: tuple[Any, ...] = (None,)) -> None:
    """Raise for a field that asks for what is not done here."""
    if value not in allowed:
        raise ValueError(f"{name} is not supported here: {why}")


class StreamOptions(BaseModel):
    """Of a stream."""

    include_usage: bool = False


class Sampled(BaseModel):
    """What every request for text has."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: Annotated[str, Field(max_length=1000)]
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=10_000)] | None
    ) = None
    user: str | None = None
    ignore_eos: bool = False

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        wrong = next((key for key in self.logit_bias or () if not key.isdecimal() or len(key) > 9), None)
        if wrong is not None:
            raise ValueError(f"logit_bias has the key {wrong!r}: its keys are ids of tokens")
        return self


class CompletionRequest(Sampled):
    """Body of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS)]
    ) = ""
    max_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        refuse(self.suffix, "suffix", "the model writes forwards only", (None, ""))
        refuse(self.best_of, "best_of", "ask for n texts and choose", (None, 1, self.n or 1))
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0 and echo is not set: nothing would be answered")
        return self


class TextPart(BaseModel):
    """Of a message in parts."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1000)] | None = None

    def as_table(self) -> dict[str, Any]:
        """For the tokenizer's template."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content or ""}


class JsonSchema(BaseModel):
    """Of a response format."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: str = "answer"
    content: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer must be."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format.type is json_schema and json_schema is missing")
        return self

    @property
    def schema_(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must fit; null for any text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.content


class ChatRequest(Sampled):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatRequest:
        for name in ("tools", "functions"):
            refuse(getattr(self, name), name, "the models here call no tools", (None, []))
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class TextFormat(BaseModel):
    """`text.format` of a response."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    content: dict[str, Any] | None = Field(alias="schema", default=None)


class TextOptions(BaseModel):
    """`text` of a response."""

    model_config = ConfigDict(extra="ignore")

    format: TextFormat = Field(default_factory=TextFormat)


class ResponsesRequest(Sampled):
    """Body of ``/v1/responses``."""

    input: str | Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _supported(self) -> ResponsesRequest:
        refuse(self.tools, "tools", "the models here call no tools", (None, []))
        refuse(self.previous_response_id, "previous_response_id", "nothing is stored; send the whole chat")
        refuse(self.n, "n", "a response has one text", (None, 1))
        return self


class EmbeddingsRequest(BaseModel):
    """Body of ``/v1/embeddings``."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: Annotated[str, Field(max_length=1000)]
    input: (
        Annotated[str, StringConstraints(min_length=1)]
        | Annotated[
            list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=2048)
        ]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    @field_validator("dimensions")
    @classmethod
    def _all(cls, value: int | None) -> int | None:
        refuse(value, "dimensions", "a vector has as many numbers as the model is wide")
        return value
