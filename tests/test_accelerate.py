"""diffusers' models on the fused operators: the same numbers, the same object, and the way back."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import nn

import semantica
from semantica import UserError
from semantica.fused.norms import FusedGroupNormSiLU
from semantica.fused.parts import parts
from semantica.fused.processors import FusedAttnProcessor, attend, text_stream
from semantica.kernels import dispatch

TEXT = 48
SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": (1, 2),
}
DEEP = {"transformer_layers_per_block": (1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 * 6 + 16}  # fmt: skip
RESAMPLING = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "up_block_types":
              ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
              "cross_attention_dim": TEXT, "attention_head_dim": 8}  # fmt: skip


def unet(**changes) -> tuple[nn.Module, dict]:
    return UNet2DConditionModel(**SMALL | CROSS | changes), conditional()


def conditional() -> dict:
    return {"sample": torch.randn(2, 4, 16, 16), "timestep": 7, "encoder_hidden_states": torch.randn(2, 77, TEXT)}


def xl() -> tuple[nn.Module, dict]:
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    model = UNet2DConditionModel(**SMALL | CROSS | DEEP)
    return model, conditional() | {"added_cond_kwargs": added}


def control() -> tuple[nn.Module, dict]:
    model = ControlNetModel(
        **{k: v for k, v in (SMALL | CROSS).items() if k not in ("up_block_types", "sample_size")},
        conditioning_embedding_out_channels=(8, 16),
    )
    # its outputs are 0 until it is trained
    for block in (*model.controlnet_down_blocks, model.controlnet_mid_block):
        nn.init.normal_(block.weight, std=0.1)
    return model, conditional() | {"controlnet_cond": torch.randn(2, 3, 32, 32)}


def unconditional() -> tuple[nn.Module, dict]:
    model = UNet2DModel(
        **SMALL, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    )
    return model, {"sample": torch.randn(2, 3, 16, 16), "timestep": 3}


def autoencoder() -> tuple[nn.Module, dict]:
    model = AutoencoderKL(
        block_out_channels=(32, 64), norm_num_groups=8, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 3, 32, 32)}


MODELS = {
    "text to image": unet,
    "time as FiLM": lambda: unet(resnet_time_scale_shift="scale_shift"),
    "blocks that resample": lambda: unet(**RESAMPLING),
    "XL": xl,
    "control": control,
    "unconditional": unconditional,
    "autoencoder": autoencoder,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    made, inputs = MODELS[request.param]()
    # norms whose weights are 1 and 0 would hide who forgets them
    for module in made.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return made.eval(), inputs


def outputs(model: nn.Module, inputs: dict) -> torch.Tensor:
    found = model(**inputs, return_dict=False)
    return torch.cat([part.flatten() for part in (*found[0], found[1])] if len(found) == 2 else [found[0].flatten()])


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_the_same_numbers_in_the_same_object_and_back(model, tmp_path):
    model, inputs = model
    kind, names, stock = type(model), list(model.state_dict()), outputs(model, inputs)
    assert semantica.accelerate(model) is model
    assert type(model) is kind and list(model.state_dict()) == names
    assert all(isinstance(norm, FusedGroupNormSiLU) for name, norm in model.named_modules() if name.endswith("norm2")
               and isinstance(norm, nn.GroupNorm))  # fmt: skip
    fused = outputs(model, inputs)
    assert relative(fused, stock) < 1e-5
    # idempotent, and channels-last computes the same
    semantica.accelerate(model).to(memory_format=torch.channels_last)
    assert relative(outputs(model, inputs), stock) < 1e-5
    model.to(memory_format=torch.contiguous_format).save_pretrained(tmp_path)
    plain = kind.from_pretrained(tmp_path)
    assert not any(type(module).__module__.startswith("semantica") for module in plain.modules())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))
    semantica.restore(model)
    assert not any(type(module).__module__.startswith("semantica") for module in model.modules())
    assert torch.equal(outputs(model, inputs), stock)


@torch.no_grad()
def test_bf16_is_as_near_as_stock_is(model):
    model, inputs = model
    exact = outputs(model.double(), {k: double(v) for k, v in inputs.items()})
    half = {k: double(v, torch.bfloat16) for k, v in inputs.items()}
    stock = outputs(model.bfloat16(), half)
    fused = outputs(semantica.accelerate(model), half)
    semantica.restore(model).float()
    assert (fused - exact).norm() <= 1.5 * (stock - exact).norm()


def double(value, dtype=torch.float64):
    if isinstance(value, dict):
        return {name: double(part, dtype) for name, part in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def test_gradients_are_those_of_stock():
    torch.manual_seed(0)
    model, inputs = unet()
    gradients = []
    for change in (lambda m: m, semantica.accelerate):
        change(model).zero_grad()
        outputs(model, inputs).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(gradients[1], gradients[0]) < 1e-4


def test_every_norm_and_cross_attention_is_accounted_for(model):
    model, _ = model
    listed = {part.name for part in parts(model) if part.kind == "norm"}
    blocks = {part.name for part in parts(model) if part.kind == "residual block"}
    inside = {f"{name}.{norm}" for name in blocks for norm in ("norm1", "norm2")}
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    assert listed | inside == norms and not listed & inside
    crossing = {n for n, m in model.named_modules() if isinstance(m, Attention) and m.is_cross_attention}
    assert {part.name for part in parts(model) if part.kind == "cross-attention"} == crossing


@torch.no_grad()
@pytest.mark.parametrize("dim", [32, 64])
def test_streams_in_one_pass_are_what_processors_add(dim):
    torch.manual_seed(0)
    attn = Attention(query_dim=2 * dim, cross_attention_dim=TEXT, heads=2, dim_head=dim).eval()
    hidden, text, pictures = torch.randn(2, 50, 2 * dim), torch.randn(2, 77, TEXT), torch.randn(2, 1, 4, TEXT)
    adapter = IPAdapterAttnProcessor2_0(2 * dim, TEXT, num_tokens=(4, 4), scale=[0.7, 0.2])
    expected = adapter(attn, hidden, (text, [pictures, pictures + 1]))
    streams = [text_stream(attn, text)]
    for i, (factor, tokens) in enumerate(zip((0.7, 0.2), (pictures[:, 0], pictures[:, 0] + 1))):
        streams.append((adapter.to_k_ip[i](tokens), factor * adapter.to_v_ip[i](tokens)))
    assert relative(attend(attn, hidden, streams), expected) < 1e-5
    assert relative(attend(attn, hidden, streams[:1]), AttnProcessor2_0()(attn, hidden, text)) < 1e-5


def test_what_is_not_ours_stays_and_says_why():
    model, _ = unet(act_fn="gelu", block_out_channels=(24, 24), attention_head_dim=(2, 2))
    reasons = {part.kind: part.why for part in parts(model) if part.why}
    assert reasons == {
        "residual block": "its activation is GELU, not SiLU",
        "cross-attention": "head dim 12 is no multiple of 8 from 16 to 160",
    }
    model, _ = unet()
    model.set_attn_processor(AttnProcessor())
    add_hook_to_module(model.mid_block.resnets[0], ModelHook())
    found = {part.name: part.why for part in parts(model) if part.why}
    assert found.pop("mid_block.resnets.0") == "its forward was replaced by a hook"
    assert set(found.values()) == {"its processor is AttnProcessor"}
    semantica.accelerate(model)
    assert type(model.mid_block.attentions[0].transformer_blocks[0].attn2.processor) is AttnProcessor


class OverTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.temporal = nn.GroupNorm(1, 4), nn.Conv3d(4, 4, 1)


TINY = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,), "num_encoder_blocks": (1,),
        "num_decoder_blocks": (1,)}  # fmt: skip


@pytest.mark.parametrize("make, message", [
    (lambda: nn.Linear(2, 2), "Linear has no GroupNorm and no attention that could be fused"),
    (lambda: AutoencoderTiny(**TINY), "AutoencoderTiny has no GroupNorm"),
    (lambda: "a name", "str is neither a model nor a diffusers pipeline"),
    (OverTime, "OverTime has layers over time .temporal.: only models of pictures are fused"),
    (lambda: unet()[0].double(), "UNet2DConditionModel is in float64 on cpu: no kernel is there; use float32 or bfl"),
    (lambda: unet()[0].half(), "UNet2DConditionModel is in float16 on cpu: no kernel is there; use float32 or bfloat"),
])  # fmt: skip
def test_what_cannot_be_accelerated_is_one_line_and_stays_as_it_was(make, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target = make()
    with pytest.raises(UserError, match=message) as raised:
        semantica.accelerate(target)
    assert "\n" not in str(raised.value)
    modules = target.modules() if isinstance(target, nn.Module) else ()
    assert not any(type(module).__module__.startswith("semantica") for module in modules)


def test_what_may_be_moved_to_a_gpu_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(dispatch.SUPPORTED, ("group_norm", "cuda"), lambda first: first.dtype != torch.float64)
    model = unet()[0].half()
    assert all(part.fused for part in parts(semantica.accelerate(model)))


def test_foreign_processors_and_a_second_time_are_said_in_one_line(caplog):
    model, _ = unet()
    semantica.accelerate(model)
    assert not caplog.records
    semantica.accelerate(model)
    model.set_attn_processor(AttnProcessor())
    semantica.accelerate(semantica.restore(model))
    assert [record.getMessage() for record in caplog.records] == [
        "UNet2DConditionModel is accelerated already: nothing in it is left to be fused",
        "UNet2DConditionModel: 4 x self-attention as it was: its processor is AttnProcessor",
        "UNet2DConditionModel: 4 x cross-attention as it was: its processor is AttnProcessor",
    ]


@torch.no_grad()
@pytest.mark.parametrize("first", ["hook", "accelerate"])
def test_offloading_by_model_and_by_layer(first):
    torch.manual_seed(0)
    model, inputs = unet()
    stock = outputs(model, inputs)
    # as enable_model_cpu_offload does, with the CPU in the part of the device
    hook = {"hook": lambda: cpu_offload_with_hook(model, "cpu"), "accelerate": lambda: semantica.accelerate(model)}
    for step in sorted(hook, key=lambda name: name != first):
        hook[step]()
    assert all(part.fused for part in parts(model)) and relative(outputs(model, inputs), stock) < 1e-5
    remove_hook_from_module(semantica.restore(model), recurse=True)
    # as enable_sequential_cpu_offload: every layer's forward is replaced
    if first == "hook":
        cpu_offload(model, "cpu")
        with pytest.raises(UserError, match="could be fused"):
            semantica.accelerate(model.mid_block.resnets[0])
        remove_hook_from_module(model, recurse=True)
        # what the hooks leave behind is no hook
        assert relative(outputs(semantica.accelerate(model), inputs), stock) < 1e-5
    else:
        cpu_offload(semantica.accelerate(model), "cpu")
        assert relative(outputs(model, inputs), stock) < 1e-5
        with pytest.raises(UserError, match="has a hook that calls its fused form: remove the hooks first"):
            semantica.restore(model)
        assert relative(outputs(model, inputs), stock) < 1e-5
        remove_hook_from_module(model, recurse=True)
    assert torch.equal(outputs(semantica.restore(model), inputs), stock)


def test_pipelines_of_this_package_have_the_same_verb(small_run):
    pipeline = semantica.SemanticaPipeline.from_pretrained(small_run)
    assert semantica.accelerate(pipeline) is pipeline and pipeline.denoiser is not pipeline.unet
    assert semantica.restore(pipeline) is pipeline and pipeline.denoiser is pipeline.unet


def test_cross_attention_through_the_triton_kernels(interpreted):
    assert interpreted("interpreted/accelerate.py") > 0


@pytest.mark.slow
def test_whole_pipelines_through_the_triton_kernels(interpreted):
    assert interpreted("test_accelerate_pipelines.py", "-k", "same_pictures and (IP-Adapters or ControlNet)") > 0


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("blocks", [False, True])
def test_compiled_whole_or_by_block_without_a_break_in_the_graph(blocks):
    torch.manual_seed(0)
    model, inputs = unet()
    stock = outputs(model, inputs)
    semantica.accelerate(model).to(memory_format=torch.channels_last)
    for block in [*model.down_blocks, model.mid_block, *model.up_blocks] if blocks else [model]:
        block.compile(fullgraph=True, backend="aot_eager")
    assert relative(outputs(model, inputs), stock) < 1e-5


def test_processors_are_diffusers_own_for_isinstance():
    model, _ = unet()
    semantica.accelerate(model)
    cross = [m.processor for m in model.modules() if isinstance(m, Attention) and m.is_cross_attention]
    assert cross and all(type(processor) is FusedAttnProcessor for processor in cross)
    assert all(isinstance(processor, AttnProcessor2_0) for processor in cross)
