"""Official weights in our modules: state dicts of the authors' public code, renamed and joined.

DiffuSeq: github.com/Shark-NLP/DiffuSeq; the network is a Hugging Face ``BertEncoder``. AR-Diffusion:
github.com/microsoft/ProphetNet, folder AR-diffusion; the encoder is a ``BertModel``. The tables below map our names to
theirs; ``{}`` is a number, and several names are joined along the first dimension.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pydiffseq.errors import InputError
from pydiffseq.models import ARDiffusion, ARDiffusionConfig, DiffuSeq, DiffuSeqConfig


def _bert_layer(ours: str, theirs: str) -> dict[str, str]:
    """One post-LN layer of Hugging Face's BertEncoder."""
    return {
        f"{ours}.attention.qkv": " ".join(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")),
        f"{ours}.attention.out": f"{theirs}.attention.output.dense",
        f"{ours}.attention_norm": f"{theirs}.attention.output.LayerNorm",
        f"{ours}.up": f"{theirs}.intermediate.dense",
        f"{ours}.down": f"{theirs}.output.dense",
        f"{ours}.ffn_norm": f"{theirs}.output.LayerNorm",
    }


# Names of modules, or of parameters that are no module's weight and bias.
DIFFUSEQ_NAMES = {
    "embedding.weight": "word_embedding.weight",
    "embedding.bias": "lm_head.bias",
    "absorbing": "mean_embed",   # of DiffuSeq-v2
    "input_up.{}": "input_up_proj.{}",
    "output_down.{}": "output_down_proj.{}",
    "positions": "position_embeddings",
    "input_norm": "LayerNorm",
    "time_mlp.up": "time_embed.0",
    "time_mlp.down": "time_embed.2",
    **_bert_layer("layers.{}", "input_transformers.layer.{}"),
}

AR_DIFFUSION_NAMES = {
    "embedding.weight": "word_embedding.weight",
    "embedding.bias": "lm_head.bias",
    "source_embedding": "encoder.embeddings.word_embeddings",
    "encoder.positions": "encoder.embeddings.position_embeddings",
    "encoder.token_type": "encoder.embeddings.token_type_embeddings",
    "encoder.norm": "encoder.embeddings.LayerNorm",
    **_bert_layer("encoder.layers.{}", "encoder.encoder.layer.{}"),
    "encoder.pooler": "encoder.pooler.dense",
    "input_up.{}": "input_up_proj.{}",
    "output_down.{}": "output_down_proj.{}",
    "positions": "position_embeddings",
    "input_norm": "LayerNorm",
    "time_mlp.up": "time_trans.0",
    "time_mlp.down": "time_trans.2",
    "length_head.table": "length_embedding",
    "blocks.{}.time_mlp.up": "transformer_blocks.{}.time_trans.0",
    "blocks.{}.time_mlp.down": "transformer_blocks.{}.time_trans.2",
    "blocks.{}.self_norm": "transformer_blocks.{}.norm1",
    "blocks.{}.self_attention.qkv": " ".join(f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv"),
    "blocks.{}.self_attention.out": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.self_attention.content_bias": "transformer_blocks.{}.r_w_bias",
    "blocks.{}.self_attention.time_bias": "transformer_blocks.{}.r_r_bias",
    "blocks.{}.cross_norm": "transformer_blocks.{}.norm2",
    "blocks.{}.cross_attention.query": "transformer_blocks.{}.attn2.to_q",
    "blocks.{}.cross_attention.key_value": " ".join(f"transformer_blocks.{{}}.attn2.to_{part}" for part in "kv"),
    "blocks.{}.cross_attention.out": "transformer_blocks.{}.attn2.to_out.0",
    "blocks.{}.ffn_norm": "transformer_blocks.{}.norm3",
    "blocks.{}.ffn.up": "transformer_blocks.{}.ff.net.0.proj",
    "blocks.{}.ffn.down": "transformer_blocks.{}.ff.net.2",
}

# Buffers that say nothing, and names that released files have for others (ProphetNet issue 86).
BUFFERS = {"position_ids", "encoder.embeddings.position_ids", "encoder.embeddings.token_type_ids"}
RELEASED = {"embed_positions.weight": "position_embeddings.weight"}
TIED = ("lm_head.weight", "word_embedding.weight")
VOCABULARY_TABLES = {"embedding.weight", "embedding.bias", "source_embedding.weight"}   # ours, a row per entry


@dataclass(frozen=True)
class System:
    """What :func:`load_official` knows of one code base."""

    names: dict[str, str]
    structure: Callable[[Mapping[str, Tensor]], dict[str, Any]]   # options that the presence of keys decides
    sizes: Callable[[Mapping[str, Tensor]], dict[str, Any]]       # options that shapes decide
    needed: tuple[str, ...]                                       # options that must be told by either
    tiny: dict[str, Any]                                          # sizes of a module that is built for its names
    defaults: dict[str, Any]
    model: type[nn.Module]
    config: type
    advice: str                                                   # what `pydiffseq convert` says of the text

    def make(self, values: dict[str, Any]) -> Any:
        """A module with random weights; the caller's random numbers stay as they are."""
        with torch.random.fork_rng(devices=[]):
            return self.model(self.config(**{**self.defaults, **values}))


def load_official(system: str, state_dict: Mapping[str, Tensor], **config: Any) -> Any:
    """Our module with the weights of an official ``state_dict``, float32, in evaluation mode.

    Args:
        system: ``"diffuseq"`` or ``"ar_diffusion"``.
        state_dict: official name -> tensor; a prefix ``module.`` is taken off.
        config: fields of the module's config. Sizes follow from the tensors; what they do not tell must be given:
            ``target_length`` (``tgt_len`` of AR-Diffusion, unless lengths are predicted), ``heads`` (unless
            ``time_injection`` is txl, or DiffuSeq has BERT's 768 units and so 12), ``time_injection="rotary"``.
            ``pad``, ``bos`` and ``eos`` are those of bert-base-uncased unless given. The rest (dropout, schedule,
            ``sequence_length``, ``logits``) has the module's defaults.

    Ids stay the official ones; ``pydiffseq convert`` rearranges them for fairseq.

    Raises:
        InputError: an unknown system; missing or unknown keys (all of them are listed); tensors whose shapes do not
            fit; an option that is missing or contradicts the tensors.
    """
    if system not in SYSTEMS:
        raise InputError(f"the system must be one of {', '.join(SYSTEMS)}, got {system!r}")
    kind = SYSTEMS[system]
    tensors = _renamed(state_dict)
    structure = {**kind.structure(tensors)}
    structure |= {name: config[name] for name in structure if structure[name] is None and name in config}
    _check_keys(kind, tensors, structure)
    values = _agreed({**structure, **kind.sizes(tensors)}, config)
    for name in kind.needed:
        if name not in values:
            raise InputError(f"the tensors do not tell {name}; give {name}=... as in the official configuration")
    model = kind.make(values)
    with torch.no_grad():
        for name, tensor in _own(model).items():
            _copy(tensor, [tensors[theirs] for theirs in official_names(kind.names, name)], name)
    return model.eval()


def official_names(names: Mapping[str, str], own: str) -> list[str]:
    """The official keys that make up our key ``own``, in the order in which they are joined."""
    number = re.search(r"\.(\d+)\.", own)
    template = own.replace(number[0], ".{}.") if number else own
    index = number[1] if number else ""
    if template in names:
        return names[template].format(index).split()
    module, _, leaf = template.rpartition(".")
    return [f"{name.replace('{}', index)}.{leaf}" for name in names[module].split()]


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Our tensors that have official ones (the loss history of a timestep sampler has none)."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("sampler_state.")}


def _renamed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrong = [str(name) for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if wrong or not state_dict:
        raise InputError("an official state dict maps names to tensors, got "
                         + (f"other values under {', '.join(wrong[:5])}" if wrong else "an empty one"))
    tensors = {name.removeprefix("module."): value for name, value in state_dict.items()}
    tensors = {RELEASED.get(name, name): value for name, value in tensors.items() if name not in BUFFERS}
    head = tensors.pop(TIED[0], None)
    table = tensors.get(TIED[1])
    if head is not None and table is not None and not torch.equal(head, table):
        raise InputError(f"{TIED[0]} and {TIED[1]} differ, but the official models tie them")
    return tensors


def _check_keys(kind: System, tensors: Mapping[str, Tensor], structure: dict[str, Any]) -> None:
    """Compare names with those of a small module of the same structure, before sizes are read from them."""
    given = {name: value for name, value in structure.items() if value is not None}
    small = kind.make({**kind.tiny, **given})
    expected = {theirs for own in _own(small) for theirs in official_names(kind.names, own)}
    missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    parts = [f"{len(names)} {word} ({', '.join(names)})" for word, names in (("missing", missing), ("unknown", unknown))
             if names]
    if parts:
        raise InputError(f"the state dict has other keys than the official model: {' and '.join(parts)}")


def _agreed(inferred: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Both together; ``None`` is inferred where the tensors leave it open."""
    inferred = {name: value for name, value in inferred.items() if value is not None}
    for name in inferred.keys() & config.keys():
        told, found = config[name], inferred[name]
        # The probability is free, whether the network has the input is not.
        if bool(told) != bool(found) if name == "self_conditioning" else told != found:
            raise InputError(f"the tensors say {name}={found!r}, but {name}={told!r} was given")
    return {**inferred, **config}


def _copy(own: Tensor, parts: list[Tensor], name: str) -> None:
    shapes = " + ".join(str(list(part.shape)) for part in parts)
    if any(part.shape[1:] != own.shape[1:] for part in parts) or sum(len(part) for part in parts) != len(own):
        raise InputError(f"the official tensors for {name} have shape {shapes}, but the model's is {list(own.shape)}")
    own.copy_(torch.cat(parts))


def _count(tensors: Iterable[str], prefix: str) -> int:
    """How many layers ``prefix.0``, ``prefix.1``, ... there are, at least 1."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, tensors) if match), default=1)


def _ar_structure(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """``time_injection`` is ``None`` where it may be rotary, or a network that is given no time at all."""
    inside = "transformer_blocks.0.time_trans.0.weight" in tensors
    injection = "txl" if "transformer_blocks.0.r_w_bias" in tensors else None if inside else "add"
    return {
        "encoder_layers": _count(tensors, "encoder.encoder.layer"),
        "decoder_layers": _count(tensors, "transformer_blocks"),
        "time_injection": injection,
        "length_policy": "predict" if "length_embedding.weight" in tensors else "pad",
    }


def _ar_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, latent = tensors["word_embedding.weight"].shape
    source_vocabulary, hidden = tensors["encoder.embeddings.word_embeddings.weight"].shape
    features = tensors.get("time_trans.0.weight", tensors.get("transformer_blocks.0.time_trans.0.weight"))
    bias, lengths = tensors.get("transformer_blocks.0.r_w_bias"), tensors.get("length_embedding.weight")
    return {
        "vocabulary": vocabulary, "source_vocabulary": source_vocabulary, "latent_dim": latent, "hidden_dim": hidden,
        "ffn_dim": len(tensors["encoder.encoder.layer.0.intermediate.dense.weight"]),
        "source_positions": len(tensors["encoder.embeddings.position_embeddings.weight"]),
        "time_dim": None if features is None else features.shape[1],
        "heads": None if bias is None else len(bias),
        "target_length": None if lengths is None else len(lengths) - 1,
        "self_conditioning": 0.5 if tensors["input_up_proj.0.weight"].shape[1] == 2 * latent else 0.0,
    }


def _diffuseq_structure(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """``latent_dim`` beside a hidden size of 2: with projections where it is another."""
    projected = any(name.startswith(("input_up_proj.", "output_down_proj.")) for name in tensors)
    return {"encoder_layers": _count(tensors, "input_transformers.layer"), "length_policy": "pad",
            "latent_dim": 1 if projected else 2, "soft_absorb": "mean_embed" in tensors}


def _diffuseq_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, latent = tensors["word_embedding.weight"].shape
    positions, hidden = tensors["position_embeddings.weight"].shape
    return {
        "vocabulary": vocabulary, "latent_dim": latent, "hidden_dim": hidden, "positions": positions,
        "ffn_dim": len(tensors["input_transformers.layer.0.intermediate.dense.weight"]),
        "time_dim": tensors["time_embed.0.weight"].shape[1], "heads": 12 if hidden == BERT_UNITS else None,
    }


BERT_UNITS = 768
SYSTEMS = {
    "diffuseq": System(
        DIFFUSEQ_NAMES, _diffuseq_structure, _diffuseq_sizes, ("heads",),
        tiny={"vocabulary": 4, "time_dim": 2, "hidden_dim": 2, "ffn_dim": 2, "heads": 1, "positions": 8,
              "sequence_length": 8},
        defaults={"pad": 0, "bos": 101, "eos": 102}, model=DiffuSeq, config=DiffuSeqConfig,
        advice="prepare text that is tokenised as the vocabulary wants it, without special tokens; decode as published "
               "with --solver ancestral --decode-steps 2000"),
    "ar_diffusion": System(
        AR_DIFFUSION_NAMES, _ar_structure, _ar_sizes, ("time_injection", "heads", "target_length"),
        tiny={"vocabulary": 4, "source_vocabulary": 4, "latent_dim": 2, "time_dim": 2, "hidden_dim": 2, "ffn_dim": 2,
              "heads": 1, "source_positions": 2, "target_length": 2, "time_injection": "rotary"},
        defaults={"pad": 0, "eos": 102}, model=ARDiffusion, config=ARDiffusionConfig,
        advice="its sentences begin with <s> on both sides: put <s> before every line that you prepare, tokenised as the "
               "vocabulary wants it; decode as published with --step-end zero --final state"),
}
