"""The fairseq task ``diffusion_seq2seq``: translation data, diffusion losses, diffusion decoding."""

import hashlib
import logging
import os
from argparse import Namespace
from dataclasses import dataclass, field

import torch
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.dataclass import ChoiceEnum
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf

from pydiffseq.decoding import MBR_DIRECTIONS, DecodeOptions
from pydiffseq.decoding.decode import DRIFTS, FINALS, ROUNDINGS, STEP_LISTS
from pydiffseq.decoding.mbr import SMOOTHINGS, TOKEN_METRICS
from pydiffseq.diffusion import SOLVERS, check_visited, read_visited
from pydiffseq.diffusion.steps import ENDS
from pydiffseq.errors import InputError, input_errors
from pydiffseq.fairseq_plugin.criterion import DiffusionCriterion, DiffusionCriterionConfig
from pydiffseq.fairseq_plugin.generator import DiffusionGenerator
from pydiffseq.fairseq_plugin.model import DiffusionFairseqModel

logger = logging.getLogger(__name__)
DEFAULTS = DecodeOptions()


@dataclass
class DiffusionSeq2SeqConfig(TranslationConfig):
    """Decoding options live here: fairseq takes the task's options from the command line when it generates."""

    left_pad_source: bool = field(default=False, metadata={"help": "pad the source on the left"})
    decode_steps: int = field(default=DEFAULTS.steps, metadata={"help": "network calls per candidate"})
    step_list: str = field(default=DEFAULTS.step_list, metadata={
        "help": f"spacing of the steps: {', '.join(STEP_LISTS)}; or a file of falling timesteps in 0..T-1, one for each "
                "network call"})
    early_stop: int = field(default=DEFAULTS.patience, metadata={
        "help": "stop a candidate whose tokens have not changed for so many steps in a row (0: never)"})
    solver: ChoiceEnum(tuple(SOLVERS)) = field(  # type: ignore[valid-type]
        default=DEFAULTS.solver, metadata={"help": "how a step is taken"})
    length_beam: int = field(default=DEFAULTS.length_beam, metadata={
        "help": "how many of the likeliest lengths to try (length_policy=predict)"})
    noise_beam: int = field(default=DEFAULTS.noise_beam, metadata={"help": "candidates per length"})
    rounding: ChoiceEnum(ROUNDINGS) = field(  # type: ignore[valid-type]
        default=DEFAULTS.rounding, metadata={
            "help": "replace x0_hat by its nearest embeddings at every step (published), off, from --rounding-step on (at "
                    "and below that timestep), or until it"})
    rounding_step: int = field(default=DEFAULTS.rounding_step, metadata={
        "help": "timestep for --rounding from and until, 0 .. the diffusion steps"})
    noise_limit: float = field(default=DEFAULTS.noise_limit, metadata={
        "help": "truncate each step's noise to this many standard deviations (DiffuSeq's top_p); 0: do not"})
    absorb_rate: float = field(default=DEFAULTS.absorb_rate, metadata={
        "help": "R: after each step a token becomes the absorbing vector with probability R x the standard deviation of "
                "its noise (DiffuSeq-v2, with --solver ancestral); 0: never"})
    drift: ChoiceEnum(DRIFTS) = field(  # type: ignore[valid-type]
        default=DEFAULTS.drift, metadata={
            "help": "with --soft-absorb: steps follow the drift to the absorbing vector, or have the vector in their start "
                    "alone (DiffuSeq-v2's ancestral code), or ignore it (its DPM-Solver code)"})
    step_end: ChoiceEnum(ENDS) = field(  # type: ignore[valid-type]
        default=DEFAULTS.step_end, metadata={
            "help": "end the step list at the clean state or at timestep 0 (zero, as published)"})
    final: ChoiceEnum(FINALS) = field(  # type: ignore[valid-type]
        default=DEFAULTS.final, metadata={"help": "read the tokens off the last x0_hat or off the final state (published)"})
    mbr_metric: ChoiceEnum(TOKEN_METRICS) = field(  # type: ignore[valid-type]
        default=DEFAULTS.mbr_metric, metadata={
            "help": "MBR's utility, on tokens: sentence BLEU, unigram F1 or edit similarity (pydiffseq mbr also has chrF)"})
    mbr_smoothing: ChoiceEnum(SMOOTHINGS) = field(  # type: ignore[valid-type]
        default=DEFAULTS.mbr_smoothing, metadata={
            "help": "smoothing of MBR's sentence BLEU (published: DiffuSeq method4, AR-Diffusion add1_all)"})
    mbr_direction: ChoiceEnum(MBR_DIRECTIONS) = field(  # type: ignore[valid-type]
        default=DEFAULTS.mbr_direction, metadata={"help": "role of the judged candidate in MBR's utility"})
    candidate_tokens: int = field(default=DEFAULTS.candidate_tokens, metadata={
        "help": "most target tokens that are denoised at once, all candidates and padding included; bounds the memory and "
                "changes no output"})
    no_cuda_graphs: bool = field(default=False, metadata={
        "help": "on a GPU, run the denoising loop step by step, not from one CUDA graph for each batch and length bucket"})
    decode_seed: int = field(default=DEFAULTS.seed, metadata={"help": "seed of the decoding noise"})


