"""From a name in the configuration to a reward function."""

import importlib
from typing import Protocol

from megatron_dsrl.errors import UserError
from megatron_dsrl.rewards.boxed import boxed


class RewardFunction(Protocol):
    """Judges one response. It may raise or take too long: the reward pool answers for it."""

    def __call__(self, response: str, answer: str, **options: object) -> float: ...


BUILT_IN: dict[str, RewardFunction] = {"boxed": boxed}


def reward_function(name: str) -> RewardFunction:
    """The function of a built-in name, or of a dotted path `package.module:function`.

    Raises:
        UserError: No such name, module or function.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise UserError(
            f"reward.function: unknown verifier {name!r}; use one of {sorted(BUILT_IN)} or a path "
            "`package.module:function`"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"reward.function: cannot import {module_name!r} ({error}); run where the module can be found, or add its "
            "folder to PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"reward.function: module {module_name!r} has no function {function_name!r}")
    return function
