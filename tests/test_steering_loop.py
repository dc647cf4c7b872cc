"""Self-guidance in the sampling loop: its formula, beside other guidance, its steps and sources, what it refuses."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from torch import Tensor

from semantica import Sampling, SemanticaPipeline, UserError
from semantica.condition import Condition, Stream
from semantica.kernels import attention_columns
from semantica.model.uvit import UViT
from semantica.sampling.guidance import TimeStepGuidance
from semantica.sampling.guiders import IndependentCondition, TimeStep, WeakModel
from semantica.sampling.loop import sample
from semantica.solvers import Schedule, alpha_sigma, eps_from_v, guide
from semantica.steering.guider import ALL_STEPS, FACTORS, Pattern, SelfGuidance
from semantica.steering.objects import Objects
from semantica.steering.recipes import compose, copy_appearance, copy_layout, move, resize
from semantica.steering.sources import Picture, Recording, looked_at
from semantica.steering.taps import MAPS, MOMENTS, Reader, Taps
from semantica.steering.terms import Change, Fixed, Term, energy, fixed, observed
from semantica.weak import Weak

OBJECTS = Objects.of({"cat": (1, 2), "dog": (4,)})
GOAL = Term("position", 1.0, ("cat",), Fixed((0.9, 0.2)))
SCHEDULE, STEPS = Schedule(16, logsnr_min=-8.0), Sampling(4, "ddim", 3.0)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> UViT:
    torch.manual_seed(0)
    made = UViT(16, 2, (32,), (1,), 64, 2, 4, 32, {"text": 24})
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.normal_(std=0.1)
        if "cross.norm" in name:
            parameter.data.mul_(4)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def condition(model) -> Condition:
    return model.condition({"text": Stream(randn(2, 7, 24, seed=0))})


Z = randn(2, 3, 16, 16, seed=1)


@torch.no_grad()
def run(model, condition, guidance=None, settings=STEPS, z=Z) -> Tensor:
    return sample(model, z, condition, None, SCHEDULE, settings, guidance=guidance)


@pytest.mark.parametrize("factor", FACTORS)
def test_the_change_of_v_is_the_papers_change_of_eps(model, condition, factor):
    """eps += weight * factor * dE/dz beside classifier-free guidance, the gradient by finite differences."""
    guider = SelfGuidance([GOAL], OBJECTS, weight=7.0, factor=factor, pattern=ALL_STEPS)
    double = model.double()
    wide, z = condition.map(Tensor.double), Z.double()
    levels = torch.tensor([[-2.0, -2.0], [1.0, 1.0]], dtype=torch.float64)
    null = double.null(2)
    reader = Reader(double, Taps(), OBJECTS, [MOMENTS])

    def energies(z: Tensor) -> Tensor:
        return energy([GOAL], looked_at(double, reader, z, levels[1], wide)[1], OBJECTS, {})

    v = guider.predictor(double, levels, wide, Weak(null), Sampling(2, "ddim", 3.0))(1, z)
    alpha, sigma = alpha_sigma(levels[1][:, None, None, None])
    guided = guide(double(z, levels[1], wide), double(z, levels[1], null), 3.0)
    change = eps_from_v(z, v, alpha, sigma) - eps_from_v(z, guided, alpha, sigma)
    direction = randn(*z.shape, seed=3).double()
    slope = (energies(z + 1e-5 * direction) - energies(z - 1e-5 * direction)) / 2e-5
    scale = {"sigma": sigma, "variance": sigma**2, "one": sigma / sigma, "velocity": alpha * sigma}[factor]
    torch.testing.assert_close((change * direction).sum((1, 2, 3)), 7 * scale.flatten() * slope, rtol=1e-4, atol=1e-9)
    model.float()


def test_guided_steps_are_those_of_the_pattern(model, condition):
    expected = [i for i in range(64) if i < 12 or (i < 62 and i % 2 == 0)]
    assert [i for i, guided in enumerate(Pattern().steps(64)) if guided] == expected
    assert ALL_STEPS.steps(3) == [True] * 3 and Pattern(numbers=(2,)).steps(3) == [False, False, True]
    for pattern, message in ((Pattern(numbers=(3,)), "has step 3"), (Pattern(0, tail=1.0), "guides none")):
        with pytest.raises(UserError, match=message):
            pattern.steps(3)
    seen = []

    class Counting(SelfGuidance):
        def gradient(self, *given):
            seen.append(given[-1])
            return super().gradient(*given)

    run(model, condition, Counting([GOAL], OBJECTS, pattern=Pattern(numbers=(0, 3))))
    assert seen == [0, 3]


def test_with_no_weight_it_is_the_guidance_that_it_is_beside(model, condition):
    """Classifier-free guidance and its interval, or a guider of diffusers."""
    for settings in (STEPS, Sampling(4, "dpmpp_2m", 2.0, interval=(0.25, 0.75)), Sampling(4, "ddim", 1.0)):
        off = SelfGuidance([GOAL], OBJECTS, weight=0.0, pattern=ALL_STEPS)
        torch.testing.assert_close(run(model, condition, off, settings), run(model, condition, None, settings))
    guider = ClassifierFreeGuidance(guidance_scale=3.0, use_original_formulation=False)
    inside = SelfGuidance([GOAL], OBJECTS, weight=20.0, pattern=ALL_STEPS, guidance=guider)
    beside = SelfGuidance([GOAL], OBJECTS, weight=20.0, pattern=ALL_STEPS)
    assert inside.needs == beside.needs == ("gradients",)
    made = run(model, condition, beside)
    assert (made - run(model, condition)).abs().max() > 1e-2
    torch.testing.assert_close(run(model, condition, inside), made, rtol=1e-4, atol=1e-4)


def test_it_goes_beside_every_guider_of_a_pipeline(small_run):
    """Without weight it is their run; with one it is another, and a recording of that guider's run fits it."""
    pipe = SemanticaPipeline.from_pretrained(small_run)
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = dict(num_inference_steps=3, guidance_scale=3.0, seed=0, solver="ddim", output_type="np")
    bad = SemanticaPipeline.from_pretrained(small_run)
    for parameter in bad.unet.parameters():
        parameter.data.mul_(0.9)
    # this package's, with what is weak as a value, and one that diffusers may have too
    for guider in (None, IndependentCondition(), TimeStep(), WeakModel(bad), TimeStepGuidance(2.0)):
        plain = pipe(pictures, guider=guider, **options).images
        record = Recording(OBJECTS, guidance=guider)
        terms, sources = [GOAL, Term("size", 1.0, (), Change(factor=2.0))], {"original": record}
        assert np.abs(pipe(pictures, guider=record, **options).images - plain).max() < 1e-4
        made = [
            pipe(
                pictures, guider=SelfGuidance(terms, OBJECTS, sources, None, weight, guidance=guider), **options
            ).images
            for weight in (0.0, 50.0)
        ]
        assert np.abs(made[0] - plain).max() < 1e-4 < 1e-2 < np.abs(made[1] - plain).max()


