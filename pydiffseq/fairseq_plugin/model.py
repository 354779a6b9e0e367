"""fairseq models: the plain networks of :mod:`pydiffseq.models` with an exponential moving average."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, cast

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.utils import merge_with_parent
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from fairseq.tasks import FairseqTask
from hydra.core.config_store import ConfigStore
from torch import Tensor

from pydiffseq.errors import InputError, input_errors
from pydiffseq.fairseq_plugin.architectures import ARCHITECTURES
from pydiffseq.fairseq_plugin.ema import ModuleEMA
from pydiffseq.models import ARDiffusion, ARDiffusionConfig, DiffuSeq, DiffuSeqConfig
from pydiffseq.models.base import DiffusionModel
from pydiffseq.models.config import CHOICES, ModelConfig
from pydiffseq.models.losses import Losses

FROM_DICTIONARY = ("vocabulary", "source_vocabulary", "pad", "eos", "bos")


def _model_config(config: type[ModelConfig]) -> type:
    """A fairseq dataclass with the fields of ``config`` (one definition) and what the adapter adds."""
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(config):
        if f.name not in FROM_DICTIONARY:
            kind: Any = ChoiceEnum(CHOICES[f.name]) if f.name in CHOICES else {
                "int": int, "float": float, "bool": bool, "str": str}[str(f.type)]
            fields.append((f.name, kind, dataclasses.field(default=f.default, metadata=dict(f.metadata))))
    fields.append(("ema_rate", float, dataclasses.field(default=0.9999, metadata={
        "help": "decay of the moving average of the weights that validation and generation read; 0: none"})))
    return dataclasses.make_dataclass(config.__name__.replace("Config", "ModelConfig"), fields,
                                      bases=(FairseqDataclass,), namespace={"__module__": __name__})


ARDiffusionModelConfig = _model_config(ARDiffusionConfig)
DiffuSeqModelConfig = _model_config(DiffuSeqConfig)


class DiffusionFairseqModel(BaseFairseqModel):
    """A diffusion network behind fairseq's interface: ``net`` is trained, ``ema`` follows it and is read in eval mode.

    A subclass names the network, its config and the fairseq dataclass of that config.
    """

    network_class: type[DiffusionModel]
    config_class: type[ModelConfig]
    options_class: type

    def __init__(self, config: ModelConfig, ema_rate: float) -> None:
        super().__init__()
        self.net = self.network_class(config)
        self.ema = ModuleEMA(self.net, ema_rate) if ema_rate else None
        if self.ema is not None:   # the history of losses is the training's alone
            cast(DiffusionModel, self.ema.module).sampler_state = None
        self.num_updates = 0

    @classmethod
    def build_model(cls, cfg, task) -> DiffusionFairseqModel:
        if isinstance(task, FairseqTask) and not getattr(task, "trains_diffusion", False):
            raise InputError(f"arch {cfg._name} works with --task diffusion_seq2seq, got the task {task.cfg._name}")
        # A field that is newer than the checkpoint gets its default (fairseq merges only the base architecture's).
        cfg = merge_with_parent(cls.options_class(), cfg, remove_missing=True)
        values = {f.name: cfg[f.name] for f in dataclasses.fields(cls.options_class) if not f.name.startswith("_")}
        ema_rate = values.pop("ema_rate")
        values = {name: str(value) if name in CHOICES else value for name, value in values.items()}
        target, source = task.target_dictionary, task.source_dictionary
        with input_errors():
            config = cls.config_class(vocabulary=len(target), source_vocabulary=len(source), pad=target.pad(),
                                      eos=target.eos(), bos=target.bos(), **values)
            if config.joined_dictionary and source.symbols != target.symbols:
                raise InputError(f"arch {cfg._name} needs one joined dictionary, but the source's and the target's differ; "
                                 "prepare the data with pydiffseq prepare, or fairseq-preprocess --joined-dictionary")
            return cls(config, ema_rate)

    def network(self) -> DiffusionModel:
        """The network to run: the trained one in training, the averaged one in evaluation."""
        return self.net if self.training or self.ema is None else cast(DiffusionModel, self.ema.module)

    def forward(self, src_tokens: Tensor, target: Tensor, ids: Tensor | None = None, seed: int | None = None,
                **unused) -> Losses:
        return self.network()(src_tokens, target, ids, seed)

    def trimming(self) -> tuple[int, int] | None:
        """The most words of a pair, and of a source alone, that are not trimmed; ``None``: the model trims nothing."""
        return None

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        self.num_updates = num_updates
        if self.ema is not None:
            self.ema.update(self.net, num_updates)

    def prepare_for_inference_(self, cfg) -> None:
        """Keep only the averaged weights, in the precision that the command asked for."""
        if self.ema is not None:
            dtype = next(self.net.parameters()).dtype
            self.net = cast(DiffusionModel, self.ema.module.to(dtype))
            self.ema = None

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Accept exported checkpoints, which hold one set of weights, and checkpoints with or without an average."""
        prefix = f"{name}." if name else ""
        net = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}net.")}
        self._check_vocabulary(net.get(f"{prefix}net.embedding.weight"))
        self._check_absorbing(f"{prefix}net.absorbing" in net if net else None)
        self._fit_sampler_state(state_dict, prefix)
        net = {key: value for key, value in net.items() if not key.startswith(f"{prefix}net.sampler_state.")}
        averaged = any(key.startswith(f"{prefix}ema.") for key in state_dict)
        if self.ema is None:
            for key in [key for key in state_dict if key.startswith(f"{prefix}ema.")]:
                del state_dict[key]
        elif not averaged:
            start = len(prefix) + len("net.")
            state_dict.update({f"{prefix}ema.module.{key[start:]}": value for key, value in net.items()})
            state_dict[f"{prefix}ema.updates"] = torch.zeros((), dtype=torch.int64)

    def _check_absorbing(self, saved: bool | None) -> None:
        """Refuse a checkpoint of the other DiffuSeq; ``saved``: whether it has an absorbing state."""
        if saved is False and self.net.absorbing is not None:
            raise InputError("the checkpoint was trained without --soft-absorb (DiffuSeq-v1) and has no absorbing state; "
                             "leave that option out, or train from the start")
        if saved and self.net.absorbing is None:
            raise InputError("the checkpoint was trained with --soft-absorb (DiffuSeq-v2); give that option, or train from "
                             "the start")

    def _fit_sampler_state(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """What a timestep sampler learnt: leave it out where this model's does not learn, start anew where it is missing.

        Checkpoints of earlier versions hold it a second time, beside the averaged weights.
        """
        own = {} if self.net.sampler_state is None else {
            f"{prefix}net.sampler_state.{key}": value for key, value in self.net.sampler_state.state_dict().items()}
        for key in [key for key in state_dict if ".sampler_state." in key and key not in own]:
            del state_dict[key]
        for key, value in own.items():
            state_dict.setdefault(key, value)

    def load_state_dict(self, state_dict, strict: bool = True, model_cfg=None, args=None):
        try:
            return super().load_state_dict(state_dict, strict, model_cfg, args)
        except RuntimeError as error:
            mismatch = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
            shown = textwrap.shorten(mismatch, 300, placeholder=" ...")
            raise InputError(f"the checkpoint does not fit a model of these options: {shown}") from error

    def _check_vocabulary(self, table: Tensor | None) -> None:
        if table is not None and len(table) != self.net.config.vocabulary:
            raise InputError(
                f"the checkpoint was trained with a target dictionary of {len(table)} entries, but the data folder's has "
                f"{self.net.config.vocabulary}; give the data folder that holds the training dictionary")


@register_model("ar_diffusion", dataclass=ARDiffusionModelConfig)
class ARDiffusionModel(DiffusionFairseqModel):
    """AR-Diffusion as a fairseq model."""

    network_class, config_class, options_class = ARDiffusion, ARDiffusionConfig, ARDiffusionModelConfig

    def max_positions(self) -> tuple[int, int]:
        config = cast(ARDiffusionConfig, self.net.config)
        # With length prediction </s> is not part of the denoised target.
        return config.source_positions, config.target_length + (config.length_policy == "predict")


@register_model("diffuseq", dataclass=DiffuSeqModelConfig)
class DiffuSeqModel(DiffusionFairseqModel):
    """DiffuSeq as a fairseq model."""

    network_class, config_class, options_class = DiffuSeq, DiffuSeqConfig, DiffuSeqModelConfig

    def max_positions(self) -> tuple[None, None]:
        """No limit: pairs that are too long are trimmed, as published (the task says how many)."""
        return None, None

    def trimming(self) -> tuple[int, int]:
        net = cast(DiffuSeq, self.net)
        return net.longest_pair(), net.longest_source()


def _register(model: str, options: type, name: str, values: dict[str, Any]) -> None:
    @register_model_architecture(model, name)
    def architecture(args) -> None:
        for key, value in values.items():
            setattr(args, key, getattr(args, key, value))

    # fairseq-hydra-train does not call architecture functions; it reads model=<name> from this store.
    node = options(**values)
    node._name = name
    ConfigStore.instance().store(name=name, group="model", node=node, provider="pydiffseq")


for _model, _options in (("ar_diffusion", ARDiffusionModelConfig), ("diffuseq", DiffuSeqModelConfig)):
    for _name, _values in ARCHITECTURES[_model].items():
        _register(_model, _options, _name, _values)
