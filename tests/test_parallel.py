"""Two processes, DDP and FSDP2, against one; what they refuse together."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from semantica import SemanticaPipeline
from semantica.train.config import TrainConfig
from semantica.train.data.config import TokensConfig
from semantica.train.data.encode import store_tokens
from semantica.train.loop import train
from semantica.train.processes import World
from semantica.train.run import checkpoint

FILES = ("unet", "encoder", "head", "ema_unet", "ema_encoder", "ema_head", "optimizer")


def config(photos, out, **changes) -> TrainConfig:
    options = dict(
        data=str(photos), out=out, steps=10, batch=8, accumulate=2, warmup=0, lr=1e-4, align=0.05, precision="fp32",
        held_out=0.34, log_every=1, save_every=5, eval_every=3, sample_every=100, workers=0, device="cpu", timeout=60.0,
    )  # fmt: skip
    return TrainConfig(**{**options, **changes})


def job(settings: TrainConfig, **more) -> dict:
    return {"config": settings.record(), **more}


@pytest.fixture(scope="module")
def together(torchrun, tmp_path_factory):
    """A function that trains in several processes what jobs say; returns how each job ended, by process."""

    def together(jobs: list[dict], processes: int = 2) -> list[list[dict]]:
        path = tmp_path_factory.mktemp("jobs") / "jobs.json"
        path.write_text(json.dumps(jobs))
        worker = Path(__file__).parent / "processes" / "ranks.py"
        process = torchrun(str(worker), str(path), processes=processes)
        said = process.communicate(timeout=400)
        assert process.returncode == 0, said[0][-2000:] + said[1][-6000:]
        return list(zip(*(json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(processes))))

    return together


def newest(out: Path) -> Path:
    return checkpoint.folders(out / "checkpoints")[-1]


def merged(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors of one kind, put together from the headers alone."""
    whole = {}
    for path in sorted(folder.glob(f"{name}.*safetensors")):
        with safe_open(path, "pt") as file:
            places = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for key in file.keys():  # noqa: SIM118
                whole.setdefault(key, []).append((places.get(key, {}).get("saved_offsets"), file.get_tensor(key)))
    return {
        k: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0] or [0])]) if len(parts) > 1 else parts[0][1]
        for k, parts in whole.items()
    }


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def furthest(a: Path, b: Path, names=FILES) -> float:
    """Largest difference of any weight, average or moment."""
    worst = 0.0
    for name in names:
        one, other = merged(a, name), merged(b, name)
        assert one.keys() == other.keys() and one, name
        worst = max(worst, *((one[k] - other[k]).abs().max().item() for k in one))
    return worst


