"""Decoding end to end: sentences per second and peak memory, with random weights at published sizes.

    python benchmarks/decode.py --sizes iwslt14 --batches 8 --candidates 10 --steps 20 --official PATH --json out.json

Contenders: this project in float32 and bfloat16; with ``--official PATH`` (a checkout of AR-Diffusion; ``transformers``
must be installed) its network and its sampling loop in float32, at the same sizes, steps and candidates; fairseq's
Transformer of the same width and depth with beam 5, made to write as many tokens for each sentence. ``--real`` takes
the lengths of the bundled Tatoeba sentences: this project then decodes what a length head would ask for, the official
code its fixed length.
Every case runs in a process of its own, so that the peak memory is its own. ``--device cuda`` measures on a GPU, with and
without CUDA graphs; its peak memory is what tensors took there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import lzma
import os
import platform
import resource
import subprocess
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
CONTENDERS = ("pydiffseq float32", "pydiffseq bfloat16", "official float32", "transformer float32")
GPU_CONTENDERS = ("pydiffseq float16", "pydiffseq bfloat16", "pydiffseq bfloat16 without graphs", "official float32",
                  "transformer float16", "transformer float32")
READY = "measuring"   # what a case's process says when it has loaded everything
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
    run(*[part[:1] for part in data[0]])   # loads the libraries
    print(READY, flush=True)
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
    sentences = sum(len(source) for source, _ in data)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**case, "sentences_per_second": sentences / best, "seconds_per_run": best, "peak_mb": peak}


def cases(args: argparse.Namespace) -> list[dict]:
    made = []
    for size, batch, candidates, steps in itertools.product(args.sizes, args.batches, args.candidates, args.steps):
        first = (candidates, steps) == (args.candidates[0], args.steps[0])
        for contender in args.contenders or (CONTENDERS if args.device == "cpu" else GPU_CONTENDERS):
            if contender.startswith("official") and not args.official or contender.startswith("transformer") and not first:
                continue
            made.append({"size": size, "batch": batch, "candidates": candidates, "steps": steps, "real": args.real,
                         "contender": contender, "official": args.official, "seconds": args.seconds, "device": args.device})
    return made


def in_a_process(case: dict, limit: float | None) -> dict | None:
    """What the case's process says; where it took more than ``limit`` seconds, a bound of its speed and no more."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    # Errors go to a file: a pipe that nobody reads while the process loads could fill up and stop it.
    with tempfile.TemporaryFile("w+") as errors, \
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            ready = process.stdout.readline()   # loading does not count
            output, _ = process.communicate(timeout=limit if ready else None)
        except subprocess.TimeoutExpired:
            process.kill()
            sentences = sum(len(source) for source, _ in batches(case))
            return {**case, "sentences_per_second": sentences / limit, "seconds_per_run": None, "peak_mb": None}
        errors.seek(0)
        why = errors.read().strip().splitlines()
    if process.returncode:
        why = why or [f"exit status {process.returncode}"]
        print(f"{case['contender']} failed: {why[-1]}", file=sys.stderr)
        return None
    return json.loads(output.splitlines()[-1])


def hopeless(case: dict, results: list[dict]) -> bool:
    """Whether the contender has run out of time with as many sentences, candidates and steps, or fewer."""
    return any(r["seconds_per_run"] is None and all(r[key] == case[key] for key in ("size", "real", "contender", "device"))
               and all(r[key] <= case[key] for key in ("batch", "candidates", "steps")) for r in results)


def ratio(own: dict, other: dict | None) -> str:
    """Of the speeds, a bound (>) where the other one ran out of time."""
    if other is None or own["seconds_per_run"] is None or not own["contender"].startswith("pydiffseq"):
        return ""
    mark = "> " if other["seconds_per_run"] is None else ""
    return f"{mark}{own['sentences_per_second'] / other['sentences_per_second']:.2f}"


def table(results: list[dict]) -> str:
    """Rows by case; the ratio is sentences per second over those of the official code, and of the Transformer.

    Candidates and steps do not apply to the Transformer, which is measured once for a size and a batch.
    """
    keys = ("size", "real", "batch", "candidates", "steps")
    rows = {(*(r[key] for key in keys[:3 if r["contender"].startswith("transformer") else 5]), r["contender"]): r
            for r in results}
    lines = ["| size | lengths | batch | k | steps | contender | sentences/s | peak MB | x official | x Transformer |",
             "|---|---|---:|---:|---:|---|---:|---:|---:|---:|"]
    for r in results:
        key, done = tuple(r[key] for key in keys), r["seconds_per_run"] is not None
        others = [rows.get((*key, "official float32")), rows.get((*key[:3], "transformer float32"))]
        k, steps = ("", "") if r["contender"].startswith("transformer") else (r["candidates"], r["steps"])
        lengths, peak = "real" if r["real"] else "padded", f"{r['peak_mb']:.0f}" if done else ""
        lines.append(f"| {r['size']} | {lengths} | {r['batch']} | {k} | {steps} | {r['contender']} "
                     f"| {'' if done else '< '}{r['sentences_per_second']:.2f} | {peak} "
                     f"| {ratio(r, others[0])} | {ratio(r, others[1])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 10, 50], metavar="K")
    parser.add_argument("--steps", nargs="+", type=int, default=[2, 3, 20])
    parser.add_argument("--contenders", nargs="+", choices=sorted({*CONTENDERS, *GPU_CONTENDERS}))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--real", action="store_true", help="lengths of the bundled sentences instead of full ones")
    parser.add_argument("--official", help="folder AR-diffusion of a checkout of the official code")
    parser.add_argument("--seconds", type=float, default=0.0, help="repeat each case for so long; the best run counts")
    parser.add_argument("--limit", type=float, help="seconds after which a case is given up, and with it those of its "
                        "contender with as many sentences, candidates and steps, or more")
    parser.add_argument("--json", type=Path, help="write the results, too; cases that are there are not measured again")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case))))
        return
    if args.official:
        args.official = os.path.abspath(args.official)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    failed = False
    for case in cases(args):
        described = {key: value for key, value in case.items() if key not in ("official", "seconds")}
        if any(described.items() <= result.items() for result in results) or hopeless(case, results):
            continue
        result = in_a_process(case, args.limit)
        if result is None:
            failed = True
            continue
        results.append({key: value for key, value in result.items() if key not in ("official", "seconds")})
        print(table(results[-1:]).splitlines()[-1], flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    print(f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(results))
    if failed:
        sys.exit("some cases failed")


if __name__ == "__main__":
    main()
