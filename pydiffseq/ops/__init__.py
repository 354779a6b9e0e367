"""The kernels as ``torch.library`` ops; each module documents shapes, dtypes and errors."""

from pydiffseq.ops._extension import draw_seed
from pydiffseq.ops.cross_entropy import linear_cross_entropy, linear_logsumexp
from pydiffseq.ops.dropout import dropout, dropout_add
from pydiffseq.ops.geglu import geglu
from pydiffseq.ops.linear import PackedLinear
from pydiffseq.ops.nearest import nearest, nearest_topk
from pydiffseq.ops.noise import embed_q_sample, philox_normal, q_sample, sampler_step
from pydiffseq.ops.packed_timestep_attention import packed_timestep_attention
from pydiffseq.ops.timestep_attention import rotary_timestep_attention, timestep_attention
from pydiffseq.ops.timestep_self_attention import rotary_timestep_self_attention, timestep_self_attention

__all__ = [
    "PackedLinear", "draw_seed", "dropout", "dropout_add", "embed_q_sample", "geglu", "linear_cross_entropy",
    "linear_logsumexp", "nearest", "nearest_topk", "packed_timestep_attention", "philox_normal", "q_sample",
    "rotary_timestep_attention", "rotary_timestep_self_attention", "sampler_step", "timestep_attention",
    "timestep_self_attention",
]
