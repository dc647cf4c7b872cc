"""`semantica sample --steer`: words and regions become tokens; what the file may say, and what it may not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantica import Conditioner, SemanticaPipeline, SemanticaScheduler, UserError, UViT, ViTEncoder, WordEncoder
from semantica.cli import main
from semantica.steering.file import read_steering
from semantica.steering.regions import Region
from semantica.tokens import ClipTokenizer

PROMPT = "two red bicycles at dusk"


@pytest.fixture(scope="module")
def unet_folder(foreign, tmp_path_factory) -> Path:
    return foreign.write(tmp_path_factory.mktemp("unet") / "model", "sd")


@pytest.fixture
def place(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    half = np.zeros((40, 40), np.uint8)
    half[:, 20:] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    return tmp_path


def written(place: Path, **content) -> Path:
    (place / "steer.json").write_text(json.dumps(content))
    return place / "steer.json"


def run(model: Path, place: Path, out: str, *more: str) -> np.ndarray:
    arguments = ["sample", "--model", str(model), "--steps", "2", "-n", "2", "--solver", "ddim", "--device", "cpu"]
    assert main([*arguments, "--out", str(place / out), *more]) == 0
    return np.stack([np.asarray(Image.open(path)) for path in sorted((place / out).glob("*.png"))]).astype(int)


def test_words_are_found_at_the_places_of_their_tokens(unet_folder):
    tokenizer = ClipTokenizer(unet_folder / "tokenizer")
    prompt = "Two  red Bicycles, and a cliff; two redder cliffs"
    row = tokenizer([prompt])[0].tolist()
    for words, where in (("red", 1), ("bicycles", 2), ("TWO RED bicycles", 0)):
        found = tokenizer.tokens_of(prompt, words)
        plain = tokenizer([words])[0].tolist()
        count = plain.index(tokenizer.end) - 1
        # "two" stands twice, the others once: "redder" is another word
        assert [row[i] for i in found[:count]] == plain[1 : 1 + count] and found[0] >= where + 1
        assert len(found) == count
    assert len(tokenizer.tokens_of("two a two", "two")) == 2
    for words in ("redd", "cliff;x", " ", "dog"):
        with pytest.raises(UserError, match="is not in the prompt"):
            tokenizer.tokens_of(prompt, words)
    with pytest.raises(UserError, match="stands behind the 10 tokens that are read"):
        tokenizer.tokens_of("a " * 12 + "dog", "dog")


def test_regions_are_the_patches_that_lie_in_them(place):
    assert Region(box=(0, 0, 0.5, 0.5)).patches(4) == (0, 1, 4, 5)
    assert Region(point=(1, 0.3)).patches(4) == (7,)
    assert Region(mask=place / "mask.png").patches(4) == (2, 3, 6, 7, 10, 11, 14, 15)
    assert Region(pixels=np.array(Image.open(place / "mask.png")) > 0).patches(4) == (2, 3, 6, 7, 10, 11, 14, 15)
    # the second of two pictures, with a class token before its patches
    assert Region(point=(0, 0)).tokens(16, 34, picture=1, pictures=2) == (18,)
    for wrong, message in (
        ({"box": (0, 0, 1.2, 1)}, "lies outside the picture"),
        ({"point": (-0.1, 0)}, "lies outside the picture"),
        ({"box": (0.5, 0, 0.5, 1)}, "is empty"),
        ({}, "give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            Region(**wrong)
    with pytest.raises(UserError, match="holds none of the picture's 4 x 4 patches"):
        Region(box=(0.3, 0.3, 0.35, 0.35)).patches(4)
    with pytest.raises(UserError, match="picture 2 of 2"):
        Region(point=(0, 0)).tokens(16, 32, picture=2, pictures=2)


def test_the_command_steers_prompts_of_a_unet(unet_folder, place):
    plain = run(unet_folder, place, "plain", "--prompt", PROMPT, "a red cliff")
    objects = {"red": {"words": "red"}}
    recipes = [{"recipe": "move", "objects": ["red"], "shift": [0.2, 0.0]}]
    path = written(place, objects=objects, recipes=recipes, steps="all", weight=50)
    steered = run(unet_folder, place, "steered", "--prompt", PROMPT, "a red cliff", "--steer", str(path))
    assert steered.shape == plain.shape == (4, 64, 64, 3)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(steered, plain))
    # each prompt has tokens of its own, and its own noise
    alone = run(unet_folder, place, "alone", "--prompt", PROMPT, "--steer", str(path))
    assert np.abs(alone - steered[:2]).max() <= 1


def test_the_command_takes_targets_from_a_real_picture(unet_folder, small_run, place):
    sources = {"photo": {"image": "photo.png", "prompt": "a red cliff"}}
    recipes = [{"recipe": "copy_layout", "source": "photo"}, {"recipe": "copy_appearance", "source": "photo"}]
    path = written(place, objects={"red": {"words": "red"}}, recipes=recipes, sources=sources, steps=[0, 1], weight=50)
    plain = run(unet_folder, place, "plain", "--prompt", PROMPT)
    assert np.abs(run(unet_folder, place, "unet", "--prompt", PROMPT, "--steer", str(path)) - plain).max() > 0
    content = dict(
        objects={"left": {"box": [0, 0, 0.5, 1]}, "rest": {"mask": "mask.png"}},
        terms=[{"energy": "shape", "objects": ["left"], "source": "photo", "angle": 20, "factor": 1.5},
               {"energy": "size", "to": 0.3, "distance": "l2"}, {"energy": "shape", "to": "mask.png"}],
        sources={"photo": {"image": "photo.png", "objects": {"left": {"point": [0.1, 0.1]}}}}, factor="velocity",
        weight=50, steps="all",
    )  # fmt: skip
    given = ["--image", str(place / "photo.png")]
    # beside another guider than classifier-free guidance; without weight it is that guider's run
    for guider in ((), ("--guider", "tsg")):
        plain = run(small_run, place, f"plain{len(guider)}", *given, *guider)
        steer = ("--steer", str(written(place, **content)))
        assert np.abs(run(small_run, place, f"run{len(guider)}", *given, *guider, *steer) - plain).max() > 0
        written(place, **content | {"weight": 0})
        assert np.abs(run(small_run, place, f"none{len(guider)}", *given, *guider, *steer) - plain).max() <= 1


def test_words_and_pictures_of_one_model(tmp_path, place, capsys):
    """A run folder that reads both: objects are tokens of the stream that they are chosen in."""
    torch.manual_seed(0)
    parts = {"image": ViTEncoder(16, 4, 64, 1, 2), "text": WordEncoder(("a", "red", "ball", "dog"), 6, 64)}
    unet = UViT(16, 2, (32,), (1,), 64, 2, 2, 32, {"image": 64, "text": 64})
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model = tmp_path / "run"
    SemanticaPipeline(unet, Conditioner(parts), SemanticaScheduler(16, reference=16)).save_pretrained(model)
    recipes, picture = [{"recipe": "move", "objects": ["x"], "to": [0.9, 0.1]}], ("--image", str(place / "photo.png"))
    prompt, both = ("--prompt", "a red ball"), ("--prompt", "a red ball", *picture)
    chosen = {"words": "red ball"}, {"words": "ball"}, {"box": [0, 0, 1, 0.5]}
    for i, (x, given) in enumerate(zip(chosen, (prompt, both, both))):
        steer = str(written(place, objects={"x": x}, recipes=recipes, factor="velocity", weight=20, steps="all"))
        plain = run(model, place, f"plain-{i}", *given)
        assert np.abs(run(model, place, f"steered-{i}", *given, "--steer", steer) - plain).max() > 0
    for x, given, message in (
        ({"x": {"words": "dog"}}, prompt, "object 'x': 'dog' is not in the prompt"),
        ({"x": {"point": [0, 0]}}, prompt, "nothing is given for 'image'"),
        ({"x": {"words": "dog"}}, picture, "nothing is given for 'text'"),
        ({"x": {"words": "ball"}, "y": {"point": [0, 0]}}, both, "by words and by regions are tokens of two streams"),
    ):
        steer = str(written(place, objects=x, recipes=recipes))
        assert main(["sample", "--model", str(model), "--out", str(place / "o.png"), *given, "--steer", steer]) == 2
        assert message in capsys.readouterr().err


OBJECTS = {"a": {"words": "red"}}
TERM = {"energy": "position", "to": [0.5, 0.5]}


@pytest.mark.parametrize("content, message", [
    ({}, "the file has no 'objects'"),
    ({"objects": {}, "terms": [TERM]}, "objects is empty"),
    ({"objects": OBJECTS}, "neither terms nor recipes"),
    ({"objects": OBJECTS, "terms": [TERM], "wieght": 1}, "unknown member 'wieght'"),
    ({"objects": {"a": {"words": "red", "box": [0, 0, 1, 1]}}, "terms": [TERM]}, "objects.a: give one of words, box"),
    ({"objects": {"a": {"box": [0, 0, 2, 1]}}, "terms": [TERM]}, "lies outside the picture"),
    ({"objects": {"a": {"box": [0, 0, 0, 1]}}, "terms": [TERM]}, "is empty"),
    ({"objects": {"a": {"mask": "no.png"}}, "terms": [TERM]}, "no.png is not there"),
    ({"objects": {"a": {"subject": "red ring"}}, "terms": [TERM]}, "none is named: give 'segmenter', its folder"),
    ({"objects": {"a": {"tokens": []}}, "terms": [TERM]}, "object 'a' has no tokens"),
    ({"objects": OBJECTS, "terms": [{"energy": "place", "to": [0, 0]}]}, "terms[0].energy is 'place': expected one of"),
    ({"objects": OBJECTS, "terms": [{"energy": "size"}]}, "the energy 'size' has no target"),
    ({"objects": OBJECTS, "terms": [{"energy": "size", "to": 0.3, "factor": 2}]}, "has no target, or two"),
    ({"objects": OBJECTS, "terms": [{"energy": "size", "to": 1.3}]}, "expected a share of the picture"),
    ({"objects": OBJECTS, "terms": [{"energy": "appearance", "to": 1}]}, "name a source"),
    ({"objects": OBJECTS, "terms": [TERM | {"objects": ["b"]}]}, "no object is called 'b': there are a"),
    ({"objects": OBJECTS, "terms": [TERM | {"weight": float("nan")}]}, "terms[0].weight is nan: expected a number"),
    ({"objects": OBJECTS, "terms": [{"energy": "shape", "source": "x"}]}, "no source is called 'x': there are"),
    ({"objects": OBJECTS, "terms": [{"energy": "size", "factor": -1, "source": "original"}]}, "expected more than 0"),
    ({"objects": OBJECTS, "recipes": [{"recipe": "fly"}]}, "recipes[0]: expected a 'recipe', one of move, resize"),
    ({"objects": OBJECTS, "recipes": [{"recipe": "move", "objects": ["a"]}]}, "recipes[0]: move needs either a shift"),
    ({"objects": OBJECTS, "recipes": [{"recipe": "resize", "objects": ["a"]}]}, "recipes[0] has no 'factor'"),
    ({"objects": OBJECTS, "terms": [TERM], "steps": [3]}, "has step 3: a run of 3 has steps 0 to 2"),
    ({"objects": OBJECTS, "terms": [TERM], "steps": "some"}, "steps is 'some': expected one of paper, all"),
    ({"objects": OBJECTS, "terms": [TERM], "factor": "tau"}, "factor is 'tau': expected one of sigma"),
    ({"objects": OBJECTS, "terms": [TERM], "sources": {"original": {"image": "photo.png"}}}, "choose another"),
    ({"objects": OBJECTS, "terms": [TERM | {"weight": 10**400}]}, "terms[0].weight is a int: expected a number"),
    ({"objects": OBJECTS, "terms": [TERM | {"objects": []}]}, "terms[0].objects is empty: name at least one"),
    ({"objects": OBJECTS, "recipes": [{"recipe": "resize", "objects": [], "factor": 2}]}, "objects is empty"),
    ({"objects": OBJECTS, "terms": [{"energy": "position", "factor": 2}]}, "knows nothing of a change of factor"),
    ({"objects": OBJECTS, "recipes": [{"recipe": "resize", "objects": ["a"], "factor": 2, "others": ["a"]}]},
     "'a' is to change, and one of the others"),
    ({"objects": OBJECTS, "terms": [{"energy": "size", "source_objects": ["b"]}]}, "'original' has no object 'b'"),
    # what only the model knows
    ({"objects": {"a": {"words": "dog"}}, "terms": [TERM]}, "object 'a': 'dog' is not in the prompt"),
    ({"objects": {"a": {"box": [0, 0, 1, 1]}}, "terms": [TERM]}, "takes pictures"),
    ({"objects": {"a": {"tokens": [40]}}, "terms": [TERM]}, "has token 40: the stream has tokens 0 to 11"),
    ({"objects": OBJECTS, "terms": [TERM], "layers": ["x"]}, "no cross-attention is called 'x': there are down_blocks"),
    ({"objects": OBJECTS, "terms": [TERM], "stream": "y"}, "no stream is called 'y'"),
])  # fmt: skip
def test_what_the_file_may_not_say_is_one_line(unet_folder, place, capsys, content, message):
    given = ["--model", str(unet_folder), "--prompt", PROMPT, "--steps", "3", "-n", "1", "--device", "cpu"]
    arguments = ["sample", *given, "--out", str(place / "o.png"), "--steer", str(written(place, **content))]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (place / "o.png").exists()


def test_engines_give_no_gradients(small_run, place, capsys):
    path = written(place, objects={"a": {"point": [0.5, 0.5]}}, terms=[TERM])
    given = ["--image", str(place / "photo.png"), "--out", str(place / "o.png"), "--steer", str(path)]
    assert main(["sample", "--model", str(Path(__file__).parent / "stored" / "bundle"), *given]) == 2
    assert "gives no gradients, which --steer needs" in capsys.readouterr().err
    assert main(["sample", "--model", str(small_run), "--engine", "torch-compile", *given]) == 2
    assert "--engine torch-compile gives no gradients" in capsys.readouterr().err


def test_every_member_of_the_file_arrives(place):
    content = dict(
        objects={"a": {"words": "red ball"}, "b": {"tokens": [3, 4]}}, weight=2, factor="one", steps=[1],
        layers=["x"], activations="y", stream="z", sources={"photo": {"image": "photo.png", "condition": "mask.png"}},
        terms=[{"energy": "shape", "objects": ["a"], "weight": 3, "source": "photo", "source_objects": ["b"],
                "shift": [0.1, -0.2], "factor": 2, "angle": 30, "distance": "l2"}],
        recipes=[{"recipe": "compose", "layout": {"a": "photo"}, "appearance": {"b": "original"},
                  "weights": {"shape": 9}}],
    )  # fmt: skip
    read = read_steering(written(place, **content))
    first, shape, appearance = read.terms
    assert (first.what, first.objects, first.weight, first.distance) == ("shape", ("a",), 3, "l2")
    target = first.target
    assert (target.source, target.objects, target.shift) == ("photo", ("b",), (0.1, -0.2))
    assert (target.factor, target.angle) == (2, 30)
    assert (shape.weight, shape.target.source) == (9, "photo")
    assert (appearance.weight, appearance.target.source) == (12, "original")
    assert (read.weight, read.factor, read.pattern.steps(2)) == (2, "one", [False, True])
    assert (read.taps.layers, read.taps.activations, read.taps.stream) == (("x",), "y", "z")
    assert read.objects["b"].tokens == (3, 4) and set(read.sources) == {"photo", "original"}


def test_a_subject_is_where_a_segmenter_finds_it(place, small_run, tmp_path):
    from semantica.benchmarks.quality.small_clip import write_clip
    from semantica.model.conditioner import encoders_of
    from semantica.pipelines.sample import load_pipeline
    from semantica.pipelines.steered import length_of, objects_of
    from semantica.segmentation.segmenter import Segmenter
    from semantica.segmentation.sizes import Sizes
    from semantica.segmentation.windows import locate, squeezed

    write_clip(tmp_path / "clip", 0)
    torch.manual_seed(0)
    sizes = Sizes(16, 1, 4, 4, 2, 16, (16, 16), (8, 8), (4, 4))
    segmenter, photo = Segmenter.from_clip(tmp_path / "clip", sizes=sizes).eval(), Image.open(place / "photo.png")
    with torch.no_grad():
        # half of the picture is likely enough
        logits = segmenter.aggregator.head
        logits.bias.zero_()
        seen = segmenter(squeezed(photo, 32, 32), segmenter.embed(segmenter.numbers(["red ring"])))
        logits.bias.fill_(-float(seen.median()))
    segmenter.save_pretrained(place / "segmenter")
    mask = locate(segmenter, photo, "red ring")
    steer = {
        "objects": {"it": {"subject": "red ring"}},
        "segmenter": "segmenter",
        "terms": [TERM | {"objects": ["it"]}],
    }
    read = read_steering(written(place, **steer))
    pipeline = load_pipeline(small_run, "cpu")
    (stream,) = encoders_of(pipeline.encoder)
    made = objects_of(pipeline, read.objects, {stream: photo}, stream, read.segmenter)
    tokens = Region(pixels=mask).tokens(pipeline.encoder.patches, length_of(pipeline, {stream: photo}, stream))
    assert 0 < len(tokens) < pipeline.encoder.patches and made.index[0].tolist() == list(tokens)