def test_every_place_of_a_mask_counts_on_a_coarser_grid():
    """Lines that bilinear sampling would not, or would only, meet."""
    mask = torch.zeros(1, 1, 256, 256)
    for first in (15, 16):
        mask[:, :, first::32] = mask[:, :, :, first::32] = 1.0
    found = {"layer": torch.rand(1, 1, 8, 8)}
    thin, full = (fixed(Term("shape", target=Fixed(m)), found)["layer"] for m in (mask, 1 - mask))
    assert not thin.any() and full.all()


def test_a_step_against_the_gradient_lowers_every_energy(model, condition):
    level, z = torch.full((2,), 0.5), Z
    reader = Reader(model, Taps(), OBJECTS, (MOMENTS, MAPS, "appearance"))
    other = looked_at(model, reader, Z.flip(-1), level, condition)[1]
    terms = {
        "move": move(("cat",), shift=(0.3, 0.0), others=("dog",)),
        "resize": resize(("cat",), 2.0, others=("dog",)),
        "layout": copy_layout(),
        "appearance": copy_appearance(objects=("dog",)),
        "compose": compose({"cat": "original"}, {"dog": "original"}),
    }
    for name, each in terms.items():
        guider = SelfGuidance(each, OBJECTS, {"original": Recording(OBJECTS)})
        targets = {"original": (other, OBJECTS)}
        gradient, _ = guider.gradient(model, reader, z, level, condition, targets)
        step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        before, after = (
            energy(each, looked_at(model, reader, here, level, condition)[1], OBJECTS, targets)
            for here in (z, z - step)
        )
        assert (after < before).all(), name


