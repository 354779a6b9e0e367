"""fairseq models: the plain networks of :mod:`pydiffseq.models` with an exponential moving average."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.utils import merge_with_parent
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from fairseq.tasks import FairseqTask
from hydra.core.config_store import ConfigStore
from torch import Tensor

from pydiffseq.errors import InputError, input_errors
from pydiffseq.fairseq_plugin.ema import ModuleEMA
from pydiffseq.models import ARDiffusion, ARDiffusionConfig
from pydiffseq.models.config import CHOICES
from pydiffseq.models.losses import Losses

FROM_DICTIONARY = ("vocabulary", "source_vocabulary", "pad", "eos")


def _model_config() -> type:
    """A fairseq dataclass with the fields of ``ARDiffusionConfig`` (one definition) and what the adapter adds."""
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(ARDiffusionConfig):
        if f.name not in FROM_DICTIONARY:
            kind: Any = ChoiceEnum(CHOICES[f.name]) if f.name in CHOICES else {
                "int": int, "float": float, "bool": bool, "str": str}[str(f.type)]
            fields.append((f.name, kind, dataclasses.field(default=f.default, metadata=dict(f.metadata))))
    fields.append(("ema_rate", float, dataclasses.field(default=0.9999, metadata={
        "help": "decay of the moving average of the weights that validation and generation read; 0: none"})))
    return dataclasses.make_dataclass("ARDiffusionModelConfig", fields, bases=(FairseqDataclass,),
                                      namespace={"__module__": __name__})


ARDiffusionModelConfig = _model_config()


@register_model("ar_diffusion", dataclass=ARDiffusionModelConfig)
class ARDiffusionModel(BaseFairseqModel):
    """AR-Diffusion behind fairseq's interface: ``net`` is trained, ``ema`` follows it and is read in eval mode."""

    def __init__(self, config: ARDiffusionConfig, ema_rate: float) -> None:
        super().__init__()
        self.net = ARDiffusion(config)
        self.ema = ModuleEMA(self.net, ema_rate) if ema_rate else None
        self.num_updates = 0

    @classmethod
    def build_model(cls, cfg, task) -> ARDiffusionModel:
        if isinstance(task, FairseqTask) and not getattr(task, "trains_diffusion", False):
            raise InputError(f"arch {cfg._name} works with --task diffusion_seq2seq, got the task {task.cfg._name}")
        # A field that is newer than the checkpoint gets its default (fairseq merges only the base architecture's).
        cfg = merge_with_parent(ARDiffusionModelConfig(), cfg, remove_missing=True)
        values = {f.name: cfg[f.name] for f in dataclasses.fields(ARDiffusionModelConfig) if not f.name.startswith("_")}
        ema_rate = values.pop("ema_rate")
        values = {name: str(value) if name in CHOICES else value for name, value in values.items()}
        target, source = task.target_dictionary, task.source_dictionary
        with input_errors():
            return cls(ARDiffusionConfig(vocabulary=len(target), source_vocabulary=len(source), pad=target.pad(),
                                         eos=target.eos(), **values), ema_rate)

    def network(self) -> ARDiffusion:
        """The network to run: the trained one in training, the averaged one in evaluation."""
        return self.net if self.training or self.ema is None else cast(ARDiffusion, self.ema.module)

    def forward(self, src_tokens: Tensor, target: Tensor, ids: Tensor | None = None, seed: int | None = None,
                **unused) -> Losses:
        return self.network()(src_tokens, target, ids, seed)

    def max_positions(self) -> tuple[int, int]:
        config = self.net.config
        # With length prediction </s> is not part of the denoised target.
        return config.source_positions, config.target_length + (config.length_policy == "predict")

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        self.num_updates = num_updates
        if self.ema is not None:
            self.ema.update(self.net, num_updates)

    def prepare_for_inference_(self, cfg) -> None:
        """Keep only the averaged weights, in the precision that the command asked for."""
        if self.ema is not None:
            dtype = next(self.net.parameters()).dtype
            self.net = cast(ARDiffusion, self.ema.module.to(dtype))
            self.ema = None

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Accept exported checkpoints, which hold one set of weights, and checkpoints with or without an average."""
        prefix = f"{name}." if name else ""
        net = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}net.")}
        self._check_vocabulary(net.get(f"{prefix}net.embedding.weight"))
        averaged = any(key.startswith(f"{prefix}ema.") for key in state_dict)
        if self.ema is None:
            for key in [key for key in state_dict if key.startswith(f"{prefix}ema.")]:
                del state_dict[key]
        elif not averaged:
            start = len(prefix) + len("net.")
            state_dict.update({f"{prefix}ema.module.{key[start:]}": value for key, value in net.items()})
            state_dict[f"{prefix}ema.updates"] = torch.zeros((), dtype=torch.int64)

    def load_state_dict(self, state_dict, strict: bool = True, model_cfg=None, args=None):
        try:
            return super().load_state_dict(state_dict, strict, model_cfg, args)
        except RuntimeError as error:
            mismatch = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
            raise InputError(f"the checkpoint does not fit a model of these options: {mismatch}") from error

    def _check_vocabulary(self, table: Tensor | None) -> None:
        if table is not None and len(table) != self.net.config.vocabulary:
            raise InputError(
                f"the checkpoint was trained with a target dictionary of {len(table)} entries, but the data folder's has "
                f"{self.net.config.vocabulary}; give the data folder that holds the training dictionary")


# --- architectures: published hyper-parameters (spec 2.9) and our recipe ---

PUBLISHED = {"length_policy": "pad"}   # the rest is the default of ARDiffusionConfig

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ar_diffusion_iwslt_de_en": PUBLISHED,
    "ar_diffusion_xsum": {
        **PUBLISHED, "latent_dim": 128, "time_dim": 128, "hidden_dim": 512, "ffn_dim": 2048, "heads": 8,
        "source_positions": 512, "target_length": 50},
    "ar_diffusion_cnndm": {
        **PUBLISHED, "latent_dim": 128, "time_dim": 128, "hidden_dim": 512, "ffn_dim": 2048, "heads": 8,
        "source_positions": 512, "target_length": 180},
    "ar_diffusion_commongen": {
        **PUBLISHED, "hidden_dim": 128, "ffn_dim": 512, "heads": 8, "source_positions": 128, "target_length": 54},
    "ar_diffusion_plus": {
        "hidden_dim": 256, "ffn_dim": 1024, "heads": 4, "encoder_layers": 3, "decoder_layers": 3,
        "source_positions": 256, "target_length": 128, "dropout": 0.1, "attention_dropout": 0.0,
        "length_relative": True, "self_conditioning": 0.5, "noise_factor": 4.0,
        "embedding_norm": True, "clean_x0": True, "ce_on": "pred", "label_smoothing": 0.1,
        "encoder_pre_norm": True, "without_pooler": True, "decoder_final_norm": True, "share_embeddings": True,
        "ema_rate": 0.999},
}


def _register(name: str, values: dict[str, Any]) -> None:
    @register_model_architecture("ar_diffusion", name)
    def architecture(args) -> None:
        for key, value in values.items():
            setattr(args, key, getattr(args, key, value))

    # fairseq-hydra-train does not call architecture functions; it reads model=<name> from this store.
    node = ARDiffusionModelConfig(**values)
    node._name = name
    ConfigStore.instance().store(name=name, group="model", node=node, provider="pydiffseq")


for _name, _values in ARCHITECTURES.items():
    _register(_name, _values)
