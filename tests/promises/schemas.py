"""Requests that schemathesis makes of /openapi.json: bodies that fit it, and bodies that do not.

schemathesis is no package of ours (about 30 with what it needs): without it there are none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

HAS_SCHEMATHESIS = importlib.util.find_spec("schemathesis") is not None
# Of a request: (method, path with its query, headers, body).
Send = Callable[[str, str, dict[str, str], bytes | None], None]


def send_made(document: dict, count: int, send: Send) -> None:
    """Send about `count` requests: of each operation that takes something, of both kinds alike.

    The same ones each time. An operation that takes nothing has few.
    """
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.generation import GenerationMode

    operations = [one.ok() for one in schemathesis.openapi.from_dict(document).get_all_operations()]
    kinds = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    num_large = 2 * sum(one.method == "post" for one in operations)
    each = settings(
        max_examples=max(1, count // num_large),
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    few = settings(each, max_examples=20)
    for operation in operations:
        for kind in kinds:

            @(each if operation.method == "post" else few)
            @given(case=operation.as_strategy(generation_mode=kind))
            def go(case) -> None:
                made = case.as_transport_kwargs(base_url="http://127.0.0.1")
                ready = requests.Request(**made).prepare()
                headers = {k: v for k, v in ready.headers.items() if k != "Content-Length"}
                body = ready.body.encode() if isinstance(ready.body, str) else ready.body
                send(ready.method, ready.path_url, headers, body)

            try:
                go()
            except Unsatisfiable:
                # What takes nothing cannot be given a wrong thing.
                assert operation.method == "get", operation.path
