"""Self-guidance: statistics and gradients against plain implementations that store attention maps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from semantica.benchmarks.unets import stored_maps
from semantica.benchmarks.unets.stored_maps import Properties
from semantica.condition import Condition, Stream
from semantica.discrete import DiscreteSchedule
from semantica.fused.accelerate import accelerate
from semantica.fused.denoiser import UNetDenoiser
from semantica.model.layers import CrossAttentionProcessor
from semantica.model.uvit import UViT
from semantica.steering import energies
from semantica.steering.guider import SelfGuidance
from semantica.steering.objects import Objects
from semantica.steering.sources import EVERYTHING, looked_at
from semantica.steering.taps import Reader, Taps, crossings, network
from semantica.steering.terms import PROPERTIES, Change, Fixed, Term, observed

SETS = {"cat": (1, 2), "dog": (4,)}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 24,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": (2, 2),
}  # fmt: skip


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """With weights under which attention differs from place to place, and no branch begins at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
        if any(part in name for part in ("attn2.to_q", "attn2.to_k", "cross.norm_q", "cross.norm_k")):
            parameter.data.mul_(4)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def uvit() -> UViT:
    torch.manual_seed(0)
    streams = {"image": 20, "text": 24}
    return stirred(UViT(16, 2, (32,), (2,), 64, 2, 4, 32, streams))


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return stirred(UNet2DConditionModel(**UNET))


@pytest.fixture(scope="module")
def denoiser(unet) -> UNetDenoiser:
    return UNetDenoiser(unet, DiscreteSchedule.from_scheduler(BETAS, 8), {"text": Stream(torch.zeros(1, 7, 24))})


class StoredMaps:
    """What notebooks do: every cross-attention's map `[B, H, N, M]` kept, each head and token of it."""

    def __init__(self):
        self.maps: list[Tensor] = []

    def keep(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        self.maps.append(weights)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)


class StoringCross(CrossAttentionProcessor):
    def __init__(self, kept: StoredMaps):
        self.kept = kept

    def __call__(self, attn, q, keys, values, sizes, lengths):
        q = F.rms_norm(q, q.shape[-1:], attn.norm_q.weight, 1e-6)
        first = sizes[0]
        own = StoredMaps().keep(q, keys[:, :first], values[:, :first])
        return own + self.kept.keep(q, keys[:, first:], values[:, first:])


# a target for each property that broadcasts to what is observed; none of them is reached
GOALS = {"position": (0.8, 0.3), "size": 0.9}


def wanted(what: str) -> Term:
    return Term(what, 2.0, (), Fixed(GOALS[what]) if what in GOALS else Change("other"))


def targets(what: str, other: Properties) -> list[Tensor]:
    return [torch.tensor(GOALS[what])] * len(other[what]) if what in GOALS else other[what]


def storing(model: UViT, logsnr: Tensor, condition: Condition):
    """`z -> properties` by a copy that stores the maps of its second stream."""
    theirs, kept, psi = copy.deepcopy(model), StoredMaps(), []
    for block in theirs.transformer_blocks:
        block.cross.processor = StoringCross(kept)
    theirs.up_blocks[0][0].register_forward_hook(lambda module, inputs, output: psi.append(output))

    def run(z: Tensor) -> Properties:
        kept.maps.clear()
        psi.clear()
        theirs(z, logsnr, condition)
        return stored_maps.properties([a.float() for a in kept.maps], psi[0].float(), [*SETS.values()])

    return run


class Elsewhere:
    """A source whose statistics are given."""

    objects = None


def compare(denoiser, condition, taps: Taps, run, z: Tensor, logsnr: Tensor) -> None:
    """Ours against `run`, which gives the properties from stored maps, for each property alone."""
    objects = Objects.of(SETS)
    with torch.no_grad():
        other = run(z.flip(-1))
    everything = Reader(denoiser, taps, objects, EVERYTHING)
    _, shown = looked_at(denoiser, everything, z.flip(-1), logsnr, condition)
    for what in PROPERTIES:
        for name, value in zip(everything.crossings, other[what]):
            mine = observed(what, shown, (0, 1))
            torch.testing.assert_close(mine.get(name, mine.get("activations")), value, rtol=1e-4, atol=1e-5)
        term = wanted(what)
        guider = SelfGuidance([term], objects, {"other": Elsewhere()}, taps)
        reader = Reader(denoiser, taps, objects, term.reads)
        gradient, v = guider.gradient(denoiser, reader, z, logsnr, condition, {"other": (shown, objects)})
        expected = stored_maps.gradient(run, z, {what: 2.0}, {what: targets(what, other)})
        assert expected.norm() > 0
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), what
        with torch.no_grad():
            torch.testing.assert_close(v, denoiser(z, logsnr, condition), rtol=1e-4, atol=1e-4)