@register_task("diffusion_seq2seq", dataclass=DiffusionSeq2SeqConfig)
class DiffusionSeq2SeqTask(TranslationTask):
    """Translation with diffusion models; everything else is fairseq's translation task."""

    cfg: DiffusionSeq2SeqConfig
    trains_diffusion = True   # what a diffusion model asks of its task

    def __init__(self, cfg: DiffusionSeq2SeqConfig, src_dict: Dictionary, tgt_dict: Dictionary) -> None:
        super().__init__(cfg, src_dict, tgt_dict)
        self._trimming: tuple[int, int] | None = None
        self._told: set[str] = set()

    def build_model(self, cfg, from_checkpoint: bool = False):
        """A diffusion model; with ``--truncate-source`` sources are cut to what it reads."""
        model = super().build_model(cfg, from_checkpoint)
        if not isinstance(model, DiffusionFairseqModel):
            raise InputError(f"task diffusion_seq2seq works with diffusion models, got a {type(model).__name__}; "
                             "give --arch ar_diffusion or diffuseq, or a checkpoint trained with it")
        longest = model.max_positions()[0]
        if self.cfg.truncate_source and longest is not None:
            self.cfg.max_source_positions = min(self.cfg.max_source_positions, longest)
        self._trimming = model.trimming()
        return model

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        """Load a split; says once how many of its pairs the model trims."""
        super().load_dataset(split, epoch, combine, **kwargs)
        if self._trimming is None or split in self._told:
            return
        self._told.add(split)
        data, (pair, source) = self.datasets[split], self._trimming
        sources = data.src_sizes - 1   # </s>
        longer = {f"sources have more than {source} words and are cut when they are decoded": sources > source}
        if data.tgt_sizes is not None:
            longer[f"pairs have more than {pair} words on both sides together and are trimmed when they are trained on or "
                   "scored"] = sources + data.tgt_sizes - 1 > pair
        for what, where in longer.items():
            if where.any():
                logger.warning("%s: %d of %d %s", split, where.sum(), len(where), what)

    def build_criterion(self, cfg, from_checkpoint: bool = False):
        """The configured criterion; fairseq's default, which cannot score a diffusion model, becomes ours."""
        if getattr(cfg, "_name", None) == "cross_entropy":
            logger.info("criterion cross_entropy does not apply to diffusion models; using diffusion_seq2seq")
            cfg = OmegaConf.structured(DiffusionCriterionConfig(_name="diffusion_seq2seq"))
        criterion = super().build_criterion(cfg)
        if not isinstance(criterion, DiffusionCriterion):
            raise InputError(f"the criterion of task diffusion_seq2seq must be diffusion_seq2seq, got {cfg._name}")
        return criterion

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        """As fairseq's, whose ``--amp`` knows CUDA alone: on a CPU it computes the losses in bfloat16 regions, too."""
        device = next(model.parameters()).device.type

        def amp_criterion(model, sample):
            with torch.autocast("cpu", torch.bfloat16, enabled=device == "cpu" and isinstance(optimizer, AMPOptimizer)):
                return criterion(model, sample)

        return super().train_step(sample, model, amp_criterion, optimizer, update_num, ignore_grad)

    def build_generator(self, models, args: Namespace, seq_gen_cls=None, extra_gen_cls_kwargs=None,
                        **unused) -> DiffusionGenerator:
        """Options come from the task's config, which fairseq fills from the command line when it generates.

        ``--eval-bleu-args '{"decode_steps": 5}'`` sets them for validation.
        """
        if len(models) != 1:
            raise InputError(f"diffusion decoding takes one checkpoint in --path, got {len(models)}; average them first")

        def value(name: str):
            chosen = getattr(args, name, None)
            return getattr(self.cfg, name) if chosen is None else chosen

        with input_errors():
            options = DecodeOptions(
                steps=value("decode_steps"), **self._step_list(value("step_list"), models[0]),
                patience=value("early_stop"), solver=str(value("solver")), length_beam=value("length_beam"),
                noise_beam=value("noise_beam"), rounding=str(value("rounding")), rounding_step=value("rounding_step"),
                noise_limit=value("noise_limit"), absorb_rate=value("absorb_rate"), drift=str(value("drift")),
                step_end=str(value("step_end")),
                final=str(value("final")), mbr_metric=str(value("mbr_metric")),
                mbr_smoothing=str(value("mbr_smoothing")), mbr_direction=str(value("mbr_direction")),
                candidate_tokens=value("candidate_tokens"), seed=value("decode_seed"),
                graphs=not value("no_cuda_graphs"),
                history=bool(getattr(args, "retain_iter_history", False)))
        candidates = options.length_beam * options.noise_beam
        if getattr(args, "nbest", 1) > candidates:
            logger.warning("--nbest %d, but only %d candidate(s): raise --noise-beam or --length-beam",
                           args.nbest, candidates)
        return DiffusionGenerator(self.target_dictionary, options)

    @staticmethod
    def _step_list(name: str, model) -> dict:
        """The options of ``--step-list``: a spacing, or the timesteps of a file."""
        if name in STEP_LISTS:
            return {"step_list": name}
        if not os.path.isfile(name):
            raise InputError(f"--step-list must be one of {', '.join(STEP_LISTS)} or a file, got {name!r}")
        return {"visited": tuple(check_visited(f"step list {name}", read_visited(name),
                                               model.network().config.diffusion_steps))}

    def build_dataset_for_inference(self, src_tokens, src_lengths, constraints=None, **unused) -> LanguagePairDataset:
        """The lines of fairseq-interactive, cut under ``--truncate-source`` as fairseq cuts those of a data folder."""
        if self.cfg.truncate_source:
            longest = self.cfg.max_source_positions
            src_tokens = [torch.cat([line[: longest - 1], line[-1:]]) if len(line) > longest else line
                          for line in src_tokens]
            src_lengths = [len(line) for line in src_tokens]
        if self._trimming is not None and (count := sum(length - 1 > self._trimming[1] for length in src_lengths)):
            logger.warning("%d of %d sources have more than %d words and are cut", count, len(src_lengths),
                           self._trimming[1])
        return LanguagePairDataset(
            src_tokens, src_lengths, self.source_dictionary, tgt_dict=self.target_dictionary,
            left_pad_source=self.cfg.left_pad_source, constraints=constraints)

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the task: digests of the dictionaries, whose order gives the ids their meaning."""
        return {**super().state_dict(), "dictionaries": self._digests()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Refuse a checkpoint of other dictionaries; those of the same size would translate into nonsense."""
        saved = state_dict.pop("dictionaries", {})
        for side, digest in self._digests().items():
            if saved.get(side, digest) != digest:
                raise InputError(f"the {side} dictionary in {self.cfg.data} is not the one that the checkpoint was "
                                 "trained with; give the data folder that holds the training dictionary")
        super().load_state_dict(state_dict)

    def _digests(self) -> dict[str, str]:
        return {"source": _digest(self.source_dictionary), "target": _digest(self.target_dictionary)}


def _digest(dictionary: Dictionary) -> str:
    return hashlib.sha256("\n".join(dictionary.symbols).encode()).hexdigest()[:16]
