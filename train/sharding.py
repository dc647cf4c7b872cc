"""What is put around a model in several processes: DDP copies it to each, FSDP2 and HSDP split it among them.

The model itself knows of none of this. `parallelize` chooses; what one process does is the base class.
"""

import copy
import functools
import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from semantica.model.compile import repeated
from semantica.model.layers import CrossAttention
from semantica.model.pretrained import PretrainedEncoder
from semantica.train.objective import Objective
from semantica.train.processes import World

# it is asked for where there are none, see `DataParallel.wrap`
warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")


class Whole:
    """Every process has the whole model; here there is only one."""

    def __init__(self, world: World, device: torch.device, dtype: torch.dtype):
        self.device = device
        # where the model is made, and under which context
        self.built_on, self.building = device, nullcontext

    def copies(self, module: nn.Module, count: int) -> list[nn.Module]:
        """So many frozen copies of a module; where processes split a model, the module and its copies are split."""
        return twins(module, count)

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective that is called in training."""
        return objective

    def micro_batch(self, objective: nn.Module, last: bool) -> AbstractContextManager:
        """For the part of a batch that is computed within: gradients are reduced over the processes after the last
        part only."""
        return nullcontext()

    def place(self, images: Any) -> Any:
        """Images `[B, 3, S, S]` as the first convolution should see them, also by name; anything else as it is.

        Here the weights' own channels-last layout decides the layout of what follows.
        """
        return images


class DataParallel(Whole):
    """DDP: a copy of the model in each process, gradients are averaged."""

    def wrap(self, objective: Objective) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        # nothing in the model changes its buffers; the option has another name from PyTorch 2.13 on
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        # sums of three processes and more depend on places in buckets. Buckets that are built anew after the first step
        # are not those of a run that goes on there; where any parameter might be unused, none are built anew
        same = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        foreign = any(isinstance(module, PretrainedEncoder) and module.trainable for module in objective.modules())
        # it takes no module on two devices: the frozen encoder of stored tokens stays on the CPU, and does not run
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            objective, elsewhere(objective, self.device)
        )
        return DistributedDataParallel(
            objective,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **{buffers: False},
            gradient_as_bucket_view=True,
            # an encoder that is trained along, but conditions nothing, and heads of one that came from elsewhere
            find_unused_parameters=same or not objective.unet.stream_names and objective.head is None or foreign,
        )

    def micro_batch(self, objective: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext() if last else objective.no_sync()


class FullySharded(Whole):
    """FSDP2: each process holds a part of every weight, of its average and of its moments.

    Each repeated block is a group that is gathered for its own forward and backward pass; all keys' and values'
    projections are one more, since `UViT.condition` uses them at once; the rest is the root's.

    With bf16, weights are gathered in bf16 and gradients summed in fp32. Norm weights are rounded as well, a relative
    2^-9, since to gather them apart would cost a collective each; their statistics are fp32 in the operators whatever
    the weights are. Inputs are not cast: noise levels and latents stay fp32, and autocast decides for each operation
    as it does in one process.
    """

    def __init__(self, world: World, device: torch.device, dtype: torch.dtype):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        super().__init__(world, device, dtype)
        # no device has to hold the model whole, and of the processes only the first, whose values the others get
        self.built_on, self.lead = torch.device("cpu"), world.is_main
        if not self.lead:
            from accelerate import init_empty_weights

            self.building = functools.partial(init_empty_weights, include_buffers=False)
        types = {} if dtype == torch.float32 else {"param_dtype": dtype, "reduce_dtype": torch.float32}
        policy = MixedPrecisionPolicy(**types, cast_forward_inputs=False)
        within = world.local_size if world.mode == "hsdp" else world.size
        if within == world.size:
            mesh = init_device_mesh(device.type, (world.size,))
        else:
            # rows of copies, and columns of parts
            mesh = init_device_mesh(device.type, (world.size // within, within), mesh_dim_names=("copy", "part"))
        self.options = {"mesh": mesh, "mp_policy": policy}

    def copies(self, module: nn.Module, count: int) -> list[nn.Module]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        # others receive bytes in the order of contiguous tensors
        whole = {key: t.contiguous() for key, t in module.state_dict().items()} if self.lead else {}
        empty(module)
        made = twins(module, count)
        for each in (module, *made):
            self.shard(each)
            materialize(each, self.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, whole, options=options)
        with torch.no_grad():
            for each in made:
                for own, value in zip(each.parameters(), module.parameters(), strict=True):
                    local(own).copy_(local(value))
        return made

    def shard(self, module: nn.Module) -> None:
        """Split a module among the processes, in place."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # FSDP2 knows contiguous parameters only; activations keep channels last, see `place`
        module.to(memory_format=torch.contiguous_format)
        crossing = [m for m in module.modules() if isinstance(m, CrossAttention)]
        projections = [part for m in crossing for part in (*m.to_kv, *m.norm_k)]
        if projections:
            fully_shard(projections, **self.options)
        for block in repeated(module):
            fully_shard(block, **self.options)
        # in training the root stays gathered until its gradients are there; averages have none, and must be
        # gathered again after they have changed
        frozen = not any(p.requires_grad for p in module.parameters())
        fully_shard(module, **self.options, reshard_after_forward=True if frozen else None)
        for name in ("condition", "null"):
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)

    def micro_batch(self, objective: nn.Module, last: bool) -> AbstractContextManager:
        from torch.distributed.fsdp import FSDPModule

        # an encoder may be one of several
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last)
        return nullcontext()

    def place(self, images: Any) -> Any:
        if isinstance(images, dict):
            return {name: self.place(value) for name, value in images.items()}
        flat = isinstance(images, Tensor) and images.ndim == 4
        return images.to(memory_format=torch.channels_last) if flat else images


KINDS = {None: Whole, "ddp": DataParallel, "fsdp": FullySharded, "hsdp": FullySharded}


def parallelize(world: World, device: torch.device, dtype: torch.dtype) -> Whole:
    """What `--parallel` asks for."""
    return KINDS[world.mode](world, device, dtype)


def twins(module: nn.Module, count: int) -> list[nn.Module]:
    """Copies that are not trained."""
    return [copy.deepcopy(module).requires_grad_(False).eval() for _ in range(count)]


def elsewhere(module: nn.Module, device: torch.device) -> list[str]:
    """Names of parameters and buffers that are not on a device."""
    return [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.device != device]


def empty(module: nn.Module) -> None:
    """Take the values of a module's parameters, in place; buffers, which follow from its configuration, keep theirs."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Memory for parameters that have none yet, and buffers, on a device."""
    buffers = dict(module.named_buffers())
    module.to_empty(device=device)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


def is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(module: nn.Module, world: World) -> nn.Module | None:
    """A sharded module's whole twin on the CPU of the main process, None on the others; others as they are."""
    if not any(is_sharded(p) for p in module.parameters()):
        return module
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    weights = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not world.is_main:
        return None
    # sharding made a subclass of the module's own class
    kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    twin = kind.from_config(module.config)
    twin.load_state_dict(weights)
    return twin.eval()