def test_gradients_on_a_uvit_are_those_through_stored_maps(uvit):
    """Of a stream that is not the first, with blocks computed again for their gradients."""
    streams = {"image": Stream(randn(2, 5, 20, seed=0)), "text": Stream(randn(2, 7, 24, seed=1))}
    condition, logsnr, z = uvit.condition(streams), torch.tensor([0.5, -1.0]), randn(2, 3, 16, 16, seed=2)

    compare(uvit, condition, Taps(stream="text"), storing(uvit, logsnr, condition), z, logsnr)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_lose_no_more_than_stored_maps_do(uvit, dtype, monkeypatch):
    """The loss is scaled up: without that, gradients of a small energy in fp16 would be subnormal, or nothing."""
    streams = {"image": Stream(randn(2, 5, 20, seed=0)), "text": Stream(randn(2, 7, 24, seed=1))}
    narrow, logsnr, z = torch.nn.Module.to(copy.deepcopy(uvit), dtype), torch.zeros(2), randn(2, 3, 16, 16, seed=2)
    wide = uvit.condition(streams)
    condition, taps, objects = wide.map(lambda a: a.to(dtype)), Taps(stream="text"), Objects.of(SETS)

    def ours(model: UViT, condition: Condition, weight: float) -> Tensor:
        guider = SelfGuidance([Term("position", weight, (), Fixed(GOALS["position"]))], objects)
        reader = Reader(model, taps, objects, ["moments"])
        return guider.gradient(model, reader, z, logsnr, condition, {})[0] / weight

    def error(gradient: Tensor) -> float:
        return float((gradient - truth).norm() / truth.norm())

    truth, goal = ours(uvit, wide, 1.0), {"position": [torch.tensor(GOALS["position"])] * 2}
    plain = stored_maps.gradient(storing(narrow, logsnr, condition), z, {"position": 1.0}, goal)
    for weight in (1.0, 1e-4):
        assert error(ours(narrow, condition, weight)) < 2 * error(plain)
    if dtype == torch.float16:
        monkeypatch.setattr("semantica.steering.guider.LOSS_SCALE", 1.0)
        assert error(ours(narrow, condition, 1e-4)) > 5 * error(plain)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_on_a_unet_are_those_through_diffusers_stored_maps(unet, fused):
    schedule = DiscreteSchedule.from_scheduler(BETAS, 8)
    ours = UNetDenoiser(accelerate(copy.deepcopy(unet)) if fused else unet, schedule)
    text, z = randn(2, 7, 24, seed=3), randn(2, 4, 8, 8, seed=4)
    logsnr = torch.tensor(schedule.levels[400], dtype=torch.float32).expand(2)
    names = [name for name in crossings(ours) if not name.startswith("down")]
    theirs = stored_maps.storing(copy.deepcopy(unet), [*SETS.values()], names, "up_blocks.1.resnets.0")

    def run(z: Tensor) -> Properties:
        return theirs(z, torch.tensor(400), text)

    compare(ours, ours.condition({"text": Stream(text)}), Taps(), run, z, logsnr)


def test_a_denoiser_is_as_it_was_after_it_was_read(uvit, denoiser):
    for made, streams, z in (
        (uvit, {"image": Stream(randn(1, 5, 20, seed=0)), "text": Stream(randn(1, 7, 24, seed=1))}, (1, 3, 16, 16)),
        (denoiser, {"text": Stream(randn(1, 7, 24, seed=1))}, (1, 4, 8, 8)),
    ):
        condition, z, level = made.condition(streams), randn(*z, seed=0), torch.zeros(1)
        parts = [vars(part).copy() for attn in crossings(made).values() for part in (attn, attn.processor)]
        with torch.no_grad():
            before = made(z, level, condition)
            reader = Reader(made, Taps(), Objects.of(SETS), EVERYTHING)
            SelfGuidance([wanted("size")], Objects.of(SETS)).gradient(made, reader, z, level, condition, {})
            with pytest.raises(KeyError), reader.watching(z):
                raise KeyError
            assert torch.equal(made(z, level, condition), before)
        assert [vars(part) for attn in crossings(made).values() for part in (attn, attn.processor)] == parts
        assert not network(made).is_gradient_checkpointing


def test_transformed_shapes_are_where_they_are_asked_to_be():
    """A disc off the middle, against discs drawn at the places and sizes that are asked for."""
    side = 64
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")

    def disc(cx: float, cy: float, radius: float) -> Tensor:
        return (((x - cx) / radius) ** 2 + ((y - cy) / (radius / 2)) ** 2 < 1).float()[None, None]

    shape, centre = disc(0.4, 0.5, 0.2), torch.tensor([[[0.4, 0.5]]])

    def changed(shift=(0.0, 0.0), factor=1.0, angle=0.0) -> Tensor:
        given = (torch.tensor([value]) for value in (shift, factor, angle))
        return energies.mask(energies.transformed(shape, centre, *given))

    def overlap(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / (a + b).clamp(max=1).sum())

    assert torch.equal(changed(), shape)
    assert overlap(changed(shift=(0.25, -0.125)), disc(0.65, 0.375, 0.2)) == 1
    assert overlap(changed(factor=0.25), disc(0.4, 0.5, 0.1)) > 0.9
    # a quarter turn makes a flat ellipse an upright one; a small one anticlockwise lifts its right end
    assert overlap(changed(angle=90.0), (((x - 0.4) / 0.1) ** 2 + ((y - 0.5) / 0.2) ** 2 < 1).float()[None, None]) > 0.9
    right = changed(angle=30.0)[0, 0] * (x > 0.5)
    assert float((right * y).sum() / right.sum()) < 0.45


def test_moments_and_maps_agree(uvit):
    """The position from moments is that of the maps; on a grid that is not square, x runs along the longer side."""
    maps = randn(2, 3, 6, 9, seed=0).abs()
    moments = maps.flatten(2) @ energies.grid_features(6, 9)
    x, y = (torch.arange(9) + 0.5) / 9, (torch.arange(6) + 0.5) / 6
    mass = maps.sum((2, 3)) + 1e-4
    expected = torch.stack(((maps.sum(2) * x).sum(2) / mass, (maps.sum(3) * y).sum(2) / mass), -1)
    torch.testing.assert_close(energies.centroid(moments), expected)
