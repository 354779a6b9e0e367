"""One case of benchmarks/decode.py, in a process of its own.

    python benchmarks/decode_case.py '{"size": "iwslt14", "batch": 8, ...}'

Prints ``measuring N sentences`` when everything is loaded, and then the case with its results as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import resource
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

SIZES = {
    "iwslt14": {"latent_dim": 64, "hidden_dim": 256, "ffn_dim": 1024, "heads": 4, "target_length": 90,
                "source_positions": 256, "vocabulary": 10005},
    "xsum": {"latent_dim": 128, "hidden_dim": 512, "ffn_dim": 2048, "heads": 8, "target_length": 50,
             "source_positions": 512, "vocabulary": 30522},
}
SOURCE_LENGTH = {"iwslt14": 30, "xsum": 256}
CORPUS = Path(__file__).parent.parent / "examples" / "tatoeba_de_en"


def batches(case: dict) -> list[tuple[Tensor, Tensor]]:
    """(sources int64 [B, S], target lengths int64 [B]): all of full length, or those of real sentences, sorted."""
    size, count = SIZES[case["size"]], case["batch"]
    generator = torch.Generator().manual_seed(0)
    if not case["real"]:
        source = torch.randint(4, size["vocabulary"], (count, SOURCE_LENGTH[case["size"]]), generator=generator)
        return [(source, torch.full((count,), size["target_length"]))]
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(CORPUS / "sentencepiece.model"))
    lines = [lzma.decompress((CORPUS / f"valid.{side}.xz").read_bytes()).decode().splitlines() for side in ("de", "en")]
    pairs = sorted((len(s) + 1, len(t)) for s, t in zip(*(model.encode(side) for side in lines), strict=True))
    pairs = pairs[:: max(1, len(pairs) // (2 * count))][: 2 * count]
    made = []
    for first in range(0, len(pairs), count):
        part = pairs[first : first + count]
        source = torch.ones(len(part), max(s for s, _ in part), dtype=torch.int64)
        for row, (length, _) in enumerate(part):
            source[row, :length] = torch.randint(4, size["vocabulary"], (length,), generator=generator)
        made.append((source, torch.tensor([t for _, t in part])))
    return made


class GivenLengths(nn.Module):
    """Stands for the length head: asks for the lengths that it is told."""

    def __init__(self, longest: int, hidden_dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(longest + 1, hidden_dim)
        self.box: list[Tensor] = []

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.one_hot(self.box[0], self.table.num_embeddings).float()


def ours(case: dict):
    from pydiffseq.decoding import DecodeOptions, Decoder
    from pydiffseq.models import ARDiffusion, ARDiffusionConfig

    size = SIZES[case["size"]]
    config = ARDiffusionConfig(source_vocabulary=size["vocabulary"], time_dim=size["latent_dim"],
                               length_policy="predict" if case["real"] else "pad", **size)
    model = ARDiffusion(config).eval().to(case["device"], getattr(torch, case["contender"].split()[1]))
    if case["real"]:
        model.length_head = GivenLengths(size["target_length"], size["hidden_dim"]).eval().to(model.embedding.weight)
    decoder = Decoder(model, DecodeOptions(steps=case["steps"], noise_beam=case["candidates"], step_end="zero",
                                           final="state", mbr_direction="reference",
                                           graphs="without graphs" not in case["contender"]))

    def run(source: Tensor, lengths: Tensor) -> None:
        if case["real"]:
            model.length_head.box[:] = [lengths]
        decoder(source, torch.arange(len(source), device=source.device))

    return run


def official(case: dict):
    """The published network and loop; its candidates run one after another and share nothing."""
    import torch.distributed as dist
    from omegaconf import OmegaConf

    sys.path[:0] = [case["official"]]
    from transformers import BertConfig

    # Imported for data sets, which are not read here; one of them is missing from the published code.
    for name in ("data_utils", "data_utils.s2s_dataset", "data_utils.tokenizer_utils"):
        sys.modules[name] = mock.MagicMock()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    size = SIZES[case["size"]]
    config = OmegaConf.load(Path(case["official"]) / "config.yaml")
    with tempfile.TemporaryDirectory() as folder:
        BertConfig().save_pretrained(folder)
        OmegaConf.update(config, "model.name", folder)
        for key, value in {
                "time_channels": size["latent_dim"], "in_channels": size["latent_dim"], "out_channels": size["latent_dim"],
                "tgt_len": size["target_length"], "max_pos_len": size["source_positions"],
                "intermediate_size": size["ffn_dim"], "num_attention_heads": size["heads"], "time_att": True,
                "att_strategy": "txl", "schedule_sampler": "xy_uniform", "skip_sample": True,
                "gen_timesteps": case["steps"], "pred_len": False}.items():
            OmegaConf.update(config, key, value)
        import importlib

        create = importlib.import_module("model_utils.create_model")
        model, diffusion = create.create_model(config, size["vocabulary"]).eval(), create.create_gaussian_diffusion(config)
        model = model.to(case["device"])
    rounding = importlib.import_module("gen_utils.generate").denoised_fn_round

    @torch.no_grad()
    def run(source: Tensor, lengths: Tensor) -> None:
        mask = source.ne(1).long()
        for _ in range(case["candidates"]):
            states = model.encoder(input_ids=source, attention_mask=mask).last_hidden_state
            kwargs = {"src_attention_mask": mask, "tgt_attention_mask": None, "encoder_hidden_states": states}
            with contextlib.redirect_stdout(io.StringIO()):
                sample = diffusion.p_sample_loop(
                    model, (len(source), size["target_length"], size["latent_dim"]), model_kwargs=kwargs, top_p=-1.0,
                    denoised_fn=lambda x, t: rounding(config, model.word_embedding, x, t))
            model.get_logits(sample).argmax(-1)

    return run


def transformer(case: dict):
    """fairseq's Transformer, beam 5, made to write each sentence's target length; candidates do not apply."""
    from fairseq.data import Dictionary
    from fairseq.models.transformer import TransformerConfig, TransformerModel
    from fairseq.search import BeamSearch
    from fairseq.sequence_generator import SequenceGenerator

    class OwnLengths(BeamSearch):
        """A sentence ends at its own length, and leaves the batch as in real life."""

        def __init__(self, words: Dictionary, lengths: Tensor) -> None:
            super().__init__(words)
            self.lengths = lengths

        def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None, candidate_multiple=2):
            ends = self.lengths[original_batch_idxs] <= step
            lprobs[~ends, :, self.eos] = float("-inf")
            if ends.any():
                lprobs[ends] = float("-inf")
                lprobs[ends, :, self.eos] = 0.0
            return super().step(step, lprobs, scores, prev_output_tokens, original_batch_idxs, candidate_multiple)

    size, words = SIZES[case["size"]], Dictionary()
    for i in range(size["vocabulary"] - len(words)):
        words.add_symbol(f"w{i}")
    part = {"embed_dim": size["hidden_dim"], "ffn_embed_dim": size["ffn_dim"], "layers": 6,
            "attention_heads": size["heads"]}
    config = TransformerConfig(share_decoder_input_output_embed=True)
    for side in (config.encoder, config.decoder):
        for name, value in part.items():
            setattr(side, name, value)
    config.decoder.input_dim = config.decoder.output_dim = size["hidden_dim"]
    config.max_source_positions = config.max_target_positions = 1024
    task = type("Task", (), {"source_dictionary": words, "target_dictionary": words})()
    model = TransformerModel.build_model.__func__(TransformerModel, config, task).eval()
    model = model.to(case["device"], getattr(torch, case["contender"].split()[1]))

    @torch.no_grad()
    def run(source: Tensor, lengths: Tensor) -> None:
        longest = int(lengths.max())
        generator = SequenceGenerator([model], words, beam_size=5, max_len_a=0, max_len_b=longest,
                                      search_strategy=OwnLengths(words, lengths))
        generator.generate([model], {"net_input": {"src_tokens": source, "src_lengths": source.ne(1).sum(1)}})

    return run


def measure(case: dict) -> dict:
    torch.manual_seed(0)
    make = {"pydiffseq": ours, "official": official, "transformer": transformer}[case["contender"].split()[0]]
    cuda = case["device"] == "cuda"
    data, run = [[part.to(case["device"]) for part in batch] for batch in batches(case)], make(case)
    sentences = sum(len(source) for source, _ in data)
    run(*[part[:1] for part in data[0]])   # loads the libraries
    print(f"measuring {sentences} sentences", flush=True)
    if cuda:
        for batch in (*data, *data):   # compiles, checks, and records the graphs
            run(*batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    best, end = float("inf"), time.perf_counter() + case["seconds"]
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        for source, lengths in data:
            run(source, lengths)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**case, "sentences_per_second": sentences / best, "seconds_per_run": best, "peak_mb": peak}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
