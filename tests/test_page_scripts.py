"""The page's scripts under Node: noise, schedules, solvers, resampling and the whole loop give Python's numbers."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import PIL
import pytest
import safetensors.numpy
from PIL import Image

from semantica import solvers
from semantica.condition import Condition
from semantica.discrete import DiscreteSchedule, schedule_of
from semantica.export.web import PAGE
from semantica.images import fit, to_planes, to_uint8
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling

MODULES = ("noise", "pixels", "resample", "sampler", "schedules", "solvers")


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A function that gives the value of a JavaScript function body; what it is called with are names there."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed")
    folder = tmp_path_factory.mktemp("scripts")
    shutil.copytree(PAGE / "js", folder / "js")
    # as the page's script element says it
    (folder / "package.json").write_text('{"type": "module"}')
    imports = "".join(f"import * as {name} from './js/{name}.js';\n" for name in MODULES)
    imports += "import { readSafetensors } from './js/engine.js';\n"

    def node(body: str, **values):
        script = folder / "script.js"
        names = ", ".join(values)
        script.write_text(
            f"{imports}import {{ readFileSync }} from 'node:fs';\n"
            f"const {{ {names} }} = JSON.parse(readFileSync(0));\n"
            f"const made = await (async () => {{ {body} }})();\n"
            "const plain = (_, value) => typeof value === 'bigint' ? `${value}`\n"
            "  : ArrayBuffer.isView(value) ? [...value] : value === Infinity ? 'Infinity' : value;\n"
            "console.log(JSON.stringify(made, plain));\n"
        )
        done = subprocess.run([program, script], input=json.dumps(values), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return node


def test_noise_is_that_of_a_seed_in_python(node):
    seeds = [(0, []), (3, [0, 1]), (2**32 - 1, [0, 0]), (2**32 + 5, [2, 1, 7]), (2**53 - 1, [5])]
    draws = [(seed, index, 12_000) for seed, index in seeds]
    made = node("return draws.map(([seed, index, count]) => noise.noise(seed, index, count))", draws=draws)
    tails = 0
    for (seed, index, count), numbers in zip(draws, made, strict=True):
        ours, theirs = np.array(numbers, np.float32), solvers.noise(seed, (count,), *index)
        tail = np.abs(theirs) > 3.65415
        assert np.array_equal(ours[~tail], theirs[~tail])
        # a float32 logarithm of the C library, which not every system rounds alike
        assert np.abs(ours.view(np.int32) - theirs.view(np.int32))[tail].max(initial=0) <= 1
        tails += tail.sum()
    assert tails > 5
    keys = node("return draws.map(([seed, index]) => noise.keyOf(seed, index))", draws=draws)
    for (seed, index, _), key in zip(draws, keys, strict=True):
        expected = np.random.SeedSequence(seed, spawn_key=index).generate_state(2, np.uint64)
        assert list(map(int, key)) == expected.tolist()


COSINES = [{"image_size": 32}, {"image_size": 256, "reference": 16, "logsnr_min": -10.0, "logsnr_max": 12.5}]
DISCRETE = [
    DiscreteSchedule(8).config,
    DiscreteSchedule(8, betas="scaled_linear", beta_start=0.00085, beta_end=0.012, offset=1, clean=False).config,
    DiscreteSchedule(8, "v_prediction", zero_snr=True, spacing="trailing", count=400).config,
    DiscreteSchedule(8, spacing="linspace", clean=False).config,
]


def test_every_coefficient_of_a_run(node):
    counts = (1, 2, 3, 20, 50)
    asked = [(config, solver, n) for config in COSINES + DISCRETE for solver in solvers.SOLVERS for n in counts]
    body = "return asked.map(([config, solver, n]) => solvers.plan(solver, schedules.levels(config, solver, n)))"
    fields = {"logsnr": "logsnr", "alpha": "alpha", "sigma": "sigma", "z_scale": "z", "x_scale": "x",
              "x_previous_scale": "previous", "noise_scale": "noise"}  # fmt: skip
    for (config, solver, n), made in zip(asked, node(body, asked=asked), strict=True):
        plan = solvers.make_plan(solver, schedule_of({**config, "solver": solver}).grid(n)[1])
        for ours, theirs in fields.items():
            np.testing.assert_allclose([step[theirs] for step in made], getattr(plan, ours), rtol=1e-9, atol=1e-12)


def test_a_run_of_too_many_or_no_steps_is_refused(node):
    body = """return [[cosine, 0], [cosine, 1.5], [discrete, 500]].map(([config, steps]) => {
        try { return schedules.levels(config, "ddim", steps) } catch (error) { return error.message } })"""
    assert node(body, cosine=COSINES[0], discrete=DISCRETE[0]) == [
        "0 steps: give a whole number, 1 or more",
        "1.5 steps: give a whole number, 1 or more",
        "500 steps of 1000 timesteps: give 1 to 499",
    ]


@pytest.mark.parametrize("kind", solvers.THRESHOLDS)
def test_thresholds(node, kind):
    x = np.random.default_rng(0).normal(0, 1.2, (3, 70)).astype(np.float32)
    x[0] *= 0.1
    config = {"thresholding": kind, "clip_range": 1.25, "dynamic_thresholding_ratio": 0.97}
    made = node("return solvers.threshold(new Float32Array(x), 70, config)", x=x.ravel().tolist(), config=config)
    assert np.array_equal(np.array(made, np.float32).reshape(x.shape), solvers.threshold(x, kind, 1.25, 0.97))


# width, height, side: as it is, larger, smaller, and so much smaller that whole blocks are averaged before
SIDES = [(16, 16, 16), (12, 9, 16), (53, 37, 16), (37, 53, 16), (130, 97, 16), (200, 201, 21), (2, 2, 8)]
# tall ones, which Pillow resizes in another order since this version
TALL = [(64, 301, 16), (64, 112, 16), (64, 113, 16), (40, 65, 64), (40, 64, 64), (30, 500, 9)]
TALL_SINCE = 13


def test_pictures_are_resized_as_pillow_does(node):
    rng = np.random.default_rng(0)
    all_sides = SIDES + (TALL if int(PIL.__version__.split(".")[0]) >= TALL_SINCE else [])
    pictures = [rng.integers(0, 256, (height, width, 3), np.uint8) for width, height, _ in all_sides]
    given = [(picture.ravel().tolist(), *sides) for picture, sides in zip(pictures, all_sides, strict=True)]
    body = "return given.map(([bytes, ...sides]) => resample.fit(Uint8Array.from(bytes), ...sides))"
    for picture, (*_, size), made in zip(pictures, all_sides, node(body, given=given), strict=True):
        assert np.array_equal(np.array(made, np.uint8).reshape(size, size, 3), fit(Image.fromarray(picture), size))


def test_pixels_to_numbers_and_back(node):
    bytes_ = np.arange(3 * 16 * 16).astype(np.uint8).reshape(1, 16, 16, 3)
    # halves between two levels, and what is out of range
    images = (np.arange(-20, 568) * 0.5 / 127.5 - 1).astype(np.float32).reshape(1, 3, 14, 14)
    planes, rgba = node(
        "return [pixels.toPlanes(bytes), pixels.toRgba(Float32Array.from(images))]",
        bytes=bytes_.ravel().tolist(), images=images.ravel().tolist(),
    )  # fmt: skip
    assert np.array_equal(np.array(planes, np.float32), to_planes(bytes_).ravel())
    made = np.array(rgba, np.uint8).reshape(1, 14, 14, 4)
    assert np.array_equal(made[..., :3], to_uint8(images)) and (made[..., 3] == 255).all()


# where a condition stays while it is read: what is let go is counted
BIND = """
let held = 0;
const bind = (tensors) => Object.fromEntries(Object.entries(tensors).map(([name, one]) => {
  held += 1;
  return [name, { ...one, dispose: () => { held -= 1 } }];
}));
"""
# a denoiser of exact float32 arithmetic: it depends on z, the noise level, the last token of each stream and emb
ENGINE = """
const sum = ({ data, dims }, b) => {
  const [, heads, tokens, width] = dims;
  const row = (token) => data[b * heads * tokens * width + token * width];
  return Math.fround(row(tokens - 1) + row(0));
};
const engine = {
  facts, empty: Object.fromEntries(Object.entries(empty).map(([name, { data, dims }]) =>
    [name, { data: new Uint8Array(Float32Array.from(data).buffer), dims }])),
  bind,
  async run(graph, feeds) {
    if (graph === "condition") {
      return Object.fromEntries(Object.entries(own).map(([name, { data, dims }]) =>
        [name, { type: "float32", data: Float32Array.from(data), dims }]));
    }
    const { z, logsnr, emb } = feeds;
    const size = z.data.length / z.dims[0];
    const v = z.data.map((value, i) => {
      const b = Math.floor(i / size);
      const level = Math.fround(logsnr.data[b] * 0.0625);
      const shift = Math.fround(sum(feeds["k.0"], b) + emb.data[b * emb.dims[1]]);
      return Math.fround(Math.fround(value * 0.5) + Math.fround(shift + level));
    });
    return { v: { data: v, dims: z.dims } };
  },
};
const images = [];
const steps = [];
for await (const step of sampler.sample(engine, new Uint8Array(12), settings)) {
  steps.push([step.done, step.total, step.first]);
  if (step.finished) images.push(...step.images);
}
for await (const step of sampler.sample(engine, new Uint8Array(12), settings)) if (step.done === 2) break;
return { images, steps, held };
"""


@pytest.mark.parametrize(
    ("solver", "guidance", "kind"), [("dpmpp_2m", 3.0, "clip"), ("ddim", 1.0, "none"), ("ddpm", 2.5, "dynamic")]
)
def test_the_loop_gives_the_bits_of_pythons(node, solver, guidance, kind):
    rng = np.random.default_rng(0)
    sizes, steps, count, batch, shape = (3, 2), 5, 5, 2, (3, 4, 4)

    def tensors(tokens: int) -> dict[str, np.ndarray]:
        shapes = {"k.0": (1, 2, tokens, 4), "v.0": (1, 2, tokens, 4), "emb": (1, 6)}
        return {name: rng.normal(0, 0.3, size).astype(np.float32) for name, size in shapes.items()}

    def condition(named: dict[str, np.ndarray], sizes: tuple[int, ...]) -> Condition:
        keys, values = ((named[name].swapaxes(1, 2),) for name in ("k.0", "v.0"))
        return Condition(keys, values, named["emb"], None, sizes)

    def denoiser(z, logsnr, condition):
        key = condition.keys[0][:, :, 0, 0]
        shift = (key[:, -1] + key[:, 0]) + condition.emb[:, 0]
        level = logsnr * np.float32(0.0625)
        return z * np.float32(0.5) + (shift + level)[:, None, None, None]

    own, empty = tensors(sum(sizes)), tensors(len(sizes))
    config = {"image_size": 4, "reference": 16, "thresholding": kind}
    settings = Sampling.of(config, steps=steps, solver=solver, guidance=guidance)
    z = np.stack([solvers.noise(11, shape, 0, j) for j in range(count)])
    expected = sample(
        denoiser, z, condition(own, sizes).repeat(count), condition(empty, (1, 1)).fill(sizes).repeat(count),
        schedule_of(config), settings,
        lambda i: np.stack([solvers.noise(11, shape, 0, j, i + 1) for j in range(count)]),
    )  # fmt: skip

    def plain(named):
        return {name: {"data": array.ravel().tolist(), "dims": array.shape} for name, array in named.items()}

    facts = dict(image=2, sample=shape, size=4, streams=sizes, schedule=config, batch=batch, graphs={})
    wanted = dict(count=count, steps=steps, guidance=guidance, seed=11, solver=solver)
    made = node(BIND + ENGINE, facts=facts, empty=plain(empty), own=plain(own), settings=wanted)
    # of a run that was left in its midst too
    assert made["held"] == 0
    assert made["steps"] == [[i + 1, 15, batch * (i // steps)] for i in range(15)]
    assert np.array_equal(np.array(made["images"], np.float32).reshape(expected.shape), expected)


# what a half-precision model of latents is asked, and what is made of its answers
ASKED = """
const asked = { denoise: [], decode: [] };
const words = (array) => ({ type: "float16", data: Uint16Array.from(array.data), dims: array.dims });
const engine = {
  facts,
  empty: readSafetensors(Uint8Array.from(file).buffer),
  bind,
  async run(graph, feeds) {
    if (graph === "condition") return Object.fromEntries(Object.entries(own).map(([name, a]) => [name, words(a)]));
    asked[graph].push(feeds);
    if (graph === "decode") return { images: { data: new Float32Array(12).fill(feeds.latents.data[0]) } };
    return { v: { data: new Float32Array(feeds.z.data.length), dims: feeds.z.dims } };
  },
};
const said = [];
for await (const step of sampler.sample(engine, new Uint8Array(12), settings)) said.push(step);
return { asked, said };
"""


def test_latents_and_half_precision(node):
    rng = np.random.default_rng(0)
    own = {"k.0": rng.normal(size=(1, 2, 3, 4)), "v.0": rng.normal(size=(1, 2, 3, 4)), "emb": rng.normal(size=(1, 6))}
    # one token for each of two streams, which have two and one
    empty = {"k.0": rng.normal(size=(1, 2, 2, 4)), "v.0": rng.normal(size=(1, 2, 2, 4)), "emb": rng.normal(size=(1, 6))}
    own, empty = ({name: array.astype(np.float16) for name, array in both.items()} for both in (own, empty))
    given = {name: {"data": array.view(np.uint16).ravel().tolist(), "dims": array.shape} for name, array in own.items()}
    facts = dict(image=2, sample=(4, 2, 2), size=2, streams=(2, 1), schedule=DISCRETE[1], batch=1, graphs={"decode": 1})
    settings = dict(count=2, steps=2, guidance=3, seed=0, solver="ddim")
    made = node(BIND + ASKED, facts=facts, own=given, file=list(safetensors.numpy.save(empty)), settings=settings)
    joined = {name: np.concatenate([own[name], empty[name].repeat((2, 1), 2)]) for name in ("k.0", "v.0")}
    joined["emb"] = np.concatenate([own["emb"], empty["emb"]])
    for feeds in made["asked"]["denoise"]:
        for name, array in joined.items():
            assert feeds[name]["type"] == "float16" and feeds[name]["dims"] == list(array.shape)
            assert feeds[name]["data"] == array.view(np.uint16).ravel().tolist()
        assert feeds["z"]["dims"] == [2, 4, 2, 2] and feeds["z"]["data"][:16] == feeds["z"]["data"][16:]
    # nothing to be seen before a variation is finished, then what the decoder makes of it
    assert [len(step["images"]) for step in made["said"]] == [0, 1, 0, 1]
    assert [feeds["latents"]["dims"] for feeds in made["asked"]["decode"]] == [[1, 4, 2, 2]] * 2
    images = [step["images"][0] for step in made["said"] if step["finished"]]
    assert images == [[feeds["latents"]["data"][0]] * 12 for feeds in made["asked"]["decode"]]


def test_scripts_are_short_and_name_no_other_host():
    for path in (p for p in Path(PAGE).rglob("*") if p.is_file()):
        text = path.read_text()
        lines = [line for line in text.splitlines() if "Content-Security-Policy" not in line]
        assert len(lines) <= 200 and max(map(len, lines)) <= 120, path
        # but for the name of a format
        assert "://" not in text.replace("http://www.w3.org/2000/svg", ""), path
