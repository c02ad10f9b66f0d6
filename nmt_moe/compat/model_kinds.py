"""Detect models that belong to another task or another translation direction."""

import logging
from collections.abc import Callable
from typing import Any

from fairseq import models
from fairseq.models import FairseqEncoderDecoderModel, FairseqLanguageModel
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask

from nmt_moe.compat._replace import replace

logger = logging.getLogger(__name__)


def refuse_models_of_another_task() -> None:
    """Reject a language model in a translation task, and a translation model in language modelling.

    Reason: the language model causes a TypeError, or translates without reading the source. The
    translation model causes an AttributeError.
    """
    replace(models, "build_model", _building)


def _building(build: Callable) -> Callable:
    def build_model(cfg: Any, task: Any, *args: Any, **kwargs: Any) -> Any:
        check_model_kind(cfg, task)
        return build(cfg, task, *args, **kwargs)

    return build_model


def check_model_kind(cfg: Any, task: Any) -> None:
    """Check that a model is of the kind that its task requires.

    Raises:
        ValueError: if it is not. The message names the model, its kind and a remedy.
    """
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    kind = models.MODEL_REGISTRY.get(name) or models.ARCH_MODEL_REGISTRY.get(name)
    if kind is None:
        return
    if isinstance(task, TranslationTask) and issubclass(kind, FairseqLanguageModel):
        raise ValueError(
            f"the model `{name}` is a language model, which cannot translate. Train it with --task "
            "language_modeling and evaluate it with fairseq-eval-lm, or use a translation model."
        )
    if isinstance(task, LanguageModelingTask) and issubclass(kind, FairseqEncoderDecoderModel):
        raise ValueError(
            f"the model `{name}` translates; it is not a language model. Train it with --task "
            "translation and run fairseq-generate or fairseq-validate, or use a language model."
        )


def warn_of_other_directions() -> None:
    """Store the languages of `--task translation` in checkpoints, and warn if others are used.

    Reason: with one dictionary for both languages, an English-Dutch model silently accepts Dutch.
    """
    replace(FairseqTask, "state_dict", _saving_direction)
    replace(FairseqTask, "load_state_dict", _comparing_direction)


def _direction(task: FairseqTask) -> str | None:
    """Return the direction, such as en-nl, or None for other kinds of tasks."""
    return (
        f"{task.cfg.source_lang}-{task.cfg.target_lang}" if type(task) is TranslationTask else None
    )


def _saving_direction(make_state: Callable) -> Callable:
    def state_dict(task: FairseqTask) -> dict[str, Any]:
        direction = _direction(task)
        return {**make_state(task), **({} if direction is None else {"direction": direction})}

    return state_dict


def _comparing_direction(load: Callable) -> Callable:
    def load_state_dict(task: FairseqTask, state_dict: dict[str, Any]) -> None:
        trained, wanted = state_dict.get("direction"), _direction(task)
        if None not in (trained, wanted) and trained != wanted:
            logger.warning("the model was trained to translate %s, not %s", trained, wanted)
        load(task, state_dict)

    return load_state_dict
