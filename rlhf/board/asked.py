"""The fields of a small form, as a browser posts them."""

from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

MOST = 1 << 20  # bytes of a form; files come another way (uploads.py)


async def body(request: Request, most: int = MOST) -> bytes:
    """The request's content. Raises HTTPException where it is longer than `most` bytes, or the
    browser went away.
    """
    parts = bytearray()
    try:
        async for chunk in request.stream():
            parts += chunk
            if len(parts) > most:
                raise HTTPException(413, "The form is too long.")
    except ClientDisconnect as gone:
        raise HTTPException(400, "The request ended before its time.") from gone
    return bytes(parts)


async def fields(request: Request) -> dict[str, str]:
    """The form's fields by name, without blanks around them; of one that comes twice the last.
    Raises HTTPException as `body`, and for what is no form.
    """
    content = await body(request)
    try:
        pairs = parse_qsl(content.decode("ascii"), keep_blank_values=True, max_num_fields=200)
    except ValueError as error:
        raise HTTPException(400, "The form can't be read.") from error
    return {name: value.replace("\r\n", "\n").replace("\0", "").strip() for name, value in pairs}
