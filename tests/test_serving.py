"""`semantica serve` to its clients: OpenAI's own, unmodified, and whatever else speaks HTTP."""

import asyncio
import base64
import io
import json
import threading
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from semantica.images import load_image
from semantica.pipelines.sample import load_pipeline, variations
from semantica.sampling.settings import Sampling
from semantica.serving.fields import fields_of
from semantica.serving.limits import Limits

# the client says so of variations, which OpenAI itself has retired
pytestmark = pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def running(served):
    """A server over the stored bundle."""
    with served.modelled(served.STORED / "bundle") as running:
        yield running


@pytest.fixture
def holding(served):
    """A function that starts a server over an engine that is held still, and gives both."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(card=served.CARD, limits=served.LIMITS, **options):
            engine = served.Held()
            running = stack.enter_context(served.live(engine, card, limits, **options))
            stack.callback(engine.release)
            return running, engine

        yield start


def client(running, **options) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": running.api, "api_key": "unused", "max_retries": 0, "timeout": 60, **options})


def pixels(data: bytes, form: str = "PNG") -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.format == form
    return np.asarray(image)


def upload(served, **fields) -> dict:
    return {"files": {"image": served.PICTURE.read_bytes()}, "data": fields}


def refusal(response: httpx.Response) -> dict:
    """What a refused request is told, once its shape is right."""
    assert response.headers["content-type"] == "application/json" and response.status_code >= 400
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def test_the_openai_client_makes_variations(served, running):
    made = client(running).images.create_variation(
        image=served.PICTURE.open("rb"), n=3, size="32x32", response_format="b64_json", user="somebody",
        extra_body={"steps": 4, "guidance": 2.0, "seed": 7, "solver": "ddim"},
    )  # fmt: skip
    images = [pixels(base64.b64decode(each.b64_json)) for each in made.data]
    pipeline = load_pipeline(served.STORED / "bundle", "cpu")
    expected = variations(pipeline, [load_image(served.PICTURE)], 3, Sampling(4, "ddim", 2.0, seed=7))[0]
    assert len(images) == 3 and all((a == b).all() for a, b in zip(images, expected))
    assert (made.size, made.output_format, made.seed) == ("32x32", "png", 7)
    # as OpenAI's own did, addresses by default: here the images themselves
    one = client(running).images.create_variation(image=served.PICTURE.read_bytes())
    head, _, data = one.data[0].url.partition(",")
    assert head == "data:image/png;base64" and len(one.data) == 1
    again = client(running).images.create_variation(
        image=served.PICTURE.read_bytes(), extra_body={"seed": one.seed, "output_format": "webp"}
    )
    assert again.seed == one.seed and again.data[0].url.startswith("data:image/webp;base64,UklGR")
    assert pixels(base64.b64decode(data)).shape == (32, 32, 3)


def test_the_async_client_gets_its_own_images_out_of_shared_batches(served, running):
    async def run() -> list:
        async with openai.AsyncOpenAI(base_url=running.api, api_key="unused", max_retries=0) as asking:
            return await asyncio.gather(
                *(
                    asking.images.create_variation(
                        image=served.PICTURE.read_bytes(), response_format="b64_json", extra_body={"seed": seed % 3}
                    )
                    for seed in range(6)
                )
            )

    made = [response.data[0].b64_json for response in asyncio.run(run())]
    assert made[:3] == made[3:] and len({*made}) == 3


def test_models_health_and_the_page(served, running):
    asking = client(running)
    (model,) = asking.models.list().data
    assert model.id == "bundle" and asking.models.retrieve("bundle") == model and model.owned_by == "semantica"
    with pytest.raises(openai.NotFoundError) as missing:
        asking.models.retrieve("dall-e-2")
    assert missing.value.code == "model_not_found"
    assert served.HTTP.get(f"{running.url}/healthz").json() == {"status": "ok"}
    assert served.HTTP.get(f"{running.url}/readyz").json() == {"status": "ready"}
    page = served.HTTP.get(f"{running.url}/")
    assert page.headers["content-type"].startswith("text/html") and '"name": "bundle"' in page.text
    # nothing from elsewhere
    assert "//" not in page.text.replace("// ", "") and "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


def test_what_is_wrong_with_a_request_is_said_in_openais_shape(served, running):
    asking = client(running)
    for fields, param, code, words in (
        ({"n": 11}, "n", "invalid_value", "less than or equal to 10"),
        ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
        ({"size": "1024x1024"}, "size", "invalid_value", "'32x32' or 'auto'"),
        ({"response_format": "gif"}, "response_format", "invalid_value", "'url' or 'b64_json'"),
        ({"extra_body": {"guidance": "nan"}}, "guidance", "invalid_value", "finite"),
        ({"extra_body": {"steps": -1}}, "steps", "invalid_value", "greater than or equal to 1"),
        ({"extra_body": {"seed": "many"}}, "seed", "invalid_value", "integer"),
        ({"extra_body": {"mask": "x"}}, "mask", "unknown_parameter", "Unknown parameter"),
        ({"image": b"GIF89a" + bytes(50)}, "image", "invalid_image", "cannot be used"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            asking.images.create_variation(**{"image": served.PICTURE.read_bytes(), **fields})
        error = refused.value
        assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="'bundle' is"):
        asking.images.create_variation(image=served.PICTURE.read_bytes(), model="dall-e-2")
    with pytest.raises(openai.NotFoundError, match="POST /v1/images/variations"):
        asking.images.generate(prompt="a dog")
    assert refusal(served.HTTP.get(f"{running.api}/images/variations"))["code"] == "method_not_allowed"


def test_texts_and_pictures_go_where_they_belong(served, holding):
    running, engine = holding(served.BOTH)
    engine.release()
    asking = client(running)
    made = asking.images.generate(prompt="two dogs", n=2, size="8x8", quality="auto", extra_body={"seed": 5})
    assert [pixels(base64.b64decode(each.b64_json))[0, 0, 0] for each in made.data] == [5, 6]
    asking.images.edit(image=served.PICTURE.open("rb"), prompt="a hat", extra_body={"seed": 6})
    asking.images.edit(image=[served.PICTURE.read_bytes()], prompt="a hat", extra_body={"seed": 6})
    asking.images.create_variation(image=served.PICTURE.read_bytes(), extra_body={"seed": 6})
    jobs = [batch[0].job for batch in engine.batches]
    assert [job.prompt for job in jobs] == ["two dogs", "a hat", "a hat", None]
    assert jobs[0].picture is None
    assert all(job.picture.shape == (4, 4, 3) for job in jobs[1:])
    for body, code in (
        ({}, "missing_required_parameter"),
        ({"prompt": ""}, "invalid_value"),
        ({"prompt": "x", "n": "2"}, "invalid_value"),
        ({"prompt": "x", "n": True}, "invalid_value"),
        ({"prompt": "x", "n": 2.0, "guidance": 2}, None),
        ({"prompt": "x", "stream": True}, "unknown_parameter"),
        ({"prompt": "x", "n": None, "user": None}, None),
        ([], "invalid_value"),
    ):
        response = served.HTTP.post(f"{running.api}/images/generations", json=body)
        assert response.status_code == 200 if code is None else refusal(response)["code"] == code
    schema = fields_of("generations", served.BOTH, served.LIMITS).model_json_schema()
    assert schema["required"] == ["prompt"] and schema["additionalProperties"] is False


def test_past_the_queue_requests_are_told_when_to_come_back(served, holding):
    running, engine = holding(queue=2)

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(verify=False, timeout=60) as asking:
            tasks = [asyncio.ensure_future(asking.post(f"{running.api}/images/variations", **upload(served)))]
            await asyncio.to_thread(engine.wait)
            tasks += [
                asyncio.ensure_future(asking.post(f"{running.api}/images/variations", **upload(served, steps=steps)))
                for steps in (5, 6)
            ]
            while running.batcher.queued() < 2:
                await asyncio.sleep(0.002)
            refused = await asking.post(f"{running.api}/images/variations", **upload(served))
            assert await asyncio.to_thread(lambda: running.figures()["semantica_queue_images"]) == 2
            engine.release()
            return [refused, *await asyncio.gather(*tasks)]

    refused, *made = asyncio.run(run())
    assert refused.status_code == 429 and refusal(refused)["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1 and [response.status_code for response in made] == [200] * 3
    with pytest.raises(openai.AuthenticationError):
        keyed, _ = holding(limits=Limits(keys=("a-long-key",)))
        client(keyed).images.create_variation(image=served.PICTURE.read_bytes())
    found = running.figures()
    assert found["semantica_rejected_total reason=rate_limit_exceeded"] == 1 and found["semantica_images_total"] == 3
    assert found["semantica_request_seconds_count endpoint=/v1/images/variations status=429"] == 1
    assert found["semantica_batch_images_sum"] == found["semantica_batch_images_count"] == 3


def test_deadlines_end_requests_and_clients_do_not_ask_again(served, holding):
    running, engine = holding(limits=Limits(deadline=0.3))
    with pytest.raises(openai.InternalServerError) as late:
        client(running, max_retries=2).images.create_variation(image=served.PICTURE.read_bytes())
    assert late.value.status_code == 504 and late.value.code == "deadline_exceeded"
    # nobody waits for the batch, if it came to that: it has ended by itself
    served.until(lambda: len(engine.batches) == engine.abandoned and not running.batcher.queued())
    found = running.figures()
    assert found["semantica_rejected_total reason=deadline_exceeded"] == 1 and len(engine.batches) <= 1


def test_who_leaves_frees_the_engine(served, holding):
    running, engine = holding()

    async def run() -> None:
        async with httpx.AsyncClient(verify=False, timeout=60) as asking:
            task = asyncio.ensure_future(asking.post(f"{running.api}/images/variations", **upload(served)))
            await asyncio.to_thread(engine.wait)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    served.until(lambda: engine.abandoned)
    engine.release()
    assert served.HTTP.post(f"{running.api}/images/variations", **upload(served)).status_code == 200
    assert running.figures()["semantica_rejected_total reason=client_left"] == 1


def test_keys(served, holding):
    keys = ("first-of-the-keys", "second-of-the-keys")
    running, engine = holding(limits=Limits(keys=keys))
    engine.release()
    for key in keys:
        assert client(running, api_key=key).models.list().data
        assert client(running, api_key=key).images.create_variation(image=served.PICTURE.read_bytes()).data
    wrong = ("Bearer", f"Bearer {keys[0]}x", keys[0], f"Basic {keys[0]}", b"Bearer \xff\xfe")
    for headers in ({}, *({"Authorization": value} for value in wrong)):
        for method, path in (("GET", "/models"), ("GET", "/models/held"), ("POST", "/images/variations")):
            response = served.HTTP.request(method, running.api + path, headers=headers)
            assert response.status_code == 401 and refusal(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/metrics"):
        assert served.HTTP.get(running.url + path).status_code == 200


def test_other_sites_are_refused(served, holding):
    running, engine = holding()
    engine.release()
    for site, status in (("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)):
        answer = served.HTTP.post(
            f"{running.api}/images/variations", **upload(served), headers={"Sec-Fetch-Site": site}
        )
        assert answer.status_code == status and (status == 200 or refusal(answer)["code"] == "cross_site")
        assert "access-control-allow-origin" not in answer.headers


def test_it_is_ready_once_it_is_warm(served):
    cold = threading.Event()
    engine = served.Held()
    engine.release()
    with served.live(engine, served.CARD, begin=lambda: cold.wait(served.LONG)) as running:
        ready = served.HTTP.get(f"{running.url}/readyz")
        assert ready.status_code == 503 and "warming up" in refusal(ready)["message"]
        assert served.HTTP.get(f"{running.url}/healthz").status_code == 200
        asking = threading.Thread(
            target=lambda: made.append(served.HTTP.post(f"{running.api}/images/variations", **upload(served)))
        )
        made: list[httpx.Response] = []
        asking.start()
        served.until(lambda: running.batcher.queued() == 1)
        cold.set()
        asking.join()
        assert made[0].status_code == 200 and served.HTTP.get(f"{running.url}/readyz").status_code == 200


def test_an_engine_that_ended_is_not_ready_and_its_server_stops(served):
    class AcceleratorError(RuntimeError):
        pass

    def fails(parts, wanted):
        raise AcceleratorError("CUDA error: the launch timed out: gpu is lost")

    with served.live(fails, served.CARD) as running:
        response = served.HTTP.post(f"{running.api}/images/variations", **upload(served))
        assert response.status_code == 500 and refusal(response)["code"] == "internal_error"
        assert isinstance(running.batcher.error, AcceleratorError)
        with pytest.raises(openai.APIError) as refused:
            for _ in range(1000):
                client(running).images.create_variation(image=served.PICTURE.read_bytes())
        assert getattr(refused.value, "status_code", 503) == 503


def test_shutting_down_finishes_what_was_accepted(served, holding):
    running, engine = holding(replace(served.CARD), grace=60)

    async def run(finish: bool) -> list[httpx.Response]:
        async with httpx.AsyncClient(verify=False, timeout=60) as asking:
            tasks = [
                asyncio.ensure_future(asking.post(f"{running.api}/images/variations", **upload(served, steps=steps)))
                for steps in (4, 5)
            ]
            await asyncio.to_thread(engine.wait)
            while running.batcher.queued() < 1:
                await asyncio.sleep(0.002)
            running.server.should_exit = True
            while not running.batcher.closed:
                await asyncio.sleep(0.002)
            with pytest.raises(httpx.TransportError):
                await asyncio.to_thread(served.HTTP.get, f"{running.url}/readyz")
            if finish:
                engine.release()
            return await asyncio.gather(*tasks)

    assert [response.status_code for response in asyncio.run(run(True))] == [200, 200]
    # and what is not finished in time is told so
    running, engine = holding(grace=0.3)
    made = asyncio.run(run(False))
    assert [response.status_code for response in made] == [503, 503]
    assert {refusal(response)["code"] for response in made} == {"service_unavailable"}
    assert json.loads(made[0].content)["error"]["type"] == "server_error"
