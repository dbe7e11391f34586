"""The HTTP API: what OpenAI's client gets, and what is refused."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditfastattn import Plan
from ditfastattn.serving.host import require_keys
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.request import ImageRequest
from tests.helpers import attentive_pipeline
from tests.serving.servers import ASK, IMAGES, Running, alone, pixels, running
from tests.three_steps import CALL
from tests.works_with import works_with

EXTRA = {key: ASK[key] for key in ("seed", "num_inference_steps", "guidance_scale")}


def client_of(served: Running, key: str = "none") -> openai.OpenAI:
    url = f"http://127.0.0.1:{served.port}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


@works_with(
    "Serving",
    "OpenAI's client, `client.images.generate(...)`, with `quality` and a seed",
    "works",
    "each image is that of its seed alone, bit for bit",
)
def test_the_openai_client_gets_the_images_of_each_seed_alone(
    served: Running, plans: dict[str, Plan]
) -> None:
    client = client_of(served)
    generate: Any = client.images.generate  # OpenAI's own tiers have other names
    for quality, plan in {"medium": plans["medium"], "high": plans["high"]}.items():
        answer = generate(
            model="digits",
            prompt="1",
            n=2,
            size="16x16",
            quality=quality,
            response_format="b64_json",
            extra_body=EXTRA,
        )
        assert answer.data is not None
        for place, image in enumerate(answer.data):
            wanted = alone(attentive_pipeline(), plan, CALL, ASK["seed"] + place)
            assert np.array_equal(pixels(image.b64_json or ""), wanted)
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("digits").id == "digits"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="expected auto, lossless, high, medium"):
        client.images.generate(model="digits", prompt="1", quality="hd")


def test_lossless_is_dense_and_auto_is_the_default(served: Running, plans: dict[str, Plan]) -> None:
    dense = alone(attentive_pipeline(), None, CALL, 3)
    found = served.ask(quality="lossless")
    assert np.array_equal(found.images[0], dense)
    assert found.headers["x-ditfastattn-plan"] == "dense"
    name = served.server.book.plans[0][0].name  # type: ignore[union-attr]  # it has a book
    assert served.ask().headers["x-ditfastattn-plan"] == name
    assert served.ask(quality="auto", class_label=1, prompt="").content == served.ask().content


def test_a_request_that_no_plan_fits_runs_dense_and_is_counted(served: Running) -> None:
    before = served.metric("dense_fallbacks_total")
    found = served.ask(num_inference_steps=4)
    dense = alone(attentive_pipeline(), None, CALL | {"num_inference_steps": 4}, 3)
    assert np.array_equal(found.images[0], dense)
    assert served.metric("dense_fallbacks_total") == before + 1


def test_models_say_what_a_tier_promises_and_what_was_measured(served: Running) -> None:
    (model,) = served.request("GET", "/v1/models").json["data"]
    high = model["qualities"]["high"]
    assert high["promise"] == "ssim >= 0.9 on the worst prompt measured"
    assert high["plans"][0]["measured"]["quality"]["worst"] == 0.95
    assert model["default_quality"] == "high"


def test_health_metrics_and_the_openapi_document(served: Running) -> None:
    assert served.request("GET", "/health").json == {"status": "ready"}
    images, steps = served.metric("images_total"), served.metric("steps_total")
    served.ask(n=2)
    assert served.metric("images_total") == images + 2
    assert served.metric("steps_total") == steps + 6
    assert served.metric("cache_bytes") > 0
    document = served.request("GET", "/openapi.json").json
    assert {IMAGES, "/v1/models", "/health", "/metrics"} <= set(document["paths"])
    fields = document["components"]["schemas"]["ImageRequest"]["properties"]
    assert {"quality", "seed", "n", "size", "negative_prompt"} <= set(fields)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": ""}, "prompt"),
    "a class beyond the model's": ({"prompt": "10"}, "prompt"),
    "a negative class": ({"class_label": -1}, "class_label"),
    "a prompt that is a number": ({"prompt": 3}, "prompt"),
    "n of text": ({"n": "2"}, "n"),
    "n true": ({"n": True}, "n"),
    "n of a fraction": ({"n": 1.5}, "n"),
    "too many images": ({"n": 5}, "n"),
    "no images": ({"n": 0}, "n"),
    "a list of sizes": ({"size": ["16x16"]}, "size"),
    "another size": ({"size": "32x32"}, "size"),
    "a size of text": ({"size": "large"}, "size"),
    "another tier": ({"quality": "standard"}, "quality"),
    "a URL": ({"response_format": "url"}, "response_format"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "too many steps": ({"num_inference_steps": 61}, "num_inference_steps"),
    "a negative seed": ({"seed": -1}, "seed"),
    "a seed that is too large": ({"seed": 2**64}, "seed"),
    "guidance that is not a number": ({"guidance_scale": float("nan")}, "guidance_scale"),
    "a negative prompt for classes": ({"negative_prompt": "2"}, "negative_prompt"),
    "an unknown field": ({"output_path": "/etc/passwd"}, "output_path"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_of_wrong_content_is_refused_by_field(served: Running, case: str) -> None:
    changes, param = BAD[case]
    found = served.ask(**changes)
    assert (found.status, found.error["param"]) == (400, param)
    assert found.error["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(width=16) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from([*ImageRequest.model_fields, "other"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
def test_any_json_is_served_or_refused(served: Running, changes: dict[str, Any]) -> None:
    found = served.ask(**changes)
    assert found.status in (200, 400, 404), found.content
    if found.status != 200:
        assert found.error["message"]


WHOLE = json.dumps(ASK).encode()
DAMAGED = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda cut, more: WHOLE[:cut] + more, st.integers(0, len(WHOLE)), st.binary(max_size=9)
    ),
    st.builds(
        lambda at, byte: WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :],
        st.integers(0, len(WHOLE) - 1),
        st.integers(0, 255),
    ),
)
TYPES = st.sampled_from(["application/json", "text/plain", "multipart/form-data", "x"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(body=DAMAGED, kind=TYPES)
def test_a_damaged_body_is_served_or_refused(served: Running, body: bytes, kind: str) -> None:
    found = served.request("POST", IMAGES, body, content_type=kind)
    assert found.status in (200, 400, 404), found.content
    if found.status != 200:
        assert found.error["message"]


def test_clients_that_hang_hold_nobody_up(served: Running) -> None:
    expected = served.ask().images[0]
    silent = socket.create_connection(("127.0.0.1", served.port), timeout=60)  # sends nothing
    deaf = served.connect(json.dumps(ASK | {"stream": True}).encode())  # and reads nothing
    try:
        assert np.array_equal(served.ask().images[0], expected)
    finally:
        silent.close()
        deaf.close()


def test_another_model_is_not_found(served: Running) -> None:
    assert served.ask(model="gpt-image-1").status == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b"[" * 60_000, 400),
        (b'{"prompt": "1", "n": ' + b"9" * 50_000 + b"}", 400),
        (b'{"prompt": "' + b"1" * 10_000_000 + b'"}', 413),
    ],
    ids=["empty", "cut", "a list", "null", "no text", "nested", "a long number", "10 MB"],
)
def test_a_body_that_is_no_request_is_refused(served: Running, body: bytes, status: int) -> None:
    try:
        found = served.request("POST", IMAGES, body)
    except (BrokenPipeError, ConnectionResetError):
        assert status == 413  # closed while it was sent
    else:
        assert found.status == status
        assert found.error["message"]
    assert served.ask().status == 200


def test_a_body_of_unknown_length_is_bounded_too(served: Running) -> None:
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(head.encode() + b"11170\r\n" + b"x" * 0x11170)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert served.ask().status == 200


def test_half_a_body_is_given_up_and_the_next_request_is_right(served: Running) -> None:
    body = json.dumps(ASK).encode()
    expected = served.ask().images[0]
    waiting = served.connect(body[:10], length=len(body))
    gone = served.connect(body[:10], length=len(body))
    gone.close()
    began = time.monotonic()
    assert waiting.recv(100).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 10
    waiting.close()
    assert np.array_equal(served.ask().images[0], expected)


def test_a_request_keeps_its_id_where_it_is_plain(
    served: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "ditfastattn.serving"):
        body = json.dumps(ASK).encode()
        kept, given = (
            served.request("POST", IMAGES, body, x_request_id=each).headers["x-request-id"]
            for each in ("a-1", "a b{}")
        )
        assert kept == "a-1"
        assert given != "a b{}"
        end = time.monotonic() + 10
        while f'"{given}"' not in caplog.text:  # written once the answer was sent
            assert time.monotonic() < end
            time.sleep(0.01)
    lines = [json.loads(text) for text in caplog.messages if text.startswith("{")]
    assert [line["id"] for line in lines] == ["a-1", given]
    assert {"tier": "high", "status": 200, "steps": 3, "images": 1}.items() <= lines[0].items()
    assert "prompt" not in lines[0]


def test_progress_is_streamed(served: Running) -> None:
    found = served.ask(stream=True)
    assert found.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in found.content.decode().splitlines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    progress = [each["step"] for each in events if each["type"] == "image_generation.progress"]
    assert progress == [1, 2, 3]
    assert events[-1]["type"] == "image_generation.completed"
    assert np.array_equal(pixels(events[-1]["b64_json"]), served.ask().images[0])


def test_keys_admit_and_health_is_open(served: Running) -> None:
    server = ImageServer(attentive_pipeline(), served.server.book, name="digits", lowering="eager")
    with running(server, require_keys(["secret", "other"])) as found:
        assert found.request("GET", "/health").status == 200
        for path in ("/metrics", "/v1/models", "/openapi.json"):
            assert found.request("GET", path).status == 401
        assert found.ask().error["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client_of(found, "wrong").models.list()
        assert client_of(found, "other").models.list().data
