"""Requests joined to batches: who goes with whom and when, what becomes of those that leave or fail, same images."""

import asyncio
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from semantica import UserError
from semantica.export.products import check_sight
from semantica.images import to_planes
from semantica.pipelines.sample import load_pipeline, variations
from semantica.sampling.settings import Sampling
from semantica.serving.batcher import Batcher, Ticket
from semantica.serving.job import Closed, Failed, Full
from semantica.serving.runner import Abandoned, Part, Runner, card_of


@pytest.fixture
def held(served):
    """A batcher over an engine that is held still: `async with` gives both, and ends them."""

    class Both:
        def __init__(self, **options):
            self.engine = served.Held()
            self.batcher = Batcher(self.engine, **{"most": 4, "wait": 0.0, "queue": 100, **options})

        def submit(self, seed: int, n: int = 1, **changes) -> asyncio.Task:
            return asyncio.ensure_future(self.batcher.submit(served.job(seed, n, **changes)))

        async def wait(self) -> None:
            await asyncio.to_thread(self.engine.wait)

        async def queued(self, images: int) -> None:
            """Until so many images wait."""
            while self.batcher.queued() != images:
                await asyncio.sleep(0.001)

        async def __aenter__(self):
            self.batcher.start()
            return self

        async def __aexit__(self, *_):
            self.engine.release()
            self.batcher.close()
            assert await asyncio.to_thread(self.batcher.join, served.LONG)

    return Both


