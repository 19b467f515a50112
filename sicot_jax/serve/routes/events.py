"""Route that takes the events of a shop's visitors."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException

from sicot_jax.errors import InputError
from sicot_jax.events.store import Event, parse_event
from sicot_jax.serve.errors import ERROR_RESPONSES
from sicot_jax.serve.photo import PhotoError, parse_json
from sicot_jax.serve.state import service_state

_MAX_EVENTS = 1000
router = APIRouter(tags=["events"])


@router.post(
    "/v1/events",
    status_code=202,
    responses=ERROR_RESPONSES,
    description="Stores a list of at most 1,000 events; events that are already stored stay "
    "unchanged.",
)
async def events(request: Request) -> dict[str, int]:
    """Stores a list of at most 1,000 events; events that are already stored stay unchanged.

    Args:
      request: the request; its body is a JSON list of events.

    Returns:
      Number of events received and of new ones.

    Raises:
      HTTPException: 404 where the service keeps no events.
      PhotoError: the request is too slow or not JSON.
      InputError: not a list of events; none is stored.
    """
    state = service_state(request)
    if state.events is None:
        raise HTTPException(404, "this service keeps no events; start it with --events FILE")
    seconds = state.settings.timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            body = await request.body()
    except TimeoutError:
        raise PhotoError(
            408, "too_slow", f"no complete request within {seconds:g} seconds"
        ) from None
    parsed = _parse_events(parse_json(body))
    new = await asyncio.get_running_loop().run_in_executor(None, state.events.add, parsed)
    return {"received": len(parsed), "new": new}


def _parse_events(content: object) -> list[Event]:
    if (
        not isinstance(content, list)
        or len(content) > _MAX_EVENTS
        or not all(isinstance(values, dict) for values in content)
    ):
        raise InputError(f"wanted a list of at most {_MAX_EVENTS} events")
    parsed = []
    for number, values in enumerate(content):
        try:
            parsed.append(parse_event(values))
        except InputError as error:
            raise InputError(f"event {number}: {error}; none was stored") from error
    return parsed
