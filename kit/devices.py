"""Several devices, and the one in use: CPU, CUDA, MPS, XLA. Only this module and the book's section
on devices name them.

There are two ways to use several. torchrun starts one process for each; every process takes its
part of the global batch and DistributedDataParallel averages the gradients. XLA on a TPU needs one
process for all its cores: arrays are marked as split along the batch, and the compiler inserts the
communication (GSPMD, Xu et al. 2021, arXiv 2105.04663).

SOURCES
    [BN]      batch normalisation: Ioffe & Szegedy 2015, arXiv 1502.03167
              Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
              Shift
"""
import gc
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

import brainsyn as bs

DEVICES = ("auto", "cpu", "cuda", "mps", "xla")
PRECISIONS = ("auto", "float32", "bfloat16")


# ------------------------------------------------------------------------------ which device ---

def pick_device(name="auto", several=False):
    """A name of DEVICES -> torch.device. auto takes the first available of cuda, mps and cpu; a
    device asked for by name that is not available is a BadInput, never a silent fall-back.

    several: whether the command can share its work with other processes; without, it is a BadInput
    to start it with torchrun.
    """
    there = [k for k in ("cuda", "mps", "cpu") if torch.get_device_module(k).is_available()]
    name = there[0] if name == "auto" else name
    if name not in (*there, "xla"):             # pick_xla looks for that
        raise bs.BadInput(f"--device {name}: PyTorch finds none here; use --device auto")
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not alone and (not several or name in ("mps", "xla")):
        raise bs.BadInput(f"with --device {name} start this command with python, not torchrun")
    if name == "xla":
        return pick_xla()
    if name == "cpu":
        torch.set_flush_denormal(True)          # tiny numbers cost time and mean nothing
    return torch.device(name) if alone else join_processes(name)


def join_processes(name):
    """Join the processes that torchrun started -> this process's torch.device, "cpu" or one of
    "cuda". Only the first process prints from then on. BadInput where there are too few GPUs or
    several machines."""
    rank, count = [int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    few = name == "cuda" and count > torch.cuda.device_count()
    if few or count != int(os.environ["WORLD_SIZE"]):
        raise bs.BadInput("let torchrun start one process a GPU, all on one machine")
    device = torch.device(f"cuda:{rank}" if name == "cuda" else "cpu")
    torch.get_device_module(name).set_device(device)
    # phantoms, a cache or pictures of the first process take as long as they take: the others wait
    backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))
    if not first_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")
    return device


def pick_xla():
    """The XLA device, which stands for all devices of this machine together (SPMD). BadInput
    without torch_xla or a TPU; PJRT_DEVICE=CPU in the environment asks for XLA on the CPU."""
    asked = os.environ.get("PJRT_DEVICE", "TPU")        # torch_xla sets it where it is not set
    try:
        import torch_xla.backends
        import torch_xla.runtime as xr
        xr.use_spmd()
        if xr.process_count() > 1 or xr.device_type() == "CPU" != asked:
            raise RuntimeError("there is no TPU that one machine drives")
        # otherwise a TPU multiplies float32 in bfloat16: too rough for orthogonal
        torch_xla.backends.set_mat_mul_precision("highest")
        return torch_xla.device()
    except (ImportError, RuntimeError, OSError) as error:
        fault = str(error).splitlines()[0]
        raise bs.BadInput(f"--device xla on {asked}: {fault}; see requirements-tpu.txt") from error


def describe(device, precision="auto"):
    """The device in use, for the first line of a log: "device cpu x 2, float32". precision: of
    PRECISIONS."""
    chip = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    times = f" x {device_count(device)}" if device_count(device) > 1 else ""
    layers = "bfloat16" if bs.uses_bf16(device, precision) else "float32"
    return f"device {device.type}{chip}{times}, {layers}"


def device_count(device):
    """How many devices share a batch."""
    return xla_devices() if device.type == "xla" else bs.processes()


def require_divisible(batch, device):
    """BadInput unless a global batch divides evenly over the devices: in a mean of means, unequal
    parts would not count the same."""
    if batch % device_count(device):
        raise bs.BadInput(f"--batch {batch} must be a multiple of {device_count(device)} devices")


# -------------------------------------------------------------------------- several processes ---

def first_process():
    """True in the process that prints, writes and samples."""
    return not dist.is_initialized() or dist.get_rank() == 0


