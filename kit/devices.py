"""Several devices, and the one in use: CPU, CUDA, MPS, XLA. Only here and in the book's section on
devices are they named.

There are two ways to use several. torchrun starts one process for each; every process takes its
part of the global batch and DistributedDataParallel averages the gradients. XLA on a TPU needs one
process for all its cores: arrays are marked as split along the batch, and the compiler puts the
communication in (GSPMD, Xu et al. 2021, arXiv 2105.04663).
"""
from __future__ import annotations

import gc
import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import brainsyn as bs


DEVICES = ("auto", "cpu", "cuda", "mps", "xla")
PRECISIONS = ("auto", "float32", "bfloat16")


def pick_device(name="auto", several=False):
    """"auto", "cpu", "cuda", "mps" or "xla" -> torch.device. auto takes the fastest of the first
    three; a device asked for by name that is not there is a BadInput, never a silent fall-back.

    several: whether the caller can share its work with other processes. Under torchrun they are
    joined here, each with a GPU of its own; only the first one prints from now on.
    """
    if name == "xla":
        return pick_xla()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there.get(name):
        raise bs.BadInput(f"--device {name}: PyTorch {torch.__version__} finds no such device "
                          "here; use --device auto")
    if name == "cpu":
        torch.set_flush_denormal(True)          # tiny numbers cost time and mean nothing
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(name)
    number = int(os.environ["LOCAL_RANK"])
    if not several:
        raise bs.BadInput("this command runs in one process; start it with python, not with "
                          "torchrun")
    if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise bs.BadInput("the processes of torchrun must be on one machine; start it there alone")
    if name == "mps":
        raise bs.BadInput("--device mps drives one GPU; start it with python, or give --device cpu")
    if name == "cuda" and number >= torch.cuda.device_count():
        raise bs.BadInput(f"--device cuda: no GPU here for process {number + 1}; start fewer, or "
                          "give --device cpu")
    if name == "cuda":
        torch.cuda.set_device(number)
    # the others wait while the first one makes phantoms, a cache, pictures: however long that takes
    dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo",
                            timeout=timedelta(days=7))
    if not first_process():
        sys.stdout = open(os.devnull, "w")
    return torch.device(name, number) if name == "cuda" else torch.device(name)


def pick_xla():
    """The XLA device, standing for all devices of this machine together (SPMD). BadInput without
    torch_xla or without a TPU; PJRT_DEVICE=CPU in the environment asks for XLA on the CPU."""
    asked = os.environ.get("PJRT_DEVICE")       # torch_xla sets it itself where it is not set
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise bs.BadInput("--device xla drives all devices from one process; start it with python, "
                          "not with torchrun")
    try:
        import torch_xla
        import torch_xla.runtime as xr
        xr.use_spmd()
        device, found = torch_xla.device(), xr.device_type()
        # asks for the devices, which are not looked for before
        xla_devices()
    except ImportError as error:
        raise bs.BadInput(f"--device xla: torch_xla cannot be imported ({str(error).splitlines()[0]}); "
                       "pip install -r requirements-tpu.txt") from error
    except (RuntimeError, OSError) as error:
        raise bs.BadInput(f"--device xla: XLA cannot use a {asked or 'TPU'} here "
                          f"({str(error).splitlines()[0]}); on a TPU machine pip install -r "
                          "requirements-tpu.txt") from error
    if xr.process_count() > 1:
        raise bs.BadInput("--device xla drives the devices of one machine; a pod of several is not "
                          "supported")
    if found == "CPU" and asked != "CPU":
        raise bs.BadInput("--device xla: there is no TPU here; PJRT_DEVICE=CPU in front of the "
                          "command runs XLA on the CPU")
    return device


def describe(device, precision="auto"):
    """The device really used, for the first line of a log: "device cpu x 2, float32". precision: of
    PRECISIONS."""
    name, count = device.type, bs.processes()
    if name == "cuda":
        name = f"cuda ({torch.cuda.get_device_name(device)})"
    if name == "xla":
        import torch_xla.runtime as xr
        name, count = f"xla ({xr.device_type()})", xla_devices()
    return f"device {name}{f' x {count}' if count > 1 else ''}, " + (
        "bfloat16" if bs.uses_bf16(device, precision) else "float32")


