"""How a request's body is read: strictly, whole, and with every bad field named.

Litestar's own reading takes `"12"` for an int, text/plain for JSON, and names the first bad field
only; this DTO is where it lets a reader of ours in.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from litestar.dto import AbstractDTO, DTOFieldDefinition
from litestar.enums import RequestEncodingType
from litestar.typing import FieldDefinition
from msgspec import UNSET
from user_service_schemas import MalformedJSON, RuleViolation, decode_request

from ..errors import Invalid, MalformedBody, UnsupportedMediaType

KIB = 1024
MAX_BODY = 64 * KIB
MAX_BATCH_BODY = KIB * KIB
MAX_FEEDBACK_BODY = 8 * KIB * KIB


class StrictBody(AbstractDTO[Any]):
    """Decodes a body into the struct that the handler's `data` is annotated with."""

    @classmethod
    def create_for_field_definition(cls, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to prepare: Litestar's transfer models are not used."""

    @classmethod
    def generate_field_definitions(
        cls, model_type: type[Any]
    ) -> Generator[DTOFieldDefinition, None, None]:
        """Yield nothing, for the same reason."""
        yield from ()

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        """Say no, for the same reason."""
        return False

    def decode_bytes(self, value: bytes) -> Any:
        """Decode the body.

        Raises:
            UnsupportedMediaType: it is not sent as JSON. A body without a type is refused, too: a
                web page can send such a one across origins without asking.
            MalformedBody, Invalid
        """
        if self.asgi_connection.content_type[0] != RequestEncodingType.JSON:  # type: ignore[attr-defined]
            raise UnsupportedMediaType
        field = self.asgi_connection.route_handler.parsed_data_field
        try:
            return decode_request(value, field.annotation)
        except MalformedJSON as error:
            raise MalformedBody from error
        except RuleViolation as violation:
            judge = self.asgi_connection.route_handler.opt["operation"].judge
            judged = judge(violation.valid) if judge and violation.valid is not UNSET else ()
            # A field that does not fit its type is said to be so, and no more.
            details = {detail.field: detail for detail in (*judged, *violation.details)}
            raise Invalid(*details.values()) from violation