def test_tokens_of_all_samples_reach_the_operator_without_a_copy(model, condition, monkeypatch):
    """A plan that had to copy them would be made anew in every call."""
    seen = []

    def columns(q, k, lse, tokens, lengths):
        seen.append(tokens.is_contiguous())
        return attention_columns(q, k, lse, tokens, lengths)

    monkeypatch.setattr("semantica.steering.taps.attention_columns", columns)
    reader, level = Reader(model, Taps(), OBJECTS, (MAPS,)), torch.zeros(2)
    with torch.no_grad(), reader.watching(Z) as statistics:
        model(Z, level, condition)
        both = statistics()
    assert seen and all(seen)
    reader = Reader(model, Taps(), Objects.stack([OBJECTS, OBJECTS]), (MAPS,))
    with torch.no_grad(), reader.watching(Z) as statistics:
        model(Z, level, condition)
        assert all(torch.equal(a, both.maps[name]) for name, a in statistics().maps.items())


def test_a_sample_is_steered_as_if_it_were_alone(model, condition):
    """Its tokens and its target are its own."""
    places = torch.tensor([[[0.9, 0.2]], [[0.1, 0.5]]])
    sets = [{"cat": (1, 2)}, {"cat": (5,)}]
    both = Objects.stack([Objects.of(each) for each in sets])
    assert torch.equal(both.member[:, :, 0], torch.tensor([[0.5, 0.5], [1.0, 0.0]]))

    def gradient(target, objects: Objects, rows: slice) -> Tensor:
        guider = SelfGuidance([Term("position", 1.0, (), Fixed(target))], objects)
        reader = Reader(model, Taps(), objects, [MOMENTS])
        level, own = torch.zeros(2)[rows], condition.map(lambda a: a[rows])
        return guider.gradient(model, reader, Z[rows], level, own, {})[0]

    together = gradient(places, both, slice(0, 2))
    for i, each in enumerate(sets):
        alone = gradient(places[i], Objects.of(each), slice(i, i + 1))[0]
        assert (together[i] - alone).norm() < 1e-4 * alone.norm()
    twice = both.repeat(2)
    assert twice.index[:, 0].tolist() == [1, 1, 5, 5] and OBJECTS.repeat(2) is OBJECTS