def first_to_fail():
    """True in the process that may say why a run ends: of several the first that asks. The others
    fail with it, or because of it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":        # started without torchrun
        return os.environ.get("RANK", "0") == "0"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          wait_for_workers=False)
    return store.add("brainsyn failed", 1) == 1


def slice_of_batch(batch):
    """The slice of a global batch that this process works on."""
    size = batch // bs.processes()
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(rank * size, (rank + 1) * size)


def first_process_first(make):
    """make() in the first process and then in all others, which find on disk what it wrote ->
    what make() returns."""
    result = make() if first_process() else None
    broadcast_from_first(0)                     # the others wait for it
    return result if first_process() else make()


def broadcast_from_first(value):
    """The first process's number, in all processes: clocks differ, and all must stop at the same
    step."""
    number = torch.tensor(float(value), dtype=torch.float64)
    if bs.processes() > 1:
        dist.broadcast(number, 0)
    return number.item()


def all_gather(tensor):
    """tensor (B / processes, ...) of every process -> (B, ...) in the order of the global batch."""
    return torch.cat(dist.nn.functional.all_gather(tensor)) if bs.processes() > 1 else tensor


def leave_processes():
    """End the sharing of work after training -> True in the first process, which goes on alone.

    No variable may refer to the network of prepare_training any more: DistributedDataParallel that
    outlives its group can crash at exit.
    """
    first = first_process()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    return first


class BatchNorm(nn.BatchNorm2d):
    """x (B, C, H, W) -> (x - mean) / sqrt(variance + eps) * weight + bias for each channel [BN].
    In training, mean and variance (sum / n) are over all n values in the global batch, and
    running_mean and running_var move towards mean and variance n / (n - 1) by the fraction
    `momentum`; in evaluation those are used.

    Written out for several processes, since torch's sees one process's part of the batch, and for
    XLA, whose running variance lacks the factor n / (n - 1).
    """

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


# --------------------------------------------------------------------- tensors to and from it ---

def xla_devices():
    """How many devices XLA drives: the cores of a TPU, or virtual ones of the CPU."""
    import torch_xla.runtime as xr
    return xr.global_runtime_device_count()


def lay_out(tensors, split=False):
    """Tell XLA how tensors lie on its devices: whole on each; or split along the first axis, where
    their number divides it."""
    import torch_xla.distributed.spmd as xs
    mesh = xs.get_1d_mesh("batch")              # all devices, in a row
    for tensor in tensors:
        first = "batch" if split and len(tensor) % mesh.size() == 0 else None
        xs.mark_sharding(tensor, mesh, (first, *[None] * tensor.ndim)[:tensor.ndim])


def to_device(device, *tensors):
    """The tensors (B, ...), on the device; on XLA split along the batch over all devices, or whole
    on each where their number does not divide B."""
    moved = bs.copy_to(device, *tensors)
    if device.type == "xla":
        lay_out(moved, split=True)
    return moved


def to_host(tree):
    """A tensor, or a dict or list of tensors (nested, other values among them), with every tensor
    on the CPU and detached. From XLA all come in one transfer: single transfers wait for each
    other."""
    if "torch_xla" in sys.modules:              # otherwise no tensor is on XLA
        import torch_xla.core.xla_model as xm
        # not a public name: without it, one transfer a tensor
        tree = getattr(xm, "_maybe_convert_to_cpu", lambda tree: tree)(tree)
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: to_host(value) for key, value in tree.items()}
    return type(tree)(to_host(value) for value in tree) if isinstance(tree, (list, tuple)) else tree


def place_network(net, device):
    """net on the device: weights laid out channels last, which convolutions prefer; on XLA whole on
    every device."""
    form = torch.preserve_format if device.type == "xla" else torch.channels_last
    net = net.to(device, memory_format=form)
    end_step(device, *net.parameters(), *net.buffers())
    return net


# ------------------------------------------------------------------------------ training step ---

def prepare_training(net, optimizer, device):
    """The network that a training loop calls in place of net, whose parameters it shares: of
    several processes it averages the gradients. Batch norms become those of the global batch. Call
    it once net and optimizer hold what they start from."""
    # as nn.SyncBatchNorm is put in place, with the parameters it has
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm
    end_step(device, *state_of(optimizer))
    return nn.parallel.DistributedDataParallel(net) if bs.processes() > 1 else net


def state_of(optimizer):
    """All tensors of an optimiser's state, as a list."""
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


def step_if_finite(device, optimizer, losses, norm):
    """optimizer.step() if all losses (B,) and the norm of all gradients are finite -> whether they
    are, a bool, the same in every process. If not, weights and the optimiser's state stay as they
    are.

    On XLA a step is two graphs: losses, gradients and norm; then, if they are finite, the weights.
    """
    finite = losses.isfinite().all() & norm.isfinite()
    finite = bs.all_sum((~finite).float()) == 0
    end_step(device, losses, finite)
    finite = bool(to_host(finite))
    if finite:
        optimizer.step()
    return finite


def end_step(device, *read):
    """On XLA: compile and run all operations since the last call as one graph. read: tensors that
    will be used later, which from then on every device holds whole, lest the compiler guess.
    Elsewhere: nothing."""
    if device.type == "xla":
        import torch_xla
        lay_out(read)
        torch_xla.sync()


def result_to_host(tensor):
    """A network's output, on the CPU; on XLA its graph ends here, the same graph in every call."""
    end_step(tensor.device, tensor)
    return tensor.cpu()


def xla_report():
    """Print what XLA did so far; nothing where it was not used. Operations that it cannot compile
    run on the CPU instead and cut a graph in two."""
    if "torch_xla" not in sys.modules:
        return
    import torch_xla.debug.metrics as met
    count, ns, *_ = met.metric_data("CompileTime") or (0, 0)
    slow = ", ".join(name for name in met.counter_names() if name.startswith("aten::"))
    print(f"XLA compiled {count} graphs in {ns / 1e9:.1f} s; run on the CPU: {slow or 'nothing'}")