@pytest.fixture(scope="module")
def runs(photos, together, tmp_path_factory):
    """The same run in one process, and in two with DDP and with FSDP2; and how the two processes' jobs ended."""
    root = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config(photos, root / "one", sample_every=10))
    torch.set_num_threads(threads)
    # a run to be continued by another kind
    for name in ("one-fsdp", "one-other"):
        shutil.copytree(root / "one", root / name)
        shutil.rmtree(root / name / "checkpoints" / "step-00000010")
    other = tmp_path_factory.mktemp("other") / "photos"
    shutil.copytree(photos, other)
    Image.new("RGB", (36, 36)).save(other / "g0" / "more.png")
    broken = tmp_path_factory.mktemp("broken")
    lost = tmp_path_factory.mktemp("lost") / "photos"
    shutil.copytree(photos, lost)
    # of the same listing, but no picture is whole
    unreadable = tmp_path_factory.mktemp("unreadable") / "photos"
    shutil.copytree(photos, unreadable)
    for path in unreadable.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60].ljust(path.stat().st_size, b"\0"))
    more = tmp_path_factory.mktemp("more")
    (more / "data").mkdir()
    (more / "data" / "more.py").write_text("changed = True")
    fine = config(photos, root / "refused")
    spoiled = dict(save_every=2, log_every=100, eval_every=100)
    jobs = {
        "ddp": job(config(photos, root / "ddp", parallel="ddp")),
        "fsdp": job(config(photos, root / "fsdp", parallel="fsdp", checkpointing=True, sample_every=10)),
        "one-fsdp": job(config(photos, root / "one-fsdp", parallel="fsdp")),
        "stopped": job(config(photos, root / "stopped", parallel="fsdp", save_every=100), stop={"1": 3}),
        "ddp, begun": job(config(photos, root / "ddp-fsdp", parallel="ddp"), stop={"0": 4}),
        "ddp-fsdp": job(config(photos, root / "ddp-fsdp", parallel="fsdp")),
        "fsdp, begun": job(config(photos, root / "fsdp-ddp", parallel="fsdp"), stop={"1": 4}),
        "fsdp-ddp": job(config(photos, root / "fsdp-ddp", parallel="ddp")),
        "spoiled-ddp": job(config(photos, root / "spoiled-ddp", parallel="ddp", **spoiled), spoil={"1": 3}),
        "spoiled-fsdp": job(config(photos, root / "spoiled-fsdp", parallel="fsdp", **spoiled), spoil={"1": 3}),
        "full": job(config(photos, root / "full", parallel="fsdp", save_every=1), full={"1": 3}),
        "code": job(fine, code={"1": str(more)}),
        "options": job(fine, here={1: {"lr": 2e-4}}),
        "data": job(fine, here={1: {"data": str(other)}}),
        "no data": job(fine, here={1: {"data": str(broken)}}),
        "batch": job(dataclasses.replace(fine, batch=6)),
        "lost": job(config(photos, root / "lost", save_every=2), here={1: {"data": str(lost)}}, lose={1: str(lost)}),
        "held out": job(config(photos, root / "no-val", val=str(photos)), here={1: {"val": str(unreadable)}}),
        "other run": job(config(photos, root / "one", steps=12, lr=2e-4, parallel="fsdp")),
    }
    return root, dict(zip(jobs, together(list(jobs.values()))))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_to_what_one_does(runs, kind):
    """The same weights, averages and moments, with InfoNCE over the batch of both and two parts to each batch."""
    root, ended = runs
    assert all("error" not in e and "left" not in e for e in ended[kind]), ended[kind]
    assert furthest(newest(root / "one"), newest(root / kind)) < 1e-5
    # the runs must have gone somewhere for that to mean anything
    start = merged(checkpoint.folders(root / "one" / "checkpoints")[0], "unet")
    assert max((merged(newest(root / "one"), "unet")[k] - v).abs().max().item() for k, v in start.items()) > 3e-4
    assert losses(root / kind) == pytest.approx(losses(root / "one"), abs=1e-4) and len(losses(root / kind)) == 10


def test_parts_and_wholes_of_a_checkpoint(runs):
    """DDP writes what one process does; FSDP2 writes parts, and none of a file's tensors twice."""
    root, _ = runs
    one, ddp, fsdp = ({p.name for p in newest(root / kind).iterdir()} for kind in ("one", "ddp", "fsdp"))
    assert one == ddp == {f"{name}.safetensors" for name in FILES} | {"state.json"}
    parts = {f"{name}.0000{i}-of-00002.safetensors" for name in FILES for i in (1, 2)}
    assert fsdp == parts | {"state.json"}
    formats = [json.loads((newest(root / k) / "state.json").read_text())["format"] for k in ("one", "ddp", "fsdp")]
    assert formats == [1, 1, 2]
    folder = newest(root / "fsdp")
    sizes = [(folder / f"ema_unet.0000{i}-of-00002.safetensors").stat().st_size for i in (1, 2)]
    whole = (newest(root / "one") / "ema_unet.safetensors").stat().st_size
    assert sum(sizes) == pytest.approx(whole, rel=0.02) and min(sizes) > 0.4 * whole


def test_pytorchs_own_reader_reads_the_parts(runs, tmp_path):
    import torch.distributed.checkpoint as dcp

    root, _ = runs
    for path in newest(root / "fsdp").glob("unet.*"):
        shutil.copy(path, tmp_path / path.name)
    expected = merged(newest(root / "fsdp"), "unet")
    actual = {k: torch.full_like(v, torch.nan) for k, v in expected.items()}
    dcp.load(actual, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(actual[k], v) for k, v in expected.items())


def test_the_published_pipeline_is_whole(runs):
    root, _ = runs
    for kind in ("ddp", "fsdp", "one-fsdp"):
        pipeline = SemanticaPipeline.from_pretrained(root / kind)
        for name, module in (("ema_unet", pipeline.unet), ("ema_encoder", pipeline.encoder)):
            expected = merged(newest(root / kind), name)
            assert all(torch.equal(v, expected[k]) for k, v in module.state_dict().items())
    with Image.open(root / "fsdp" / "samples" / "step-00000010.png") as two:
        with Image.open(root / "one" / "samples" / "step-00000010.png") as one:
            difference = np.abs(np.asarray(two, np.int16) - np.asarray(one, np.int16))
    assert difference.max() <= 2


