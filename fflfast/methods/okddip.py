"""OKDDip, diverse peers and a leader: attention gives each peer a teacher of its own, the peers' mean teaches a leader.

L = Σ_i CE(z_i) + CE(z_l) + λ(e) · [Σ_i KL_T(x_i → z_i) + KL_T(mean z → z_l)], T = 3, λ ramped up over 80 epochs;
x_i = Σ_j a_ij·z_j with a = softmax over all j, i included, of q_i·k_j per image, q_i = W_q·f_i and k_i = W_k·f_i, f_i
the pooled feature map of peer i, C → C/8 without bias. It is not detached: x_i trains W_q and W_k and every peer.
Chen, Mei, Wang, Feng, Chen, AAAI 2020, arXiv 1912.00350.

The cohort's last network is the leader, by which a run is judged; the paper has three peers, so four networks. The
recipe is that of the authors' code.

Departures: the mean that teaches the leader is detached, while the code lets that term reach the peers as well (option
``leader_teaches_peers``); the code adds 1e-7 to the teachers' probabilities, here they are exact. The paper shares W_q
and W_k among peers of one architecture; here peers whose maps have another number of channels have their own, all
giving vectors of the length that the narrowest asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..cohort import Batch, Cohort, CohortOutput
from ..graph import DistillGraph
from .base import CIFAR_RECIPE, Method, MethodOptions, known_channels, pooled_features

__all__ = ["OKDDip", "OKDDipOptions"]


@dataclass(frozen=True)
class OKDDipOptions(MethodOptions):
    """Options of OKDDip.

    Attributes:
        leader_teaches_peers: let the gradient of KL(mean → leader) flow into the peers too, as the published code does.
    """

    leader_teaches_peers: bool = False


class OKDDip(Method):
    """Online Knowledge Distillation with Diverse peers (arXiv 1912.00350).

    ``method.query`` and ``method.key`` hold the projections by the number of channels that they read.

    Raises:
        ValueError: fewer than three sub-networks (two peers and the leader), or one without a spatial feature map.
    """

    Options = OKDDipOptions
    recipe = MappingProxyType({**CIFAR_RECIPE, "weight_decay": 5e-4})
    min_sub_networks = 3
    main_output = "leader"
    options: OKDDipOptions

    def __init__(self, cohort: Cohort, num_classes: int, options: OKDDipOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        channels = known_channels(cohort, "OKDDip")[:-1]
        self.graph = _graph(len(channels), self.options.leader_teaches_peers)
        length = max(1, min(channels) // 8)
        self.query, self.key = (
            nn.ModuleDict({str(c): nn.Linear(c, length, bias=False) for c in sorted(set(channels))}) for _ in range(2)
        )

    def attention(self, output: CohortOutput) -> Tensor:
        """How much peer j counts in the teacher of peer i, for each image (B, N, N); rows sum to 1."""
        pooled = pooled_features(output, "OKDDip")[:-1]
        queries, keys = (
            torch.stack([projections[str(f.shape[1])](f) for f in pooled], dim=1)
            for projections in (self.query, self.key)
        )
        return torch.softmax(queries @ keys.transpose(1, 2), dim=-1)

    def joint_logits(self, output: CohortOutput, batch: Batch) -> list[Tensor]:
        peers = torch.stack(output.logits[:-1], dim=1)
        mixtures = (self.attention(output).unsqueeze(3) * peers.unsqueeze(1)).sum(dim=2)
        return [*output.logits, *mixtures.unbind(dim=1)]

    def predict(self, output: CohortOutput, images: Tensor) -> dict[str, Tensor]:
        peers = super().predict(output._replace(logits=output.logits[:-1]), images)
        return {**peers, "leader": output.logits[-1]}


def _graph(peers: int, leader_teaches_peers: bool) -> DistillGraph:
    graph = DistillGraph.okddip(peers)
    edges = [edge._replace(detach=edge.detach and not leader_teaches_peers) for edge in graph.edges]
    return DistillGraph(graph.num_logits, graph.ce_weights, graph.mixtures, edges, graph.names)