def first_pixels(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_what_waits_goes_together_as_far_as_it_is_alike(held):
    async def run() -> None:
        async with held(most=4) as both:
            tasks = [both.submit(0)]
            await both.wait()
            # another number of steps, guidance, solver: a batch of its own, the oldest of them first
            tasks += [both.submit(1), both.submit(2, steps=5), both.submit(3), both.submit(4, 2), both.submit(5)]
            tasks += [both.submit(6, guidance=2.0), both.submit(7, solver="dpmpp_2m"), both.submit(8, steps=5)]
            await both.queued(9)
            both.engine.release()
            made = await asyncio.gather(*tasks)
            assert both.engine.seeds == [
                [(0, 1)], [(1, 1), (3, 1), (4, 2)], [(2, 1), (8, 1)], [(5, 1)], [(6, 1)], [(7, 1)]
            ]  # fmt: skip
            assert [first_pixels(images) for images in made] == [[0], [1], [2], [3], [4, 5], [5], [6], [7], [8]]

    asyncio.run(run())


def test_none_waits_for_ever_and_large_requests_go_in_parts(held):
    async def run() -> None:
        async with held(most=4) as both:
            tasks = [both.submit(0)]
            await both.wait()
            tasks += [both.submit(1, steps=9), both.submit(10, 9)]
            await both.queued(10)
            both.engine.going.release()
            await both.wait()
            # the odd one has its turn, though others that go together have come since
            tasks += [both.submit(seed) for seed in (21, 22, 23, 24)]
            await both.queued(13)
            both.engine.release()
            made = await asyncio.gather(*tasks)
            assert both.engine.seeds == [
                [(0, 1)], [(1, 1)], [(10, 4)], [(10, 4)], [(10, 1), (21, 1), (22, 1), (23, 1)], [(24, 1)]
            ]  # fmt: skip
            assert first_pixels(made[2]) == [*range(10, 19)] and made[2].shape == (9, 8, 8, 3)

    asyncio.run(run())


def test_a_batch_starts_when_it_is_full_or_has_waited(held):
    async def run() -> None:
        async with held(most=3, wait=1000.0) as both:
            both.engine.release()
            first = [both.submit(seed) for seed in (1, 2)]
            await both.queued(2)
            assert both.engine.batches == []
            await asyncio.gather(*first, both.submit(3))
            assert both.engine.seeds == [[(1, 1), (2, 1), (3, 1)]]
        async with held(most=3, wait=0.02) as both:
            both.engine.release()
            await both.submit(1)
            assert both.engine.seeds == [[(1, 1)]]

    asyncio.run(run())


def test_a_batch_waits_for_who_was_just_answered_and_longer_for_who_is_on_the_way(served):
    async def run() -> None:
        batcher, ticket = Batcher(served.Held(), 4, 0.5, 9), Ticket(served.job())
        batcher.ended = 100.0
        ticket.arrived = batcher.ended - 9
        assert batcher.due(ticket) == batcher.ended + 0.5
        with batcher.expect(), batcher.expect():
            assert batcher.due(ticket) == batcher.ended + 2.0
            # both have submitted
            batcher.here = 2
            assert batcher.due(ticket) == batcher.ended + 0.5
        ticket.arrived = batcher.ended + 9
        assert batcher.due(ticket) == ticket.arrived + 0.5 and batcher.asked == 0

    asyncio.run(run())


def test_more_than_may_wait_is_refused_with_a_time(held):
    async def run() -> None:
        async with held(queue=3) as both:
            first = both.submit(0)
            await both.wait()
            # nothing waits: a request of any size may
            large = both.submit(1, 5)
            await both.queued(5)
            both.batcher.pace = 2.0
            with pytest.raises(Full) as refused:
                await both.submit(2)
            assert pickle.loads(pickle.dumps(refused.value)).seconds == 10
            both.engine.release()
            await asyncio.gather(first, large)
            assert len(await both.submit(3)) == 1

    asyncio.run(run())


def test_who_leaves_is_not_served(held):
    async def run() -> None:
        async with held() as both:
            first, second = both.submit(0), both.submit(1, steps=9)
            await both.wait()
            await both.queued(1)
            second.cancel()
            await both.queued(0)
            # whoever shares a batch with somebody who stays is made with it
            third, fourth = both.submit(2), both.submit(3)
            await both.queued(2)
            # the only one of a running batch: it ends at its next step
            first.cancel()
            await both.wait()
            third.cancel()
            await asyncio.sleep(0.05)
            both.engine.release()
            assert first_pixels(await fourth) == [3]
            assert both.engine.seeds == [[(0, 1)], [(2, 1), (3, 1)]] and both.engine.abandoned == 1

    asyncio.run(run())


def test_a_bad_request_fails_alone(held, caplog):
    async def run() -> None:
        async with held() as both:
            both.engine.bad = 13
            tasks = [both.submit(0)]
            await both.wait()
            tasks += [both.submit(seed) for seed in (12, 13, 14)]
            await both.queued(3)
            both.engine.release()
            made = await asyncio.gather(*tasks, return_exceptions=True)
            assert [first_pixels(made[i]) for i in (0, 1, 3)] == [[0], [12], [14]]
            assert isinstance(made[2], Failed) and "a bad job" in caplog.text
            assert len(await both.submit(15)) == 1 and not both.batcher.error

    asyncio.run(run())


def test_closing_finishes_what_was_taken_and_aborting_does_not(held):
    async def run() -> None:
        async with held() as both:
            tasks = [both.submit(0), both.submit(1, 6, steps=9)]
            await both.wait()
            await both.queued(6)
            both.batcher.close()
            with pytest.raises(Closed, match="shutting down"):
                await both.submit(2)
            both.engine.release()
            assert [len(made) for made in await asyncio.gather(*tasks)] == [1, 6]
            assert await asyncio.to_thread(both.batcher.join, 60)
        async with held() as both:
            tasks = [both.submit(0), both.submit(1, steps=9)]
            await both.wait()
            await both.queued(1)
            both.batcher.abort("out of patience")
            made = await asyncio.gather(*tasks, return_exceptions=True)
            assert [str(error) for error in made] == ["out of patience"] * 2
            assert await asyncio.to_thread(both.batcher.join, 60) and both.engine.abandoned == 1

    asyncio.run(run())


def test_an_engine_that_fails_for_good_says_so(served, caplog):
    class AcceleratorError(RuntimeError):
        pass

    def fails(parts, wanted):
        raise AcceleratorError("CUDA error: unspecified launch failure")

    def cannot_begin() -> None:
        raise UserError("no such size")

    async def run() -> None:
        lost, stillborn = Batcher(fails, 4, 0.0, 9).start(), Batcher(fails, 4, 0.0, 9, begin=cannot_begin).start()
        for batcher, kind in ((lost, Failed), (stillborn, Closed)):
            with pytest.raises(kind):
                await batcher.submit(served.job())
            with pytest.raises(Closed):
                await batcher.submit(served.job())
            assert batcher.join(60) and batcher.ready()
        assert "cannot use it any more" in lost.ready() and isinstance(lost.error, AcceleratorError)
        assert str(stillborn.error) == "no such size"

    asyncio.run(run())


def parts_of(served, seeds: dict[int, int], **changes) -> list[Part]:
    """A part for each seed, with so many images of a picture of its own."""
    made = []
    for seed, count in seeds.items():
        picture = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
        made.append(Part(served.job(seed, count, picture=picture, **changes), range(count)))
    return made


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddim", "ddpm"])
def test_images_do_not_depend_on_the_batch(served, solver):
    """Bit for bit in ONNX Runtime on the CPU, and what `semantica sample` makes of the same picture and seed."""
    pipeline = load_pipeline(served.STORED / "bundle", "cpu")
    runner = Runner(pipeline, 8)
    parts = parts_of(served, {3: 2, 4: 1, 5: 4, 6: 1}, solver=solver)
    together = runner(parts, lambda: True)
    for part, images in zip(parts, together, strict=True):
        (alone,) = runner([part], lambda: True)
        assert images.shape == (len(part.images), 32, 32, 3) and (images == alone).all()
        last = runner([Part(part.job, part.images[-1:])], lambda: True)[0]
        assert (last[0] == images[-1]).all()
        settings = Sampling(4, solver, 1.5, seed=part.job.seed)
        sampled = variations(pipeline, [Image.fromarray(part.job.picture)], part.job.n, settings)[0]
        assert (images == sampled).all()
    # a batch that is filled up to a prepared size
    runner.sizes = [8]
    assert all((a == b).all() for a, b in zip(runner(parts[:2], lambda: True), together))


def test_a_batch_that_nobody_wants_ends_at_its_next_step(served):
    runner = Runner(load_pipeline(served.STORED / "bundle", "cpu"), 2)
    asked = []

    def wanted() -> bool:
        asked.append(None)
        return len(asked) < 3

    with pytest.raises(Abandoned):
        runner(parts_of(served, {1: 1}, steps=50), wanted)
    assert len(asked) == 3


def test_what_compiles_sees_few_sizes(served, monkeypatch):
    pipeline = load_pipeline(served.STORED / "bundle", "cpu")
    assert Runner(pipeline, 6).sizes == [1, 2, 3, 4, 5, 6] and Runner(pipeline, 6).warm == []
    with pytest.raises(UserError, match="--max-batch 65: this engine makes at most 64 images at once"):
        Runner(pipeline, 65)
    monkeypatch.setattr(type(pipeline.denoiser), "max_batch", 9)
    with pytest.raises(UserError, match="--max-batch 5: this engine makes at most 4"):
        Runner(pipeline, 5)
    monkeypatch.setattr(type(pipeline.denoiser), "refuses", {"steps": "no callback"})
    runner = Runner(pipeline)
    assert runner.sizes == runner.warm == [1, 2, 4] and not runner.stepwise
    card = card_of(pipeline, served.STORED / "bundle", "", 4, None, "ddim")
    runner.warm_up(card)
    assert (card.size, card.side, card.endpoints, card.name) == (32, 32, ("variations",), "bundle")


def test_what_an_encoder_cuts_out_is_resized_once(served, monkeypatch):
    pipeline = load_pipeline(served.STORED / "bundle", "cpu")
    side = pipeline.engine.bundle.inputs["image"][-1]
    sight = {"size": side, "resize": side + 4, "interpolation": "bicubic", "nearest": False}
    monkeypatch.setitem(pipeline.engine.manifest, "sight", {"image": sight})
    card = card_of(pipeline, served.STORED / "bundle", "", 4, None, "ddim")
    assert card.side == side + 4
    sent = np.random.default_rng(0).integers(0, 256, (card.side, card.side, 3), np.uint8)
    (seen,) = pipeline.planes("image", [Image.fromarray(sent)])
    assert np.array_equal(seen, to_planes([sent[2:-2, 2:-2]])[0])
    with pytest.raises(UserError, match=f"sees {side} pixels cut out of {side + 4}, which --one-file, --web cannot do"):
        check_sight(pipeline.engine.bundle, ["--one-file", "--web"])


@pytest.mark.slow
def test_models_of_text_in_torch(served, foreign, tmp_path):
    """Prompts of several requests in one batch of a diffusers folder, as the pipeline makes them one by one."""
    pipeline = load_pipeline(foreign.write(tmp_path / "model", "sd"), "cpu")
    card = card_of(pipeline, tmp_path / "model", "", 4, None, "ddim")
    assert (card.inputs, card.endpoints, card.guidance, card.size) == (("text",), ("generations",), 7.5, 64)
    runner = Runner(pipeline, 4)
    prompts = {5: "a lighthouse on a cliff", 6: "two red bicycles"}
    parts = [Part(served.job(seed, 2, picture=None, prompt=text), range(2)) for seed, text in prompts.items()]
    for part, images in zip(parts, runner(parts, lambda: True), strict=True):
        settings = Sampling(4, "ddim", 1.5, seed=part.job.seed)
        expected = variations(pipeline, {"text": [part.job.prompt]}, 2, settings)[0]
        # the batch may round matrix products in another way
        assert images.shape == expected.shape and np.abs(images.astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_a_run_of_pictures_and_texts_serves_each_alone_too(served, tmp_path):
    import torch

    from semantica import Conditioner, SemanticaPipeline, SemanticaScheduler, UViT, ViTEncoder, WordEncoder

    torch.manual_seed(0)
    parts = {"image": ViTEncoder(16, 4, 64, 1, 2), "text": WordEncoder(("a", "red", "ball"), 6, 64)}
    unet, run = UViT(16, 2, (32,), (1,), 64, 2, 2, 32, {"image": 64, "text": 64}), tmp_path / "run"
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    SemanticaPipeline(unet, Conditioner(parts), SemanticaScheduler(16, reference=16)).save_pretrained(run)
    pipeline = load_pipeline(run, "cpu")
    card = card_of(pipeline, run, "named", 4, None, "ddim")
    assert card.endpoints == ("variations", "generations", "edits") and (card.side, card.name) == (16, "named")
    runner, (one, other) = Runner(pipeline, 4), parts_of(served, {1: 1, 2: 1})
    for picture, text in ((True, "a red ball"), (True, None), (False, "a red ball")):
        changes = {"prompt": text} if picture else {"prompt": text, "picture": None}
        asked = [Part(replace(part.job, **changes), part.images) for part in (one, other)]
        pictures = [Image.fromarray(part.job.picture) for part in asked] if picture else None
        inputs = pipeline.named(pictures, [text] * 2 if text else None)
        made = runner(asked, lambda: True)
        for i, (part, images) in enumerate(zip(asked, made)):
            own = {name: values and values[i : i + 1] for name, values in inputs.items()}
            expected = variations(pipeline, own, 1, Sampling(4, "ddim", 1.5, seed=part.job.seed))[0]
            assert np.abs(images.astype(int) - expected).max() <= 1
    assert (made[0] != runner([Part(one.job, one.images)], lambda: True)[0]).any()