def test_a_run_of_one_process_continues_in_two_and_back(runs, photos, tmp_path, capsys):
    """The samples stay in order: the ends are those of runs that were never moved."""
    root, ended = runs
    assert all("error" not in e for e in ended["one-fsdp"])
    assert losses(root / "one-fsdp")[:5] == losses(root / "one")[:5]
    assert furthest(newest(root / "one-fsdp"), newest(root / "one")) < 1e-5
    shutil.copytree(root / "fsdp", tmp_path / "back")
    part = newest(tmp_path / "back") / "optimizer.00002-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    train(config(photos, tmp_path / "back"))
    said = capsys.readouterr().out
    assert f"step-00000010 is damaged ({part.name} is not what was written" in said and "from step 5" in said
    assert furthest(newest(tmp_path / "back"), newest(root / "one")) < 1e-5


@pytest.mark.parametrize("kind", ["ddp-fsdp", "fsdp-ddp"])
def test_a_run_moves_between_ddp_and_fsdp(runs, kind):
    """After four steps, saved as wholes or as parts: the end is that of runs that were never moved."""
    root, ended = runs
    begun = ended[f"{kind[: kind.index('-')]}, begun"]
    assert [len(e["graphs"]) for e in begun] == [4, 4] and [len(e["graphs"]) for e in ended[kind]] == [6, 6]
    assert furthest(newest(root / kind), newest(root / "one")) < 1e-5
    assert losses(root / kind) == pytest.approx(losses(root / "one"), abs=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "one-fsdp", "ddp-fsdp", "fsdp-ddp"])
def test_held_out_figures_are_those_of_one_process_on_each(runs, kind):
    root, ended = runs
    first, second = (e["held_out"] for e in ended[kind])
    assert first == second and first
    one, other = (held_out(root / name) for name in ("one", kind))
    assert len(other) == 4 and [f for figures in first for f in figures.values()] == sum(other, [])[-2 * len(first) :]
    assert np.abs(np.subtract(one, other)).max() < 1e-5
    # averages that stood still would show, also between two evaluations without a save in between
    assert min(abs(one[0][0] - one[1][0]), abs(one[1][0] - one[2][0])) > 1e-4


def held_out(out: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[row["held_out_loss"], row["held_out_loss_shuffled"]] for row in rows if "held_out_loss" in row]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loss_that_is_infinite_on_one_process_ends_the_run_of_all(runs, kind):
    """Gradients stay finite, so that only one process sees it; the checkpoint before is that of an undisturbed run."""
    root, ended = runs
    first, second = ended[f"spoiled-{kind}"]
    assert first["kind"] == "FloatingPointError" and "nothing was saved since" in first["error"]
    assert "\n" not in first["error"] and second == {"left": 1}
    folder = root / f"spoiled-{kind}" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-00000002"]
    state, _ = checkpoint.load_newest(folder, World(), pytest.fail)
    assert state["step"] == 2
    assert furthest(folder / "step-00000002", root / "lost" / "checkpoints" / "step-00000002") < 1e-5
    assert not (root / f"spoiled-{kind}" / "model_index.json").exists()


