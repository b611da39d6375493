"""The sources of `[reward] judges`: a template, a parser, and who answers."""

from collections.abc import Callable

from torchrft.config.job_config import JobConfig
from torchrft.config.reward_config import Judge as Entry
from torchrft.models.loader import load_config, load_tokenizer
from torchrft.models.vision import Vision
from torchrft.rewards.judge import Engine, EngineAnswers, Judge
from torchrft.rewards.judge_template import JudgeTemplate
from torchrft.rewards.verdicts import parser_of

MakeEngine = Callable[[Entry, int, Vision | None], Engine]


def build_judge(entry: Entry, config: JobConfig, make_engine: MakeEngine) -> Judge:
    """The judge of an entry of `[reward] judges`.

    `make_engine(entry, max_len, vision)` starts an engine that has the judge's weights.

    Raises ValueError for a template, parser, model, engine or server that cannot be used.
    """
    template = JudgeTemplate(entry.template, entry.name)
    where = f"judge {entry.name!r}"
    parser_of(entry.parser)
    for fault in entry.faults():
        raise ValueError(fault)
    if entry.engine == "remote":
        from torchrft.rewards.judge_server import ServerAnswers

        return Judge(entry, template, ServerAnswers(entry), config.training.seed)
    assert entry.pretrain is not None
    limit = getattr(load_config(entry.pretrain), "max_position_embeddings", entry.max_len)
    max_len = min(entry.max_len, limit)
    if entry.max_new_tokens >= max_len:
        raise ValueError(
            f"{where}: max_new_tokens = {entry.max_new_tokens} leaves no room for a prompt within "
            f"{max_len} tokens, the smaller of max_len and the model's own limit"
        )
    tokenizer = load_tokenizer(entry.pretrain)
    vision = None
    if template.shows_images:
        data = config.data
        vision = Vision.load(entry.pretrain, None, data.min_pixels, data.max_pixels)
    engine = make_engine(entry, max_len, vision)
    answers = EngineAnswers(engine, tokenizer, entry, max_len, vision)
    return Judge(entry, template, answers, config.training.seed)
