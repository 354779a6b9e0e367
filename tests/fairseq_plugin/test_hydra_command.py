"""fairseq-hydra-train without user_dir: the task, the criterion, and every arch by name."""

import pytest
from hydra.core.config_store import ConfigStore
from toy import load, script

from pydiffseq.fairseq_plugin.architectures import ARCHITECTURES

SMALL = ["model.hidden_dim=32", "model.ffn_dim=64", "model.heads=2", "model.latent_dim=16", "model.time_dim=16",
         "model.encoder_layers=1", "model.decoder_layers=1", "model.target_length=24", "model.source_positions=32"]


def hydra_train(data, folder, *words, sizes=SMALL):
    return script("hydra-train", "task=diffusion_seq2seq", "criterion=diffusion_seq2seq", "optimizer=adam",
                  "lr_scheduler=fixed", f"task.data={data}", "optimization.max_update=2", "optimization.lr=[0.005]",
                  "dataset.batch_size=32", "common.cpu=true", f"checkpoint.save_dir={folder}/checkpoints", *sizes,
                  f"hydra.run.dir={folder}", *words, cwd=folder)


@pytest.mark.parametrize(("model", "words"), [("ar_diffusion", ["common.bf16=true"]), ("ar_diffusion_plus", [])])
def test_hydra_train(data, tmp_path, model, words):
    done = hydra_train(data, tmp_path, f"model={model}", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load(tmp_path / "checkpoints/checkpoint_last.pt")
    assert saved["cfg"]["model"]["hidden_dim"] == 32
    plus = model == "ar_diffusion_plus"
    assert saved["cfg"]["model"]["embedding_norm"] is plus
    assert ("net.length_head.offset_bias" in saved["model"]) == plus


def test_unknown_name_lists_the_choices(data, tmp_path):
    done = hydra_train(data, tmp_path, "model=ar_diffusion", "model.noise_schedule=quadratic")
    assert done.returncode != 0 and "sqrt" in done.stderr and "Traceback" not in done.stderr
    done = hydra_train(data, tmp_path, "model=ar_diffusion", "model.anchor_scale=0")
    assert done.returncode != 0 and "anchor_scale must be > 0, got 0.0" in done.stderr


@pytest.mark.parametrize(("model", "arch"), [(model, arch) for model in ARCHITECTURES for arch in ARCHITECTURES[model]])
def test_every_arch_is_a_hydra_model(model, arch):
    node = ConfigStore.instance().load(f"model/{arch}.yaml").node
    assert node["_name"] == arch
    assert {name: node[name] if not hasattr(node[name], "value") else node[name].value
            for name in ARCHITECTURES[model][arch]} == ARCHITECTURES[model][arch]