def test_tokens_that_a_sample_does_not_have_have_no_attention(model):
    """Streams of different lengths: moments and maps are those of a sample's own tokens."""
    tokens = randn(2, 7, 24, seed=0)
    level, objects = torch.zeros(2), Objects.of({"cat": (1, 2), "late": (6,)})
    lengths = torch.tensor([7, 4])
    masked = model.condition({"text": Stream(tokens, lengths=lengths)})
    seen = looked_at(model, Reader(model, Taps(), objects, (MOMENTS, MAPS)), Z, level, masked)[1]
    short = model.condition({"text": Stream(tokens[1:, :4])})
    alone = looked_at(model, Reader(model, Taps(), Objects.of({"cat": (1, 2)}), (MOMENTS, MAPS)), Z[1:], level[1:],
                      short)[1]  # fmt: skip
    for name in seen.maps:
        assert not seen.maps[name][1, 1].any() and not seen.moments[name][1, 1].any()
        torch.testing.assert_close(seen.maps[name][1:, :1], alone.maps[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.moments[name][1:, :1], alone.moments[name], rtol=1e-4, atol=1e-6)


def test_a_recorded_run_is_the_run_and_its_targets_are_of_the_same_step(model, condition):
    record = Recording(OBJECTS)
    torch.testing.assert_close(run(model, condition, record), run(model, condition))
    (kept,) = record.runs
    assert sorted(kept) == [0, 1, 2, 3] and all(a.dtype == torch.float32 for a in kept[0].maps.values())
    # the run that was recorded is where its own targets are: L1 distances of sizes are 0, and so is their gradient
    still = SelfGuidance([Term("size", 1e3), Term("position", 1e3)], OBJECTS, {"original": record}, pattern=ALL_STEPS)
    torch.testing.assert_close(run(model, condition, still), run(model, condition), rtol=1e-3, atol=1e-3)
    # a second run reads it again
    run(model, condition, still)
    five = Sampling(5, "ddim", 3.0)
    with pytest.raises(UserError, match="step 4 was not recorded: record a run of 5 steps"):
        run(model, condition, still, five)
    three = condition.map(lambda a: torch.cat((a, a[:1])))
    with pytest.raises(UserError, match="a batch of 3 is steered by a recording of 2"):
        run(model, three, still, z=randn(3, 3, 16, 16, seed=0))
    less = Recording(OBJECTS, wanted=(MOMENTS,))
    run(model, condition, less)
    with pytest.raises(UserError, match="maps were not recorded"):
        run(model, condition, SelfGuidance([Term("size")], OBJECTS, {"original": less}))
    with pytest.raises(UserError, match="this recording is empty"):
        run(model, condition, SelfGuidance([Term("size")], OBJECTS, {"original": Recording(OBJECTS)}))


def test_a_real_picture_is_seen_at_the_level_of_each_step(model, condition):
    """Without inversion: the forward process applied to it, with noise that depends on seed and step."""
    one = condition.map(lambda a: a[:1])
    x, levels = randn(1, 3, 16, 16, seed=5).clamp(-1, 1), torch.tensor([[-3.0] * 2, [20.0] * 2])
    show = Picture(x, one, seed=3).shows(model, Taps(), OBJECTS, (MOMENTS,), levels, [True] * 2)
    reader = Reader(model, Taps(), OBJECTS, (MOMENTS,))
    clean = looked_at(model, reader, x, levels[1, :1], one)[1]
    found, again = (observed("position", show(1), (0, 1)) for _ in range(2))
    for name, value in observed("position", clean, (0, 1)).items():
        assert torch.equal(found[name], again[name])
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3)
    assert any(
        (a - b).abs().max() > 1e-3 for a, b in zip(observed("position", show(0), (0, 1)).values(), found.values())
    )
    guider = SelfGuidance(copy_layout("photo"), OBJECTS, {"photo": Picture(x, one)}, weight=30.0)
    assert (run(model, condition, guider) - run(model, condition)).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"pictures \(1, 3, 8, 8\) to steer 2 samples"):
        run(model, condition, SelfGuidance(copy_layout("p"), OBJECTS, {"p": Picture(x[..., :8, :8], one)}))
    with pytest.raises(UserError, match="1 pictures beside a condition of 2"):
        Picture(x, condition)


