"""SDS, DDS and CDS: closed forms, the authors' algorithm written again over stock diffusers, gradients in few bits."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from semantica import UserError, UViT
from semantica.condition import Condition, Stream
from semantica.discrete import DiscreteSchedule
from semantica.editing.contrast import contrast, patch_nce, patches
from semantica.editing.scores import Editing, drawn, edit, generator
from semantica.editing.taps import decoder_attention
from semantica.fused.denoiser import UNetDenoiser
from semantica.solvers import Schedule

TEXT, SIZE = 16, 8
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference_nce(query: Tensor, key: Tensor, size: int, picked: np.ndarray, tau: float) -> Tensor:
    """The authors' loss of one layer and sample, `[N, C]` each, patch by patch, with their masked diagonal."""
    side, places = round(len(query) ** 0.5), []
    for features in (query, key):
        rows = features.reshape(side, side, -1)
        own = []
        for r in range(side // size):
            for c in range(side // size):
                mean = rows[r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(size * size, -1).mean(0)
                own.append(mean / mean.norm())
        places.append([own[p] for p in picked])
    losses = []
    for i, k in enumerate(places[1]):
        others = [k @ q if j != i else torch.tensor(-10.0, dtype=q.dtype) for j, q in enumerate(places[0])]
        logits = torch.stack([k @ places[0][i], *others]) / tau
        losses.append(F.cross_entropy(logits[None], torch.tensor([0])))
    return torch.stack(losses).mean()


def test_patch_nce_and_its_gradient_are_those_of_a_loop_over_patches():
    query, key = (randn(2, 36, 5, seed=s, dtype=torch.float64) for s in (0, 1))
    for size in (1, 2, 3):
        count = (6 // size) ** 2
        picked = np.random.default_rng(size).permutation(count)[:7]
        own = query.clone().requires_grad_()
        made = patch_nce(patches(own, size)[:, picked], patches(key, size)[:, picked], 0.07)
        again = query.clone().requires_grad_()
        expected = torch.stack([reference_nce(again[b], key[b], size, picked, 0.07) for b in range(2)])
        assert torch.allclose(made, expected, rtol=1e-12, atol=1e-12)
        weights = torch.tensor([1.0, -2.5], dtype=torch.float64)
        for loss in (made, expected):
            (weights * loss).sum().backward()
        assert torch.allclose(own.grad, again.grad, rtol=1e-10, atol=1e-13) and float(own.grad.abs().max()) > 1e-2


def test_the_sum_goes_over_layers_and_sizes_and_draws_patches_for_each():
    query, key = ({"a": randn(1, 64, 5, seed=s), "b": randn(1, 4, 3, seed=s + 2)} for s in (0, 1))
    rng, expected = generator(3, 1), 0.0
    # a grid of 2 x 2 has one patch of 2 x 2, which has no other to be told from
    for name, size, count in (("a", 1, 64), ("a", 2, 16), ("b", 1, 4)):
        picked = rng.permutation(count)[:20]
        expected += reference_nce(query[name][0].double(), key[name][0].double(), size, picked, 0.1)
    made = contrast(query, key, generator(3, 1), 20, (1, 2), 0.1)
    assert made.shape == (1,) and float((made.double() - expected).abs()) < 1e-5
    # half precision is compared in fp32
    half = contrast({n: f.bfloat16() for n, f in query.items()}, key, generator(3, 1), 20, (1, 2), 0.1)
    assert half.dtype == torch.float32
    with pytest.raises(UserError, match="no attention here has two patches of 2 or 3 places"):
        contrast({"b": query["b"]}, {"b": key["b"]}, generator(0), sizes=(2, 3))
    with pytest.raises(UserError, match="only square pictures"):
        patches(randn(1, 6, 3, seed=0), 1)


class Gaussian:
    """The exact denoiser of pictures N(mu, s^2): mu is the condition, 0 without."""

    array, max_batch, joins, refuses = "torch", None, True, {"gradients": "this one gives no gradients"}
    device, dtype, variance = torch.device("cpu"), torch.float64, 0.3

    def __call__(self, z: Tensor, logsnr: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (a.sqrt()[:, None, None, None] for a in (logsnr.sigmoid(), (-logsnr).sigmoid()))
        eps = sigma * (z - alpha * condition.emb.view_as(z)) / (alpha**2 * self.variance + sigma**2)
        return (eps - sigma * z) / alpha

    def null(self, batch: int) -> Condition:
        return self.of(torch.zeros(batch, 3, 4, 4, dtype=torch.float64))

    @staticmethod
    def of(mean: Tensor) -> Condition:
        return Condition((), (), mean.flatten(1), None, ())


@pytest.mark.parametrize("method", ["sds", "dds"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_scores_are_the_closed_form_on_gaussians(method, guidance):
    x, source, target = (randn(2, 3, 4, 4, seed=s, dtype=torch.float64) for s in range(3))
    settings, schedule = Editing(method, 3, guidance=guidance, w_dds=1.7, seed=5), Schedule(32)
    toy, expected = Gaussian(), x
    made = edit(toy, x, toy.of(source), toy.of(target), None, schedule, settings)
    for i in range(3):
        levels, noise = (torch.from_numpy(a).double() for a in drawn(schedule, settings, x.shape, i))
        signal, variance = (a[:, None, None, None] for a in (levels.sigmoid(), (-levels).sigmoid()))
        alpha, sigma = signal.sqrt(), variance.sqrt()
        # guidance moves the mean from 0: both branches are linear in it
        pairs = ((expected, guidance * target), (x, guidance * source))
        gain = sigma / (signal * 0.3 + variance)
        eps = [gain * (alpha * z + sigma * noise - alpha * mean) for z, mean in pairs]
        score = eps[0] - (noise if method == "sds" else eps[1])
        # 2000 / 64^2 at the rate 0.1, whatever the size
        expected = expected - 0.1 * 1.7 * 2000 / 4096 * score
    assert torch.allclose(made, expected, rtol=1e-10, atol=1e-10) and float((made - x).abs().max()) > 0.1


def uvit() -> UViT:
    torch.manual_seed(0)
    net = UViT(image_size=16, channels=(16,), depths=(1,), width=32, depth=3, heads=2, emb_dim=16, streams={"image": 6})
    for parameter in net.parameters():
        # layers that start as zeros would hide what comes before them
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net.eval().requires_grad_(False)


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
    )  # fmt: skip
    return made.eval().requires_grad_(False)


class Case:
    """A denoiser, its schedule, what is edited, and both conditions."""

    def __init__(self, kind: str):
        self.kind = kind
        if kind == "U-ViT":
            self.net, self.schedule, shape = uvit(), Schedule(16, 16), (2, 3, 16, 16)
            streams = [{"image": Stream(randn(2, 5, 6, seed=s))} for s in (1, 2)]
            self.denoiser = self.net
        else:
            self.net, self.schedule, shape = unet(), DiscreteSchedule.from_scheduler(BETAS, SIZE), (2, 4, SIZE, SIZE)
            streams = [{"text": Stream(randn(2, 7, TEXT, seed=s))} for s in (1, 2)]
            self.denoiser = UNetDenoiser(self.net, self.schedule, {"text": Stream(randn(1, 7, TEXT, seed=3))})
        self.streams, self.x = streams, randn(*shape, seed=4)
        self.source, self.target = self.conditions(self.denoiser)

    @torch.no_grad()
    def conditions(self, denoiser) -> list[Condition]:
        return [
            denoiser.condition({name: stream.map(lambda a: a.to(denoiser.dtype)) for name, stream in streams.items()})
            for streams in self.streams
        ]

    def run(self, settings: Editing, rows: slice = slice(None), source=None) -> Tensor:
        given = [condition.map(lambda array: array[rows]) for condition in (source or self.source, self.target)]
        return edit(self.denoiser, self.x[rows], *given, None, self.schedule, settings)


@pytest.fixture(scope="module", params=["U-ViT", "UNet"])
def case(request):
    return Case(request.param)


def test_nothing_changes_where_source_and_target_are_the_same(case):
    made = case.run(Editing("dds", 4), source=case.target)
    assert float((made - case.x).abs().max()) < 1e-4
    assert float((case.run(Editing("dds", 4)) - case.x).abs().max()) > 1e-2


def test_steps_are_the_authors_algorithm_written_plainly(case):
    """Over stock diffusers for the UNet: their pipeline's code, its hooks, SGD and sums, with our draws."""
    pixels = case.kind == "U-ViT"
    settings = Editing("cds", 3, guidance=7.5, w_dds=0.8, w_cut=1000.0 if pixels else 40.0, patches=20, seed=2)
    branches, kept = [case.source, case.target, case.denoiser.null(2)], {}
    if pixels:
        tapped = {f"transformer_blocks.{i}.attn": case.net.transformer_blocks[i].attn for i in (1, 2)}
    else:
        branches = [s["text"].tokens for s in (*case.streams, {"text": case.denoiser.blank["text"]})]
        branches[2] = branches[2].expand(2, -1, -1)
        tapped = {n: m.to_out[0] for n, m in case.net.named_modules() if n.endswith("attn1") and "up" in n}
    signal = DDIMScheduler.from_config(BETAS).alphas_cumprod

    def levels_of(logsnr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the network reads, alpha and sigma."""
        if pixels:
            return logsnr, *((sign * logsnr).sigmoid().sqrt()[:, None, None, None] for sign in (1, -1))
        t = (torch.from_numpy(case.schedule.levels).float()[None] - logsnr[:, None]).abs().argmin(1)
        assert int(t.min()) >= 50 and int(t.max()) < 950
        return t, *(a.sqrt()[:, None, None, None] for a in (signal[t], 1 - signal[t]))

    def eps_of(picture: Tensor, t: Tensor, branch, alpha: Tensor, sigma: Tensor) -> Tensor:
        if not pixels:
            return case.net(picture, t, branch).sample
        return sigma * picture + alpha * case.net(picture, t, branch)

    hooks = [
        module.register_forward_hook(lambda m, i, out, name=name: kept.update({name: out}))
        for name, module in tapped.items()
    ]
    x, z, places = case.x, case.x.clone().requires_grad_(), case.x[0, 0].numel()
    optimizer = torch.optim.SGD([z], lr=0.1 * places / 64**2)
    for i in range(3):
        logsnr, eps = (torch.from_numpy(a) for a in drawn(case.schedule, settings, x.shape, i))
        t, alpha, sigma = levels_of(logsnr)
        predicted, features = [], []
        with torch.no_grad():
            for picture, branch in ((x, branches[0]), (z, branches[1])):
                noised = alpha * picture + sigma * eps
                own = eps_of(noised, t, branch, alpha, sigma)
                features.append(dict(kept))
                other = eps_of(noised, t, branches[2], alpha, sigma)
                predicted.append(other + 7.5 * (own - other))
            g = predicted[1] - predicted[0]
        loss = 2000 * 0.8 * (z * g).sum() / places
        eps_of(alpha * z + sigma * eps, t, branches[1], alpha, sigma)
        rng = generator(2, i)
        for name in tapped:
            for size in (1, 2):
                picked = rng.permutation(len(kept[name][0]) // size**2)[:20]
                for b in range(2):
                    nce = reference_nce(kept[name][b], features[0][name][b], size, picked, 0.07)
                    loss = loss + settings.w_cut * nce
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()
    made, moved = case.run(settings), float((z.detach() - x).abs().max())
    assert moved > 0.03 and float((made - z.detach()).abs().max()) < 2e-4 * moved
    # the contrast is a part of it that can be seen
    assert float((case.run(dataclasses.replace(settings, w_cut=0.0)) - made).abs().max()) > 1e-2 * moved


def test_features_are_read_in_the_decoder(case):
    names = {"U-ViT": ["transformer_blocks.1.attn", "transformer_blocks.2.attn"],
             "UNet": [f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn1" for i in (0, 1)]}  # fmt: skip
    assert list(decoder_attention(case.denoiser)) == names[case.kind]


def test_runs_repeat_and_pictures_do_not_know_of_each_other(case):
    settings = Editing("cds", 2, w_cut=30.0, seed=1)
    made = case.run(settings)
    assert torch.equal(made, case.run(settings))
    assert torch.allclose(case.run(settings, slice(0, 1)), made[:1], atol=1e-5)
    assert not torch.allclose(case.run(dataclasses.replace(settings, seed=2)), made, atol=1e-3)


def test_checkpointing_changes_nothing(case):
    settings, network = Editing("cds", 2, w_cut=30.0), getattr(case.denoiser, "module", case.denoiser)
    stored = case.run(settings)
    network.enable_gradient_checkpointing()
    try:
        assert torch.allclose(case.run(settings), stored, atol=1e-6)
    finally:
        network.disable_gradient_checkpointing()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_contrasts_gradient_survives_half_precision(case, dtype):
    narrow = (
        case.denoiser.in_precision(dtype) if hasattr(case.denoiser, "in_precision") else nn.Module.to(uvit(), dtype)
    )
    settings = Editing("cds", 1, w_dds=0.0, w_cut=1e4)
    made = edit(narrow, case.x, *case.conditions(narrow), None, case.schedule, settings)
    exact, found = ((z - case.x).flatten() for z in (case.run(settings), made))
    assert found.dtype == torch.float32 and float(F.cosine_similarity(exact, found, dim=0)) > 0.99
    assert 0.95 < float(found.norm() / exact.norm()) < 1.05


@pytest.mark.parametrize("wrong, message", [
    (lambda: Editing("css"), "method 'css' is unknown: choose one of cds, dds, sds"),
    (lambda: Editing(iterations=0), "0 iterations: give at least 1"),
    (lambda: Editing(w_cut=-1.0), "w_cut is -1.0: give a number of at least 0"),
    (lambda: Editing(rate=float("nan")), "rate is nan"),
    (lambda: Editing(temperature=0.0), "temperature 0.0 must be above 0"),
    (lambda: Editing(sizes=()), "256 patches of sizes"),
    (lambda: Editing(interval=(0.9, 0.1)), "give two fractions"),
    (lambda: Editing(seed=-1), "seed -1 must be 0 or more"),
    (lambda: edit(Gaussian(), randn(1, 3, 4, 4, seed=0), Gaussian().null(1), Gaussian().null(1), None, Schedule(32),
                  Editing()), "this one gives no gradients"),
    (lambda: edit(Gaussian(), randn(1, 3, 4, 4, seed=0), None, Gaussian().null(1), None, Schedule(32), Editing("dds")),
     "dds compares with the source"),
    (lambda: edit(Gaussian(), randn(1, 3, 4, 4, seed=0) * float('inf'), None, Gaussian().null(1), None, Schedule(32),
                  Editing("sds")), "finite no more after iteration 1: lower its rate"),
    (lambda: decoder_attention(Gaussian()), "Gaussian is no torch module"),
    (lambda: decoder_attention(nn.Linear(2, 2)), "Linear has no self-attention in its decoder: take the method dds"),
])  # fmt: skip
def test_what_cannot_be_edited_is_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


def test_conditions_of_other_sizes_are_one_line():
    case = Case("UNet")
    other = case.denoiser.condition({"text": Stream(randn(2, 5, TEXT, seed=1))})
    with pytest.raises(UserError, match=r"stream sizes \(7,\) cannot be filled up to \(5,\)"):
        case.run(Editing("dds"), source=other)
