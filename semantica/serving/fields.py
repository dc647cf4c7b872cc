"""The fields of each endpoint: OpenAI's, as far as a model of ours can do what they ask, and a few of our own."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from semantica.inputs import SINGLE, TEXT
from semantica.serving.job import ENDPOINTS, Card
from semantica.serving.limits import Limits
from semantica.serving.refusals import Refused, of_fields

PROMPT = 32_000
# field -> (what it takes, default, description); all may be null, as in OpenAI's API
Rows = dict[str, tuple[Any, Any, str]]


def whole(value: Any) -> Any:
    """What JSON calls an integer: 4.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(**bounds: int) -> Any:
    return Annotated[int, Field(**bounds), BeforeValidator(whole)]


class Image(BaseModel):
    """One image, in the form that was asked for."""

    b64_json: str | None = None
    url: str | None = None


class ImagesResponse(BaseModel):
    """Images. `seed` is of this server: with it, and the same fields, the same images are made again."""

    created: int
    data: list[Image]
    output_format: str
    size: str
    seed: int


class Fields(BaseModel):
    """What every endpoint has in common, once read."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def fields_of(endpoint: str, card: Card, limits: Limits) -> type[Fields]:
    """The fields of an endpoint of a served model, apart from the picture."""
    size = f"{card.size}x{card.size}"
    text = Annotated[str, Field(max_length=512)]
    rows: Rows = {
        "model": (text, None, f"{card.name!r}, or left out."),
        "n": (number(ge=1, le=limits.images), 1, "How many images."),
        "size": (Literal[size, "auto"], "auto", "The model makes one size."),
        "response_format": (
            Literal["url", "b64_json"], "url" if endpoint == "variations" else "b64_json",
            "`url` gives data: URLs, since nothing is kept on the server.",
        ),
        "output_format": (Literal["png", "jpeg", "webp"], "png", "What images are encoded as."),
        "output_compression": (number(ge=0, le=100), 100, "Quality of jpeg and webp, in percent."),
        "user": (text, None, "Taken and not looked at."),
        "safety_identifier": (text, None, "Taken and not looked at."),
        "steps": (number(ge=1, le=limits.steps), card.steps, "Sampling steps."),
        "guidance": (
            Annotated[float, Field(ge=-100, le=100)], card.guidance,
            "null + guidance * (own - null), classifier-free guidance; 1 is none.",
        ),
        "seed": (number(ge=0, lt=1 << 63), None, "Drawn, and said in the response, if left out."),
        "solver": (Literal[card.solvers], card.solver, "The sampler."),
    }  # fmt: skip
    if TEXT in ENDPOINTS[endpoint]:
        # what they ask for is what is done anyway
        rows |= {
            "quality": (Literal["auto", "standard"], "auto", "There is one."),
            "background": (Literal["auto", "opaque"], "auto", "Images are opaque."),
            "moderation": (Literal["auto", "low"], "auto", "Nothing is looked at."),
        }
    fields: dict[str, Any] = {
        name: (kind | None, Field(default, description=description))
        for name, (kind, default, description) in rows.items()
    }
    if TEXT in ENDPOINTS[endpoint]:
        fields["prompt"] = (Annotated[str, Field(min_length=1, max_length=PROMPT)], Field(description="What to show."))
    return create_model(f"{endpoint.capitalize()}Fields", __base__=Fields, **fields)


def read(kind: type[Fields], given: bytes | dict[str, str]) -> dict[str, Any]:
    """Fields from a JSON body, or from the texts of a form; null is the default.

    Raises:
        Refused: one is missing, unknown or impossible.
    """
    try:
        made = kind.model_validate_json(given, strict=True) if isinstance(given, bytes) else form(kind, given)
    except ValidationError as error:
        raise of_fields(error) from None
    defaults = {name: field.default for name, field in kind.model_fields.items()}
    return {name: defaults[name] if value is None else value for name, value in made}


def form(kind: type[Fields], given: dict[str, str]) -> Fields:
    """An empty field of a form is one that was left out, but for a prompt."""
    return kind.model_validate_strings({name: value for name, value in given.items() if value or name == "prompt"})


def described(endpoint: str, kind: type[Fields]) -> dict[str, Any]:
    """The request body of an endpoint for an OpenAPI document."""
    schema = kind.model_json_schema()
    if SINGLE not in ENDPOINTS[endpoint]:
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    picture = {"type": "string", "format": "binary", "description": "A JPEG, PNG, WEBP, GIF, BMP or TIFF picture."}
    schema["properties"] = {SINGLE: picture, **schema["properties"]}
    schema["required"] = [SINGLE, *schema.get("required", ())]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def check_model(name: str | None, card: Card) -> None:
    """Raises `Refused` for the name of another model."""
    if name not in (None, "", card.name):
        raise Refused(404, "model_not_found", f"The model is not served here; {card.name!r} is.", "model")
