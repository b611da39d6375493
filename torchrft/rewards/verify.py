"""What of the rewards only loading can show: functions, their options, judges' templates."""

from collections.abc import Callable
from functools import partial

from torchrft.config.reward_config import Judge, Reward
from torchrft.rewards.registry import MissingPackage
from torchrft.rewards.rule_source import check_isolation, checked_rule
from torchrft.rewards.text import text_or_file


def reward_faults(reward: Reward) -> list[str]:
    """A sentence for each function, template and parser that cannot be used; starts nothing.

    Files of the user's own functions are imported.
    """
    checks: list[Callable[[], object]] = [
        *(partial(checked_rule, entry) for entry in reward.functions),
        partial(check_isolation, reward),
        *(partial(_check_judge, judge) for judge in reward.judges),
        *(
            partial(text_or_file, entry.chat_template, f'models "{entry.pretrain}": chat_template')
            for entry in reward.models
            if entry.chat_template is not None
        ),
    ]
    faults = []
    for check in checks:
        try:
            check()
        except MissingPackage:
            pass  # `unavailable` of the config says so: a dry run may lack it
        except ValueError as error:
            faults.append(f"[reward] {error}")
    return faults


def _check_judge(judge: Judge) -> None:
    from torchrft.rewards.judge_template import JudgeTemplate
    from torchrft.rewards.verdicts import parser_of

    JudgeTemplate(judge.template, judge.name)
    parser_of(judge.parser)