def test_what_cannot_be_steered_is_one_line(model, condition):
    class Engine:
        array, device, max_batch, joins = "torch", torch.device("cpu"), None, True
        refuses = {"gradients": "engine 'onnxruntime' gives no gradients", "module": "no guider"}

    guider = SelfGuidance([GOAL], OBJECTS)
    with pytest.raises(UserError, match="engine 'onnxruntime' gives no gradients"):
        run(Engine(), condition, guider)
    with pytest.raises(UserError, match="function cannot be steered"):
        sample(lambda z, logsnr, c: z, Z, condition, condition, SCHEDULE, STEPS, guidance=guider)
    nothing = UViT(16, 2, (32,), (1,), 64, 1, 4, 32, {"text": 24}, "global")
    with pytest.raises(UserError, match="no cross-attention to tokens"):
        run(nothing, condition, guider)
    with pytest.raises(UserError, match="energy is not finite at step 0"):
        run(model, condition, SelfGuidance([Term("size", float("nan"), (), Fixed(0.5))], OBJECTS))
    with pytest.raises(UserError, match="an object has token 9: the stream has tokens 0 to 6"):
        run(model, condition, SelfGuidance([GOAL], Objects.of({"cat": (9,)})))
    for make, message in (
        (lambda: SelfGuidance([], OBJECTS), "no energy to follow"),
        (lambda: SelfGuidance([Term("size")], OBJECTS), "has no target: its source 'original' is not there"),
        (lambda: SelfGuidance([Term("size", 1, ("bird",), Fixed(1))], OBJECTS), "no object is called 'bird'"),
        (lambda: SelfGuidance([GOAL], OBJECTS, factor="tau"), "factor 'tau': expected one of"),
        (lambda: Term("size", target=None), "the energy 'size' has no target"),
        (lambda: Term("place"), "no energy is called 'place'"),
        (lambda: Term("appearance", target=Fixed(1)), "name a source"),
        (lambda: Term("size", target=Change(), distance="l3"), "distance 'l3'"),
        (lambda: Objects.of({"cat": ()}), "object 'cat' has no tokens"),
        (lambda: move(("cat",)), "either a shift"),
        (lambda: Pattern(dense=2.0), "shares of the run"),
    ):
        with pytest.raises(UserError, match=message):
            make()


MEMORY = """
import sys, torch
from semantica.condition import Stream
from semantica.memory import peak_resident
from semantica.model.uvit import UViT
from semantica.steering.guider import SelfGuidance
from semantica.steering.objects import Objects
from semantica.steering.taps import Reader, Taps
from semantica.steering.terms import Fixed, Term
torch.set_num_threads(1)
way, grid, tokens, depth = sys.argv[1], 24, 2048, 6
model = UViT(2 * 2 * grid, 2, (16,), (1,), 64, depth, 4, 32, {"text": 16}).eval().requires_grad_(False)
z, level = torch.randn(1, 3, 4 * grid, 4 * grid), torch.zeros(1)
condition = model.condition({"text": Stream(torch.randn(1, tokens, 16))})
objects, goal = Objects.of({"a": (3, 4)}), Term("size", 1.0, (), Fixed(0.9))

class Stored:
    def __init__(self, kept):
        self.kept = kept
    def __call__(self, attn, q, keys, values, sizes, lengths):
        q = torch.nn.functional.rms_norm(q, q.shape[-1:], attn.norm_q.weight, 1e-6)
        p = (q.transpose(1, 2) @ keys.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).softmax(-1)
        self.kept.append(p)
        return (p @ values.transpose(1, 2)).transpose(1, 2)

def step(model, condition, z):
    if way == "ours":
        reader = Reader(model, Taps(), objects, goal.reads)
        SelfGuidance([goal], objects).gradient(model, reader, z, level, condition, {})
    else:
        kept, leaf = [], z.clone().requires_grad_()
        for block in model.transformer_blocks:
            block.cross.processor = Stored(kept)
        model(leaf, level, condition)
        torch.autograd.grad(sum(p[..., [3, 4]].mean((1, 3)).std() for p in kept), leaf)

step(model, model.condition({"text": Stream(torch.randn(1, 8, 16))}), z)
before = peak_resident()
step(model, condition, z)
print(peak_resident() - before, depth * 4 * grid**2 * tokens * 4)
"""


@pytest.mark.slow
def test_memory_of_a_guided_step_does_not_grow_with_the_maps():
    """576 places and 2048 tokens in 6 layers: 113 MB of maps, which autograd keeps more than once."""
    grown = {}
    for way in ("ours", "maps"):
        done = subprocess.run([sys.executable, "-P", "-c", MEMORY, way], capture_output=True, text=True, check=True)
        grown[way], of_maps = map(int, done.stdout.split())
    assert grown["maps"] > of_maps and grown["ours"] < of_maps / 3, grown
