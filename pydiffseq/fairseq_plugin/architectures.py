"""Named architectures: published hyper-parameters (spec 1.2, 2.9) and our recipes, as changes of a model's defaults."""

from __future__ import annotations

from typing import Any

PUBLISHED = {"length_policy": "pad"}   # the rest is the default of ARDiffusionConfig

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "ar_diffusion": {
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
    },
    "diffuseq": {
        "diffuseq_base": {},   # the defaults of DiffuSeqConfig
        "diffuseq_small": {    # the published recipe at a size for small data
            "latent_dim": 64, "time_dim": 64, "hidden_dim": 256, "ffn_dim": 1024, "heads": 4, "encoder_layers": 6,
            "positions": 128},
        "diffuseq_plus": {
            "latent_dim": 64, "time_dim": 64, "hidden_dim": 256, "ffn_dim": 1024, "heads": 4, "encoder_layers": 6,
            "positions": 128, "dropout": 0.1, "attention_dropout": 0.0, "timestep_sampler": "uniform",
            "length_policy": "predict", "length_relative": True, "loss_scope": "target", "self_conditioning": 0.5,
            "noise_factor": 4.0, "embedding_norm": True, "clean_x0": True, "ce_on": "pred", "label_smoothing": 0.1,
            "encoder_pre_norm": True, "ema_rate": 0.999},
    },
}