def test_all_stop_after_the_step_in_which_one_was_told_to(runs):
    root, ended = runs
    assert [len(e["graphs"]) for e in ended["stopped"]] == [3, 3]
    assert [p.name for p in (root / "stopped" / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (root / "stopped" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("options", "the processes disagree on --lr: 0.0001 on process 0, 0.0002 on process 1"),
        ("code", "the processes disagree on the package's code: "),
        ("data", "the processes disagree on the pictures in --data"),
        ("no data", "process 1 of 2: "),
        ("batch", "--batch 6 in --accumulate 2 parts cannot be split among 2 processes"),
        ("other run", "made with --lr 0.0001, not 0.0002"),
    ],
)
def test_what_processes_refuse_one_says_and_all_leave(runs, case, message):
    root, ended = runs
    first, second = ended[case]
    assert message in first["error"] and "\n" not in first["error"] and second == {"left": 2}
    assert not (root / "refused").exists() and len(losses(root / "one")) == 10


def test_data_lost_by_one_process_ends_the_run_of_all_in_one_line(runs):
    root, ended = runs
    first, second = ended["lost"]
    assert re.match("process 1 of 2: no readable pair after .*cannot be read", first["error"]), ended["lost"]
    assert second == {"left": 2}
    assert [p.name for p in (root / "lost" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_disk_that_is_full_for_one_process_ends_the_run_of_all_in_one_line(runs):
    """Also where the next save is due before the one that failed was asked about."""
    root, ended = runs
    first, second = ended["full"]
    assert first["error"].startswith("no space left to write ") and second == {"left": 2}, ended["full"]
    assert [p.name for p in checkpoint.folders(root / "full" / "checkpoints")] == ["step-00000001", "step-00000002"]
    assert checkpoint.load_newest(root / "full" / "checkpoints", World(), pytest.fail)[0]["step"] == 2


def test_held_out_pictures_that_one_process_cannot_read_end_the_run_of_all_in_one_line(runs):
    root, ended = runs
    first, second = ended["held out"]
    assert re.match("process 1 of 2: no readable pair after ", first["error"]), ended["held out"]
    assert second == {"left": 2} and not (root / "no-val" / "checkpoints").exists()


@pytest.mark.slow
def test_alignment_and_stored_tokens_in_two_processes(photos, together, tmp_path):
    """REPA to a frozen encoder that runs along, and conditions from stored tokens: as in one process."""
    train(config(photos, tmp_path / "teacher", steps=1))
    source = str(tmp_path / "teacher")
    place = tmp_path / "tokens"
    store_tokens(TokensConfig(str(photos), encoder=source, out=place, device="cpu", precision="fp32"))
    kinds = {
        "repa": dict(repa=0.5, repa_encoder=source),
        "stored": dict(encoder=source, tokens=str(place), align=0.0),
    }
    for kind, options in kinds.items():
        train(config(photos, tmp_path / f"{kind}-one", **options))
    jobs = [
        job(config(photos, tmp_path / f"{kind}-{mode}", parallel=mode, **options))
        for kind, options in kinds.items()
        for mode in ("ddp", "fsdp")
    ]
    assert all("error" not in ended for each in together(jobs) for ended in each)
    files = {"repa": (*FILES, "repa"), "stored": ("unet", "ema_unet", "optimizer")}
    for kind in kinds:
        for mode in ("ddp", "fsdp"):
            pair = (newest(tmp_path / f"{kind}-{name}") for name in (mode, "one"))
            assert furthest(*pair, files[kind]) < 1e-5, (kind, mode)


@pytest.mark.slow
def test_two_nodes_of_two_split_inside_and_copy_between(photos, tmp_path):
    train(config(photos, tmp_path / "one"))
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([job(config(photos, tmp_path / "hsdp", parallel="hsdp"))]))
    worker = Path(__file__).parent / "processes" / "ranks.py"
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    command = [
        sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--no-python", sys.executable, "-P", str(worker), str(jobs),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    folder = newest(tmp_path / "hsdp")
    assert furthest(folder, newest(tmp_path / "one")) < 1e-5
    # two parts of each weight, and no part twice, though four processes hold one
    places = []
    for path in folder.glob("unet.*"):
        with safe_open(path, "pt") as file:
            held = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        places += [held[key]["saved_offsets"] for key in held if key == "conv_out.weight"]
    assert len(places) == 2 and places[0] != places[1]


@pytest.mark.slow
def test_three_processes_go_on_to_the_same_bits(photos, together, tmp_path):
    """Of two, sums are the same in any order."""
    settings = dict(batch=6, accumulate=1, save_every=2, eval_every=10, image_size=16)
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    together([job(config(photos, out, steps=n, **settings)) for out, n in ((straight, 4), (parts, 2), (parts, 4))], 3)
    assert furthest(newest(straight), newest(parts)) == 0


@pytest.mark.slow
def test_one_graph_in_each_of_two_processes(photos, together, tmp_path):
    """DDP around the network compiled as one: the run of one process, gradients exchanged while they are computed."""
    settings = dict(steps=4, save_every=4, eval_every=4, accumulate=1)
    train(config(photos, tmp_path / "one", **settings))
    told = dict(parallel="ddp", compile=True, compile_scope="network")
    (ended,) = together([job(config(photos, tmp_path / "ddp", **settings, **told))])
    for process in ended:
        assert process["graphs"][1:] == [process["graphs"][1]] * 3 and process["breaks"] == 0, process
    assert furthest(newest(tmp_path / "one"), newest(tmp_path / "ddp")) < 1e-4


@pytest.mark.slow
def test_everything_at_once_compiles_whole_and_never_again(photos, together, tmp_path):
    """FSDP2, bf16, compiled blocks, checkpointing, parts of batches: close to fp32, and no graph after two steps."""
    settings = dict(steps=6, save_every=6, eval_every=6, align=0.0)
    train(config(photos, tmp_path / "one", **settings))
    told = dict(parallel="fsdp", compile=True, precision="bf16", checkpointing=True)
    (ended,) = together([job(config(photos, tmp_path / "fsdp", **settings, **told))])
    for process in ended:
        graphs = process["graphs"]
        assert graphs[1] > 0 and graphs[2:] == [graphs[2]] * 4 and process["breaks"] == 0, process
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "one"), rel=0.03)
