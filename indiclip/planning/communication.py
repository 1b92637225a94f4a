"""How long ranks exchange gradients, weights and embeddings in a step, from the bandwidths of the links.

Sizes are bytes. A ring all-gather or reduce-scatter of S bytes over n ranks sends (n - 1) / n of S over each link, an
all-reduce twice that (Patarasuk and Yuan, JPDC 2009; as nccl-tests counts its bus bandwidth). Across nodes of g GPUs
with a network adapter each, NCCL makes g rings, each of which leaves a node through another adapter and carries S / g;
the part inside the node runs at the same time, and the slower of the two counts.
"""

from dataclasses import dataclass

from indiclip.planning.hardware import Device, Strategy
from indiclip.planning.memory import Weights


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them.

    Attributes:
        device: Of which all are.
        nodes: Machines.
        gpus_per_node: Of each.
        link_share: Share of the links' bandwidth that is reached.
    """

    device: Device
    nodes: int
    gpus_per_node: int
    link_share: float = 1.0

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    def gather_seconds(self, size: float) -> float:
        """An all-gather or a reduce-scatter over all GPUs; `size` is of the whole, not of a rank's part."""
        sent = size * (self.world - 1) / self.world
        inside = sent / self._rate(self.device.nvlink_gbs) if self.gpus_per_node > 1 else 0.0
        between = sent / self.gpus_per_node / self._rate(self.device.nic_gbs) if self.nodes > 1 else 0.0
        return max(inside, between)

    def reduce_seconds(self, size: float) -> float:
        """An all-reduce over all GPUs."""
        return 2 * self.gather_seconds(size)

    @property
    def node(self) -> "Cluster":
        """One of the nodes."""
        return Cluster(self.device, 1, self.gpus_per_node, self.link_share)

    @property
    def replicas(self) -> "Cluster":
        """The GPUs of one number, one in each node: HSDP's ranks with the same shard. Each has its own adapter."""
        return Cluster(self.device, self.nodes, 1, self.link_share)

    def _rate(self, gbs: float) -> float:
        return gbs * 1e9 * self.link_share


@dataclass(frozen=True)
class Traffic:
    """Seconds of a step's exchange.

    Attributes:
        weights: Shards that are gathered for one pass, forward or backward.
        gradients: That are reduced; of PCGrad each head's too, at most: as if all heads reached all that is trained.
        loss: Embeddings of all ranks, and their gradients.
        tail: Of `gradients`, what comes when the last of them is there, so that nothing can hide it.
        ahead: Shards that are gathered once, before both passes, so that nothing can hide it.
    """

    weights: float
    gradients: float
    loss: float
    tail: float
    ahead: float = 0.0

    @property
    def total(self) -> float:
        return self.ahead + 2 * self.weights + self.gradients + self.loss

    def exposed(self, forward_seconds: float, backward_seconds: float) -> float:
        """What the step waits for: the rest of what does not hide behind the computation of the same pass.

        The first block of a pass cannot be gathered in advance; that is small, and left out.
        """
        hidden_forward = min(self.weights, forward_seconds)
        hidden_backward = min(self.weights + self.gradients - self.tail, backward_seconds)
        return self.total - hidden_forward - hidden_backward


_BUCKET = 25 * 2**20  # bytes of DDP's buckets (torch's default)


def traffic(cluster: Cluster, strategy: Strategy, weights: Weights, embeddings: float, computes_in: int = 4) -> Traffic:
    """Seconds of a step's exchange.

    Gradients are reduced in float32, as DDP does, and FSDP2 with a `reduce_dtype` of float32.

    Args:
        cluster: Where it runs.
        strategy: How ranks share the weights.
        weights: From `weigh`.
        embeddings: Bytes of the embeddings that a contrastive loss gathers, of all ranks.
        computes_in: Bytes of a number in which sharded weights are gathered.
    """
    if cluster.world == 1:
        return Traffic(0, 0, 0, 0)
    loss = 2 * cluster.gather_seconds(
        embeddings
    )  # gathered on the way forward, their gradients reduced on the way back
    gradients, gathered = weights.trained, weights.total / 4 * computes_in
    last = weights.largest_block or gradients
    if strategy == "ddp":
        gather, reduce = 0.0, cluster.reduce_seconds(gradients)
        tail = cluster.reduce_seconds(min(_BUCKET, gradients))
    elif strategy == "fsdp":
        gather, reduce = cluster.gather_seconds(gathered), cluster.gather_seconds(gradients)
        tail = cluster.gather_seconds(last)
    else:
        node, replicas, share = cluster.node, cluster.replicas, 1 / cluster.gpus_per_node
        gather = node.gather_seconds(gathered)
        reduce = node.gather_seconds(gradients) + replicas.reduce_seconds(gradients * share)
        tail = node.gather_seconds(last) + replicas.reduce_seconds(last * share)
    if weights.separate_heads:  # each head's are reduced, then the sum, and all passes were made before
        reduce = tail = reduce + weights.separate_heads * cluster.reduce_seconds(gradients)
    if weights.stay_gathered:
        return Traffic(0.0, reduce, loss, tail, ahead=gather)
    return Traffic(gather, reduce, loss, tail)
