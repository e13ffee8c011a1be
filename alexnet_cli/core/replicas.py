"""The same weights in several processes, each with images of its own: torch's DistributedDataParallel.

The loss of a process is its images' share of the mean over the whole batch, so gradients are added, not averaged. What
crosses is sent in buckets while the backward pass goes on.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from alexnet_cli.core.network import Network
from alexnet_cli.core.process_group import ProcessMesh

Summed = torch.futures.Future[Tensor]


def replicated(network: Network, ranks: ProcessMesh, compress: bool) -> nn.Module:
    """The network with gradients added up over `ranks.group`; `compress` sends them as bf16.

    What is split over all ranks by columns, and so is nobody's replica, keeps its own. Parameters that learn nothing
    must say so before: whoever freezes one wraps the network anew. Where nobody's replica learns, it stays as it is.
    """
    assert ranks.group is not None
    apart = [name for name, _ in network.named_buffers()]  # each rank draws the dropout of its own images
    if ranks.columns is not None:
        apart += [name for name, _ in network.named_parameters() if name.startswith("fc")]
    if not set(trainable(network)) - set(apart):
        return network
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, apart)
    wrapped = DistributedDataParallel(
        network,
        process_group=ranks.group,
        init_sync=False,  # all have drawn the same initial values, or read the same file
        gradient_as_bucket_view=True,
    )
    layers: dict[Tensor, str] = {p: name.partition(".")[0] for name, p in network.named_parameters()}
    # Torch inspects what it is given and knows its own annotations only.
    wrapped.register_comm_hook(ranks, lambda state, bucket: _added(state, bucket, layers, compress))
    return wrapped


def _added(ranks: ProcessMesh, bucket: GradBucket, layers: dict[Tensor, str], compress: bool) -> Summed:
    """The sum of a bucket's gradients over replicas, when it is there."""
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16) if compress else gradients
    for parameter in bucket.parameters():
        size = parameter.numel() * sent.element_size()
        ranks.traffic[f"{layers[parameter]} gradients"] += 2 * size * (ranks.replicas - 1) // ranks.replicas
    summed: Summed = dist.all_reduce(sent, group=ranks.group, async_op=True).get_future()

    def received(done: Summed) -> Tensor:
        value: Tensor = done.value()[0]
        return gradients.copy_(value) if compress else value

    return summed.then(received)


def trainable(network: nn.Module) -> list[str]:
    """The parameters that learn: with others, gradients are exchanged in another way."""
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]
