"""Data parallelism: the same weights in several processes, with torch's DistributedDataParallel.

Each process divides its loss by the size of the whole batch, so gradients are summed, not averaged. They are sent in
buckets during the backward pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from alexnet_cli.core.model.network import Network
from alexnet_cli.core.parallel.process_group import ProcessMesh

TensorFuture = torch.futures.Future[Tensor]


def wrap_ddp(network: Network, ranks: ProcessMesh, compress: bool) -> nn.Module:
    """Wrap the network so that gradients are summed over `ranks.group`; `compress` sends them as bf16.

    Layers that are split over all ranks (hybrid) are left out. Wrap the network again after parameters are frozen.
    Returns the network itself if no replicated parameter is trainable.
    """
    assert ranks.group is not None
    ignored = [name for name, _ in network.named_buffers()]  # each rank has the dropout state of its own images
    if ranks.columns is not None:
        ignored += [name for name, _ in network.named_parameters() if name.startswith("fc")]
    if not set(trainable_names(network)) - set(ignored):
        return network
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, ignored)
    wrapped = DistributedDataParallel(
        network,
        process_group=ranks.group,
        init_sync=False,  # all ranks draw the same initial values, or read the same file
        gradient_as_bucket_view=True,
    )
    layers: dict[Tensor, str] = {p: name.partition(".")[0] for name, p in network.named_parameters()}
    # A lambda, since torch checks the annotations of a hook and knows only its own types.
    wrapped.register_comm_hook(ranks, lambda state, bucket: _sum_bucket(state, bucket, layers, compress))
    return wrapped


def _sum_bucket(ranks: ProcessMesh, bucket: GradBucket, layers: dict[Tensor, str], compress: bool) -> TensorFuture:
    """Start to sum a bucket's gradients over replicas. Returns the future of the sum."""
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16) if compress else gradients
    for parameter in bucket.parameters():
        size = parameter.numel() * sent.element_size()
        ranks.traffic[f"{layers[parameter]} gradients"] += 2 * size * (ranks.replicas - 1) // ranks.replicas
    summed: TensorFuture = dist.all_reduce(sent, group=ranks.group, async_op=True).get_future()

    def unpack(done: TensorFuture) -> Tensor:
        done.value()  # raises the error of an exchange that failed
        return gradients.copy_(sent) if compress else sent

    return summed.then(unpack)


def trainable_names(network: nn.Module) -> list[str]:
    """The names of the trainable parameters. If they change, the network must be wrapped again."""
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]
