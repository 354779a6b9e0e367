"""The fairseq task ``diffusion_seq2seq``: translation data, diffusion losses, diffusion decoding."""

import logging
from argparse import Namespace
from dataclasses import dataclass, field

from fairseq.data import LanguagePairDataset
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from pydiffseq.decoding import MBR_DIRECTIONS, DecodeOptions
from pydiffseq.decoding.decode import FINALS, ROUNDINGS
from pydiffseq.diffusion import SOLVERS
from pydiffseq.diffusion.steps import ENDS
from pydiffseq.errors import input_errors
from pydiffseq.fairseq_plugin.criterion import DiffusionCriterionConfig
from pydiffseq.fairseq_plugin.generator import DiffusionGenerator

logger = logging.getLogger(__name__)
DEFAULTS = DecodeOptions()


@dataclass
class DiffusionSeq2SeqConfig(TranslationConfig):
    """Decoding options live here: fairseq takes the task's options from the command line when it generates."""

    left_pad_source: bool = field(default=False, metadata={"help": "pad the source on the left"})
    decode_steps: int = field(default=DEFAULTS.steps, metadata={"help": "network calls per candidate"})
    solver: ChoiceEnum(tuple(SOLVERS)) = field(default=DEFAULTS.solver, metadata={"help": "how a step is taken"})
    length_beam: int = field(default=DEFAULTS.length_beam, metadata={
        "help": "how many of the likeliest lengths to try (length_policy=predict)"})
    noise_beam: int = field(default=DEFAULTS.noise_beam, metadata={"help": "candidates per length"})
    rounding: ChoiceEnum(ROUNDINGS) = field(default=DEFAULTS.rounding, metadata={
        "help": "round every x0_hat to its nearest embedding (published: every)"})
    step_end: ChoiceEnum(ENDS) = field(default=DEFAULTS.step_end, metadata={
        "help": "end the step list at the clean state or at timestep 0 (zero, as published)"})
    final: ChoiceEnum(FINALS) = field(default=DEFAULTS.final, metadata={
        "help": "read the tokens off the last x0_hat or off the final state (published)"})
    mbr_direction: ChoiceEnum(MBR_DIRECTIONS) = field(default=DEFAULTS.mbr_direction, metadata={
        "help": "role of the judged candidate in MBR's sentence BLEU"})
    decode_seed: int = field(default=DEFAULTS.seed, metadata={"help": "seed of the decoding noise"})


@register_task("diffusion_seq2seq", dataclass=DiffusionSeq2SeqConfig)
class DiffusionSeq2SeqTask(TranslationTask):
    """Translation with diffusion models; everything else is fairseq's translation task."""

    cfg: DiffusionSeq2SeqConfig

    def build_criterion(self, cfg, from_checkpoint: bool = False):
        """The configured criterion; fairseq's default, which cannot score a diffusion model, becomes ours."""
        if getattr(cfg, "_name", None) == "cross_entropy":
            logger.info("criterion cross_entropy does not apply to diffusion models; using diffusion_seq2seq")
            cfg = DiffusionCriterionConfig(_name="diffusion_seq2seq")
        return super().build_criterion(cfg)

    def build_generator(self, models, args: Namespace, seq_gen_cls=None, extra_gen_cls_kwargs=None,
                        **unused) -> DiffusionGenerator:
        """Options come from the task's config: at generation fairseq fills it from the command line."""
        cfg = self.cfg
        with input_errors():
            options = DecodeOptions(
                steps=cfg.decode_steps, solver=str(cfg.solver), length_beam=cfg.length_beam,
                noise_beam=cfg.noise_beam, rounding=str(cfg.rounding), step_end=str(cfg.step_end),
                final=str(cfg.final), mbr_direction=str(cfg.mbr_direction), seed=cfg.decode_seed,
                history=bool(getattr(args, "retain_iter_history", False)))
        return DiffusionGenerator(self.target_dictionary, options)

    def build_dataset_for_inference(self, src_tokens, src_lengths, constraints=None, **unused) -> LanguagePairDataset:
        return LanguagePairDataset(
            src_tokens, src_lengths, self.source_dictionary, tgt_dict=self.target_dictionary,
            left_pad_source=self.cfg.left_pad_source, constraints=constraints)
