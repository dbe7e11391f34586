"""What a request may say: OpenAI's body for images, and a few fields more."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints

SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
MOST_SEED = 2**53 - 1  # every integer up to here is one in all JSON readers

Text = Annotated[str, StringConstraints(max_length=100_000)]


class ImageRequest(BaseModel):
    """The body of ``POST /v1/images/generations``.

    Beside OpenAI's fields: ``seed`` (image k of a request has seed + k), ``num_inference_steps``,
    ``guidance_scale``, ``negative_prompt``, and ``class_label`` for class-conditional models, which
    take it as the prompt too. ``quality`` names a tier of the plan book, or is ``auto``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Text = ""
    class_label: Annotated[int, Field(ge=0)] | None = None
    model: Annotated[str, Field(max_length=200)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    size: Annotated[str, Field(pattern=SIZE)] = "auto"
    quality: Annotated[str, Field(max_length=32)] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: bool = False
    user: Annotated[str, Field(max_length=200)] | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[FiniteFloat, Field(ge=0, le=100, strict=False)] | None = None
    negative_prompt: Text | None = None


class RequestError(Exception):
    """Report a request that cannot be served, as OpenAI's API does.

    Attributes:
        status: the HTTP status.
        message: what is wrong.
        param: the field of the body, if it is one.
        code: a word for programs.
        retry_after: seconds after which to try again; 0 where that does not help.
    """

    def __init__(
        self, status: int, message: str, *, param: str = "", code: str = "", retry_after: int = 0
    ) -> None:
        """Take what there is to say."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": kind,
            "param": self.param or None,
            "code": self.code or None,
        }
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the response."""
        return {"Retry-After": str(self.retry_after)} if self.retry_after else {}