def rank():
    """Which of them this one is, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_process():
    """Whether this process is the one that prints, writes and draws."""
    return rank() == 0


def leave_processes():
    """Part from the others when training is over -> whether this was the first process, which goes
    on alone.

    Nobody may hold the network of prepare_training any more: DistributedDataParallel that outlives
    its group can crash on the way out."""
    first = first_process()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    return first


def share_of(batch):
    """Which samples of a global batch this process works on: a slice."""
    mine = batch // bs.processes()
    return slice(rank() * mine, (rank() + 1) * mine)


def require_divisible(batch, device):
    """BadInput unless a global batch divides evenly: unequal parts would not count the same in a
    mean."""
    count = xla_devices() if device.type == "xla" else bs.processes()
    if batch % count:
        raise bs.BadInput(f"--batch {batch}: does not divide evenly over {count} devices; choose a "
                          f"multiple of {count}")


def in_turn(make):
    """make() in the first process alone and then in all others, who find on disk what it wrote."""
    if first_process():
        made = make()
    if bs.processes() > 1:
        dist.barrier()
    return made if first_process() else make()


def agreed(value):
    """The first process's number, in all of them: clocks differ, and all must stop at the same
    step."""
    if bs.processes() == 1:
        return value
    told = torch.tensor(float(value), dtype=torch.float64)
    dist.broadcast(told, 0)
    return told.item()


def gathered(tensor):
    """tensor (B / processes, ...) of every process -> (B, ...) in the order of the global batch."""
    if bs.processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(bs.processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class BatchNorm(nn.BatchNorm2d):
    """x (B, C, H, W) -> (x - mean) / sqrt(variance + eps) * weight + bias for each channel [BN].
    While training, mean and variance (sum / n) are those of all n values in the global batch, and
    running_mean and running_var move towards mean and variance n / (n - 1) by the share `momentum`;
    in evaluation those are used.

    Written out for several processes, since torch's own sees only the share of one, and for XLA,
    whose running variance lacks the factor n / (n - 1)."""

    def forward(self, x):
        if not self.training or bs.processes() == 1 and x.device.type != "xla":
            return super().forward(x)
        n = x.numel() // x.shape[1] * bs.processes()
        mean = bs.all_sum(x.float().mean((0, 2, 3))) / bs.processes()
        centred = x.float() - mean.view(-1, 1, 1)
        variance = bs.all_sum((centred ** 2).mean((0, 2, 3))) / bs.processes()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


def xla_devices():
    """How many devices XLA drives: the cores of a TPU, or virtual ones of the CPU."""
    import torch_xla.runtime as xr
    return xr.global_runtime_device_count()


def xla_sharding(axes, split):
    """How XLA shall lay out an array of so many axes: split along the first one, or whole on every
    device -> (mesh of all devices, the mesh's axis or None for each axis of the array)."""
    import torch_xla.distributed.spmd as xs
    mesh = xs.Mesh(np.arange(xla_devices()), (xla_devices(),), ("batch",))
    return mesh, ("batch", *[None] * (axes - 1)) if split else (None,) * axes


def to_device(device, *tensors):
    """The tensors (B, ...), on the device; on XLA split along the batch over all of them, or whole
    on each where their number does not divide B."""
    if device.type != "xla":
        return bs.copy_to(device, *tensors)
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as xs
    return [xm.send_cpu_data_to_device([tensor], device, xs.ShardingSpec(
        *xla_sharding(tensor.ndim, len(tensor) % xla_devices() == 0)))[0] for tensor in tensors]


def to_host(tree):
    """A tensor, or a dict or list of them (nested, other values among them), with every tensor on
    the CPU and detached. From XLA all come in one transfer: one by one, each waits for the one
    before."""
    if "torch_xla" in sys.modules:              # else there is nothing of it to move
        import torch_xla.core.xla_model as xm
        # not a public name: without it, one by one
        at_once = getattr(xm, "_maybe_convert_to_cpu", None)
        tree = at_once(tree) if at_once else tree
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: to_host(value) for key, value in tree.items()}
    return type(tree)(to_host(value) for value in tree) if isinstance(tree, (list, tuple)) else tree


def place_network(net, device):
    """net on the device, its weights laid out channels last, as convolutions like it; on XLA whole
    on every one."""
    if device.type != "xla":
        return net.to(device, memory_format=torch.channels_last)
    net = net.to(device)
    mark_whole([*net.parameters(), *net.buffers()])
    return net


def mark_whole(tensors):
    """Tell XLA that every device holds these tensors whole, before a graph is made that would guess
    it."""
    import torch_xla
    import torch_xla.distributed.spmd as xs
    for tensor in tensors:
        xs.mark_sharding(tensor, *xla_sharding(tensor.ndim, split=False))
    torch_xla.sync()


def prepare_training(net, optimizer, device, compiled=False):
    """What a training loop calls in place of net, whose parameters it shares: with gradients
    averaged over processes, or through torch.compile. Call it once net and optimizer hold what they
    start from.

    BadInput for torch.compile on XLA.
    """
    if bs.processes() > 1 or device.type == "xla":
        # as nn.SyncBatchNorm is put in place, with the parameters it has
        for module in net.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm
    if device.type == "xla":
        if compiled:
            raise bs.BadInput("--compile: XLA compiles by itself; leave it out")
        mark_whole([its for state in optimizer.state.values() for its in state.values()])
    if bs.processes() > 1:
        net = nn.parallel.DistributedDataParallel(net, [device.index] if device.type == "cuda"
                                                  else None)
    return torch.compile(net) if compiled else net


def step_if_finite(device, optimizer, losses, norm):
    """optimizer.step() where all losses (B,) and the norm of all gradients are finite -> whether
    they are: bool tensor (). Where they are not, weights and the optimiser's state stay as they
    are, in every process.

    On XLA both outcomes are computed and one is chosen, so that the graph is the same.
    """
    finite = losses.isfinite().all() & norm.isfinite()
    if bs.processes() > 1:
        flag = finite.int()
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        finite = flag > 0
    if device.type != "xla":
        if finite:
            optimizer.step()
        return finite
    with torch.no_grad():
        kept = [p for group in optimizer.param_groups for p in group["params"]]
        kept += [its for state in optimizer.state.values() for its in state.values()]
        before = [tensor.clone() for tensor in kept]
        optimizer.step()
        for tensor, old in zip(kept, before):
            tensor.copy_(torch.where(finite, tensor, old))
    return finite


def end_step(device, *read):
    """On XLA everything since the last call becomes one graph and is run; elsewhere it has run
    already. read: tensors that will be looked at later, which the graph then gathers from all
    devices."""
    if device.type == "xla":
        mark_whole(read)


def xla_report():
    """What XLA did so far, in words; "" where it was not used. Ops it cannot compile run on the CPU
    instead and cut a graph in two."""
    if "torch_xla" not in sys.modules:
        return ""
    import torch_xla.debug.metrics as met
    count, nanoseconds, *_ = met.metric_data("CompileTime") or (0, 0)
    fallen = sorted(name for name in met.counter_names() if name.startswith("aten::"))
    return (f"XLA compiled {count} graphs in {nanoseconds / 1e9:.1f} s; run on the CPU instead: "
            + (", ".join(fallen) or "nothing"))
